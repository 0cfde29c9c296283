"""The contest on Kaggle: fetch its data, check and unpack them, send a submission; all with Kaggle's own client.

``python -m whalelib.data.kaggle fetch [--folder FOLDER]`` and ``... submit FILE [--message TEXT] [--send]``. The client
is the command ``kaggle``. It finds the account's credentials by itself: here it is only looked whether there are any,
and nothing that looks like one is left in what is shown. Exit code: 0 all went well, 2 the request can't be met, 130
interrupted.
"""

import argparse
import hashlib
import importlib.metadata
import io
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from whalelib.contest import (
    COLUMNS,
    Problem,
    SubmissionError,
    check_submission,
    read_submission,
)
from whalelib.data.catalog import KAGGLE_FOLDERS, CatalogError, kaggle_folder
from whalelib.data.layouts import NEW_WHALE, Problems, read_lines
from whalelib.files import locked, replacing
from whalelib.ledger import project_root

CONTEST = "humpback-whale-identification"
PAGE = f"https://www.kaggle.com/competitions/{CONTEST}"
MOUNTED = Path("/kaggle/input")
PARTS = ".parts"

EXPECTED = r"train\.csv|sample_submission\.csv|(train|test)/[\w-]+\.jpg"
INNER = ("train.zip", "test.zip")  # an older form of the archive has the photographs in archives of their own
MEMBER_LIMIT = 64 * 2**20
ARCHIVE_LIMIT = 16 * 2**30
SHOWN = 5

SECRET = re.compile(
    r"\bKGAT_\w+|\b[0-9a-f]{32}\b|(?<=Bearer )\S+|(?<=Basic )\S+|(?<=\?)\S+=\S+", re.IGNORECASE
)


class Counts(NamedTuple):
    """How many training photographs, labels (``new_whale`` among them) and test photographs there are."""

    train: int
    labels: int
    test: int


COUNTS = Counts(25_361, 5_005, 7_960)  # Table 2.1 of the report; 5,004 whales and new_whale
# labels_hash of what the report counts.
LABELS = "dc1e7f3b88bd3e6a66499f9ad98270bedbfa3dee2f87aefe4b93d23852fd6972"


class KaggleError(ValueError):
    """What keeps the data from being fetched or a submission from being sent."""


def home() -> Path:
    """Return the folder of the contest's data as ``open_catalog("kaggle")`` finds it, or where they belong."""
    try:
        return kaggle_folder()
    except CatalogError:
        return Path(os.environ.get("WHALE_KAGGLE") or project_root() / KAGGLE_FOLDERS[-1]).absolute()


def has_credentials() -> bool:
    """Return whether there are credentials in one of the places where the client looks; none is opened."""
    given = os.environ.get
    if given("KAGGLE_API_TOKEN") or (given("KAGGLE_USERNAME") and given("KAGGLE_KEY")):
        return True
    user = Path.home()
    folders = [user / ".kaggle", Path(given("XDG_CONFIG_HOME") or user / ".config") / "kaggle"]
    folders += [Path(named)] if (named := given("KAGGLE_CONFIG_DIR")) else []
    names = ("kaggle.json", "access_token", "access_token.txt", "credentials.json")
    return any((folder / name).is_file() for folder in folders for name in names)


def redacted(text: str) -> str:
    """Return a text without keys, tokens and the signatures of addresses."""
    for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return SECRET.sub("***", text)


def find_client() -> str | None:
    """Return the path of the client, on PATH or beside this Python, or None."""
    beside = Path(sys.executable).parent
    return shutil.which("kaggle") or shutil.which("kaggle", path=str(beside))


