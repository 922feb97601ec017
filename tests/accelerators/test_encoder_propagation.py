"""Encoder propagation against the plain sampler, against its own formula, and against what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators import Conflict, SamplingContext, accelerate
from hasten.accelerators.deep_cache import DeepCache
from hasten.accelerators.encoder_propagation import EncoderPropagation
from hasten.denoiser import Denoiser
from hasten.errors import BadInput, HastenError
from hasten.performance.cost import macs
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.predictions import prediction_from
from hasten.samplers import DDIM
from hasten.sampling import Noise
from hasten.schedules import VPCosine

from ._tiny import LABEL, SHAPE, Transformer, compiled, context_of, denoiser_of, random_, relative, sampled, unet

DDIM20 = compiled(DDIM(), 20)


def propagated(denoiser: Denoiser, plan: Any = DDIM20, **options: Any) -> Any:
    return EncoderPropagation(**options).apply(denoiser, context_of(plan, denoiser))


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("extrapolate", [0, 1])
@pytest.mark.parametrize("net", [unet(attention=(1,)), random_(Transformer())])
def test_with_key_steps_alone_it_is_the_plain_sampler(net: nn.Module, parallel: int, extrapolate: int) -> None:
    plain = denoiser_of(net)
    fast = propagated(plain, keys=tuple(range(20)), parallel=parallel, extrapolate=extrapolate)
    assert torch.equal(sampled(fast, DDIM20), sampled(plain, DDIM20))
    assert fast.encoder_calls == fast.decoder_calls == fast.queries == 20


@pytest.mark.parametrize("extrapolate", [0, 1])
@pytest.mark.parametrize("net", [unet(attention=(1,)), random_(Transformer())])
def test_decoding_in_one_batch_is_decoding_one_by_one(net: nn.Module, extrapolate: int) -> None:
    plain = denoiser_of(net)
    fasts = [propagated(plain, parallel=parallel, extrapolate=extrapolate) for parallel in (1, 3, 99)]
    serial, chunks, groups = (sampled(fast, DDIM20) for fast in fasts)
    assert relative(chunks, serial) < 1e-5 and relative(groups, serial) < 1e-5
    assert 1e-4 < relative(serial, sampled(plain, DDIM20)) < 0.5  # something is reused, and it is not nonsense
    keys = (0, 1, 2, 4, 6, 10, 14)
    assert fasts[0].keys == keys and [fast.encoder_calls for fast in fasts] == [7, 7, 7]
    assert [fast.decoder_calls for fast in fasts] == [20, 10, 7]  # groups of 1, 1, 2, 2, 4, 4, 6 in chunks of 3
    assert torch.equal(sampled(fasts[2], DDIM20), groups)  # a second trajectory remembers nothing of the first


def test_every_sampler_in_order() -> None:
    plain = denoiser_of(unet())
    for name in ("heun", "dpm:order=2", "unipc", "ddim:eta=1", "ddpm"):
        plan = compiled(pick("samplers", name), 12)
        keys = tuple(range(0, plan.nfe, 3))
        serial = sampled(propagated(plain, plan, keys=keys), plan)
        parallel = sampled(propagated(plain, plan, keys=keys, parallel=8), plan)
        everything = propagated(plain, plan, keys=tuple(range(plan.nfe)))
        assert torch.equal(sampled(everything, plan), sampled(plain, plan)), name
        assert relative(parallel, serial) < 1e-5 and relative(serial, sampled(plain, plan)) < 1, name


@torch.no_grad()
def test_outputs_are_those_of_the_formula() -> None:
    """Reused, then linearly extrapolated in the angle; each with the embedding and x_t of the evaluation itself."""
    net = unet()
    plain, times = denoiser_of(net), DDIM20.times
    x = torch.randn(20, 3, *SHAPE, generator=torch.Generator().manual_seed(3))
    clock = times.to(torch.float32)
    keys = (0, 2, 5, 9, 13, 17)

    def features(k: int) -> list[Tensor]:
        skips, middle = net.encode(x[k], net.embed(clock[k].expand(3), LABEL))
        return [*skips, middle]

    for extrapolate in (0, 1):
        fast = propagated(plain, keys=keys, extrapolate=extrapolate)
        for k in range(12):
            result = fast(x[k], times[k], label=LABEL)
            i = max(key for key in keys if key <= k)
            saved = features(i)
            if extrapolate and i >= 5:  # before, the key step before the last is the first evaluation
                p = keys[keys.index(i) - 1]
                angle = torch.atan2(VPCosine().sigma(times), VPCosine().alpha(times))
                r = float((angle[k] - angle[i]) / (angle[i] - angle[p]))
                saved = [new + r * (new - old) for old, new in zip(features(p), saved)]
            raw = net.decode(saved[:-1], saved[-1], net.embed(clock[k].expand(3), LABEL))
            alpha, sigma = VPCosine().alpha(times[k]), VPCosine().sigma(times[k])
            torch.testing.assert_close(result, (alpha * x[k] - sigma * raw).float(), rtol=1e-4, atol=1e-5)


def test_a_change_of_conditions_or_batch_is_a_key_step() -> None:
    plain = denoiser_of(unet())
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    for parallel in (1, 9):
        fast = propagated(plain, keys=(0, 5, 10, 15), parallel=parallel)
        times = DDIM20.times
        fast(x, times[0], label=LABEL)
        fast(x, times[1], label=LABEL.clone())
        assert fast.encoder_calls == 1
        other = LABEL.flip(0)
        torch.testing.assert_close(fast(x, times[2], label=other), plain(x, times[2], label=other))
        assert fast.encoder_calls == 2
        fast(x, times[3], label=other)
        torch.testing.assert_close(fast(x[:2], times[4], label=other[:2]), plain(x[:2], times[4], label=other[:2]))
        assert fast.encoder_calls == 3
        fast.reset()
        torch.testing.assert_close(fast(x, times[0], label=LABEL), plain(x, times[0], label=LABEL))


def test_cost_is_what_the_formula_predicts() -> None:
    """Multiply-accumulates of samplings against 1 / (1 - f (1 - k / N)), serial and parallel."""
    net = unet(widths=(16, 32), attention=(0, 1))
    plain = denoiser_of(net)
    x, time = torch.randn(3, *SHAPE), torch.full((3,), 0.5)
    emb = net.embed(time, LABEL)
    encoder = macs(net.encode, x, emb)
    whole = macs(net, x, time, LABEL)
    for parallel in (1, 4):
        fast = propagated(plain, parallel=parallel)
        result = macs(sampled, plain, DDIM20) / macs(sampled, fast, DDIM20)
        assert result == pytest.approx(fast.expected_speedup(encoder / whole), rel=0.01)
        assert result > 1.2


def test_first_blocks_of_a_transformer() -> None:
    net = random_(Transformer())
    plain = denoiser_of(net)
    for first, expected in ((None, [7, 7, 7, 20]), (1, [7, 20, 20, 20])):
        fast = propagated(plain, first=first)
        net.ran = [0] * 4
        sampled(fast, DDIM20, scale=1.0)
        assert net.ran == expected
    with pytest.raises(BadInput, match="1 to 3 of this network's 4 blocks, found 4"):
        propagated(plain, first=4)
    with pytest.raises(BadInput, match="first is for transformers"):
        propagated(denoiser_of(unet()), first=1)


class Still(nn.Module):
    """A network with output 0."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("until", [0.5, 0.0, 2.0])
