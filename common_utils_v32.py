"""What two or more of the scripts share: command line from dataclasses, seeds, files, states of
optimizers.

Imports nothing of the project but terminal.py; see README.md for the scripts."""

import argparse
import contextlib
import copy
import dataclasses
import errno
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import psutil
import torch
from torch import Tensor, nn

import terminal
from terminal import CliParser

LEFTOVER_AGE = 3600  # seconds after which a temporary file is taken for a killed process's
Choices = tuple[str, ...] | None


class UserError(Exception):
    """Bad input. One line that names the file, flag or value and says what to do."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main. A UserError or an OS error becomes one line on stderr and exit code 2; a
    traceback comes before it with --verbose alone."""
    try:
        code = main() or 0
    except KeyboardInterrupt:
        _end(130)
    except MemoryError as error:
        _end(2, f"not enough memory ({error})")
    except (UserError, OSError) as error:
        _end(2, str(error))
    _end(code)


def _end(code: int, error: str = "") -> NoReturn:
    if hasattr(signal, "SIGCHLD"):  # a loader's worker that ends now is no error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if error:
        if terminal.is_verbose():
            traceback.print_exc()
        print(f"error: {' '.join(error.split())}", file=sys.stderr)
    sys.exit(code)


def opt(default: Any, help: str, *, group: str = "settings", choices: Choices = None) -> Any:
    """A dataclass field that also describes its command-line flag."""
    metadata = {"help": help, "group": group, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_dataclass(cls: type, argv: list[str] | None = None, description: str = "") -> Any:
    """Command line -> a dataclass instance, with one flag for each `opt` field, in titled groups;
    booleans become --x/--no-x.

    --config FILE.json gives defaults; a key in it that is no flag is an error. A ValueError of
    __post_init__ becomes a UserError."""
    argv = sys.argv[1:] if argv is None else argv
    parser = CliParser(description=description)
    parser.add_argument(
        "--config", metavar="FILE.json", help="settings to start from; the command line wins"
    )
    names = _add_flags(parser, cls)
    config = parser.parse_known_args(argv)[0].config
    if config:
        argv = [*_config_flags(config, names), *argv]
    values = vars(parser.parse_args(argv))
    values.pop("config")
    terminal.detail(f"settings: {to_json(values)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def _add_flags(parser: CliParser, cls: type) -> set[str]:
    """One flag for each `opt` field; -> their names."""
    hints = get_type_hints(cls)
    groups: dict[str, Any] = {}
    fields = [field for field in dataclasses.fields(cls) if "help" in field.metadata]
    for field in fields:
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = field.metadata["help"].replace("%", "%%")
        kind = _flag_kind(hints[field.name], field.metadata["choices"])
        groups[title].add_argument(f"--{field.name}", default=default, help=text, **kind)
    return {field.name for field in fields}


def _flag_kind(hint: Any, choices: Choices) -> dict[str, Any]:
    """What add_argument needs to know of a field's type."""
    if type(None) in get_args(hint):
        hint = get_args(hint)[0]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) in (list, tuple):
        return {"type": get_args(hint)[0], "nargs": "+", "choices": choices}
    return {"type": finite if hint is float else hint, "choices": choices}


def positive(text: str) -> int:
    """A whole number from 1 up: the type of a flag."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give 1 or more")
    return value


def finite(text: str) -> float:
    """The type of flags that are numbers: no check of a range would find NaN outside."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: give a finite number")
    return value


