"""The figures show what they are given."""

import base64
import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from whalelib import plots, report


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context():
        plt.switch_backend("agg")
        plots.use_style()
        yield
    plt.close("all")


def test_image_grid():
    images = [np.full((4, 6, 3), 200, np.uint8), np.full((6, 4), 0.5), np.zeros((5, 5), np.uint8)]
    figure = plots.image_grid(images, ["a", "b", "c"], columns=2)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "c", ""]
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 0]
    assert figure.axes[1].images[0].get_clim() == (0, 1) and figure.axes[2].images[0].get_clim() == (0, 255)
    with pytest.raises(ValueError, match="2 captions for 3"):
        plots.image_grid(images, ["a", "b"])
    with pytest.raises(ValueError, match="no images"):
        plots.image_grid([])


def test_outlined():
    pixels = np.full((20, 30, 4), 60, np.uint8)
    pixels[..., 3] = 0
    assert (plots.outlined(pixels) == 60).all()
    pixels[5:15, 8:22, 3] = 255
    drawn = plots.outlined(pixels, width=1)
    changed = (drawn != 60).any(axis=-1)
    assert changed[5, 8:22].all() and changed[5:15, 21].all() and not changed[6:14, 9:21].any()
    assert changed.sum() == 2 * (10 + 14) - 4 and (pixels[..., :3] == 60).all()


def test_class_sizes():
    ours = pd.DataFrame({"photographs": [1, 4], "ids": [7, 2]})
    figure = plots.class_sizes({"ours": ours, "the competition": report.class_sizes()})
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["ours", "the competition"]
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "log"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [7, 2]
    assert len(figure.axes[1].patches) == (report.class_sizes()["whales"] > 0).sum()


def test_image_sizes():
    sizes = pd.DataFrame(
        {
            "split": ["train", "train", "test"],
            "width": [10, 20, 30],
            "height": [5, 6, 7],
            "photographs": [1, 9, 2],
        }
    )
    once, bubbles = plots.image_sizes(sizes, ratios=(2,)).axes
    assert once.collections[0].get_offsets().tolist() == [[10, 5], [20, 6]]
    diameters = np.sqrt(bubbles.collections[0].get_sizes())
    assert diameters == pytest.approx([0, 4 * np.log(9)])
    assert [text.get_text() for text in once.get_legend().get_texts()] == ["train", "test"]


def test_contrast_histograms():
    figure = plots.contrast_histograms(report.contrast_histogram(), {"train": 58.7})
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["train", "test"]
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 25361
    assert [text.get_text() for text in figure.axes[0].texts] == ["mean 58.7"] and not figure.axes[1].texts
    figure.canvas.draw()


def test_cosine_by_strength():
    frame = pd.DataFrame({"strength": [0, 5], "mean": [1, 0.8], "low": [1, 0.7], "high": [1, 0.9]})
    figure = plots.cosine_by_strength({"a": frame, "b": frame / 2}, "angle (degrees)", {"same whale": 0.6})
    (axis,) = figure.axes
    assert [line.get_ydata()[-1] for line in axis.lines] == [0.8, 0.4, 0.6]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
    assert [text.get_text() for text in axis.texts] == [
        "same whale"
    ] and axis.get_xlabel() == "angle (degrees)"
    figure, axes = plt.subplots(1, 2)
    assert plots.cosine_by_strength({"a": frame}, "x", used=(0, 2), axis=axes[1]) is figure
    assert axes[1].get_legend() is None and [text.get_text() for text in axes[1].texts] == ["in training"]
    assert not axes[0].lines and axes[1].patches[0].get_width() == 2


CONTROL = """
import ipywidgets
from matplotlib.figure import Figure
from whalelib import plots

def draw(angle=10, fill="zero"):
    figure = Figure(figsize=(1, angle / 10), dpi=50)
    figure.subplots().set_title(fill)
    print("drawn at", angle, fill)
    return figure

slider = ipywidgets.IntSlider(min=-90, max=90, value=10)
plots.control(draw, angle=slider, fill=["zero", "mean"])
"""


def test_a_control_leaves_a_picture():
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    from whalelib.course.execute import tidy  # noqa: PLC0415

    sources = ["%matplotlib inline", CONTROL, "slider.value = 40"]
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = nbclient.NotebookClient(node, timeout=120)
    client.execute()
    outputs = node.cells[1].outputs
    # A busy kernel sends a line in pieces.
    printed = "".join(output.text for cell in node.cells for output in cell.outputs if "text" in output)
    assert printed == "drawn at 10 zero\ndrawn at 40 zero\n"  # each once, though there are two controls
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    tidy(node)
    (picture,) = [output.data for output in node.cells[1].outputs if "data" in output]
    assert set(picture) == {"image/png", "text/plain"} and "widgets" not in node.metadata
    with Image.open(io.BytesIO(base64.b64decode(picture["image/png"]))) as image:
        assert image.height > 2 * image.width  # drawn anew, in the place of the first


def test_a_control_from_nonsense():
    pytest.importorskip("ipywidgets")
    with pytest.raises(ValueError, match="angle"):
        plots.control(lambda angle=1: None, angle=object())
