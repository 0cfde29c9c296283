"""Scores of ranked predictions: MAP@k, top-k accuracy, and how sure of them one may be.

Section 1 of the report, eq. 1.1. A prediction is a row of labels, best guess first; a label is a string or an
integer. A missing guess (None, NaN or "") keeps its place in the row and never matches, so a short row is a
row with missing guesses at its end.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from whalelib.data import NEW_WHALE

GUESSES = 5


def average_precision_at_k(predicted, truth, k: int = GUESSES) -> np.ndarray:
    """Average precision at k of each row: one over the rank of the first hit, 0 without a hit.

    With one right label per photograph, P(k) * rel(k) in eq. 1.1 is non-zero only where that label first
    appears; repeating a label gains nothing, and a repeated wrong label still takes up its rank.

    Args:
        predicted: (N, K) labels, best first. Rows of a list may differ in length; K may be less than k.
        truth: (N,) right labels.
        k: ranks that count, at least 1.

    Returns:
        (N,) float64 in {0, 1/k, ..., 1/2, 1}.

    Raises:
        ValueError: lengths differ, k < 1, or a row has no right label (the message names the first such row).
        TypeError: strings are compared with numbers, which could never match.
    """
    hits = _hits(predicted, truth, k)
    if hits.shape[1] == 0:
        return np.zeros(len(hits))
    return np.where(hits.any(axis=1), 1.0 / (hits.argmax(axis=1) + 1), 0.0)


def map_at_k(predicted, truth, k: int = GUESSES) -> float:
    """Mean of `average_precision_at_k` over at least one row: the contest's score (eq. 1.1)."""
    return _mean(average_precision_at_k(predicted, truth, k))


def top_k_accuracy(predicted, truth, k: int) -> float:
    """Share of rows whose right label is among the first k guesses; arguments as above."""
    return _mean(_hits(predicted, truth, k).any(axis=1))


def relabel_unseen(truth, known: Iterable, new=NEW_WHALE) -> np.ndarray:
    """Right labels as a model can name them: whales that its training photographs do not show become `new`.

    A 20 % test set drawn at random holds whales with no photograph left to train on. Calling them new is the
    only right answer there; the published scores of the report's authors need this step.

    Args:
        truth: (N,) labels.
        known: labels of the training photographs (repeats allowed).
        new: label of the whales outside the catalogue.

    Returns:
        (N,) object array.
    """
    truth, known = _column(truth), set(known)
    _comparable(np.array(list(known), dtype=object), truth)
    return np.where(pd.Series(truth, dtype=object).isin(known), truth, np.array(new, dtype=object))


def bootstrap_interval(
    values, seed: int | np.random.Generator, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (N,) values, such as one model's average precisions.

    To compare two models on the same photographs give the differences of their rows. The rows are drawn
    independently: several photographs of one encounter make the true interval wider than this one.

    Returns:
        (low, high).

    Raises:
        ValueError: no values, a value that is not finite, or a level outside (0, 1).
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("bootstrap_interval needs a non-empty row of finite values")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    if values.min() == values.max():
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=draws,
        batch=max(1, 5_000_000 // len(values)),
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def mask_iou(predicted, truth) -> float:
    """Intersection over union of two masks, (H, W) booleans; 1 when both are empty.

    Raises:
        ValueError: their shapes differ.
    """
    predicted, truth = np.asarray(predicted, dtype=bool), np.asarray(truth, dtype=bool)
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {truth.shape}")
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0


def box_iou(predicted, truth) -> np.ndarray:
    """Intersection over union of boxes, pair by pair.

    Args:
        predicted: (N, 4) x0, y0, x1, y1.
        truth: (N, 4).

    Returns:
        (N,) from 0 to 1.

    Raises:
        ValueError: their shapes differ, or a box is empty.
    """
    predicted, truth = np.asarray(predicted, dtype=float), np.asarray(truth, dtype=float)
    if predicted.shape != truth.shape or predicted.ndim != 2 or predicted.shape[1] != 4:
        raise ValueError(f"boxes of shapes {predicted.shape} and {truth.shape}")
    sides = [boxes[:, 2:] - boxes[:, :2] for boxes in (predicted, truth)]
    if not all((side > 0).all() for side in sides):
        raise ValueError("an empty box: x0 < x1 and y0 < y1 are needed")
    common = np.minimum(predicted[:, 2:], truth[:, 2:]) - np.maximum(predicted[:, :2], truth[:, :2])
    common = common.clip(0).prod(axis=1)
    return common / (sides[0].prod(axis=1) + sides[1].prod(axis=1) - common)


def parse_predictions(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Split a submission's `Id` column ("w_1 w_2 new_whale w_3 w_4") into guesses.

    Nothing is checked here (`whalelib.contest.check_submission` does that) and nothing is dropped.

    Args:
        frame: columns Image and Id.

    Returns:
        (N,) image names and (N, 5) object array of labels; None where a row has fewer than five. The array is
        wider than 5 only if some row has more.
    """
    rows = [text.split() if isinstance(text, str) else [] for text in frame["Id"]]
    return frame["Image"].to_numpy(dtype=object), _pad(rows, GUESSES)


def _hits(predicted, truth, k: int) -> np.ndarray:
    """(N, min(K, k)) booleans: is this guess the right label?"""
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    truth, predicted = _column(truth), _table(predicted)
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} rows of predictions for {len(truth)} right labels")
    predicted = predicted[:, :k]
    _comparable(predicted.ravel(), truth)
    missing = pd.isna(predicted)
    if missing.any():
        predicted = np.where(missing, None, predicted)
    return np.asarray(predicted == truth[:, None], dtype=bool)


def _column(truth) -> np.ndarray:
    truth = np.asarray(truth, dtype=object)
    if truth.ndim != 1:
        raise ValueError(f"right labels must be one row of N, not of shape {truth.shape}")
    unlabelled = np.fromiter((pd.isna(label) or label == "" for label in truth), dtype=bool, count=len(truth))
    if unlabelled.any():
        raise ValueError(f"{unlabelled.sum()} rows have no right label, first row {unlabelled.argmax()}")
    return truth


def _table(predicted) -> np.ndarray:
    if isinstance(predicted, Sequence) and not isinstance(predicted, str):
        if any(isinstance(row, str) or not np.iterable(row) for row in predicted):
            raise ValueError("predictions must be N rows of labels: one row is a single label")
        return _pad([list(row) for row in predicted], 0)
    predicted = np.asarray(predicted, dtype=object)
    if predicted.ndim != 2:
        raise ValueError(f"predictions must have the shape (N, K), not {predicted.shape}")
    return predicted


def _pad(rows: list[list], width: int) -> np.ndarray:
    width = max([width, *map(len, rows)])
    table = np.full((len(rows), width), None, dtype=object)
    if all(len(row) == width for row in rows):
        table[:] = rows if rows else table
        return table
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _comparable(labels: np.ndarray, truth: np.ndarray) -> None:
    kinds = _kind(labels), _kind(truth)
    if set(kinds) == {"text", "number"}:
        raise TypeError(f"the right labels are {kinds[1]}s, the others {kinds[0]}s: nothing could ever match")


def _kind(labels: np.ndarray) -> str:
    inferred = pd.api.types.infer_dtype(labels, skipna=True)
    if inferred == "string":
        return "text"
    return "number" if inferred in {"integer", "floating", "mixed-integer-float"} else "other"


def _mean(values: np.ndarray) -> float:
    if not len(values):
        raise ValueError("no rows to score")
    return float(values.mean())
