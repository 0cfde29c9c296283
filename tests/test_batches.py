import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from whalelib import augment
from whalelib.data import NEW_WHALE
from whalelib.data.batches import Doubled, Portions, PxK
from whalelib.data.photographs import Photographs
from whalelib.train import epoch_batches, fit

SIZE = (16, 32)
SIZES = {"ada": 4, "bo": 2, "cy": 1, NEW_WHALE: 3}
SET = os.environ.get("WHALE_REFERENCE", "")
NEW = 10008


# ---------------------------------------------------------------- every photograph twice


def test_the_second_half_is_mirrored_and_other_whales(photographs):
    data = Doubled(photographs)
    identity = photographs.catalog.table["identity"]
    place = {"ada": 0, "bo": 1, "cy": 2, NEW_WHALE: 6}
    assert data.new == 6 and len(data) == 20
    assert data.labels[:10].tolist() == [place[name] for name in identity]
    assert data.labels[10:].tolist() == [place[name] + 3 * (name != NEW_WHALE) for name in identity]
    for i in range(20):
        item, plain = data[i], photographs[i % 10]["image"]
        assert (item["label"], item["index"]) == (data.labels[i], i)
        if item["label"] != data.new:
            assert data.mirrored(i) == (i >= 10)
        assert item["image"].shape == (4, *SIZE)
        assert torch.equal(item["image"], plain.flip(-1) if data.mirrored(i) else plain)
    assert data[-1]["index"] == 19
    with pytest.raises(IndexError):
        data[20]


def test_new_whales_are_mirrored_half_the_time_in_both_halves(photographs):
    data = Doubled(photographs)
    new = np.flatnonzero(data.labels == data.new)
    assert len(new) == 6
    tosses = []
    for epoch in range(400):
        data.set_epoch(epoch)
        tosses.append([data.mirrored(i) for i in new])
    tosses = np.array(tosses)
    assert (abs(tosses.mean(axis=0) - 0.5) < 0.125).all()  # five standard deviations
    assert (abs(np.corrcoef(tosses.T) - np.eye(6)) < 0.25).all()


