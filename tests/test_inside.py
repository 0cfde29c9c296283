"""Heat maps where the answer is known, their test by deletion, and maps of points that are where they should be."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from whalelib import inside
from whalelib.models import FeatureMap, ThirdPlace


class Toy(nn.Module):
    """An embedding of (N, 1, 2, 2) images: their first and last pixels, made as long as 1."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Identity()
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        self.neck[1].weight = nn.Parameter(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]]), requires_grad=False)

    def embed(self, images):
        return F.normalize(self.neck(self.backbone(images)))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 16, stride=16)


def network():
    """A third-place network whose normalisations have seen something, in training mode."""
    model = ThirdPlace(4, FeatureMap(Tiny(), 6, ()), size=(64, 128), dimension=16)
    model.neck[3] = nn.Linear(6 * 4 * 8, 16)
    for _ in range(3):
        model(torch.rand(8, 3, 64, 128))
    return model


def units(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_heat_is_what_a_cell_adds_along_the_target():
    images = torch.tensor([[[[1.0, 2], [3, 4]]], [[[3.0, 9], [9, 0]]]])
    targets = torch.tensor([[0.0, 1], [-0.6, 0.8]])
    heat = inside.grad_cam(Toy(), images, targets)
    expected = torch.tensor([[[0, 0], [0, 4 / 17**0.5]], [[-0.6, 0], [0, 0]]])
    torch.testing.assert_close(heat, expected)


def test_pooled_heat_forgets_the_place():
    images = torch.tensor([[[[1.0, 2], [3, 4]]]])
    heat = inside.grad_cam(Toy(), images, torch.tensor([[0.0, 1]]), by="pooled")
    torch.testing.assert_close(heat, images[0] / 4 / 17**0.5)


def test_cells_and_a_constant_add_up_to_the_cosine():
    torch.manual_seed(0)
    model, images, targets = network(), torch.rand(5, 3, 64, 128), units(5, 16)
    heat = inside.grad_cam(model, images, targets, batch_size=2)
    assert heat.shape == (5, 4, 8)
    assert model.training
    model.eval()
    with torch.no_grad():
        maps = model.backbone((images - model.mean) / model.std)
        long, constant = model.neck(maps), model.neck(torch.zeros_like(maps))
        rest = (constant * targets).sum(1) / long.norm(dim=1)
        cosine = (model.embed(images) * targets).sum(1)
        torch.testing.assert_close(heat.sum((1, 2)) + rest, cosine, atol=1e-5, rtol=1e-4)
        maps[:, :, 1, 2] = 0  # a cell's heat is what is lost without it, as long as the length is what it was
        lost = ((long - model.neck(maps)) * targets).sum(1) / long.norm(dim=1)
    torch.testing.assert_close(heat[:, 1, 2], lost, atol=1e-5, rtol=1e-4)


def test_an_earlier_layer_gives_its_own_cells_and_nothing_is_left_behind():
    torch.manual_seed(0)
    model = network()
    finer = nn.Conv2d(3, 3, 8, stride=8)
    model.backbone = FeatureMap(nn.Sequential(), 6, ())
    model.backbone.network.features = nn.Sequential(finer, nn.ReLU(), nn.Conv2d(3, 6, 2, stride=2))
    images = torch.rand(2, 3, 64, 128)
    assert inside.grad_cam(model, images, units(2, 16), layer=finer).shape == (2, 8, 16)
    assert not finer._forward_hooks
    assert not model.neck._forward_hooks
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_integrated_heat_adds_up_to_the_cosine_whatever_follows():
    torch.manual_seed(0)
    model = network()
    finer = nn.Conv2d(3, 3, 8, stride=8)
    model.backbone.network.features = nn.Sequential(finer, nn.SiLU(), nn.Conv2d(3, 6, 2, stride=2))
    images, targets = torch.rand(3, 3, 64, 128), units(3, 16)
    heat = inside.integrated_cam(model, images, targets, layer=finer, steps=50, batch_size=2)
    assert heat.shape == (3, 8, 16)
    assert model.training
    assert not finer._forward_hooks
    model.eval()
    with torch.no_grad():
        blank = images.mean((2, 3), keepdim=True).expand_as(images)
        more = ((model.embed(images) - model.embed(blank)) * targets).sum(1)
    torch.testing.assert_close(heat.sum((1, 2)), more, atol=1e-3, rtol=1e-2)
    once = inside.grad_cam(model, images, targets, layer=finer).sum((1, 2))
    assert (once - more).abs().max() > 0.05  # the gradient at the image alone doesn't


def test_integrated_heat_where_the_answer_is_known():
    class Square(nn.Module):
        def forward(self, x):
            return F.pad(x[:, 0, :1, :1].flatten(1).square(), (0, 1), value=1.0)

    model = Toy()
    model.neck = Square()  # pixel 0 gives (a * a, 1), and the cosine to (1, 0) is a * a / sqrt(a ** 4 + 1)
    images = torch.tensor([[[[3.0, 1], [2, -2]]]])  # of mean 1
    heat = inside.integrated_cam(model, images, torch.tensor([[1.0, 0]]), steps=200)
    expected = torch.zeros(1, 2, 2)
    expected[0, 0, 0] = 9 / 82**0.5 - 1 / 2**0.5
    torch.testing.assert_close(heat, expected, atol=1e-4, rtol=1e-3)


def test_bad_questions_have_clear_answers():
    with pytest.raises(ValueError, match="by = 'cell'"):
        inside.grad_cam(Toy(), torch.zeros(1, 1, 2, 2), torch.zeros(1, 2), by="cell")
    with pytest.raises(ValueError, match="2 images, 1 targets"):
        inside.grad_cam(Toy(), torch.zeros(2, 1, 2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="1 images, 2 targets"):
        inside.integrated_cam(Toy(), torch.zeros(1, 1, 2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="steps = 0"):
        inside.integrated_cam(Toy(), torch.zeros(1, 1, 2, 2), torch.zeros(1, 2), steps=0)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\), masks of shape \(1, 6, 8\)"):
        inside.heat_share(torch.zeros(1, 4, 4), torch.zeros(1, 6, 8))
    with pytest.raises(ValueError, match="12 x 16 pixels"):
        inside.blanked(torch.zeros(1, 3, 12, 16), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="share = 0"):
        inside.blanked(torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 4), share=0)
    with pytest.raises(ValueError, match="perplexity = 30 for 20 rows"):
        inside.neighbour_map(np.zeros((20, 3)))
    with pytest.raises(ValueError, match="10 rows, 10 points, 10 neighbours"):
        inside.neighbours_kept(np.zeros((10, 3)), np.zeros((10, 2)))


def test_the_share_of_the_heat_on_a_mask():
    heat = torch.tensor([[[3.0, -5], [1, 0]], [[1.0, 1], [1, 1]], [[-1.0, -1], [-1, 0]]])
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True  # the first cell
    mask[:, 2, :2] = True  # half of the third
    share, area = inside.heat_share(heat, mask)
    torch.testing.assert_close(share[:2], torch.tensor([3.5 / 4, 1.5 / 4]))
    assert share[2].isnan()
    torch.testing.assert_close(area, torch.full((3,), 6 / 16))


def test_the_hottest_cells_get_the_mean_colour():
    images = torch.rand(2, 3, 16, 32)
    heat = torch.zeros(2, 4, 4)
    heat[0, 1, 2], heat[1, 3, 0] = 1, -1
    out = inside.blanked(images, heat, share=1 / 16, grid=4)
    mean = images[0].mean((1, 2))
    torch.testing.assert_close(out[0, :, 4:8, 16:24], mean[:, None, None].expand(3, 4, 8))
    assert (out[0] != images[0]).any(0).sum() == 32
    assert (out[1] != images[1]).any(0)[:4, :8].all()  # of equals the first
    assert torch.equal(
        inside.blanked(images, heat, 1, 4), images.mean((2, 3), keepdim=True).expand_as(images)
    )


def test_cells_that_matter_are_found_and_the_cosine_falls():
    torch.manual_seed(0)
    model = network().eval()
    images = torch.rand(20, 3, 64, 128)
    with torch.no_grad():
        targets = model.embed(images)
        heat = inside.grad_cam(model, images, targets)
        left = [
            (model.embed(inside.blanked(images, each, 0.1, 8)) * targets).sum(1).mean()
            for each in (heat, torch.rand(20, 4, 8), -heat)
        ]
    assert left[0] < left[1] < left[2]


@pytest.fixture
def clouds():
    """Three clouds of forty points in ten dimensions."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(size=(40, 10)) + 12 * rng.normal(size=10) for _ in range(3)])


def test_the_map_keeps_clouds_together_and_apart(clouds):
    flat = inside.neighbour_map(clouds, perplexity=10)
    assert flat.shape == (120, 2)
    middles = flat.reshape(3, 40, 2).mean(1)
    nearest = np.linalg.norm(flat[:, None] - middles, axis=2).argmin(1)
    assert (nearest == np.repeat([0, 1, 2], 40)).all()
    np.testing.assert_array_equal(flat, inside.neighbour_map(clouds, perplexity=10))


def test_the_map_is_as_good_as_another_program_s():
    datasets, manifold = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.manifold")
    rows = datasets.load_digits().data[:300]
    theirs = manifold.TSNE(perplexity=20, init="pca", method="exact", max_iter=500).fit_transform(rows)
    kept = [inside.neighbours_kept(rows, flat).mean() for flat in (inside.neighbour_map(rows, 20), theirs)]
    assert kept[0] > kept[1] - 0.02
    assert kept[0] > inside.neighbours_kept(rows, inside.principal(rows)[0]).mean() + 0.1


def test_affinities_have_the_perplexity(clouds):
    rows = torch.as_tensor(clouds, dtype=torch.float32)
    for perplexity in (2, 30):
        joint = inside._affinities(rows, perplexity)
        assert joint.sum().item() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(joint, joint.T)
    alone = torch.tensor([[0.0], [1], [10], [11]])
    assert inside._affinities(alone, 1.05)[0, 1] > 0.2  # a quarter of all, each being the other's neighbour


def test_principal_components_are_those_of_the_largest_variance():
    rng = np.random.default_rng(0)
    made = rng.normal(size=(500, 2)) * (3, 1)
    basis = np.linalg.qr(rng.normal(size=(6, 2)))[0]
    flat, shares = inside.principal(made @ basis.T + 5)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] == pytest.approx(0.9, abs=0.02)
    assert np.abs(np.corrcoef(flat[:, 0], made[:, 0])[0, 1]) > 0.99
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(inside.principal(-(made @ basis.T))[0], -flat, atol=1e-9)


def test_neighbours_are_counted(clouds):
    assert inside.neighbours_kept(clouds, clouds).tolist() == [1] * 120
    flat = np.random.default_rng(1).normal(size=(120, 2))
    assert inside.neighbours_kept(clouds, flat, 20).mean() == pytest.approx(20 / 119, abs=0.03)
    line = np.array([[0.0], [1], [3], [10]])
    assert inside.neighbours_kept(line, np.array([[0.0], [1], [-3], [10]]), 1).tolist() == [1, 1, 0, 0]
