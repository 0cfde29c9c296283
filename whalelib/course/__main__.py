"""The course's command line: ``python -m whalelib.course {run,figures,ledger,refresh,order}``.

Exit code: 0 all went well, 1 a notebook failed, 2 the request can't be met, 130 interrupted.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from whalelib.course.execute import Outcome, refresh
from whalelib.course.notebooks import CourseError, discover, trainers_first
from whalelib.course.results import table
from whalelib.course.runner import Course, jobs_of, tell, tell_meanwhile
from whalelib.ledger import LedgerError, append_ledger, commit_of, ledger_path, project_root, read_rows
from whalelib.run import Settings, environment, place

SAME_VALUE = ("notebook", "metric", "data", "profile", "edition", "seed", "device")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m whalelib.course", description="Execute the course's notebooks.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "run": "execute what is missing, write pages, figures and the results table",
        "figures": "the same, ending with the list of figures",
        "ledger": "execute apart from the course and append what was measured to the ledger",
        "refresh": "execute the committed notebooks in place with their default parameters",
        "order": "print the notebooks' paths in the order to start several at a time",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--notebooks", default="", help='patterns, as "02_* 01_02" (default: all)')
        command.add_argument(
            "--folder", type=Path, default=project_root() / "notebooks", help="where they are"
        )
        if name in ("refresh", "order"):
            continue
        default = Settings()
        command.add_argument("--data", default=default.data, help="world[:PRESET[@SEED]], kaggle, or a path")
        command.add_argument("--profile", default=default.profile, help="lab, small or paper")
        command.add_argument("--edition", default=default.edition, help="as_described or as_shipped")
        command.add_argument("--seed", default=str(default.seed), help="a whole number; ledger: also 0,1,2")
        command.add_argument("--device", default=default.device, help="auto, cpu or cuda")
        command.add_argument(
            "--build", type=Path, default=place("WHALE_BUILD", "build"), help="output folder"
        )
        command.add_argument("--force", action="store_true", help="execute also what is up to date")
        if name in ("run", "figures"):
            command.add_argument("--jobs", default="auto", help="notebooks executed at a time")
        if name == "ledger":
            command.add_argument("--allow-dirty", action="store_true", help="mark rows of uncommitted code")
            command.add_argument("--ledger", type=Path, default=ledger_path(), help="the ledger's CSV")
    return parser.parse_args(given)


def _settings(arguments: argparse.Namespace) -> list[Settings]:
    """Return one choice of settings for each seed asked for."""
    seeds = arguments.seed.split(",") if arguments.command == "ledger" else [arguments.seed]
    for seed in seeds:
        if not seed.strip().isdecimal():
            raise CourseError(f"seed = {arguments.seed!r}: give a whole number from 0 up")
    other = (arguments.data, arguments.profile, arguments.edition)
    try:
        return [Settings(*other, int(seed), arguments.device) for seed in seeds]
    except ValueError as error:
        raise CourseError(str(error)) from error


def _near(path: Path) -> str:
    """Return a path as a reader would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _close(course: Course) -> int:
    """Print what failed, and return the exit code."""
    if course.failed:
        print(f"\n{len(course.failed)} of {len(course.done)} notebooks failed:")
    for outcome in course.failed:
        print(
            f"  {outcome.name}: {outcome.why()}\n    see {_near(course.build / 'html' / outcome.name)}.html"
        )
    return 1 if course.failed else 0


def _run(arguments: argparse.Namespace) -> int:
    everything = discover(arguments.folder)
    chosen = discover(arguments.folder, arguments.notebooks)
    (settings,) = _settings(arguments)
    course = Course(everything, chosen, settings, arguments.build.absolute())
    course.run(arguments.force, jobs_of(arguments.jobs, settings))
    if arguments.command == "figures":
        drawn = [_near(Path(path)) for outcome in course.done for path in outcome.figures]
        print("\n" + "\n".join([f"{len(drawn)} figures, each with its data as CSV:", *drawn]))
    else:
        print("\n" + table(course.done))
        print(f"\nResults: {_near(course.build / 'results.csv')}")
    print(f"Pages: {_near(course.build / 'html' / 'index.html')}")
    return _close(course)


def _ledger(arguments: argparse.Namespace) -> int:
    everything = discover(arguments.folder)
    chosen = discover(arguments.folder, arguments.notebooks)
    choices = _settings(arguments)
    commit = commit_of(project_root(), arguments.allow_dirty)
    code = 0
    for settings in choices:
        print(f"\n{settings}")
        build = arguments.build.absolute() / "ledger" / settings.label
        course = Course(everything, chosen, settings, build, shows_ledger=False)

        def enter(outcome: Outcome, kept: bool, settings: Settings = settings) -> None:
            if not outcome.ok:
                return
            rows = outcome.rows
            if kept:  # an earlier run was cut off between measuring and entering
                entered = {tuple(row[name] for name in SAME_VALUE) for row in read_rows(arguments.ledger)}
                rows = [row for row in rows if tuple(row[name] for name in SAME_VALUE) not in entered]
            if commit_of(project_root(), arguments.allow_dirty) != commit:
                raise LedgerError(
                    "the code changed while it was measured; the same command goes on from there"
                )
            more = {"command": _command(outcome, settings), "commit": commit}
            added = append_ledger([{**row, **more} for row in rows], arguments.ledger)
            print(f"      {added} values entered" + (", the others were there already" if kept else ""))

        with environment({"WHALE_FIGURES": str(build / "figures")}):
            course.run(arguments.force, after=enter)
        code = max(code, _close(course))
    print(f"\nLedger: {_near(arguments.ledger)}")
    return code


def _command(outcome: Outcome, settings: Settings) -> str:
    """Return the command that repeats a measurement, without this machine's folders."""
    parts = {"NOTEBOOKS": outcome.number, "DATA": settings.public_data, "PROFILE": settings.profile}
    parts |= {"EDITION": settings.edition, "SEED": str(settings.seed), "DEVICE": settings.device}
    return "make ledger " + " ".join(f"{name}={shlex.quote(value)}" for name, value in parts.items())


def _refresh(arguments: argparse.Namespace) -> int:
    failed = 0
    chosen = discover(arguments.folder, arguments.notebooks)
    for number, notebook in enumerate(chosen, start=1):
        line = f"[{number}/{len(chosen)}] {notebook.number} {notebook.title} ... "
        began = time.monotonic()
        try:
            refresh(notebook, lambda cell, total, line=line: tell_meanwhile(f"{line}cell {cell}/{total}"))
        except Exception as error:
            failed += 1
            tell(
                f"{line}FAILED, left as it was: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
            )
        else:
            seconds = time.monotonic() - began
            tell(f"{line}ok {seconds:.1f} s, {notebook.path.stat().st_size / 1e3:.0f} kB")
    return 1 if failed else 0


def _order(arguments: argparse.Namespace) -> int:
    chosen = discover(arguments.folder, arguments.notebooks)
    print("\n".join(_near(notebook.path) for notebook in trainers_first(chosen)))
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _arguments(given)
    commands = {"run": _run, "figures": _run, "ledger": _ledger, "refresh": _refresh, "order": _order}
    try:
        return commands[arguments.command](arguments)
    except (CourseError, LedgerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
