import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from whalelib import augment
from whalelib.data import NEW_WHALE
from whalelib.data.masks import decode_rle, encode_rle, mask_pixels
from whalelib.data.photographs import Photographs
from whalelib.data.quadruplets import Quadruplets

SIZE = (16, 32)
SIZES = {"ada": 4, "bo": 2, "cy": 1, NEW_WHALE: 3}


def drawn(data):
    rows, labels, mirrored = (np.array(part) for part in zip(*map(data.draw, range(len(data))), strict=True))
    identity = data.photographs.catalog.table["identity"].to_numpy()[rows]
    return rows, labels, mirrored, identity


@pytest.mark.parametrize("flips", ["pair", "each"])
def test_labels_say_who_is_there_and_whether_mirrored(photographs, flips):
    data = Quadruplets(photographs, 400, flips=flips)
    _, labels, mirrored, identity = drawn(data)
    whale = {"ada": 0, "bo": 1, "cy": 2}
    expected = [
        whale[name] + 3 * flip if name in whale else 6
        for name, flip in zip(identity.flat, mirrored.flat, strict=True)
    ]
    assert labels.ravel().tolist() == expected
    assert (identity[:, 0] == identity[:, 1]).all()
    assert (identity[:, 2] != identity[:, 0]).all()
    assert (identity[:, 2] != NEW_WHALE).all()
    assert (identity[:, 3] == NEW_WHALE).all()
    agree = (labels[:, 0] == labels[:, 1])[identity[:, 0] != NEW_WHALE].mean()
    assert agree == 1 if flips == "pair" else 0.4 < agree < 0.6
    assert 0.45 < mirrored.mean() < 0.55


def test_a_class_comes_once_a_pass_wherever_epochs_cut_it(photographs):
    data = Quadruplets(photographs, 3)
    anchors = []
    for epoch in range(8):  # 24 items, six passes over ada, bo, cy and new_whale
        data.set_epoch(epoch)
        anchors += drawn(data)[3][:, 0].tolist()
    for start in range(0, 24, 4):
        assert sorted(anchors[start : start + 4]) == sorted(SIZES)


def test_two_photographs_of_a_class_differ_unless_it_has_one(photographs):
    rows, _, _, identity = drawn(Quadruplets(photographs, 200))
    same = rows[:, 0] == rows[:, 1]
    assert (same == (identity[:, 0] == "cy")).all()


def test_one_photograph_taken_twice_is_augmented_twice(photographs):
    moving = Photographs(
        photographs.catalog, SIZE, masks=True, transform=augment.first_place(SIZE, "as_shipped")
    )
    data = Quadruplets(moving, 60)
    pairs = [data[i]["image"][:2] for i in range(60) if drawn(data)[3][i, 0] == "cy"]
    assert pairs
    assert any(not torch.equal(*pair) for pair in pairs)


def test_classes_have_the_photographs_they_must(photographs):
    data = Quadruplets(photographs, 200, minimum=2)
    assert Counter(drawn(data)[3][:, 2]).keys() == {"ada", "bo"}
    with pytest.raises(ValueError, match="1 whales have 4 photographs or more; two at least are needed"):
        Quadruplets(photographs, 9, minimum=4)


def test_without_new_whales_the_fourth_is_another_known_one(photographs):
    catalog = photographs.catalog
    known = catalog.where((catalog.table["identity"] != NEW_WHALE).to_numpy())
    _, labels, _, identity = drawn(Quadruplets(Photographs(known, SIZE), 100))
    assert (labels < 6).all()
    assert (identity[:, 3] != identity[:, 0]).all()
    assert (identity[:, 3] != identity[:, 2]).all()


def test_items_are_the_photographs_mirrored_with_their_masks(photographs):
    data = Quadruplets(photographs, 20)
    for i in range(20):
        rows, _, mirrored = data.draw(i)
        for image, row, flip in zip(data[i]["image"], rows, mirrored, strict=True):
            plain = photographs[int(row)]["image"]
            assert plain.shape == (4, *SIZE)
            assert torch.equal(image, plain.flip(-1) if flip else plain)
    batch = default_collate([data[0], data[1]])
    assert batch["image"].shape == (2, 4, 4, *SIZE)
    assert batch["label"].shape == (2, 4)


def test_draws_depend_on_seed_epoch_and_index_alone(photographs):
    first, second = (Quadruplets(photographs, 12, seed=5) for _ in range(2))
    for data in (first, second):
        data.set_epoch(2)
    backwards = [second[i] for i in reversed(range(12))][::-1]
    assert all(torch.equal(first[i]["image"], backwards[i]["image"]) for i in range(12))
    second.set_epoch(3)
    assert any(not torch.equal(first[i]["image"], second[i]["image"]) for i in range(12))
    assert first.fingerprint != Quadruplets(photographs, 12, seed=6).fingerprint


def test_a_photograph_without_a_mask_has_zeros(photographs):
    table = photographs.catalog.table.assign(rle=[None] * 10)
    bare = Photographs(dataclasses.replace(photographs.catalog, table=table), SIZE, masks=True)
    assert bare[0]["image"][3].eq(0).all()
    assert photographs[0]["image"][3].mean() == pytest.approx(0.5, abs=0.02)


def test_the_mask_follows_the_box(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 20)).save(path)
    mask = np.zeros((192, 384), bool)
    mask[:, 192:] = True  # the right half of the photograph
    assert mask_pixels(mask, path, (20, 0, 40, 20), SIZE).min() > 200  # grey at the edge
    assert mask_pixels(encode_rle(mask), path, (0, 0, 20, 20), SIZE).max() < 55
    assert mask_pixels(mask, path, (10, 0, 30, 20), SIZE)[:, 24:].min() == 255
    assert mask_pixels(mask, path, None, SIZE).mean() == pytest.approx(127.5, abs=4)


def test_run_lengths():
    mask = np.zeros((192, 384), bool)
    mask[:3, 0] = mask[:2, 1] = True
    assert encode_rle(mask) == "1 3 193 2"  # the first solution's own example
    assert np.array_equal(decode_rle("1 3 193 2"), mask)
    assert not decode_rle("").any()
    for wrong in ("1", "a 2", "0 4", "1 0", "5 2 1 2", "73728 2", "-1 2"):
        with pytest.raises(ValueError, match="run lengths"):
            decode_rle(wrong)
