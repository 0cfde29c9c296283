"""The solutions' networks at full size: one real training step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from whalelib import models
from whalelib.recipes import first

NEEDED = 9 * 2**20  # KiB; a step of four images was measured at 7.6 GiB


def free_memory():
    """Return how many KiB may be had, None where the system doesn't say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    lines = dict(line.split(":") for line in path.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0])


def real_step(*options):
    free = free_memory()
    if free is not None and free < NEEDED:
        pytest.skip(f"{free / 2**20:.1f} GiB of memory are free, a step of the full-size network needs 9")
    command = [
        sys.executable,
        "-m",
        "whalelib.recipes.full_step",
        "--steps",
        "1",
        "--device",
        "cpu",
        *options,
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_real_training_step_at_full_size():
    """Forward, three losses, backward, clipping, Adam: 4 images of 4 x 256 x 512 through SENet-154 and its heads."""
    found = real_step()
    assert found["parameters"] == pytest.approx(
        113_040_560 + 2048 * 10008 + 10008 + 2048 * 512 + 512 + 2048 * 2 + 512 * 2, rel=1e-3
    )
    # Of a network that knows nothing: 2 ln 2 for the cross-entropy, at most the margin and a little more for triplets.
    assert found["cross-entropy"] == pytest.approx(1.386, abs=0.1)
    assert 0 < found["gradient"] < 1e5
    assert found["loss"] == pytest.approx(
        found["cross-entropy"] + found["global triplet"] + found["local triplet"], rel=1e-2
    )
    assert 4 < found["memory"] < 16
    assert found["seconds"] > 0


@pytest.mark.parametrize("size", [(256, 512), (512, 512)])
def test_a_real_training_step_of_the_second_solution(size):
    """Forward, three losses, backward, Adam: 4 images of 3 x H x W through ResNet-101 and both heads."""
    found = real_step("--recipe", "second", "--size", *map(str, size))
    assert found["parameters"] == pytest.approx(42_500_160 + 2 * 2048 * 10008 + 10008 + 2048 * 2, rel=1e-3)
    # Of a network that knows nothing: (1 + 1/4) ln 2; and a softmax of cosines near 0, the own one 31 lower.
    assert found["focal"] == pytest.approx(1.25 * 0.693, abs=0.1)
    assert found["margin"] == pytest.approx(9.2 + 64 * 0.479 + 1, abs=5)
    assert found["loss"] == pytest.approx(found["focal"] + 0.1 * found["margin"] + found["triplet"], rel=1e-2)
    assert 0 < found["triplet"] < 1
    assert 2 < found["memory"] < 12


@pytest.mark.parametrize("edition", ["as_described", "as_shipped"])
def test_the_paper_profile_takes_senet154(edition, monkeypatch):
    monkeypatch.delenv("WHALE_SENET154", raising=False)
    with torch.device("meta"), pytest.warns(UserWarning, match=r"random weights.*senet154-c7b49a05\.pth"):
        model = first.network("paper", 5004, edition, seed=0)
    assert models.count_parameters(model.backbone) == 113_040_560
    model.freeze()
    assert models.count_parameters(model.backbone, trainable=True) == 107_876_992


def test_the_paper_profile_reads_the_weights_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("WHALE_SENET154", str(tmp_path / "nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        first.network("paper", 3, "as_described", seed=0)


def test_pixels_are_normalised_by_edition(monkeypatch):
    monkeypatch.delenv("WHALE_SENET154", raising=False)
    small = models.FeatureMap(torch.nn.Conv2d(4, 8, 3), 8, ())
    monkeypatch.setattr(first, "senet154", lambda *_, **__: small)
    with pytest.warns(UserWarning, match="random weights"):
        described, shipped = (
            first.network("paper", 3, edition, seed=0) for edition in ("as_described", "as_shipped")
        )
    assert described.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert described.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert (shipped.mean.item(), shipped.std.item()) == (0, 1)
