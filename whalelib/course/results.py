"""The table of what the notebooks measured."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from whalelib.course.execute import Outcome
from whalelib.ledger import RESULT_COLUMNS, write_rows

SETTINGS = ("data", "profile", "edition", "seed", "device")


def shown(value: str) -> str:
    """Return a recorded value for display: rounded to four decimals or, below 0.001, four digits."""
    try:
        number = float(value)
    except ValueError:
        return value
    if number == int(number):
        return f"{number:.0f}" if value.lstrip("-").isdigit() else f"{number:.1f}"
    return f"{number:.4f}" if abs(number) >= 1e-3 else f"{number:.4g}"


def write_results(build: Path, outcomes: Iterable[Outcome]) -> Path:
    """Write ``results.csv``: every value with its data, profile, edition, seed, device and seconds."""
    path = build / "results.csv"
    write_rows(path, RESULT_COLUMNS, [row for outcome in outcomes for row in outcome.rows])
    return path


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the results as text, with the settings above when all rows share them."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    if not rows:
        return "No values were recorded."
    shared = [name for name in SETTINGS if len({row[name] for row in rows}) == 1]
    columns = ["notebook", "metric", "value", *(name for name in SETTINGS if name not in shared)]
    lines = [columns, *([{**row, "value": shown(row["value"])}[name] for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    heading = f"Results ({', '.join(f'{name} {rows[0][name]}' for name in shared)})" if shared else "Results"
    text = [
        "  ".join(
            cell.rjust(width) if i == 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([heading, text[0], "-" * max(map(len, text)), *text[1:]])
