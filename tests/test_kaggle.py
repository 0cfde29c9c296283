"""The contest's data and submissions, with a stand-in for Kaggle's client."""

import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from whalelib.contest import SubmissionError
from whalelib.data import kaggle, open_catalog
from whalelib.data.kaggle import CONTEST, Counts, KaggleError

SECRET = "0123456789abcdef0123456789abcdef"
COUNTS = Counts(train=4, labels=3, test=2)
FILES = {
    "train.csv": b"Image,Id\na.jpg,w_1\nb.jpg,w_1\nc.jpg,w_2\nd.jpg,new_whale\n",
    "sample_submission.csv": b"Image,Id\ne.jpg,new_whale w_1 w_2 w_3 w_4\nf.jpg,new_whale w_1 w_2 w_3 w_4\n",
    **{f"train/{name}.jpg": name.encode() * 50 for name in "abcd"},
    **{f"test/{name}.jpg": name.encode() * 60 for name in "ef"},
}
# It notes how it was called, says what it is told to, and for a download copies an archive to where it is asked to.
CLIENT = """#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/calls"
cat "$here/says"
test "$2" != download || test ! -e "$here/archive.zip" || cp "$here/archive.zip" "$6/$4.zip"
exit $(cat "$here/code")
"""


class Client:
    """The stand-in: what it does and what it was asked."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "kaggle"
        self.path.write_text(CLIENT)
        self.path.chmod(0o755)
        self.tell("")

    def tell(self, says, code=0):
        (self.folder / "says").write_text(says)
        (self.folder / "code").write_text(str(code))

    @property
    def calls(self):
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An account without credentials, and a place for the data; return that place."""
    for name in [name for name in os.environ if name.startswith(("KAGGLE_", "XDG_"))]:
        monkeypatch.delenv(name)
    for name in ("WHALE_KAGGLE", "WHALE_REFERENCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))
    folders = (tmp_path / "mounted" / CONTEST, tmp_path / "data")
    for module in ("catalog", "kaggle"):
        monkeypatch.setattr(f"whalelib.data.{module}.KAGGLE_FOLDERS", folders)
    monkeypatch.setattr(kaggle, "MOUNTED", tmp_path / "mounted")
    monkeypatch.setattr(kaggle, "COUNTS", COUNTS)
    return folders[1]


@pytest.fixture
def client(home, tmp_path, monkeypatch):
    """A client that knows its credentials."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("KAGGLE_USERNAME", "ahab")
    monkeypatch.setenv("KAGGLE_KEY", SECRET)
    return Client(tmp_path / "bin")


def pack(path, files=FILES, compression=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def archive_in(home, files=FILES):
    return pack(home / f"{CONTEST}.zip", files)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".zip" and path.name != ".lock"
    }


def lay(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def in_zips(folder, prefix=""):
    """The older form: photographs in archives of their own, with or without the folder's name."""
    files = {name: content for name, content in FILES.items() if "/" not in name}
    for split in ("train", "test"):
        inner = {
            prefix.format(split) + name.partition("/")[2]: content
            for name, content in FILES.items()
            if name.startswith(f"{split}/")
        }
        files[f"{split}.zip"] = pack(folder / f"{split}.zip", inner, zipfile.ZIP_DEFLATED).read_bytes()
    return files


def test_fetch(client, home, capsys):
    pack(client.folder / "archive.zip")
    client.tell(f"Downloading with key {SECRET}\n")
    assert kaggle.main(["fetch"]) == 0
    assert contents(home) == FILES
    assert client.calls == [f"competitions download -c {CONTEST} -p {home}/.parts -q"]
    assert not (home / ".parts").exists()
    out, err = capsys.readouterr()
    assert "4 photographs with 3 labels, 2 to be labelled" in out
    assert "other labels than the report counts" in out
    assert "DATA=kaggle finds them" in out
    assert SECRET not in out + err


def test_what_is_there_is_not_fetched_again(client, home):
    pack(client.folder / "archive.zip")
    kaggle.fetch(counts=COUNTS)
    kaggle.fetch(counts=COUNTS)
    (home / f"{CONTEST}.zip").unlink()
    kaggle.fetch(counts=COUNTS)
    assert len(client.calls) == 1


def test_another_folder(client, home, tmp_path, capsys):
    pack(client.folder / "archive.zip")
    assert kaggle.main(["fetch", "--folder", str(tmp_path / "else where")]) == 0
    assert contents(tmp_path / "else where") == FILES
    assert f"export WHALE_KAGGLE='{tmp_path}/else where'" in capsys.readouterr().out


def test_whale_kaggle_may_be_a_new_folder(client, home, tmp_path, monkeypatch):
    monkeypatch.setenv("WHALE_KAGGLE", str(tmp_path / "new"))
    pack(client.folder / "archive.zip")
    assert kaggle.fetch(counts=COUNTS) == tmp_path / "new"


def test_an_archive_from_elsewhere_needs_no_client(home):
    archive_in(home)
    kaggle.fetch(counts=COUNTS)
    assert contents(home) == FILES


@pytest.mark.parametrize("prefix", ["", "{}/"])
def test_archives_in_the_archive(home, tmp_path, prefix):
    archive_in(home, in_zips(tmp_path / "inner", prefix))
    kaggle.fetch(counts=COUNTS)
    assert contents(home) == FILES


def test_unpacking_goes_on_where_it_stopped(home):
    there = dict(FILES)
    there["train/a.jpg"] = b"A" * 50  # of the right size: it is believed
    there["train/b.jpg"] = b"b" * 49
    del there["test/f.jpg"]
    lay(home, there)
    archive_in(home)
    kaggle.fetch(counts=COUNTS)
    assert contents(home) == FILES | {"train/a.jpg": b"A" * 50}


def test_a_download_that_broke_off_goes_on(client, home):
    whole = pack(client.folder / "archive.zip").read_bytes()
    (client.folder / "archive.zip").write_bytes(whole[:-30])
    with pytest.raises(KaggleError, match=r"\.parts.*no whole archive: the same command goes on"):
        kaggle.fetch(counts=COUNTS)
    assert (home / ".parts" / f"{CONTEST}.zip").is_file()
    (client.folder / "archive.zip").write_bytes(whole)
    kaggle.fetch(counts=COUNTS)
    assert contents(home) == FILES


def test_no_client(home, capsys):
    assert kaggle.main(["fetch"]) == 2
    assert "pip install kaggle" in capsys.readouterr().err


def test_no_credentials(client, home, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_USERNAME")
    assert kaggle.main(["fetch"]) == 2
    assert "https://www.kaggle.com/settings" in capsys.readouterr().err
    assert client.calls == []


@pytest.mark.parametrize("name", ["kaggle.json", "access_token", "credentials.json"])
@pytest.mark.parametrize("place", [".kaggle", ".config/kaggle", "own"])
def test_files_of_credentials_are_seen_but_not_opened(home, tmp_path, monkeypatch, place, name):
    assert not kaggle.has_credentials()
    folder = tmp_path / "user" / place
    folder.mkdir(parents=True)
    if place == "own":
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(folder))
    (folder / name).write_text(SECRET)
    (folder / name).chmod(0)
    assert kaggle.has_credentials()


@pytest.mark.parametrize(
    ("given", "enough"),
    [
        ({"KAGGLE_API_TOKEN": "KGAT_1"}, True),
        ({"KAGGLE_USERNAME": "ahab", "KAGGLE_KEY": SECRET}, True),
        ({"KAGGLE_USERNAME": "ahab"}, False),
        ({"KAGGLE_KEY": SECRET}, False),
    ],
)
def test_credentials_of_the_environment(home, monkeypatch, given, enough):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert kaggle.has_credentials() is enough


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (
            "403 - Forbidden - You must accept this competition's rules",
            rf"accept the rules at .*{CONTEST}/rules",
        ),
        ("403 Client Error: Forbidden for url: https://api.kaggle.com/v1/x?sig=abc", "accept the rules"),
        ("(403)\nReason: Forbidden", "accept the rules"),
        ("401 Client Error: Unauthorized for url: https://api.kaggle.com/v1/x", "make new ones at"),
        ("You must authenticate before you can call the Kaggle API.", "make new ones at"),
        (" 7%| 403.1M/5.5G\rConnection reset", r"failed \(exit code 1\)\n.*Connection reset"),
    ],
)
def test_what_the_client_says_is_told_without_credentials(client, home, capsys, says, told):
    client.tell(f"{says}\nkey {SECRET} token KGAT_secret Authorization: Bearer abc.def\n", 1)
    with pytest.raises(KaggleError, match=f"(?s){told}") as caught:
        kaggle.fetch(counts=COUNTS)
    for secret in (SECRET, "KGAT_secret", "abc.def", "sig=abc"):
        assert secret not in str(caught.value)


