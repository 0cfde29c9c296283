"""The report's items and numbers as data, and the claims of the notebooks on them."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalelib import report
from whalelib.data.world.photograph import SPECIALS
from whalelib.report import chapter2, chapter3, chapter4

ROOT = Path(__file__).parent.parent
TABLES = [
    "1.1",
    "2.1",
    "2.2",
    "2.3",
    "2.4",
    "3.1",
    "3.2",
    "3.3",
    "4.1",
    "4.2",
    "4.3",
    "4.4",
    "5.1",
    "5.2",
    "5.3",
]
ROWS = dict(zip(TABLES, [5, 3, 18, 7, 2, 9, 6, 3, 8, 10, 10, 2, 9, 3, 2], strict=True))


def test_every_item_is_claimed_or_still_to_come():
    assert report.claim_problems(report.claims(ROOT / "notebooks")) == []


def test_index_is_complete_by_count_and_without_gaps():
    index = report.INDEX
    assert index["item"].is_unique and not index.isna().any(axis=None)
    assert index["kind"].value_counts().to_dict() == {
        "section": 64,
        "figure": 40,
        "equation": 29,
        "table": 15,
    }
    assert (index["number"].str[0] == index["chapter"]).all()
    for kind, part in index.groupby("kind"):
        numbers = set(part["number"])
        for number in numbers:
            head, _, last = number.rpartition(".")
            if last.isdigit() and int(last) > 1 and head:
                assert f"{head}.{int(last) - 1}" in numbers, f"{kind} {number} has no predecessor"
            if kind == "section" and head:
                assert head in numbers, f"section {number} is in no section"


def notebook(folder, name, claims):
    metadata = {} if claims is None else {"whalelib": {"claims": claims}}
    (folder / f"{name}.ipynb").write_text(json.dumps({"metadata": metadata, "cells": []}))


def test_claims_are_read_from_metadata(tmp_path):
    notebook(tmp_path, "02_01", ["table 2.1", "section 2.1", "table 2.1"])
    notebook(tmp_path, "01_01", ["table 2.1"])
    notebook(tmp_path, "00_01", None)
    assert report.claims(tmp_path) == {"table 2.1": ["01_01", "02_01"], "section 2.1": ["02_01"]}
    assert report.claims(tmp_path / "absent") == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metadata": {"whalelib": {"claims": "table 2.1"}}}'])
def test_a_broken_notebook_is_named(tmp_path, text):
    (tmp_path / "bad.ipynb").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.ipynb"):
        report.claims(tmp_path)


def test_each_kind_of_wrong_claim_is_found():
    later = report.INDEX.loc[report.INDEX["chapter"].isin(["3", "4", "5"]), "item"].tolist()
    now = {item: ["nb"] for item in report.INDEX["item"] if item not in later}
    assert report.claim_problems(now, later) == []
    assert (
        report.claim_problems(now | {"table 3.1": ["nb"]}, [item for item in later if item != "table 3.1"])
        == []
    )
    assert report.claim_problems(now, later[1:]) == [f"{later[0]}: no notebook claims it"]
    lacking = {item: names for item, names in now.items() if item != "equation 2.3"}
    assert report.claim_problems(lacking, later) == ["equation 2.3: no notebook claims it"]
    assert report.claim_problems(lacking, [*later, "equation 2.3"]) == [
        "equation 2.3: listed as to come, but no item of chapters 3 to 5"
    ]
    assert report.claim_problems(now | {"table 3.1": ["nb"]}, later) == [
        "table 3.1: claimed by nb and still listed as to come"
    ]
    assert report.claim_problems(now | {"table 9.9": ["nb"]}, later) == [
        "table 9.9: claimed by nb, but no item of the report"
    ]
    assert report.claim_problems(now, [*later, "table 3.9"]) == [
        "table 3.9: listed as to come, but no item of chapters 3 to 5"
    ]


@pytest.mark.parametrize("number", TABLES)
def test_tables(number):
    table, text = report.table(number), report.table(number, as_text=True)
    assert len(table) == ROWS[number] and list(table.columns) == list(text.columns)
    assert not table.isna().any(axis=None)
    assert all(isinstance(cell, str) for cell in text.to_numpy().ravel())


def test_the_index_and_the_tables_are_the_same_set():
    assert report.INDEX.loc[report.INDEX["kind"] == "table", "number"].tolist() == TABLES
    with pytest.raises(KeyError, match=r"no table 2\.5; it has 1\.1, 2\.1"):
        report.table("2.5")


def test_table_cells_by_hand():
    assert report.table("1.1", as_text=True).iloc[1].tolist() == ["2nd", "Tao Shen", "0.97208"]
    assert report.table("2.2").set_index("Examples")["Occurrences"][["1", "17", "18+"]].tolist() == [
        2073,
        17,
        81,
    ]
    assert report.table("3.3", as_text=True)["Private"].tolist() == ["0.97309", "0.85070", "0.86513"]
    assert report.table("4.2")["Weight"].sum() == 15 and report.table("4.2")["Pseudo labels"].sum() == 5
    assert report.table("4.4")["Public"].tolist() == [0.97359, 0.9715]
    assert report.table("5.2")["Class grouping"].tolist() == [False, False, True]
    assert report.table("5.3")["Private"].tolist() == [0.97113, 0.96889]
    winners = [report.table(number)["Private"][0] for number in ("3.3", "4.4", "5.3")]
    assert winners == report.table("1.1")["Score"][:3].tolist()


def test_printed_numbers_agree_with_one_another():
    sizes = report.table("2.1").set_index("Dataset")["Number of examples"]
    assert sizes["Train"] + sizes["Test"] == sizes["Total"] == 33321
    gray = report.table("2.4")
    assert (gray["Gray scale images"] + gray["Colored images"]).tolist() == [25361, 7960]
    assert np.allclose(gray["Gray scale (%)"] + gray["Colored (%)"], 100)
    assert report.table("2.2")["Occurrences"].sum() == 5005
    assert report.table("4.1").groupby("Transformation set")["Probability"].sum().round(2).tolist() == [
        0.99,
        1,
        1,
        1,
    ]


def test_facts_agree_with_one_another_and_with_the_tables():
    facts, classes = report.facts(), report.class_sizes()
    assert classes["photographs"].tolist() == list(range(1, 74))
    assert classes["whales"].sum() == facts.loc["whales", "train"] == 5004
    assert (
        (classes["photographs"] * classes["whales"]).sum()
        == facts.loc["photographs of whales", "train"]
        == 15697
    )
    assert 15697 + facts.loc["photographs of new_whale", "train"] == 25361
    labels = np.repeat(np.arange(5004), np.repeat(classes["photographs"], classes["whales"]))
    table = chapter2.table_2_2([*labels, *["new_whale"] * 9664])
    pd.testing.assert_frame_equal(table, report.table("2.2"), check_dtype=False)
    common, rest = report.image_sizes(), report.image_sizes_rest()
    for split, total in (("train", 25361), ("test", 7960)):
        assert common[split].sum() + rest[split].sum() == facts.loc["photographs", split] == total
        histogram = report.contrast_histogram().query("split == @split")
        assert histogram["photographs"].sum() == total
        assert histogram["low"].iloc[0] == facts.loc["min contrast", split]
        assert histogram["high"].iloc[-1] == facts.loc["max contrast", split]
        assert np.array_equal(histogram["low"][1:], histogram["high"][:-1])
        middle = (histogram["low"] + histogram["high"]) / 2
        assert np.average(middle, weights=histogram["photographs"]) == pytest.approx(
            facts.loc["mean contrast", split], abs=1
        )
    assert common[["train", "test"]].sum(axis=1).min() == 5
    grays = report.table("2.4").set_index("Dataset")["Gray scale images"]
    assert facts.loc["gray photographs", ["train", "test"]].tolist() == [grays["Train"], grays["Test"]]
    assert facts.loc["mean contrast", "report says"] == "60" and facts.loc["whales", "report says"] == ""


def test_drawn_sizes_give_table_2_3_and_are_the_same_for_a_seed():
    sizes = report.image_sizes_like(3)
    table = chapter2.table_2_3(sizes["split"], sizes["width"], sizes["height"])
    pd.testing.assert_frame_equal(table, report.table("2.3"), check_dtype=False)
    pd.testing.assert_frame_equal(sizes, report.image_sizes_like(3))
    assert not sizes.equals(report.image_sizes_like(4))
    facts = report.facts()
    assert sizes["width"].between(*facts.loc[["least width", "greatest width"], "all"]).all()
    assert sizes["height"].between(*facts.loc[["least height", "greatest height"], "all"]).all()
    share = sizes["width"].between(970, 1150).groupby(sizes["split"]).mean()
    expected = facts.loc["share of widths 970 to 1150 pixels", ["train", "test"]].astype(float)
    assert np.allclose(share[["train", "test"]], expected, atol=0.005)


def test_errata():
    errata = report.errata()
    assert not errata.duplicated(["item", "cell"]).any() and (errata != "").all(axis=None)
    assert set(errata["item"]) <= set(report.INDEX["item"])
    assert set(errata["kind"]) == {"wrong", "code differs", "omitted", "rounding", "unclear", "note", "ocr"}
    cells = report.errata("3.2").set_index("cell")
    cell = cells.loc["Second, step 2, train Top@1"]
    assert (cell["printed"], cell["corrected"], cell["kind"]) == ("45.4", "37.7", "wrong")
    assert report.table("3.2", as_text=True)["Top@1 train (%)"][4] == "45.4"
    assert report.errata("equation 4.9")["corrected"].tolist() == ["x if x > 0; 0 otherwise"]
    assert report.errata("4.1")["kind"].tolist()[0] == "ocr"
    assert report.errata("1.1").empty
    with pytest.raises(KeyError, match="no table 7"):
        report.errata("7")


def test_published_runs():
    runs = report.published_runs()
    assert len(runs) == 32 and runs.groupby("run")["file"].apply(list).map(len).eq(4).all()
    assert set(runs["file"]) == {"test1", "test2", "hard1", "hard2"}
    assert runs["MAP@5"].between(0.69, 0.99).all()


def test_bad_photographs():
    shown = report.bad_photographs()
    figures = [item for item in report.INDEX["item"] if item[:8] in ("figure 2", "figure A")]
    assert shown["item"].tolist() == [
        item for item in figures if item not in ("figure 2.1", "figure 2.2", "figure 2.3")
    ]
    assert shown["image"].is_unique and shown["image"].str.fullmatch(r"[0-9a-f]{9}\.jpg").all()
    assert set(shown["kind"]) <= set(SPECIALS)


def test_diagonals():
    diagonals = report.diagonals()
    assert diagonals["ratio"].tolist()[:3] == [1.75, 1.5, 2.33]
    assert (
        diagonals["sizes"].is_monotonic_decreasing and (diagonals["photographs"] >= diagonals["sizes"]).all()
    )


def test_provenance_tells_quoted_from_derived(monkeypatch):
    assert "not at hand" in report.provenance("table 2.1")
    again = report.table("2.1")
    monkeypatch.setattr(report.recompute, "table_2_1", lambda reference: again)
    assert "9 of 9 cells equal" in report.provenance("table 2.1", Path())
    again = again.replace(7960, 7961)
    assert "8 of 9 cells equal" in report.provenance("table 2.1", Path())
    again = again[:2]
    assert "other rows" in report.provenance("table 2.1", Path())


def test_data_files_are_small():
    folder = resources.files("whalelib.report")
    files = [
        path for part in (folder, folder / "tables") for path in part.iterdir() if path.name.endswith(".csv")
    ]
    assert len(files) == 38
    for path in files:
        assert len(path.read_bytes()) < 30_000, path.name


photographs = st.lists(
    st.tuples(st.sampled_from(["train", "test"]), st.integers(1, 4), st.integers(1, 3), st.booleans()),
    min_size=1,
)


@given(photographs)
def test_chapter_2_equals_counting_by_hand(rows):
    split, width, height, gray = zip(*rows, strict=True)
    sizes = chapter2.table_2_1(split)["Number of examples"].tolist()
    assert sizes == [split.count("train"), split.count("test"), len(rows)]
    table = chapter2.table_2_3(split, width, height, least=20)
    expected = []
    for w in range(1, 5):
        for h in range(1, 4):
            shares = [
                100 * sum(row[:3] == (name, w, h) for row in rows) / split.count(name) if name in split else 0
                for name in ("train", "test")
            ]
            if max(shares) > 20:
                expected.append([w, h, *(round(share, 2) for share in shares)])
    assert np.allclose(table.fillna(0).to_numpy(dtype=float).reshape(-1, 4), np.reshape(expected, (-1, 4)))
    colours = chapter2.table_2_4(split, gray)
    for name, row in zip(("train", "test"), colours.itertuples(index=False), strict=True):
        assert row[1] == sum(part[0] == name and part[3] for part in rows) and row[1] + row[3] == split.count(
            name
        )


@given(st.lists(st.integers(0, 9), min_size=1))
def test_class_sizes_equal_counting_by_hand(labels):
    table = chapter2.table_2_2(labels, last=4).set_index("Examples")["Occurrences"]
    counts = [labels.count(label) for label in set(labels)]
    assert table.tolist() == [counts.count(1), counts.count(2), counts.count(3), sum(n >= 4 for n in counts)]
    sizes = chapter2.figure_2_1(labels)
    assert (sizes["photographs"] * sizes["ids"]).sum() == len(labels) and (sizes["ids"] > 0).all()


def test_contrast_histogram_of_one_split():
    histogram = chapter2.figure_2_3(["test"] * 4, [0, 1, 9, 10])
    assert histogram["photographs"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert histogram["low"].tolist() == list(range(10)) and set(histogram["split"]) == {"test"}


HEADER = """\
 start_time :2020-01-02 03:04:05
 batch_size :5