def test_injection_into_a_still_network_is_a_recursion(until: float) -> None:
    """DDIM with eps = 0: c <- (c + amount [t < until]) alpha_s / alpha_r."""
    accelerator = EncoderPropagation(inject=0.003, until=until)
    plain = denoiser_of(Still(), "eps")
    moved = accelerator.plan(DDIM20, plain)
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c, alpha = 1.0, VPCosine().alpha(DDIM20.times)
    for k in range(20):
        c = (c + 0.003 * float(DDIM20.times[k] < until)) * float(alpha[k + 1] / alpha[k])
    assert relative(moved(plain, x), c * x) < 1e-6
    assert (until == 0) == torch.equal(moved(plain, x), DDIM20(plain, x))


@pytest.mark.parametrize("name", ["v", "eps", "flow"])
def test_injection_is_the_papers_loop(name: str) -> None:
    """The network's own output is unchanged, the state is shifted, and the update uses both."""
    plain, amount, until = denoiser_of(unet(classes=0), name), 0.02, 0.5
    schedule, prediction = plain.schedule, prediction_from(name)
    times = DDIM20.times
    x = z = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t, s in zip(times, times[1:]):
        raw = plain.raw(x, t)
        x = x + amount * z if t < until else x
        (a, b), (a_s, b_s) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, s))
        _, c_skip, c_out = prediction.coefficients(a, b)
        x0 = c_skip * x + c_out * raw
        x = a_s * x0 + b_s * (x - a * x0) / b
    moved = EncoderPropagation(inject=amount, until=until).plan(DDIM20, plain)
    torch.testing.assert_close(moved(plain, z), x, rtol=1e-5, atol=1e-6)
    assert relative(DDIM20(plain, z), x) > 1e-3
    assert EncoderPropagation().plan(DDIM20, plain) is DDIM20


def test_searched_key_steps_beat_the_patterns() -> None:
    plain = denoiser_of(unet(attention=(1,)))
    target = sampled(plain, DDIM20, seed=100)
    errors = {}
    for keys in ("paper", "found", "uniform"):
        fast = propagated(plain, keys=keys, budget=7, every=3)
        assert len(fast.keys) == 7 and fast.keys[0] == 0
        errors[keys] = relative(sampled(fast, DDIM20, seed=100), target)
    # an untrained network changes evenly, so that keys at equal distances are nearly the best for it
    assert errors["found"] < 0.8 * errors["paper"] and errors["found"] < 1.1 * errors["uniform"], errors


