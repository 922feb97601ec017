"""The pretended device refuses and records what a real one refuses and waits for, and computes what the CPU does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .pretend import Pretended, PretendedTensor, put, taken


def test_numbers_and_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(2, 2, 4, 4)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with Pretended() as device:
        there = copy.deepcopy(net).to("cuda")
        assert {p.device.type for p in there.parameters()} == {"cuda"}
        device.clear()
        optimizer = torch.optim.SGD(there.parameters(), lr=0.1)
        made = there(x.to("cuda"))
        made.square().sum().backward()
        optimizer.step()
        assert made.device == torch.device("cuda", 0) and made.is_cuda
        assert device.count("wait", "") == 0 and device.count("upload", "") == 1, device.lines()
        found = [taken(p.grad) for p in there.parameters()]
        q = torch.randn(1, 2, 5, 4)
        attention = F.scaled_dot_product_attention(*[q.to("cuda")] * 3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert torch.allclose(taken(attention), F.scaled_dot_product_attention(q, q, q), atol=1e-6)


def test_mixed_devices_are_refused() -> None:
    with Pretended():
        x, y = torch.ones(2, device="cuda"), torch.ones(2)
        assert float(x.sum() + torch.tensor(1.0)) == 3  # without dimensions it may be on the CPU
        for wrong in (lambda: x + y, lambda: y.add_(x), lambda: torch.cat([x, y]), lambda: y[x.long() - 1]):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device="cuda", generator=torch.Generator())


def test_waits_and_copies_are_recorded() -> None:
    with Pretended() as device:
        x = torch.ones(3, device="cuda")
        assert not device.events
        for what, wanted in [
            (lambda: x.sum().item(), {"wait": 1}),
            (lambda: bool(x.any()), {"wait": 1}),
            (lambda: x.tolist(), {"wait": 1}),
            (lambda: torch.equal(x, x + 0), {"wait": 1}),
            (lambda: x.nonzero(), {"wait": 1}),
            (lambda: x.cpu(), {"wait": 1}),
            (lambda: x.to("cpu", torch.float64), {"wait": 1, "widened": 1}),
            (lambda: x.double(), {"float64": 1}),
            (lambda: torch.tensor([1.0, 2.0], device="cuda"), {"upload": 1}),
            (lambda: torch.zeros(3).to(x), {"upload": 1}),
            (lambda: x.new_tensor([1.0]), {"upload": 1}),
            (lambda: x[torch.tensor([0, 2])], {"upload": 1}),
            (lambda: x[x > 0], {"wait": 1}),
            (lambda: x.__setitem__(x > 2, 0.0), {}),
            (lambda: torch.zeros(3).pin_memory().to("cuda", non_blocking=True), {"async": 1}),
            (lambda: torch.zeros(3).to("cuda", non_blocking=True), {"upload": 1}),
            (lambda: torch.cuda.synchronize(), {"wait": 1}),
            (lambda: (x * 2 + x.new_zeros(3)).softmax(0), {}),
        ]:
            device.clear()
            what()
            found = {kind: device.count(kind, "") for kind, _ in device.events}
            assert found == wanted, device.lines()
            with device.unrecorded():
                what()
            assert {kind: device.count(kind, "") for kind, _ in device.events} == wanted
    with Pretended("mps") as device:
        x = torch.ones(3, device="mps")
        assert x.device.type == "mps" and not x.is_cuda
        for wide in (lambda: x.double(), lambda: x.to("cpu", torch.float64), lambda: x.to(torch.complex128)):
            with pytest.raises(TypeError, match="MPS"):
                wide()
        with pytest.raises(RuntimeError, match="cannot pin"):
            torch.zeros(3).pin_memory()
        two = torch.tensor(2.0, dtype=torch.float64)
        assert float((x.cpu().double() * two).sum()) == float((two * x).sum()) == 6
    net = put(nn.Linear(2, 2))
    assert all(isinstance(p, PretendedTensor) and isinstance(p, nn.Parameter) for p in net.parameters())
