"""Quantisation: learned rounding, calibration over time, split shortcuts, groups, ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hasten
from hasten.accelerators import Call, Recorder, SamplingContext, accelerate
from hasten.accelerators._quantization.calibration import (
    Samples,
    calibration_samples,
    fit_activations,
    time_group_bounds,
)
from hasten.accelerators._quantization.fake_quant import FakeQuantLayer, fake_quant_layers
from hasten.accelerators._quantization.mixed_precision import most_sensitive
from hasten.accelerators._quantization.rounding import (
    Block,
    initial_v,
    learn_rounding,
    learn_steps,
    mean_error,
    rectified_sigmoid,
)
from hasten.accelerators._quantization.session import relative_error
from hasten.accelerators._quantization.units import UnitInputs, trace_layers
from hasten.accelerators.quantize import Quantize
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.nets.time_groups import TimeGroups
from hasten.nets.unet import UNet
from hasten.schedules import VPCosine
from tests.test_model import tiny


def mixed(n: int, seed: int) -> Tensor:
    """Activations like those in a network, (n, 32, 8, 8): 12 sources mixed into 32 channels, then SiLU."""
    mix = torch.randn(32, 12, generator=torch.Generator().manual_seed(99)) / 12**0.5
    z = torch.randn(n, 12, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.silu(torch.einsum("oc,nchw->nohw", 1.5 * mix, z))


def block_of(layer: nn.Module, sim: FakeQuantLayer, x: Tensor) -> Block:
    with torch.no_grad():
        return Block(sim, UnitInputs([((x,), {})]), [layer(x)], torch.zeros(len(x), dtype=torch.long))


@torch.no_grad()
def squared(layer: nn.Module, sim: nn.Module, x: Tensor) -> float:
    return float((layer(x) - sim(x)).square().mean())


def test_learned_rounding_beats_nearest_on_held_out_inputs() -> None:
    torch.manual_seed(0)
    layer, held_out = nn.Conv2d(32, 32, 3, padding=1), mixed(64, 2)
    sim = FakeQuantLayer(layer, [0], 4)
    v = initial_v(sim.pieces[0])
    ratio = sim.pieces[0].target / sim.pieces[0].scale[:, None, None, None]
    torch.testing.assert_close(
        rectified_sigmoid(v), ratio - ratio.floor(), atol=1e-4, rtol=0
    )  # it starts at the weight itself
    nearest = squared(layer, sim, held_out)
    result = learn_rounding(block_of(layer, sim, mixed(128, 1)), 300, batch=32)
    assert squared(layer, sim, held_out) <= 0.6 * nearest  # measured: .39
    assert result["settled"] >= 0.95
    q = sim.pieces[0].q
    assert torch.equal(q, q.round()) and q.min() >= 0 and q.max() <= 15


def bimodal(n: int, seed: int) -> Tensor:
    """Inputs like those of a layer with a skip connection: 16 strong channels and 16 weak ones."""
    x = torch.randn(n, 32, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x * torch.cat([torch.full((16,), 20.0), torch.full((16,), 0.2)])[:, None, None]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_split_shortcut_beats_one_range(bits: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(32, 16, 1), bimodal(16, 1)
    with torch.no_grad():
        layer.weight[:, 16:] *= 100  # the weak half counts as much as the other
    wrong = []
    for edges in ([0, 16], [0]):
        sim = FakeQuantLayer(layer, edges, bits)
        samples = Samples(x, torch.zeros(len(x)), {}, torch.zeros(len(x), dtype=torch.long))
        net = nn.Sequential(sim)
        fit_activations(Asked(net), net, samples, 1, "search", 16)
        wrong.append(squared(layer, sim, bimodal(16, 2)))
    assert wrong[0] < 0.05 * wrong[1]  # measured: .0002 and .004


class Asked(nn.Module):
    """What `fit_activations` asks of a denoiser, of a network without a time."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x)


