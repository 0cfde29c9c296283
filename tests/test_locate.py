import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from whalelib import locate
from whalelib.data import CatalogError, open_catalog
from whalelib.data.photographs import Photographs
from whalelib.locate import MASK_SIZE, decode_rle, encode_rle, mask_box
from whalelib.metrics import box_iou, mask_iou
from whalelib.models import lite0
from whalelib.run import Run, Settings
from whalelib.train import save_weights

BOX = ["x0", "y0", "x1", "y1"]


# Run lengths


def test_run_lengths_count_from_one_down_the_columns():
    mask = np.array([[0, 1, 1], [1, 1, 0]], dtype=bool)  # down the columns: 0 1, 1 1, 1 0
    assert encode_rle(mask) == "2 4"
    assert np.array_equal(decode_rle("2 4", (2, 3)), mask)
    assert np.array_equal(decode_rle("1 1 6 1", (2, 3)), [[1, 0, 0], [0, 0, 1]])
    assert encode_rle(np.zeros(MASK_SIZE)) == ""
    assert decode_rle("").shape == MASK_SIZE
    assert not decode_rle("").any()
    assert encode_rle(np.ones((3, 4))) == "1 12"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32), st.sampled_from([0.1, 0.5, 0.9]))
def test_run_lengths_hold_every_mask(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    assert np.array_equal(decode_rle(encode_rle(mask), mask.shape), mask)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1", "pairs"),
        ("1 2 3", "pairs"),
        ("a b", "pairs"),
        ("1.5 2", "pairs"),
        ("-1 2", "pairs"),
        ("0 2", "beyond"),
        ("6 2", "beyond"),
        ("2 0", "beyond"),
        ("99999999999 1", "beyond"),
        ("3 1 1 1", "order"),
        ("1 3 2 1", "overlap"),
    ],
)
def test_run_lengths_that_make_no_sense(text, what):
    with pytest.raises(ValueError, match=what) as caught:
        decode_rle(text, (2, 3))
    assert text in str(caught.value)


# Boxes from masks


def drawn(*parts, shape=(100, 200)):
    mask = np.zeros(shape, dtype=bool)
    for x0, y0, x1, y1 in parts:
        mask[y0:y1, x0:x1] = True
    return mask


def test_box_of_a_mask_ends_just_beyond_it():
    assert mask_box(drawn((20, 30, 120, 70))) == (20, 30, 120, 70)
    assert mask_box(np.ones(MASK_SIZE)) == (0, 0, 384, 192)
    assert mask_box(drawn((20, 30, 120, 70)).astype(np.uint8) * 255) == (20, 30, 120, 70)


def test_crumbs_do_not_widen_the_box():
    assert mask_box(drawn((20, 30, 120, 70), (0, 0, 5, 5), (180, 90, 200, 100))) == (20, 30, 120, 70)


def test_a_fluke_in_two_halves_is_one():
    halves = (20, 30, 80, 70), (100, 40, 150, 70)
    assert mask_box(drawn(*halves)) == (20, 30, 150, 70)
    assert mask_box(drawn(*halves), share=1) == (20, 30, 80, 70)


def test_parts_that_touch_at_a_corner_are_one():
    assert mask_box(drawn((20, 30, 80, 70), (80, 70, 90, 75))) == (20, 30, 90, 75)


def test_no_box_without_a_fluke():
    assert mask_box(np.zeros((100, 200))) is None
    assert mask_box(drawn((0, 0, 9, 11))) is None  # 99 of 20,000 pixels
    assert mask_box(drawn((0, 0, 10, 10))) == (0, 0, 10, 10)
    assert mask_box(drawn((0, 0, 10, 10)), smallest=0.01) is None


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 99), min_size=4, max_size=4))
def test_box_of_any_rectangle(sides):
    x0, x1 = sorted(sides[:2])
    y0, y1 = sorted(sides[2:])
    assert mask_box(drawn((x0, y0, x1 + 1, y1 + 1)), smallest=0) == (x0, y0, x1 + 1, y1 + 1)


