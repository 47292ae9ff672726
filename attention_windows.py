"""Overlapping windows of an image's tokens, cut and added up again, and rotary positions in them.

Images are (B, H, W, C). Shapes: B batch, H W tokens, C channels, D head width."""

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Build = Callable[[int, int, int, torch.device], Tensor]  # of side, window, stride and device


def rotary_table(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Cosines and signed sines (2, height * width, dim) that turn a head of width `dim`. Pairs are
    (i, i + dim / 2), the first half of them turned by row, the second by column: rotary position
    embedding in 2-D (Su et al. 2021). Wavelengths run from 2 pi to about 100 tokens."""
    frequency = 16.0 ** -(torch.arange(dim // 4, device=device) / max(1, dim // 4))
    rows = torch.arange(height, device=device)[:, None] * frequency
    columns = torch.arange(width, device=device)[:, None] * frequency
    by_row = rows[:, None].expand(height, width, -1)
    by_column = columns[None].expand(height, width, -1)
    angle = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    cosines = angle.cos().repeat(1, 2)
    signed_sines = torch.cat([-angle.sin(), angle.sin()], dim=-1)
    return torch.stack([cosines, signed_sines])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn pairs (x[i], x[i + D/2]) of (..., N, D) by the table's angles; norms are kept. Whole
    rows are multiplied: to cut them into halves first takes five times as long."""
    cosines, signed_sines = table.to(x.dtype)
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), signed_sines)


def window_count(side: int, window: int, stride: int) -> int:
    """Windows that cover `side` tokens, the last one reaching past the end where it must."""
    return 1 + max(0, math.ceil((side - window) / stride))


def extract_windows(x: Tensor, window: int, stride: int, groups: int = 1) -> Tensor:
    """Overlapping windows of (B, H, W, groups * D), zeros past the right and bottom.

    -> (groups, B, rows, columns, window, window, D). Needs window <= 2 stride: a window is its own
    `stride` tokens and the first of the next one's."""
    rows = window_count(x.shape[1], window, stride)
    columns = window_count(x.shape[2], window, stride)
    bottom = (rows + 1) * stride - x.shape[1]
    right = (columns + 1) * stride - x.shape[2]
    x = F.pad(x, (0, 0, 0, right, 0, bottom))
    shared = window - stride
    x = x.unflatten(1, (-1, stride))
    x = torch.cat([x[:, :-1], x[:, 1:, :shared]], dim=2)  # B, rows, window, W, C
    x = x.unflatten(3, (-1, stride)).unflatten(5, (groups, -1)).permute(5, 0, 1, 3, 2, 4, 6)
    return torch.cat([x[:, :, :, :-1], x[:, :, :, 1:, :, :shared]], dim=5)


def _merge_axis(x: Tensor, stride: int) -> Tensor:
    """Add up windows (A, n, window, ...) that start every `stride` along one axis.

    -> (A, (n - 1) stride + window, ...)"""
    count, window = x.shape[1:3]
    if window == stride:
        return x.flatten(1, 2)
    other_axes = (0, 0) * (x.ndim - 3)
    heads = F.pad(x[:, :, :stride], (*other_axes, 0, 0, 0, 1))
    tails = F.pad(x[:, :, stride:], (*other_axes, 0, 2 * stride - window, 1, 0))
    return (heads + tails).flatten(1, 2)[:, : (count - 1) * stride + window]


def add_windows(x: Tensor, stride: int) -> Tensor:
    """(groups, B, rows, columns, window, window, D) -> (B, H, W, groups * D): sums of windows."""
    groups, batch, rows, columns, window = x.shape[:5]
    x = x.permute(1, 2, 4, 3, 5, 0, 6).reshape(batch, rows, window, -1)
    x = _merge_axis(x, stride)  # B, rows of tokens, (columns, window, groups, D)
    x = _merge_axis(x.reshape(batch * x.shape[1], columns, window, -1), stride)
    return x.unflatten(0, (batch, -1))


def windows_over(side: int, window: int, stride: int, device: torch.device) -> Tensor:
    """How many windows cover each token along an axis, (side,) float32."""
    ones = torch.ones(1, window_count(side, window, stride), window, device=device)
    return _merge_axis(ones, stride)[0, :side]


def keys_inside(side: int, window: int, stride: int, device: torch.device) -> Tensor:
    """Along an axis: which tokens of each window lie on the frame, (windows, window) bool."""
    first = stride * torch.arange(window_count(side, window, stride), device=device)
    return first[:, None] + torch.arange(window, device=device) < side


@functools.lru_cache(maxsize=256)
def _kept(build: Build, side: int, window: int, stride: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later step may need it for gradients
        return build(side, window, stride, device)


def along_axis(build: Build, side: int, window: int, stride: int, device: torch.device) -> Tensor:
    """`build(side, window, stride, device)`, kept from block to block where no graph is traced."""
    make = build if torch.compiler.is_compiling() else partial(_kept, build)
    return make(side, window, stride, device)


def coverage(height: int, width: int, window: int, stride: int, like: Tensor) -> Tensor:
    """How many windows cover each token, (height, width, 1), of the type and device of `like`."""
    rows = along_axis(windows_over, height, window, stride, like.device)
    columns = along_axis(windows_over, width, window, stride, like.device)
    return (rows[:, None] * columns)[..., None].to(like.dtype)
