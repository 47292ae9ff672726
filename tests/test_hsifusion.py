"""HSIFusionNet: contract, attention, experts, numerics, sizes."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F

import attention_windows as windows_of
import hsifusion_v252_complete as hsi
from checkpoint_files import save_checkpoint
from common_utils_v32 import UserError
from hsifusion_v252_complete import (
    LightningProBlock,
    LightningProConfig,
    create_hsifusion_lightning_pro,
    from_pretrained,
)
from spectral_layers import STRIP_FLOATS

SMALL = {"base_channels": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 2)}


def small(**overrides):
    torch.manual_seed(0)
    model = create_hsifusion_lightning_pro("tiny", **{**SMALL, **overrides})
    wake(model)
    return model


def wake(model):
    """Give the head weights of some size, so that the output depends on everything."""
    torch.nn.init.normal_(model.head.coefficients.weight, std=0.05)


# --- contract


@pytest.mark.parametrize("size", [(64, 64), (66, 64), (65, 79), (97, 130)])
def test_any_size_and_parity_comes_back_as_it_went_in(size):
    assert small()(torch.rand(2, 3, *size)).shape == (2, 31, *size)


@pytest.mark.parametrize("size", [(482, 512), (487, 331)])
def test_a_full_frame_comes_back_at_its_size(size):
    with torch.no_grad():
        assert create_hsifusion_lightning_pro("tiny").eval()(torch.rand(1, 3, *size)).shape == (
            1,
            31,
            *size,
        )


@pytest.mark.parametrize("channels", [(1, 4), (4, 28), (8, 250)])
def test_other_channel_counts(channels):
    assert (
        small(in_channels=channels[0], out_channels=channels[1])(
            torch.rand(1, channels[0], 64, 64)
        ).shape[1]
        == channels[1]
    )


def test_wrong_inputs_and_settings_are_errors_that_name_the_choices():
    model = small()
    for bad in (torch.rand(1, 3, 63, 64), torch.rand(1, 4, 64, 64), torch.rand(3, 64, 64)):
        with pytest.raises(ValueError, match="min_input_size"):
            model(bad)
    with pytest.raises(ValueError, match="tiny, small, base, large"):
        create_hsifusion_lightning_pro("huge")
    with pytest.raises(ValueError, match="no_such_field"):
        create_hsifusion_lightning_pro("tiny", no_such_field=1)
    for field in (
        {"depths": (1, 1)},
        {"num_heads": (3, 2, 2)},
        {"dropout": 1.0},
        {"window_size": 1},
        {"use_sparse_attention": True},
        {"use_moe": True, "num_experts": 1},
        {"base_channels": 0},
    ):
        with pytest.raises(ValueError):
            LightningProConfig(**field)


def test_preset_fills_only_what_is_not_given():
    config = create_hsifusion_lightning_pro("small", base_channels=32).config
    assert config.base_channels == 32 and config.depths == hsi.SIZES["small"]["depths"]


@pytest.mark.parametrize(
    "size, limit", [("tiny", 1.7e6), ("small", 4e6), ("base", 12e6), ("large", 32e6)]
)
def test_parameter_classes(size, limit):
    with torch.device("meta"):
        count = sum(p.numel() for p in create_hsifusion_lightning_pro(size).parameters())
    assert 0.35 * limit < count <= limit


def test_factory_gives_a_plain_module_in_train_mode_and_compiling_keeps_keys():
    model = small()
    assert model.training and isinstance(model, torch.nn.Module) and not hasattr(model, "_orig_mod")
    keys = list(model.state_dict())
    model.compile()
    assert list(model.state_dict()) == keys


EFFECTIVE = {
    "base_channels": 24,
    "depths": (1, 1, 2),
    "num_heads": (4, 4, 4),
    "window_size": 4,
    "mlp_ratio": 3.0,
    "enable_spectral": False,
    "use_sliding_window": False,
    "use_moe": True,
    "use_rope": False,
    "use_cross_attention": True,
    "estimate_uncertainty": True,
}


@pytest.mark.parametrize("field", EFFECTIVE)
def test_every_structural_field_changes_the_output(field):
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before, after = small().eval()(x), small(**{field: EFFECTIVE[field]}).eval()(x)
    if field == "estimate_uncertainty":
        assert len(after) == 2 and (after[1] > 0).all() and after[1].shape == before.shape
    else:
        assert not torch.equal(before, after)


def test_stochastic_and_bookkeeping_fields_do_what_they_name():
    x = torch.rand(2, 3, 64, 64)
    for field in ({"dropout": 0.5}, {"drop_path": 0.9}):
        model = small(**field)
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    assert small(min_input_size=96).config.min_input_size == 96
    with pytest.raises(ValueError):
        small(min_input_size=96)(x)
    a, b = (
        small(use_moe=True, auxiliary_loss_weight=0.1),
        small(use_moe=True, auxiliary_loss_weight=0.2),
    )
    a(x), b(x)
    assert b.auxiliary_loss().item() == pytest.approx(2 * a.auxiliary_loss().item())
    assert len(small(use_moe=True, num_experts=6).encoder[0][0].mlp.experts) == 6


def test_activation_checkpointing_gives_the_same_gradients_and_saves_memory():
    x, saved = torch.rand(1, 3, 64, 64), []
    for recompute in (False, True):
        model, stored = small(use_checkpoint=recompute), 0

        def pack(t):
            nonlocal stored
            stored += t.numel()  # noqa: B023
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x).sum().backward()
        saved.append((stored, model.stem.weight.grad))
    assert saved[1][0] < 0.7 * saved[0][0]
    torch.testing.assert_close(saved[0][1], saved[1][1])


def test_memory_formats_agree_and_the_output_keeps_channels_last():
    x = torch.rand(2, 3, 64, 70)
    last, first = small().eval(), small(use_channels_last=False).eval()
    with torch.no_grad():
        y = last(x)
        torch.testing.assert_close(y, last(x.to(memory_format=torch.channels_last)), rtol=0, atol=0)
        torch.testing.assert_close(y, first(x), rtol=1e-4, atol=1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last) and first(x).is_contiguous()


def test_the_start_is_the_fitted_linear_map():
    rgb = torch.rand(2, 3, 64, 64)
    cube = torch.einsum("oc,bchw->bohw", torch.rand(31, 3), rgb) + 0.02
    model = create_hsifusion_lightning_pro("tiny", **SMALL)
    model.fit_spectral_path(rgb, cube)
    with torch.no_grad():
        assert ((model(rgb) - cube).abs() / cube).mean() < 0.02


# --- windows and positions


def test_rope_keeps_norms_and_products_depend_on_the_offset_alone():
    table = windows_of.rotary_table(8, 8, 16)
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    turned_q, turned_k = (
        windows_of.rotate(x.expand(64, 16), table.double()).view(8, 8, 16) for x in (q, k)
    )
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(8, 8))
    for dy, dx in ((0, 0), (2, 3), (5, 1)):
        products = (turned_q[: 8 - dy, : 8 - dx] * turned_k[dy:, dx:]).sum(-1)
        torch.testing.assert_close(
            products, products[0, 0].expand_as(products), rtol=1e-5, atol=1e-5
        )
    rows = (turned_q[0, 0] * turned_k[3, 0]).sum() - (turned_q[0, 0] * turned_k[0, 3]).sum()
    assert rows.abs() > 1e-3  # rows and columns are told apart


def mean_of_windows(windows, height, width, stride):
    """(groups, B, rows, columns, window, window, D) -> (B, height, width, groups * D)."""
    covers = windows_of.coverage(height, width, windows.shape[4], stride, windows)
    return windows_of.add_windows(windows, stride)[:, :height, :width] / covers


@pytest.mark.parametrize("side", [(8, 8), (9, 14), (20, 33), (5, 40)])
@pytest.mark.parametrize("window, stride", [(8, 6), (8, 8), (4, 3)])
def test_merged_windows_give_back_the_image_and_their_gradient_is_right(side, window, stride):
    x = torch.randn(2, *side, 3, dtype=torch.float64, requires_grad=True)
    windows = windows_of.extract_windows(x, window, stride)
    torch.testing.assert_close(mean_of_windows(windows, *side, stride), x)
    assert windows.shape[4:6] == (window, window)


def test_window_merge_gradcheck():
    x = torch.randn(1, 5, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: mean_of_windows(torch.tanh(windows_of.extract_windows(t, 4, 3)).pow(2), 5, 7, 3),
        x,
    )


def test_window_padding_is_masked():
    """Window attention of a 10 x 13 frame equals attention computed window by window over the real
    tokens alone."""
    torch.manual_seed(0)
    attention = hsi.WindowAttention(LightningProConfig(), 16, 16, 2).double()
    x = torch.randn(1, 10, 13, 16, dtype=torch.float64)
    out, covers = (
        torch.zeros(10, 13, 16, dtype=torch.float64),
        torch.zeros(10, 13, 1, dtype=torch.float64),
    )
    for top in range(0, 10 - 2, 6):
        for left in range(0, 13 - 2, 6):
            part = attention.qkv(x[:, top : top + 8, left : left + 8])
            h, w = part.shape[1:3]
            table = attention.table.view(2, 8, 8, -1)[:, :h, :w].flatten(1, 2)
            q, k, v = part.reshape(1, h * w, 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(
                windows_of.rotate(q, table), windows_of.rotate(k, table), v
            )
            out[top : top + 8, left : left + 8] += y.transpose(1, 2).reshape(h, w, 16)
            covers[top : top + 8, left : left + 8] += 1
    torch.testing.assert_close(attention(x)[0], out / covers)


def test_global_and_sparse_attention_see_the_whole_frame():
    for sparse in (False, True):
        config = LightningProConfig(
            use_sliding_window=False, use_sparse_attention=sparse, use_rope=False
        )
        attention = hsi.WindowAttention(config, 48, 16, 2)
        torch.nn.init.eye_(attention.qkv.weight)
        qkv = torch.randn(1, 12, 12, 48)
        out, moved = attention(qkv), qkv.clone()
        moved[0, 11, 11, 32:] += 100.0  # a far value, in the keys' place of a corner query
        moved[0, 11, 11, 16:32] = 20 * qkv[0, 0, 0, :16]
        assert not torch.allclose(out[0, 0, 0], attention(moved)[0, 0, 0])


def test_sparse_attention_keeps_the_best_keys_alone():
    outputs, x = [], torch.randn(1, 12, 12, 48)
    for sparse in (False, True):
        torch.manual_seed(0)
        config = LightningProConfig(
            use_sliding_window=False, use_sparse_attention=sparse, use_rope=False
        )
        attention = hsi.WindowAttention(config, 48, 16, 2)
        torch.nn.init.eye_(attention.qkv.weight)
        outputs.append(attention(x))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_cross_attention_keeps_its_query_path_and_sees_few_tokens(monkeypatch):
    cross, x, skip, seen = (
        hsi.CrossAttention(16, 2),
        torch.randn(1, 40, 30, 16),
        torch.randn(1, 40, 30, 16),
        [],
    )
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v: seen.append(k.shape[2]) or attend(q, k, v),
    )
    out = cross(x, skip)
    assert seen == [64] and not torch.allclose(out, x)
    torch.nn.init.zeros_(cross.proj.weight)
    torch.nn.init.zeros_(cross.proj.bias)
    torch.testing.assert_close(cross(x, skip), x)


def test_the_likelihood_trains_the_scale_alone():
    model = small(estimate_uncertainty=True)
    hsi.laplace_nll(*model(torch.rand(1, 3, 64, 64)), torch.rand(1, 31, 64, 64)).backward()
    assert {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    } == {"head.scale.weight", "head.scale.bias"}


@pytest.mark.parametrize("size", [(64, 96), (87, 79)])
@pytest.mark.parametrize(
    "features", [{}, {"estimate_uncertainty": True, "use_cross_attention": True}]
)
def test_strips_change_nothing(monkeypatch, size, features):
    model, x = small(**features).eval(), torch.rand(2, 3, *size)
    model.fit_spectral_path(torch.rand(1, 3, 64, 64), torch.rand(1, 31, 64, 64))
    with torch.no_grad():
        whole = model(x)
        monkeypatch.setitem(STRIP_FLOATS, "cpu", 1)  # the thinnest that are cut
        torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-5)


def test_every_query_and_key_gets_a_gradient_and_depends_on_every_channel():
    model = small()
    model(torch.rand(1, 3, 64, 64)).square().mean().backward()
    for block in (m for m in model.modules() if isinstance(m, LightningProBlock)):
        for part in (
            *block.spatial.qkv.weight.grad.chunk(3),
            *block.spectral.qkv.weight.grad.chunk(3),
        ):
            assert (part.abs().sum(dim=0) > 0).all()


# --- experts


def moe(**overrides):
    torch.manual_seed(0)
    return hsi.MixtureOfExperts(LightningProConfig(use_moe=True, **overrides), 16)


def test_experts_compute_their_own_tokens_only_and_match_a_dense_reference():
    layer, x, seen = moe(), torch.randn(1, 4, 5, 16), []
    for expert in layer.experts:
        expert.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    out = layer(x)
    assert sum(seen) == 2 * 20
    probability = layer.router(x).softmax(-1)
    top = probability.topk(2, dim=-1)
    weight = torch.zeros_like(probability).scatter(
        -1, top.indices, top.values / top.values.sum(-1, keepdim=True)
    )
    dense = sum(weight[..., i, None] * expert(x) for i, expert in enumerate(layer.experts))
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


def test_all_tokens_to_two_experts_works_and_the_others_get_zero_gradients():
    layer, x = moe(), torch.randn(1, 4, 4, 16)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
    (layer(x).sum() + layer.balance).backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert (
        layer.experts[3][0].weight.grad.abs().sum()
        == 0
        < layer.experts[0][0].weight.grad.abs().sum()
    )


def test_balancing_loss_is_least_when_even_and_has_a_gradient():
    layer, x = moe(), torch.randn(1, 16, 16, 16)
    layer(x)
    layer.balance.backward()
    assert layer.router.weight.grad.abs().sum() > 0 and layer.balance >= 0.99
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
        layer(x)
    assert layer.balance > 1.5


# --- training properties


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_moe": True},
        {"use_cross_attention": True},
        {"estimate_uncertainty": True},
        {"use_sliding_window": False},
        {"enable_spectral": False},
    ],
)
def test_every_parameter_gets_a_gradient_from_the_default_loss(options):
    model = create_hsifusion_lightning_pro("tiny", **SMALL, **options)
    wake(model)
    out, target = model(torch.rand(1, 3, 64, 64)), torch.rand(1, 31, 64, 64)
    pred, scale = out if isinstance(out, tuple) else (out, None)
    loss = ((pred - target).abs() / target.clamp_min(0.01)).mean() + model.auxiliary_loss()
    if scale is not None:
        loss = loss + hsi.laplace_nll(pred, scale, target)
    loss.backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


def test_a_block_changes_its_input_at_the_start():
    block, x = LightningProBlock(LightningProConfig(), 64, 4), torch.randn(1, 16, 16, 64)
    assert (block(x) - x).norm() > 0.05 * x.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_forward_is_finite_and_close(dtype):
    model, x = small(estimate_uncertainty=True).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        full, _ = model(x)
        with torch.autocast("cpu", dtype):
            half, scale = model(x)
    assert half.dtype == torch.float32 and half.isfinite().all() and scale.isfinite().all()
    assert (half - full).abs().mean() < 0.02 * full.abs().mean()


def test_the_same_seed_gives_the_same_weights_and_steps():
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        model = create_hsifusion_lightning_pro("tiny", **SMALL, dropout=0.1, drop_path=0.1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for step in range(2):
            x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_models_copy_and_pickle_after_a_forward():
    model = small(use_moe=True)
    model(torch.rand(1, 3, 64, 64)).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("ema", [True, False])
def test_a_checkpoint_gives_back_the_same_model(tmp_path, ema):
    model, average = small(), small()
    torch.nn.init.normal_(average.head.coefficients.weight)
    save_checkpoint(
        tmp_path / "x.ckpt",
        {
            "model": "hsifusion",
            "model_config": dataclasses.asdict(model.config),
            "state_dict": model.state_dict(),
            "ema": average.state_dict(),
        },
    )
    x = torch.rand(1, 3, 64, 64)
    expected = average if ema else model
    torch.testing.assert_close(
        from_pretrained(tmp_path / "x.ckpt", ema)(x), expected(x), rtol=0, atol=0
    )
    save_checkpoint(
        tmp_path / "y.ckpt",
        {"model": "sharp", "model_config": {}, "state_dict": model.state_dict()},
    )
    with pytest.raises(UserError, match="y.ckpt"):
        from_pretrained(tmp_path / "y.ckpt")


def test_the_laplace_term_is_least_at_the_mean_error_and_leaves_the_cube_alone():
    pred = torch.zeros(1000, requires_grad=True)
    target = torch.distributions.Laplace(0.0, 0.2).sample((1000,))
    best = min(
        (0.05, 0.1, 0.2, 0.4, 0.8),
        key=lambda b: hsi.laplace_nll(pred, torch.full((1000,), b), target).item(),
    )
    assert best == 0.2
    scale = torch.full((1000,), 0.1, requires_grad=True)
    hsi.laplace_nll(pred, scale, target).backward()
    assert pred.grad is None and scale.grad.abs().sum() > 0


def test_compiles_without_graph_breaks_in_the_training_shape():
    explanation = torch._dynamo.explain(small())(torch.rand(1, 3, 64, 64))
    assert explanation.graph_break_count == 0, explanation.break_reasons
