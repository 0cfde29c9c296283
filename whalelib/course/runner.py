"""Running the course: some notebooks at a time, telling how far it is, redoing only what is missing."""

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from whalelib.course import pages
from whalelib.course.execute import (
    Outcome,
    execute_apart,
    first_line,
    key_of,
    load,
    lost,
    up_to_date,
)
from whalelib.course.kernels import PROCESSES
from whalelib.course.notebooks import CourseError, Notebook, trainers_first
from whalelib.course.results import write_results
from whalelib.ledger import ledger_path, read_rows
from whalelib.run import Run, Settings

CORES = os.cpu_count() or 1
AT_ONCE = min(CORES + 2, 4)  # more than cores, as some wait for a network that another one trains


def jobs_of(asked: str, settings: Settings) -> int:
    """Return how many notebooks are executed at a time; "auto" is one where each needs the whole machine.

    Raises:
        CourseError: ``asked`` is neither "auto" nor a whole number from 1 up.
    """
    if asked == "auto":
        whole = settings.profile == "paper" or settings.device == "cuda"
        return 1 if whole or Run("jobs", settings).device == "cuda" else AT_ONCE
    if not (asked.isdecimal() and int(asked)):
        raise CourseError(f"jobs = {asked!r}: give auto or a whole number from 1 up")
    return int(asked)


def tell(line: str) -> None:
    """Print a line of progress."""
    print(("\r\033[K" if sys.stdout.isatty() else "") + line, flush=True)


def tell_meanwhile(text: str) -> None:
    """Show on a terminal what goes on, until the next line."""
    if sys.stdout.isatty():
        print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)


@dataclass
class Work:
    """One notebook that is being executed, in a process of its own: one that dies takes no other with it."""

    notebook: Notebook
    key: str
    process: BaseProcess
    began: float = field(default_factory=time.monotonic)
    cell: str = ""
    outcome: Outcome | None = None


@dataclass
class Course:
    """The chosen notebooks among all, to be executed into one build folder with one choice of settings."""

    everything: list[Notebook]
    chosen: list[Notebook]
    settings: Settings
    build: Path
    shows_ledger: bool = True
    done: list[Outcome] = field(default_factory=list)
    _known: dict[Notebook, Outcome | None] = field(default_factory=dict)
    _running: dict[Connection, Work] = field(default_factory=dict)

    def run(
        self, force: bool = False, jobs: int = 1, after: Callable[[Outcome, bool], None] | None = None
    ) -> None:
        """Execute what is missing. Whatever happens, the pages and results of what is done are kept.

        Args:
            force: execute also what is up to date.
            jobs: notebooks at a time; above 1 their kernels share the cores, unless OMP_NUM_THREADS is set.
            after: called after each notebook with its outcome and whether that is an earlier one that stands.

        Raises:
            CourseError: the data can't be opened.
        """
        fingerprint = self._open_data()
        self._known = {notebook: load(self.build, notebook) for notebook in self.everything}
        self._write_index()
        waiting, finished = deque(self.chosen if jobs == 1 else trainers_first(self.chosen)), []
        share = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, CORES // jobs))}
        try:
            while waiting or self._running or finished:
                while waiting and len(self._running) < jobs:
                    notebook = waiting.popleft()
                    key, earlier = self._key(notebook, fingerprint), self._known[notebook]
                    if not force and up_to_date(earlier, key):
                        finished.append((notebook, earlier, True))
                    else:
                        self._start(notebook, key, share | os.environ)
                if not finished:
                    tell(self._now())
                for notebook, outcome, kept in finished:
                    self._finish(notebook, outcome, kept)
                    if after:
                        after(outcome, kept)
                finished = self._wait()
        finally:
            for work in self._running.values():
                work.process.terminate()
            for work in self._running.values():
                work.process.join()
            order = [notebook.name for notebook in self.chosen]
            self.done.sort(key=lambda outcome: order.index(outcome.name))

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

    def _start(self, notebook: Notebook, key: str, variables: dict[str, str]) -> None:
        ours, theirs = PROCESSES.Pipe(duplex=False)
        arguments = (theirs, variables, notebook, self.settings, self.build, key)
        process = PROCESSES.Process(target=execute_apart, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that ours ends with the process
        self._running[ours] = Work(notebook, key, process)

    def _wait(self) -> list[tuple[Notebook, Outcome, bool]]:
        """Wait until something is finished, and return it."""
        finished = []
        while self._running and not finished:
            for link in wait(list(self._running)):
                work = self._running[link]
                try:
                    told = link.recv()
                except (EOFError, OSError):
                    link.close()
                    work.process.join()
                    del self._running[link]
                    finished.append((work.notebook, work.outcome or self._lost(work), False))
                    continue
                if isinstance(told, Outcome):
                    work.outcome = told
                else:
                    work.cell = " cell {}/{}".format(*told)
            tell_meanwhile(self._now(cells=True))
        return finished

    def _lost(self, work: Work) -> Outcome:
        seconds = time.monotonic() - work.began
        return lost(work.notebook, self.settings, self.build, work.key, seconds, work.process.exitcode)

    def _now(self, cells: bool = False) -> str:
        names = [work.notebook.number + work.cell * cells for work in self._running.values()]
        return f"running: {', '.join(names)}" if names else ""

    def _finish(self, notebook: Notebook, outcome: Outcome, kept: bool) -> None:
        try:
            if not kept or not pages.up_to_date(self.build, notebook):
                pages.write_page(self.build, notebook, outcome, self.everything)
        except Exception as error:
            outcome.error = outcome.error or {"type": "PageNotRendered", "message": first_line(error)}
        self.done.append(outcome)
        self._known[notebook] = outcome
        self._write_index()
        seconds = f"{outcome.seconds:.1f} s"
        came = f"up to date (took {seconds})" if kept else f"ok {seconds}"
        if not outcome.ok:
            came = f"FAILED {seconds}, {outcome.why()}"
        line = f"[{len(self.done)}/{len(self.chosen)}] {notebook.number} {notebook.title} ... {came}"
        tell("; ".join(filter(None, [line, self._now()])))

    def _write_index(self) -> None:
        pages.write_index(self.build, list(self._known.items()))
        write_results(self.build, [outcome for outcome in self._known.values() if outcome])

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
