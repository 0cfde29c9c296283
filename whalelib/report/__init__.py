"""The report's items, tables and numbers as data, and the notebooks that answer for them.

Numbers under "the report" are quoted: the tables as printed, their errata, and what follows from its authors'
own files (`whalelib.report.recompute` derives those again where the files are at hand). Nothing here is
measured by this project.
"""

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from whalelib.report import chapter2, chapter3, chapter4, chapter5, curation, recompute

__all__ = [
    "INDEX",
    "TO_COME",
    "bad_photographs",
    "chapter2",
    "chapter3",
    "chapter3_facts",
    "chapter4",
    "chapter4_facts",
    "chapter5",
    "chapter5_facts",
    "claim_problems",
    "claims",
    "class_sizes",
    "contrast_histogram",
    "curation",
    "diagonals",
    "errata",
    "facts",
    "first_place_checkpoints",
    "first_place_curves",
    "first_place_starts",
    "follow_up",
    "image_sizes",
    "image_sizes_like",
    "image_sizes_rest",
    "provenance",
    "published_runs",
    "published_submissions",
    "recompute",
    "second_place_checkpoints",
    "second_place_curves",
    "second_place_schedule",
    "second_place_submissions",
    "table",
]

_FOLDER = resources.files(__package__)
_LATER = {"3", "4", "5"}


def _read(name: str, **options) -> pd.DataFrame:
    with (_FOLDER / name).open(encoding="utf-8") as file:
        return pd.read_csv(file, **options)


INDEX = _read("index.csv", dtype=str).assign(
    kind=lambda items: items["item"].str.split().str[0], number=lambda items: items["item"].str.split().str[1]
)[["item", "kind", "number", "chapter", "title"]]
"""Every section, table, figure and equation: item ("table 2.1"), kind, number, chapter, title."""

TO_COME = tuple(_read("to_come.csv", dtype=str)["item"])
"""Items of chapters 3 to 5 that no notebook claims yet."""


