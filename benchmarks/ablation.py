"""What each block of the models earns: the variants that `race.py --ablation` races.

    python benchmarks/race.py --mst-root ../MST-plus-plus --data_root data/ARAD_1K \\
        --budget 300 --folds 5 --most-folds 2 --ablation hsifusion sharp --json ablation.json

Most are fields of a model's configuration. What no field turns off is taken out of the model once
it is built: `MODEL,without=PART`. Each variant has the same training time, so one that costs less
takes more steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Entrant, and what stands in its row.
HSIFUSION = {
    "hsifusion": "as it is",
    "hsifusion,without=windows": "no window attention",
    "hsifusion,without=spectral": "no spectral attention",
    "hsifusion,enable_spectral=false": "windows in place of spectral attention",
    "hsifusion,use_sliding_window=false": "whole frame in place of windows",
    "hsifusion,use_rope=false": "no rotary positions",
    "hsifusion,use_moe=true": "experts in place of MLPs",
    "hsifusion,use_cross_attention=true": "cross-attention to pooled skips as well",
    "hsifusion,without=gain": "no gain, the added term alone",
    "hsifusion,without=term": "no added term, the gain alone",
    "hsifusion,without=basis": "bands of their own, no smooth basis",
    "hsifusion,without=start": "direct path learnt, no closed-form start",
    "hsifusion,without=direct": "no direct path",
    "hsifusion,without=consistency": "no camera consistency",
}
SHARP = {
    "sharp": "as it is: exact top-k, RBF keys mixed, gated fusion",
    "sharp,sparse_mode=block": "blocks of keys in place of top-k",
    "sharp,sparse_mode=local": "local windows in place of top-k",
    "sharp,sparse_sparsity_ratio=0": "dense in place of top-k",
    "sharp,key_rbf_mode=mean": "RBF keys averaged",
    "sharp,key_rbf_mode=none": "keys without RBF features",
    "sharp,without=fusion": "skips added, no gated fusion",
    "sharp,without=spectral": "no spectral attention",
    "sharp,without=consistency": "no camera consistency",
}
ABLATIONS = {"hsifusion": HSIFUSION, "sharp": SHARP}
HEAD_PARTS = ("gain", "term", "basis", "start", "direct", "consistency")


class Nothing(nn.Module):
    """In place of a branch of attention: zeros of its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def frame_map(self, x: Tensor) -> None:
        return None

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


class AddedSkip(nn.Module):
    """In place of a gated fusion: the skip's linear map alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.skip = linear

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + self.skip(skip)


class NoCorrection(nn.Module):
    """In place of the consistency with the camera."""

    def fit(self, rgb: Tensor, cube: Tensor) -> None:
        pass

    def forward(self, cube: Tensor, image: Tensor) -> Tensor:
        return torch.zeros((), device=cube.device)


def take_out(model: nn.Module, part: str) -> None:
    """Take one part out of a model that was just built, in place. ValueError for a part that is
    not one, or that this model does not have."""
    if part == "windows" and hasattr(model, "stem_mix"):
        for block in blocks_of(model, "spatial"):
            block.spatial = Nothing(block.spatial.qkv.out_features // 3)
    elif part == "spectral":
        for block in blocks_of(model, "spectral"):
            block.spectral = Nothing(block.spectral.qkv.out_features // 3)
    elif part == "fusion" and not hasattr(model, "stem_mix"):
        for index, fusion in enumerate(model.fuse):
            model.fuse[index] = AddedSkip(fusion.skip)
    elif part in HEAD_PARTS:
        take_out_of_head(model.head, part)
    else:
        raise ValueError(f"without={part}: not a part of this model")


def blocks_of(model: nn.Module, branch: str) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, branch)]


def take_out_of_head(head: nn.Module, part: str) -> None:
    if part == "consistency":
        head.consistency = NoCorrection()
    elif part == "basis":
        bands, pixels = head.direct.out_features, head.coefficients.in_features
        head.basis = nn.Parameter(torch.eye(bands), requires_grad=False)
        head.coefficients = nn.Linear(pixels, 2 * bands)
        nn.init.normal_(head.coefficients.weight, std=2e-3)
        nn.init.zeros_(head.coefficients.bias)
        head.basis_loss = lambda: torch.zeros(())
    elif part in ("start", "direct"):
        head.fit = head.consistency.fit
        if part == "direct":
            for parameter in head.direct.parameters():
                nn.init.zeros_(parameter).requires_grad_(False)
    else:
        hold_at_zero(head.coefficients, first_half=part == "gain")


def hold_at_zero(coefficients: nn.Linear, first_half: bool) -> None:
    """The first half of the rows makes the gain, the second the term."""
    rank = coefficients.out_features // 2
    rows = slice(0, rank) if first_half else slice(rank, None)
    for parameter in coefficients.parameters():
        kept = torch.ones_like(parameter)
        kept[rows] = 0
        with torch.no_grad():
            parameter.mul_(kept)
        parameter.register_hook(lambda gradient, kept=kept: gradient * kept.to(gradient.device))
