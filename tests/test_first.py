"""The first place recipe, end to end on a few small photographs with supplied boxes and masks."""

import shutil
from dataclasses import replace

import pytest
import torch

from whalelib.recipes import first

CHOICES = first.Choices(quadruplets=2, size=(32, 64), images=0.6)


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def test_three_steps_then_the_cache(six_animals, monkeypatch):
    trained = first.trained(six_animals, CHOICES)
    history = trained.history
    assert history["step"].unique().tolist() == [1, 2, 3]
    assert history["images"].sum() == pytest.approx(0.6 * first.budget("lab", trained.parts), rel=0.1)
    assert history.groupby("step")["valid MAP@5"].last().between(0, 1).all()
    assert history.groupby("step")["lr"].last().tolist() == [step.rate for step in first.STEPS["lab"]]
    monkeypatch.setattr(first, "fit", None)  # not to be called
    again = first.trained(six_animals, CHOICES)
    assert torch.equal(weights(trained.model), weights(again.model))
    held = trained.parts.photographs(trained.parts.held)
    found = first.probabilities(trained.model, held)
    assert found.shape == (len(held), 6)
    assert ((found > 0) & (found < 1)).all()


def test_parts_can_be_left_out(six_animals):
    plain = first.trained(six_animals, CHOICES)
    for part in first.PARTS:
        other = first.trained(six_animals, replace(CHOICES, without=(part,)))
        assert not torch.equal(weights(other.model), weights(plain.model)), part
        assert other.parts.crop == (None if part == "boxes" else "box")


def test_a_killed_training_goes_on_to_the_same_weights(six_animals, places, monkeypatch):
    choices = replace(CHOICES, images=2.0)
    whole = weights(first.trained(six_animals, choices).model)
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
        first.trained(six_animals, choices)
    monkeypatch.setattr(first, "fit", fit)
    assert torch.equal(weights(first.trained(six_animals, choices).model), whole)