"""
TITLES = """\
 rate     iter   epoch  | valid   top@1    top@5    map@5  | train    top@1    top@5    map@5 | batch  |  time
-----------------------------------------------------------------------------------------------------------------
"""
RESUMED = HEADER + "  start from600, l_rate =3e-05 \nfreeze=True, batch_size=5, min_num_class=0 \n" + TITLES


def log_row(iteration, epoch, train="1.304    52.100    0.656", time=" 1 hr 04 min"):
    return (
        f"0.00030 {iteration / 1000:5.2f} k {epoch:5.2f}  | 1.348    76.685    91.779    0.8342    0.4000 | "
        f"{train} | 1.361     45.000    0.592 | {time} \n"
    )


def test_a_training_log_is_read_line_by_line():
    nothing = "0.000    0.000    0.000"
    text = (
        HEADER + TITLES + log_row(0, 0, nothing) + "".join(log_row(i, i / 500) for i in (200, 400, 600, 800))
    )
    text += RESUMED + log_row(600, 1.2, nothing) + log_row(800, 1.6)
    starts, rows = chapter3.read_log(text, "7")
    assert starts["rows"].tolist() == [5, 2] and starts["batch"].tolist() == [5, 5]
    assert starts["from"].isna().tolist() == [True, False] and starts["from"][1] == 600
    assert (starts["frozen"][1], starts["rate"][1], starts["least"][1]) == ("True", 3e-05, 0)
    assert starts["photographs"].tolist() == [10000, 10000]
    assert rows["iteration"].tolist() == [0, 200, 400, 600, 800, 600, 800]
    assert rows["superseded"].tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert rows["train_loss"].isna().tolist() == [True, *[False] * 4, True, False]
    last = rows.iloc[-1]
    assert (last["valid_top5"], last["threshold"], last["train_map5"], last["batch_map5"]) == (
        91.779,
        0.4,
        0.656,
        0.592,
    )
    assert last["minutes"] == 64 and last["line"] == 17 and text.splitlines()[16].startswith("0.00030")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HEADER + "Traceback (most recent call last):\n", "line 3: Traceback"),
        (HEADER + TITLES + log_row(0, 0)[:-30] + "\n", "line 5: 0.00030"),
        (log_row(0, 0) + HEADER, "line 1: 0.00030"),
        (HEADER + TITLES + log_row(0, 0).replace("0.8342", "nan"), "line 5: 0.00030"),
        (
            HEADER + "odd\n" + TITLES + "odd again\n",
            "2 lines that cannot be read\n  line 3: odd\n  line 6: odd again",
        ),
    ],
)
def test_a_log_with_odd_lines_is_refused(text, told):
    with pytest.raises(ValueError, match="log 7: ") as refused:
        chapter3.read_log(text, "7")
    assert told in str(refused.value)


def test_an_empty_log_has_no_rows():
    starts, rows = chapter3.read_log("", "7")
    assert starts.empty and rows.empty and list(rows) == chapter3.ROWS and list(starts) == chapter3.STARTS


def test_checkpoints_of_the_first_solutions_training():
    found = report.first_place_checkpoints()
    assert found[["Model", "Step", "log", "iteration"]].equals(chapter3.CHECKPOINTS)
    corrected = found.set_index(["Model", "Step"])["train_top1"]
    assert corrected["Second", 2] == 37.7
    later = found[found["Step"] > 1]
    # Each was the best row of its log, and better than its neighbours by several points.
    assert later["best"].all() and (later["valid_map5"] - later["around"]).between(0.02, 0.08).all()
    assert (later["valid_map5"] - later["last"]).min() > 0.14


def test_curves_hold_the_checkpoints_and_show_the_drift():
    curves = report.first_place_curves()
    keys = ["Model", "Step", "iteration"]
    assert not curves.duplicated(keys).any()
    both = report.first_place_checkpoints().merge(curves, on=keys, suffixes=("", "_curve"))
    assert len(both) == 6 and (both["valid_map5"] == both["valid_map5_curve"]).all()
    last = chapter3.stretches(curves).query("Step == 3 and stretch == 4")
    assert (last["train_top1"] == 25).all() and last["train_loss"].between(1.3, 1.5).all()
    assert len(chapter3.stretches(curves, parts=2)) == 12


def test_carried_labels():
    playground = pd.DataFrame({"Image": list("abcdef"), "Id": ["x", "x", "x", "y", "y", "new_whale"]})
    extra = pd.DataFrame({"Image": list("abdfz"), "Id": ["u", "v", "w", "w", "w"]})
    found = chapter3.carried_labels(extra, playground)
    assert found.to_numpy().tolist() == [["x", 3, 2, 2, "u"], ["y", 2, 1, 1, "w"]]


def test_chapter_3_facts():
    facts = report.chapter3_facts()
    assert facts["extra photographs"] == 1774 and facts["whales of the extra photographs"] == 792
    assert f"{facts['share of new_whale first, First']:.1%}" == "45.3%"
    assert f"{facts['share of new_whale first, Second']:.1%}" == "44.1%"


BEGUN = """\
\t__file__     = main.py
\tout_dir      = ./models/x

