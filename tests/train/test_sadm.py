"""Structure-guided training: identities of the relation distance, steps of both players, and the exact plain step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.metrics.structure_distance import random_features, structure_distance
from hasten.model import Model
from hasten.nets.relation_encoder import RelationEncoder
from hasten.schedules import VPCosine
from hasten.train import DenoisingLoss, Fit, TrainedModule
from hasten.train.relations import relation_distance, sample_distances
from hasten.train.sadm import (
    Estimates,
    Sadm,
    StructuredLoss,
    StructureTerm,
    clean_samples,
    structure_options,
    with_structure,
)

from ..factories import noise_images, tiny_denoiser, weights

SHAPE = (1, 8, 8)


def features(n: int = 12, d: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def images(n: int = 8) -> Tensor:
    return noise_images(n).float() / 127.5 - 1


# ---- the distance (checks 3 and 5, and the isometry of processes) ----


def test_equal_batches_have_distance_zero_and_no_gradient() -> None:
    encoder = RelationEncoder(SHAPE, width=8)
    x = images()
    x0 = x.clone().requires_grad_(True)
    distance = relation_distance(encoder(x), encoder(x0))
    (gradient,) = torch.autograd.grad(distance, x0)
    assert float(distance.detach()) == 0 and bool((gradient == 0).all())


def test_permutations_and_isometries_leave_the_distance() -> None:
    a, b = features(), features(seed=1)
    plain = relation_distance(a, b)
    order = torch.randperm(len(a))
    w = torch.rand(len(a), dtype=torch.float64)
    assert float(relation_distance(a[order], b[order])) == pytest.approx(float(plain), abs=1e-15)
    weighted = relation_distance(a, b, w)
    assert float(relation_distance(a[order], b[order], w[order])) == pytest.approx(float(weighted), abs=1e-7)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    assert abs(float(relation_distance(a @ rotation, b @ rotation) - plain)) < 1e-14
    assert abs(float(relation_distance(3 * a, 3 * b) - plain)) < 1e-7  # scale-free, but for the 1e-8 under the root
    assert float(relation_distance(a, b[order])) != pytest.approx(float(plain), rel=1e-3)


def test_contracted_samples_are_seen() -> None:
    """Estimates that are all blurred alike: half of the distances. Divided by its own mean each, nothing would show."""
    a = features()
    assert float(relation_distance(a, 0.5 * a)) > 0.1


def test_duplicates_give_finite_gradients() -> None:
    encoder = RelationEncoder(SHAPE, width=8)
    x = images(2)[[0, 0, 0, 1]]
    for x0 in (x.clone(), x[[0, 0, 0, 0]] + 0.1, torch.zeros_like(x)):
        x0.requires_grad_(True)
        distance = relation_distance(encoder(x), encoder(x0))
        grads = torch.autograd.grad(distance, [x0, *encoder.parameters()])
        assert all(bool(g.isfinite().all()) for g in (distance, *grads))
    same = torch.zeros(4, 3).requires_grad_(True)
    (gradient,) = torch.autograd.grad(sample_distances(same).sum(), same)
    assert bool((gradient == 0).all())


def test_weights_and_groups_leave_pairs_out() -> None:
    a, b = features(), features(seed=1)
    w = (torch.arange(12) < 5).double()
    assert float(relation_distance(a, b, w)) == pytest.approx(float(relation_distance(a[:5], b[:5])), rel=1e-6)
    groups = (torch.arange(12) >= 6).long()
    moved = b.clone()
    moved[6:] = b[6:] @ torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]  # turns one group as a whole
    assert float(relation_distance(a, moved, groups=groups)) == pytest.approx(
        float(relation_distance(a, b, groups=groups)), rel=1e-6
    )
    assert float(relation_distance(a, moved)) != pytest.approx(float(relation_distance(a, b)), rel=1e-4)
    assert float(relation_distance(a, b, torch.zeros(12))) == 0
    with pytest.raises(BadInput, match="2 samples"):
        relation_distance(a[:1], b[:1])


def test_distances_of_half_precision_are_in_float32() -> None:
    f = 200 * features().half()  # squares overflow float16
    with torch.autocast("cpu", torch.bfloat16):
        d = sample_distances(f)
    assert d.dtype == torch.float32 and bool(d.isfinite().all())
    assert torch.allclose(d, sample_distances(f.double()).float(), rtol=1e-4)


@pytest.mark.parametrize("shape", [(2,), (4, 9), (1, 28, 28), (3, 5, 33), (4, 3, 8, 8)])
def test_encoder_is_bounded_for_samples_of_any_shape(shape: tuple[int, ...]) -> None:
    out = RelationEncoder(shape, width=8)(100 * torch.randn(3, *shape))
    assert out.shape == (3, 128) and torch.allclose(out.norm(dim=1), torch.ones(3), atol=1e-4)


# ---- steps of both players (check 4) ----


def players(
    times: str = "shared", prediction: str = "v", **options: float
) -> tuple[Denoiser, StructureTerm, StructuredLoss]:
    torch.manual_seed(3)
    denoiser = tiny_denoiser(prediction=prediction, trainable=True)
    structure = StructureTerm(Sadm(times=times, start=0.0, width=8, **options), SHAPE)
    return denoiser, structure, StructuredLoss(DenoisingLoss(label_drop=0.0), denoiser, structure)


def estimates(denoiser: Denoiser) -> Estimates:
    """Of a fixed batch with fixed noise."""
    torch.manual_seed(0)
    x, t = images(), torch.full((8,), 0.4, dtype=torch.float64)
    x_t = denoiser.schedule.alpha(t[:1]).float() * x + denoiser.schedule.sigma(t[:1]).float() * torch.randn_like(x)
    raw = denoiser.raw(x_t, t)
    return Estimates(raw, clean_samples(denoiser, x_t, t, raw), x)


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_encoder_step_raises_and_network_step_lowers_the_distance(prediction: str) -> None:
    denoiser, structure, _ = players(prediction=prediction)
    e = estimates(denoiser)
    before = structure.distance(e.target, e.x0.detach(), None, None).detach()
    batch = {"structure_real": e.target, "structure_generated": e.x0.detach()}
    structure.encoder_loss(batch).backward()
    with torch.no_grad():
        for p in structure.encoder.parameters():
            p -= 0.02 * p.grad
    raised = structure.distance(e.target, e.x0.detach(), None, None)
    assert float(raised.detach()) > float(before)
    zero = (e.output * 0).sum()  # a loss without a gradient
    structure.norms.copy_(torch.tensor([1.0, 1.0]))
    structure.count.fill_(1000)  # ratio of norms .995
    structure.add(zero, e.output, e, {}).backward()
    with torch.no_grad():
        for p in denoiser.parameters():
            p -= 0.1 * p.grad
    assert all(p.grad is not None for p in denoiser.parameters())
    e = estimates(denoiser)
    assert float(structure.distance(e.target, e.x0, None, None)) < float(raised)


def test_term_has_the_weight_that_was_asked_for() -> None:
    """At the network's output the gradients of loss and term have the ratio 1 : weight, and the value is the loss's."""
    _, structure, loss = players("own", weight=0.25)
    seen: dict[str, Tensor] = {}
    plain_evaluate = DenoisingLoss.evaluate

    def evaluate(self: DenoisingLoss, denoiser: Denoiser, batch: dict[str, Tensor]) -> Any:
        result = plain_evaluate(self, denoiser, batch)
        seen["raw"], seen["loss"] = result.raw, result.loss
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoisingLoss, "evaluate", evaluate)
        total = loss({"x": images()})
    assert float(total) == float(seen["loss"])
    (whole,) = torch.autograd.grad(total, seen["raw"], retain_graph=True)
    (plain,) = torch.autograd.grad(seen["loss"], seen["raw"], retain_graph=True)
    assert float((whole - plain).norm() / plain.norm()) == pytest.approx(0.25, rel=1e-4)
    assert not any(p.grad is not None for p in structure.encoder.parameters())


def test_noise_levels_are_shared_and_follow_the_gate() -> None:
    denoiser, structure, loss = players(gate="snr")
    times = []
    denoiser.raw = lambda x_t, t, **cond: times.append(t) or 0 * x_t  # type: ignore[method-assign]
    for _ in range(400):
        structure.count += 1
        loss.at_one_time({"x": images(3)})
    t = torch.stack(times)
    assert bool((t == t[:, :1]).all())
    grid = torch.linspace(0, 1, 10001, dtype=torch.float64)
    gate = Sadm().gate_at(denoiser.schedule.alpha(grid), denoiser.schedule.sigma(grid))
    expected = float((gate * grid).sum() / gate.sum())
    assert float(t[:, 0].mean()) == pytest.approx(expected, abs=2e-3)
    assert float(gate[0]) == 1 and float(gate[-1]) < 1e-9


# ---- the plain step, bit for bit (check 2) ----


def fitted(options: Sadm | None, out: Path, steps: int = 6, **settings: Any) -> tuple[Tensor, dict[str, nn.Module]]:
    denoiser = tiny_denoiser(2, trainable=True, null_label=2)
    loss = DenoisingLoss(label_drop=0.3)
    module = TrainedModule("model", denoiser, lambda batch: loss(denoiser, batch))
    modules = [module] if options is None else with_structure(module, loss, denoiser, SHAPE, options)
    batches = [{"x": images(8).roll(k, 0), "label": torch.arange(8) % 2} for k in range(steps)]
    fit = Fit(**{"steps": steps, "device": "cpu", "tensorboard": False, **settings})
    emas = fit(modules, batches, out, show=False)
    return weights(denoiser), emas


@pytest.mark.parametrize("times", ["shared", "own"])
def test_weight_zero_and_the_time_before_the_start_are_the_plain_steps(times: str, tmp_path: Path) -> None:
    plain, _ = fitted(None, tmp_path / "plain")
    zero, emas = fitted(Sadm(weight=0.0, times=times), tmp_path / "zero")
    assert torch.equal(zero, plain) and "structure" not in emas
    # the encoder begins at 4 of 6 steps, the term one step later, so that its first 5 are plain
    options = Sadm(times=times, start=0.6, width=8)
    late, emas = fitted(options, tmp_path / "late", warmup=1, decay="constant")
    assert int(emas["structure"].count) == 2 and not torch.equal(late, plain)
    five, _ = fitted(options, tmp_path / "five", warmup=1, decay="constant", accumulate=2)
    assert bool(five.isfinite().all())
    before = fitted(None, tmp_path / "before", 5, warmup=1, decay="constant")[0]
    assert torch.equal(
        fitted(options.__class__(times=times, start=0.8, width=8), tmp_path / "w", 5, warmup=1, decay="constant")[0],
        before,
    )


def test_bf16_and_r1_train_with_finite_numbers(tmp_path: Path) -> None:
    options = Sadm(start=0.0, width=8, r1=0.1, loss="smooth_l1")
    fitted_weights, emas = fitted(options, tmp_path, 2, precision="bf16")
    assert bool(fitted_weights.isfinite().all()) and bool(weights(emas["structure"]).isfinite().all())


def test_encoder_without_training_keeps_its_weights() -> None:
    for adversarial in (False, True):
        _, structure, loss = players(adversarial=adversarial)
        batch = {"x": images()}
        loss(batch)
        structure.encoder_loss(batch).backward()
        gradients = torch.cat([p.grad.flatten() for p in structure.encoder.parameters() if p.grad is not None])
        assert bool((gradients != 0).any()) is adversarial and set(batch) == {"x"}


def test_resumed_run_is_exact(tmp_path: Path) -> None:
    options = Sadm(start=0.0, width=8)
    constant = {"decay": "constant", "warmup": 1}
    whole, _ = fitted(options, tmp_path / "whole", 4, **constant)
    denoiser_and_rest = tmp_path / "parts"
    fitted(options, denoiser_and_rest, 2, **constant)
    again, _ = fitted(options, denoiser_and_rest, 4, **constant)
    assert torch.equal(whole, again)


def test_options_are_read_and_refused() -> None:
    assert structure_options("0.1") == structure_options(0.1) == Sadm(weight=0.1)
    assert structure_options("weight=.2,times=own,gate=alpha") == Sadm(weight=0.2, times="own", gate="alpha")
    assert structure_options(0.0) is None and structure_options(None) is None
    for bad in ("-1", "weight=.1,gate=foo", "weight=.1,lambda=2", "much", "weight=.1,start=1"):
        with pytest.raises(BadInput) as error:
            structure_options(bad)
        assert "\n" not in str(error.value)


def test_table_schedules_of_eps_networks() -> None:
    """A gate of 0 at pure noise, and estimates that stay finite there."""
    denoiser = tiny_denoiser(schedule=VPCosine(offset=0.0), prediction="v")
    x, t = images(2), torch.ones(2, dtype=torch.float64)
    assert bool(clean_samples(denoiser.replace(prediction="eps"), x, t, x).isfinite().all())


# ---- the ring of eight modes (check 1) ----


class RingNet(nn.Module):
    """`net(x (B, 2), time (B,))`, a small perceptron."""

    frequencies: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        self.register_buffer("frequencies", 2.0 ** torch.arange(4) * math.pi / 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        phase = time[:, None] * self.frequencies
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))


def ring(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (n,), generator=generator) * math.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2, generator=generator)


def mean_discrepancy(x: Tensor, y: Tensor) -> float:
    """MMD^2 with a sum of three Gaussian kernels."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return sum(
            (torch.exp(-(torch.cdist(a, b) ** 2) / (2 * s * s)) for s in (0.1, 0.3, 1.0)), torch.zeros(())
        ).mean()

    return float(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


@pytest.mark.slow
def test_ring_of_eight_modes_gets_closer_to_the_structure_of_the_data(tmp_path: Path) -> None:
    """Equal iterations, three seeds, 8 DDIM steps: structure distance in frozen random features falls by a tenth or
    more, all modes stay, and the distributions are no further apart."""
    figures: dict[str, list[tuple[float, float, float]]] = {"plain": [], "term": []}
    real, steps = ring(1000, 99), 400
    for seed in range(3):
        for name, options in (("plain", None), ("term", Sadm(weight=1.0, start=0.0, lr=1e-3))):
            torch.manual_seed(seed)
            denoiser = Denoiser(RingNet(), VPCosine(offset=0.0), "v")
            loss = DenoisingLoss(label_drop=0.0)
            module = TrainedModule("model", denoiser, lambda b, d=denoiser, f=loss: f(d, b), lr=2e-3)
            modules = [module] if options is None else with_structure(module, loss, denoiser, (2,), options)
            fit = Fit(steps=steps, warmup=1, seed=seed, device="cpu", tensorboard=False)
            batches = [{"x": ring(128, 1000 * seed + k)} for k in range(steps)]
            trained = fit(modules, batches, tmp_path / f"{name}{seed}", show=False)["model"]
            model = Model(trained.eval(), name, (2,))  # type: ignore[arg-type]
            x = model.sample(1000, seed=7, sampler="ddim", times="trailing", steps=8)
            modes = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
            share = torch.bincount(modes, minlength=8) / 1000
            first, second = (random_features(points) for points in (real, x))
            distance = sum(structure_distance(a, b) for a, b in zip(first, second, strict=True)) / len(first)
            figures[name].append((distance, float(torch.special.entr(share).sum()), mean_discrepancy(real, x)))
    plain, term = (torch.tensor(figures[name]).mean(0).tolist() for name in ("plain", "term"))
    print(f"structure distance, entropy of modes, MMD^2: plain {plain}, with the term {term}")
    assert term[0] <= 0.9 * plain[0]
    assert term[1] >= plain[1] - 0.01
    assert term[2] <= 1.05 * plain[2]
