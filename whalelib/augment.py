"""Random changes of a photograph that leave the animal the same.

Sections 3.1.4 and 4.1.3 of the report describe the solutions' steps; here are the baseline's few, and the
seeding that all share.
"""

import os
import random

import numpy as np

# Albumentations asks a server for its newest version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2


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
