"""Submissions, and a contest that can be scored without a leaderboard.

Section 1 of the report: one row a test photograph with five guesses, MAP@5 on 22 % (public) and 78 %
(private) of them. The same checks serve the generated world, any data folder, and a file meant for Kaggle.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from whalelib.files import replacing
from whalelib.metrics import GUESSES, NEW_WHALE, average_precision_at_k, parse_predictions, relabel_unseen

COLUMNS = ["Image", "Id"]
PUBLIC_SHARE = 0.22
_SHOWN = 20


class Problem(NamedTuple):
    """One fault of a submission.

    `row` is the line in the file (the header is line 1), None for a photograph that has no row. `refused` is
    False for what a leaderboard would accept, such as another order of rows.
    """

    row: int | None
    image: str
    problem: str
    refused: bool = True

    def __str__(self) -> str:
        where = "no row" if self.row is None else f"row {self.row}"
        return ": ".join(part for part in (where, self.image, self.problem) if part)


class SubmissionError(ValueError):
    """A submission that cannot be scored; `problems` holds every reason."""

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__(_listing(source, self.problems))


class ContestError(ValueError):
    """A contest that cannot be held on these data."""


@dataclass(frozen=True)
class Score:
    """MAP@5 on the public part, the private part and all test photographs; NaN for an empty part."""

    public: float
    private: float
    all: float
    public_photographs: int
    private_photographs: int

    def __str__(self) -> str:
        return (
            f"public {self.public:.5f} ({self.public_photographs} photographs), "
            f"private {self.private:.5f} ({self.private_photographs}), all {self.all:.5f}"
        )


def read_submission(path: Path | str) -> pd.DataFrame:
    """Read a submission CSV as text: columns Image and Id in any order, one row a line, nothing repaired.

    Returns:
        Frame with columns Image, Id (str); the index, named `row`, is the line number in the file. A blank
        line inside the file stays as an empty row so that `check_submission` can name it.

    Raises:
        SubmissionError: not UTF-8, not these columns, or a line with another number of fields.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = [(reader.line_num, fields) for fields in reader]
    except UnicodeDecodeError as error:
        raise SubmissionError(
            str(path), [Problem(None, "", f"not UTF-8 text (byte {error.start})")]
        ) from error
    except csv.Error as error:
        raise SubmissionError(str(path), [Problem(None, "", f"not a CSV file ({error})")]) from error
    if sorted(header) != sorted(COLUMNS):
        raise SubmissionError(
            str(path), [Problem(1, "", f"columns must be Image,Id, not {','.join(header)}")]
        )
    while lines and not lines[-1][1]:
        lines.pop()
    ragged = [
        Problem(row, fields[0], f"{len(fields)} fields instead of 2")
        for row, fields in lines
        if len(fields) not in (0, 2)
    ]
    if ragged:
        raise SubmissionError(str(path), ragged)
    index = pd.Index([row for row, _ in lines], name="row", dtype=int)
    frame = pd.DataFrame([fields or ["", ""] for _, fields in lines], columns=header, index=index, dtype=str)
    return frame[COLUMNS]


def check_submission(
    frame: pd.DataFrame, images: Sequence[str] | None = None, known: Iterable[str] | None = None
) -> list[Problem]:
    """Every fault of a submission, by row; an empty list means that it may be sent.

    The rules: exactly one row a test photograph, in the order of the sample submission; five distinct labels
    a row, parted by one space, each a known id or `new_whale`. Kaggle accepts any order, so order is reported
    with `refused=False`. Kaggle also accepts fewer than five labels; here that is a fault, since a guess left
    out can only lose.

    Args:
        frame: columns Image and Id, as from `read_submission`. Rows of a frame made in memory are numbered as
            the lines of the file it would be written to.
        images: test photographs in the order of the sample; None skips the checks that need them.
        known: ids of the training photographs, with or without `new_whale`; None skips the check of unknown
            ids.
    """
    absent = [name for name in COLUMNS if name not in frame.columns]
    if absent:
        return [Problem(1, "", f"no column {' and no column '.join(absent)}")]
    rows = frame.index if frame.index.name == "row" else range(2, len(frame) + 2)
    names = [name if isinstance(name, str) else "" for name in frame["Image"]]
    texts = [text if isinstance(text, str) else "" for text in frame["Id"]]
    known = None if known is None else set(known) | {NEW_WHALE}
    problems = [
        Problem(row, name, fault)
        for row, name, text in zip(rows, names, texts, strict=True)
        for fault in _guess_faults(text, known)
    ]
    problems += _image_faults(list(rows), names, None if images is None else list(images))
    return sorted(problems, key=lambda problem: (problem.row is None, problem.row or 0))


