"""Every notebook keeps the course's rules; every rule is shown to catch a notebook that breaks it."""

import ast
import re
import statistics
import subprocess
from dataclasses import asdict

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from whalelib.course.notebooks import NAME, Notebook
from whalelib.course.pages import mathml
from whalelib.ledger import project_root
from whalelib.run import Settings

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000
HEADER = ("Report", "You will learn", "Minutes", "Device", "Data")
ABOUT = {"title": str, "section": str, "minutes": (int, float), "device": str, "data": str, "claims": list}
COMPARED = ("report", "shipped code", "ours")
NAMES = ", ".join(f"{name}={name}" for name in asdict(Settings()))
PATHS = re.compile(r"""(?:^|[\s'"(=:])(/(?!kaggle/)[A-Za-z][\w.-]*/[\w.-]+)""")

# ---- the rules: each takes a notebook and yields what is wrong


def code_cells(notebook):
    return notebook.cells()


def texts(notebook):
    return [cell.source for cell in notebook.node.cells if cell.cell_type == "markdown"]


def tagged(notebook, tag):
    return [cell for cell in notebook.node.cells if tag in cell.metadata.get("tags", [])]


def has_its_name(notebook):
    if not NAME.fullmatch(notebook.name):
        yield f"{notebook.path.name} is not of the form NN_MM_slug.ipynb"


def is_small(notebook):
    size = notebook.path.stat().st_size
    if size >= MAX_BYTES:
        yield f"{size:,} bytes, at most {MAX_BYTES:,} are allowed"


def was_executed_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if not counts or counts != list(range(1, len(counts) + 1)):
        yield f"execution counts {counts}"


def has_no_error(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"In [{cell.execution_count}]: {output.ename}"


def has_the_five_parameters(notebook):
    cells = tagged(notebook, "parameters")
    if len(cells) != 1:
        yield f"{len(cells)} cells tagged parameters"
        return
    lines = ast.parse(cells[0].source).body
    try:
        given = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (AttributeError, ValueError):
        given = None
    if given != asdict(Settings()):
        yield f"parameters {given}, not {asdict(Settings())}"
    if notebook.node.cells[1] is not cells[0]:
        yield "the parameters are not the second cell"


def starts_under_its_number(notebook):
    call = f'whalelib.start("{notebook.number}", {NAMES})'
    if not any(call in cell.source for cell in code_cells(notebook)):
        yield f"no {call}"


def tree(cell):
    return ast.parse(re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.M))


def defines_little(notebook):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [
        node.name for cell in code_cells(notebook) for node in ast.walk(tree(cell)) if isinstance(node, kinds)
    ]
    if len(found) > 3:
        yield f"{len(found)} definitions, at most 3 belong in a notebook: {', '.join(found)}"


def has_short_cells(notebook):
    lengths = [len(cell.source.strip().splitlines()) for cell in code_cells(notebook)]
    for cell, length in zip(code_cells(notebook), lengths, strict=True):
        if length > 35:
            yield f"In [{cell.execution_count}] has {length} lines, more than 35"
    if lengths and statistics.median(lengths) > 8:
        yield f"the median code cell has {statistics.median(lengths)} lines, more than 8"


def says_what_it_is(notebook):
    first = notebook.node.cells[0]
    number = notebook.number.replace("_", ".")
    if first.cell_type != "markdown" or not first.source.startswith(f"# {number} {notebook.title}\n"):
        yield f"its first cell does not begin with '# {number} {notebook.title}'"
    for name in HEADER:
        if f"**{name}**" not in first.source:
            yield f"its first cell has no **{name}**"


def has_metadata(notebook):
    about = notebook.node.metadata.get("whalelib", {})
    for name, kind in ABOUT.items():
        outside = name == "claims" and about.get(name) == []  # a notebook about none of the report's items
        if not isinstance(about.get(name), kind) or not (about[name] or outside):
            yield f"metadata whalelib.{name}: {about.get(name)!r}"
    extra = sorted(set(notebook.node.metadata) - {"whalelib", "kernelspec", "language_info"})
    extra += sorted({key for cell in notebook.node.cells for key in cell.metadata} - {"tags"})
    if extra:
        yield f"metadata left by a tool: {', '.join(extra)}"


def checks_one_output(notebook):
    cells = [cell for cell in code_cells(notebook) if re.search(r"^# NBVAL_CHECK_OUTPUT$", cell.source, re.M)]
    if len(cells) != 1:
        yield f"{len(cells)} cells with # NBVAL_CHECK_OUTPUT"
    elif not any(
        (output.get("text") or output.get("data", {}).get("text/plain", "")).strip()
        for output in cells[0].outputs
    ):
        yield "its checked cell has no text as output"


