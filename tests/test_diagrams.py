from itertools import combinations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import torchvision
from pretrainedmodels.models import senet
from torch import nn

from whalelib.models import ThirdPlace, count_parameters, densenet121
from whalelib.report import diagrams

STAGES = pd.DataFrame(
    {
        "blocks": [0, 3, 8, 36, 3],
        "stride": [4, 1, 2, 2, 2],
        "maps": [128, 256, 512, 1024, 2048],
        "height": [64, 64, 32, 16, 8],
        "width": [128, 128, 64, 32, 16],
        "parameters": [113_408, 354_864, 4_695_296, 68_677_888, 39_199_104],
        "kept": [77.6, 163.6, 226.61, 466.62, 25.36],  # a column of another kind turns no shape into 64.0
    },
    index=[f"layer{i}" for i in range(5)],
)
RESNET = pd.DataFrame(
    {
        "blocks": [0, 3, 4, 23, 3],
        "stride": [4, 1, 2, 2, 2],
        "maps": [64, 256, 512, 1024, 2048],
        "height": [64, 64, 32, 16, 8],
        "width": [128, 128, 64, 32, 16],
        "parameters": [9_536, 215_808, 1_219_584, 26_090_496, 14_964_736],
    },
    index=STAGES.index,
)
DENSENET = pd.DataFrame(
    {
        "layers": [0, 6, 0, 12, 0, 24, 0, 16, 0],
        "maps": [64, 256, 128, 512, 256, 1024, 512, 1024, 1024],
        "height": [80, 80, 40, 40, 20, 20, 10, 10, 10],
        "width": [160, 160, 80, 80, 40, 40, 20, 20, 20],
        "parameters": [9_536, 335_040, 33_280, 919_680, 132_096, 2_837_760, 526_336, 2_158_080, 2_048],
        "kept": [17.6, 83.57, 16.39, 66.4, 8.2, 57.9, 4.1, 11.38, 0.42],
    },
    index=[
        "stem",
        "denseblock1",
        "transition1",
        "denseblock2",
        "transition2",
        "denseblock3",
        "transition3",
        "denseblock4",
        "norm5",
    ],
)
RESNETS = {"ResNet-101": RESNET, "SE-ResNet-101": RESNET.assign(parameters=[9_536, 1, 2, 3, 4])}
ALL = {
    "3.7": diagrams.first_place(2048, 8, 16, 512, 10008, (4, 256, 512), "SENet-154"),
    "3.8": diagrams.se_block(256, 16, 64, 128),
    "3.9": diagrams.se_bottleneck(),
    "3.10": diagrams.senet(STAGES, (4, 256, 512)),
    "4.6": diagrams.second_place(2048, 8, 16, 10008, (3, 256, 512), "SE-ResNeXt-101"),
    "4.6 as shipped": diagrams.second_place(2048, 8, 16, 10008, (3, 256, 512), "SE-ResNet-101", margin=0),
    "4.7": diagrams.resnets(RESNETS, (3, 256, 512)),
    "4.8": diagrams.bottlenecks(),
    "5.3": diagrams.third_place(1024, 10, 10, 512, 10008, (3, 320, 320), "DenseNet-121"),
    "5.4": diagrams.dense_layers(),
    "5.5": diagrams.densenet(DENSENET, (3, 320, 640)),
}
each = pytest.mark.parametrize("drawing", ALL.values(), ids=ALL.keys())


def corners(box):
    return box.x - box.width / 2, box.y - box.height / 2, box.x + box.width / 2, box.y + box.height / 2


@each
def test_boxes_lie_apart_and_arrows_join_them(drawing):
    for one, other in combinations(drawing.boxes.itertuples(), 2):
        a, b = corners(one), corners(other)
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1], (one.name, other.name)
    assert drawing.boxes["name"].is_unique
    named = drawing.boxes.loc[drawing.boxes["kind"] != "label", "name"]
    assert {*drawing.arrows["source"], *drawing.arrows["target"]} == {*named}
    assert {*drawing.boxes["kind"]} <= {*diagrams.KINDS, "label"}


@each
def test_texts_fit_their_boxes(drawing):
    figure = drawing.draw()
    try:
        axis = figure.axes[0]
        renderer = figure.canvas.get_renderer()
        shown = {text.get_text(): text for text in axis.texts}
        for box in drawing.boxes.itertuples():
            extent = shown[box.text].get_window_extent(renderer)
            assert extent.width / figure.dpi < box.width, box.text
            assert extent.height / figure.dpi < box.height, box.text
    finally:
        plt.close(figure)


