"""The second place recipe, end to end on a few small photographs with supplied boxes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from whalelib.identify import blend
from whalelib.losses import arcface, euclidean, focal, triplet
from whalelib.recipes import second
from whalelib.run import Run

CHOICES = second.Choices(batch=16, size=(32, 64), images=2.0)


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def test_training_then_the_cache(six_animals, monkeypatch):
    trained = second.trained(six_animals, CHOICES)
    history = trained.history
    assert len(history) == 20
    assert (history["images"] == history["steps"] * 16).all()
    assert 0 <= history["valid MAP@5"].iloc[-1] <= 1
    assert history["lr"].max() == pytest.approx(second.RATE["lab"])
    assert history["lr"].iloc[0] == pytest.approx(second.RATE["lab"] / 3)
    monkeypatch.setattr(second, "fit", None)  # not to be called
    again = second.trained(six_animals, CHOICES)
    assert torch.equal(weights(trained.model), weights(again.model))
    answer = second.answer(replace(trained, parts=replace(trained.parts, queries=trained.parts.held)))
    assert answer.guesses.shape == (len(trained.parts.held), 5)


def test_a_killed_training_goes_on_to_the_same_weights(six_animals, monkeypatch, tmp_path):
    monkeypatch.setenv("WHALE_CACHE", str(tmp_path / "whole"))
    whole = weights(second.trained(six_animals, CHOICES).model)
    monkeypatch.setenv("WHALE_CACHE", str(tmp_path / "killed"))
    fit = second.fit

    def killed(*args, **options):
        def stop(model, row):
            if row["epoch"] == 7:
                raise KeyboardInterrupt
            return {}

        return fit(*args, **{**options, "on_epoch": stop})

    monkeypatch.setattr(second, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        second.trained(six_animals, CHOICES)
    monkeypatch.setattr(second, "fit", fit)
    assert torch.equal(weights(second.trained(six_animals, CHOICES).model), whole)


def test_the_schedule_of_figure_4_9():
    epochs = [0, 3, 4, 8, 9, 38, 39, 48, 49, 58, 59, 99]
    rates = [1e-4, 1e-4, 2e-4, 2e-4, 3e-4, 3e-4, 1e-4, 1e-4, 5e-5, 5e-5, 1e-5, 1e-5]
    hardest = [100, 100, 100, 100, 70, 70, 60, 60, 50, 50, 40, 40]
    assert [second.schedule(epoch)[0] for epoch in epochs] == rates
    assert [int(10_008 * second.schedule(epoch)[1]) for epoch in epochs] == hardest
    assert second.rate_factor(10, 20) == pytest.approx(1 / 6)  # as epoch 50 of 100


@pytest.mark.parametrize("edition", ["as_described", "as_shipped"])
def test_the_loss_is_the_sum_of_its_parts(edition):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 0, 5, 5, 5, 5, 7, 7, 7, 7, 20, 20, 20, 20])
    output = {
        "logits": torch.randn(16, 20, generator=generator),
        "cosines": torch.rand(16, 20, generator=generator) * 2 - 1,
        "features": torch.nn.functional.normalize(torch.randn(16, 8, generator=generator)),
    }
    shipped = edition == "as_shipped"
    margin = 0.0 if shipped else 0.5
    loss = second.Loss(edition, 100, margin)
    loss.set_epoch(45)
    found = loss(output, {"label": labels})
    expected = focal(output["logits"], labels, 6e-3 if shipped else None)
    expected += 0.1 * arcface(output["cosines"], labels, margin)
    expected += triplet(euclidean(output["features"]), labels, as_shipped=shipped)
    assert torch.isclose(found["loss"], expected)


def test_a_loss_can_be_left_out():
    generator = torch.Generator().manual_seed(0)
    output = {name: torch.rand(4, 6, generator=generator) for name in ("logits", "cosines", "features")}
    batch = {"label": torch.tensor([0, 0, 1, 1])}
    found = second.Loss("as_described", 100, 0.5, without=("focal", "boxes"))(output, batch)
    assert torch.isclose(found["loss"], 0.1 * found["margin"] + found["triplet"])


def test_parts_can_be_left_out(six_animals):
    plain = second.trained(six_animals, CHOICES)
    for part in ("Table 4.1", "mirrored whales", "batches of groups"):
        other = second.trained(six_animals, replace(CHOICES, without=(part,)))
        assert not torch.equal(weights(other.model), weights(plain.model)), part
    without = second.trained(six_animals, replace(CHOICES, without=("boxes",)))
    assert (plain.parts.crop, without.parts.crop) == (
        "box",
        None,
    )  # these boxes, enlarged, are whole photographs


def test_a_vote_is_the_shipped_blend(six_animals):
    """What the recipe computes with arrays is what files of five whales each give."""
    one = second.trained(six_animals, CHOICES)
    other = replace(one, model=second.network("lab", len(one.parts.known), "as_described", 9))
    here, networks, shares = one.parts, [one, other], [1, 2]
    files = []
    for trained in networks:
        found = second.files(trained)
        files += [
            found[(found["part"] == "held") & (found["view"] == view)] for view in ("plain", "mirrored")
        ]
    expected, _ = blend(files, [1, 1, 2, 2], 0.3)
    similarity = second.votes(networks, "held", shares)
    assert second.top5(similarity, here.known, 0.3).tolist() == expected.tolist()


def test_files_are_kept_with_the_others_in_place_of_earlier_ones(places, monkeypatch):
    monkeypatch.setattr(second, "ledger_path", lambda: places / "results" / "ledger.csv")
    row = {"data": "world", "edition": "as_described", "seed": 0, "part": "held", "view": "plain"}
    row |= {"image": "a.jpg", "identity": "w_1"}
    for model, probability in (("b", 0.25), ("a", 0.5), ("b", 0.1234567)):
        second._keep(pd.DataFrame([{**row, "model": model, "probability": probability}]))
    kept = pd.read_csv(second.kept_files())
    assert kept["model"].tolist() == ["a", "b"]
    assert kept["probability"].tolist() == [0.5, 0.1235]


def test_what_starts_from_nothing_may_learn_faster():
    model = second.network("lab", 3, "as_described", 0)
    groups = second.optimizer(model, 1e-3, 10).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 1e-2])
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    assert (
        len(groups[1]["params"]) == 4
    )  # of the normalisation its weight, of the heads directions, weight, bias


def test_only_the_five_most_probable_count():
    kept = second.top_only(np.arange(14.0).reshape(2, 7))
    assert kept.tolist() == [[0, 0, 2, 3, 4, 5, 6], [0, 0, 9, 10, 11, 12, 13]]
    few = np.ones((2, 3))
    assert np.array_equal(second.top_only(few), few)


def test_pseudo_labels_join_the_training_photographs(six_animals):
    here = second.parts(six_animals, CHOICES.size)
    here = replace(here, queries=here.held)  # these data have no test photographs
    more = second.with_pseudo_labels(six_animals, here, CHOICES)
    added = more.rest.table.iloc[len(here.rest) :]
    assert len(added) == max(1, round(second.PSEUDO_SHARE * len(here.held)))
    assert set(added["identity"]) <= set(here.known)
    assert set(added["image"]) <= set(here.held.table["image"])
    assert more.known == here.known


def test_table_4_2():
    models = {name: second.choices_of("paper", name) for name in second.MODELS}
    assert sum(weight for *_, weight in second.MODELS.values()) == 15
    assert models["a"] == second.Choices("resnet101", (256, 512), False)
    assert models["h"] == second.Choices("se_resnet101", (512, 512), True)
    assert models["j"] == second.Choices("se_resnext101_32x4d", (512, 512), True)


def test_a_backbone_of_another_profile_is_refused():
    with pytest.raises(ValueError, match="backbone = 'resnet101': choose one of lite0"):
        second.network("lab", 5, "as_described", 0, "resnet101")
    with pytest.warns(UserWarning, match="WHALE_RESNET101"):
        second.network("paper", 5, "as_described", 0)


def test_editions_differ_in_the_margin(six_animals):
    shipped = Run("04_16", replace(six_animals.settings, edition="as_shipped"))
    brief = replace(CHOICES, images=0.2)
    described, shipped = (second.trained(run, brief) for run in (six_animals, shipped))
    assert shipped.history["margin"].iloc[0] < described.history["margin"].iloc[0] / 2
