"""Where a run computes: devices, precision, compiling, memory."""

import os

import psutil
import pytest
import torch

import compute_devices as devices
from common_utils_v32 import UserError
from compute_devices import is_out_of_memory


def test_unusable_devices_are_named():
    with pytest.raises(UserError, match="tpu"):
        devices.resolve_device("tpu!")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="use cpu"):
            devices.resolve_device("cuda")


# --- memory


def test_free_memory_is_the_machines_within_the_limit_on_this_process(monkeypatch):
    available = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    for limit, free in ((float("inf"), 1000), (300, 300)):
        monkeypatch.setattr(devices, "cgroup_free", lambda limit=limit: limit)
        assert devices.free_memory() == free


def write_cgroup(folder, names, limit, usage, stat):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage, stat), strict=True):
        (folder / name).write_text(f"{value}\n", encoding="utf-8")


def test_cgroup_limits_of_both_versions_and_of_parents(tmp_path):
    member = tmp_path / "cgroup"
    names = ("memory.max", "memory.current", "memory.stat")
    write_cgroup(tmp_path / "v2" / "job", names, 1000, 700, "anon 1\ninactive_file 200")
    write_cgroup(tmp_path / "v2" / "job" / "step", names, "max", 500, "inactive_file 0")
    member.write_text("0::/job/step\n", encoding="utf-8")
    assert devices.cgroup_free(tmp_path / "v2", member) == 500
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    write_cgroup(tmp_path / "v1" / "memory" / "job", names, 900, 100, "total_inactive_file 50")
    member.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n", encoding="utf-8")
    assert devices.cgroup_free(tmp_path / "v1", member) == 850
    assert devices.cgroup_free(tmp_path / "none", tmp_path / "absent") == float("inf")


@pytest.mark.parametrize(
    "user, ours",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
def test_the_users_allocator_settings_win(monkeypatch, user, ours):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    devices.prepare_cuda()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == ours


@pytest.mark.parametrize(
    "error, halves",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (NotImplementedError("can't allocate memory"), False),  # a RuntimeError by birth
    ],
)
def test_only_an_allocators_word_counts_as_out_of_memory(error, halves):
    assert is_out_of_memory(error) == halves
