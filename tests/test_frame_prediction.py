"""The tiler: the full frame's output where the model is local, exact where it is constant, in
bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from frame_prediction import LiveBytes, blend_tiles, predict_frame, ramp, tile_offsets

ROOT = Path(__file__).resolve().parents[1]


def tiled(run, image, patch, overlap, batch=1, bands=5):
    return torch.from_numpy(
        blend_tiles(
            run,
            lambda y0, y1, x0, x1: image[:, y0:y1, x0:x1],
            image.shape[1:],
            patch,
            overlap,
            batch,
            lambda channels: np.full((channels, *image.shape[1:]), np.nan, np.float32),
        )
    )


@pytest.mark.parametrize(
    "size", [(64, 64), (65, 97), (50, 200), (130, 131), (64, 65), (63, 129), (200, 64)]
)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_tiled_output_equals_full_frame_of_a_convolutional_model(size, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1))
    model.to(memory_format=torch.channels_last)
    image = torch.rand(3, *size)
    full = model(image[None])[0]
    assert (tiled(model, image, 64, 16, batch) - full).abs().max() < 1e-5
    assert full[:, 0].abs().min() > 0


@pytest.mark.parametrize(
    "size", [(64, 64), (65, 64), (40, 300), (193, 257), (64 + 48, 64 + 2 * 48)]
)
@pytest.mark.parametrize("overlap", [0, 1, 16, 40])
def test_constant_model_gives_exactly_its_constant(size, overlap):
    out = tiled(
        lambda x: x.new_full((len(x), 2, *x.shape[2:]), 0.3), torch.rand(3, *size), 64, overlap
    )
    assert (out == torch.tensor(0.3)).all()


def test_one_band_is_blended_too():
    calls = []

    def run(x):
        calls.append(1)
        return x.new_full((1, 1, *x.shape[2:]), float(len(calls)))

    out = tiled(run, torch.rand(3, 112, 64), 64, 16)
    assert out[0, 0, 0] == 1 and out[0, -1, 0] == 2
    steps = out[0, :, 0].diff()
    assert steps.min() >= 0 and steps.max() < 0.3, "the overlap is a ramp, not a seam"


def test_tiles_cover_the_side_with_the_overlap_that_was_asked_for():
    for side, tile, overlap in [
        (10, 10, 3),
        (11, 10, 3),
        (100, 10, 9),
        (101, 32, 8),
        (5, 10, 0),
        (20000, 512, 128),
    ]:
        offsets = tile_offsets(side, min(tile, side), overlap)
        assert offsets[0] == 0 and offsets[-1] + min(tile, side) == side
        assert all(0 < b - a <= tile - overlap for a, b in zip(offsets, offsets[1:], strict=False))


def test_ramp_ignores_the_outer_quarter_of_a_tile():
    weight = ramp(32)
    assert (weight[:8] == 0).all() and (weight[24:] == 1).all()
    assert torch.allclose(weight + weight.flip(0), torch.ones(32))


def test_live_bytes_counts_the_peak_and_not_the_sum():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        for _ in range(5):
            x = x + 1
    assert 8000 <= live.peak <= 12000


STREAM = """
import json, resource, sys, torch, numpy as np
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import standin_model
import sharp_inference as inference
args = inference.Settings(checkpoint=["x"], input=["x"], output="x", memory_gb=0.15)
model = standin_model.loaded()
np.lib.format.open_memmap({image!r}, "w+", np.uint8, (2300, 2500, 3))[:] = 7
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
line = inference.reconstruct(model, Path({image!r}), Path({output!r}), "npy", args)
print(json.dumps([before, peak(), line]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory as Linux counts it")
def test_big_image_streams_to_a_mapped_file_in_bounded_memory(tmp_path):
    code = STREAM.format(
        root=str(ROOT), image=str(tmp_path / "big.npy"), output=str(tmp_path / "out" / "big.npy")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, peak, line = json.loads(done.stdout.splitlines()[-1])
    cube = np.load(tmp_path / "out" / "big.npy", mmap_mode="r")
    assert cube.shape == (31, 2300, 2500) and "tiles of" in line
    assert peak - before < 520, f"{peak - before:.0f} MiB for an output of {cube.nbytes >> 20} MiB"
    corner, middle = cube[:, :2, :2], cube[:, 1150:1152, 1250:1252]
    assert np.isfinite(corner).all() and (middle == middle[:, :1, :1]).all()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["big.npy"]


class SmallMemory(torch.nn.Conv2d):
    """A convolution on a device that has no room for more than 200 x 200 pixels."""

    error = torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, x):
        if x.shape[-1] * x.shape[-2] > 200 * 200:
            self.refused = [*getattr(self, "refused", []), tuple(x.shape[-2:])]
            raise self.error
        return super().forward(x)


@torch.no_grad()
def test_a_frame_to_score_that_does_not_fit_is_predicted_in_tiles(capsys):
    network, rgb = SmallMemory(3, 5, 3, padding=1), torch.rand(1, 3, 300, 420)
    found = predict_frame(network, rgb, torch.device("cpu"))
    whole = torch.nn.functional.conv2d(rgb, network.weight, network.bias, padding=1)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    assert network.refused.count((300, 420)) == 1  # the whole frame is not tried again
    assert "out of memory with a tile of 420 px: going on with 208 px" in capsys.readouterr().out
    small = rgb[..., :100, :120]
    assert torch.equal(predict_frame(network, small, torch.device("cpu")), network(small))


@torch.no_grad()
def test_any_other_error_of_a_frame_to_score_is_raised(monkeypatch):
    monkeypatch.setattr(SmallMemory, "error", RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        predict_frame(SmallMemory(3, 5, 3), torch.rand(1, 3, 300, 420), torch.device("cpu"))
