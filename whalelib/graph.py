"""The report's runs and their notebooks as a graph of tasks, on one machine or many: `python -m whalelib.graph`.

Detectors, then crops, trainings (the third recipe's end with the mean of their last weights), answers of one network
and of several, and the notebooks that reproduce a solution. A finished task leaves a file in the cache, under a hash of
all that it depends on, and is not done again. The engine "local" does one task after another in this process; "ray"
gives them to a Ray cluster, or to this machine when RAY_ADDRESS names none. The machines share the project's folder,
the cache and the data.
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

import pandas as pd
import torch

from whalelib import keypoints, paper, weights
from whalelib.contest import Contest, ContestError, write_submission
from whalelib.data import Catalog, open_catalog
from whalelib.data.catalog import CatalogError
from whalelib.files import locked, replacing, sha256_of
from whalelib.ledger import ledger_path, project_root, read_rows
from whalelib.recipes import first, second, third
from whalelib.run import EDITIONS, ONLY_SHOWS, PROFILES, Run, Settings, place, sources_hash

RETRIES = 3  # of a task whose process or machine was lost
OBJECT_STORE = 80_000_000  # bytes: tasks hand each other files' names only
DETECTOR_OF = {"first": "masks", "second": "keypoints", "third": "landmarks"}
NOTEBOOKS = {  # that show what networks answer, alone and together
    "03_16": ("3.2/1",),
    "04_16": ("4.2/a",),
    "04_17": ("4.2/a",),
    "05_14": ("5.2/1", "5.2/2", "5.2/3"),
    "05_15": ("5.2/1",),
}
ENGINES = ("local", "ray")


class GraphError(ValueError):
    """The graph can't be made or run as asked."""


# A graph of tasks


@dataclass(frozen=True)
class Task:
    """A piece of work that depends on others.

    name: its own; work: a command, or a function that returns what is worth keeping (a dict of plain values; under
    "files" the paths of what it wrote: once they are gone or overwritten it has to be done again), or None; depends:
    plain values that decide the result, besides what the tasks in ``needs`` gave; gpus, cpus: that it takes, for an
    engine that counts them.

    Work that is lost half-way is begun again: what it does must stand that, as `train.fit` does with its checkpoints.
    """

    name: str
    work: Callable[[], Mapping | None] | tuple[str, ...]
    needs: tuple[str, ...] = ()
    depends: object = None
    gpus: float = 0
    cpus: float = 1


@dataclass(frozen=True)
class Outcome:
    """What came of a task: state is "done", "kept" (from before), "failed" or "skipped" (for want of another one)."""

    name: str
    state: str
    error: str = ""
    seconds: float = 0.0
    result: dict = field(default_factory=dict)


def in_order(tasks: Iterable[Task]) -> list[Task]:
    """Return tasks so that each comes after all it needs, otherwise as they came.

    Raises:
        GraphError: two of one name, one that needs an unknown task, or a circle.
    """
    tasks = list(tasks)
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GraphError(f"two tasks are called {twice[0]!r}")
    for task in tasks:
        if unknown := sorted({*task.needs} - {*names}):
            raise GraphError(f"{task.name} needs {unknown[0]!r}, which is no task")
    done, left = {}, tasks
    while left:
        ready = [task for task in left if all(name in done for name in task.needs)]
        if not ready:
            raise GraphError(f"tasks that need each other: {', '.join(task.name for task in left)}")
        done |= {task.name: task for task in ready}
        left = [task for task in left if task.name not in done]
    return list(done.values())


