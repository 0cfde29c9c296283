"""The tables and figures of chapter 2 for any data set, in the report's layout.

Arguments are columns of equal length, one entry a photograph; `split` holds "train" or "test".
"""

import numpy as np
import pandas as pd

SPLITS = ("train", "test")


def table_2_1(split) -> pd.DataFrame:
    """Photographs in each data set and their percentages (Table 2.1)."""
    counts = pd.Series(np.asarray(split)).value_counts().reindex(SPLITS, fill_value=0)
    numbers = [*counts, counts.sum()]
    return pd.DataFrame(
        {
            "Dataset": ["Train", "Test", "Total"],
            "Number of examples": numbers,
            "Percentage": [_percent(number, counts.sum()) for number in numbers],
        }
    )


def table_2_2(identity, last: int = 18) -> pd.DataFrame:
    """How many ids have n training photographs, all from `last` on in one row (Table 2.2).

    Like the report, it counts `new_whale` as one id; leave its photographs out to count individuals.
    """
    sizes = figure_2_1(identity)
    counts = sizes.set_index("photographs")["ids"].reindex(range(1, last), fill_value=0)
    rest = sizes.loc[sizes["photographs"] >= last, "ids"].sum()
    return pd.DataFrame(
        {"Examples": [*map(str, range(1, last)), f"{last}+"], "Occurrences": [*counts, int(rest)]}
    )


def table_2_3(split, width, height, least: float = 1.0) -> pd.DataFrame:
    """Sizes (pixels) that more than `least` percent of either data set have (Table 2.3)."""
    counts = figure_2_2(split, width, height).pivot_table(
        index=["width", "height"], columns="split", values="photographs", fill_value=0
    )
    counts = counts.reindex(columns=list(SPLITS), fill_value=0).astype(int)
    totals = counts.sum()
    common = counts[(100 * counts > least * totals).any(axis=1)]
    return pd.DataFrame(
        {
            "Width": common.index.get_level_values("width").astype(int),
            "Height": common.index.get_level_values("height").astype(int),
            "Train (%)": [_percent(number, totals["train"]) for number in common["train"]],
            "Test (%)": [_percent(number, totals["test"]) for number in common["test"]],
        }
    )


def table_2_4(split, gray) -> pd.DataFrame:
    """Gray and coloured photographs (Table 2.4).

    `gray` are booleans by either rule: the text's (all channels equal in every pixel) or the one behind the
    printed counts (no pixel with r != g and g != b). Only pixels can tell the two apart.
    """
    split, gray = np.asarray(split), np.asarray(gray, dtype=bool)
    rows = []
    for name in SPLITS:
        chosen = gray[split == name]
        total, grays = len(chosen), int(chosen.sum())
        rows.append(
            [name.title(), grays, _percent(grays, total), total - grays, _percent(total - grays, total)]
        )
    return pd.DataFrame(
        rows, columns=["Dataset", "Gray scale images", "Gray scale (%)", "Colored images", "Colored (%)"]
    )


def figure_2_1(identity) -> pd.DataFrame:
    """Class sizes (Fig. 2.1): `ids` with exactly `photographs` photographs, for every size that occurs."""
    sizes = pd.Series(np.asarray(identity, dtype=object)).value_counts()
    sizes = sizes.value_counts().sort_index()
    return pd.DataFrame({"photographs": sizes.index.astype(int), "ids": sizes.to_numpy(dtype=int)})


def figure_2_2(split, width, height) -> pd.DataFrame:
    """Image sizes (Fig. 2.2): `photographs` of each split with exactly this width and height (pixels)."""
    frame = pd.DataFrame(
        {"split": np.asarray(split), "width": np.asarray(width), "height": np.asarray(height)}
    )
    return frame.value_counts(sort=False).rename("photographs").reset_index()


def figure_2_3(split, contrast, bins: int = 10) -> pd.DataFrame:
    """Contrast (Fig. 2.3): photographs in `bins` equal steps between the extremes of each split.

    Returns:
        Columns split, low, high (grey levels; the last step includes its end), photographs.
    """
    split, contrast = np.asarray(split), np.asarray(contrast, dtype=float)
    parts = []
    for name in SPLITS:
        if (split == name).any():
            counts, edges = np.histogram(contrast[split == name], bins)
            parts.append(
                pd.DataFrame({"split": name, "low": edges[:-1], "high": edges[1:], "photographs": counts})
            )
    return pd.concat(parts, ignore_index=True)


def _percent(part: int, total: int) -> float:
    return round(100 * part / total, 2) if total else float("nan")
