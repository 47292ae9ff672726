"""A GPU's kernels cost some microseconds each to launch: a step must not launch thousands."""

import pytest
import torch
from launches import launches_of

import optimized_dataloader
from common_utils_v32 import make_average
from hsifusion_v252_complete import create_hsifusion_lightning_pro
from optimized_dataloader import MSTPlusPlusLoss, RawBatch, prepare_batch
from sharp_v322_hardened import create_sharp_v32


@pytest.mark.parametrize(
    "create, most", [(create_hsifusion_lightning_pro, 2300), (create_sharp_v32, 3000)]
)
def test_a_training_step_launches_few_kernels(create, most, monkeypatch):
    model, loss_fn = create("tiny"), MSTPlusPlusLoss()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    average = make_average(model, 0.999, 1)
    rgb, cube = torch.rand(1, 3, 128, 128), torch.rand(1, 31, 128, 128)

    def step():
        optimizer.zero_grad(set_to_none=True)
        (loss_fn(model(rgb), cube) + model.auxiliary_loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update()

    step()  # what is kept from step to step is built
    launches = launches_of(step, monkeypatch)
    assert 500 < launches.count <= most, launches.names


def batch_of(codes, side=6, dtype=torch.uint8):
    count = len(codes)
    rgb = torch.randint(0, 255, (count, side, side, 3)).to(dtype)
    cube = torch.rand(count, side, side, 5).half()
    ranges = torch.tensor([[3.0, 250.0]]).repeat(count, 1)
    codes = torch.tensor(codes, dtype=torch.uint8)
    return RawBatch(rgb, cube, codes, ranges, torch.arange(count))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_gpus_batches_are_turned_as_a_cpus_are_in_few_launches(dtype, monkeypatch):
    batch = batch_of(range(8), dtype=dtype)
    expected = prepare_batch(batch)
    gather = optimized_dataloader.turned_by_gather
    monkeypatch.setattr(optimized_dataloader, "turned_one_by_one", gather)
    prepare_batch(batch)  # the table of places is built
    launches = launches_of(lambda: prepare_batch(batch), monkeypatch)
    assert launches.count <= 15, launches.names
    for found, want in zip(prepare_batch(batch), expected, strict=True):
        assert torch.equal(found, want) and found.stride() == want.stride()
