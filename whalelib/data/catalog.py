"""The catalog: which photographs there are, whose they are, and what else is known of them."""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from whalelib.data.layouts import BOX, NEW_WHALE, Problem, Problems, find_layout, read_metadata
from whalelib.data.statistics import statistics
from whalelib.ledger import project_root

if TYPE_CHECKING:
    import pandera.pandas as pandera

KAGGLE_FOLDERS = (
    Path("/kaggle/input/competitions/humpback-whale-identification"),
    Path("/kaggle/input/humpback-whale-identification"),
    Path("data/humpback-whale-identification"),
)
_TEXT = ("image", "identity", "path", "split", "mask", "source")
_LISTED = 20


class CatalogError(ValueError):
    """Data that can't be used: the message lists what is wrong by file and row, ``problems`` is the table."""

    def __init__(self, message: str, problems: pd.DataFrame | None = None):
        super().__init__(message)
        self.problems = problem_table([]) if problems is None else problems


@dataclass(frozen=True, eq=False, repr=False)
class Catalog:
    """Photographs, whose they are, and what was wrong with the data.

    Attributes:
        name: what the data are called.
        root: the folder they were read from.
        table: one row a photograph: ``image`` (its name, unique), ``identity`` (missing when unlabelled),
            ``path`` (absolute), ``split`` ("train" or "test"); where known ``x0``, ``y0``, ``x1``, ``y1``
            (its box), ``mask`` (path) and key points NAME_x, NAME_y, in pixels of the upright photograph,
            missing (NaN) where not; and ``source``, ``row``: the file and the line that list it.
        problems: one row a problem: ``file``, ``row`` (line, the header's is 1; missing for a file as a
            whole), ``problem``, ``action`` ("skipped", "refused" or "repaired").

    Raises:
        CatalogError: a table that breaks these rules, with the rows that do.
    """

    name: str
    root: Path
    table: pd.DataFrame
    problems: pd.DataFrame

    def __post_init__(self):
        import pandera.errors  # noqa: PLC0415  (a third of a second that only a catalog needs)

        try:
            _schema().validate(self.table, lazy=True)
        except pandera.errors.SchemaErrors as error:
            bad = Problems()
            for case in error.failure_cases.itertuples():
                row = None if pd.isna(case.index) else int(case.index)
                # A rule for a whole row fails once for each of its columns.
                whole_row = case.schema_context == "DataFrameSchema" and row is not None
                found = "" if whole_row else f", not {case.failure_case!r} ({case.column})"
                bad.refuse("table", row, f"{case.check} is needed{found}")
            message = f"the catalog {self.name} breaks its own rules (row: place in its table)"
            raise refusal(message, list(dict.fromkeys(bad))) from None

    def __len__(self):
        return len(self.table)

    def __repr__(self):
        counts = self.table["split"].value_counts()
        splits = ", ".join(f"{counts.get(split, 0):,} {split}" for split in ("train", "test"))
        return (
            f"<Catalog {self.name}: {len(self):,} photographs ({splits}), {len(self.known):,} known "
            f"individuals, {len(self.problems):,} problems>"
        )

    @property
    def train(self) -> "Catalog":
        """The training photographs."""
        return self.where(self.table["split"] == "train")

    @property
    def test(self) -> "Catalog":
        """The test photographs."""
        return self.where(self.table["split"] == "test")

    @property
    def known(self) -> list[str]:
        """The identities of the training photographs but ``new_whale``, sorted."""
        identities = self.table.loc[self.table["split"] == "train", "identity"].dropna().unique()
        return sorted(set(identities) - {NEW_WHALE})

    @property
    def has_test_labels(self) -> bool:
        """Whether guesses can be scored: there are test photographs and all have an identity."""
        identities = self.table.loc[self.table["split"] == "test", "identity"]
        return len(identities) > 0 and bool(identities.notna().all())

    @property
    def fingerprint(self) -> str:
        """A hash of the table and of the size and time of change of every file: other data, another value.

        Files are looked at, not read: a hundredth of a second per thousand photographs.
        """
        table = self.table.drop(columns=["source", "row"], errors="ignore").copy()
        total = hashlib.sha256()
        for column in ("path", "mask"):
            for path in table.get(column, pd.Series(dtype="str")).dropna():
                total.update(repr(_stamp(path)).encode())
            if column in table:
                table[column] = table[column].str.removeprefix(os.path.realpath(self.root))
        total.update(table.to_csv(index=False).encode(errors="surrogateescape"))
        return total.hexdigest()[:16]

    def where(self, mask: pd.Series | np.ndarray) -> "Catalog":
        """Return the catalog of the rows for which ``mask`` (one boolean a row, in order) is true.

        Raises:
            ValueError: not booleans, or not as many as rows.
        """
        chosen = np.asarray(mask)
        if chosen.dtype != bool or chosen.shape != (len(self),):
            raise ValueError(f"a mask of {len(self)} booleans is needed, not {chosen.shape} {chosen.dtype}")
        return replace(self, table=self.table[chosen].reset_index(drop=True))

    def verified(self, workers: int | None = None) -> "Catalog":
        """Decode every photograph once and return the catalog of those that can be read.

        The others move to ``problems``, and so does a note of what had to be repaired in some (they stay).
        Duplicates stay: ``sha1`` in :func:`whalelib.data.statistics` shows them.

        Raises:
            CatalogError: none can be read.
        """
        measured = statistics(self, workers=workers)
        problems = Problems()
        noted = measured.loc[(measured["fault"] != "") | (measured["repairs"] != "")]
        for i, found in noted.iterrows():
            row = self.table.iloc[i]
            shown = os.path.relpath(row["path"], os.path.realpath(self.root))
            file, line = row.get("source") or shown, row.get("row")
            note = problems.skip if found["fault"] else problems.repair
            what = found["fault"] or found["repairs"]
            note(file, None if pd.isna(line) else int(line), f"{shown}: {what}")
        known = pd.concat([self.problems, problem_table(problems)], ignore_index=True).drop_duplicates()
        sound = (measured["fault"] == "").to_numpy()
        if not sound.any():
            raise refusal(f"no photograph of {self.name} can be read", known)
        return replace(self.where(sound), problems=known.reset_index(drop=True))

    def report_problems(self) -> str:
        """Return the problems as one text, by file and row; "" when there is none.

        Of many alike the first are shown and the rest counted; ``problems`` has them all.
        """
        if self.problems.empty:
            return ""
        counts = self.problems["action"].value_counts()
        total = ", ".join(f"{counts[action]:,} {action}" for action in counts.index)
        return f"Problems in {self.name}: {total}\n{_listing(self.problems)}"


