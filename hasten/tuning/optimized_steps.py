"""Times optimised for a sampler, a schedule and, if asked, this very model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput, check_numbers
from ..pick import format_spec
from ..plan.table import Plan, plan
from ..samplers import DPMSolver, UniPC
from ..sampling import walk
from ..times import CosineAngle, Karras, Quadratic, TimeGrid, UniformLambda, UniformTime
from ._cache import cached_result
from ._mixtures import draw_family
from ._nodes import EarlyStop, GridNodes
from ._objective import ErrorBound, minimise, orders
from ._task import Tuned, TuningTask

VERSION = 1
IMAGES = 1000
FINE: Any = UniPC(3)
GRIDS: dict[str, TimeGrid] = {
    "lambda": UniformLambda(),
    "uniform": UniformTime(),
    "karras": Karras(),
    "quadratic": Quadratic(),
    "narrow_angle": CosineAngle(scale=0.5),
    "angle": CosineAngle(),
    "wide_angle": CosineAngle(scale=2.0),
}


@dataclass(frozen=True)
class OptimizedSteps:
    """The times t_1 .. t_{N-1} at which a deterministic sampler does best; the first and the last stay as they are.

    In lam = log(alpha/sigma), the gaps from lam_0 to lam_N are a softmax of N numbers. lam_N belongs to the end of the
    grid or, where that is the clean image, to `low`: the last step then goes from t_{N-1} to 0 instead. A start with
    q = sigma/alpha above 1500 (pure noise; cosine tables) counts as q = 150.

    objective "bound": the paper's: the least `J = sum_i e_i |sum_{n,j} w_{n,j}|` (see `tuning/_objective.py`), for
        UniPC and DPM-Solver++, with exact gradients, from several starts; network-free, about a second.
        p: `e_i = s_i^p / a_i`, 1 for pixels, 2 for latents. trunc: steps below this index count with the root of the
        sum of squares of their terms; by default 3 for N <= 7, else 0, as in the authors' code. growth: neighbouring
        gaps differ by a factor of at most this; by default 4, and 1.6 where trunc = 0: without it J is then least for
        useless nodes whose terms cancel.
    objective "local": ours, network-free, for any deterministic sampler: the least mean, over 16 random Gaussian
        mixtures, of the logarithm of the mean squared error at the end of the probability-flow equation.
        std: the root mean square deviation of a coordinate of the data; by default that of the task's images where
        there are any, else 0.5. A few seconds.
    objective "trajectory": ours: the least mean squared distance of the sampler's result from the end of the model's
        own fine trajectory (UniPC-3, `fine` steps) from the same noise, differentiated through sampler and network,
        from the best of the starts, the task's own times and those of the other two objectives. A quarter of the
        `task.n` (by default 64) noises is held out and decides when to stop: after `patience` iterations without gain,
        or `iterations`; of all that was tried the best on all noises is taken. searches: from how many of the best
        starts. chunk: samples at a time.

    starts: where the search begins: names of fixed grids, "lambda", "uniform", "karras", "quadratic", "narrow_angle"
    (scale 0.5), "angle" (1), "wide_angle" (2). restarts: random ones beside them ("bound" only).

    Results are remembered by schedule, sampler, steps and options, and for "trajectory" by the weights, the noises and
    the times given as well.

    The cost of a plan is that of its sampler: NFE = steps for UniPC. The order of the sampler is not changed.

    Raises:
        BadInput: for a sampler that is not linear or draws noise; for "bound" with another sampler than the two.

    Reference: Xue, Liu, Chen, Zhang, Hu, Xie, Li 2024, arXiv:2402.17376 ("bound").
    """

    objective: Literal["bound", "local", "trajectory"] = "bound"
    p: float = 1.0
    trunc: int | None = None
    growth: float | None = None
    low: float | None = None
    std: float | None = None
    starts: tuple[str, ...] = tuple(GRIDS)
    restarts: int = 2
    fine: int = 64
    iterations: int = 40
    patience: int = 8
    searches: int = 1
    chunk: int = 16
    seed: int = 0
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        wrong = [name for name in self.starts if name not in GRIDS]
        if wrong or not self.starts:
            raise BadInput(f"OptimizedSteps(starts={self.starts}): names of fixed grids, of {', '.join(GRIDS)}")
        if self.objective not in ("bound", "local", "trajectory"):
            raise BadInput(f"OptimizedSteps(objective={self.objective!r}): one of bound, local, trajectory")
        if self.growth is not None and self.growth <= 1:
            raise BadInput(f"OptimizedSteps(growth={self.growth}): must be greater than 1")
        if (self.std is not None and self.std <= 0) or min(
            self.fine, self.iterations, self.patience, self.searches, self.chunk
        ) < 1:
            raise BadInput(f"{self}: std must be positive, fine, iterations, patience, searches and chunk at least 1")
        check_numbers(self)

    def tune(self, task: TuningTask) -> Tuned:
        """The plan of `task.sampler` on the best times found between `task.times[0]` and `task.times[-1]`.

        figures: what the objective was at the best fixed start and at the end, and for "trajectory" the held-out error.
        """
        times = task.times.detach().double()
        _check_deterministic(task.sampler, plan(task.sampler, task.schedule, times))
        key = self._key(task, times)
        found = cached_result(key, lambda: self._solve(task, times)) if key else self._solve(task, times)
        best = torch.tensor(found["times"], dtype=torch.float64)
        return Tuned(plan=plan(task.sampler, task.schedule, best), figures=found["figures"])

    def _solve(self, task: TuningTask, times: Tensor) -> dict[str, Any]:
        solve = {"bound": self._bound, "local": self._local, "trajectory": self._trajectory}[self.objective]
        best, figures = solve(task, times)
        return {"times": best.tolist(), "figures": {"objective": self.objective, "steps": len(times) - 1, **figures}}

    def _key(self, task: TuningTask, times: Tensor) -> dict[str, Any] | None:
        """All that the result depends on; None where the model cannot be told from another."""
        key: dict[str, Any] = {
            "method": "optimized_steps", "version": VERSION, "schedule": task.schedule.to_dict(),
            "sampler": format_spec(task.sampler), "ends": [float(times[0]), float(times[-1])], "steps": len(times) - 1,
            "options": {**dataclasses.asdict(self), "starts": list(self.starts)},
        }  # fmt: skip
        if self.objective != "bound":
            key["std"] = self._deviation(task)
        if self.objective != "trajectory":
            return key
        if not task.identity:
            return None
        label = task.cond(self._count(task)).get("label")
        model = {"identity": task.identity, "shape": list(task.shape), "seed": task.seed, "n": self._count(task)}
        model |= {"label": None if label is None else label.tolist(), "times": times.tolist()}
        # guides and number formats change the answers, not the weights: ask a few times
        x, answers = task.noise(0, 1).initial(), []
        with torch.no_grad():
            for part in (0.9, 0.7, 0.5, 0.3, 0.1):
                t = torch.tensor(part * float(times[0]), dtype=torch.float64)
                answer = task.denoiser(x, t, **task.cond(1)).double().flatten()
                answers += [float(answer.norm()), float(answer[0]), float(answer[len(answer) // 2])]
        model["answers"] = [f"{value:.4g}" for value in answers]
        return {**key, **model}

    # ---- the paper's bound --------------------------------------------------------------------------------------

    def _bound(self, task: TuningTask, times: Tensor) -> tuple[Tensor, dict[str, Any]]:
        sampler, N = task.sampler, len(times) - 1
        if not _bounded(sampler):
            raise BadInput(
                f"objective=bound is for UniPC and multistep DPM-Solver++ that predict x0, not for "
                f"{format_spec(sampler)}: use objective=local"
            )
        trunc = self.trunc if self.trunc is not None else 3 if N <= 7 else 0
        growth = self.growth if self.growth is not None else 4.0 if trunc else 1.6
        nodes = GridNodes(task.schedule, times, self.low)
        bound = ErrorBound(orders(N, sampler.order, sampler.lower_order_final), self.p, trunc)
        grids = {name: nodes.inside(nodes.grid(GRIDS[name], N)).numpy() for name in self.starts}
        random = np.random.default_rng(self.seed)
        starts = list(grids.values())
        for _ in range(self.restarts):
            gaps = np.exp(0.5 * random.standard_normal(N))
            starts.append(
                nodes.first + (nodes.last - nodes.first) * np.concatenate([[0.0], gaps.cumsum()]) / gaps.sum()
            )
        J, lam = minimise(bound, nodes.first, nodes.last, starts, growth)
        figures = {"J": J, "trunc": trunc, **{f"J_{name}": bound(grid)[0] for name, grid in grids.items()}}
        return nodes.times(torch.from_numpy(lam)), figures

    # ---- random mixtures ----------------------------------------------------------------------------------------

    def _local(self, task: TuningTask, times: Tensor) -> tuple[Tensor, dict[str, Any]]:
        schedule, sampler = task.schedule, task.sampler
        nodes = GridNodes(schedule, times, self.low)
        std = self._deviation(task)
        family, data, noise = draw_family(schedule, std, self.seed)
        x = schedule.alpha(times[0]) * data + schedule.sigma(times[0]) * noise
        with torch.no_grad():
            exact = walk(FINE, family, x, nodes.grid(UniformLambda(), max(100, 10 * task.steps)))

        def log_error(times: Tensor) -> Tensor:
            error = (walk(sampler, family, x, times, grad=times.requires_grad) - exact).square()
            # of each mixture; the floor is the accuracy of `exact`
            return torch.log(error.reshape(family.size, -1).mean(1) + 1e-9).mean()

        def log_error_slope(u: Tensor) -> tuple[float, Tensor]:
            value = log_error(nodes.of(u))
            return value.item(), torch.autograd.grad(value, u)[0]

        with torch.no_grad():
            grids = {name: nodes.grid(GRIDS[name], task.steps) for name in self.starts}
            at = {name: log_error(grid).item() for name, grid in grids.items()}
        # a few iterations from each of the best, then many from the best of those
        tried = [nodes.descend(log_error_slope, grids[name], max(self.iterations // 4, 1))
                 for name in sorted(at, key=lambda name: at[name])[:3]]  # fmt: skip
        begin = min([*tried, *((at[name], grids[name]) for name in grids)], key=lambda pair: pair[0])
        best = min(begin, nodes.descend(log_error_slope, begin[1], self.iterations), key=lambda pair: pair[0])
        figures = {
            "error": math.exp(best[0] / 2),
            "std": std,
            **{f"error_{k}": math.exp(value / 2) for k, value in at.items()},
        }
        return best[1], figures

    def _deviation(self, task: TuningTask) -> float:
        """Of a coordinate of the data, root mean square over the coordinates."""
        if self.std is not None or task.images is None:
            return 0.5 if self.std is None else self.std
        return task.images(IMAGES)[0].double().var(0).mean().sqrt().item()

    # ---- the model's own trajectory -----------------------------------------------------------------------------

    def _other(self, objective: Literal["bound", "local"], task: TuningTask) -> Tensor:
        """The times of another objective, remembered on their own."""
        table = dataclasses.replace(self, objective=objective).tune(task).plan
        assert table is not None
        return table.times

    def _count(self, task: TuningTask) -> int:
        return 64 if task.n is None else task.n

    def _trajectory(self, task: TuningTask, times: Tensor) -> tuple[Tensor, dict[str, Any]]:
        n, nodes, schedule = self._count(task), GridNodes(task.schedule, times, self.low), task.schedule
        if n < 2:
            raise BadInput(f"objective=trajectory needs at least 2 noises, one of them held out; found n={n}")
        x = task.noise(0, n).initial() * float(schedule.prior_std(times[0]))
        cond, held = task.cond(n), n - max(n // 4, 1)
        evaluations = 0

        def rows(part: slice) -> dict[str, Any]:
            return {key: value[part] for key, value in cond.items()}

        def ends(table: Plan, first: int, last: int, what: str = "") -> Tensor:
            nonlocal evaluations
            found = []
            for k in range(first, last, self.chunk):
                part = slice(k, min(k + self.chunk, last))
                found.append(table(task.denoiser, x[part], grad=False, **rows(part)))
                evaluations += table.nfe * len(found[-1])
                if what:
                    task.tick(what, part.stop, last, 0.0)
            return torch.cat(found)

        fine = plan(FINE, schedule, nodes.grid(UniformLambda(), self.fine))
        exact = ends(fine, 0, n, "fine trajectory").double()

        def error(times: Tensor) -> tuple[float, float]:
            """Mean squares: over all noises, over those held out."""
            each = (ends(plan(task.sampler, schedule, times), 0, n).double() - exact).square().flatten(1).mean(1)
            return each.mean().item(), each[held:].mean().item()

        def slope(u: Tensor) -> tuple[float, Tensor]:
            """log of the mean squared error and its gradient; a chunk at a time, as memory is what is scarce."""
            nonlocal evaluations
            table = plan(task.sampler, schedule, nodes.of(u))
            total, gradient = 0.0, torch.zeros_like(u)
            for k in range(0, held, self.chunk):
                part = slice(k, min(k + self.chunk, held))
                found = table(task.denoiser, x[part], grad=True, **rows(part))
                loss = (found.double() - exact[part]).square().sum() / exact[:held].numel()
                gradient += torch.autograd.grad(loss, u, retain_graph=True)[0]
                total += loss.item()
                evaluations += table.nfe * len(found)
            return math.log(total + 1e-30), gradient / (total + 1e-30)

        candidates = {"given": times, **{name: nodes.grid(GRIDS[name], task.steps) for name in self.starts}}
        candidates["local"] = self._other("local", task)
        if _bounded(task.sampler):
            candidates["bound"] = self._other("bound", task)
        at = {}
        for done, (name, grid) in enumerate(candidates.items()):
            at[name] = error(grid)
            task.tick("starts", done + 1, len(candidates), math.sqrt(at[name][0]))
        names = sorted(at, key=lambda name: at[name])
        best, made, total = (*at[names[0]], candidates[names[0]]), 0, self.searches * self.iterations
        for k, name in enumerate(names[: self.searches]):
            least, waited = at[name][1], 0

            def watch(u: Tensor, done: int, before: int = k * self.iterations) -> None:
                nonlocal best, least, waited, made
                made, now = made + 1, nodes.of(u)
                everywhere, out = error(now)
                waited = 0 if out < least else waited + 1
                least = min(least, out)
                # rare samples that end in another mode rule the mean: too rare for the held-out noises to choose by
                best = min(best, (everywhere, out, now), key=lambda found: found[0])
                task.tick("trajectory", before + done, total, math.sqrt(out))
                if waited >= self.patience:
                    raise EarlyStop

            nodes.descend(slope, candidates[name], self.iterations, watch)
        task.tick("trajectory", total, total, math.sqrt(best[1]))
        figures = {"error": math.sqrt(best[0]), "held_out": math.sqrt(best[1]),
                   "held_out_given": math.sqrt(at["given"][1]), "iterations": made,
                   "evaluations": evaluations}  # fmt: skip
        return best[2], {**figures, **{f"error_{name}": math.sqrt(value[0]) for name, value in at.items()}}


def _bounded(sampler: Any) -> bool:
    """Whether the paper's weights are those of the sampler."""
    return isinstance(sampler, (UniPC, DPMSolver)) and sampler.predict == "x0" and getattr(sampler, "multistep", True)


def _check_deterministic(sampler: Any, table: Plan) -> None:
    if table.stochastic:
        raise BadInput(
            f"optimized_steps is for samplers that draw no noise, found {format_spec(sampler)}: try unipc or dpm"
        )
