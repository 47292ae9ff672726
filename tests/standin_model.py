"""A small convolutional model in the place of the real ones, for tests of what is around it."""

import dataclasses

import torch
from torch import nn

from frame_prediction import Loaded


@dataclasses.dataclass
class Config:
    model_size: str = "tiny"
    in_channels: int = 3
    out_channels: int = 31
    width: int = 8
    estimate_uncertainty: bool = False


class Standin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = nn.Conv2d(config.in_channels, config.width, 3, padding=1)
        self.second = nn.Conv2d(config.width, config.out_channels, 3, padding=1)
        self.largest = 10**9  # pixels; more is "out of memory"

    def forward(self, x):
        assert min(x.shape[2:]) >= 64
        if x.shape[2] * x.shape[3] > self.largest:
            raise torch.OutOfMemoryError("too big")
        cube = self.second(torch.relu(self.first(x)))
        return (cube, torch.full_like(cube, 0.1)) if self.config.estimate_uncertainty else cube


def create(model_size="base", in_channels=3, out_channels=31, **overrides):
    torch.manual_seed(0)
    return Standin(Config(model_size, in_channels, out_channels, **overrides))


def loaded(rgb_norm="per_image", bands=31, **overrides):
    wavelengths = [400 + 300 * i / max(bands - 1, 1) for i in range(bands)]
    module = create("tiny", out_channels=bands, **overrides).eval()
    return Loaded(
        "standin",
        "standin.ckpt",
        "hsifusion",
        module,
        torch.device("cpu"),
        "raw",
        {},
        {},
        rgb_norm,
        wavelengths,
        bands,
        pixel_bytes=400.0,
    )