def test_unsupported_options_and_networks_raise() -> None:
    plain = denoiser_of(unet())
    few = compiled(DDIM(), 8)
    for keys in ("paper", "found", (0, 4)):
        with pytest.raises(BadInput, match="needs 9 model evaluations or more, found 8"):
            propagated(plain, few, keys=keys)
    with pytest.raises(BadInput, match="11 of 20 model evaluations would depend on key step 0"):
        propagated(plain, keys=(0, 11))
    with pytest.raises(BadInput, match="times of all model evaluations"):
        EncoderPropagation().apply(plain, SamplingContext())
    with pytest.raises(BadInput, match="needs calibration samples"):
        EncoderPropagation(keys="found").apply(plain, SamplingContext(times=context_of(DDIM20).times))
    with pytest.raises(BadInput, match="Still has no split point: supported are"):
        propagated(denoiser_of(Still()))
    with pytest.raises(BadInput, match="found Still"):
        EncoderPropagation().apply(Still(), context_of(DDIM20))
    with pytest.raises(BadInput, match="did you mean 'uniform'"):
        propagated(plain, keys="unifrom")
    with pytest.raises(BadInput, match="extrapolate is 0"):
        EncoderPropagation(extrapolate=2)
    with pytest.raises(Conflict, match="both claim 'features'"):
        accelerate(plain, [EncoderPropagation(), DeepCache()], context_of(DDIM20))
    with pytest.raises(HastenError, match="cannot be steered"):
        propagated(plain).features(torch.zeros(1, *SHAPE), DDIM20.times[0])


def test_another_sampling_than_the_planned_one_raises() -> None:
    fast = propagated(denoiser_of(unet()))
    with pytest.raises(BadInput, match=r"made for t = 0.98 at model evaluation 0, found t = 0.5"):
        fast(torch.zeros(1, *SHAPE), 0.5)
    other = compiled(DDIM(), 21)
    with pytest.raises(BadInput, match="at model evaluation 1, found t = "):
        sampled(fast, other)
    sampled(fast, DDIM20)
    with pytest.raises(BadInput, match="made for 20 model evaluations, found one more"):
        fast(torch.zeros(1, *SHAPE), 0.0)
    x = torch.zeros(2, *SHAPE)
    fast.reset()
    with pytest.raises(BadInput, match="several times at once"):
        fast(x, torch.tensor([0.98, 0.5], dtype=torch.float64))
    fast(x, torch.tensor([0.98, 0.98], dtype=torch.float64))


def test_the_denoiser_is_not_changed_and_half_precision_works() -> None:
    plain = denoiser_of(unet())
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    fast = propagated(plain, extrapolate=1, parallel=4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = sampled(fast, DDIM20)
    assert rough.dtype == torch.float32 and relative(rough, sampled(fast, DDIM20)) < 0.1
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert "forward" not in vars(plain.net) and fast.schedule is plain.schedule


def test_on_a_model() -> None:
    model = hasten.load("fashion")
    info: dict[str, Any] = {"n": 2, "sampler": "ddim", "times": "trailing", "steps": 20, "guidance_scale": 2.0}
    plain = model.sample(**info)
    spelled = "encoder_propagation:keys=(0,1,2,4,6,9,12,15,18),parallel=4,extrapolate=1"
    assert pick("accelerators", spelled).keys == (0, 1, 2, 4, 6, 9, 12, 15, 18)
    fast = model.sample(**info, accelerators=(spelled,))
    assert 0 < relative(fast, plain) < 0.15


@pytest.mark.slow
def test_searched_key_steps_beat_the_papers_on_the_bundled_teacher() -> None:
    """50 DDIM steps, 9 keys, final samples of other seeds than the search saw."""
    model = hasten.load("fashion")
    info: dict[str, Any] = {"sampler": "ddim", "times": "trailing", "steps": 50, "guidance_scale": 1.0}
    result: Any = model.way(**info, accelerators=("encoder_propagation:keys=found,samples=4,seed=1000",)).denoiser
    assert len(result.keys) == 9
    keys = f"keys=({','.join(map(str, result.keys))})"
    plain = model.sample(10, **info)
    paper, hold, line = (
        relative(model.sample(10, **info, accelerators=(f"encoder_propagation:{options}",)), plain)
        for options in ("keys=paper", keys, f"{keys},extrapolate=1")
    )
    assert hold < 0.85 * paper and line < 0.8 * hold, (line, hold, paper)


def test_draw_takes_it_as_any_denoiser() -> None:
    plain = denoiser_of(unet())
    fast = propagated(plain)
    noise = Noise(range(3), SHAPE)
    one = draw(fast, DDIM(), DDIM20.times, noise, label=LABEL)
    torch.testing.assert_close(one, sampled(fast, DDIM20, scale=1.0))