\t<additional comments>
\t  ... xxx baseline  ...\x20

** dataset setting **
batch_size = 64
train_dataset :\x20
<process.data.WhaleDataset object at 0x7f9a>
change hard_ratio: 0.01
"""


def second_row(iteration, epoch, map5="0.943", time="30 hr 58 min", name="", top1="0.917"):
    return (
        f"{name}0.0000100 {iteration:5.1f} {epoch:6.1f} | 0.360  {top1}  0.002  ({map5})   | "
        f"0.418  0.001  0.969  (1.000)  | {time}\n"
    )


def test_a_log_of_the_second_solution_is_read_line_by_line():
    text = BEGUN.replace("64", "20") + second_row(0, 0, "0.000", " 0 hr 00 min", top1="0.000")
    text += BEGUN + second_row(0, 0, "0.000", " 0 hr 00 min", top1="0.000")
    text += second_row(100, 0, "0.000", " 0 hr 02 min") + "save max valid!!!!!! : 0.5\n"
    text += "change hard_ratio: 0.007\n" + second_row(200, 1, "0.500", " 1 hr 04 min")
    text += "save max valid!!!!!! : 0.75\n"
    logs = chapter4.read_log(text, "7")
    assert logs.starts[["batch", "rows"]].to_numpy().tolist() == [[20, 1], [64, 3]]
    assert logs.rows["iteration"].tolist() == [0, 0, 100, 200] and logs.rows["start"].tolist() == [1, 2, 2, 2]
    assert logs.rows["hard_ratio"].tolist() == [0.01, 0.01, 0.01, 0.007]
    row = logs.rows.iloc[-1]
    names = ["valid_loss", "valid_top1", "valid_fifth", "valid_map5", "batch_loss", "batch_margin"]
    assert row[names].tolist() == [0.36, 0.917, 0.002, 0.5, 0.418, 0.001]
    assert row[["batch_new", "batch_known", "minutes", "epoch", "rate"]].tolist() == [0.969, 1, 64, 1, 1e-5]
    assert text.splitlines()[row["line"] - 1].endswith(" 1 hr 04 min")
    assert logs.bests["map5"].tolist() == [0.5, 0.75] and logs.views.empty
    assert logs.bests.loc[0, chapter4.SPAN].tolist() == [100, 200, 2, 64]
    assert logs.bests.loc[1, "after"] == 200 and np.isnan(logs.bests.loc[1, "until"])


def screen(*validations):
    """A terminal's output: layers, warnings, and validations (MAP@5 and threshold of both views) with a row each."""
    text = "Namespace(batch_size=32, focal_w=1.0)\nDataParallel(\n  (0): Bottleneck(\nchange lr: 0.0001\n"
    text += "change hard_ratio: 0.01\n" + second_row(0, 0, "0.000", name="x_fold0 ", top1="0.000")
    best = 0
    for number, (plain, flipped) in enumerate(validations, start=1):
        mean = (plain + flipped) / 2
        text += f"{plain} 0.2\n\n{flipped} 0.22\n"
        if mean > best:
            text, best = text + f"save max valid!!!!!! : {mean}\n", mean
        text += second_row(10 * number, 0, f"{mean:.3f}", name="x_fold0 ", top1=f"0.8{number:02}")
    return text


