import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from whalelib import augment
from whalelib.data import NEW_WHALE, PhotographError, open_catalog, photographs, read_image
from whalelib.data.photographs import Photographs

SIZE = (24, 48)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Six textured photographs of two animals and a stranger."""
    folder = tmp_path_factory.mktemp("animals")
    generator = np.random.default_rng(0)
    for name in ("ada", "bo", NEW_WHALE):
        (folder / name).mkdir()
        for number in range(2):
            pixels = generator.integers(0, 256, (30 + 10 * number, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{number}.png")
    return open_catalog(folder)


def moving(**options):
    return {"transform": augment.baseline(SIZE), "seed": 3, **options}


def test_items(catalog):
    data = Photographs(catalog, SIZE)
    assert len(data) == 6
    assert data.known == ["ada", "bo"]
    for index, (item, row) in enumerate(zip(data, catalog.table.itertuples(), strict=False)):
        assert item["index"] == index
        assert item["label"] == {"ada": 0, "bo": 1, NEW_WHALE: -1}[row.identity]
        assert item["image"].dtype == torch.float32
        assert np.array_equal(item["image"].numpy() * 255, read_image(row.path, size=SIZE).transpose(2, 0, 1))
    assert data[-1]["index"] == 5
    with pytest.raises(IndexError):
        data[6]


def test_labels_follow_the_given_identities(catalog):
    assert Photographs(catalog, SIZE, known=["bo", "cy"]).labels.tolist() == [-1, -1, 0, 0, -1, -1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_depends_on_seed_epoch_and_index_alone(catalog, workers):
    data = Photographs(catalog, SIZE, **moving())
    data.set_epoch(4)
    expected = [item["image"] for item in (data[i] for i in range(6))]
    torch.manual_seed(workers)
    np.random.seed(workers)  # noqa: NPY002  (must not matter)
    random.seed(workers)
    for order in ([5, 3, 1, 0, 2, 4], [2, 2, 0]):
        loader = DataLoader(data, batch_size=2, sampler=order, num_workers=workers)
        images = torch.cat([batch["image"] for batch in loader])
        assert all(torch.equal(image, expected[i]) for image, i in zip(images, order, strict=True))


def test_other_seeds_epochs_and_indices_draw_otherwise(catalog):
    one = catalog.where(np.arange(6) == 0)

    def draw(seed, epoch):
        data = Photographs(one, SIZE, **moving(seed=seed))
        data.set_epoch(epoch)
        return data[0]["image"]

    draws = [draw(*key) for key in product(range(3), range(3))]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    twice = Photographs(catalog, SIZE, **moving())
    first = twice[0]["image"]
    pixels = twice._pixels[0]
    pixels[1] = pixels[0]
    assert not torch.equal(first, twice[1]["image"])


@pytest.mark.parametrize("inner", ["plain", "one of"])
def test_steps_of_a_pipeline_draw_independently(inner):
    # set_random_seed would take both flips or neither: each step would get a generator of the same seed.
    first = (
        A.HorizontalFlip(p=0.5) if inner == "plain" else A.OneOf([A.HorizontalFlip(p=1), A.NoOp(p=1)], p=1)
    )
    pipeline = A.Compose([first, A.VerticalFlip(p=0.5)], strict=True)
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    draws = 2000
    counts = Counter(
        augment.augmented(pipeline, (0, 1, i), image=image)["image"].tobytes() for i in range(draws)
    )
    assert len(counts) == 4
    assert all(abs(count / draws - 0.25) < 0.05 for count in counts.values())  # five standard deviations


def test_a_misspelt_argument_is_an_error():
    with pytest.raises(ValueError, match="rotat"), pytest.warns(UserWarning, match="rotat"):
        A.Compose([A.Affine(rotat=3)], strict=True)
    assert augment.baseline(SIZE).strict


def test_the_baseline_never_mirrors():
    # Bright left half: whatever the draw, it stays left.
    image = np.zeros((32, 64, 3), dtype=np.uint8)
    image[:, :32] = 200
    for i in range(300):
        changed = augment.augmented(augment.baseline((32, 64)), (0, 0, i), image=image)["image"].astype(float)
        assert changed.shape == image.shape
        assert changed[:, :20].mean() > changed[:, -20:].mean() + 50


def test_plain_shares_pixels(catalog):
    data = Photographs(catalog, SIZE, **moving())
    plain = data.plain()
    assert plain._pixels is data._pixels
    assert data.transform is not None
    assert torch.equal(plain[0]["image"], Photographs(catalog, SIZE)[0]["image"])


@pytest.mark.parametrize("options", [{"memory": False}, {"memory": True}, {"folder": "kept"}])
def test_where_pixels_are_kept_does_not_matter(catalog, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = [read_image(path, size=SIZE) for path in catalog.table["path"]]
    for _ in range(2):
        data = Photographs(catalog, SIZE, **options)
        assert all(np.array_equal(data.pixels(i), expected[i]) for i in range(6))
        data.pixels(0)[:] = 0
        assert np.array_equal(data.pixels(0), expected[0])


def count_reads(monkeypatch):
    reads = []
    monkeypatch.setattr(
        photographs, "read_image", lambda path, **k: reads.append(path) or read_image(path, **k)
    )
    return reads


def test_memory_decodes_once(catalog, monkeypatch):
    reads = count_reads(monkeypatch)
    data = Photographs(catalog, SIZE)
    for _ in range(2):
        [data[i] for i in range(6)]
    assert len(reads) == 6


def test_a_file_saves_decoding(catalog, monkeypatch, tmp_path):
    reads = count_reads(monkeypatch)
    Photographs(catalog, SIZE, folder=tmp_path)
    Photographs(catalog, SIZE, folder=tmp_path, **moving())
    assert len(reads) == 6
    Photographs(catalog, (24, 24), folder=tmp_path)
    Photographs(catalog.where(np.arange(6) < 3), SIZE, folder=tmp_path)
    assert len(reads) == 15
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_two_at_a_time_decode_once(catalog, monkeypatch, tmp_path):
    reads = count_reads(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: Photographs(catalog, SIZE, folder=tmp_path), range(2)))
    assert len(reads) == 6
    assert np.array_equal(found[0].pixels(5), found[1].pixels(5))


def test_an_interrupted_file_is_not_kept(catalog, monkeypatch, tmp_path):
    def fail(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(photographs, "read_image", fail)
    with pytest.raises(KeyboardInterrupt):
        Photographs(catalog, SIZE, folder=tmp_path)
    assert not list(tmp_path.glob("[!.]*"))


def test_boxes(catalog):
    with pytest.raises(ValueError, match="no boxes"):
        Photographs(catalog, SIZE, crop="box")
    boxed = catalog.where(np.arange(6) < 2)
    for name, values in {
        "x0": [5.0, np.nan],
        "y0": [6, np.nan],
        "x1": [45, np.nan],
        "y1": [26, np.nan],
    }.items():
        boxed.table[name] = values
    data = Photographs(boxed, SIZE, crop="box")
    first, second = boxed.table["path"]
    assert np.array_equal(data.pixels(0), read_image(first, size=SIZE, box=(5, 6, 45, 26)))
    assert np.array_equal(data.pixels(1), read_image(second, size=SIZE))


def test_an_unreadable_photograph_is_named(tmp_path):
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "torn.jpg").write_bytes(b"torn")
    with pytest.raises(PhotographError, match=r"torn\.jpg"):
        Photographs(open_catalog(tmp_path), SIZE)[0]


def test_what_is_decoded_is_decoded_when_asked_for_and_shared_with_the_plain_ones(catalog, monkeypatch):
    decoded = []
    read = Photographs._read
    monkeypatch.setattr(Photographs, "_read", lambda self, index: decoded.append(index) or read(self, index))
    moved = Photographs(catalog, SIZE, **moving())
    assert not decoded
    assert torch.equal(moved.plain()[1]["image"], Photographs(catalog, SIZE)[1]["image"])
    assert len(decoded) == 2 * len(catalog)
    moved[0]
    assert len(decoded) == 2 * len(catalog)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": (0, 4)}, "size"), ({"crop": "mask"}, "crop = 'mask'"), ({"seed": -1}, "seed = -1")],
)
def test_bad_arguments(catalog, options, message):
    with pytest.raises(ValueError, match=message):
        Photographs(catalog, **{"size": SIZE, **options})


def test_fingerprint_tells_what_decides_items(catalog):
    def fingerprint(rows=6, **options):
        return Photographs(catalog.where(np.arange(6) < rows), **{"size": SIZE, **options}).fingerprint

    kinds = [{}, {"size": (24, 24)}, {"seed": 1}, {"rows": 5}, moving(seed=0), {"known": ["bo", "ada"]}]
    found = [fingerprint(**kind) for kind in kinds]
    assert len(set(found)) == len(kinds)
    assert found == [fingerprint(**kind) for kind in kinds]
