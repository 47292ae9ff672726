"""Checkpoints: written whole or not at all, read without running code, refused where damaged.

save_checkpoint("last.ckpt", state)
state = read_checkpoint("last.ckpt")                  # or a .safetensors file, or bare weights"""

import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from common_utils_v32 import UserError, atomic_write, to_json

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # what DDP and torch.compile put before names
LARGEST = 2**16  # number in a model's configuration
DIGEST = "sha256"  # of weights and metadata, in the metadata of a .safetensors file


def save_checkpoint(path: str | Path, state: dict, previous: Path | None = None) -> None:
    """Save tensors and plain types atomically; what was there becomes `previous`, if given."""
    memory = io.BytesIO()  # written to a full disk, torch.save would not say that it is full
    torch.save(state, memory)

    def write(file: BinaryIO) -> None:
        file.write(memory.getbuffer())
        file.flush()
        os.fsync(file.fileno())
        if previous is not None and Path(path).exists():
            _keep(Path(path), previous)

    atomic_write(path, write)


def _keep(path: Path, previous: Path) -> None:
    """`path` becomes `previous` and stays itself: at no moment is there neither."""
    link = previous.with_name(f".{previous.name}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def save_weights(
    path: str | Path, state_dict: dict, model: str, model_config: dict, data: dict, averaged: bool
) -> None:
    """Save weights as .safetensors, with what rebuilds the model in the file's metadata."""
    metadata = {
        "format": "hsi-checkpoint",
        "model": model,
        "model_config": to_json(model_config),
        "data": to_json(data),
        "averaged": to_json(averaged),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    payload = safetensors_bytes(weights, metadata | {DIGEST: _digest(weights, metadata)})
    atomic_write(path, lambda file: file.write(payload))


def _digest(weights: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of weights, and of the metadata."""
    sha = hashlib.sha256(to_json(metadata, sort_keys=True).encode())
    for name in sorted(weights):
        value = weights[name]
        sha.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read_checkpoint(path: str | Path) -> dict:
    """Read a trainer's checkpoint, a .safetensors file or a bare state dict; pickled code never
    runs.

    Returns a dict with at least `model`, `model_config`, `state_dict`, `ema` and `data`, None or {}
    where unknown. UserError when the file is missing, damaged, or a pickle that holds more than
    tensors and plain types."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint file; a run writes last.ckpt when it stops and best.ckpt "
            "at its first validation"
        )
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    if "state_dict" not in state:  # bare weights
        state = {"state_dict": state}
    state = {"model": None, "model_config": {}, "ema": None, "data": {}} | state
    if not _are_weights(state["state_dict"]):
        raise UserError(f"{path}: holds no model weights")
    if state["ema"] is not None and not _are_weights(state["ema"]):
        raise UserError(f"{path}: damaged, its averaged weights are none")
    for key, kind in (("model", str), ("model_config", dict), ("data", dict)):
        if state[key] is not None and not isinstance(state[key], kind):
            raise UserError(f"{path}: damaged, its {key} is a {type(state[key]).__name__}")
    return state


def _are_weights(found: Any) -> bool:
    if not isinstance(found, dict) or not found:
        return False
    named = all(isinstance(name, str) for name in found)
    return named and all(isinstance(value, Tensor) for value in found.values())


def _read_torch(path: Path) -> Any:
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file; all mean the same
        refused = "weights_only" in str(error).lower()
        reason = "it holds more than tensors and plain types" if refused else "damaged"
        raise UserError(
            f"{path}: refused as a checkpoint ({reason}); use a file written by the trainers"
        ) from None


def _check_archive(path: Path) -> None:
    """An error unless a file of torch.save is as it was written: torch.load looks at no checksum.
    It is an archive without compression, so that no part of it can grow when read. Files of torch
    before 1.6 are no archives and have no checksums."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
        if packed or sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("larger than its file")
        if archive.testzip():
            raise ValueError("another checksum")


def _read_safetensors(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
        digest = metadata.pop(DIGEST, None)
        if digest not in (None, _digest(weights, metadata)):
            raise ValueError("damaged: another checksum")
        parts = {name: json.loads(metadata.get(name, "{}")) for name in ("model_config", "data")}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    averaged = weights if metadata.get("averaged") == "true" else None
    return {"model": metadata.get("model"), "state_dict": weights, "ema": averaged} | parts


Model = TypeVar("Model", bound=nn.Module)


def build_from_checkpoint(
    path: str | Path, kind: str, create: Callable[..., Model], ema: bool = True
) -> Model:
    """A model from any checkpoint of the trainers; averaged weights if any and `ema` is on."""
    state = read_checkpoint(path)
    if state["model"] not in (kind, None) or not state["model_config"]:
        found = state["model"] or "bare weights"
        raise UserError(f"{path}: holds {found}, not a {kind} checkpoint with its configuration")
    weights = state["ema"] if ema and state["ema"] else state["state_dict"]
    model = build_model(create, state["model_config"], weights, path)
    load_weights(model, weights, path)
    return model


def without_wrappers(weights: dict) -> dict:
    """A state dict's names without what DDP and torch.compile put before them."""
    return {WRAPPERS.sub("", name): value for name, value in weights.items()}


def build_model(make: Callable[..., Model], config: dict, weights: dict, path: str | Path) -> Model:
    """The model of a configuration, which may be a stranger's. UserError unless the weights are
    such a model's: it is made without memory first, as a configuration may ask for any amount."""
    try:
        for value in config.values():
            numbers = value if isinstance(value, (list, tuple)) else (value,)
            if any(isinstance(number, int) and number > LARGEST for number in numbers):
                raise ValueError(f"{value} is too large")
        if sum(config.get("depths") or ()) > len(weights):
            raise ValueError("it has more blocks than weights")
        with torch.device("meta"):
            trial = make(**config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied
            load_weights(trial, weights, path)
        return make(**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its configuration does not fit the model: {reason}") from None


@contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """What torch raises for states that are not a run's becomes one UserError."""
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(
            f"{path}: no run to go on from, damaged or of another version ({reason})"
        ) from None


def load_weights(model: nn.Module, weights: dict, path: str | Path) -> None:
    """load_state_dict, names without DDP's and torch.compile's prefixes; one-line UserErrors."""
    try:
        model.load_state_dict(without_wrappers(weights))
    except RuntimeError as error:
        first = " ".join(str(error).splitlines()[1:2]).strip()[:200]
        raise UserError(
            f"{path}: weights do not fit this model, another version or size of it wrote them; "
            f"train anew ({first})"
        ) from None
