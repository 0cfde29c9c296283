"""Settings, what a run records and draws, and the ledger."""

import csv
import math
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageColor

import whalelib
from whalelib import ledger
from whalelib.ledger import LEDGER_COLUMNS, LedgerError, append_ledger, commit_of, read_ledger, read_rows
from whalelib.plots import PALETTE
from whalelib.run import LARGE_FIGURE, Run, Settings, figures_folder, sources_hash, start


@pytest.fixture
def run(places):
    run = Run("02_01", Settings())
    run.catalog = SimpleNamespace(fingerprint="abc")
    return run


def rows_of(places, notebook="02_01"):
    return read_rows(places / "results" / f"{notebook}.csv")


# ---- settings


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"profile": "labs"}, "choose one of lab, small, paper"),
        ({"edition": "described"}, "as_described, as_shipped"),
        ({"device": "gpu"}, "auto, cpu, cuda"),
        ({"seed": -1}, "whole number"),
        ({"seed": "0"}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"data": ""}, "kaggle"),
        ({"data": "no/such/folder"}, "exists"),
        ({"data": "worlds"}, "exists"),
    ],
)
def test_unknown_value_names_the_choices(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)


def test_data_is_named_without_folders(animals, tmp_path):
    table = animals / "metadata.csv"
    table.write_text("image_id,identity,path\n")
    assert Settings(data=str(animals)).public_data == "animals"
    assert Settings(data=str(table)).public_data == "animals/metadata.csv"
    assert Settings(data="world:tiny@7").public_data == "world:tiny@7"
    assert Settings(data="world:tiny").public_data == "world:tiny@2019"
    assert Settings().public_data == "world:lab@2019"
    assert str(tmp_path) not in Settings(data=str(animals)).label


def test_relative_data_is_found_from_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Settings(data="whalelib").located == ledger.project_root() / "whalelib"
    (tmp_path / "whalelib").mkdir()
    assert Settings(data="whalelib").located == tmp_path / "whalelib"


def test_labels_tell_settings_apart(animals, tmp_path):
    other = tmp_path / "elsewhere" / "animals"
    other.mkdir(parents=True)
    choices = [Settings(), Settings(seed=1), Settings(profile="paper"), Settings(edition="as_shipped")]
    choices += [Settings(data=str(animals)), Settings(data=str(other))]
    assert len({choice.label for choice in choices}) == len(choices)


def test_sources_are_told_apart_but_for_what_is_left_out(monkeypatch, tmp_path):
    package = tmp_path / "package"
    (package / "course").mkdir(parents=True)
    monkeypatch.setattr("whalelib.run.__file__", str(package / "run.py"))
    seen = []
    for path in ("run.py", "course/pages.py", "table.csv", "notes.txt"):
        (package / path).write_text(path)
        seen.append((sources_hash("course/"), sources_hash()))
    apart, whole = zip(*seen, strict=True)
    assert apart[0] == apart[1] != apart[2] == apart[3]
    assert len({*whole[:3]}) == 3


# ---- starting


def test_start_prints_versions_and_settings_on_one_line(capsys):
    run = start("02_01", data="world", profile="lab", edition="as_described", seed=3, device="cpu")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"whalelib {whalelib.__version__}" in printed
    assert "seed 3" in printed
    assert run.device == "cpu"


def test_start_refuses_unknown_parameters_and_names():
    with pytest.raises(ValueError, match=r"unknown parameter\(s\) sed: the parameters are data"):
        start("02_01", sed=3)
    with pytest.raises(ValueError, match="02_01"):
        start("class_sizes")


def test_start_refuses_what_papermill_injected_unknown(monkeypatch):
    cells = ["", "seed = 0", "# Parameters\nsed = 3\nseed = 1\n"]
    shell = SimpleNamespace(user_ns={"In": cells})
    monkeypatch.setattr("builtins.get_ipython", lambda: shell, raising=False)
    with pytest.raises(ValueError, match=r"unknown parameter.*sed"):
        start("02_01", seed=1)
    cells[2] = "# Parameters\nseed = 1\n"
    assert start("02_01", seed=1).settings.seed == 1


