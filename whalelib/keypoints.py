"""Where the fluke ends: four key points, boxes from them, crops from boxes (report 4.1.2).

The second solution found the boxes of all photographs with two Cascaded Pyramid Networks (Chen et al. 2018), of which
it published the code, without the weights and the points it was trained with. Here they learn the points in the
generated world, where they are known, and find them in any photograph. Supplied boxes take precedence.
"""

import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck
from tqdm.auto import tqdm

from whalelib import augment, locate, weights
from whalelib.data import Catalog, read_image, statistics
from whalelib.data.images import Box
from whalelib.data.layouts import BOX, Problems
from whalelib.data.photographs import Photographs, as_tensor
from whalelib.locate import cache_folder, code_of, looked_at_once, trained_once, weights_hash
from whalelib.models import LITE0_MEAN, LITE0_STD, Sums, lite, second_place_url, trunk
from whalelib.run import Run, Settings, by_profile
from whalelib.train import evaluating, fit, keep_memory, warm_cosine

POINTS = ("left_down", "left_up", "right_down", "right_up")
COLUMNS = tuple(f"{point}_{axis}" for point in POINTS for axis in "xy")
MIRRORED = (2, 3, 0, 1)  # which point each is in the mirror image
STRIDE = 4  # pixels of the network's input a cell of a heat map
HEIGHT = 100.0  # of a heat map's hill
SIGMA = 1 / 16  # of the hill, as a share of the map's longer side: 4 of 64 cells
MARGIN = 0.1  # of the box, on each side of the crop


# Heat maps