def solves_its_exercises(notebook):
    order = [
        tag
        for cell in notebook.node.cells
        for tag in cell.metadata.get("tags", [])
        if tag in ("exercise", "solution")
    ]
    if "exercise" not in order:
        yield "no cell tagged exercise"
    for place, tag in enumerate(order):
        if tag == "exercise" and order[place + 1 : place + 2] != ["solution"]:
            yield f"exercise {order[: place + 1].count('exercise')} has no solution after it"
    for tag, kind in (("exercise", "markdown"), ("solution", "code")):
        if any(cell.cell_type != kind for cell in tagged(notebook, tag)):
            yield f"a cell tagged {tag} is not {kind}"


def says_when_it_goes_wrong(notebook):
    if not any(re.search(r"^## When it goes wrong$", text, re.M) for text in texts(notebook)):
        yield "no '## When it goes wrong'"


def compares(notebook):
    tables = [line for text in texts(notebook) for line in text.splitlines() if line.startswith("|")]
    shown = [
        output.data.get("text/plain", "")
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "data" in output
    ]
    heads = [text.lower() for text in (*tables, *(text.split("\n")[0] for text in shown))]
    if not any(all(name in head for name in COMPARED) for head in heads):
        yield f"no table with the columns {' / '.join(COMPARED)}"


def has_equations_that_render(notebook):
    for text in texts(notebook):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        for block, inline in re.findall(r"(?<!\\)\$\$(.+?)\$\$|(?<![\\$])\$([^$]+?)(?<!\\)\$", prose, re.S):
            try:
                mathml(block or inline, display=bool(block))
            except ValueError as error:
                yield str(error)


def names_no_folder_of_a_machine(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            if found := PATHS.search(text):
                yield f"In [{cell.execution_count}] shows {found[1]}"


RULES = [
    has_its_name,
    is_small,
    was_executed_in_order,
    has_no_error,
    has_the_five_parameters,
    starts_under_its_number,
    defines_little,
    has_short_cells,
    says_what_it_is,
    has_metadata,
    checks_one_output,
    solves_its_exercises,
    says_when_it_goes_wrong,
    compares,
    has_equations_that_render,
    names_no_folder_of_a_machine,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path, rule):
    assert list(rule(Notebook(path))) == []


def test_there_are_notebooks():
    assert NOTEBOOKS
    numbers = [Notebook(path).number for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)


def test_nothing_large_is_committed():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert files
    assert [
        (path.name, path.stat().st_size)
        for path in files
        if path.exists() and path.stat().st_size >= MAX_BYTES
    ] == []


# ---- each rule catches what it is for

HEAD = "# 02.01 Sizes\n\n" + "\n".join(f"- **{name}**: x" for name in HEADER)
VALUES = "\n".join(f"{name} = {value!r}".replace("'", '"') for name, value in asdict(Settings()).items())
START = f'import whalelib\n\nrun = whalelib.start("02_01", {NAMES})'
CLOSING = (
    "| what | report | shipped code | ours |\n|---|---|---|---|\n| a | 1 | 1 | 1 |\n\n"
    "## When it goes wrong\nNothing."
)


def good():
    """Return a notebook that keeps every rule."""

    def code(source, *outputs, tags=()):
        return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)} if tags else {})

    cells = [
        new_markdown_cell(HEAD),
        code(VALUES, tags=["parameters"]),
        code(START, new_output("stream", text="whalelib 0.1.0, data/world, /kaggle/input is fine\n")),
        new_markdown_cell(
            r"The mean $\bar x$ costs \$5, `$code`, and" + "\n" + r"$$a = \frac{b}{c} \tag{2.1}$$"
        ),
        code("# NBVAL_CHECK_OUTPUT\nprint(1)", new_output("stream", text="1\n")),
        new_markdown_cell("Try.", metadata={"tags": ["exercise"]}),
        code("1", tags=["solution"]),
        new_markdown_cell(CLOSING),
    ]
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
    about = {
        "title": "Sizes",
        "section": "2.2.1",
        "minutes": 1,
        "device": "cpu",
        "data": "any",
        "claims": ["section 2.2.1"],
    }
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"whalelib": about, "kernelspec": kernel})


