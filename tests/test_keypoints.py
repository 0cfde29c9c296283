import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from whalelib import keypoints, locate
from whalelib.data import CatalogError, open_catalog, statistics
from whalelib.data.layouts import BOX
from whalelib.keypoints import COLUMNS, PLANS, PointedPhotographs, PointNetwork
from whalelib.metrics import box_iou
from whalelib.models import count_parameters, lite0
from whalelib.run import Run, Settings

TINY = replace(PLANS["lab"], backbones=("lite0", "lite1"), size=(64, 96), width=16, images=120)


# Heat maps


def test_a_point_on_a_heat_map_and_back_as_shipped():
    maps = keypoints.heat_maps(torch.tensor([[[40.0, 100.0]]]), (256, 256))
    assert maps.shape == (1, 1, 64, 64)
    assert np.array_equal(keypoints.points_of(maps[0].numpy(), 1.0, (0, 0)), [[41, 102]])
    assert maps.max() == pytest.approx(100 * np.exp(-(0.25**2 + 0.25**2) / 32))


def test_a_hill_is_four_cells_wide_on_64_and_scales_with_the_map():
    for side, sigma in ((256, 4), (128, 2)):
        heat = keypoints.heat_maps(torch.tensor([[[81.0, 41.0]]]), (side, side))[0, 0]
        assert heat[10, 20] == 100
        assert heat[10, 20 + sigma] == pytest.approx(100 * np.exp(-0.5))
        assert heat[10 + sigma, 20] == pytest.approx(100 * np.exp(-0.5))
    assert keypoints.heat_maps(torch.zeros(2, 4, 2), (96, 192)).shape == (2, 4, 24, 48)


@settings(deadline=None, max_examples=50)
@given(st.floats(20, 230), st.floats(20, 230), st.floats(0.2, 1.0))
def test_points_come_back_within_half_a_cell_and_the_shipped_offset(x, y, scale):
    maps = keypoints.heat_maps(torch.tensor([[[x, y]]], dtype=torch.float32), (256, 256))
    found = keypoints.points_of(maps[0].numpy(), scale, (0, 0))[0]
    # Written one pixel of the input less, read two pixels of the photograph more.
    assert np.abs(found - (np.array([x, y]) - 1) / scale - 2).max() <= 2 / scale + 0.5


def test_a_flat_map_shows_no_point():
    flat = np.full((4, 16, 16), 3, np.float32)
    assert np.array_equal(keypoints.points_of(flat, 0.5, (100, 50)), [[102, 52]] * 4)


# The loss


def golden_points():
    return {"points": torch.tensor([[[40.0, 100], [60, 120], [200, 100], [150, 200]]])}


def test_loss_of_empty_maps_as_shipped():
    nothing = torch.zeros(1, 4, 64, 64)
    parts = keypoints.point_loss({"global": nothing, "refined": nothing}, golden_points())
    assert parts["global"] == pytest.approx(19.6391, abs=1e-3)
    assert parts["refined"] == pytest.approx(19.6408, abs=1e-3)
    assert parts["loss"] == pytest.approx(39.28, abs=1e-2)


def test_loss_against_loops():
    batch = {"points": torch.rand(3, 4, 2) * 60}
    output = {name: 60 * torch.randn(3, 4, 16, 24) for name in ("global", "refined")}
    truth = keypoints.heat_maps(batch["points"], (64, 96))
    losses = {}
    for name, maps in output.items():
        losses[name] = []
        for point in range(4):
            error = (truth[:, point] - maps[:, point].clamp(min=0)).abs()
            hill = truth[:, point] > truth.max() / 10
            losses[name].append(0.5 * error[hill].mean() + 0.5 * error[~hill].mean())
    parts = keypoints.point_loss(output, batch)
    assert parts["global"] == pytest.approx(np.mean(losses["global"]), rel=1e-4)
    assert parts["refined"] == pytest.approx(np.mean(sorted(losses["refined"])[2:]), rel=1e-4)
    assert parts["loss"] == parts["global"] + parts["refined"]


def test_loss_of_right_maps_is_zero_and_what_is_negative_counts_as_nothing():
    batch = golden_points()
    truth = keypoints.heat_maps(batch["points"], (256, 256))
    below = torch.where(truth < 1e-3, -50.0, truth)
    assert keypoints.point_loss({"global": truth, "refined": truth}, batch)["loss"] == 0
    assert keypoints.point_loss({"global": below, "refined": below}, batch)["loss"] < 1e-3


