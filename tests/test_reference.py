"""The committed numbers against the files of the report's authors, where those are at hand."""

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from whalelib import contest, metrics, report
from whalelib.data import open_catalog, statistics
from whalelib.report import chapter3, chapter4, recompute

SET = os.environ.get("WHALE_REFERENCE", "")
REFERENCE = Path(SET) / "reference"
PREDICTIONS = recompute.find_predictions(REFERENCE) if SET else []

pytestmark = pytest.mark.skipif(
    not SET, reason="WHALE_REFERENCE is not set: the report authors' own files are not part of the project"
)


def test_the_folder_is_there():
    assert REFERENCE.is_dir(), f"WHALE_REFERENCE={SET} holds no folder reference/"


@pytest.mark.parametrize("number", ["2.1", "2.2", "2.3", "2.4"])
def test_tables_of_chapter_2_are_exact(number):
    # Table 2.4 stands on the authors' counts by their script's rule; the text's rule needs the photographs.
    table = getattr(recompute, f"table_{number.replace('.', '_')}")(REFERENCE)
    pd.testing.assert_frame_equal(table, report.table(number), check_dtype=False, check_exact=True)


@pytest.mark.parametrize("name", ["class_sizes", "image_sizes", "image_sizes_rest", "contrast_histogram"])
def test_committed_numbers_are_the_recomputed_ones(name):
    pd.testing.assert_frame_equal(
        getattr(recompute, name)(REFERENCE), getattr(report, name)(), check_dtype=False, check_exact=True
    )


def test_committed_facts_are_the_recomputed_ones():
    committed = report.facts().reset_index()[["fact", "train", "test", "all"]]
    pd.testing.assert_frame_equal(recompute.facts(REFERENCE), committed, check_dtype=False, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [f"table 2.{n}" for n in range(1, 5)]
    + ["facts", "class_sizes", "image_sizes", "diagonals", "contrast_histogram", "bad_photographs"],
)
def test_what_notebooks_say_of_the_numbers(name):
    equal, cells = re.search(r"(\d+) of (\d+) cells equal", report.provenance(name, REFERENCE)).groups()
    assert equal == cells


def test_errata_of_chapter_2_as_shares():
    facts = report.facts()
    assert facts.loc["share of widths 970 to 1150 pixels", ["train", "test"]].round(3).tolist() == [
        0.746,
        0.738,
    ]
    assert facts.loc["mean contrast", ["train", "test", "all"]].astype(float).round(2).tolist() == [
        58.73,
        57.57,
        58.45,
    ]
    labels = recompute.identities(REFERENCE)
    large = labels.value_counts()[lambda counts: counts >= 18]
    assert len(large) == 81 and metrics.NEW_WHALE in large


def test_the_authors_files_agree_with_one_another():
    classes = pd.read_csv(REFERENCE / "data_analysis" / "classes.csv").set_index("Id")["Frequency"]
    labels = recompute.identities(REFERENCE).value_counts()
    assert labels.to_dict() == classes.to_dict()
    assert recompute.contrasts(REFERENCE)["split"].value_counts().to_dict() == {"train": 25361, "test": 7960}


def test_contrast_of_real_photographs_is_the_authors():
    folder = Path(SET) / "real" / "photos2019"
    if not folder.is_dir():
        pytest.skip("the ten photographs of the competition are not at hand")
    ours = statistics(open_catalog(folder), cache=False).set_index("image")
    authors = pd.read_csv(REFERENCE / "data_analysis" / "contrast.train.csv").set_index("Image")["Contrast"]
    error = (ours["contrast"] - authors[ours.index]).abs()
    assert len(error) == 10 and ours["gray_strict"].sum() == 4
    assert error[ours["gray_strict"]].max() < 1e-6
    # JPEG decoders convert colours with small differences of their own.
    assert error.max() < 0.05


def test_there_are_predictions_to_score():
    assert PREDICTIONS, f"no testN.csv or hardN.csv under {REFERENCE / 'predictions'}"


