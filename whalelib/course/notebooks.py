"""Which notebooks there are, and what each says of itself."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import nbformat

NAME = re.compile(r"(?P<number>(\d\d|[A-Z])_\d\d)_(?P<slug>[a-z0-9_]+)")


class CourseError(Exception):
    """The course can't begin as asked."""


@dataclass(frozen=True)
class Notebook:
    """One notebook of the course, ``NN_MM_slug.ipynb``."""

    path: Path

    @property
    def name(self) -> str:
        """File name without ``.ipynb``."""
        return self.path.stem

    @property
    def number(self) -> str:
        """Chapter and place in it, as "02_01"."""
        match = NAME.fullmatch(self.name)
        return match["number"] if match else self.name

    @cached_property
    def node(self) -> nbformat.NotebookNode:
        """The notebook as read; raises ValueError when the file is none."""
        try:
            return nbformat.read(self.path, as_version=4)
        except Exception as error:
            raise ValueError(f"{self.path.name} is no notebook: {error}") from error

    @property
    def about(self) -> dict[str, object]:
        """The metadata key ``whalelib``: title, section, minutes, claims and so on; empty when unreadable."""
        try:
            return dict(self.node.metadata.get("whalelib", {}))
        except ValueError:
            return {}

    @property
    def title(self) -> str:
        """The title it gives itself, else its file name in words."""
        match = NAME.fullmatch(self.name)
        return str(self.about.get("title") or (match["slug"] if match else self.name).replace("_", " "))

    def cells(self) -> list[nbformat.NotebookNode]:
        """Its code cells that hold code."""
        return [cell for cell in self.node.cells if cell.cell_type == "code" and cell.source.strip()]


def discover(folder: Path, patterns: str = "") -> list[Notebook]:
    """Return the notebooks of ``folder`` in order, those that match one of the space-separated ``patterns``.

    A pattern is a file name without ``.ipynb`` or a number, with ``*`` and ``?``: ``02_*``, ``01_02``.

    Raises:
        CourseError: there are none, or a pattern matches none.
    """
    found = [Notebook(path) for path in sorted(folder.glob("*.ipynb")) if not path.name.startswith(".")]
    if not found:
        raise CourseError(f"no notebooks in {folder}")
    wanted = patterns.replace(",", " ").split() or ["*"]
    chosen = set()
    for pattern in wanted:
        pattern = pattern.removesuffix(".ipynb").removeprefix("notebooks/")  # noqa: PLW2901
        hits = {
            book for book in found if fnmatchcase(book.name, pattern) or fnmatchcase(book.number, pattern)
        }
        if not hits:
            names = "\n  ".join(book.name for book in found)
            raise CourseError(f"no notebook matches {pattern!r}; there are\n  {names}")
        chosen |= hits
    return [book for book in found if book in chosen]


def trainers_first(books: list[Notebook]) -> list[Notebook]:
    """Return the notebooks in the order to start several at a time: first those that train what others need.

    Their metadata say what, under ``trains``. Started late, one would keep all that wait for it from using the cores.
    """
    return sorted(books, key=lambda book: not book.about.get("trains"))
