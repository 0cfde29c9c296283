"""Table 3.2 and what stands behind it, from the training logs of the report's authors.

`rows` below are those of `read_log`, of one log or of several together.
"""

import re

import numpy as np
import pandas as pd

from whalelib.data import NEW_WHALE

CHECKPOINTS = pd.DataFrame(
    [
        ("First", 1, "2", 22_600),
        ("First", 2, "2.1", 66_600),
        ("First", 3, "2.1.1", 67_200),
        ("Second", 1, "4", 26_000),
        ("Second", 2, "4.4", 70_000),
        ("Second", 3, "4.4.2", 71_000),
    ],
    columns=["Model", "Step", "log", "iteration"],
)
"""The row of a log behind each row of Table 3.2: where the next step starts, or what was submitted."""

STARTS = [
    "log",
    "start",
    "line",
    "started",
    "batch",
    "rate",
    "from",
    "frozen",
    "least",
    "rows",
    "photographs",
]
VALUES = {
    "rate": float,
    "iteration": float,
    "epoch": float,
    "valid_loss": float,
    "valid_top1": float,
    "valid_top5": float,
    "valid_map5": float,
    "threshold": float,
    "train_loss": float,
    "train_top1": float,
    "train_map5": float,
    "batch_loss": float,
    "batch_top1": float,
    "batch_map5": float,
    "hours": int,
    "minutes": int,
}
ROWS = ["log", "start", "line", *(name for name in VALUES if name != "hours"), "superseded"]

_NUMBER = r"\s*(\d+\.\d+)\s*"
_ROW = re.compile(
    rf"{_NUMBER} {_NUMBER}k{_NUMBER}\|{_NUMBER * 5}\|{_NUMBER * 3}\|{_NUMBER * 3}\|\s*(\d+) hr (\d+) min\s*"
)
_HEADS = (
    re.compile(r"\s*start_time :(?P<started>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\s*"),
    re.compile(r"\s*batch_size :(?P<batch>\d+)\s*"),
    re.compile(r"\s*start from(?P<from>\d+), l_rate =(?P<rate>[\d.e-]+)\s*"),
    re.compile(r"freeze=(?P<frozen>\w+), batch_size=(?P<batch>\d+), min_num_class=(?P<least>\d+)\s*"),
    re.compile(r"\s*rate +iter +epoch +\|.*|-+|\s*"),
)