def keys(tasks: Iterable[Task]) -> dict[str, str]:
    """Return a hash for each task: of its name, what it depends on, and the hashes of the tasks it needs."""
    found: dict[str, str] = {}
    for task in in_order(tasks):
        parts = [task.name, task.depends, [found[name] for name in task.needs]]
        found[task.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return found


def marker(name: str, key: str) -> Path:
    """Return the file that says that a task was done under a hash, and what it gave."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return place("WHALE_CACHE", "data/cache") / "graph" / f"{plain}-{key}.json"


def kept(name: str, key: str) -> dict | None:
    """Return what a task gave when it was done under this hash; None when it was not, or its files are others now."""
    try:
        done = json.loads(marker(name, key).read_text())
        # The same tasks of other networks or settings write under the same names.
        whole = all(
            os.path.getsize(path) == size and sha256_of(path) == digest
            for path, (size, digest) in done["written"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return done if whole else None


def perform(task: Task, key: str, variables: Mapping[str, str] | None = None) -> dict:
    """Do a task in this process, and leave the file that says so.

    Args:
        task: the task.
        key: its hash.
        variables: of the environment of whoever asks.

    Returns:
        ``seconds`` and ``result``; or ``seconds`` and ``error``, on one line: no fault of the task is raised.
    """
    os.environ.update(variables or {})
    began = time.monotonic()
    try:
        result = dict((task.work() if callable(task.work) else command(task.work)) or {})
        written = {path: (os.path.getsize(path), sha256_of(path)) for path in result.get("files", [])}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return {"seconds": time.monotonic() - began, "error": f"{type(error).__name__}: {lines[0]}"}
    about = {"task": task.name, "seconds": round(time.monotonic() - began, 1), "result": result}
    about |= {"host": platform.node(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    about |= {"written": written}
    with replacing(marker(task.name, key)) as part:
        part.write_text(json.dumps(about, indent=1))
    return about


def command(words: Sequence[str]) -> None:
    """Run a command that ends with this process, however that ends (Linux; elsewhere it might go on).

    Raises:
        CalledProcessError: it failed.
    """
    linux = sys.platform == "linux"
    library = ctypes.CDLL(None) if linux else None
    set_death_signal = 1
    dies = partial(library.prctl, set_death_signal, int(signal.SIGTERM)) if linux else None
    subprocess.run(list(words), check=True, cwd=project_root(), preexec_fn=dies)


class Engine(Protocol):
    """Does tasks somewhere."""

    def start(self, task: Task, key: str) -> None:
        """Take on a task whose needs are done."""

    def wait(self) -> tuple[str, dict]:
        """Return the name of a task that ended, and what :func:`perform` gave."""

    def has_gpu(self) -> bool:
        """Say whether tasks may have a GPU."""


class Local:
    """The engine that does one task after another, here."""

    def __init__(self):
        self._tasks = deque()

    def start(self, task: Task, key: str) -> None:
        """Take on a task whose needs are done."""
        self._tasks.append((task, key))

    def wait(self) -> tuple[str, dict]:
        """Do the next task; return its name and what :func:`perform` gave."""
        task, key = self._tasks.popleft()
        return task.name, perform(task, key)

    def has_gpu(self) -> bool:
        """Say whether this machine has a GPU."""
        return torch.cuda.is_available()


class Ray:
    """The engine that gives tasks to a Ray cluster: that of RAY_ADDRESS, or one of this machine alone.

    A task whose process or machine is lost is begun again, ``retries`` times; one that raises is not. Each gets the
    environment's variables WHALE_*, and the GPUs it asks for.

    Args:
        retries: see above.

    Raises:
        GraphError: Ray is not installed, or there is no cluster at that address.
    """

    def __init__(self, retries: int = RETRIES):
        address = os.environ.get("RAY_ADDRESS")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not address:  # Ray would write one into the home folder
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        try:
            import ray  # noqa: PLC0415 - optional
        except ImportError as error:
            raise GraphError("the engine ray needs Ray: pip install -e '.[cluster]'") from error
        self.ray, self.retries, self._running = ray, retries, {}
        if not ray.is_initialized():
            here = {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
            try:
                ray.init(address or "local", **({} if address else here))
            except ConnectionError as error:
                raise GraphError(f"RAY_ADDRESS = {address!r}: {error}") from error

    def start(self, task: Task, key: str) -> None:
        """Take on a task whose needs are done."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= task.cpus and n.get("GPU", 0) >= task.gpus for n in nodes):
            tell(f"{task.name} waits: no machine has {task.cpus:g} cores and {task.gpus:g} GPUs")
        options = {"num_cpus": task.cpus, "num_gpus": task.gpus, "max_retries": self.retries}
        variables = {name: value for name, value in os.environ.items() if name.startswith("WHALE_")}
        remote = self.ray.remote(perform).options(name=task.name, **options)
        self._running[remote.remote(task, key, variables)] = task.name

    def wait(self) -> tuple[str, dict]:
        """Wait until a task ends; return its name and what :func:`perform` gave."""
        (ended,), _ = self.ray.wait(list(self._running), num_returns=1)
        name = self._running.pop(ended)
        try:
            return name, self.ray.get(ended)
        except self.ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [""]
            return name, {"seconds": 0.0, "error": f"{type(error).__name__}: {lines[0]}"}

    def has_gpu(self) -> bool:
        """Say whether the cluster has GPUs."""
        return self.ray.cluster_resources().get("GPU", 0) > 0


def tell(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def execute(tasks: Iterable[Task], engine: Engine, *, tell: Callable[[str], None] = tell) -> list[Outcome]:
    """Do all tasks that are not done yet, and what can be done when some fail.

    Args:
        tasks: of a graph.
        engine: does them.
        tell: told a line for each task that ends.

    Returns:
        An outcome for each task, each after those of the tasks it needs.

    Raises:
        GraphError: the tasks make no graph.
    """
    order = in_order(tasks)
    key = keys(order)
    found: dict[str, Outcome] = {}
    running: set[str] = set()

    def ended(outcome: Outcome) -> None:
        found[outcome.name] = outcome
        more = f", {outcome.error}" if outcome.error else "".join(f", {text}" for text in _shown(outcome))
        took = f" {outcome.seconds:.1f} s" if outcome.state in ("done", "failed") else ""
        tell(f"[{len(found)}/{len(order)}] {outcome.name} ... {outcome.state}{took}{more}")

    while len(found) < len(order):
        for task in order:
            if task.name in found or task.name in running:
                continue
            needed = [found.get(name) for name in task.needs]
            bad = [one.name for one in needed if one and one.state in ("failed", "skipped")]
            if bad:
                ended(Outcome(task.name, "skipped", f"for want of {', '.join(bad)}"))
            elif all(needed):
                if done := kept(task.name, key[task.name]):
                    ended(Outcome(task.name, "kept", seconds=done["seconds"], result=done["result"]))
                else:
                    engine.start(task, key[task.name])
                    running.add(task.name)
        if running:
            name, gave = engine.wait()
            running.remove(name)
            state = "failed" if "error" in gave else "done"
            ended(Outcome(name, state, gave.get("error", ""), gave["seconds"], gave.get("result", {})))
    return [found[task.name] for task in order]


def _shown(outcome: Outcome) -> list[str]:
    return [f"{name} {value}" for name, value in outcome.result.items() if name != "files"]


# The graph of the report


def plan(
    settings: Settings,
    patterns: Iterable[str] = (),
    *,
    gpus: int = 0,
    cpus: int = 1,
    extra: Path | None = None,
) -> list[Task]:
    """Return the tasks of some of the report's runs, with all they need, up to the notebooks that show them.

    Args:
        settings: of all of them.
        patterns: of runs, as `paper.select` takes them; default all. Without extra photographs, all is without the run
            that takes them.
        gpus: for each training; with more than one it is shared among them (torchrun). The other tasks that use
            networks get one, if any.
        cpus: for each of them.
        extra: folder of an earlier contest's photographs, see `paper.data_of`.

    Raises:
        PaperError: no such run, or no extra photographs for it.
        CatalogError: the data can't be used.
    """
    patterns, settings = list(patterns), replace(settings, data=settings.source)  # the same path everywhere
    run = Run("graph", settings)
    chosen = paper.select(patterns, profile=settings.profile)
    chosen = paper.ready(chosen, run.catalog, extra, asked=bool(patterns or extra))
    table = {row.name: row for row in paper.rows(settings.profile)}
    wanted = {name for row in chosen for name in (row.name, *row.needs)}
    recipes = {table[name].recipe for name in wanted}
    wanted |= {row.name for row in table.values() if row.recipe in {DETECTOR_OF.get(one) for one in recipes}}
    ours = [row for row in table.values() if row.name in wanted]

    code = sources_hash(*ONLY_SHOWS, "graph.py")
    about = {"settings": {**asdict(settings), "data": ""}, "code": code}
    data = {**about, "data": run.catalog.fingerprint}
    task = partial(Task, gpus=min(gpus, 1), cpus=cpus)
    tasks = []
    for row in ours:
        if row.recipe not in paper.RECIPES:
            depends = {**about, "weights": _given(row)}
            tasks.append(task(row.name, partial(train, row.name, settings), (), depends))
            continue
        folder = str(paper.extra_folder(run.catalog, extra)) if row.extra else None
        own = {**data, "extra": open_catalog(folder).fingerprint if folder else ""}
        crops = f"crops of the {row.recipe} recipe{', with extra photographs' * row.extra}"
        if crops not in {one.name for one in tasks}:
            needs = tuple(one.name for one in ours if one.recipe == DETECTOR_OF[row.recipe])
            tasks.append(task(crops, partial(locate_all, row.name, settings, folder), needs, own))
        work = partial(train, row.name, settings, folder)
        own |= {"choices": asdict(row.choices), "weights": _given(row)}
        tasks.append(
            Task(
                row.name,
                work if gpus <= 1 else _shared(row.name, settings, folder, gpus),
                (crops, *row.needs),
                own,
                gpus,
                cpus * max(gpus, 1),
            )
        )
    networks = [row for row in chosen if row.recipe in paper.RECIPES]
    if len(run.catalog.test):
        tasks += _answers(networks, settings, extra, data, task)
    tasks += _notebooks(networks, {one.name for one in tasks}, settings, run.catalog, task)
    return in_order(tasks)


def _given(row: paper.Row) -> str:
    """Return a hash of the ImageNet weights that a row's network starts from, "" without any."""
    name = keypoints.imagenet(row.network) if row.recipe == "keypoints" else row.network
    return weights.content(name) if name in weights.NAMES else ""


def _shared(name: str, settings: Settings, extra: str | None, gpus: int) -> tuple[str, ...]:
    """Return the command that trains on several GPUs of one machine."""
    ours = {**asdict(settings), "data": settings.source, "model": name} | ({"extra": extra} if extra else {})
    options = [word for key, value in ours.items() for word in (f"--{key}", str(value))]
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus))
    return (sys.executable, *start, "-m", "whalelib.paper", "run", *options)


