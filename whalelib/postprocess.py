"""Corrections of five guesses that no network makes: duplicate whales, sizes of photographs, known answers.

Sections 5.2.2, 5.2.3 and 5.5 of the report. The contest's labels give some whales two or three ids, photographs of one
whale on one day tend to have one size, and the answers of a few test photographs were published. ``groups`` below maps
the name of a group to the ids that are one whale, as `read_groups` returns it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from whalelib.data.catalog import refusal
from whalelib.data.layouts import Line, Problems, read_lines
from whalelib.metrics import GUESSES, NEW_WHALE

Sizes = Mapping[str, tuple[int, int]]


class Processed(NamedTuple):
    """What `post_process` returns.

    Attributes:
        guesses: (Q, K) objects, best first; None is no guess. K is the guesses' own, 5 at least, 6 where a leaked id
            made a row longer.
        changes: a row each change: step ("duplicates", "sizes", "leaks"), image, before, after (the guesses as a
            submission writes them).
        unsized: the photographs whose first guess is one of several ids of a whale and whose row the rule of sizes left
            alone because a size is missing.
    """

    guesses: np.ndarray
    changes: pd.DataFrame
    unsized: list[str]


def post_process(
    images: Sequence[str],
    guesses: np.ndarray,
    groups: Mapping[str, Sequence[str]],
    leaks: Mapping[str, str] | None = None,
    sizes: Sizes | pd.DataFrame | None = None,
    labels: Mapping[str, str] | None = None,
    cut: bool = False,
) -> Processed:
    """Apply `rank_duplicates`, `rank_sizes` and `rank_leaks`, in the order of the third solution's code.

    Args:
        images: (Q,) names of the test photographs, each once.
        guesses: (Q, K) labels, best first; None is no guess. `whalelib.metrics.parse_predictions` reads them from a
            submission, `whalelib.contest.write_submission` writes them.
        groups: group -> ids of one whale.
        leaks: test photograph -> its published id; None leaves the step out.
        sizes: photograph -> (H, W) in pixels, or a table as for `photograph_sizes`; None leaves the step out.
        labels: training photograph -> id; needed with ``sizes``.
        cut: what the leaks make longer to five guesses, which a submission needs. The original does not.

    Raises:
        ValueError: a photograph twice, other lengths, sizes without labels, or groups as `rank_duplicates` refuses.
    """
    if (sizes is None) != (labels is None):
        raise ValueError("the rule of sizes needs both sizes and the labels of the training photographs")
    images, ranked = _rows(images, guesses)
    changes, unsized = [], np.zeros(len(images), dtype=bool)
    stages = {"duplicates": rank_duplicates(ranked, groups)}
    if sizes is not None:
        stages["sizes"], unsized = rank_sizes(images, stages["duplicates"], groups, sizes, labels)
    if leaks is not None:
        stages["leaks"] = rank_leaks(images, list(stages.values())[-1], leaks, cut)
    for step, after in stages.items():
        for place in np.flatnonzero(changed(ranked, after)):
            texts = (" ".join(_labels(table[place])) for table in (ranked, after))
            changes.append([step, images[place], *texts])
        ranked = after
    table = pd.DataFrame(changes, columns=["step", "image", "before", "after"])
    return Processed(ranked, table, [images[place] for place in np.flatnonzero(unsized)])


def rank_duplicates(guesses: np.ndarray, groups: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Put the other ids of the first guess's whale right behind it, and cut the row to five (section 5.2.2).

    Args:
        guesses: (Q, K) labels, best first; None is no guess.
        groups: group -> ids of one whale.

    Returns:
        (Q, K) guesses, K at least 5; rows whose first guess is in no group are as they were.

    Raises:
        ValueError: guesses of another shape, a group of fewer than two ids, or an id twice.
    """
    guesses, whale = _table(guesses), _whales(groups)
    rows = {}
    for place in np.flatnonzero(pd.Series(guesses[:, 0]).isin(whale)):
        row = _labels(guesses[place])
        rows[place] = _unique([row[0], *whale[row[0]], *row])[:GUESSES]
    return _with_rows(guesses, rows)


