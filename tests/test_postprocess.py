import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalelib.contest import write_submission
from whalelib.data import NEW_WHALE, CatalogError
from whalelib.metrics import map_at_k
from whalelib.postprocess import (
    changed,
    compare_labels,
    photograph_sizes,
    post_process,
    rank_duplicates,
    rank_leaks,
    rank_sizes,
    read_groups,
    read_ids,
    regroup,
    ungroup,
)
from whalelib.report import chapter5, chapter5_facts, recompute, table

SET = os.environ.get("WHALE_REFERENCE", "")
REFERENCE = Path(SET) / "reference"
THIRD = REFERENCE / "competition" / "third_place"
real = pytest.mark.skipif(not SET, reason="WHALE_REFERENCE is not set: no submission to process")

PAIRS = {"pair": ("a", "b"), "triple": ("c", "d", "e")}
NAMES = ["a", "b", "c", "d", "e", "f", "g", NEW_WHALE]
ROWS = st.lists(st.lists(st.sampled_from(NAMES), min_size=5, max_size=5, unique=True), min_size=1, max_size=6)


def rows(*texts):
    return np.array([[*text.split(), *[None] * 5][:5] for text in texts], dtype=object)


def texts(guesses):
    return [" ".join(label for label in row if label is not None) for row in guesses]


# ---------------------------------------------------------------- the three steps


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a f g h new_whale", "a b f g h"),  # the other id comes in, the fifth falls out
        ("b f a g new_whale", "b a f g new_whale"),  # it moves forward
        ("a b f g h", "a b f g h"),
        ("d f e c g", "d c e f g"),  # in the order of the group
        ("f a b g h", "f a b g h"),  # only behind the first guess
        ("new_whale a f g h", "new_whale a f g h"),
        ("a", "a b"),
    ],
)
def test_duplicates(before, after):
    assert texts(rank_duplicates(rows(before), PAIRS)) == [after]


@given(ROWS)
def test_duplicates_keep_the_first_guess_and_lose_none_but_the_last(guesses):
    found = rank_duplicates(guesses, PAIRS)
    assert found.shape == (len(guesses), 5)
    for before, after in zip(guesses, found, strict=True):
        assert before[0] == after[0] and len(set(after)) == 5
        whale = next((ids for ids in PAIRS.values() if before[0] in ids), ())
        assert set(after[: max(len(whale), 1)]) == {before[0], *whale}
        others = [label for label in before if label not in whale]
        assert [label for label in after if label not in whale] == others[: 5 - len(whale)]
    assert (rank_duplicates(found, PAIRS) == found).all()


def test_missing_guesses_keep_their_places():
    guesses = np.array([[None, "a", "f"], [np.nan, "f", ""], ["a", None, None]], dtype=object)
    assert rank_duplicates(guesses, PAIRS).tolist() == [
        [None, "a", "f", None, None],
        [None, "f", None, None, None],
        ["a", "b", None, None, None],
    ]
    assert rank_leaks(["x", "y", "z"], guesses, {"x": "a"})[0].tolist() == ["a", "f", None, None, None]
    assert changed(guesses, np.array([["a", None, "f"], [None, "f", None], ["a", None, None]])).tolist() == [
        True,
        False,
        False,
    ]


LABELS = {"a1": "a", "a2": "a", "b1": "b", "c1": "c", "d1": "d", "e1": "e", "f1": "f", "n1": NEW_WHALE}
SIZES = {"a1": (3, 4), "a2": (5, 6), "b1": (3, 5), "c1": (1, 1), "d1": (1, 1), "e1": (2, 2), "f1": (3, 4)}


@pytest.mark.parametrize(
    ("size", "before", "after"),
    [
        ((3, 5), "a b f g h", "b a f g h"),
        ((5, 6), "b a f g h", "a b f g h"),
        ((3, 4), "a b f g h", "a b f g h"),  # already first
        ((4, 3), "a b f g h", "a b f g h"),  # height and width are not exchanged
        ((1, 1), "e f g h i", "e f g h i"),  # c and d both have a photograph of that size
        ((2, 2), "c d e f g", "e c d f g"),
        ((2, 2), "c f g h i", "e c f g h"),  # an id that was not guessed comes in
        ((3, 5), "f b a g h", "f b a g h"),  # the first guess is in no group
    ],
)
def test_sizes(size, before, after):
    found, unsized = rank_sizes(["t"], rows(before), PAIRS, SIZES | {"t": size}, LABELS)
    assert texts(found) == [after] and not unsized.any()
    frame = pd.DataFrame([[name, *sides] for name, sides in (SIZES | {"t": size}).items()])
    frame.columns = ["image", "height", "width"]
    assert texts(rank_sizes(["t"], rows(before), PAIRS, frame, LABELS)[0]) == [after]


