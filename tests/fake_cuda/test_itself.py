"""The device refuses and counts what a GPU does: a fault of each kind is planted, and found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fake_cuda.device import DEVICE, DeviceError, fake_cuda

Fault = Callable[[Tensor], object]
REFUSED: dict[str, Fault] = {
    "a sum with a tensor of the host": lambda x: x + torch.ones(4, 4),
    "a product with a tensor of the host": lambda x: x @ torch.ones(4, 4),
    "a stack with a number of the host": lambda x: torch.stack([x.sum(), torch.ones(())]),
    "a lookup of ids of the host": lambda x: F.embedding(torch.zeros(2, dtype=torch.int64), x),
    "a product of two types": lambda x: x @ x.bfloat16(),
    "an input in place of two types": lambda x: x.detach().addmm_(x, x.bfloat16()),
    "a norm of two types": lambda x: F.layer_norm(x.bfloat16(), (4,), x[0]),
    "a number that is read": lambda x: x.sum().item(),
    "a decision": lambda x: bool((x > 0).all()),
    "a list": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy into a tensor of the host": lambda x: torch.zeros(4, 4).copy_(x),
    "a place that is filled with a number of the device": lambda x: x.masked_fill(x > 0, x.sum()),
    "a selection by a mask": lambda x: x[x > 0],
    "a shape that depends on values": lambda x: x.nonzero(),
    "one of the backward": lambda x: Reading.apply(x).sum().backward(),
    "pinned memory of the device": lambda x: x.pin_memory(),
}
WAITED_FOR: dict[str, Fault] = {
    "a tensor that is not pinned": lambda x: torch.ones(3).to(DEVICE, non_blocking=True),
    "a copy into pinned memory that is to be waited for": lambda x: refused(lambda: torch.empty(4, 4, pin_memory=True).copy_(x)),
    "a pinned one, if it is to be waited for": lambda x: torch.ones(3).pin_memory().to(DEVICE),
    "a number that is brought": lambda x: torch.tensor(1.0, device=DEVICE),
    "values that are brought": lambda x: x.detach().copy_(torch.ones(4, 4)),
    "an index of the host": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "the end of all that is under way": lambda x: torch.cuda.synchronize(),
    "the end of a stream": lambda x: torch.cuda.current_stream().synchronize(),
    "a collective of the host": lambda x: torch.distributed.all_reduce(torch.ones(2)),
}
FREE: dict[str, Fault] = {
    "a copy into pinned memory": lambda x: torch.empty(8, 4, pin_memory=True)[:4].copy_(x, non_blocking=True),
    "a pinned copy": lambda x: torch.ones(3).pin_memory().to(DEVICE, non_blocking=True),
    "numbers of Python": lambda x: x.mul(2.0).clamp(max=1.0).masked_fill(x > 0, 0.0),
    "a number of the host": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "what is made there": lambda x: torch.arange(4, device=x.device) + torch.full((4,), 2, device=x.device),
    "a forward and its backward": lambda x: F.gelu(x @ x).sum().backward(),
    "a backward that asks for the device": lambda x: Asking.apply(x).sum().backward(),
    "a place that is filled": lambda x: x.detach()[:, 2:].fill_(0.0),
}


class Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * grads[0].max().item()


class Asking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        assert grads[0].is_cuda and torch.zeros(2, device=grads[0].device).is_cuda
        return grads[0]


def refused(fault: Callable[[], object]) -> None:
    with pytest.raises(DeviceError):
        fault()


def something() -> Tensor:
    x = torch.zeros(4, 4, device=DEVICE, requires_grad=True)
    assert x.is_cuda and x.device == DEVICE and torch.zeros_like(x).device.type == "cuda"
    return x


@pytest.mark.parametrize("fault", REFUSED)
def test_is_refused(fault: str) -> None:
    with fake_cuda(), pytest.raises(DeviceError):
        REFUSED[fault](something())


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("fault", WAITED_FOR)
def test_is_counted(fault: str) -> None:
    with fake_cuda() as device:
        WAITED_FOR[fault](something())
    assert device.waits.total() == 1 and "test_itself.py" in device.places[0]


@pytest.mark.parametrize("work", FREE)
def test_is_no_fault(work: str) -> None:
    with fake_cuda() as device:
        FREE[work](something())
    assert not device.waits


def test_an_answer_is_what_the_host_finds() -> None:
    with fake_cuda(answer=3) as device:
        x = something()
        assert (x.sum().item(), x.cpu()[1].tolist(), bool(x.all())) == (3.0, [3.0] * 4, True)
        assert not x.cpu().is_cuda and torch.zeros(4, 4).copy_(x).sum() == 48
    assert device.waits.total() == 5


def test_nothing_is_left_behind() -> None:
    with fake_cuda():
        pass
    assert torch.zeros(2, device="meta").device.type == "meta" and torch.ones(2).sum().item() == 2
