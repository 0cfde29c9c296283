"""The third solution's recipe, and what it alone has: templates, the mirrored class, its batches."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from whalelib import augment, landmarks
from whalelib.data.batches import Portions, Shuffled
from whalelib.data.layouts import BOX
from whalelib.losses import add_margin, cosines, without_mirrored
from whalelib.models import FeatureMap, ThirdPlace, count_parameters, densenet121
from whalelib.recipes import ladder, third


class Tiny(nn.Module):
    """A backbone of one convolution, 1/32 of the image."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 32, stride=32)


def tiny(identities=5, size=(64, 64), **options):
    return ThirdPlace(identities, FeatureMap(Tiny(), 6, ()), size=size, dimension=16, **options)


def test_the_network_gives_embeddings_of_length_one_and_two_cosines_a_whale():
    model = tiny()
    out = model(torch.rand(4, 3, 64, 64))
    assert out["features"].shape == (4, 16)
    torch.testing.assert_close(out["features"].norm(dim=1), torch.ones(4))
    assert out["cosines"].shape == (4, 10)
    assert out["cosines"].abs().max() <= 1 + 1e-6
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_full_network_has_the_parameters_of_the_original():
    model = third.network("paper", 3, 0)
    linear = next(layer for layer in model.neck if isinstance(layer, nn.Linear))
    assert (linear.in_features, linear.out_features) == (102_400, 512)
    assert count_parameters(linear) == 52_429_312  # 52.43 M
    assert count_parameters(model.backbone) == 6_953_856  # DenseNet-121 without its classifier


def test_densenet_loads_torchvisions_file_and_ends_without_a_relu(tmp_path):
    network = torchvision.models.densenet121()
    state = {  # as old files have it
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for name, value in network.state_dict().items()
    }
    path = tmp_path / "densenet121.pth"
    torch.save(state, path)
    body = densenet121(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest()).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(body(images), network.eval().features(images))
        assert (body(images) < 0).any()
    with pytest.raises(ValueError, match="not the expected weights"):
        densenet121(path)


def test_the_mirrored_class_is_a_constant_without_a_gradient():
    logits = torch.tensor([[3.0, 1.0, -2.0, 0.5]], requires_grad=True)
    found = without_mirrored(logits, torch.tensor([1]))
    assert found.tolist() == [[2.0, 0.0, -3.0, 0.0]] or found[0, 3] == 0
    assert found[0].tolist() == [2.0, 0.0, -3.0, 0.0]
    nn.functional.cross_entropy(found, torch.tensor([1])).backward()
    assert logits.grad[0, 3] == 0
    assert (logits.grad[0, :3] != 0).all()


def test_the_loss_at_the_start_shows_that_the_margin_is_there():
    # Each cosine is near 0: ln(2C) + 65 sin(.5) and what the spread of 512 dimensions adds.
    generator = torch.Generator().manual_seed(0)
    cosines = torch.randn(64, 9776, generator=generator) / 512**0.5
    batch = {"label": torch.randint(9776, (64,), generator=generator)}
    expected = np.log(9776) + 65 * np.sin(0.5) + 65**2 / 1024
    assert third.loss({"cosines": cosines}, batch)["loss"].item() == pytest.approx(expected, rel=0.05)
    assert third.loss({"cosines": cosines}, batch, margin=0)["loss"].item() < 20


def test_the_rate_is_halved_at_the_milestones():
    factors = [third.rate_factor(at, 500, (0.5, 0.7)) for at in (0, 249.9, 250, 349, 350, 499)]
    assert factors == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [third.accumulated(epoch) for epoch in range(5)] == [2, 2, 2, 1, 1]


def test_the_mean_score_counts_validations_alone():
    rows = [{"epoch": 1}, {"valid MAP@5": 0.2}, {}, {"valid MAP@5": 0.4}]
    assert third.mean_score(rows) == pytest.approx(0.3)
    assert third.mean_score(rows[:3]) == -np.inf
    assert third.mean_score([{"valid MAP@5": i / 100} for i in range(40)]) == pytest.approx(0.295)