def write_submission(images: Sequence[str], predictions, path: Path | str) -> Path:
    """Write a submission CSV; a run that is killed leaves the old file or the new one, never half of one.

    Args:
        images: (N,) test photographs.
        predictions: (N, 5) labels, best first.
        path: file to write; its folder is made when missing.

    Raises:
        SubmissionError: a photograph twice, or not five distinct labels in a row. Nothing is written then.
    """
    images, predictions = list(images), np.asarray(predictions, dtype=object)
    if predictions.ndim != 2 or len(predictions) != len(images):
        raise ValueError(
            f"{len(images)} photographs need ({len(images)}, 5) predictions, not {predictions.shape}"
        )
    spaced = [
        i for i, row in enumerate(predictions) if any(isinstance(x, str) and len(x.split()) > 1 for x in row)
    ]
    if spaced:
        raise ValueError(f"a label with a space cannot be written: {list(predictions[spaced[0]])}")
    frame = _submission(images, predictions)
    problems = check_submission(frame)
    if problems:
        raise SubmissionError(str(path), problems)
    path = Path(path)
    with replacing(path) as part:
        frame.to_csv(part, index=False, lineterminator="\n")
    return path


def _submission(images: Sequence[str], predictions: np.ndarray) -> pd.DataFrame:
    """Return the rows of a submission; None, NaN and "" are no label."""
    texts = [
        " ".join(str(label) for label in row if not (pd.isna(label) or label == "")) for row in predictions
    ]
    return pd.DataFrame({"Image": images, "Id": texts})


def commonest(identities: Iterable[str]) -> list[str]:
    """The five most frequent labels, ties by name: every row of the contest's sample submission."""
    counts = pd.Series(list(identities), dtype=object).dropna().value_counts()
    return sorted(counts.index, key=lambda label: (-counts[label], label))[:GUESSES]


def complete(frame: pd.DataFrame, images: Sequence[str], guess: Sequence[str]) -> pd.DataFrame:
    """Put a submission into the order of `images`, with the labels `guess` for a photograph without a row.

    For test photographs that cannot be read: the contest wants a row for them too. A row that is not asked
    for stays, at the end, for `check_submission` to report.
    """
    present = set(frame["Image"])
    lacking = [image for image in images if image not in present]
    filled = pd.concat(
        [frame[COLUMNS], pd.DataFrame({"Image": lacking, "Id": " ".join(guess)}, columns=COLUMNS)]
    )
    place = {image: i for i, image in enumerate(images)}
    order = filled["Image"].map(lambda image: place.get(image, len(place))).to_numpy().argsort(kind="stable")
    return filled.iloc[order].reset_index(drop=True)


