"""The class of least mean error from as few evaluations as needed: all times, fixed stages, or a paired test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import BadInput, check_int
from ...metrics.paired_loss import t_quantile
from ...utils.random import make_generator

__all__ = ["AllTimes", "Decision", "Elimination", "PairedStop", "Stages", "eliminate"]

# (images (n,), classes (k,), times (m,)), all indices -> weighted errors (k, n, m)
Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Decision(NamedTuple):
    """The result of `eliminate`.

    Args:
        winner: (N,) the class of least mean error among those that were left.
        errors: (N, K, T), NaN where a class was eliminated before.
        evaluations: (N,) evaluations of the network, a class at a time each one.
    """

    winner: Tensor
    errors: Tensor
    evaluations: Tensor


class Elimination(Protocol):
    """When classes are eliminated. No label is consulted."""

    def order(self, times: int, seed: int) -> Tensor:
        """The order (T,) in which the T times are evaluated."""
        ...

    def looks(self, times: int) -> list[int]:
        """The numbers of times after which classes are eliminated, rising."""
        ...

    def keep(self, errors: Tensor, classes: int, times: int, look: int) -> Tensor:
        """Which classes stay, bool (n, k).

        Args:
            errors: (n, k, m) of the k classes that are left, at the m times so far.
            classes: K, at the beginning.
            times: T, in all.
            look: index into `looks`.
        """
        ...


@dataclass(frozen=True)
class AllTimes:
    """Every class at every time: the exhaustive answer."""

    def order(self, times: int, seed: int) -> Tensor:
        """As they are."""
        return torch.arange(times)

    def looks(self, times: int) -> list[int]:
        """The end."""
        return [times]

    def keep(self, errors: Tensor, classes: int, times: int, look: int) -> Tensor:
        """The least mean error."""
        return _best(errors.mean(2), 1)


@dataclass(frozen=True)
class Stages:
    """The paper's fixed stages: after so many times, so many classes of least mean error stay.

    Args:
        times: in all after each stage, rising; beyond T they are T.
        keep_classes: how many stay after each, falling; the last is 1. The defaults are those of FGVC-Aircraft.

    Raises:
        BadInput: for stages of other kinds.

    References:
        Li, Prabhudesai, Duggal, Brown, Pathak 2023, arXiv:2303.16203; Yue et al. 2024, arXiv:2403.02649.
    """

    times: tuple[int, ...] = (20, 50, 100, 500)
    keep_classes: tuple[int, ...] = (20, 10, 5, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(self.times))
        object.__setattr__(self, "keep_classes", tuple(self.keep_classes))
        rising = all(a < b for a, b in zip((0, *self.times), self.times))
        falling = all(a > b for a, b in zip(self.keep_classes, self.keep_classes[1:]))
        if not self.times or len(self.times) != len(self.keep_classes) or not (rising and falling):
            raise BadInput(f"stages need rising times and falling classes, found {self.times} and {self.keep_classes}")
        if self.keep_classes[-1] != 1:
            raise BadInput(f"the last stage must keep one class, found {self.keep_classes[-1]}")

    def order(self, times: int, seed: int) -> Tensor:
        """By reversed bits: any first m of them are spread evenly."""
        bits = max(times - 1, 1).bit_length()
        turned = [int(f"{k:0{bits}b}"[::-1], 2) for k in range(2**bits)]
        return torch.tensor([k for k in turned if k < times])

    def looks(self, times: int) -> list[int]:
        """The stages' times."""
        return [min(count, times) for count in self.times]

    def keep(self, errors: Tensor, classes: int, times: int, look: int) -> Tensor:
        """The `keep_classes[look]` of least mean error."""
        return _best(errors.mean(2), min(self.keep_classes[look], errors.shape[1]))


