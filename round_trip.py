"""How well a predicted cube explains the photo that it came from: rendered back, and compared."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from camera_colour import camera_response, encode_srgb
from common_utils_v32 import UserError
from frame_prediction import Loaded

MOST_PIXELS = 200_000  # that colour differences are computed of
AMPLIFIED = 8  # times, the difference in the picture


def camera_of(model: Loaded) -> tuple[str, np.ndarray]:
    """Name and weights (bands, 3) of the recorded camera, or of the fitted one; or a UserError."""
    name = model.data.get("camera")
    if name:
        with contextlib.suppress(UserError):  # a CSV file that is not here
            return f"camera {name}", camera_response(name, model.wavelengths)
    head: Any = getattr(model.module, "head", None)
    if head is None or not head.consistency.seen.any():
        raise UserError(f"{model.path}: --check_rgb: it knows no camera, recorded or fitted")
    consistency = head.consistency
    response = torch.linalg.solve(consistency.whiten.double(), consistency.seen.double())
    return "the response fitted in training", response.T.float().cpu().numpy()


@contextlib.contextmanager
def without_consistency(model: Loaded) -> Iterator[None]:
    """The model without its correction towards the photo."""
    noise: Any = getattr(model.module, "head").consistency.noise  # noqa: B009
    before = noise.clone()
    noise.fill_(torch.inf)  # infinitely noisy photos correct nothing
    try:
        yield
    finally:
        noise.copy_(before)


def rendered(cube: np.ndarray, response: np.ndarray, photo: np.ndarray, srgb: bool) -> np.ndarray:
    """The linear light (H, W, 3) in [0, 1] that the camera sees of a cube (bands, H, W). Of linear
    photos the exposure is not known: one gain is fitted."""
    light = np.einsum("bhw,bc->hwc", cube, response.astype(np.float32))
    if not srgb:
        inside = photo < 0.98
        power = float(np.square(light[inside]).sum())
        light *= float((light[inside] * photo[inside]).sum()) / max(power, 1e-9)
    return np.clip(light, 0, 1)


def difference(found: np.ndarray, photo: np.ndarray, srgb: bool) -> str:
    """Mean and 95th percentile in per cent of full scale; for sRGB the mean CIEDE2000 too."""
    shown = [encode_srgb(picture) if srgb else picture for picture in (found, photo)]
    error = 100 * np.abs(shown[0] - shown[1])
    text = f"mean {error.mean():.2f} %, 95th percentile {np.quantile(error, 0.95):.2f} %"
    if not srgb:
        return text
    import colour

    step, lab = max(1, photo[..., 0].size // MOST_PIXELS), []
    for picture in (found, photo):
        xyz = colour.RGB_to_XYZ(picture.reshape(-1, 3)[::step], "sRGB")
        lab.append(colour.XYZ_to_Lab(xyz))
    apart = colour.delta_E(lab[0], lab[1], method="CIE 2000")
    return f"{text}, delta E 2000 {np.mean(apart):.2f}"


def check_rgb(
    model: Loaded,
    photo: np.ndarray,
    cube: np.ndarray,
    again: Callable[[], np.ndarray],
    picture: Path | None,
) -> str:
    """Compare a photo (H, W, 3), as linear light in [0, 1], with its cube (bands, H, W) rendered
    back; -> a remark.

    again() predicts the cube anew, for the comparison without camera consistency. picture: a file
    to show photo, rendered photo and their difference in."""
    camera, response = camera_of(model)
    srgb = model.encoding == "srgb"
    found = rendered(cube, response, photo, srgb)
    remark = f"rendered back through {camera}: {difference(found, photo, srgb)}"
    if hasattr(model.module, "head"):
        with without_consistency(model):
            plain = rendered(again(), response, photo, srgb)
        remark += f" (without camera consistency {difference(plain, photo, srgb)})"
    if picture is not None:
        shown, seen = encode_srgb(photo), encode_srgb(found)
        apart = np.clip(AMPLIFIED * np.abs(shown - seen), 0, 1)
        sheet = np.concatenate([shown, seen, apart], axis=1)
        Image.fromarray(np.rint(255 * sheet).astype(np.uint8)).save(picture)
    return remark
