import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from whalelib import keypoints, landmarks, locate
from whalelib.data import CatalogError, open_catalog
from whalelib.data.layouts import BOX
from whalelib.landmarks import COLUMNS, LANDMARKS, PLANS, TEN, TEN_COLUMNS, LandmarkNetwork, MarkedPhotographs
from whalelib.metrics import box_iou
from whalelib.models import count_parameters
from whalelib.run import Run, Settings

TINY = replace(PLANS["lab"], side=64, grid=2, images=135, batch=4)
SET = os.environ.get("WHALE_REFERENCE", "")
needs_reference = pytest.mark.skipif(not SET, reason="needs the authors' files")

share = st.floats(0.05, 0.95)
boxes_of_shares = st.tuples(share, share, share, share)


# Anchors


def test_anchors_are_nine_shapes_a_cell_in_the_order_of_the_output():
    anchors = landmarks.anchors(3)
    assert anchors.shape == (81, 4)
    shapes = anchors.reshape(9, 9, 4)
    assert torch.allclose(
        shapes[:, 0, 2:].T[0], torch.tensor([0.15, 0.3, 0.075, 0.3, 0.6, 0.15, 0.6, 1.2, 0.3])
    )
    assert torch.allclose(
        shapes[:, 0, 2:].T[1], torch.tensor([0.15, 0.075, 0.3, 0.3, 0.15, 0.6, 0.6, 0.3, 1.2])
    )
    assert torch.allclose(shapes[4, :, 0], torch.tensor([1, 3, 5] * 3) / 6)  # rows, then columns
    assert torch.allclose(shapes[4, :, 1], torch.tensor([1, 3, 5]).repeat_interleave(3) / 6)


@given(boxes_of_shares, st.lists(st.tuples(share, share), min_size=4, max_size=4))
def test_codes_there_and_back(box, points):
    anchors = landmarks.anchors(9).double()
    box, points = torch.tensor(box, dtype=torch.double), torch.tensor(points, dtype=torch.double)
    back = landmarks.decode_boxes(landmarks.encode_boxes(box, anchors), anchors)
    assert (back - box).abs().max() < 1e-6
    back = landmarks.decode_points(landmarks.encode_points(points, anchors), anchors)
    assert (back - points).abs().max() < 1e-6


def test_codes_by_hand():
    box, anchor = torch.tensor([0.5, 0.4, 0.6, 0.3]), torch.tensor([0.2, 0.6, 0.3, 0.4])
    assert landmarks.encode_boxes(box, anchor).tolist() == pytest.approx([1, -0.5, np.log(2), np.log(0.75)])
    points = torch.tensor([[0.5, 0.4], [0.2, 0.8]])
    assert torch.allclose(landmarks.encode_points(points, anchor), torch.tensor([[1.0, -0.5], [0, 0.5]]))


@given(boxes_of_shares, boxes_of_shares)
def test_right_overlap_is_that_of_the_corners(one, other):
    corners = [landmarks._corners(np.array([box])) for box in (one, other)]
    pair = [torch.tensor(box, dtype=torch.double) for box in (one, other)]
    assert landmarks.overlaps(*pair) == pytest.approx(box_iou(*corners)[0], abs=1e-9)


def test_overlap_as_shipped_takes_the_others_height():
    square, flat = torch.tensor([0.5, 0.5, 0.6, 0.6]), torch.tensor([0.5, 0.5, 0.6, 0.3])
    assert landmarks.overlaps(square, flat, "as_shipped") == pytest.approx(1)
    assert landmarks.overlaps(square, flat) == pytest.approx(0.5)
    assert landmarks.overlaps(flat, square, "as_shipped") == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="edition = 'right'"):
        landmarks.overlaps(square, flat, "right")


# The loss

GOLDEN = {
    "box": torch.tensor([[0.5, 0.5, 0.6, 0.3]]),
    "points": torch.tensor([[[0.2, 0.3], [0.5, 0.4], [0.8, 0.3], [0.5, 0.7]]]),
}


def codes(batch=1, grid=9, generator=None):
    """Return the output of a network that says nothing, or anything."""
    anchors = landmarks.anchors(grid)
    shapes = {"score": (), "box": (4,), "points": (4, 2)}
    draw = torch.zeros if generator is None else lambda *shape: torch.randn(*shape, generator=generator)
    return {name: draw(batch, len(anchors), *shape) for name, shape in shapes.items()} | {"anchors": anchors}


def test_assignment_and_loss_as_shipped():
    positive, scored = landmarks.assigned(GOLDEN["box"], landmarks.anchors(9), "as_shipped")
    assert (positive.sum(), scored.sum()) == (1, 700)
    assert landmarks.anchors(9)[positive[0]].flatten().tolist() == pytest.approx([0.5, 0.5, 0.6, 0.15])
    parts = landmarks.landmark_loss(codes(), GOLDEN, "as_shipped")
    assert parts["loss"] == pytest.approx(7.85750, abs=1e-5)
    assert parts["score"] == pytest.approx(np.log(2))


