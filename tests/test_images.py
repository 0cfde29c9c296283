import io
import os
import pickle
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from whalelib.data import images
from whalelib.data.images import PhotographError, decode, read_image


def noise(height=60, width=90, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1).astype(
        np.uint8
    )


def stored(path, pixels, mode=None, **options):
    Image.fromarray(pixels, mode).save(path, **options) if mode else Image.fromarray(pixels).save(
        path, **options
    )
    return path


def encoded(suffix, pixels):
    return cv2.imencode(suffix, pixels)[1].tobytes()


def test_plain_photograph_is_read_as_it_is(tmp_path):
    pixels = noise()
    read = read_image(stored(tmp_path / "a.png", pixels))
    assert read.dtype == np.uint8 and read.flags.writeable and read.flags.c_contiguous
    np.testing.assert_array_equal(read, pixels)


def test_one_pixel(tmp_path):
    path = stored(tmp_path / "a.png", np.array([[[1, 2, 3]]], dtype=np.uint8))
    assert read_image(path).tolist() == [[[1, 2, 3]]]
    assert read_image(path, size=(3, 5)).shape == (3, 5, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp", "gif", "ppm", "jp2"])
def test_formats(tmp_path, suffix):
    assert read_image(stored(tmp_path / f"a.{suffix}", smooth(40, 60))).shape == (40, 60, 3)


# Faults


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp", "gif", "ppm", "jp2"])
@pytest.mark.parametrize("left", [0.95, 0.5, 0.02])
def test_truncated(tmp_path, suffix, left):
    path = stored(tmp_path / f"a.{suffix}", noise(100, 150))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(PhotographError) as error:
        read_image(path)
    assert error.value.path == path and error.value.reason
    assert str(error.value) == f"{path}: {error.value.reason}"


def test_empty(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(PhotographError, match="empty"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "content", [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg xmlns='x'/>", bytes(5000)]
)
def test_not_a_photograph(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(PhotographError, match="not a photograph"):
        read_image(tmp_path / "a.jpg")


def test_postscript_is_never_interpreted(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(PhotographError, match="not a photograph"):
        read_image(tmp_path / "a.jpg")


def test_missing_folder_and_pipe(tmp_path):
    with pytest.raises(PhotographError, match="missing"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(PhotographError, match="a folder"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(PhotographError, match="pipe"):
        read_image(tmp_path / "pipe.jpg")
    with pytest.raises(PhotographError):
        read_image("a\0b.jpg")


def test_decompression_bomb(tmp_path, monkeypatch):
    # 400 million pixels in a file of 400 kB, refused before any of them is decoded.
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)
    assert path.stat().st_size < 500_000
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(PhotographError, match="pixels"):
        read_image(path)
    Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(PhotographError, match=r"9000 x 9000 pixels, more than the limit of 64,000,000"):
        read_image(path)
    Image.new("1", (80, 60)).save(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 80 * 60)
    assert read_image(path).shape == (60, 80, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 80 * 60 - 1)
    with pytest.raises(PhotographError, match="80 x 60 pixels"):
        read_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_error_survives_a_process_border():
    error = pickle.loads(pickle.dumps(PhotographError("a.jpg", "empty")))
    assert str(error) == "a.jpg: empty" and error.reason == "empty"


# Repairs


def test_16_bits_are_scaled_not_cut(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65408, 65535]], dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(encoded(".png", values))
    (tmp_path / "a.pgm").write_bytes(encoded(".pgm", values))
    (tmp_path / "a.tif").write_bytes(encoded(".tiff", values))
    for name in ("a.png", "a.pgm", "a.tif"):
        read = read_image(tmp_path / name)
        assert read[0, :, 0].tolist() == np.rint(values[0] / 257).astype(int).tolist(), name
        assert (read == read[..., :1]).all()
        assert decode(tmp_path / name).repairs == [images.SIXTEEN_BITS]


@pytest.mark.parametrize("suffix", [".png", ".ppm", ".tiff"])
def test_16_bits_in_three_channels(tmp_path, suffix):
    values = noise().astype(np.uint16) * 257
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(suffix, values[..., ::-1]))
    np.testing.assert_array_equal(read_image(path), values // 257)
    assert decode(path).repairs == [images.SIXTEEN_BITS]


def test_pixels_without_a_known_white(tmp_path):
    stored(tmp_path / "a.tif", np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5))
    with pytest.raises(PhotographError, match="floating-point"):
        read_image(tmp_path / "a.tif")
    stored(tmp_path / "a.tif", np.full((4, 5), 70000, dtype=np.int32))
    with pytest.raises(PhotographError, match="32-bit"):
        read_image(tmp_path / "a.tif")
    stored(tmp_path / "a.tif", np.full((4, 5), 65535, dtype=np.int32))
    assert (read_image(tmp_path / "a.tif") == 255).all()


def test_cmyk(tmp_path):
    Image.fromarray(smooth(40, 60)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    read = read_image(tmp_path / "a.jpg")
    assert np.abs(read.astype(int) - smooth(40, 60)).mean() < 4
    assert images.to_rgb(decode(tmp_path / "a.jpg").image)[1] == images.CMYK


def test_palette(tmp_path):
    palette = Image.fromarray(smooth(40, 60)).quantize(64)
    palette.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(palette.convert("RGB")))
    assert images.to_rgb(decode(tmp_path / "a.png").image)[1] == ""


def test_transparent_pixels_lie_on_white(tmp_path):
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[..., 3] = [[0, 128, 255], [0, 0, 0]]
    read = read_image(stored(tmp_path / "a.png", pixels))
    assert read[..., 0].tolist() == [[255, 127, 0], [255, 255, 255]]
    assert read_image(tmp_path / "a.png", mode="L").tolist() == read[..., 0].tolist()
    assert images.to_rgb(decode(tmp_path / "a.png").image)[1] == images.ON_WHITE


def test_opaque_alpha_is_no_repair(tmp_path):
    pixels = np.dstack([noise(), np.full((60, 90), 255, dtype=np.uint8)])
    np.testing.assert_array_equal(read_image(stored(tmp_path / "a.png", pixels)), pixels[..., :3])
    assert images.to_rgb(decode(tmp_path / "a.png").image)[1] == ""


def test_transparent_gray_palette_and_key(tmp_path):
    gray = np.array([[10, 200]], dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "key.png", transparency=10)
    assert read_image(tmp_path / "key.png")[0, :, 0].tolist() == [255, 200]
    assert read_image(tmp_path / "key.png", mode="L").tolist() == [[255, 200]]
    Image.fromarray(np.dstack([gray, [[0, 255]]]).astype(np.uint8), "LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0, :, 0].tolist() == [255, 200]
    palette = Image.fromarray(smooth(8, 8)).quantize(4)
    palette.save(tmp_path / "p.png", transparency=int(np.asarray(palette)[0, 0]))
    assert read_image(tmp_path / "p.png")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, suffix, orientation):
    upright = smooth(40, 64)
    # How the camera stored it: the inverse of what a viewer has to do.
    as_stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"lossless": True} if suffix == "webp" else {"quality": 98} if suffix == "jpg" else {}
    path = stored(tmp_path / f"a.{suffix}", np.ascontiguousarray(as_stored), exif=exif, **quality)
    read = read_image(path)
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < 3
    found = decode(path)
    assert (found.height, found.width) == (40, 64)
    assert found.repairs == ([] if orientation == 1 else [images.UPRIGHT])


def test_damaged_exif_says_nothing(tmp_path):
    path = stored(tmp_path / "a.jpg", smooth(40, 64), exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(path).shape == (40, 64, 3)


def test_first_frame(tmp_path):
    first, second = Image.fromarray(noise(seed=1)), Image.fromarray(noise(seed=2))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.asarray(first))


# Sizes, modes, boxes


def test_luma(tmp_path):
    path = stored(tmp_path / "a.png", smooth(40, 60))
    luma = smooth(40, 60) @ [0.299, 0.587, 0.114]
    assert np.abs(read_image(path, mode="L") - luma).max() <= 1
    assert read_image(path, size=(20, 30), mode="L").shape == (20, 30)
    path = stored(tmp_path / "b.png", noise(channels=1))
    np.testing.assert_array_equal(read_image(path, mode="L"), noise(channels=1))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("box", [None, (100, 40, 600, 300), (10.5, 20.25, 300.75, 640)])
def test_reduced_decoding_is_near_the_full_one(tmp_path, orientation, box):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(tmp_path / "a.jpg", smooth(700, 1050), exif=exif, quality=95)
    full = Image.fromarray(read_image(path))
    for size in ((64, 128), (128, 64), (30, 700)):
        expected = full.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
        read = read_image(path, size=size, box=box)
        assert read.shape == (*size, 3)
        assert np.abs(read.astype(int) - np.asarray(expected)).max() <= 6


def test_a_large_jpeg_is_decoded_reduced(tmp_path):
    path = stored(tmp_path / "a.jpg", smooth(800, 1200))
    assert decode(path, (100, 150)).image.size == (150, 100)
    assert decode(path, (101, 150)).image.size == (300, 200)
    assert decode(path, (100, 150), (0, 0, 600, 400)).image.size == (300, 200)
    assert (decode(path, (100, 150)).height, decode(path, (100, 150)).width) == (800, 1200)


def test_box(tmp_path):
    pixels = noise(60, 90)
    path = stored(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_image(path, box=(10, 20, 40, 50)), pixels[20:50, 10:40])
    np.testing.assert_array_equal(read_image(path, box=(10.2, 20.9, 39.1, 49.5)), pixels[20:50, 10:40])
    np.testing.assert_array_equal(read_image(path, box=(-5, 40, 20, 999)), pixels[40:, :20])
    np.testing.assert_array_equal(read_image(path, size=(30, 30), box=(10, 20, 40, 50)), pixels[20:50, 10:40])
    assert read_image(path, size=(8, 8), box=(89.9, 59.9, 95, 95)).shape == (8, 8, 3)


@pytest.mark.parametrize("box", [(90, 0, 99, 9), (20, 20, 20, 30), (30, 9, 20, 19), (float("nan"), 0, 9, 9)])
def test_nothing_in_the_box(tmp_path, box):
    path = stored(tmp_path / "a.png", noise(60, 90))
    for size in (None, (8, 8)):
        with pytest.raises(PhotographError, match="lies in the box"):
            read_image(path, size=size, box=box)


def test_wrong_arguments(tmp_path):
    path = stored(tmp_path / "a.png", noise())
    with pytest.raises(ValueError, match="mode"):
        read_image(path, mode="BGR")
    with pytest.raises(ValueError, match="size"):
        read_image(path, size=(0, 5))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "gif"])
def test_damage_is_read_or_told_but_never_crashes(tmp_path, suffix):
    buffer = io.BytesIO()
    Image.fromarray(smooth(50, 70)).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            data = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(data), 5):
                data[place] = rng.integers(256)
            path.write_bytes(data)
            try:
                assert read_image(path).dtype == np.uint8
            except PhotographError as error:
                assert error.reason