def test_missing_cuda_is_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        start("02_01", device="cuda")


def test_processes_that_load_are_a_share_of_the_cores(monkeypatch):
    run = Run("02_01", Settings(profile="paper"))
    run.device = "cuda"
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12), raising=False)

    def workers(processes="1", cores=""):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        monkeypatch.setenv("WHALE_CPUS", cores)
        return run.resources["workers"]

    assert [workers(), workers("4"), workers("24")] == [11, 2, 1]
    assert [workers("4", "6"), workers("1", "1"), workers("1", "64")] == [5, 1, 15]


def test_importing_the_package_is_light():
    heavy = "print([name for name in ('torch', 'pandas', 'matplotlib') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, whalelib; {heavy}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ---- records


def test_record_returns_the_value_and_writes_it_in_full(run, places):
    assert run.record("MAP@5", np.float64(1 / 3)) == 1 / 3
    (row,) = rows_of(places)
    assert float(row["value"]) == 1 / 3
    assert [row[name] for name in ("data", "profile", "edition", "seed")] == [
        "world:lab@2019",
        "lab",
        "as_described",
        "0",
    ]
    assert row["device"] in {"cpu", run.device_name}
    assert float(row["seconds"]) >= 0


def test_record_again_replaces(run, places):
    run.record("a", 1)
    run.record("b", 2)
    run.record("a", 3)
    assert [(row["metric"], row["value"]) for row in rows_of(places)] == [("a", "3"), ("b", "2")]


def test_rerun_replaces_its_own_rows_only(run, places):
    run.record("old name", 1)
    Run("02_01", Settings(seed=1)).record("other seed", 2)
    Run("02_01", Settings()).record("new name", 3)
    assert {row["metric"] for row in rows_of(places)} == {"other seed", "new name"}


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), None, "", [1, 2], np.zeros(2)])
def test_record_refuses_what_is_no_value(run, places, value):
    with pytest.raises(ValueError, match="'MAP@5': a result is"):
        run.record("MAP@5", value)
    assert rows_of(places) == []


@pytest.mark.parametrize("value", [np.int64(3), np.float32(0.5), "new_whale", True, np.array(2.0)])
def test_record_takes_numbers_and_texts(run, places, value):
    run.record("m", value)
    assert rows_of(places)[0]["value"] == str(getattr(value, "item", lambda: value)())


# ---- figures


FRAME = pd.DataFrame({"x": [0, 1, 2], "y": [1.0, 2.0, 4.0]})


def draw():
    figure, axes = plt.subplots(figsize=(4, 2), layout="constrained")
    axes.plot(FRAME["x"], FRAME["y"])
    plt.close(figure)
    return figure


def test_figure_is_the_same_byte_for_byte(run, places):
    paths = [places / "figures" / f"02_01_line.{kind}" for kind in ("png", "csv")]
    run.save_figure(draw(), "line", FRAME)
    first = [path.read_bytes() for path in paths]
    run.save_figure(draw(), "line", FRAME)
    assert [path.read_bytes() for path in paths] == first
    assert b"matplotlib" not in first[0].lower()
    assert first[1] == b"x,y\n0,1\n1,2\n2,4\n"
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["02_01_line.csv", "02_01_line.png"]


def test_figure_keeps_a_named_index(run, places):
    run.save_figure(draw(), "line", FRAME.set_index("x")["y"])
    assert (places / "figures" / "02_01_line.csv").read_text().startswith("x,y\n0,1\n")


