"""What a notebook runs with: its settings, its data, and the places of what it measures and draws."""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageColor

from whalelib.files import replacing
from whalelib.ledger import RESULT_COLUMNS, measured, project_root, read_ledger, read_rows, write_rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from whalelib.data import Catalog

PROFILES = ("lab", "small", "paper")
EDITIONS = ("as_described", "as_shipped")
DEVICES = ("auto", "cpu", "cuda")
FIGURE_DPI = 110
LARGE_FIGURE = 250_000
ONLY_SHOWS = ("course/", "report/", "plots.py", "run.py", "ledger.py")  # sources no result depends on
SHOWN_VERSIONS = ("numpy", "pandas", "torch")


def place(variable: str, default: str) -> Path:
    """Return the folder that an environment variable names, else ``default``, relative to the project."""
    return project_root() / (os.environ.get(variable) or default)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block; processes started in it inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def by_profile(lab: object, paper: object, small: object = None) -> dict[str, object]:
    """Return what each of PROFILES takes; `small` what `lab` does, unless it is given."""
    return dict(zip(PROFILES, (lab, lab if small is None else small, paper), strict=True))


def sources_hash(*leave_out: str) -> str:
    """Return a hash of the library's files, but those whose path begins with one of ``leave_out``."""
    package = Path(__file__).resolve().parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package).as_posix()
        if path.suffix in {".py", ".csv", ".json"} and not name.startswith(leave_out):
            total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@dataclass(frozen=True)
