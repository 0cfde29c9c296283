"""One style for all figures, the figures that several notebooks share, and a control to move.

Colours are Okabe and Ito's, which readers with any colour vision can tell apart. Functions return the Figure
and leave saving to the caller.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence

import cv2
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
COLOURS = {"train": PALETTE[0], "test": PALETTE[1]}
INK, FAINT = "#262626", "#D9D9D9"


def use_style() -> None:
    """Set matplotlib's defaults for the whole course: quiet axes, readable at laptop width and in print."""
    mpl.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.figsize": (7.5, 4.0),
            "figure.constrained_layout.use": True,
            "savefig.dpi": 150,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": FAINT,
            "grid.linewidth": 0.6,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "image.cmap": "gray",
            "axes.prop_cycle": mpl.cycler(color=PALETTE),
        }
    )


def image_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int = 5,
    cell: tuple[float, float] = (1.9, 1.5),
) -> Figure:
    """Photographs side by side, each in its own aspect ratio, with a caption above.

    Args:
        images: uint8 (or float 0 to 1) of shape (H, W, 3) RGB or (H, W) gray.
        captions: one a photograph; long ones may hold line breaks.
        columns: photographs a row.
        cell: height follows the rows: inches (wide, high) of one photograph with its caption.

    Raises:
        ValueError: no images, or another number of captions.
    """
    if not len(images):
        raise ValueError("no images to show")
    captions = [""] * len(images) if captions is None else list(captions)
    if len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * cell[0], rows * cell[1]), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        limit = 255 if np.asarray(image).dtype == np.uint8 else 1
        axis.imshow(image, vmin=0, vmax=limit, cmap="gray", interpolation="antialiased")
        axis.set_title(caption, fontsize=8, loc="center")
    return figure