def _answers(
    chosen: list[paper.Row], settings: Settings, extra: Path | None, data: dict, task: Callable
) -> list[Task]:
    """Return the tasks that name the queries' whales: by each network, and by all of a table together."""
    groups = {f"answer of {row.name}": [row] for row in chosen}
    for recipe in ("second", "third"):  # the report's two models of the first are no ensemble
        rows = [row for row in chosen if row.recipe == recipe]
        if len(rows) > 1:
            groups[f"ensemble of {paper.TABLES[recipe]}"] = rows
    found = []
    for name, rows in groups.items():
        names = tuple(row.name for row in rows)
        work = partial(answer, name, names, settings, str(extra) if extra else None)
        found.append(task(name, work, names, data))
    return found


def _notebooks(
    networks: list[paper.Row], names: set[str], settings: Settings, catalog: Catalog, task: Callable
) -> list[Task]:
    """Return the tasks that execute the notebooks of what is trained."""
    from whalelib.course.execute import key_of  # noqa: PLC0415 - it brings papermill
    from whalelib.course.notebooks import discover  # noqa: PLC0415

    found = []
    for number, shown in NOTEBOOKS.items():
        if not {*shown} <= {row.name for row in networks}:
            continue
        (book,) = discover(project_root() / "notebooks", number)
        ledger = [list(row.values()) for row in read_rows(ledger_path()) if row["notebook"] == number]
        depends = key_of(book, settings, catalog.fingerprint, ledger)
        table = shown[0].partition("/")[0]
        needs = [*shown, *(f"answer of {network}" for network in shown), f"ensemble of {table}"]
        work = partial(show, number, settings)
        found.append(task(f"notebook {number}", work, tuple(one for one in needs if one in names), depends))
    return found


