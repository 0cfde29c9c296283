"""Executing one notebook, and remembering what came of it inside the executed copy."""

import copy
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from multiprocessing import current_process
from multiprocessing.connection import Connection
from pathlib import Path

import nbformat
import papermill
from nbclient import NotebookClient
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.engines import NBClientEngine, papermill_engines
from papermill.execute import ERROR_MARKER_TAG

from whalelib.course.kernels import FORKED, get_ready
from whalelib.course.notebooks import Notebook
from whalelib.files import replacing
from whalelib.ledger import read_rows
from whalelib.run import Settings, environment, figures_folder, sources_hash

RECORD = "whalelib_run"
OnCell = Callable[[int, int], None]  # told the number of the cell that begins, and how many there are
QUIET = ["--IPKernelApp.log_level=50"]  # kernels warn of unencrypted sockets, which are local and signed


@dataclass
class Outcome:
    """What came of one execution; kept in the executed notebook's metadata."""

    name: str
    number: str
    title: str
    key: str
    settings: dict[str, object]
    date: str
    seconds: float = 0.0
    error: dict[str, object] | None = None
    rows: list[dict[str, str]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every cell ran without error."""
        return self.error is None

    def why(self) -> str:
        """Return which cell failed and with which error, on one line."""
        where = f"cell {self.error['cell']}: " if self.error.get("cell") else ""
        return f"{where}{self.error['type']}: {self.error['message']}"


def key_of(notebook: Notebook, settings: Settings, fingerprint: str, ledger: object = "") -> str:
    """Return the hash of everything that an execution depends on: a notebook with the same key is up to date.

    That is the notebook's cells, the library's sources and the versions under it, the parameters, the data's
    fingerprint, the reference files' place, and the ledger rows that it shows.
    """
    requirements = importlib.metadata.requires("whalelib") or []
    names = sorted({re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line})
    parts = {
        "cells": [
            [cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in notebook.node.cells
        ],
        "code": sources_hash("course/"),
        "versions": [sys.version, *(f"{name} {importlib.metadata.version(name)}" for name in names)],
        "settings": {**asdict(settings), "data": settings.source},
        "data": fingerprint,
        "reference": os.environ.get("WHALE_REFERENCE", ""),
        "ledger": ledger,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def executed_path(build: Path, notebook: Notebook) -> Path:
    """Return where the executed copy of a notebook lies."""
    return build / "notebooks" / notebook.path.name


def load(build: Path, notebook: Notebook) -> Outcome | None:
    """Return what came of the last execution; None when there was none that finished."""
    try:
        node = nbformat.read(executed_path(build, notebook), as_version=4)
        return Outcome(**node.metadata[RECORD])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def up_to_date(outcome: Outcome | None, key: str) -> bool:
    """Whether an execution can stand: same key, no error, figures still there."""
    return bool(outcome and outcome.key == key and outcome.ok and all(map(os.path.exists, outcome.figures)))


class _LiveEngine(NBClientEngine):
    """Papermill's engine, telling which cell begins."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, on_cell=None, **options):
        begin = nb_man.cell_start

        def cell_start(cell, cell_index=None, **more):
            on_cell(cell_index + 1, len(nb_man.nb.cells))
            begin(cell, cell_index, **more)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("whalelib", _LiveEngine)
logging.getLogger("papermill").setLevel(logging.ERROR)


def execute(notebook: Notebook, settings: Settings, build: Path, key: str, on_cell: OnCell) -> Outcome:
    """Execute a notebook with papermill, write its executed copy, and return what came of it.

    No fault of the notebook raises: ``Outcome.error`` tells it. An interrupt leaves the earlier copy.
    """
    outcome = _begun(notebook, settings, key)
    results = build / "results" / f"{notebook.number}.csv"
    results.unlink(missing_ok=True)
    began, began_at = time.monotonic(), time.time()
    with (
        environment({"WHALE_BUILD": str(build), "WHALE_RESULTS": str(results.parent), **FORKED}),
        replacing(executed_path(build, notebook)) as part,
    ):
        try:
            _papermill(notebook, {**asdict(settings), "data": settings.source}, part, on_cell)
        except Exception as error:
            outcome.error = {"type": type(error).__name__, "message": first_line(error)}
        node = _read_executed(part, notebook)
        _judge(node, outcome)
        outcome.seconds = round(time.monotonic() - began, 1)
        outcome.rows = read_rows(results)
        drawn = figures_folder(settings).glob(f"{notebook.number}_*.png")
        outcome.figures = sorted(
            str(path.resolve()) for path in drawn if path.stat().st_mtime >= began_at - 1
        )
        node.metadata.get("papermill", {})["input_path"] = notebook.path.name
        _write(node, outcome, part)
    return outcome


def execute_apart(
    link: Connection, variables: dict[str, str], notebook: Notebook, settings: Settings, build: Path, key: str
) -> None:
    """Be a process that executes one notebook: tell ``link`` each cell's number, and at last the outcome.

    Args:
        link: to the course's process, which ends this one with SIGTERM.
        variables: the course's environment; that of the server which forks this process may be older.
        notebook, settings, build, key: as :func:`execute` takes them.
    """
    current_process().daemon = False  # its kernel is a process of it
    get_ready()
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to all; a kernel is stopped once
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(variables)
    with suppress(KeyboardInterrupt):
        link.send(execute(notebook, settings, build, key, lambda *cell: link.send(cell)))


def lost(
    notebook: Notebook, settings: Settings, build: Path, key: str, seconds: float, exit_code: int
) -> Outcome:
    """Return the outcome of an execution whose process ended before it could tell one, and write its copy."""
    outcome = _begun(notebook, settings, key)
    outcome.seconds = round(seconds, 1)
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with {exit_code}"
    message = f"the process that executed it {how}; if memory was short, give fewer JOBS"
    outcome.error = {"type": "ProcessLost", "message": message}
    with replacing(executed_path(build, notebook)) as part:
        _write(_read_executed(part, notebook), outcome, part)
    return outcome


def _begun(notebook: Notebook, settings: Settings, key: str) -> Outcome:
    shown = {**asdict(settings), "data": settings.public_data}
    now = datetime.now().astimezone().isoformat(timespec="minutes")
    return Outcome(notebook.name, notebook.number, notebook.title, key, shown, now)


def _write(node: nbformat.NotebookNode, outcome: Outcome, path: Path) -> None:
    node.metadata[RECORD] = asdict(outcome)
    nbformat.write(node, path)


def _papermill(
    notebook: Notebook, parameters: dict, output: Path, on_cell: Callable[[int, int], None]
) -> None:
    node = copy.deepcopy(notebook.node)
    node.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    known = papermill.inspect_notebook(node)
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"its parameters cell doesn't know the parameter(s) {', '.join(unknown)}")
    papermill.execute_notebook(
        node,
        str(output).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
        parameters,
        engine_name="whalelib",
        kernel_name="python3",
        progress_bar=False,
        cwd=notebook.path.parent,
        extra_arguments=QUIET,
        on_cell=on_cell,
    )


