"""ImageNet weights of the solutions' networks: fetch them, check them, find them.

``python -m whalelib.weights [NAME ...] [--folder data/weights] [--from FOLDER]``. The files are those of
pretrainedmodels, from its address or from copies of theirs elsewhere: data.lip6.fr's certificate ran out in 2022.
Exit code: 0 all went well, 1 some could not be had, 2 the request can't be met, 130 interrupted.
"""

import argparse
import http
import http.client
import os
import shlex
import shutil
import signal
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from whalelib.files import locked, replacing, sha256_of
from whalelib.models import DENSENET121_URL, SENET154_URL, load_checked, second_place_url
from whalelib.run import place

KAGGLE_INPUT = Path("/kaggle/input")
LIMIT = 10**9
TIMEOUT = 30
CHUNK = 2**18

MONAI = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/"
TORCHVISION = "https://download.pytorch.org/models/"
# MONAI keeps the same files and lists their whole sums (tests/testing_data/data_config.json); timm has some saved anew.
MIRRORS = {
    "senet154": (
        f"{MONAI}senet154-c7b49a05.pth",
        f"{TIMM}v0.1-weights/legacy_senet154-e9eb9fe6.pth",
    ),
    "resnet101": (f"{TORCHVISION}resnet101-63fe2227.pth",),
    "se_resnet101": (
        f"{TIMM}v0.1-cadene/se_resnet101-7e38fcc6.pth",
        f"{MONAI}se_resnet101-7e38fcc6.pth",
    ),
    "se_resnext101_32x4d": (
        f"{MONAI}se_resnext101_32x4d-3b2fe3d8.pth",
        f"{TIMM}v0.1-weights/legacy_se_resnext101_32x4d-37725eac.pth",
    ),
    "se_resnext50_32x4d": (f"{TIMM}v0.1-weights/legacy_se_resnext50_32x4d-f3651bad.pth",),
    "densenet121": (f"{TORCHVISION}densenet121-a639ec97.pth",),
}
NAMES = tuple(MIRRORS)
WHOLE_SUMS = (
    "c7b49a056b98b0bed65b0237c27acdead655e599669215573d357ad337460413",
    "7e38fcc64eff3225a3ea4e6081efeb6087e8d5a61c204d94edc2ed1aab0b9d70",
    "3b2fe3d8acb8de7d5976c4baf518f24a0237509272a69366e816682d3e57b989",
)
NOTES = {
    "densenet121-a639ec97.pth": "torchvision's numbers (74.4 % on ImageNet, it says), perhaps not pretrainedmodels'",
}


class Source(NamedTuple):
    """Where a file of weights is, its SHA-256 (the whole or the first digits), and what to know of it."""

    url: str
    sha256: str
    note: str = ""

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]


class WeightsError(ValueError):
    """Weights that can't be had; the message tells what was tried."""


def sources(name: str) -> tuple[Source, ...]:
    """Return where the weights of one of NAMES can be had, in the order of trying.

    Raises:
        ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"name = {name!r}: choose one of {', '.join(NAMES)}")
    own = {"senet154": SENET154_URL, "densenet121": DENSENET121_URL}.get(name) or second_place_url(name)
    # Here pretrainedmodels' file has the oldest format of torch, which weights_only refuses; torchvision's is new.
    urls = (*MIRRORS[name], own) if name == "resnet101" else (own, *MIRRORS[name])
    found = []
    for url in urls:
        file = url.rsplit("/", 1)[1]
        digits = Path(file).stem.rsplit("-", 1)[1]
        whole = next((sum_ for sum_ in WHOLE_SUMS if sum_.startswith(digits)), digits)
        found.append(Source(url, whole, NOTES.get(file, "")))
    return tuple(found)


def known(name: str) -> tuple[str, ...]:
    """Return the SHA-256, or its first digits, of each file that holds the weights of one of NAMES.

    Any may be given as ``sha256`` to the network's function in whalelib.models: the file must have one of them.
    """
    return tuple(dict.fromkeys(source.sha256 for source in sources(name)))


def variable(name: str) -> str:
    """Return the environment variable that gives the path of weights."""
    return f"WHALE_{name.upper()}"


def weights_folder() -> Path:
    """Return where weights are kept: ``$WHALE_WEIGHTS``, default ``data/weights``."""
    return place("WHALE_WEIGHTS", "data/weights")


def found(name: str) -> Path | None:
    """Return the weights of one of NAMES: what the environment's :func:`variable` says, else what was fetched, or None.

    On Kaggle those of a data set that is attached to the notebook are found too.

    Raises:
        ValueError: another name.
    """
    files = [source.file for source in sources(name)]
    if given := os.environ.get(variable(name)):
        return Path(given)
    folders = [weights_folder(), *sorted(KAGGLE_INPUT.glob("*"))]
    return next((path for at in folders for file in files if (path := at / file).is_file()), None)


def content(name: str) -> str:
    """Return a hash of the weights that :func:`found` finds, for the cache's keys; "" where there are none."""
    path = found(name)
    if path is None or not path.is_file():
        return str(path or "")  # a path that is wrong is told where it is loaded
    return _sum_of(path, path.stat().st_size, path.stat().st_mtime_ns)


