"""The course's runner, pages, results and ledger on small notebooks; the Makefile and what it installs."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from packaging.requirements import Requirement
from PIL import Image

from whalelib.course import __main__ as command
from whalelib.course import execute, runner
from whalelib.course.execute import load, up_to_date
from whalelib.course.notebooks import CourseError, Notebook, discover
from whalelib.course.pages import mathml
from whalelib.course.results import shown
from whalelib.course.runner import jobs_of
from whalelib.ledger import LEDGER_COLUMNS, project_root, read_rows
from whalelib.run import Settings

PARAMETERS = 'data = "world"\nprofile = "lab"\nedition = "as_described"\nseed = 0\ndevice = "auto"'
BEGIN = (
    "from whalelib.run import Run, Settings\n"
    'run = Run("{}", Settings(data, profile, edition, seed, device))\n'
    "_ = run.record('seed again', seed)"
)
STORY = r"""## Equations
Inline $\sigma = 0.5$, and
$$C = \sqrt{\frac{1}{n}\sum_i x_i^2} \tag{2.1}$$
then [the next](01_02_fails.ipynb)."""
DRAW = (
    "import matplotlib.pyplot as plt\nimport pandas as pd\n"
    "figure, axes = plt.subplots(figsize=(2, 1))\naxes.plot([1, 2, 4])\n"
    "run.save_figure(figure, 'line', pd.DataFrame({'y': [1, 2, 4]}))"
)


def write(folder, name, *sources, parameters=PARAMETERS, title=None, solution=None):
    """Write a notebook: texts that begin with # are markdown, the others code."""
    cells = [new_markdown_cell(f"# {name}"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [new_markdown_cell(text) if text.startswith("#") else new_code_cell(text) for text in sources]
    if solution:
        cells.append(new_code_cell(solution, metadata={"tags": ["solution"]}))
    about = {"whalelib": {"title": title, "section": "2.1"}} if title else {}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=about), path)
    return path


class Course:
    """A notebooks folder and the places that its runs write to."""

    def __init__(self, place):
        self.place, self.notebooks, self.build = place, place / "notebooks", place / "build"
        self.data = place / "animals"
        for number, name in enumerate(["ada", "bo"]):
            (self.data / name).mkdir(parents=True)
            Image.new("RGB", (12, 8), (80 * number, 60, 40)).save(self.data / name / f"{name}.png")

    def arguments(self, what, *more):
        paths = ["--folder", str(self.notebooks)]
        if what != "refresh":
            paths += ["--build", str(self.build), "--data", str(self.data)]
        return [what, *paths, *more]

    def run(self, capsys, what="run", *more):
        code = command.main(self.arguments(what, *more))
        return code, capsys.readouterr().out

    def page(self, name):
        return (self.build / "html" / f"{name}.html").read_text(encoding="utf-8")


@pytest.fixture
def course(tmp_path, monkeypatch):
    for name in ("WHALE_FIGURES", "WHALE_RESULTS", "WHALE_BUILD", "WHALE_REFERENCE"):
        monkeypatch.delenv(name, raising=False)
    # Whoever edits the library while these tests run shall not see them fail.
    monkeypatch.setattr(execute, "sources_hash", lambda *_: "sources")
    return Course(tmp_path)


def state_of(printed, name):
    return re.search(rf"^\[\d+/\d+\] {name}.*\.\.\. (.*)$", printed, re.M)[1]


