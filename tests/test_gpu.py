"""On a CUDA device: the same numbers as on a CPU, no waiting, memory that is bounded."""

import copy

import numpy as np
import pytest
import torch
from conftest import write_raw_arad
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from training_helpers import TRAINERS, after_step, assert_same, parts, settings, stop_after

import common_utils_v32 as common
import compute_devices as devices
import sparse_attention
from compute_devices import Ranks
from frame_prediction import PredictionOptions, load_model, plan_tile, predict
from hsifusion_v252_complete import create_hsifusion_lightning_pro
from optimized_dataloader import MSTPlusPlusLoss, RawBatch, prepare_batch
from sharp_v322_hardened import SHARPv32Trainer, create_sharp_v32
from training_runs import RunFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is usable here"),
]
CUDA = torch.device("cuda", 0)
CREATE = {"hsifusion": create_hsifusion_lightning_pro, "sharp": create_sharp_v32}
MOST_LAUNCHES = {"hsifusion": 2300, "sharp": 3000}
HALF = [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)]


@pytest.fixture(autouse=True)
def float32_means_float32():
    devices.prepare_cuda()
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(params=CREATE)
def name(request):
    return request.param


def model_and_data(name, count=2, side=96):
    """A tiny model on the CPU that has a direct path, and a batch that it was fitted on."""
    torch.manual_seed(0)
    model = CREATE[name]("tiny")
    rgb = torch.rand(count, 3, side, side)
    cube = (torch.rand(31, 3) @ rgb.flatten(2)).view(count, 31, side, side) / 3 + 0.01
    model.fit_spectral_path(rgb, cube)
    return model, rgb, cube


def loss_of(model, rgb, cube, amp=None):
    with torch.autocast(rgb.device.type, amp, enabled=amp is not None):
        pred = model(rgb)
    return pred, MSTPlusPlusLoss()(pred, cube) + model.auxiliary_loss()


def gradients(model):
    return {key: p.grad.detach().cpu() for key, p in model.named_parameters()}


def relative(found, expected):
    """The difference of two dicts of tensors over the length of the second."""
    error = sum((found[key] - expected[key]).double().square().sum() for key in expected)
    return (error / sum(x.double().square().sum() for x in expected.values())).sqrt().item()


# --- the same numbers


@pytest.mark.parametrize("tf32, forward, backward", [(False, 2e-5, 1e-3), (True, 5e-3, 5e-2)])
def test_forward_and_gradients_are_the_cpus(name, tf32, forward, backward):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    model, rgb, cube = model_and_data(name)
    other = copy.deepcopy(model).to(CUDA)
    pred, loss = loss_of(model, rgb, cube)
    found, loss_there = loss_of(other, rgb.to(CUDA), cube.to(CUDA))
    loss.backward()
    loss_there.backward()
    assert ((found.cpu() - pred).abs() <= forward * (1 + pred.abs())).all()
    assert relative(gradients(other), gradients(model)) < backward
    with torch.no_grad():
        expected, found = model.eval()(rgb), other.eval()(rgb.to(CUDA)).cpu()
    assert ((found - expected).abs() <= forward * (1 + expected.abs())).all()


@pytest.mark.parametrize("amp, limit", HALF)
def test_half_precision_is_close_and_its_gradients_are_finite(name, amp, limit):
    model, rgb, cube = model_and_data(name)
    model, rgb, cube = model.to(CUDA), rgb.to(CUDA), cube.to(CUDA)
    expected, _ = loss_of(model, rgb, cube)
    pred, loss = loss_of(model, rgb, cube, amp)
    assert pred.dtype == torch.float32
    assert (pred - expected).abs().mean() <= limit * expected.abs().mean()
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_gradients_are_the_same_whether_backward_runs_inside_autocast_or_outside(name):
    found = []
    for inside in (False, True):
        model, rgb, cube = model_and_data(name)
        model = model.to(CUDA)
        _, loss = loss_of(model, rgb.to(CUDA), cube.to(CUDA), torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16, enabled=inside):
            loss.backward()
        found.append(gradients(model))
    assert relative(found[1], found[0]) < 1e-2