def test_the_terminals_output_gives_both_views():
    logs = chapter4.read_log(screen((0.5, 0.75), (0.25, 0.75)), "screen-7")
    assert logs.starts["batch"].tolist() == [32] and len(logs.rows) == 3
    assert logs.views[["plain", "plain_threshold", "flipped", "flipped_threshold"]].to_numpy().tolist() == [
        [0.5, 0.2, 0.75, 0.22],
        [0.25, 0.2, 0.75, 0.22],
    ]
    assert logs.views["until"].tolist() == [10, 20] and logs.bests["until"].tolist() == [10]


@pytest.mark.parametrize(
    ("log", "text", "told"),
    [
        ("7", BEGUN + "Traceback (most recent call last):\n", "line 12: Traceback"),
        ("7", BEGUN + "0.93 0.2\n", "line 12: 0.93 0.2"),
        ("7", second_row(0, 0) + BEGUN, "line 1: 0.0000100"),
        ("7", BEGUN + second_row(0, 0, "nan"), "line 12: 0.0000100"),
        ("screen-7", "change hard_ratio: 0.01\n" + screen((1.0, 1.0)), "line 1: change"),
        (
            "screen-7",
            screen((0.5, 0.75)).replace("save max valid!!!!!! : 0", "save max valid : nan"),
            "save max",
        ),
        ("screen-7", screen((0.5, 0.75)).replace("0.75 0.22\n", ""), "a validation of one view only"),
        ("screen-7", screen((0.5, 0.75))[:-8] + "\n", "1 lines that cannot be read"),
    ],
)
def test_a_log_of_the_second_solution_with_odd_lines_is_refused(log, text, told):
    with pytest.raises(ValueError, match=f"log {log}: ") as refused:
        chapter4.read_log(text, log)
    assert told in str(refused.value)


