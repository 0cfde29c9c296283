"""Random changes of a photograph that leave the animal the same.

Section 3.1.4 of the report describes the first solution's steps, section 4.1.3 those of the others. Here are
the baseline's few, the first solution's, and the seeding that all share. No step mirrors a photograph: that
makes another animal, so it is the data set's to do, with the label.
"""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from math import ceil, floor, prod, sqrt
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

# Albumentations asks a server for its newest version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
from albumentations.core.type_definitions import Targets

from whalelib.run import EDITIONS

REFERENCE_SIZE = (256, 512)  # (H, W), for which the first solution's steps are given

MOVED = (Targets.IMAGE, Targets.MASK)

Range = tuple[float, float]
Pixels = tuple[int, int]
Length = Annotated[int, Field(ge=0)]
Factor = Annotated[float, Field(gt=0, le=1)]


def _rising(values: tuple) -> tuple:
    if values[0] > values[1]:
        raise ValueError(f"{values}: the lowest comes first")
    return values


def augmented(transform: A.BaseCompose, key: tuple[int, ...], **targets: np.ndarray) -> dict[str, np.ndarray]:
    """Apply an albumentations pipeline with draws that depend on ``key`` alone.

    One generator is shared by all steps. ``transform.set_random_seed`` would give every step the *same* seed,
    so that two steps with p = 0.5 were always taken together; numpy's global seed does nothing.

    Args:
        transform: the pipeline, whose state is overwritten.
        key: whole numbers from 0 up, as (seed, epoch, index).
        **targets: ``image`` (H, W, 3) uint8, and what else the pipeline takes.

    Returns:
        The targets, changed.
    """
    generator = np.random.default_rng(key)
    transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    return transform(**targets)


def baseline(size: tuple[int, int]) -> A.Compose:
    """Return the baseline's augmentation: small moves, light and blur.

    No flip: the left and the right of a fluke differ, so a flipped one would be another animal.

    Args:
        size: (H, W) of the images, in pixels; the blur grows with it.
    """
    return A.Compose(
        [
            A.Affine(
                scale=(0.85, 1.15),
                translate_percent=(-0.08, 0.08),
                rotate=(-12, 12),
                shear={"x": (-8, 8), "y": (-4, 4)},
                border_mode=cv2.BORDER_REPLICATE,
                p=0.9,
            ),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.3, p=0.6),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, max(0.4, size[1] / 160)), p=0.2),
        ],
        strict=True,
    )


def for_masks(size: tuple[int, int]) -> A.Compose:
    """Return the augmentation with which masks are learned: flukes of all sizes, lights and qualities.

    The masks are to hold for real photographs, so the generated ones are changed more than is natural. The
    mask moves with the image; beyond the image's border there is no fluke.

    Args:
        size: (H, W) of the images, in pixels; the blur grows with it.
    """
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(
                scale={"x": (0.4, 1.3), "y": (0.5, 1.8)},
                translate_percent=(-0.15, 0.15),
                rotate=(-25, 25),
                shear={"x": (-15, 15), "y": (-8, 8)},
                border_mode=cv2.BORDER_REFLECT_101,
                p=0.9,
            ),
            A.ToGray(p=0.3),
            A.RandomBrightnessContrast(brightness_limit=0.3, contrast_limit=0.5, p=0.7),
            A.RandomGamma(gamma_limit=(50, 180), p=0.4),
            A.HueSaturationValue(hue_shift_limit=20, sat_shift_limit=40, val_shift_limit=0, p=0.3),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, size[1] / 80), p=0.3),
            A.GaussNoise(std_range=(0.01, 0.1), p=0.3),
        ],
        strict=True,
    )


@cache
def _normal_table() -> np.ndarray:
    # The middles of 2**16 equally likely slices of the standard normal distribution: 16 random bits looked up
    # here are a normal number, several times faster than a drawn one.
    lower = [NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**15)]
    return np.array([*lower, *(-value for value in reversed(lower))], dtype=np.float32)


class _Lightness(A.ImageOnlyTransform):
    """Changes L of CIE-LAB alone, which OpenCV stores as 0 to 255; the colour stays."""

    def apply(self, img, **params):
        """Return ``img`` (H, W, 3) uint8 RGB with another lightness."""
        lab = cv2.cvtColor(img, cv2.COLOR_RGB2LAB)
        cv2.insertChannel(self.changed(cv2.extractChannel(lab, 0), **params), lab, 0)
        return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


