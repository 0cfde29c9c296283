"""How photographs and their labels lie in a folder: the layouts that a catalog can be read from.

Each reader returns the table of a catalog, with ``source`` and ``row`` (the file that lists a photograph, and
the line there), and notes in :class:`Problems` what it skipped, refused or repaired. It opens no photograph.
"""

import codecs
import csv
import io
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from whalelib.data.images import SUFFIXES

NEW_WHALE = "new_whale"
# Of the test photographs, 2,197 of 7,960 show new whales, as probing the leaderboard told.
NEW_SHARE = 0.276
BOX = ("x0", "y0", "x1", "y1")
SPLITS = {"train": "train", "database": "train", "gallery": "train", "test": "test", "query": "test"}

COLUMNS = ("image", "identity", "path", "split", "source", "row")

Row = dict[str, object]


class Problem(NamedTuple):
    """One thing that is wrong: the file, its line (None: the file itself), what, and what was done."""

    file: str
    row: int | None
    problem: str
    action: str


class Problems(list[Problem]):
    """What is wrong, in the order in which it was found."""

    def refuse(self, file: str, row: int | None, problem: str) -> None:
        """Note what keeps the data from being used at all."""
        self.append(Problem(file, row, problem, "refused"))

    def skip(self, file: str, row: int | None, problem: str) -> None:
        """Note what is left out."""
        self.append(Problem(file, row, problem, "skipped"))

    def repair(self, file: str, row: int | None, problem: str) -> None:
        """Note what is used after a change."""
        self.append(Problem(file, row, problem, "repaired"))

    @property
    def refused(self) -> bool:
        """Whether anything was refused."""
        return any(problem.action == "refused" for problem in self)


class Line(NamedTuple):
    """A record of a CSV file: the line on which it begins (the header's is 1) and its fields."""

    row: int
    fields: dict[str, str]


