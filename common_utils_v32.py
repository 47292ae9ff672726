"""What two or more of the scripts share, in sections: command line from dataclasses, process group and seeds,
checkpoints, metrics, small layers, colour and camera. Imports nothing of the project; see README.md for the scripts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import errno
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

# --- command line

class UserError(Exception):
    """Bad input. The message is one line that names the file, flag or value and says what to do."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main: a UserError or an OS error becomes one line on stderr and exit code 2, never a traceback."""
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def opt(default: Any, help: str, *, group: str = "settings", choices: tuple | None = None) -> Any:
    """A dataclass field that also describes its command-line flag."""
    start = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**start, metadata={"help": help, "group": group, "choices": choices})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and a script's description keeps its lines."""


class CliParser(argparse.ArgumentParser):
    """argparse with dashes and underscores both accepted in flags, defaults in --help and one-line errors."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **{"formatter_class": HelpFormatter} | kwargs)

    def parse_known_args(self, args=None, namespace=None):
        known = {flag.replace("-", "_"): flag for flag in self._option_string_actions}
        args = sys.argv[1:] if args is None else list(args)
        for i, arg in enumerate(args[:args.index("--")] if "--" in args else args):
            if arg.startswith("--"):
                name, equals, value = arg.partition("=")
                args[i] = known.get(name.replace("-", "_"), name) + equals + value
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parse_dataclass(cls: type, argv: list[str] | None = None, description: str = "") -> Any:
    """Command line -> a dataclass instance: one flag per `opt` field, in titled groups; booleans become --x/--no-x.

    --config gives defaults; a key that is no flag is an error. ValueErrors of __post_init__ become UserErrors."""
    parser = CliParser(description=description)
    parser.add_argument("--config", metavar="FILE.json", help="settings to start from; the command line wins")
    fields = {field.name: field for field in dataclasses.fields(cls) if "help" in field.metadata}
    hints, groups = get_type_hints(cls), {}
    for name, field in fields.items():
        title, choices, hint = field.metadata["group"], field.metadata["choices"], hints[name]
        if type(None) in get_args(hint):
            hint = get_args(hint)[0]
        if hint is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(hint) in (list, tuple):
            kind = {"type": get_args(hint)[0], "nargs": "+", "choices": choices}
        else:
            kind = {"type": hint, "choices": choices}
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        groups[title].add_argument(f"--{name}", default=default, help=field.metadata["help"].replace("%", "%%"), **kind)
    argv = sys.argv[1:] if argv is None else argv
    path = parser.parse_known_args(argv)[0].config
    values = vars(parser.parse_args([*(_config_flags(path, set(fields)) if path else []), *argv]))
    values.pop("config")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def _config_flags(path: str, known: set[str]) -> list[str]:
    """The settings of a JSON file as flags, so that one parser checks both. A null leaves the default."""
    settings, flags = read_json(path), []
    unknown = set(settings) - known if isinstance(settings, dict) else {"a list"}
    if unknown:
        raise UserError(f"--config {path}: unknown settings: {', '.join(sorted(unknown))}; --help lists the known ones")
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def optional_fields(cls: type, skip: tuple[str, ...] = ()) -> list[tuple]:
    """The fields of a dataclass for make_dataclass, all with default None: "not given, the preset decides"."""
    hints = get_type_hints(cls)
    return [(f.name, hints[f.name] | None, dataclasses.field(default=None, metadata=f.metadata))
            for f in dataclasses.fields(cls) if f.name not in skip]


# --- process group and seeds

@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of a run (torchrun's environment, or one process alone)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool, device: torch.device) -> tuple[bool, ...]:
        """For each flag: is it set on any rank?"""
        if self.world_size == 1:
            return flags
        return tuple((self.sum(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist())

    def gather(self, item: Any) -> list:
        """Every rank's picklable item, in rank order, on every rank."""
        items = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def agree(self, value: Any, what: str) -> None:
        """UserError unless all ranks hold the same value, which would leave some waiting for the others for ever."""
        values = list(map(str, self.gather(value)))
        if len(set(values)) > 1:
            raise UserError(f"{what} differs between ranks: {', '.join(values)}; use a folder that all of them see")

    def leave(self) -> None:
        if self.world_size > 1:
            dist.barrier()  # rank 0 may still be saving, and a launcher may end the job with its first rank
            dist.destroy_process_group()


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> device; plain `cuda` under torchrun is the local rank's card."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: no CUDA device is usable here; use --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    return device


def init_process_group(device: str) -> tuple[Ranks, torch.device]:
    """Join the group that torchrun announces in the environment (gloo on CPU, nccl on CUDA), if any."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    resolved = resolve_device(device, local)
    if world > 1:
        patience = datetime.timedelta(hours=2)  # one rank may have longer scenes to score than another
        dist.init_process_group("nccl" if resolved.type == "cuda" else "gloo", timeout=patience)
    return Ranks(int(os.environ.get("RANK", "0")), world, local), resolved


def set_default_environment() -> None:
    """CUDA's allocator settings, unless the user has some; called by main(), before the first CUDA tensor."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:256")


