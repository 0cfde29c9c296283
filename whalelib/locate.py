"""Where the fluke is: masks from a U-Net, boxes from masks (report 3.1.1 and 3.1.2).

The first solution took masks and boxes from files; how they came about is not published. Here a U-Net with a
pretrained encoder learns masks in the generated world, where they are known, and finds them in any photograph.
Supplied boxes and masks take precedence.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from whalelib import augment
from whalelib.data import Catalog, PhotographError, read_image, statistics
from whalelib.data.catalog import problem_table, refusal
from whalelib.data.images import Box
from whalelib.data.layouts import BOX, Folder, Problems, annotations, find_masks, read_lines
from whalelib.data.masks import MASK_SIZE, decode_rle, encode_rle, mask_pixels
from whalelib.data.photographs import Photographs
from whalelib.files import locked, making, replacing
from whalelib.models import LITE0_MEAN, LITE0_STD, lite0
from whalelib.run import Run, Settings, place
from whalelib.train import evaluating, fit, keep_memory, load_weights, save_weights, warm_cosine

__all__ = [
    "MASK_SIZE",
    "decode_rle",
    "encode_rle",
    "find_mask",
    "found_masks",
    "located",
    "mask_box",
    "mask_model",
    "predict_masks",
    "train_unet",
    "unet",
]

SIZE = (96, 192)  # (H, W) that the U-Net sees
WORLD = "world:lab@2019"  # whose training photographs it learns from
IMAGES = 3_500  # that it is shown, the same ones again and again
DECODER = (64, 32, 16, 8, 8)  # channels, from the smallest size to the largest
SMALLEST = 0.005  # of the photograph: a smaller part of a mask is no fluke
SHARE = 0.3  # of the largest part: a part as large as this is the fluke's other half


def mask_box(mask: np.ndarray, smallest: float = SMALLEST, share: float = SHARE) -> Box | None:
    """Return the box of a mask's fluke: its largest connected part (report 3.1.2).

    A fluke with its middle under water or spray comes in two parts, so a part nearly as large as the largest
    belongs to it; the crumbs that a mask has elsewhere do not.

    Args:
        mask: (H, W), true on the fluke.
        smallest: when the largest part covers less than this share of the mask, it is no fluke.
        share: of the largest part, which another part must cover to belong to it; 1 takes the largest alone.

    Returns:
        x0, y0, x1, y1 in pixels of the mask, x1 and y1 just beyond it; None without a fluke.
    """
    mask = np.asarray(mask) > 0
    parts = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[2][1:]
    areas = parts[:, cv2.CC_STAT_AREA]
    if not len(parts) or areas.max() < smallest * mask.size:
        return None
    x, y, width, height = parts[areas >= share * areas.max(), :4].T
    return float(x.min()), float(y.min()), float((x + width).max()), float((y + height).max())


class MaskNetwork(nn.Module):
    """A U-Net (Ronneberger et al. 2015) whose contracting path is an EfficientNet-Lite0.

    Args:
        pretrained: the encoder with ImageNet weights, else random ones.
        seed: of the new weights.
    """

    FROZEN = ("conv_stem", "bn1", "blocks.0", "blocks.1")

    def __init__(self, pretrained: bool = True, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = smp.Unet("tu-tf_efficientnet_lite0", encoder_weights=None, decoder_channels=DECODER)
            weights = lite0().state_dict() if pretrained else {}
        if pretrained:
            encoder = self.net.encoder.model
            encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()}, strict=True)
            for name, parameter in encoder.named_parameters():
                parameter.requires_grad_(not name.startswith(self.FROZEN))
        self.pretrained = pretrained
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 1, H, W) of images (N, 3, H, W), RGB, 0 to 1; a fourth channel is not looked at.

        H and W are multiples of 32.
        """
        images = (images[:, :3] - LITE0_MEAN) / LITE0_STD
        return self.net(images.contiguous(memory_format=torch.channels_last))

    def train(self, mode: bool = True) -> "MaskNetwork":
        """Set the mode as ever, but leave the statistics of what is frozen alone."""
        super().train(mode)
        for name, module in self.net.encoder.model.named_modules():
            if self.pretrained and name.startswith(self.FROZEN):
                module.training = False
        return self


