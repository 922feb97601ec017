"""Plans that evaluate the branches of classifier-free guidance one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import BadInput, check_choice

__all__ = ["BRANCHES", "branch_evaluator", "check_branches", "paired_rows"]

BRANCHES = ("cond", "uncond")
Evaluate = Callable[[int, Tensor, Tensor, dict[str, Any]], Tensor]


def check_branches(branches: Sequence[str], evaluations: int, guidance_scale: float | None) -> tuple[str, ...]:
    """The branches of a plan, one for each of its evaluations.

    Raises:
        BadInput: for another number of them, another name, and without the scale that they were made for.
    """
    for branch in branches:
        check_choice("branch of a plan", branch, BRANCHES)
    if len(branches) != evaluations:
        raise BadInput(f"plan: {evaluations} evaluations need as many branches, found {len(branches)}")
    if guidance_scale is None:
        raise BadInput("plan: branches need the guidance_scale that they were made for")
    return tuple(branches)


def branch_evaluator(denoiser: Any, plan: Any, *, merge: bool = False) -> Evaluate:
    """A function `(k, x_t, t, conditions) -> x0` that makes evaluation k of a plan.

    Args:
        denoiser: under `CFG` for a plan with branches, any for one without.
        plan: a `Plan`.
        merge: make two evaluations of different branches at one state and time in one batch of 2 B rows, as `CFG` does.

    Raises:
        BadInput: for a plan with branches and a denoiser without guidance, at another scale, or with an interval,
            a rescaling or further guides: the plan's own numbers are the guidance.
    """
    if plan.branches is None:
        return lambda k, x_t, t, cond: denoiser(x_t, t, **cond)
    evaluate, scale = getattr(denoiser, "branch", None), plan.guidance_scale
    if evaluate is None:
        raise BadInput(
            f"this plan evaluates both branches of guidance, for guidance_scale {scale:g}: sample with that scale and "
            f"without further guides, found {type(denoiser).__name__}"
        )
    guide = denoiser.guide
    if abs(guide.scale - scale) > 1e-6 * max(1.0, abs(scale)) or guide.interval is not None or guide.rescale:
        raise BadInput(f"this plan was made for guidance_scale {scale:g} alone, found {guide}")
    pairs: frozenset[int] = paired_rows(plan) if merge else frozenset()
    ahead: dict[int, Tensor] = {}

    def evaluate_branch(k: int, x_t: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        if k in ahead:
            return ahead.pop(k)
        if k in pairs:
            both: tuple[Tensor, Tensor] = evaluate(x_t, t, both=True, **cond)
            first, ahead[k + 1] = both if plan.branches[k] == "cond" else both[::-1]
            return first
        result: Tensor = evaluate(x_t, t, uncond=plan.branches[k] == "uncond", **cond)
        return result

    return evaluate_branch


def paired_rows(plan: Any) -> frozenset[int]:
    """The evaluations whose state and time the next one has too, for the other branch: row k is `x_{k+1} = x_k`."""
    same: set[int] = set()
    k = 0
    while k + 1 < plan.nfe:
        others = (plan.A[k], plan.B[k], plan.C[k])
        identity = bool((plan.a[k] == 1).all()) and not any(bool(row.any()) for row in others)
        if identity and plan.times[k] == plan.times[k + 1] and plan.branches[k] != plan.branches[k + 1]:
            same.add(k)
            k += 1
        k += 1
    return frozenset(same)