def test_a_missing_size_leaves_the_row_alone_and_is_counted():
    images, guesses = ["s", "t", "u"], rows("a b f g h", "a b f g h", "c d e f g")
    sizes = SIZES | {"t": (3, 5), "u": (2, 2)}
    found, unsized = rank_sizes(images, guesses, PAIRS, sizes, LABELS)
    assert texts(found) == ["a b f g h", "b a f g h", "e c d f g"] and unsized.tolist() == [
        True,
        False,
        False,
    ]
    # Another photograph of a might be of the same size.
    found, unsized = rank_sizes(images, guesses, PAIRS, sizes, LABELS | {"a3": "a"})
    assert texts(found) == ["a b f g h", "a b f g h", "e c d f g"] and unsized.tolist() == [True, True, False]
    processed = post_process(images, guesses, PAIRS, sizes=sizes, labels=LABELS)
    assert processed.unsized == ["s"] and processed.changes["image"].tolist() == ["t", "u"]


def test_sizes_of_a_table():
    frame = pd.DataFrame({"image": ["s", "t"], "height": [3.0, np.nan], "width": [4.0, np.nan]})
    assert photograph_sizes(frame) == {"s": (3, 4)}


def test_leaks():
    images = ["r", "s", "t", "u"]
    guesses = rows("a b c d f", "a b c d f", "a b c d f", "a b c d f")
    leaks = {"s": "a", "t": "c", "u": "g", "elsewhere": "g"}
    found = rank_leaks(images, guesses, leaks)
    assert texts(found) == ["a b c d f", "a b c d f", "c a b d f", "g a b c d f"] and found.shape == (4, 6)
    found = rank_leaks(images, guesses, leaks, cut=True)
    assert texts(found)[3] == "g a b c d" and found.shape == (4, 5)
    assert texts(guesses) == ["a b c d f"] * 4  # the argument stays as it was


def test_post_process_goes_by_the_original_s_order(tmp_path):
    images = ["s", "t", "u"]
    guesses = rows("a f g h i", "a f g h i", "f g h i j")
    sizes = SIZES | {"s": (3, 5), "t": (3, 5), "u": (9, 9)}
    processed = post_process(images, guesses, PAIRS, {"t": "k", "u": "g"}, sizes, LABELS)
    assert texts(processed.guesses) == ["b a f g h", "k b a f g h", "g f h i j"]
    assert processed.changes.to_numpy().tolist() == [
        ["duplicates", "s", "a f g h i", "a b f g h"],
        ["duplicates", "t", "a f g h i", "a b f g h"],
        ["sizes", "s", "a b f g h", "b a f g h"],
        ["sizes", "t", "a b f g h", "b a f g h"],
        ["leaks", "t", "b a f g h", "k b a f g h"],
        ["leaks", "u", "f g h i j", "g f h i j"],
    ]
    with pytest.raises(ValueError, match="6 labels instead of 5"):
        write_submission(images, processed.guesses, tmp_path / "submission.csv")
    cut = post_process(images, guesses, PAIRS, {"t": "k", "u": "g"}, sizes, LABELS, cut=True)
    write_submission(images, cut.guesses, tmp_path / "submission.csv")
    alone = post_process(images, guesses, PAIRS)
    assert set(alone.changes["step"]) == {"duplicates"} and not alone.unsized
    assert post_process(images, guesses, {}).changes.empty


@pytest.mark.parametrize(
    ("problem", "call"),
    [
        ("group pair: two ids or more", lambda: rank_duplicates(rows("a"), {"pair": ["a"]})),
        ("group pair: two ids or more", lambda: rank_duplicates(rows("a"), {"pair": "ab"})),
        ("group q: a is already", lambda: rank_duplicates(rows("a"), {"p": ["a", "b"], "q": ["c", "a"]})),
        ("a is already", lambda: regroup(["a"], {"p": ["a", "a"]})),
        (r"shape \(5,\)", lambda: rank_duplicates(rows("a")[0], PAIRS)),
        ("s is named twice", lambda: rank_leaks(["s", "s"], rows("a", "b"), {})),
        ("1 photographs", lambda: rank_sizes(["s"], rows("a", "b"), PAIRS, {}, {})),
        ("both sizes and the labels", lambda: post_process(["s"], rows("a"), PAIRS, sizes={})),
        ("1 rows of guesses before, 2 after", lambda: changed(rows("a"), rows("a", "b"))),
    ],
)
def test_wrong_arguments(problem, call):
    with pytest.raises(ValueError, match=problem):
        call()


# ---------------------------------------------------------------- ids grouped for training


