"""Reading photographs: from a file, whatever it holds, to 8-bit RGB pixels or one clear error.

What is done to a file on the way, everywhere in the project:

* EXIF rotation is applied, so boxes, masks and key points are in pixels of the upright photograph;
* 16 bits a channel become 8 over the full range (65535 becomes 255); whole numbers of 32 bits are taken for
  16 when they fit, other numbers are refused, because nothing says which of them is white;
* transparent pixels are laid on white, as a page shows them;
* CMYK is converted without its colour profile; palettes and single channels become RGB as they are;
* of a file with several frames the first is read.

Damage that the format itself can't tell, such as a few changed bits inside a JPEG file, goes unnoticed.
"""

import math
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
Image.init()
# A closed list: PIL would hand PostScript to an interpreter. Not every build of PIL reads them all.
FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
)
SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".webp",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
        ".ppm",
        ".pgm",
        ".jp2",
        ".avif",
    )
)

SIXTEEN_BITS = "16 bits a channel scaled to 8"
UPRIGHT = "turned upright as its EXIF says"
ON_WHITE = "transparent pixels laid on white"
CMYK = "CMYK converted without its colour profile"

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]


class PhotographError(ValueError):
    """A file that can't be read as a photograph: ``path`` and ``reason``."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(str(path), reason)
        self.path, self.reason = Path(path), reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@dataclass
class Decoded:
    """A photograph as its file stores it, decoded and upright.

    ``height`` and ``width`` are the photograph's, of which ``image`` may be a reduced version; ``mode`` is
    PIL's name of the stored pixels; ``repairs`` says what was done that changes what one sees.
    """

    image: Image.Image
    height: int
    width: int
    mode: str
    repairs: list[str]


def decode(path: Path | str, size: tuple[int, int] | None = None, box: Box | None = None) -> Decoded:
    """Decode a photograph and turn it upright, keeping its stored mode.

    Args:
        path: the file.
        size: the (H, W) that the caller is going to resize to. A large JPEG file is then decoded at 1/2, 1/4
            or 1/8, never below what ``size`` needs; several times faster.
        box: the part (x0, y0, x1, y1) that is going to have this size; the whole by default.

    Raises:
        PhotographError: missing, not a plain file, empty, not a photograph, truncated, more than
            ``MAX_PIXELS``, or nothing of it lies in the box.
    """
    try:
        _check_file(path)
        with Image.open(path, formats=FORMATS) as image:
            return _decode(path, image, size, box)
    except PhotographError:
        raise
    except Exception as error:  # PIL's plugins raise all kinds on damaged files
        raise PhotographError(path, _reason(error)) from error


def _check_file(path: Path | str) -> None:
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device or pipe"
        raise PhotographError(path, f"{what}, not a file")
    if found.st_size == 0:
        raise PhotographError(path, "the file is empty")


def _decode(path: Path | str, image: Image.Image, size: tuple[int, int] | None, box: Box | None) -> Decoded:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PhotographError(path, f"{width} x {height} pixels, more than the limit of {MAX_PIXELS:,}")
    mode, stored_as = image.mode, str([tile.args for tile in image.tile])
    repairs = [SIXTEEN_BITS] if re.search(r";16|, 65535\)", stored_as) else []
    turned = _orientation(image)
    if turned != 1:
        repairs.append(UPRIGHT)
    if image.format in ("JPEG", "MPO"):
        sideways = turned >= 5
        upright = (width, height) if sideways else (height, width)
        if size is not None:
            x0, y0, x1, y1 = _within(path, box, *upright)
            least = (upright[0] * size[0] / (y1 - y0), upright[1] * size[1] / (x1 - x0))
            image.draft(None, tuple(math.ceil(n) for n in (least if sideways else least[::-1])))
    image.load()
    # Asked again, because for some formats (TIFF) PIL has turned the pixels itself.
    turn = _orientation(image)
    if turn >= 5:
        width, height = height, width
    if turn != 1:
        image = image.transpose(_TURNS[turn])
    return Decoded(image, height, width, mode, repairs)


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # a damaged EXIF block says nothing, and the pixels are whole
        orientation = image.getexif().get(_ORIENTATION)
        return orientation if orientation in _TURNS else 1
    return 1


def _within(path: Path | str, box: Box | None, height: int, width: int) -> Box:
    """Return the part of the box that lies in the photograph."""
    if box is None:
        return 0, 0, width, height
    x0, y0, x1, y1 = (float(n) for n in box)
    inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if not (inside[0] < inside[2] and inside[1] < inside[3]):
        raise PhotographError(path, f"nothing of its {width} x {height} pixels lies in the box {box}")
    return inside


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a photograph ({', '.join(FORMATS)})"
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than the limit of {min(MAX_PIXELS, 2 * Image.MAX_IMAGE_PIXELS):,}"
    return f"truncated or damaged ({str(error) or type(error).__name__})"


def photograph_size(path: Path | str) -> tuple[int, int]:
    """Return (H, W) of the upright photograph, from the file's header.

    Raises:
        PhotographError: the file can't be read as a photograph.
    """
    try:
        _check_file(path)
        with Image.open(path, formats=FORMATS) as image:
            turned = _orientation(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, Image.DecompressionBombError) as error:
        raise PhotographError(path, _reason(error)) from error


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Convert a decoded image to mode RGB, and say what was changed on the way ("" for nothing that shows).

    Raises:
        ValueError: pixels that have no known white.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white")
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("32-bit pixels beyond the range of 16 bits have no known white")
        pixels = (pixels.astype(np.uint32) * 255 + 32767) // 65535
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB"), SIXTEEN_BITS
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        page = Image.new("RGB", image.size, "white")
        page.paste(rgba, mask=alpha)
        return page, ON_WHITE if alpha.getextrema()[0] < 255 else ""
    if image.mode == "RGB":
        return image, ""
    return image.convert("RGB"), CMYK if image.mode == "CMYK" else ""


def read_image(
    path: Path | str, size: tuple[int, int] | None = None, mode: str = "RGB", box: Box | None = None
) -> np.ndarray:
    """Read a photograph, or a part of it, at any size.

    Args:
        path: the file.
        size: (H, W) to resize to, whatever the shape (bilinear, antialiased); None keeps the pixels as they
            are. A large JPEG file is decoded at a reduced size first: values differ slightly from those of a
            resized full decode.
        mode: "RGB", or "L" for luma (ITU-R 601).
        box: x0, y0, x1, y1 in pixels of the upright photograph, cut where it leaves the photograph. Without
            ``size`` it is widened to whole pixels.

    Returns:
        (H, W, 3) uint8 RGB, or (H, W) uint8 with mode "L".

    Raises:
        PhotographError: the file can't be read as a photograph, or nothing of it lies in the box.
        ValueError: another mode, or a size below one pixel.
    """
    if mode not in ("RGB", "L"):
        raise ValueError(f"mode = {mode!r}: choose 'RGB' or 'L'")
    if size is not None and min(size) < 1:
        raise ValueError(f"size = {size!r}: give (H, W) in pixels")
    found = decode(path, size, box)
    image, down, across = found.image, found.image.height / found.height, found.image.width / found.width
    x0, y0, x1, y1 = _within(path, box, found.height, found.width)
    x0, y0, x1, y1 = x0 * across, y0 * down, min(x1 * across, image.width), min(y1 * down, image.height)
    left, top = math.floor(x0), math.floor(y0)
    if box is not None:
        image = image.crop((left, top, math.ceil(x1), math.ceil(y1)))
    try:
        if image.mode != mode or image.has_transparency_data:
            image = to_rgb(image)[0].convert(mode)
    except ValueError as error:
        raise PhotographError(path, str(error)) from error
    if size is not None:
        part = (x0 - left, y0 - top, x1 - left, y1 - top)
        image = image.resize(size[::-1], Image.Resampling.BILINEAR, box=part)
    return np.array(image)
