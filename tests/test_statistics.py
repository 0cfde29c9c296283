import hashlib
import os
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from whalelib.data import (
    PhotographError,
    images,
    open_catalog,
    photograph_statistics,
    sharpness,
    statistics,
)

module = sys.modules["whalelib.data.statistics"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("WHALE_CACHE", str(folder))
    return folder


def naive(path):
    """The same measures by the plain loop: PIL to open, NumPy for the rest."""
    stored = Image.open(path)
    pixels = np.asarray(stored.convert("RGB"))
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return {
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "bytes": os.path.getsize(path),
        "mode": stored.mode,
        "gray_strict": bool(np.all((red == green) & (green == blue))),
        "gray_script": not np.any((red != green) & (green != blue)),
        "mean": np.mean(pixels, dtype=np.float64),
        "contrast": np.std(pixels, dtype=np.float64),
    }


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """60 photographs of all kinds, half of them gray in one way or another."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    (root / "w_1").mkdir()
    for number in range(60):
        height, width = rng.integers(1, 200, 2)
        pixels = rng.integers(0, rng.integers(2, 257), (height, width, 3), dtype=np.uint8)
        kind = number % 6
        if kind in (1, 2, 3):
            pixels[...] = pixels[..., :1]
        if kind == 2:  # one pixel that only the strict rule calls coloured
            pixels[rng.integers(height), rng.integers(width), number % 2 * 2] ^= 1
        if kind == 3:  # one pixel that both rules call coloured
            pixels[rng.integers(height), rng.integers(width)] += np.array([0, 1, 2], dtype=np.uint8)
        image = Image.fromarray(pixels)
        if kind == 4:
            image = image.convert("L")
        if kind == 5:
            image = image.quantize(200)
        image.save(root / "w_1" / f"{number:02}.{'jpg' if kind == 0 else 'png'}")
    return root


def test_against_the_plain_loop(photographs):
    catalog = open_catalog(photographs)
    found = statistics(catalog, workers=2)
    expected = pd.DataFrame([naive(path) for path in catalog.table["path"]])
    for name in ("height", "width", "bytes", "mode", "gray_strict", "gray_script"):
        assert found[name].tolist() == expected[name].tolist(), name
    for name in ("mean", "contrast"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-9)
    assert found["image"].tolist() == catalog.table["image"].tolist()
    assert (found["fault"] == "").all() and (found["repairs"] == "").all()
    assert found["gray_script"].sum() > found["gray_strict"].sum() > 10, "the two rules differ here"


def test_columns(photographs):
    names = "image split height width bytes mode gray_strict gray_script mean contrast repairs sha1 fault"
    found = statistics(open_catalog(photographs))
    assert list(found) == names.split()
    again = statistics(open_catalog(photographs))
    pd.testing.assert_frame_equal(found, again, check_exact=True)


def test_strips_change_nothing(photographs, monkeypatch):
    whole = statistics(open_catalog(photographs), cache=False)
    monkeypatch.setattr(module, "_STRIP_PIXELS", 500)
    pd.testing.assert_frame_equal(statistics(open_catalog(photographs), cache=False), whole, check_exact=True)


def test_contrast_by_hand(tmp_path):
    Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8)).save(tmp_path / "a.png")
    found = photograph_statistics(tmp_path / "a.png")
    assert (found["mean"], found["contrast"]) == (127.5, 127.5)
    Image.fromarray(np.full((9, 9, 3), 77, dtype=np.uint8)).save(tmp_path / "a.png")
    assert photograph_statistics(tmp_path / "a.png")["contrast"] == 0


@pytest.mark.parametrize(
    "pixel, strict, script",
    [
        ((5, 5, 5), True, True),
        ((5, 5, 6), False, True),
        ((6, 5, 5), False, True),
        ((5, 6, 5), False, False),
        ((5, 6, 7), False, False),
    ],
)
def test_the_two_gray_rules(tmp_path, pixel, strict, script):
    pixels = np.full((150, 150, 3), 5, dtype=np.uint8)
    pixels[149, 148] = pixel
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = photograph_statistics(tmp_path / "a.png")
    assert (found["gray_strict"], found["gray_script"]) == (strict, script)


def test_one_pixel_of_each_kind_does_not_make_colour(tmp_path):
    # Red differs in one pixel and blue in another: the script's rule looks at one pixel at a time.
    Image.fromarray(np.array([[[1, 0, 0], [0, 0, 1]]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert photograph_statistics(tmp_path / "a.png")["gray_script"]


def test_hash_is_of_the_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "gray.png")
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "rgb.bmp")
    hashes = {photograph_statistics(tmp_path / name)["sha1"] for name in ("gray.png", "rgb.bmp")}
    assert hashes == {hashlib.sha1(b"20 30 1 " + pixels.tobytes()).hexdigest()}
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(colour).save(tmp_path / "colour.tif")
    hashes = {photograph_statistics(tmp_path / name)["sha1"] for name in ("colour.png", "colour.tif")}
    assert hashes == {hashlib.sha1(b"20 30 3 " + colour.tobytes()).hexdigest()}
    flat = np.zeros((20, 30), dtype=np.uint8)
    Image.fromarray(flat).save(tmp_path / "wide.png")
    Image.fromarray(flat.T.copy()).save(tmp_path / "high.png")
    assert len({photograph_statistics(tmp_path / name)["sha1"] for name in ("wide.png", "high.png")}) == 2


def test_repairs_and_measures_after_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "turned.png", exif=exif)
    found = photograph_statistics(tmp_path / "turned.png")
    assert (found["height"], found["width"], found["repairs"]) == (30, 20, images.UPRIGHT)
    (tmp_path / "deep.png").write_bytes(
        cv2.imencode(".png", np.full((4, 5), 65535, dtype=np.uint16))[1].tobytes()
    )
    found = photograph_statistics(tmp_path / "deep.png")
    assert (found["mean"], found["mode"], found["repairs"]) == (255, "I;16", images.SIXTEEN_BITS)
    assert found["gray_strict"]
    clear = np.zeros((4, 5, 4), dtype=np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = photograph_statistics(tmp_path / "clear.png")
    assert (found["mean"], found["mode"], found["repairs"]) == (255, "RGBA", images.ON_WHITE)
    Image.fromarray(clear[..., :3]).convert("CMYK").save(tmp_path / "print.jpg")
    assert photograph_statistics(tmp_path / "print.jpg")["repairs"] == images.CMYK


def test_pixels_without_a_known_white(tmp_path):
    Image.fromarray(np.zeros((4, 5), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(PhotographError, match="floating-point"):
        photograph_statistics(tmp_path / "a.tif")


@pytest.fixture
def faulty(tmp_path, photographs):
    shutil.copytree(photographs, tmp_path / "faulty")
    folder = tmp_path / "faulty/w_1"
    (folder / "00.jpg").write_bytes(b"")
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:60])
    catalog = open_catalog(tmp_path / "faulty")
    (folder / "02.png").unlink()
    return catalog


def test_faults(faulty):
    found = statistics(faulty)
    faults = found[found["fault"] != ""]
    assert faults["image"].tolist() == ["w_1/00.jpg", "w_1/01.png", "w_1/02.png"]
    assert faults["fault"].tolist()[::2] == ["the file is empty", "the file is missing"]
    assert faults["bytes"].fillna(-1).tolist() == [0, 60, -1]
    measures = ["height", "mode", "gray_strict", "contrast", "sha1"]
    assert faults[measures].isna().all(axis=None) and found.drop(faults.index)[measures].notna().all(
        axis=None
    )


def decoded(monkeypatch):
    """Count the photographs that are decoded from here on."""
    paths = []
    measure = module.photograph_statistics
    monkeypatch.setattr(module, "photograph_statistics", lambda path: paths.append(path) or measure(path))
    return paths


def test_each_photograph_is_decoded_once(faulty, monkeypatch):
    paths = decoded(monkeypatch)
    first = statistics(faulty)
    assert sorted(paths) == sorted(faulty.table["path"])
    paths.clear()
    pd.testing.assert_frame_equal(statistics(faulty), first, check_exact=True)
    assert len(paths) == 3, "only what couldn't be read is tried again"
    paths.clear()
    part = faulty.where((first["fault"] == "") & (first["height"] > 50))
    assert len(statistics(part)) == len(part) and paths == [], "a part of the catalog needs no new pass"
    part = part.where(np.arange(len(part)) < 3)
    statistics(part, cache=False)
    assert len(paths) == 3


def test_a_changed_file_is_decoded_again(faulty, monkeypatch):
    statistics(faulty)
    path = faulty.table["path"][10]
    Image.fromarray(np.full((3, 3), 9, dtype=np.uint8)).save(path)
    paths = decoded(monkeypatch)
    assert statistics(faulty)["mean"][10] == 9 and path in paths
    monkeypatch.setattr(images, "MAX_PIXELS", 8)
    assert "limit of 8" in statistics(faulty)["fault"][10]


@pytest.mark.parametrize("damage", [b"", b"path\n", b"\xff\xfe\0", b"path,modified,height\n1,x,y\n", None])
def test_a_damaged_cache_is_measured_anew(photographs, cache, damage):
    catalog = open_catalog(photographs)
    first = statistics(catalog)
    (file,) = cache.glob("*.csv")
    file.write_bytes(file.read_bytes()[:-50] if damage is None else damage)
    pd.testing.assert_frame_equal(statistics(catalog), first, check_exact=True)
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_a_cache_that_cant_be_written(photographs, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WHALE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="can't be kept"):
        assert len(statistics(open_catalog(photographs))) == 60


def test_an_interrupted_pass_keeps_what_it_has(photographs, monkeypatch):
    catalog, measure = open_catalog(photographs), module.photograph_statistics
    stop = catalog.table["path"][40]

    def interrupted(path):
        if path == stop:
            raise KeyboardInterrupt
        return measure(path)

    monkeypatch.setattr(module, "photograph_statistics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statistics(catalog, workers=2)
    monkeypatch.setattr(module, "photograph_statistics", measure)
    paths = decoded(monkeypatch)
    statistics(catalog)
    assert len(paths) == 20


def test_a_large_photograph_in_bounded_memory(tmp_path):
    # 64 million pixels are 256 MB in PIL; a plain np.std of them takes 1.5 GB more.
    Image.new("L", (8000, 8000), 7).save(tmp_path / "l.png")
    Image.new("RGB", (8000, 8000), (1, 2, 3)).save(tmp_path / "rgb.png", compress_level=1)
    code = (
        "import resource, sys; from whalelib.data import photograph_statistics\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(photograph_statistics(sys.argv[1])['mean'])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    for name, mean in (("l.png", 7), ("rgb.png", 2)):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert float(out[0]) == mean and float(out[1]) < 400, f"{name}: {out[1]} MB"


def test_sharpness_falls_with_blur_and_is_the_variance_of_the_laplacian(tmp_path):
    (tmp_path / "w_1").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    for name, sigma in enumerate((0.01, 1, 3)):
        Image.fromarray(cv2.GaussianBlur(pixels, (0, 0), sigma)).save(tmp_path / "w_1" / f"{name}.png")
    found = sharpness(open_catalog(tmp_path), size=(40, 60), workers=2)
    assert found.shape == (3,) and found[0] > found[1] > found[2] > 0
    x = np.pad(pixels.astype(float), 1, mode="reflect")
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    assert found[0] == pytest.approx(laplacian.var())


def test_not_slower_than_the_plain_loop(tmp_path):
    # The ratio that a person sees is three and more; a test on a busy machine asks for less.
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:700, :1050]
    (tmp_path / "w_1").mkdir()
    for number in range(12):
        pixels = np.stack([x / 5 + number, y / 4, (x + y) / 9], -1) + rng.normal(0, 8, (700, 1050, 1))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / "w_1" / f"{number}.jpg")
    catalog = open_catalog(tmp_path)

    def seconds(work):
        times = []
        for _ in range(3):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return min(times)

    plain = seconds(lambda: [naive(path) for path in catalog.table["path"]])
    ours = seconds(lambda: statistics(catalog, cache=False))
    assert plain / ours > 1.1, f"{plain:.2f} s and {ours:.2f} s"
