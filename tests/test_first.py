"""The first place recipe, end to end on a few small photographs with supplied boxes and masks."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from whalelib.data import NEW_WHALE
from whalelib.recipes import first
from whalelib.run import Run, Settings

CHOICES = first.Choices(quadruplets=2, size=(32, 64), images=0.6)


@pytest.fixture
def run(places, monkeypatch):
    """Six animals of three photographs each and four strangers, with boxes and masks beside them."""
    folder = places / "animals"
    (folder / "train").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for name, count in {**{f"w_{i}": 3 for i in range(6)}, NEW_WHALE: 4}.items():
        base = rng.integers(0, 256, (8, 16, 3), dtype=np.uint8)
        for number in range(count):
            image = f"{name}{number}.png"
            noise = rng.integers(0, 60, (32, 64, 3), dtype=np.uint8)
            pixels = np.kron(base, np.ones((4, 4, 1), np.uint8)) // 2 + noise
            Image.fromarray(pixels).save(folder / "train" / image)
            Image.fromarray(np.full((32, 64), 255, np.uint8)).save(folder / "masks" / image)
            rows.append((image, name))
    pd.DataFrame(rows, columns=["Image", "Id"]).to_csv(folder / "train.csv", index=False)
    pd.DataFrame(
        [(image, 0, 0, 60, 30) for image, _ in rows], columns=["Image", "x0", "y0", "x1", "y1"]
    ).to_csv(folder / "boxes.csv", index=False)
    monkeypatch.setattr("whalelib.run.sources_hash", lambda *others: "as it is")
    return Run("03_15", Settings(data=str(folder)))


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def test_three_steps_then_the_cache(run, monkeypatch):
    trained = first.trained(run, CHOICES)
    history = trained.history
    assert history["step"].unique().tolist() == [1, 2, 3]
    assert history["images"].sum() == pytest.approx(0.6 * first.budget("lab", trained.parts), rel=0.1)
    assert history.groupby("step")["valid MAP@5"].last().between(0, 1).all()
    assert history.groupby("step")["lr"].last().tolist() == [step.rate for step in first.STEPS["lab"]]
    monkeypatch.setattr(first, "fit", None)  # not to be called
    again = first.trained(run, CHOICES)
    assert torch.equal(weights(trained.model), weights(again.model))
    held = trained.parts.photographs(trained.parts.held)
    found = first.probabilities(trained.model, held)
    assert found.shape == (len(held), 6)
    assert ((found > 0) & (found < 1)).all()


def test_a_killed_training_goes_on_to_the_same_weights(run, places, monkeypatch):
    choices = replace(CHOICES, images=2.0)
    whole = weights(first.trained(run, choices).model)
    fit, calls = first.fit, []

    def killed(*args, **options):
        calls.append(options["folder"])
        if len(calls) == 2:
            fit(*args, **{**options, "epochs": 1, "stop": None})
            raise KeyboardInterrupt
        return fit(*args, **options)

    shutil.rmtree(places / "cache")
    monkeypatch.setattr(first, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        first.trained(run, choices)
    monkeypatch.setattr(first, "fit", fit)
    assert torch.equal(weights(first.trained(run, choices).model), whole)
