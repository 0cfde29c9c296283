"""What several test files share."""

import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings
from PIL import Image

from whalelib.data import NEW_WHALE, open_catalog
from whalelib.data.masks import encode_rle
from whalelib.data.photographs import Photographs
from whalelib.run import Run, Settings

# How long an example takes says more about what else runs than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Run a test a core, 4 at most: a third worker on two cores takes longer to start than it saves."""
    return min(os.cpu_count() or 1, 4)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Send everything that a run writes into a folder of this test, and return that folder."""
    for name in ("BUILD", "RESULTS", "FIGURES", "CACHE"):
        monkeypatch.setenv(f"WHALE_{name}", str(tmp_path / name.lower()))
    return tmp_path


@pytest.fixture
def animals(tmp_path):
    """Return a folder per individual: two animals with two small photographs each."""
    folder = tmp_path / "animals"
    for place, name in enumerate(["ada", "bo"]):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (12, 8), (80 * place, 60 * number, 40)).save(
                folder / name / f"{name}{number}.png"
            )
    return folder


@pytest.fixture
def bright_flukes(places):
    """Return a function that makes a folder of dark photographs (H, W) = (200, 400), each with one bright box.

    It takes the boxes, x0, y0, x1, y1, by the photographs' names, whose first letter is the animal.
    """

    def make(boxes):
        images = places / "flukes" / "images"
        images.mkdir(parents=True)
        for name, (x0, y0, x1, y1) in boxes.items():
            image = np.full((200, 400), 20, np.uint8)
            image[y0:y1, x0:x1] = 220
            Image.fromarray(image).save(images / name)
        table = pd.DataFrame({"Image": list(boxes), "Id": [name[0] for name in boxes]})
        table.to_csv(images.parent / "labels.csv", index=False)
        return images.parent

    return make


@pytest.fixture
def six_animals(places, monkeypatch):
    """A run on six animals of three photographs each and four strangers, with boxes and masks beside them."""
    folder = places / "animals"
    (folder / "train").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for name, count in {**{f"w_{i}": 3 for i in range(6)}, NEW_WHALE: 4}.items():
        base = rng.integers(0, 256, (8, 16, 3), dtype=np.uint8)
        for number in range(count):
            image = f"{name}{number}.png"
            noise = rng.integers(0, 60, (32, 64, 3), dtype=np.uint8)
            pixels = np.kron(base, np.ones((4, 4, 1), np.uint8)) // 2 + noise
            Image.fromarray(pixels).save(folder / "train" / image)
            Image.fromarray(np.full((32, 64), 255, np.uint8)).save(folder / "masks" / image)
            rows.append((image, name))
    pd.DataFrame(rows, columns=["Image", "Id"]).to_csv(folder / "train.csv", index=False)
    pd.DataFrame(
        [(image, 0, 0, 60, 30) for image, _ in rows], columns=["Image", "x0", "y0", "x1", "y1"]
    ).to_csv(folder / "boxes.csv", index=False)
    monkeypatch.setattr("whalelib.run.sources_hash", lambda *others: "as it is")
    return Run("03_15", Settings(data=str(folder)))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three animals with four, two and one photographs, three strangers; at (16, 32), left and right halves differ."""
    folder = tmp_path_factory.mktemp("animals")
    rng = np.random.default_rng(0)
    for name, count in {"ada": 4, "bo": 2, "cy": 1, NEW_WHALE: 3}.items():
        (folder / name).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{number}.png")
    catalog = open_catalog(folder)
    catalog.table["rle"] = encode_rle(np.arange(192 * 384).reshape(192, 384) % 384 < 192)
    return Photographs(catalog, (16, 32), masks=True)
