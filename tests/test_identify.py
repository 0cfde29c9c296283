import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import nn

from whalelib import augment
from whalelib.data import NEW_WHALE, open_catalog
from whalelib.data.photographs import Photographs
from whalelib.identify import choose_threshold, embed, hold_out, identity_similarity, threshold_curve, top5
from whalelib.metrics import average_precision_at_k, map_at_k

SET = os.environ.get("WHALE_REFERENCE", "")
ORACLES = sorted((Path(SET) / "oracle").glob("*.npz")) if SET else []


def naive_top5(row, identities, threshold):
    """The rule of the third solution as its author's text says it, one identity after the other."""
    guesses = []
    for place in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if row[place] < threshold and NEW_WHALE not in guesses:
            guesses.append(NEW_WHALE)
        guesses.append(identities[place])
    if NEW_WHALE not in guesses:
        guesses.append(NEW_WHALE)
    return [*guesses, None, None, None, None, None][:5]


# A coarse grid of values, so that ties and values equal to the threshold come up.
GRID = st.integers(-4, 4).map(lambda n: n / 4)


@st.composite
def tables(draw, least=1):
    shape = draw(st.tuples(st.integers(least, 8), st.integers(1, 9)))
    similarity = draw(hnp.arrays(draw(st.sampled_from([np.float32, np.float64])), shape, elements=GRID))
    return similarity, [f"w_{i}" for i in range(shape[1])]


@given(tables(), GRID)
@settings(deadline=None)
def test_top5_is_the_naive_rule(table, threshold):
    similarity, identities = table
    expected = [naive_top5(row, identities, threshold) for row in similarity]
    assert top5(similarity, np.array(identities), threshold).tolist() == expected


@pytest.mark.skipif(
    not SET, reason="WHALE_REFERENCE is not set: no values of the original functions to compare with"
)
def test_top5_is_the_third_solutions():
    assert ORACLES, f"WHALE_REFERENCE={SET} holds no oracle/*.npz"
    compared = 0
    for path in ORACLES:
        with np.load(path) as oracle:
            if "third/similarity" not in oracle:
                continue
            similarity, identities = oracle["third/similarity"], oracle["third/similarity_ids"]
            for name in oracle.files:
                if name.startswith("third/top5_at_"):
                    threshold = float(name.rsplit("_", 1)[1])
                    assert [" ".join(row) for row in top5(similarity, identities, threshold)] == oracle[
                        name
                    ].tolist()
                    compared += 1
    assert compared


def test_top5_at_both_ends():
    similarity = np.array([[0.1, 0.9, 0.5, 0.3, 0.2, 0.4]])
    identities = list("abcdef")
    assert top5(similarity, identities, -np.inf).tolist() == [["b", "c", "f", "d", "e"]]
    assert top5(similarity, identities, np.inf).tolist() == [[NEW_WHALE, "b", "c", "f", "d"]]
    assert top5(similarity, identities, 0.2).tolist() == [["b", "c", "f", "d", "e"]]
    assert top5(similarity, identities, 0.21).tolist() == [["b", "c", "f", "d", NEW_WHALE]]


def test_top5_with_fewer_than_five_identities():
    assert top5([[0.2, 0.8]], ["a", "b"], 0.5).tolist() == [["b", NEW_WHALE, "a", None, None]]
    assert top5([[0.2, 0.8]], ["a", "b"], 0.1).tolist() == [["b", "a", NEW_WHALE, None, None]]


@pytest.mark.parametrize(
    ("similarity", "identities", "message"),
    [
        ([[0.1, np.nan]], ["a", "b"], "not finite"),
        ([[0.1, -np.inf]], ["a", "b"], "not finite"),
        ([[0.1]], ["a", "b"], "2 identities"),
        ([0.1, 0.2], ["a", "b"], "2 identities"),
        (np.zeros((3, 0)), [], "0 identities"),
        ([[0.1, 0.2]], ["a", NEW_WHALE], "is no identity"),
    ],
)
def test_top5_refuses(similarity, identities, message):
    with pytest.raises(ValueError, match=message):
        top5(similarity, identities, 0.5)


