"""The solutions as recipes: each made of the parts that the library names, on the same data, through the same loop."""