@cache
def _sum_of(path: Path, *_: int) -> str:
    return sha256_of(path)[:16]


def pretrained(name: str) -> Path | None:
    """Return what :func:`found` does; where there are none a warning says that training starts from random ones."""
    weights = found(name)
    if weights is None:
        first = sources(name)[0]
        warnings.warn(
            f"{name} starts from random weights, with which it will learn little from so few photographs: run "
            f"`make weights`, or get {first.url} and set {variable(name)} to its path",
            stacklevel=3,
        )
    return weights


def fetch(name: str, folder: Path | None = None, local: Path | None = None) -> Path:
    """Return the path of weights, fetched if they are not there; their sum is right and nothing but tensors is in them.

    Args:
        name: one of NAMES.
        folder: where they are kept; default :func:`weights_folder`.
        local: a folder to copy them from, whatever the file's name there, instead of fetching them.

    Raises:
        WeightsError: none could be had, with the reason for each source.
        ValueError: another name.
    """
    folder, tried = folder or weights_folder(), []
    with locked(folder):
        for source in sources(name):
            path = folder / source.file
            if path.is_file() and not _fault(path, source.sha256):
                return path
        if local:
            return _copy(name, local, folder)
        for source in sources(name):
            try:
                path = _download(source, folder)
            except (OSError, http.client.HTTPException, WeightsError) as error:
                tried.append(f"{source.url}: {str(error) or type(error).__name__}")
            else:
                for reason in tried:
                    print(f"not from {reason}")
                if source.note:
                    print(f"{path.name}: {source.note}")
                return path
    lines = [
        f"{name} can't be had:",
        *tried,
        "Fetch one of these with a browser, and give its folder: --from FOLDER",
    ]
    raise WeightsError("\n  ".join(lines))


def _fault(path: Path, sha256: str) -> str:
    """Return what is wrong with a file of weights, or ""."""
    try:
        load_checked(path, sha256)
    except Exception as error:  # torch raises all kinds on what it can't load
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def _copy(name: str, local: Path, folder: Path) -> Path:
    """Copy weights from a folder in which a file has one of their sums."""
    there = sorted(local.glob("*.pth")) if local.is_dir() else []
    for path in there:
        found = sha256_of(path)
        for source in sources(name):
            if not found.startswith(source.sha256):
                continue
            if fault := _fault(path, source.sha256):
                raise WeightsError(f"{path}: {fault}")
            with replacing(folder / source.file) as part:
                shutil.copyfile(path, part)
            return folder / source.file
    sums = ", ".join(known(name))
    raise WeightsError(
        f"{name}: of the {len(there)} files *.pth in {local} none has a SHA-256 that begins with {sums}"
    )


def _download(source: Source, folder: Path) -> Path:
    """Download a file beside its place, check it, and put it there; what broke off is gone on with."""
    part = folder / f"{source.file}.part"
    resumed = part.is_file()
    _get(source.url, part)
    fault = _fault(part, source.sha256)
    if fault and resumed:  # the piece that lay there was of another file
        part.unlink()
        _get(source.url, part)
        fault = _fault(part, source.sha256)
    if fault:
        part.unlink()
        raise WeightsError(fault.removeprefix(f"{part}: "))
    os.replace(part, folder / source.file)
    return folder / source.file


def _get(url: str, part: Path) -> None:
    """Download to ``part``, after the bytes that are there already where the server can.

    Raises:
        OSError, http.client.HTTPException: no answer, an error, too large, or it broke off.
    """
    begun = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if begun and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is lacking; the sum tells whether it is right
        raise
    with answer:
        begun = begun if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        length = answer.headers.get("Content-Length")
        total = begun + int(length) if length else None
        if total and total > LIMIT:
            raise OSError(f"{total:,} bytes, more than {LIMIT:,}")
        bar = tqdm(
            desc=part.stem, total=total, initial=begun, unit="B", unit_scale=True, leave=False, disable=None
        )
        with part.open("ab" if begun else "wb") as file, bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                begun += len(chunk)
                if begun > LIMIT:
                    raise OSError(f"more than {LIMIT:,} bytes")
    if total and begun < total:
        raise OSError(f"broke off after {begun:,} of {total:,} bytes; the same command goes on from there")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m whalelib.weights", description="ImageNet weights of the networks.", allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--folder", type=Path, default=weights_folder(), help="where they are kept")
    parser.add_argument(
        "--from", dest="local", type=Path, help="a folder to take them from, instead of the net"
    )
    arguments = parser.parse_args(given)
    paths, code = {}, 0
    try:
        for name in arguments.names or NAMES:
            try:
                paths[name] = fetch(name, arguments.folder.absolute(), arguments.local)
                print(paths[name])
            except WeightsError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from there", file=sys.stderr)
        return 130
    for name, path in paths.items():
        print(f"export {variable(name)}={shlex.quote(str(path))}")
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