class Settings:
    """The five orthogonal parameters of every notebook.

    ``data``: "world", "world:PRESET", "world:PRESET@SEED", "kaggle", or the path of a folder or metadata CSV.
    ``profile``: "lab" (a laptop, minutes), "small" (a laptop's night: the same networks, 32 times as many images) or
    "paper" (the published sizes).
    ``edition``: "as_described" (the report) or "as_shipped" (the solutions' code).
    ``seed``: of every random draw but the world's own.
    ``device``: "auto", "cpu" or "cuda".

    Raises:
        ValueError: a value is not one of the choices, which the message names.
    """

    data: str = "world"
    profile: str = "lab"
    edition: str = "as_described"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        choices = {"profile": PROFILES, "edition": EDITIONS, "device": DEVICES}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} = {value!r}: choose one of {', '.join(allowed)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed = {self.seed!r}: give a whole number from 0 up")
        if not isinstance(self.data, str) or not self.data.strip():
            raise ValueError(f"data = {self.data!r}: give world[:PRESET[@SEED]], kaggle, or a path")
        if not self.generated and self.data != "kaggle" and not self.located.exists():
            raise ValueError(
                f"data = {self.data!r}: choose world[:PRESET[@SEED]], kaggle, or the path of a folder or "
                "metadata CSV that exists"
            )

    @property
    def generated(self) -> bool:
        """Whether the data are the world's."""
        return self.data.split(":")[0].split("@")[0] == "world"

    @property
    def located(self) -> Path:
        """The data's path; a relative one is looked for in the working folder, then in the project."""
        here = Path(self.data).expanduser()
        return here.absolute() if here.exists() else project_root() / here

    @property
    def source(self) -> str:
        """What ``whalelib.data.open_catalog`` takes."""
        return self.data if self.generated or self.data == "kaggle" else str(self.located)

    @property
    def public_data(self) -> str:
        """The data's name as results carry it: the world's with preset and seed, a path's last part."""
        if self.generated:
            from whalelib.data.world import DEFAULT_SEED  # noqa: PLC0415

            preset, _, seed = self.data.removeprefix("world").removeprefix(":").partition("@")
            return f"world:{preset or 'lab'}@{seed or DEFAULT_SEED}"
        if self.data == "kaggle":
            return self.data
        path = self.located.resolve()
        return path.name if path.is_dir() else f"{path.parent.name}/{path.name}"

    @property
    def default(self) -> bool:
        """Whether these are the default settings (on any device)."""
        default = Settings()
        same = (self.profile, self.edition, self.seed) == (default.profile, default.edition, default.seed)
        return same and self.public_data == default.public_data

    @property
    def label(self) -> str:
        """A folder name that tells these settings from others (the device apart)."""
        name = f"{self.public_data}-{self.profile}-{self.edition}-{self.seed}"
        return (
            f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{hashlib.sha256(self.source.encode()).hexdigest()[:6]}"
        )

    def __str__(self):
        return (
            f"data {self.public_data}, profile {self.profile}, edition {self.edition}, seed {self.seed}, "
            f"device {self.device}"
        )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add to a command what all have that enter values in the ledger: data, edition, seed, whether code may differ."""
    parser.add_argument("data", help="world, or a folder with test labels")
    parser.add_argument("--edition", choices=EDITIONS, default=EDITIONS[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--allow-dirty", action="store_true", help="enter values of code that is not committed"
    )


def figures_folder(settings: Settings) -> Path:
    """Return where figures go: ``figures/`` for default settings, else ``build/figures/LABEL/``."""
    other = place("WHALE_BUILD", "build") / "figures" / settings.label
    return place("WHALE_FIGURES", "figures" if settings.default else str(other))


@dataclass(eq=False)
class Run:
    """One notebook's context: what it reads, what it records, what it draws.

    Environment, all optional: ``WHALE_BUILD`` (default ``build``), ``WHALE_CACHE`` (``data/cache``),
    ``WHALE_RESULTS`` (``build/results``), ``WHALE_FIGURES`` (see :func:`figures_folder`) and
    ``WHALE_REFERENCE`` (other people's files, never needed).
    """

    notebook: str
    settings: Settings
    _began: float = field(default_factory=time.monotonic, repr=False)
    _rows: dict[str, dict[str, object]] = field(default_factory=dict, repr=False)

    @cached_property
    def catalog(self) -> "Catalog":
        """The verified catalog of the data; what was skipped or refused is printed once."""
        from whalelib.data import open_catalog  # noqa: PLC0415

        catalog = open_catalog(self.settings.source).verified()
        if problems := catalog.report_problems():
            print(problems)
        return catalog

    @cached_property
    def device(self) -> str:
        """The device to compute on, "cpu" or "cuda".

        Raises:
            RuntimeError: "cuda" was asked for and there is none.
        """
        import torch  # noqa: PLC0415

        available = torch.cuda.is_available()
        if self.settings.device == "cuda" and not available:
            raise RuntimeError("device = 'cuda', but torch finds no CUDA device here; use 'auto' or 'cpu'")
        return "cuda" if available and self.settings.device != "cpu" else "cpu"

    @property
    def resources(self) -> dict[str, object]:
        """What `train.fit` may use: device, precision and workers.

        At the published sizes on a GPU: bfloat16, a process a core to load with, but for one, and, where the
        environment's WHALE_COMPILE is 1, compiled networks. Else float32 and no processes, so that a training is the
        same everywhere but for rounding. The cores are those that WHALE_CPUS gives each process of a training, else its
        share of those that are there.
        """
        large = self.settings.profile == "paper" and self.device == "cuda"
        workers = 0
        if large:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            cores = int(os.environ.get("WHALE_CPUS") or len(os.sched_getaffinity(0)) // processes)
            workers = max(1, min(16, cores) - 1)
        return {
            "device": self.device,
            "precision": "bf16-mixed" if large else "32-true",
            "workers": workers,
            "compiled": large and os.environ.get("WHALE_COMPILE") == "1",
        }

    @property
    def device_name(self) -> str:
        """The device as results carry it: "cpu", or "cuda" with the card's name.

        A notebook that never imported torch computed on the CPU whatever the setting says.
        """
        if "torch" not in sys.modules or self.device == "cpu":
            return "cpu"
        return f"cuda ({sys.modules['torch'].cuda.get_device_name()})"

    @property
    def reference(self) -> Path | None:
        """The folder ``$WHALE_REFERENCE/reference`` (the authors' files), or None when that is unset."""
        return self._given("reference")

    @property
    def real(self) -> Path | None:
        """The folder ``$WHALE_REFERENCE/real`` (real photographs), or None when that is unset."""
        return self._given("real")

    def _given(self, name: str) -> Path | None:
        if not os.environ.get("WHALE_REFERENCE"):
            return None
        folder = place("WHALE_REFERENCE", "") / name
        if not folder.is_dir():
            raise FileNotFoundError(f"WHALE_REFERENCE is set, but there is no folder {folder}")
        return folder.resolve()

    def record(self, metric: str, value: object) -> float | int | str:
        """Write a measured value to the results table and return it.

        The first record of a run replaces the rows that an earlier run with the same settings left; the same
        metric recorded again replaces the first. ``seconds`` in the row counts from the start of the run.

        Raises:
            ValueError: the value is NaN, infinite, empty or no single number or text; or no metric is named.
        """
        if not isinstance(metric, str) or not metric.strip():
            raise ValueError(f"a metric needs a name, not {metric!r}")
        value = measured(value, metric)
        tag = {
            "data": self.settings.public_data,
            "profile": self.settings.profile,
            "edition": self.settings.edition,
            "seed": str(self.settings.seed),
        }
        row = {"notebook": self.notebook, "metric": metric, "value": value, **tag, "device": self.device_name}
        self._rows[metric] = {**row, "seconds": round(time.monotonic() - self._began, 1)}
        path = place("WHALE_RESULTS", str(place("WHALE_BUILD", "build") / "results")) / f"{self.notebook}.csv"
        others = [old for old in read_rows(path) if any(old[name] != text for name, text in tag.items())]
        write_rows(path, RESULT_COLUMNS, [*others, *self._rows.values()])
        return value

    def save_figure(self, figure: "Figure", name: str, frame: "pd.DataFrame | pd.Series") -> None:
        """Save a figure as PNG and the data it shows as CSV, ``{notebook}_{name}.png`` and ``.csv``.

        The PNG is the same byte for byte for the same figure: fixed resolution, no dates or versions inside. One
        above LARGE_FIGURE bytes, as of many photographs, is kept with 256 colours, and if need be fewer pixels.
        Default settings write to ``figures/``, others to ``build/figures/LABEL/``.
        """
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"figure name {name!r}: use lower-case letters, digits and underscores")
        path = figures_folder(self.settings) / f"{self.notebook}_{name}.png"
        with replacing(path) as part:
            figure.savefig(part, format="png", dpi=FIGURE_DPI, metadata={"Software": None})
            if part.stat().st_size > LARGE_FIGURE:
                _make_smaller(part)
        named = any(label is not None for label in frame.index.names)
        with replacing(path.with_suffix(".csv")) as part:
            frame.to_csv(part, index=named, float_format="%.8g", lineterminator="\n")

    def folder(self, name: str, *, code: str | None = None, **key: object) -> Path:
        """Return a cache folder for what ``name`` and ``key`` say, made from these data with this code.

        Profile, edition, seed, device, the catalog's fingerprint and the code are part of the key: nothing made under
        other conditions is ever read back.

        Args:
            name: what is kept.
            code: a hash of the code that makes it; default of the library's sources, save what only shows results.
            **key: what else it depends on.
        """
        parts = {
            "name": name,
            "key": key,
            "data": self.catalog.fingerprint,
            "settings": {**asdict(self.settings), "data": "", "device": self.device},
            "code": sources_hash(*ONLY_SHOWS) if code is None else code,
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        folder = place("WHALE_CACHE", "data/cache") / f"{name}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def ledger(self) -> "pd.DataFrame":
        """Return this notebook's rows of the ledger (measured earlier, elsewhere); may be empty."""
        frame = read_ledger()
        return frame[frame["notebook"] == self.notebook].reset_index(drop=True)


def start(notebook: str, **parameters: object) -> Run:
    """Begin a notebook: check its parameters, set the plot style, print one line of versions and settings.

    Args:
        notebook: its number, as "02_01".
        **parameters: ``data``, ``profile``, ``edition``, ``seed``, ``device``; see :class:`Settings`.

    Raises:
        ValueError: an unknown parameter or value.
    """
    if not re.fullmatch(r"(\d\d|[A-Z])_\d\d", notebook):
        raise ValueError(f"notebook {notebook!r}: give its number, as '02_01'")
    unknown = sorted({*parameters, *_injected_parameters()} - set(Settings.__dataclass_fields__))
    if unknown:
        known = ", ".join(Settings.__dataclass_fields__)
        raise ValueError(f"unknown parameter(s) {', '.join(unknown)}: the parameters are {known}")
    run = Run(notebook, Settings(**parameters))
    if run.settings.device == "cuda":
        _ = run.device
    from whalelib.plots import use_style  # noqa: PLC0415

    use_style()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN_VERSIONS)
    version = importlib.metadata.version("whalelib")
    print(f"whalelib {version}, Python {platform.python_version()}, {versions} | {run.settings}")
    return run


def _injected_parameters() -> set[str]:
    """Return the names that papermill set in this notebook; of a misspelt one it only warns."""
    try:
        cells = get_ipython().user_ns.get("In", [])
    except NameError:
        return set()
    injected = [cell for cell in cells if cell.startswith("# Parameters\n")]
    return {
        target.id
        for cell in injected
        for line in ast.parse(cell).body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }


def _make_smaller(path: Path) -> None:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    while True:
        colours = _few_colours(picture)
        picture.quantize(palette=colours, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)
        if path.stat().st_size <= LARGE_FIGURE or picture.width < 300:
            return
        picture = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5), Image.Resampling.LANCZOS)


def _few_colours(picture: Image.Image) -> Image.Image:
    """Return a palette of at most 256 colours for a picture.

    The plots' own come first: where photographs fill a picture, those of markers and lines are rare, and a median cut
    merges them. Then 64 that are far apart, for what else is rare, and the rest where most of the pixels are.
    """
    from whalelib.plots import FAINT, INK, PALETTE  # noqa: PLC0415

    kept = [value for name in (*PALETTE, INK, FAINT, "white", "black") for value in ImageColor.getrgb(name)]
    for most, method in ((64, Image.Quantize.MAXCOVERAGE), (256, Image.Quantize.MEDIANCUT)):
        count = min(most, 256 - len(kept) // 3)
        kept += picture.quantize(count, method).getpalette()[: 3 * count]
    palette = Image.new("P", (1, 1))
    palette.putpalette(kept)
    return palette
