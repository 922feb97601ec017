"""Accelerated denoisers do not synchronise with the device; special layers and first calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators import accelerate
from hasten.accelerators._compile import CompiledNet
from hasten.accelerators._patches.attention import TextVersion
from hasten.accelerators._patches.exchange import Exchange
from hasten.accelerators._patches.swap import Patched
from hasten.accelerators.deep_cache import DeepCache
from hasten.accelerators.encoder_propagation import EncoderPropagation
from hasten.accelerators.quantize import Quantize
from hasten.distributed.groups import ProcessGroup
from hasten.errors import BadInput
from hasten.guides.cfg import CFG
from hasten.performance.profile import work_of
from hasten.samplers import DDIM

from ..pretend import Pretended, put
from ._tiny import LABEL, SHAPE, compiled, context_of, denoiser_of, unet


@pytest.mark.parametrize(
    "method",
    [
        DeepCache(every=3, extrapolate=1),
        EncoderPropagation(keys="uniform", every=3, parallel=3),
        Quantize(images=1, steps=2),
    ],
    ids=lambda method: type(method).__name__,
)
@torch.no_grad()
def test_guided_evaluations_do_not_synchronise(method: object) -> None:
    plan, plain = compiled(DDIM(), 12), denoiser_of(unet())
    guided = CFG(scale=2.0).wrap(accelerate(plain, [method], context_of(plan, plain)))
    with Pretended() as device:
        put(guided)
        x, label = torch.zeros(len(LABEL), *SHAPE).to("cuda"), LABEL.to("cuda")
        for module in guided.modules():  # integer layers make their kernels where they are now
            if hasattr(module, "prepare"):
                module.prepare()
        guided(x, plan.times[0], label=label)
        device.clear()
        for t in plan.times[1:-1]:
            x = guided(x, t, label=label)
        assert device.count("wait") == device.count("upload") == 0, device.lines()


@torch.no_grad()
def test_doubled_conditions_are_recomputed_where_they_change() -> None:
    guided, x, label = CFG(scale=2.0).wrap(denoiser_of(unet())), torch.zeros(3, *SHAPE), LABEL.clone()
    first = guided(x, 0.5, label=label)
    assert torch.equal(guided(x, 0.5, label=label), first)
    label += 1  # the same tensor, with other numbers
    label %= 3
    assert torch.equal(guided(x, 0.5, label=label), guided(x, 0.5, label=label.clone()))
    assert not torch.equal(guided(x, 0.5, label=label), first)
    assert guided(x[:2], 0.5, label=label[:2]).shape[0] == 2


@torch.no_grad()
def test_the_workload_of_a_quantised_network_needs_no_memory() -> None:
    plan, plain = compiled(DDIM(), 12), denoiser_of(unet())
    built = accelerate(plain, [Quantize(images=1, steps=2, groups=2)], context_of(plan, plain))
    label = torch.zeros(2, dtype=torch.long)
    x = torch.randn(2, *SHAPE)
    for value in (0.9, 0.1):  # the group of a time is the same, read from the device or not
        time = torch.full((2,), value * 20)
        read = built.net(x, time, label=label)
        time.host_times = (value * 20,)  # type: ignore[attr-defined]
        assert torch.equal(built.net(x, time, label=label), read)
    result, expected = (work_of(one.net, (2, *SHAPE), label=label) for one in (built, plain))
    assert result.macs == expected.macs


class Linear(nn.Module):
    """As peft's LoRA around a linear layer."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_patches_support_a_lora_of_linear_layers() -> None:
    def patched(wrap: type) -> nn.Module:
        net = unet()
        block = next(module for module in net.modules() if isinstance(getattr(module, "modulation", None), nn.Linear))
        block.modulation = wrap(block.modulation)
        return Patched(net, Exchange(ProcessGroup((0, 1), 0), "sync", "full", 0, "same", 60), TextVersion()).net

    class Other(Linear):
        __module__ = "somewhere.else"

    assert any(isinstance(module, Linear) for module in patched(Linear).modules())
    with pytest.raises(BadInput, match="a Other: it may mix rows"):
        patched(Other)


@torch.no_grad()
def test_the_first_call_of_a_graph_does_not_change_its_inputs() -> None:
    """It is run twice, to time the second: a network that writes into what it is given would answer differently."""

    class InPlace(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return x.mul_(2) + time[:, None]

    net = CompiledNet(InPlace(), lambda plain: plain, graphs=2)
    assert torch.equal(net(torch.ones(2, 3), torch.zeros(2)), torch.full((2, 3), 2.0))
