"""Structure-guided adversarial training: the relations of the samples of a batch as a further term of a loss.

The minimax of the paper: the network minimises `loss + weight * D`, an encoder maximises D, the distance between the
relations of the clean samples and those of the network's estimates of them (`train.relations`). The paper's code is not
public; what its text leaves open (the normalisation of distances, weights, gates, the encoder) is ours, and named so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, to_x0
from ..distributed.gather import mean_over_ranks
from ..distributed.ranks import Ranks
from ..errors import BadInput, check_choices
from ..nets.relation_encoder import RelationEncoder
from ..pick import pick
from ..predictions import spread
from ..schedules.base import Schedule
from ..utils.devices import float64_device
from .adversarial import r1_penalty
from .losses import DenoisingLoss, Uniform
from .relations import LOSSES, relation_distance
from .trained_module import TrainedModule

__all__ = ["Estimates", "Sadm", "StructureTerm", "StructuredLoss", "structure_options", "with_structure"]

KEYS = ("structure_real", "structure_generated", "structure_weights", "structure_groups")  # of a batch
GATES = ("auto", "snr", "alpha", "none")
TIMES = ("shared", "own")
GOLDEN = 0.6180339887498949
DECAY = 0.99  # of the running gradient norms
TINY = 1e-6


@dataclass(frozen=True)
class Sadm:
    """The options of the structure term.

    Args:
        weight: lambda, relative to the loss: the gradients of loss and term at the network's output have the ratio 1 :
            weight, by running averages of their norms. 0: no term.
        gate: how much samples at a noise level count, since at high noise even a perfect denoiser's estimates are
            blurred: `"snr"`, `min(SNR, gamma) / gamma`; `"alpha"`, alpha^2; `"none"`. `"auto"`: `"snr"` in training,
            `"none"` in distillation, where the target is no average.
        gamma: of `"snr"`.
        times: `"shared"`: samples are noised anew, all to the same level, so that relations mix no noise levels, which
            takes another evaluation of the network; levels are drawn in proportion to the gate. `"own"`: the estimates
            behind the loss, with the gate as weight; only samples with, or without, their labels are compared.
        start: fraction of the budget before which the loss is the plain one, in [0, 1).
        adversarial: train the encoder. False: it keeps its random weights.
        loss: `"l2"`, squared differences of relations, or `"smooth_l1"`.
        lr: peak learning rate of the encoder (AdamW, betas 0 and .99, no weight decay, one step for each of the
            network's).
        r1: weight of a penalty on the encoder's squared gradient in the clean samples. Its updates are clipped to norm
            1 as the network's are.
        width: of the encoder.

    Raises:
        BadInput: for an unknown choice, or a number out of range.

    References:
        Yang, Qian, Zhang, Liu, Cui 2024, arXiv:2402.17563.
    """

    weight: float = 0.1
    gate: str = "auto"
    gamma: float = 5.0
    times: str = "shared"
    start: float = 0.1
    adversarial: bool = True
    loss: str = "l2"
    lr: float = 1e-4
    r1: float = 0.0
    width: int = 32

    def __post_init__(self) -> None:
        check_choices(self, gate=GATES, times=TIMES, loss=LOSSES)
        if not (self.weight >= 0 and self.r1 >= 0 and self.gamma > 0 and self.lr > 0 and 0 <= self.start < 1):
            raise BadInput("structure needs weight and r1 of at least 0, gamma and lr above 0, and start in [0, 1)")
        if not 1 <= self.width <= 4096:
            raise BadInput(f"structure: width must be 1 to 4096, got {self.width}")

    def gate_at(self, alpha: Tensor, sigma: Tensor, otherwise: str = "snr") -> Tensor:
        """The gate of samples at these coefficients, float64 of their shape. otherwise: what `"auto"` is."""
        gate = otherwise if self.gate == "auto" else self.gate
        if gate == "none":
            return torch.ones_like(alpha)
        if gate == "alpha":
            return alpha**2
        return ((alpha / sigma.clamp_min(TINY)) ** 2).clamp_max(self.gamma) / self.gamma


def structure_options(spec: float | str | Sadm | None, trained: bool = False) -> Sadm | None:
    """The options that a user gave: a weight, `"0.1"`, or `"weight=0.1,times=own"`. None for no term.

    Args:
        spec: as given.
        trained: the network is trained already, so that the term begins at once where nothing else is asked for.

    Raises:
        BadInput: for unknown options, or values out of range.
    """
    if spec is None or isinstance(spec, Sadm):
        options = spec
    else:
        text = str(spec).strip()
        options = pick("train", f"sadm:{text}" if "=" in text else f"sadm:weight={text or 'none'}")
        options = replace(options, start=0.0) if trained and "start" not in text else options
    return options if options is not None and options.weight else None


@dataclass
class Estimates:
    """What the structure term compares.

    Args:
        output: what the network returned (B, *S), from which `x0` was computed.
        x0: estimates of the clean samples (B, *S).
        target: the clean samples, or a teacher's estimates (B, *S).
        weights: of the samples (B,), or None.
        groups: (B,): only samples of the same group are compared; or None.
    """

    output: Tensor
    x0: Tensor
    target: Tensor
    weights: Tensor | None = None
    groups: Tensor | None = None


class StructureTerm(nn.Module):
    """The encoder with the state of the structure term: its steps and the running norms of the gradients.

    One trained module's loss calls `add`; `trained_module` is the encoder's own, which follows it in the list.

    Args:
        options: of the term.
        shape: S of a sample.
        ranks: the processes, whose samples are compared with one another. None: this one.
        encoder: `(B, *S) -> (B, D)`, features of bounded norm. Default: `RelationEncoder`.
    """

    count: Tensor
    norms: Tensor

    def __init__(
        self, options: Sadm, shape: tuple[int, ...], ranks: Ranks | None = None, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.options, self.ranks = options, ranks
        self.encoder = RelationEncoder(shape, options.width) if encoder is None else encoder
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("norms", torch.zeros(2, dtype=torch.float32))  # mean squares: loss, term
        self._cached: tuple[Tensor, int, int] | None = None

    def steps(self) -> int:
        """The number of the encoder's steps. The device is read only where others wrote the buffer."""
        cached = self._cached
        if cached is None or cached[0] is not self.count or cached[1] != self.count._version:
            self._cached = cached = self.count, self.count._version, int(self.count)
        return cached[2]

    @property
    def active(self) -> bool:
        """Whether the term is added already."""
        return not self.options.start or self.steps() > 0

    def distance(self, target: Tensor, x0: Tensor, weights: Tensor | None, groups: Tensor | None) -> Tensor:
        """D between the relations of `target` and `x0`, see `relation_distance`."""
        real, generated = self.encoder(torch.cat([target.to(x0.dtype), x0])).split(len(x0))
        return relation_distance(real, generated, weights, groups, self.options.loss, self.ranks)

    def add(self, loss: Tensor, output: Tensor, estimates: Estimates, batch: dict[str, Tensor]) -> Tensor:
        """The loss with the term's gradient. Its value stays that of the loss, to compare with plain runs.

        Args:
            loss: a scalar.
            output: what the network returned for the loss (B, *S).
            estimates: to compare; left in the batch for the encoder's loss.
            batch: of the step.
        """
        x0 = estimates.x0.detach().requires_grad_(True)
        target, weights, groups = estimates.target.detach(), estimates.weights, estimates.groups
        (gradient,) = torch.autograd.grad(self.distance(target, x0, weights, groups), x0)
        (at_output,) = torch.autograd.grad(estimates.x0, estimates.output, gradient, retain_graph=True)
        (of_loss,) = torch.autograd.grad(loss, output, retain_graph=True)
        factor = self.options.weight * self.ratio(of_loss, at_output)
        batch["structure_real"], batch["structure_generated"] = target, x0.detach()
        if weights is not None:
            batch["structure_weights"] = weights
        if groups is not None:
            batch["structure_groups"] = groups
        term = factor * (gradient * estimates.x0).float().sum()
        return loss + (term - term.detach())

    @torch.no_grad()
    def ratio(self, of_loss: Tensor, of_term: Tensor) -> Tensor:
        """The ratio of the running gradient norms, loss to term, with this step's."""
        squares = torch.stack([g.float().square().sum() for g in (of_loss, of_term)])
        if self.ranks is not None:
            squares = mean_over_ranks(squares, self.ranks)
        # a plain mean at first, then an exponential one
        share = max(1 / (self.steps() + 1), 1 - DECAY)
        self.norms.copy_(torch.where(self.norms.sum() > 0, self.norms.lerp(squares, share), squares))
        return (self.norms[0] / self.norms[1].clamp_min(1e-30)).sqrt()

    def encoder_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """-D on the samples of the loss before, which the encoder minimises."""
        self.count.fill_(self.steps() + 1)
        real, generated, weights, groups = (batch.pop(key, None) for key in KEYS)
        if real is None or generated is None or not self.options.adversarial:
            return sum((p.sum() for p in self.encoder.parameters()), self.norms.new_zeros(())) * 0
        loss = -self.distance(real, generated, weights, groups)
        if self.options.r1:
            loss = loss + self.options.r1 * r1_penalty(self.project, [real])
        return loss

    def project(self, samples: Sequence[Tensor]) -> Tensor:
        """The features along a random direction (B,): the square of its gradient has the mean of the whole one's."""
        features: Tensor = self.encoder(samples[0])
        return features @ torch.randn(features.shape[1], device=features.device, dtype=features.dtype)

    def trained_module(self, optimiser: str = "adamw") -> TrainedModule:
        """The encoder as the module `structure` of a run."""
        return TrainedModule(
            "structure", self, self.encoder_loss, lr=self.options.lr, betas=(0.0, 0.99), weight_decay=0.0,
            optimiser="adamw" if optimiser == "muon" else optimiser, start=self.options.start,
        )  # fmt: skip


class StructuredLoss:
    """A denoising loss with the structure term: `loss(batch) -> scalar`.

    Args:
        loss: without the term.
        denoiser: in training.
        structure: the term.
    """

    def __init__(self, loss: DenoisingLoss, denoiser: Denoiser, structure: StructureTerm) -> None:
        self.loss, self.denoiser, self.structure = loss, denoiser, structure
        self._quantiles: tuple[Tensor, Tensor] | None = None

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        plain = self.loss.evaluate(self.denoiser, batch)
        if not self.structure.active:
            return plain.loss
        if self.structure.options.times == "own":
            schedule = self.denoiser.schedule
            gate = self.structure.options.gate_at(schedule.alpha(plain.t), schedule.sigma(plain.t))
            x0 = clean_samples(self.denoiser, plain.x_t, plain.t, plain.raw)
            groups = None if plain.dropped is None else plain.dropped.long()
            estimates = Estimates(plain.raw, x0, batch["x"], gate.float().to(x0.device), groups)
        else:
            estimates = self.at_one_time(batch)
        return self.structure.add(plain.loss, plain.raw, estimates, batch)

    def at_one_time(self, batch: dict[str, Tensor]) -> Estimates:
        """Estimates of the whole batch at one noise level, which is the same in all processes and drawn from no
        generator: quantiles of the steps are equally distributed by the golden ratio."""
        x, schedule = batch["x"], self.denoiser.schedule
        u = (0.5 + GOLDEN * self.structure.steps()) % 1
        time = self.gated_time(schedule, self.loss.times, u)
        t = torch.full((len(x),), time, dtype=torch.float64, device=float64_device(x.device))
        x_t = spread(schedule.alpha(t), x) * x + spread(schedule.sigma(t), x) * torch.randn_like(x)
        cond = {name: batch[name] for name in self.loss.conditions if name in batch}
        raw = self.denoiser.raw(x_t, t, **cond)
        return Estimates(raw, clean_samples(self.denoiser, x_t, t, raw), x)

    def gated_time(self, schedule: Schedule, times: Callable[[Schedule, Tensor], Tensor] | None, u: float) -> float:
        """The u-quantile of the loss's distribution of times, each weighted by the gate."""
        if self._quantiles is None:
            grid = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
            at = (times or Uniform())(schedule, grid)
            gate = self.structure.options.gate_at(schedule.alpha(at), schedule.sigma(at))
            gate = gate if float(gate.sum()) > 0 else torch.ones_like(gate)
            self._quantiles = at, gate.cumsum(0) / gate.sum()
        at, cumulated = self._quantiles
        return float(at[min(int(torch.searchsorted(cumulated, u)), len(at) - 1)])


def with_structure(
    trained: TrainedModule,
    loss: DenoisingLoss,
    denoiser: Denoiser,
    shape: Sequence[int],
    options: Sadm,
    ranks: Ranks | None = None,
    encoder: nn.Module | None = None,
    seed: int = 0,
) -> list[TrainedModule]:
    """A trained denoiser with the structure term, and the encoder, for `Fit`.

    Args:
        trained: the denoiser's module; its own loss is replaced.
        loss: without the term.
        denoiser: in training.
        shape: S of a sample.
        options: of the term; of weight 0 gives `trained` alone.
        ranks: the processes that share a batch; None: this one.
        encoder: `(B, *S) -> (B, D)` of bounded norm, such as one that was trained on images before. Default: a
            `RelationEncoder` of random weights.
        seed: of these.
    """
    if not options.weight:
        return [trained]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        structure = StructureTerm(options, tuple(shape), ranks, encoder)
    wrapped = StructuredLoss(loss, denoiser, structure)
    return [replace(trained, loss=wrapped), structure.trained_module(trained.optimiser)]


def clean_samples(denoiser: Denoiser, x_t: Tensor, t: Tensor, raw: Tensor) -> Tensor:
    """The estimate of the clean samples (B, *S) behind an output `raw` at x_t, finite also where alpha is 0."""
    alpha, sigma = denoiser.schedule.alpha(t).clamp_min(TINY), denoiser.schedule.sigma(t)
    _, c_skip, c_out = denoiser.prediction.coefficients(alpha, sigma)
    return to_x0(x_t, raw, c_skip, c_out)
