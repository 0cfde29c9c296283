"""The benchmarks: that the ways they compare are the same thing, and that a table says on what it was measured."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from whalelib import bench, losses
from whalelib.identify import nearest


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(12, 16, generator=generator))
    return vectors, torch.arange(3).repeat_interleave(4), generator


def test_the_plain_ways_give_the_same(batch):
    vectors, labels, generator = batch
    weight = torch.randn(5, 16, generator=generator)
    expected = losses.arcface(losses.cosines(vectors, weight), labels)
    assert bench.one_hot_arcface(vectors, weight, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    expected = losses.triplet(losses.euclidean(vectors), labels)
    assert bench.looped_triplet(vectors, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    stripes = F.normalize(torch.randn(3, 4, 8, generator=generator), dim=2)
    assert bench.looped_aligned(stripes).item() == pytest.approx(
        losses.aligned(stripes).sum().item(), rel=1e-4
    )
    logits = torch.randn(12, 7, generator=generator)
    assert bench.one_hot_focal(logits, labels).item() == pytest.approx(
        losses.focal(logits, labels).item(), rel=1e-5
    )


def test_small_tables():
    found = pd.DataFrame(bench.loss_times(0.01, rows=16, classes=50, features=32))
    assert (found["milliseconds"] > 0).all()
    same = found.groupby("loss")["value"].agg(lambda values: values.max() - values.min())
    assert (same.drop("batch-hard triplet") < 1e-3).all()
    assert {"ours", "plain"} <= {*found["way"]}
    dealt = pd.DataFrame(bench.samplers(0.01, photographs=2_000, whales=300))
    assert (dealt["batches"] > 0).all()


def test_a_table_says_on_what_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("WHALE_BENCH", str(tmp_path))
    path = bench.keep("samplers", [{"sampler": "a", "milliseconds": 1.23456789}])
    table = pd.read_csv(path)
    assert path == tmp_path / "samplers.csv"
    assert table["milliseconds"].tolist() == [1.2346]
    assert {"processor", "processors", "threads", "torch", "numpy", "date"} <= {*table}
    bench.keep("samplers", [{"sampler": "b", "milliseconds": 2.0}], add=True)
    assert pd.read_csv(path)["sampler"].tolist() == ["a", "b"]
    bench.keep("samplers", [{"sampler": "c", "milliseconds": 3.0}])
    assert pd.read_csv(path)["sampler"].tolist() == ["c"]


@pytest.mark.parametrize("faiss", [False, True])
@pytest.mark.parametrize(("gallery", "count", "chunk"), [(40, 5, 7), (40, 5, 100), (3, 5, 2)])
def test_the_nearest_are_found_whatever_the_chunk(gallery, count, chunk, faiss):
    rng = np.random.default_rng(0)
    rows = [
        part / np.linalg.norm(part, axis=1, keepdims=True)
        for part in (rng.normal(size=(n, 8)) for n in (6, gallery))
    ]
    cosines, places = nearest(*rows, count, chunk=chunk, faiss=faiss)
    expected = np.argsort(-(rows[0] @ rows[1].T), axis=1)[:, :count]
    assert places.tolist() == expected.tolist()
    assert np.allclose(cosines, np.take_along_axis(rows[0] @ rows[1].T, expected, 1), atol=1e-6)


def test_the_third_solutions_comparison_at_the_contests_size():
    row = bench._apart("twelve_views()")
    assert row["GB"] < 2
    assert row["processor seconds"] < 20  # ten on two cores


def test_the_fast_layout_learns_the_same():
    plain, fast = (bench.lab_step(variant, seconds=0)["losses"] for variant in ("plain", "channels last"))
    assert fast == pytest.approx(plain, abs=5e-3)


@pytest.mark.parametrize("name", bench.LAB)
def test_steps_of_the_labs_networks_are_timed(name):
    row = bench.training_step(name, 8, channels_last=True, seconds=0)
    assert row["images a second"] > 0
    assert row["TFLOP/s"] > 0
    assert np.isfinite(row["loss"])


def test_an_empty_gallery():
    with pytest.raises(ValueError, match="empty"):
        nearest(np.ones((1, 2)), np.ones((0, 2)))
