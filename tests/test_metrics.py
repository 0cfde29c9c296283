"""The score, against equation 1.1 written out in loops."""

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalelib import metrics

LABELS = ["w_1", "w_2", "w_3", "w_4", metrics.NEW_WHALE]


def equation_1_1(guesses, right, k):
    """sum over ranks of P(rank) * rel(rank), where the right label is relevant only once."""
    score, hits = 0.0, 0
    for rank, guess in enumerate(guesses[:k], start=1):
        relevant = guess == right and guess not in guesses[: rank - 1]
        hits += relevant
        score += hits / rank * relevant
    return score


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([*LABELS, None, ""]), max_size=7), st.sampled_from(LABELS)),
        min_size=1,
    ),
    st.integers(1, 8),
)
def test_equals_equation_1_1(rows, k):
    predicted, truth = [row for row, _ in rows], [right for _, right in rows]
    expected = [equation_1_1(guesses, right, k) for guesses, right in rows]
    np.testing.assert_allclose(metrics.average_precision_at_k(predicted, truth, k), expected)
    assert metrics.map_at_k(predicted, truth, k) == pytest.approx(np.mean(expected))
    top = np.mean([right in guesses[:k] for guesses, right in rows])
    assert metrics.top_k_accuracy(predicted, truth, k) == pytest.approx(top)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 6), min_size=5, max_size=5), st.integers(0, 6)), min_size=1)
)
def test_integer_labels(rows):
    predicted, truth = np.array([row for row, _ in rows]), np.array([right for _, right in rows])
    expected = [equation_1_1(guesses, right, 5) for guesses, right in rows]
    np.testing.assert_allclose(metrics.average_precision_at_k(predicted, truth), expected)


def test_by_hand():
    predicted = [["a", "b", "c", "d", "e"]] * 6
    np.testing.assert_allclose(
        metrics.average_precision_at_k(predicted, list("abcdex")), [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 0]
    )
    assert metrics.average_precision_at_k(predicted, list("abcdex"), 2).tolist() == [1, 0.5, 0, 0, 0, 0]


def test_a_repeated_label_counts_once_and_takes_its_rank():
    assert metrics.map_at_k([["a", "a", "a", "a", "a"]], ["a"]) == 1
    assert metrics.map_at_k([["a", "a", "b", "b", "b"]], ["b"]) == pytest.approx(1 / 3)


def test_missing_guesses_keep_their_place_and_never_match():
    rows = [["a"], [], [None, "b"], [np.nan, pd.NA, "b"], ["", "b"]]
    values = metrics.average_precision_at_k(rows, ["a", "a", "b", "b", "b"])
    np.testing.assert_allclose(values, [1, 0, 1 / 2, 1 / 3, 1 / 2])
    assert metrics.map_at_k(np.array([[1, np.nan], [np.nan, 2]]), [1, 2]) == 0.75
    assert metrics.map_at_k(np.empty((3, 0)), ["a", "b", "c"]) == 0


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, ""])
def test_a_row_without_right_label_is_named(missing):
    with pytest.raises(ValueError, match="1 rows have no right label, first row 1"):
        metrics.map_at_k([["a"], ["b"]], ["a", missing])


def test_bad_input():
    with pytest.raises(ValueError, match="2 rows of predictions for 3 right labels"):
        metrics.map_at_k([["a"], ["b"]], ["a", "b", "c"])
    with pytest.raises(ValueError, match="k must be at least 1"):
        metrics.map_at_k([["a"]], ["a"], 0)
    with pytest.raises(ValueError, match="no rows"):
        metrics.map_at_k([], [])
    with pytest.raises(ValueError, match="one row is a single label"):
        metrics.map_at_k(["a b c d e"], ["a"])
    with pytest.raises(ValueError, match="shape"):
        metrics.map_at_k(np.array(["a", "b"]), ["a", "b"])
    with pytest.raises(TypeError, match="nothing could ever match"):
        metrics.map_at_k([[1, 2]], ["1"])
    with pytest.raises(TypeError, match="nothing could ever match"):
        metrics.relabel_unseen(["a"], [1])


def test_forms_of_input_agree():
    predicted, truth = [["a", "b"], ["b", "a"]], ["a", "a"]
    forms = [
        predicted,
        tuple(map(tuple, predicted)),
        np.array(predicted),
        pd.DataFrame(predicted),
        list(np.array(predicted)),
    ]
    for form in forms:
        for right in (truth, np.array(truth), pd.Series(truth), pd.Series(truth, dtype="string")):
            assert metrics.map_at_k(form, right) == 0.75


def test_relabel_unseen():
    relabelled = metrics.relabel_unseen(["w_1", "w_9", "new_whale", "w_2"], pd.Series(["w_1", "w_2", "w_1"]))
    assert relabelled.tolist() == ["w_1", "new_whale", "new_whale", "w_2"]
    assert metrics.relabel_unseen([3, 4], [3], new=-1).tolist() == [3, -1]
    with pytest.raises(ValueError, match="no right label"):
        metrics.relabel_unseen(["w_1", None], ["w_1"])


def test_parse_predictions():
    frame = pd.DataFrame({"Image": ["x.jpg", "y.jpg", "z.jpg"], "Id": ["a b c d e", " a  b ", None]})
    images, predicted = metrics.parse_predictions(frame)
    assert images.tolist() == ["x.jpg", "y.jpg", "z.jpg"]
    assert predicted.tolist() == [list("abcde"), ["a", "b", None, None, None], [None] * 5]
    assert metrics.parse_predictions(pd.DataFrame({"Image": ["x"], "Id": ["a b c d e f"]}))[1].shape == (1, 6)
    assert metrics.parse_predictions(frame.iloc[:0])[1].shape == (0, 5)


def test_bootstrap_interval():
    values = np.random.default_rng(0).choice([0, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1], 2000)
    low, high = metrics.bootstrap_interval(values, seed=0)
    assert low < values.mean() < high
    normal = 1.96 * values.std() / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(normal, rel=0.1)
    assert (
        metrics.bootstrap_interval(values, seed=0)
        == (low, high)
        != metrics.bootstrap_interval(values, seed=1)
    )
    narrow = metrics.bootstrap_interval(values, seed=0, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert metrics.bootstrap_interval([0.5, 0.5], seed=0) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "level"), [([], 0.95), ([1, np.nan], 0.95), ([[1.0]], 0.95), ([0, 1], 95)]
)
def test_bootstrap_interval_refuses(values, level):
    with pytest.raises(ValueError, match=r"needs a non-empty row|level must lie"):
        metrics.bootstrap_interval(values, 0, level=level)


def test_100000_rows_of_strings_in_a_second():
    rng = np.random.default_rng(0)
    ids = np.array([f"w_{i:07x}" for i in range(5004)], dtype=object)
    truth = ids[rng.integers(0, len(ids), 100_000)]
    frame = pd.DataFrame(
        {"Image": truth, "Id": [" ".join(row) for row in ids[rng.integers(0, len(ids), (100_000, 5))]]}
    )
    seconds = []
    for _ in range(3):
        start = time.process_time()
        metrics.map_at_k(metrics.parse_predictions(frame)[1], truth)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
