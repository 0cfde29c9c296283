"""The comparison of the solutions, and the ablation: what is counted, and what is left out."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from whalelib.data import NEW_WHALE
from whalelib.identify import hold_out
from whalelib.recipes import ablation, baseline, compare, first, second, third
from whalelib.recipes.baseline import Answer
from whalelib.run import Run, Settings


def test_ranking_and_rejection_apart():
    truth = np.array(["a", "b", "c", NEW_WHALE, NEW_WHALE], dtype=object)
    similarity = np.array(
        [[0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [0.2, 0.1, 0.3], [0.2, 0.1, 0.0], [0.6, 0.1, 0.0]]
    )
    guesses = [["a", NEW_WHALE, "b", "c", None], ["a", "b", NEW_WHALE, "c", None]]
    guesses += [
        [NEW_WHALE, "c", "a", "b", None],
        [NEW_WHALE, "a", "b", "c", None],
        ["a", NEW_WHALE, "b", "c", None],
    ]
    answer = Answer(np.array(guesses, dtype=object), 0.35, 0.0, similarity, np.array(["a", "b", "c"]))
    found = compare.judged(answer, truth, np.array([1, 2, 7, 0, 0]))
    assert found["MAP@5"] == pytest.approx((1 + 1 / 2 + 1 / 2 + 1 + 1 / 2) / 5)
    assert found["known"] == pytest.approx(2 / 3)
    assert found["new"] == pytest.approx(3 / 4)
    assert found["new_whale first"] == pytest.approx(2 / 5)
    assert found["ranking"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found["rejection"] == pytest.approx(4 / 6)  # .9, .5, .3 above .2; .9 above .6
    assert [found[f"ranking, {name}"] for name in compare.SIZES] == pytest.approx(
        [1, 1 / 2, np.nan, 1], nan_ok=True
    )
    assert found["low"] <= found["MAP@5"] <= found["high"]


def test_without_new_whales_nobody_can_be_rejected():
    answer = Answer(np.array([["a"] + [None] * 4], dtype=object), 0, 0, np.array([[1.0]]), np.array(["a"]))
    found = compare.judged(answer, np.array(["a"], dtype=object), np.array([1]))
    assert np.isnan([found["new"], found["rejection"]]).all()


def test_processes_that_train_the_baseline_together_keep_none_out(six_animals, monkeypatch):
    folders = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("fcntl.flock", lambda file, _: folders.append(Path(file.name).parent.name))
    monkeypatch.setattr(baseline, "fit", lambda *_, **__: pd.DataFrame({"steps": [1]}))
    baseline.trained(six_animals)
    assert {name.partition("-")[0] for name in folders} == {"pixels"}


def test_all_see_as_many_images_as_the_baseline_under_every_profile(contest, monkeypatch):
    assert compare._share(contest, first) == 1
    large = Run("06_01", replace(contest.settings, profile="paper"))
    monkeypatch.setattr(first, "parts", lambda run: first.Parts(run.catalog.train, None, None, (8, 8), 0))
    rest, _ = hold_out(contest.catalog.train)
    own = first.budget("paper", first.parts(large))
    assert compare._share(large, first) * own == pytest.approx(baseline.budget("paper", rest))


@pytest.fixture
def contest(six_animals):
    """The run of six animals, with three of its photographs to be named."""
    folder = six_animals.settings.located
    rows = pd.read_csv(folder / "train.csv").iloc[[0, 3, -1]].assign(Image=["x.png", "y.png", "z.png"])
    (folder / "test").mkdir()
    boxes = pd.read_csv(folder / "boxes.csv")
    for old, new in zip(
        pd.read_csv(folder / "train.csv")["Image"].iloc[[0, 3, -1]], rows["Image"], strict=True
    ):
        shutil.copy(folder / "train" / old, folder / "test" / new)
        shutil.copy(folder / "masks" / old, folder / "masks" / new)
    boxes = pd.concat([boxes, boxes.iloc[:3].assign(Image=rows["Image"].tolist())])
    boxes.to_csv(folder / "boxes.csv", index=False)
    rows.to_csv(folder / "test_labels.csv", index=False)
    return Run("06_01", Settings(data=str(folder)))


def test_all_see_as_many_images_and_are_judged_alike(contest, monkeypatch):
    monkeypatch.setitem(compare.baseline.SIZES, "lab", (32, 64))  # the first recipe's too
    monkeypatch.setitem(second.SIZES, "lab", ((32, 64), (32, 32)))
    contenders = {name: compare.contender(contest, name) for name in ("baseline", "first", "second")}
    assert all(one.images > 0 and one.training > 0 for one in contenders.values())
    assert contenders["baseline"].images == 14 * 16  # of the 18 named ones two are held out
    table = compare.table(contest, contenders)
    ways = [(name, way) for name in contenders for way in compare.WAYS[name]]
    assert table.index.tolist() == ways
    assert table["MAP@5"].between(0, 1).all()
    values = compare.measure(contest, ["baseline"])
    assert values["baseline, by neighbours: MAP@5"] == round(table["MAP@5"].iloc[0], 4)


def test_an_unknown_contender(contest):
    with pytest.raises(ValueError, match="fourth"):
        compare.contender(contest, "fourth")


def test_every_part_is_left_out_once():
    for recipe, module in (("first", first), ("second", second), ("third", third)):
        left_out = [
            networks[0].without for networks, _ in ablation.CASES[recipe].values() if networks[0].without
        ]
        assert left_out == [(part,) for part in module.PARTS]


@pytest.mark.parametrize("choices", [first.Choices, second.Choices, third.Choices])
def test_only_parts_can_be_left_out(choices):
    with pytest.raises(ValueError, match="the rudder"):
        choices(without=("the rudder",))


def test_an_answer_takes_the_networks_and_views_of_its_case(monkeypatch):
    calls = []
    train = lambda run, choices: choices  # noqa: E731
    monkeypatch.setitem(
        ablation.ANSWER, "second", (train, lambda networks, **views: calls.append((networks, views)))
    )
    ablation.answer(None, "second", "two networks, wide and square")
    ablation.answer(None, "second", "named without mirror images")
    (two, none), (one, views) = calls
    assert [network.size for network in two] == [(96, 192), (96, 96)]
    assert none == {}
    assert views == {"mirrored": False}
    assert one == [second.Choices()]
