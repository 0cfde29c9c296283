import numpy as np
import pytest
import torch
from torch import nn

from whalelib.contrast import Contrasted, global_contrast, local_contrast
from whalelib.models import Identifier


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(image, size, bias):
    """Return the local normalisation of an image (C, H, W), pixel by pixel as the formula says it."""
    channels, height, width = image.shape
    half, count = size // 2, channels * size**2

    def mean(values):
        padded = np.pad(values, ((0, 0), (half, half), (half, half)))
        rows = [
            [padded[:, i : i + size, j : j + size].sum() / count for j in range(width)] for i in range(height)
        ]
        return np.array(rows)

    centred = image - mean(image)
    return centred / np.sqrt(bias + mean(centred**2))


@pytest.mark.parametrize(("size", "bias"), [(9, 1.0), (3, 0.0), (5, 0.01), (1, 1.0)])
def test_local_contrast_is_its_formula(size, bias):
    image = images(3, 12, 17)
    found = local_contrast(image, size=size, bias=bias)
    assert found.shape == image.shape
    np.testing.assert_allclose(found.numpy(), by_loops(image.numpy(), size, bias), atol=1e-12)


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_global_contrast_is_its_formula(bias):
    image = images(3, 8, 9)
    centred = image.numpy() - image.numpy().mean()
    expected = centred / np.sqrt(bias + (centred**2).mean())
    np.testing.assert_allclose(global_contrast(image, bias=bias).numpy(), expected, atol=1e-12)
    if not bias:
        assert abs(expected.mean()) < 1e-12 and abs(expected.std() - 1) < 1e-12


@pytest.mark.parametrize("contrast", [global_contrast, local_contrast])
def test_each_image_by_itself(contrast):
    batch = images(2, 4, 3, 10, 11)
    found = contrast(batch)
    for i in range(2):
        for j in range(4):
            torch.testing.assert_close(found[i, j], contrast(batch[i, j]), rtol=0, atol=1e-12)


def test_global_contrast_knows_no_light():
    image = images(3, 8, 9)
    darker = 0.3 * image + 0.2
    torch.testing.assert_close(global_contrast(darker), global_contrast(image), rtol=0, atol=1e-9)
    # With a bias it does, and local contrast with the authors' bias of 1 hardly divides at all.
    assert not torch.allclose(global_contrast(darker, bias=1), global_contrast(image, bias=1), atol=1e-3)
    inner = (..., slice(4, -4), slice(4, -4))
    large = images(3, 40, 50)
    torch.testing.assert_close(
        local_contrast(0.3 * large + 0.2)[inner], 0.3 * local_contrast(large)[inner], rtol=0.05, atol=0
    )


def test_an_image_of_one_colour():
    flat = torch.full((3, 20, 30), 0.7)
    assert torch.isfinite(global_contrast(flat)).all() and global_contrast(flat).abs().max() < 1e-5 / 1e-8
    black = torch.zeros(3, 20, 30)
    assert (global_contrast(black) == 0).all() and (local_contrast(black, bias=0) == 0).all()
    # Zeros beyond the edge make the border bright, and it alone.
    found = local_contrast(flat)
    assert found[:, 4:-4, 4:-4].abs().max() < 1e-6 and found[:, 0, 0].min() > 0.3


def test_arguments_that_make_no_sense():
    image = images(3, 8, 9)
    for contrast in (global_contrast, local_contrast):
        with pytest.raises(ValueError, match="bias = -1"):
            contrast(image, bias=-1)
        with pytest.raises(ValueError, match="bias = nan"):
            contrast(image, bias=float("nan"))
        with pytest.raises(ValueError, match=r"shape \(8, 9\)"):
            contrast(image[0])
        with pytest.raises(ValueError, match=r"torch\.uint8"):
            contrast((255 * image).byte())
    for size in (0, 4, -3):
        with pytest.raises(ValueError, match=f"size = {size}"):
            local_contrast(image, size=size)


class Pooled(nn.Module):
    num_features = 12

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, self.num_features, 3)

    def forward(self, images):
        return self.layer(images).mean(dim=(2, 3))


def test_a_network_behind_it():
    batch, plain = images(4, 3, 16, 20).float(), Pooled()
    model = Identifier(5, backbone=Contrasted(plain, global_contrast), mean=0, std=1).eval()
    torch.testing.assert_close(model.embed(batch), model.embed(0.5 * batch + 0.1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.backbone(batch), plain(global_contrast(batch)))
    assert model(batch)["logits"].shape == (4, 5)
    model(batch)["logits"].sum().backward()
    assert plain.layer.weight.grad.abs().sum() > 0
