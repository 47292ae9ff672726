"""Layers of both models: resolution, strips, spectral attention, and the spectral head with its
closed-form start, its basis and the consistency with the camera."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectral_layers import (
    BASIS_RANK,
    STRIP_FLOATS,
    CameraConsistency,
    DropPath,
    SpectralAttention,
    SpectralHead,
    check_image,
    colour_channels,
    colour_features,
    depth_to_space,
    fit_linear_spectral_path,
    in_strips,
    space_to_depth,
)

FEATURES = 8


def spectral_head(in_channels=3, out_channels=31, std=None, **options):
    """A head whose correction is as small as at the start, or larger with a deviation `std`."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(FEATURES)
    head = SpectralHead(in_channels, out_channels, FEATURES, norm, **options)
    if std is not None:
        nn.init.normal_(head.coefficients.weight, std=std)
    return head


def run(head, rgb, features=None):
    """The head's outputs for rgb (B, in, H, W), as images."""
    x = rgb.permute(0, 2, 3, 1).contiguous()
    if features is None:
        size = (-(-x.shape[1] // 2), -(-x.shape[2] // 2))
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(len(x), *size, FEATURES, generator=generator)
    return [y.permute(0, 3, 1, 2) for y in head(x, colour_features(x), features)]


def linear_path(head, rgb):
    return head.direct(rgb.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_branch_is_dropped_for_whole_samples_and_the_mean_stays():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 2, 3))
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 4 / 3]))
    assert (dropped.amin(dim=(1, 2, 3)) == dropped.amax(dim=(1, 2, 3))).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(torch.ones(3, 1, 1, 1)), torch.ones(3, 1, 1, 1))


def test_growing_undoes_shrinking():
    x = torch.randn(2, 7, 9, 3)
    assert space_to_depth(x).shape == (2, 4, 5, 12)
    assert torch.equal(depth_to_space(space_to_depth(x), 7, 9), x)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 3, 63, 64), (3, 64, 64)])
def test_an_image_of_another_form_is_an_error_that_names_the_least_side(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*min_input_size = 64"):
        check_image(torch.zeros(shape), 3, 64)
    check_image(torch.zeros(1, 3, 64, 64), 3, 64)


def test_strips_of_rows_that_see_their_neighbours_change_nothing(monkeypatch):
    def mean_of_three_rows(x):
        padded = F.pad(x, (0, 0, 0, 0, 1, 1))
        return padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]

    x = torch.rand(2, 37, 5, 3)
    with torch.no_grad():
        whole = in_strips(mean_of_three_rows, x, channels=3, halo=1)
        halved = in_strips(space_to_depth, x, channels=12)
        monkeypatch.setitem(STRIP_FLOATS, "cpu", 200)
        torch.testing.assert_close(in_strips(mean_of_three_rows, x, channels=3, halo=1), whole)
        torch.testing.assert_close(in_strips(space_to_depth, x, channels=12), halved)


def test_spectral_attention_is_a_softmax_over_channels():
    torch.manual_seed(0)
    attention = SpectralAttention(12, 8, 2)
    x = torch.randn(1, 6, 5, 12)
    q, k, v = attention.qkv(x).view(30, 3, 2, 4).unbind(1)
    expected = torch.empty(30, 2, 4)
    for head in range(2):
        a, b = (F.normalize(t[:, head], dim=0) for t in (q, k))
        expected[:, head] = v[:, head] @ (4 * a.T @ b).softmax(dim=-1).T
    torch.testing.assert_close(
        attention(x, attention.frame_map(x)).view(30, 2, 4), expected, rtol=1e-4, atol=1e-5
    )


# --- the closed-form start


def relative_linear_reference(rgb, cube, floor=0.01):
    """Weighted least squares band by band with plain NumPy."""
    x = np.concatenate([rgb, np.ones((1, rgb.shape[1]))]).T
    maps = []
    for y in cube:
        w = 1 / np.maximum(y, floor)
        maps.append(np.linalg.lstsq(x * w[:, None], y * w, rcond=None)[0])
    return np.stack(maps)


