"""SHARP: sizes, the contract of the models, its layers, and the step engine."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import sharp_v322_hardened as sharp
from checkpoint_files import save_checkpoint
from sharp_v322_hardened import (
    ChannelRMSNorm,
    RBFProjection,
    SHARPv32Config,
    SHARPv32Trainer,
    create_sharp_v32,
)
from sparse_attention import SPARSE_MODES, sparse_attention_topk_streaming
from spectral_layers import STRIP_FLOATS, smooth_basis

MILLIONS = {"tiny": 1.7, "small": 4.0, "base": 12.0, "large": 32.0}
LITTLE = {"base_dim": 16, "depths": (1, 1), "heads": (1, 2), "mlp_ratios": (1.0, 1.0)}


def little(seed=0, **overrides):
    torch.manual_seed(seed)
    return create_sharp_v32("tiny", **{**LITTLE, **overrides})


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(prediction, target):
    return (prediction - target).abs().mean()


def batch(count=2, seed=0, side=64):
    return images(count, 3, side, side, seed=seed), images(count, 31, side, side, seed=seed + 1)


# --- contract


@pytest.mark.parametrize("size", MILLIONS)
def test_sizes_stay_in_their_class(size):
    with torch.device("meta"):
        model = create_sharp_v32(size)
    assert sum(p.numel() for p in model.parameters()) <= MILLIONS[size] * 1e6
    assert model.training and type(model) is sharp.SHARPv32


def test_unknown_size_field_or_value_names_the_choices():
    for args, words in ((("huge",), "tiny, small"), (("tiny", 3, 31, "topp"), "topk, block")):
        with pytest.raises(ValueError, match=words):
            create_sharp_v32(*args[:3], **({"sparse_mode": args[3]} if len(args) > 3 else {}))
    with pytest.raises(ValueError, match="base_dim"):
        create_sharp_v32("tiny", basedim=3)
    for bad in (
        {"depths": (1, 0)},
        {"heads": (1,)},
        {"sparse_window_size": 48},
        {"drop_path_rate": 1.0},
        {"sparse_sparsity_ratio": 1.0},
        {"key_rbf_mode": "cubic"},
        {"rbf_centers_per_head": 0},
    ):
        with pytest.raises(ValueError):
            little(**bad)


def test_preset_fills_only_what_was_not_given():
    config = create_sharp_v32("tiny", base_dim=24, sparse_k_cap=7).config
    assert (
        config.base_dim == 24
        and config.sparse_k_cap == 7
        and config.depths == sharp.SIZES["tiny"]["depths"]
    )


@pytest.mark.parametrize("height, width", [(64, 64), (66, 64), (65, 71), (87, 131)])
def test_any_size_comes_back_at_that_size(height, width):
    with torch.no_grad():
        assert little(depths=(1, 1, 1), heads=(1, 1, 1), mlp_ratios=(1, 1, 1))(
            images(1, 3, height, width)
        ).shape == (1, 31, height, width)


@pytest.mark.parametrize("height, width", [(482, 512), (487, 331)])
def test_a_full_frame_comes_back_at_its_size(height, width):
    with torch.no_grad():
        assert create_sharp_v32("tiny")(images(1, 3, height, width)).shape == (1, 31, height, width)


@pytest.mark.parametrize("height, width", [(64, 96), (87, 79)])
def test_strips_change_nothing(monkeypatch, height, width):
    model, x = little().eval(), images(2, 3, height, width)
    model.fit_spectral_path(x, torch.einsum("oc,bchw->bohw", smooth_basis(31, 3), x))
    with torch.no_grad():
        whole = model(x)
        monkeypatch.setitem(STRIP_FLOATS, "cpu", 1)  # the thinnest that are cut
        torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-5)


def test_wrong_input_is_an_error():
    for shape in ((1, 4, 64, 64), (1, 3, 63, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match="min_input_size"):
            little()(torch.zeros(shape))


@pytest.mark.parametrize("channels, bands", [(1, 4), (8, 250), (3, 1), (2, 28)])
def test_other_channel_counts_learn_and_stay_finite(channels, bands):
    model = little(in_channels=channels, out_channels=bands)
    cube = model(images(1, channels, 64, 64))
    (cube.mean() + model.auxiliary_loss()).backward()
    assert cube.shape == (1, bands, 64, 64) and all(
        p.grad.isfinite().all() for p in model.parameters()
    )


def test_memory_layout_of_the_input_does_not_matter():
    model, x = little().eval(), images(2, 3, 64, 80)
    with torch.no_grad():
        reference = model(x)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), reference)
        torch.testing.assert_close(model(F.pad(x, (3, 3))[..., 3:-3]), reference)


@pytest.mark.parametrize("mode", SPARSE_MODES)
@pytest.mark.parametrize("key_mode", sharp.KEY_RBF_MODES)
def test_every_parameter_gets_a_gradient_that_is_not_zero(mode, key_mode):
    model = little(sparse_mode=mode, key_rbf_mode=key_mode, sparse_sparsity_ratio=0.5)
    (loss_of(model(images(2, 3, 64, 64)), 0.3) + model.auxiliary_loss()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_queries_and_keys_learn_in_every_stage_and_depend_on_every_channel():
    model = create_sharp_v32("tiny")
    loss_of(model(images(1, 3, 64, 64)), 0.3).backward()
    attentions = [m for m in model.modules() if isinstance(m, sharp.MultiScaleAttention)]
    assert len(attentions) == 7
    for attention in attentions:
        for part in attention.to_qkv.weight.grad.chunk(6):
            assert (part.abs().amax(0) > 0).all()


def test_same_seed_same_run_and_other_seed_another():
    x, cube = batch()

    def run(seed):
        model = little(seed, drop_path_rate=0.3)
        trainer = SHARPv32Trainer(model, loss_of, lr=1e-2)
        for _ in range(2):
            trainer.train_step([(x, cube)])
        return model.state_dict()

    a, b, c = run(5), run(5), run(6)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(dtype):
    model, x = create_sharp_v32("tiny").eval(), images(1, 3, 64, 96)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", dtype):
            half = model(x)
        assert half.dtype == torch.float32 and (half - full).abs().max() < 0.02 * full.abs().max()
        assert (
            model(x * 0).isfinite().all()
            and model(x * 100).isfinite().all()
            and model(-x).isfinite().all()
        )


def test_checkpointing_changes_nothing_but_memory():
    x, cube = batch(1)
    grads, calls = [], {False: 0, True: 0}
    for use in (False, True):
        model = little(use_checkpoint=use)
        model.encoder[0][0].expand.register_forward_hook(
            lambda *_, use=use: calls.update({use: calls[use] + 1})
        )
        loss_of(model(x), cube).backward()
        grads.append([p.grad for p in model.parameters()])
    assert calls == {False: 1, True: 2}  # computed again in the backward
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_a_block_changes_its_input_at_the_start():
    block = little().encoder[0][0]
    x = torch.randn(1, 16, 16, 16)
    assert (block(x) - x).std() > 0.05


def test_deepcopy_and_pickle_after_a_step_give_the_same_output():
    model, (x, cube) = little(), batch(1)
    loss_of(model(x), cube).backward()
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), model(x))


def test_compiling_keeps_names_and_breaks_no_graph():
    model = little()
    names = list(model.state_dict())
    explained = torch._dynamo.explain(model)(images(1, 3, 64, 64))
    assert explained.graph_break_count == 0
    model.compile(backend="eager")
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(model(x), little()(x))
    assert list(model.state_dict()) == names


def test_sparse_settings_reach_the_attention(monkeypatch):
    seen = []
    monkeypatch.setattr(
        sharp,
        "sparse_attention_topk_streaming",
        lambda q, k, v, **kwargs: seen.append(kwargs) or torch.zeros(*q.shape[:2], v.shape[-1]),
    )
    fields = {
        "sparse_block_size": 11,
        "sparse_max_tokens": 12,
        "sparse_window_size": 25,
        "sparse_k_cap": 13,
        "sparse_q_block_size": 14,
        "sparse_sparsity_ratio": 0.7,
        "sparse_mode": "block",
    }
    little(**fields, sparsemax_pad_value=0.5)(images(1, 3, 64, 64))
    coarse = next(kwargs for kwargs in seen if kwargs["sparse_mode"] == "block")
    assert {
        k: coarse[k.removeprefix("sparse_") if k != "sparse_mode" else k] for k in fields
    } == fields
    assert coarse["sparsemax_pad_value"] == 0.5


def test_padding_of_the_frame_stays_out_of_attention(monkeypatch):
    shapes = []
    attend = sparse_attention_topk_streaming
    monkeypatch.setattr(
        sharp,
        "sparse_attention_topk_streaming",
        lambda q, k, v, **kw: (
            shapes.append((k.shape[1], kw["spatial_shape"])) or attend(q, k, v, **kw)
        ),
    )
    little()(images(1, 3, 67, 65))
    assert {shape for _, shape in shapes} == {
        (34, 33),
        (17, 17),
    }  # each token holds a real pixel, none is padding
    assert all(n == math.prod(shape) for n, shape in shapes)


# --- linear start, head


def test_fitted_path_is_the_start_and_relative_error_is_low():
    torch.manual_seed(0)
    rgb = torch.rand(2, 3, 64, 64)
    weight = torch.rand(31, 3)
    cube = torch.einsum("oc,bchw->bohw", weight, rgb) + 0.02
    model = create_sharp_v32("tiny")
    model.fit_spectral_path(rgb, cube)
    with torch.no_grad():
        error = ((model(rgb) - cube).abs() / cube).mean()
    assert error < 0.02
    assert torch.allclose(model.head.direct.weight, weight, atol=1e-3)


# --- layers


def test_rms_norm_normalises_channels_and_follows_every_weight_update():
    norm, x = ChannelRMSNorm(8).eval(), torch.randn(2, 8, 5, 6)
    expected = x / x.square().mean(1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        norm.weight.fill_(3.0)
    torch.testing.assert_close(norm(x), 3 * expected)
    norm.load_state_dict({"weight": torch.full((8,), 2.0)})
    torch.testing.assert_close(norm(x), 2 * expected)
    torch.testing.assert_close(norm.to(torch.float64)(x.double()).float(), 2 * expected)
    torch.testing.assert_close(
        ChannelRMSNorm(8, channel_dim=-1)(x.movedim(1, -1)).movedim(-1, 1), expected
    )


@pytest.mark.parametrize("width", [8, 16, 32])
def test_rbf_features_have_a_useful_size_and_differ(width):
    torch.manual_seed(0)
    rbf = RBFProjection(2, width, 32, "linear")
    (features,) = rbf.features(F.rms_norm(torch.randn(1, 2, 500, width), (width,)))
    assert 0.05 < features.mean() < 0.5 and features.std() > 0.03 and features.max() <= 1.0


def test_rbf_key_modes_differ_as_documented():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    picks = {}
    for mode in sharp.KEY_RBF_MODES:
        fq, fk = RBFProjection(1, 16, 32, mode)(q, k)
        picks[mode] = (fq @ fk.mT).argmax(-1).unique().numel()
    assert picks["mean"] == 1 and picks["linear"] > 15 and picks["none"] > 8
    assert SHARPv32Config().key_rbf_mode == "linear"


def test_fusion_keeps_its_query_path():
    torch.manual_seed(0)
    fusion = sharp.GatedCrossFusion(SHARPv32Config(**LITTLE), 16, 1)
    for parameter in (fusion.skip.weight, fusion.skip.bias, fusion.out.weight, fusion.out.bias):
        torch.nn.init.zeros_(parameter)
    x = torch.randn(1, 9, 11, 16)
    assert torch.equal(fusion(x, torch.randn(1, 9, 11, 16)), x)


def test_fusion_cost_grows_linearly():
    from torch.utils.flop_counter import FlopCounterMode

    fusion, counts = sharp.GatedCrossFusion(SHARPv32Config(**LITTLE), 16, 1), []
    for side in (16, 64):
        with FlopCounterMode(display=False) as counter:
            fusion(torch.randn(1, side, side, 16), torch.randn(1, side, side, 16))
        counts.append(counter.get_total_flops())
    assert counts[1] == 16 * counts[0]


# --- step engine


def test_accumulation_equals_the_big_batch_with_a_smaller_last_part():
    x, cube = batch(5)
    results = []
    for parts in ([(x, cube)], [(x[:2], cube[:2]), (x[2:4], cube[2:4]), (x[4:], cube[4:])]):
        model = little()
        SHARPv32Trainer(model, loss_of, grad_clip=0).train_step(parts)
        results.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-3)


def test_no_weight_decay_on_norms_biases_scales_centres_and_basis():
    model = little()
    trainer = SHARPv32Trainer(model, loss_of, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in trainer.optimizer.param_groups[0]["params"]}
    rest = {names[id(p)] for p in trainer.optimizer.param_groups[1]["params"]}
    assert (
        decayed | rest == set(names.values())
        and trainer.optimizer.param_groups[1]["weight_decay"] == 0
    )
    assert all(
        name.endswith("weight") and "norm" not in name and "guide.0" not in name for name in decayed
    )
    assert {"head.basis", "encoder.0.0.scale1", "stem.bias"} <= rest


def test_a_bad_step_is_skipped_the_next_works_and_a_run_of_them_stops():
    x, cube = batch(1)
    for dtype in (None, torch.float16):
        model = little()
        trainer = SHARPv32Trainer(model, loss_of, amp_dtype=dtype, max_bad_steps=2)
        before = copy.deepcopy(model.state_dict())
        assert not trainer.train_step([(x, cube * math.nan)])["grad_norm"].isfinite()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert trainer.train_step([(x, cube)])["grad_norm"].isfinite()
        assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        trainer.train_step([(x, cube * math.nan)])
        with pytest.raises(FloatingPointError, match="2 steps in a row"):
            trainer.train_step([(x, cube * math.nan)])


def test_gradients_are_clipped():
    x, cube = batch(1)
    model = little()
    report = SHARPv32Trainer(model, lambda p, t: 1e4 * loss_of(p, t), grad_clip=0.5).train_step(
        [(x, cube)]
    )
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert report["grad_norm"] > 0.5 and abs(float(norm) - 0.5) < 1e-3


@pytest.mark.parametrize("limit", [0.9, 0.3])  # 0.9: the warm-up rules, 0.3: the limit does
def test_average_warms_up_and_decays_to_the_power_of_the_interval(limit):
    x, cube = batch(1)
    model = little(ema_update_every=2)
    trainer = SHARPv32Trainer(model, loss_of, ema_decay=limit, lr=1e-2)
    name, expected = "head.direct.weight", model.head.direct.weight.detach().clone()
    for step in range(1, 9):
        trainer.train_step([(x, cube)])
        if step % 2 == 0:
            n, live = step // 2 - 1, model.head.direct.weight.detach().clone()
            decay = min(limit**2, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * live
            torch.testing.assert_close(trainer.state_dict()["ema"][name], expected)
    assert list(trainer.state_dict()["ema"]) == list(model.state_dict())


def test_average_never_changes_the_live_weights():
    x, cube = batch(1)
    model = little()
    before = copy.deepcopy(model.state_dict())
    trainer = SHARPv32Trainer(model, loss_of, lr=0.0)
    for _ in range(3):
        trainer.train_step([(x, cube)])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_saving_and_loading_in_between_changes_no_bit(tmp_path):
    data = [batch(1, seed) for seed in range(5)]

    def trainer(seed):
        return SHARPv32Trainer(little(seed), loss_of, lr=1e-2, ema_update_every=2)

    whole, first, second = trainer(0), trainer(0), trainer(1)
    for item in data:
        whole.train_step([item])
    for item in data[:3]:
        first.train_step([item])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for item in data[3:]:
        second.train_step([item])
    for part in ("state_dict", "ema"):
        a, b = whole.state_dict()[part], second.state_dict()[part]
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (
        whole.steps == second.steps
        and whole.state_dict()["ema_updates"] == second.state_dict()["ema_updates"]
    )


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    rgb = torch.rand(2, 3, 64, 64)
    cube = torch.einsum("oc,bchw->bohw", 0.1 + smooth_basis(31, 3).abs(), rgb**2)
    model = little()
    model.fit_spectral_path(rgb, cube)
    trainer = SHARPv32Trainer(model, loss_of, lr=3e-3)
    losses = [trainer.train_step([(rgb, cube)])["loss"] for _ in range(45)]
    assert losses[-1] < 0.6 * losses[0]


def test_from_pretrained_rebuilds_model_and_weights(tmp_path):
    model = little(out_channels=7)
    trainer = SHARPv32Trainer(model, loss_of, lr=1e-2)
    for seed in range(3):
        x = images(1, 3, 64, 64, seed=seed)
        trainer.train_step([(x, images(1, 7, 64, 64, seed=seed + 9))])
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(model.config).items()}
    save_checkpoint(
        tmp_path / "last.ckpt",
        {"model": "sharp", "model_config": config, "data": {}} | trainer.state_dict(),
    )
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        live, averaged = (
            sharp.from_pretrained(tmp_path / "last.ckpt", ema=ema).eval() for ema in (False, True)
        )
        assert torch.equal(live(x), model.eval()(x)) and live.config == model.config
        assert torch.equal(averaged(x), trainer.average.module.eval()(x)) and not torch.equal(
            averaged(x), live(x)
        )