def test_figure_that_fails_leaves_the_old_one(run, places, monkeypatch):
    run.save_figure(draw(), "line", FRAME)
    before = (places / "figures" / "02_01_line.png").read_bytes()

    def half(path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    figure = draw()
    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        run.save_figure(figure, "line", FRAME)
    assert (places / "figures" / "02_01_line.png").read_bytes() == before
    assert len(list((places / "figures").iterdir())) == 2


def test_figure_name_is_checked(run):
    with pytest.raises(ValueError, match="lower-case"):
        run.save_figure(draw(), "../line", FRAME)


def test_only_default_settings_write_the_committed_figures(monkeypatch):
    monkeypatch.delenv("WHALE_FIGURES", raising=False)
    monkeypatch.delenv("WHALE_BUILD", raising=False)
    root = ledger.project_root()
    assert figures_folder(Settings()) == root / "figures"
    assert figures_folder(Settings(device="cpu", data="world:lab@2019")) == root / "figures"
    assert figures_folder(Settings(seed=1)).is_relative_to(root / "build" / "figures")


# ---- folders and given files


def test_folder_depends_on_everything_that_matters(run):
    first = run.folder("embeddings", size=128)
    assert first.is_dir()
    assert run.folder("embeddings", size=128) == first
    others = [run.folder("embeddings", size=64), run.folder("masks", size=128)]
    for settings in (Settings(seed=1), Settings(edition="as_shipped")):
        other = Run("02_01", settings)
        other.catalog = run.catalog
        others.append(other.folder("embeddings", size=128))
    run.catalog = SimpleNamespace(fingerprint="other")
    others.append(run.folder("embeddings", size=128))
    assert len({first, *others}) == 1 + len(others)


def test_reference_is_none_when_unset_and_an_error_when_wrong(run, monkeypatch, tmp_path):
    monkeypatch.delenv("WHALE_REFERENCE", raising=False)
    assert run.reference is None
    monkeypatch.setenv("WHALE_REFERENCE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="WHALE_REFERENCE"):
        _ = run.reference
    (tmp_path / "reference").mkdir()
    assert run.reference == (tmp_path / "reference").resolve()


def test_catalog_is_verified_and_its_problems_are_printed(animals, capsys):
    (animals / "bo" / "broken.png").write_bytes(b"no image")
    catalog = Run("02_01", Settings(data=str(animals))).catalog
    assert len(catalog) == 4
    assert "broken.png" in capsys.readouterr().out


# ---- ledger

ROW = {
    "notebook": "01_02",
    "metric": "MAP@5",
    "value": 0.5,
    "command": "make ledger NOTEBOOKS=01_02",
    "commit": "abc",
    "data": "playground2018",
    "profile": "lab",
    "edition": "as_described",
    "seed": 0,
    "device": "cpu",
    "seconds": 1.5,
}


def test_ledger_appends_in_its_columns(tmp_path):
    path = tmp_path / "ledger.csv"
    assert append_ledger([ROW], path) == 1
    assert append_ledger([{**ROW, "seed": 1, "value": 1 / 3}], path) == 1
    frame = read_ledger(path)
    assert tuple(frame.columns) == LEDGER_COLUMNS
    assert list(frame["seed"]) == [0, 1]
    assert float(frame["value"][1]) == 1 / 3
    assert frame["date"].str.match(r"\d{4}-\d\d-\d\dT").all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"value": math.nan}, "finite"),
        ({"data": "/home/someone/photos"}, "absolute path"),
        ({"command": ""}, "missing"),
        ({"machine": "x"}, "unknown"),
    ],
)
def test_ledger_refuses_and_writes_nothing(tmp_path, change, told):
    path = tmp_path / "ledger.csv"
    append_ledger([ROW], path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=f"row 2.*{told}"):
        append_ledger([ROW, {**ROW, **change}], path)
    assert path.read_bytes() == before


def test_ledger_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "ledger.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(LedgerError, match="columns"):
        append_ledger([ROW], path)
    assert path.read_text() == "a,b\n1,2\n"


