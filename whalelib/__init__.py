"""The executable edition of the report, ordered as a photograph travels.

data -> locate -> augment -> models -> losses -> train -> identify -> metrics.
"""

__version__ = "0.1.0"