def dense_reference(q, k, v, mode, frame, ratio=0.9, side=7):
    """Attention by a full matrix of scores and masks, in float64 on the CPU."""
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mode == "topk":
        least = scores.topk(sparse_attention.keys_to_keep(k.shape[1], ratio)).values[..., -1:]
        return scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ v
    place = torch.arange(frame[0] * frame[1])
    rows, columns = place // frame[1], place % frame[1]
    near = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs()) <= side // 2
    scores = scores.masked_fill(~near, -1e30)
    if mode == "sparsemax":
        return sparse_attention.sparsemax(scores) @ v
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("mode", ["topk", "local", "sparsemax"])
def test_attention_equals_a_dense_reference(mode):
    torch.manual_seed(0)
    frame = (20, 22)
    tensors = [torch.randn(3, 440, 16, device=CUDA, requires_grad=True) for _ in range(3)]
    out = sparse_attention.sparse_attention_topk_streaming(
        *tensors, sparse_mode=mode, spatial_shape=frame
    )
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), tensors)
    twins = [tensor.detach().double().cpu().requires_grad_() for tensor in tensors]
    expected = dense_reference(*twins, mode, frame)
    wanted = torch.autograd.grad((expected * weight.double().cpu()).sum(), twins)
    assert (out.cpu() - expected).abs().max() < 1e-5
    for gradient, want in zip(found, wanted, strict=True):
        assert (gradient.cpu() - want).abs().max() < 1e-4


def test_block_attention_without_sparsity_is_dense_and_with_it_is_the_cpus():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 440, 16) for _ in range(3))
    attend = sparse_attention.sparse_attention_topk_streaming
    on_gpu = [x.to(CUDA) for x in (q, k, v)]
    dense = attend(*on_gpu, sparse_mode="block", sparsity_ratio=0.0)
    torch.testing.assert_close(
        dense.cpu(), scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=0
    )
    sparse = attend(*on_gpu, sparse_mode="block")
    expected = attend(q, k, v, sparse_mode="block")
    torch.testing.assert_close(sparse.cpu(), expected, atol=1e-5, rtol=0)