# ---- executing


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Run a course in which one notebook passes and the others fail, each in its own way."""
    course = Course(tmp_path_factory.mktemp("mixed"))
    folder = course.notebooks
    write(
        folder,
        "01_01_passes",
        f"#{STORY}",
        BEGIN.format("01_01"),
        DRAW,
        title="Fine & <dandy>",
        solution="6 * 7",
    )
    write(folder, "01_02_fails", "x = 1", "1 / 0", "y = 2")
    write(folder, "01_03_unknown", "1", parameters=PARAMETERS.replace('device = "auto"', ""))
    write(folder, "02_01_nothing", "# Words only")
    write(folder, "02_02_exits", "a = 1", "import sys\nsys.exit(0)", "b = 2")
    write(folder, "02_03_dies", "a = 1", "import os\nos._exit(1)", "b = 2")
    (folder / "02_04_garbage.ipynb").write_text("{nope")
    write(folder, "A_01_last", BEGIN.format("A_01"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WHALE_")}
    done = subprocess.run(
        [sys.executable, "-m", "whalelib.course", *course.arguments("run")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    course.code, course.printed, course.errors = done.returncode, done.stdout, done.stderr
    return course


def test_failures_stop_neither_the_others_nor_the_report(mixed):
    assert mixed.code == 1, mixed.errors
    assert state_of(mixed.printed, "01_01").startswith("ok ")
    assert state_of(mixed.printed, "A_01").startswith("ok ")
    assert "6 of 8 notebooks failed" in mixed.printed


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("01_02_fails", "cell 4: ZeroDivisionError: division by zero"),
        ("01_03_unknown", "its parameters cell doesn't know the parameter(s) device"),
        ("02_01_nothing", "no cell was executed"),
        ("02_02_exits", "cell 5: Stopped: 1 cell(s) were not executed"),
        ("02_03_dies", "cell 4: DeadKernelError: Kernel died"),
        ("02_04_garbage", "02_04_garbage.ipynb is no notebook"),
    ],
)
def test_failure_is_told_with_its_cell(mixed, name, why):
    assert "FAILED" in state_of(mixed.printed, name[:5])
    assert f"{name}: {why}" in mixed.printed or why in mixed.printed
    page = mixed.page(name)
    assert "This notebook failed" in page
    assert why.split(":")[-1].strip().split("'")[-1] in page


def test_partly_executed_page_shows_the_traceback(mixed):
    page = mixed.page("01_02_fails")
    assert "Traceback" in page
    assert "In\xa0[4]:" in page, "what ran has its number"
    assert "In\xa0[\xa0]:" in page, "what did not has none"


def test_results_are_printed_and_written(mixed):
    with (mixed.build / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["notebook"], row["metric"], row["value"]) for row in rows] == [
        ("01_01", "seed again", "0"),
        ("A_01", "seed again", "0"),
    ]
    assert {row["data"] for row in rows} == {"animals"}
    assert re.search(
        r"Results \(data animals, profile lab, edition as_described, seed 0, device cpu\)", mixed.printed
    )
    assert re.search(r"^01_01 +seed again +0$", mixed.printed, re.M)


def test_executed_copies_name_no_folder_of_this_machine(mixed):
    for row in read_rows(mixed.build / "results.csv"):
        assert str(mixed.place) not in str(row)


def test_progress_counts_what_is_done_and_names_what_runs(mixed):
    lines = re.findall(r"^\[(\d+)/8\] .*$", mixed.printed, re.M)
    assert lines == [str(number) for number in range(1, 9)]
    assert re.search(r"^running: 01_01(, \w+)*$", mixed.printed, re.M)


# ---- several at a time

WAIT = "import os, pathlib, time\nhere = pathlib.Path({!r})\n"
MEET = WAIT + (
    "(here / '{}').write_text('')\nbegan = time.monotonic()\n"
    "while len(list(here.iterdir())) < 2:\n    assert time.monotonic() - began < 120\n    time.sleep(0.05)"
)
THREADS = "run.record('threads', os.environ.get('OMP_NUM_THREADS', 'free'))"


def test_several_at_a_time_share_the_cores_and_are_told_in_order(course, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner, "CORES", 6)
    here = course.place / "here"
    here.mkdir()
    for number in ("01_01", "01_02"):
        more = "time.sleep(2)" if number == "01_01" else "1"
        write(
            course.notebooks,
            f"{number}_a",
            MEET.format(str(here), number),
            more,
            BEGIN.format(number),
            THREADS,
        )
    code, printed = course.run(capsys, "run", "--jobs", "2")
    assert code == 0, printed
    assert "running: 01_01, 01_02\n" in printed
    assert re.findall(r"^\[(.*)/2\] (\w+) .*?(?:; (.*))?$", printed, re.M) == [
        ("1", "01_02", "running: 01_01"),
        ("2", "01_01", ""),
    ]
    rows = [row for row in read_rows(course.build / "results.csv") if row["metric"] == "threads"]
    assert [(row["notebook"], row["value"]) for row in rows] == [("01_01", "3"), ("01_02", "3")]
    assert re.findall(r"^(01_0\d) +threads", printed, re.M) == ["01_01", "01_02"]

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    course.run(capsys, "run", "--jobs", "2", "--force", "--notebooks", "01_02")
    assert read_rows(course.build / "results.csv")[-1]["value"] == "5", "what the user sets stands"


def test_one_at_a_time_has_all_cores(course, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write(course.notebooks, "01_01_a", "import os", BEGIN.format("01_01"), THREADS)
    course.run(capsys, "run", "--jobs", "1")
    assert read_rows(course.build / "results.csv")[-1]["value"] == "free"


def test_auto_is_one_where_a_notebook_needs_the_whole_machine(monkeypatch):
    monkeypatch.setattr(runner.Run, "device", "cpu")
    assert jobs_of("auto", Settings()) == runner.AT_ONCE
    assert jobs_of("auto", Settings(profile="paper")) == 1
    assert jobs_of("auto", Settings(device="cuda")) == 1
    assert jobs_of("3", Settings(device="cuda")) == 3
    monkeypatch.setattr(runner.Run, "device", "cuda")
    assert jobs_of("auto", Settings()) == 1


def test_a_process_that_dies_is_its_own_notebooks_failure(course, capsys, tmp_path):
    pid = tmp_path / "pid"
    killed = (
        "import os, pathlib, signal\nfrom multiprocessing import parent_process\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        "os.kill(parent_process().pid, signal.SIGKILL)\n"
        "import time; time.sleep(600)"
    )
    write(course.notebooks, "01_01_killed", "1")
    write(course.notebooks, "01_02_lives", "1")
    assert course.run(capsys)[0] == 0
    write(course.notebooks, "01_01_killed", killed)
    write(course.notebooks, "01_02_lives", "2")
    code, printed = course.run(capsys)
    assert code == 1
    assert "ProcessLost: the process that executed it was killed by SIGKILL" in state_of(printed, "01_01")
    assert state_of(printed, "01_02").startswith("ok ")
    assert "killed by SIGKILL" in course.page("01_01_killed")
    assert not load(course.build, Notebook(course.notebooks / "01_01_killed.ipynb")).ok
    for _ in range(50):
        if not Path(f"/proc/{pid.read_text()}").exists():
            return
        time.sleep(0.1)
    pytest.fail("its kernel lives on")


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux")
def test_kernels_are_fresh_and_have_imported_the_libraries(course, capsys):
    there = "import sys\nfor name in ('torch', 'tqdm'):\n    run.record(name, int(name in sys.modules))"
    names = "run.record('names', int('left' in globals()))\nleft = 1"
    inline = "import matplotlib.pyplot as plt\nrun.record('backend', plt.get_backend().split('.')[-1])"
    for name in ("01_01_a", "01_02_b"):
        write(course.notebooks, name, BEGIN.format(name[:5]), there, names, inline)
    code, printed = course.run(capsys, "run", "--jobs", "1")
    assert code == 0, printed
    found = {row["metric"]: row["value"] for row in read_rows(course.build / "results.csv")}
    assert found == {"seed again": "0", "torch": "1", "tqdm": "0", "names": "0", "backend": "backend_inline"}


# ---- pages


def test_page_needs_no_network(mixed):
    for path in (mixed.build / "html").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"""(?:src|srcset)=["']?(?:https?:)?//""", text), path.name
        assert not re.findall(r"<link[^>]+href=[\"']?(?:https?:)?//", text), path.name
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text), path.name
        assert not re.findall(r"<script(?![^>]*type=.application/)", text), path.name