def test_shuffled_batches_hold_each_item_once_and_portions_go_on_where_an_epoch_ends():
    sampler = Shuffled(10, 3, seed=1)
    epoch = list(sampler)
    assert [len(batch) for batch in epoch] == [3, 3, 3]
    assert len({i for batch in epoch for i in batch}) == 9
    sampler.set_epoch(1)
    assert list(sampler) != epoch
    assert [len(batch) for batch in Shuffled(2, 3)] == [2]
    portions = Portions(Shuffled(10, 3, seed=1), 4)
    assert len(list(portions)) == 4
    assert list(portions)[:3] == epoch


@pytest.fixture
def flukes(six_animals):
    """The six animals with landmarks, in a function of (transform, aligned)."""
    catalog = six_animals.catalog.train
    table = catalog.table.copy()
    for name, (x, y) in {
        "left_tip": (4, 4),
        "notch": (30, 12),
        "right_tip": (58, 4),
        "bottom": (30, 28),
    }.items():
        table[f"{name}_x"], table[f"{name}_y"] = float(x), float(y)
    catalog = replace(catalog, table=table)

    def make(transform=None, aligned=0):
        return third.Flukes(catalog, (32, 32), (32, 64), catalog.known, transform=transform, aligned=aligned)

    return make


def test_items_of_training_are_photographs_and_their_mirror_images(flukes):
    data, plain = flukes(augment.third_place((32, 64)), 0.5), flukes()
    assert len(data) == 2 * len(plain)
    known = len(plain.photographs.known)
    own = plain.labels >= 0
    assert (data.labels[len(plain) :][own] == plain.labels[own] + known).all()
    assert (data.labels[len(plain) :][~own] == -1).all()
    item = data[0]
    assert item["image"].shape == (3, 32, 32)
    torch.testing.assert_close(item["image"], data[0]["image"])
    data.set_epoch(1)
    assert not torch.equal(item["image"], data[0]["image"])


def test_alignment_brings_the_landmarks_to_their_places(flukes):
    data = flukes()
    bright = np.zeros((32, 64, 3), np.uint8)
    bright[3:6, 57:60] = 255  # the right tip
    data.photographs.pixels = lambda place: bright.copy()
    image = data.plain(1)[0]["image"].sum(0)
    y, x = np.unravel_index(image.argmax(), image.shape)
    assert (x, y) == pytest.approx(landmarks.REFERENCE_POINTS[2] * 32 / 320, abs=3)
    assert not torch.equal(data.plain(0)[0]["image"], data.plain(1)[0]["image"])


def test_another_alignment_share_or_box_is_another_fingerprint(flukes):
    data = flukes()
    assert data.fingerprint == flukes().fingerprint
    assert data.fingerprint != flukes(aligned=1).fingerprint
    data.boxes = data.boxes + 0.01
    assert data.fingerprint != flukes().fingerprint


def test_features_are_seen_by_every_version_of_the_landmarks(flukes):
    part = flukes().catalog
    moved = part.table.set_index("image")[[*BOX, *landmarks.COLUMNS]].assign(x0=8.0, notch_y=16.0)
    nobody = part.where(np.zeros(len(part), dtype=bool))
    parts = third.Parts(part, nobody, part, nobody, part, (32, 32), (32, 64), "as_described", 0, (moved,))
    model = tiny(size=(32, 32))
    found = third.features(model, parts.views(part))
    assert found.shape == (2, len(part), 4, 16)
    alone = replace(part, table=part.table.assign(x0=8.0, notch_y=16.0))
    np.testing.assert_allclose(found[:, :, :2], third.features(model, flukes()), atol=1e-6)
    np.testing.assert_allclose(found[:, :, 2:], third.features(model, parts.flukes(alone)), atol=1e-6)
    assert abs(found[:, :, :2] - found[:, :, 2:]).max() > 1e-4