def test_top5_leaves_its_argument_alone():
    similarity = np.random.default_rng(0).random((4, 8))
    before = similarity.copy()
    top5(similarity, list("abcdefgh"), 0.5)
    assert np.array_equal(similarity, before)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_identity_similarity_is_the_nearest_photographs(chunk):
    generator = np.random.default_rng(1)
    queries, gallery = unit(generator.standard_normal((7, 5))), unit(generator.standard_normal((12, 5)))
    owner = np.array(
        ["b", "a", NEW_WHALE, "c", "a", None, "b", "b", np.nan, "c", "a", NEW_WHALE], dtype=object
    )
    similarity, identities = identity_similarity(queries, gallery, owner, chunk=chunk)
    assert identities.tolist() == ["a", "b", "c"]
    assert similarity.dtype == np.float32
    for i, query in enumerate(queries):
        for j, identity in enumerate(identities):
            nearest = max(query @ gallery[k] for k in range(12) if owner[k] == identity)
            assert similarity[i, j] == pytest.approx(nearest, abs=1e-6)


def test_identity_similarity_refuses():
    rows = np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match="no photograph of the gallery"):
        identity_similarity(rows, rows, [NEW_WHALE, None])
    with pytest.raises(ValueError, match="2 rows of the gallery"):
        identity_similarity(rows, rows, ["a"])


def test_the_contests_size_is_quick():
    generator = np.random.default_rng(0)
    similarity = generator.random((7960, 5004), dtype=np.float32)
    identities = np.array([f"w_{i}" for i in range(5004)])
    began = time.perf_counter()
    top5(similarity, identities, 0.999)
    assert time.perf_counter() - began < 10  # a loop over the rows takes longer, this a fraction of a second


@st.composite
def labelled(draw):
    similarity, identities = draw(tables(least=2))
    known = draw(st.lists(st.sampled_from(identities), min_size=1, max_size=len(similarity) - 1))
    new = draw(st.lists(st.sampled_from([NEW_WHALE, "w_unseen"]), min_size=1, max_size=1))
    rest = len(similarity) - len(known) - 1
    truth = (
        known + new + draw(st.lists(st.sampled_from([*identities, NEW_WHALE]), min_size=rest, max_size=rest))
    )
    return similarity, identities, truth


@given(labelled(), st.sampled_from([0.0, 0.276, 0.5, 1.0]))
@settings(max_examples=200, deadline=None)
def test_threshold_curve_is_exact(case, new_share):
    similarity, identities, truth = case
    answer = np.array([label if label in identities else NEW_WHALE for label in truth])
    new = answer == NEW_WHALE

    def weighted(threshold):
        precision = average_precision_at_k(top5(similarity, identities, threshold), answer)
        return new_share * precision[new].mean() + (1 - new_share) * precision[~new].mean()

    thresholds, scores = threshold_curve(similarity, identities, truth, new_share)
    assert (np.diff(thresholds) < 0).all()
    assert scores == pytest.approx([weighted(threshold) for threshold in thresholds])
    # No threshold at all does better: between two similarities nothing changes.
    anywhere = np.arange(-9.5, 10) / 8
    best = max(weighted(threshold) for threshold in anywhere)
    assert weighted(choose_threshold(similarity, identities, truth, new_share)) == pytest.approx(best)


def test_choose_threshold_lies_between():
    similarity = [[0.9, 0.1], [0.8, 0.2], [0.5, 0.3]]
    assert choose_threshold(similarity, ["a", "b"], ["a", "a", NEW_WHALE], 0.5) == pytest.approx(0.65)


