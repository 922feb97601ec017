"""Low-rank adaptation: identities of the layers, their state, and extraction by SVD."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import BadInput
from hasten.nets.lora import (
    add_lora,
    lora_factors,
    lora_layers,
    merge_factors,
    merge_lora,
    remove_lora,
    set_lora_scale,
    target_layers,
    unmerge_lora,
)
from hasten.nets.lora_svd import extract_low_rank, truncated
from hasten.nets.unet import UNet
from hasten.train.checkpoint import load_modules, save_modules
from hasten.train.ema import copy_for_average
from hasten.train.fit import Fit
from hasten.train.trained_module import TrainedModule


class Net(nn.Module):
    """Every kind of layer that a LoRA meets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular")
        self.point = nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(2, 8)
        self.to_q = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depth(self.point(self.conv(x))))
        return self.head(torch.tanh(self.to_q(x.mean((2, 3)))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def filled(net: nn.Module, rank: int = 3, alpha: float | None = None, targets: str = "all") -> nn.Module:
    """The network with a LoRA that changes it."""
    add_lora(net, rank, alpha, targets)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(net).values():
        layer.lora_B.data = 0.3 * torch.randn(layer.lora_B.shape, generator=generator)
    return net


def test_it_starts_as_the_identity_and_trains_factors_alone(net: Net) -> None:
    before = net(X)
    names = add_lora(net, 3, targets="all")
    assert names == ["conv", "point", "to_q", "head"]  # not the convolution with groups
    assert torch.equal(net(X), before)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{factor}" for name in names for factor in "AB"}
    net(X).square().sum().backward()
    assert all(layer.lora_B.grad is not None and layer.lora_B.grad.any() for layer in lora_layers(net).values())


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_merged_weights_give_the_same_outputs(net: Net, alpha: float | None) -> None:
    plain, weights = copy.deepcopy(net), {k: v.clone() for k, v in net.state_dict().items()}
    expected = filled(net, alpha=alpha)(X)
    assert (expected - plain(X)).abs().max() > 1e-2
    merge_factors(plain, lora_factors(net))
    merge_lora(net)
    for one in (plain, net):
        assert torch.allclose(one(X), expected, atol=1e-5)
    unmerge_lora(net)
    assert torch.allclose(net(X), expected, atol=1e-5)
    merge_lora(net)
    remove_lora(net)
    assert type(net.to_q) is nn.Linear and type(net.conv) is nn.Conv2d
    assert net.state_dict().keys() == weights.keys()
    assert torch.allclose(net(X), expected, atol=1e-5)


def test_the_scale_is_linear_in_the_weights(net: Net) -> None:
    base = net.to_q.weight.detach().clone()
    delta = lora_factors(filled(net))["to_q"].delta()
    set_lora_scale(net, 0.5)
    merge_lora(net)
    assert torch.allclose(net.to_q.weight, base + 0.5 * delta, atol=1e-6)
    set_lora_scale(net, 0)
    assert torch.allclose(net.to_q.weight, base, atol=1e-6)


def test_merging_a_copy_leaves_the_original(net: Net) -> None:
    """Also where the copy shares the base weights, as averages do."""
    other = copy_for_average(filled(net))
    assert other.get_parameter("to_q.weight") is net.to_q.weight
    weight = net.to_q.weight.detach().clone()
    merge_lora(other)
    assert torch.equal(net.to_q.weight, weight) and not torch.equal(other.get_parameter("to_q.weight"), weight)


def test_targets(net: Net) -> None:
    assert list(target_layers(net)) == ["to_q"]
    assert list(target_layers(net, "conv")) == ["conv"]
    assert list(target_layers(net, "conv, head")) == ["conv", "head"]
    with pytest.raises(BadInput, match="no linear layer or convolution 'to_p'.*did you mean 'to_q'"):
        target_layers(net, "to_p")
    with pytest.raises(BadInput, match="'depth'"):
        target_layers(net, "depth")
    assert len(target_layers(UNet(3, widths=(8, 16)))) > 10  # of hasten's own network: all
    for rank in (0, -1, 2.5):
        with pytest.raises(BadInput, match="rank of a LoRA must be a whole number of at least 1"):
            add_lora(net, rank)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="has a LoRA already"):
        add_lora(filled(net), 2)


def test_a_half_precision_base(net: Net) -> None:
    expected = filled(net)(X)
    net.to_q.half(), net.head.half()  # the factors too
    half = copy.deepcopy(net)
    for layer in lora_layers(half).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    merge_lora(half)
    assert half.get_parameter("to_q.weight").dtype == torch.float16
    assert torch.allclose(half.float()(X), expected, atol=2e-2)


def test_checkpoints_hold_the_factors_alone(net: Net, tmp_path: Path) -> None:
    """A stopped run that resumes ends as one that was not stopped, and its files are small."""

    def run(steps: list[int], folder: Path) -> nn.Module:
        for n in steps:
            torch.manual_seed(0)
            student = Net()
            add_lora(student, 2, targets="all", seed=3)
            trained = TrainedModule("student", student, lambda batch: student(batch["x"]).square().mean(), lr=1e-2)
            fit = Fit(steps=n, device="cpu", tensorboard=False, warmup=1, decay="constant")
            averaged = fit([trained], [{"x": X}] * 9, folder, show=False)["student"]
        return averaged

    uninterrupted, resumed = run([6], tmp_path / "a"), run([3, 6], tmp_path / "b")
    for one, other in zip(lora_factors(uninterrupted).values(), lora_factors(resumed).values(), strict=True):
        assert torch.equal(one.up, other.up) and one.up.any()
    state = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["players"]["student"]
    assert all("lora_" in name for name in (*state["module"], *state["ema"]))
    save_modules({"student": uninterrupted}, tmp_path / "s.safetensors")
    torch.manual_seed(0)
    again = Net()
    add_lora(again, 2, targets="all")
    load_modules({"student": again}, tmp_path / "s.safetensors")
    assert torch.equal(again(X), uninterrupted(X))


def test_the_average_shares_frozen_weights(net: Net) -> None:
    from hasten.distributed.ranks import Ranks
    from hasten.train.checkpoint import TrainingState

    trained = TrainedModule("student", filled(net), lambda batch: net(batch["x"]).sum())
    state = TrainingState([trained], torch.device("cpu"), Ranks(torch.device("cpu")))
    average = dict(state.emas["student"].named_parameters())
    for name, p in net.named_parameters():
        assert (average[name] is p) is ("lora_" not in name)


@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3, 3)])
def test_svd_is_the_best_approximation(shape: tuple[int, ...]) -> None:
    """Eckart-Young: the error is the tail of the singular values, and no approximation of that rank has less."""
    torch.manual_seed(0)
    difference = torch.randn(shape)
    s = torch.linalg.svdvals(difference.double().flatten(1))
    for rank in range(1, 9):
        factors, rest = truncated(difference, rank)
        assert rest == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-9)
        assert float((difference - factors.delta()).norm()) == pytest.approx(rest, abs=1e-5)
        assert factors.shape == shape and factors.rank == rank
    assert rest == 0