def claims(notebooks: Path | str) -> dict[str, list[str]]:
    """Which notebooks claim which item, from the key `whalelib.claims` of each notebook's metadata.

    Returns:
        item -> names of notebooks (without ending), in order of name; only claimed items.

    Raises:
        ValueError: a notebook that is not JSON, or whose claims are not a list of strings (the file is
            named).
    """
    found: dict[str, list[str]] = {}
    for path in sorted(Path(notebooks).glob("*.ipynb")):
        try:
            claimed = (
                json.loads(path.read_text(encoding="utf-8"))["metadata"].get("whalelib", {}).get("claims", [])
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not a notebook ({error})") from error
        if not isinstance(claimed, list) or not all(isinstance(item, str) for item in claimed):
            raise ValueError(f"{path}: claims must be a list of items such as 'table 2.1'")
        for item in dict.fromkeys(claimed):
            found.setdefault(item, []).append(path.stem)
    return found


def claim_problems(claimed: dict[str, list[str]], to_come: Iterable[str] = TO_COME) -> list[str]:
    """What is wrong with the claims: each item belongs to a notebook or to the list of items to come."""
    items, to_come = dict(zip(INDEX["item"], INDEX["chapter"], strict=True)), list(to_come)
    problems = []
    for item, notebooks in claimed.items():
        if item not in items:
            problems.append(f"{item}: claimed by {', '.join(notebooks)}, but no item of the report")
    for item in to_come:
        if items.get(item) not in _LATER:
            problems.append(f"{item}: listed as to come, but no item of chapters 3 to 5")
        if item in claimed:
            problems.append(f"{item}: claimed by {', '.join(claimed[item])} and still listed as to come")
    problems += [f"{item}: no notebook claims it" for item in items if item not in {*claimed, *to_come}]
    return problems


def table(number: str, as_text: bool = False) -> pd.DataFrame:
    """A table of the report as printed, errors included (see `errata`).

    Cells that span rows are repeated. Table 2.2's three pairs of columns follow one another; in Tables 4.1
    and 5.1 the rows of one set share one printed probability.

    Args:
        number: such as "2.2".
        as_text: keep every cell as the printed characters ("0.84870"), not as a number.

    Raises:
        KeyError: the report has no such table.
    """
    if f"table {number}" not in set(INDEX["item"]):
        tables = INDEX.loc[INDEX["kind"] == "table", "number"]
        raise KeyError(f"the report has no table {number}; it has {', '.join(tables)}")
    name = f"tables/table_{number.replace('.', '_')}.csv"
    return _read(name, dtype=str if as_text else None, keep_default_na=False)


def errata(item: str | None = None) -> pd.DataFrame:
    """Corrections to the report, all or those of one item ("equation 4.9"; a bare number means a table).

    Returns:
        Columns item, cell, printed, corrected, kind, evidence. Kinds: "wrong" (against the solution's code or
        the authors' own files), "code differs" (the released code does not do what is described), "omitted",
        "rounding", "unclear", "note" (right, but easily misread), "ocr" (a fault of the text version, not of
        the report).
    """
    frame = _read("errata.csv", dtype=str, keep_default_na=False)
    if item is None:
        return frame
    item = item if " " in item else f"table {item}"
    if item not in set(INDEX["item"]):
        raise KeyError(f"the report has no {item}")
    return frame[frame["item"] == item].reset_index(drop=True)


def published_runs() -> pd.DataFrame:
    """Scores that the report's authors published later for eight models on two test sets and a hard set.

    Columns run, description, file (test1 and test2: 3,993 photographs each; hard1 and hard2: 5,328, scored by
    the models of test 1 and test 2), MAP@5, Top@1, Top@3, Top@5 (NaN where only MAP@5 is quoted). Quoted, not
    checked: `recompute.prediction_runs` scores those runs whose predictions are at hand.
    """
    return _read("published_runs.csv")


def follow_up() -> pd.DataFrame:
    """How those models rank the right label of each photograph, two by two: what their differences are made of.

    Columns run, file, other, other_file, and a row for each rank of the first model (1 to 5, "none" where the right
    label is not among its five guesses): how many photographs the second has at rank 1, 2, 3, 4, 5, none. Counted in
    the predictions that the report's authors published on the branches of their repository, henriquesimoes/humpback;
    `recompute.follow_up` counts again those that are at hand. Each model is compared with others on the same file,
    and with itself on the hard photographs after training on the other list.
    """
    return _read("follow_up.csv", dtype={"rank": str})


def facts() -> pd.DataFrame:
    """Numbers behind the text of chapter 2, for the competition's 33,321 photographs, indexed by fact.

    Columns train, test, all (NaN where it makes no sense; shares lie between 0 and 1), section and "report
    says": the printed words where the text states the fact.
    """
    return (
        _read("facts.csv", dtype={"section": str})
        .fillna({"section": "", "report says": ""})
        .set_index("fact")
    )


def class_sizes() -> pd.DataFrame:
    """Figure 2.1: how many of the 5,004 whales have 1, 2, ... 73 training photographs (photographs, whales).

    `new_whale` is left out; `facts()` has its 9,664 photographs.
    """
    return _read("class_sizes.csv")


def image_sizes() -> pd.DataFrame:
    """Sizes (pixels) that at least five of the 33,321 photographs have: width, height, train, test."""
    return _read("image_sizes.csv")


def image_sizes_rest() -> pd.DataFrame:
    """All other sizes in steps: width_from, width_to, height_from, height_to (end excluded), train, test."""
    return _read("image_sizes_rest.csv")


def diagonals() -> pd.DataFrame:
    """The ratios, width / height, that most different sizes have: ratio, sizes, photographs.

    Sizes 1050 pixels wide are left out. The first three are the diagonals of Figure 2.2.
    """
    return _read("diagonals.csv")


def image_sizes_like(seed: int) -> pd.DataFrame:
    """A size for each of the 33,321 photographs, distributed like the competition's.

    Sizes of at least five photographs have their exact counts, so Table 2.3 comes out exactly; the others are
    drawn evenly inside their step. Columns split, width, height (pixels), in random order within each split.
    """
    rng = np.random.default_rng(seed)
    common, rest = image_sizes(), image_sizes_rest()
    taken = set(zip(common["width"], common["height"], strict=True))
    parts = []
    for split in ("train", "test"):
        exact = common.loc[common.index.repeat(common[split]), ["width", "height"]]
        steps = rest.loc[rest.index.repeat(rest[split])]
        drawn = [_size_inside(step, taken, rng) for step in steps.itertuples()]
        sizes = pd.concat([exact, pd.DataFrame(drawn, columns=exact.columns)])
        parts.append(sizes.iloc[rng.permutation(len(sizes))].assign(split=split))
    return pd.concat(parts, ignore_index=True)[["split", "width", "height"]]


def _size_inside(step, taken: set[tuple[int, int]], rng: np.random.Generator) -> tuple[int, int]:
    while True:
        width = int(rng.integers(step.width_from, step.width_to))
        height = int(rng.integers(step.height_from, step.height_to))
        if (width, height) not in taken:
            return width, height


def contrast_histogram() -> pd.DataFrame:
    """Figure 2.3: ten equal steps of contrast (grey levels) a split: split, low, high, photographs."""
    return _read("contrast_histogram.csv")


def bad_photographs() -> pd.DataFrame:
    """The photographs of section 2.3 and appendix A: item, image, identity, shows, kind.

    `image` (the file's name) and `identity` are the competition's; `kind` is the nearest kind of photograph in
    the generated world, as `whalelib.data.world.specials` names it.
    """
    return _read("bad_photographs.csv", dtype=str)


def first_place_starts() -> pd.DataFrame:
    """Every start of the first solution's training program by the report's authors, in the order of time.

    Columns log, start, started, batch, rate, from, frozen, least, rows, photographs: see `chapter3.read_log`. Six of
    the ten logs stand behind Table 3.2 (`first_place_checkpoints`), the other four behind no number of the report.
    """
    return _read("first_place_starts.csv", dtype={"log": str, "frozen": str})


def first_place_checkpoints() -> pd.DataFrame:
    """What those logs say of each row of Table 3.2: the columns of `chapter3.checkpoints`."""
    return _read("first_place_checkpoints.csv", dtype={"log": str})


def first_place_curves() -> pd.DataFrame:
    """The curves of the six logs behind Table 3.2, thinned: the columns of `chapter3.curves`."""
    return _read("first_place_curves.csv")


def chapter3_facts() -> pd.Series:
    """Numbers behind the text of chapter 3, indexed by fact.

    On the photographs that the first solution's training splits 2 to 5 add to the contest's (section 3.2.2; those
    "with a label of the playground" are the ones whose own label in that contest is at hand), and on how often a
    submission names `new_whale` first (section 3.4.2): the two of the report's authors, the second and third
    solutions'.
    """
    return _read("chapter3_facts.csv").set_index("fact")["value"]


def second_place_checkpoints() -> pd.DataFrame:
    """What the logs say of each row of Table 4.3: the columns of `chapter4.checkpoints`."""
    return _read("second_place_checkpoints.csv")


def second_place_schedule() -> pd.DataFrame:
    """Learning rate and hard ratio by epoch, as the logs show them: the columns of `chapter4.schedule`."""
    return _read("second_place_schedule.csv")


def second_place_curves() -> pd.DataFrame:
    """The curves of the ten models of Table 4.3, one row an epoch: the columns of `chapter4.curves`."""
    return _read("second_place_curves.csv")


def second_place_submissions() -> pd.DataFrame:
    """What the submissions of the report's authors with the second solution name first, of the 7,960 test photographs.

    Columns submission (a log's name of `chapter4.MODELS`, a backbone, or "ensemble"), new_first (share of photographs
    where it is `new_whale`), whales (how many different ones are named first), agreement (share where it is what the
    ensemble names first).
    """
    return _read("second_place_submissions.csv")


def published_submissions() -> pd.DataFrame:
    """Leaderboard scores of single models and of ensembles of the second solution, beyond Table 4.4 (section 4.4).

    Columns by ("Shen" or "report's authors"), submission, models, public, private (NaN where it is not told).
    Quoted from the texts beside the published code and submissions; no leaderboard is at hand to check them. The
    report's authors give the name "ResNet101 ensemble" twice; the second is taken for SE-ResNeXt-101, as the names of
    their files have it.
    """
    return _read("published_submissions.csv")


def chapter4_facts() -> pd.Series:
    """Numbers behind the text of chapter 4, indexed by fact.

    On the second solution's boxes (section 4.1.2: overlap is intersection over union), pseudo labels (4.2),
    validation list (Table 4.3), and on how often a vote of the ten models' published guesses by rank, weighted as in
    Table 4.2, names the same whale first as their ensemble (4.4).
    """
    return _read("chapter4_facts.csv").set_index("fact")["value"]


def chapter5_facts() -> pd.Series:
    """Numbers behind the text of chapter 5, indexed by fact.

    On the third solution's labels and what grouping changes in them (section 5.2.2), its split, its submission before
    and after post-processing (5.2.2, 5.2.3, 5.5; the sizes of photographs are not at hand, so "rows changed by sizes"
    is what the other two steps leave to explain), and Table 5.3.
    """
    return _read("chapter5_facts.csv").set_index("fact")["value"]


def provenance(name: str, reference: Path | None = None) -> str:
    """Where the competition's numbers come from, as a sentence; those derived again are compared.

    Args:
        name: "table 2.1" to "table 2.4", "table 3.2", "table 4.3" (as printed, so what the logs say otherwise, or not
            at all, differs), or a function here and in `recompute`: "facts", "class_sizes", "image_sizes", "diagonals",
            "contrast_histogram", "bad_photographs", "first_place_starts", "first_place_checkpoints",
            "first_place_curves", "chapter3_facts", "second_place_checkpoints", "second_place_schedule",
            "second_place_curves", "second_place_submissions", "chapter4_facts", "chapter5_facts".
        reference: folder with the authors' own files; None where it is not at hand.
    """
    kept = table(name.removeprefix("table ")) if name.startswith("table ") else globals()[name]()
    title = name[0].upper() + name[1:].replace("_", " ")
    if reference is None:
        return f"{title}: quoted as kept in whalelib.report; the authors' files are not at hand."
    derived = getattr(recompute, name.replace(" ", "_").replace(".", "_"))(reference)
    if name.endswith("facts"):
        derived, kept = derived.set_index("fact"), pd.DataFrame(kept)
        kept = kept[list(derived)]
    if kept.shape != derived.shape:
        return (
            f"{name}: derived again from the authors' files, with other rows: {kept.shape}, {derived.shape}"
        )
    kept, derived = kept.to_numpy(dtype=object), derived.to_numpy(dtype=object)
    empty = pd.isna(kept) & pd.isna(derived)
    equal, cells = int(((kept == derived) & ~empty).sum()), int((~empty).sum())
    return f"{title}: derived again from the authors' files; {equal} of {cells} cells equal what is kept."