@pytest.mark.parametrize(
    ("truth", "share", "message"),
    [
        (["a", "a"], 0.3, "no query of a new whale"),
        ([NEW_WHALE, "c"], 0.3, "no query of a known whale"),
        (["a"], 0.3, "2 queries"),
        (["a", None], 0.3, "1 of 2 queries have no right answer"),
        (["a", NEW_WHALE], 1.3, "new_share = 1.3"),
    ],
)
def test_threshold_curve_refuses(truth, share, message):
    with pytest.raises(ValueError, match=message):
        threshold_curve([[0.1, 0.2], [0.3, 0.4]], ["a", "b"], truth, share)


class Colours(nn.Module):
    """Embeds an image as its mean colour; dropout and normalisation tell training from evaluation."""

    def __init__(self):
        super().__init__()
        self.neck = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.pinned = nn.BatchNorm1d(3).eval()

    def embed(self, images):
        return self.pinned(self.neck(images.mean(dim=(2, 3))))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Photographs in one colour each: "ada" reds, "bo" greens, "cy" one blue, strangers gray."""
    folder = tmp_path_factory.mktemp("animals")
    shades = {
        "ada": [(200, 10, 20), (180, 15, 15), (220, 5, 30)],
        "bo": [(10, 190, 20), (25, 210, 20)],
        "cy": [(20, 20, 220)],
        NEW_WHALE: [(99, 99, 90), (80, 85, 80)],
    }
    for name, colours in shades.items():
        (folder / name).mkdir()
        for number, colour in enumerate(colours):
            Image.new("RGB", (20, 10), colour).save(folder / name / f"{name}{number}.png")
    return open_catalog(folder)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_embed(catalog, batch_size):
    model = Colours().train()
    model.pinned.eval()
    data = Photographs(catalog, (4, 8), transform=augment.baseline((4, 8)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = embed(model, data, batch_size=batch_size)
    assert model.training and model.neck.training and not model.pinned.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert data.transform is not None
    assert found.dtype == np.float32
    colours = np.array([np.asarray(Image.open(path))[0, 0] for path in catalog.table["path"]], dtype=float)
    assert found == pytest.approx(unit(colours), abs=1e-5)


def test_embed_restores_the_mode_after_an_error(catalog):
    class Broken(Colours):
        def embed(self, images):
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        embed(model, Photographs(catalog, (4, 8)))
    assert model.neck.training


def test_from_photographs_to_guesses(catalog):
    rows = embed(Colours(), Photographs(catalog, (4, 8)))
    identity = catalog.table["identity"].to_numpy()
    held = ("ada0.png", "bo0.png", "new_whale0.png", "new_whale1.png")
    queries = catalog.table["path"].str.endswith(held).to_numpy()
    similarity, identities = identity_similarity(rows[queries], rows[~queries], identity[~queries])
    assert identities.tolist() == ["ada", "bo", "cy"]
    threshold = choose_threshold(similarity, identities, identity[queries])
    assert map_at_k(top5(similarity, identities, threshold), identity[queries]) == 1


def test_hold_out(catalog):
    for seed in range(5):
        rest, held = hold_out(catalog, share=0.34, new=0.5, seed=seed)
        assert sorted([*rest.table["image"], *held.table["image"]]) == sorted(catalog.table["image"])
        owners = held.table["identity"].value_counts()
        assert owners.to_dict() == {"ada": 1, "bo": 1, NEW_WHALE: 1}
        assert set(owners.index) <= set(rest.table["identity"])
    draws = {tuple(hold_out(catalog, share=0.34, seed=seed)[1].table["image"]) for seed in range(9)}
    assert len(draws) > 1
    assert list(hold_out(catalog, seed=3)[1].table["image"]) == list(
        hold_out(catalog, seed=3)[1].table["image"]
    )


def test_hold_out_takes_only_as_asked(catalog):
    _, held = hold_out(catalog, share=1 / 6, new=0.0)
    assert len(held) == 1
    assert held.table["identity"].isin(["ada", "bo"]).all()