class LabNoise(_Lightness):
    """Noise on the lightness, drawn for each pixel by itself (equations 3.1 to 3.4).

    With lightness s from 0 to 1 and n from the standard normal distribution, "gaussian" gives s + sigma n and
    "speckle" s (1 + sigma n); both are cut to 0 to 1.

    Args:
        kind: "gaussian" or "speckle".
        sigma: standard deviation, as a share of the whole range of lightness.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        kind: Literal["gaussian", "speckle"]
        sigma: Annotated[float, Field(ge=0)]

    def __init__(self, kind: str = "gaussian", sigma: float = 0.1, p: float = 0.5):
        super().__init__(p=p)
        self.kind, self.sigma = kind, sigma

    def get_params_dependent_on_data(self, params, data):
        """Draw n: (H, W) float32."""
        height, width = params["shape"][:2]
        words = self.random_generator.bit_generator.random_raw(-(-height * width // 4))
        draws = words.view(np.uint16)[: height * width].reshape(height, width)
        return {"noise": _normal_table().take(draws, mode="clip")}

    def changed(self, lightness, noise, **params):
        """Return the (H, W) uint8 lightness with noise."""
        change = noise * (255 * self.sigma) if self.kind == "gaussian" else noise * lightness * self.sigma
        return cv2.add(lightness, change, dtype=cv2.CV_8U)


class LabCLAHE(_Lightness):
    """Contrast-limited adaptive histogram equalisation of the lightness (section 3.1.4).

    Args:
        clip_limit: highest bar of a tile's histogram, in multiples of the mean bar.
        grid: tiles along each side, whatever the size of the image.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        clip_limit: Annotated[float, Field(gt=0)]
        grid: Annotated[int, Field(ge=1)]

    def __init__(self, clip_limit: float = 2, grid: int = 16, p: float = 0.5):
        super().__init__(p=p)
        self.clip_limit, self.grid = clip_limit, grid

    def changed(self, lightness, **params):
        """Return the equalised (H, W) uint8 lightness."""
        return cv2.createCLAHE(self.clip_limit, (self.grid, self.grid)).apply(lightness)