def test_best_anchors_are_positive_where_none_overlaps_enough():
    anchors = landmarks.anchors(9)
    overlap = landmarks.overlaps(GOLDEN["box"][:, None], anchors)
    assert overlap.max() == pytest.approx(0.5)
    positive, scored = landmarks.assigned(GOLDEN["box"], anchors)
    assert torch.equal(positive, overlap > 0.499)
    assert torch.equal(scored, positive | (overlap < 0.4))
    between = torch.tensor([[0.5, 0.5, 0.44, 0.44]])
    assert not landmarks.assigned(between, anchors, "as_shipped")[0].any()
    assert landmarks.assigned(between, anchors)[0].any()
    exact = anchors[[300, 700]]
    assert landmarks.assigned(exact, anchors)[0][[0, 1], [300, 700]].all()


@pytest.mark.parametrize("edition", ["as_described", "as_shipped"])
def test_loss_against_loops(edition):
    output = codes(2, 3, torch.Generator().manual_seed(0))
    batch = {"box": torch.tensor([[0.5, 0.5, 0.7, 0.5], [0.4, 0.6, 0.3, 0.3]]), "points": torch.rand(2, 4, 2)}
    told = {"box": [], "landmarks": [], "positive": [], "none": []}
    weights = []
    for image in range(2):
        truth = batch["box"][image], batch["points"][image]
        overlap = [float(landmarks.overlaps(truth[0], anchor, edition)) for anchor in output["anchors"]]
        for i, anchor in enumerate(output["anchors"]):
            positive = overlap[i] > 0.75 or (edition == "as_described" and overlap[i] > max(overlap) - 1e-6)
            scored = positive or overlap[i] < 0.4
            said = [output[name][image, i] for name in ("box", "points", "score")]
            if edition == "as_shipped":
                said = [part * scored for part in said]
            told["box"].append(F.smooth_l1_loss(said[0], landmarks.encode_boxes(truth[0], anchor)))
            told["landmarks"].append(F.smooth_l1_loss(said[1], landmarks.encode_points(truth[1], anchor)))
            weights.append(1.0 if edition == "as_shipped" else overlap[i])
            if edition == "as_shipped" or scored:
                share = said[2].sigmoid()
                told["positive" if positive else "none"].append(-torch.log(share if positive else 1 - share))
    found = landmarks.landmark_loss(output, batch, edition)
    told = {name: np.array([float(value) for value in values]) for name, values in told.items()}
    box, points = (np.average(told[name], weights=weights) for name in ("box", "landmarks"))
    score = (told["positive"].mean() + told["none"].mean()) / 2
    if edition == "as_shipped":
        score = np.concatenate([told["positive"], told["none"]]).mean()
    assert [found[name].item() for name in ("box", "landmarks", "score")] == pytest.approx(
        [box, points, score], rel=1e-4
    )
    assert found["loss"] == pytest.approx(5 * (box + points) + 0.5 * score, rel=1e-4)


def test_right_codes_cost_nothing_and_are_read_back():
    output = codes(2)
    batch = {"box": torch.tensor([[0.5, 0.5, 0.9, 0.6], [0.3, 0.6, 0.4, 0.3]]), "points": torch.rand(2, 4, 2)}
    output["box"] = landmarks.encode_boxes(batch["box"][:, None], output["anchors"])
    output["points"] = landmarks.encode_points(batch["points"][:, None], output["anchors"])
    output["score"] = 40 * landmarks.assigned(batch["box"], output["anchors"])[0] - 20.0
    assert landmarks.landmark_loss(output, batch)["loss"] < 1e-6
    boxes, points, score = landmarks.best_anchors(output)
    assert torch.allclose(boxes, batch["box"], atol=1e-6)
    assert torch.allclose(points, batch["points"], atol=1e-6)
    assert (score > 0.999).all()


# The network


class OneCell(nn.Module):
    """A backbone whose map is zero but in one cell."""

    num_features = 8

    def __init__(self, row, column):
        super().__init__()
        self.cell = row, column

    def forward(self, images):
        found = torch.zeros(len(images), 8, 3, 3)
        found[:, :, self.cell[0], self.cell[1]] = 1
        return found

    def freeze(self):
        pass


def test_outputs_are_those_of_their_anchors():
    network = LandmarkNetwork(OneCell(2, 1), 3)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    with torch.no_grad():
        for place, value in ((0, 2.0), (3, 1.0), (5, -0.5), (6, 0.25)):  # score, log of width, left tip
            network.head.weight[place * 9 + 4, 0] = value  # of the fifth shape, .6 x .15
    boxes, points, score = landmarks.best_anchors(network(torch.rand(2, 3, 96, 96)))
    middle = torch.tensor([0.5, 5 / 6])
    assert torch.allclose(boxes, torch.cat([middle, torch.tensor([0.6 * np.e, 0.15])]).expand(2, 4))
    assert torch.allclose(points[:, 0], middle + torch.tensor([-0.5 * 0.6, 0.25 * 0.15]))
    assert torch.allclose(points[:, 1:], middle.expand(2, 3, 2))
    assert torch.allclose(score, torch.tensor(2.0).sigmoid())


def test_full_size_network_of_the_paper():
    network = landmarks.network(PLANS["paper"]).eval()
    assert count_parameters(network) == count_parameters(network, trainable=True) == 7_073_781
    with torch.inference_mode():
        output = network(torch.rand(1, 3, 288, 288))
        assert network.backbone(torch.rand(1, 3, 288, 288)).shape == (1, 1024, 9, 9)
    shapes = {name: tuple(value.shape) for name, value in output.items()}
    assert shapes == {"score": (1, 729), "box": (1, 729, 4), "points": (1, 729, 4, 2), "anchors": (729, 4)}