def test_regroup_and_ungroup():
    labels = ["a", NEW_WHALE, "b", None, "d", "f"]
    assert regroup(labels, PAIRS).tolist() == ["pair", NEW_WHALE, "pair", None, "triple", "f"]
    with pytest.raises(ValueError, match="pair has the name of a label"):
        regroup(["pair", "a"], PAIRS)
    guesses = rows("pair new_whale f triple g", "f pair a", "f g", "new_0 new_whale f")
    assert texts(ungroup(guesses, PAIRS | {"new_0": [NEW_WHALE]})) == [
        "a b new_whale f c",
        "f a b",
        "f g",
        "new_whale f",
    ]


@given(ROWS)
def test_a_group_guessed_first_gives_what_its_first_id_gives(guesses):
    for row in guesses:
        whale = next((group for group, ids in PAIRS.items() if row[0] == ids[0]), None)
        if whale is not None:
            grouped = [[whale, *(label for label in row[1:] if label not in PAIRS[whale])]]
            assert texts(ungroup(np.array(grouped), PAIRS)) == texts(rank_duplicates([row], PAIRS))


def test_compare_labels():
    before = pd.Series(["a", "b", "f", NEW_WHALE, NEW_WHALE, NEW_WHALE, "g"], index=list("tuvwxyz"))
    after = pd.Series(["pair", "pair", NEW_WHALE, "f", "new_0", "pair", "g"], index=list("tuvwxyz"))
    kinds = compare_labels(before, after[::-1], PAIRS)
    assert kinds.to_numpy().tolist() == [
        ["whale", "group", 2, 2, 1],
        [NEW_WHALE, "group", 1, 1, 1],
        [NEW_WHALE, "new id", 1, 1, 1],
        [NEW_WHALE, "whale", 1, 1, 1],
        ["whale", NEW_WHALE, 1, 1, 1],
    ]
    assert compare_labels(before, before).empty
    with pytest.raises(ValueError, match="1 photographs are in one of the two only, such as t"):
        compare_labels(before, after[1:])
    with pytest.raises(ValueError, match="t is twice in the labels after"):
        compare_labels(before, pd.concat([after, after[:1]]))


# ---------------------------------------------------------------- files