def find_compiler() -> str | None:
    """The compiler that torch.compile would use."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "cc"))), None)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, CUDA included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# --- files and checkpoints

# The first bytes of a MATLAB v7.3 file, before its HDF5: text, no subsystem data, version 2, little-endian.
MAT_HEADER = b"MATLAB 7.3 MAT-file, Platform: Python, HDF5 schema 1.00 .".ljust(116) + bytes(8) + b"\x00\x02IM"


def atomic_write(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all: temporary file in the same folder, fsync, rename. A failure keeps the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)
            write(file)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"{path}: the disk is full; make room and run the same command again") from None
        raise


def to_json(value: Any, **kwargs: Any) -> str:
    """JSON of plain values, paths, and numpy or torch scalars and arrays; NaN and infinities become null."""
    text = json.dumps(value, default=lambda x: str(x) if isinstance(x, Path) else x.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda name: None), **kwargs)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically."""
    atomic_write(path, lambda file: file.write((to_json(value, indent=2) + "\n").encode()))


def read_json(path: str | Path) -> Any:
    """Read a JSON file; UserError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Save tensors and plain types atomically; read_checkpoint reads them back without unpickling code."""
    atomic_write(path, lambda file: torch.save(state, file))


def save_weights(path: str | Path, state_dict: dict, model: str, model_config: dict, data: dict, averaged: bool) -> None:
    """Save weights as .safetensors, with what is needed to rebuild the model in its metadata."""
    metadata = {"format": "hsi-checkpoint", "model": model, "model_config": to_json(model_config), "data": to_json(data),
                "averaged": to_json(averaged)}
    payload = safetensors_bytes({k: v.detach().cpu().contiguous() for k, v in state_dict.items()}, metadata)
    atomic_write(path, lambda file: file.write(payload))


def read_checkpoint(path: str | Path) -> dict:
    """Read a trainer's checkpoint, a .safetensors file or a bare state dict, never running pickled code.

    Returns a dict with at least `model`, `model_config`, `state_dict`, `ema` and `data` (None or {} where unknown).
    Raises UserError when the file is missing, unreadable, or a pickle that holds more than tensors and plain types."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                meta, weights = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            facts = {key: json.loads(meta.get(key, "{}")) for key in ("model_config", "data")}
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        ema = weights if meta.get("averaged") == "true" else None
        return {"model": meta.get("model"), "ema": ema, "state_dict": weights, **facts}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file; each means the same to the user
        reason = "it holds more than tensors and plain types" if "weights_only" in str(error).lower() else "damaged"
        raise UserError(f"{path}: refused as a checkpoint ({reason}); use a file written by the trainers") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    bare = "state_dict" not in state
    state = {"model": None, "model_config": {}, "ema": None, "data": {}} | ({"state_dict": state} if bare else state)
    weights = state["state_dict"]
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{path}: holds no model weights")
    if not all(isinstance(state[key] or {}, dict) for key in ("model_config", "ema", "data")):
        raise UserError(f"{path}: damaged, its configuration is not a table of settings")
    return state


def build_from_checkpoint(path: str | Path, kind: str, create: Callable[..., nn.Module], ema: bool = True) -> nn.Module:
    """Rebuild a model from any checkpoint of the trainers; the averaged weights where there are any and `ema` is on."""
    state = read_checkpoint(path)
    if state["model"] not in (kind, None) or not state["model_config"]:
        raise UserError(f"{path}: holds {state['model'] or 'bare weights'}, not a {kind} checkpoint with its configuration")
    model = create(**state["model_config"])
    load_weights(model, (ema and state["ema"]) or state["state_dict"], path)
    return model


def load_weights(model: nn.Module, weights: dict, path: str | Path) -> None:
    """load_state_dict with a one-line UserError on a mismatch; a `module.` prefix of DDP is dropped."""
    try:
        model.load_state_dict({k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in weights.items()})
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise UserError(f"{path}: weights do not fit this model: {' '.join(first).strip()[:200]}") from None


# --- a run's folder, log and signals

STOPPED = 75  # exit code of a run that a signal stopped after it saved: "try again" (EX_TEMPFAIL of sysexits.h)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run writes: `<output_dir>/<name>`; logs to `$HSI_LOG_DIR/<name>`, checkpoints to `$HSI_CKPT_DIR/<name>` if set."""

    logs: Path
    checkpoints: Path

    @classmethod
    def of(cls, output_dir: str, name: str) -> RunFolder:
        return cls(*(Path(os.environ.get(variable) or output_dir, name) for variable in ("HSI_LOG_DIR", "HSI_CKPT_DIR")))

    def resume_path(self, resume_from: str | None) -> Path | None:
        """The checkpoint to go on from: a path as given, `auto` for last.ckpt where there is one, None for a new run.
        Raises UserError when a new run would write over an old one."""
        last = self.checkpoints / "last.ckpt"
        for file in self.checkpoints.glob(".*.ckpt.*") if resume_from else ():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > 3600:  # left by a kill, long ago
                    file.unlink()
        if resume_from == "auto":
            return last if last.exists() else None
        if resume_from:
            return Path(resume_from)
        for sign in (last, self.logs / "config.json"):
            if sign.exists():
                raise UserError(f"{sign.parent} holds a run: give --resume_from auto to go on, or another --experiment_name")
        return None