def read_log(text: str, log: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a training log of the first solution's code: every start of the program, and every row of values.

    Args:
        text: of the log.
        log: its name, for the column `log` and for messages.

    Returns:
        starts: log, start (1, 2, ...), line (in the file), started (date and time), batch (examples of four
        photographs each), rate, from (iteration), frozen, least (photographs of a whale); where a new model
        starts the log leaves these four out: NaN. rows: how many the start wrote. photographs: how many
        it trained on, to about a thousandth, as the column epoch implies.

        rows: log, start, line, rate, iteration, epoch; loss, Top@1 and Top@5 (percent) and MAP@5 (0 to 1) of
        the validation photographs (valid_), of the last 50 training batches (train_; no Top@5) and of the
        last batch (batch_); threshold (of `new_whale`, best on the validation photographs; for the training
        photographs it is 0.5); minutes since the start; superseded (a later row has this
        iteration or an earlier one). A
        start's first row has no training values yet: NaN. The losses are the cross entropy and both triplet losses.

    Raises:
        ValueError: lines of another form, or before the first start; the message lists them all.
    """
    starts, rows, odd = [], [], []
    for line, content in enumerate(text.splitlines(), start=1):
        row = _ROW.fullmatch(content)
        head = next((found for pattern in _HEADS if (found := pattern.fullmatch(content))), None)
        if head and "started" in head.groupdict():
            starts.append({"line": line, **head.groupdict()})
        elif row and starts:
            rows.append([len(starts), line, *row.groups()])
        elif head and (starts or not content.strip()):
            starts[-1:] = [start | head.groupdict() for start in starts[-1:]]
        else:
            odd.append(f"line {line}: {content.strip()[:80]}")
    if odd:
        raise ValueError(f"log {log}: {len(odd)} lines that cannot be read\n  " + "\n  ".join(odd))
    frame = _rows(rows, log)
    return _starts(starts, frame, log), frame


def _rows(rows: list, log: str) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["start", "line", *VALUES]).astype(VALUES)
    frame["iteration"] = (1000 * frame["iteration"]).round().astype(int)
    frame["minutes"] += 60 * frame["hours"]
    first = ~frame["start"].duplicated()
    frame.loc[first, [name for name in VALUES if name.startswith(("train_", "batch_"))]] = np.nan
    frame["superseded"] = frame["iteration"] >= frame["iteration"][::-1].cummin().shift()[::-1]
    return frame.assign(log=log)[ROWS]


def _starts(starts: list, rows: pd.DataFrame, log: str) -> pd.DataFrame:
    frame = pd.DataFrame(starts).reindex(columns=STARTS).assign(log=log, start=range(1, len(starts) + 1))
    numbers = ["batch", "rate", "from", "least"]
    frame[numbers] = frame[numbers].astype(float)
    parts = dict(iter(rows.groupby("start")))
    frame["rows"] = [len(parts.get(start, ())) for start in frame["start"]]
    for place, start in frame.iterrows():
        if start["rows"] > 1:
            ends = parts[start["start"]].iloc[[0, -1]]
            passed, epochs = ends["iteration"].diff().iloc[1], ends["epoch"].diff().iloc[1]
            frame.loc[place, "photographs"] = round(4 * start["batch"] * passed / epochs)
    return frame


def checkpoints(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what the logs say of each row of Table 3.2, with all their digits (Table 3.2, section 3.4.2).

    Returns:
        Columns Model, Step, log, iteration, minutes; train_loss, train_map5, train_top1, valid_map5, valid_top1,
        threshold as in `rows`; before, after: valid_map5 of the rows 200 iterations earlier and later; around:
        the median valid_map5 of all rows within 1,000 iterations but this; best: whether no row of the log has
        a higher valid_map5; last: valid_map5 of the log's last row; again: valid_map5 of the same weights on the
        same photographs when the next step starts from them (dropout stays on), NaN after step 3.
    """
    values = ["minutes", "train_loss", "train_map5", "train_top1", "valid_map5", "valid_top1", "threshold"]
    found = []
    for checkpoint in CHECKPOINTS.to_dict("records"):
        log, at = rows[rows["log"] == checkpoint["log"]].set_index("iteration"), checkpoint["iteration"]
        score = log["valid_map5"]
        follows = CHECKPOINTS.query("Model == @checkpoint['Model'] and Step == @checkpoint['Step'] + 1")[
            "log"
        ]
        again = rows[rows["log"].isin(follows) & (rows["iteration"] == at)]["valid_map5"]
        found.append(
            {
                **checkpoint,
                **log.loc[at, values],
                "before": score[at - 200],
                "after": score[at + 200],
                "around": score[abs(score.index - at) <= 1000].drop(at).median().round(4),
                "best": score[at] == score.max(),
                "last": score.iloc[-1],
                "again": again.iloc[0] if len(again) else np.nan,
            }
        )
    return pd.DataFrame(found).astype({"minutes": int})


def table_3_2(rows: pd.DataFrame) -> pd.DataFrame:
    """Return Table 3.2 from the logs, in the report's layout: two of its 42 cells differ from the printed ones."""
    found = checkpoints(rows)
    return pd.DataFrame(
        {
            "Model": found["Model"],
            "Step": found["Step"],
            "MAP@5 train": found["train_map5"],
            "MAP@5 validation": found["valid_map5"],
            "Top@1 train (%)": found["train_top1"].round(1),
            "Top@1 validation (%)": found["valid_top1"].round(1),
            "Training time": [f"{m / 60:.0f}h" if m >= 60 else f"{m}min" for m in found["minutes"]],
        }
    )


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the curves of the six logs behind Table 3.2, thinned.

    Step 1 keeps a row every 1,000 iterations, steps 2 and 3 every 400; within 1,000 iterations of the checkpoint
    all rows stay, and so does the last one.

    Returns:
        Columns Model, Step, iteration, and of `rows` valid_map5, threshold, train_loss, train_top1, train_map5.
    """
    parts = []
    for model, step, log, at in CHECKPOINTS.itertuples(index=False):
        part = rows[rows["log"] == log]
        every = part["iteration"] % (1000 if step == 1 else 400) == 0
        kept = every | (abs(part["iteration"] - at) <= 1000) | (part["iteration"] == part["iteration"].max())
        parts.append(part[kept].assign(Model=model, Step=step))
    names = ["valid_map5", "threshold", "train_loss", "train_top1", "train_map5"]
    return pd.concat(parts, ignore_index=True)[["Model", "Step", "iteration", *names]]


def stretches(curves: pd.DataFrame, parts: int = 4) -> pd.DataFrame:
    """Return the medians of equal stretches of each step: where a training went, peaks and dips left out.

    Args:
        curves: as `curves` returns them.
        parts: stretches a step, equal in iterations.

    Returns:
        Columns Model, Step, stretch (1, 2, ...), until (its last iteration), medians of train_loss, train_top1,
        train_map5, valid_map5, threshold.
    """
    names = ["train_loss", "train_top1", "train_map5", "valid_map5", "threshold"]
    found = []
    for (model, step), part in curves.groupby(["Model", "Step"]):
        stretch = pd.cut(part["iteration"], parts, labels=range(1, parts + 1))
        table = part.groupby(stretch, observed=True).agg(
            {"iteration": "max"} | dict.fromkeys(names, "median")
        )
        found.append(table.rename_axis("stretch").reset_index().assign(Model=model, Step=step))
    frame = pd.concat(found, ignore_index=True).rename(columns={"iteration": "until"})
    return frame.astype({"stretch": int})[["Model", "Step", "stretch", "until", *names]]


def carried_labels(extra: pd.DataFrame, playground: pd.DataFrame) -> pd.DataFrame:
    """Compare the labels of the extra training photographs with the playground contest's own (section 3.2.2).

    The two contests name whales differently. Labels carried over by whale give each of the playground's whales one
    label; labels guessed photograph by photograph would, now and then, give it two.

    Args:
        extra: Image, Id of the extra photographs.
        playground: Image, Id of that contest.

    Returns:
        A row each whale of the playground that has extra photographs: whale, photographs (the playground's),
        extra (how many of them), labels (how many different ones these have), label (the commonest).
    """
    both = playground.merge(extra, on="Image", how="left", suffixes=("_playground", ""))
    both = both[both["Id_playground"] != NEW_WHALE]
    found = both.groupby("Id_playground").agg(
        photographs=("Image", "size"),
        extra=("Id", "count"),
        labels=("Id", "nunique"),
        label=("Id", lambda ids: ids.mode().get(0)),
    )
    return found[found["extra"] > 0].rename_axis("whale").reset_index()