def unet(pretrained: bool = True, seed: int = 0) -> MaskNetwork:
    """Return the mask network, untrained but for its encoder."""
    return MaskNetwork(pretrained, seed)


def mask_loss(logits: torch.Tensor, batch: dict) -> dict[str, torch.Tensor]:
    """Return Dice loss plus binary cross-entropy, as ``loss``, and each."""
    truth = batch["image"][:, 3:]
    dice = smp.losses.DiceLoss("binary")(logits, truth)
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    return {"loss": dice + entropy, "dice": dice, "cross-entropy": entropy}


def train_unet(
    catalog: Catalog,
    *,
    size: tuple[int, int] = SIZE,
    images: int = IMAGES,
    seed: int = 0,
    device: str = "auto",
    folder: Path | None = None,
) -> tuple[MaskNetwork, pd.DataFrame]:
    """Train a U-Net on photographs with masks and return it with its history.

    Args:
        catalog: photographs of which all have masks.
        size: (H, W), multiples of 32.
        images: to train with in all.
        seed: of weights, order and augmentation.
        device: "auto", "cpu" or "cuda".
        folder: for checkpoints; None keeps nothing.
    """
    photographs = Photographs(catalog, size, masks=True, transform=augment.for_masks(size), seed=seed)
    epochs = max(1, round(images / len(photographs)))
    model = unet(seed=seed)
    history = fit(
        model,
        photographs,
        mask_loss,
        epochs=epochs,
        batch_size=16,
        optimizer=_optimizer,
        schedule=partial(warm_cosine, epochs=epochs),
        seed=seed,
        device=device,
        folder=folder,
    )
    return model, history


def _optimizer(model: MaskNetwork) -> torch.optim.Optimizer:
    encoder = [p for p in model.net.encoder.parameters() if p.requires_grad]
    new = [*model.net.decoder.parameters(), *model.net.segmentation_head.parameters()]
    return torch.optim.AdamW([{"params": encoder}, {"params": new, "lr": 8e-3}], lr=2e-3, weight_decay=1e-2)


def mask_model(run: Run) -> MaskNetwork:
    """Return the U-Net trained on the world's training photographs, from the cache if it is there.

    It is the same for all data, profiles and editions; it depends on the run's seed and device.
    """
    world = Run(run.notebook, Settings(data=WORLD, seed=run.settings.seed, device=run.settings.device))
    weights = _model_folder(world) / "unet.safetensors"
    training = partial(train_unet, seed=run.settings.seed, device=run.device, folder=weights.parent)
    return trained_once(weights, lambda: unet().to(run.device), lambda: training(world.catalog.train))


def trained_once(
    weights: Path, make: Callable[[], nn.Module], train: Callable[[], tuple[nn.Module, pd.DataFrame]]
) -> nn.Module:
    """Return a network for use, read from its file of weights; without one it is trained first, and kept.

    Args:
        weights: the file. The history of the training is kept beside it.
        make: returns the network that the weights are of.
        train: returns it trained, and the history.
    """
    with making(weights) as writes:
        if weights.exists():
            model = make()
        else:
            model, history = train()
            if writes:
                history.to_csv(weights.with_name("history.csv"), index=False)
                save_weights(model, weights)
    load_weights(model, weights)
    return model.eval()


def _model_folder(world: Run) -> Path:
    # All that decides the weights: a change elsewhere in the library needs no new training.
    parts = (MaskNetwork, mask_loss, train_unet, _optimizer, augment.for_masks, augment.augmented, lite0)
    code = code_of(*parts, *map(inspect.getmodule, (Photographs, read_image, mask_pixels, fit)))
    about = [SIZE, IMAGES, DECODER, world.settings.seed, world.device]
    return cache_folder("unet", world.catalog.train.fingerprint, code, *about)


def weights_hash(model: nn.Module) -> str:
    """Return a hash of a network's weights and buffers."""
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.cpu().numpy().tobytes())
    return weights.hexdigest()