def test_page_draws_equations_and_links_pages(mixed):
    page = mixed.page("01_01_passes")
    assert page.count("<math") == 2
    assert "(2.1)" in page
    assert "$" not in re.sub(r"<style.*?</style>", "", page, flags=re.S).replace("url($", "")
    assert 'href="01_02_fails.html"' in page
    assert "<details" in page
    assert "Fine &amp; &lt;dandy&gt;" in mixed.page("01_02_fails")


def test_index_lists_everything(mixed):
    index = mixed.page("index")
    for text in (
        "Introduction",
        "The competition&#39;s photographs",
        "Fine &amp; &lt;dandy&gt;",
        "seed again",
    ):
        assert text in index
    assert index.count('class="pill failed"') == 6
    thumbnail = re.search(r'src="(thumbnails/01_01_line\.png)"', index)[1]
    with Image.open(mixed.build / "html" / thumbnail) as image:
        assert image.width <= 480


@pytest.mark.parametrize("latex", [r"\frac{1}{2", r"\nosuchcommand{x}"])
def test_unread_equation_is_an_error(latex):
    with pytest.raises(ValueError, match="equation"):
        mathml(latex, display=True)


def test_bar_is_drawn_above_the_letter():
    assert '<mo stretchy="false">\N{OVERLINE}</mo>' in mathml(r"\bar X", display=False)


