"""The figures show what they are given."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

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