def test_a_key_of_any_form_is_hidden(client, home, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "moby")
    client.tell("no such key: moby", 1)
    with pytest.raises(KaggleError) as caught:
        kaggle.fetch(counts=COUNTS)
    assert "no such key: ***" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "mode", "told"),
    [
        ("../train.csv", 0, "leads out"),
        ("/etc/passwd", 0, "leads out"),
        ("train/../../a.jpg", 0, "leads out"),
        ("..\\train.csv", 0, "leads out"),
        ("C:\\train.csv", 0, "leads out"),
        ("train/g.jpg", stat.S_IFLNK | 0o777, "a link or a device"),
        ("train", stat.S_IFLNK | 0o777, "a link or a device"),
        ("train/b.jpg", 0, "there twice"),
    ],
)
def test_a_suspicious_archive_is_refused_whole(home, name, mode, told):
    archive_in(home)
    with zipfile.ZipFile(home / f"{CONTEST}.zip", "a") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, "../../elsewhere")
    before = contents(home.parent)
    with pytest.raises(KaggleError, match=rf"is refused: its member .* {told}"):
        kaggle.fetch(counts=COUNTS)
    assert contents(home.parent) == before


def test_inner_archives_are_looked_at_as_well(home, tmp_path):
    files = in_zips(tmp_path / "inner")
    files["test.zip"] = pack(tmp_path / "evil.zip", {"../../e.jpg": b"e"}).read_bytes()
    archive_in(home, files)
    with pytest.raises(KaggleError, match=r"test\.zip is refused: its member '\.\./\.\./e\.jpg' leads out"):
        kaggle.fetch(counts=COUNTS)