# What the tasks do. All of it is in the cache afterwards, and fetched from there by whoever needs it.


def train(name: str, settings: Settings, extra: str | None = None) -> dict:
    """Train one of the report's networks, see `paper.trained`; return the images it saw, but of detectors."""
    row = _row(name, settings)
    made = paper.trained(row, paper.data_of(row, settings, extra=extra))
    return {"images": int(made.history["images"].sum())} if hasattr(made, "history") else {}


def locate_all(name: str, settings: Settings, extra: str | None = None) -> dict:
    """Find the flukes in all photographs that a network is trained on; return how many photographs there are."""
    row = _row(name, settings)
    run = paper.data_of(row, settings, extra=extra)
    paper.RECIPES[row.recipe].parts(run)
    return {"photographs": len(run.catalog)}


def answer(name: str, networks: Sequence[str], settings: Settings, extra: str | None = None) -> dict:
    """Write a submission by one trained network or several; return its file, and MAP@5 where labels are known."""
    rows = [_row(one, settings) for one in networks]
    runs = [paper.data_of(row, settings, extra=extra) for row in rows]
    trained = [paper.trained(row, run) for row, run in zip(rows, runs, strict=True)]
    recipe = rows[0].recipe
    if recipe == "first":
        given = first.answer(trained[0])
    elif recipe == "second":
        votes = [second.MODELS[row.name.partition("/")[2]][3] for row in rows]
        given = second.answer(trained, weights=votes)
    else:
        given = third.answer(trained)
    images = trained[0].parts.queries.table["image"]
    file = re.sub(r"\W+", "_", name) + ".csv"
    path = place("WHALE_BUILD", "build") / "submissions" / settings.label / file
    found = {"files": [str(write_submission(images, given.guesses, path).absolute())]}
    try:
        score = Contest.open(runs[0].catalog).score(path)
    except ContestError:
        return found
    return {**found, "MAP@5": round(score.all, 4)}


