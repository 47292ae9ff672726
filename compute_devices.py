"""Where a run computes: its place among other processes, its device and precision, compiling, and
the memory that it may take."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common_utils_v32 import UserError

# Longest that a rank waits for another: it may read more data, score longer scenes, or save.
GROUP_PATIENCE = datetime.timedelta(minutes=20)
LEAST_CAPABILITY = (7, 0)  # of a card: the first with the kernels that PyTorch's builds hold
# What a CPU's allocator and cuBLAS say in a plain RuntimeError.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
NOT_DETERMINISTIC = "does not have a deterministic implementation"


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of a run: torchrun's, or one process alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def announced(cls) -> Ranks:
        """The place that torchrun gives in the environment, if it started this process."""
        names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        return cls(*(int(os.environ.get(name, default)) for name, default in names))

    def join(self, device: torch.device) -> None:
        """Meet the other ranks, if any. Objects and flags go over gloo, a card's gradients over
        NCCL, whose threads no fork survives: a loader's workers have to run by now."""
        if self.world_size == 1:
            return
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=GROUP_PATIENCE, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=GROUP_PATIENCE)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag: is it set on any rank?"""
        if self.world_size == 1:
            return flags
        counts = self.sum(torch.tensor(flags, dtype=torch.float32))
        return tuple((counts > 0).tolist())

    def gather(self, item: Any) -> list:
        """Every rank's picklable item, in rank order, on every rank."""
        items = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def gather_lists(self, items: list) -> list:
        """The items of every rank's list, in rank order, on every rank."""
        return [item for part in self.gather(items) for item in part]

    def agree(self, value: Any, what: str) -> None:
        """UserError unless all ranks hold the same value; else some would wait for ever."""
        values = [str(other) for other in self.gather(value)]
        if len(set(values)) > 1:
            found = ", ".join(values)
            raise UserError(f"{what} differs between ranks: {found}; use a folder all of them see")

    def leave(self) -> None:
        if self.world_size > 1:
            dist.barrier()  # rank 0 may still save, and a launcher may end the job with any rank
            dist.destroy_process_group()