def test_a_turned_photograph_is_turned_as_the_edition_does(flukes):
    catalog = flukes().catalog
    turns = {catalog.table["image"].iloc[0]: 90}
    seen = [
        third.Flukes(catalog, (32, 32), (32, 64), catalog.known, turns=turns, edition=edition)
        for edition in ("as_described", "as_shipped")
    ]
    assert not torch.equal(seen[0][0]["image"], seen[1][0]["image"])
    assert torch.equal(seen[0][1]["image"], seen[1][1]["image"])
    assert seen[0].fingerprint != seen[1].fingerprint


def test_grouped_labels_are_trained_on_as_described_alone(flukes, tmp_path):
    table = flukes().catalog.table[:6].assign(identity=["a", "a", "b", "b", "new_whale", "new_whale"])
    catalog = replace(flukes().catalog, table=table, root=tmp_path)
    rest, strangers = (
        catalog.where(((table["identity"] == "new_whale") == new).to_numpy()) for new in (0, 1)
    )
    names = table["image"].tolist()
    held = catalog.where(table["image"].isin([names[0], names[5]]).to_numpy())
    parts = third.Parts(rest, held, rest, strangers, held, (32, 32), (32, 64), "as_described", 0)
    assert third.grouped(parts) is parts
    rows = [(names[2], "ab"), (names[0], "ab"), (names[4], "c"), (names[5], "c"), (names[3], "new_whale")]
    text = "".join(f"{image},{name}\n" for image, name in rows)
    (tmp_path / third.GROUPED).write_text("Image,Id\n" + text)
    learnt = third.grouped(parts)
    assert dict(zip(learnt.rest.table["image"], learnt.rest.table["identity"], strict=True)) == {
        names[0]: "ab",
        names[1]: "a",
        names[2]: "ab",
        names[4]: "c",
    }
    assert learnt.known == ["a", "ab", "c"]
    assert learnt.gallery is parts.gallery
    shipped = replace(parts, edition="as_shipped")
    assert third.grouped(shipped) is shipped
    (tmp_path / third.GROUPED).write_text("Image,Id\nnobody.jpg,a\n")
    with pytest.raises(ValueError, match=r"train\.v2\.csv.*row 2.*nobody\.jpg: not a training photograph"):
        third.grouped(parts)


SET = os.environ.get("WHALE_REFERENCE", "")


@pytest.mark.skipif(not SET, reason="WHALE_REFERENCE is not set: no values of the original functions")
def test_the_loss_is_the_originals():
    compared = 0
    for path in sorted((Path(SET) / "oracle").glob("*.npz")):
        with np.load(path) as oracle:
            if "third/arc_logits" not in oracle:
                continue
            rows, weight, labels, logits = (
                torch.from_numpy(oracle[f"third/arc_{name}"])
                for name in ("embeddings", "weight", "labels", "logits")
            )
            found = cosines(rows, weight)
            torch.testing.assert_close(65 * add_margin(found, labels, 0.5), logits, rtol=0, atol=1e-6)
            plain = nn.functional.cross_entropy(logits, labels)
            assert plain.item() == pytest.approx(float(oracle["third/plain_cross_entropy"]), abs=1e-6)
            loss = third.loss({"cosines": found}, {"label": labels})["loss"]
            assert loss.item() == pytest.approx(float(oracle["third/flip_masked_loss"]), abs=1e-6)
            compared += 1
    assert compared


def test_one_each_gives_every_photograph_once_mirrored_or_not():
    plain = list(ladder.OneEach(20, False, 0))
    assert sorted(plain) == list(range(20))
    sampler = ladder.OneEach(20, True, 0)
    items = list(sampler)
    assert sorted(i % 20 for i in items) == list(range(20))
    assert 3 < sum(i >= 20 for i in items) < 17
    sampler.set_epoch(1)
    assert list(sampler) != items
