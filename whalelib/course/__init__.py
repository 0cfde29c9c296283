"""The course: executing the notebooks, their pages, and the results they measured.

``python -m whalelib.course --help``; ``make course`` calls it.
"""
