"""Training the adapters of all classes in one run: each class's loss depends on its own factors only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BadInput, Notice, check_int, check_number
from ...schedules.base import Schedule
from ...schedules.discrete import Discrete
from ...utils.random import make_generator
from .adapters import Factors
from .errors import ClassErrors

__all__ = ["AdapterTraining", "steps_for_shots", "train_adapters"]

PAPER_STEPS = {1: 60, 2: 100, 4: 200, 8: 700, 16: 1000}  # by shots, for FGVC-Aircraft


@dataclass(frozen=True)
class AdapterTraining:
    """How adapters are trained.

    Args:
        steps: of Adam.
        lr: constant learning rate.
        batch: shots of each class a step, and as many images of the prior.
        prior_weight: of the loss of the prior's images.
        low, high: range of the times.
        seed: of times, noise and the choice of images.
        classes_at_once: trained in one batch.
    """

    steps: int
    lr: float
    batch: int = 4
    prior_weight: float = 1.0
    low: float = 0.0
    high: float = 1.0
    seed: int = 0
    classes_at_once: int = 64

    def __post_init__(self) -> None:
        check_int("train_steps", self.steps, 1)
        check_int("shots_per_step", self.batch, 1)
        if check_number("lr", self.lr) <= 0 or check_number("prior_weight", self.prior_weight) < 0:
            raise BadInput(f"lr must be positive and prior_weight at least 0, found {self.lr}, {self.prior_weight}")


def steps_for_shots(shots: int) -> int:
    """The paper's numbers of steps, 60 for one shot to 1,000 for 16, on straight lines in between."""
    known = sorted(PAPER_STEPS)
    if shots <= known[0]:
        return PAPER_STEPS[known[0]]
    for low, high in zip(known, known[1:]):
        if shots <= high:
            rise = PAPER_STEPS[high] - PAPER_STEPS[low]
            return round(PAPER_STEPS[low] + (shots - low) / (high - low) * rise)
    return PAPER_STEPS[known[-1]]


def train_adapters(
    errors: ClassErrors,
    shots: Sequence[Tensor],
    prior: Tensor | None,
    training: AdapterTraining,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train the adapters of `errors`, in place.

        loss_c = E || eps - eps_c(x_t, t) ||^2 over the shots of c + prior_weight E || eps - eps_c(x'_t, t) ||^2

    x' of the prior, images of the model itself, which keep an adapter from changing what its shots do not show. Times
    and noise are the same for all classes, so that two classes with the same shots get the same adapter. The classes
    are trained in one batch: Adam treats every factor by itself, so that each gets what it would get alone.

    Args:
        errors: with adapters.
        shots: samples (n_c, *S) of each class.
        prior: (p, *S), or (K, p, *S) of each class; None: none.
        training: how.
        progress: called with (steps done, of how many), of all groups of classes.

    Returns:
        The mean loss of each step of the last group of classes.

    References:
        Yue et al. 2024, arXiv:2403.02649; Ruiz et al. 2022, arXiv:2208.12242, for the prior.
    """
    adapters = errors.adapters
    assert adapters is not None, "only with adapters"
    groups = torch.arange(len(shots)).split(training.classes_at_once)
    losses: list[float] = []
    for number, group in enumerate(groups):
        losses = []
        parameters: Factors = {
            name: (down.detach().clone().requires_grad_(True), up.detach().clone().requires_grad_(True))
            for name, (down, up) in adapters.select(group).items()
        }
        flat = [factor for pair in parameters.values() for factor in pair]
        optimiser = torch.optim.Adam(flat, lr=training.lr)
        generator = make_generator(training.seed)
        for step in range(training.steps):
            t = random_times(errors.denoiser.schedule, training, generator)
            shape = (training.batch, *shots[0].shape[1:])
            noise = torch.randn(shape, generator=generator).to(shots[0].device)
            place = torch.rand(training.batch, generator=generator)
            x0 = torch.stack([shots[k][(place * len(shots[k])).long().to(shots[k].device)] for k in group.tolist()])
            with torch.enable_grad():
                loss = errors(x0, noise, t, group, parameters, own=True).mean(1)
                if prior is not None and training.prior_weight:
                    own = prior.ndim == noise.ndim + 1
                    some = (torch.rand(training.batch, generator=generator) * prior.shape[1 if own else 0]).long()
                    some = some.to(prior.device)
                    x1 = prior[group.to(prior.device)][:, some] if own else prior[some]
                    loss = loss + training.prior_weight * errors(x1, noise, t, group, parameters, own=own).mean(1)
                total = loss.sum()
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            optimiser.step()
            losses.append(float(total.detach()) / len(group))
            if not losses[-1] < float("inf"):
                raise BadInput(f"the loss of the adapters is {losses[-1]} at step {step}: use a smaller lr")
            if progress is not None:
                progress(number * training.steps + step + 1, len(groups) * training.steps)
        for name, pair in parameters.items():
            for all_of_it, trained in zip(adapters.factors[name], pair):
                all_of_it[group.to(all_of_it.device)] = trained.detach()
    part = max(len(losses) // 4, 1)
    if len(losses) >= 8 and sum(losses[-part:]) > 1.5 * sum(losses[:part]):
        warnings.warn("the loss of the adapters rose during their training: use a smaller lr", Notice, stacklevel=3)
    return losses


def random_times(schedule: Schedule, training: AdapterTraining, generator: torch.Generator) -> Tensor:
    """One time (B,) from each of B equal intervals, at random; of a `Discrete` schedule those of its entries."""
    u = (torch.arange(training.batch) + torch.rand(training.batch, generator=generator)) / training.batch
    t = training.low + u.double() * (training.high - training.low)
    if isinstance(schedule, Discrete):
        entries = len(schedule.alphas_cumprod)
        t = (t * entries).ceil().clamp(1, entries) / entries
    return t.clamp(max=training.high)
