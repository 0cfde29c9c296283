"""The report's drawings of networks, drawn again from their numbers: Figures 3.7 to 3.10, 4.6 to 4.8, 5.3 to 5.5.

A diagram is two tables, of boxes and of arrows; shapes on arrows are those of the tensors that flow along them.
Lengths are inches, y counts downwards.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from whalelib.plots import INK, PALETTE

KINDS = {  # colour of a box by what it does
    "data": "#FFFFFF",
    "convolution": PALETTE[0],
    "normalisation": PALETTE[6],
    "activation": PALETTE[5],
    "pooling": PALETTE[2],
    "block": PALETTE[4],
    "loss": PALETTE[3],
    "operation": "#FFFFFF",
}
HEIGHT = 0.36
BOXES = ("name", "text", "kind", "x", "y", "width", "height")
ARROWS = ("source", "target", "tensor", "via")


@dataclass(frozen=True)
class Diagram:
    """Boxes (name, text, kind, and x, y of the centre, width, height) and arrows (source, target, tensor, via).

    ``via`` is "" for a straight arrow, "h" or "v" for one corner (first horizontal, first vertical), "z" for one that
    runs back half-way between two rows, or a number: the x at which it goes from one row to the other.
    """

    boxes: pd.DataFrame
    arrows: pd.DataFrame

    def draw(self) -> Figure:
        """Return the figure."""
        boxes = self.boxes.set_index("name")
        left, right = (boxes["x"] - boxes["width"] / 2).min(), (boxes["x"] + boxes["width"] / 2).max()
        detours = [via for via in self.arrows["via"] if not isinstance(via, str)]
        left, right = min([left, *detours]) - 0.1, max([right, *detours]) + 0.1
        top, bottom = (boxes["y"] - boxes["height"] / 2).min(), (boxes["y"] + boxes["height"] / 2).max()
        size = (right - left, bottom - top + 0.2)
        figure, axis = plt.subplots(figsize=size, layout="none")
        axis.set_position([0, 0, 1, 1])
        axis.set(xlim=(left, right), ylim=(bottom + 0.1, top - 0.1))
        axis.axis("off")
        for arrow in self.arrows.itertuples():
            _arrow(axis, boxes.loc[arrow.source], boxes.loc[arrow.target], arrow.tensor, arrow.via)
        for box in boxes.itertuples():
            _box(axis, box)
        return figure

    @property
    def table(self) -> pd.DataFrame:
        """One row an arrow: from, to (the boxes' texts) and the tensor's shape, for saving beside the figure."""
        text = self.boxes.set_index("name")["text"].str.replace("\n", " ").str.replace("$", "", regex=False)
        ends = {"from": self.arrows["source"].map(text), "to": self.arrows["target"].map(text)}
        return pd.DataFrame(ends | {"tensor": self.arrows["tensor"]})


def _box(axis, box) -> None:
    """Draw a box with its text; kind "label" is text alone, "operation" a circle."""
    look = {"ha": "center", "va": "center", "color": INK, "zorder": 4}
    if box.kind == "label":
        axis.text(box.x, box.y, box.text, fontsize=9, **look)
        return
    face = [
        1 - 0.28 * (1 - c) if box.kind not in ("data", "operation") else 1 for c in to_rgb(KINDS[box.kind])
    ]
    shape = {"facecolor": face, "edgecolor": INK, "linewidth": 0.9, "zorder": 3}
    if box.kind == "operation":
        axis.add_patch(Circle((box.x, box.y), box.height / 2, **shape))
        axis.text(box.x, box.y, box.text, fontsize=12, **look)
        return
    corner = (box.x - box.width / 2 + 0.06, box.y - box.height / 2 + 0.06)
    rounded = "round,pad=0.06" if box.kind != "data" else "square,pad=0.06"
    axis.add_patch(FancyBboxPatch(corner, box.width - 0.12, box.height - 0.12, boxstyle=rounded, **shape))
    axis.text(box.x, box.y, box.text, fontsize=8.5, linespacing=1.15, **look)


def _arrow(axis, source, target, tensor: str, via: str | float) -> None:
    """Draw an arrow from border to border, with the tensor's shape on its longest part."""
    (x0, y0), (x1, y1) = (source.x, source.y), (target.x, target.y)
    corners = {"": [], "h": [(x1, y0)], "v": [(x0, y1)], "z": [(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2)]}
    middle = corners[via] if isinstance(via, str) else [(via, y0), (via, y1)]
    points = [(x0, y0), *middle, (x1, y1)]
    points[0] = _border(source, points[1])
    points[-1] = _border(target, points[-2])
    axis.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1, solid_joinstyle="round", zorder=1)
    head = {
        "arrowstyle": "-|>",
        "color": INK,
        "linewidth": 1,
        "mutation_scale": 9,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axis.annotate("", points[-1], points[-2], arrowprops=head, zorder=2)
    if tensor:
        parts = list(itertools.pairwise(points))
        (ax, ay), (bx, by) = max(
            parts, key=lambda ends: abs(ends[0][0] - ends[1][0]) + abs(ends[0][1] - ends[1][1])
        )
        flat = abs(ax - bx) > abs(ay - by)
        look = {"fontsize": 7, "color": "0.3", "zorder": 5}
        if flat:
            axis.text((ax + bx) / 2, ay - 0.05, tensor, ha="center", va="bottom", **look)
        else:
            axis.text(ax + 0.06, (ay + by) / 2, tensor, ha="left", va="center", **look)


def _border(box, towards: tuple[float, float]) -> tuple[float, float]:
    """Return where a horizontal or vertical line from a box's centre leaves it."""
    (x, y), (tx, ty) = (box.x, box.y), towards
    if abs(tx - x) > abs(ty - y):
        return x + (box.width / 2 if tx > x else -box.width / 2), y
    return x, y + (box.height / 2 if ty > y else -box.height / 2)


def diagram(boxes: Sequence[tuple], arrows: Sequence[tuple]) -> Diagram:
    """Return a diagram from tuples: (name, text, kind, x, y[, width[, height]]), (source, target[, tensor[, via]])."""
    rows = [(*box, *(1.5, HEIGHT)[len(box) - 5 :]) for box in boxes]
    lines = [(*arrow, *("", "")[len(arrow) - 2 :]) for arrow in arrows]
    return Diagram(pd.DataFrame(rows, columns=BOXES), pd.DataFrame(lines, columns=ARROWS))


def survey(layers: nn.Module, image: tuple[int, int, int]) -> pd.DataFrame:
    """Return what each layer of a chain gives and costs, for one image (C, H, W).

    Args:
        layers: whose children follow one another, on torch's ``meta`` device: nothing is computed.
        image: (C, H, W).

    Returns:
        Index layer; columns maps, height, width of the output; parameters; multiplications in billions; kept, the
        megabytes of maps that training keeps until the gradient comes back.
    """
    rows, x = {}, torch.empty(1, *image, device="meta")
    for name, layer in layers.named_children():
        kept: dict[int, torch.Tensor] = {}
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(_keeping(kept), lambda t: t):
            x = layer(x)
        for tensor in layer.state_dict().values():
            kept.pop(_storage(tensor), None)
        megabytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 1e6
        learned = sum(p.numel() for p in layer.parameters())
        rows[name] = [*x.shape[1:], learned, counter.get_total_flops() / 2e9, megabytes]
    columns = ["maps", "height", "width", "parameters", "multiplications", "kept"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("layer")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _keeping(kept: dict[int, torch.Tensor]):
    """Return a hook that notes each piece of memory once."""
    return lambda tensor: kept.setdefault(_storage(tensor), tensor)


def shares(costs: pd.DataFrame, marked: Sequence[str] = ()) -> Figure:
    """Draw what share each row has of each column, a panel a column; marked rows in colour, the others gray."""
    share = costs / costs.sum()
    figure, axes = plt.subplots(
        1, len(share.columns), figsize=(2.9 * len(share.columns), 2.2), sharey=True, sharex=True
    )
    for axis, name in zip(axes, share, strict=True):
        colours = [PALETTE[0] if row in marked else PALETTE[6] for row in share.index]
        bars = axis.barh(share.index, share[name], color=colours)
        axis.bar_label(bars, [f"{value:.1%}" for value in share[name]], padding=3, fontsize=8)
        axis.set(title=name, xlim=(0, 1.25 * share.max(axis=None)), xticks=[])
        axis.grid(visible=False)
    axes[0].invert_yaxis()
    return figure


def se_block(channels: int, reduction: int, height: int, width: int) -> Diagram:
    """Figure 3.8: squeeze (average), excite (two layers) and scale."""
    squeezed = channels // reduction
    vector, few = f"{channels}", f"{squeezed}"
    chain = [
        ("pool", "average\nover H × W", "pooling"),
        ("fc1", f"FC {channels} → {squeezed}", "convolution"),
        ("relu", "ReLU", "activation"),
        ("fc2", f"FC {squeezed} → {channels}", "convolution"),
        ("sigmoid", "sigmoid", "activation"),
    ]
    boxes = [("in", f"input\n{channels} × {height} × {width}", "data", 0.75, 0, 1.3, 0.5)]
    boxes += [(*box, 2.15 + 1.4 * i, 1.1, 1.02, 0.46) for i, box in enumerate(chain)]
    boxes += [
        ("times", "×", "operation", 7.75, 0, 0.32, 0.32),
        ("out", f"output\n{channels} × {height} × {width}", "data", 9.05, 0, 1.3, 0.5),
    ]
    arrows = [
        ("in", "pool", "", "v"),
        ("pool", "fc1", vector),
        ("fc1", "relu", few),
        ("relu", "fc2", few),
        ("fc2", "sigmoid", vector),
        ("sigmoid", "times", "a weight a channel", "h"),
        ("in", "times"),
        ("times", "out"),
    ]
    return diagram(boxes, arrows)


def se_bottleneck(groups: int = 64) -> Diagram:
    """Figure 3.9: three convolutions, an SE block, and the input added; stride s and 4d output maps."""
    chain = [
        ("in", "input", "data", "C × H × W"),
        ("conv1", "convolution 1 × 1", "convolution", ""),
        ("norm1", "batch norm, ReLU", "normalisation", "2d × H × W"),
        ("conv2", f"convolution 3 × 3, stride s,\n{groups} groups", "convolution", ""),
        ("norm2", "batch norm, ReLU", "normalisation", "4d × H/s × W/s"),
        ("conv3", "convolution 1 × 1", "convolution", ""),
        ("norm3", "batch norm", "normalisation", "4d × H/s × W/s"),
        ("se", "SE block", "block", "4d × H/s × W/s"),
        ("plus", "+", "operation", ""),
        ("relu", "ReLU", "activation", "4d × H/s × W/s"),
        ("out", "output", "data", ""),
    ]
    boxes, arrows = _residual(chain, 1.3, 1.9)
    at = {name: y for name, _, _, _, y, _, _ in boxes}
    boxes += [
        ("down", "convolution, stride s,\nwhen the shape changes", "convolution", 4.3, at["norm1"], 1.9, 0.5),
        ("norm4", "batch norm", "normalisation", 4.3, at["norm2"], 1.9, 0.32),
    ]
    arrows += [("in", "down", "", "h"), ("down", "norm4"), ("norm4", "plus", "4d × H/s × W/s", "v")]
    return diagram(boxes, arrows)


def _residual(chain: Sequence[tuple], x: float, wide: float, of: str = "") -> tuple[list, list]:
    """Return boxes and arrows of a column (name, text, kind, tensor that leaves it); a row without text stays empty."""
    boxes, y = [], 0.0
    for name, text, kind, _ in chain:
        height = 0.5 if "\n" in text else 0.32
        if text:
            wide_here = 0.32 if kind == "operation" else wide
            boxes.append((of + name, text, kind, x, y + height / 2, wide_here, height))
        y += height + 0.26
    shown = [row for row in chain if row[1]]
    arrows = [(of + one, of + other, tensor) for (one, *_, tensor), (other, *_) in itertools.pairwise(shown)]
    return boxes, arrows


def senet(stages: pd.DataFrame, image: tuple[int, int, int]) -> Diagram:
    """Figure 3.10: one row a layer.

    Args:
        stages: index layer, columns blocks, stride (of the first block), maps, height, width, parameters; the first row
            is the stem.
        image: (C, H, W).
    """
    gap = 0.95
    stem = [("conv1", "3 × 3, s 2", 64), ("conv2", "3 × 3, s 1", 64), ("conv3", "3 × 3, s 1", 128)]
    boxes = [("image", "image\n{} × {} × {}".format(*image), "data", 2.2, 0, 1.6, 0.5)]
    boxes += [
        (name, f"convolution\n{text}, {maps} maps", "convolution", 2.2 + 1.85 * i, gap, 1.6, 0.5)
        for i, (name, text, maps) in enumerate(stem)
    ]
    boxes.append(("pool", "max pooling\n3 × 3, s 2", "pooling", 7.75, gap, 1.6, 0.5))
    arrows = [("image", "conv1"), ("conv1", "conv2"), ("conv2", "conv3"), ("conv3", "pool")]
    for row, stage in enumerate(stages.itertuples(), start=1):
        text = f"{stage.Index}\n{stage.parameters / 1e6:.2f} M"
        boxes.append((f"name-{stage.Index}", text, "label", 0.6, gap * row, 0.9, 0.5))
    more, lines, last = _stages(stages, gap, "SE bottleneck")
    text = "feature maps\n{maps} × {height} × {width}".format(**stages.iloc[-1].astype(int))
    boxes += [*more, ("out", text, "data", 7.75, gap * len(stages), 1.6, 0.5)]
    return diagram(boxes, [*arrows, *lines, (last, "out")])


def _stages(stages: pd.DataFrame, gap: float, block: str) -> tuple[list, list, str]:
    """Return boxes and arrows of the stages after the stem's box "pool", a row each, and the last box's name."""
    boxes, arrows, last = [], [], "pool"
    for row, (before, stage) in enumerate(itertools.pairwise(stages.itertuples()), start=2):
        first, rest = f"{stage.Index}-first", f"{stage.Index}-rest"
        text, others = f"{block}\ns = {stage.stride}, 4d = {stage.maps}", f"{block} × {stage.blocks - 1}"
        boxes += [
            (first, text, "block", 2.2, gap * row, 1.6, 0.5),
            (rest, f"{others}\ns = 1, 4d = {stage.maps}", "block", 4.6, gap * row, 1.7, 0.5),
        ]
        arrows += [(last, first, f"{before.maps} × {before.height} × {before.width}", "z"), (first, rest)]
        last = rest
    return boxes, arrows, last


def first_place(
    features: int,
    height: int,
    width: int,
    local: int,
    classes: int,
    image: tuple[int, int, int],
    backbone: str,
) -> Diagram:
    """Figure 3.7: backbone, global and local head, and the three losses.

    Args:
        features, height, width: of the backbone's last map.
        local: features of a stripe.
        classes: whales and mirrored whales, 2C.
        image: (C, H, W).
        backbone: its name.
    """
    up, middle, down = 0.0, 0.95, 1.9
    boxes = [
        ("image", "photograph + mask\n{} × {} × {}".format(*image), "data", 0.75, up, 1.4, 0.5),
        ("backbone", backbone, "block", 0.75, middle, 1.4, 0.5),
        ("average", f"average over\n{height} × {width}", "pooling", 2.5, up, 1.05, 0.5),
        ("neck", "dropout .2,\nbatch norm, L2", "normalisation", 4.1, up, 1.15, 0.5),
        ("fc", f"16 × FC\n{features} → {classes}", "convolution", 5.75, up, 1.25, 0.5),
        ("sigmoid", "sigmoid", "activation", 7.2, up, 0.75, 0.36),
        ("bce", "binary\ncross-entropy", "loss", 8.65, up, 1.15, 0.5),
        ("triplet", "triplet loss,\nglobal", "loss", 8.65, middle, 1.15, 0.5),
        ("rows", f"average over\neach of {height} rows", "pooling", 2.5, down, 1.1, 0.5),
        ("squeeze", f"convolution 1 × 1\n{features} → {local}", "convolution", 4.35, down, 1.25, 0.5),
        ("neck2", "batch norm, L2\nof each stripe", "normalisation", 6.1, down, 1.15, 0.5),
        ("triplet2", "triplet loss,\nlocal", "loss", 8.65, down, 1.15, 0.5),
        ("sum", "+", "operation", 9.6, middle, 0.32, 0.32),
        ("loss", "loss", "loss", 10.25, middle, 0.6, 0.36),
    ]
    arrows = [
        ("image", "backbone"),
        ("backbone", "average", f"{features} × {height} × {width}", 1.75),
        ("backbone", "rows", "", 1.75),
        ("average", "neck", f"{features}"),
        ("neck", "fc", f"{features}"),
        ("fc", "sigmoid", f"{classes}"),
        ("sigmoid", "bce", f"{classes}"),
        ("neck", "triplet", f"{features} global features", "v"),
        ("rows", "squeeze", f"{features} × {height}"),
        ("squeeze", "neck2", f"{local} × {height}"),
        ("neck2", "triplet2", f"{height} × {local}"),
        ("bce", "sum", "", "h"),
        ("triplet", "sum"),
        ("triplet2", "sum", "", "h"),
        ("sum", "loss"),
    ]
    return diagram(boxes, arrows)


def second_place(
    features: int,
    height: int,
    width: int,
    classes: int,
    image: tuple[int, int, int],
    backbone: str,
    margin: float = 0.5,
) -> Diagram:
    """Figure 4.6: the flow common to all models, with the weights of the three losses.

    Args:
        features, height, width: of the backbone's last map.
        classes: whales and mirrored whales, 2C.
        image: (C, H, W).
        backbone: its name.
        margin: in radians, 0 for the training as shipped.
    """
    up, middle, down = 0.0, 0.95, 1.9
    angle = f"margin\ncos(θ + {margin:g})" if margin else "no margin\nin training"
    boxes = [
        ("image", "photograph\n{} × {} × {}".format(*image), "data", 0.75, middle, 1.3, 0.5),
        ("backbone", backbone, "block", 0.75, down, 1.3, 0.5),
        ("average", f"average over\n{height} × {width}", "pooling", 2.85, down, 1.1, 0.5),
        ("norm", "batch norm", "normalisation", 2.85, middle, 1.1, 0.36),
        ("l2", "L2", "normalisation", 2.85, up, 1.1, 0.36),
        ("triplet", "triplet loss", "loss", 9.2, up, 1.2, 0.5),
        ("cosine", f"cosine with\neach of {classes}", "convolution", 4.75, middle, 1.25, 0.5),
        ("margin", angle, "activation", 6.25, middle, 1.05, 0.5),
        ("softmax", "× 64, softmax", "activation", 7.6, middle, 1.05, 0.36),
        ("arcface", "cross-entropy", "loss", 9.2, middle, 1.2, 0.5),
        ("fc", f"16 × FC\n{features} → {classes}", "convolution", 4.75, down, 1.25, 0.5),
        ("sigmoid", "sigmoid", "activation", 6.8, down, 0.8, 0.36),
        ("focal", "adapted\nfocal loss", "loss", 9.2, down, 1.2, 0.5),
        ("answer", "classification", "data", 6.8, 2.65, 1.2, 0.36),
        ("sum", "+", "operation", 10.6, middle, 0.32, 0.32),
        ("loss", "loss", "loss", 11.3, middle, 0.6, 0.36),
    ]
    arrows = [
        ("image", "backbone"),
        ("backbone", "average", f"{features} × {height} × {width}"),
        ("average", "norm", f"{features}"),
        ("norm", "l2", f"{features}"),
        ("l2", "triplet", f"{features} features of length 1"),
        ("l2", "cosine", "", 3.8),
        ("l2", "fc", "", 3.8),
        ("cosine", "margin"),
        ("margin", "softmax"),
        ("softmax", "arcface"),
        ("fc", "sigmoid", f"{classes}"),
        ("sigmoid", "focal", f"{classes}"),
        ("sigmoid", "answer"),
        ("triplet", "sum", "× 1", "h"),
        ("arcface", "sum", "× 0.1"),
        ("focal", "sum", "× 1", "h"),
        ("sum", "loss"),
    ]
    return diagram(boxes, arrows)


def resnets(networks: Mapping[str, pd.DataFrame], image: tuple[int, int, int]) -> Diagram:
    """Figure 4.7: the structure that ResNet-101 and its relatives share, and what each stage of each has to learn.

    Args:
        networks: name -> table as ``senet`` takes it, equal in all but the parameters.
        image: (C, H, W).

    Raises:
        ValueError: networks of different structure.
    """
    gap, tables = 0.95, list(networks.values())
    shape = ["blocks", "stride", "maps", "height", "width"]
    if not all(table[shape].equals(tables[0][shape]) for table in tables):
        raise ValueError(f"{', '.join(networks)}: of different structure")
    stages = tables[0]
    stem = f"convolution\n7 × 7, s 2, {stages['maps'].iloc[0]} maps"
    boxes = [
        ("image", "image\n{} × {} × {}".format(*image), "data", 2.2, 0, 1.6, 0.5),
        ("conv", stem, "convolution", 2.2, gap, 1.6, 0.5),
        ("pool", "max pooling\n3 × 3, s 2", "pooling", 4.6, gap, 1.7, 0.5),
    ]
    names = dict(enumerate(stages.index, start=1)) | {len(stages) + 1: "all"}
    boxes += [(f"name-{name}", name, "label", 0.6, gap * row, 0.9, 0.5) for row, name in names.items()]
    for column, (network, table) in enumerate(networks.items()):
        x = 6.6 + 1.45 * column
        boxes.append((f"head-{network}", f"{network}\nparameters", "label", x, 0, 1.4, 0.5))
        for row, learned in enumerate([*table["parameters"], table["parameters"].sum()], start=1):
            boxes.append((f"{network}-{row}", f"{learned / 1e6:.2f} M", "label", x, gap * row, 1.4, 0.5))
    more, lines, last = _stages(stages, gap, "bottleneck")
    text = "feature maps\n{maps} × {height} × {width}".format(**stages.iloc[-1].astype(int))
    boxes += [*more, ("out", text, "data", 4.6, gap * (len(stages) + 1), 1.7, 0.5)]
    return diagram(boxes, [("image", "conv"), ("conv", "pool"), *lines, (last, "out")])


BOTTLENECKS = {  # name: stride of the first and the second convolution, maps of both, groups, SE block
    "ResNet-101": ("", ", stride s", "d", "", False),
    "SE-ResNet-101": (", stride s", "", "d", "", True),
    "SE-ResNeXt-101 (32 × 4d)": ("", ", stride s", "2d", "32 groups", True),
}


def bottlenecks() -> Diagram:
    """Figure 4.8: the bottlenecks of the three backbones side by side; stride s and 4d output maps."""
    boxes, arrows = [], []
    for column, (name, (first, second, maps, groups, squeeze)) in enumerate(BOTTLENECKS.items()):
        x, after = 4.2 * column + 1.2, f"{maps} × H/s × W/s"
        chain = [
            ("in", "input", "data", "C × H × W"),
            ("conv1", f"convolution 1 × 1{first}", "convolution", ""),
            ("norm1", "batch norm, ReLU", "normalisation", after if first else f"{maps} × H × W"),
            ("conv2", f"convolution 3 × 3{second}\n{groups or '1 group'}", "convolution", ""),
            ("norm2", "batch norm, ReLU", "normalisation", after),
            ("conv3", "convolution 1 × 1", "convolution", ""),
            ("norm3", "batch norm", "normalisation", "4d × H/s × W/s"),
            ("se", "SE block" if squeeze else "", "block", "4d × H/s × W/s"),
            ("plus", "+", "operation", ""),
            ("relu", "ReLU", "activation", "4d × H/s × W/s"),
            ("out", "output", "data", ""),
        ]
        column_boxes, column_arrows = _residual(chain, x, 1.9, f"{name}-")
        at = {box[0]: box[4] for box in column_boxes}
        down, norm = f"{name}-down", f"{name}-norm4"
        text = "convolution 1 × 1,\nstride s, if needed"
        boxes += [
            *column_boxes,
            (f"{name}-name", name, "label", x, -0.4, 1.9, 0.32),
            (down, text, "convolution", x + 1.95, at[f"{name}-norm1"], 1.4, 0.5),
            (norm, "batch norm", "normalisation", x + 1.95, at[f"{name}-norm2"], 1.4, 0.32),
        ]
        arrows += [
            *column_arrows,
            (f"{name}-in", down, "", "h"),
            (down, norm),
            (norm, f"{name}-plus", "", "v"),
        ]
    return diagram(boxes, arrows)


def third_place(
    features: int,
    height: int,
    width: int,
    dimension: int,
    classes: int,
    image: tuple[int, int, int],
    backbone: str,
    *,
    dropout: float = 0.5,
    margin: float = 0.5,
    scale: float = 65,
) -> Diagram:
    """Figure 5.3: from a photograph to its feature vector, and what is made of that in training and at inference.

    Args:
        features, height, width: of the backbone's last map.
        dimension: of the feature vector.
        classes: whales and mirrored whales, 2C.
        image: (C, H, W).
        backbone: its name.
        dropout: share of the maps.
        margin: in radians.
        scale: of the cosines.
    """
    up, middle, down = 0.0, 1.0, 1.9
    boxes = [
        ("image", "photograph\n{} × {} × {}".format(*image), "data", 0.75, up, 1.3, 0.5),
        ("backbone", backbone, "block", 2.5, up, 1.3, 0.5),
        ("norm", "batch norm\nof each map", "normalisation", 4.85, up, 1.15, 0.5),
        ("dropout", f"dropout of\nmaps, {dropout:g}", "normalisation", 6.4, up, 1.15, 0.5),
        ("fc", f"FC\n{features * height * width} → {dimension}", "convolution", 8.1, up, 1.35, 0.5),
        ("norm2", "batch norm", "normalisation", 9.95, up, 1.15, 0.5),
        ("l2", "L2", "normalisation", 0.75, middle, 1.3, 0.36),
        ("vector", f"feature vector\n{dimension}, length 1", "data", 2.5, middle, 1.3, 0.5),
        ("cosine", f"cosine with\neach of {classes}", "convolution", 4.85, middle, 1.25, 0.5),
        ("margin", f"margin\ncos(θ + {margin:g})", "activation", 6.4, middle, 1.15, 0.5),
        ("softmax", f"× {scale:g}, softmax\nwithout mirror image", "activation", 8.1, middle, 1.55, 0.5),
        ("loss", "cross-entropy", "loss", 9.95, middle, 1.15, 0.5),
        ("templates", "cosine with\neach template", "convolution", 4.85, down, 1.25, 0.5),
        ("answer", "five guesses", "data", 6.4, down, 1.15, 0.5),
    ]
    arrows = [
        ("image", "backbone"),
        ("backbone", "norm", f"{features} × {height} × {width}"),
        ("norm", "dropout"),
        ("dropout", "fc"),
        ("fc", "norm2", f"{dimension}"),
        ("norm2", "l2", f"{dimension}", "z"),
        ("l2", "vector"),
        ("vector", "cosine", "training"),
        ("cosine", "margin"),
        ("margin", "softmax"),
        ("softmax", "loss"),
        ("vector", "templates", "inference", "v"),
        ("templates", "answer"),
    ]
    return diagram(boxes, arrows)


def dense_layers(growth: int = 32, bottleneck: int = 4, compression: float = 0.5) -> Diagram:
    """Figure 5.4: (a) a composite operation and the concatenation after it, (b) a transition; C input maps.

    Args:
        growth: k, the maps that each composite operation adds.
        bottleneck: how many times as many the first convolution gives.
        compression: θ, the share of the maps that a transition keeps.
    """
    layer = [
        ("in", "input", "data", "C × H × W"),
        ("norm1", "batch norm, ReLU", "normalisation", ""),
        ("conv1", "convolution 1 × 1", "convolution", f"{bottleneck}k × H × W"),
        ("norm2", "batch norm, ReLU", "normalisation", ""),
        ("conv2", "convolution 3 × 3", "convolution", "k × H × W"),
        ("concatenation", "concatenation", "block", "(C + k) × H × W"),
        ("out", "output", "data", ""),
    ]
    transition = [
        ("in", "input", "data", "C × H × W"),
        ("norm", "batch norm, ReLU", "normalisation", ""),
        ("conv", "convolution 1 × 1", "convolution", "θC × H × W"),
        ("pool", "average pooling 2 × 2, s 2", "pooling", "θC × H/2 × W/2"),
        ("out", "output", "data", ""),
    ]
    titles = {
        "layer": ("(a) composite operation, k = {}", growth, 1.2, layer),
        "transition": ("(b) transition, θ = {}", compression, 5.4, transition),
    }
    boxes, arrows = [], []
    for name, (title, value, x, chain) in titles.items():
        column_boxes, column_arrows = _residual(chain, x, 2.0, f"{name}-")
        boxes += [(f"{name}-name", title.format(value), "label", x, -0.4, 2.4, 0.32), *column_boxes]
        arrows += column_arrows
    arrows.append(("layer-in", "layer-concatenation", "C × H × W, as it came", 2.6))
    return diagram(boxes, arrows)


def densenet(stages: pd.DataFrame, image: tuple[int, int, int]) -> Diagram:
    """Figure 5.5: one row a dense block, with the transition after it, or the normalisation after the last.

    Args:
        stages: index layer, columns layers (composite operations; 0 where there is none), maps, height, width,
            parameters; the first row is the stem, then each block and what follows it.
        image: (C, H, W).
    """
    gap, first, second = 0.95, 2.3, 5.4
    size = "{0.maps} × {0.height} × {0.width}".format
    boxes = [
        ("image", "image\n{} × {} × {}".format(*image), "data", first, 0, 1.9, 0.5),
        (
            "conv",
            f"convolution\n7 × 7, s 2, {stages['maps'].iloc[0]} maps",
            "convolution",
            first,
            gap,
            1.9,
            0.5,
        ),
        ("pool", "max pooling\n3 × 3, s 2", "pooling", second, gap, 1.9, 0.5),
        ("head", "parameters", "label", 7.3, 0, 1.6, 0.5),
    ]
    arrows, last = [("image", "conv"), ("conv", "pool")], "pool"
    rows = list(stages.itertuples())
    learned = [rows[0].parameters]
    for row, (before, block, after) in enumerate(
        zip(rows[:-1:2], rows[1::2], rows[2::2], strict=True), start=2
    ):
        end = after is rows[-1]
        text = "batch norm\nwithout ReLU" if end else f"transition\n{block.maps} → {after.maps} maps"
        boxes += [
            (
                block.Index,
                f"dense block\n{block.layers} composite operations",
                "block",
                first,
                gap * row,
                1.9,
                0.5,
            ),
            (after.Index, text, "normalisation" if end else "pooling", second, gap * row, 1.9, 0.5),
        ]
        arrows += [(last, block.Index, size(before), "z"), (block.Index, after.Index, size(block))]
        learned.append(block.parameters + after.parameters)
        last = after.Index
    names = ["stem", *(f"block {i}" for i in range(1, len(learned))), "all"]
    for row, (name, count) in enumerate(zip(names, [*learned, sum(learned)], strict=True), start=1):
        boxes += [
            (f"name-{name}", name, "label", 0.6, gap * row, 0.9, 0.5),
            (f"parameters-{name}", f"{count / 1e6:.2f} M", "label", 7.3, gap * row, 1.6, 0.5),
        ]
    boxes.append(
        ("out", f"feature maps\n{size(rows[-1])}", "data", second, gap * (len(learned) + 1), 1.9, 0.5)
    )
    return diagram(boxes, [*arrows, (last, "out")])
