"""The ledger: results too long for the default run, one row a measured value.

``data/results/ledger.csv`` is written only by ``make ledger`` and by commands that call
:func:`append_ledger`. A notebook shows its rows beside what it measures live (``run.ledger()``).
"""

import csv
import math
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from whalelib.files import locked, replacing

if TYPE_CHECKING:
    import pandas as pd

    from whalelib.run import Run

RESULT_COLUMNS = ("notebook", "metric", "value", "data", "profile", "edition", "seed", "device", "seconds")
LEDGER_COLUMNS = (
    "notebook",
    "metric",
    "value",
    "command",
    "commit",
    "data",
    "profile",
    "edition",
    "seed",
    "device",
    "seconds",
    "date",
)


class LedgerError(ValueError):
    """Rows that may not enter the ledger, or a state of the project in which none may."""


def project_root() -> Path:
    """Return the checkout that the package lies in, else the working folder."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / "pyproject.toml").exists() else Path.cwd()


def ledger_path() -> Path:
    """Return the ledger's place in the project."""
    return project_root() / "data" / "results" / "ledger.csv"


def measured(value: object, metric: str) -> float | int | str:
    """Return ``value`` as a plain number or text that may be recorded.

    Raises:
        ValueError: it is NaN, infinite or empty, or no single number or text.
    """
    with suppress(AttributeError, ValueError, RuntimeError):
        value = value.item()  # a NumPy or torch scalar; larger arrays raise and are refused below
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    raise ValueError(f"{metric!r}: a result is a finite number or a text, not {value!r}")


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write ``rows`` as CSV with ``columns``, atomically."""
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV as written by :func:`write_rows`; none when there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_ledger(path: Path | None = None) -> "pd.DataFrame":
    """Return the ledger as a frame with ``LEDGER_COLUMNS``, maybe without rows; values stay as written."""
    import pandas as pd  # noqa: PLC0415

    frame = pd.DataFrame(read_rows(path or ledger_path()), columns=list(LEDGER_COLUMNS))
    for column in ("seed", "seconds"):
        frame[column] = pd.to_numeric(frame[column])
    return frame


def commit_of(folder: Path | None = None, allow_dirty: bool = False) -> str:
    """Return the short commit that ``folder`` is at, with ``+dirty`` appended when its files differ.

    The ledger and what is kept beside it may differ: they do after every entry.

    Raises:
        LedgerError: no git repository, or uncommitted changes without ``allow_dirty``.
    """
    folder = folder or project_root()

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
        if run.returncode:
            raise LedgerError(f"a ledger row names its commit, but git says: {run.stderr.strip()}")
        return run.stdout

    commit = git("rev-parse", "--short=12", "HEAD").strip()
    changed = git("status", "--porcelain", "--", ".", ":(exclude)data/results").splitlines()
    if changed and not allow_dirty:
        listed = "\n".join(f"  {line}" for line in changed[:10])
        raise LedgerError(
            f"{len(changed)} uncommitted change(s): a ledger row must say which code gave it.\n{listed}\n"
            "Commit first, or pass ALLOW_DIRTY=1 to mark the rows '+dirty'."
        )
    return commit + ("+dirty" if changed else "")


def rows_of(
    run: "Run", values: Mapping[str, float], *, command: str, seconds: float, **others: object
) -> list[dict[str, object]]:
    """Return the ledger's rows of what a command measured with a run's settings.

    Args:
        run: whose notebook, settings and device they carry.
        values: by metric.
        command: that repeats the measurement, without data, edition and seed, which have columns of their own.
        seconds: that it took.
        **others: columns in place of the run's.
    """
    settings = run.settings
    about = {"notebook": run.notebook, "command": command, "data": settings.public_data}
    about |= {"profile": settings.profile, "edition": settings.edition, "seed": settings.seed}
    about |= {"device": run.device_name, "seconds": round(seconds, 1), **others}
    return [{**about, "metric": metric, "value": value} for metric, value in values.items()]


def append_ledger(
    rows: Iterable[Mapping[str, object]], path: Path | None = None, allow_dirty: bool = False
) -> int:
    """Append measured values to the ledger, atomically, and return how many.

    Args:
        rows: mappings with every one of ``LEDGER_COLUMNS``; ``commit`` and ``date`` are filled in when
            absent. ``notebook`` is a notebook's number, or a command's name for values measured elsewhere.
        path: the ledger's CSV; default ``data/results/ledger.csv``.
        allow_dirty: let uncommitted changes pass, marking the commit ``+dirty``.

    Raises:
        LedgerError: a column is missing or unknown, a value is no finite number or text, ``data`` is an
            absolute path, or the working tree has uncommitted changes. Nothing is written then.
    """
    path = path or ledger_path()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    commit = None
    checked = []
    for number, given in enumerate(rows, start=1):
        row = {"date": now, **given}
        if "commit" not in row:
            commit = row["commit"] = commit or commit_of(allow_dirty=allow_dirty)
        missing = [column for column in LEDGER_COLUMNS if row.get(column) in (None, "")]
        unknown = sorted(set(row) - set(LEDGER_COLUMNS))
        if missing or unknown:
            raise LedgerError(f"row {number}: columns missing {missing}, unknown {unknown}")
        if Path(str(row["data"])).is_absolute():
            raise LedgerError(f"row {number}: data is an absolute path ({row['data']}): give its public name")
        try:
            row["value"] = measured(row["value"], str(row["metric"]))
        except ValueError as error:
            raise LedgerError(f"row {number}: {error}") from None
        checked.append(row)
    with locked(path.parent):
        present = read_rows(path)
        if present and tuple(present[0]) != LEDGER_COLUMNS:
            raise LedgerError(f"{path}: columns {list(present[0])}, expected {list(LEDGER_COLUMNS)}")
        write_rows(path, LEDGER_COLUMNS, [*present, *checked])
    return len(checked)