def problems(rule, node, folder, name="02_01_sizes"):
    path = folder / f"{name}.ipynb"
    nbformat.write(node, path)
    return list(rule(Notebook(path)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_lets_a_good_notebook_pass(rule, tmp_path):
    assert problems(rule, good(), tmp_path) == []


def set_source(place, source):
    return lambda node: node.cells[place].update(source=source)


def set_output(place, *outputs):
    return lambda node: node.cells[place].update(outputs=list(outputs))


def set_tags(place, *tags):
    return lambda node: node.cells[place].metadata.update(tags=list(tags))


def set_about(**values):
    return lambda node: node.metadata.whalelib.update(values)


BREAKS = [
    (is_small, set_output(4, new_output("stream", text="x" * MAX_BYTES)), "bytes"),
    (was_executed_in_order, lambda node: node.cells[2].update(execution_count=None), r"\[1, None, 3, 4\]"),
    (was_executed_in_order, lambda node: node.cells[2].update(execution_count=7), r"\[1, 7, 3, 4\]"),
    (was_executed_in_order, lambda node: node.update(cells=node.cells[:1]), r"\[\]"),
    (has_no_error, set_output(4, new_output("error", ename="KeyError", evalue="", traceback=[])), "KeyError"),
    (has_the_five_parameters, set_tags(1), "0 cells"),
    (has_the_five_parameters, set_tags(2, "parameters"), "2 cells"),
    (has_the_five_parameters, set_source(1, VALUES + "\nmore = 1"), "more"),
    (has_the_five_parameters, set_source(1, VALUES.replace("seed = 0", "seed = 1")), "'seed': 1"),
    (has_the_five_parameters, set_source(1, VALUES.replace("seed = 0", "seed = int()")), "None"),
    (has_the_five_parameters, lambda node: node.cells.insert(1, node.cells.pop(2)), "second cell"),
    (starts_under_its_number, set_source(2, START.replace("02_01", "02_02")), "02_01"),
    (starts_under_its_number, set_source(2, START.replace("seed=seed", "seed=0")), "seed=seed"),
    (
        defines_little,
        set_source(4, "%time 1\n" + "".join(f"def f{i}(): pass\n" for i in range(4))),
        "f0, f1, f2, f3",
    ),
    (has_short_cells, set_source(4, "1\n" * 36), "36 lines"),
    (
        has_short_cells,
        lambda node: [cell.update(source="1\n" * 9) for cell in node.cells if cell.cell_type == "code"],
        "median",
    ),
    (says_what_it_is, set_source(0, HEAD.replace("02.01", "02.02")), "02.01 Sizes"),
    (says_what_it_is, set_source(0, HEAD.replace("**Minutes**", "Minutes")), "Minutes"),
    (says_what_it_is, set_about(title="Other"), "Other"),
    (has_metadata, set_about(claims="section 2.1"), "claims"),
    (has_metadata, set_about(minutes="2"), "minutes"),
    (has_metadata, lambda node: node.metadata.pop("whalelib"), "title"),
    (has_metadata, lambda node: node.metadata.update(papermill={}), "papermill"),
    (has_metadata, lambda node: node.cells[4].metadata.update(execution={}), "execution"),
    (checks_one_output, set_source(4, "print(1)"), "0 cells"),
    (checks_one_output, set_source(6, "# NBVAL_CHECK_OUTPUT\n1"), "2 cells"),
    (checks_one_output, set_output(4), "no text"),
    (checks_one_output, set_output(4, new_output("stream", text=" \n")), "no text"),
    (solves_its_exercises, set_tags(5), "no cell tagged exercise"),
    (solves_its_exercises, set_tags(6), "exercise 1 has no solution"),
    (solves_its_exercises, set_tags(3, "exercise"), "exercise 1 has no solution"),
    (solves_its_exercises, set_tags(7, "solution"), "not code"),
    (says_when_it_goes_wrong, set_source(7, CLOSING.replace("## When", "When")), "goes wrong"),
    (compares, set_source(7, CLOSING.replace("shipped code", "code")), "shipped code"),
    (has_equations_that_render, set_source(3, r"$$\frac{1$$"), "equation"),
    (has_equations_that_render, set_source(3, r"is $\nosuch{x}$"), "nosuch"),
    (
        names_no_folder_of_a_machine,
        set_output(4, new_output("stream", text="in /home/me/x.png\n")),
        "/home/me",
    ),
]


@pytest.mark.parametrize(("rule", "change", "told"), BREAKS, ids=[f"{b[0].__name__}-{b[2]}" for b in BREAKS])
def test_rule_catches_a_broken_notebook(rule, change, told, tmp_path):
    node = good()
    change(node)
    found = problems(rule, node, tmp_path)
    assert found
    assert re.search(told, " ".join(found))


@pytest.mark.parametrize("name", ["02_1_sizes", "2_01_sizes", "02_01", "02_01_Sizes", "AB_01_x"])
def test_rule_catches_a_wrong_name(name, tmp_path):
    assert problems(has_its_name, good(), tmp_path, name)


def test_table_may_be_an_output(tmp_path):
    node = good()
    node.cells[7].source = ""
    frame = "   what report shipped code ours\n0  a 1 1 1"
    node.cells[4].outputs = [new_output("execute_result", data={"text/plain": frame})]
    assert problems(compares, node, tmp_path) == []


def test_every_rule_is_shown_to_fail():
    assert {rule for rule, *_ in BREAKS} | {has_its_name} == set(RULES)