def test_other_whales_than_the_known_have_no_label(photographs):
    data = Doubled(Photographs(photographs.catalog, SIZE, known=["bo", "ada"]))
    assert Counter(data.labels.tolist()) == {1: 4, 3: 4, 0: 2, 2: 2, 4: 6, -1: 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_depend_on_seed_epoch_and_index_alone(photographs, workers):
    def images(seed, epoch, order, workers=0):
        moving = Photographs(
            photographs.catalog, SIZE, transform=augment.first_place(SIZE, "as_described"), seed=seed
        )
        data = Doubled(moving)
        data.set_epoch(epoch)
        loader = DataLoader(data, batch_size=3, sampler=order, num_workers=workers)
        return dict(zip(order, torch.cat([batch["image"] for batch in loader]), strict=True))

    one = images(1, 2, range(20))
    two = images(1, 2, [7, 19, 3, 0, 12], workers)
    assert all(torch.equal(one[i], image) for i, image in two.items())
    for other in (images(1, 3, range(20)), images(2, 2, range(20))):
        assert sum(torch.equal(one[i], other[i]) for i in range(20)) < 5
    # A photograph and its mirror image move each in its own way.
    assert sum(torch.equal(one[i], one[i + 10].flip(-1)) for i in range(10)) < 5


def test_fingerprint(photographs):
    others = [Photographs(photographs.catalog, SIZE), Photographs(photographs.catalog, SIZE, seed=1)]
    kinds = [photographs.fingerprint] + [Doubled(other).fingerprint for other in (photographs, *others)]
    assert len(set(kinds)) == 4
    assert Doubled(photographs).fingerprint == kinds[1]


# ---------------------------------------------------------------- groups of a class


def sizes_of(labels, own):
    return Counter(Counter(labels[own].tolist()).values())


@st.composite
def collections(draw):
    """Images of up to 12 whales and of new ones, without order, and a batch that they suffice for."""
    counts = draw(st.lists(st.integers(1, 23), min_size=2, max_size=12))
    new = draw(st.integers(0, 9))
    images = draw(st.integers(1, 5))
    share = draw(st.sampled_from([0, 0.25, 0.5, 0.9]))
    groups = draw(st.integers(1, len(counts)))
    seed = draw(st.integers(0, 99))
    labels = np.repeat([*range(len(counts)), 50, -1], [*counts, new, draw(st.integers(0, 3))])
    labels = np.random.default_rng(seed).permutation(labels)
    spare = draw(st.integers(0, images - 1))
    return labels, groups * images + spare, images, share, seed


@given(collections(), st.integers(0, 3))
@settings(deadline=None, max_examples=150)
def test_what_a_batch_and_an_epoch_hold(collection, epoch):
    labels, batch, images, share, seed = collection
    sampler = PxK(labels, batch, 50, images=images, share=share, seed=seed)
    sampler.set_epoch(epoch)
    groups = batch // images
    new = int(groups * share) if (labels == 50).any() else 0
    batches = list(sampler)
    assert len(batches) == len(sampler) >= 1
    dealt = Counter()
    for places in batches:
        assert len(places) == groups * images
        whales, strangers = places[: (groups - new) * images], places[(groups - new) * images :]
        found = labels[whales].reshape(-1, images)
        assert (found == found[:, :1]).all() and (found >= 0).all() and (found != 50).all()
        assert len({*found[:, 0].tolist()}) == groups - new
        assert (labels[strangers] == 50).all()
        if new * images <= (labels == 50).sum():
            assert len({*strangers}) == len(strangers)
        dealt.update(whales)
    left = 0
    for label, count in Counter(labels[(labels >= 0) & (labels != 50)].tolist()).items():
        own = np.flatnonzero(labels == label)
        given_out = sum(dealt[i] for i in own) // images
        assert given_out <= max(1, count // images)
        if count >= images:
            assert max(dealt[i] for i in own) <= 1
        left += given_out < max(1, count // images)
    assert left < groups - new  # else there would have been another batch


@given(collections())
@settings(deadline=None, max_examples=30)
def test_an_epoch_depends_on_seed_and_epoch_alone(collection):
    labels, batch, images, share, seed = collection
    one, two = (PxK(labels, batch, 50, images=images, share=share, seed=seed) for _ in range(2))
    one.set_epoch(3)
    np.random.seed(0)  # noqa: NPY002  (must not matter)
    torch.manual_seed(0)
    two.set_epoch(1)
    two.set_epoch(3)
    assert list(one) == list(one) == list(two)
    assert epoch_batches(len(labels), batch, one, seed=5, epoch=3) == list(one)


def test_epochs_and_seeds_differ():
    labels = np.repeat(np.arange(20), 6)
    sampler = PxK(labels, 16, 99)
    draws = [list(sampler)]
    sampler.set_epoch(1)
    draws += [list(sampler), list(PxK(labels, 16, 99, seed=1))]
    assert all(one != two for i, one in enumerate(draws) for two in draws[:i])


def test_a_quarter_of_the_groups_is_new():
    labels = np.append(np.repeat(np.arange(40), 5), [99] * 30)
    for batch, whales, new in ((16, 3, 1), (32, 6, 2), (64, 12, 4), (128, 24, 8)):
        for places in PxK(labels, batch, 99):
            assert sizes_of(labels, places) == Counter({4: whales}) + Counter({4 * new: 1})


def test_few_images_are_repeated_and_a_remainder_is_left_out():
    labels = np.repeat([0, 1, 2], [1, 3, 11])
    counts = Counter()
    for epoch in range(300):
        sampler = PxK(labels, 4, 9)
        sampler.set_epoch(epoch)
        assert len(sampler) == 1 + 1 + 2
        counts.update(np.concatenate(list(sampler)).tolist())
    assert counts[0] == 4 * 300
    assert sum(counts[i] for i in (1, 2, 3)) == 4 * 300
    assert all(abs(counts[i] - 400) < 80 for i in (1, 2, 3))
    # 8 of the 11, others each time
    assert sum(counts[i] for i in range(4, 15)) == 8 * 300
    assert all(abs(counts[i] - 2400 / 11) < 45 for i in range(4, 15))


def test_new_whales_never_run_out():
    labels = np.append(np.repeat(np.arange(8), 40), [9, 9])
    batches = list(PxK(labels, 16, 9))
    assert len(batches) > 20
    assert all(len(places) == 16 and sizes_of(labels, places)[4] == 4 for places in batches)


def test_without_new_whales_all_groups_are_whales():
    labels = np.repeat(np.arange(8), 4)
    batches = list(PxK(labels, 16, 99))
    assert len(batches) == 2
    assert sorted(np.concatenate(batches).tolist()) == list(range(32))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 0, 1, 9], {"batch": 16}, "2 whales.* a batch of 16 needs 3"),
        ([0, 0, 1], {"batch": 16}, "2 whales.* a batch of 16 needs 4"),
        ([9, 9, -1], {"batch": 4, "share": 0.5}, "0 whales.* a batch of 4 needs 1"),
        ([], {"batch": 4}, "0 whales"),
        ([0, 1], {"batch": 3}, "batches of 3"),
        ([0, 1], {"batch": 8, "images": 0}, "0 images"),
        ([0, 1], {"batch": 8, "share": 1}, "share of 1"),
        ([0, 1], {"batch": 8, "share": -0.1}, "share of -0.1"),
    ],
)
def test_bad_arguments(labels, options, message):
    with pytest.raises(ValueError, match=message):
        PxK(np.array(labels, dtype=int), new=9, **options)