class RunLog:
    """Writes metrics.jsonl and TensorBoard files (mirrored to Weights & Biases where asked); silent on ranks but 0."""

    def __init__(self, folder: Path, ranks: Ranks, step: int, wandb_project: str | None, settings: dict) -> None:
        self.active, self.wandb = ranks.is_main, None
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():  # what a killed run logged after its last checkpoint is made again
            lines = path.read_text().splitlines(True)  # the last may have been cut
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
            atomic_write(path, lambda file: file.write("".join(kept).encode()))
        self.lines, self.board = open(path, "a"), SummaryWriter(str(folder), purge_step=step + 1)  # noqa: SIM115
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb needs the wandb package: pip install wandb, or leave --wandb away") from None
            name = folder.name
            self.wandb = wandb.init(project=wandb_project, name=name, id=name, resume="allow", config=settings, dir=str(folder))

    def write(self, kind: str, step: int, values: dict) -> None:
        if not self.active:
            return
        self.lines.write(to_json({"kind": kind, "step": step} | values) + "\n")
        self.lines.flush()
        scalars = {f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, (int, float))}
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(scalars, step=step)

    def figure(self, name: str, step: int, figure: Any) -> None:
        if self.wandb:
            self.wandb.log({name: figure}, step=step)
        if self.active:
            self.board.add_figure(name, figure, step)

    def close(self) -> None:
        if self.active:
            self.lines.close()
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def leave_process_group(worker: int) -> None:
    """For a loader's workers: a launcher's signal to the trainer's process group must not end them before the trainer's step
    ends. They keep the default handlers, by which the loader itself ends them."""
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask the loop to stop at its next safe point; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def rng_state() -> dict:
    """State of the generators of torch (and CUDA) of this process; restore with set_rng_state."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def environment_record() -> dict:
    """Versions, machine and git commit that a number was made with."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "device": device,
            "threads": torch.get_num_threads(), "git_commit": commit or None}


def memory_gb(device: torch.device) -> float:
    """Peak CUDA memory of this process, or its resident memory on a CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


# --- metrics
# Of (C, H, W) or (1, C, H, W) tensors in any memory layout, in float64, as defined by the NTIRE 2022 spectral reconstruction
# challenge (run by the MST++ toolbox), with a floor on MRAE's denominator.


def _pair(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    pred, target = pred.detach().double(), target.detach().double()
    if pred.shape != target.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape")
    return (pred[0], target[0]) if pred.ndim == 4 else (pred, target)


def mrae(pred: Tensor, target: Tensor, floor: float = 1e-6) -> float:
    """Mean relative absolute error: mean(|pred - target| / max(target, floor))."""
    pred, target = _pair(pred, target)
    return ((pred - target).abs() / target.clamp_min(floor)).mean().item()


def rmse(pred: Tensor, target: Tensor) -> float:
    """Root mean squared error over all pixels and bands."""
    pred, target = _pair(pred, target)
    return (pred - target).square().mean().sqrt().item()


def psnr(pred: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, both clamped to [0, 1], peak 1."""
    error = rmse(pred.clamp(0, 1), target.clamp(0, 1))
    return -20 * math.log10(error) if error else math.inf


def sam(pred: Tensor, target: Tensor, dark: float = 0.01) -> float:
    """Mean spectral angle in degrees over the pixels whose mean target is above `dark` (a black one has no angle), or NaN."""
    pred, target = _pair(pred, target)
    lit = target.mean(dim=0) > dark
    a, b = F.normalize(pred[:, lit], dim=0), F.normalize(target[:, lit], dim=0)
    # atan2 of the two half-angle chords stays exact near 0, where acos of a rounded cosine gives 1e-6 degrees of noise
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=0), (a + b).norm(dim=0))).mean().item()


def ergas(pred: Tensor, target: Tensor) -> float:
    """Relative dimensionless global error in synthesis (Wald 2000), ratio 1, in percent; bands of mean zero are left out."""
    pred, target = _pair(pred, target)
    mean = target.mean(dim=(1, 2))
    ratio = (pred - target).square().mean(dim=(1, 2))[mean > 0] / mean[mean > 0].square()
    return 100 * ratio.mean().sqrt().item()