def test_both_halves_of_a_split_layer_are_settled() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(32, 16, 1), mixed(64, 1)
    sim = FakeQuantLayer(layer, [0, 16], 4)
    before = [piece.q.clone() for piece in sim.pieces]
    result = learn_rounding(block_of(layer, sim, x), 300, batch=32)
    assert result["settled"] >= 0.95 and result["error"] < result["nearest"]
    for piece, old in zip(sim.pieces, before):
        assert 0 < int((piece.q != old).sum()) and (piece.q - old).abs().max() <= 1


def test_learned_steps_correct_a_range_with_an_outlier() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(32, 16, 1), mixed(64, 1)
    sim = FakeQuantLayer(layer, [0], 8)
    sim.pieces[0].act_scale, sim.pieces[0].act_zero = torch.tensor([x.max() * 8 / 255]), torch.tensor([2.0])
    block = block_of(layer, sim, x)
    result = learn_steps(block, 200, rate=2e-2)
    assert result["error"] < 0.5 * result["before"] and result["error"] == mean_error(block, 32)


def net_of_two() -> UNet:
    torch.manual_seed(0)
    net = UNet(channels=1, widths=(8, 16), classes=3, embedding=16, attention=(1,))
    for p in net.parameters():
        nn.init.normal_(p, std=0.15)
    return net