def outlined(pixels: np.ndarray, width: int = 3) -> np.ndarray:
    """Return RGB (H, W, 3) uint8 of ``pixels`` (H, W, 4), their fourth channel's outline drawn into them.

    Args:
        pixels: uint8, RGB and the mask.
        width: of the line, in pixels.
    """
    edges, _ = cv2.findContours(
        (pixels[..., 3] > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    colour = [round(255 * part) for part in mpl.colors.to_rgb(PALETTE[5])]
    return cv2.drawContours(pixels[..., :3].copy(), edges, -1, colour, width)


def class_sizes(sizes: Mapping[str, pd.DataFrame]) -> Figure:
    """Figure 2.1: how many individuals have n photographs, on a logarithmic scale; one panel a data set.

    Args:
        sizes: title -> columns photographs and one of ids, whales; leave `new_whale` out, it dwarfs the axis.
    """
    figure, axes = plt.subplots(len(sizes), 1, figsize=(7.5, 2.3 * len(sizes) + 0.5), squeeze=False)
    for axis, (title, frame) in zip(axes.flat, sizes.items(), strict=True):
        counts = frame["whales"] if "whales" in frame else frame["ids"]
        shown = counts.to_numpy() > 0
        axis.bar(frame["photographs"][shown], counts[shown], width=0.85, color=PALETTE[0], bottom=0)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)
        axis.set_xlim(left=0)
        axis.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axis.grid(axis="x", visible=False)
        axis.set(title=title, xlabel="photographs of an individual", ylabel="individuals")
    return figure


def image_sizes(sizes: pd.DataFrame, ratios: Sequence[float] = ()) -> Figure:
    """Figure 2.2: (a) every size as a point; (b) bubbles with a radius of 2 ln(photographs) points.

    A size that a single photograph has gets the radius 0 and so does not show in (b), as in the report.

    Args:
        sizes: columns split, width, height (pixels), photographs.
        ratios: width / height of lines to draw through the origin.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharex=True, sharey=True)
    for split, part in sizes.groupby("split", sort=False):
        # The test set is drawn over the larger training set, so it stays see-through.
        look = {"color": COLOURS.get(split, PALETTE[2]), "alpha": 0.35, "linewidths": 0, "label": split}
        axes[0].scatter(part["width"], part["height"], s=6, **look)
        radius = 2 * np.log(part["photographs"].to_numpy(dtype=float))
        axes[1].scatter(part["width"], part["height"], s=(2 * radius) ** 2, **look)
    widest, highest = sizes["width"].max(), sizes["height"].max()
    for axis, title in zip(axes, ("(a) each size once", "(b) radius 2 ln(photographs)"), strict=True):
        for ratio in ratios:
            end = min(widest, highest * ratio)
            axis.plot([0, end], [0, end / ratio], color=PALETTE[-1], linewidth=0.8, linestyle=":")
            axis.annotate(f"{ratio:g}", (end, end / ratio), (2, 2), textcoords="offset points", fontsize=7)
        axis.set(title=title, xlabel="width (pixels)", xlim=(0, 1.05 * widest), ylim=(0, 1.08 * highest))
    axes[0].set_ylabel("height (pixels)")
    handles = [
        mpl.lines.Line2D([], [], marker="o", linestyle="", color=COLOURS.get(split, PALETTE[2]), label=split)
        for split in sizes["split"].unique()
    ]
    axes[0].legend(handles=handles, loc="upper right")
    return figure


def contrast_histograms(histogram: pd.DataFrame, means: Mapping[str, float] | None = None) -> Figure:
    """Figure 2.3: photographs by contrast, one panel a split.

    Args:
        histogram: columns split, low, high (grey levels), photographs.
        means: split -> mean contrast, drawn as a line.
    """
    splits = list(histogram["split"].unique())
    figure, axes = plt.subplots(1, len(splits), figsize=(4.2 * len(splits), 3.2), sharex=True, squeeze=False)
    for axis, split in zip(axes.flat, splits, strict=True):
        part = histogram[histogram["split"] == split]
        axis.bar(
            part["low"],
            part["photographs"],
            width=part["high"] - part["low"],
            align="edge",
            color=COLOURS.get(split, PALETTE[2]),
            edgecolor="white",
            linewidth=0.8,
        )
        if means is not None and split in means:
            axis.axvline(means[split], color=INK, linewidth=1, linestyle="--")
            axis.annotate(
                f"mean {means[split]:.1f}", (means[split], 0.97), (4, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", va="top", fontsize=8,
            )  # fmt: skip
        axis.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))
        axis.grid(axis="x", visible=False)
        axis.set(title=split, xlabel="contrast (grey levels)", xlim=(0, None))
        axis.set_ylim(top=1.12 * part["photographs"].max())
    axes[0, 0].set_ylabel("photographs")
    return figure


def cosine_by_strength(
    frames: Mapping[str, pd.DataFrame],
    xlabel: str,
    yardsticks: Mapping[str, float] | None = None,
    used: tuple[float, float] | None = None,
    axis: Axes | None = None,
) -> Figure:
    """How far changes of growing strength move embeddings: the mean cosine, and a band of four fifths.

    Args:
        frames: label -> columns strength, mean, low, high, as ``identify.cosine_by_strength`` returns them.
        xlabel: what the strength is, with its unit.
        yardsticks: label -> a cosine to compare with, as ``identify.mean_cosines`` returns them.
        used: lowest and highest strength in training, shaded.
        axis: where to draw; default a figure of its own.
    """
    if axis is None:
        _, axis = plt.subplots(figsize=(7.5, 3.2))
    if used is not None:
        axis.axvspan(*used, color=FAINT, alpha=0.5, linewidth=0, zorder=0)
        axis.annotate(
            "in training", (sum(used) / 2, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8
        )
    for number, (label, frame) in enumerate(frames.items()):
        colour = PALETTE[number % len(PALETTE)]
        axis.fill_between(
            frame["strength"], frame["low"], frame["high"], color=colour, alpha=0.18, linewidth=0
        )
        axis.plot(frame["strength"], frame["mean"], color=colour, marker="o", markersize=3.5, label=label)
    for label, value in (yardsticks or {}).items():
        if not np.isfinite(value):
            continue
        axis.axhline(value, color=INK, linewidth=0.9, linestyle=":")
        axis.annotate(
            label, (1, value), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", fontsize=8,
        )  # fmt: skip
    axis.set(xlabel=xlabel, ylabel="cosine to the original")
    axis.margins(y=0.12)  # room for words
    if len(frames) > 1:
        axis.legend()
    return axis.figure


def control(draw: Callable[..., Figure], **controls) -> None:
    """Show a figure, and controls that draw it anew; without anybody to move them the figure stays.

    The picture is an ordinary output, not a widget's: it is there in a saved notebook, on a page and where no
    kernel runs. Only the controls need one.

    Args:
        draw: makes the figure from the controls' values. Its defaults are where the controls begin.
        **controls: of each argument, as ipywidgets' ``interact`` takes them: (lowest, highest[, step]), a list
            of choices, a boolean, or a widget.

    Raises:
        ValueError: a value that no control is made from, by its name.
    """
    import ipywidgets  # noqa: PLC0415  (of the course, not of the library)
    from IPython.display import display  # noqa: PLC0415

    widgets = {}
    for name, given in controls.items():
        start = inspect.signature(draw).parameters[name].default
        widgets[name] = ipywidgets.interactive.widget_from_abbrev(given, start)
        if widgets[name] is None:
            raise ValueError(f"{name} = {given!r}: no control can be made from it")
        widgets[name].description = widgets[name].description or name.replace("_", " ")
        widgets[name].style.description_width = "initial"
        if widgets[name].has_trait("continuous_update"):
            widgets[name].continuous_update = False  # a drawing takes longer than a mouse between two steps

    def picture() -> Figure:
        figure = draw(**{name: widget.value for name, widget in widgets.items()})
        plt.close(figure)  # else the cell shows it once more
        return figure

    display(ipywidgets.VBox(list(widgets.values())))
    shown = display(picture(), display_id=True)
    for widget in widgets.values():
        widget.observe(lambda change: shown.update(picture()), "value")
