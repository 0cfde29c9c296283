"""Statistics of photographs: size, colour and contrast, from one pass that also finds the faulty files.

The source of Tables 2.3 and 2.4 and of Figures 2.2 and 2.3 (report, section 2.2), for any catalog.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pandas as pd
import PIL
from PIL import Image
from tqdm import tqdm

from whalelib.data import images
from whalelib.files import replacing
from whalelib.run import place

if TYPE_CHECKING:
    from whalelib.data.catalog import Catalog

MEASURES = {
    "height": "Int64",
    "width": "Int64",
    "bytes": "Int64",
    "mode": "str",
    "gray_strict": "boolean",
    "gray_script": "boolean",
    "mean": "float64",
    "contrast": "float64",
    "repairs": "str",
    "sha1": "str",
}
_VERSION = 2
_STRIP_PIXELS = 4_000_000
_MANY = 300
_LEVELS = np.arange(256)


def photograph_statistics(path: Path | str) -> dict[str, object]:
    """Measure one photograph, converted to 8-bit RGB as :mod:`whalelib.data.images` says.

    Sums are exact integers, so ``mean`` and ``contrast`` carry no more error than their last operation.
    Memory stays near 4 bytes a pixel (8 when the photograph has to be turned) plus one strip.

    Returns:
        ``height`` and ``width`` (upright, pixels), ``mode`` (PIL's, as stored), ``mean`` and ``contrast``
        (standard deviation; equations 2.1 and 2.2) of the values 0 to 255 of all channels; ``gray_strict``:
        red, green and blue agree in every pixel (section 2.2.2); ``gray_script``: the rule of the script
        behind Table 2.4, by which a pixel has colour only where red differs from green *and* green from blue;
        ``sha1`` of the size and the pixels (of one channel where they are strictly gray), the same for copies
        whatever the file; ``repairs``: what was changed so as to show, mostly "".

    Raises:
        PhotographError: the file can't be read as a photograph.
    """
    found = images.decode(path)
    image, height, width = found.image, found.height, found.width
    repairs = dict.fromkeys(found.repairs)
    one_channel = Image.getmodebase(image.mode) == "L"
    plain = image.mode == "L" and not image.has_transparency_data
    counts, strict, script = np.zeros(256, dtype=np.int64), True, True
    gray, colour = (hashlib.sha1(f"{height} {width} {n} ".encode(), usedforsecurity=False) for n in (1, 3))
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        try:
            strip, repair = (strip, "") if plain else images.to_rgb(strip)
        except ValueError as error:
            raise images.PhotographError(path, str(error)) from error
        repairs |= {repair: None} if repair else {}
        strip_strict = strip_script = True
        if not one_channel:
            pixels = strip.tobytes()
            strip_strict, strip_script = _gray(pixels)
            if rows < height or not strip_strict:
                colour.update(pixels)
        if strip_strict:
            level = strip.getchannel(0)
            counts += 3 * np.array(level.histogram())
            gray.update(level.tobytes())
        else:
            counts += np.array(strip.histogram()).reshape(3, 256).sum(axis=0)
        strict, script = strict and strip_strict, script and strip_script
    n, total, squares = (int((counts * _LEVELS**power).sum()) for power in range(3))
    return {
        "height": height,
        "width": width,
        "mode": found.mode,
        "gray_strict": strict,
        "gray_script": script,
        "mean": total / n,
        "contrast": math.sqrt(n * squares - total * total) / n,
        "sha1": (gray if strict else colour).hexdigest(),
        "repairs": "; ".join(repairs),
    }


def _gray(pixels: bytes) -> tuple[bool, bool]:
    """Return whether RGB pixels are gray by the strict rule and by the script's."""
    every = np.frombuffer(pixels, dtype=np.uint8).reshape(-1, 3)
    # A few pixels mostly show that a photograph has colour; only a gray one needs them all.
    for some in (every[::101], every):
        red, green, blue = some.T
        first, second = red != green, green != blue
        if (first & second).any():
            return False, False
    return not (first.any() or second.any()), True


def statistics(catalog: "Catalog", workers: int | None = None, cache: bool = True) -> pd.DataFrame:
    """Measure every photograph of a catalog, decoding each once and in parallel.

    Threads, not processes: PIL, NumPy and hashlib release Python's lock while they work, so threads use all
    cores without the start-up of processes, and nothing has to be forked or pickled in a notebook.

    Args:
        catalog: the photographs.
        workers: threads; default one a core, 16 at the most.
        cache: keep results in ``$WHALE_CACHE`` (default ``data/cache``), by path, size and time of change of
            each
            file: a part of the catalog, or a catalog with a few new photographs, reuses them. Faults aren't
                kept.

    Returns:
        One row a photograph, in the catalog's order: ``image``, ``split``, the measures of
        :func:`photograph_statistics` with ``bytes`` (size of the file), and ``fault``: "", or why the file
        can't be read; the measures are then missing.
    """
    paths = catalog.table["path"].tolist()
    stamps = {path: _stamp(path) for path in paths}
    file = place("WHALE_CACHE", "data/cache") / f"statistics-{cache_key(catalog.root)}.csv"
    found = {}
    if cache:
        kept = _read_cache(file)
        found = {path: kept[path] for path in stamps if path in kept and kept[path]["stamp"] == stamps[path]}
    missing = [path for path in stamps if path not in found]
    try:
        for path, record in zip(missing, _measure(missing, workers or _cores()), strict=True):
            found[path] = {"stamp": stamps[path], **record}
    finally:  # an interrupted pass keeps what it has measured
        if cache and missing:
            good = {path: record for path, record in found.items() if "fault" not in record}
            _write_cache(file, kept | good)
    blank = {"repairs": "", "fault": ""}
    rows = [blank | found[path] | {"bytes": stamps[path][0]} for path in paths]
    records = pd.DataFrame(rows, columns=[*MEASURES, "fault"]).astype(MEASURES | {"fault": "str"})
    return pd.concat([catalog.table[["image", "split"]].reset_index(drop=True), records], axis=1)


def sharpness(
    catalog: "Catalog", size: tuple[int, int] = (256, 512), workers: int | None = None
) -> np.ndarray:
    """Return how sharp each photograph is: (N,) float64, the variance of its Laplacian.

    Blur takes away the differences between neighbouring pixels, and so the variance; noise adds to it. All
    photographs are brought to one size first, since the same detail has steeper edges in fewer pixels.

    Args:
        catalog: the photographs, all readable (see ``Catalog.verified``).
        size: (H, W) in pixels.
        workers: threads; default one a core, 16 at the most.
    """

    def measure(path: str) -> float:
        luma = images.read_image(path, size, mode="L")
        return float(cv2.Laplacian(luma, cv2.CV_64F).var())

    with ThreadPoolExecutor(workers or _cores()) as pool:
        return np.fromiter(pool.map(measure, catalog.table["path"]), float, len(catalog))


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 16)