def distribute(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The model as all ranks train it together, with rank 0's weights and buffers. Buffers do not
    change in training, so they are sent once, not at every forward."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    device_ids = [device] if device.type == "cuda" else None
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    new = "forward_sync_buffers"  # of torch 2.13, which warns of the old name
    never: dict[str, Any] = {new if new in names else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=device_ids, **never)


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """auto, cpu, cuda or cuda:N -> device; plain cuda under torchrun is the local rank's card.
    UserError for other names, and for a card that is not there, too old, or without a driver."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda and shutil.which("nvidia-smi"):
            print(f"no CUDA device is usable ({_cuda_trouble()}): on the CPU", file=sys.stderr)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        device = _check_card(name, local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def _check_card(name: str, index: int) -> torch.device:
    trouble = _cuda_trouble()
    if trouble:
        raise UserError(f"--device {name}: no CUDA device is usable here ({trouble}); use cpu")
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(f"--device cuda:{index}: this machine has {count} CUDA devices")
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        raise UserError(
            f"--device cuda:{index}: {torch.cuda.get_device_name(index)} has compute capability "
            f"{capability[0]}.{capability[1]}, below 7.0; use --device cpu"
        )
    return torch.device("cuda", index)


def _cuda_trouble() -> str:
    """Why CUDA does not work here, in torch's words; empty where it does."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(". ")
    return "" if torch.cuda.device_count() else "no card is visible"


def prepare_cuda(deterministic: bool = False) -> None:
    """CUDA's settings of a process, before its first CUDA tensor.

    Allocator: expandable segments alone, unless the user set something; with max_split_size_mb
    beside them large merged blocks would not be used again, and reserved memory would grow.
    float32 means float32: no TF32 in convolutions either. Deterministic: an operator without a
    deterministic kernel is an error."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # torch's newer name for the same
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward is not
        torch.backends.cuda.enable_cudnn_sdp(False)


def use_threads(count: int | None) -> None:
    """Let torch compute with so many threads; None: as it would. UserError below 1."""
    if count is not None and count < 1:
        raise UserError(f"--threads {count}: give 1 or more")
    if count is not None:
        torch.set_num_threads(count)


def autocast_type(wanted: bool, name: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision (`name`: auto, bf16 or fp16), or None for float32."""
    if not wanted:
        return None
    if name == "bf16":
        return torch.bfloat16
    if name == "fp16":
        return torch.float16
    if device.type == "cpu":  # auto: bfloat16 is slow there
        return None
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def missing_compiler(device: torch.device) -> str:
    """What torch.compile would need and this machine lacks; empty where nothing is missing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton  # takes a while

        if not has_triton():
            return "Triton"
    names = (os.environ.get("CXX", ""), "g++", "clang++", "cc")
    return "" if any(shutil.which(name) for name in names) else "a C++ compiler"


def first_output(output: Any) -> Tensor:
    """A model's cube, where it gives a scale beside it."""
    return output[0] if isinstance(output, tuple) else output


def trial_step(
    network: nn.Module, shape: tuple[int, ...], device: torch.device, amp: torch.dtype | None
) -> None:
    """Forward and backward of zeros, to compile what is to be compiled; gradients are dropped."""
    rgb = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    alone: contextlib.AbstractContextManager = contextlib.nullcontext()
    if isinstance(network, DistributedDataParallel):
        alone = network.no_sync()  # another rank may fail
    with alone:
        with torch.autocast(device.type, amp, enabled=amp is not None):
            output = network(rgb)
        first_output(output).float().mean().backward()
    network.zero_grad(set_to_none=True)


def compile_in_place(
    network: nn.Module,
    device: torch.device,
    ranks: Ranks,
    trial: Callable[[], None],
    *,
    wanted: bool | None,
    mode: str | None = None,
    obstacle: str = "",
) -> bool:
    """Compile without changing the state dict's keys, try it by `trial`, and say so; True when it
    is on. `wanted` None is "on CUDA". Where `trial` fails, all ranks go on in eager mode.

    UserError where it is asked for and there is an `obstacle` in the model, or no compiler."""
    if not (device.type == "cuda" if wanted is None else wanted):
        return False
    trouble = obstacle or missing_compiler(device)
    if trouble and wanted:
        if not obstacle:
            trouble = f"it needs {trouble}, which is not installed"
        raise UserError(f"--compile_model: {trouble}; give --no-compile_model")
    start = time.monotonic()
    if not trouble:
        _say(ranks, "compiling the model, which takes a minute or more (--no-compile_model: not)")
        network.compile(mode=mode)
        try:
            trial()
        except Exception as error:  # a compiler raises kinds of its own
            if is_out_of_memory(error):
                raise
            trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if any(ranks.any(bool(trouble))):
        torch.compiler.set_stance("force_eager")
        reason = trouble or "it fails on another rank"
        _say(ranks, f"going on without torch.compile ({reason})")
        return False
    _say(ranks, f"compiled in {time.monotonic() - start:.0f} s")
    return True


def _say(ranks: Ranks, text: str) -> None:
    if ranks.is_main:
        print(text, file=sys.stderr, flush=True)


def memory_gb(device: torch.device) -> float:
    """Peak CUDA memory of this process, or its resident memory on a CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def free_memory() -> float:
    """Bytes of main memory that this process may still take."""
    return min(psutil.virtual_memory().available, cgroup_free())


def cgroup_free(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes left under the tightest memory limit, cgroup v1 or v2, file cache included; or inf."""
    free = math.inf
    if not membership.exists():
        return free
    for line in membership.read_text(encoding="utf-8").splitlines():
        controllers, place = line.split(":", 2)[1:]
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = top / place.lstrip("/")
        for folder in (inner, *inner.parents):  # a container may see only the top one
            if folder.is_relative_to(top) and (folder / names[0]).exists():
                free = min(free, _free_in(folder, *names))
    return free


def _free_in(folder: Path, limit: str, usage: str, cache: str) -> float:
    """Bytes left in one cgroup, from the files of these names."""
    most = float((folder / limit).read_text(encoding="utf-8").replace("max", "inf"))
    used = int((folder / usage).read_text(encoding="utf-8"))
    rows = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    statistics = dict(row.split() for row in rows)
    return most - used + int(statistics.get(cache, 0))


def free_cuda_memory(device: torch.device) -> float:
    """Bytes of a card's memory that are free, or torch's own without being used."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had no memory left; some raise a plain RuntimeError that says so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return type(error) is RuntimeError and any(text in str(error) for text in OUT_OF_MEMORY)


@contextlib.contextmanager
def errors_in_one_line(device: torch.device) -> Iterator[None]:
    """What training may lack of its machine becomes a UserError that says what to change. A loader
    worker that was killed is told by a signal, so that the error comes up anywhere in a step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "DataLoader" in str(error):
            raise UserError(
                f"{str(error).splitlines()[0].rstrip('. ')}: memory or /dev/shm ran out perhaps; "
                "try --num_workers 0"
            ) from None
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory on {device}: lower --batch_size (and raise --accumulate_steps), "
                "or give --use_checkpoint"
            ) from None
        if NOT_DETERMINISTIC in str(error):
            operator = str(error).split(NOT_DETERMINISTIC)[0].strip()
            raise UserError(
                f"--deterministic: {operator} has no deterministic kernel on {device}; "
                "give --no-deterministic"
            ) from None
        raise
