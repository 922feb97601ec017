"""Time grids optimised for a sampler, a schedule and, with objective=trajectory, a model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput, check_choice, check_numbers
from ..pick import format_spec
from ..plan.table import Plan, plan
from ..samplers import DPMSolver, UniPC
from ..sampling import walk
from ..times import CosineAngle, Karras, Quadratic, TimeGrid, UniformLambda, UniformTime
from ..utils.devices import as_float64
from ._cache import cached_result
from ._mixtures import draw_family
from ._nodes import EarlyStopping, GridNodes
from ._objective import ErrorBound, minimise, orders
from ._task import Tuned, Tuner, TuningTask

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
class OptimizedSteps(Tuner):
    """The times t_1 .. t_{N-1} with the smallest error of a deterministic sampler; the first and the last are fixed.

    In lam = log(alpha/sigma), the gaps from lam_0 to lam_N are a softmax of N parameters. lam_N is that of the end of
    the grid or, if that is the clean image, of `low`: the last step then goes from t_{N-1} to 0 instead. A start with
    q = sigma/alpha above 1500 (pure noise; cosine tables) counts as q = 150.

    Results are cached by schedule, sampler, steps and options, and for "trajectory" also by the weights, the noises and
    the task's times. The cost of a plan is that of its sampler: NFE = steps for UniPC. The order does not change.

    Args:
        objective: "bound", the paper's: the minimum of `J = sum_i e_i |sum_{n,j} w_{n,j}|` (see
            `tuning/_objective.py`), for UniPC and DPM-Solver++, with exact gradients, from several starts;
            network-free, about a second. "local", ours, network-free, for any deterministic sampler: the minimum of the
            mean, over 16 random Gaussian mixtures, of the log mean squared error at the end of the probability-flow
            ODE; a few seconds. "trajectory", ours: the minimum of the mean squared distance of the sampler's result
            from the end of the model's own fine trajectory (UniPC-3, `fine` steps) from the same noise, differentiated
            through sampler and network, from the best of the starts, the task's times and those of the other two
            objectives. A quarter of the `task.n` (by default 64) noises is held out and decides when to stop: after
            `patience` iterations without improvement, or `iterations`; the best grid on all noises is returned.
        p: of "bound": `e_i = s_i^p / a_i`, 1 for pixels, 2 for latents.
        trunc: of "bound": steps below this index count with the root of the sum of squares of their terms. Default: 3
            for N <= 7, else 0, as in the authors' code.
        growth: of "bound": the largest ratio of neighbouring gaps. Default: 4, and 1.6 where trunc = 0, where J would
            otherwise be minimal at useless nodes whose terms cancel.
        low: see above.
        std: of "local": the root mean square deviation of a coordinate of the data. Default: that of the task's images
            if there are any, else 0.5.
        starts: fixed grids to start from: "lambda", "uniform", "karras", "quadratic", "narrow_angle" (scale 0.5),
            "angle" (1), "wide_angle" (2).
        restarts: of "bound": further random starts.
        fine: of "trajectory": steps of the fine trajectory.
        iterations, patience: see "trajectory".
        searches: of "trajectory": how many of the best starts are optimised.
        chunk: of "trajectory": samples per model evaluation.
        seed: of the random mixtures and starts.

    Raises:
        BadInput: for options out of range; in `tune`, for a sampler that is not linear or draws noise, and for "bound"
            with a sampler other than these two.

    References:
        Xue, Liu, Chen, Zhang, Hu, Xie, Li 2024, arXiv:2402.17376 ("bound").
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
    reads_sources: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.starts:
            raise BadInput(f"optimized_steps needs at least one start of {', '.join(GRIDS)}")
        for name in self.starts:
            check_choice("optimized_steps start", name, GRIDS)
        check_choice("optimized_steps objective", self.objective, ("bound", "local", "trajectory"))
        if self.growth is not None and self.growth <= 1:
            raise BadInput(f"optimized_steps(growth={self.growth}): must be greater than 1")
        counts = self.fine, self.iterations, self.patience, self.searches, self.chunk
        if (self.std is not None and self.std <= 0) or min(counts) < 1:
            raise BadInput(f"{self}: std must be positive, fine, iterations, patience, searches and chunk at least 1")
        check_numbers(self)

    def tune(self, task: TuningTask) -> Tuned:
        """The plan of `task.sampler` on the best times between `task.times[0]` and `task.times[-1]`.

        Figures: the objective at the fixed starts and at the end, and for "trajectory" the held-out error.
        """
        times = task.times.detach().double()
        _check_deterministic(task.sampler, plan(task.sampler, task.schedule, times))
        key = self._key(task, times)
        result = cached_result(key, lambda: self._solve(task, times)) if key else self._solve(task, times)
        best = torch.tensor(result["times"], dtype=torch.float64)
        return Tuned(plan=plan(task.sampler, task.schedule, best), figures=result["figures"])

    def _solve(self, task: TuningTask, times: Tensor) -> dict[str, Any]:
        """The best times and the figures, as JSON."""
        solve = {"bound": self._bound, "local": self._local, "trajectory": self._trajectory}[self.objective]
        best, figures = solve(task, times)
        return {"times": best.tolist(), "figures": {"objective": self.objective, "steps": len(times) - 1, **figures}}

    def _key(self, task: TuningTask, times: Tensor) -> dict[str, Any] | None:
        """The cache key; None if the model has no identity."""
        key: dict[str, Any] = {
            "method": "optimized_steps",
            "version": VERSION,
            "schedule": task.schedule.to_dict(),
            "sampler": format_spec(task.sampler),
            "ends": [float(times[0]), float(times[-1])],
            "steps": len(times) - 1,
            "options": {**dataclasses.asdict(self), "starts": list(self.starts)},
        }
        if self.objective != "bound":
            key["std"] = self._deviation(task)
        if self.objective != "trajectory":
            return key
        if not task.identity:
            return None
        label = task.cond(self._count(task)).get("label")
        model = {"identity": task.identity, "shape": list(task.shape), "seed": task.seed, "n": self._count(task)}
        model |= {"label": None if label is None else label.tolist(), "times": times.tolist()}
        # guidance and precision change the outputs but not the identity: evaluate at a few times
        x, outputs = task.noise(0, 1).initial(), []
        with torch.no_grad():
            for fraction in (0.9, 0.7, 0.5, 0.3, 0.1):
                t = torch.tensor(fraction * float(times[0]), dtype=torch.float64)
                x0 = as_float64(task.denoiser(x, t, **task.cond(1))).flatten()
                outputs += [float(x0.norm()), float(x0[0]), float(x0[len(x0) // 2])]
        model["answers"] = [f"{value:.4g}" for value in outputs]
        return {**key, **model}

    # ---- the paper's bound --------------------------------------------------------------------------------------

    def _bound(self, task: TuningTask, times: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Minimise J; returns times and figures."""
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
        grids = {name: nodes.project(nodes.grid(GRIDS[name], N)).numpy() for name in self.starts}
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
        """Minimise the error on random mixtures; returns times and figures."""
        schedule, sampler = task.schedule, task.sampler
        nodes = GridNodes(schedule, times, self.low)
        std = self._deviation(task)
        family, data, noise = draw_family(schedule, std, self.seed)
        x = schedule.alpha(times[0]) * data + schedule.sigma(times[0]) * noise
        with torch.no_grad():
            exact = walk(FINE, family, x, nodes.grid(UniformLambda(), max(100, 10 * task.steps)))

        def log_error(times: Tensor) -> Tensor:
            error = (walk(sampler, family, x, times, grad=times.requires_grad) - exact).square()
            # of each mixture; 1e-9 is the accuracy of `exact`
            return torch.log(error.reshape(family.size, -1).mean(1) + 1e-9).mean()

        def log_error_gradient(u: Tensor) -> tuple[float, Tensor]:
            value = log_error(nodes.from_params(u))
            return value.item(), torch.autograd.grad(value, u)[0]

        with torch.no_grad():
            grids = {name: nodes.grid(GRIDS[name], task.steps) for name in self.starts}
            errors = {name: log_error(grid).item() for name, grid in grids.items()}
        # a few iterations from each of the best, then many from the best of those
        candidates = [
            nodes.descend(log_error_gradient, grids[name], max(self.iterations // 4, 1))
            for name in sorted(errors, key=lambda name: errors[name])[:3]
        ]
        candidates += [(errors[name], grids[name]) for name in grids]
        start = min(candidates, key=lambda pair: pair[0])
        best = min(start, nodes.descend(log_error_gradient, start[1], self.iterations), key=lambda pair: pair[0])
        figures = {
            "error": math.exp(best[0] / 2),
            "std": std,
            **{f"error_{k}": math.exp(value / 2) for k, value in errors.items()},
        }
        return best[1], figures

    def _deviation(self, task: TuningTask) -> float:
        """The root mean square deviation of a coordinate of the data."""
        if self.std is not None or task.images is None:
            return 0.5 if self.std is None else self.std
        return as_float64(task.images(IMAGES)[0]).var(0).mean().sqrt().item()

    # ---- the model's own trajectory -----------------------------------------------------------------------------

    def _other(self, objective: Literal["bound", "local"], task: TuningTask) -> Tensor:
        """The times of another objective, cached separately."""
        table = dataclasses.replace(self, objective=objective).tune(task).plan
        assert table is not None
        return table.times

    def _count(self, task: TuningTask) -> int:
        """The number of noises."""
        return 64 if task.n is None else task.n

    def _trajectory(self, task: TuningTask, times: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Minimise the distance to the model's own trajectory; returns times and figures."""
        n, nodes, schedule = self._count(task), GridNodes(task.schedule, times, self.low), task.schedule
        if n < 2:
            raise BadInput(f"objective=trajectory needs at least 2 noises, one of them held out; found n={n}")
        x = task.noise(0, n).initial() * float(schedule.prior_std(times[0]))
        cond, held = task.cond(n), n - max(n // 4, 1)
        evaluations = 0

        def cond_of(samples: slice) -> dict[str, Any]:
            return {key: value[samples] for key, value in cond.items()}

        def ends(table: Plan, first: int, last: int, what: str = "") -> Tensor:
            nonlocal evaluations
            results = []
            for k in range(first, last, self.chunk):
                samples = slice(k, min(k + self.chunk, last))
                results.append(table(task.denoiser, x[samples], grad=False, cond=cond_of(samples)))
                evaluations += table.nfe * len(results[-1])
                if what:
                    task.tick(what, samples.stop, last, 0.0)
            return torch.cat(results)

        fine = plan(FINE, schedule, nodes.grid(UniformLambda(), self.fine))
        exact = as_float64(ends(fine, 0, n, "fine trajectory"))

        def error(times: Tensor) -> tuple[float, float]:
            """Mean squared errors: over all noises, over the held-out ones."""
            squares = (as_float64(ends(plan(task.sampler, schedule, times), 0, n)) - exact).square().flatten(1).mean(1)
            return squares.mean().item(), squares[held:].mean().item()

        def log_error_gradient(u: Tensor) -> tuple[float, Tensor]:
            """Log of the mean squared error and its gradient, accumulated over chunks to save memory."""
            nonlocal evaluations
            table = plan(task.sampler, schedule, nodes.from_params(u))
            total, gradient = 0.0, torch.zeros_like(u)
            for k in range(0, held, self.chunk):
                samples = slice(k, min(k + self.chunk, held))
                result = table(task.denoiser, x[samples], grad=True, cond=cond_of(samples))
                loss = (as_float64(result) - exact[samples]).square().sum() / exact[:held].numel()
                gradient += torch.autograd.grad(loss, u, retain_graph=True)[0]
                total += loss.item()
                evaluations += table.nfe * len(result)
            return math.log(total + 1e-30), gradient / (total + 1e-30)

        candidates = {"given": times, **{name: nodes.grid(GRIDS[name], task.steps) for name in self.starts}}
        candidates["local"] = self._other("local", task)
        if _bounded(task.sampler):
            candidates["bound"] = self._other("bound", task)
        errors = {}
        for done, (name, grid) in enumerate(candidates.items()):
            errors[name] = error(grid)
            task.tick("starts", done + 1, len(candidates), math.sqrt(errors[name][0]))
        names = sorted(errors, key=lambda name: errors[name])
        best, iterations, total = (*errors[names[0]], candidates[names[0]]), 0, self.searches * self.iterations
        for k, name in enumerate(names[: self.searches]):
            best_held_out, idle = errors[name][1], 0

            def callback(u: Tensor, done: int, before: int = k * self.iterations) -> None:
                nonlocal best, best_held_out, idle, iterations
                iterations, now = iterations + 1, nodes.from_params(u)
                all_noises, held_out = error(now)
                idle = 0 if held_out < best_held_out else idle + 1
                best_held_out = min(best_held_out, held_out)
                # rare samples that end in another mode dominate the mean: too rare to select by held-out noises alone
                best = min(best, (all_noises, held_out, now), key=lambda entry: entry[0])
                task.tick("trajectory", before + done, total, math.sqrt(held_out))
                if idle >= self.patience:
                    raise EarlyStopping

            nodes.descend(log_error_gradient, candidates[name], self.iterations, callback)
        task.tick("trajectory", total, total, math.sqrt(best[1]))
        figures = {
            "error": math.sqrt(best[0]),
            "held_out": math.sqrt(best[1]),
            "held_out_given": math.sqrt(errors["given"][1]),
            "iterations": iterations,
            "evaluations": evaluations,
        }
        return best[2], {**figures, **{f"error_{name}": math.sqrt(value[0]) for name, value in errors.items()}}


def _bounded(sampler: Any) -> bool:
    """Whether the paper's bound is that of the sampler."""
    return isinstance(sampler, (UniPC, DPMSolver)) and sampler.predict == "x0" and getattr(sampler, "multistep", True)


def _check_deterministic(sampler: Any, table: Plan) -> None:
    """Raise BadInput for a sampler that draws noise."""
    if table.stochastic:
        raise BadInput(f"optimized_steps is for deterministic samplers, found {format_spec(sampler)}: try unipc or dpm")