def test_small_network_depends_on_its_seed_and_keeps_its_first_layers():
    networks = [landmarks.network(TINY, seed=seed) for seed in (0, 0, 1)]
    heads = [network.head.weight for network in networks]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    frozen = {name for name, p in networks[0].named_parameters() if not p.requires_grad}
    assert any("conv_stem" in name for name in frozen)
    assert not any("blocks.6" in name or name.startswith("head") for name in frozen)
    with torch.inference_mode():
        assert networks[0].eval()(torch.rand(2, 3, 64, 64))["box"].shape == (2, 36, 4)


# Photographs with points


@pytest.fixture(scope="module")
def world():
    return open_catalog("world:tiny").train


def test_photographs_are_squashed_and_marked(world):
    photographs = MarkedPhotographs(world, (64, 64))
    points = landmarks.ten_points(world).clip(0, 1)
    sizes = [Image.open(path).size for path in world.table["path"][:4]]
    for index in range(4):
        item = photographs[index]
        assert item["image"].shape == (3, 64, 64)
        truth = world.table[list(COLUMNS)].to_numpy()[index].reshape(4, 2) / sizes[index]
        assert np.allclose(item["points"], truth.clip(0, 1), atol=1e-6)
        low, high = points[index].min(axis=0), points[index].max(axis=0)
        assert np.allclose(item["box"][:2], (low + high) / 2, atol=1e-6)
        assert np.allclose(item["box"][2:], np.minimum((high - low) * (1.2, 1.1), 1), atol=1e-6)
    bare = replace(world, table=world.table.drop(columns="right_water_x"))
    with pytest.raises(ValueError, match="no column right_water_x"):
        MarkedPhotographs(bare, (64, 64))
    bare = replace(world, table=world.table.assign(notch_y=np.nan))
    with pytest.raises(ValueError, match="lack some of the ten points"):
        MarkedPhotographs(bare, (64, 64))


def test_names_and_their_mirror_images():
    assert [TEN[i] for i in landmarks.TEN_MIRRORED] == [
        name.replace("left", "L").replace("right", "left").replace("L", "right") for name in TEN
    ]
    assert [LANDMARKS[i] for i in landmarks.MIRRORED] == ["right_tip", "notch", "left_tip", "bottom"]


def test_points_move_with_the_image():
    size, dot = (96, 192), 5
    xy = [
        (30, 30),
        (60, 45),
        (95, 50),
        (130, 45),
        (160, 30),
        (150, 60),
        (120, 75),
        (95, 80),
        (70, 75),
        (40, 60),
    ]
    points = np.array(xy) / size[::-1]
    image = np.full((*size, 3), 90, np.uint8)
    for x, y in xy[:2] + xy[8:]:
        image[y - dot : y + dot, x - dot : x + dot] = 0
    for x, y in xy[3:7]:
        image[y - dot : y + dot, x - dot : x + dot] = 255
    transform = keypoints.for_points(size)
    transform.transforms = transform.transforms[:2]  # the moves
    mirrored = 0
    for epoch in range(30):
        changed, moved = landmarks.moved(transform, (0, epoch, 0), image, points)
        assert moved[0, 0] < moved[2, 0] < moved[4, 0]
        pixels = moved * size[::-1]
        inside = [(4 < x < size[1] - 5) and (4 < y < size[0] - 5) for x, y in pixels]
        values = [
            int(changed[round(y), round(x), 0]) if ok else None
            for (x, y), ok in zip(pixels, inside, strict=True)
        ]
        left = [value for value in values[:2] + values[8:] if value is not None]
        mirrored += left[0] > 200
        wanted = 255 if left[0] > 200 else 0
        assert max(abs(value - wanted) for value in left) < 60
        assert all(abs(value - (255 - wanted)) < 60 for value in values[3:7] if value is not None)
    assert 6 < mirrored < 24


def test_training_boxes_by_hand():
    ten = np.tile([[0.5, 0.5]], (10, 1))
    ten[0], ten[4], ten[7] = (0.2, 0.3), (0.7, 0.4), (0.5, 0.8)
    assert np.allclose(landmarks.training_boxes(ten), [0.45, 0.55, 0.6, 0.55])
    ten[4] = (1.0, 0.4)
    assert np.allclose(landmarks.training_boxes(np.stack([ten, ten])), [[0.6, 0.55, 0.96, 0.55]] * 2)
    ten[0] = (0.0, 0.3)
    assert landmarks.training_boxes(ten)[2] == 1


def test_folds_are_of_one_size_and_depend_on_the_seed():
    parts = landmarks.fold_numbers(103, 1)
    assert sorted(np.bincount(parts)) == [20, 20, 21, 21, 21]
    assert np.array_equal(parts, landmarks.fold_numbers(103, 1))
    assert not np.array_equal(parts, landmarks.fold_numbers(103, 2))