def show(number: str, settings: Settings) -> dict:
    """Execute a notebook of the course into the build folder, with its page; return its file.

    Raises:
        RuntimeError: a cell failed; the message says which.
    """
    from whalelib.course.execute import executed_path  # noqa: PLC0415
    from whalelib.course.notebooks import discover  # noqa: PLC0415
    from whalelib.course.runner import Course  # noqa: PLC0415

    folder, build = project_root() / "notebooks", place("WHALE_BUILD", "build").absolute()
    books = discover(folder, number)
    course = Course(discover(folder), books, settings, build)
    with locked(build):  # two at a time would each write the index without the other
        course.run()
    if course.failed:
        raise RuntimeError(course.failed[0].why())
    return {"files": [str(executed_path(build, books[0]))]}


def _row(name: str, settings: Settings) -> paper.Row:
    return next(row for row in paper.rows(settings.profile) if row.name == name)


# The command line


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m whalelib.graph", description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False
    )
    parser.add_argument(
        "--model", nargs="*", default=[], help='names of runs, as "4.2/a 5.2/*" (default: all)'
    )
    parser.add_argument("--data", default="world", help="world[:PRESET[@SEED]], kaggle, or a path")
    parser.add_argument("--profile", choices=PROFILES, default=PROFILES[0])
    parser.add_argument("--edition", choices=EDITIONS, default=EDITIONS[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--extra", type=Path, help="folder of an earlier contest's photographs, for 3.2/2")
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    parser.add_argument("--gpus", type=int, help="for a training (default: 1 where there are any)")
    parser.add_argument("--cpus", type=int, help="for a training and GPU (default: ray counts 1)")
    parser.add_argument("--retries", type=int, default=RETRIES, help="of a lost task, on ray")
    parser.add_argument("--list", action="store_true", help="print the tasks, and do nothing")
    return parser.parse_args(given)


def listing(tasks: Iterable[Task]) -> str:
    """Return a table of tasks: what each needs and takes, and whether it is done."""
    tasks = in_order(tasks)
    key = keys(tasks)
    table = [
        {
            "task": task.name,
            "state": "done" if kept(task.name, key[task.name]) else "to do",
            "gpus": task.gpus,
            "cpus": task.cpus,
            "needs": ", ".join(task.needs),
        }
        for task in tasks
    ]
    return pd.DataFrame(table).to_string(index=False)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 all is done, 1 a task failed, 2 it can't be met as asked."""
    chosen = _arguments(given)
    try:
        settings = paper.settings_of(chosen)
        engine = Ray(chosen.retries) if chosen.engine == "ray" and not chosen.list else Local()
        gpus = chosen.gpus
        if gpus is None:
            gpus = int(settings.device != "cpu" and engine.has_gpu())
        if chosen.cpus:
            os.environ["WHALE_CPUS"] = str(chosen.cpus)  # for the tasks, wherever they are done
        models, cpus = paper.words(chosen.model), chosen.cpus or 1
        tasks = plan(settings, models, gpus=gpus, cpus=cpus, extra=chosen.extra)
    except (GraphError, paper.PaperError, CatalogError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.list:
        print(listing(tasks))
        return 0
    try:
        outcomes = execute(tasks, engine)
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130
    bad = [one for one in outcomes if one.state in ("failed", "skipped")]
    if bad:
        print(f"\n{len(bad)} of {len(outcomes)} tasks are not done:")
        print("\n".join(f"  {one.name}: {one.state}, {one.error}" for one in bad))
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