@pytest.mark.parametrize(
    ("limit", "value", "told"),
    [("MEMBER_LIMIT", 55, "60 bytes, more than 55"), ("ARCHIVE_LIMIT", 300, "beyond 300")],
)
def test_sizes_have_limits(home, monkeypatch, limit, value, told):
    monkeypatch.setattr(kaggle, limit, value)
    archive_in(home, {name: content for name, content in FILES.items() if "csv" not in name})
    with pytest.raises(KaggleError, match=told):
        kaggle.fetch(counts=COUNTS)
    assert contents(home) == {}


def test_encrypted_members_are_refused(home):
    path = archive_in(home)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(KaggleError, match=r"'train\.csv' is encrypted"):
        kaggle.fetch(counts=COUNTS)


def test_a_full_disk_is_told_beforehand(home, monkeypatch):
    archive_in(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(KaggleError, match=r"bytes are needed, and 1 are free"):
        kaggle.fetch(counts=COUNTS)


def test_a_damaged_member_is_found_by_its_sum(home):
    path = archive_in(home)
    path.write_bytes(path.read_bytes().replace(b"c" * 50, b"c" * 49 + b"x"))
    with pytest.raises(KaggleError, match=r"damaged .*train/c\.jpg.*delete it"):
        kaggle.fetch(counts=COUNTS)
    assert "train/b.jpg" in contents(home)
    assert "train/c.jpg" not in contents(home)


def test_a_cut_archive_is_damaged(home):
    path = archive_in(home)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(KaggleError, match="damaged"):
        kaggle.fetch(counts=COUNTS)


def test_what_is_not_the_contests_stays_packed(home, capsys):
    archive_in(home, FILES | {"train/x.exe": b"x", "README": b"x", "train/deep/y.jpg": b"y", "more/": b""})
    kaggle.fetch(counts=COUNTS)
    assert contents(home) == FILES
    assert (
        "left packed, not the contest's: 3 (README, train/deep/y.jpg, train/x.exe)" in capsys.readouterr().out
    )


def test_what_is_missing_is_named(home):
    lay(home, FILES | {"train/c.jpg": b"", "test/g.jpg": b"g"})
    for name in ("train/a.jpg", "test/e.jpg", "test/f.jpg"):
        (home / name).unlink()
    assert kaggle.faults(home, COUNTS) == [
        "train/: missing or empty: 2 (a.jpg, c.jpg)",
        "test/: missing or empty: 2 (e.jpg, f.jpg)",
        "test/: not listed in sample_submission.csv: 1 (g.jpg)",
    ]
    assert kaggle.faults(home, Counts(5, 4, 9))[:2] == [
        "train.csv: 4 rows instead of 5",
        "train.csv: 3 labels instead of 4",
    ]


def test_of_many_the_first_are_named(home):
    rows = "".join(f"{i}.jpg,w_{i}\n" for i in range(1, 10))
    lay(home, FILES | {"train.csv": f"Image,Id\n{rows}".encode()})
    found = kaggle.faults(home, Counts(9, 9, 2))
    assert "train/: missing or empty: 9 (1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg, ...)" in found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "train.csv: can't be read"),
        (b"", "train.csv: the file is empty"),
        (b"Image,Id\n", "0 rows instead of 4"),
    ],
)
def test_a_list_that_says_nothing_is_a_fault(home, text, told):
    lay(home)
    (home / "train.csv").unlink() if text is None else (home / "train.csv").write_bytes(text)
    assert any(told in fault for fault in kaggle.faults(home, COUNTS))


def test_an_archive_that_lacks_something(home, capsys):
    archive_in(home, {name: content for name, content in FILES.items() if name != "test/e.jpg"})
    assert kaggle.main(["fetch"]) == 2
    assert "is not whole:\n  test/: missing or empty: 1 (e.jpg)" in capsys.readouterr().err