def test_an_empty_log_of_the_second_solution_has_no_rows():
    for log in ("7", "screen-7"):
        logs = chapter4.read_log("", log)
        assert [list(part) for part in logs] == [
            chapter4.STARTS,
            chapter4.ROWS,
            chapter4.BESTS,
            chapter4.VIEWS,
        ]
        assert not any(map(len, logs)) and not any(map(len, chapter4.join([logs, logs])))


def made_logs(top1_of_row="0.885"):
    """Logs of all ten models: (a) with a terminal's output, (b) with another validation in between, the others sure."""
    logs = []
    for model, log in chapter4.MODELS.items():
        text = (
            BEGUN
            + second_row(0, 0, "0.000", " 0 hr 00 min", top1="0.000")
            + "save max valid!!!!!! : 0.9345\n"
        )
        logs.append(
            chapter4.read_log(
                text
                + second_row(100, 1, "0.930" if model == "b" else "0.934", "1 hr 15 min", top1=top1_of_row),
                log,
            )
        )
    return [*logs, chapter4.read_log(screen((0.9, 0.96), (0.5, 0.5)), "screen-" + chapter4.MODELS["a"])]


def test_table_4_3_takes_no_row_that_may_be_another_validations():
    logs = chapter4.join(made_logs())
    found = chapter4.checkpoints(logs).set_index("Model")
    assert found["found"].tolist() == ["yes", "no", *["likely"] * 8]
    assert found.loc["a", ["map5", "top1", "plain", "flipped", "until"]].tolist() == [
        0.93,
        0.801,
        0.9,
        0.96,
        10,
    ]
    assert np.isnan(found.loc["b", "top1"]) and np.isnan(found.loc["c", "plain"])
    table = chapter4.table_4_3(logs)
    assert list(table) == list(report.table("4.3")) and table["Batch size"].tolist() == [32, *[64] * 9]
    cells = chapter4.cells(report.table("4.3"), table).set_index(["row", "column"])
    assert cells.loc[("b", "Top@1"), "verdict"] == "not checkable"
    assert cells.loc[("c", "Top@1"), ["derived", "verdict"]].tolist() == [0.885, "equal"]
    assert cells.loc[("c", "MAP@5"), ["printed", "derived", "verdict"]].tolist() == [
        0.926,
        0.934,
        "different",
    ]
    with pytest.raises(ValueError, match="different rows or columns"):
        chapter4.cells(report.table("4.3"), table[:5])


