"""What two or more of the scripts share: command line from dataclasses, process group and seeds, files and checkpoints, a
run's folder, log and signals, states of optimizers. Imports nothing of the project; see README.md for the scripts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import errno
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
from typing import Any, BinaryIO, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


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
        for i, arg in enumerate(args[: args.index("--")] if "--" in args else args):
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
    parser.add_argument(
        "--config", metavar="FILE.json", help="settings to start from; the command line wins"
    )
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
        groups[title].add_argument(
            f"--{name}", default=default, help=field.metadata["help"].replace("%", "%%"), **kind
        )
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
        raise UserError(
            f"--config {path}: unknown settings: {', '.join(sorted(unknown))}; --help lists the known ones"
        )
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += (
                [f"--{name}", *map(str, value)]
                if isinstance(value, list)
                else [f"--{name}={value}"]
            )
    return flags


def optional_fields(cls: type, skip: tuple[str, ...] = ()) -> list[tuple]:
    """The fields of a dataclass for make_dataclass, all with default None: "not given, the preset decides"."""
    hints = get_type_hints(cls)
    return [
        (f.name, hints[f.name] | None, dataclasses.field(default=None, metadata=f.metadata))
        for f in dataclasses.fields(cls)
        if f.name not in skip
    ]


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
        return tuple(
            (self.sum(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist()
        )

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
            raise UserError(
                f"{what} differs between ranks: {', '.join(values)}; use a folder that all of them see"
            )

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
            raise UserError(
                f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices"
            )
        torch.cuda.set_device(device)
    return device


def init_process_group(device: str) -> tuple[Ranks, torch.device]:
    """Join the group that torchrun announces in the environment (gloo on CPU, nccl on CUDA), if any."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    resolved = resolve_device(device, local)
    if world > 1:
        patience = datetime.timedelta(
            hours=2
        )  # one rank may have longer scenes to score than another
        dist.init_process_group("nccl" if resolved.type == "cuda" else "gloo", timeout=patience)
    return Ranks(int(os.environ.get("RANK", "0")), world, local), resolved


def set_default_environment() -> None:
    """CUDA's allocator settings, unless the user has some; called by main(), before the first CUDA tensor."""
    os.environ.setdefault(
        "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:256"
    )


def find_compiler() -> str | None:
    """The compiler that torch.compile would use."""
    return next(
        filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "cc"))), None
    )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, CUDA included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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
            raise UserError(
                f"{path}: the disk is full; make room and run the same command again"
            ) from None
        raise


def to_json(value: Any, **kwargs: Any) -> str:
    """JSON of plain values, paths, and numpy or torch scalars and arrays; NaN and infinities become null."""
    text = json.dumps(value, default=lambda x: str(x) if isinstance(x, Path) else x.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda name: None), **kwargs)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically."""
    atomic_write(path, lambda file: file.write((to_json(value, indent=2) + "\n").encode()))


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    atomic_write(path, lambda file: file.write(text.encode()))


def read_json(path: str | Path) -> Any:
    """Read a JSON file; UserError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Save tensors and plain types atomically; read_checkpoint reads them back without unpickling code."""
    atomic_write(path, lambda file: torch.save(state, file))


def save_weights(
    path: str | Path, state_dict: dict, model: str, model_config: dict, data: dict, averaged: bool
) -> None:
    """Save weights as .safetensors, with what is needed to rebuild the model in its metadata."""
    metadata = {
        "format": "hsi-checkpoint",
        "model": model,
        "model_config": to_json(model_config),
        "data": to_json(data),
        "averaged": to_json(averaged),
    }
    payload = safetensors_bytes(
        {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}, metadata
    )
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
    except (
        Exception
    ) as error:  # torch raises many kinds for a damaged file; each means the same to the user
        reason = (
            "it holds more than tensors and plain types"
            if "weights_only" in str(error).lower()
            else "damaged"
        )
        raise UserError(
            f"{path}: refused as a checkpoint ({reason}); use a file written by the trainers"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    bare = "state_dict" not in state
    state = {"model": None, "model_config": {}, "ema": None, "data": {}} | (
        {"state_dict": state} if bare else state
    )
    weights = state["state_dict"]
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(v, Tensor) for v in weights.values())
    ):
        raise UserError(f"{path}: holds no model weights")
    if not all(isinstance(state[key] or {}, dict) for key in ("model_config", "ema", "data")):
        raise UserError(f"{path}: damaged, its configuration is not a table of settings")
    return state


Model = TypeVar("Model", bound=nn.Module)


def build_from_checkpoint(
    path: str | Path, kind: str, create: Callable[..., Model], ema: bool = True
) -> Model:
    """Rebuild a model from any checkpoint of the trainers; the averaged weights where there are any
    and `ema` is on."""
    state = read_checkpoint(path)
    if state["model"] not in (kind, None) or not state["model_config"]:
        raise UserError(
            f"{path}: holds {state['model'] or 'bare weights'}, not a {kind} checkpoint with its configuration"
        )
    model = create(**state["model_config"])
    load_weights(model, (ema and state["ema"]) or state["state_dict"], path)
    return model


def load_weights(model: nn.Module, weights: dict, path: str | Path) -> None:
    """load_state_dict with a one-line UserError on a mismatch; a `module.` prefix of DDP is dropped."""
    try:
        model.load_state_dict(
            {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in weights.items()}
        )
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise UserError(
            f"{path}: weights do not fit this model: {' '.join(first).strip()[:200]}"
        ) from None


STOPPED = 75  # exit code of a run that a signal stopped after it saved: "try again" (EX_TEMPFAIL of sysexits.h)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run writes: `<output_dir>/<name>`; logs to `$HSI_LOG_DIR/<name>`, checkpoints to `$HSI_CKPT_DIR/<name>` if set."""

    logs: Path
    checkpoints: Path

    @classmethod
    def of(cls, output_dir: str, name: str) -> RunFolder:
        return cls(
            *(
                Path(os.environ.get(variable) or output_dir, name)
                for variable in ("HSI_LOG_DIR", "HSI_CKPT_DIR")
            )
        )

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
                raise UserError(
                    f"{sign.parent} holds a run: give --resume_from auto to go on, or another --experiment_name"
                )
        return None