@pytest.mark.parametrize("name", PREDICTIONS, ids=lambda name: f"{name.parent.name}/{name.name}")
def test_predictions_give_their_published_scores(name):
    scores = recompute.score_predictions(REFERENCE, name)
    for score in ("MAP@5", "Top@1", "Top@3", "Top@5"):
        assert f"{scores[score]:.5f}" == f"{scores[score + ' published']:.5f}", score
    assert scores["MAP@5 without relabelling"] < scores["MAP@5"] and scores["relabelled"] > 0
    quoted = report.published_runs().query("run == @scores['run'] and file == @scores['file']")
    for row in quoted.to_dict("records"):
        published = {
            score: row[score] for score in ("MAP@5", "Top@1", "Top@3", "Top@5") if not np.isnan(row[score])
        }
        assert published == {score: scores[f"{score} published"] for score in published}


def test_a_hard_set_goes_with_the_training_list_of_its_number(tmp_path):
    name = next((name for name in PREDICTIONS if name.name == "hard1"), None)
    if name is None:
        pytest.skip("no predictions on the hard set")
    (tmp_path / "curation").symlink_to((REFERENCE / "curation").resolve())
    for ending in (".csv", ".md"):
        target = tmp_path / "predictions" / "swapped" / f"hard2{ending}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(name.with_suffix(ending).read_bytes())
    scores = recompute.prediction_runs(tmp_path).iloc[0]
    assert abs(scores["MAP@5"] - scores["MAP@5 published"]) > 1e-4


def test_relabelled_counts():
    scores = [recompute.score_predictions(REFERENCE, name) for name in PREDICTIONS]
    expected = {"test1": 437, "test2": 484}
    for row in scores:
        assert row["relabelled"] == expected.get(row["file"], row["relabelled"])


def test_real_submissions_pass_the_checks():
    sample = contest.read_submission(REFERENCE / "competition" / "third_place" / "sample_submission.csv")
    labels = recompute.identities(REFERENCE)
    assert set(sample["Id"]) == {" ".join(contest.commonest(labels))}
    paths = sorted((REFERENCE / "submissions").rglob("*.csv"))
    assert paths
    for path in paths:
        problems = contest.check_submission(contest.read_submission(path), sample["Image"], labels)
        refused = [str(problem) for problem in problems if problem.refused]
        # The third place put leaked ids in front of its guesses without cutting to five.
        leaked = 3 if path.name == "submission.processed.csv" else 0
        assert len(refused) == leaked and all("6 labels instead of 5" in problem for problem in refused), path


def test_table_3_2_is_in_the_logs_but_for_its_errata():
    printed, logged = report.table("3.2"), recompute.table_3_2(REFERENCE)
    assert list(printed) == list(logged)
    differ = {
        f"{row['Model']}, step {row['Step']}, {column}": (row[column], logged[column][place])
        for place, row in printed.iterrows()
        for column in printed
        if row[column] != logged[column][place]
    }
    assert differ == {
        "First, step 3, Top@1 validation (%)": (80.0, 80.1),
        "Second, step 2, Top@1 train (%)": (45.4, 37.7),
    }
    cells = report.errata("3.2").query("kind in ['wrong', 'rounding']")
    assert sorted(zip(map(float, cells["printed"]), map(float, cells["corrected"]), strict=True)) == sorted(
        differ.values()
    )


def test_every_line_of_the_first_solutions_logs_is_accounted_for():
    starts, rows = recompute.first_place_logs(REFERENCE)
    assert (len(starts), len(rows), rows["log"].nunique()) == (15, 2278, 10)
    for log, part in rows.groupby("log"):
        text = gzip.decompress((REFERENCE / "logs_1st" / f"train.{log}.log.gz").read_bytes()).decode()
        assert len(part) == text.count(" hr ")  # each row ends with a time, no other line has one
        assert (starts["log"] == log).sum() == text.count("start_time")
    assert starts.groupby("log")["rows"].sum().to_dict() == rows["log"].value_counts().to_dict()
    # Three rows were written twice: by starts that a later one undid.
    assert rows.loc[rows["superseded"], ["log", "line"]].to_numpy().tolist() == [
        ["1", 13],
        ["1", 71],
        ["1", 72],
    ]


