"""A checkpoint as files for other programs: safetensors, configuration, a card, and ONNX."""

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import common_utils_v32 as common
import terminal
from checkpoint_files import save_weights
from common_utils_v32 import UserError
from cube_files import extra
from frame_prediction import MIN_SIDE, Loaded

EXPORT_SIDE = 256  # px, of the frame that the ONNX file is for
SIDE_STEP = 32  # px, of free heights and widths
EXPORT_TOLERANCE = 1e-3  # between ONNX Runtime's output and torch's, relative to the largest value


def export(model: Loaded, folder: Path, side: int | None) -> None:
    """Safetensors, configuration, model card, and an ONNX file, held against torch's output."""
    side = side or EXPORT_SIDE
    module = model.module.cpu()
    save_weights(
        folder / "model.safetensors",
        module.state_dict(),
        model.kind,
        model.config,
        model.data,
        averaged=model.weights == "ema",
    )
    difference, failure = export_onnx(model, folder / "model.onnx", side)
    sides = ["32 n", "32 m"] if 2 in free_sizes(model.kind) else [side, side]
    facts = {
        "model": model.kind,
        "weights": f"{model.weights} of {Path(model.path).name}",
        "rgb_norm": model.rgb_norm,
        "rgb_encoding": model.encoding,
        "input": "(B, 3, H, W) float32 RGB in linear light: per_image = (x - min) / (max - min) of "
        "the whole image, unit = 1 for full scale",
        "least_side": MIN_SIDE,
        "wavelengths": model.wavelengths,
        "output": f"(B, {model.bands}, H, W) float32",
        "parameters": sum(p.numel() for p in module.parameters()),
        "model_config": model.config,
        "data": model.data,
        "onnx_input": ["batch", 3, *sides],
        "onnx_difference": difference,
    }
    common.write_json(folder / "config.json", facts)
    common.write_text(folder / "README.md", model_card(model, facts))
    if failure:
        raise UserError(failure)
    terminal.say(
        f"{folder}: model.safetensors, config.json, README.md, model.onnx ({side} px, "
        f"within {difference:.1e} of torch)"
    )


def free_sizes(kind: str) -> dict[int, Any]:
    """Which sizes of the ONNX file's input are free: the batch, and of HSIFusionNet the sides in
    steps of SIDE_STEP; SHARP's tiles are laid out as the graph is made."""
    free: dict[int, Any] = {0: Dim("batch", min=1, max=256)}
    if kind == "hsifusion":
        for axis, name in ((2, "n"), (3, "m")):
            free[axis] = SIDE_STEP * Dim(name, min=2, max=128)
    return free


def export_onnx(model: Loaded, file: Path, side: int) -> tuple[float, str]:
    """Write an ONNX file for frames of side x side, and of other sizes where they are free; -> its
    largest difference to torch over some sizes, and what is wrong with it, if anything is."""
    onnxruntime, _ = extra("onnxruntime"), extra("onnxscript")
    free = free_sizes(model.kind)
    shapes = [(2, 3, side, side), (1, 3, side, side), (3, 3, side, side)]
    if 2 in free:
        side = -(-side // SIDE_STEP) * SIDE_STEP
        shapes = [(2, 3, side, side)]
        shapes += [(1, 3, side // 2 + SIDE_STEP, side), (3, 3, 2 * SIDE_STEP, 3 * SIDE_STEP)]
    try:
        with torch.no_grad(), silent_packages():
            torch.onnx.export(
                model.module,
                (torch.rand(shapes[0]),),
                file,
                input_names=["rgb"],
                dynamic_shapes=(free,),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = re.findall(">: (.+)", str(error))[:1]
        return math.nan, f"{file}: not written, the other files are: {reason}"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    difference = max(_difference(session, model, shape) for shape in shapes)
    if difference <= EXPORT_TOLERANCE:
        return difference, ""
    return difference, f"{file}: differs from torch by {difference:.2g}; do not use it"


@contextlib.contextmanager
def silent_packages() -> Iterator[None]:
    """What packages say of one another, which nobody asked for, stays unsaid."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _difference(session: Any, model: Loaded, shape: tuple[int, ...]) -> float:
    """Between the two, over the largest value (1 at least), for an input of this shape."""
    example = torch.rand(shape)
    with torch.no_grad():
        expected = tree_leaves(model.module(example))[0].numpy()
    found = session.run(None, {"rgb": example.numpy()})[0]
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def model_card(model: Loaded, facts: dict) -> str:
    lines = [f"- {key}: {value}\n" for key, value in facts.items()]
    return (
        f"# {model.name}: RGB to {model.bands} spectral bands\n\n{''.join(lines)}\n"
        "Three channels do not determine a spectrum: trust this for cameras, light and scenes like "
        "those of its training data.\n\n"
        "    python sharp_inference.py --checkpoint model.safetensors --input photo.jpg "
        "--output photo.npy\n"
    )