def client(*arguments: str) -> str:
    """Run the client; its progress is shown on a terminal.

    Returns:
        The last lines that it said, without credentials.

    Raises:
        KaggleError: there is no client, there are no credentials, or it failed; the message says what to do.
    """
    if not (program := find_client()):
        raise KaggleError("Kaggle's client isn't installed: pip install kaggle (the command is kaggle)")
    if not has_credentials():
        raise KaggleError(
            "no credentials for Kaggle: make a token at https://www.kaggle.com/settings and save it as "
            "~/.kaggle/access_token, or kaggle.json there. Kaggle's client alone reads them: never put them into a "
            "notebook"
        )
    said: deque[str] = deque(maxlen=40)
    shown = sys.stderr.isatty()
    with subprocess.Popen(
        [program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            # Progress ends its lines with \r alone, which newline="" keeps.
            for line in io.TextIOWrapper(process.stdout, errors="replace", newline=""):
                said.append(redacted(line))
                if shown:
                    print(said[-1], end="", file=sys.stderr, flush=True)
        except BaseException:
            process.terminate()
            raise
    lines = [
        line.strip() for line in said if line.strip() and not re.match(r"\s*\d+%\|", line)
    ]  # no progress
    # Of a contest that it doesn't find it tells without an exit code.
    if process.returncode or any(line.startswith("Could not find competition") for line in lines):
        raise KaggleError(_why("\n".join(lines[-SHOWN:]), process.returncode))
    return "\n".join(lines)


def _why(said: str, code: int) -> str:
    """Return what to tell of a client that failed, from its last words."""
    if re.search(r"\b403\b\W*(Client Error|Forbidden|Reason)", said):
        hint = f"Kaggle refuses this account (403): log in, accept the rules at {PAGE}/rules, and try again"
    elif re.search(r"\b401\b\W*(Client Error|Unauthorized|Reason)|must authenticate", said):
        hint = "Kaggle doesn't know these credentials (401): make new ones at https://www.kaggle.com/settings"
    else:
        hint = f"Kaggle's client failed (exit code {code})"
    return f"{hint}\n{said}".rstrip()


def members(archive: zipfile.ZipFile, inside: str = "") -> tuple[dict[str, zipfile.ZipInfo], list[str]]:
    """Return what of an archive to unpack, by its path in the folder, and the names of what isn't the contest's.

    Args:
        archive: the contest's, or one of ``INNER``.
        inside: "train" or "test" for such a one, whose members may lack the folder's name.

    Raises:
        KaggleError: a member leads out of the folder, is a link, encrypted, there twice or too large.
    """
    wanted, others, total = {}, [], 0
    for info in archive.infolist():
        name = info.filename
        target = f"{inside}/{name}" if inside and "/" not in name else name
        inner = not inside and target in INNER
        fault = _fault_of(info, ARCHIVE_LIMIT if inner else MEMBER_LIMIT)
        total += info.file_size
        if total > ARCHIVE_LIMIT:
            fault = f"is beyond {ARCHIVE_LIMIT:,} bytes in all"
        if target in wanted:
            fault = "is there twice"
        if fault:
            raise KaggleError(f"{archive.filename} is refused: its member {name!r} {fault}")
        if info.is_dir():
            continue
        known = re.fullmatch(rf"{inside}/[\w-]+\.jpg" if inside else EXPECTED, target, re.ASCII)
        if known or inner:
            wanted[target] = info
        else:
            others.append(name)
    return wanted, others


def _fault_of(info: zipfile.ZipInfo, limit: int) -> str:
    parts = re.split(r"[/\\]", info.filename)
    if parts[0] == "" or ":" in parts[0] or ".." in parts:
        return "leads out of the folder"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device, not a file"
    if info.flag_bits & 1:
        return "is encrypted"
    # zipfile never gives more bytes than this number says.
    return f"has {info.file_size:,} bytes, more than {limit:,}" if info.file_size > limit else ""


def unpack(path: Path, folder: Path, inside: str = "") -> list[str]:
    """Unpack an archive into a folder: what is the contest's and not there yet with its size; sums are checked.

    Each file is there whole or not at all. Archives in the archive lie in ``PARTS`` until they are unpacked.

    Args:
        path: the archive.
        folder: where train.csv, train/ and so on go.
        inside: see :func:`members`.

    Returns:
        The names of members that are not the contest's and stay packed.

    Raises:
        KaggleError: it is damaged or suspicious (see :func:`members`), or the disk is too small.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wanted, others = members(archive, inside)
            places = {
                target: folder / (f"{PARTS}/{target}" if target in INNER else target) for target in wanted
            }
            lacking = [target for target, info in wanted.items() if _size(places[target]) != info.file_size]
            need, free = sum(wanted[target].file_size for target in lacking), shutil.disk_usage(folder).free
            if need > free:
                raise KaggleError(f"{folder}: {need:,} bytes are needed, and {free:,} are free")
            quiet = None if lacking else True
            for target in tqdm(lacking, desc=f"unpacking {path.name}", unit=" files", disable=quiet):
                with (
                    archive.open(wanted[target]) as packed,
                    replacing(places[target]) as part,
                    part.open("wb") as out,
                ):
                    shutil.copyfileobj(packed, out, 2**20)
    # NotImplementedError is zipfile's, of a compression that it doesn't know.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise KaggleError(
            f"{path} is damaged ({error}): delete it, and the same command fetches it anew"
        ) from error
    for name in INNER:
        if name in wanted:
            others += unpack(places[name], folder, name.removesuffix(".zip"))
            places[name].unlink()
    return others


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def download(folder: Path) -> Path:
    """Have the client fetch the contest's archive into a folder, or go on with it; return its path.

    Raises:
        KaggleError: as :func:`client`, or what it left is no archive.
    """
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    quiet = [] if sys.stderr.isatty() else ["-q"]
    client("competitions", "download", "-c", CONTEST, "-p", str(parts), *quiet)
    part, whole = parts / f"{CONTEST}.zip", folder / f"{CONTEST}.zip"
    if not zipfile.is_zipfile(part):
        raise KaggleError(
            f"{part} is no whole archive: the same command goes on with it; if that doesn't help, delete it"
        )
    os.replace(part, whole)
    return whole


def faults(folder: Path, counts: Counts = COUNTS) -> list[str]:
    """Return what a folder with the contest's data lacks or has too much, a line each; nothing when it is whole."""
    found = []
    for file, split, count in (
        ("train.csv", "train", counts.train),
        ("sample_submission.csv", "test", counts.test),
    ):
        problems = Problems()
        lines = read_lines(folder / file, COLUMNS, problems)
        found += [f"{file}: {problem.problem}" for problem in problems if problem.action != "repaired"]
        if problems.refused:
            continue
        if len(lines) != count:
            found.append(f"{file}: {len(lines):,} rows instead of {count:,}")
        labels = {line.fields["Id"] for line in lines}
        if split == "train" and len(labels) != counts.labels:
            found.append(f"{file}: {len(labels):,} labels instead of {counts.labels:,}")
        listed = {line.fields["Image"] for line in lines}
        there = _files(folder / split)
        found += _some(f"{split}/: missing or empty", listed - there)
        found += _some(f"{split}/: not listed in {file}", there - listed)
    return found


def _files(folder: Path) -> set[str]:
    """Return the names of the files in a folder that are not empty; none of a folder that isn't there."""
    if not folder.is_dir():
        return set()
    return {entry.name for entry in os.scandir(folder) if entry.is_file() and entry.stat().st_size}


def _some(what: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return [f"{what}: {len(names):,} ({shown})"] if names else []


def labels_hash(folder: Path) -> str:
    """Return the SHA-256 of the rows of train.csv, "Image,Id", sorted, whatever its order and line ends."""
    lines = read_lines(folder / "train.csv", COLUMNS, Problems())
    rows = sorted(f"{line.fields['Image']},{line.fields['Id']}" for line in lines)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def fetch(folder: Path | None = None, counts: Counts = COUNTS) -> Path:
    """Fetch, unpack and check the contest's data, as far as they are not there; return their folder.

    Args:
        folder: where to; default :func:`home`. An archive that lies there (the client's, or a browser's) is taken.
        counts: what has to be there.

    Raises:
        KaggleError: see :func:`client`, :func:`unpack`; or the folder isn't whole, with what is missing.
    """
    folder = home() if folder is None else folder.expanduser().absolute()
    archive = folder / f"{CONTEST}.zip"
    if folder.is_relative_to(MOUNTED):
        print(f"On Kaggle: the data are there already, in {folder}")
    elif archive.is_file() or faults(folder, counts):
        with locked(folder):
            if not archive.is_file():
                print(f"Fetching several gigabytes into {folder}; after a stop the same command goes on")
                download(folder)
            if others := unpack(archive, folder):
                print(*_some("left packed, not the contest's", others))
            shutil.rmtree(folder / PARTS, ignore_errors=True)
    if left := faults(folder, counts):
        raise KaggleError("\n  ".join([f"{folder} is not whole:", *left]))
    print(
        f"Whole: {counts.train:,} photographs with {counts.labels:,} labels, {counts.test:,} to be labelled"
    )
    which = "the labels that" if labels_hash(folder) == LABELS else "other labels than"
    print(f"train.csv has {which} the report counts")
    if archive.is_file():
        print(f"{archive} isn't needed any more")
    found = folder == home()
    print("DATA=kaggle finds them" if found else f"export WHALE_KAGGLE={shlex.quote(str(folder))}")
    return folder


def checked(path: Path, folder: Path, counts: Counts = COUNTS) -> tuple[list[str], list[Problem]]:
    """Return a submission's rows of labels and what Kaggle would accept but isn't as it should be.

    Args:
        path: the submission.
        folder: the contest's data; without them photographs and labels are not checked, only their number.
        counts: of the contest.

    Raises:
        SubmissionError: it can't be sent, with every reason.
    """
    frame = read_submission(path)
    sample, train = folder / "sample_submission.csv", folder / "train.csv"
    images = known = None
    if sample.is_file() and train.is_file():
        images, known = list(read_submission(sample)["Image"]), set(read_submission(train)["Id"])
    problems = check_submission(frame, images, known)
    if images is None and len(frame) != counts.test:
        problems.append(Problem(None, "", f"{len(frame):,} rows instead of {counts.test:,}"))
    if refused := [problem for problem in problems if problem.refused]:
        raise SubmissionError(str(path), refused)
    if images is None:
        problems.append(
            Problem(None, "", f"names and labels are not checked: no data in {folder}", refused=False)
        )
    return list(frame["Id"]), problems


def submit(path: Path, message: str = "", send: bool = False) -> None:
    """Check a submission, show what would be sent and how, and send it if asked to.

    Raises:
        SubmissionError, FileNotFoundError: it can't be sent.
        KaggleError: see :func:`client`.
    """
    labels, notes = checked(path, home(), COUNTS)
    first = sum(text.split()[0] == NEW_WHALE for text in labels)
    print(f"{path}: {len(labels):,} rows, {NEW_WHALE} first in {first:,} of them ({first / len(labels):.1%})")
    with path.open(encoding="utf-8-sig") as file:
        print("".join(f"  {line.rstrip()}\n" for line, _ in zip(file, range(3), strict=False)), end="")
    for note in notes:
        print(f"note: {note.problem}" if note.row is None else f"note: {note}")
    message = message or f"whalelib {importlib.metadata.version('whalelib')}: {path.name}"
    command = ("competitions", "submit", "-c", CONTEST, "-f", str(path), "-m", message)
    print(shlex.join([find_client() or "kaggle", *command]))
    print(client(*command) if send else "Nothing is sent; --send (make submit SEND=1) sends it.")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m whalelib.data.kaggle", description="The contest on Kaggle.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fetch", help="fetch, unpack and check the data", allow_abbrev=False)
    one.add_argument("--folder", type=Path, help="where to (default: where DATA=kaggle looks)")
    two = commands.add_parser(
        "submit", help="check a submission, and send it if asked to", allow_abbrev=False
    )
    two.add_argument("file", type=Path, help="CSV: Image,Id with five labels a row")
    two.add_argument("--message", default="", help="shown beside the score")
    two.add_argument("--send", action="store_true", help="really send it")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _arguments(given)
    try:
        if arguments.command == "fetch":
            fetch(arguments.folder, COUNTS)
        else:
            submit(arguments.file, arguments.message, arguments.send)
    except (KaggleError, SubmissionError, OSError) as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