def ssim(pred: Tensor, target: Tensor) -> float:
    """Structural similarity, 11x11 Gaussian window, peak 1, mean over bands (torchmetrics)."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim
    except ImportError:
        raise UserError("SSIM needs torchmetrics: pip install -r requirements-extra.txt") from None
    pred, target = (x[None].float().contiguous().clamp(0, 1) for x in _pair(pred, target))
    return torchmetrics_ssim(pred, target, data_range=1.0).item()


def crop_border(height: int, width: int, border: int = 128) -> tuple[int, int]:
    """Border removed before scoring, in pixels per side; a quarter of the side on sides under 320 pixels."""
    return tuple(min(border, side // 4) if side < 320 else border for side in (height, width))


def centre_crop(x: Tensor, border: int = 128) -> Tensor:
    """The protocol's centre: the border removed from the last two dimensions (226 x 256 of 482 x 512)."""
    height, width = x.shape[-2:]
    bh, bw = crop_border(height, width, border)
    if border < 0 or 2 * bh >= height or 2 * bw >= width:
        raise UserError(f"a crop border of {border} px of a frame of {height} x {width}: give one from 0 to what leaves pixels")
    return x[..., bh : height - bh, bw : width - bw]


def scene_metrics(pred: Tensor, target: Tensor, *, floor: float = 1e-6, border: int = 128, with_ssim: bool = False) -> dict:
    """All metrics of one scene: of the centre crop, and with `_full` of the whole frame; MRAE with floors 0.01 and 1e-6 too."""
    result: dict[str, Any] = {}
    for suffix, p, t in (("", centre_crop(pred, border), centre_crop(target, border)), ("_full", pred, target)):
        scores = {"mrae": mrae(p, t, floor), "rmse": rmse(p, t), "psnr": psnr(p, t), "sam": sam(p, t), "ergas": ergas(p, t),
                  "mrae_floor_0.01": mrae(p, t, 0.01), "mrae_floor_1e-06": mrae(p, t, 1e-6)}
        if with_ssim:
            scores["ssim"] = ssim(p, t)
        result |= {name + suffix: value for name, value in scores.items()}
    return result | {"border": list(crop_border(*target.shape[-2:], border)), "metric_floor": floor}


def per_band_metrics(pred: Tensor, target: Tensor, floor: float = 1e-6) -> dict[str, list[float]]:
    """MRAE, RMSE, PSNR, ERGAS and SSIM of every band (one band has no spectral angle)."""
    bands = [(p[None], t[None]) for p, t in zip(*_pair(pred, target), strict=True)]
    return {"mrae": [mrae(*band, floor) for band in bands]} | {
        metric.__name__: [metric(*band) for band in bands] for metric in (rmse, psnr, ergas, ssim)}


def mean_metrics(scenes: list[dict]) -> dict[str, float]:
    """Mean over scenes of every number that scene_metrics gives; a black scene has no angle and is left out of SAM's."""
    columns = {name: [scene[name] for scene in scenes] for name, value in scenes[0].items() if isinstance(value, float)}
    return {name: float((np.nanmean if name.startswith("sam") else np.mean)(column)) for name, column in columns.items()}


def bootstrap_interval(values: list[float], samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over scenes; a NaN (SAM of a scene without a lit pixel) is left out."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    draws = values[np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))].mean(axis=1)
    return tuple(np.percentile(draws, [2.5, 97.5]).tolist())


# --- layers

class DropPath(nn.Module):
    """Drops a residual branch per sample with probability p and scales the rest by 1 / (1 - p) (stochastic depth)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weights of linear maps and convolutions decay; norms, biases, scales and all else do not."""
    decayed = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_scaler(device: torch.device, amp: torch.dtype | None) -> torch.amp.GradScaler:
    """It scales for float16 alone; for every type it makes the optimizer skip a step whose gradients are not finite."""
    still = {"init_scale": 1.0, "growth_factor": 1 + 2**-40, "backoff_factor": 1 - 2**-40}  # in float32 both factors are 1
    return torch.amp.GradScaler(device.type, **({} if amp is torch.float16 else still))


def restore(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: dict) -> None:
    """Load both from `state`; a scale that was kept for another precision is left out."""
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]["growth_factor"] == scaler.get_growth_factor():
        scaler.load_state_dict(state["scaler"])


def restore_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, state: dict, lr: float, weight_decay: float) -> None:
    """Load a schedule whose optimizer, of decay_groups, is restored; go on with this run's lr and weight decay."""
    schedule.load_state_dict(state)
    schedule.base_lrs = [lr] * len(schedule.base_lrs)
    for group, decay, curve in zip(schedule.optimizer.param_groups, (weight_decay, 0.0), schedule.lr_lambdas, strict=True):
        group.update(weight_decay=decay, initial_lr=lr, lr=lr * curve(schedule.last_epoch))


def make_average(model: nn.Module, decay: float, every: int) -> AveragedModel | None:
    """Moving average of the weights, updated every `every` steps; its decay warms up, to forget early weights. None without."""
    if decay == 0:
        return None
    average = AveragedModel(model, use_buffers=True)
    average.n_averaged.fill_(1)  # the copy above; else the first update would copy instead of average

    def update(averaged: list, current: list, _: object) -> None:
        n = int(average.n_averaged) - 1  # kept on the CPU
        torch._foreach_lerp_(averaged, current, 1 - min(decay**every, (1 + n) / (10 + n)))

    average.multi_avg_fn = update
    return average


