"""Table 4.3 and what stands behind it, from the training logs of the report's authors.

Each of the ten models has a log with a row every 100 iterations; for eight of them the terminal's output is there too
("screen" logs), with a row every ten and both scores of every validation. `logs` below are what `join` returns.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

MODELS = pd.Series(
    {
        "a": "resnet101.256x512",
        "b": "resnet101.pseudo.256x512",
        "c": "resnet101.512x512",
        "d": "resnet101.pseudo.512x512",
        "e": "seresnet101.256x512",
        "f": "seresnet101.pseudo.256x512",
        "g": "seresnet101.512x512",
        "h": "seresnet101.pseudo.512x512",
        "i": "seresnext101.256x512",
        "j": "seresnext101.pseudo.512x512",
    },
    name="log",
).rename_axis("Model")
"""The log, and the submission, of each model of Table 4.2."""
SCREEN = "screen-"

VALUES = {
    "rate": float,
    "iteration": float,
    "epoch": float,
    "valid_loss": float,
    "valid_top1": float,
    "valid_fifth": float,
    "valid_map5": float,
    "batch_loss": float,
    "batch_margin": float,
    "batch_new": float,
    "batch_known": float,
    "hours": int,
    "minutes": int,
}
STARTS = ["log", "start", "line", "batch", "rows"]
ROWS = ["log", "start", "line", *(name for name in VALUES if name != "hours"), "hard_ratio"]
SPAN = ["after", "until", "minutes_from", "minutes_to"]
BESTS = ["log", "start", "line", "map5", *SPAN]
VIEWS = ["log", "start", "line", "plain", "plain_threshold", "flipped", "flipped_threshold", *SPAN]

_N = r"\s*(\d+\.\d+)\s*"
_ROW = re.compile(
    rf"(?:\w+ )?{_N} {_N} {_N}\|{_N * 3}\({_N}\)\s*\|{_N * 3}\({_N}\)\s*\|\s*(\d+) hr (\d+) min\s*"
)
_BATCH = re.compile(r"batch_size = (\d+)|Namespace\(batch_size=(\d+),.*")
_RATIO = re.compile(r"change hard_ratio: ([\d.e-]+)")
_BEST = re.compile(r"save max valid!+ : (\d\.\d+)")
_VIEW = re.compile(r"(\d\.\d+) (\d\.\d+)")
_TOLD = re.compile(r"\d+ hr|save max|hard_ratio")
_HEAD = re.compile(
    r"\t(__file__|out_dir) +=.*|\t<additional comments>|\t  \.\.\..*|\*\* .* \*\*|(train|valid)_dataset : |<.*>|"
)


class Logs(NamedTuple):
    """What `read_log` finds in a log, or `join` in several."""

    starts: pd.DataFrame
    rows: pd.DataFrame
    bests: pd.DataFrame
    views: pd.DataFrame


def read_log(text: str, log: str) -> Logs:
    """Read a training log of the second solution's code.

    Args:
        text: of the log.
        log: its name, for the column `log` and for messages; "screen-" in front says that it is a terminal's output,
            of which much is neither row nor validation and is passed over.

    Returns:
        starts: log, start (1, 2, ...), line (in the file, of the batch size), batch (photographs), rows (how many the
        start wrote).

        rows: log, start, line, rate, iteration, epoch (0 to 99); of the last validation, the mean of the plain and
        the flipped photographs: valid_loss, valid_top1, valid_fifth (share with the right name in the fifth place),
        valid_map5; of the batch: batch_loss (focal and triplet loss), batch_margin (0.1 x the cross entropy of the
        margin head), batch_new and batch_known (MAP@5 of its new and its known whales at the threshold 0.5); minutes
        since the start; hard_ratio (share of classes in the focal loss). Before the first validation and in the
        first row the log writes zeros.

        bests: log, start, line, map5, and when: after the row of this iteration and until that of the next one (a row
        of the iteration of the validation itself follows it), minutes_from and minutes_to of these two rows.

        views (screen logs only): every validation: log, start, line, MAP@5 and best threshold of `new_whale` of the
        plain and of the flipped photographs, and when, as above.

    Raises:
        ValueError: lines of another form, values before the first start, or one view without the other; the message
            lists them all.
    """
    starts, rows, bests, views, odd = [], [], [], [], []
    ratio, screen = np.nan, log.startswith(SCREEN)
    for line, content in enumerate(text.splitlines(), start=1):
        place = [log, len(starts), line]
        if starts and (found := _ROW.fullmatch(content)):
            rows.append([*place, *found.groups(), ratio])
        elif found := _BATCH.fullmatch(content):
            starts.append([log, len(starts) + 1, line, int(found[1] or found[2])])
        elif starts and (found := _RATIO.fullmatch(content)):
            ratio = float(found[1])
        elif starts and (found := _BEST.fullmatch(content)):
            bests.append([*place, float(found[1])])
        elif screen and starts and (found := _VIEW.fullmatch(content)):
            views.append([*place, *map(float, found.groups())])
        elif not (_TOLD.search(content) is None if screen else _HEAD.fullmatch(content)):
            odd.append(f"line {line}: {content.strip()[:80]}")
    if len(views) % 2:
        odd.append(f"line {views.pop()[2]}: a validation of one view only")
    if odd:
        raise ValueError(f"log {log}: {len(odd)} lines that cannot be read\n  " + "\n  ".join(odd))
    frame = _rows(rows)
    both = [[*plain, *flipped[3:]] for plain, flipped in zip(views[::2], views[1::2], strict=True)]
    counts = frame["start"].value_counts()
    return Logs(
        pd.DataFrame([[*start, counts.get(start[1], 0)] for start in starts], columns=STARTS),
        frame,
        _timed(pd.DataFrame(bests, columns=BESTS[:4]), frame),
        _timed(pd.DataFrame(both, columns=VIEWS[:7]), frame),
    )


def join(logs: Sequence[Logs]) -> Logs:
    """Return several logs as one; a table without rows anywhere stays so."""
    tables = [[part for part in parts if len(part)] or parts[:1] for parts in zip(*logs, strict=True)]
    return Logs(*(pd.concat(parts, ignore_index=True) for parts in tables))


def _rows(rows: list) -> pd.DataFrame:
    names = ["log", "start", "line", *VALUES, "hard_ratio"]
    frame = pd.DataFrame(rows, columns=names).astype(VALUES)
    frame["minutes"] += 60 * frame["hours"]
    return frame.astype({"iteration": int, "epoch": int, "start": int, "line": int})[ROWS]


def _timed(found: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add the iterations and minutes of the rows of the same start before and after each line; NaN for none."""
    found = found.astype({"start": int, "line": int})
    for direction, names in (("backward", SPAN[::2]), ("forward", SPAN[1::2])):
        near = rows[["start", "line", "iteration", "minutes"]].set_axis(["start", "line", *names], axis=1)
        found = pd.merge_asof(found, near, on="line", by="start", direction=direction)
    return found[[*found.columns[:-4], *SPAN]]