def test_hours_are_rounded_as_printed():
    times = [chapter4.half_hours(minutes) for minutes in (0, 14, 16, 44, 46, 1858, 881, 2248)]
    assert times == ["0h00", "0h00", "0h30", "0h30", "1h00", "31h00", "14h30", "37h30"]


def test_a_schedule_that_differs_between_logs_is_refused():
    rows = pd.DataFrame(
        {"log": ["x", "x", "y", "y"], "epoch": [0, 1, 0, 1], "rate": [1, 2, 1, 2], "hard_ratio": 0.1}
    )
    assert chapter4.schedule(rows).to_numpy().tolist() == [[0, 0, 1, 0.1, 2], [1, 1, 2, 0.1, 2]]
    with pytest.raises(ValueError, match="differ in epoch 1"):
        chapter4.schedule(rows.assign(rate=[1, 2, 1, 3]))


def test_schedule_of_the_second_solutions_training():
    schedule = report.second_place_schedule()
    assert schedule[["from", "to"]].to_numpy().ravel().tolist() == [0, 3, 4, 8, 9, 38, 39, 48, 49, 58, 59, 99]
    assert schedule["rate"].max() == 3e-4 and schedule["rate"].iloc[-1] == 1e-5
    assert (10008 * schedule["hard_ratio"]).astype(int).tolist() == [100, 100, 70, 60, 50, 40]
    assert (schedule["logs"] == 18).all()


