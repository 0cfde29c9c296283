"""The submission checks and the offline leaderboard."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from whalelib import contest, metrics
from whalelib.contest import Contest, ContestError, SubmissionError, check_submission, read_submission
from whalelib.data import open_catalog

IDS = [f"w_{i}" for i in range(8)]
IMAGES = [f"{i}.jpg" for i in range(50)]
TRUTH = [metrics.NEW_WHALE if i % 4 == 0 else IDS[i % 8] for i in range(50)]
GUESS = f"new_whale {' '.join(IDS[:4])}"


@dataclass(frozen=True)
class Folder:
    """What a contest needs of a catalogue."""

    root: Path
    table: pd.DataFrame
    name: str = "made"
    known: tuple = tuple(IDS)

    @property
    def test(self):
        return self


@pytest.fixture
def folder(tmp_path):
    return Folder(
        tmp_path, pd.DataFrame({"image": IMAGES, "identity": pd.array([pd.NA] * 50, dtype="string")})
    )


@pytest.fixture
def world(folder):
    usage = ["public" if i < 11 else "private" for i in range(50)]
    solution = pd.DataFrame({"Image": IMAGES, "Id": TRUTH, "Usage": usage})
    (folder.root / "hidden").mkdir()
    solution.to_csv(folder.root / "hidden" / "solution.csv", index=False)
    return folder


def submission(**changes):
    rows = dict.fromkeys(IMAGES, GUESS) | {f"{name[1:]}.jpg": text for name, text in changes.items()}
    return pd.DataFrame({"Image": list(rows), "Id": list(rows.values())})


def text_of(problems):
    return [str(problem) for problem in problems]


def test_a_good_submission_has_no_problem():
    assert check_submission(submission(), IMAGES, IDS) == []


@pytest.mark.parametrize(
    ("guess", "fault"),
    [
        ("w_0 w_1 w_2 w_3", "4 labels instead of 5"),
        ("w_0 w_1 w_2 w_3 w_4 w_5", "6 labels instead of 5"),
        ("", "0 labels instead of 5"),
        (None, "0 labels instead of 5"),
        ("w_0 w_1 w_2 w_3 w_3", "w_3 is given 2 times"),
        ("w_0 w_1 w_2 w_3 w_9", "w_9 is neither an id of the training photographs nor new_whale"),
        ("w_0 w_1 w_2  w_3 w_4", "labels must be parted by one space, without spaces around them"),
        ("w_0 w_1 w_2 w_3 w_4 ", "labels must be parted by one space, without spaces around them"),
    ],
)
def test_faults_of_a_row_name_the_line_and_the_photograph(guess, fault):
    assert text_of(check_submission(submission(_3=guess), IMAGES, IDS)) == [f"row 5: 3.jpg: {fault}"]


def test_all_faults_in_one_list_by_row():
    frame = submission(_1="w_0 w_0 w_2 w_3 w_9")
    frame = pd.concat(
        [frame.iloc[:40], frame.iloc[[2]], pd.DataFrame({"Image": ["", "x.jpg"], "Id": [GUESS] * 2})]
    )
    problems = check_submission(frame, IMAGES, IDS)
    assert text_of(problems)[:5] == [
        "row 3: 1.jpg: w_0 is given 2 times",
        "row 3: 1.jpg: w_9 is neither an id of the training photographs nor new_whale",
        "row 42: 2.jpg: listed twice, first in row 4",
        "row 43: no name of a photograph",
        "row 44: x.jpg: not a test photograph",
    ]
    assert text_of(problems)[5:] == [f"no row: {i}.jpg: missing" for i in range(40, 50)]


def test_another_order_is_reported_but_not_refused(world):
    swapped = submission().iloc[[1, 0, *range(2, 50)]].reset_index(drop=True)
    (problem,) = check_submission(swapped, IMAGES, IDS)
    assert (
        str(problem) == "row 2: 1.jpg: another order than the sample's, which has 0.jpg here (2 rows differ)"
    )
    assert not problem.refused
    rng = np.random.default_rng(0)
    answers = submission(**{f"_{i}": " ".join(rng.permutation(IDS)[:5]) for i in range(50)})
    board = Contest.open(world)
    assert board.score(answers.sample(frac=1, random_state=0)) == board.score(answers)


def test_columns(tmp_path):
    assert text_of(check_submission(pd.DataFrame({"Image": []}))) == ["row 1: no column Id"]
    path = tmp_path / "s.csv"
    path.write_text("Image,Whale\nx.jpg,w_1\n")
    with pytest.raises(
        SubmissionError, match=r"s\.csv: 1 problem\n  row 1: columns must be Image,Id, not Image,Whale"
    ):
        read_submission(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "columns must be Image,Id, not $"),
        (
            b"Image,Id\nx.jpg,w_1,w_2\ny.jpg\n",
            "row 2: x.jpg: 3 fields instead of 2\n  row 3: y.jpg: 1 fields",
        ),
        (b"Image,Id\nx.jpg,w_\xff\n", "not UTF-8 text"),
        ("Image,Id\nx.jpg,w_1\n".encode("utf-16"), "not UTF-8 text"),
        (b'Image,Id\nx.jpg,"w_1\n', "not a CSV file"),
    ],
)
def test_unreadable_files(tmp_path, data, message):
    (tmp_path / "s.csv").write_bytes(data)
    with pytest.raises(SubmissionError, match=message):
        read_submission(tmp_path / "s.csv")


def test_read_keeps_line_numbers_and_accepts_a_byte_order_mark_and_any_column_order(tmp_path):
    path = tmp_path / "s.csv"
    path.write_bytes(
        b"\xef\xbb\xbfId,Image\r\nw_0 NA w_2 w_3 w_4,a.jpg\r\n\r\nw_0 w_1 w_2 w_3,b.jpg\r\n\r\n\r\n"
    )
    frame = read_submission(path)
    assert frame["Image"].tolist() == ["a.jpg", "", "b.jpg"] and frame.index.tolist() == [2, 3, 4]
    assert frame["Id"][2] == "w_0 NA w_2 w_3 w_4"
    assert text_of(check_submission(frame, ["a.jpg", "b.jpg"])) == [
        "row 3: 0 labels instead of 5",
        "row 3: no name of a photograph",
        "row 4: b.jpg: 4 labels instead of 5",
    ]


def test_write_and_read(tmp_path):
    guesses = np.array([text.split() for text in submission()["Id"]], dtype=object)
    path = contest.write_submission(IMAGES, guesses, tmp_path / "new" / "s.csv")
    assert path.read_bytes().startswith(b"Image,Id\n0.jpg,new_whale w_0 w_1 w_2 w_3\n")
    pd.testing.assert_frame_equal(
        read_submission(path).reset_index(drop=True), submission(), check_dtype=False
    )
    assert [item.name for item in path.parent.iterdir()] == ["s.csv"]


def test_write_refuses_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("old")
    with pytest.raises(SubmissionError, match=r"row 2: a\.jpg: 4 labels instead of 5"):
        contest.write_submission(["a.jpg"], [["w_0", "w_1", "w_2", "w_3", None]], path)
    with pytest.raises(SubmissionError, match="listed twice"):
        contest.write_submission(["a.jpg"] * 2, [IDS[:5]] * 2, path)
    with pytest.raises(ValueError, match="need"):
        contest.write_submission(["a.jpg"], IDS[:5], path)
    with pytest.raises(ValueError, match="label with a space"):
        contest.write_submission(["a.jpg"], [["w_0 w_1", *IDS[2:6]]], path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_score_splits_public_and_private(world):
    answers = submission(
        **{f"_{i}": " ".join([TRUTH[i], *[x for x in IDS if x != TRUTH[i]][:4]]) for i in range(11)}
    )
    score = Contest.open(world).score(answers)
    guesses = metrics.parse_predictions(answers)[1]
    assert score.public == 1 and (score.public_photographs, score.private_photographs) == (11, 39)
    assert score.private == metrics.map_at_k(guesses[11:], TRUTH[11:])
    assert score.all == pytest.approx((11 * score.public + 39 * score.private) / 50)
    assert str(score).startswith("public 1.00000 (11 photographs), private 0.")


def test_score_reads_a_file_and_refuses_a_faulty_one(world, tmp_path):
    path = tmp_path / "s.csv"
    submission().to_csv(path, index=False)
    board = Contest.open(world)
    assert board.score(path) == board.score(str(path)) == board.score(submission())
    submission(_7="w_0").iloc[:20].to_csv(path, index=False)
    with pytest.raises(
        SubmissionError, match=r"(?s)s\.csv: 31 problems\n  row 9: 7\.jpg: 1 labels.*\.\.\. and 11 more"
    ) as error:
        board.score(path)
    assert len(error.value.problems) == 31
    assert error.value.problems == board.check(path)


def test_guesses_are_scored_as_a_submission(world):
    board, frame = Contest.open(world), submission()
    guesses = np.array([row.split() for row in frame["Id"]], dtype=object)
    assert board.score_guesses(frame["Image"], guesses) == board.score(frame)


def test_labels_are_not_shown(world):
    board = Contest.open(world)
    public = {name: getattr(board, name) for name in dir(board) if not name.startswith("_")}
    assert set(public) == {
        *("check", "images", "known", "name", "open", "relabelled", "reveal", "score", "score_guesses"),
    }
    assert not hasattr(board, "__dict__")
    assert "w_" not in repr(board) and "w_" not in str(board.score(submission()))


def test_labels_are_shown_when_asked_for(world):
    board = Contest.open(world)
    assert board.reveal().to_dict() == dict(zip(IMAGES, TRUTH, strict=True))


def test_usage_is_drawn_where_there_is_none(folder):
    labels = pd.DataFrame({"Image": IMAGES, "Id": TRUTH})
    labels.to_csv(folder.root / "test_labels.csv", index=False)
    rng = np.random.default_rng(1)
    answers = submission(**{f"_{i}": " ".join(rng.permutation([*IDS, "new_whale"])[:5]) for i in range(50)})
    score = Contest.open(folder).score(answers)
    assert (score.public_photographs, score.private_photographs) == (11, 39)
    assert score.all == metrics.map_at_k(metrics.parse_predictions(answers)[1], TRUTH)
    assert Contest.open(folder, seed=1).score(answers).public != score.public
    labels.sample(frac=1, random_state=0).to_csv(folder.root / "test_labels.csv", index=False)
    assert Contest.open(folder).score(answers).public == score.public


def test_labels_of_the_catalogue_serve_and_unseen_whales_are_new(folder):
    table = pd.DataFrame({"image": IMAGES, "identity": [*TRUTH[:48], "w_unseen", "w_unseen"]})
    board = Contest.open(replace(folder, table=table))
    assert board.relabelled == 2
    expected = metrics.relabel_unseen(table["identity"], IDS)
    assert board.score(submission()).all == metrics.map_at_k([GUESS.split()] * 50, expected)


def test_order_of_the_sample_submission(world):
    sample = submission().iloc[::-1]
    sample.to_csv(world.root / "sample_submission.csv", index=False)
    board = Contest.open(world)
    assert list(board.images) == IMAGES[::-1]
    assert board.check(sample) == [] and not any(problem.refused for problem in board.check(submission()))
    sample.iloc[1:].to_csv(world.root / "sample_submission.csv", index=False)
    with pytest.raises(ContestError, match="not the photographs that have labels"):
        Contest.open(world)


def test_without_labels_the_message_says_what_to_do(folder):
    with pytest.raises(
        ContestError, match=r"50 of 50 test photographs have no label.*Submit the file to Kaggle.*validation"
    ):
        Contest.open(folder)
    with pytest.raises(ContestError, match="no test photographs"):
        Contest.open(replace(folder, table=folder.table.iloc[:0]))


def test_faults_of_a_label_file_are_listed_by_row(folder):
    path = folder.root / "test_labels.csv"
    path.write_text("Image,Id,Usage\na.jpg,w_0,Public\na.jpg,w_1,other\n,w_1,private\nb.jpg,w 1,Private\n")
    with pytest.raises(ContestError) as error:
        Contest.open(folder)
    assert str(error.value).splitlines()[1:] == [
        "  row 3: a.jpg: Usage must be public or private, not 'other'",
        "  row 4: no name of a photograph",
        "  row 5: b.jpg: the label must be one word, not 'w 1'",
        "  row 3: a.jpg: listed twice",
    ]
    path.write_text("Image,Label\na.jpg,w_0\n")
    with pytest.raises(ContestError, match="no column Id"):
        Contest.open(folder)
    path.write_text("Image,Id\n")
    with pytest.raises(ContestError, match="no labels in it"):
        Contest.open(folder)


def test_complete_and_commonest():
    assert contest.commonest(["w_2"] * 3 + ["w_3", "w_1", "new_whale", "new_whale", "w_5", "w_4"]) == [
        "w_2",
        "new_whale",
        "w_1",
        "w_3",
        "w_4",
    ]
    partial = submission().drop(index=[3, 7]).sample(frac=1, random_state=0)
    whole = contest.complete(partial, IMAGES, GUESS.split())
    assert check_submission(whole, IMAGES, IDS) == []
    extra = pd.concat([partial, pd.DataFrame({"Image": ["x.jpg"], "Id": [GUESS]})])
    assert text_of(check_submission(contest.complete(extra, IMAGES, GUESS.split()), IMAGES, IDS)) == [
        "row 52: x.jpg: not a test photograph"
    ]


def test_a_test_photograph_that_cannot_be_read_still_has_its_row(tmp_path, monkeypatch):
    monkeypatch.setenv("WHALE_CACHE", str(tmp_path / "cache"))
    for split, names in (("train", IMAGES[:8]), ("test", IMAGES[8:14])):
        (tmp_path / split).mkdir()
        for i, name in enumerate(names):
            Image.new("RGB", (8, 6), (i, 99, 200)).save(tmp_path / split / name)
    pd.DataFrame({"Image": IMAGES[:8], "Id": IDS}).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame({"Image": IMAGES[8:14], "Id": TRUTH[8:14]}).to_csv(tmp_path / "test_labels.csv", index=False)
    (tmp_path / "test" / IMAGES[9]).write_bytes(b"not a photograph")
    catalog = open_catalog(tmp_path).verified()
    board = Contest.open(catalog)
    assert set(board.images) == set(IMAGES[8:14]) and board.known == tuple(IDS)
    readable = pd.DataFrame({"Image": catalog.test.table["image"], "Id": GUESS})
    with pytest.raises(SubmissionError, match=r"no row: 9\.jpg: missing"):
        board.score(readable)
    score = board.score(contest.complete(readable, board.images, GUESS.split()))
    assert score.all == metrics.map_at_k([GUESS.split()] * 6, TRUTH[8:14])
