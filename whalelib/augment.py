"""Random changes of a photograph that leave the animal the same.

Sections 3.1.4, 4.1.3 and 5.1.2 of the report describe the three solutions' steps. Here are the
baseline's few, theirs, and the seeding that all share. No step mirrors a photograph: that makes another animal,
so it is the data set's to do, with the label.
"""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from math import ceil, cos, floor, prod, radians, sin, sqrt, tan
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

REFERENCE_SIZE = (256, 512)  # (H, W), for which the first two solutions' steps are given
PHOTOGRAPH_WIDTH = 1050  # of most photographs (Table 2.3); the third solution's steps are given for full size

MOVED = (Targets.IMAGE, Targets.MASK)

Range = tuple[float, float]
Pixels = tuple[int, int]
Length = Annotated[int, Field(ge=0)]
Factor = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Slant = Annotated[float, Field(gt=-90, lt=90)]
Positive = Annotated[float, Field(gt=0)]


def _rising(values: tuple) -> tuple:
    if values[0] > values[1]:
        raise ValueError(f"{values}: the lowest comes first")
    return values


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"{value} is even: a kernel has a pixel in its middle")
    return value


Odd = Annotated[int, Field(ge=1), AfterValidator(_odd)]


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


def _words(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    words = generator.bit_generator.random_raw(-(-prod(shape) // 4))
    return words.view(np.uint16)[: prod(shape)].reshape(shape)


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
        draws = _words(self.random_generator, params["shape"][:2])
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
    """One step of a solution's augmentation.

    Attributes:
        name: as in Table 3.1, 4.1 or 5.1.
        probability: that an image undergoes it.
        transform: its class.
        described: its parameters as the report gives them, at the solution's own size; None: not there.
        shipped: the same as the code has them.
        group: of the steps of a group at most one is taken, in the second solution at most two, in the third all
            by their own probabilities.
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
    # Within a group the probabilities are weights.
    return _composed(FIRST_PLACE, size, edition, lambda steps: A.OneOf(steps, p=sum(s.p for s in steps)))


def _composed(
    table: Sequence[Step],
    size: tuple[int, int],
    edition: str,
    joined: Callable[[list[A.BasicTransform]], A.BaseCompose],
    keypoints: A.KeypointParams | None = None,
) -> A.Compose:
    """Return an edition's pipeline of a table, the steps of a group joined."""
    if edition not in EDITIONS:
        raise ValueError(f"edition = {edition!r}: choose one of {EDITIONS}")
    field = edition.removeprefix("as_")
    steps = [step for step in table if getattr(step, field) is not None]
    pipeline = []
    for _, group in groupby(steps, lambda step: step.group or step.name):
        made = [step.transform(**_at_size(getattr(step, field), size), p=step.probability) for step in group]
        pipeline += made if len(made) == 1 else [joined(made)]
    return A.Compose(pipeline, keypoint_params=keypoints, strict=True)


def _at_size(parameters: Mapping[str, object], size: tuple[int, int]) -> dict[str, object]:
    fitted = dict(parameters)
    for name, side, reference in zip(("rows", "columns"), size, REFERENCE_SIZE, strict=True):
        if name in fitted:
            # A step of at least one pixel stays one.
            fitted[name] = tuple(round(v * side / reference) or (v > 0) - (v < 0) for v in fitted[name])
    if "sigma" in fitted:
        # As if noise of that strength at (256, 512) had been averaged over the pixels that fall together.
        fitted["sigma"] *= sqrt(prod(size) / prod(REFERENCE_SIZE))
    if "sigmas" in fitted:
        share = sqrt(prod(size) / prod(REFERENCE_SIZE))
        fitted["sigmas"] = tuple(sigma * share for sigma in fitted["sigmas"])
    if "sigma_limit" in fitted:  # of a blur, in pixels
        share = size[1] / REFERENCE_SIZE[1]
        fitted["sigma_limit"] = tuple(sigma * share for sigma in fitted["sigma_limit"])
        # The kernel grows with the blur, but is never smaller than given: the rest of it is zeros then.
        fitted["blur_limit"] = tuple(max(k, 2 * round(share * (k // 2)) + 1) for k in fitted["blur_limit"])
    if "unit" in fitted:
        fitted["unit"] = min(1, size[1] / PHOTOGRAPH_WIDTH)
    return fitted


class ToGray(A.ImageOnlyTransform):
    """The luminance in all three channels (section 4.1.3).

    Args:
        bgr: take red for blue and blue for red, as who gives (B, G, R) to a function for (R, G, B).
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        bgr: bool

    def __init__(self, bgr: bool = False, p: float = 0.5):
        super().__init__(p=p)
        self.bgr = bgr

    def apply(self, img, **params):
        """Return ``img`` (H, W, 3) RGB in gray."""
        gray = cv2.cvtColor(img, cv2.COLOR_BGR2GRAY if self.bgr else cv2.COLOR_RGB2GRAY)
        return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)


class _Warp(A.DualTransform):
    """Moves image and mask alike; bilinear."""

    _targets = MOVED

    def apply(self, img, **params):
        """Return ``img``, moved."""
        if img.ndim == 3 and img.shape[2] == 3:
            # OpenCV moves four channels in half the time of three.
            four = self.moved(cv2.cvtColor(img, cv2.COLOR_RGB2RGBA), **params)
            return cv2.cvtColor(four, cv2.COLOR_RGBA2RGB)
        return self.moved(img, **params)


class PerspectiveShrink(_Warp):
    """The image warped into a quadrilateral within it, and zeros around ("without cropping", Figure 4.5b).

    Each corner moves inward along both axes, each time by another share of the image's side.

    Args:
        inset: largest share, from 0 to .5 (exclusive); the shares are uniform from 0.
        crop: as the code had it: the corners are whole pixels, and the quadrilateral's bounding box is cut out
            and resized to the image's size, so that fewer zeros remain.
        p: probability.
    """

    class InitSchema(A.DualTransform.InitSchema):
        """What the arguments must be."""

        inset: Annotated[float, Field(ge=0, lt=0.5)]
        crop: bool

    def __init__(self, inset: float = 0.25, crop: bool = False, p: float = 0.5):
        super().__init__(p=p)
        self.inset, self.crop = inset, crop

    def get_params_dependent_on_data(self, params, data):
        """Draw the corners: (4, 2) float32, x and y in pixels, clockwise from the upper left."""
        (left, right), (top, bottom) = (
            ([self._near(side), self._near(side)], [self._far(side), self._far(side)])
            for side in params["shape"][1::-1]
        )
        xs, ys = (left[0], right[0], right[1], left[1]), (top[0], top[1], bottom[0], bottom[1])
        return {"corners": np.array([xs, ys], np.float32).T}

    def _near(self, side: int) -> float:
        if self.crop:
            return self.py_random.randint(0, int(side * self.inset))
        return self.py_random.uniform(0, self.inset * side)

    def _far(self, side: int) -> float:
        if self.crop:
            return self.py_random.randint(min(int(side * (1 - self.inset)), side - 1), side - 1)
        return side - 1 - self._near(side)

    def moved(self, img, corners, **params):
        """Return ``img`` within the quadrilateral."""
        height, width = img.shape[:2]
        if not self.crop:
            return cv2.warpPerspective(img, _perspective((height, width), corners), (width, height))
        first = corners.min(axis=0)
        # The box ends before its last row and column.
        columns, rows = np.maximum(corners.max(axis=0) - first, 1).astype(int).tolist()
        cut = cv2.warpPerspective(img, _perspective((height, width), corners - first), (columns, rows))
        return cv2.resize(cut, (width, height))


def _perspective(size: tuple[int, int], corners: np.ndarray) -> np.ndarray:
    """Return the (3, 3) map of an image's corner pixels, clockwise from the upper left, to (4, 2) corners (x, y)."""
    bottom, right = (side - 1 for side in size)
    own = np.float32([(0, 0), (right, 0), (right, bottom), (0, bottom)])
    return cv2.getPerspectiveTransform(own, corners)


class PerspectiveCrop(_Warp):
    """A quadrilateral of the image, warped to fill it ("with cropping", Figure 4.5c).

    Each corner lies inward of the image's along both axes, each time by another share of the image's side. The
    shares depend on one strength an image, uniform between its limits.

    Args:
        strengths: lowest and highest strength.
        normal: the shares are the sizes of normal draws whose standard deviation is the strength, so that some
            are larger, as the code had it; else uniform from 0 to the strength.
        p: probability.
    """

    class InitSchema(A.DualTransform.InitSchema):
        """What the arguments must be."""

        strengths: Annotated[tuple[Share, Share], AfterValidator(_rising)]
        normal: bool

    def __init__(self, strengths: Range = (0.01, 0.1), normal: bool = False, p: float = 0.5):
        super().__init__(p=p)
        self.strengths, self.normal = strengths, normal

    def get_params_dependent_on_data(self, params, data):
        """Draw the corners: (4, 2) float32, x and y in pixels, clockwise from the upper left."""
        strength = self.py_random.uniform(*self.strengths)
        draw = self.random_generator.normal if self.normal else self.random_generator.uniform
        shares = np.abs(draw(0, strength, (4, 2))) % 1
        outer = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
        return {"corners": (np.abs(outer - shares) * params["shape"][1::-1]).astype(np.float32)}

    def moved(self, img, corners, **params):
        """Return what is within the quadrilateral, at the size of its longer sides and then, bicubic, at its own."""
        height, width = img.shape[:2]
        top, right, bottom, left = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)
        size = max(2, int(left), int(right)), max(2, int(top), int(bottom))
        back = cv2.invert(_perspective(size, corners))[1]
        flat = cv2.warpPerspective(img, back, size[::-1])
        return cv2.resize(flat, (width, height), interpolation=cv2.INTER_CUBIC)


class RotateShear(_Warp):
    """Rotation about the centre and shear, in one step; the border is replicated where nothing was (Figure 4.3).

    Args:
        angles: lowest and highest angle of the rotation, in degrees, clockwise.
        shears: the same of the shears.
        both: after the rotation a shear along x and one along y, by angles of their own, so that areas stay;
            else, as the code had it, before the rotation the upright axis alone is turned by one angle and keeps
            its length, so that areas shrink by the angle's cosine.
        p: probability.
    """

    border = cv2.BORDER_REPLICATE

    class InitSchema(A.DualTransform.InitSchema):
        """What the arguments must be."""

        angles: Annotated[Range, AfterValidator(_rising)]
        shears: Annotated[tuple[Slant, Slant], AfterValidator(_rising)]
        both: bool

    def __init__(
        self, angles: Range = (-15, 15), shears: Range = (-15, 15), both: bool = True, p: float = 0.5
    ):
        super().__init__(p=p)
        self.angles, self.shears, self.both = angles, shears, both

    def get_params(self):
        """Draw the (2, 2) map of offsets (x, y) from the centre."""
        turn, *slants = (
            radians(self.py_random.uniform(*limits))
            for limits in (self.angles, *[self.shears] * (1 + self.both))
        )
        rotation = np.array([[cos(turn), -sin(turn)], [sin(turn), cos(turn)]])
        if not self.both:
            return {"linear": rotation @ [[1, -sin(slants[0])], [0, cos(slants[0])]]}
        along_x, along_y = [[1, tan(slants[0])], [0, 1]], [[1, 0], [tan(slants[1]), 1]]
        return {"linear": np.array(along_y) @ along_x @ rotation}

    def moved(self, img, linear, shift=(0, 0), **params):
        """Return ``img``, turned, sheared and then shifted by shares of its width and height."""
        affine = np.column_stack([linear, _offset(img.shape, linear, shift)])
        return cv2.warpAffine(img, affine, img.shape[1::-1], borderMode=self.border)


def _offset(shape: tuple[int, ...], linear: np.ndarray, shift: Sequence[float]) -> np.ndarray:
    """Return what to add to ``linear`` times (x, y), in pixels: the centre stays but for the shift."""
    sides = np.array(shape[1::-1])
    centre = (sides - 1) / 2
    return centre - linear @ centre + sides * shift


class GaussianNoise(A.ImageOnlyTransform):
    """Noise of normal distribution, drawn for each pixel by itself, in whole levels (section 4.1.3).

    Args:
        sigmas: lowest and highest standard deviation, as a share of the whole range; uniform, one an image.
        per_channel: probability that the channels have noise of their own; else they share it.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        sigmas: Annotated[tuple[Share, Share], AfterValidator(_rising)]
        per_channel: Share

    def __init__(self, sigmas: Range = (0, 0.01), per_channel: float = 0.5, p: float = 0.5):
        super().__init__(p=p)
        self.sigmas, self.per_channel = sigmas, per_channel

    def get_params_dependent_on_data(self, params, data):
        """Draw the noise: (H, W, 1 or 3) int16."""
        sigma = self.py_random.uniform(*self.sigmas)
        channels = 3 if self.py_random.random() < self.per_channel else 1
        levels = np.rint(_normal_table() * (255 * sigma)).astype(np.int16)
        draws = _words(self.random_generator, (*params["shape"][:2], channels))
        return {"noise": levels.take(draws, mode="clip")}

    def apply(self, img, noise, **params):
        """Return ``img`` (H, W, 3) uint8 with noise."""
        noise = cv2.merge([noise] * 3) if noise.shape[2] == 1 else noise
        return cv2.add(img, noise, dtype=cv2.CV_8U)


class HueSaturation(A.ImageOnlyTransform):
    """One whole number added to the saturation and, on its scale, to the hue (section 4.1.3).

    With saturation and hue from 0 to 255 both change by v. OpenCV keeps the hue as 0 to 179, so that it changes by
    180 v / 255 there, cut to a whole number, and around the circle; saturation is cut to 0 to 255.

    Args:
        values: lowest and highest v, ends included.
        bgr: take red for blue and blue for red, so that the hue turns the other way.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        values: Annotated[Pixels, AfterValidator(_rising)]
        bgr: bool

    def __init__(self, values: Pixels = (-5, 5), bgr: bool = False, p: float = 0.5):
        super().__init__(p=p)
        self.values, self.bgr = values, bgr

    def get_params(self):
        """Draw v."""
        return {"value": self.py_random.randint(*self.values)}

    def apply(self, img, value, **params):
        """Return ``img`` (H, W, 3) uint8 RGB in other colours."""
        there, back = (
            (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR) if self.bgr else (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
        )
        levels = np.arange(256)
        table = np.stack(
            [(levels + int(value * 180 / 255)) % 180, np.clip(levels + value, 0, 255), levels], axis=1
        )
        return cv2.cvtColor(cv2.LUT(cv2.cvtColor(img, there), table.astype(np.uint8)[None]), back)


class PiecewiseAffine(_Warp):
    """The points of a regular grid moved at random, and what is between them with them (Figure 4.4).

    The grid reaches from border to border. A point moves along both axes by normal draws, a share of the image's
    side, and stays within the image. Each cell is two triangles, each of which an affine map moves.

    Args:
        scales: lowest and highest standard deviation of the share; uniform, one an image.
        grid: points along each side.
        p: probability.
    """

    class InitSchema(A.DualTransform.InitSchema):
        """What the arguments must be."""

        scales: Annotated[tuple[Share, Share], AfterValidator(_rising)]
        grid: Annotated[int, Field(ge=2)]

    def __init__(self, scales: Range = (0.01, 0.03), grid: int = 4, p: float = 0.5):
        super().__init__(p=p)
        self.scales, self.grid = scales, grid

    def get_params_dependent_on_data(self, params, data):
        """Draw where each point of the grid takes its pixel from: (2, grid, grid) float32, x and y in pixels."""
        scale, (height, width) = self.py_random.uniform(*self.scales), params["shape"][:2]
        sides = np.array([[[width]], [[height]]])
        steps = np.linspace(0, 1, self.grid)
        shares = np.stack(np.meshgrid(steps, steps))
        shares += self.random_generator.normal(0, scale, shares.shape)
        return {"points": np.clip(shares * sides, 0, sides - 1).astype(np.float32)}

    def moved(self, img, points, **params):
        """Return ``img``, bent."""
        rows, columns, row_cells, column_cells, fold = _grid(*img.shape[:2], self.grid)
        # Bilinear between the four points of a cell, and then folded along its diagonal.
        fourth = points[:, :-1, :-1] - points[:, :-1, 1:] - points[:, 1:, :-1] + points[:, 1:, 1:]
        x, y = rows @ points @ columns + fold * (row_cells @ fourth @ column_cells)
        return cv2.remap(img, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


@lru_cache(8)
def _grid(height: int, width: int, points: int) -> tuple[np.ndarray, ...]:
    # Of (H, points) and (points, W) each pixel's weights of the grid's lines; of (H, points - 1) and
    # (points - 1, W) its cell; (H, W) what folds a cell's bilinear map into two affine ones.
    weights, cells, places = [], [], []
    for side in (height, width):
        place = np.arange(side, dtype=np.float32) * ((points - 1) / side)
        cell = place.astype(int)
        weights.append(np.maximum(1 - np.abs(place[:, None] - np.arange(points, dtype=np.float32)), 0))
        cells.append((cell[:, None] == np.arange(points - 1)).astype(np.float32))
        places.append((place - cell).astype(np.float32))
    down, right = places[0][:, None], places[1][None]
    fold = np.minimum(down, right) - down * right
    return weights[0], weights[1].T.copy(), cells[0], cells[1].T.copy(), fold


class SomeOf(A.RandomOrder):
    """From none to ``n`` of the steps, each number equally likely, in random order."""

    def _get_idx(self):
        return super()._get_idx()[: self.py_random.randint(0, self.n)]


_COLOUR = {"bgr": True}  # the code read (B, G, R) and took it for (R, G, B)
SECOND_PLACE = (
    Step("Gray scale transform", 0.5, ToGray, {}, _COLOUR),
    Step(
        "Perspective transform without cropping",
        0.5,
        PerspectiveShrink,
        {"inset": 0.25},
        {"inset": 0.25, "crop": True},
    ),
    Step(
        "Random rotation and shear",
        1,
        RotateShear,
        {"angles": (-15, 15), "shears": (-15, 15)},
        {"angles": (-15, 15), "shears": (-15, 15), "both": False},
    ),
    *(
        Step(name, 0.2, transform, described, {**described, **shipped}, "Some")
        for name, transform, described, shipped in (
            ("Gaussian noise", GaussianNoise, {"sigmas": (0, 0.01), "per_channel": 0.5}, {}),
            ("Gaussian blur", A.GaussianBlur, {"blur_limit": (5, 5), "sigma_limit": (0, 1.5)}, {}),
            ("Hue and saturation addition", HueSaturation, {"values": (-5, 5)}, _COLOUR),
            ("Piecewise affine transformation", PiecewiseAffine, {"scales": (0.01, 0.03), "grid": 4}, {}),
            (
                "Perspective transform with cropping",
                PerspectiveCrop,
                {"strengths": (0.01, 0.1)},
                {"normal": True},
            ),
        )
    ),
)


def second_place(size: tuple[int, int], edition: str = "as_described") -> A.Compose:
    """Return the second solution's augmentation: Table 4.1 in the order of its code.

    Of the last five steps an image undergoes none, one or two, equally likely, in random order. The mirrored whales
    are the data set's.

    Args:
        size: (H, W) of the images, in pixels. What is given for (256, 512) is fitted to it: noise, as in
            ``first_place``, and the blur, by the width.
        edition: "as_described" in the report or "as_shipped" in the code; ``SECOND_PLACE`` shows both. Images are
            RGB in both: where the code took blue for red, so do the steps.

    Returns:
        A pipeline for ``image`` (H, W, 3) uint8 RGB, to be used with ``augmented``.

    Raises:
        ValueError: an unknown edition.
    """
    return _composed(SECOND_PLACE, size, edition, _some)


def _some(steps: list[A.BasicTransform]) -> A.BaseCompose:
    for step in steps:
        step.p = 1  # once chosen
    return SomeOf(steps, n=2)


class RandomAffine(RotateShear):
    """Scaling, rotation, shear and shift in one step, with zeros where nothing was (section 5.1.2).

    Key points move along. First both sides are scaled, each by a factor of its own, then all is as in
    ``RotateShear``, and last comes the shift.

    Args:
        angles: of the rotation, as in ``RotateShear``.
        shears: as there.
        both: as there.
        scales: lowest and highest factor.
        shifts: the same of the shift along each side, as a share of it; the sides' are independent.
        p: probability.
    """

    _targets = (*MOVED, Targets.KEYPOINTS)
    border = cv2.BORDER_CONSTANT

    class InitSchema(RotateShear.InitSchema):
        """What the arguments must be."""

        scales: Annotated[tuple[Positive, Positive], AfterValidator(_rising)]
        shifts: Annotated[Range, AfterValidator(_rising)]

    def __init__(
        self,
        angles: Range = (-10, 10),
        shears: Range = (-10, 10),
        both: bool = True,
        scales: Range = (0.9, 1.1),
        shifts: Range = (-0.05, 0.05),
        p: float = 0.5,
    ):
        super().__init__(angles, shears, both, p)
        self.scales, self.shifts = scales, shifts

    def get_params(self):
        """Draw the (2, 2) map of offsets (x, y) from the centre, and the shift (x, y) as shares of the sides."""
        scale, shift = (
            [self.py_random.uniform(*limits) for _ in "xy"] for limits in (self.scales, self.shifts)
        )
        return {"linear": super().get_params()["linear"] * scale, "shift": shift}

    def apply_to_keypoints(self, keypoints, linear, shift, shape, **params):
        """Return ``keypoints`` (K, 2 or more), of which x and y come first, moved."""
        keypoints = keypoints.copy()
        keypoints[:, :2] = keypoints[:, :2] @ linear.T + _offset(shape, linear, shift)
        return keypoints


class _Blur(A.ImageOnlyTransform):
    """The mean of the pixels around, with the weights of a kernel; the image is mirrored at its border."""

    def apply(self, img, kernel, **params):
        """Return ``img``, blurred."""
        return cv2.filter2D(img, -1, kernel)


def _coarser(kernel: np.ndarray, unit: float) -> np.ndarray:
    """Return what does to an image made smaller, ``unit`` to 1, what a (k, k) kernel does to the image; k is odd.

    Each weight goes to its place among the larger pixels. Along either axis the three pixels around share it, some
    of them by less than 0, so that the kernel's mean and variance are right. At 1 the kernel stays.
    """
    places = unit * (np.arange(len(kernel)) - len(kernel) // 2)
    reach = max(1, ceil(places[-1]))
    nearest = np.clip(np.rint(places), 1 - reach, reach - 1)
    beside = places - nearest
    shares = np.zeros((len(kernel), 2 * reach + 1))
    for step, share in ((-1, beside * (beside - 1) / 2), (0, 1 - beside**2), (1, beside * (beside + 1) / 2)):
        shares[np.arange(len(kernel)), (nearest + step + reach).astype(int)] = share
    return (shares.T @ kernel @ shares).astype(np.float32)


class AverageBlur(_Blur):
    """The mean of a square (section 5.1.2).

    Args:
        side: of the square, odd.
        unit: side of the kernel's pixels, in pixels of the image, above 0 and at most 1.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        side: Odd
        unit: Factor

    def __init__(self, side: int = 3, unit: float = 1, p: float = 0.5):
        super().__init__(p=p)
        self.side, self.unit = side, unit

    def get_params(self):
        """Return the kernel."""
        return {"kernel": _coarser(np.full((self.side, self.side), self.side**-2), self.unit)}


class MotionBlur(_Blur):
    """The mean along a short straight line through the pixel (section 5.1.2).

    The line has any direction. Its weights fall or rise evenly from d at one end to 1 - d at the other, before
    they are made to sum to 1; d is uniform from 0 to 1.

    Args:
        sides: lowest and highest side of the kernel, odd; the odd numbers between are equally likely.
        whole: draw any whole number between and make even ones one larger, as the code did, so that of 3 and 5 the
            5 is twice as likely.
        unit: side of the kernel's pixels, in pixels of the image, above 0 and at most 1.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        sides: Annotated[tuple[Odd, Odd], AfterValidator(_rising)]
        whole: bool
        unit: Factor

    def __init__(self, sides: Pixels = (3, 5), whole: bool = False, unit: float = 1, p: float = 0.5):
        super().__init__(p=p)
        self.sides, self.whole, self.unit = sides, whole, unit

    def get_params(self):
        """Draw the kernel."""
        low, high = self.sides
        side = self.py_random.randrange(low, high + 1, 1 if self.whole else 2) | 1
        angle, end = self.py_random.uniform(0, 360), self.py_random.uniform(0, 1)
        kernel = np.zeros((side, side), np.float32)
        kernel[:, side // 2] = np.linspace(end, 1 - end, side)
        turn = cv2.getRotationMatrix2D((side // 2, side // 2), angle, 1)
        kernel = cv2.warpAffine(kernel, turn, (side, side))
        return {"kernel": _coarser(kernel / kernel.sum(), self.unit)}


class RandomArithmetic(A.ImageOnlyTransform):
    """A random number added to all values, or all values times one; rounded and cut to 0 to 255 (section 5.1.2).

    Args:
        kind: "addition", of a whole number, or "multiplication".
        values: lowest and highest number, ends included.
        per_channel: probability that each channel has a number of its own; else they share it.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        kind: Literal["addition", "multiplication"]
        values: Annotated[Range, AfterValidator(_rising)]
        per_channel: Share

    def __init__(
        self, kind: str = "addition", values: Range = (-10, 10), per_channel: float = 0.5, p: float = 1
    ):
        super().__init__(p=p)
        self.kind, self.values, self.per_channel = kind, values, per_channel

    def get_params(self):
        """Draw the number, or one a channel: (1,) or (3,)."""
        (low, high), draw = self.values, self.py_random
        channels = 3 if draw.random() < self.per_channel else 1
        if self.kind == "addition":
            return {"number": np.array([draw.randint(ceil(low), floor(high)) for _ in range(channels)])}
        return {"number": np.array([draw.uniform(low, high) for _ in range(channels)])}

    def apply(self, img, number, **params):
        """Return ``img`` (H, W, 3) uint8, brighter or darker."""
        levels = np.arange(256)[:, None]
        table = levels + number if self.kind == "addition" else levels * number
        return cv2.LUT(img, np.clip(np.rint(table), 0, 255).astype(np.uint8)[None])


class RandomGray(A.ImageOnlyTransform):
    """The image mixed with its luminance (section 5.1.2).

    Args:
        alphas: lowest and highest share of the luminance, from 0 to 1.
        white: as the code had it, the luminance is made white wherever it is not 0, so that the image fades and
            only black stays: imgaug 0.2.7 takes an image of real numbers for one from 0 to 1.
        p: probability.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """What the arguments must be."""

        alphas: Annotated[tuple[Share, Share], AfterValidator(_rising)]
        white: bool

    def __init__(self, alphas: Range = (0.8, 1), white: bool = False, p: float = 0.5):
        super().__init__(p=p)
        self.alphas, self.white = alphas, white

    def get_params(self):
        """Draw the share."""
        return {"alpha": self.py_random.uniform(*self.alphas)}

    def apply(self, img, alpha, **params):
        """Return ``img`` (H, W, 3) uint8 RGB, grayer or whiter."""
        gray = cv2.cvtColor(img, cv2.COLOR_RGB2GRAY)
        if self.white:
            gray = cv2.threshold(gray, 0, 255, cv2.THRESH_BINARY)[1]
        return cv2.addWeighted(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), alpha, img, 1 - alpha, 0)


_AVERAGE, _MOTION = {"side": 3, "unit": 1}, {"sides": (3, 5), "unit": 1}
_ADDITION = {"kind": "addition", "values": (-10, 10), "per_channel": 0.5}
_MULTIPLY = {"kind": "multiplication", "values": (0.9, 1.1), "per_channel": 0.5}
_AFFINE = {"angles": (-10, 10), "shears": (-10, 10), "scales": (0.9, 1.1), "shifts": (-0.05, 0.05)}
THIRD_PLACE = tuple(
    Step(name, probability, transform, described, {**described, **shipped}, "All")
    for name, probability, transform, described, shipped in (
        ("Average blur", 0.5, AverageBlur, _AVERAGE, {}),
        ("Motion blur", 0.5, MotionBlur, _MOTION, {"whole": True}),
        ("Random addition", 1, RandomArithmetic, _ADDITION, {}),
        ("Random multiply", 1, RandomArithmetic, _MULTIPLY, {}),
        ("Random scale, translation, shear and rotation", 0.5, RandomAffine, _AFFINE, {"both": False}),
        ("Random gray scale", 0.5, RandomGray, {"alphas": (0.8, 1)}, {"white": True}),
    )
)


def third_place(size: tuple[int, int], edition: str = "as_described") -> A.Compose:
    """Return the third solution's augmentation: Table 5.1, its steps in random order.

    The report draws the side of the motion blur's kernel from U(3, 5). A kernel has an odd side, so that it is 3 or
    5, equally likely; in the code 5 is twice as likely. The mirrored whales are the data set's, as are the crop and
    the alignment, which come afterwards.

    Args:
        size: (H, W) of the images, in pixels. The blurs are given for photographs at full size, mostly 1050 pixels
            wide: in narrower ones they reach that much less far and at 320 hardly blur, as when the photograph is
            made smaller afterwards; wider ones keep them. All other lengths are shares.
        edition: "as_described" in the report or "as_shipped" in the code; ``THIRD_PLACE`` shows both. The code had
            real numbers between most steps, where whole ones are kept here, and shifted by whole pixels.

    Returns:
        A pipeline for ``image`` (H, W, 3) uint8 RGB and, where given, ``mask`` (H, W) uint8 and ``keypoints``
        (K, 2), x and y in pixels, to be used with ``augmented``. Key points come back as float32, even from outside
        the image. A box is to be given by its corners.

    Raises:
        ValueError: an unknown edition.
    """
    keypoints = A.KeypointParams("xy", remove_invisible=False)
    return _composed(THIRD_PLACE, size, edition, lambda steps: A.RandomOrder(steps, n=len(steps)), keypoints)
