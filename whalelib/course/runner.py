"""Running the course: one notebook after another, telling how far it is, redoing only what is missing."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from whalelib.course import pages
from whalelib.course.execute import Outcome, execute, first_line, key_of, load, up_to_date
from whalelib.course.notebooks import CourseError, Notebook
from whalelib.course.results import write_results
from whalelib.ledger import ledger_path, read_rows
from whalelib.run import Settings


class Line:
    """One line of progress that ends with what came of it; on a terminal it tells the cell meanwhile."""

    def __init__(self, text: str):
        self.text = f"{text} ... "
        self.live = sys.stdout.isatty()
        print(self.text, end="", flush=True)

    def cell(self, number: int, total: int) -> None:
        """Tell which cell runs."""
        if self.live:
            print(f"\r\033[K{self.text}cell {number}/{total}", end="", flush=True)

    def end(self, text: str) -> None:
        """Finish the line."""
        print(f"\r\033[K{self.text}{text}" if self.live else text, flush=True)


@dataclass
class Course:
    """The chosen notebooks among all, to be executed into one build folder with one choice of settings."""

    everything: list[Notebook]
    chosen: list[Notebook]
    settings: Settings
    build: Path
    shows_ledger: bool = True
    done: list[Outcome] = field(default_factory=list)

    def run(self, force: bool = False, after: Callable[[Outcome, bool], None] | None = None) -> None:
        """Execute what is missing. Whatever happens, the pages and results of what is done are kept.

        Args:
            force: execute also what is up to date.
            after: called after each notebook with its outcome and whether that is an earlier one that stands.

        Raises:
            CourseError: the data can't be opened.
        """
        fingerprint = self._open_data()
        try:
            for number, notebook in enumerate(self.chosen, start=1):
                line = Line(f"[{number}/{len(self.chosen)}] {notebook.number} {notebook.title}")
                outcome, kept = self._one(notebook, fingerprint, force, line)
                self.done.append(outcome)
                if after:
                    after(outcome, kept)
        finally:
            known = [(notebook, load(self.build, notebook)) for notebook in self.everything]
            pages.write_index(self.build, known)
            write_results(self.build, [outcome for _, outcome in known if outcome])

    def _open_data(self) -> str:
        from whalelib.data import open_catalog  # noqa: PLC0415

        began = time.monotonic()
        print(f"data: {self.settings.public_data}", flush=True)
        try:
            catalog = open_catalog(self.settings.source)
        except (ValueError, OSError) as error:
            raise CourseError(f"data {self.settings.data!r} can't be used: {error}") from error
        print(f"data: {len(catalog):,} photographs, {time.monotonic() - began:.1f} s", flush=True)
        if problems := catalog.report_problems():
            print(problems, flush=True)
        return catalog.fingerprint

    def _one(self, notebook: Notebook, fingerprint: str, force: bool, line: Line) -> tuple[Outcome, bool]:
        key = self._key(notebook, fingerprint)
        outcome = load(self.build, notebook)
        kept = not force and up_to_date(outcome, key)
        if not kept:
            outcome = execute(notebook, self.settings, self.build, key, line.cell)
        try:
            if not kept or not pages.up_to_date(self.build, notebook):
                pages.write_page(self.build, notebook, outcome, self.everything)
        except Exception as error:
            outcome.error = outcome.error or {"type": "PageNotRendered", "message": first_line(error)}
        seconds = f"{outcome.seconds:.1f} s"
        if outcome.ok:
            line.end(f"up to date (took {seconds})" if kept else f"ok {seconds}")
        else:
            line.end(f"FAILED {seconds}, {outcome.why()}")
        return outcome, kept

    def _key(self, notebook: Notebook, fingerprint: str) -> str:
        shown = read_rows(ledger_path()) if self.shows_ledger else []
        own = [list(row.values()) for row in shown if row["notebook"] == notebook.number]
        try:
            return key_of(notebook, self.settings, fingerprint, own)
        except ValueError:
            return ""  # not a notebook: executing it says so

    @property
    def failed(self) -> list[Outcome]:
        """The notebooks of this run that failed."""
        return [outcome for outcome in self.done if not outcome.ok]