@cache
def _schema() -> "pandera.DataFrameSchema":
    """Return what holds for every catalog's table."""
    import pandera.pandas as pandera  # noqa: PLC0415

    optional = {"required": False, "nullable": True}
    check = pandera.Check
    columns = {
        "image": pandera.Column("str", check.str_length(min_value=1, error="a name"), unique=True),
        "identity": pandera.Column(
            "str", check.str_matches(r"\S+\Z", error="no space, not empty"), nullable=True
        ),
        "path": pandera.Column(
            "str", check(lambda paths: paths.map(os.path.isabs), error="an absolute path")
        ),
        "split": pandera.Column("str", check.isin(["train", "test"], error="train or test")),
        "mask": pandera.Column("str", **optional),
        r"^.+_[xy]$": pandera.Column("float64", regex=True, **optional),
        "source": pandera.Column("str", required=False),
        "row": pandera.Column("Int64", **optional),
    } | {name: pandera.Column("float64", **optional) for name in BOX}

    def boxes(table: pd.DataFrame) -> pd.Series | bool:
        there = [name for name in BOX if name in table]
        if len(there) < len(BOX):
            return not there
        empty = table[there].isna().all(axis=1)
        return empty | ((table["x0"] < table["x1"]) & (table["y0"] < table["y1"]))

    return pandera.DataFrameSchema(columns, checks=check(boxes, error="x0 < x1 and y0 < y1, or no box"))


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def problem_table(problems: list[Problem]) -> pd.DataFrame:
    """Return problems as a catalog's table of them."""
    table = pd.DataFrame(problems, columns=Problem._fields)
    return table.astype({"file": "str", "row": "Int64", "problem": "str", "action": "str"})


def _listing(problems: pd.DataFrame) -> str:
    """Return one line a problem, the worst first; of many alike only the first."""
    order = {"refused": 0, "skipped": 1, "repaired": 2}
    problems = problems.sort_values("action", key=lambda action: action.map(order), kind="stable")
    # Alike: the same words after the name, up to the first number or quoted value.
    kind = problems["problem"].str.replace(r"^.*?: ", "", regex=True).str.replace(r"[\d'(].*", "", regex=True)
    lines = []
    for (_, file, _), alike in problems.groupby(["action", "file", kind], sort=False):
        shown = alike.sort_values("row", kind="stable")
        lines += [
            f"  {file}{'' if pd.isna(row.row) else f', row {row.row}'}: {row.problem} ({row.action})"
            for row in shown.head(_LISTED).itertuples()
        ]
        if len(alike) > _LISTED:
            lines.append(f"  {file}: and {len(alike) - _LISTED:,} more like these; .problems lists them all")
    return "\n".join(lines)