def test_only_tagged_equations_are_numbered():
    assert "(1)" not in mathml(r"\begin{align} a &= b \\ c &= d \end{align}", display=True)
    assert "(4.9)" in mathml(r"h(x) = x \tag{4.9}", display=True)


# ---- only missing work is redone


def test_only_what_changed_is_executed_again(course, capsys, monkeypatch):
    first = write(course.notebooks, "01_01_draws", BEGIN.format("01_01"), DRAW)
    write(course.notebooks, "01_02_fails", "1 / 0")
    assert course.run(capsys)[0] == 1

    code, printed = course.run(capsys)
    assert code == 1
    assert state_of(printed, "01_01").startswith("up to date")
    assert state_of(printed, "01_02").startswith("FAILED")
    assert re.search(r"^01_01 +seed again +0$", printed, re.M)

    write(course.notebooks, "01_02_fails", "1 + 0")
    code, printed = course.run(capsys)
    assert code == 0
    assert state_of(printed, "01_02").startswith("ok ")

    def redone():
        again = state_of(course.run(capsys, "run", "--notebooks", "01_01")[1], "01_01").startswith("ok ")
        kept = state_of(course.run(capsys, "run", "--notebooks", "01_01")[1], "01_01").startswith(
            "up to date"
        )
        return again and kept

    node = nbformat.read(first, as_version=4)
    node.cells[-1].outputs = []
    nbformat.write(node, first)
    assert not redone(), "outputs are no part of the source"
    node.cells.append(new_code_cell("1"))
    nbformat.write(node, first)
    assert redone(), "the source changed"
    next((course.build / "figures").rglob("01_01_line.png")).unlink()
    assert redone(), "a figure was missing"
    Image.new("RGB", (20, 10)).save(course.data / "ada" / "new.png")
    assert redone(), "the data changed"
    monkeypatch.setattr(execute, "sources_hash", lambda *_: "edited")
    assert redone(), "the library changed"
    monkeypatch.setenv("WHALE_REFERENCE", str(course.place))
    assert redone(), "reference files were given"
    shutil.rmtree(course.build / "html")
    assert not redone(), "a page alone is rendered again without executing"
    assert (course.build / "html" / "01_01_draws.html").exists()