def test_ledger_writers_at_once_lose_nothing(tmp_path):
    path = tmp_path / "ledger.csv"
    code = (
        "import sys; from pathlib import Path; from whalelib.ledger import append_ledger; import ast\n"
        "row = ast.literal_eval(sys.argv[2])\n"
        "for i in range(20): append_ledger([{**row, 'seed': i}], Path(sys.argv[1]))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), repr(ROW)]) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(read_rows(path)) == 60


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    (folder / "data" / "results").mkdir(parents=True)
    (folder / "code.py").write_text("1\n")
    (folder / "data" / "results" / "ledger.csv").write_text("old\n")
    git = ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    return folder


def test_commit_is_named_and_a_dirty_tree_refused(repository):
    clean = commit_of(repository)
    assert len(clean) == 12
    (repository / "data" / "results" / "ledger.csv").write_text("new\n")
    assert commit_of(repository) == clean
    (repository / "new.py").write_text("2\n")
    with pytest.raises(LedgerError, match=r"(?s)new\.py.*ALLOW_DIRTY=1"):
        commit_of(repository)
    assert commit_of(repository, allow_dirty=True) == f"{clean}+dirty"


def test_outside_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(LedgerError, match="git says"):
        commit_of(tmp_path)


def test_run_sees_its_own_ledger_rows(run, monkeypatch, tmp_path):
    path = tmp_path / "ledger.csv"
    monkeypatch.setattr(ledger, "ledger_path", lambda: path)
    assert run.ledger().empty
    append_ledger([ROW, {**ROW, "notebook": "02_01", "metric": "mine"}], path)
    assert list(run.ledger()["metric"]) == ["mine"]


def test_committed_ledger_is_well_formed():
    path = ledger.ledger_path()
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == LEDGER_COLUMNS
        for row in reader:
            ledger.measured(
                float(row["value"]) if row["value"][:1].isdigit() else row["value"], row["metric"]
            )
            assert all(row.values())
            assert not row["data"].startswith("/")


def test_a_large_figure_keeps_fewer_colours_and_pixels(places, monkeypatch):
    monkeypatch.setattr("whalelib.run.LARGE_FIGURE", 0)
    monkeypatch.setenv("WHALE_FIGURES", str(places / "figures"))
    figure = plt.figure(figsize=(4, 2))
    figure.add_axes((0, 0, 1, 1)).imshow(np.random.default_rng(0).random((40, 80, 3)))
    Run("02_01", Settings(data="world:tiny")).save_figure(figure, "noise", pd.DataFrame({"a": [1]}))
    with Image.open(places / "figures" / "02_01_noise.png") as image:
        assert image.mode == "P"
        assert image.width < 300


def test_markers_keep_their_colours_in_a_large_figure_of_a_photograph(places, monkeypatch):
    monkeypatch.setenv("WHALE_FIGURES", str(places / "figures"))
    generator = np.random.default_rng(0)
    sea = np.array([35, 80, 140]) + 25 * generator.standard_normal((400, 700, 1))
    sea[150:300, 200:500] -= 60
    figure = plt.figure(figsize=(7, 4))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(sea.clip(0, 255).astype(np.uint8))
    axis.axis("off")
    colours = {(60 + 110 * place, 60 + 50 * place): colour for place, colour in enumerate(PALETTE[:6])}
    for (x, y), colour in colours.items():
        axis.plot(x, y, "o", color=colour, markersize=6, markeredgecolor="white")
    run, path = Run("02_01", Settings(data="world:tiny")), places / "figures" / "02_01_markers.png"
    run.save_figure(figure, "markers", pd.DataFrame({"a": [1]}))
    first = path.read_bytes()
    run.save_figure(figure, "markers", pd.DataFrame({"a": [1]}))
    assert path.read_bytes() == first
    assert len(first) <= LARGE_FIGURE
    with Image.open(path) as image:
        assert image.mode == "P"
        pixels, scale = np.asarray(image.convert("RGB")).astype(int), image.width / 700
    for (x, y), colour in colours.items():
        found = pixels[round((y + 0.5) * scale), round((x + 0.5) * scale)]
        assert np.abs(found - ImageColor.getrgb(colour)).max() <= 4, (colour, found)


def test_rows_of_carry_the_runs_settings(animals):
    run = Run("05_14", Settings(data=str(animals), edition="as_shipped", seed=3, device="cpu"))
    (row,) = ledger.rows_of(run, {"MAP@5": 0.5}, command="python -m it", seconds=1.234, profile="paper")
    assert row == {
        "notebook": "05_14",
        "command": "python -m it",
        "data": "animals",
        "profile": "paper",
        "edition": "as_shipped",
        "seed": 3,
        "device": "cpu",
        "seconds": 1.2,
        "metric": "MAP@5",
        "value": 0.5,
    }
