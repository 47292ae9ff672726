"""What a training run keeps beside its weights: its folder, its log, the signals that stop it, and
the states of random generators. Each trainer owns its loop; this is what both write and read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint_files import load_weights, read_checkpoint, save_checkpoint, without_wrappers
from common_utils_v32 import UserError, make_folder, remove_leftovers, to_json, write_text
from compute_devices import Ranks, first_output

STOPPED = 75  # exit code of a run that a signal stopped after it saved (EX_TEMPFAIL: try again)
# The checkpoint to go on from, the one before it, that of the best validation.
CHECKPOINTS = LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run writes: <output_dir>/<name>; logs to $HSI_LOG_DIR/<name> and checkpoints to
    $HSI_CKPT_DIR/<name> where these are set."""

    logs: Path
    checkpoints: Path

    @classmethod
    def of(cls, output_dir: str, name: str) -> RunFolder:
        logs = os.environ.get("HSI_LOG_DIR") or output_dir
        checkpoints = os.environ.get("HSI_CKPT_DIR") or output_dir
        return cls(Path(logs, name), Path(checkpoints, name))

    def resume(self, resume_from: str | None) -> tuple[Path, dict] | tuple[None, None]:
        """The checkpoint to go on from, and its state: a path as given; `auto` for last.ckpt, the
        one before where that is damaged, the best where both are gone, or none where none is there;
        None for a new run. UserError where a run would write over another one."""
        if resume_from:
            remove_leftovers(self.checkpoints)
            remove_leftovers(self.logs)
        if resume_from == "auto":
            return self._newest()
        signs = [self.checkpoints / name for name in CHECKPOINTS]
        if resume_from is None:
            self._refuse([*signs, self.logs / "config.json"])
            return None, None
        path, state = Path(resume_from), read_checkpoint(resume_from)
        if path.resolve().parent != self.checkpoints.resolve():
            self._refuse(signs)  # of a start from there that ended early there is a config.json
        return path, state

    def _refuse(self, signs: list[Path]) -> None:
        for sign in signs:
            if sign.exists():
                raise UserError(
                    f"{sign.parent} holds a run: give --resume_from auto to go on, or another "
                    "--experiment_name"
                )

    def _newest(self) -> tuple[Path, dict] | tuple[None, None]:
        """The newest checkpoint that is not damaged; a damaged one is moved away."""
        damaged: dict[Path, UserError] = {}
        for path in (self.checkpoints / name for name in CHECKPOINTS):
            if not path.exists():
                continue
            try:
                state = read_checkpoint(path)
            except UserError as error:
                damaged[path] = error
                continue
            for bad, reason in damaged.items():
                kept = bad.with_suffix(".damaged")
                print(f"{reason}; kept as {kept}, going on from {path}", file=sys.stderr)
                with contextlib.suppress(FileNotFoundError):  # another rank was first
                    os.replace(bad, kept)
            return path, state
        if damaged:
            raise next(iter(damaged.values()))
        if (self.logs / "summary.json").exists():
            raise UserError(
                f"{self.logs} holds a run that ended, {self.checkpoints} no checkpoint of it; set "
                "HSI_CKPT_DIR as it was, or give another --experiment_name"
            )
        return None, None

    def make(self) -> None:
        """UserError where one of them cannot be written."""
        for folder, variable in ((self.logs, "HSI_LOG_DIR"), (self.checkpoints, "HSI_CKPT_DIR")):
            make_folder(folder, variable if os.environ.get(variable) else "--output_dir")

    def save(self, name: str, state: dict) -> None:
        """Write a checkpoint; the last.ckpt before it is kept as previous.ckpt."""
        previous = self.checkpoints / PREVIOUS if name == LAST else None
        save_checkpoint(self.checkpoints / name, state, previous)


MEASURE = ("metric_floor", "val_crop_border")  # settings that a reported value depends on
# Settings that no step depends on, or that a run looks up anew where it goes on.
NO_MATTER = (
    *("output_dir", "experiment_name", "resume_from", "init_from", "log_interval", "save_minutes"),
    *("device", "threads", "num_workers", "verify", "wandb", "use_amp", "amp_dtype"),
    *("compile_model", "val_interval", "data_root", "batch_size"),
)
SCALE = "head.scale."  # what a model has with --estimate_uncertainty alone
# What of a model may depend on the number of bands.
BAND_PARTS = ("direct", "basis", "consistency", "coefficients", "scale")  # of the head