def test_operators_pass_torchs_checks():
    q, k, v = (torch.randn(2, 64, 8, device=CUDA, requires_grad=True) for _ in range(3))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    topk, local = torch.ops.hsi.topk_attention.default, torch.ops.hsi.local_attention.default
    torch.library.opcheck(topk, (q, k, v, 7, 0.3, 32, 32), test_utils=checks)
    frame = [x.detach().unflatten(1, (8, 8)).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(local, (*frame, 3, 0.3, -1e30, False), test_utils=checks)


# --- steps


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_raw_arad(tmp_path_factory.mktemp("raw"), size=(160, 160))


def make_gpu_run(trainer, data, out, *more, device=CUDA):
    module, cfg = settings(trainer, data, out, "--device", str(device), *more)
    return module.Run(cfg, Ranks(), device, RunFolder.of(cfg.output_dir, cfg.experiment_name))


@pytest.fixture(params=TRAINERS)
def trainer(request, runs_in_this_process):
    return request.param


EAGER = ("--no-compile_model", "--amp_dtype", "bf16")


def test_no_step_waits_for_the_device(trainer, scenes, tmp_path, monkeypatch):
    more = ("--log_interval", 1000, "--epochs", 1, "--val_interval", 9, "--iterations_per_epoch", 6)
    run = make_gpu_run(trainer, scenes, tmp_path, *EAGER, *more)
    monkeypatch.setattr(run, "log_progress", lambda: None)

    def strict(count):
        torch.cuda.set_sync_debug_mode("error" if 2 <= count < 5 else "default")

    after_step(run, strict)
    try:
        run.train_epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == 6


def steps(trainer, data, out, count, *more):
    """Weights after `count` steps of a run of one epoch."""
    more = (*more, "--epochs", 1, "--iterations_per_epoch", count, "--optimizer", "adam")
    run = make_gpu_run(trainer, data, out, *more)
    run.train_epoch()
    return run, {key: x.float().cpu() for key, x in parts(run)[0].state_dict().items()}


@pytest.mark.parametrize("amp, scale_after", [("fp16", 0.5), ("bf16", 1.0)])
def test_infinite_gradients_leave_the_weights(trainer, amp, scale_after, scenes, tmp_path):
    run = make_gpu_run(trainer, scenes, tmp_path, "--amp_dtype", amp, "--no-compile_model")
    model, scaler = parts(run)[0], getattr(run, "engine", run).scaler
    first = next(model.parameters())
    first.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    scale = scaler.get_scale()
    stop_after(run, 1)
    run.train_epoch()
    assert_same(dict(model.state_dict()), before)
    assert scaler.get_scale() == scale * scale_after


def finished(trainer, data, out, *more, device=CUDA):
    run = make_gpu_run(trainer, data, out, *EAGER, *more, device=device)
    assert run.train() == 0
    return common.read_checkpoint(out / "run" / "last.ckpt")


@pytest.mark.parametrize("between, exact", [("cuda:0", True), ("cpu", False)])
def test_a_resumed_run_ends_like_an_undisturbed_one(trainer, between, exact, scenes, tmp_path):
    more = ("--no-use_amp", "--deterministic")
    devices.prepare_cuda(deterministic=True)
    try:
        whole = finished(trainer, scenes, tmp_path / "whole", *more)
        for device, until in ((CUDA, 3), (torch.device(between), 5)):
            flags = (*EAGER, *more, "--resume_from", "auto")
            run = make_gpu_run(trainer, scenes, tmp_path / "cut", *flags, device=device)
            stop_after(run, until)
            assert run.train() == 75
        cut = finished(trainer, scenes, tmp_path / "cut", *more, "--resume_from", "auto")
    finally:
        torch.use_deterministic_algorithms(False)
    if exact:
        for key in ("state_dict", "ema", "step", "epoch"):
            assert_same(cut[key], whole[key])
    else:
        assert relative(cut["state_dict"], whole["state_dict"]) < 1e-2


def count_launches(run):
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.name in ("cudaLaunchKernel", "cuLaunchKernel") for event in found.events())


def test_a_step_launches_few_kernels(name):
    model, rgb, cube = model_and_data(name, 20, 128)
    model, rgb, cube = model.to(CUDA), rgb.to(CUDA), cube.to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    average = common.make_average(model, 0.999, 1)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, rgb, cube)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update()

    step()
    assert count_launches(step) <= MOST_LAUNCHES[name]


def test_a_batch_is_prepared_in_few_launches_and_as_on_the_cpu():
    rgb, cube = torch.randint(0, 255, (8, 64, 64, 3)).to(torch.uint8), torch.rand(8, 64, 64, 31)
    ranges, codes = torch.tensor([[3.0, 250.0]]).repeat(8, 1), torch.arange(8).to(torch.uint8)
    batch = RawBatch(rgb, cube.half(), codes, ranges, torch.arange(8))
    pinned = RawBatch(*(x.pin_memory() for x in batch))
    found = prepare_batch(pinned, CUDA)
    for there, here in zip(found, prepare_batch(batch), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)
    assert count_launches(lambda: prepare_batch(pinned, CUDA)) <= 15


def test_memory_does_not_grow_over_many_steps(name):
    model, rgb, cube = model_and_data(name, 4, 128)
    model = model.to(CUDA)
    engine = torch.optim.AdamW(model.parameters(), fused=True)
    torch.cuda.reset_peak_memory_stats()
    for number in range(200):
        count = 1 + number % 4  # batches of several sizes
        loss_of(model, rgb[:count].to(CUDA), cube[:count].to(CUDA), torch.bfloat16)[1].backward()
        engine.step()
        engine.zero_grad(set_to_none=True)
    limit = 1.3 * torch.cuda.max_memory_allocated() + 512 * 2**20
    assert torch.cuda.memory_reserved() <= limit


