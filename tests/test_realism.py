import os
from pathlib import Path

import numpy as np
import pytest

from whalelib.data import open_catalog, read_image
from whalelib.data.world import make_world
from whalelib.metrics import mask_iou
from whalelib.realism import mask_overlap


def test_iou_of_masks():
    a, b = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    assert mask_iou(a, b) == 1
    a[:2], b[1:3] = True, True
    assert mask_iou(a, b) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(6, 4\)"):
        mask_iou(a, b.T)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return open_catalog(make_world("tiny", 7, tmp_path_factory.mktemp("worlds") / "tiny", workers=1))


def test_the_true_masks_overlap_wholly_and_none_not_at_all(tiny):
    by_shape = {row.path: read_image(row.mask, mode="L") > 127 for row in tiny.table.itertuples()}
    true = iter(by_shape.values())
    assert (mask_overlap(lambda image: next(true), tiny) == 1).all()
    nothing = mask_overlap(lambda image: np.zeros(image.shape[:2], bool), tiny)
    assert (nothing == 0).all()
    assert list(nothing.index) == list(tiny.table["image"])


def test_dark_pixels_are_half_a_segmentation_of_real_flukes_too(tiny):
    def dark(image):
        return image.mean(axis=2) < image.mean()

    assert 0.2 < mask_overlap(dark, tiny).mean() < 0.9
    if not os.environ.get("WHALE_REFERENCE"):
        pytest.skip("WHALE_REFERENCE is unset: no real masks")
    real = open_catalog(Path(os.environ["WHALE_REFERENCE"]) / "real" / "photos2019")
    assert len(mask_overlap(dark, real)) == 10


def test_no_masks_is_said(tiny):
    with pytest.raises(ValueError, match="no photograph has a mask"):
        mask_overlap(lambda image: image, tiny.where(tiny.table["mask"].isna()))