def start_weights(
    model: Any, kind: str, init_from: str | None, rgb: Tensor, cube: Tensor, loss_fn: Any
) -> str:
    """Where a new run starts: at the closed-form path fitted on rgb (B, 3, h, w) and cube (B,
    bands, h, w), or at the weights of a file; -> what to say of it.

    UserError where the file holds another model, or another size of it."""
    if init_from is None:
        model.fit_spectral_path(rgb, cube)
        return "starts at the linear path that was fitted to the training scenes"
    checkpoint = read_checkpoint(init_from)
    _check_kind(checkpoint["model"] or kind, kind, f"--init_from {init_from}")
    weights = without_wrappers(checkpoint["ema"] or checkpoint["state_dict"])
    own = model.state_dict()
    other_bands = [name for name in weights if _is_of_other_bands(name, weights, own)]
    for name in other_bands:
        weights[name] = own[name]
    of_scale = {name for name in (*own, *weights) if name.startswith(SCALE)}
    new_scale = of_scale - weights.keys()
    for name in new_scale:
        weights[name] = own[name]
    for name in of_scale - own.keys():  # this model has none
        del weights[name]
    load_weights(model, weights, f"--init_from {init_from}")
    text = f"starts from {init_from}"
    if new_scale:
        text += ", whose uncertainty is new"
    if other_bands:
        text += ", which has another number of bands: direct path, basis and camera are new"
    return f"{text}; {_refit_where_better(model, rgb, cube, loss_fn)}"


def _check_kind(found: str, kind: str, where: str) -> None:
    if found != kind:
        raise UserError(f"{where}: holds {found}, this trains {kind}")


def resume_weights(model: Any, kind: str, state: dict, path: Path) -> None:
    """The weights of a checkpoint to go on from. UserError with what differs where the model is
    another one."""
    _check_kind(state["model"], kind, f"--resume_from {path}")
    try:
        load_weights(model, state["state_dict"], path)
    except UserError:
        old, new = state["model_config"], dataclasses.asdict(model.config)
        differ = [name for name in new if old.get(name) != new[name]]
        if not differ:
            raise
        found = ", ".join(f"{name} {old.get(name)} and not {new[name]}" for name in differ)
        raise UserError(
            f"--resume_from {path}: its model has {found}; give that run's settings, or another "
            "--experiment_name"
        ) from None


def _is_of_other_bands(name: str, weights: dict, own: dict) -> bool:
    part = name.split(".")[1] if name.startswith("head.") else ""
    return part in BAND_PARTS and name in own and weights[name].shape != own[name].shape


@torch.no_grad()
def _refit_where_better(model: Any, rgb: Tensor, cube: Tensor, loss_fn: Any) -> str:
    """Fit the direct path and the camera to new data; keep that where it lowers the loss."""

    def error() -> float:
        model.eval()
        parts = zip(rgb.split(8), cube.split(8), strict=True)
        losses = [float(loss_fn(first_output(model(x)), y)) for x, y in parts]
        model.train()
        return sum(losses) / len(losses)

    before, old = {key: value.clone() for key, value in model.state_dict().items()}, error()
    model.fit_spectral_path(rgb, cube)
    new, verdict = error(), "kept"
    if not new < old:  # NaN is no improvement
        model.load_state_dict(before)
        verdict = "not kept"
    text = f"its loss on training patches {old:.4f}; with the linear path fitted anew"
    return f"{text} {new:.4f}, {verdict}"


def other_settings(old: dict, cfg: Any) -> str:
    """Which settings that a step depends on are not as the `old` ones of a run, in words."""
    text = ""
    for name, value in old.items():
        new = getattr(cfg, name, value)
        if name not in NO_MATTER and new != value:
            now, then = ("not given" if x is None else x for x in (new, value))
            text += f"; --{name} {now}, it was {then}"
    return text


def other_batch(state: dict, cfg: Any) -> str:
    """Whether all ranks together take other batches than a checkpoint's run did, in words."""
    old_ranks, old_size = len(state["rng"]), state["settings"]["batch_size"]
    if old_ranks * old_size == cfg.world_size * cfg.batch_size:
        return ""
    now = f"{cfg.world_size} x --batch_size {cfg.batch_size}"
    return f"; ranks x patches of a batch are {now}, they were {old_ranks} x {old_size}"


def keeps_best(state: dict, cfg: Any, facts: dict, folder: RunFolder) -> bool:
    """Whether the best value of a resumed run is of the same scenes, measure and folder."""
    old, digest = state["settings"], state["data"].get("val_scenes")
    same = digest == facts["val_scenes"]
    if digest is None:  # an older run's
        same = all(old[key] == getattr(cfg, key) for key in ("data_root", "val_split"))
    same = same and all(old[key] == getattr(cfg, key) for key in MEASURE)
    return same and (folder.checkpoints / BEST).exists()