def code_of(*parts: object) -> str:
    """Return a hash of the source of functions, classes and modules."""
    return hashlib.sha256("".join(map(inspect.getsource, parts)).encode()).hexdigest()


def cache_folder(name: str, *key: object) -> Path:
    """Return the cache's folder, made when it is missing, for what ``name`` and ``key`` (plain values) say."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = place("WHALE_CACHE", "data/cache") / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def predict_masks(
    model: nn.Module, catalog: Catalog, size: tuple[int, int] = SIZE, batch_size: int = 32
) -> pd.DataFrame:
    """Find the fluke in each photograph.

    Args:
        model: from images (N, 3, H, W), RGB, 0 to 1, to logits (N, 1, H, W).
        catalog: N photographs.
        size: (H, W) that the model sees.
        batch_size: photographs at a time.

    Returns:
        One row a photograph: ``image``, ``rle`` (see :func:`encode_rle`), ``confidence`` (mean probability
        inside the mask, 0 when it is empty).
    """
    photographs = Photographs(catalog, size, memory=False)
    starts = tqdm(range(0, len(photographs), batch_size), "Finding flukes", leave=False)
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without Python's lock
        for start in starts:
            chosen = range(start, min(start + batch_size, len(photographs)))
            for found in probability(model, np.stack(list(pool.map(photographs.pixels, chosen)))):
                mask = found > 0.5
                rows.append((encode_rle(mask), float(found[mask].mean()) if mask.any() else 0.0))
    table = pd.DataFrame(rows, columns=["rle", "confidence"])
    table.insert(0, "image", catalog.table["image"].to_numpy())
    return table


def found_masks(run: Run, catalog: Catalog) -> pd.DataFrame:
    """Return what :func:`predict_masks` finds with the run's U-Net, each photograph looked at once.

    Results are kept by the photographs' pixels: a part of a catalog, or one with a few new photographs, reuses them.
    """
    model = mask_model(run)
    code = code_of(predict_masks, probability, *map(inspect.getmodule, (Photographs, read_image)))
    folder = cache_folder("masks", weights_hash(model), code, run.device)
    return looked_at_once(folder / "masks.csv", catalog, partial(predict_masks, model))


def looked_at_once(path: Path, catalog: Catalog, find: Callable[[Catalog], pd.DataFrame]) -> pd.DataFrame:
    """Return ``find(catalog)``, one row a photograph with its ``image``, from what ``path`` keeps by the pixels.

    Only photographs whose pixels are not in the file yet are given to ``find``.
    """
    pixels = statistics(catalog)["sha1"]
    with locked(path.parent):
        kept = pd.DataFrame(index=pd.Index([], dtype="str"))
        if path.exists():
            kept = pd.read_csv(path, index_col="sha1", dtype={"rle": "str"}, keep_default_na=False)
        missing = ~pixels.isin(kept.index).to_numpy()
        if missing.any():
            found = find(catalog.where(missing)).drop(columns="image").set_index(pixels[missing])
            kept = pd.concat([part for part in (kept, found) if len(part)])
            kept = kept[~kept.index.duplicated()]
            with replacing(path) as part:
                kept.to_csv(part, index_label="sha1")
    table = kept.loc[pixels].reset_index(drop=True)
    table.insert(0, "image", catalog.table["image"].to_numpy())
    return table


@torch.inference_mode()
def probability(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return how probably each pixel is the fluke's, (N, *MASK_SIZE), of images (N, H, W, 3) uint8.

    The logits are enlarged, not the mask, so its outline is finer than the model's pixels. The model runs in
    evaluation mode and is left as it was.
    """
    keep_memory()
    with evaluating(model) as device:
        logits = model(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255)
    return F.interpolate(logits.float(), MASK_SIZE, mode="bilinear")[:, 0].sigmoid().cpu().numpy()