def checkpoints(logs: Logs) -> pd.DataFrame:
    """Return what the logs say of each row of Table 4.3, with all their digits (Table 4.3, section 4.5).

    Returns:
        A row each model: Model, log; batch (of its last start); map5, the highest, and in which epoch; after, until,
        minutes_from, minutes_to: between which rows it was reached, those of the screen log where there is one (then
        until is its iteration); top1 of the same validation; found: whether top1 is certain: "yes" (the screen log's
        row of that iteration has it), "likely" (the next row's MAP@5 has the same three decimals) or "no" (top1 is
        NaN); plain, plain_threshold, flipped, flipped_threshold of that validation, NaN without a screen log;
        first_margin: what the margin head's loss starts with; last: MAP@5 of the last row; minutes of the last row.
    """
    found = []
    for model, log in MODELS.items():
        screen = SCREEN + log if (logs.rows["log"] == SCREEN + log).any() else log
        rows, best = _best(logs, screen)
        views = logs.views[logs.views["log"] == screen]
        view = views[(views["line"] < best["line"]) & (views["start"] == best["start"])][-1:]
        same = rows["iteration"] == best["until"]
        row = rows[same].iloc[0] if same.any() else None
        agrees = row is not None and round(best["map5"], 3) == row["valid_map5"]
        sure = "no" if not agrees else "yes" if screen != log else "likely"
        names = ["plain", "plain_threshold", "flipped", "flipped_threshold"]
        found.append(
            {
                "Model": model,
                "log": log,
                "batch": logs.starts.loc[logs.starts["log"] == screen, "batch"].iloc[-1],
                "map5": best["map5"],
                "epoch": rows.loc[rows["iteration"] <= best["after"], "epoch"].iloc[-1],
                **best[SPAN],
                "top1": row["valid_top1"] if agrees else np.nan,
                "found": sure,
                **(view[names].iloc[0] if len(view) else dict.fromkeys(names, np.nan)),
                "first_margin": rows["batch_margin"].iloc[0],
                "last": rows["valid_map5"].iloc[-1],
                "minutes": rows["minutes"].iloc[-1],
            }
        )
    return pd.DataFrame(found).astype(dict.fromkeys(SPAN, int)).round({"map5": 6, "plain": 6, "flipped": 6})