class Contest:
    """An offline leaderboard over the test photographs of one data folder; it keeps the labels to itself.

    Attributes:
        name: name of the catalogue.
        images: test photographs, in the order of the sample submission where there is one.
        known: ids of the training photographs, without `new_whale`.
        relabelled: how many test photographs show a whale without training photographs; the right answer for
            them is `new_whale`, as no model can name them.
    """

    __slots__ = ("_grade", "_truth", "images", "known", "name", "relabelled")

    def __init__(self, name: str, solution: pd.DataFrame, known: Iterable[str], images: Sequence[str]):
        """Hold a contest on a checked `solution` (Image, Id, Usage); `Contest.open` makes one from data."""
        self.name, self.images, self.known = name, tuple(images), tuple(known)
        solution = solution.set_index("Image").loc[list(images)]
        truth = relabel_unseen(solution["Id"], {*self.known, NEW_WHALE})
        self.relabelled = int((truth != solution["Id"].to_numpy(dtype=object)).sum())
        self._grade = _grader(list(images), truth, (solution["Usage"] == "public").to_numpy())
        self._truth = pd.Series(truth, pd.Index(images, name="image"), name="identity")

    def __repr__(self) -> str:
        return f"Contest({self.name!r}, {len(self.images)} test photographs, {len(self.known)} known ids)"

    @classmethod
    def open(cls, catalog, seed: int = 0) -> "Contest":
        """Open the contest of a catalogue.

        Labels come from the first of: `hidden/solution.csv` (Image,Id,Usage; a generated world),
        `test_labels.csv` (Image,Id and perhaps Usage), the labels of the catalogue's own test photographs.
        Where no Usage is given, 22 % of the photographs are drawn as public with `seed`, whatever their order
        in the file.

        Raises:
            ContestError: no labels (the message says what to do instead), or a faulty label file (all faults,
                by row).
        """
        root = Path(catalog.root)
        for path in (root / "hidden" / "solution.csv", root / "test_labels.csv"):
            if path.is_file():
                solution = _read_solution(path)
                break
        else:
            solution = _labels_of(catalog)
        if "Usage" not in solution:
            solution = solution.assign(Usage=_draw_usage(solution["Image"], seed))
        return cls(catalog.name, solution, catalog.known, _sample_order(root, solution["Image"]))

    def check(self, submission: pd.DataFrame | Path | str) -> list[Problem]:
        """`check_submission` against this contest's photographs and ids."""
        frame = submission if isinstance(submission, pd.DataFrame) else read_submission(submission)
        return check_submission(frame, self.images, self.known)

    def score(self, submission: pd.DataFrame | Path | str) -> Score:
        """MAP@5 on the public and private parts, as a leaderboard would show after the contest.

        Raises:
            SubmissionError: a fault that keeps it from being scored, with the list of them all.
        """
        named = not isinstance(submission, pd.DataFrame)
        frame = read_submission(submission) if named else submission
        refused = [problem for problem in self.check(frame) if problem.refused]
        if refused:
            raise SubmissionError(str(submission) if named else "submission", refused)
        return self._grade(*parse_predictions(frame))

    def score_guesses(self, images: Sequence[str], guesses: np.ndarray) -> Score:
        """Score guesses (Q, 5), best first, None being none, of Q photographs; as `score`."""
        return self.score(_submission(images, guesses))

    def reveal(self) -> pd.Series:
        """Return the right answers by image, once the contest is over: to see where points were lost.

        Whoever chooses anything by them has no score any more.
        """
        return self._truth.copy()


def _grader(images: list[str], truth: np.ndarray, public: np.ndarray) -> Callable[..., Score]:
    place = {image: i for i, image in enumerate(images)}

    def grade(names: np.ndarray, guesses: np.ndarray) -> Score:
        guesses = guesses[np.argsort([place[name] for name in names])]
        values = average_precision_at_k(guesses, truth)
        return Score(
            public=float(values[public].mean()) if public.any() else float("nan"),
            private=float(values[~public].mean()) if not public.all() else float("nan"),
            all=float(values.mean()),
            public_photographs=int(public.sum()),
            private_photographs=int((~public).sum()),
        )

    return grade


def _listing(source: str, faults: Sequence) -> str:
    lines = [f"{source}: {len(faults)} {'problem' if len(faults) == 1 else 'problems'}"]
    lines += [f"  {fault}" for fault in faults[:_SHOWN]]
    if len(faults) > _SHOWN:
        lines.append(f"  ... and {len(faults) - _SHOWN} more")
    return "\n".join(lines)


def _guess_faults(text: str, known: set[str] | None) -> list[str]:
    labels = text.split()
    faults = []
    if len(labels) != GUESSES:
        faults.append(f"{len(labels)} labels instead of {GUESSES}")
    if " ".join(labels) != text:
        faults.append("labels must be parted by one space, without spaces around them")
    for label in dict.fromkeys(labels):
        if labels.count(label) > 1:
            faults.append(f"{label} is given {labels.count(label)} times")
        if known is not None and label not in known:
            faults.append(f"{label} is neither an id of the training photographs nor {NEW_WHALE}")
    return faults


