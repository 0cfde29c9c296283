"""The pages: every executed notebook as HTML that needs no network, and an index of them."""

import base64
import logging
import mimetypes
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import unquote

import jinja2
import nbformat
from math_core import LatexError, LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from whalelib import report
from whalelib.course.execute import Outcome, executed_path, tidy
from whalelib.course.notebooks import Notebook
from whalelib.course.results import shown
from whalelib.files import replacing
from whalelib.run import Settings

HERE = Path(__file__).parent
THUMBNAIL = 480
CONVERTER = LatexToMathML(fancy_error=False)


def mathml(latex: str, display: bool) -> str:
    r"""Return an equation as MathML, which browsers draw by themselves; numbered only by ``\tag``.

    Raises:
        ValueError: the equation is not understood.
    """
    body = re.sub(r"\\label\{[^}]*\}", "", latex).strip()
    if r"\tag" in body and r"\begin{" not in body:
        body = rf"\begin{{equation}}{body}\end{{equation}}"
    elif r"\tag" not in body:
        body = re.sub(r"\\(begin|end)\{(equation|align|gather|multline)\}", r"\\\1{\2*}", body)
    try:
        drawn = CONVERTER.convert_with_local_state(body, displaystyle=display)
    except LatexError as error:
        raise ValueError(f"equation {latex.strip()!r}: {error}") from error
    return drawn.replace(">\N{MACRON}</mo>", ">\N{OVERLINE}</mo>")  # browsers draw a macron into the letter


class _Renderer(IPythonRenderer):
    """Markdown whose equations, pictures and links work in a page without network."""

    def __init__(self, folder: Path, **options):
        super().__init__(escape=False, **options)
        self.folder = folder

    def _math(self, latex: str, display: bool) -> str:
        try:
            return mathml(latex, display)
        except ValueError:
            return f'<code class="equation-unread">{self.escape_html(latex)}</code>'

    def block_math(self, body: str) -> str:
        return self._math(body, display=True)

    def inline_math(self, body: str) -> str:
        return self._math(body, display=False)

    def latex_environment(self, name: str, body: str) -> str:
        return self._math(f"\\begin{{{name}}}{body}\\end{{{name}}}", display=True)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        file = self.folder / unquote(url)
        if "://" not in url and not url.startswith(("data:", "attachment:")) and file.is_file():
            kind = mimetypes.guess_type(file.name)[0]
            url = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        return super().image(text, url, title)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if "://" not in url:
            url = re.sub(r"^([\w.-]+)\.ipynb(?=$|#)", r"\1.html", url)
        return super().link(text, url, title)


class _Exporter(HTMLExporter):
    """nbconvert's lab pages without scripts from elsewhere."""

    def __init__(self, folder: Path):
        self.folder = folder
        super().__init__(raw_template=(HERE / "page.html").read_text("utf-8"))
        self.log.setLevel(logging.ERROR)  # it warns of pictures without words for them, given below

    @jinja2.pass_context
    def markdown2html(self, context, source):
        attachments = context.get("cell", {}).get("attachments", {})
        return MarkdownWithMath(renderer=_Renderer(self.folder, attachments=attachments)).render(source)

    def default_filters(self):
        yield from super().default_filters()
        yield "latex2html", lambda latex: mathml(latex.strip().strip("$"), display=True)


def page_path(build: Path, notebook: Notebook) -> Path:
    """Return where a notebook's page lies."""
    return build / "html" / f"{notebook.name}.html"


def up_to_date(build: Path, notebook: Notebook) -> bool:
    """Whether the page is younger than what it shows and what makes it."""
    page = page_path(build, notebook)
    makers = [executed_path(build, notebook), notebook.path.parent, HERE / "page.html", Path(__file__)]
    return page.exists() and page.stat().st_mtime >= max(path.stat().st_mtime for path in makers)


def write_page(build: Path, notebook: Notebook, outcome: Outcome, around: Sequence[Notebook]) -> Path:
    """Render an executed notebook, failed ones too, with links to the notebooks before and after it."""
    node = nbformat.read(executed_path(build, notebook), as_version=4)
    if node.metadata.get("papermill", {}).get("parameters") == asdict(
        Settings()
    ):  # they repeat the parameters cell
        node.cells = [
            cell for cell in node.cells if "injected-parameters" not in cell.metadata.get("tags", [])
        ]
    tidy(node)  # scripts of widgets would come from the network
    node.metadata["title"] = f"{notebook.number.replace('_', '.')} {notebook.title}"
    place = list(around).index(notebook)
    resources = {
        "metadata": {"name": notebook.name, "path": str(notebook.path.parent)},
        "outcome": outcome,
        "before": around[place - 1] if place else None,
        "after": around[place + 1] if place + 1 < len(around) else None,
    }
    html, _ = _Exporter(notebook.path.parent).from_notebook_node(node, resources)
    html = html.replace("No description has been provided for this image", f"Output: {notebook.title}")
    path = page_path(build, notebook)
    with replacing(path) as part:
        part.write_text(html, encoding="utf-8")
    return path


def _thumbnails(build: Path, outcome: Outcome) -> list[str]:
    made = []
    for source in map(Path, outcome.figures):
        target = build / "html" / "thumbnails" / source.name
        if not source.exists():
            continue
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            with Image.open(source) as image, replacing(target) as part:
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                image.save(part, format="PNG")
        made.append(f"thumbnails/{target.name}")
    return made


def write_index(build: Path, outcomes: Sequence[tuple[Notebook, Outcome | None]]) -> Path:
    """Write ``html/index.html``: every notebook by chapter, its state and figures, and all results."""
    titles = report.INDEX.query("kind == 'section'").set_index("number")["title"]
    chapters: dict[str, list[dict[str, object]]] = {}
    for notebook, outcome in outcomes:
        key = notebook.number.split("_")[0]
        entry = {
            "notebook": notebook,
            "outcome": outcome,
            "page": f"{notebook.name}.html" if page_path(build, notebook).exists() else None,
            "thumbnails": _thumbnails(build, outcome) if outcome else [],
        }
        chapters.setdefault(titles.get(key.lstrip("0"), "The course"), []).append(entry)
    environment = jinja2.Environment(autoescape=True)
    environment.filters["shown"] = shown
    template = environment.from_string((HERE / "index.html").read_text("utf-8"))
    ran = [outcome for _, outcome in outcomes if outcome]
    html = template.render(
        chapters=chapters, outcomes=ran, rows=[row for outcome in ran for row in outcome.rows]
    )
    path = build / "html" / "index.html"
    with replacing(path) as part:
        part.write_text(html, encoding="utf-8")
    return path