class BrightnessShift(A.ImageOnlyTransform):
    """One constant added to all values of all channels (equation 3.5), cut to 0 to 255 and to whole numbers.

    Args:
        shift: the constant, as a share of the whole range; below 0 it darkens.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        shift: Annotated[float, Field(ge=-1, le=1)]

    def __init__(self, shift: float = 0.1, p: float = 0.5):
        super().__init__(p=p)
        self.shift = shift

    def apply(self, img, **params):
        """Return ``img`` (H, W, 3) uint8, brighter or darker."""
        return cv2.LUT(img, np.clip(np.arange(256) + 255 * self.shift, 0, 255).astype(np.uint8))


class RandomRotation(A.DualTransform):
    """Rotation about the centre, bilinear, with zeros where nothing was.

    Args:
        angles: lowest and highest angle, in degrees, counter-clockwise.
        whole: draw whole degrees, ends included, instead of real ones.
        p: probability.
    """

    _targets = MOVED

    class InitSchema(A.DualTransform.InitSchema):
        """What the arguments must be."""

        angles: Annotated[Range, AfterValidator(_rising)]
        whole: bool

    def __init__(self, angles: Range = (-25, 25), whole: bool = False, p: float = 0.5):
        super().__init__(p=p)
        self.angles, self.whole = angles, whole

    def get_params(self):
        """Draw the angle."""
        low, high = self.angles
        draw = self.py_random
        return {"angle": draw.randint(ceil(low), floor(high)) if self.whole else draw.uniform(low, high)}

    def apply_with_params(self, params, *args, **kwargs):
        """Return the targets, rotated; a colour image and its mask at once."""
        image, mask = kwargs.get("image"), kwargs.get("mask")
        if image is None or mask is None or image.shape != (*mask.shape, 3) or image.dtype != mask.dtype:
            return super().apply_with_params(params, *args, **kwargs)
        # OpenCV turns four channels in half the time of three and one.
        four = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
        cv2.insertChannel(mask, four, 3)
        four = self.apply(four, **params)
        image, mask = cv2.cvtColor(four, cv2.COLOR_RGBA2RGB), cv2.extractChannel(four, 3)
        return {**kwargs, "image": image, "mask": mask}

    def apply(self, img, angle, **params):
        """Return ``img``, rotated."""
        height, width = img.shape[:2]
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
        return cv2.warpAffine(img, turn, (width, height))


class RandomErase(A.DualTransform):
    """A rectangle at a random place that shows nothing (random erasing; section 3.1.4, Figure 3.2).

    In the mask it is 0 whatever fills it in the image.

    Args:
        rows: lowest and highest height of the rectangle, in pixels.
        columns: the same of its width.
        fill: "zero", "mean" (of each channel over the image) or "random" (each value by itself).
        inside: the rectangle lies within the image. Else its upper left corner may be anywhere from 0 to H
            and from 0 to W, ends included, so that it may be cut and even empty.
        p: probability.
    """

    _targets = MOVED

    class InitSchema(A.DualTransform.InitSchema):
        """What the arguments must be."""

        rows: Annotated[tuple[Length, Length], AfterValidator(_rising)]
        columns: Annotated[tuple[Length, Length], AfterValidator(_rising)]
        fill: Literal["zero", "mean", "random"]
        inside: bool

    def __init__(
        self,
        rows: Pixels = (5, 10),
        columns: Pixels = (5, 10),
        fill: str = "zero",
        inside: bool = True,
        p: float = 0.5,
    ):
        super().__init__(p=p)
        self.rows, self.columns, self.fill, self.inside = rows, columns, fill, inside

    def get_params_dependent_on_data(self, params, data):
        """Draw the rectangle and what fills it."""
        place = []
        for side, sides in zip(params["shape"], (self.rows, self.columns), strict=False):
            length = min(self.py_random.randint(*sides), side)
            start = self.py_random.randint(0, side - length if self.inside else side)
            place.append(slice(start, start + length))
        values = 0
        if self.fill == "mean":
            values = np.round(np.mean(data["image"], axis=(0, 1)))
        elif self.fill == "random":
            values = self.random_generator.integers(0, 256, data["image"][*place].shape, dtype=np.uint8)
        return {"place": tuple(place), "values": values}

    def apply(self, img, place, values, **params):
        """Return ``img`` with the rectangle filled."""
        img = img.copy()
        img[place] = values
        return img

    def apply_to_mask(self, mask, place, **params):
        """Return ``mask`` with zeros in the rectangle."""
        return self.apply(mask, place, 0)


class RandomShift(A.DualTransform):
    """Every pixel moved by the same whole steps, with zeros where nothing was (section 3.1.4).

    Args:
        rows: lowest and highest step down, in pixels.
        columns: the same to the right.
        p: probability.
    """

    _targets = MOVED

    class InitSchema(A.DualTransform.InitSchema):
        """What the arguments must be."""

        rows: Annotated[Pixels, AfterValidator(_rising)]
        columns: Annotated[Pixels, AfterValidator(_rising)]

    def __init__(self, rows: Pixels = (-10, 10), columns: Pixels = (-15, 15), p: float = 0.5):
        super().__init__(p=p)
        self.rows, self.columns = rows, columns

    def get_params(self):
        """Draw the steps."""
        return {"down": self.py_random.randint(*self.rows), "right": self.py_random.randint(*self.columns)}

    def apply(self, img, down, right, **params):
        """Return ``img``, moved."""
        height, width = img.shape[:2]
        down, right = (max(-side, min(step, side)) for step, side in ((down, height), (right, width)))
        moved = np.zeros_like(img)
        moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = img[
            max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
        return moved


class RandomScale(A.DualTransform):
    """The image made smaller, both sides alike, and put at a random place within zeros (section 3.1.4).

    Args:
        factors: lowest and highest factor, above 0 and at most 1.
        p: probability.
    """

    _targets = MOVED

    class InitSchema(A.DualTransform.InitSchema):
        """What the arguments must be."""

        factors: Annotated[tuple[Factor, Factor], AfterValidator(_rising)]

    def __init__(self, factors: Range = (0.9, 1), p: float = 0.5):
        super().__init__(p=p)
        self.factors = factors

    def get_params_dependent_on_data(self, params, data):
        """Draw the factor and the place."""
        factor = self.py_random.uniform(*self.factors)
        sides = [max(1, int(side * factor)) for side in params["shape"][:2]]
        starts = [
            self.py_random.randint(0, side - new) for side, new in zip(params["shape"], sides, strict=False)
        ]
        return {
            "factor": factor,
            "place": tuple(slice(start, start + new) for start, new in zip(starts, sides, strict=True)),
        }

    def apply(self, img, place, **params):
        """Return ``img``, smaller."""
        rows, columns = place
        scaled = np.zeros_like(img)
        scaled[place] = cv2.resize(img, (columns.stop - columns.start, rows.stop - rows.start))
        return scaled


class MaskDeletion(A.DualTransform):
    """The whole mask set to 0, the image left as it is (section 3.1.4)."""

    _targets = MOVED

    def apply(self, img, **params):
        """Return ``img`` itself."""
        return img

    def apply_to_mask(self, mask, **params):
        """Return zeros."""
        return np.zeros_like(mask)


@dataclass(frozen=True)
class Step:
    """One step of the first solution's augmentation.

    Attributes:
        name: as in Table 3.1.
        probability: that an image undergoes it.
        transform: its class.
        described: its parameters as the report gives them, at (256, 512); None: not there.
        shipped: the same as the code has them.
        group: of the steps of a group at most one is taken.
    """

    name: str
    probability: float
    transform: type[A.BasicTransform]
    described: Mapping[str, object] | None
    shipped: Mapping[str, object] | None
    group: str = ""


_ERASE = {"rows": (5, 10), "columns": (5, 10)}
_SHIFT = {"rows": (-10, 10), "columns": (-15, 15)}
FIRST_PLACE = (
    Step(
        "Random angle rotation",
        0.5,
        RandomRotation,
        {"angles": (-25, 25)},
        {"angles": (-25, 25), "whole": True},
    ),
    Step(
        "Speckle", 0.25, LabNoise, {"kind": "speckle", "sigma": 1}, {"kind": "speckle", "sigma": 0.1}, "Noise"
    ),
    Step("Gaussian", 0.25, LabNoise, {"sigma": 0.5}, {"sigma": 0.1}, "Noise"),
    Step("Brightness shift", 0.125, BrightnessShift, {"shift": 0.1}, {"shift": 0.1}, "Illumination"),
    Step("Gamma of 1", 0.125, A.NoOp, None, {}, "Illumination"),
    Step(
        "CLAHE", 0.125, LabCLAHE, {"clip_limit": 2, "grid": 16}, {"clip_limit": 2, "grid": 16}, "Illumination"
    ),
    Step("Factor of 1", 0.125, A.NoOp, None, {}, "Illumination"),
    Step("Random erase", 0.5, RandomErase, _ERASE, {**_ERASE, "inside": False}),
    Step("Random shift", 0.5, RandomShift, _SHIFT, _SHIFT),
    Step("Random scale", 0.5, RandomScale, {"factors": (0.9, 1)}, {"factors": (0.9, 1)}),
    Step("Mask deletion", 0.5, MaskDeletion, {}, {}),
)


def first_place(size: tuple[int, int], edition: str = "as_described") -> A.Compose:
    """Return the first solution's augmentation: Table 3.1 in the order of its code.

    The horizontal flip, which the table leaves out, changes the label too and so belongs to the data set.

    Args:
        size: (H, W) of the images, in pixels. What is given for (256, 512) is fitted to it: lengths in pixels, and
            noise, which is drawn for each pixel and so is weaker where a pixel stands for several.
        edition: "as_described" in the report or "as_shipped" in the code; ``FIRST_PLACE`` shows both.

    Returns:
        A pipeline for ``image`` (H, W, 3) uint8 RGB and ``mask`` (H, W) uint8, to be used with ``augmented``.

    Raises:
        ValueError: an unknown edition.
    """
    if edition not in EDITIONS:
        raise ValueError(f"edition = {edition!r}: choose one of {EDITIONS}")
    field = edition.removeprefix("as_")
    steps = [step for step in FIRST_PLACE if getattr(step, field) is not None]
    pipeline = []
    for _, group in groupby(steps, lambda step: step.group or step.name):
        made = [step.transform(**_at_size(getattr(step, field), size), p=step.probability) for step in group]
        # Within a group the probabilities are weights.
        pipeline += made if len(made) == 1 else [A.OneOf(made, p=sum(step.p for step in made))]
    return A.Compose(pipeline, strict=True)


def _at_size(parameters: Mapping[str, object], size: tuple[int, int]) -> dict[str, object]:
    fitted = dict(parameters)
    for name, side, reference in zip(("rows", "columns"), size, REFERENCE_SIZE, strict=True):
        if name in fitted:
            # A step of at least one pixel stays one.
            fitted[name] = tuple(round(v * side / reference) or (v > 0) - (v < 0) for v in fitted[name])
    if "sigma" in fitted:
        # As if noise of that strength at (256, 512) had been averaged over the pixels that fall together.
        fitted["sigma"] *= sqrt(prod(size) / prod(REFERENCE_SIZE))
    return fitted