def _measure(paths: list[str], workers: int) -> Iterator[dict[str, object]]:
    """Yield the record of each path, in order."""
    pool = ThreadPoolExecutor(workers)
    try:
        records = pool.map(_record, paths)
        bar = {"unit": "photo", "mininterval": 1, "leave": False, "disable": len(paths) < _MANY}
        yield from tqdm(records, "reading photographs", len(paths), **bar)
    finally:
        pool.shutdown(cancel_futures=True)


def _record(path: str) -> dict[str, object]:
    try:
        return photograph_statistics(path)
    except images.PhotographError as error:
        return {"fault": error.reason}


def _stamp(path: str) -> tuple[int | None, int | None]:
    """Return a file's size and time of change (nanoseconds)."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None, None
    return found.st_size, found.st_mtime_ns


def cache_key(root: Path) -> str:
    """Return what tells the kept measures of one folder's photographs from another's."""
    # Another PIL may decode to other pixels.
    parts = (str(root), _VERSION, PIL.__version__, images.MAX_PIXELS)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read_cache(file: Path) -> dict[str, dict[str, object]]:
    """Return path -> record; empty when there is no whole cache."""
    types = {name: {"Int64": "int64", "boolean": "bool"}.get(kind, kind) for name, kind in MEASURES.items()}
    numbers = [name for name, kind in types.items() if kind == "float64"]
    try:
        # Read as text first: not every version of pandas reads a float64 back to the last bit.
        text = types | {"path": "str", "modified": "int64"} | dict.fromkeys(numbers, "str")
        frame = pd.read_csv(file, dtype=text, keep_default_na=False)[list(text)]
        frame[numbers] = frame[numbers].map(float)
    except (OSError, ValueError, KeyError):
        return {}
    if not frame["sha1"].str.fullmatch("[0-9a-f]{40}").all():  # the last column: the file was cut
        return {}
    records = frame.to_dict("records")
    return {row.pop("path"): {"stamp": (row["bytes"], row.pop("modified")), **row} for row in records}


def _write_cache(file: Path, records: dict[str, dict[str, object]]) -> None:
    rows = [
        {**row, "path": p, "bytes": row["stamp"][0], "modified": row["stamp"][1]}
        for p, row in records.items()
    ]
    try:
        with replacing(file) as part:
            pd.DataFrame(rows, columns=["path", "modified", *MEASURES]).to_csv(part, index=False)
    except OSError as error:
        warnings.warn(f"the statistics can't be kept in {file}: {error}", stacklevel=3)