def test_other_settings_are_other_work(course, capsys):
    write(course.notebooks, "01_01_draws", BEGIN.format("01_01"), DRAW)
    course.run(capsys)
    code, printed = course.run(capsys, "run", "--seed", "3")
    assert code == 0
    assert state_of(printed, "01_01").startswith("ok ")
    assert re.search(r"^01_01 +seed again +3$", printed, re.M)
    assert read_rows(course.build / "results.csv")[0]["seed"] == "3"
    assert len(list((course.build / "figures").rglob("01_01_line.png"))) == 2


def test_figures_are_listed(course, capsys):
    write(course.notebooks, "01_01_draws", BEGIN.format("01_01"), DRAW)
    code, printed = course.run(capsys, "figures")
    assert code == 0
    assert "1 figures" in printed
    assert "01_01_line.png" in printed


# ---- requests that can't be met


def test_patterns_choose_in_order(course):
    for name in ("02_01_b", "01_01_a", "A_01_z", "01_02_c"):
        write(course.notebooks, name)

    def names(patterns):
        return [notebook.name for notebook in discover(course.notebooks, patterns)]

    assert names("") == ["01_01_a", "01_02_c", "02_01_b", "A_01_z"]
    assert names("A_* 01_*") == ["01_01_a", "01_02_c", "A_01_z"]
    assert names("02_01, 01_02_c.ipynb") == ["01_02_c", "02_01_b"]
    with pytest.raises(CourseError, match=r"(?s)no notebook matches '03_\*'.*01_01_a"):
        names("01_* 03_*")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--notebooks", "09_*"], "no notebook matches '09_*'"),
        (["--profile", "labs"], "choose one of lab, small, paper"),
        (["--edition", "shipped"], "as_shipped"),
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--seed", "x"], "whole number"),
        (["--seed", "0,1"], "whole number"),
        (["--data", "no/such/folder"], "exists"),
        (["--jobs", "0"], "auto or a whole number from 1"),
        (["--jobs", "many"], "auto or a whole number from 1"),
    ],
)
def test_bad_request_is_one_clear_error(course, capsys, more, told):
    write(course.notebooks, "01_01_a", "1")
    assert command.main([*course.arguments("run"), *more]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert told in output.err
    assert not course.build.exists()


def test_unusable_data_is_one_clear_error(course, capsys):
    write(course.notebooks, "01_01_a", "1")
    shutil.rmtree(course.data)
    course.data.mkdir()
    (course.data / "train.csv").write_text("Image,Name\na.jpg,w_1\n")
    assert command.main(course.arguments("run")) == 2
    assert "train.csv" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--profil", "lab"], ["--sed", "1"], ["more"]])
def test_unknown_option_is_an_error(course, more):
    with pytest.raises(SystemExit) as raised:
        command.main([*course.arguments("run"), *more])
    assert raised.value.code == 2


# ---- interrupted


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_what_is_finished(course, how):
    write(course.notebooks, "01_01_first", BEGIN.format("01_01"))
    markers = [course.place / name for name in ("one", "two")]
    for number, marker in enumerate(markers, start=2):
        told = f"pathlib.Path({str(marker)!r}).write_text(str(os.getpid()))"
        write(course.notebooks, f"01_0{number}_slow", f"import os, pathlib, time\n{told}\ntime.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, "-m", "whalelib.course", *course.arguments("run", "--jobs", "2")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background may have SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    deadline = time.monotonic() + 300
    while not all(marker.exists() for marker in markers) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(how)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "goes on from there" in printed
    kernels = [Path("/proc", marker.read_text()) for marker in markers]
    for _ in range(100):
        if not any(kernel.exists() for kernel in kernels):
            break
        time.sleep(0.1)
    assert not any(kernel.exists() for kernel in kernels)
    assert [path.name for path in (course.build / "notebooks").iterdir()] == ["01_01_first.ipynb"]
    assert "not run" in course.page("index")
    first = load(course.build, Notebook(course.notebooks / "01_01_first.ipynb"))
    assert up_to_date(first, first.key), "the next run has no need to repeat it"


# ---- the ledger


@pytest.fixture
def ledger(course, monkeypatch):
    monkeypatch.setattr(command, "commit_of", lambda *_: "0123456789ab")
    course.ledger = course.place / "ledger.csv"
    write(course.notebooks, "01_01_measures", BEGIN.format("01_01"))
    return course


def test_ledger_takes_every_seed_once(ledger, capsys):
    more = ("--seed", "0,1", "--ledger", str(ledger.ledger))
    code, printed = ledger.run(capsys, "ledger", *more)
    assert code == 0
    rows = read_rows(ledger.ledger)
    assert tuple(rows[0]) == LEDGER_COLUMNS
    assert [(row["seed"], row["value"]) for row in rows] == [("0", "0"), ("1", "1")]
    assert {row["commit"] for row in rows} == {"0123456789ab"}
    assert rows[1]["command"] == (
        "make ledger NOTEBOOKS=01_01 DATA=animals PROFILE=lab EDITION=as_described SEED=1 DEVICE=auto"
    )
    assert not (ledger.build / "html").exists(), "the course's own pages stay as they were"

    assert ledger.run(capsys, "ledger", *more)[0] == 0
    assert read_rows(ledger.ledger) == rows, "nothing is entered twice"
    ledger.ledger.unlink()
    code, printed = ledger.run(capsys, "ledger", *more)
    assert printed.count("up to date") == 2
    assert len(read_rows(ledger.ledger)) == 2, "what was measured but not entered is entered"


def test_ledger_refuses_failures(ledger, capsys):
    write(ledger.notebooks, "01_02_fails", BEGIN.format("01_02"), "1 / 0")
    assert ledger.run(capsys, "ledger", "--ledger", str(ledger.ledger))[0] == 1
    assert [row["notebook"] for row in read_rows(ledger.ledger)] == ["01_01"]


def test_ledger_refuses_code_that_changed_meanwhile(ledger, capsys, monkeypatch):
    commits = iter(["0123456789ab", "ba9876543210"])
    monkeypatch.setattr(command, "commit_of", lambda *_: next(commits))
    assert ledger.run(capsys, "ledger", "--ledger", str(ledger.ledger))[0] == 2
    assert read_rows(ledger.ledger) == []


def test_ledger_rows_belong_to_what_a_page_shows(course, capsys, monkeypatch):
    write(course.notebooks, "01_01_shows", "1")
    rows = [{"notebook": "01_01", "metric": "m", "value": "1"}]
    monkeypatch.setattr("whalelib.course.runner.read_rows", lambda _: rows)
    course.run(capsys)
    assert state_of(course.run(capsys)[1], "01_01").startswith("up to date")
    rows.append({"notebook": "09_09", "metric": "m", "value": "1"})
    assert state_of(course.run(capsys)[1], "01_01").startswith("up to date")
    rows.append({"notebook": "01_01", "metric": "n", "value": "1"})
    assert state_of(course.run(capsys)[1], "01_01").startswith("ok ")


# ---- refreshing the committed notebooks


def test_refresh_replaces_outputs_in_place(course, capsys):
    path = write(course.notebooks, "01_01_a", "import sys\nprint('one', end='\\r')\nprint('two')", "seed + 1")
    broken = write(course.notebooks, "01_02_b", "print('kept')\n1 / 0")
    before = broken.read_bytes()
    code, printed = course.run(capsys, "refresh")
    assert code == 1
    assert "left as it was" in state_of(printed, "01_02")
    assert broken.read_bytes() == before
    node = nbformat.read(path, as_version=4)
    code_cells = [cell for cell in node.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code_cells] == [1, 2, 3]
    assert code_cells[1].outputs[0].text == "two\n"
    assert code_cells[2].outputs[0].data["text/plain"] == "1"
    assert set(node.metadata) <= {"whalelib", "kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in node.cells)


# ---- results


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0.51234567", "0.5123"),
        ("12", "12"),
        ("1e-07", "1e-07"),
        ("3.0", "3.0"),
        ("w_1", "w_1"),
        ("-0.25", "-0.2500"),
    ],
)
def test_values_are_rounded_for_display_only(value, text):
    assert shown(value) == text


# ---- the Makefile and what it installs

ROOT = project_root()


def make(*arguments):
    own = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # that of `make test`
    return subprocess.run(
        ["make", "-C", ROOT, *arguments], capture_output=True, text=True, check=False, env=own
    )


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@needs_make
def test_make_refuses_unknown_parameters():
    for wrong in ("PROFIL=lab", "ALLOW_DIRTY=yes", "seed=1", "WHALE_REFERENCE=no/such/folder"):
        done = make("help", wrong)
        assert done.returncode == 2
        assert wrong.split("=")[0] in done.stderr
    assert make("help", "NOTEBOOKS=02_* 01_02", "SEED=1").returncode == 0


@needs_make
def test_make_refuses_what_a_target_does_not_take_and_hands_on_the_rest():
    for target, wrong in (
        ("graph", "FOLD=0"),
        ("paper-list", "SEED=1"),
        ("lab", "DATA=world"),
        ("clean", "BUILD=x"),
    ):
        done = make("-n", target, wrong)
        assert done.returncode == 2
        assert f"make {target} doesn't take {wrong.split('=')[0]}; it takes " in done.stderr
    for target, given, told in (
        ("paper", "PROFILE=small", '--profile "$PROFILE"'),
        ("paper", "BATCH=8", '--batch "$BATCH"'),
        ("paper-list", "PROFILE=lab", '--profile "$PROFILE"'),
        ("paper-list", "EDITION=as_shipped", '--edition "$EDITION"'),
        ("graph", "BUILD=x", 'WHALE_BUILD="$BUILD"'),
        ("test", "JOBS=2", '-n "$JOBS"'),
    ):
        assert told in make("-n", target, given).stdout
    assert "--profile" not in make("-n", "paper").stdout  # it has its own default


@needs_make
def test_make_help_tells_every_target_and_parameter():
    text = make("help").stdout
    source = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", source, re.M)[1].split()
    for target in set(targets) - {"help", "install"}:
        assert f"make {target} " in text
    known = re.search(r"^KNOWN = (.*)$", source, re.M)[1].split()
    for name in known:
        assert name.startswith("WHALE_") or f"  {name}=" in text
    assert re.search("^  paper-list +PROFILE EDITION$", text, re.M)


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in lists for line in group], project


def test_constraints_pin_what_the_project_needs():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(
        re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines if not line.startswith("#")
    )
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    for requirement in requirements()[0]:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(versions[name]), requirement


def test_conda_environment_installs_the_same_through_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    _, project = requirements()
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert Requirement(f"python{project['requires-python']}").specifier.contains(
        python.removeprefix("python=") + ".0"
    )
    assert "pip" in environment["dependencies"]
    through_pip = environment["dependencies"][-1]["pip"]
    extras = ",".join(sorted(project["optional-dependencies"]))
    assert sorted(through_pip) == ["-c constraints.txt", f"-e .[{extras}]"]
    assert environment["name"] == project["name"]


def test_citation_names_the_report_and_the_three_solutions():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == requirements()[1]["license"] == "MIT"
    assert citation["version"] == requirements()[1]["version"]
    report, *solutions = citation["references"]
    assert report["title"] == "Humpback Whale Identification Challenge: An Overview of the Top Solutions"
    assert [solution["authors"][0]["family-names"] for solution in solutions] == ["Qiao", "Shen", "Park"]
    assert all(solution["repository-code"].startswith("https://github.com/") for solution in solutions)