def test_figures_say_the_shapes():
    assert ALL["3.7"].table["tensor"].tolist().count("2048 × 8 × 16") == 1
    assert "8 × 512" in ALL["3.7"].table["tensor"].tolist()
    assert ALL["3.8"].boxes.set_index("name").loc["fc1", "text"] == "FC 256 → 16"
    assert "64 groups" in ALL["3.9"].boxes.set_index("name").loc["conv2", "text"]
    tensors = [tensor for tensor in ALL["3.10"].table["tensor"] if tensor]
    assert tensors == ["128 × 64 × 128", "256 × 64 × 128", "512 × 32 × 64", "1024 × 16 × 32"]
    assert ALL["3.10"].boxes.set_index("name").loc["layer3-rest", "text"].startswith("SE bottleneck × 35")


def text_of(drawing):
    return drawing.boxes.set_index("name")["text"]


def test_figure_4_6_says_the_weights_and_the_margin():
    described, shipped = ALL["4.6"], ALL["4.6 as shipped"]
    ends = described.table.set_index("from")["tensor"]
    assert ends[["triplet loss", "cross-entropy", "adapted focal loss"]].tolist() == ["× 1", "× 0.1", "× 1"]
    assert text_of(described)["margin"] == "margin\ncos(θ + 0.5)"
    assert text_of(shipped)["margin"] == "no margin\nin training"
    assert text_of(shipped)["fc"] == "16 × FC\n2048 → 10008"


def test_figure_4_7_says_the_shapes_and_the_sums():
    tensors = [tensor for tensor in ALL["4.7"].table["tensor"] if tensor]
    assert tensors == ["64 × 64 × 128", "256 × 64 × 128", "512 × 32 × 64", "1024 × 16 × 32"]
    text = text_of(ALL["4.7"])
    assert text["layer3-rest"] == "bottleneck × 22\ns = 1, 4d = 1024" and text["conv"].endswith("64 maps")
    assert text["ResNet-101-6"] == "42.50 M" and text["SE-ResNet-101-6"] == "0.01 M"
    with pytest.raises(ValueError, match="ResNet-101, SE-ResNet-101: of different structure"):
        diagrams.resnets(RESNETS | {"SE-ResNet-101": RESNET.assign(blocks=1)}, (3, 256, 512))


def test_figure_4_8_shows_the_networks_as_they_are():
    with torch.device("meta"):
        networks = [
            torchvision.models.resnet101(),
            senet.se_resnet101(pretrained=None),
            senet.se_resnext101_32x4d(pretrained=None),
        ]
    assert len(networks) == len(diagrams.BOTTLENECKS)
    text = text_of(ALL["4.8"])
    tensors = ALL["4.8"].arrows.set_index("source")["tensor"]
    for name, network in zip(diagrams.BOTTLENECKS, networks, strict=True):
        for stage in (network.layer2, network.layer3, network.layer4):
            block = stage[0]
            d = block.conv3.out_channels // 4
            for conv in ("conv1", "conv2", "conv3"):
                strided = getattr(block, conv).stride == (2, 2)
                assert strided == ("stride s" in text[f"{name}-{conv}"])
            width = "d" if block.conv2.out_channels == d else f"{block.conv2.out_channels // d}d"
            assert tensors[f"{name}-norm2"].startswith(f"{width} ×")
            assert ("32 groups" in text[f"{name}-conv2"]) == (block.conv2.groups == 32)
            assert hasattr(block, "se_module") == (f"{name}-se" in text)
            assert block.downsample[0].stride == (2, 2)
            assert block.downsample[0].kernel_size == (1, 1)


def test_figure_5_3_says_the_sizes_and_both_ways_out():
    text, tensors = text_of(ALL["5.3"]), ALL["5.3"].table["tensor"].tolist()
    assert text["fc"] == "FC\n102400 → 512" and text["cosine"] == "cosine with\neach of 10008"
    assert text["margin"] == "margin\ncos(θ + 0.5)" and text["softmax"].startswith(f"× {ThirdPlace.SCALE:g},")
    assert [tensor for tensor in tensors if tensor] == [
        "1024 × 10 × 10",
        "512",
        "512",
        "training",
        "inference",
    ]
    with torch.device("meta"):
        neck = ThirdPlace(5004, densenet121()).neck
    kinds = [nn.BatchNorm2d, nn.Dropout2d, nn.Flatten, nn.Linear, nn.BatchNorm1d]
    assert [type(part) for part in neck] == kinds  # in the order of the boxes
    names = ALL["5.3"].boxes["name"].tolist()
    assert names[names.index("backbone") + 1 :][:4] == ["norm", "dropout", "fc", "norm2"]
    assert neck[3].in_features == 102400 and neck[3].out_features == 512 and neck[1].p == 0.5


