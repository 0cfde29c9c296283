"""The first solution's linear layer alone."""

from dataclasses import replace

import numpy as np
import torch

from whalelib.metrics import map_at_k
from whalelib.models import FirstPlace, first_place_lite0
from whalelib.recipes import first, head


def test_four_ways_from_the_same_start(six_animals):
    trained = first.trained(six_animals, first.Choices(quadruplets=2, size=(32, 64), images=0.2))
    parts = trained.parts
    trained = replace(trained, parts=replace(parts, queries=parts.held))
    truth = parts.held.table["identity"].to_numpy(dtype=object)
    table = head.ways(trained, lambda guesses: map_at_k(guesses, truth), steps=20)
    assert list(table.index) == ["Adam, batch 5", "Adam, batch 12", "AdamW, batch 5", "AdamW, batch 12"]
    assert table["MAP@5"].between(0, 1).all()
    assert (table["cross-entropy"] > 0).all()
    again = head.ways(trained, lambda guesses: map_at_k(guesses, truth), steps=20)
    assert np.array_equal(table.to_numpy(), again.to_numpy(), equal_nan=True)


def test_the_head_is_the_networks():
    model = FirstPlace(4, first_place_lite0(pretrained=False), seed=1).eval()
    alone = head.Head(4, 1280, seed=2).eval()
    alone.neck.load_state_dict(model.neck.state_dict())
    alone.head.load_state_dict(model.head.state_dict())
    images = torch.rand(3, 4, 32, 64)
    with torch.inference_mode():
        rows = model.features(images).mean((2, 3))
        assert torch.allclose(alone(rows[None])["logits"], model(images)["logits"], atol=1e-6)