def test_the_fitted_path_is_the_linear_map_of_least_relative_error():
    rng = np.random.default_rng(0)
    rgb, cube = rng.uniform(0.01, 1, (3, 4096)), rng.uniform(0, 1, (31, 4096)) ** 3
    reference = relative_linear_reference(rgb, cube)
    expected = (reference[:, :3] @ rgb + reference[:, 3:]).reshape(1, 31, 64, 64)
    rgb, cube = (torch.from_numpy(x).float().view(1, -1, 64, 64) for x in (rgb, cube))
    head = spectral_head()
    head.fit(rgb, cube)
    np.testing.assert_allclose(linear_path(head, rgb).detach().numpy(), expected, atol=1e-4)
    with torch.no_grad():
        (start,) = run(head.train(), rgb)
    scale = rgb.mean(dim=1, keepdim=True) + np.abs(expected)
    assert ((start - torch.from_numpy(expected)).abs() / scale).mean() < 0.01


@pytest.mark.parametrize("channels, bands", [(3, 31), (8, 250), (3, 1)])
def test_fit_survives_constant_and_black_images(channels, bands):
    rgb, cube = torch.zeros(1, channels, 8, 8), torch.zeros(1, bands, 8, 8)
    weight, bias = fit_linear_spectral_path(rgb, cube)
    assert weight.isfinite().all() and bias.isfinite().all()
    camera = CameraConsistency(channels, bands)
    for level in (0.0, 0.5):
        camera.fit(rgb + level, cube + level)
        assert camera(torch.rand(1, 8, 8, bands), torch.rand(1, 8, 8, channels)).isfinite().all()


# --- consistency with the camera


def camera_and_scene(channels=3, bands=31, noise=0.0, size=64):
    """A camera of smooth lobes (in, out), its image, and the scene's cube (2, out, H, W), which is
    smooth in space and spectrum."""
    g = torch.Generator().manual_seed(0)
    place = torch.linspace(0, 1, bands)
    peaks = torch.linspace(0.9, 0.1, channels)[:, None]
    camera = torch.exp(-((place - peaks) ** 2) * 40)
    camera = camera / camera.sum(dim=1).max()
    maps = F.interpolate(torch.rand(2, 6, 8, 8, generator=g), size, mode="bicubic")
    spectra = torch.exp(-((place - torch.linspace(0, 1, 6)[:, None]) ** 2) * 12)
    cube = torch.einsum("nkhw,kb->nbhw", maps.clamp(0.05, 1), spectra)
    rgb = torch.einsum("cb,nbhw->nchw", camera, cube)
    return camera, rgb * (1 + noise * torch.randn(rgb.shape, generator=g)), cube