def test_training_finds_landmarks_and_measures_what_it_left_out(world, tmp_path):
    model, history = landmarks.train_landmarks(world, fold=1, plan=TINY, folder=tmp_path, device="cpu")
    assert history["loss"].iloc[-1] < 0.7 * history["loss"].iloc[0]
    assert history["held-out box IoU"].notna().sum() == history["held-out error"].notna().sum() == 1
    found = landmarks.predict_landmarks(model, world, TINY.side)
    assert found["image"].tolist() == world.table["image"].tolist()
    out = landmarks.fold_numbers(len(world)) == 1
    overlap = landmarks.box_overlaps(found[out].reset_index(drop=True), world.where(out))
    assert history["held-out box IoU"].iloc[-1] == pytest.approx(overlap.mean(), abs=1e-4)
    before = landmarks.predict_landmarks(landmarks.network(TINY), world, TINY.side)
    assert landmarks.box_overlaps(found, world).mean() > 2 * landmarks.box_overlaps(before, world).mean()
    again, same = landmarks.train_landmarks(world, fold=1, plan=TINY, folder=tmp_path, device="cpu")
    assert same.equals(history)  # from the checkpoint
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="fold = 5"):
        landmarks.train_landmarks(world, fold=5, plan=TINY)


def test_the_papers_training(monkeypatch, world):
    told = {}
    monkeypatch.delenv("WHALE_DENSENET121", raising=False)
    monkeypatch.setattr(landmarks, "fit", lambda *args, **options: told.update(options))
    with pytest.warns(UserWarning, match=r"densenet121-fbdb23505\.pth and set WHALE_DENSENET121"):
        model, _ = landmarks.train_landmarks(world, plan=replace(PLANS["paper"], images=3500 * 8, side=32))
    optimizer = told["optimizer"](model)
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (5e-4, 5e-4)
    assert told["batch_size"] == 16
    epochs = told["epochs"]
    rates = [told["schedule"](place / 3500 * epochs) for place in (0, 1499, 1501, 2499, 2501, 2999, 3001)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001])


# From photographs to boxes and landmarks


def test_shares_and_pixels_there_and_back():
    rng = np.random.default_rng(0)
    boxes, points, shape = rng.random((5, 4)), rng.random((5, 4, 2)), rng.integers(100, 900, (5, 2))
    table = landmarks.in_pixels(boxes, points, shape)
    assert table["notch_y"].tolist() == pytest.approx((points[:, 1, 1] * shape[:, 0]).tolist())
    assert table["x1"].tolist() == pytest.approx(((boxes[:, 0] + boxes[:, 2] / 2) * shape[:, 1]).tolist())
    back = landmarks.shares(table, shape)
    assert np.allclose(back[0], boxes)
    assert np.allclose(back[1], points)


def test_ensemble_is_the_mean_of_the_two_that_agree_most():
    boxes = np.array(
        [[0.5, 0.5, 0.6, 0.4], [0.3, 0.5, 0.2, 0.4], [0.52, 0.5, 0.6, 0.4], [0.5, 0.1, 0.6, 0.2]]
    )[:, None]
    points = np.arange(4).reshape(4, 1, 1, 1) / 10 + np.zeros((4, 1, 4, 2))
    box, landmark = landmarks.ensemble(boxes, points)
    assert np.allclose(box, [[0.51, 0.5, 0.6, 0.4]])
    assert np.allclose(landmark, 0.1)
    alone = landmarks.ensemble(boxes[:1], points[:1] - 0.5)
    assert np.allclose(alone[0], boxes[0])
    assert (alone[1] == 0).all()
    outside = landmarks.ensemble(np.array([[[1.5, 0.5, 0.2, 0.2]], [[0.9, 0.5, 0.4, 0.2]]]), points[:2])
    assert np.isfinite(outside[0]).all()


def test_ensemble_as_shipped_is_the_last_but_one_in_a_corner():
    rng = np.random.default_rng(0)
    boxes, points = rng.uniform(0.3, 0.6, (5, 7, 4)), rng.random((5, 7, 4, 2))
    box, landmark = landmarks.ensemble(boxes, points, "as_shipped")
    assert np.array_equal(landmark, points[3])
    low = (boxes[3, :, :2] - 0.65 * boxes[3, :, 2:]).clip(0, 1)
    high = (boxes[3, :, :2] + 0.65 * boxes[3, :, 2:]).clip(0, 1)
    assert np.allclose(box, np.concatenate([(high - low) / 2, high - low], 1))
    assert (landmarks.crop_of(box, landmark)[:, :2] == 0).all()
    alone = landmarks.ensemble(boxes[:1], points[:1], "as_shipped")
    assert np.array_equal(alone[1], points[0])
    assert np.allclose(alone[0][:, :2], alone[0][:, 2:] / 2)


@pytest.fixture(scope="module")
def published():
    """Boxes (6, N, 4) and landmarks (6, N, 4, 2) of the solution: five folds and its ensemble."""
    folder = Path(SET) / "reference" / "competition" / "third_place"
    tables = [pd.read_csv(folder / f"landmark.test.{i}.csv").set_index("filename") for i in range(6)]
    names = tables[0].index
    assert all(set(table.index) == set(names) for table in tables)
    values = np.stack([table.loc[names].to_numpy() for table in tables])
    return values[..., :4], values[..., 4:].reshape(*values.shape[:2], 4, 2)


@needs_reference
def test_ensemble_as_shipped_is_the_published_one(published):
    boxes, points = published
    box, landmark = landmarks.ensemble(boxes[:5], points[:5], "as_shipped")
    assert len(box) == 7_960
    assert np.abs(box - boxes[5]).max() < 1e-12
    assert np.abs(landmark - points[5]).max() < 1e-12