def test_training_takes_them(photographs):
    data = Doubled(photographs)
    seen = []

    class Colour(torch.nn.Linear):
        def forward(self, images):
            return super().forward(images.mean(dim=(2, 3)))

    def loss(output, batch):
        seen.append(batch["index"].tolist())
        return torch.nn.functional.cross_entropy(output, batch["label"])

    sampler = PxK(data.labels, 16, data.new, seed=3)
    history = fit(Colour(4, 7), data, loss, epochs=2, batch_size=16, sampler=sampler, device="cpu")
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert seen == expected and history["steps"].sum() == len(expected)
    assert [sum(data.labels[i] == data.new for i in places) for places in seen] == [4] * len(seen)


# ---------------------------------------------------------------- the contest's own lists


@pytest.fixture(scope="module")
def contest():
    """The labels that the second solution trained on: its list less its validation photographs, twice."""
    if not SET:
        pytest.skip("WHALE_REFERENCE is not set: no lists of the second solution to deal out")
    lists = Path(SET) / "reference" / "competition" / "second_place_lists"
    whale = {name: int(place) for name, place in (x.split() for x in (lists / "label_list.txt").open())}
    held = {line.split()[0] for line in (lists / "val0.txt").open()}
    pairs = [(line.split()[0], line.split()[2]) for line in (lists / "train_image_list.txt").open()]
    plain = np.array([whale[name] for image, name in pairs if image not in held])
    assert len(pairs) == 25361 and len(plain) == 24766
    known = plain >= 0
    return np.concatenate([np.where(known, plain, NEW), np.where(known, plain + NEW // 2, NEW)])


@pytest.mark.parametrize(("batch", "expected"), [(16, 3964), (32, 1981), (64, 989), (128, 494)])
def test_an_epoch_is_as_long_as_the_original_s(contest, batch, expected):
    """The original gave ``expected`` batches in one epoch; which whales are left over is a matter of chance."""
    counts = np.bincount(contest, minlength=NEW)[:NEW]
    groups = np.where(counts < 4, counts > 0, counts // 4).sum()
    sampler = PxK(contest, batch, NEW)
    lengths = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        lengths.append(len(sampler))
    assert max(lengths) <= groups // (batch // 16 * 3)
    assert abs(np.array(lengths) - expected).max() <= 3


def test_portions_follow_each_other():
    labels = np.repeat(np.arange(12), 5)
    sampler = PxK(labels, 16, new=99, seed=4)
    passes = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        passes += list(sampler)
    portions = Portions(PxK(labels, 16, new=99, seed=4), 2)
    found = []
    for epoch in range(4):
        portions.set_epoch(epoch)
        assert len(portions) == len(list(portions)) == 2
        found += list(portions)
    assert found == passes[:8]
    again = Portions(PxK(labels, 16, new=99, seed=4), 2)  # as after a kill
    again.set_epoch(3)
    assert list(again) == passes[6:8]
    again.set_epoch(1)
    assert list(again) == passes[2:4]