def test_a_wrapped_rank_with_accumulation_equals_one_big_batch(name, monkeypatch):
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}.items():
        monkeypatch.setenv(key, value)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, device_id=CUDA)
    try:
        found = []
        for groups, wrapped in ((2, True), (1, False)):
            model, rgb, cube = model_and_data(name, 4)
            network = model = model.to(CUDA)
            if wrapped:
                network = devices.distribute(model, CUDA)
            rgb, cube = rgb.to(CUDA).chunk(groups), cube.to(CUDA).chunk(groups)
            if name == "sharp":
                SHARPv32Trainer(network, MSTPlusPlusLoss(), ema_decay=0).train_step(
                    list(zip(rgb, cube, strict=True))
                )
            else:
                for x, y in zip(rgb, cube, strict=True):
                    (MSTPlusPlusLoss()(network(x), y) / groups).backward()
            found.append(gradients(model))
        assert relative(*found) < 1e-3
    finally:
        torch.distributed.destroy_process_group()


# --- prediction


@pytest.fixture
def predictor(name, tmp_path):
    model, _, _ = model_and_data(name)
    path = tmp_path / "m.ckpt"
    facts = {"rgb_norm": "unit", "wavelengths": list(range(400, 701, 10))}
    state = {"model": name, "data": facts, "state_dict": model.state_dict(), "ema": None}
    common.save_checkpoint(path, state | {"model_config": vars(model.config)})
    return load_model(str(path), CUDA)


def predicted(model, rgb, options=None):
    _, height, width = rgb.shape

    def source(top, bottom, left, right):
        return rgb[:, top:bottom, left:right]

    def allocate(channels):
        return np.empty((channels, height, width), np.float32)

    return predict(model, source, (height, width), options or PredictionOptions(), allocate)


def test_the_same_photo_twice_takes_the_same_tile_and_gives_the_same_cube(predictor):
    rgb = torch.rand(3, 700, 900)
    planned = plan_tile(predictor, (700, 900), PredictionOptions())
    first, second = predicted(predictor, rgb), predicted(predictor, rgb)
    assert first[1] == second[1] == planned
    assert np.array_equal(first[0], second[0])


def test_too_little_memory_halves_the_tile_and_other_errors_are_raised(predictor, capsys):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    used = torch.cuda.memory_allocated()
    side = 1024
    try:
        share = (used + 0.4 * predictor.pixel_bytes * side**2) / total
        torch.cuda.set_per_process_memory_fraction(share)
        cube, tile = predicted(predictor, torch.rand(3, side, side), PredictionOptions(side))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tile < side and np.isfinite(cube).all()
    assert "out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="size"):
        predicted(predictor, torch.rand(4, 128, 128))


# --- compiled: these take longest


@pytest.mark.parametrize("flags, limit", [(("--no-use_amp",), 1e-3), (EAGER[1:], 2e-2)])
def test_compiled_steps_equal_eager_ones(trainer, flags, limit, scenes, tmp_path):
    _, eager = steps(trainer, scenes, tmp_path / "eager", 3, *flags, "--no-compile_model")
    run, compiled = steps(trainer, scenes, tmp_path / "compiled", 3, *flags, "--compile_model")
    assert run.compiled
    assert relative(compiled, eager) < limit


def test_one_graph_serves_many_steps_and_a_validation(trainer, scenes, tmp_path):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    more = ("--epochs", 1, "--iterations_per_epoch", 20, "--compile_model", *EAGER[1:])
    assert make_gpu_run(trainer, scenes, tmp_path, *more).train() == 0
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_cuda_graphs_run(scenes, tmp_path, runs_in_this_process):
    flags = ("--compile_mode", "reduce-overhead", *EAGER[1:])
    run, weights = steps("sharp_training_script_fixed", scenes, tmp_path, 8, *flags)
    assert run.compiled and all(x.isfinite().all() for x in weights.values())
