"""Train SHARP v3.2.2 on a staged data set or a raw ARAD-1K folder.

One process (a laptop, or one GPU):
    python sharp_training_script_fixed.py --data_root data/staged --model_size tiny --epochs 20
Four GPUs of one machine; --batch_size is per process:
    python -m torch.distributed.run --nproc_per_node=4 \\
        sharp_training_script_fixed.py --data_root data/staged --memory_mode lazy
Go on after a stop, a crash or a preemption, bit for bit on a CPU:
    the same command and --resume_from auto

A run lives in <output_dir>/<experiment_name>: config.json, last.ckpt, best.ckpt, best.safetensors,
metrics.jsonl, summary.json, run.png and TensorBoard files. SIGTERM, SIGINT and SIGUSR1 finish the
step, save, and exit with code 75.

On a CPU that other programs use too, set GOMP_SPINCOUNT=1000 (or OMP_WAIT_POLICY=PASSIVE): OpenMP's
threads wait busily, and two trainers on two cores slow each other tenfold without it."""

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import common_utils_v32 as common
import compute_devices as devices
import sharp_v322_hardened as sharp
from common_utils_v32 import opt
from optimized_dataloader import DataConfig, prepare_batch
from sharp_v322_hardened import COMPILE_MODES, SIZES, SHARPv32Config, SHARPv32Trainer
from training_state import RunState, complete_settings, run_trainer

MODEL = "sharp"
_data, _model = partial(opt, group="data"), partial(opt, group="model")
_learn, _speed = partial(opt, group="optimisation"), partial(opt, group="speed")
_validation, _run = partial(opt, group="validation"), partial(opt, group="run")