def rank_sizes(
    images: Sequence[str],
    guesses: np.ndarray,
    groups: Mapping[str, Sequence[str]],
    sizes: Sizes | pd.DataFrame,
    labels: Mapping[str, str],
) -> tuple[np.ndarray, np.ndarray]:
    """Put the id first whose training photographs have one of the test photograph's size (section 5.2.2).

    That is where the first guess is in a group, and exactly one id of the group has such a photograph. The report
    leaves "exactly one" out.

    Args:
        images: (Q,) names of the test photographs, each once.
        guesses: (Q, K) labels, best first; None is no guess.
        groups: group -> ids of one whale.
        sizes: photograph, test or training -> (H, W) in pixels; or a table as for `photograph_sizes`.
        labels: training photograph -> id.

    Returns:
        (Q, K) guesses, K at least 5, and (Q,) booleans: rows that were left alone because the size of the test
        photograph, or of a training photograph of the group, is missing.

    Raises:
        ValueError: a photograph twice, other lengths, or groups as `rank_duplicates` refuses.
    """
    (images, guesses), whale = _rows(images, guesses), _whales(groups)
    if isinstance(sizes, pd.DataFrame):
        sizes = photograph_sizes(sizes)
    seen: dict[str, set] = {name: set() for name in whale}
    for photograph, name in labels.items():
        if name in whale:
            seen[name].add(sizes.get(photograph))
    rows, unsized = {}, np.zeros(len(guesses), dtype=bool)
    for place in np.flatnonzero(pd.Series(guesses[:, 0]).isin(whale)):
        row, size = _labels(guesses[place]), sizes.get(images[place])
        ids = whale[row[0]]
        unsized[place] = size is None or any(None in seen[name] for name in ids)
        found = [name for name in ids if size in seen[name]]
        if not unsized[place] and len(found) == 1:
            rows[place] = _unique([*found, *row])[:GUESSES]
    return _with_rows(guesses, rows), unsized


def rank_leaks(
    images: Sequence[str], guesses: np.ndarray, leaks: Mapping[str, str], cut: bool = False
) -> np.ndarray:
    """Put the published id of a test photograph first; the other guesses move back (section 5.2.3).

    Args:
        images: (Q,) names of the test photographs, each once.
        guesses: (Q, K) labels, best first; None is no guess.
        leaks: test photograph -> id; photographs that are not among the Q are passed over.
        cut: the rows that it changes to five. The original does not, so a row that lacked the id then has six.

    Returns:
        (Q, K) guesses, K at least 5, and 6 if a row has six.

    Raises:
        ValueError: a photograph twice, or other lengths.
    """
    images, guesses = _rows(images, guesses)
    rows = {}
    for place, image in enumerate(images):
        name, row = leaks.get(image), _labels(guesses[place])
        if name is not None and guesses[place, 0] != name:
            rows[place] = _unique([name, *row])[: GUESSES if cut else None]
    return _with_rows(guesses, rows)