def read_lines(path: Path, needed: Iterable[str], problems: Problems, shown: str = "") -> list[Line]:
    """Read a CSV file (UTF-8, commas, a header), every field as text; ``shown`` names it in ``problems``.

    Another encoding, missing columns and an empty file are refused; a byte order mark is repaired; a record
    with too many or too few fields is skipped.
    """
    shown = shown or path.name
    text = _text(path, shown, problems)
    if text is None:
        return []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines, header, row = [], None, 0
    try:
        for fields in reader:
            begins, row = row + 1, reader.line_num
            if not fields:
                continue
            if header is None:
                header = fields
                if not _right_columns(shown, begins, header, needed, problems):
                    return []
            elif len(fields) != len(header):
                problems.skip(shown, begins, f"{len(fields)} fields where the header has {len(header)}")
            else:
                lines.append(Line(begins, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        problems.refuse(shown, reader.line_num, f"not CSV: {error}")
        return []
    if header is None:
        problems.refuse(shown, None, f"the file is empty; it needs the columns {', '.join(needed)}")
    return lines


def _text(path: Path, shown: str, problems: Problems) -> str | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.refuse(shown, None, f"can't be read: {error.strerror}")
        return None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        problems.refuse(shown, 1, "not UTF-8 text (UTF-16?); save the file as UTF-8")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        row = len((data[: error.start] + b".").splitlines())
        what = f"byte 0x{data[error.start]:02x} is not UTF-8 (Latin-1, Windows-1252?); save the file as UTF-8"
        problems.refuse(shown, row, what)
        return None
    if text.startswith("\ufeff"):
        problems.repair(shown, 1, "the byte order mark before the header is ignored")
    return text.removeprefix("\ufeff")


def _right_columns(name: str, row: int, header: list[str], needed: Iterable[str], problems: Problems) -> bool:
    missing = [column for column in needed if column not in header]
    twice = sorted({column for column in header if header.count(column) > 1})
    if missing:
        problems.refuse(name, row, f"no column {', '.join(missing)}; found: {', '.join(header)}")
    if twice:
        problems.refuse(name, row, f"more than one column {', '.join(twice)}")
    return not missing and not twice


class Folder:
    """Finds files by the names that someone's CSV gives, without ever leaving the folder.

    The folder itself may be a symbolic link (photographs often lie on another disk); neither a name nor a
    link inside it may lead out.
    """

    def __init__(self, path: Path):
        self.path = path
        self._root = os.path.realpath(path)
        self._real: dict[str, str] = {}

    def find(self, name: str) -> tuple[str | None, str, bool]:
        """Return (absolute path, "", False), or (None, what is wrong, whether it leads out of the folder)."""
        if not name or "\0" in name:
            return None, "no file has such a name", False
        folder, leaf = os.path.split(os.path.join(self._root, name))
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        path = os.path.join(self._real[folder], leaf)
        if leaf in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if path != self._root and not path.startswith(self._root.rstrip(os.sep) + os.sep):
            return None, "leads out of the folder", True
        try:
            kind = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None, "the file is missing", False
        except OSError as error:
            return None, f"can't be read: {error.strerror}", False
        if stat.S_ISREG(kind):
            return path, "", False
        return None, "a folder, not a file" if stat.S_ISDIR(kind) else "a device or pipe, not a file", False

    def names(self) -> list[str]:
        """Return the names in the folder, sorted, but for hidden files and those of file managers."""
        names = sorted(entry.name for entry in os.scandir(self.path))
        return [n for n in names if not n.startswith(".") and n.lower() not in ("thumbs.db", "desktop.ini")]

    def photographs(self, shown: str, problems: Problems, known: Iterable[str] = ()) -> list[str]:
        """Return the names, but ``known`` ones, that end like a photograph's; note what else lies there."""
        photographs = []
        for name in (name for name in self.names() if name not in known):
            readable = name.encode(errors="backslashreplace").decode()
            if readable != name:
                problems.skip(f"{shown}/{readable}", None, "the name is not UTF-8")
            elif is_photograph(name):
                photographs.append(name)
            else:
                folder = os.path.isdir(self.path / name)
                what = "a folder, not a file" if folder else "not a photograph by its suffix"
                problems.skip(f"{shown}/{name}", None, what)
        return photographs


def is_photograph(name: str) -> bool:
    """Return whether a file's name ends like a photograph's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _locate(
    folder: Folder, name: str, shown: str, place: tuple[str, int | None], problems: Problems
) -> str | None:
    """Return a file's path, or note at ``place`` (file, row) why there is none."""
    path, fault, outside = folder.find(name)
    if path is None:
        note = problems.refuse if outside else problems.skip
        note(*place, f"{shown}: {fault}")
    return path


def _fault_of(identity: str) -> str:
    if not identity:
        return "no identity"
    if any(c.isspace() for c in identity):
        return f"the identity {identity!r} has a space, which separates identities in a submission"
    return ""


def _once(file: str, rows: list[Row], telling: tuple[str, ...], problems: Problems) -> list[Row]:
    """Leave each name once; where its rows differ nothing says which is right, so none is left."""
    first: dict[object, Row] = {}
    unclear = set()
    for row in rows:
        one = first.setdefault(row["image"], row)
        if any(row[column] != one[column] for column in telling):
            unclear.add(row["image"])
    kept = []
    for row in rows:
        image, number = row["image"], row["row"]
        if image in unclear:
            values = ", ".join(f"{column} {row[column]}" for column in telling)
            problems.skip(file, number, f"{image}: listed more than once and differently, here with {values}")
        elif row is not first[image]:
            problems.skip(file, number, f"{image}: listed more than once; row {first[image]['row']} is used")
        else:
            kept.append(row)
    return kept


def _labels(path: Path, split: str, problems: Problems) -> tuple[list[Row], set[str]]:
    """Return the sound rows of an Image,Id file, and every name it lists."""
    rows, listed = [], set()
    for number, fields in read_lines(path, ("Image", "Id"), problems):
        image, identity = fields["Image"], fields["Id"]
        listed.add(image)
        if fault := _fault_of(identity):
            problems.skip(path.name, number, f"{image}: {fault}")
        else:
            rows.append(
                {"image": image, "identity": identity, "split": split, "source": path.name, "row": number}
            )
    return _once(path.name, rows, ("identity",), problems), listed


def _labelled(root: Path, csv_name: str, folder_name: str, problems: Problems) -> list[Row]:
    """Read an Image,Id file and the folder with its photographs, as the training split."""
    labels, listed = _labels(root / csv_name, "train", problems)
    folder, rows = Folder(root / folder_name), []
    for row in labels:
        place = (csv_name, row["row"])
        if path := _locate(folder, row["image"], f"{folder_name}/{row['image']}", place, problems):
            rows.append(row | {"path": path})
    _note_unlisted(folder, folder_name, listed, csv_name, problems)
    return rows


def _note_unlisted(folder: Folder, shown: str, listed: set[str], csv_name: str, problems: Problems) -> None:
    if listed:
        known = {os.path.normpath(name).split(os.sep)[0] for name in listed}
        for name in folder.photographs(shown, problems, known):
            problems.skip(f"{shown}/{name}", None, f"not listed in {csv_name}")


def read_kaggle(root: Path, problems: Problems) -> pd.DataFrame:
    """Read Kaggle's layout: train.csv, train/ and, if there, test/, sample_submission.csv, test_labels.csv.

    The sample gives the test photographs and their order; without one they are what lies in test/, by name.
    """
    train = _labelled(root, "train.csv", "train", problems)
    test = _test(root, problems)
    taken = {row["image"]: row["row"] for row in train}
    for row in test:
        if row["image"] in taken:
            what = f"{row['image']}: also in train.csv, row {taken[row['image']]}; a name is one photograph's"
            problems.skip(row["source"] or f"test/{row['image']}", row["row"], what)
    rows = train + [row for row in test if row["image"] not in taken]
    return _annotated(root, rows, problems)


def _test(root: Path, problems: Problems) -> list[Row]:
    sample, labels_file = root / "sample_submission.csv", root / "test_labels.csv"
    if not (root / "test").is_dir():
        for path in (sample, labels_file):
            if path.is_file():
                problems.skip(path.name, None, "there is no folder test/ with its photographs")
        return []
    folder = Folder(root / "test")
    identities, has_labels = {}, labels_file.is_file()
    if has_labels:
        identities = {row["image"]: row for row in _labels(labels_file, "test", problems)[0]}
    if sample.is_file():
        listed = [
            {"image": fields["Image"], "source": sample.name, "row": number}
            for number, fields in read_lines(sample, ("Image", "Id"), problems)
        ]
        _note_unlisted(folder, "test", {row["image"] for row in listed}, sample.name, problems)
        listed = _once(sample.name, listed, (), problems)
    else:
        none = {"source": "", "row": None}
        listed = [
            {key: identities.get(name, none)[key] for key in none} | {"image": name}
            for name in folder.photographs("test", problems)
        ]
    rows = []
    for row in listed:
        name = row["image"]
        place = (row["source"] or f"test/{name}", row["row"])
        if path := _locate(folder, name, f"test/{name}", place, problems):
            identity = identities[name]["identity"] if name in identities else None
            rows.append(row | {"path": path, "identity": identity, "split": "test"})
    found = {row["image"] for row in rows}
    for name, label in identities.items():
        if name not in found:
            problems.skip(labels_file.name, label["row"], f"{name}: a label for no photograph of test/")
    if has_labels and (bare := sum(row["identity"] is None for row in rows)):
        problems.skip(labels_file.name, None, f"no label for {bare} of the {len(rows)} photographs of test/")
    return rows


def read_labels(root: Path, problems: Problems) -> pd.DataFrame:
    """Read labels.csv (Image,Id) with images/, and masks/ where there is one; all training."""
    return _annotated(root, _labelled(root, "labels.csv", "images", problems), problems)


def read_metadata(path: Path, problems: Problems) -> pd.DataFrame:
    """Read a metadata CSV as wildlife-datasets writes it: image_id, identity, path (from the CSV's folder).

    Optional columns: split (train, database, gallery; test, query), bbox ("[x, y, w, h]"), or those of
    :func:`annotations`. Its identity "unknown" is ``new_whale``. A test row needs no identity.
    """
    rows, unknown = [], 0
    lines = read_lines(path, ("image_id", "identity", "path"), problems)
    for number, fields in lines:
        image, identity = fields["image_id"], fields["identity"]
        split = SPLITS.get(fields.get("split", "train"))
        unknown += identity == "unknown"
        identity = NEW_WHALE if identity == "unknown" else identity
        fault = "" if split == "test" and not identity else _fault_of(identity)
        if not image:
            fault = "no image_id"
        if split is None:
            fault = f"the split {fields['split']!r} is none of {', '.join(SPLITS)}"
        if fault:
            problems.skip(path.name, number, f"{image}: {fault}")
            continue
        row = {"image": image, "identity": identity or None, "split": split, "path": fields["path"]}
        rows.append(row | {"source": path.name, "row": number})
    if unknown:
        problems.repair(path.name, None, f"the identity 'unknown' of {unknown} rows is read as {NEW_WHALE}")
    folder, found = Folder(path.parent), []
    for row in _once(path.name, rows, ("identity", "split", "path"), problems):
        if place := _locate(folder, row["path"], row["path"], (path.name, row["row"]), problems):
            found.append(row | {"path": place})
    kept = {row["row"] for row in found}
    lines = [line for line in lines if line.row in kept]
    notes = annotations(path.name, "image_id", lines, folder, problems)
    return _join(_table(found), notes).reset_index()


def read_individuals(root: Path, problems: Problems) -> pd.DataFrame:
    """Read a folder per individual, IDENTITY/photograph; a photograph's name is "IDENTITY/photograph"."""
    folder, rows = Folder(root), []
    for identity in folder.names():
        if not (root / identity).is_dir():
            if is_photograph(identity):
                problems.skip(identity, None, "not in the folder of an individual")
            continue
        inside = Folder(root / identity).photographs(identity, problems)
        if fault := _fault_of(identity) or ("" if inside else "no photographs"):
            problems.skip(f"{identity}/", None, f"{fault} ({len(inside)} photographs)" if inside else fault)
            continue
        for leaf in inside:
            name = f"{identity}/{leaf}"
            if path := _locate(folder, name, name, (name, None), problems):
                row = {"image": name, "identity": identity, "path": path, "split": "train"}
                rows.append(row | {"source": "", "row": None})
    return _annotated(root, rows, problems)


def _annotated(root: Path, rows: list[Row], problems: Problems) -> pd.DataFrame:
    """Add what lies beside the photographs: truth/photographs.csv, boxes.csv (Image, x0, ...), masks/."""
    table = _table(rows)
    for file, key, more in (("truth/photographs.csv", "image", ()), ("boxes.csv", "Image", BOX)):
        path = root / file
        if path.is_file():
            lines = read_lines(path, (key, *more), problems, file)
            # The truth of a generated world tells of an earlier contest's photographs too.
            lines = [line for line in lines if line.fields.get("split", "train") in ("train", "test")]
            notes = annotations(file, key, lines, Folder(path.parent), problems)
            others = notes.index.difference(table.index)
            if len(others):
                what = f"{len(others)} names are of no photograph here, such as {others[0]}"
                problems.skip(file, None, what)
            table = _join(table, notes)
    if (root / "masks").is_dir():
        table = _join(table, find_masks(Folder(root / "masks"), table.index, problems))
    return table.reset_index()


def _table(rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS).set_index("image")


def _join(table: pd.DataFrame, notes: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of ``notes`` to ``table``, by name; where both say something ``notes`` holds."""
    for column, values in notes.reindex(table.index).items():
        table[column] = values.combine_first(table[column]) if column in table else values
    return table


def find_masks(
    folder: Folder, images: Iterable[str], problems: Problems, shown: str = "masks"
) -> pd.DataFrame:
    """Find the mask of each photograph: the same name, or the same with .png; ``shown`` names the folder."""
    there, masks, used = set(folder.photographs(shown, problems)), {}, set()
    for image in images:
        for name in (image, f"{os.path.splitext(image)[0]}.png"):
            if name in there:
                used.add(name)
                file = f"{shown}/{name}"
                masks[image] = _locate(folder, name, file, (file, None), problems)
                break
    for name in sorted(there - used):
        problems.skip(f"{shown}/{name}", None, "the mask of no photograph here")
    return pd.DataFrame({"mask": pd.Series(masks, dtype="object")})


def annotations(file: str, key: str, lines: list[Line], folder: Folder, problems: Problems) -> pd.DataFrame:
    """Return what is said of boxes (x0, y0, x1, y1, or bbox), masks (paths) and key points (NAME_x, NAME_y).

    One row a name. A value that makes no sense is noted and left out; the photograph stays.
    """
    first: dict[str, Line] = {}
    for line in lines:
        name = line.fields[key]
        if first.setdefault(name, line) is not line:
            what = f"{name}: listed more than once; row {first[name].row} is used"
            problems.skip(file, line.row, what)
    row_of = {name: line.row for name, line in first.items()}
    frame = pd.DataFrame([line.fields for line in first.values()], index=list(first), dtype="object")
    notes = pd.DataFrame(index=frame.index)
    for what, said in _numeric(frame):
        values = said.apply(pd.to_numeric, errors="coerce").astype(float)
        if what == "bbox":
            values = _corners(values)
        sound = np.isfinite(values).all(axis=1)
        if what in ("bbox", "box"):
            sound &= (values["x0"] < values["x1"]) & (values["y0"] < values["y1"])
        blank = said.isin(["", "nan", "NaN"]).all(axis=1)
        for name in frame.index[~sound & ~blank]:
            found = ", ".join(said.loc[name])
            problems.skip(file, row_of[name], f"{name}: its {what} makes no sense and is left out ({found})")
        notes[list(values)] = values.where(sound)
    if "mask" in frame:
        notes["mask"] = [
            _locate(folder, mask, f"{name}: its mask {mask}", (file, row_of[name]), problems)
            if mask
            else None
            for name, mask in frame["mask"].items()
        ]
    return notes


def _numeric(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the groups of columns that hold numbers together: the box and each key point."""
    groups = []
    if "bbox" in frame:
        parts = [text.strip("[]() ").replace(",", " ").split() for text in frame["bbox"]]
        whole = [part if len(part) == 4 else [" ".join(part), "", "", ""] for part in parts]
        groups.append(("bbox", pd.DataFrame(whole, index=frame.index, dtype="object")))
    elif set(BOX) <= set(frame):
        groups.append(("box", frame[list(BOX)]))
    for x in frame:
        if x.endswith("_x") and f"{x[:-1]}y" in frame:
            groups.append((x[:-2], frame[[x, f"{x[:-1]}y"]]))
    return groups


def _corners(bbox: pd.DataFrame) -> pd.DataFrame:
    """Turn x, y, width, height into x0, y0, x1, y1."""
    x, y, width, height = (bbox.iloc[:, i] for i in range(4))
    return pd.DataFrame({"x0": x, "y0": y, "x1": x + width, "y1": y + height})


LAYOUTS = {
    "Kaggle's": (("train.csv", "train/"), read_kaggle),
    "labels": (("labels.csv", "images/"), read_labels),
    "metadata": (("metadata.csv",), lambda root, problems: read_metadata(root / "metadata.csv", problems)),
}
_RESERVED = ("train", "test", "images", "masks")


def find_layout(root: Path) -> Callable[[Path, Problems], pd.DataFrame]:
    """Return the reader of the layout that lies in a folder.

    Raises:
        ValueError: none or more than one; the message lists what was looked for and what was found.
    """

    def there(part: str) -> bool:
        path = root / part
        return path.is_dir() if part.endswith("/") else path.is_file()

    whole = [title for title, (parts, _) in LAYOUTS.items() if all(map(there, parts))]
    if len(whole) == 1:
        return LAYOUTS[whole[0]][1]
    if len(whole) > 1:
        names = " and ".join(f"{title} ({', '.join(LAYOUTS[title][0])})" for title in whole)
        raise ValueError(
            f"{root} has more than one layout: {names}; keep one, or give the path of the metadata CSV"
        )
    begun = [part for parts, _ in LAYOUTS.values() for part in parts if there(part)]
    folders = [name for name in Folder(root).names() if (root / name).is_dir()]
    if not begun and folders and not set(folders) & set(_RESERVED):
        return read_individuals
    looked = []
    for title, (parts, _) in LAYOUTS.items():
        found = ", ".join(f"{part} ({'found' if there(part) else 'missing'})" for part in parts)
        looked.append(f"  {title}: {found}")
    found = ", ".join(folders[:10]) + (", ..." if len(folders) > 10 else "") or "none"
    individuals = f"  a folder per individual: nothing of the above, and folders (found: {found})"
    raise ValueError("\n".join([f"{root} has no layout that is known. Looked for:", *looked, individuals]))