def test_blocks_come_in_network_order_and_shortcuts_are_split_where_h_ends() -> None:
    net = net_of_two()
    denoiser = Denoiser(net, VPCosine(), "v").eval()
    result = trace_layers(
        denoiser, net, (torch.zeros(1, 1, 8, 8), torch.tensor([0.5]), {"label": torch.zeros(1).long()})
    )
    layers = {n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(result.layers) == layers and [n for _, ns in result.units for n in ns] != sorted(layers)
    assert result.splits == {
        "up.0.0.block.shortcut": 16,
        "up.0.1.block.shortcut": 16,
        "up.1.0.block.shortcut": 16,
        "up.1.1.block.shortcut": 8,
    }
    names = [name for name, _ in result.units]
    assert names[:4] == ["time.1", "time.3", "conv_in", "down.0.0.block"] and names[-1] == "conv_out"
    assert names.index("middle.0.attention") == names.index("middle.0.block") + 1
    assert dict(result.units)["down.1.0.block"] == [
        f"down.1.0.block.{n}" for n in ("conv1", "modulation", "shortcut", "conv2")
    ]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def recorded_calls(n: int, seed: int, model: Any = None) -> list[Call]:
    model = tiny() if model is None else model
    recorder = Recorder(model.denoiser)
    dataclasses.replace(model, denoiser=recorder).sample(n, seed=seed, batch_size=n)
    return recorder.calls


def test_calibration_uses_evenly_spaced_steps_in_a_random_order() -> None:
    calls = [
        (torch.full((2, 1), float(k)), 1 - k / 50, {"label": torch.tensor([k, k]), "scale": 2.0}) for k in range(50)
    ]
    result = calibration_samples(calls, [t for _, t, _ in calls], 20, seed=0, bounds=(0.3, 0.6))
    assert sorted(set(result.x.flatten().tolist())) == [k * 50 // 20 for k in range(20)] and len(result) == 40
    assert result.x.flatten().tolist() != sorted(result.x.flatten().tolist())
    x, t, cond = result.rows(torch.tensor([3, 7]))
    assert torch.equal(cond["label"], x.flatten().long()) and cond["scale"] == 2.0
    torch.testing.assert_close(t, 1 - x.flatten().double() / 50)
    assert torch.equal(result.group, torch.bucketize(result.t, torch.tensor([0.3, 0.6], dtype=torch.float64)))
    assert all(set(result.group[result.t == one].tolist()) == {g} for g, (_, t, _) in result.batches(7) for one in t)
    assert len(time_group_bounds([0.1, 0.2, 0.3, 0.4], 2)) == 1 and time_group_bounds([0.1, 0.2, 0.3, 0.4], 2)[
        0
    ] == pytest.approx(0.25)
    with pytest.raises(BadInput, match="5 groups of times"):
        time_group_bounds([0.1, 0.2], 5)


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.set_num_threads(1)
    model = hasten.load("fashion")
    return model, recorded_calls(6, 10**6, model), recorded_calls(4, 3 * 10**6, model)


@pytest.mark.slow
def test_the_teacher_in_eight_bits_keeps_its_x0(teacher: Any) -> None:
    model, calls, held_out = teacher
    before = {key: value.clone() for key, value in model.denoiser.state_dict().items()}
    method = Quantize(images=6)
    built = accelerate(model.denoiser, [method], SamplingContext(None, lambda n, seed: calls))
    assert relative_error(model.denoiser, built, method.samples(model.denoiser, held_out)) < 0.02  # measured: .012
    after = model.denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.slow
def test_calibration_over_all_times_beats_the_first_ones(teacher: Any) -> None:
    """Ranges from the noisiest quarter of the time steps fit the last ones worse than ranges from all of them."""
    model, calls, held_out = teacher
    method = Quantize(images=6)
    late = method.samples(model.denoiser, held_out[-3:])
    wrong = {}
    for name, recorded in {"early": calls[: len(calls) // 4], "spread": calls}.items():
        session = method.start(model.denoiser, recorded)
        session.fit_ranges()
        wrong[name] = relative_error(model.denoiser, session.rounded, late)
    assert wrong["spread"] < 0.8 * wrong["early"], wrong


def test_integer_layers_are_the_fake_quantized_ones_and_the_model_is_not_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, method = tiny(), Quantize(weights=4, rank=2, images=4)
    calls = recorded_calls(4, 0, model)
    session = method.start(model.denoiser, calls)
    built = method.finish(session)
    samples = method.samples(model.denoiser, calls)
    assert relative_error(session.rounded, built, samples) < 2e-3  # the branch is in float16
    assert 1e-4 < relative_error(model.denoiser, built, samples) < 0.3
    assert built.net is not model.denoiser.net and isinstance(model.denoiser.net.middle[0].block.conv1, nn.Conv2d)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.denoiser.modules())
    with pytest.raises(BadInput, match="quantised already"):
        method.start(built, calls)


def error_in_four_bits(**options: Any) -> float:
    model = tiny()
    calls, held_out = recorded_calls(8, 0, model), recorded_calls(6, 100, model)
    method = Quantize(weights=4, acts=None, images=8, **options)
    built = method.apply(model.denoiser, SamplingContext(None, lambda n, seed: calls))
    return relative_error(model.denoiser, built, method.samples(model.denoiser, held_out))


@pytest.fixture(scope="module")
def nearest() -> float:
    return error_in_four_bits()


@pytest.mark.parametrize("options", [{"rank": 6}, {"eight": 0.1}, {"rounding": "adaround", "iterations": 50}])
def test_every_option_for_four_bits_beats_nearest(options: dict[str, Any], nearest: float) -> None:
    wrong = error_in_four_bits(**options)
    assert wrong < 0.9 * nearest, (wrong, nearest)  # measured: .51, .43 and .83, biases as they were


def test_corrected_biases_leave_no_mean_error() -> None:
    model = tiny()
    calls, held_out = recorded_calls(8, 0, model), recorded_calls(8, 100, model)
    method = Quantize(weights=4, groups=3)
    recorded = {}
    for correct in (False, True):
        session = method.start(model.denoiser, calls)
        session.fit_ranges()
        if correct:
            session.correct_biases()
        samples = method.samples(model.denoiser, held_out)
        (_, batch), *_ = samples.batches(len(samples))
        outputs = [denoiser.raw(batch[0], batch[1], **batch[2]) for denoiser in (model.denoiser, session.rounded)]
        recorded[correct] = (
            float((outputs[1] - outputs[0]).mean().abs()),
            relative_error(model.denoiser, session.rounded, samples),
        )
        for name, layer in fake_quant_layers(session.net).items():
            assert (layer.shift is None) == (not correct or layer.layer.bias is None), name
    assert recorded[True][0] < 0.8 * recorded[False][0] and recorded[True][1] < 0.97 * recorded[False][1], (
        recorded
    )  # .58 and .92
    built = fake_quant_layers(session.net)["middle.0.block.conv1"].to_integer()
    saved = model.denoiser.net.middle[0].block.conv1.bias
    assert not torch.equal(built.bias, saved) and torch.equal(
        built.bias, saved + session.net.middle[0].block.conv1.shift
    )


def test_the_most_sensitive_layers_get_eight_bits() -> None:
    error = {"a": 0.31, "b": 0.2, "c": 0.1, "d": 0.0}
    sizes = {"a": 90, "b": 20, "c": 10, "d": 1}  # squared errors a weight: .00107, .002, .001, 0
    assert most_sensitive(sizes, 20, error.__getitem__) == ["b"]
    assert most_sensitive(sizes, 35, error.__getitem__) == ["b", "c"]  # a is next, and does not fit
    assert most_sensitive(sizes, 1000, error.__getitem__) == ["b", "a", "c"]
    model = tiny()
    session = Quantize(weights=4, eight=0.1).start(model.denoiser, recorded_calls(4, 0, model))
    bits = {name: layer.pieces[0].bits for name, layer in fake_quant_layers(session.net).items()}
    weights = {name: model.denoiser.net.get_submodule(name).weight.numel() for name in bits}
    wide = sum(weights[name] for name, count in bits.items() if count == 8)
    assert set(bits.values()) == {4, 8} and 0.05 < wide / sum(weights.values()) <= 0.1
    assert {name for name, count in bits.items() if count == 8} == set(session.int8_layers)


class Growing(nn.Module):
    """A network whose activations are a hundred times larger at t = 1 than at 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.config: dict[str, Any] = {}

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        gain = 100 ** time[:, None, None, None]
        return self.conv(x * gain).mean(1, keepdim=True) / gain


def test_groups_of_times_have_their_own_ranges() -> None:
    denoiser = Denoiser(Growing(), VPCosine(), "x0").eval()
    built = torch.Generator().manual_seed(0)
    calls = [(torch.randn(4, 1, 8, 8, generator=built), 1 - k / 20, {}) for k in range(20)]
    context, wrong = SamplingContext(None, lambda n, seed: calls), []
    for groups in (1, 4):
        quantised = Quantize(groups=groups).apply(denoiser, context)
        wrong.append(relative_error(denoiser, quantised, calibration_samples(calls, [t for _, t, _ in calls], 20, 1)))
    assert wrong[1] < 0.3 * wrong[0]  # measured: .07
    assert isinstance(quantised.net, TimeGroups)  # type: ignore[union-attr]
    x, t = calls[0][0], torch.tensor([1.0, 0.05, 0.6, 0.05], dtype=torch.float64)
    one_by_one = torch.cat([quantised(x[k : k + 1], t[k]) for k in range(4)])
    torch.testing.assert_close(quantised(x, t), one_by_one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 5}, "weights must be 8 or 4 bits, found 5"),
        ({"acts": 4}, "acts must be 8 or none bits, found 4"),
        ({"ranges": "mse"}, "unknown ranges 'mse': "),
        ({"eight": 1.5}, "eight is a fraction of the weights, 0 to 1, found 1.5"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"acts": None, "groups": 2}, "acts is none"),
        ({"acts": None, "learn_steps": True}, "acts is none"),
        ({"keep": ("midle",)}, "did you mean 'middle'"),
        ({"keep": ("*",)}, "no Conv2d or Linear to quantize"),
    ],
)
def test_unsupported_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Quantize(**options).apply(tiny().denoiser, SamplingContext(None, lambda n, seed: recorded_calls(1, 0)))


def test_it_needs_calibration_samples() -> None:
    with pytest.raises(BadInput, match="quantize needs calibration samples"):
        accelerate(tiny().denoiser, [Quantize()])


def test_a_student_with_guidance_and_steps_as_inputs_is_quantised() -> None:
    student = hasten.load("fashion_student")
    quick = Quantize(images=2, steps=4, ranges="minmax")
    calls = student.calls(2, 0, steps=4)
    built = quick.apply(student.denoiser, SamplingContext(None, lambda n, seed: calls))
    assert 1e-4 < relative_error(student.denoiser, built, quick.samples(student.denoiser, calls)) < 0.1