def find_mask(model: nn.Module, photograph: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return the mask (H, W) bool of one photograph (H, W, 3) uint8 RGB, as :func:`predict_masks` keeps it."""
    seen = np.array(Image.fromarray(photograph).resize(size[::-1], Image.Resampling.BILINEAR))
    mask = probability(model, seen[None])[0] > 0.5
    return mask_pixels(mask, "", None, photograph.shape[:2]) > 127


def located(
    run: Run, *, boxes: Path | str | None = None, masks: Path | str | None = None, margin: float = 0.0
) -> Catalog:
    """Return the run's photographs with a box and a mask each, supplied or found.

    What is supplied takes precedence, row by row: first the arguments, then what lies beside the
    photographs. A supplied mask gives the box where none is supplied. The truth of a generated world is not
    supplied: it is for training and measuring.

    Args:
        run: whose catalog, seed and device to take.
        boxes: a CSV file Image, x0, y0, x1, y1, in pixels.
        masks: a folder of pictures named as the photographs (or with .png), or a CSV file Image, rle.
        margin: added on each side of a box that was found, as a share of its width and height.

    Returns:
        The catalog with ``x0``, ``y0``, ``x1``, ``y1``; ``rle`` (the mask at ``MASK_SIZE``, "" when there is
        none); ``mask`` (path) where a picture was supplied; ``box_from`` ("supplied", "mask", or "whole" for the
        whole photograph, where no mask was found); ``mask_from`` ("supplied", "found", "none"). Rows that make no
        sense are printed and added to ``problems``; what they would have supplied is found instead.

    Raises:
        CatalogError: a file can't be used at all; the message names file and row.
    """
    catalog = run.catalog
    problems = Problems()
    table, places = supplied(catalog, boxes, masks, problems)
    shape = statistics(catalog)[["height", "width"]].to_numpy(dtype=float)
    check_boxes(table, shape, places, problems)
    _read_masks(table, problems)

    missing, bare = table["rle"].isna().to_numpy(), table["x0"].isna().to_numpy()
    if missing.any():
        table.loc[missing, "rle"] = found_masks(run, catalog.where(missing))["rle"].to_numpy()
    own = {i: mask_box(decode_rle(table["rle"].iat[i])) for i in np.flatnonzero(missing | bare)}
    crumbs = [i for i in np.flatnonzero(missing) if own[i] is None]
    table.loc[crumbs, "rle"] = ""
    table["mask_from"] = np.where(table["rle"] == "", "none", np.where(missing, "found", "supplied"))
    table["box_from"] = np.where(
        bare, ["mask" if own.get(i) else "whole" for i in range(len(table))], "supplied"
    )
    scaled = [_scaled(own[i], *shape[i], margin) for i in np.flatnonzero(bare)]
    table.loc[bare, list(BOX)] = np.reshape(scaled, (-1, 4))
    return with_boxes(catalog, table, problems)


def with_boxes(catalog: Catalog, table: pd.DataFrame, problems: Problems) -> Catalog:
    """Return a catalog with a table of boxes; tell the problems, and how many photographs are taken whole."""
    if problems:
        print(replace(catalog, problems=problem_table(problems)).report_problems())
    if whole := int((table["box_from"] == "whole").sum()):
        print(f"No fluke found in {whole:,} of {len(table):,} photographs: they are taken whole.")
    known = pd.concat([catalog.problems, problem_table(problems)], ignore_index=True)
    return replace(catalog, table=table, problems=known)


def _scaled(box: Box | None, height: float, width: float, margin: float) -> Box:
    """Return a box at ``MASK_SIZE`` in the photograph's pixels, with a margin; without a box the whole photograph."""
    if box is None:
        return 0.0, 0.0, width, height
    x0, y0, x1, y1 = box
    x, y = margin * (x1 - x0), margin * (y1 - y0)
    down, across = height / MASK_SIZE[0], width / MASK_SIZE[1]
    return (
        max(x0 - x, 0.0) * across,
        max(y0 - y, 0.0) * down,
        min(x1 + x, MASK_SIZE[1]) * across,
        min(y1 + y, MASK_SIZE[0]) * down,
    )


def supplied(
    catalog: Catalog, boxes: Path | str | None, masks: Path | str | None, problems: Problems
) -> tuple[pd.DataFrame, dict[str, tuple[str, int]]]:
    """Return the catalog's table with the columns x0, y0, x1, y1, mask, rle: supplied, else missing.

    And the file and row of each box that ``boxes`` supplies.
    """
    places = {}
    table = catalog.table.drop(columns=["rle"], errors="ignore")
    if (catalog.root / "world.json").is_file():
        table = table.drop(columns=[*BOX, "mask"], errors="ignore")
    for column in BOX:
        table[column] = table.get(column, np.nan)
    for column in ("mask", "rle"):
        values = table[column] if column in table else pd.Series(pd.NA, index=table.index)
        table[column] = values.astype("str")
    if boxes is not None:
        path = Path(boxes)
        lines = read_lines(path, ("Image", *BOX), problems)
        places = {line.fields["Image"]: (path.name, line.row) for line in reversed(lines)}
        notes = annotations(path.name, "Image", lines, Folder(path.parent), problems)
        _join(table, notes.reindex(columns=list(BOX)), path.name, problems)
    if masks is not None:
        path = Path(masks)
        if path.is_dir():
            notes = find_masks(Folder(path), table["image"], problems, path.name)
        else:
            notes = _run_lengths(path, problems)
            # A supplied text holds before a picture beside the photographs.
            table.loc[table["image"].isin(notes.index), "mask"] = pd.NA
        _join(table, notes, path.name, problems)
    if problems.refused:
        raise refusal("supplied boxes or masks are refused", problems)
    return table, places


def _join(table: pd.DataFrame, notes: pd.DataFrame, file: str, problems: Problems) -> None:
    notes = notes.dropna(how="all")
    others = notes.index.difference(table["image"])
    if len(others):
        problems.skip(file, None, f"{len(others)} names are of no photograph here, such as {others[0]}")
    rows = table.index[table["image"].isin(notes.index)]
    for column in notes:
        table.loc[rows, column] = notes.loc[table.loc[rows, "image"], column].to_numpy()


def _run_lengths(path: Path, problems: Problems) -> pd.DataFrame:
    first: dict[str, int] = {}
    masks = {}
    for row, fields in read_lines(path, ("Image", "rle"), problems):
        name = fields["Image"]
        if first.setdefault(name, row) != row:
            problems.skip(path.name, row, f"{name}: listed more than once; row {first[name]} is used")
            continue
        try:
            decode_rle(fields["rle"])
            masks[name] = fields["rle"]
        except ValueError as error:
            problems.skip(path.name, row, f"{name}: {error}")
    return pd.DataFrame({"rle": pd.Series(masks, dtype="object")})


def check_boxes(table: pd.DataFrame, shape: np.ndarray, places: dict, problems: Problems) -> None:
    """Leave out boxes that lie beyond their photographs."""
    height, width = shape.T
    beyond = (table["x0"] >= width) | (table["y0"] >= height) | (table["x1"] <= 0) | (table["y1"] <= 0)
    for i in np.flatnonzero(beyond):
        box = ", ".join(f"{table[name].iat[i]:g}" for name in BOX)
        what = f"its box ({box}) is beyond its {width[i]:g} x {height[i]:g} pixels and is left out"
        name = table["image"].iat[i]
        problems.skip(*places.get(name, ("boxes.csv", None)), f"{name}: {what}")
    table.loc[beyond, list(BOX)] = np.nan


def _read_masks(table: pd.DataFrame, problems: Problems) -> None:
    """Put the supplied pictures' run lengths at ``MASK_SIZE`` beside them; leave out those that can't be read."""
    for i in np.flatnonzero(table["mask"].notna()):
        try:
            mask = mask_pixels(Path(table["mask"].iat[i]), table["path"].iat[i], None, MASK_SIZE) > 127
        except PhotographError as error:
            file = f"{error.path.parent.name}/{error.path.name}"
            problems.skip(file, None, f"the mask of {table['image'].iat[i]}: {error.reason}")
            table.loc[i, "mask"] = pd.NA
        else:
            table.loc[i, "rle"] = encode_rle(mask)