def corrected(consistency, cube, rgb):
    rows = [t.permute(0, 2, 3, 1) for t in (cube, rgb)]
    return (rows[0] + consistency(*rows)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels, bands", [(3, 31), (2, 12), (4, 120)])
def test_a_cube_moves_towards_what_the_camera_saw_and_towards_the_truth(channels, bands):
    camera, rgb, cube = camera_and_scene(channels, bands)
    consistency = CameraConsistency(channels, bands)
    wrong = cube * torch.linspace(0.8, 1.1, bands)[:, None, None]
    assert torch.equal(corrected(consistency, wrong, rgb), wrong)  # before the fit
    consistency.fit(rgb, cube)
    better = corrected(consistency, wrong, rgb)
    seen = [(torch.einsum("cb,nbhw->nchw", camera, c) - rgb).abs() for c in (wrong, better)]
    assert seen[1].mean() < 0.1 * seen[0].mean()
    assert seen[1][..., 0].mean() < 0.2 * seen[0][..., 0].mean()  # at the border too
    assert (better - cube).abs().mean() < 0.8 * (wrong - cube).abs().mean()
    assert (corrected(consistency, cube, rgb) - cube).abs().mean() < 0.01 * cube.mean()


def test_the_noisier_the_image_the_less_a_cube_moves():
    moved = []
    for noise in (0.0, 0.1, 1.0):
        _, rgb, cube = camera_and_scene(noise=noise)
        consistency = CameraConsistency(3, 31)
        consistency.fit(rgb, cube)
        clean = camera_and_scene()[1]
        moved.append((corrected(consistency, 0.9 * cube, clean) - 0.9 * cube).abs().mean())
    assert moved[0] > 1.2 * moved[1] > 4 * moved[2]


def test_noise_is_averaged_over_pixels():
    _, rgb, cube = camera_and_scene(noise=0.1)
    consistency = CameraConsistency(3, 31)
    consistency.fit(rgb, cube)
    assert (corrected(consistency, 0.9 * cube, rgb) - cube).abs().mean() < 0.5 * 0.1 * cube.mean()


def test_training_knows_no_consistency_and_evaluation_does():
    camera, rgb, cube = camera_and_scene()
    head = spectral_head(std=0.05)
    head.fit(rgb, cube)
    with torch.no_grad():
        (evaluated,), (trained,) = run(head.eval(), rgb), run(head.train(), rgb)

    def unexplained(cube):
        error = torch.einsum("cb,nbhw->nchw", camera, cube) - rgb
        return F.avg_pool2d(error, 8).abs().mean()

    assert unexplained(evaluated) < 0.5 * unexplained(trained)


# --- the head


@pytest.mark.parametrize("channels, bands", [(3, 31), (1, 4), (8, 250), (3, 1)])
def test_every_parameter_of_the_head_learns_whatever_the_channels(channels, bands):
    head = spectral_head(channels, bands, std=0.05, estimate_uncertainty=True)
    cube, scale = run(head, torch.rand(2, channels, 9, 12))
    assert cube.shape == scale.shape == (2, bands, 9, 12)
    (cube.square().mean() + scale.mean() + head.basis_loss()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(p.grad.abs().sum() > 0 for p in head.parameters() if p.ndim > 1 and bands > 1)


def test_dark_and_bright_pixels_get_corrections_of_the_same_relative_size():
    head = spectral_head(std=0.1).eval()
    rgb = torch.rand(1, 3, 32, 32).clamp_min(0.2)
    with torch.no_grad():
        head.direct.bias.zero_()
        bright = run(head, rgb)[0] - linear_path(head, rgb)
        dark = run(head, 0.05 * rgb)[0] - linear_path(head, 0.05 * rgb)
    assert 0.02 < dark.abs().mean() / bright.abs().mean() < 0.2


def test_output_is_never_negative_where_asked_and_negative_pixels_still_learn():
    head, rgb = spectral_head(non_negative=True), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        head.direct.bias.fill_(-5.0)
    (cube,) = run(head, rgb)
    assert (cube == 0).all()
    (cube - 0.5).abs().mean().backward()
    assert (head.direct.bias.grad < 0).all()  # descent raises the bias
    assert run(spectral_head(), -rgb)[0].min() < 0


def test_the_scale_is_positive_and_trains_nothing_but_itself():
    head = spectral_head(std=0.05, estimate_uncertainty=True)
    _, scale = run(head, torch.rand(1, 3, 16, 16))
    assert (scale > 0).all()
    scale.sum().backward()
    learning = {name for name, p in head.named_parameters() if p.grad is not None}
    assert learning == {"scale.weight", "scale.bias"}


@pytest.mark.parametrize("size", [(64, 48), (63, 51)])
def test_the_head_in_strips_gives_what_it_gives_at_once(monkeypatch, size):
    head = spectral_head(std=0.1, estimate_uncertainty=True).eval()
    rgb, cube = torch.rand(1, 3, *size), torch.rand(1, 31, *size)
    head.fit(rgb, cube)
    with torch.no_grad():
        whole = run(head, rgb)
        monkeypatch.setitem(STRIP_FLOATS, "cpu", 1 << 14)
        for expected, found in zip(whole, run(head, rgb), strict=True):
            torch.testing.assert_close(found, expected)


def test_the_basis_starts_smooth_and_orthonormal_and_its_loss_pulls_back():
    head = spectral_head()
    basis = head.basis.detach()
    assert basis.shape == (31, BASIS_RANK)
    assert torch.allclose(basis.mT @ basis, torch.eye(BASIS_RANK), atol=1e-5)
    assert head.basis_loss().item() < 1e-7
    assert basis[:, 1].diff().sign().unique().numel() == 1  # half a cosine: no wiggles
    with torch.no_grad():
        head.basis += 0.1 * torch.randn_like(head.basis)
    before = head.basis_loss().item()
    optimizer = torch.optim.SGD([head.basis], lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        head.basis_loss().backward()
        optimizer.step()
    assert before > 1e-2 and head.basis_loss().item() < before


def test_rough_spectra_cost_even_where_they_are_orthonormal():
    head = spectral_head()
    rotated, _ = torch.linalg.qr(torch.randn(31, BASIS_RANK))
    with torch.no_grad():
        head.basis.copy_(rotated)
    assert torch.allclose(rotated.mT @ rotated, torch.eye(BASIS_RANK), atol=1e-5)
    assert head.basis_loss() > 1.0


def test_colour_features_are_finite_and_of_order_one_from_black_to_white():
    for level in (0.0, 1e-4, 0.1, 1.0):
        features = colour_features(torch.full((1, 2, 2, 3), level))
        assert features.shape == (1, 2, 2, colour_channels(3))
        assert features.isfinite().all() and features.abs().max() < 6