def heat_maps(points: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the maps that a network is to give: a hill on each point (Gaussian, ``HEIGHT``, ``SIGMA``).

    As shipped, a point at pixel p is at cell (p - 1) / 4.

    Args:
        points: (N, K, 2) x, y in pixels of the network's input.
        size: (H, W) of that input, multiples of ``STRIDE``.

    Returns:
        (N, K, H / 4, W / 4).
    """
    height, width = (side // STRIDE for side in size)
    sigma = SIGMA * max(height, width)
    slopes = []
    for axis, cells in enumerate((width, height)):
        middle = (points[..., axis, None] - 1) / STRIDE
        apart = torch.arange(cells, device=points.device) - middle
        slopes.append(torch.exp(-apart.square() / (2 * sigma**2)))
    across, down = slopes
    return HEIGHT * down[..., :, None] * across[..., None, :]


def points_of(maps: np.ndarray, scale: float, default: tuple[float, float]) -> np.ndarray:
    """Return the points that heat maps show, as shipped.

    A map is blurred a little; the point is a quarter of the way from its highest cell to the next highest one, and two
    pixels of the photograph further, in whole pixels. A flat map shows none, and the default is taken.

    Args:
        maps: (K, h, w), of a photograph or summed over its views.
        scale: pixels of the network's input a pixel of the photograph.
        default: x, y in pixels of the photograph.

    Returns:
        (K, 2) x, y in pixels of the photograph.
    """
    points = []
    for heat in maps:
        blurred = cv2.GaussianBlur(heat, (5, 5), 1)
        if blurred.var() < 1:
            points.append(default)
            continue
        second, first = np.argsort(blurred, axis=None, kind="stable")[-2:]
        y, x = (3 * np.array(divmod(first, heat.shape[1])) + divmod(second, heat.shape[1])) / 4
        points.append((x * STRIDE / scale, y * STRIDE / scale))
    return np.rint(np.array(points) + 2)


def point_loss(output: dict[str, torch.Tensor], batch: dict, share: float = 0.5) -> dict[str, torch.Tensor]:
    """Return the losses of both parts of the network and their sum, as shipped.

    The loss of a point is the mean absolute error where its map is above a tenth of the highest hill, plus the mean
    elsewhere, each over the batch, halved; what is negative in the output counts as 0. RefineNet learns from the
    hardest ``share`` of the points alone (online hard key points mining, Chen et al. 2018).

    Args:
        output: of :class:`PointNetwork`, (N, K, h, w) each.
        batch: with ``points`` (N, K, 2), in pixels of the network's input.
        share: of the points of a batch.
    """
    height, width = output["refined"].shape[2:]
    truth = heat_maps(batch["points"], (height * STRIDE, width * STRIDE))
    hills = truth > truth.amax() / 10
    plain, refined = (_map_error(output[name], truth, hills) for name in ("global", "refined"))
    hardest = refined.topk(max(1, int(len(refined) * share))).values
    parts = {"global": plain.mean(), "refined": hardest.mean()}
    return {"loss": sum(parts.values()), **parts}


def _map_error(maps: torch.Tensor, truth: torch.Tensor, hills: torch.Tensor) -> torch.Tensor:
    """Return (K,): each point's loss."""
    error = (truth - maps.float().relu()).abs()
    parts = [(error * where).sum((0, 2, 3)) / (where.sum((0, 2, 3)) + 1e-4) for where in (hills, ~hills)]
    return sum(parts) / 2


# The network


class Maps(nn.Module):
    """A backbone's four feature maps, at 1/4, 1/8, 1/16 and 1/32 of the image.

    Args:
        network: an EfficientNet of timm or a SENet of pretrainedmodels.
        channels: of the four maps.
        mean, std: of the pixels that it expects.
        frozen: names of parts that stay as they are, weights and statistics.
    """

    def __init__(
        self,
        network: nn.Module,
        channels: tuple[int, ...],
        *,
        mean: float = LITE0_MEAN,
        std: float = LITE0_STD,
        frozen: tuple[str, ...] = (),
    ):
        super().__init__()
        self.network, self.channels, self.mean, self.std = network, channels, mean, std
        self._frozen = [network.get_submodule(name) for name in frozen]
        for part in self._frozen:
            part.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return four maps (N, C, H / 4, W / 4) to (N, C, H / 32, W / 32) of images (N, 3, H, W), RGB, 0 to 1."""
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if hasattr(self.network, "forward_intermediates"):
            return self.network.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
        maps = [self.network.layer0(images)]
        for layer in (self.network.layer1, self.network.layer2, self.network.layer3, self.network.layer4):
            maps.append(layer(maps[-1]))
        return maps[1:]

    def train(self, mode: bool = True) -> "Maps":
        """Set the mode as ever, but leave the statistics of what is frozen alone."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self


def lite_maps(variant: int = 0, pretrained: bool = True) -> Maps:
    """Return the maps of an EfficientNet-Lite, with ImageNet weights or random ones."""
    network = lite(variant, pretrained)
    network.prune_intermediate_layers([1, 2, 3, 4], prune_head=True)
    channels = tuple(stage["num_chs"] for stage in network.feature_info[1:])
    return Maps(network, channels, frozen=("conv_stem", "bn1", "blocks.0", "blocks.1") if pretrained else ())


def se_resnext_maps(
    depth: int = 50, weights: Path | str | None = None, *, sha256: Sums | None = None, seed: int = 0
) -> Maps:
    """Return the maps of the second solution's SE-ResNeXt-50 or -101 (32x4d), from pretrainedmodels.

    Pixels are normalised by .65 and .25, the solution's numbers for its key points.

    Args:
        depth: 50 or 101.
        weights: path of pretrainedmodels' file; None for random weights.
        sha256: of that file, or its first digits; default those that its published name ends with.
        seed: of random weights.

    Raises:
        FileNotFoundError: there is no such file; the message says where to get it.
        ValueError: it is another file, or of another network; or there is no such depth.
    """
    if depth not in (50, 101):
        raise ValueError(f"depth = {depth!r}: choose 50 or 101")
    name = f"se_resnext{depth}_32x4d"
    network, _ = trunk(name, second_place_url(name), weights, sha256, seed)
    return Maps(network, (256, 512, 1024, 2048), mean=0.65, std=0.25)


class GlobalNet(nn.Module):
    """The first part: a feature pyramid whose finest map already shows the points.

    Args:
        channels: of the four maps that enter, from the finest.
        points: K.
        width: channels of the pyramid.
    """

    def __init__(self, channels: tuple[int, ...], points: int, width: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channel, width, 1) for channel in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, out, 3, padding=1) for out in (points, width, width))

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the pyramid, finest first: (N, K, H / 4, W / 4) and three of ``width`` channels."""
        lateral = [layer(found) for layer, found in zip(self.lateral, maps, strict=True)]
        pyramid = [lateral.pop()]
        for beside, smooth in zip(reversed(lateral), reversed(self.smooth), strict=True):
            above = F.interpolate(pyramid[0], beside.shape[2:], mode="bilinear")
            pyramid.insert(0, smooth(above + beside))
        return pyramid


class RefineNet(nn.Module):
    """The second part: the pyramid's maps, the coarser the longer worked on, enlarged and looked at together."""

    def __init__(self, points: int, width: int):
        super().__init__()
        self.stages = nn.ModuleList()
        for level, (channels, blocks) in enumerate(((points, 1), (width, 1), (width, 2), (width, 3))):
            stage = [_bottleneck(channels if i == 0 else width, width) for i in range(blocks)]
            if level:
                times = 2**level
                stage.append(nn.ConvTranspose2d(width, width, 2 * times, times, times // 2))
            self.stages.append(nn.Sequential(*stage))
        self.output = nn.Sequential(_bottleneck(4 * width, width), nn.Conv2d(width, points, 1))

    def forward(self, pyramid: list[torch.Tensor]) -> torch.Tensor:
        """Return (N, K, H / 4, W / 4)."""
        return self.output(
            torch.cat([stage(level) for stage, level in zip(self.stages, pyramid, strict=True)], 1)
        )


def _bottleneck(channels: int, width: int) -> Bottleneck:
    same = channels == width
    beside = None if same else nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
    return Bottleneck(channels, width // Bottleneck.expansion, downsample=beside)


class PointNetwork(nn.Module):
    """A Cascaded Pyramid Network (Chen et al. 2018) for the four ends of a fluke.

    Args:
        backbone: makes the four maps; default EfficientNet-Lite0's.
        width: channels of the pyramid, a multiple of 4; 256 in the solution.
        seed: of the new weights.
    """

    def __init__(self, backbone: Maps | None = None, width: int = 256, seed: int = 0):
        super().__init__()
        self.backbone = lite_maps() if backbone is None else backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.coarse = GlobalNet(self.backbone.channels, len(POINTS), width)
            self.refine = RefineNet(len(POINTS), width)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return heat maps ``global`` and ``refined``, (N, K, H / 4, W / 4), of images (N, 3, H, W) from 0 to 1.

        H and W are multiples of 32.
        """
        pyramid = self.coarse(self.backbone(images))
        return {"global": pyramid[0], "refined": self.refine(pyramid)}


# Photographs


def tips_up(table: pd.DataFrame) -> pd.DataFrame:
    """Return a catalog's table with ``left_up`` and ``right_up`` at the fluke's tips, where these can be seen.

    The world has there what reaches furthest to the left and to the right. But the boxes that the solution published
    for real photographs reach as high as the tips do, so its points lay on them. A tip beyond the fluke's box is under
    water or outside the photograph, and the world's point stays.
    """
    table = table.copy()
    for side in ("left", "right"):
        tip, up = ([f"{side}_{name}_{axis}" for axis in "xy"] for name in ("tip", "up"))
        if not {*tip, *up, *BOX} <= set(table):
            continue
        x, y = table[tip[0]], table[tip[1]]
        # The box ends at whole pixels, half a pixel or so beside a tip on its border.
        seen = x.between(table["x0"] - 1, table["x1"] + 1) & y.between(table["y0"] - 1, table["y1"] + 1)
        table.loc[seen, up] = table.loc[seen, tip].to_numpy()
    return table


class PointedPhotographs(Photographs):
    """Photographs as the network sees them, with their points where they are known.

    The photograph keeps its shape: it is resized until it fits, and put in the upper left corner; the rest is gray.
    Item i has ``points`` (4, 2) float32 besides, x and y in pixels of the image, if the catalog has ``COLUMNS``.

    Args:
        catalog: what to read.
        size: (H, W) of the network's input.
        **options: as of ``Photographs``; a transform moves the points too (see :func:`moved`).
    """

    GRAY = 127

    def __init__(self, catalog: Catalog, size: tuple[int, int], **options):
        shape = statistics(catalog)[["height", "width"]].to_numpy(dtype=float)
        self.scale = (np.array(size) / shape).min(axis=1)
        self.inner = np.maximum(1, np.rint(shape * self.scale[:, None]).astype(int))  # (N, 2): height, width
        self.points = None
        if set(COLUMNS) <= set(catalog.table):
            points = catalog.table[list(COLUMNS)].to_numpy(dtype=float).reshape(-1, len(POINTS), 2)
            self.points = points * self.scale[:, None, None]
        super().__init__(catalog, size, **options)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return item ``index`` as the class says."""
        if self.points is None:
            return super().__getitem__(index)
        index = range(len(self))[index]
        image, points = self.pixels(index), self.points[index]
        if self.transform is not None:
            image, points = moved(self.transform, (self.seed, self.epoch, index), image, points)
        item = {"image": as_tensor(image), "points": torch.tensor(points, dtype=torch.float32)}
        return {**item, "label": int(self.labels[index]), "index": index}

    def _read(self, index: int) -> np.ndarray:
        height, width = self.inner[index]
        canvas = np.full((*self.size, 3), self.GRAY, np.uint8)
        canvas[:height, :width] = read_image(self._paths[index], size=(int(height), int(width)))
        return canvas

    @property
    def _pixels_key(self) -> str:
        return f"{super()._pixels_key}-inner"


def moved(
    transform: A.Compose, key: tuple[int, ...], image: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return image and points (4, 2) after a transform: within the image, and left on the left when it mirrored."""
    changed = augment.augmented(transform, key, image=image, keypoints=points)
    points = np.clip(changed["keypoints"], 0, np.array(image.shape[1::-1]) - 1)
    if points[:2, 0].sum() > points[2:, 0].sum():
        points = points[list(MIRRORED)]
    return changed["image"], points


def for_points(size: tuple[int, int]) -> A.Compose:
    """Return the augmentation with which points are learned: that of the masks, but for milder moves.

    The lowest point of a fluke that is turned far is another one. No reflections at the border: a second fluke there
    would be as right as the first.
    """
    steps = [step for step in augment.for_masks(size).transforms if not isinstance(step, A.Affine)]
    move = A.Affine(
        scale={"x": (0.6, 1.15), "y": (0.6, 1.5)},
        translate_percent=(-0.1, 0.1),
        rotate=(-8, 8),
        shear={"x": (-8, 8), "y": (-4, 4)},
        border_mode=cv2.BORDER_REPLICATE,
        p=0.9,
    )
    points = A.KeypointParams("xy", remove_invisible=False)
    return A.Compose([steps[0], move, *steps[1:]], keypoint_params=points, strict=True)


# Training


@dataclass(frozen=True)
class Plan:
    """How a profile's networks are made and trained.

    backbones: two names; size: (H, W) of the input; width: of the pyramid; images: that each network is shown; batch:
    images a step; rate: of what is new; the backbone's is a quarter of it.
    """

    backbones: tuple[str, str]
    size: tuple[int, int]
    width: int
    images: int
    batch: int
    rate: float


PLANS = by_profile(
    Plan(("lite0", "lite1"), (96, 192), 32, 2_350, 8, 5e-3),
    Plan(("se_resnext50", "se_resnext101"), (256, 256), 256, 60_000, 32, 1e-3),
)


def backbone(name: str, file: Path | str | None = None, seed: int = 0) -> Maps:
    """Return a backbone by its name in ``PLANS``; ``file`` of weights and ``seed`` are of an SE-ResNeXt."""
    if name.startswith("lite"):
        return lite_maps(int(name.removeprefix("lite")))
    known = weights.known(imagenet(name))
    return se_resnext_maps(int(name.removeprefix("se_resnext")), file, sha256=known, seed=seed)


def imagenet(name: str) -> str | None:
    """Return what ``whalelib.weights`` calls a backbone of ``PLANS``; None of those that bring their weights."""
    return None if name.startswith("lite") else f"{name}_32x4d"


def train_points(
    catalog: Catalog,
    *,
    name: str = "lite0",
    plan: Plan = PLANS["lab"],
    seed: int = 0,
    device: str = "auto",
    folder: Path | None = None,
) -> tuple[PointNetwork, pd.DataFrame]:
    """Train a network on photographs with points and return it with its history.

    ImageNet weights are those that :func:`whalelib.weights.found` finds; without them a warning says where to get them,
    and the network starts from random ones.

    Args:
        catalog: photographs of which all have the ``COLUMNS``; see :func:`tips_up`.
        name: of the backbone.
        plan: size, width and how long.
        seed: of weights, order and augmentation.
        device: "auto", "cpu" or "cuda".
        folder: for checkpoints; None keeps nothing.
    """
    given = imagenet(name) and weights.pretrained(imagenet(name))
    catalog = replace(catalog, table=tips_up(catalog.table))
    photographs = PointedPhotographs(catalog, plan.size, transform=for_points(plan.size), seed=seed)
    epochs = max(1, round(plan.images / len(photographs)))
    model = PointNetwork(backbone(name, given, seed), plan.width, seed)
    history = fit(
        model,
        photographs,
        point_loss,
        epochs=epochs,
        batch_size=plan.batch,
        optimizer=partial(_optimizer, rate=plan.rate),
        schedule=partial(warm_cosine, epochs=epochs),
        seed=seed,
        device=device,
        folder=folder,
    )
    return model, history


def _optimizer(model: PointNetwork, rate: float) -> torch.optim.Optimizer:
    old = [p for p in model.backbone.parameters() if p.requires_grad]
    new = [*model.coarse.parameters(), *model.refine.parameters()]
    groups = [{"params": new}, {"params": old, "lr": rate / 4}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=1e-2)


def point_models(run: Run) -> list[PointNetwork]:
    """Return the profile's two networks, trained on the world's training photographs or from the cache.

    They are the same for all data and editions; they depend on the run's profile, seed and device.
    """
    plan = PLANS[run.settings.profile]
    world = Run(run.notebook, Settings(data=locate.WORLD, seed=run.settings.seed, device=run.settings.device))
    return [point_model(world, name, plan) for name in plan.backbones]


def point_model(world: Run, name: str, plan: Plan) -> PointNetwork:
    """Return one of a plan's two networks, trained on the world's training photographs or from the cache."""
    # All that decides the weights: a change elsewhere in the library needs no new training.
    parts = [heat_maps, point_loss, _map_error, Maps, lite_maps, se_resnext_maps, GlobalNet, RefineNet]
    parts += [_bottleneck, PointNetwork, PointedPhotographs, tips_up, moved, for_points, backbone]
    parts += [train_points, _optimizer, augment.for_masks, augment.augmented, lite]
    code = code_of(*parts, *map(inspect.getmodule, (Photographs, read_image, fit)))
    settings = world.settings
    given = imagenet(name) and weights.content(imagenet(name))
    about = [name, repr(plan), given, HEIGHT, SIGMA, settings.seed, world.device]
    folder = cache_folder("keypoints", world.catalog.train.fingerprint, code, *about)
    training = partial(
        train_points, name=name, plan=plan, seed=settings.seed, device=world.device, folder=folder
    )
    return trained_once(
        folder / "network.safetensors",
        lambda: PointNetwork(backbone(name), plan.width).to(world.device),
        lambda: training(world.catalog.train),
    )


# From photographs to boxes


def predict_points(
    model: nn.Module, catalog: Catalog, size: tuple[int, int], batch_size: int = 32
) -> pd.DataFrame:
    """Find the four points in each photograph, as shipped: of the photograph and its mirror image together.

    Args:
        model: from images (N, 3, H, W), RGB, 0 to 1, to heat maps ``refined`` (N, 4, H / 4, W / 4).
        catalog: N photographs.
        size: (H, W) that the model sees.
        batch_size: photographs at a time.

    Returns:
        One row a photograph: ``image``, the ``COLUMNS`` in its pixels, ``confidence`` (the mean height of the four
        maps' highest cells, as a share of ``HEIGHT``).
    """
    photographs = PointedPhotographs(catalog, size, memory=False)
    shape = statistics(catalog)[["width", "height"]].to_numpy(dtype=float)
    starts = tqdm(range(0, len(photographs), batch_size), "Finding points", leave=False)
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without Python's lock
        for start in starts:
            chosen = range(start, min(start + batch_size, len(photographs)))
            images = list(pool.map(photographs.pixels, chosen))
            for i, maps in zip(
                chosen, both_views(model, np.stack(images), photographs.inner[chosen]), strict=True
            ):
                points = points_of(maps, photographs.scale[i], tuple(shape[i] / 2))
                rows.append([*points.ravel(), float(maps.max((1, 2)).mean()) / (2 * HEIGHT)])
    table = pd.DataFrame(rows, columns=[*COLUMNS, "confidence"], dtype=float)
    table.insert(0, "image", catalog.table["image"].to_numpy())
    return table


@torch.inference_mode()
def both_views(model: nn.Module, images: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Return heat maps (N, 4, h, w) float32, summed over the images and their mirror images.

    The model runs in evaluation mode and is left as it was.

    Args:
        model: as of :func:`predict_points`.
        images: (N, H, W, 3) uint8 RGB, in the upper left corner of which the photographs are.
        inner: (N, 2) heights and widths of the photographs there.
    """
    keep_memory()
    flipped = images.copy()
    for image, (_, width) in zip(flipped, inner, strict=True):
        image[:, :width] = image[:, :width][:, ::-1].copy()
    views = []
    with evaluating(model) as device:
        for view in (images, flipped):
            seen = torch.from_numpy(view).to(device).permute(0, 3, 1, 2).float() / 255
            views.append(model(seen)["refined"].float().relu().cpu().numpy())
    plain, mirrored = views
    for total, other, (_, width) in zip(plain, mirrored[:, MIRRORED], inner, strict=True):
        cells = width // STRIDE
        total[..., :cells] += other[..., :cells][..., ::-1]
    return plain


def found_points(run: Run, catalog: Catalog) -> list[pd.DataFrame]:
    """Return what each of the run's two networks finds (:func:`predict_points`), each photograph looked at once."""
    size = PLANS[run.settings.profile].size
    parts = (heat_maps, points_of, PointedPhotographs, predict_points, both_views)
    code = code_of(*parts, *map(inspect.getmodule, (Photographs, read_image)))
    tables = []
    for model in point_models(run):
        folder = cache_folder("points", weights_hash(model), code, size, run.device)
        find = partial(predict_points, model, size=size)
        tables.append(looked_at_once(folder / "points.csv", catalog, find))
    return tables


def points_box(points: np.ndarray) -> np.ndarray:
    """Return boxes (..., 4), x0, y0, x1, y1, from the least to the greatest of points (..., K, 2), none below 0."""
    points = np.asarray(points, dtype=float)
    return np.concatenate([points.min(axis=-2), points.max(axis=-2)], axis=-1).clip(0)


def mean_boxes(found: list[pd.DataFrame], shape: np.ndarray) -> np.ndarray:
    """Return (N, 4): the means of the networks' boxes, in whole pixels as shipped and within the photographs.

    Args:
        found: a table with the ``COLUMNS`` for each network.
        shape: (N, 2) heights and widths of the photographs.
    """
    points = np.stack([table[list(COLUMNS)].to_numpy().reshape(-1, len(POINTS), 2) for table in found])
    mean = np.floor(points_box(points).mean(axis=0))
    return np.minimum(mean, np.tile(shape[:, ::-1], 2))


def crop_box(box: Box, shape: tuple[int, int], margin: float = MARGIN) -> Box:
    """Return the part of a photograph that the solution takes: the box and a margin, 120 % of its sides as shipped.

    Args:
        box: x0, y0, x1, y1, in pixels.
        shape: (H, W) of the photograph; the crop ends at its border.
        margin: on each side, as a share of the box's width and height; a pixel more to the right and below.

    Returns:
        x0, y0, x1, y1 in whole pixels, x1 and y1 just beyond the crop.
    """
    x0, y0, x1, y1 = box
    across, down = margin * (x1 - x0), margin * (y1 - y0)
    height, width = shape
    return (
        float(int(max(x0 - across, 0))),
        float(int(max(y0 - down, 0))),
        float(int(min(x1 + across + 1, width))),
        float(int(min(y1 + down + 1, height))),
    )


def located(run: Run, *, boxes: Path | str | None = None, margin: float | None = MARGIN) -> Catalog:
    """Return the run's photographs with a box each, supplied or from the points that two networks find.

    What is supplied takes precedence, row by row: first the argument, then what lies beside the photographs; masks
    have no part in it. The truth of a generated world is not supplied: it is for training and measuring. A box that is
    found is the mean of the two networks' boxes, in whole pixels.

    Args:
        run: whose catalog, profile, seed and device to take.
        boxes: a CSV file Image, x0, y0, x1, y1, in pixels.
        margin: of the crop, see :func:`crop_box`; None gives the boxes themselves.

    Returns:
        The catalog with ``x0``, ``y0``, ``x1``, ``y1``; ``box_from`` ("supplied", "points", or "whole" for the whole
        photograph, where the points found make no box); and where no box was supplied the ``COLUMNS``, means of what
        the two networks found, and their ``confidence``. Rows that make no sense are printed and added to ``problems``;
        what they would have supplied is found instead.

    Raises:
        CatalogError: the file can't be used at all; the message names file and row.
    """
    catalog = run.catalog
    problems = Problems()
    table, places = locate.supplied(catalog, boxes, None, problems)
    table = table.drop(columns=["rle", *COLUMNS], errors="ignore")
    shape = statistics(catalog)[["height", "width"]].to_numpy(dtype=float)
    locate.check_boxes(table, shape, places, problems)

    bare = table["x0"].isna().to_numpy()
    table["box_from"] = np.where(bare, "points", "supplied")
    table[[*COLUMNS, "confidence"]] = np.nan
    if bare.any():
        found = found_points(run, catalog.where(bare))
        columns = [*COLUMNS, "confidence"]
        table.loc[bare, columns] = np.mean([each[columns] for each in found], axis=0)
        mean = mean_boxes(found, shape[bare])
        whole = np.tile(shape[bare, ::-1], 2) * [0, 0, 1, 1]
        none = (mean[:, :2] >= mean[:, 2:]).any(axis=1)
        table.loc[bare, list(BOX)] = np.where(none[:, None], whole, mean)
        table.loc[np.flatnonzero(bare)[none], "box_from"] = "whole"
    if margin is not None:
        crops = [
            crop_box(box, size, margin) for box, size in zip(table[list(BOX)].to_numpy(), shape, strict=True)
        ]
        table[list(BOX)] = np.reshape(crops, (-1, 4))
    return locate.with_boxes(catalog, table, problems)


# How good they are


def point_errors(found: pd.DataFrame, truth: pd.DataFrame) -> np.ndarray:
    """Return (N, 4): how far each point found is from the true one, in pixels; tables with the ``COLUMNS``."""
    found, truth = (table[list(COLUMNS)].to_numpy(dtype=float) for table in (found, truth))
    return np.linalg.norm((found - truth).reshape(-1, len(POINTS), 2), axis=2)


def correct_points(errors: np.ndarray, boxes: np.ndarray, share: float = 0.05) -> float:
    """Return the share of points (N, K) that are no further off than ``share`` of their box's diagonal (PCK).

    Args:
        errors: (N, K) pixels, as of :func:`point_errors`.
        boxes: (N, 4) true boxes.
        share: of the diagonal.
    """
    boxes = np.asarray(boxes, dtype=float)
    diagonal = np.hypot(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    return float((errors <= share * diagonal[:, None]).mean())