def photograph_sizes(table: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Return photograph -> (H, W) in pixels, for `rank_sizes`.

    Args:
        table: image, height, width, as `whalelib.data.statistics` returns them; rows without a size are left out.
    """
    known = table.dropna(subset=["height", "width"])
    sides = zip(known["height"].astype(int).tolist(), known["width"].astype(int).tolist(), strict=True)
    return dict(zip(known["image"], sides, strict=True))


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return (Q,) booleans: which rows of guesses, (Q, K) and (Q, L), differ; None at a row's end is no difference.

    Raises:
        ValueError: not as many rows.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows of guesses before, {len(after)} after")
    tables = _table(before), _table(after)
    width = max(table.shape[1] for table in tables)
    one, other = (_with_rows(table, {}, width) for table in tables)
    return np.asarray(one != other, dtype=bool).any(axis=1)


# Ids grouped for training


def regroup(identities: Iterable, groups: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Give the photographs of a whale with several ids one label to train on: the group's (section 5.2.2).

    Args:
        identities: (N,) labels; those in no group, and missing ones, stay.
        groups: group -> ids of one whale.

    Returns:
        (N,) objects.

    Raises:
        ValueError: groups as `rank_duplicates` refuses, or a group that has the name of a label.
    """
    _whales(groups)
    labels = list(identities)
    if taken := set(groups) & set(labels):
        raise ValueError(f"the group {min(taken)} has the name of a label")
    names = {name: group for group, ids in groups.items() for name in ids}
    return np.array([names.get(label, label) for label in labels], dtype=object)


def ungroup(guesses: np.ndarray, groups: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Put the ids of a group where its name is guessed, and cut the row to five (section 5.5).

    The released code of the third solution has no such step: it compares test photographs with training photographs
    under their own ids, whatever it was trained on, so that `rank_duplicates` is all that is left of the groups.

    Args:
        guesses: (Q, K) labels, best first; None is no guess.
        groups: group -> what to write for it: the ids of one whale, or ``new_whale`` alone for an id that was given to
            photographs of a new whale.

    Returns:
        (Q, K) guesses, K at least 5; of a label that comes up twice the first counts.

    Raises:
        ValueError: guesses of another shape.
    """
    guesses = _table(guesses)
    rows = {}
    for place in np.flatnonzero(pd.DataFrame(guesses).isin(set(groups)).any(axis=1)):
        row = [name for label in _labels(guesses[place]) for name in groups.get(label, [label])]
        rows[place] = _unique(row)[:GUESSES]
    return _with_rows(guesses, rows)


def compare_labels(before: pd.Series, after: pd.Series, groups: Collection[str] = ()) -> pd.DataFrame:
    """Count how the labels of two files differ, such as the third solution's two lists of training photographs.

    Args:
        before: label of each photograph, indexed by its name.
        after: the same photographs, in any order.
        groups: names of groups.

    Returns:
        A row each kind of change, the commonest first: from ("new_whale" or "whale"), to ("group", "new_whale", "whale"
        for a label that ``before`` has, "new id" for another), photographs, labels_before, labels_after (how many
        different ones).

    Raises:
        ValueError: a photograph twice, or in one of the two only.
    """
    for name, labels in (("before", before), ("after", after)):
        if labels.index.has_duplicates:
            raise ValueError(f"{labels.index[labels.index.duplicated()][0]} is twice in the labels {name}")
    if len(odd := before.index.symmetric_difference(after.index)):
        raise ValueError(f"{len(odd)} photographs are in one of the two only, such as {odd[0]}")
    groups, known = set(groups), set(before)

    def kind(label: str) -> str:
        if label in groups:
            return "group"
        return label if label == NEW_WHALE else "whale" if label in known else "new id"

    both = pd.DataFrame({"before": before, "after": after.loc[before.index]})
    both = both[both["before"] != both["after"]]
    kinds = {"from": both["before"].map(kind), "to": both["after"].map(kind)}
    found = both.assign(**kinds).groupby(["from", "to"])
    counts = found.agg(
        photographs=("before", "size"), labels_before=("before", "nunique"), labels_after=("after", "nunique")
    )
    return counts.reset_index().sort_values("photographs", ascending=False, kind="stable", ignore_index=True)


# Files


def read_groups(path: Path | str, known: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Read a file of groups: Id (the group's name), SubId (the ids of one whale, parted by spaces).

    Args:
        path: CSV file.
        known: ids of the training photographs; None skips the check of unknown ids.

    Returns:
        Group -> ids, in the order of the file.

    Raises:
        CatalogError: (a ValueError) it cannot be read, or a group without a name or named twice, of fewer than two ids,
            or with an id that is unknown or in another group; all faults by row.
    """
    path, problems = Path(path), Problems()
    known = None if known is None else set(known)
    groups: dict[str, tuple[str, ...]] = {}
    rows: dict[str, int] = {}
    for row, fields in complete_lines(path, ("Id", "SubId"), problems):
        name, ids = fields["Id"].strip(), tuple(fields["SubId"].split())
        if not name or name in groups:
            problems.refuse(path.name, row, f"{name}: a group twice" if name else "a group without a name")
        groups[name] = ids
        if len(ids) < 2:
            problems.refuse(path.name, row, f"{name}: a group of {len(ids)}, it needs two ids")
        for one in ids:
            if one in rows:
                problems.refuse(path.name, row, f"{name}: {one} is already in row {rows[one]}")
            elif known is not None and one not in known:
                problems.refuse(path.name, row, f"{name}: {one} is no id of the training photographs")
            rows.setdefault(one, row)
    if problems.refused:
        raise refusal(f"{path} is refused", problems)
    return groups


def read_ids(
    path: Path | str,
    images: Collection[str] | None = None,
    known: Collection[str] | None = None,
    kind: str = "a test photograph",
) -> dict[str, str]:
    """Read a file of ids, such as that of the published answers or that of grouped labels: Image, Id.

    Args:
        path: CSV file.
        images: photographs that it may name; None skips the check of unknown photographs.
        known: ids of the training photographs; None skips the check of unknown ids.
        kind: what its photographs are, for messages.

    Returns:
        Photograph -> id, in the order of the file.

    Raises:
        CatalogError: (a ValueError) it cannot be read, or a photograph that is unknown, named twice or without one id;
            all faults by row.
    """
    path, problems = Path(path), Problems()
    images, known = (None if names is None else set(names) for names in (images, known))
    leaks: dict[str, str] = {}
    rows: dict[str, int] = {}
    for row, fields in complete_lines(path, ("Image", "Id"), problems):
        image, name = fields["Image"].strip(), fields["Id"].strip()
        if image in rows:
            problems.refuse(path.name, row, f"{image}: already in row {rows[image]}")
        elif not image or (images is not None and image not in images):
            problems.refuse(path.name, row, f"{image}: not {kind}" if image else "no photograph")
        if len(name.split()) != 1:
            problems.refuse(path.name, row, f"{image}: one id is needed, not {name!r}")
        elif known is not None and name not in known:
            problems.refuse(path.name, row, f"{image}: {name} is no id of the training photographs")
        leaks[image] = name
        rows.setdefault(image, row)
    if problems.refused:
        raise refusal(f"{path} is refused", problems)
    return leaks


def complete_lines(path: Path, columns: Iterable[str], problems: Problems, shown: str = "") -> list[Line]:
    """Read a CSV file as `whalelib.data.layouts.read_lines` does, but refuse what that skips: no line is left out."""
    found = Problems()
    lines = read_lines(path, columns, found, shown)
    for problem in found:
        if problem.action != "repaired":
            problems.refuse(*problem[:3])
    return lines


# Rows of guesses


def _whales(groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return id -> all ids of its whale."""
    whale: dict[str, tuple[str, ...]] = {}
    for group, ids in groups.items():
        if isinstance(ids, str) or len(ids) < 2:
            raise ValueError(f"group {group}: two ids or more are needed, not {ids!r}")
        for name in ids:
            if name in whale:
                raise ValueError(f"group {group}: {name} is already in a group")
            whale[name] = tuple(ids)
    return whale


def _table(guesses: np.ndarray) -> np.ndarray:
    guesses = np.asarray(guesses, dtype=object)
    if guesses.ndim != 2 or not guesses.shape[1]:
        raise ValueError(f"guesses of shape {guesses.shape}: (Q, K) are needed")
    return np.where(pd.isna(guesses) | (guesses == ""), None, guesses)


def _rows(images: Sequence[str], guesses: np.ndarray) -> tuple[list[str], np.ndarray]:
    images, guesses = list(images), _table(guesses)
    if len(images) != len(guesses):
        raise ValueError(f"{len(images)} photographs, guesses of shape {guesses.shape}")
    if len(set(images)) < len(images):
        names = pd.Index(images)
        raise ValueError(f"{names[names.duplicated()][0]} is named twice")
    return images, guesses


def _labels(row: np.ndarray) -> list[str]:
    return [label for label in row if label is not None]


def _unique(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(labels))


def _with_rows(guesses: np.ndarray, rows: Mapping[int, list[str]], width: int = GUESSES) -> np.ndarray:
    """Return the guesses with these rows put in: (Q, K), wide enough for the longest."""
    width = max([width, guesses.shape[1], *map(len, rows.values())])
    ranked = np.full((len(guesses), width), None, dtype=object)
    ranked[:, : guesses.shape[1]] = guesses
    for place, row in rows.items():
        ranked[place] = [*row, *[None] * (width - len(row))]
    return ranked
