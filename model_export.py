"""A checkpoint as files for other programs: safetensors, configuration, a card, and ONNX."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

import common_utils_v32 as common
from checkpoint_files import save_weights
from common_utils_v32 import UserError
from cube_files import extra
from frame_prediction import MIN_SIDE, Loaded

EXPORT_SIDE = 256  # px, of the frame that the ONNX file is for
EXPORT_TOLERANCE = 1e-3  # between ONNX Runtime's output and torch's, relative to the largest value


def export(model: Loaded, folder: Path, side: int | None) -> None:
    """Safetensors, configuration, model card, and an ONNX file of one input size, held against
    torch's output."""
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
    facts = {
        "model": model.kind,
        "weights": f"{model.weights} of {Path(model.path).name}",
        "rgb_norm": model.rgb_norm,
        "input": "(B, 3, H, W) float32 RGB: per_image = (x - min) / (max - min) of the whole "
        "image, unit = x / 255",
        "least_side": MIN_SIDE,
        "wavelengths": model.wavelengths,
        "output": f"(B, {model.bands}, H, W) float32",
        "parameters": sum(p.numel() for p in module.parameters()),
        "model_config": model.config,
        "data": model.data,
        "onnx_input": [1, 3, side, side],
        "onnx_difference": difference,
    }
    common.write_json(folder / "config.json", facts)
    common.write_text(folder / "README.md", model_card(model, facts))
    if failure:
        raise UserError(failure)
    print(
        f"{folder}: model.safetensors, config.json, README.md, model.onnx ({side} px, "
        f"within {difference:.1e} of torch)"
    )


def export_onnx(model: Loaded, file: Path, side: int) -> tuple[float, str]:
    """Write an ONNX file for frames of side x side; -> its largest difference to torch, and what is
    wrong with it, if anything is."""
    onnxruntime, _ = extra("onnxruntime"), extra("onnxscript")
    example = torch.rand(1, 3, side, side)
    try:
        with torch.no_grad():
            expected = tree_leaves(model.module(example))[0].numpy()
            torch.onnx.export(
                model.module,
                (example,),
                file,
                input_names=["rgb"],
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = re.findall(">: (.+)", str(error))[:1]
        return math.nan, f"{file}: not written, the other files are: {reason}"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {"rgb": example.numpy()})[0]
    difference = float(np.abs(found - expected).max())
    if difference <= EXPORT_TOLERANCE * max(1.0, np.abs(expected).max()):
        return difference, ""
    return difference, f"{file}: differs from torch by {difference:.2g}; do not use it"


def model_card(model: Loaded, facts: dict) -> str:
    lines = [f"- {key}: {value}\n" for key, value in facts.items()]
    return (
        f"# {model.name}: RGB to {model.bands} spectral bands\n\n{''.join(lines)}\n"
        "Three channels do not determine a spectrum: trust this for cameras, light and scenes like "
        "those of its training data.\n\n"
        "    python sharp_inference.py --checkpoint model.safetensors --input photo.jpg "
        "--output photo.npy\n"
    )