def test_extraction(net: Net) -> None:
    student = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "bias" not in name and not name.startswith(("norm", "depth")):
                p += 0.1 * torch.randn(p.shape)
    exact = extract_low_rank(net, student, 100)
    assert exact.total < 1e-12 and not exact.lost
    merged = copy.deepcopy(net)
    merge_factors(merged, exact.factors)
    assert torch.allclose(merged(X), student(X), atol=1e-5)
    with torch.no_grad():
        student.norm.bias += 0.3
        student.to_q.bias += 0.4
    part = extract_low_rank(net, student, 2)
    assert set(part.lost) == {"norm.bias", "to_q.bias"}
    assert part.lost["norm.bias"] == pytest.approx(0.3 * 8**0.5, rel=1e-5)
    before, after = dict(net.named_parameters()), dict(student.named_parameters())
    squares, rest = 0.0, sum(value**2 for value in part.lost.values())
    for name, p in after.items():
        difference = p.detach() - before[name].detach()
        squares += float(difference.norm()) ** 2
        if (layer := name.removesuffix(".weight")) in part.factors:
            error = float((difference - part.factors[layer].delta()).norm())
            assert part.errors[layer] == pytest.approx(error / float(difference.norm()), rel=1e-4, abs=1e-6)
            rest += error**2
    assert part.total == pytest.approx((rest / squares) ** 0.5, rel=1e-4)
    only = extract_low_rank(net, student, 2, "to_q")
    assert set(only.factors) == {"to_q"} and "conv.weight" in only.lost and only.total > part.total


def test_extraction_refuses(net: Net) -> None:
    with pytest.raises(BadInput, match="equal in all layers"):
        extract_low_rank(net, copy.deepcopy(net), 4)
    wide = copy.deepcopy(net)
    wide.head = nn.Linear(6, 3, bias=False)
    with pytest.raises(BadInput, match=r"head.weight is \(2, 6\) in the base and \(3, 6\)"):
        extract_low_rank(net, wide, 4)
    wide.head = nn.Linear(6, 2)
    with pytest.raises(BadInput, match="different weights, first head.bias"):
        extract_low_rank(net, wide, 4)
    with pytest.raises(BadInput, match=r"no layer extra|no layer 'extra'"):
        merge_factors(net, {"extra": truncated(torch.ones(2, 2), 1)[0]})
    with pytest.raises(BadInput, match=r"\(3, 6\) of head, those of Net are \(2, 6\)"):
        merge_factors(net, {"head": truncated(torch.ones(3, 6), 1)[0]})