def _read_executed(path: Path, notebook: Notebook) -> nbformat.NotebookNode:
    for source in (path, notebook.path):
        try:
            node = nbformat.read(source, as_version=4)
        except (OSError, ValueError):
            continue
        node.cells = [cell for cell in node.cells if ERROR_MARKER_TAG not in _tags(cell)]
        if source != path:
            for cell in node.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
        return node
    message = f"`{notebook.path.name}` could not be read as a notebook."
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(message)])


def _judge(node: nbformat.NotebookNode, outcome: Outcome) -> None:
    """Put into ``outcome.error`` the first cell that failed (counted as in the source) or was not run."""
    own = [cell for cell in node.cells if "injected-parameters" not in _tags(cell)]
    code = [(place, cell) for place, cell in enumerate(own, start=1) if cell.cell_type == "code"]
    for place, cell in code:
        for output in cell.outputs:
            if output.output_type == "error" and not (outcome.ok and output.ename == "SystemExit"):
                message = first_line(output.evalue)
                outcome.error = {"cell": place, "type": output.ename, "message": message}
                return
    if not outcome.ok:
        begun = [place for place, cell in code if cell.metadata.get("papermill", {}).get("start_time")]
        if begun:
            outcome.error["cell"] = begun[-1]
        return
    work = [(place, cell) for place, cell in code if cell.source.strip() and "parameters" not in _tags(cell)]
    idle = [place for place, cell in work if cell.execution_count is None]
    if len(idle) == len(work):
        outcome.error = {"type": "NothingExecuted", "message": "no cell was executed"}
    elif idle:
        message = f"{len(idle)} cell(s) were not executed"
        outcome.error = {"cell": idle[0], "type": "Stopped", "message": message}


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def first_line(message: object) -> str:
    """Return the first line of an error's message."""
    lines = str(message).strip().splitlines()
    return lines[0][:300] if lines else ""


def tidy(node: nbformat.NotebookNode) -> None:
    """Leave of progress bars what a terminal shows at the end; of widgets, which need a kernel, nothing."""
    node.metadata.pop("widgets", None)
    CoalesceStreamsPreprocessor(enabled=True).preprocess(node, {})
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_remains(output)]


def _is_remains(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return not output.text.strip()
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def refresh(notebook: Notebook, on_cell: OnCell) -> None:
    """Execute a committed notebook with its own default parameters and replace its outputs, if none failed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file stays as it was.
    """
    node = nbformat.read(notebook.path, as_version=4)
    client = NotebookClient(
        node,
        timeout=None,
        kernel_name="python3",
        extra_arguments=QUIET,
        resources={"metadata": {"path": str(notebook.path.parent)}},
        on_cell_start=lambda cell, cell_index: on_cell(cell_index + 1, len(node.cells)),
    )
    client.execute()
    tidy(node)
    kept = {name: node.metadata[name] for name in ("kernelspec", "whalelib") if name in node.metadata}
    node.metadata = nbformat.from_dict({**kept, "language_info": {"name": "python"}})
    for cell in node.cells:
        tags = _tags(cell)
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    with replacing(notebook.path) as part:
        nbformat.write(node, part)
