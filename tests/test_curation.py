import os
from pathlib import Path

import pandas as pd
import pytest

from whalelib.data import NEW_WHALE, CatalogError
from whalelib.metrics import relabel_unseen
from whalelib.report import curation

SET = os.environ.get("WHALE_REFERENCE", "")
CURATION = Path(SET) / "reference" / "curation"
real = pytest.mark.skipif(not SET, reason="WHALE_REFERENCE is not set: no lists of the report's authors")

LABELS = "a1 a a2 a b1 b b2 b c1 c c2 c d1 d n1 new_whale n2 new_whale n3 new_whale n4 new_whale"
LISTS = {
    "not_new": "Image,Id,Status\nn1,a,not_new\nn2,b,new\n",
    "mislabeled": "Image,Correct\na2,c\nc2,new_id\n",
    "duplicate_images": "Keep,Remove\nb1,n3\n",
    "duplicate_ids": "Duplicates,Verdict\nb a,true\nc d,false\n",
    "not_valid": "Image,Id,Description\nn4,new_whale,two tails\n",
    "hard": "Image\nb1\nb1\nn4\n",
    "texted": "Image\nn2\nb1\n",
}


def labels_of(text):
    words = text.split()
    return pd.DataFrame({"Image": words[::2], "Id": words[1::2]}, dtype="str")


def pairs(frame):
    return " ".join(f"{image}:{label}" for image, label in frame[["Image", "Id"]].to_numpy())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "duplicates").mkdir()
    for name, (file, _) in curation.FILES.items():
        (tmp_path / file).write_text(LISTS[name])
    return tmp_path


@pytest.fixture
def labels():
    return labels_of(LABELS)


def test_labels_are_put_right(folder, labels):
    lists = curation.read_lists(folder, labels)
    curated = curation.curate(labels, lists)
    # a and b are one whale, called b; c2 has no other photograph of its whale.
    assert pairs(curated.standard) == "a1:b a2:c b2:b c1:c c2:new_whale d1:d n1:b"
    assert pairs(curated.hard) == "b1:b n2:new_whale"
    assert pairs(curated.removed) == "n3:new_whale n4:new_whale"
    assert len(curated.all) == len(curation.correct(labels, lists)) == 9
    assert pairs(labels) == pairs(labels_of(LABELS))
    counts = curation.counts(labels, lists)
    assert counts[["labels changed", "photographs removed", "whales"]].tolist() == [4, 2, 3]
    assert counts[["lines of hard photographs", "photographs in both"]].tolist() == [3, 1]
    assert counts[[name for name in counts.index if name.startswith("all: ")]].tolist() == [9, 3, 7, 2]


def test_a_cell_of_two_photographs(folder, labels):
    (folder / "mislabeled.csv").write_text("Image,Correct\na2 c2,new_id\n")
    lists = curation.read_lists(folder, labels)
    assert pairs(curation.correct(labels, lists)).startswith("a1:b a2:b b1:b b2:b c1:c c2:c")
    both = curation.correct(labels, lists, split_cells=True)
    assert pairs(both).startswith("a1:b a2:new_whale b1:b b2:b c1:c c2:new_whale")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (
            "not_new",
            "Image,Id,Status\nn1,a,perhaps\n",
            r"not_new\.csv, row 2: Status: 'perhaps', not new or not",
        ),
        ("not_new", "Image,Id,Status\nn1,z,new\n", r"not_new\.csv, row 2: Id: there is no label z"),
        ("not_new", "Image,Id,Status\nn1,a,new\nn1,b,new\n", r"row 3: n1 is already in row 2"),
        (
            "mislabeled",
            "Image,Correct\na2 z9,c\n",
            r"mislabeled\.csv, row 2: Image: there is no photograph z9",
        ),
        ("duplicate_images", "Keep,Remove\nb1,n3 n4\n", r"imgs\.csv, row 2: Remove: 'n3 n4', not photograph"),
        (
            "duplicate_ids",
            "Duplicates,Verdict\na,true\n",
            r"duplicates/duplicates\.csv, row 2: .* two or more",
        ),
        ("duplicate_ids", "Duplicates,Verdict\na new_whale,true\n", "there is no whale new_whale"),
        ("duplicate_ids", "Duplicates,Verdict\na b,true\nc a,true\n", "row 3: a is already in row 2"),
        ("hard", "Image\nb1\n\nzz\n", r"hard\.csv, row 4: Image: there is no photograph zz"),
        ("texted", "Name\nb1\n", r"texted\.csv, row 1: no column Image"),
        ("not_valid", "Image,Id\nn4\n", r"not_valid\.csv, row 2: 1 fields where the header has 2"),
    ],
)
def test_faults_of_the_lists(folder, labels, name, text, problem):
    (folder / curation.FILES[name][0]).write_text(text)
    with pytest.raises(CatalogError, match=problem):
        curation.read_lists(folder, labels)