def _config_flags(path: str, known: set[str]) -> list[str]:
    """The settings of a JSON file as flags, so that one parser checks both; null is no setting."""
    settings = read_json(path)
    unknown = set(settings) - known if isinstance(settings, dict) else {"a list"}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"--config {path}: unknown settings: {names}; --help lists the known ones")
    flags = []
    for name, value in settings.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            flags.append(f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def optional_fields(cls: type, skip: tuple[str, ...] = ()) -> list[tuple]:
    """The fields of a dataclass for make_dataclass, all None by default: "the preset decides"."""
    hints = get_type_hints(cls)
    fields = []
    for field in dataclasses.fields(cls):
        if field.name not in skip:
            unset = dataclasses.field(default=None, metadata=field.metadata)
            fields.append((field.name, hints[field.name] | None, unset))
    return fields


def given_fields(settings: Any, cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of `cls` that `settings` gives a value, by name."""
    given = {}
    for field in dataclasses.fields(cls):
        value = getattr(settings, field.name, None)
        if value is not None and field.name not in skip:
            given[field.name] = value
    return given


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, CUDA included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def begin_worker() -> None:
    """For a pool's workers: Ctrl-C is left to the process that started them, and they end with it,
    also where it is killed; else they would wait for its next job for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def atomic_write(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename. A failure keeps the old."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=temporary_prefix(path.name), dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
            write(file)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"{path}: the disk is full; make room, run the same again") from None
        raise


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder, and see that it can be written to; UserError that names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{flag} {folder}: cannot be written ({reason}); give another") from None


def temporary_prefix(name: str) -> str:
    """How the name of a temporary file or folder begins: with whose it is, for remove_leftovers."""
    return f".{name[:100]}.{socket.gethostname()}-{os.getpid()}-"


def remove_leftovers(folder: Path) -> None:
    """Remove a folder's temporary files and folders whose process was killed: it is no more, or it
    ran on another machine an hour ago. Called before this process writes there."""
    for path in folder.glob(".*-*-????????"):
        owner = re.fullmatch(r"\..+\.(.+)-(\d+)-\w{8}", path.name)
        with contextlib.suppress(FileNotFoundError):  # another process was first
            if owner is None:
                continue
            ended = int(owner[2]) == os.getpid() or not _runs(int(owner[2]))
            here = owner[1] == socket.gethostname()
            if (here and ended) or time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _runs(process: int) -> bool:
    """Whether a process runs; one that was killed may wait for long until its parent looks."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def to_json(value: Any, **kwargs: Any) -> str:
    """JSON of plain values, paths, NumPy and torch scalars and arrays; NaN, infinity: null."""
    text = json.dumps(value, default=lambda x: str(x) if isinstance(x, Path) else x.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda name: None), **kwargs)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, to_json(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; UserError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weights of linear maps and convolutions decay, all else does not."""
    decayed = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    chosen = {id(parameter) for parameter in decayed}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def make_scaler(device: torch.device, amp: torch.dtype | None) -> torch.amp.GradScaler:
    """It scales for float16 alone; for every type it skips steps whose gradients are not finite."""
    if amp is torch.float16:
        return torch.amp.GradScaler(device.type)
    almost_one = 2**-40  # from 1, as the factors must be; in float32 they are 1, so the scale stays
    return torch.amp.GradScaler(
        device.type, init_scale=1.0, growth_factor=1 + almost_one, backoff_factor=1 - almost_one
    )


def restore(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: dict) -> None:
    """Load both from `state`; a scale that was kept for another precision is left out."""
    optimizer.load_state_dict(state["optimizer"])
    # Moments written under another `use_channels_last` get the layout that fused kernels need.
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
    if state["scaler"]["growth_factor"] == scaler.get_growth_factor():
        scaler.load_state_dict(state["scaler"])


def restore_schedule(
    schedule: torch.optim.lr_scheduler.LambdaLR, state: dict, lr: float, weight_decay: float
) -> None:
    """Load a schedule whose optimizer is restored; go on with this run's lr and weight decay."""
    schedule.load_state_dict(state)
    schedule.base_lrs = [lr] * len(schedule.base_lrs)
    groups, curves = schedule.optimizer.param_groups, schedule.lr_lambdas
    for group, decay, curve in zip(groups, (weight_decay, 0.0), curves, strict=True):
        group.update(weight_decay=decay, initial_lr=lr, lr=lr * curve(schedule.last_epoch))


def _float_tensors(model: nn.Module) -> list[Tensor]:
    tensors = (*model.parameters(), *model.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


class WeightAverage:
    """Moving average of a model's weights and buffers, `module`, updated every `every` steps. Its
    decay warms up, to forget early weights. Updates are counted in Python, without a wait."""

    def __init__(self, model: nn.Module, decay: float, every: int) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.updates = decay**every, 0
        # The same tensors at each step: to look them up takes as long as to average them.
        self._averaged, self._current = _float_tensors(self.module), _float_tensors(model)

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict:
        """What a checkpoint keeps: the averaged weights, and how often they were updated."""
        return {"ema": self.module.state_dict(), "ema_updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["ema"])
        self.updates = state["ema_updates"]


def make_average(model: nn.Module, decay: float, every: int) -> WeightAverage | None:
    """The average of a model's weights; None where decay is 0."""
    return WeightAverage(model, decay, every) if decay > 0 else None


def __getattr__(name: str) -> Any:
    """Checkpoints are read and written in checkpoint_files; they are still found here too."""
    if name in ("save_checkpoint", "read_checkpoint", "save_weights", "load_weights"):
        return getattr(importlib.import_module("checkpoint_files"), name)
    raise AttributeError(name)