def _image_faults(rows: list[int], names: list[str], images: list[str] | None) -> list[Problem]:
    problems, first = [], {}
    wanted = None if images is None else set(images)
    for row, name in zip(rows, names, strict=True):
        if not name:
            problems.append(Problem(row, "", "no name of a photograph"))
        elif name in first:
            problems.append(Problem(row, name, f"listed twice, first in row {first[name]}"))
        else:
            first[name] = row
            if wanted is not None and name not in wanted:
                problems.append(Problem(row, name, "not a test photograph"))
    if images is None:
        return problems
    problems += [Problem(None, image, "missing") for image in images if image not in first]
    if not problems and names != images:
        moved = [i for i, (name, image) in enumerate(zip(names, images, strict=True)) if name != image]
        fault = (
            f"another order than the sample's, which has {images[moved[0]]} here ({len(moved)} rows differ)"
        )
        problems.append(Problem(rows[moved[0]], names[moved[0]], fault, refused=False))
    return problems


def _read_solution(path: Path) -> pd.DataFrame:
    try:
        solution = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ContestError(f"{path}: cannot be read as a CSV file ({error})") from error
    lacking = [name for name in COLUMNS if name not in solution]
    if lacking:
        raise ContestError(f"{path}: no column {', '.join(lacking)}; needed are Image,Id and perhaps Usage")
    if "Usage" in solution:
        solution["Usage"] = solution["Usage"].str.strip().str.lower()
    faults = []
    for i, row in enumerate(solution.itertuples(index=False), start=2):
        if not row.Image:
            faults.append(f"row {i}: no name of a photograph")
        if not row.Id or len(row.Id.split()) != 1:
            faults.append(f"row {i}: {row.Image}: the label must be one word, not {row.Id!r}")
        if "Usage" in solution and row.Usage not in ("public", "private"):
            faults.append(f"row {i}: {row.Image}: Usage must be public or private, not {row.Usage!r}")
    faults += [
        f"row {i + 2}: {solution['Image'].iloc[i]}: listed twice"
        for i in np.flatnonzero(solution["Image"].duplicated().to_numpy())
    ]
    if faults or solution.empty:
        raise ContestError(_listing(str(path), faults or ["no labels in it"]))
    return solution


def _labels_of(catalog) -> pd.DataFrame:
    test = catalog.test.table
    unlabelled = test["identity"].isna()
    if unlabelled.any() or not len(test):
        lack = (
            f"{unlabelled.sum()} of {len(test)} test photographs have no label"
            if len(test)
            else "no test photographs"
        )
        raise ContestError(
            f"{catalog.root}: {lack}, so nothing can be scored here. Submit the file to Kaggle (kaggle "
            "competitions submit -c humpback-whale-identification -f FILE -m MESSAGE), or score a validation "
            "split of the training photographs with whalelib.metrics.map_at_k, or put the labels into "
            "test_labels.csv (Image,Id)."
        )
    return pd.DataFrame(
        {"Image": test["image"].to_numpy(dtype=object), "Id": test["identity"].to_numpy(dtype=object)}
    )


def _draw_usage(images: pd.Series, seed: int) -> np.ndarray:
    ranked = np.argsort(images.to_numpy(dtype=object), kind="stable")
    public = np.random.default_rng(seed).permutation(len(images))[: round(PUBLIC_SHARE * len(images))]
    usage = np.full(len(images), "private", dtype=object)
    usage[ranked[public]] = "public"
    return usage


def _sample_order(root: Path, images: pd.Series) -> list[str]:
    sample = root / "sample_submission.csv"
    if not sample.is_file():
        return list(images)
    order = list(read_submission(sample)["Image"])
    if sorted(order) != sorted(images):
        differ = sorted(set(order) ^ set(images))
        raise ContestError(f"{sample}: not the photographs that have labels; first difference {differ[:1]}")
    return order
