"""The probability-flow ODE by scipy's adaptive Runge-Kutta methods, with step sizes for each sample."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, HastenError, check_choices, check_numbers
from ..sampling import SamplerBase
from ..schedules.base import Schedule
from .adaptive import integration_interval

METHODS = ("RK45", "RK23", "DOP853")
ORDERS = {"RK45": 5, "RK23": 3, "DOP853": 8}
STOP = object()


@dataclass(frozen=True)
class ProbabilityFlow(SamplerBase):
    """The deterministic path from noise to data, to a tolerance, by RK45 (or RK23, DOP853) of scipy.integrate.

    With the angle phi = atan(sigma / alpha), which is pi/2 at pure noise, Y = z / sqrt(alpha^2 + sigma^2), w = log phi,

        dY/dw = phi (Y cos phi - x0) / sin phi,

    finite from alpha = 0 on, and the same equation on every schedule. (In phi itself the error estimate misses what
    happens near the image: at equal NFE the error is 50 times larger.) It stops at the last positive time of the grid,
    times[-2] (the schedule's t_min if the grid is one step into 0), where the output is the result; on a grid that ends
    above 0 the result is the state there. The times between are not used.

    A step is accepted when the root mean square of error / (atol + rtol |Y|) over the entries of one sample is at most
    1. The paper solves an entire batch as one system, so that an image depends on the others in its batch; here each
    sample has its own solver. The solvers run in lockstep: all that wait for an evaluation are evaluated in one batch,
    each at its own time. Each solver runs in its own thread, in which the network is never evaluated. States are
    float64, the network's input has the dtype of x.

    Not linear. Order 5, 3 or 8 (as the method claims); NFE not known in advance: 6, 3 or 12 a step (also a rejected
    one), and 3 more. Small tolerances need smooth outputs, which a network in bfloat16 does not have.

    Args:
        rtol, atol: relative and absolute tolerance.
        method: "RK45", "RK23" or "DOP853".
        limit: maximum number of evaluations of one sample.

    Raises:
        HastenError: while sampling, where a sample's solver finds no step or reaches the limit, or an output is not
            finite.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, arXiv:2011.13456, section 4.3 and appendix D.4 (RK45,
        rtol = atol = 1e-5).
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "RK45"
    limit: int = 1000
    linear: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    why: ClassVar[str] = "the length of its next step follows the error of the last one, for each sample"

    def __post_init__(self) -> None:
        check_choices(self, method=METHODS)
        if not (1e-13 <= self.rtol < 1 and 0 < self.atol < 1 and self.limit > 0):
            raise BadInput(f"{self}: needs 1e-13 <= rtol < 1, 0 < atol < 1 and limit > 0")
        check_numbers(self)

    @property
    def order(self) -> int:
        """The order of the method."""
        return ORDERS[self.method]

    def nfe(self, steps: int) -> None:
        """None: the number of model evaluations depends on the values."""
        return

    def solve(
        self, evaluate: Callable[..., Tensor], schedule: Schedule, x: Tensor, times: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """x (B, *S) at times[0] -> the result at times[-1].

        Args:
            evaluate: `evaluate(x (R, *S), t (R,), rows (R,) or None) -> x0`.
            schedule: of the denoiser.
            x: the initial state (B, *S).
            times: (steps + 1,), decreasing.
            noise: not used.
        """
        import numpy as np
        from scipy import integrate

        top, last = integration_interval(schedule, times)
        (a0, s0), (a1, s1) = ((schedule.alpha(t), schedule.sigma(t)) for t in (top, last))
        start, end = (math.log(math.atan2(float(s), float(a))) for a, s in ((a0, s0), (a1, s1)))
        rule = getattr(integrate, self.method)

        def path(k: int, derivative: Callable[[float, Any], Any]) -> Any:
            """The solver of sample k; runs in a thread."""
            solver = rule(derivative, start, Y[k], end, rtol=self.rtol, atol=self.atol)
            message: str | None = None
            while solver.status == "running" and solver.nfev < self.limit:
                message = solver.step()
            if solver.status != "finished":
                where = f"stopped at t = {float(at(solver.t)):.4g} after {solver.nfev} evaluations of a sample"
                raise HastenError(
                    f"probability_flow {where} ({message or f'limit={self.limit}'}): a network in low precision, or "
                    f"with noise of its own, needs larger tolerances than rtol={self.rtol:g}, atol={self.atol:g}"
                )
            return solver.y

        def at(w: Any) -> Tensor:
            """The time, or times, of w; at both ends exactly those of the grid."""
            w = torch.as_tensor(w, dtype=torch.float64)
            t = schedule.time(-torch.log(torch.tan(w.exp())))
            return torch.where(w >= start, top, torch.where(w <= end, last, t))

        def derivatives(rows: list[int], requests: list[tuple[float, Any]]) -> list[Any]:
            w = torch.tensor([w for w, _ in requests], dtype=torch.float64)
            t, state = at(w), np.stack([Y for _, Y in requests])
            scale = torch.hypot(schedule.alpha(t), schedule.sigma(t))[:, None]
            z = (scale * torch.from_numpy(state)).reshape(-1, *x.shape[1:]).to(x)
            which = None if len(rows) == len(x) else torch.tensor(rows, device=x.device)
            x0 = evaluate(z, t, which).detach().cpu().double().flatten(1).numpy()
            if not np.isfinite(x0).all():
                raise HastenError("probability_flow: the output of the network is not finite")
            phi = w.exp().numpy()[:, None]
            return list(phi * (state * np.cos(phi) - x0) / np.sin(phi))

        Y = (x.detach().cpu().double().flatten(1) / math.hypot(float(a0), float(s0))).numpy()
        if start > end:
            Y = np.stack(run_in_lockstep(path, len(x), derivatives))
        z = (torch.from_numpy(Y) * math.hypot(float(a1), float(s1))).reshape(x.shape).to(x)
        return evaluate(z, last) if times[-1] == 0 else z


def run_in_lockstep(
    path: Callable[[int, Callable[..., Any]], Any],
    count: int,
    evaluate_batch: Callable[[list[int], list[Any]], list[Any]],
) -> list[Any]:
    """Run `path(k, evaluate)`, k = 0 .. count - 1, each in its own thread, with their evaluations batched.

    Once every path that has not returned waits in `evaluate(*arguments)`, the caller's thread calls
    `evaluate_batch(which, requests)`, which returns one result each, and they continue. Any exception, of a path, of
    `evaluate_batch` or a KeyboardInterrupt meanwhile, ends all paths and is raised.

    Args:
        path: the function of each thread.
        count: number of threads.
        evaluate_batch: the numbers of the waiting paths and their arguments -> their results.

    Returns:
        the results of the paths, in order.
    """
    inbox: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
    replies: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(count)]

    def run(k: int) -> None:
        def evaluate(*arguments: Any) -> Any:
            inbox.put((k, "evaluate", arguments))
            reply = replies[k].get()
            if reply is STOP:
                raise _Stopped
            return reply

        try:
            inbox.put((k, "return", path(k, evaluate)))
        except BaseException as error:  # raised in the caller's thread
            inbox.put((k, "raise", error))

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(count)]
    try:
        for thread in threads:
            thread.start()
        results: list[Any] = [None] * count
        running = count
        while running:
            requests: dict[int, Any] = {}
            for k, kind, what in [inbox.get() for _ in range(running)]:
                if kind == "raise":
                    raise what
                if kind == "return":
                    results[k] = what
                else:
                    requests[k] = what
            which, running = sorted(requests), len(requests)
            if which:
                for k, reply in zip(which, evaluate_batch(which, [requests[k] for k in which]), strict=True):
                    replies[k].put(reply)
        return results
    finally:
        for reply in replies:
            reply.put(STOP)


class _Stopped(Exception):
    """Ends a thread whose evaluation will not be made."""
