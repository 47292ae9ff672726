"""Sparse attention: exact against a dense masked reference, bounded in memory, two-dimensional
where it is local."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sparse_attention as sharp
from sparse_attention import (
    MASKED,
    TILE_SCORES,
    _local_backward,
    _local_forward,
    _topk_backward,
    _topk_forward,
    keys_to_keep,
    sparse_attention_topk_streaming,
    sparsemax,
)


def dense_reference(q, k, v, keep, scale=None):
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    threshold = scores.topk(keep).values[..., -1:]
    return scores.masked_fill(scores < threshold, -math.inf).softmax(-1) @ v


def window_reference(q, k, v, height, width, side, weights=lambda scores: scores.softmax(-1)):
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    near = ((y[:, None] - y).abs() <= side // 2) & ((x[:, None] - x).abs() <= side // 2)
    return weights((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~near, -1e30)) @ v


def tensors(*sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


def assert_same_with_gradients(f, g, inputs, atol=2e-5):
    a, b = f(*inputs), g(*inputs)
    grad = torch.randn(b.shape, dtype=b.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)
    for x, y in zip(
        torch.autograd.grad(a, inputs, grad), torch.autograd.grad(b, inputs, grad), strict=True
    ):
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(
    "n, ratio, keep", [(300, 0.9, 30), (300, 0.7, 90), (1, 0.9, 1), (5, 0.99, 1), (10, 0.0, 10)]
)
def test_number_of_keys_kept_has_no_rounding_surprise(n, ratio, keep):
    assert keys_to_keep(n, ratio) == keep


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 150),
    width=st.integers(1, 9),
    value_width=st.integers(1, 9),
    ratio=st.floats(0.01, 0.99),
    block=st.integers(1, 200),
    q_block=st.integers(1, 200),
    heads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_topk_equals_a_dense_masked_reference_for_any_block_sizes(
    n, width, value_width, ratio, block, q_block, heads, seed
):
    inputs = tensors(
        (heads, n, width),
        (heads, n, width),
        (heads, n, value_width),
        dtype=torch.float64,
        seed=seed,
    )
    assert_same_with_gradients(
        lambda *x: sparse_attention_topk_streaming(
            *x, ratio, block_size=block, q_block_size=q_block
        ),
        lambda *x: dense_reference(*x, keys_to_keep(n, ratio)),
        inputs,
        atol=1e-9,
    )


def test_topk_in_many_tiles_equals_the_reference(monkeypatch):
    monkeypatch.setitem(TILE_SCORES, "cpu", 4000)
    inputs = tensors((2, 300, 8), (2, 300, 8), (2, 300, 16))
    for block, q_block in ((2048, 1024), (64, 32), (7, 3)):
        assert_same_with_gradients(
            lambda *x, b=block, r=q_block: sparse_attention_topk_streaming(
                *x, 0.9, block_size=b, q_block_size=r
            ),
            lambda *x: dense_reference(*x, 30),
            inputs,
        )


def test_topk_caps_the_keys_and_ratio_0_does_not():
    inputs = tensors((2, 64, 8), (2, 64, 8), (2, 64, 8))
    assert_same_with_gradients(
        lambda *x: sparse_attention_topk_streaming(*x, 0.5, k_cap=5),
        lambda *x: dense_reference(*x, 5),
        inputs,
    )
    assert_same_with_gradients(
        lambda *x: sparse_attention_topk_streaming(*x, 0.0, k_cap=5),
        lambda *x: dense_reference(*x, 64),
        inputs,
    )


def test_keys_tied_at_the_threshold_are_all_kept():
    q, v = torch.ones(1, 40, 4), torch.eye(40)[None]
    k = torch.ones(1, 40, 4)
    k[:, :3] = 2.0  # three better keys, then 37 ties
    for block in (8, 2048):
        kept = (
            sparse_attention_topk_streaming(q, k, v, 0.9, block_size=block) > 0
        )  # K = 4, in the ties
        assert kept.all()
        assert (
            (sparse_attention_topk_streaming(q, k, v, 0.95, block_size=block) > 0).sum(-1) == 3
        ).all()
    assert (sparse_attention_topk_streaming(0 * q, k, v, 0.9) > 0).all()  # scores of exactly 0


def test_gradients_of_every_mode_in_float64():
    inputs = tensors((2, 30, 4), (2, 30, 4), (2, 30, 3), dtype=torch.float64)
    for kwargs in (
        {"sparsity_ratio": 0.7},
        {"sparse_mode": "block", "sparsity_ratio": 0.6, "block_size": 4},
        {"sparse_mode": "local", "window_size": 9},
        {"sparse_mode": "sparsemax", "window_size": 9},
        {"sparse_mode": "sparsemax", "window_size": 9, "sparsemax_pad_value": 0.3},
    ):
        assert torch.autograd.gradcheck(
            lambda *x, kw=kwargs: sparse_attention_topk_streaming(*x, **kw, spatial_shape=(5, 6)),
            inputs,
        )


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    side=st.sampled_from([1, 3, 7, 11]),
    heads=st.integers(1, 3),
)
def test_local_windows_see_2d_neighbours_and_never_wrap_round(height, width, side, heads):
    n = height * width
    inputs = tensors((heads, n, 4), (heads, n, 4), (heads, n, 5))
    for mode, weights in (("topk", lambda s: s.softmax(-1)), ("sparsemax", sparsemax)):
        assert_same_with_gradients(
            lambda *x, m=mode: sparse_attention_topk_streaming(
                *x,
                max_tokens=1 if n > 1 else 8192,
                window_size=side**2,
                spatial_shape=(height, width),
                sparse_mode=m,
            ),
            lambda *x, w=weights: window_reference(*x, height, width, side, w),
            inputs,
        )


def test_local_windows_in_many_strips_equal_the_reference(monkeypatch):
    monkeypatch.setitem(TILE_SCORES, "cpu", 20000)
    inputs = tensors((1, 33 * 40, 4), (1, 33 * 40, 4), (1, 33 * 40, 4))
    assert_same_with_gradients(
        lambda *x: sparse_attention_topk_streaming(*x, max_tokens=100, spatial_shape=(33, 40)),
        lambda *x: window_reference(*x, 33, 40, 7),
        inputs,
    )


def test_padding_the_frame_changes_nothing_that_lies_a_window_inside():
    q, k, v = tensors((1, 20 * 20, 4), (1, 20 * 20, 4), (1, 20 * 20, 4))

    def run(*x, shape):
        return sparse_attention_topk_streaming(*x, max_tokens=1, spatial_shape=shape)

    image = [
        F.pad(x.unflatten(1, (20, 20)), (0, 0, 0, 5, 0, 3), value=9.0).flatten(1, 2)
        for x in (q, k, v)
    ]
    padded = run(*image, shape=(23, 25)).unflatten(1, (23, 25))
    torch.testing.assert_close(
        padded[:, :17, :17], run(q, k, v, shape=(20, 20)).unflatten(1, (20, 20))[:, :17, :17]
    )


def test_sparsemax_is_the_projection_onto_the_simplex():
    scores = (
        torch.randn(50, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    )
    weights = sparsemax(scores)
    assert torch.allclose(weights.sum(-1), torch.ones(50, dtype=torch.float64))
    low, high = scores.min(-1, keepdim=True).values - 1, scores.max(-1, keepdim=True).values
    for _ in range(80):  # the threshold by bisection
        middle = (low + high) / 2
        above = (scores - middle).clamp_min(0).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    torch.testing.assert_close(weights, (scores - low).clamp_min(0))
    assert (weights == 0).any(-1).all()


def test_sparsemax_pad_value_takes_weight_from_border_pixels_only():
    q, k, v = tensors((1, 81, 4), (1, 81, 4), (1, 81, 4))
    masked, padded = (
        sparse_attention_topk_streaming(
            q,
            k,
            v,
            sparse_mode="sparsemax",
            window_size=9,
            spatial_shape=(9, 9),
            sparsemax_pad_value=value,
        ).unflatten(1, (9, 9))
        for value in (None, 50.0)
    )
    torch.testing.assert_close(masked[:, 1:-1, 1:-1], padded[:, 1:-1, 1:-1])
    assert padded[:, 0].abs().max() == 0 < masked[:, 0].abs().min()


@pytest.mark.parametrize("n", [256, 200])
def test_block_mode_attends_to_the_chosen_blocks_alone(n):
    q, k, v = tensors((2, n, 8), (2, n, 8), (2, n, n))
    v = torch.eye(n).expand(2, n, n).contiguous()
    weights = sparse_attention_topk_streaming(q, k, v, 0.75, sparse_mode="block", block_size=16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, n))  # nothing goes to padding
    blocks = F.pad(weights, (0, -n % 16)).unflatten(-1, (-1, 16)).sum(-1) > 0
    keep = keys_to_keep(-(-n // 16), 0.75)
    assert (blocks.sum(-1) == keep).all()
    for start in range(0, n, 32):  # the blocks with the best mean score, the same for a query block
        pooled_q = F.pad(q, (0, 0, 0, -n % 32))[:, start : start + 32].mean(1)
        pooled_k = torch.stack([part.mean(1) for part in k.split(16, 1)], 1)
        best = (pooled_k @ pooled_q[..., None])[..., 0].topk(keep).indices
        expected = torch.zeros(2, -(-n // 16), dtype=torch.bool).scatter_(1, best, True)
        assert (blocks[:, start : start + 32] == expected[:, None]).all()


def test_block_mode_costs_less_with_more_sparsity_and_ignores_max_tokens():
    q, k, v = tensors((1, 1024, 8), (1, 1024, 8), (1, 1024, 8))
    counts = []
    for ratio in (0.5, 0.9):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            sparse_attention_topk_streaming(q, k, v, ratio, sparse_mode="block", max_tokens=10)
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.3 * counts[0]


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(
    "kwargs, largest",
    [
        ({}, 2**18),
        ({"sparse_mode": "block"}, 16 * 2048 * 16),
        ({"sparse_mode": "local", "spatial_shape": (32, 64)}, 2**20),
    ],
)
def test_no_mode_allocates_n_x_n(kwargs, largest, monkeypatch):
    # run without the operators' wrapper, so that the mode sees inside them
    run = {"_topk_op": _topk_forward, "_local_op": _local_forward}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the tiles of one core
    n = 2048
    q, k, v = (x.detach() for x in tensors((1, n, 16), (1, n, 16), (1, n, 16)))
    for name, function in run.items():
        monkeypatch.setattr(sharp, name, function)
    with LargestTensor() as seen:
        sparse_attention_topk_streaming(q, k, v, 0.9, **kwargs)
    assert seen.elements <= largest < n * n
    with LargestTensor() as seen:
        if "sparse_mode" not in kwargs:
            out, threshold = _topk_forward(q, k, v, 205, 0.25, 2048, 1024)
            _topk_backward(torch.ones_like(out), q, k, v, out, threshold, 205, 0.25, 2048, 1024)
        elif kwargs["sparse_mode"] == "local":
            image = [x.unflatten(1, (32, 64)) for x in (q, k, v)]
            out, nothing = _local_forward(*image, 7, 0.25, MASKED, False)
            _local_backward(torch.ones_like(out), *image, out, nothing, 7, 0.25, MASKED, False)
    assert seen.elements <= largest


def test_peak_memory_of_a_training_step_is_far_below_n_x_n(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    n = 4096
    q, k, v = tensors((1, n, 32), (1, n, 32), (1, n, 32))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        sparse_attention_topk_streaming(q, k, v).sum().backward()
    current = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        current += event.nbytes()
        peak = max(peak, current)
    assert 0 < peak < n * n * 4 / 4  # one N x N float32 matrix is four times the limit


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sparsity_ratio": 1.0}, "sparsity_ratio"),
        ({"sparsity_ratio": -0.1}, "sparsity_ratio"),
        ({"k_cap": 0}, "k_cap"),
        ({"block_size": 0}, "block_size"),
        ({"q_block_size": -1}, "q_block_size"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"window_size": 48}, "odd square"),
        ({"window_size": 16}, "odd square"),
        ({"sparse_mode": "some"}, "topk, block"),
        ({"max_tokens": 10}, "spatial_shape"),
        ({"max_tokens": 10, "spatial_shape": (4, 4)}, "spatial_shape"),
    ],
)
def test_bad_values_are_errors_that_name_them(change, words):
    q, k, v = tensors((1, 64, 4), (1, 64, 4), (1, 64, 4))
    with pytest.raises(ValueError, match=words):
        sparse_attention_topk_streaming(q, k, v, **change)


def test_shapes_that_do_not_fit_are_errors():
    q, k, v = tensors((1, 64, 4), (1, 64, 5), (1, 64, 4))
    with pytest.raises(ValueError, match="q, k, v"):
        sparse_attention_topk_streaming(q, k, v)
    with pytest.raises(ValueError, match="q, k, v"):
        sparse_attention_topk_streaming(q[0], q[0], v[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_keeps_its_type(dtype):
    q, k, v = (x.detach().to(dtype) for x in tensors((1, 256, 8), (1, 256, 8), (1, 256, 8)))
    for kwargs in (
        {},
        {"sparse_mode": "block"},
        {"sparse_mode": "local", "spatial_shape": (16, 16)},
    ):
        out = sparse_attention_topk_streaming(q, k, v, **kwargs)
        full = sparse_attention_topk_streaming(q.float(), k.float(), v.float(), **kwargs)
        assert out.dtype == dtype and (out.float() - full).abs().max() < 0.02


def test_operations_inside_the_operators_are_counted():
    q, k, v = tensors((2, 64, 8), (2, 64, 8), (2, 64, 8))
    with FlopCounterMode(display=False) as counter:
        out = sparse_attention_topk_streaming(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 2 * 64 * 64 * 8
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * 2 * 64 * 64 * 8


def test_operators_pass_torch_checks_for_compiled_graphs():
    q, k, v = tensors((2, 40, 4), (2, 40, 4), (2, 40, 4))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.hsi.topk_attention.default, (q, k, v, 4, 0.5, 2048, 1024), test_utils=checks
    )
    image = [x.detach().unflatten(1, (5, 8)).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        torch.ops.hsi.local_attention.default, (*image, 3, 0.5, 0.0, False), test_utils=checks
    )


@pytest.mark.parametrize("mode", ["topk", "local", "sparsemax"])
def test_gradients_are_the_same_whether_backward_is_called_inside_autocast_or_not(mode):
    gradients = []
    for inside in (False, True):
        q, k, v = tensors((1, 64, 8), (1, 64, 8), (1, 64, 8))
        with torch.autocast("cpu", torch.bfloat16):
            out = sparse_attention_topk_streaming(
                q, k, v, 0.5, sparse_mode=mode, spatial_shape=(8, 8), window_size=9
            )
            if inside:
                out.square().sum().backward()
        if not inside:
            out.square().sum().backward()
        gradients.append([x.grad for x in (q, k, v)])
    for outside, within in zip(*gradients, strict=True):
        assert torch.equal(outside, within)