@needs_reference
def test_all_published_crops_begin_in_the_corner_and_the_right_ones_do_not(published):
    boxes, points = published
    crops = {"as_shipped": landmarks.crop_of(boxes[5], points[5])}
    crops["as_described"] = landmarks.crop_of(*landmarks.ensemble(boxes[:5], points[:5]))
    corner = {edition: (crop[:, :2] == 0).all(axis=1).mean() for edition, crop in crops.items()}
    whole = {edition: (crop == [0, 0, 1, 1]).all(axis=1).mean() for edition, crop in crops.items()}
    sides = {edition: (crop[:, 2:] - crop[:, :2]).mean(axis=0) for edition, crop in crops.items()}
    assert corner["as_shipped"] == 1
    assert corner["as_described"] == pytest.approx(0.457, abs=0.001)
    assert whole["as_shipped"] == pytest.approx(0.463, abs=0.001)
    assert whole["as_described"] == pytest.approx(0.308, abs=0.001)
    assert sides["as_shipped"] == pytest.approx([0.995, 0.871], abs=1e-3)
    assert sides["as_described"] == pytest.approx([0.989, 0.795], abs=1e-3)


class Bright(nn.Module):
    """Finds the ends of what is bright."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.6))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        output, sides = codes(len(images), 1), images.shape[2:]
        for place, image in enumerate(images.mean(1) > self.level):
            ys, xs = torch.nonzero(image, as_tuple=True)
            if not len(xs):
                output["box"][place, :, 0] = 100  # far beyond the image
                continue
            left, right, top, low = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
            ends = [
                (left, top),
                ((left + right) / 2, (top + low) / 2),
                (right, top),
                ((left + right) / 2, low),
            ]
            points = torch.tensor(ends) / torch.tensor(sides[::-1])
            box = torch.cat([points.amin(0) + points.amax(0), 2 * (points.amax(0) - points.amin(0))]) / 2
            output["box"][place] = landmarks.encode_boxes(box, output["anchors"])
            output["points"][place] = landmarks.encode_points(points, output["anchors"])
        return output


FLUKES = {"a0.png": (100, 40, 300, 160), "a1.png": (40, 80, 360, 140), "b0.png": (8, 8, 200, 120)}


@pytest.fixture
def folder(bright_flukes):
    return bright_flukes(FLUKES)


@pytest.fixture
def models(monkeypatch):
    models = [Bright(), Bright()]
    monkeypatch.setattr(landmarks, "landmark_models", lambda run, folds=None: models[:folds])
    return models


def run_on(folder, **options):
    return Run("05_01", Settings(data=str(folder), device="cpu", **options))


def boxes_of(catalog):
    return {row.image: tuple(getattr(row, name) for name in BOX) for row in catalog.table.itertuples()}


def near(found, expected, tolerance=4):
    return np.abs(np.subtract(found, expected)).max() <= tolerance


def test_predictions_are_in_pixels(folder):
    model = Bright().train()
    found = landmarks.predict_landmarks(model, open_catalog(folder), 160, batch_size=2)
    assert model.training
    assert model.calls == 2
    assert found["image"].tolist() == list(FLUKES)
    assert (found["confidence"] == 0.5).all()
    for row in found.itertuples():
        x0, y0, x1, y1 = FLUKES[row.image]
        assert near((row.x0, row.y0, row.x1, row.y1), (x0, y0, x1, y1))
        assert near((row.left_tip_x, row.left_tip_y, row.right_tip_x, row.right_tip_y), (x0, y0, x1, y0))
        assert near(
            (row.notch_x, row.notch_y, row.bottom_x, row.bottom_y),
            ((x0 + x1) / 2, (y0 + y1) / 2, (x0 + x1) / 2, y1),
        )


def test_located_finds_what_is_not_supplied_once(folder, models):
    catalog = landmarks.located(run_on(folder))
    assert all(near(boxes_of(catalog)[name], box) for name, box in FLUKES.items())
    assert catalog.table["box_from"].tolist() == catalog.table["landmarks_from"].tolist() == ["network"] * 3
    assert catalog.table[[*COLUMNS, "confidence"]].notna().all(axis=None)
    calls = models[0].calls
    landmarks.located(run_on(folder))
    assert models[0].calls == calls
    shipped = boxes_of(landmarks.located(run_on(folder, edition="as_shipped")))
    assert all(box[:2] == (0, 0) for box in shipped.values())
    assert near(shipped["a0.png"], (0, 0, 1.3 * 200, 1.3 * 120), 6)


def test_folds_are_averaged(folder, models, monkeypatch):
    one = landmarks.located(run_on(folder), folds=1)
    frames = landmarks.found_landmarks(run_on(folder), one, 1)
    shifted = frames[0].assign(**{column: frames[0][column] + 6 for column in (*BOX, *COLUMNS)})
    monkeypatch.setattr(landmarks, "found_landmarks", lambda run, catalog, folds: [frames[0], shifted])
    both = landmarks.located(run_on(folder))
    moved = both.table[[*BOX, *COLUMNS]] - one.table[[*BOX, *COLUMNS]]
    assert np.allclose(moved, 3)


def four(values):
    return ",".join(map(str, values))


def test_supplied_landmarks_and_boxes_take_precedence_row_by_row(folder, models, tmp_path):
    given_points = tmp_path / "points.csv"
    given_points.write_text(
        f"Image,{four(COLUMNS)},x0,y0,x1,y1\n"
        f"a0.png,{four(range(10, 18))},5,6,70,80\n"
        f"a1.png,{four(range(20, 28))},,,,\n"
        "b0.png,1,2,,,5,6,7,8,10,20,30,40\n"
        f"strange.png,{four(range(8))},1,2,3,4\n"
    )
    catalog = landmarks.located(run_on(folder), landmarks=given_points)
    table = catalog.table.set_index("image")
    assert table.loc["a0.png", list(COLUMNS)].tolist() == list(range(10, 18))
    assert table.loc["a1.png", list(COLUMNS)].tolist() == list(range(20, 28))
    assert near(table.loc["b0.png", ["left_tip_x", "left_tip_y"]].to_numpy(dtype=float), (8, 8))
    assert table["landmarks_from"].tolist() == ["supplied", "supplied", "network"]
    assert table["box_from"].tolist() == ["supplied", "network", "supplied"]
    assert boxes_of(catalog)["a0.png"] == (5, 6, 70, 80)
    assert near(boxes_of(catalog)["a1.png"], FLUKES["a1.png"])
    assert boxes_of(catalog)["b0.png"] == (10, 20, 30, 40)
    said = {
        (row.file, None if pd.isna(row.row) else row.row): row.problem
        for row in catalog.problems.itertuples()
    }
    assert "notch is missing" in said["points.csv", 4]
    assert "strange.png" in said["points.csv", None]

    given_boxes = tmp_path / "boxes.csv"
    given_boxes.write_text("Image,x0,y0,x1,y1\na0.png,1,2,31,42\nb0.png,500,0,600,10\n")
    boxes = boxes_of(landmarks.located(run_on(folder), landmarks=given_points, boxes=given_boxes))
    assert boxes["a0.png"] == (1, 2, 31, 42)
    assert near(boxes["b0.png"], FLUKES["b0.png"])  # its box is beyond the photograph


def test_ten_numbered_points_are_accepted_and_make_a_box(folder, models, tmp_path):
    numbers = [f"{number}_{axis}" for number in landmarks.NUMBERS for axis in "xy"]
    ten = [
        (100, 40),
        (150, 60),
        (200, 70),
        (250, 60),
        (300, 40),
        (280, 80),
        (240, 120),
        (200, 140),
        (150, 120),
        (120, 80),
    ]
    flat = [value for point in ten for value in point]
    given_points = tmp_path / "keypoints.csv"
    blank = [*flat[:8], "", "", *flat[10:]]
    given_points.write_text(
        f"filename,{four(numbers)}\na0.png,{four(flat)}\na1.png,{four(blank)}\nb0.png,{four(x + 900 for x in flat)}\n"
    )
    catalog = landmarks.located(run_on(folder), landmarks=given_points)
    table = catalog.table.set_index("image")
    assert table.loc["a0.png", list(COLUMNS)].tolist() == [100, 40, 200, 70, 300, 40, 200, 140]
    assert boxes_of(catalog)["a0.png"] == pytest.approx((80, 35, 320, 145))
    assert table["landmarks_from"].tolist() == ["supplied", "network", "network"]
    assert table["box_from"].tolist() == ["supplied", "network", "network"]
    said = {row.row: row.problem for row in catalog.problems.itertuples()}
    assert "right_tip is missing" in said[3]
    assert "beyond its 400 x 200 pixels" in said[4]


def test_landmarks_that_cannot_be_used_are_refused(folder, models, tmp_path):
    with pytest.raises(CatalogError, match=r"missing\.csv"):
        landmarks.located(run_on(folder), landmarks=tmp_path / "missing.csv")
    bad = tmp_path / "bad.csv"
    bad.write_text("Image,left_tip_x,left_tip_y\na0.png,1,2\n")
    with pytest.raises(CatalogError, match=r"bad\.csv, row 1: no column notch_x"):
        landmarks.located(run_on(folder), landmarks=bad)


def test_nothing_found_is_the_whole_photograph(folder, models, capsys):
    Image.fromarray(np.zeros((200, 400), np.uint8)).save(folder / "images" / "b0.png")
    catalog = landmarks.located(run_on(folder))
    assert boxes_of(catalog)["b0.png"] == (0, 0, 400, 200)
    assert catalog.table["box_from"].tolist() == ["network", "network", "whole"]
    assert "No fluke found in 1 of 3 photographs" in capsys.readouterr().out


def test_the_truth_of_a_world_is_not_supplied(places, models):
    truth = open_catalog("world:tiny")
    catalog = landmarks.located(Run("05_01", Settings(data="world:tiny", device="cpu")))
    assert models[0].calls > 0
    assert set(catalog.table["box_from"]) <= {"network", "whole"}
    assert (catalog.table["notch_x"] - truth.table["notch_x"]).abs().max() > 1


def test_networks_are_trained_once_for_all_data(places, folder, monkeypatch):
    trained = []

    def train(catalog, *, fold, plan, edition, seed, device, folder):
        trained.append((catalog.name, fold, edition, plan.grid, seed))
        return landmarks.network(plan, seed=seed), pd.DataFrame({"epoch": [1], "held-out error": [fold / 10]})

    monkeypatch.setattr(locate, "WORLD", "world:tiny@2019")
    monkeypatch.setattr(landmarks, "train_landmarks", train)
    monkeypatch.setattr(landmarks, "PLANS", {"lab": TINY, "paper": replace(TINY, folds=5)})
    one = landmarks.landmark_models(run_on(folder))
    other = landmarks.landmark_models(Run("01_01", Settings(data="world:tiny", device="cpu")))
    assert trained == [("world:tiny@2019", 0, "as_described", 2, 0)]
    assert len(one) == len(other) == 1
    assert not one[0].training
    pairs = zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [each["held-out error"].iloc[0] for each in landmarks.histories(run_on(folder), 2)] == [0, 0.1]
    assert len(trained) == 2
    landmarks.landmark_models(run_on(folder, edition="as_shipped"))
    landmarks.landmark_models(run_on(folder, seed=1))
    assert len(trained) == 4
    for folds in (0, 6):
        with pytest.raises(ValueError, match=f"folds = {folds}"):
            landmarks.landmark_models(run_on(folder), folds)


# Crops


@given(boxes_of_shares, st.lists(st.tuples(share, share), min_size=4, max_size=4), st.integers(0, 99))
def test_crops_hold_landmarks_and_stay_within_the_photograph(box, points, seed):
    points = np.array(points)
    for generator in (None, np.random.default_rng(seed)):
        crop = landmarks.crop_of(box, points, generator)
        assert (crop[:2] <= points.min(axis=0)).all()
        assert (crop[2:] >= points.max(axis=0)).all()
        assert (crop >= 0).all()
        assert (crop <= 1).all()
        inner = landmarks.within(points, crop)
        assert np.allclose(crop[:2] + inner * (crop[2:] - crop[:2]), points)


def test_crops_by_hand():
    points = np.array([[0.4, 0.4], [0.5, 0.5], [0.9, 0.4], [0.5, 0.6]])
    assert np.allclose(landmarks.crop_of([0.5, 0.5, 0.4, 0.2], points), [0.24, 0.37, 0.9, 0.63])
    assert np.allclose(landmarks.within(points[2], np.array([0.24, 0.37, 0.9, 0.63])), [1, 0.03 / 0.26])
    assert landmarks.crop_pixels(np.array([0.24, 0.37, 0.9, 0.63]), (500, 1000)).tolist() == [
        240,
        185,
        900,
        315,
    ]
    assert landmarks.crop_pixels(np.array([1.0, 0.5, 1.0, 0.5]), (500, 1000)).tolist() == [
        999,
        250,
        1000,
        251,
    ]
    both = landmarks.crop_of(np.tile([0.5, 0.5, 0.4, 0.2], (2, 1)), np.stack([points, points]))
    assert np.allclose(both, landmarks.crop_of([0.5, 0.5, 0.4, 0.2], points))


def test_training_crops_are_jittered():
    box, points = np.tile([0.5, 0.5, 0.4, 0.2], (2000, 1)), np.full((2000, 4, 2), 0.5)
    crops = landmarks.crop_of(box, points, np.random.default_rng(0))
    assert np.array_equal(crops, landmarks.crop_of(box, points, np.random.default_rng(0)))
    centre, sides = (crops[:, :2] + crops[:, 2:]) / 2 - 0.5, (crops[:, 2:] - crops[:, :2]) / (0.4, 0.2)
    for axis in (0, 1):
        assert np.quantile(centre[:, axis], [0, 0.5, 1]) == pytest.approx([-0.05, 0, 0.05], abs=4e-3)
        assert np.quantile(sides[:, axis], [0, 0.5, 1]) == pytest.approx([1.2, 1.3, 1.4], abs=1e-2)
    moved = landmarks.jittered(points, np.random.default_rng(0)) - points
    assert np.quantile(moved, [0, 0.5, 1]) == pytest.approx([-0.05, 0, 0.05], abs=2e-3)
    assert abs(np.corrcoef(moved.reshape(2000, 8).T)[0, 1:]).max() < 0.1


def marked(points, size):
    """Return an image (H, W, 3), black but for the landmarks, each of its own brightness."""
    image = np.zeros((*size, 3), np.uint8)
    for value, (x, y) in zip((100, 150, 200, 250), points * size[::-1], strict=True):
        image[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4] = value
    return image


@pytest.mark.parametrize("edition", ["as_described", "as_shipped"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_box_and_landmarks_turn_with_the_photograph(degrees, edition):
    size, points = (120, 180), np.array([[0.3, 0.3], [0.5, 0.5], [0.6, 0.3], [0.5, 0.8]])
    low, high = points.min(axis=0), points.max(axis=0)
    box = np.concatenate([(low + high) / 2, high - low])
    image, turned_box, moved = landmarks.turned(marked(points, size), box, points, degrees, edition)
    assert image.shape[:2] == (size[::-1] if degrees in (90, 270) and edition == "as_described" else size)
    found = [int(image[round(y * image.shape[0]), round(x * image.shape[1]), 0]) for x, y in moved]
    assert found == [100, 150, 200, 250]
    assert np.allclose(turned_box[:2] - turned_box[2:] / 2, moved.min(axis=0))
    assert np.allclose(turned_box[:2] + turned_box[2:] / 2, moved.max(axis=0))


def test_turns():
    points, box = np.array([[0.1, 0.2]] * 4), np.array([0.3, 0.4, 0.2, 0.1])
    image = np.zeros((10, 20, 3), np.uint8)
    assert np.allclose(landmarks.turned(image, box, points, 90)[2], [0.8, 0.1])  # clockwise
    assert np.allclose(landmarks.turned(image, box, points, 90)[1], [0.6, 0.3, 0.1, 0.2])
    assert landmarks.turned(image, box, points, 90, "as_shipped")[2][0] == pytest.approx([0.65, -0.3])
    with pytest.raises(ValueError, match="degrees = 45"):
        landmarks.turned(image, box, points, 45)
    turns = pd.Series(landmarks.TURNS)
    assert turns.value_counts().to_dict() == {270: 18, 90: 16, 180: 4}
    assert landmarks.TURNS.get("no such.jpg", 0) == 0


# Alignment


def test_alignment_against_a_solver():
    rng = np.random.default_rng(0)
    points = landmarks.REFERENCE_POINTS + rng.normal(0, 20, (3, 5, 4, 2))
    matrices = landmarks.align_matrix(points)
    assert matrices.shape == (3, 5, 2, 3)
    for place in np.ndindex(3, 5):
        system = np.hstack([points[place], np.ones((4, 1))])
        expected = np.linalg.lstsq(system, landmarks.REFERENCE_POINTS.astype(float), rcond=None)[0].T
        assert np.allclose(matrices[place], expected)
    still = landmarks.align_matrix(landmarks.REFERENCE_POINTS)
    assert np.allclose(still, [[1, 0, 0], [0, 1, 0]], atol=1e-9)
    half = landmarks.align_matrix(landmarks.REFERENCE_POINTS / 2, size=160)
    assert np.allclose(half, still, atol=1e-9)


@needs_reference
def test_alignment_is_the_third_solutions():
    oracles = sorted((Path(SET) / "oracle").glob("*.npz"))
    assert oracles, f"WHALE_REFERENCE={SET} holds no oracle/*.npz"
    compared = 0
    for path in oracles:
        with np.load(path) as oracle:
            if "third/align_landmarks" not in oracle:
                continue
            assert np.array_equal(landmarks.REFERENCE_POINTS, oracle["third/align_reference_points"])
            found = landmarks.align_matrix(oracle["third/align_landmarks"])
            assert np.abs(found - oracle["third/align_matrices"]).max() < 1e-6
            compared += len(found)
    assert compared > 0


@pytest.mark.parametrize("size", [320, 160])
def test_an_aligned_image_has_its_landmarks_at_the_reference_points(size):
    affine = np.array([[0.8, 0.1], [-0.15, 0.7]])
    points = (landmarks.REFERENCE_POINTS - 160) @ affine.T + 150
    image = marked(points / 320, (320, 320))
    found = landmarks.aligned(image, points, size)
    assert found.shape == (size, size, 3)
    for value, (x, y) in zip((100, 150, 200, 250), landmarks.REFERENCE_POINTS * size / 320, strict=True):
        assert found[round(y), round(x), 0] == value
    white = landmarks.aligned(np.full((320, 320, 3), 255, np.uint8), landmarks.REFERENCE_POINTS * 0.5 + 80)
    assert white[0, 0].tolist() == [255] * 3
    black = landmarks.aligned(np.full((320, 320, 3), 255, np.uint8), landmarks.REFERENCE_POINTS * 1.5 - 80)
    assert black[0, 0].tolist() == [0] * 3


@pytest.mark.parametrize(
    "points",
    [
        [[10, 150], [100, 150], [200, 150], [300, 150]],
        [[10, 150], [100, 150], [200, 150], [300, 150.001]],
        [[10, 10], [20, 20], [100, 100], [300, 300]],
        [[5, 5]] * 4,
        [[0, 0]] * 4,
        [[290, 54], [158, 164], [29, 59], [157, 276]],  # mirrored
    ],
)
def test_landmarks_on_one_line_leave_the_image_as_it_is(points):
    image = np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8)
    assert np.isfinite(landmarks.align_matrix(np.array(points))).all()
    assert np.array_equal(landmarks.aligned(image, np.array(points)), image)
    assert landmarks.aligned(image, np.array(points), 64).shape == (64, 64, 3)


# How good they are


def test_errors_of_landmarks():
    truth = pd.DataFrame([[10.0, 10, 20, 20, 30, 30, 40, 40]] * 2, columns=list(COLUMNS))
    found = truth.copy()
    found.loc[1, ["notch_x", "notch_y"]] = [23, 24]
    errors = landmarks.landmark_errors(found, truth)
    assert errors.tolist() == [[0, 0, 0, 0], [0, 5, 0, 0]]
    assert keypoints.correct_points(errors, [[0, 0, 80, 60], [0, 0, 40, 30]]) == 7 / 8


def test_overlaps_with_the_boxes_to_find(world):
    shape = landmarks._shape(world)
    boxes, points = (
        landmarks.training_boxes(landmarks.ten_points(world).clip(0, 1)),
        np.zeros((len(world), 4, 2)),
    )
    assert np.allclose(landmarks.box_overlaps(landmarks.in_pixels(boxes, points, shape), world), 1)
    boxes[:, 3] /= 2
    assert np.allclose(landmarks.box_overlaps(landmarks.in_pixels(boxes, points, shape), world), 0.5)
    assert set(TEN_COLUMNS) <= set(world.table)