class RunLog:
    """Writes metrics.jsonl and TensorBoard files (mirrored to Weights & Biases where asked); silent on ranks but 0."""

    def __init__(
        self, folder: Path, ranks: Ranks, step: int, wandb_project: str | None, settings: dict
    ) -> None:
        self.active, self.wandb = ranks.is_main, None
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():  # what a killed run logged after its last checkpoint is made again
            lines = path.read_text().splitlines(True)  # the last may have been cut
            kept = [
                line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step
            ]
            atomic_write(path, lambda file: file.write("".join(kept).encode()))
        self.lines, self.board = open(path, "a"), SummaryWriter(str(folder), purge_step=step + 1)  # noqa: SIM115
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "--wandb needs the wandb package: pip install wandb, or leave --wandb away"
                ) from None
            name = folder.name
            self.wandb = wandb.init(
                project=wandb_project,
                name=name,
                id=name,
                resume="allow",
                config=settings,
                dir=str(folder),
            )

    def write(self, kind: str, step: int, values: dict) -> None:
        if not self.active:
            return
        self.lines.write(to_json({"kind": kind, "step": step} | values) + "\n")
        self.lines.flush()
        scalars = {
            f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, (int, float))
        }
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
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def environment_record() -> dict:
    """Versions, machine and git commit that a number was made with."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = (
        subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if shutil.which("git")
        else None
    )
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "git_commit": commit or None,
    }


def memory_gb(device: torch.device) -> float:
    """Peak CUDA memory of this process, or its resident memory on a CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weights of linear maps and convolutions decay; norms, biases, scales and all else do not."""
    decayed = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def make_scaler(device: torch.device, amp: torch.dtype | None) -> torch.amp.GradScaler:
    """It scales for float16 alone; for every type it makes the optimizer skip a step whose gradients are not finite."""
    still = {
        "init_scale": 1.0,
        "growth_factor": 1 + 2**-40,
        "backoff_factor": 1 - 2**-40,
    }  # in float32 both factors are 1
    return torch.amp.GradScaler(device.type, **({} if amp is torch.float16 else still))


def restore(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: dict) -> None:
    """Load both from `state`; a scale that was kept for another precision is left out."""
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]["growth_factor"] == scaler.get_growth_factor():
        scaler.load_state_dict(state["scaler"])


def restore_schedule(
    schedule: torch.optim.lr_scheduler.LambdaLR, state: dict, lr: float, weight_decay: float
) -> None:
    """Load a schedule whose optimizer, of decay_groups, is restored; go on with this run's lr and weight decay."""
    schedule.load_state_dict(state)
    schedule.base_lrs = [lr] * len(schedule.base_lrs)
    for group, decay, curve in zip(
        schedule.optimizer.param_groups, (weight_decay, 0.0), schedule.lr_lambdas, strict=True
    ):
        group.update(weight_decay=decay, initial_lr=lr, lr=lr * curve(schedule.last_epoch))


def make_average(model: nn.Module, decay: float, every: int) -> AveragedModel | None:
    """Moving average of the weights, updated every `every` steps; its decay warms up, to forget early weights. None without."""
    if decay == 0:
        return None
    average = AveragedModel(model, use_buffers=True)
    average.n_averaged.fill_(
        1
    )  # the copy above; else the first update would copy instead of average

    def update(averaged: list, current: list, _: object) -> None:
        n = int(average.n_averaged) - 1  # kept on the CPU
        torch._foreach_lerp_(averaged, current, 1 - min(decay**every, (1 + n) / (10 + n)))

    average.multi_avg_fn = update
    return average


def cgroup_free(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes left under the tightest memory limit on this process, cgroup v1 or v2 (inf: none). File cache counts as free."""
    free = math.inf
    for line in membership.read_text().splitlines() if membership.exists() else ():
        controllers, place = line.split(":", 2)[1:]
        v1 = "memory" in controllers.split(",")
        if controllers and not v1:
            continue
        limit, usage, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if v1
            else ("memory.max", "memory.current", "inactive_file")
        )
        top = root / "memory" if v1 else root
        inner = top / place.lstrip("/")
        for folder in (inner, *inner.parents):  # a container may see only the top one
            if folder.is_relative_to(top) and (folder / limit).exists():
                stat = dict(
                    row.split() for row in (folder / "memory.stat").read_text().splitlines()
                )
                most = float((folder / limit).read_text().replace("max", "inf"))
                free = min(free, most - int((folder / usage).read_text()) + int(stat.get(cache, 0)))
    return free