def test_the_logs_tell_which_photographs_were_trained_on():
    starts = report.first_place_starts().dropna(subset="photographs").set_index("log")["photographs"]
    sizes = {
        log: len(pd.read_csv(REFERENCE / "competition" / f"train_split_{n}.csv")) for log, n in SPLIT.items()
    }
    assert set(sizes.values()) == {24619, 26393}
    assert (starts / pd.Series(sizes)[starts.index]).between(0.999, 1.001).all()


SPLIT = {"1": 1, "2": 1, "2.1": 1, "2.1.1": 1, "3": 1, "2.2": 2, "4": 2, "4.3": 2, "4.4": 2, "4.4.2": 2}


@pytest.mark.parametrize(
    "name",
    ["first_place_starts", "first_place_checkpoints", "first_place_curves", "chapter3_facts", "table 3.2"],
)
def test_what_notebooks_say_of_chapter_3(name):
    equal, cells = map(
        int, re.search(r"(\d+) of (\d+) cells equal", report.provenance(name, REFERENCE)).groups()
    )
    assert equal == cells - 2 * (name == "table 3.2")


def test_the_extra_photographs_carry_the_playgrounds_labels():
    extra, playground = recompute.extra_photographs(REFERENCE), recompute.playground_labels(REFERENCE)
    assert set(extra["splits"]) == {4} and extra["Image"].is_unique
    carried = chapter3.carried_labels(extra[["Image", "Id"]], playground)
    assert (carried["labels"] == 1).all()
    # Shuffled among the photographs, the same labels would contradict one another for nearly all whales.
    shuffled = extra.assign(Id=np.random.default_rng(0).permutation(extra["Id"]))[["Image", "Id"]]
    several = chapter3.carried_labels(shuffled, playground).query("extra > 1")
    assert (several["labels"] > 1).mean() > 0.9
    # One of the ten photographs at hand is in both contests, and its whale's extra photographs say what it says.
    photograph = open_catalog(Path(SET) / "real" / "photos2019").table.set_index("image")
    twin = playground.set_index("Image").loc["b35cb9b8.jpg", "Id"]
    assert carried.set_index("whale").loc[twin, "label"] == photograph.loc["000a6daec.jpg", "identity"]


def test_table_4_3_is_in_the_logs_but_for_one_cell():
    cells = chapter4.cells(report.table("4.3"), recompute.table_4_3(REFERENCE))
    assert cells["verdict"].value_counts().to_dict() == {"equal": 39, "not checkable": 1}
    assert cells.query("verdict != 'equal'")[["row", "column"]].to_numpy().tolist() == [["c", "Top@1"]]


def test_every_line_of_the_second_solutions_logs_is_accounted_for():
    logs = recompute.second_place_logs(REFERENCE)
    assert [len(part) for part in logs] == [19, 127_890, 694, 13_881]
    for path in sorted((REFERENCE / "logs_2nd").glob("*.log.gz")):
        log, text = path.name.removesuffix(".log.gz"), gzip.decompress(path.read_bytes()).decode()
        assert (logs.rows["log"] == log).sum() == text.count(" hr ")
        assert (logs.bests["log"] == log).sum() == text.count("save max valid")
        assert (logs.starts["log"] == log).sum() == max(text.count("batch_size = "), text.count("Namespace("))


def test_screen_and_other_logs_agree():
    rows, bests = recompute.second_place_logs(REFERENCE)[1:3]
    screens = [log for log in rows["log"].unique() if log.startswith(chapter4.SCREEN)]
    assert len(screens) == 8
    same = [name for name in chapter4.ROWS if name not in ("log", "start", "line")]
    for screen in screens:
        log = screen.removeprefix(chapter4.SCREEN)
        assert (
            bests.loc[bests["log"] == screen, "map5"].tolist()
            == bests.loc[bests["log"] == log, "map5"].tolist()
        )
        every, hundredth = (rows[rows["log"] == name].set_index("iteration") for name in (screen, log))
        columns = [name for name in same if name not in ("iteration", "minutes")]
        pd.testing.assert_frame_equal(every.loc[hundredth.index, columns], hundredth[columns])


