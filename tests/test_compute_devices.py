"""Where a run computes: devices, precision, compiling, memory."""

import os
from functools import partial

import psutil
import pytest
import torch
from conftest import config

import compute_devices as devices
from common_utils_v32 import UserError
from compute_devices import Ranks, is_out_of_memory
from optimized_dataloader import train_loader
from training_runs import environment_record

ON_THE_CPU = partial(devices.errors_in_one_line, torch.device("cpu"))


# --- devices


@pytest.mark.parametrize("name", ["tpu!", "mps", "xpu"])
def test_devices_that_are_not_supported_are_named(name):
    with pytest.raises(UserError, match=f"--device {name}: choose auto, cpu, cuda"):
        devices.resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a usable card")
def test_no_card_is_one_line_with_the_reason():
    with pytest.raises(UserError, match=r"--device cuda: no CUDA device .*\(.+\); use"):
        devices.resolve_device("cuda")


@pytest.fixture
def one_card(monkeypatch):
    """A machine that seems to have one card; -> what it says of itself, to change."""
    card = {"capability": (9, 0), "trouble": None}

    def init():
        if card["trouble"]:
            raise RuntimeError(card["trouble"])

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not card["trouble"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Some Card")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return card


def test_cards_that_do_not_serve_are_one_line(one_card):
    assert devices.resolve_device("auto") == torch.device("cuda", 0)
    with pytest.raises(UserError, match="has 1 CUDA"):
        devices.resolve_device("cuda:1")
    one_card["capability"] = (6, 1)
    with pytest.raises(UserError, match="Some Card has compute capability 6.1, below 7.0"):
        devices.resolve_device("cuda")
    one_card["trouble"] = "The NVIDIA driver on your system is too old (found version 11040).\nGo"
    with pytest.raises(UserError, match=r"driver on your system is too old \(found version 11040"):
        devices.resolve_device("cuda")


def test_on_the_cpu_a_card_is_neither_named_nor_fed(one_card, staged):
    assert environment_record(torch.device("cpu"))["device"] != "Some Card"
    assert environment_record(torch.device("cuda", 0))["device"] == "Some Card"
    loader = train_loader(config(staged, num_workers=-1)).loader
    assert not loader.pin_memory and loader.num_workers == 0


@pytest.fixture
def determinism():
    """Puts torch's flags back."""
    cuda = torch.backends.cuda
    yield
    torch.use_deterministic_algorithms(False)
    cuda.enable_mem_efficient_sdp(True)
    cuda.enable_cudnn_sdp(True)


def test_float32_means_float32_and_deterministic_means_it(determinism, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    devices.prepare_cuda()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    devices.prepare_cuda(deterministic=True)
    x = torch.zeros(4)
    with (
        pytest.raises(UserError, match="--deterministic: put_.*no deterministic kernel on cpu"),
        ON_THE_CPU(),
    ):
        x.put_(torch.tensor([1, 1]), torch.ones(2))


def test_a_step_out_of_memory_says_what_to_change():
    with (
        pytest.raises(UserError, match="out of memory on cpu: lower --batch_size.*checkpoint"),
        ON_THE_CPU(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    with pytest.raises(RuntimeError, match="shapes"), ON_THE_CPU():
        raise RuntimeError("shapes differ")


# --- compiling


@pytest.fixture
def eager_again():
    yield
    torch.compiler.set_stance("default")


def compile_it(network, trial, **settings):
    return devices.compile_in_place(network, torch.device("cpu"), Ranks(), trial, **settings)


def test_a_network_that_does_not_compile_goes_on_in_eager_mode(eager_again, monkeypatch, capsys):
    monkeypatch.setattr(devices, "missing_compiler", lambda device: "")
    network = torch.nn.Linear(2, 2)

    def fails():
        raise RuntimeError("the backend\nbroke")

    assert not compile_it(network, fails, wanted=True)
    said = capsys.readouterr().err
    assert "going on without torch.compile (RuntimeError: the backend broke)" in said
    assert network(torch.ones(1, 2)).shape == (1, 2)


class Doubling(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_backend_that_fails_is_not_asked_again(eager_again, monkeypatch):
    monkeypatch.setattr(devices, "missing_compiler", lambda device: "")

    def broken(graph, inputs):
        raise RuntimeError("the backend broke")

    def compile_so(network, mode=None):
        network._compiled_call_impl = torch.compile(network._call_impl, backend=broken)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_so)
    network, x = Doubling(), torch.ones(1, 2)
    assert not compile_it(network, lambda: network(x), wanted=True)
    assert network(x).shape == (1, 2)


def test_out_of_memory_while_compiling_is_no_fault_of_the_compiler(monkeypatch):
    monkeypatch.setattr(devices, "missing_compiler", lambda device: "")

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_it(torch.nn.Linear(2, 2), fails, wanted=True)


def test_a_missing_compiler_is_said_or_an_error(monkeypatch, capsys):
    monkeypatch.setattr(devices, "missing_compiler", lambda device: "a C++ compiler")
    network = torch.nn.Linear(2, 2)
    assert not compile_it(network, print, wanted=None)  # a CPU is not compiled for by default
    with pytest.raises(UserError, match="--compile_model: it needs a C++".replace("+", r"\+")):
        compile_it(network, print, wanted=True)
    with pytest.raises(UserError, match="--compile_model: experts break it; give --no-compile"):
        compile_it(network, print, wanted=True, obstacle="experts break it")
    assert capsys.readouterr().out == ""


def test_compiling_says_how_long_it_took(capsys):
    network = torch.nn.Linear(2, 2)
    ran = []
    keys = list(network.state_dict())
    assert compile_it(network, lambda: ran.append(1), wanted=True)
    assert ran and "compiled in 0 s" in capsys.readouterr().err
    assert list(network.state_dict()) == keys


def test_a_trial_step_leaves_no_gradients():
    network = torch.nn.Conv2d(3, 5, 3)
    devices.trial_step(network, (2, 3, 8, 8), torch.device("cpu"), torch.bfloat16)
    assert network.weight.grad is None


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