def test_read_groups(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text("Id,SubId\npair,a b\ntriple,c d e\n")
    assert read_groups(path) == PAIRS == read_groups(path, set("abcde"))
    with pytest.raises(CatalogError, match=r"groups\.csv, row 3: triple: e is no id"):
        read_groups(path, set("abcd"))
    path.write_text("Id,SubId\np,a b\nq,c\nr,d a\np,f g\n,h i\ns,j j\nt,k l,m\n")
    with pytest.raises(CatalogError) as error:
        read_groups(path)
    for row, problem in (
        (3, "q: a group of 1"),
        (4, "r: a is already in row 2"),
        (5, "p: a group twice"),
        (6, "a group without a name"),
        (7, "s: j is already in row 7"),
        (8, "3 fields where the header has 2"),
    ):
        assert f"groups.csv, row {row}: {problem}" in str(error.value)
    path.write_text("Id,Sub\np,a b\n")
    with pytest.raises(CatalogError, match="no column SubId"):
        read_groups(path)
    with pytest.raises(CatalogError, match="No such file"):
        read_groups(tmp_path / "none.csv")


def test_read_ids(tmp_path):
    path = tmp_path / "leaks.csv"
    path.write_text("Image,Id\ns,a\nt,b\n")
    assert read_ids(path) == {"s": "a", "t": "b"} == read_ids(path, ["s", "t", "u"], ["a", "b"])
    with pytest.raises(CatalogError, match=r"leaks\.csv, row 3: t: not a test photograph"):
        read_ids(path, ["s"])
    with pytest.raises(CatalogError, match=r"leaks\.csv, row 2: s: a is no id"):
        read_ids(path, known=["b"])
    path.write_text("Image,Id\ns,a\ns,b\nt,\n,c\nu,c d\n")
    with pytest.raises(CatalogError) as error:
        read_ids(path)
    for row, problem in (
        (3, "s: already in row 2"),
        (4, "t: one id is needed, not ''"),
        (5, "no photograph"),
        (6, "u: one id is needed, not 'c d'"),
    ):
        assert f"leaks.csv, row {row}: {problem}" in str(error.value)


# ---------------------------------------------------------------- the real submission


@pytest.fixture(scope="module")
def submission():
    images, raw = recompute.third_place_guesses(REFERENCE)
    return (
        images,
        raw,
        recompute.third_place_guesses(REFERENCE, processed=True)[1],
        recompute.third_place_groups(REFERENCE),
        recompute.third_place_leaks(REFERENCE),
    )


@real
def test_steps_on_the_real_submission(submission):
    images, raw, _, groups, leaks = submission
    assert (len(groups), len(leaks)) == (89, 135)
    processed = post_process(images, raw, groups, leaks)
    assert processed.changes["step"].value_counts().to_dict() == {"duplicates": 81, "leaks": 6}
    longer = processed.guesses[:, 5] != np.array(None)
    assert longer.sum() == 3
    cut = post_process(images, raw, groups, leaks, cut=True).guesses
    assert cut.shape == raw.shape and changed(cut, processed.guesses).sum() == 3


@real
def test_the_real_submission_is_the_processed_one_given_the_sizes(submission, tmp_path):
    images, raw, expected, groups, leaks = submission
    labels = recompute.third_place_labels(REFERENCE)
    swaps = chapter5.size_swaps(images, raw, expected, groups, leaks)
    assert len(swaps) == 16
    sizes = chapter5.made_sizes(images, swaps, groups, labels)
    processed = post_process(images, raw, groups, leaks, sizes, labels)
    assert processed.changes["step"].value_counts().to_dict() == {"duplicates": 81, "sizes": 16, "leaks": 6}
    assert not changed(processed.guesses, expected).any() and not processed.unsized
    text = pd.DataFrame({"Image": images, "Id": texts(processed.guesses)}).to_csv(index=False)
    original = (REFERENCE / "submissions" / "third" / "submission.processed.csv").read_text()
    assert text.split() == original.split()
    # Without the test photographs' sizes the rule moves nothing and says so.
    bare = {name: size for name, size in sizes.items() if name in labels.index}
    unknown = post_process(images, raw, groups, leaks, bare, labels)
    assert len(unknown.unsized) == 180 and changed(unknown.guesses, expected).sum() == 16


@real
def test_the_published_answers(submission):
    images, raw, expected, groups, leaks = submission
    leaked = np.isin(images, list(leaks))
    answers = [leaks[image] for image in images[leaked]]
    assert round(map_at_k(raw[leaked], answers), 4) == 0.9667
    assert map_at_k(post_process(images, raw, groups, leaks).guesses[leaked], answers) == 1
    assert map_at_k(expected[leaked], answers) == 1


@real
def test_grouped_labels(submission):
    groups = submission[3]
    plain = recompute.third_place_labels(REFERENCE)
    grouped = recompute.third_place_labels(REFERENCE, "train.v2")
    kinds = compare_labels(plain, grouped, groups)
    assert kinds["photographs"].sum() == 871
    assert kinds.to_numpy().tolist() == [
        ["whale", "group", 477, 178, 88],
        [NEW_WHALE, "new id", 198, 1, 99],
        [NEW_WHALE, "whale", 189, 1, 188],
        [NEW_WHALE, "group", 7, 1, 7],
    ]
    # Of the photographs of whales, regroup gives the second list but for one group that it leaves out.
    whales = plain != NEW_WHALE
    ours = pd.Series(regroup(plain, groups), index=plain.index)
    differ = ours[whales][ours[whales] != grouped[whales]]
    assert set(differ) == {"group_0088"} and len(differ) == 5


def test_facts_of_chapter_5_agree_with_one_another():
    facts = chapter5_facts()
    assert facts.index.is_unique
    kinds = facts[[name for name in facts.index if name.startswith("of these, ")]]
    assert kinds.sum() == facts["labels changed by grouping"] == 871
    assert facts["ids after grouping"] == 5004 - 178 + 88 + facts["new ids"]
    steps = facts[[f"rows changed by {step}" for step in ("duplicates", "sizes", "leaks")]]
    assert steps.tolist() == [81, 16, 6] and facts["rows changed otherwise"] == 0
    assert steps.max() < facts["rows changed by all steps"] == 99 < steps.sum()
    assert facts["validation photographs"] == 800 + int(800 * 0.276)
    assert (
        facts["training photographs"] == facts["photographs of whales, which guesses are compared with"] - 400
    )
    gaps = table("5.3")[["Public", "Private"]].diff().iloc[1].abs().round(5)
    assert gaps.tolist() == facts[["gap to Park's public score", "gap to Park's private score"]].tolist()


def test_sizes_made_for_swaps():
    images, raw = ["s", "t", "u"], rows("a b f g h", "a f g h i", "c d e f g")
    processed = rows("b a f g h", "a b f g h", "f c d e g")
    swaps = chapter5.size_swaps(images, raw, processed, PAIRS, {})
    assert swaps == {"s": "b"}  # the third row is no swap of ids of one whale
    sizes = chapter5.made_sizes(images, swaps, PAIRS, LABELS)
    found = post_process(images, raw, PAIRS, sizes=sizes, labels=LABELS)
    assert texts(found.guesses) == ["b a f g h", "a b f g h", "c d e f g"] and not found.unsized