def test_on_kaggle(client, home, tmp_path, capsys):
    mounted = tmp_path / "mounted" / CONTEST
    lay(mounted)
    assert kaggle.main(["fetch"]) == 0
    assert f"On Kaggle: the data are there already, in {mounted}" in capsys.readouterr().out
    assert client.calls == []
    assert not home.exists()
    assert open_catalog("kaggle").root == mounted


def test_labels_are_known_by_their_rows(home):
    lay(home)
    known = kaggle.labels_hash(home)
    header, *rows = FILES["train.csv"].splitlines()
    lay(home, {"train.csv": b"\r\n".join([header, *reversed(rows)])})
    assert kaggle.labels_hash(home) == known
    lay(home, {"train.csv": FILES["train.csv"].replace(b"w_2", b"w_3")})
    assert kaggle.labels_hash(home) != known


@pytest.mark.skipif("WHALE_REFERENCE" not in os.environ, reason="needs the contest's labels")
def test_the_counts_are_the_contests():
    labels = Path(os.environ["WHALE_REFERENCE"]) / "reference" / "competition" / "train.csv"
    rows = labels.read_text().split()[1:]
    assert kaggle.COUNTS[:2] == (len(rows), len({row.split(",")[1] for row in rows}))
    assert kaggle.labels_hash(labels.parent) == kaggle.LABELS


GOOD = "Image,Id\ne.jpg,new_whale w_1 w_2 w_3 w_4\nf.jpg,w_1 w_2 new_whale w_3 w_4\n"


@pytest.fixture
def data(home):
    files = {"train.csv": FILES["train.csv"] + b"".join(b"%d.jpg,w_%d\n" % (i, i) for i in range(3, 6))}
    lay(home, FILES | files)
    return home


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "it is.csv"
    path.write_text(GOOD)
    return path


def test_a_submission_is_shown_and_not_sent(client, data, file, capsys):
    assert kaggle.main(["submit", str(file), "--message", "by neighbours"]) == 0
    out = capsys.readouterr().out
    assert f"{file}: 2 rows, new_whale first in 1 of them (50.0%)" in out
    assert "".join(f"  {line}\n" for line in GOOD.splitlines()) in out
    sent = f"competitions submit -c {CONTEST} -f '{file}' -m 'by neighbours'"
    assert f"{client.path} {sent}\nNothing is sent" in out
    assert client.calls == []


def test_a_submission_is_sent_when_asked_to(client, data, file, capsys):
    client.tell("100%|\rSuccessfully submitted to Humpback Whale Identification\n")
    assert kaggle.main(["submit", str(file), "--send"]) == 0
    assert client.calls[0].startswith(f"competitions submit -c {CONTEST} -f {file} -m whalelib ")
    out = capsys.readouterr().out
    assert "Successfully submitted" in out
    assert "Nothing is sent" not in out


@pytest.mark.parametrize(
    ("says", "code", "told"),
    [
        ("400 Client Error: Bad Request", 1, "Bad Request"),
        ("Could not find competition - please verify", 0, "Could not find competition"),
    ],
)
def test_a_submission_that_kaggle_refuses(client, data, file, capsys, says, code, told):
    client.tell(f"{says} {SECRET}", code)
    assert kaggle.main(["submit", str(file), "--send"]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert SECRET not in err


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("f.jpg", "g.jpg", "row 3: g.jpg: not a test photograph"),
        ("w_4", "w_9", "w_9 is neither an id"),
        (" w_4", "", "4 labels instead of 5"),
        ("Image,Id", "Image,Label", "columns must be Image,Id"),
    ],
)
def test_a_faulty_submission_is_never_sent(client, data, file, capsys, old, new, told):
    file.write_text(GOOD.replace(old, new))
    assert kaggle.main(["submit", str(file), "--send"]) == 2
    assert told in capsys.readouterr().err
    assert client.calls == []


def test_another_order_is_only_noted(client, data, file, capsys):
    head, *rows = GOOD.splitlines()
    file.write_text("\n".join([head, *rows[::-1]]))
    assert kaggle.main(["submit", str(file)]) == 0
    assert "note: row 2: f.jpg: another order" in capsys.readouterr().out


def test_without_the_data_less_is_checked(home, file, capsys):
    assert kaggle.main(["submit", str(file)]) == 0
    assert "note: names and labels are not checked" in capsys.readouterr().out
    with pytest.raises(SubmissionError, match="2 rows instead of 3"):
        kaggle.checked(file, home, Counts(4, 3, 3))


def test_no_such_file(home, capsys):
    assert kaggle.main(["submit", "nowhere.csv", "--send"]) == 2
    assert "nowhere.csv" in capsys.readouterr().err