def _best(logs: Logs, log: str) -> tuple[pd.DataFrame, pd.Series]:
    """Return the rows of a log's last start, and its best validation."""
    rows, bests = (table[table["log"] == log] for table in (logs.rows, logs.bests))
    rows = rows[rows["start"] == rows["start"].max()]
    bests = bests[bests["start"] == rows["start"].iloc[0]]
    return rows, bests.loc[bests["map5"].idxmax()]


def table_4_3(logs: Logs) -> pd.DataFrame:
    """Return Table 4.3 from the logs, in the report's layout; the one cell that they cannot give is empty."""
    found = checkpoints(logs)
    return pd.DataFrame(
        {
            "Model": found["Model"],
            "MAP@5": found["map5"].round(3),
            "Top@1": found["top1"],
            "Batch size": found["batch"],
            "Training time": [half_hours(minutes) for minutes in found["minutes_from"]],
        }
    )


def half_hours(minutes: float) -> str:
    """Return a time as Table 4.3 prints it: rounded to half an hour, such as "29h30"."""
    halves = round(minutes / 30)
    return f"{halves // 2}h{30 * (halves % 2):02}"


def cells(printed: pd.DataFrame, derived: pd.DataFrame) -> pd.DataFrame:
    """Compare a printed table, cell by cell, with the one derived again.

    Args:
        printed: whose first column names the rows.
        derived: with the same rows and columns; NaN or None where a cell cannot be derived.

    Returns:
        A row each cell but the names: row, column, printed, derived, verdict ("equal", "different", "not checkable").

    Raises:
        ValueError: other rows or columns.
    """
    if list(printed) != list(derived) or printed.iloc[:, 0].tolist() != derived.iloc[:, 0].tolist():
        raise ValueError("the tables have different rows or columns")
    rows = []
    for place, name in enumerate(printed.iloc[:, 0]):
        for column in printed.columns[1:]:
            one, other = printed[column].iloc[place], derived[column].iloc[place]
            verdict = "not checkable" if pd.isna(other) else "equal" if one == other else "different"
            rows.append([name, column, one, other, verdict])
    return pd.DataFrame(rows, columns=["row", "column", "printed", "derived", "verdict"])


def schedule(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the learning rate and the hard ratio by epoch, as all logs show them (Figure 4.9, section 4.3.5).

    Args:
        rows: of `Logs`.

    Returns:
        A row each stretch: from, to (epochs from 0, both included), rate, hard_ratio, logs (that show it).

    Raises:
        ValueError: logs that differ.
    """
    shown = rows[["epoch", "rate", "hard_ratio"]].drop_duplicates().sort_values("epoch", ignore_index=True)
    if shown["epoch"].duplicated().any():
        raise ValueError(
            f"the logs differ in epoch {shown.loc[shown['epoch'].duplicated(), 'epoch'].iloc[0]}"
        )
    stretch = (shown[["rate", "hard_ratio"]].diff() != 0).any(axis=1).cumsum()
    found = shown.groupby(stretch).agg(
        **{"from": ("epoch", "min"), "to": ("epoch", "max")},
        rate=("rate", "first"),
        hard_ratio=("hard_ratio", "first"),
    )
    return found.assign(logs=rows["log"].nunique()).reset_index(drop=True)


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the curves of the ten models, one row an epoch of the last start of each log.

    Args:
        rows: of `Logs`; screen logs are left out.

    Returns:
        Columns Model, epoch; map5 and top1 of the last validation that the epoch's rows show, NaN in epoch 0; loss
        (focal and triplet) and margin, the means over the epoch's rows of the losses of single batches.
    """
    parts = []
    for model, log in MODELS.items():
        part = rows[rows["log"] == log]
        epochs = part[part["start"] == part["start"].max()].groupby("epoch")
        last = epochs[["valid_map5", "valid_top1"]].last()
        means = epochs[["batch_loss", "batch_margin"]].mean().round(3)
        last.loc[0] = np.nan
        parts.append(last.join(means).reset_index().assign(Model=model))
    names = {"valid_map5": "map5", "valid_top1": "top1", "batch_loss": "loss", "batch_margin": "margin"}
    return pd.concat(parts, ignore_index=True).rename(columns=names)[["Model", "epoch", *names.values()]]