def space_to_depth(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4C); an odd side repeats its last row or column."""
    if x.shape[1] % 2:
        x = torch.cat([x, x[:, -1:]], dim=1)
    if x.shape[2] % 2:
        x = torch.cat([x, x[:, :, -1:]], dim=2)
    return x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3)  # by way of B, H/2, 2, W/2, 2, C


def depth_to_space(x: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w, 4C) -> (B, height, width, C), the inverse of space_to_depth."""
    return x.unflatten(3, (2, 2, -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :height, :width]


# Values in one temporary where no gradient is recorded. A CPU's allocator maps larger ones anew for every operation, which
# costs more than the arithmetic; a GPU needs large ones to be busy.
STRIP_FLOATS = {"cpu": 1 << 21, "cuda": 1 << 27}


def row_strips(x: Tensor, channels: int, halo: int = 0) -> list[tuple[slice, slice]]:
    """Rows of x (B, H, W, C) to read, and which of those to keep: all at once while gradients are recorded, else strips of
    even height whose temporaries of `channels` channels have at most STRIP_FLOATS values, with `halo` rows of context."""
    height, floats = x.shape[1], STRIP_FLOATS.get(x.device.type, 1 << 27)
    whole = torch.is_grad_enabled() or torch.compiler.is_exporting()
    rows = height if whole else max(4, floats // (len(x) * x.shape[2] * channels) // 2 * 2)
    tops = [(max(0, top - halo), top) for top in range(0, height, rows)]
    return [(slice(start, top + rows + halo), slice(top - start, top - start + rows)) for start, top in tops]


def in_strips(function: Callable[..., Tensor], *xs: Tensor, channels: int, halo: int = 0) -> Tensor:
    """function(*xs), which maps rows of (B, H, W, C) to rows, or two to one, and sees `halo` rows to either side."""
    strips, out, filled = row_strips(xs[0], channels, halo), None, 0
    for read, keep in strips:
        part = function(*(x[:, read] for x in xs))[:, keep]
        if len(strips) == 1:
            return part
        if out is None:
            height = math.ceil(xs[0].shape[1] / (keep.stop // part.shape[1]))
            out = part.new_empty(len(part), height, *part.shape[2:])
        out[:, filled : filled + part.shape[1]] = part
        filled += part.shape[1]
    return out


def pixels_in_strips(function: Callable[..., list[Tensor]], x: Tensor, colour: Tensor, features: Tensor, channels: int) -> list:
    """function(x, colour, features) -> outputs of `channels`, which sees four rows more to either side; x, colour and the
    outputs have the pixels' rows, the features half as many."""
    parts = []
    for read, keep in row_strips(features, 8 * channels, halo=2):
        pixels, keep = slice(2 * read.start, 2 * read.stop), slice(2 * keep.start, 2 * keep.stop)
        parts.append([y[:, keep] for y in function(x[:, pixels], colour[:, pixels], features[:, read])])
    return [y[0] if len(y) == 1 else torch.cat(y, dim=1) for y in zip(*parts, strict=True)]


DARK = 0.01  # added to the intensity: below it a pixel's relative correction fades, as the relative error's floor does


def brightness(x: Tensor) -> Tensor:
    """Mean of the channels of (B, H, W, C), DARK above 0, (B, H, W, 1)."""
    return x.mean(dim=-1, keepdim=True).clamp_min(0) + DARK


def colour_features(x: Tensor) -> Tensor:
    """x (B, H, W, C), x over its intensity, and the logarithms of both, (B, H, W, 3 C + 1), all of order 1."""
    intensity, most = brightness(x), 2.0 * x.shape[-1]
    chroma = ((x.clamp_min(0) + DARK) / intensity).log()
    return torch.cat([x, (x / intensity).clamp(-most, most), 0.5 + 0.3 * intensity.log(), 0.5 * chroma], dim=-1)


def smooth_basis(bands: int, rank: int) -> Tensor:
    """The smoothest orthonormal spectra (bands, rank): the first cosines of the DCT."""
    angle = math.pi * (torch.arange(bands, dtype=torch.float64)[:, None] + 0.5) * torch.arange(rank) / bands
    return F.normalize(angle.cos(), dim=0).float()


class SpectralAttention(nn.Module):
    """Attention between a head's channels over all pixels, at a cost linear in them (as in MST and Restormer). All it needs
    of a frame is X'X, for q'k is Wq' X'X Wk, and what it does to a pixel is one linear map, the weights times Wv."""

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 4.0))

    def frame_map(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, dim, width): what attention over this frame does to each of its pixels."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.flatten(1, 2).to(wide)
        q, k, v = self.qkv.weight.to(wide).unflatten(0, (3, self.heads, -1))  # h, D, dim
        with torch.autocast(x.device.type, enabled=False):  # sums over many pixels are kept in float32
            gram = (x.transpose(1, 2) @ x)[:, None]
            from_q, from_k = q @ gram, k @ gram
            norm_q, norm_k = ((a * b).sum(-1).clamp_min(1e-12).sqrt() for a, b in ((from_q, q), (from_k, k)))
            cosine = from_q @ k.transpose(-1, -2) / (norm_q[..., :, None] * norm_k[..., None, :])
            return ((cosine * self.temperature).softmax(dim=-1) @ v).flatten(1, 2).transpose(1, 2)

    def forward(self, x: Tensor, frame_map: Tensor) -> Tensor:
        """Some rows of the frame (B, H, W, dim) -> (B, H, W, width)."""
        return (x.flatten(1, 2) @ frame_map).unflatten(1, x.shape[1:3])


def normalise_rgb(rgb: Tensor, rgb_norm: str, low: float | Tensor = 0.0, high: float | Tensor = 255.0) -> Tensor:
    """uint8-valued RGB -> float32: `unit` divides by 255, `per_image` maps the whole image's [low, high] to [0, 1]."""
    rgb = rgb.float()
    if rgb_norm == "unit":
        return rgb / 255.0
    if rgb_norm != "per_image":
        raise UserError(f"rgb_norm {rgb_norm!r}: choose per_image or unit")
    return (rgb - low) / (torch.as_tensor(high, dtype=torch.float32) - low).clamp_min(1.0)


def fit_linear_spectral_path(rgb: Tensor, cube: Tensor, floor: float = 0.01) -> tuple[Tensor, Tensor]:
    """The affine map RGB -> bands that minimises the squared error relative to max(target, floor), in closed form.

    rgb (B, in, h, w) and cube (B, out, h, w) -> weight (out, in), bias (out), float32. Each band is its own weighted
    least-squares problem: X' W X beta = X' W y with W = max(y, floor)^-2, solved in float64 with a slight ridge."""
    pixels = [t.detach().movedim(1, -1).flatten(0, -2) for t in (rgb, cube)]
    size, bands = rgb.shape[1] + 1, cube.shape[1]
    gram, moment = (torch.zeros(bands, n, dtype=torch.float64, device=rgb.device) for n in (size * size, size))
    for x, y in zip(*(t.split(2**15) for t in pixels), strict=True):  # chunks stay in cache
        x, y = F.pad(x.double(), (0, 1), value=1.0), y.double()
        w = y.clamp_min(floor).reciprocal().square_()
        gram += w.T @ (x[:, :, None] * x[:, None, :]).flatten(1)
        moment += w.mul_(y).T @ x
    gram = gram.view(bands, size, size)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += 1e-9 * diagonal.mean(dim=1, keepdim=True)
    beta = torch.linalg.solve(gram, moment[..., None])[..., 0]
    return beta[:, :-1].float(), beta[:, -1].float()


class CameraConsistency(nn.Module):
    """Moves a predicted cube towards the image that it was predicted from.

    What the camera would have seen of the cube is compared with what it saw, averaged over 5 x 5 pixels against noise, and
    the difference goes back into the bands as the likeliest smooth spectrum that explains it: the update of a linear
    Gaussian model (Wiener filter), whose prior error is PRIOR of a pixel's brightness. Where an image is noisier than
    that, or no linear camera explains it, little changes; nothing does before `fit`.

    For evaluation: a network that is trained through it leans on it, and its own spectra get worse. `forward` gives the
    correction alone."""

    PRIOR, SIDE = 0.04, 5

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.register_buffer("whiten", torch.zeros(in_channels, in_channels))  # rotates and scales channels to variance 1
        self.register_buffer("seen", torch.zeros(in_channels, out_channels))  # cube -> those channels
        self.register_buffer("back", torch.zeros(out_channels, in_channels))
        self.register_buffer("noise", torch.ones(2, in_channels))  # its variance over the prior's: constant, per brightness

    @torch.no_grad()
    def fit(self, rgb: Tensor, cube: Tensor) -> None:
        """Estimate the camera's smooth response and its noise from rgb (B, in, h, w) and cube (B, out, h, w)."""
        bands = self.seen.shape[1]
        x, y = (t.detach().movedim(1, -1).flatten(0, -2) for t in (rgb, cube))
        step = math.ceil(len(x) / 2**17)
        light = brightness(x[::step])
        seen, y = x[::step].div(light).double(), y[::step].div(light).double()
        smooth = torch.eye(bands, dtype=y.dtype, device=y.device).diff(n=min(2, bands - 1), dim=0)
        gram = y.T @ y / len(y) + 0.01 * (bands / 31) ** 5 * smooth.T @ smooth  # differences shrink as bands get finer
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-12)
        response = torch.linalg.solve(gram, y.T @ seen / len(y)).T

        place = torch.arange(bands, dtype=y.dtype, device=y.device) * (31 / bands)
        prior = torch.exp(-((place[:, None] - place) ** 2) / 8)  # errors of bands 20 nm apart are alike
        variance, axes = torch.linalg.eigh(response @ prior @ response.T)
        variance = variance.clamp_min(1e-6 * variance.max()) + 1e-12
        whiten = axes.T / variance.sqrt()[:, None]

        error = rgb - torch.einsum("kn,bnhw->bkhw", response.to(cube.dtype), cube)
        light = brightness(rgb.movedim(1, -1)).flatten().double()
        power = self.average(error).square().mean(dim=1).flatten().double()
        terms = torch.stack([torch.ones_like(light), light], dim=1) / light[:, None]
        normal = terms.T @ terms
        normal.diagonal().add_(1e-9 * normal.trace())  # in images of one brightness the two can't be told apart
        noise = torch.linalg.solve(normal, terms.T @ (power / light)).clamp_min(1e-9)
        self.whiten.copy_(whiten)
        self.seen.copy_(whiten @ response)
        self.back.copy_(prior @ (whiten @ response).T)
        self.noise.copy_(noise[:, None] / (self.PRIOR**2 * variance / variance.mean()))

    def average(self, x: Tensor) -> Tensor:
        """The mean over SIDE x SIDE pixels of (B, C, H, W)."""
        return F.avg_pool2d(x, self.SIDE, 1, self.SIDE // 2, count_include_pad=False)

    def forward(self, cube: Tensor, image: Tensor) -> Tensor:
        """cube (B, H, W, out) and image (B, H, W, in) -> what to add to the cube, so that it explains the image better."""
        light = brightness(image)
        error = self.average((F.linear(image, self.whiten) - F.linear(cube, self.seen)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        constant, per_light = self.noise
        return F.linear(error / (1 + (constant + per_light * light) / light**2), self.back)


# --- colour and camera

# CIE 1964 10-degree colour matching functions x10, y10, z10 (CIE 15, Colorimetry), 380 to 780 nm, step 10 nm.
CIE_1964 = (np.arange(380.0, 781.0, 10.0), np.array([
    [.00016, .002362, .01911, .084736, .204492, .314679, .383734, .370702, .302273, .195618, .080507, .016172, .003816, .037465,
     .117749, .236491, .376772, .529826, .705224, .878655, 1.01416, 1.11852, 1.12399, 1.03048, .856297, .647467, .431567, .268329,
     .152568, .081261, .040851, .019941, .009577, .004553, .002175, .001045, .000508, .000251, .000126, 6.5e-05, 3.3e-05],
    [1.7e-05, .000253, .002004, .008756, .021391, .038676, .062077, .089456, .128201, .18519, .253589, .339133, .460777, .606741,
     .761757, .875211, .961988, .991761, .99734, .955552, .868934, .777405, .658341, .527963, .398057, .283493, .179828, .107633,
     .060281, .0318, .015905, .007749, .003718, .001768, .000846, .000407, .000199, 9.8e-05, 5e-05, 2.5e-05, 1.3e-05],
    [.000705, .010482, .086011, .389366, .972542, 1.55348, 1.96728, 1.9948, 1.74537, 1.31756, .772125, .415254, .218502, .112044,
     .060709, .030451, .013676, .003988, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]).T)
XYZ_TO_SRGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
D65_XYZ = np.array([0.9505, 1.0, 1.0890])  # both IEC 61966-2-1

# Two cameras of our own as lobes (height, peak nm, width nm below it, width nm above it): the piecewise Gaussians of Wyman et
# al., "Simple Analytic Approximations to the CIE XYZ Color Matching Functions", JCGT 2(2), 2013, eq. 4; overlaps and side lobes
# as in Jiang et al., "What is the Space of Spectral Sensitivity Functions for Digital Color Cameras?", WACV 2013.
CAMERAS = {
    "analytic": ([(1.0, 602, 22, 36), (0.10, 535, 30, 30), (0.04, 440, 20, 20)],
                 [(1.0, 532, 34, 38), (0.08, 440, 25, 25), (0.05, 640, 30, 30)], [(1.0, 458, 26, 30), (0.07, 530, 25, 35)]),
    "analytic2": ([(1.0, 592, 18, 46), (0.16, 520, 35, 30), (0.10, 430, 20, 25)],
                  [(1.0, 545, 42, 34), (0.14, 470, 30, 25)], [(1.0, 446, 22, 38), (0.12, 545, 30, 40)]),
}


def sum_of_lobes(nm: np.ndarray, lobes: list[tuple[float, float, float, float]]) -> np.ndarray:
    """A smooth spectrum: piecewise Gaussians (height, peak, width below, width above), in nm."""
    return sum(a * np.exp(-0.5 * ((nm - peak) / np.where(nm < peak, low, high)) ** 2) for a, peak, low, high in lobes)


def camera_response(camera: str, wavelengths: list[float] | np.ndarray) -> np.ndarray:
    """Weights (bands, 3) that make R, G, B of a spectrum: band width x sensitivity, with the gain at which a perfect
    white (all bands 1) is 1. camera: `analytic`, `analytic2`, `cie1964`, or a CSV file with rows nm,r,g,b."""
    nm = np.asarray(wavelengths, np.float64)
    if camera in CAMERAS:
        response = np.stack([sum_of_lobes(nm, lobes) for lobes in CAMERAS[camera]], axis=1)
    else:
        at, table = CIE_1964 if camera == "cie1964" else _read_camera_csv(camera)
        response = np.stack([np.interp(nm, at, column, left=0.0, right=0.0) for column in table.T], axis=1)
    response = response * (np.abs(np.gradient(nm)) if len(nm) > 1 else 1.0)[:, None]
    total = response.sum(axis=0)
    if not (total > 1e-6).all():
        raise UserError(f"camera {camera}: channel {'RGB'[int(np.argmin(total))]} sees nothing of "
                        f"{nm.min():g}-{nm.max():g} nm; choose another camera")
    return response / total


def _read_camera_csv(path: str) -> tuple[np.ndarray, np.ndarray]:
    if not Path(path).is_file():
        raise UserError(f"camera {path}: choose {', '.join(CAMERAS)}, cie1964, or a CSV file with rows nm,r,g,b")
    try:
        table = np.genfromtxt(path, delimiter=",", dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise UserError(f"camera {path}: {error}; rows must be nm,r,g,b") from None
    table = table[1:] if np.isnan(table[:1]).all() else table  # a header line
    if len(table) < 2 or table.shape[1] != 4 or not np.isfinite(table).all():
        raise UserError(f"camera {path}: needs two or more rows of four numbers nm,r,g,b")
    table = table[np.argsort(table[:, 0])]
    return table[:, 0], table[:, 1:]


def render_rgb(cube: np.ndarray, response: np.ndarray, *, rng: np.random.Generator, exposure: float | None = None,
               electrons: float = 750, jpeg_quality: int = 65) -> tuple[np.ndarray, bytes]:
    """The field's photo of a cube (H, W, bands): camera, exposure, Poisson noise, clip, 8 bit, JPEG. Linear, no gamma.

    exposure: a fixed gain (1: perfect white is full scale), or None: mean signal 0.18 of full scale, another brightness
    for each scene. electrons: photo-electrons at full scale, 0 for no noise. -> (uint8 (H, W, 3), the JPEG file)."""
    signal = np.maximum(cube.astype(np.float32, copy=False) @ response.astype(np.float32), 0)
    signal *= 0.18 / max(float(signal.mean()), 1e-9) if exposure is None else exposure
    if electrons:
        signal = rng.poisson(np.minimum(signal, 4.0) * electrons) / electrons  # 4: well above the clip
    encoded = io.BytesIO()
    frame = np.rint(np.clip(signal, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(frame).save(encoded, "JPEG", quality=jpeg_quality)
    return np.asarray(Image.open(encoded).convert("RGB")), encoded.getvalue()


def cube_to_srgb(cube: np.ndarray, wavelengths: list[float] | np.ndarray) -> np.ndarray:
    """A picture to look at, uint8 sRGB (H, W, 3), of a cube (H, W, bands) in [0, 1]: the CIE 1964 observer, a flat spectrum of
    1 as D65 white; bands that miss its red, green or blue in false colour, by a long, a middle and a short one."""
    nm = np.asarray(wavelengths, float)
    if nm.min() > 500 or nm.max() < 600 or len(nm) < 3:
        bands = np.argsort(nm)[[-1 - len(nm) // 6, len(nm) // 2, len(nm) // 6]]
        return np.rint(np.clip(cube[..., bands].astype(np.float32), 0, 1) * 255).astype(np.uint8)
    xyz = camera_response("cie1964", nm) * D65_XYZ
    linear = np.clip(cube.astype(np.float32, copy=False) @ (xyz @ XYZ_TO_SRGB.T).astype(np.float32), 0, 1)
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(gamma * 255).astype(np.uint8)


def scene_figure(rgb: Tensor, pred: Tensor, target: Tensor, wavelengths: list[float], title: str = "RGB") -> Any:
    """A matplotlib figure of one scene, all (C, H, W): a picture, the prediction rendered, its error, and spectra."""
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the whole process

    figure = Figure(figsize=(16, 4), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].imshow(rgb.movedim(0, -1).clamp(0, 1).numpy())
    axes[1].imshow(cube_to_srgb(pred.movedim(0, -1).numpy(), np.asarray(wavelengths)))
    error = ((pred - target).abs() / target.clamp_min(0.01)).mean(0)
    figure.colorbar(axes[2].imshow(error.numpy(), vmin=0, vmax=0.5, cmap="magma"), ax=axes[2])
    h, w = target.shape[1:]
    for i, (y, x) in enumerate([(h // 4, w // 4), (h // 2, w // 2), (3 * h // 4, w // 3)]):
        axes[3].plot(wavelengths, target[:, y, x].numpy(), f"C{i}-", label=f"({x}, {y}) measured")
        axes[3].plot(wavelengths, pred[:, y, x].numpy(), f"C{i}--", label="predicted")
        axes[0].plot(x, y, f"C{i}o")
    axes[3].set_xlabel("wavelength (nm)")
    axes[3].legend(fontsize=7)
    for axis, name in zip(axes, (title, "prediction", "relative error", "spectra"), strict=True):
        axis.set_title(name)
    return figure