def test_checkpoints_of_the_second_solutions_training():
    found, printed = report.second_place_checkpoints(), report.table("4.3")
    assert found["log"].tolist() == chapter4.MODELS.tolist()
    assert found["found"].value_counts().to_dict() == {"yes": 8, "likely": 1, "no": 1}
    assert (found["map5"].round(3) == printed["MAP@5"]).all() and (
        found["batch"] == printed["Batch size"]
    ).all()
    both = (found["plain"] + found["flipped"]) / 2
    assert (both - found["map5"]).abs().dropna().max() < 2e-6
    # Without a margin the loss starts near ln(10008) / 10 and more; with it, at about four times that.
    assert found["first_margin"].between(0.92, 1.06).all()
    assert found["epoch"].tolist() == [81, 78, 99, 95, 92, 86, 93, 53, 44, 90]


def test_curves_of_the_second_solutions_training():
    curves, best = report.second_place_curves(), report.second_place_checkpoints()
    assert len(curves) == 1000 and not curves.duplicated(["Model", "epoch"]).any()
    assert (curves["map5"].isna() == (curves["epoch"] == 0)).all()
    assert (curves.groupby("Model")["map5"].max() <= best.set_index("Model")["map5"].round(3)).all()
    # The best of hundreds of validations is luck in part: it is higher than where the training ends.
    assert (best["map5"] > best["last"]).all()


def test_submissions_with_the_second_solution():
    submissions = report.second_place_submissions().set_index("submission")
    assert submissions.index.tolist() == [
        *chapter4.MODELS,
        "resnet101",
        "seresnet101",
        "seresnext101",
        "ensemble",
    ]
    assert submissions.loc["ensemble", ["whales", "agreement"]].tolist() == [4064, 1]
    singles = submissions.loc[chapter4.MODELS, "agreement"]
    assert singles.idxmin() == chapter4.MODELS["h"] and singles.between(0.901, 0.983).all()
    quoted = report.published_submissions()
    assert set(quoted["submission"]) <= {*submissions.index, "256x512", "pseudo.512x512"}
    ours = (
        quoted[quoted["by"] == "report's authors"]
        .set_index("submission")
        .loc["ensemble", ["public", "private"]]
    )
    assert ours.tolist() == report.table("4.4").loc[1, ["Public", "Private"]].tolist()


def test_chapter_4_facts():
    facts = report.chapter4_facts()
    assert facts["pseudo labels"] == 1505 and facts["pseudo labels of new_whale"] == 0
    assert facts["published leaks with a pseudo label"] == facts["of these, with the leaked label"] == 135
    assert facts["agreement of the vote by 1 / rank"] >= 0.994
    assert f"{facts['pseudo labels'] / 7960:.0%}" == "19%"
