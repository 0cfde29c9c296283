"""The sets that the report's authors curated after it: corrected labels, a standard set and a hard one.

They looked through the contest's training photographs, put right labels that were wrong, took out what shows no whale
or two, and set apart what is hard to tell: occluded, far away, at a poor angle, or with writing in it. Their lists
(CC0) are no part of this project; `curate` applies them to the contest's labels, in the order of the authors' script.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from whalelib.data.catalog import refusal
from whalelib.data.layouts import NEW_WHALE, Problems
from whalelib.postprocess import complete_lines

NEW_ID = "new_id"
"""What the list of wrong labels says of a photograph whose whale has no other."""


class Lists(NamedTuple):
    """The authors' lists, one table each, with the rows as they stand in the files.

    Attributes:
        not_new: Image, Id, Status ("not_new" or "new": whether the photograph of `new_whale` shows the whale Id).
        mislabeled: Image, Correct (an id, or "new_id").
        duplicate_images: Keep, Remove: two files of one photograph.
        duplicate_ids: Duplicates (ids parted by a space), Verdict (true: they are one whale).
        not_valid: Image, of photographs to take out.
        hard: Image.
        texted: Image, of photographs with writing in them.
    """

    not_new: pd.DataFrame
    mislabeled: pd.DataFrame
    duplicate_images: pd.DataFrame
    duplicate_ids: pd.DataFrame
    not_valid: pd.DataFrame
    hard: pd.DataFrame
    texted: pd.DataFrame


class Curated(NamedTuple):
    """What `curate` returns, each with the columns Image, Id in the order of the labels.

    Attributes:
        standard: photographs to train and test on.
        hard: those of the lists of hard photographs and of photographs with writing.
        removed: photographs taken out, with the labels that they had.
    """

    standard: pd.DataFrame
    hard: pd.DataFrame
    removed: pd.DataFrame

    @property
    def all(self) -> pd.DataFrame:
        """The standard and the hard photographs, those of the standard set first."""
        return pd.concat([self.standard, self.hard], ignore_index=True)


FILES = {
    "not_new": ("not_new.csv", {"Image": "photograph", "Id": "label", "Status": ("new", "not_new")}),
    "mislabeled": ("mislabeled.csv", {"Image": "photographs", "Correct": "label"}),
    "duplicate_images": ("duplicate_imgs.csv", {"Keep": "photograph", "Remove": "photograph"}),
    "duplicate_ids": ("duplicates/duplicates.csv", {"Duplicates": "whales", "Verdict": ("true", "false")}),
    "not_valid": ("not_valid.csv", {"Image": "photograph"}),
    "hard": ("hard.csv", {"Image": "photograph"}),
    "texted": ("texted.csv", {"Image": "photograph"}),
}
"""The file of each list, and what its columns that count hold."""


def read_labels(path: Path | str) -> pd.DataFrame:
    """Read labels of photographs: columns Image, Id, a row each photograph.

    Raises:
        CatalogError: (a ValueError) it cannot be read, or a photograph twice or without one label; all faults by row.
    """
    path, problems = Path(path), Problems()
    lines, first = complete_lines(path, ("Image", "Id"), problems), {}
    for row, fields in lines:
        image, label = fields["Image"], fields["Id"]
        if first.setdefault(image, row) != row:
            problems.refuse(path.name, row, f"{image}: already in row {first[image]}")
        if not image or len(label.split()) != 1:
            problems.refuse(path.name, row, f"{image}: a photograph and one label are needed, not {label!r}")
    if problems.refused:
        raise refusal(f"{path} is refused", problems)
    return pd.DataFrame([line.fields for line in lines], columns=["Image", "Id"], dtype="str")


def read_lists(folder: Path | str, labels: pd.DataFrame) -> Lists:
    """Read the authors' lists.

    Args:
        folder: with the files of `FILES`.
        labels: Image, Id of the photographs that the lists are about.

    Raises:
        CatalogError: (a ValueError) a file that cannot be read, a status or verdict of another word, a photograph or
            whale that the labels do not have, two corrections of one photograph, or a whale in two groups; all faults
            by file and row. A cell of mislabeled.csv may name several photographs.
    """
    folder, problems = Path(folder), Problems()
    known = {"photograph": set(labels["Image"]), "label": {*labels["Id"], NEW_ID}}
    known |= {"photographs": known["photograph"], "whales": known["label"] - {NEW_ID, NEW_WHALE}}
    tables = {}
    for name, (file, columns) in FILES.items():
        lines, first = complete_lines(folder / file, tuple(columns), problems, file), {}
        for row, fields in lines:
            for column, kind in columns.items():
                for fault in _faults(fields[column], kind, known):
                    problems.refuse(file, row, f"{column}: {fault}")
            # A mere list of photographs may repeat itself, a correction may not.
            for word in fields[next(iter(columns))].split() if len(columns) > 1 else ():
                if first.setdefault(word, row) != row:
                    problems.refuse(file, row, f"{word} is already in row {first[word]}")
        tables[name] = pd.DataFrame([line.fields for line in lines], columns=list(columns), dtype="str")
    if problems.refused:
        raise refusal(f"{folder} is refused", problems)
    return Lists(**tables)


def _faults(text: str, kind: str | tuple[str, ...], known: dict[str, set[str]]) -> list[str]:
    """Return what is wrong with a cell of a list."""
    if isinstance(kind, tuple):
        return [] if text in kind else [f"{text!r}, not {' or '.join(kind)}"]
    words = text.split()
    if len(words) < 1 + (kind == "whales") or (len(words) > 1 and kind in ("photograph", "label")):
        return [f"{text!r}, not {'two or more ' * (kind == 'whales')}{kind}"]
    return [f"there is no {kind.removesuffix('s')} {word}" for word in words if word not in known[kind]]


def correct(labels: pd.DataFrame, lists: Lists, split_cells: bool = False) -> pd.DataFrame:
    """Return the labels put right, in their order, without the photographs taken out.

    First photographs of `new_whale` get their whale, then wrong labels the right one, or `new_whale` where the whale
    has no other photograph; then the second file of a photograph goes, whatever its label; then ids that are one whale
    get the first of them; then photographs go that are not valid.

    Args:
        labels: Image, Id.
        lists: as `read_lists` returns them.
        split_cells: correct the photographs of a cell that names several, too. The authors' script passes that cell by:
            one of 29, of two photographs.
    """
    ids = labels.set_index("Image")["Id"]
    found = lists.not_new[lists.not_new["Status"] == "not_new"]
    wrong = lists.mislabeled
    if split_cells:
        wrong = wrong.assign(Image=wrong["Image"].str.split()).explode("Image")
    right = dict(zip(found["Image"], found["Id"], strict=True))
    right |= dict(zip(wrong["Image"], wrong["Correct"].replace(NEW_ID, NEW_WHALE), strict=True))
    ids = ids.index.to_series().map(right).fillna(ids).rename("Id")
    ids = ids.drop([*lists.duplicate_images["Remove"], *lists.not_valid["Image"]], errors="ignore")
    groups = lists.duplicate_ids.loc[lists.duplicate_ids["Verdict"] == "true", "Duplicates"].str.split()
    first = {name: group[0] for group in groups for name in group}
    return ids.map(first).fillna(ids).reset_index()


def curate(labels: pd.DataFrame, lists: Lists, split_cells: bool = False) -> Curated:
    """Return the standard set, the hard set and what is in neither.

    Args:
        labels: Image, Id.
        lists: as `read_lists` returns them.
        split_cells: as for `correct`.
    """
    corrected = correct(labels, lists, split_cells)
    hard = corrected["Image"].isin({*lists.hard["Image"], *lists.texted["Image"]})
    removed = labels[~labels["Image"].isin(corrected["Image"])]
    parts = corrected[~hard], corrected[hard], removed
    return Curated(*(part[["Image", "Id"]].reset_index(drop=True) for part in parts))


def counts(labels: pd.DataFrame, lists: Lists, split_cells: bool = False) -> pd.Series:
    """Return what is in the lists and in the sets, as numbers, indexed by their names.

    Args:
        labels: Image, Id.
        lists: as `read_lists` returns them.
        split_cells: as for `correct`.
    """
    curated = curate(labels, lists, split_cells)
    before, after = labels.set_index("Image")["Id"], curated.all.set_index("Image")["Id"]
    found = {
        "candidates for a whale among new_whale": len(lists.not_new),
        "of these, confirmed": (lists.not_new["Status"] == "not_new").sum(),
        "wrong labels": len(lists.mislabeled),
        "of these, to new_whale": (lists.mislabeled["Correct"] == NEW_ID).sum(),
        "photographs in two files": len(lists.duplicate_images),
        "groups of ids": len(lists.duplicate_ids),
        "of these, one whale": (lists.duplicate_ids["Verdict"] == "true").sum(),
        "photographs that are not valid": len(lists.not_valid),
        "lines of hard photographs": len(lists.hard),
        "lines of photographs with writing": len(lists.texted),
        "photographs in both": len({*lists.hard["Image"]} & {*lists.texted["Image"]}),
        "labels changed": (before[after.index] != after).sum(),
        "photographs removed": len(curated.removed),
        "whales": _whales(curated.all),
    }
    for name, part in {"standard": curated.standard, "hard": curated.hard, "all": curated.all}.items():
        new = (part["Id"] == NEW_WHALE).sum()
        found[f"{name}: photographs"] = len(part)
        found[f"{name}: whales"] = _whales(part)
        found[f"{name}: photographs of whales"] = len(part) - new
        found[f"{name}: photographs of new_whale"] = new
    return pd.Series(found, name="count", dtype=int)


def draw_test(photographs: pd.DataFrame, seed: int, share: float = 0.2) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw a test set at random, as the authors did twice, without a seed: their own draws cannot be drawn again.

    Whales of the test set that no photograph is left to train on are `new_whale` to a model:
    `whalelib.metrics.relabel_unseen`.

    Args:
        photographs: Image, Id, such as the standard set.
        seed: of the draw.
        share: of the photographs.

    Returns:
        Photographs to train on and to test with, in their order.

    Raises:
        ValueError: a share that leaves one of the two empty.
    """
    size = round(share * len(photographs))
    if not 0 < size < len(photographs):
        raise ValueError(
            f"share = {share} of {len(photographs)} photographs leaves nothing to train or to test with"
        )
    tested = np.zeros(len(photographs), dtype=bool)
    tested[np.random.default_rng(seed).permutation(len(photographs))[:size]] = True
    return tuple(photographs[part].reset_index(drop=True) for part in (~tested, tested))


def _whales(photographs: pd.DataFrame) -> int:
    return photographs.loc[photographs["Id"] != NEW_WHALE, "Id"].nunique()