def test_each_best_is_the_mean_of_its_two_views():
    logs = recompute.second_place_logs(REFERENCE)
    views = logs.views.assign(mean=(logs.views["plain"] + logs.views["flipped"]) / 2)
    for log, part in views.groupby("log"):
        rises = part.loc[part["mean"] > part["mean"].cummax().shift(fill_value=0), "mean"]
        assert rises.tolist() == logs.bests.loc[logs.bests["log"] == log, "map5"].tolist()


@pytest.mark.parametrize(
    "name",
    [
        "second_place_checkpoints",
        "second_place_schedule",
        "second_place_curves",
        "second_place_submissions",
        "chapter4_facts",
        "table 4.3",
    ],
)
def test_what_notebooks_say_of_chapter_4(name):
    equal, cells = map(
        int, re.search(r"(\d+) of (\d+) cells equal", report.provenance(name, REFERENCE)).groups()
    )
    assert equal == cells - (name == "table 4.3")


def test_the_third_solutions_submission_is_explained():
    images, raw = recompute.third_place_guesses(REFERENCE)
    submitted = recompute.third_place_guesses(REFERENCE, processed=True)
    processed = recompute.third_place_processed(REFERENCE)
    assert (images == submitted[0]).all() and raw.shape == (7960, 5) and submitted[1].shape == (7960, 6)
    assert (processed.guesses == submitted[1]).all() and not processed.unsized
    assert processed.changes["step"].value_counts().to_dict() == {"duplicates": 81, "sizes": 16, "leaks": 6}


def test_what_notebooks_say_of_chapter_5():
    equal, cells = re.search(
        r"(\d+) of (\d+) cells equal", report.provenance("chapter5_facts", REFERENCE)
    ).groups()
    assert equal == cells == str(len(report.chapter5_facts()))


def test_errata_of_chapter_5_that_files_can_tell():
    facts = report.chapter5_facts()
    cells = report.errata().set_index(["item", "cell"])["corrected"]
    assert cells["section 5.5", "share of new_whale first"].startswith(
        f"{facts['share of new_whale first, before']:.1%}".replace("%", " %")
    )
    assert cells["section 5.3.3", "photographs to train on"].startswith(
        f"{facts['training photographs']:,.0f}: "
    )
    grouped = cells["section 5.2.2", "new whales with several images"]
    parts = [facts[f"of these, of new_whale, to {kind}"] for kind in ("new ids", "whales", "groups")]
    assert [int(number) for number in re.findall(r"\d+", grouped)] == parts
    # All boxes of the shipped file have their centre at half their size.
    boxes = pd.read_csv(REFERENCE / "competition" / "third_place" / "landmark.test.5.csv")
    assert len(boxes) == 7960 and np.allclose(boxes[["x", "y"]], boxes[["w", "h"]] / 2, atol=1e-12, rtol=0)


def test_the_index_is_what_the_report_holds():
    path = Path(SET) / "report.txt"
    if not path.is_file():
        pytest.skip("the text of the report is not at hand")
    body = path.read_text(encoding="utf-8").split("Chapter 1 Introduction", 1)[1]
    found = {
        f"{kind.lower()} {number}"
        for kind, number in re.findall(r"^(Table|Figure) (\w\.\d+)\. ", body, flags=re.M)
    }
    found |= {f"section {number}" for number in re.findall(r"^(\d(?:\.\d){1,2}) [A-Z]", body, flags=re.M)}
    found |= {
        f"section {number}" for number in re.findall(r"^(?:Chapter|Appendix) ([2-6A])\b", body, flags=re.M)
    }
    found |= {f"equation {number}" for number in re.findall(r"[({](\d\.\d+)[)}]\W*$", body, flags=re.M)}
    assert found | {"section 1"} == set(report.INDEX["item"])