@dataclass(frozen=True)
class PairedStop:
    """Classes are eliminated as soon as a paired test shows that all T times would eliminate them.

    At a look after m of T times, in a random stratified order without replacement, class k goes where for the class c
    of least mean error so far

        mean(e_k - e_c) >= q sd(e_k - e_c) sqrt((1 - m / T) / m),

    q the quantile of Student's t at error / ((K - 1) J), J looks: the probability that the exhaustive answer is lost at
    any look to any other class is at most `error`, as far as means of the differences are normal. The same noise for
    all classes makes the differences small; no look costs an evaluation. At m = T the answer is the exhaustive one.

    Args:
        error: promised bound of the probability of another answer than the exhaustive one, in (0, 1).
        first: times before the first look, at least 2.
        growth: factor of the times from one look to the next, > 1.

    Raises:
        BadInput: for numbers out of these ranges.
    """

    error: float = 0.05
    first: int = 8
    growth: float = 1.4

    def __post_init__(self) -> None:
        check_int("first", self.first, 2)
        if not 0 < self.error < 1 or not self.growth > 1:
            raise BadInput(f"the error must lie in (0, 1) and growth above 1, found {self.error} and {self.growth}")

    def order(self, times: int, seed: int) -> Tensor:
        """Rounds of `first` times, one from each of as many equal intervals, each at random."""
        generator = make_generator(seed)
        strata = [part[torch.randperm(len(part), generator=generator)] for part in _parts(times, self.first)]
        rounds = [
            torch.tensor([int(part[k]) for part in strata if k < len(part)]) for k in range(max(map(len, strata)))
        ]
        return torch.cat(rounds)

    def looks(self, times: int) -> list[int]:
        """`first` times, then growing by `growth` in multiples of it, to the end."""
        counts, count = [], float(self.first)
        while count < times:
            rounded = self.first * round(count / self.first)
            if rounded < times and rounded not in counts:
                counts.append(rounded)
            count *= self.growth
        return [*counts, times]

    def keep(self, errors: Tensor, classes: int, times: int, look: int) -> Tensor:
        """The classes that the test does not eliminate."""
        m, mean = errors.shape[2], errors.mean(2)
        if m >= times:
            return _best(mean, 1)
        best = mean.argmin(1)
        difference = errors - errors[torch.arange(len(errors)), best][:, None]
        level = self.error / ((classes - 1) * max(len(self.looks(times)) - 1, 1))
        # over all times together: more than within the strata, which is on the safe side
        reach = -t_quantile(level, m - 1) * difference.std(2) * math.sqrt((1 - m / times) / m)
        kept = ~((difference.mean(2) >= reach) & (reach > 0))
        kept[torch.arange(len(errors)), best] = True
        return kept


def eliminate(
    evaluate: Evaluate, images: int, classes: int, times: int, rule: Elimination | None = None, seed: int = 0
) -> Decision:
    """Find the class of least mean error for each image.

    Args:
        evaluate: gives the errors (k, n, m) of k classes for n images at m times, all by index.
        images: N.
        classes: K, at least 2.
        times: T.
        rule: when classes are eliminated. None: `PairedStop`.
        seed: of a random order of the times, the same for all images.
    """
    rule = PairedStop() if rule is None else rule
    order, looks = rule.order(times, seed), rule.looks(times)
    errors = torch.full((images, classes, times), float("nan"), dtype=torch.float64)
    alive = torch.ones(images, classes, dtype=torch.bool)
    for look, (first, last) in enumerate(zip([0, *looks], looks)):
        sets: dict[tuple[int, ...], list[int]] = {}
        for image in range(images):
            left = tuple(alive[image].nonzero()[:, 0].tolist())
            if len(left) > 1:
                sets.setdefault(left, []).append(image)
        for left, members in sets.items():
            some, which = torch.tensor(members), torch.tensor(left)
            if last > first:
                found = evaluate(some, which, order[first:last]).double().cpu().permute(1, 0, 2)
                errors[some[:, None, None], which[None, :, None], order[first:last][None, None]] = found
            so_far = errors[some[:, None, None], which[None, :, None], order[:last][None, None]]
            alive[some[:, None], which[None]] = rule.keep(so_far, classes, times, look)
    mean = errors.nanmean(2).masked_fill(~alive, float("inf"))
    return Decision(mean.argmin(1), errors, (~errors.isnan()).sum((1, 2)))


def _parts(times: int, count: int) -> list[Tensor]:
    """The indices 0 .. T-1 as `count` intervals, as equal as they can be."""
    return [part for part in torch.arange(times).tensor_split(count) if len(part)]


def _best(mean: Tensor, count: int) -> Tensor:
    """The `count` least of each row, bool of the shape of `mean`; the first ones of equals."""
    ranks = mean.argsort(stable=True, dim=1).argsort(dim=1)
    return ranks < count
