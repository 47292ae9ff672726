"""A checkpoint as files for other programs: safetensors, configuration, a card, and ONNX."""

import contextlib
import logging
import math
import os
import re
import tempfile
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
from frame_prediction import MIN_SIDE, RIVAL, Loaded

EXPORT_SIDE = 256  # px, of the frame that the ONNX file is for
SIDE_STEP = 32  # px, of free heights and widths
FILES = ("model.safetensors", "config.json", "README.md", "model.onnx")
EXPORT_TOLERANCE = 1e-3  # between ONNX Runtime's output and torch's, relative to the largest value

# How another program uses the ONNX file: light, normalisation, and a size that the graph takes.
RECIPE = """
import json
import numpy as np
import onnxruntime
from PIL import Image

facts = json.load(open("config.json"))
rgb = np.asarray(Image.open("photo.jpg").convert("RGB")) / 255
if facts["rgb_encoding"] == "srgb":
    rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
if facts["rgb_norm"] == "per_image":
    rgb = (rgb - rgb.min()) / (rgb.max() - rgb.min())
height, width = rgb.shape[:2]
more = [(0, SIDE - side) for side in (height, width)]
rgb = np.pad(rgb, [*more, (0, 0)], "symmetric").transpose(2, 0, 1)[None]
session = onnxruntime.InferenceSession("model.onnx")
cube = session.run(["cube"], {"rgb": rgb.astype(np.float32)})[0][0, :, :height, :width]
"""


def export(model: Loaded, folder: Path, side: int | None, overwrite: bool = False) -> None:
    """Safetensors, configuration, model card, and an ONNX file, held against torch's output.

    UserError where one of them is there already and is not to be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--export {folder}: a file; give a folder")
    there = [folder / name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"--export {folder}: {there[0]} exists; give --overwrite, or a new folder")
    terminal.say(f"{folder}: exporting; a tiny model takes a minute or two")
    folder.mkdir(parents=True, exist_ok=True)
    common.remove_leftovers(folder)
    with tempfile.TemporaryDirectory(prefix=common.temporary_prefix("export"), dir=folder) as work:
        said, failure = _write(model, Path(work), side or EXPORT_SIDE)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for file in Path(work).iterdir():
            os.replace(file, folder / file.name)
    if failure:
        raise UserError(f"{folder}: {failure}")
    terminal.say(f"{folder}: {said}")


def _write(model: Loaded, folder: Path, side: int) -> tuple[str, str]:
    """The files; -> what to say of them, and what is wrong with the ONNX file, if anything is."""
    module = model.module.cpu()
    save_weights(
        folder / "model.safetensors",
        module.state_dict(),
        model.kind,
        model.config,
        model.data,
        averaged=model.weights == "ema",
    )
    names, difference, failure = export_onnx(model, folder / "model.onnx", side)
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
        "onnx_outputs": names,
        "onnx_difference": difference,
    }
    common.write_json(folder / "config.json", facts)
    common.write_text(folder / "README.md", model_card(model, facts))
    return f"{', '.join(FILES)} ({side} px, within {difference:.1e} of torch)", failure


def free_sizes(kind: str) -> dict[int, Any]:
    """Which sizes of the ONNX file's input are free: the batch, and of HSIFusionNet the sides in
    steps of SIDE_STEP; SHARP's tiles are laid out as the graph is made."""
    free: dict[int, Any] = {0: Dim("batch", min=1, max=256)}
    if kind == "hsifusion":
        for axis, name in ((2, "n"), (3, "m")):
            free[axis] = SIDE_STEP * Dim(name, min=2, max=128)
    return free


def export_onnx(model: Loaded, file: Path, side: int) -> tuple[list[str], float, str]:
    """Write an ONNX file for frames of side x side, and of other sizes where they are free; -> its
    outputs, their largest difference to torch over some sizes, and what is wrong, if anything is.
    """
    onnxruntime, _ = extra("onnxruntime"), extra("onnxscript")
    free = free_sizes(model.kind)
    shapes = [(2, 3, side, side), (1, 3, side, side), (3, 3, side, side)]
    if 2 in free:
        side = -(-side // SIDE_STEP) * SIDE_STEP
        shapes = [(2, 3, side, side)]
        shapes += [(1, 3, side // 2 + SIDE_STEP, side), (3, 3, 2 * SIDE_STEP, 3 * SIDE_STEP)]
    names = ["cube", "scale"] if model.gives_scale else ["cube"]
    try:
        with torch.no_grad(), silent_packages():
            torch.onnx.export(
                model.module,
                (torch.rand(shapes[0]),),
                file,
                input_names=["rgb"],
                output_names=names,
                dynamic_shapes=(free,),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = re.findall(">: (.+)", str(error))[:1]
        return names, math.nan, f"{file.name} is not written, the other files are: {reason}"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    difference = max(_difference(session, model, shape) for shape in shapes)
    if difference <= EXPORT_TOLERANCE:
        return names, difference, ""
    return names, difference, f"{file.name} differs from torch by {difference:.2g}; do not use it"


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
        expected = [output.numpy() for output in tree_leaves(model.module(example))]
    found = session.run(None, {"rgb": example.numpy()})
    pairs = zip(found, expected, strict=True)
    return float(max(np.abs(x - y).max() / max(1.0, np.abs(y).max()) for x, y in pairs))


def model_card(model: Loaded, facts: dict) -> str:
    lines = [f"- {key}: {value}\n" for key, value in facts.items()]
    command = "python sharp_inference.py --checkpoint model.safetensors"
    if model.kind == RIVAL:
        command += " --mst-root MST-plus-plus"
    sides, largest = "max(64, -(-side // 32) * 32)", "any size"
    if 2 not in free_sizes(model.kind):
        sides, largest = f"{facts['onnx_input'][2]}", "at most that size"
    recipe = (
        f"With ONNX Runtime, a photo of {largest}; where pixels are mirrored beyond it, values "
        f"differ a little from the above:\n\n```python{RECIPE.replace('SIDE', sides)}```"
    )
    if math.isnan(facts["onnx_difference"]):
        recipe = "There is no ONNX file: the exporter refused this model."
    return (
        f"# {model.name}: RGB to {model.bands} spectral bands\n\n{''.join(lines)}\n"
        "Three channels do not determine a spectrum: trust this for cameras, light and scenes like "
        "those of its training data.\n\n"
        f"    {command} --input photo.jpg --output photo.npy\n\n"
        f"{recipe}\n"
    )