def refusal(message: str, problems: pd.DataFrame | list[Problem]) -> CatalogError:
    """Return the error of data that can't be used, with all problems listed by file and row."""
    table = problems if isinstance(problems, pd.DataFrame) else problem_table(problems)
    return CatalogError(f"{message}\n{_listing(table)}", table)


def open_catalog(data: str | Path) -> Catalog:
    """Open a set of photographs.

    Args:
        data: "world[:PRESET[@SEED]]", the generated world (made when it is missing; "world" is
            "world:lab@2019"); "kaggle", the contest's own data (the first of $WHALE_KAGGLE,
            /kaggle/input/humpback-whale-identification and data/humpback-whale-identification); or a path: a
            metadata CSV as wildlife-datasets writes it, or a folder with train.csv, train/ and perhaps test/
            (Kaggle's), with labels.csv, images/ and perhaps masks/, with metadata.csv, or with a folder per
            individual.

    Raises:
        CatalogError: no such data, no known layout or more than one, a file with the wrong columns or
            encoding, a path that leaves the folder, or no photograph left. The message lists all problems by
            file and row.
    """
    spec = str(data)
    if re.match(r"world([:@]|$)", spec):
        return _open_world(spec)
    if spec == "kaggle":
        return _read("kaggle", kaggle_folder())
    path = Path(spec).expanduser()
    if not path.exists():
        raise CatalogError(f"{spec} does not exist; data are world[:PRESET[@SEED]], kaggle, or a path")
    root = Path(os.path.abspath(path))
    return _read(root.name if root.is_dir() else root.parent.name, root)


def _open_world(spec: str) -> Catalog:
    from whalelib.data.world import DEFAULT_SEED, PRESETS, make_world  # noqa: PLC0415

    found = re.fullmatch(r"world(?::(?P<preset>[^@]*)(?:@(?P<seed>\d+))?)?", spec)
    if not found:
        raise CatalogError(f"{spec!r} is not of the form world[:PRESET[@SEED]], such as world:lab@2019")
    preset = "lab" if found["preset"] is None else found["preset"]
    if preset not in PRESETS:
        raise CatalogError(f"{spec!r}: there is no world {preset!r}; choose from {', '.join(PRESETS)}")
    seed = int(found["seed"] or DEFAULT_SEED)
    return _read(f"world:{preset}@{seed}", make_world(preset, seed))


def kaggle_folder() -> Path:
    """Return the contest's folder: $WHALE_KAGGLE, or the first that exists of KAGGLE_FOLDERS.

    Raises:
        CatalogError: there is none; the message says where it was looked for.
    """
    if named := os.environ.get("WHALE_KAGGLE"):
        if not Path(named).is_dir():
            raise CatalogError(f"WHALE_KAGGLE names {named}, which is no folder")
        return Path(named).absolute()
    places = [project_root() / folder for folder in KAGGLE_FOLDERS]
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(str(place) for place in places)
    raise CatalogError(f"the contest's data are not here; looked for $WHALE_KAGGLE (unset), {looked}")


def _read(name: str, path: Path) -> Catalog:
    """Read the catalog at a path, and refuse it with the list of all that is wrong."""
    problems = Problems()
    if path.is_dir():
        try:
            reader = find_layout(path)
        except ValueError as error:
            raise CatalogError(str(error)) from None
        table = reader(path, problems)
    elif path.name in ("train.csv", "labels.csv"):
        raise CatalogError(f"{path}: give its folder, {path.parent}, where the photographs lie too")
    elif path.suffix.lower() == ".csv":
        table = read_metadata(path, problems)
    else:
        raise CatalogError(f"{path} is neither a folder nor a CSV file")
    if problems.refused:
        raise refusal(f"{path} is refused", problems)
    if table.empty:
        raise refusal(f"{path}: no photograph is left", problems)
    order = [column for column in table if column not in ("source", "row")] + ["source", "row"]
    table = (
        table[order].astype({column: "str" for column in _TEXT if column in table}).astype({"row": "Int64"})
    )
    return Catalog(name, path if path.is_dir() else path.parent, table, problem_table(problems))