def test_iou_of_boxes():
    boxes = [[0, 0, 2, 2], [0, 0, 4, 2], [0, 0, 1, 1]]
    assert box_iou(boxes, [[1, 0, 3, 2], [0, 0, 4, 2], [5, 5, 6, 6]]) == pytest.approx([1 / 3, 1, 0])
    with pytest.raises(ValueError, match="empty box"):
        box_iou([[0, 0, 0, 1]], [[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="shapes"):
        box_iou([[0, 0, 1, 1]], [0, 0, 1, 1])


# The network


def test_unet_begins_with_the_pretrained_weights():
    model, pretrained = locate.unet(), lite0().state_dict()
    encoder = model.net.encoder.model.state_dict()
    assert len(encoder) > 250
    assert all(torch.equal(value, pretrained[name]) for name, value in encoder.items())
    others = locate.unet(pretrained=False).net.encoder.model.state_dict()
    assert not torch.equal(others["conv_stem.weight"], encoder["conv_stem.weight"])


def test_unet_gives_a_logit_for_each_pixel_and_does_not_look_at_a_fourth_channel():
    model = locate.unet(pretrained=False).eval()
    images = torch.rand(2, 4, 64, 96)
    with torch.inference_mode():
        logits = model(images)
        assert logits.shape == (2, 1, 64, 96)
        assert torch.equal(logits, model(images[:, :3]))
        assert not torch.equal(logits, model(images.flip(0)))


def test_unet_depends_on_its_seed_alone():
    torch.manual_seed(1)
    one = locate.unet(seed=3).state_dict()
    state = torch.get_rng_state()
    other = locate.unet(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = locate.unet(seed=4).state_dict()
    assert any(not torch.equal(one[name], third[name]) for name in one)


def test_first_layers_stay_as_they_are():
    model = locate.unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(torch.rand(2, 3, 32, 64)).square().mean().backward()
    optimizer.step()
    after, frozen = model.state_dict(), tuple(f"net.encoder.model.{part}" for part in model.FROZEN)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith(frozen) for name in moved)
    assert {name for name in before if name.startswith("net.decoder") and "weight" in name} <= moved


def test_mask_loss_of_right_and_wrong_masks():
    truth = torch.zeros(2, 4, 8, 8)
    truth[:, 3, 2:5, 2:5] = 1
    right, wrong = (40 * truth[:, 3:] - 20) * 1.0, 20 - 40 * truth[:, 3:]
    assert locate.mask_loss(right, {"image": truth})["loss"] < 1e-4
    parts = locate.mask_loss(wrong, {"image": truth})
    assert parts["dice"] > 0.99
    assert parts["cross-entropy"] == pytest.approx(20)
    assert parts["loss"] == parts["dice"] + parts["cross-entropy"]


def test_mask_loss_without_a_fluke_has_a_finite_gradient():
    logits = torch.zeros(2, 1, 8, 8, requires_grad=True)
    locate.mask_loss(logits, {"image": torch.zeros(2, 4, 8, 8)})["loss"].backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad > 0).all()


def test_training_finds_flukes(tmp_path):
    catalog = open_catalog("world:tiny").train
    model, history = locate.train_unet(catalog, size=(64, 128), images=640, folder=tmp_path, device="cpu")
    assert history["loss"].iloc[-1] < 0.8 * history["loss"].iloc[0]
    found = locate.predict_masks(model, catalog, (64, 128))
    truth = Photographs(catalog, MASK_SIZE, masks=True)
    scores = [mask_iou(decode_rle(rle), truth.pixels(i)[..., 3] > 127) for i, rle in enumerate(found["rle"])]
    assert np.mean(scores) > 0.7
    again, same = locate.train_unet(catalog, size=(64, 128), images=640, folder=tmp_path, device="cpu")
    assert same.equals(history)  # from the checkpoint
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# From photographs to the catalog


class Bright(nn.Module):
    """Takes what is bright for the fluke."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.5))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return 100 * (images.mean(1, keepdim=True) - self.level)


FLUKES = {
    "a0.png": (100, 40, 300, 160),
    "a1.png": (0, 0, 200, 200),
    "b0.png": None,
    "b1.png": (40, 80, 360, 140),
}


def photographs(folder, layout="labels"):
    """Four photographs of 400 x 200 pixels, dark with a bright rectangle; the third has none."""
    images = folder / ("images" if layout == "labels" else "train")
    images.mkdir(parents=True)
    for name, box in FLUKES.items():
        parts = [] if box is None else [box]
        Image.fromarray(drawn(*parts, shape=(200, 400)).astype(np.uint8) * 200 + 20).save(images / name)
    table = pd.DataFrame({"Image": list(FLUKES), "Id": [name[0] for name in FLUKES]})
    table.to_csv(folder / ("labels.csv" if layout == "labels" else "train.csv"), index=False)
    return folder


@pytest.fixture
def folder(places):
    return photographs(places / "flukes")


@pytest.fixture
def model(monkeypatch):
    model = Bright()
    monkeypatch.setattr(locate, "mask_model", lambda run: model)
    return model


def run_on(folder):
    return Run("03_01", Settings(data=str(folder), device="cpu"))


def boxes_of(catalog):
    return {row.image: tuple(getattr(row, name) for name in BOX) for row in catalog.table.itertuples()}


def near(box, expected, tolerance=3):
    return np.abs(np.subtract(box, expected)).max() <= tolerance


def test_masks_are_found_in_the_order_of_the_catalog(folder):
    catalog, model = open_catalog(folder), Bright().train()
    found = locate.predict_masks(model, catalog, batch_size=3)
    assert model.training
    assert model.calls == 2
    assert found["image"].tolist() == catalog.table["image"].tolist() == list(FLUKES)
    for row in found.itertuples():
        mask, box = decode_rle(row.rle), FLUKES[row.image]
        expected = drawn(*[] if box is None else [box], shape=(200, 400))
        expected = cv2.resize(expected.astype(np.uint8), MASK_SIZE[::-1], interpolation=cv2.INTER_AREA) > 0
        assert mask_iou(mask, expected) > 0.95
        assert row.confidence > 0.9 if box else row.confidence == 0
    one = locate.find_mask(model, np.array(Image.open(folder / "images" / "a0.png").convert("RGB")))
    assert one.shape == (200, 400)
    assert mask_iou(one, drawn(FLUKES["a0.png"], shape=(200, 400))) > 0.95


def test_boxes_come_from_masks_and_the_whole_photograph_stands_in(folder, model, capsys):
    catalog = locate.located(run_on(folder))
    boxes = boxes_of(catalog)
    assert all(near(boxes[name], box or (0, 0, 400, 200)) for name, box in FLUKES.items())
    table = catalog.table.set_index("image")
    assert table["box_from"].tolist() == ["mask", "mask", "whole", "mask"]
    assert table["mask_from"].tolist() == ["found", "found", "none", "found"]
    assert table.loc["b0.png", "rle"] == ""
    assert "No fluke found in 1 of 4 photographs" in capsys.readouterr().out
    data = Photographs(catalog, (32, 64), crop="box", masks=True)
    assert data.pixels(0)[8:-8, 8:-8, 3].min() == 255
    assert data.pixels(2)[..., 3].max() == 0
    assert data.pixels(2).shape == (32, 64, 4)


def test_masks_are_found_once(folder, model):
    locate.located(run_on(folder))
    calls = model.calls
    again = locate.located(run_on(folder))
    assert model.calls == calls == 1
    assert near(boxes_of(again)["a0.png"], FLUKES["a0.png"])
    part = run_on(folder).catalog.where(np.array([False, True, True, False]))
    assert locate.found_masks(run_on(folder), part)["rle"].tolist() == again.table["rle"].tolist()[1:3]
    assert model.calls == calls
    model.level.data += 0.1  # another model, other masks
    locate.located(run_on(folder))
    assert model.calls == calls + 1


def test_a_margin_is_for_boxes_that_were_found(folder, model):
    (folder / "boxes.csv").write_text("Image,x0,y0,x1,y1\nb1.png,10,20,30,40\n")
    boxes = boxes_of(locate.located(run_on(folder), margin=0.1))
    assert near(boxes["a0.png"], (80, 28, 320, 172))
    assert near(boxes["a1.png"], (0, 0, 220, 200))  # not beyond the photograph
    assert boxes["b0.png"] == (0, 0, 400, 200)
    assert boxes["b1.png"] == (10, 20, 30, 40)


def test_supplied_boxes_and_masks_take_precedence_row_by_row(folder, model):
    (folder / "boxes.csv").write_text("Image,x0,y0,x1,y1\na0.png,1,2,30,40\nb0.png,5,6,70,80\n")
    (folder / "masks").mkdir()
    Image.fromarray(drawn((20, 10, 60, 50)).astype(np.uint8) * 255).save(folder / "masks" / "a1.png")
    catalog = locate.located(run_on(folder))
    boxes, table = boxes_of(catalog), catalog.table.set_index("image")
    assert boxes["a0.png"] == (1, 2, 30, 40)
    assert boxes["b0.png"] == (5, 6, 70, 80)
    assert near(boxes["a1.png"], (40, 20, 120, 100))  # from the supplied mask, of half the photograph's size
    assert near(boxes["b1.png"], FLUKES["b1.png"])
    assert table["box_from"].tolist() == ["supplied", "mask", "supplied", "mask"]
    assert table["mask_from"].tolist() == ["found", "supplied", "none", "found"]
    assert table["mask"].notna().tolist() == [False, True, False, False]
    assert mask_iou(decode_rle(table.loc["a1.png", "rle"]), drawn((40, 20, 116, 96), shape=MASK_SIZE)) > 0.9


def test_arguments_take_precedence_over_what_lies_beside_the_photographs(folder, model, tmp_path):
    (folder / "boxes.csv").write_text("Image,x0,y0,x1,y1\na0.png,1,2,30,40\nb0.png,5,6,70,80\n")
    (folder / "masks").mkdir()
    for name in ("a0.png", "a1.png"):
        Image.fromarray(drawn((20, 10, 60, 50)).astype(np.uint8) * 255).save(folder / "masks" / name)
    given_boxes, given_masks = tmp_path / "given.csv", tmp_path / "rle.csv"
    given_boxes.write_text("Image,x0,y0,x1,y1\na0.png,7,8,90,100\n")
    given_masks.write_text(
        f"Image,rle\na1.png,{encode_rle(drawn((192, 0, 384, 96), shape=MASK_SIZE))}\nb1.png,\n"
    )
    catalog = locate.located(run_on(folder), boxes=given_boxes, masks=given_masks)
    boxes, table = boxes_of(catalog), catalog.table.set_index("image")
    assert boxes["a0.png"] == (7, 8, 90, 100)
    assert boxes["b0.png"] == (5, 6, 70, 80)
    assert boxes["a1.png"] == (200, 0, 400, 100)
    assert boxes["b1.png"] == (0, 0, 400, 200)  # somebody says that there is no fluke
    assert table["mask_from"].tolist() == ["supplied", "supplied", "none", "none"]
    assert pd.isna(table.loc["a1.png", "mask"])
    pixels = Photographs(catalog, (20, 40), masks=True).pixels(1)
    assert pixels[:9, 21:, 3].min() == 255
    assert pixels[11:, :, 3].max() == 0
    assert model.calls == 1  # b0 alone


def test_a_folder_of_masks_as_argument(folder, model, tmp_path):
    (tmp_path / "drawn").mkdir()
    Image.fromarray(drawn((20, 10, 60, 50)).astype(np.uint8) * 255).save(tmp_path / "drawn" / "a0.png")
    shutil.copy(tmp_path / "drawn" / "a0.png", tmp_path / "drawn" / "stranger.png")
    catalog = locate.located(run_on(folder), masks=tmp_path / "drawn")
    assert near(boxes_of(catalog)["a0.png"], (40, 20, 120, 100))
    assert "drawn/stranger.png" in catalog.problems["file"].tolist()


def test_rows_that_make_no_sense_are_told_by_file_and_row(folder, model, tmp_path, capsys):
    boxes, masks = tmp_path / "mine.csv", tmp_path / "rle.csv"
    boxes.write_text(
        "Image,x0,y0,x1,y1\na0.png,30,2,1,40\na1.png,x,2,30,40\nb0.png,1,2,3,4\nb0.png,5,6,7,8\n"
        "b1.png,400,0,500,10\nc0.png,1,2,3,4\na0.png,1,2,3\n"
    )
    masks.write_text(
        "Image,rle\na0.png,1 2 3\na1.png,9 4 2 1\nb0.png,1 1\nb0.png,2 1\nb1.png,73728 2\nc0.png,1 1\n"
    )
    catalog = locate.located(run_on(folder), boxes=boxes, masks=masks)
    told = {(row.file, row.row if pd.notna(row.row) else 0) for row in catalog.problems.itertuples()}
    assert told == {
        *(("mine.csv", row) for row in (0, 2, 3, 5, 6, 8)),
        *(("rle.csv", row) for row in (0, 2, 3, 5, 6)),
    }
    shown = capsys.readouterr().out
    assert "mine.csv, row 2: a0.png: its box makes no sense" in shown
    assert "mine.csv, row 6: b1.png: its box (400, 0, 500, 10) is beyond its 400 x 200 pixels" in shown
    assert "rle.csv, row 2: a0.png: run lengths '1 2 3'" in shown
    assert "such as c0.png" in shown
    found = boxes_of(catalog)
    assert found["b0.png"] == (1, 2, 3, 4)
    assert all(near(found[name], FLUKES[name]) for name in ("a0.png", "a1.png", "b1.png"))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"boxes": ("Image,x0,y0,x1\na0.png,1,2,3\n")}, "given.csv, row 1: no column y1"),
        ({"boxes": ""}, "given.csv: the file is empty"),
        ({"masks": "Image,mask\na0.png,1 2\n"}, "given.csv, row 1: no column rle"),
        ({"masks": None}, "given.csv: can't be read"),
        ({"boxes": None}, "given.csv: can't be read"),
    ],
)
def test_files_that_cannot_be_used_are_refused(folder, model, tmp_path, arguments, what):
    (name, text), path = arguments.popitem(), tmp_path / "given.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CatalogError) as caught:
        locate.located(run_on(folder), **{name: path})
    assert what in str(caught.value)


def test_a_mask_that_cannot_be_read_is_told_and_found_instead(folder, model, capsys):
    (folder / "masks").mkdir()
    (folder / "masks" / "a0.png").write_bytes(b"no picture")
    catalog = locate.located(run_on(folder))
    assert near(boxes_of(catalog)["a0.png"], FLUKES["a0.png"])
    assert catalog.table["mask"].isna().all()
    assert "masks/a0.png" in catalog.problems["file"].tolist()
    assert "not a photograph" in capsys.readouterr().out


def test_the_truth_of_a_world_is_not_supplied(places, model, monkeypatch):
    world = open_catalog("world:tiny")
    assert world.table["mask"].notna().all()
    for data in ("world:tiny", str(world.root)):
        model.calls = 0
        catalog = locate.located(Run("03_01", Settings(data=data, device="cpu")))
        assert model.calls > 0 or data != "world:tiny"
        assert len(catalog) == len(world)
        assert set(catalog.table["mask_from"]) <= {"found", "none"}
        assert catalog.table["mask"].isna().all()
        assert (catalog.table["x0"] - world.table["x0"]).abs().max() > 1


def test_processes_that_train_together_keep_none_out(tmp_path, monkeypatch):
    """Each waits for the others within the training; all have the weights that the first writes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("fcntl.flock", None)
    path, theirs, own = tmp_path / "weights.safetensors", nn.Linear(2, 2), nn.Linear(2, 2)
    found = locate.trained_once(path, None, lambda: (own, save_weights(theirs, path)))
    assert torch.equal(found.weight, theirs.weight)
    assert [*tmp_path.iterdir()] == [path]


def test_the_model_is_trained_once_for_all_data_profiles_and_editions(places, folder, monkeypatch):
    trained = []

    def train(catalog, *, seed, device, folder):
        trained.append((catalog.name, len(catalog), seed, device))
        return locate.unet(pretrained=False, seed=seed), pd.DataFrame({"epoch": [1]})

    monkeypatch.setattr(locate, "WORLD", "world:tiny@2019")
    monkeypatch.setattr(locate, "train_unet", train)
    one = locate.mask_model(run_on(folder))
    others = [
        locate.mask_model(Run("01_01", Settings(data="world:tiny", device="cpu"))),
        locate.mask_model(
            Run("03_01", Settings(data=str(folder), profile="paper", edition="as_shipped", device="cpu"))
        ),
    ]
    assert trained == [("world:tiny@2019", len(open_catalog("world:tiny").train), 0, "cpu")]
    for other in others:
        assert not other.training
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    locate.mask_model(Run("03_01", Settings(data=str(folder), seed=1, device="cpu")))
    assert len(trained) == 2
