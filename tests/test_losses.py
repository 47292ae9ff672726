"""The training loss: right values, finite gradients, float32 whatever the autocast."""

import numpy as np
import pytest
import torch

from common_utils_v32 import UserError
from optimized_dataloader import MSTPlusPlusLoss


def pair(shape=(2, 31, 8, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator)
    target[:, :, 0, 0] = 0
    return torch.rand(shape, generator=generator), target


def test_equals_float64_numpy_in_any_memory_layout():
    pred, target = pair()
    p, t = pred.double().numpy(), target.double().numpy()
    for floor in (1e-2, 1e-6):
        expected = np.mean(np.abs(p - t) / np.maximum(t, floor))
        for layout in (torch.contiguous_format, torch.channels_last):
            loss = MSTPlusPlusLoss(floor)(pred.contiguous(memory_format=layout), target)
            assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_is_zero_for_a_perfect_prediction():
    _, target = pair()
    for floor in (1e-2, 1e-6):
        assert MSTPlusPlusLoss(floor)(target, target).item() == 0


def test_gradient_is_finite_where_the_target_is_zero():
    pred, target = pair()
    pred.requires_grad_()
    MSTPlusPlusLoss()(pred, target).backward()
    assert torch.isfinite(pred.grad).all() and pred.grad[:, :, 0, 0].abs().min() > 0
    same = target.clone().requires_grad_()
    MSTPlusPlusLoss()(same, target).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_float32_under_autocast_and_for_half_predictions(dtype):
    pred, target = pair()
    target[:, :, 1] = (
        1e-5  # below the least normal float16; with floor 1e-6 its reciprocal overflows float16
    )
    pred, target = pred.to(dtype), target.to(dtype)
    exact = MSTPlusPlusLoss(1e-6)(pred.float(), target.float())
    with torch.autocast("cpu", dtype=dtype):
        loss = MSTPlusPlusLoss(1e-6)(pred, target)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_floor_schedule_is_a_function_of_the_step():
    loss = MSTPlusPlusLoss(floor=0.01, floor_start=0.16, floor_steps=4)
    assert [loss.floor_at(step) for step in range(6)] == pytest.approx(
        [0.16, 0.08, 0.04, 0.02, 0.01, 0.01]
    )
    pred, target = torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2)
    assert loss(pred, target).item() == pytest.approx(0.1 / 0.16)
    loss.step = 100
    assert loss(pred, target).item() == pytest.approx(10)
    assert not loss.state_dict()


def test_bad_floor_and_shapes_are_errors():
    with pytest.raises(UserError, match="--train_floor 0"):
        MSTPlusPlusLoss(0)
    with pytest.raises(ValueError, match="differ in shape"):
        MSTPlusPlusLoss()(torch.zeros(2, 31, 4, 4), torch.zeros(1, 31, 4, 4))