def test_a_list_that_is_not_there(folder, labels):
    (folder / "hard.csv").unlink()
    with pytest.raises(CatalogError, match=r"hard\.csv: can't be read: No such file"):
        curation.read_lists(folder, labels)


def test_read_labels(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("Image,Id\na1,a\nb1,b\n")
    assert pairs(curation.read_labels(path)) == "a1:a b1:b"
    path.write_text("Image,Id\na1,a\na1,b\nb1,\n")
    with pytest.raises(CatalogError) as error:
        curation.read_labels(path)
    assert "train.csv, row 3: a1: already in row 2" in str(error.value)
    assert "train.csv, row 4: b1: a photograph and one label" in str(error.value)


def test_drawing_a_test_set(labels):
    train, test = curation.draw_test(labels, seed=1)
    assert (len(train), len(test)) == (9, 2)
    assert sorted([*train["Image"], *test["Image"]]) == sorted(labels["Image"])
    assert pairs(train) == pairs(labels[labels["Image"].isin(train["Image"])])
    draws = [pairs(curation.draw_test(labels, seed=seed)[1]) for seed in (1, 1, 2, 3, 4)]
    assert draws[0] == draws[1] and len(set(draws)) > 1
    for share in (0, 0.01, 1):
        with pytest.raises(ValueError, match=f"share = {share} of 11"):
            curation.draw_test(labels, seed=1, share=share)


# ---------------------------------------------------------------- the authors' own lists


@pytest.fixture(scope="module")
def contest():
    labels = curation.read_labels(CURATION.parent / "competition" / "train.csv")
    return labels, curation.read_lists(CURATION / "filter", labels)


@real
def test_counts_are_the_authors(contest):
    counts = curation.counts(*contest)
    assert counts.tolist() == [
        *(366, 164, 29, 15, 10, 125, 112, 56, 4260, 1460, 348, 490, 66, 4887),
        *(19967, 4353, 13953, 6014),
        *(5328, 1441, 1869, 3459),
        *(25295, 4887, 15822, 9473),
    ]
    split = curation.counts(*contest, split_cells=True)
    assert split["labels changed"] == counts["labels changed"] + 2


@real
def test_sets_are_the_authors(contest):
    curated = curation.curate(*contest)
    hard = (CURATION / "sets" / "hard.csv").read_text()
    assert curated.hard.to_csv(index=False, lineterminator="\n") == hard
    for number in (1, 2):
        folder = CURATION / "sets" / f"test#{number}"
        parts = [curation.read_labels(folder / f"{part}.csv") for part in ("train", "test")]
        found = pd.concat(parts).sort_values("Image")
        assert pairs(found) == pairs(curated.standard.sort_values("Image"))
    classes = pd.read_csv(CURATION / "sets" / "classes.csv")["Id"]
    assert set(classes) == set(curated.all["Id"]) | {NEW_WHALE}
    log = (CURATION / "sets" / "tests.stats.log").read_text()
    assert (
        f"standard examples: {len(curated.standard)}\n" in log
        and f"total examples: {len(curated.all)}\n" in log
    )


@real
def test_a_draw_is_like_the_authors(contest):
    standard = curation.curate(*contest).standard
    unseen = []
    for seed in range(4):
        train, test = curation.draw_test(standard, seed)
        assert (len(train), len(test)) == (15974, 3993)
        unseen.append((relabel_unseen(test["Id"], train["Id"]) != test["Id"]).sum())
    # The authors drew 437 and 484.
    assert all(400 < count < 520 for count in unseen)