@dataclasses.dataclass
class TrainConfig(DataConfig):
    """Settings of a run; every field is a flag, those of the data set's configuration too."""

    data_root: str = _data("", "staged or raw ARAD-1K (default: $HSI_DATA_DIR or ./data/ARAD_1K)")
    batch_size: int = _data(20, "patches per batch and process")

    model_size: str = _model("base", "preset of the model's fields", choices=tuple(SIZES))

    epochs: int = _learn(300, "length of the run")
    accumulate_steps: int = _learn(1, "batches per optimizer step")
    optimizer: str = _learn("adamw", "update rule", choices=("adamw", "adam"))
    lr: float | None = _learn(None, "peak learning rate (default: 8e-4 for tiny, else 4e-4)")
    eta_min: float = _learn(1e-6, "learning rate at the end of the cosine")
    warmup_epochs: float | None = _learn(
        None, "epochs of linear warm-up (default: 5, at most a twentieth of the run)"
    )
    weight_decay: float = _learn(1e-4, "on weight matrices; never on norms, biases, layer scales")
    gradient_clip: float = _learn(1.0, "largest gradient norm; 0 is no clipping")
    train_floor: float = _learn(1e-3, "smallest denominator of the training MRAE")
    train_floor_start: float | None = _learn(None, "its value at first, falling over the warm-up")
    ema_decay: float = _learn(0.999, "decay of the averaged weights; 0 is no averaging")
    ema_update_every: int = _learn(1, "steps between two updates of the average")

    use_amp: bool = _speed(True, "mixed precision where --amp_dtype gives one")
    amp_dtype: str = _speed(
        "auto",
        "auto: on CUDA bf16, or fp16 where that is missing; on a CPU float32",
        choices=("auto", "bf16", "fp16"),
    )
    compile_model: bool | None = _speed(
        None, "torch.compile; by default on for CUDA, or with --compile_mode"
    )
    compile_mode: str | None = _speed(
        None, "mode of torch.compile; giving one turns it on", choices=COMPILE_MODES
    )
    use_channels_last: bool = _speed(True, "weights of convolutions in channels_last memory")
    device: str = _speed("auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = _speed(None, "threads of a CPU (default: all cores)")
    deterministic: bool = _speed(False, "deterministic kernels alone, an error where there is none")

    val_interval: int = _validation(1, "epochs between validations")
    val_crop_border: int = _validation(128, "pixels removed on each side before scoring")
    metric_floor: float = _validation(1e-6, "smallest denominator of the reported MRAE")

    output_dir: str = _run("./experiments", "folder of runs")
    experiment_name: str = _run("", "folder of this run (default: sharp)")
    resume_from: str | None = _run(None, "checkpoint to go on from; `auto`: last.ckpt if any")
    init_from: str | None = _run(None, "weights to start a new run from, .ckpt or .safetensors")
    log_interval: int = _run(50, "optimizer steps between log lines")
    save_minutes: float = _run(10.0, "minutes between saves inside an epoch")
    wandb: str | None = _run(None, "mirror the log to this Weights & Biases project")

    def __post_init__(self) -> None:
        super().__post_init__()
        complete_settings(self, MODEL)


# The model's fields are flags too; one that is not given keeps the size's value.
NOT_FLAGS = ("in_channels", "out_channels", "compile_mode", "ema_update_every")
Settings = dataclasses.make_dataclass(
    "Settings", common.optional_fields(SHARPv32Config, skip=NOT_FLAGS), bases=(TrainConfig,)
)


class Run(RunState):
    """One training run: the model, its step engine, and the loop."""

    kind, parts = MODEL, ("engine",)

    def make_model(self, state: dict | None, resume: Path | None) -> None:
        """Model, what wraps it, its step engine and schedule."""
        cfg, device = self.cfg, self.device
        # The same weights on every rank: DDP broadcasts rank 0's, which start at the linear path.
        common.seed_everything(cfg.seed)
        skip = ("compile_mode",)  # the trainer compiles, not the engine
        self.model = self.create(sharp.create_sharp_v32, SHARPv32Config, skip).to(device)
        self.place_weights(self.model, state, resume)
        if cfg.use_channels_last:
            self.model.to(memory_format=torch.channels_last)
        network: nn.Module = self.model
        if self.ranks.world_size > 1:
            network = devices.distribute(self.model, device)
        self.amp = devices.autocast_type(cfg.use_amp, cfg.amp_dtype, device)
        self.compiled = self.compile(network)
        self.engine = SHARPv32Trainer(
            network,
            self.loss_fn,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            optimizer=torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam,
            amp_dtype=self.amp,
            grad_clip=cfg.gradient_clip,
            ema_decay=cfg.ema_decay,
            ema_update_every=cfg.ema_update_every,
        )
        self.average, self.trained = self.engine.average, [self.engine]
        common.seed_everything(cfg.seed + self.ranks.rank)  # dropout differs between ranks
        self.schedule = self.make_schedule(self.engine.optimizer)

    def compile(self, network: nn.Module) -> bool:
        """Compile the network where it is asked for, or pays, and works."""
        cfg, wanted = self.cfg, self.cfg.compile_model
        if wanted is None and cfg.compile_mode is not None:
            wanted = True
        shape = (cfg.batch_size, 3, cfg.patch_size, cfg.patch_size)
        trial = partial(devices.trial_step, network, shape, self.device, self.amp)
        return devices.compile_in_place(
            network, self.device, self.ranks, trial, wanted=wanted, mode=cfg.compile_mode
        )

    def train(self) -> int:
        start, done = time.monotonic(), False
        with self.bar:
            while self.epoch < self.cfg.epochs:
                done = self.train_epoch() and self.validate() and self.end_epoch()
                if not done:
                    break
        return self.finish(done, time.monotonic() - start)

    def train_epoch(self) -> bool:
        """The rest of the epoch; False when a signal stops it, after a whole optimizer step."""
        cfg = self.cfg
        self.engine.wrapped.train()
        self.train_loader.set_position(self.epoch, self.iteration)
        self.totals = torch.zeros(3, device=self.device)  # loss, MRAE, steps since the last line
        self.logged = (time.monotonic(), self.iteration)
        group = []
        for batch in self.train_loader:
            group.append(prepare_batch(batch, self.device))
            self.bar.update()
            done = self.iteration + len(group)
            if len(group) < cfg.accumulate_steps and done < self.iterations:
                continue
            self.train_step(group)
            self.iteration, group = done, []
            if self.step % cfg.log_interval == 0 or self.iteration == self.iterations:
                self.log_progress()
            stop, save = self.asked()
            if stop and self.iteration < self.iterations:
                return False
            if save:
                self.save("last.ckpt")
        return True

    def train_step(self, group: list) -> None:
        """One optimizer step on the batches of a group; the last group may be smaller."""
        self.loss_fn.step = self.step
        self.lr = self.engine.optimizer.param_groups[0]["lr"]
        try:
            result = self.engine.train_step(group)
        except FloatingPointError as error:
            self.say(self.sound.go_back(f"step {self.step}: {error}"))
        else:
            found = torch.stack([result["loss"], result["error"], torch.ones_like(result["loss"])])
            self.totals += found.where(found.isfinite().all(), 0)  # else the step is skipped
            self.norm = result["grad_norm"]
        self.schedule.step()
        self.step += 1

    def learnt(self) -> dict:
        engine = self.engine.state_dict()
        weights = {"state_dict": engine.pop("state_dict"), "ema": engine.pop("ema")}
        return weights | {"engine": engine}

    def learn_from(self, state: dict) -> None:
        weights = {"state_dict": state["state_dict"], "ema": state["ema"]}
        self.engine.load_state_dict(state["engine"] | weights)


def main() -> int:
    return run_trainer(Settings, Run, __doc__)


if __name__ == "__main__":
    common.run_cli(main)