class SoundState:
    """A state of the run whose error was sound, to go back to where it explodes: the mean of a log
    line is EXPLOSION times the lowest of the last LINES, or gradients are not finite for many
    steps. Data and schedule go on, so other batches follow. After MOST times it is a UserError.

    The steps after a state show whether it is sound, so the one of the last line is on trial."""

    EXPLOSION, LINES, MOST = 10.0, 20, 3

    def __init__(self, *parts: Any) -> None:
        """parts: whatever has state_dict and load_state_dict."""
        self.parts, self.errors, self.times = parts, [math.inf], 0
        self.sound = self.on_trial = self._copy()

    def _copy(self) -> list[dict]:
        return [_copied(part.state_dict()) for part in self.parts]

    def follow(self, step: int, error: float) -> str:
        """Keep the state, or go back where the error of a log line exploded, and say so."""
        lowest = min(self.errors)
        if error > self.EXPLOSION * lowest:
            return self.go_back(f"step {step}: MRAE {error:.3g} exploded from {lowest:.3g}")
        self.errors = [*self.errors, error][-self.LINES :]
        self.sound, self.on_trial = self.on_trial, self._copy()
        return ""

    def go_back(self, what: str) -> str:
        if self.times == self.MOST:
            raise UserError(
                f"{what}, and going back has not helped {self.MOST} times; lower --lr, raise "
                "--train_floor, or try dataset_setup.py --verify-only; last.ckpt is from before"
            )
        self.times += 1
        self.on_trial = self.sound
        for part, state in zip(self.parts, self.sound, strict=True):
            part.load_state_dict(_copied(state))  # an optimizer takes tensors as they are
        return f"{what}: back to the last sound state ({self.times} of {self.MOST} times)"


def _copied(state: Any) -> Any:
    """A state of plain types and tensors in tensors of its own, in main memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


class RunLog:
    """Writes metrics.jsonl, TensorBoard files and, where asked, Weights & Biases; on rank 0."""

    def __init__(
        self, folder: Path, ranks: Ranks, step: int, wandb_project: str | None, settings: dict
    ) -> None:
        self.active, self.wandb = ranks.is_main, None
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            _cut_log(path, step)
        self.lines = open(path, "a", encoding="utf-8")  # noqa: SIM115 (close() closes it)
        self.board = SummaryWriter(str(folder), purge_step=step + 1)
        if wandb_project:
            self.wandb = _start_wandb(wandb_project, folder, settings)

    def write(self, kind: str, step: int, values: dict) -> None:
        if not self.active:
            return
        self.lines.write(to_json({"kind": kind, "step": step} | values) + "\n")
        self.lines.flush()
        scalars = {}
        for name, value in values.items():
            if isinstance(value, (int, float)):
                scalars[f"{kind}/{name}"] = float(value)
                self.board.add_scalar(f"{kind}/{name}", float(value), step)
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


def _cut_log(path: Path, step: int) -> None:
    """Drop what a killed run logged after `step`, which is made again, and a line that was cut."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))


def _start_wandb(project: str, folder: Path, settings: dict) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb: pip install wandb, or leave --wandb away") from None
    name = folder.name
    return wandb.init(
        project=project, name=name, id=name, resume="allow", config=settings, dir=str(folder)
    )


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop: of a terminal that closes too, unless `nohup` ignores it.
    Windows has two of them."""
    names = ["SIGTERM", "SIGINT", "SIGUSR1"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        names.append("SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def leave_process_group(worker: int) -> None:
    """For a loader's workers: a launcher's signal to the trainer's process group must not end them
    before the trainer's step ends. The default handlers stay, by which the loader ends them."""
    if hasattr(os, "setsid"):
        os.setsid()
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)


class StopSignal:
    """Signals ask the loop to stop at its next safe point; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in stop_signals():
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()


def _leave_terminal() -> None:
    """Nobody reads what is written to a terminal that closed, and writing to it is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # and no file or pipe
            os.dup2(nowhere, stream)


def environment_record(device: torch.device | None = None) -> dict:
    """Versions, machine and git commit that a number was made with, on `device`, a card or None."""
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        commit = answer.stdout.strip() or None
    name = platform.processor() or platform.machine()
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "git_commit": commit,
    }


def check_progress(state: dict, needed: tuple[str, ...], iterations: int, path: Path) -> None:
    """UserError unless a checkpoint is a run's, within an epoch of this many iterations."""
    for key in needed:
        if key not in state:
            raise UserError(f"--resume_from {path}: no run to go on from (no {key})")
    kinds: dict[str, Any] = dict.fromkeys(("settings", "best_metrics", "metrics"), dict)
    kinds |= dict.fromkeys(("epoch", "iteration", "step", "validated"), int)
    kinds["best"] = (int, float)
    for key, kind in kinds.items():
        value = state[key]
        if not isinstance(value, kind) or (kind is int and value < -1):
            raise UserError(f"--resume_from {path}: damaged, its {key} cannot be {value!r:.40}")
    if state["iteration"] > iterations:
        raise UserError(
            f"--resume_from {path}: stands at iteration {state['iteration']} of an epoch that now "
            f"has {iterations}; give its --iterations_per_epoch, --batch_size and ranks"
        )


def check_resumed_data(old: dict, new: dict, path: Path) -> None:
    """UserError where a checkpoint's data facts are not this run's. One without a word on how its
    photos were stored was trained on 8 bits of linear light."""
    old = {"rgb_dtype": "uint8", "rgb_encoding": "linear"} | old
    for key in ("rgb_norm", "rgb_dtype", "rgb_encoding", "wavelengths"):
        if old.get(key) != new[key]:
            found = f"trained with {key} {old.get(key)}, not {new[key]}"
            raise UserError(f"--resume_from {path}: {found}")


def rng_state() -> dict:
    """State of this process's generators of torch, CUDA's included; set_rng_state restores it."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