def test_figure_5_4_shows_the_layers_as_they_are():
    with torch.device("meta"):
        features = densenet121().network.features
    text, tensors = text_of(ALL["5.4"]), ALL["5.4"].arrows.set_index("source")["tensor"]
    assert text["layer-name"].endswith("k = 32") and text["transition-name"].endswith("θ = 0.5")
    layer, transition = features.denseblock2.denselayer3, features.transition2
    assert [*dict(layer.named_children())] == ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    assert [*dict(transition.named_children())] == ["norm", "relu", "conv", "pool"]
    names = ALL["5.4"].boxes["name"].tolist()
    assert names[1:6] == ["layer-in", "layer-norm1", "layer-conv1", "layer-norm2", "layer-conv2"]
    assert (layer.conv1.kernel_size, layer.conv2.kernel_size) == ((1, 1), (3, 3))
    assert layer.conv1.out_channels == 4 * 32 and tensors["layer-conv1"].startswith("4k ×")
    assert layer.conv2.out_channels == 32 and tensors["layer-conv2"].startswith("k ×")
    assert tensors["layer-concatenation"].startswith("(C + k) ×")
    assert transition.conv.out_channels == 0.5 * transition.conv.in_channels
    assert isinstance(transition.pool, nn.AvgPool2d) and transition.pool.kernel_size == 2
    assert text["transition-pool"] == "average pooling 2 × 2, s 2"


def test_figure_5_5_says_the_shapes_and_the_sums():
    drawing = ALL["5.5"]
    assert [tensor for tensor in drawing.table["tensor"] if tensor] == [
        f"{maps} × {height} × {2 * height}"
        for maps, height in [(64, 80), (256, 80), (128, 40), (512, 40), (256, 20), (1024, 20), (512, 10)]
    ] + ["1024 × 10 × 20"]
    text = text_of(drawing)
    assert text["denseblock3"] == "dense block\n24 composite operations"
    assert text["transition3"] == "transition\n1024 → 512 maps" and text["norm5"].endswith("without ReLU")
    assert text["parameters-block 3"] == "3.36 M" and text["parameters-all"] == "6.95 M"
    with torch.device("meta"):
        features = densenet121().network.features
    learned = {name: count_parameters(part) for name, part in features.named_children()}
    assert DENSENET["parameters"].iloc[1:].to_dict() == {name: learned[name] for name in DENSENET.index[1:]}


def test_a_text_too_long_is_found():
    """The test above can fail."""
    drawing = diagrams.diagram(
        [("a", "far too long a text for so small a box", "data", 0, 0, 0.5)], [("a", "a")]
    )
    with pytest.raises(AssertionError):
        test_texts_fit_their_boxes(drawing)


def test_survey_of_layers_counted_by_hand():
    with torch.device("meta"):
        layers = nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1)
        )
    found = diagrams.survey(layers, (4, 32, 64))
    assert found[["maps", "height", "width"]].to_numpy().tolist() == [[8, 16, 32], [8, 16, 32], [2, 16, 32]]
    assert found["parameters"].tolist() == [4 * 8 * 9, 0, 8 * 2 + 2]
    assert found["multiplications"].tolist() == pytest.approx([4 * 8 * 9 * 512 / 1e9, 0, 8 * 2 * 512 / 1e9])
    # The input of each convolution, the output of the ReLU; weights don't count.
    assert found["kept"].tolist() == pytest.approx(
        [4 * 32 * 64 * 4 / 1e6, 8 * 512 * 4 / 1e6, 8 * 512 * 4 / 1e6]
    )


def test_shares_of_each_column():
    figure = diagrams.shares(STAGES[["blocks", "parameters"]], ["layer3"])
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert texts[0] == ["0.0%", "6.0%", "16.0%", "72.0%", "6.0%"]
    assert texts[1][3] == "60.8%"
    plt.close(figure)