def test_only_the_hardest_points_teach_the_second_part():
    maps = torch.zeros(1, 4, 64, 64, requires_grad=True)
    truth = keypoints.heat_maps(golden_points()["points"], (256, 256))
    easy = torch.tensor([1.0, 1.0, 0.0, 0.0]).reshape(4, 1, 1)
    refined = maps + (truth * easy + 1e-3)
    keypoints.point_loss({"global": truth, "refined": refined}, golden_points())["loss"].backward()
    assert (maps.grad.abs().sum((0, 2, 3)) > 0).tolist() == [False, False, True, True]


def test_loss_of_points_far_outside_is_finite():
    maps = torch.zeros(1, 4, 16, 16, requires_grad=True)
    batch = {"points": torch.tensor([[[1.0, 1], [-900, 5], [5, 900], [60, 60]]])}
    loss = keypoints.point_loss({"global": maps + 1, "refined": maps + 1}, batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(maps.grad).all()


# The network


def test_full_size_network_of_the_paper():
    network = PointNetwork(keypoints.se_resnext_maps(50)).eval()
    assert count_parameters(network) == 50_566_648
    with torch.inference_mode():
        output = network(torch.rand(1, 3, 256, 256))
    assert {name: maps.shape for name, maps in output.items()} == dict.fromkeys(
        ("global", "refined"), (1, 4, 64, 64)
    )
    with pytest.raises(ValueError, match="depth = 34"):
        keypoints.se_resnext_maps(34)
    with pytest.raises(FileNotFoundError, match=r"se_resnext101_32x4d-3b2fe3d8\.pth"):
        keypoints.se_resnext_maps(101, "missing.pth")


@pytest.mark.parametrize("variant", [0, 1])
def test_small_network_gives_maps_of_a_quarter_of_any_size(variant):
    network = PointNetwork(keypoints.lite_maps(variant), width=16).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        for maps in network(images).values():
            assert maps.shape == (2, 4, 16, 24)
        one, other = network(images)["refined"]
        assert torch.allclose(network(images[1:])["refined"][0], other, atol=1e-3)
        assert not torch.equal(one, other)


def test_network_begins_with_the_pretrained_weights_and_depends_on_its_seed():
    pretrained = lite0().state_dict()
    networks = [PointNetwork(width=16, seed=seed).state_dict() for seed in (0, 0, 1)]
    kept = {name.removeprefix("backbone.network."): value for name, value in networks[0].items()}
    shared = kept.keys() & pretrained.keys()
    assert len(shared) > 250
    assert all(torch.equal(kept[name], pretrained[name]) for name in shared)
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    assert any(not torch.equal(networks[0][name], networks[2][name]) for name in networks[0])


def test_first_layers_stay_as_they_are():
    network = PointNetwork(width=16).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = keypoints._optimizer(network, 0.1)
    keypoints.point_loss(network(torch.rand(2, 3, 64, 64)), {"points": torch.rand(2, 4, 2) * 60})[
        "loss"
    ].backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    parts = [f"backbone.network.{part}" for part in ("conv_stem", "bn1", "blocks.0", "blocks.1")]
    assert not any(name.startswith(tuple(f"{part}." for part in parts)) for name in moved)
    assert {name for name in before if name.startswith("refine") and name.endswith("weight")} <= moved


# Photographs with points


def test_photographs_keep_their_shape_in_the_upper_left_corner():
    catalog = open_catalog("world:tiny").train
    photographs = PointedPhotographs(catalog, (64, 96))
    shape = statistics(catalog)[["height", "width"]].to_numpy()
    for index in (0, 3):
        pixels, (height, width) = photographs.pixels(index), photographs.inner[index]
        assert pixels.shape == (64, 96, 3)
        assert height == 64 or width == 96
        assert width / height == pytest.approx(shape[index, 1] / shape[index, 0], rel=0.05)
        assert (pixels[height:] == 127).all()
        assert (pixels[:, width:] == 127).all()
        truth = catalog.table[list(COLUMNS)].to_numpy()[index].reshape(4, 2)
        assert np.allclose(photographs[index]["points"], truth * photographs.scale[index])
    bare = replace(catalog, table=catalog.table.drop(columns=list(COLUMNS)))
    assert "points" not in PointedPhotographs(bare, (64, 96))[0]


def test_points_move_with_the_image():
    size, dot = (96, 192), 6
    points = np.array([[60.0, 70], [30, 30], [130, 75], [160, 35]])
    image = np.full((*size, 3), 90, np.uint8)
    for (x, y), value in zip(points.astype(int), (0, 0, 255, 255), strict=True):
        image[y - dot : y + dot, x - dot : x + dot] = value
    transform = keypoints.for_points(size)
    transform.transforms = transform.transforms[:2]  # the moves
    mirrored = 0
    for epoch in range(40):
        changed, moved = keypoints.moved(transform, (0, epoch, 0), image, points)
        assert moved[:2, 0].sum() < moved[2:, 0].sum()
        values = [int(changed[round(y), round(x), 0]) for x, y in moved]
        inside = [(4 < x < size[1] - 5) and (4 < y < size[0] - 5) for x, y in moved]
        mirrored += values[0] > 200
        expected = np.array([255, 255, 0, 0] if values[0] > 200 else [0, 0, 255, 255])
        assert np.abs(expected - values)[inside].max(initial=0) < 60
        assert (moved >= 0).all()
        assert (moved <= np.array(size[::-1]) - 1).all()
    assert 8 < mirrored < 32


def test_training_items_can_be_repeated():
    catalog = open_catalog("world:tiny").train
    photographs = PointedPhotographs(catalog, (64, 96), transform=keypoints.for_points((64, 96)), seed=1)
    one, again = photographs[2], photographs[2]
    photographs.set_epoch(1)
    other = photographs[2]
    assert torch.equal(one["image"], again["image"])
    assert torch.equal(one["points"], again["points"])
    assert not torch.equal(one["points"], other["points"])


def test_upper_points_are_the_tips_where_these_are_seen():
    table = open_catalog("world:tiny").train.table.copy()
    table.loc[table.index[0], "left_tip_y"] = table["y0"].iloc[0] - 40
    taught = keypoints.tips_up(table)
    assert taught["left_up_y"].iloc[0] == table["left_up_y"].iloc[0]
    assert (taught["right_up_x"] == table["right_tip_x"]).mean() > 0.8
    assert taught.drop(columns=["left_up_x", "left_up_y", "right_up_x", "right_up_y"]).equals(
        table.drop(columns=["left_up_x", "left_up_y", "right_up_x", "right_up_y"])
    )
    points = [keypoints.points_box(t[list(COLUMNS)].to_numpy().reshape(-1, 4, 2)) for t in (table, taught)]
    truth = table[list(BOX)].to_numpy()
    before, after = (box_iou(boxes, truth).mean() for boxes in points)
    assert after > before
    bare = table[["image", *COLUMNS]]
    assert keypoints.tips_up(bare).equals(bare)


def test_training_finds_points(tmp_path):
    catalog = open_catalog("world:tiny").train
    plan = replace(TINY, images=500)
    model, history = keypoints.train_points(catalog, plan=plan, folder=tmp_path, device="cpu")
    assert history["loss"].iloc[-1] < 0.8 * history["loss"].iloc[0]
    found = keypoints.predict_points(model, catalog, plan.size)
    boxes = keypoints.points_box(found[list(COLUMNS)].to_numpy().reshape(-1, 4, 2))
    boxes[:, 2:] += 1
    assert np.median(box_iou(boxes, catalog.table[list(BOX)].to_numpy())) > 0.6
    again, same = keypoints.train_points(catalog, plan=plan, folder=tmp_path, device="cpu")
    assert same.equals(history)  # from the checkpoint
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_networks_of_the_paper_say_where_their_weights_are(monkeypatch):
    monkeypatch.delenv("WHALE_SE_RESNEXT50_32X4D", raising=False)
    monkeypatch.setattr(keypoints, "fit", lambda *args, **kwargs: pd.DataFrame())
    with pytest.warns(
        UserWarning, match=r"se_resnext50_32x4d-a260b3a4\.pth and set WHALE_SE_RESNEXT50_32X4D"
    ):
        keypoints.train_points(
            open_catalog("world:tiny").train, name="se_resnext50", plan=replace(TINY, width=16)
        )


# From photographs to boxes


def test_crop_as_shipped():
    assert keypoints.crop_box((100, 100, 900, 400), (500, 1000)) == (20, 70, 981, 431)  # 361 x 961
    assert keypoints.crop_box((5, 5, 995, 495), (500, 1000)) == (0, 0, 1000, 500)
    assert keypoints.crop_box((10, 20, 65, 75), (500, 1000)) == (4, 14, 71, 81)
    assert keypoints.crop_box((10, 20, 60, 70), (500, 1000), margin=0) == (10, 20, 61, 71)


@settings(deadline=None)
@given(st.lists(st.integers(0, 99), min_size=4, max_size=4), st.floats(0, 0.5))
def test_crops_hold_their_box_and_stay_within_the_photograph(sides, margin):
    (x0, x1), (y0, y1) = sorted(sides[:2]), sorted(sides[2:])
    crop = keypoints.crop_box((x0, y0, x1, y1), (100, 100), margin)
    assert 0 <= crop[0] <= x0 <= x1 <= crop[2] <= 100
    assert 0 <= crop[1] <= y0 <= y1 <= crop[3] <= 100
    assert crop[0] < crop[2]
    assert crop[1] < crop[3]


def test_box_of_points():
    points = [[30, 80], [-4, 20], [60, 85], [90, 10]]
    assert keypoints.points_box(points).tolist() == [0, 10, 90, 85]
    assert keypoints.points_box([points, points]).shape == (2, 4)


def test_errors_of_points():
    truth = pd.DataFrame([[10.0, 10, 20, 20, 30, 30, 40, 40]] * 2, columns=list(COLUMNS))
    found = truth.copy()
    found.loc[1, ["left_down_x", "left_down_y"]] = [13, 14]
    errors = keypoints.point_errors(found, truth)
    assert errors.tolist() == [[0, 0, 0, 0], [5, 0, 0, 0]]
    assert keypoints.correct_points(errors, [[0, 0, 80, 60], [0, 0, 80, 60]]) == 1
    assert keypoints.correct_points(errors, [[0, 0, 80, 60], [0, 0, 40, 30]]) == 7 / 8


class Corners(nn.Module):
    """Sees the ends of what is red on the left and of what is blue on the right."""

    def __init__(self, flat=False):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(float(flat)))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        maps = torch.zeros(len(images), 4, images.shape[2] // 4, images.shape[3] // 4)
        bright = images.mean(1) > 0.6
        for place, image in enumerate(bright):
            ys, xs = torch.nonzero(image, as_tuple=True)
            if len(xs) and not self.level:
                left, right, top, low = xs.min(), xs.max(), ys.min(), ys.max()
                points = torch.stack([left, low, left, top, right, low, right, top]).reshape(1, 4, 2)
                maps[place] = keypoints.heat_maps(points.float() + 1, tuple(images.shape[2:]))[0]
        return {"global": maps, "refined": maps}


FLUKES = {"a0.png": (100, 40, 300, 160), "a1.png": (40, 80, 360, 140), "b0.png": (8, 8, 200, 120)}


@pytest.fixture
def folder(bright_flukes):
    return bright_flukes(FLUKES)


@pytest.fixture
def models(monkeypatch):
    models = [Corners(), Corners()]
    monkeypatch.setattr(keypoints, "point_models", lambda run: models)
    return models


def run_on(folder, **options):
    return Run("04_02", Settings(data=str(folder), device="cpu", **options))


def boxes_of(catalog):
    return {row.image: tuple(getattr(row, name) for name in BOX) for row in catalog.table.itertuples()}


def near(box, expected, tolerance=9):  # two cells of a map at half the photograph's size
    return np.abs(np.subtract(box, expected)).max() <= tolerance


def test_photograph_and_mirror_image_agree(folder):
    catalog, model = open_catalog(folder), Corners().train()
    found = keypoints.predict_points(model, catalog, (96, 192), batch_size=2)
    assert model.training
    assert model.calls == 4
    assert found["image"].tolist() == list(FLUKES)
    assert (found["confidence"] > 0.9).all()
    for row in found.itertuples():
        x0, y0, x1, y1 = FLUKES[row.image]
        assert near((row.left_down_x, row.left_down_y), (x0, y1))
        assert near((row.left_up_x, row.left_up_y), (x0, y0))
        assert near((row.right_down_x, row.right_down_y), (x1, y1))
        assert near((row.right_up_x, row.right_up_y), (x1, y0))


def test_boxes_from_points_and_their_crops(folder, models):
    boxes = keypoints.located(run_on(folder), margin=None)
    assert all(near(boxes_of(boxes)[name], box) for name, box in FLUKES.items())
    assert boxes.table["box_from"].tolist() == ["points"] * 3
    crops = keypoints.located(run_on(folder))
    for name, box in boxes_of(boxes).items():
        assert boxes_of(crops)[name] == keypoints.crop_box(box, (200, 400))
    assert crops.table[list(COLUMNS)].notna().all(axis=None)


def test_points_are_found_once_and_networks_averaged(folder, models, monkeypatch):
    one = keypoints.located(run_on(folder))
    calls = models[0].calls
    keypoints.located(run_on(folder))
    assert models[0].calls == calls
    frames = keypoints.found_points(run_on(folder), one)
    shifted = frames[1].assign(**{column: frames[1][column] + 5 for column in COLUMNS})
    monkeypatch.setattr(keypoints, "found_points", lambda run, catalog: [frames[0], shifted])
    moved = keypoints.located(run_on(folder), margin=None)
    before = keypoints.points_box(frames[0][list(COLUMNS)].to_numpy().reshape(-1, 4, 2))
    expected = np.minimum(np.floor(before + 2.5), [400, 200, 400, 200])
    assert np.array_equal(moved.table[list(BOX)].to_numpy(), expected)
    assert np.allclose(moved.table["left_up_x"], frames[0]["left_up_x"] + 2.5)


def test_supplied_boxes_take_precedence_row_by_row(folder, models, tmp_path):
    (folder / "boxes.csv").write_text("Image,x0,y0,x1,y1\na0.png,1,2,31,42\na1.png,5,6,70,80\n")
    given_boxes = tmp_path / "given.csv"
    given_boxes.write_text("Image,x0,y0,x1,y1\na1.png,10,20,30,40\nb0.png,500,0,600,10\n")
    catalog = keypoints.located(run_on(folder), boxes=given_boxes, margin=None)
    boxes = boxes_of(catalog)
    assert boxes["a0.png"] == (1, 2, 31, 42)
    assert boxes["a1.png"] == (10, 20, 30, 40)
    assert near(boxes["b0.png"], FLUKES["b0.png"])
    assert catalog.table["box_from"].tolist() == ["supplied", "supplied", "points"]
    assert catalog.table["left_up_x"].notna().tolist() == [False, False, True]
    assert ("given.csv", 3) in {(row.file, row.row) for row in catalog.problems.itertuples()}
    crops = boxes_of(keypoints.located(run_on(folder), boxes=given_boxes))
    assert crops["a1.png"] == (8, 18, 33, 43)
    with pytest.raises(CatalogError, match="missing"):
        keypoints.located(run_on(folder), boxes=tmp_path / "missing.csv")


def test_without_points_the_whole_photograph(folder, monkeypatch, capsys):
    monkeypatch.setattr(keypoints, "point_models", lambda run: [Corners(flat=True), Corners(flat=True)])
    catalog = keypoints.located(run_on(folder))
    assert set(boxes_of(catalog).values()) == {(0, 0, 400, 200)}
    assert catalog.table["box_from"].tolist() == ["whole"] * 3
    assert "No fluke found in 3 of 3 photographs" in capsys.readouterr().out


def test_the_truth_of_a_world_is_not_supplied(places, models):
    world = open_catalog("world:tiny")
    catalog = keypoints.located(Run("04_02", Settings(data="world:tiny", device="cpu")))
    assert models[0].calls > 0
    assert set(catalog.table["box_from"]) <= {"points", "whole"}
    assert (catalog.table["left_up_x"] - world.table["left_up_x"]).abs().max() > 1


def test_networks_are_trained_once_for_all_data_and_editions(places, folder, monkeypatch):
    trained = []

    def train(catalog, *, name, plan, seed, device, folder):
        trained.append((catalog.name, name, plan.width, seed, device))
        return PointNetwork(keypoints.backbone(name), plan.width, seed), pd.DataFrame({"epoch": [1]})

    monkeypatch.setattr(locate, "WORLD", "world:tiny@2019")
    monkeypatch.setattr(keypoints, "train_points", train)
    monkeypatch.setattr(keypoints, "PLANS", {"lab": TINY, "paper": replace(TINY, width=32)})
    one = keypoints.point_models(run_on(folder))
    other = keypoints.point_models(
        Run("01_01", Settings(data="world:tiny", edition="as_shipped", device="cpu"))
    )
    assert trained == [("world:tiny@2019", name, 16, 0, "cpu") for name in TINY.backbones]
    for network, same in zip(one, other, strict=True):
        assert not network.training
        pairs = zip(network.state_dict().values(), same.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    keypoints.point_models(run_on(folder, seed=1))
    keypoints.point_models(run_on(folder, profile="paper"))
    assert len(trained) == 6


@pytest.mark.skipif("WHALE_REFERENCE" not in os.environ, reason="needs the authors' files")
def test_published_boxes_of_the_two_networks_agree_better_than_those_of_two_solutions():
    competition = Path(os.environ["WHALE_REFERENCE"]) / "reference" / "competition"
    names = ("second_place_boxes_se50", "second_place_boxes_se101", "first_place_boxes")
    tables = [pd.read_csv(competition / f"{name}.csv").set_index("Image")[list(BOX)] for name in names]
    assert tables[0].index.equals(tables[1].index)
    sound = [table.index[(table["x0"] < table["x1"]) & (table["y0"] < table["y1"])] for table in tables]
    common = sound[0].intersection(sound[1]).intersection(sound[2])
    assert len(common) > 0.99 * len(tables[0])
    one, other, first = (table.loc[common].to_numpy() for table in tables)
    assert box_iou(one, other).mean() > box_iou(one, first).mean() > 0.8
