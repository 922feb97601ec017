"""hasten against diffusers on the same work, in the same run: the solvers' error and the cost of a step.

    python -m benchmarks.peers                    both tables, about a minute on one core
    python -m benchmarks.peers --out peers.jsonl  and one JSON line per measured cell

Error: 256 samples of two closed-form mixtures (M2: 6 modes in 2 dimensions, M64: 10 modes in 64) from the same starting
noise, on the same noise levels, with the exact denoiser evaluated at the level of each scheduler; RMS distance to
the end of the probability-flow ODE (DOP853, relative tolerance 1e-10). "-" where diffusers gives no number.

Cost: one step on a 1x4x64x64 float32 state with a network that costs nothing, the libraries interleaved, median over
repeats. Ours is the entire loop of a `Plan` divided by its steps, with and without the `Denoiser` that turns eps into
x0 (which diffusers' `step` does inside); diffusers' is `scheduler.step` alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.exact import GaussianMixture, m2, m64
from hasten.plan import plan
from hasten.samplers import DDIM, DEIS, PLMS, DPMSolver, Heun, UniPC
from hasten.schedules import Discrete

F64 = torch.float64
COUNTS = (5, 6, 8, 10, 15, 20)
TABLES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
SPACINGS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
}


@dataclass(frozen=True)
class Peer:
    """A scheduler of diffusers and our sampler of the same name; either may be missing."""

    name: str
    scheduler: str | None
    options: dict[str, Any]
    ours: Any


PEERS = (
    Peer("DDIM", "DDIMScheduler", {"clip_sample": False}, DDIM()),
    Peer("UniPC-2", "UniPCMultistepScheduler", {"solver_order": 2}, UniPC(2)),
    Peer("UniPC-2 bh1", "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, UniPC(2, "bh1")),
    Peer("UniPC-3", "UniPCMultistepScheduler", {"solver_order": 3}, UniPC(3)),
    Peer("DPM++ 2M", "DPMSolverMultistepScheduler", {"solver_order": 2}, DPMSolver(2)),
    Peer("DPM++ 3M (half term)", "DPMSolverMultistepScheduler", {"solver_order": 3}, DPMSolver(3, third="compat")),
    Peer("DPM++ 3M (third order)", None, {}, DPMSolver(3)),
    Peer("DPM++ 3S", "DPMSolverSinglestepScheduler", {"solver_order": 3}, DPMSolver(3, multistep=False)),
    Peer("DEIS-3 log rho", "DEISMultistepScheduler", {"solver_order": 3}, DEIS(3, "log_rho")),
    Peer("DEIS-3 rho", None, {}, DEIS(3, "rho")),
    Peer("iPNDM-4", None, {}, PLMS(4, "ramp")),
    Peer("Heun", "HeunDiscreteScheduler", {}, Heun()),
)


@dataclass(frozen=True)
class Cell:
    """One measurement. error: RMS over samples, and the median; overhead: seconds per step, minimum and median.

    `budget` is the number of evaluations allowed, `nfe` those used (Heun uses an odd number).
    """

    kind: str
    problem: str
    method: str
    library: str
    budget: int
    nfe: int
    value: float
    median: float


def start(name: str) -> Tensor:
    """The starting noise (256, D)."""
    import numpy as np

    return torch.from_numpy(np.random.default_rng(0).standard_normal((256, 2 if name == "M2" else 64)))


def at_level(model: GaussianMixture, y: Tensor, q: Tensor) -> Tensor:
    """The exact model output at y = z/alpha and any noise level q."""
    t = model.schedule.time(-torch.log(q))
    return model(y * model.schedule.alpha(t), t)


def levels(scheduler: Any, schedule: Discrete) -> Tensor:
    """The distinct noise levels that a scheduler visits, from noise to clean."""
    if hasattr(scheduler, "sigmas") and scheduler.sigmas is not None:
        return torch.unique_consecutive(scheduler.sigmas.double())
    return schedule.q((scheduler.timesteps.double() + 1) / 1000)


def theirs(scheduler: Any, model: GaussianMixture, z: Tensor) -> Tensor:
    """diffusers' loop in float32, the denoiser evaluated at the scheduler's own level (not at its rounded timestep)."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    in_y = type(scheduler).__name__.startswith("Heun")  # its state is y = z/alpha
    sigmas = getattr(scheduler, "sigmas", None)
    state = z.float()
    for k, t in enumerate(scheduler.timesteps):
        q = sigmas[k].double() if sigmas is not None else model.schedule.q((t.double() + 1) / 1000)
        root = torch.sqrt(1 + q**2)
        y = state.double() if in_y else state.double() * root
        eps = (y - at_level(model, y, q)) / q
        state = scheduler.step(eps.float(), t, state, return_dict=False)[0]
    return state.double()


def errors(problem: str, spacing: str, counts: tuple[int, ...]) -> Iterator[Cell]:
    """Errors of every pair on one mixture and table, both libraries on the levels of diffusers' spacing, then 0."""
    import diffusers

    name, table = problem.split()
    base = diffusers.UniPCMultistepScheduler(**TABLES[table])
    schedule = Discrete(tuple(base.alphas_cumprod.double().tolist()), "log_q")
    model = {"M2": m2, "M64": m64}[name](schedule)
    q0, noise = float(schedule.q(1.0)), start(name)
    exact = model.ode(noise, 1.0)

    def cell(method: str, library: str, budget: int, nfe: int, end: Tensor) -> Cell:
        wrong = (end - exact).square().mean(1).sqrt()
        rms = wrong.square().mean().sqrt().item()
        return Cell("error", f"{problem} {spacing}", method, library, budget, nfe, rms, wrong.median().item())

    for count in counts:
        for peer in PEERS:
            heun, steps = peer.name == "Heun", (count + 1) // 2 if peer.name == "Heun" else count
            base = diffusers.UniPCMultistepScheduler(**TABLES[table], **SPACINGS[spacing])
            base.set_timesteps(steps)
            q = levels(base, schedule)
            times = torch.cat([schedule.time(-torch.log(q[:-1])), torch.zeros(1, dtype=F64)])
            times[0] = schedule.time(-torch.log(q[0])).clamp(max=1.0)
            z = noise * math.sqrt(1 + q0**2) / math.sqrt(1 + float(q[0]) ** 2)
            ours = plan(peer.ours, schedule, times)
            yield cell(peer.name, "hasten", count, ours.nfe, ours(model, z, None))
            if peer.scheduler is None or (
                peer.scheduler == "DDIMScheduler" and (spacing != "trailing" or 1000 % count)
            ):
                continue
            options = {
                k: v
                for k, v in SPACINGS[spacing].items()
                if peer.scheduler != "DDIMScheduler" or k == "timestep_spacing"
            }
            if peer.scheduler == "DPMSolverSinglestepScheduler" and options.pop("timestep_spacing") == "trailing":
                continue  # it knows one spacing in time only, which is not this one
            scheduler = getattr(diffusers, peer.scheduler)(**TABLES[table], **options, **peer.options)
            try:
                scheduler.set_timesteps(steps)
                begin = z * math.sqrt(1 + float(q[0]) ** 2) if heun else z
                yield cell(peer.name, "diffusers", count, ours.nfe, theirs(scheduler, model, begin))
            except (IndexError, ValueError, RuntimeError) as error:
                print(f"diffusers {peer.scheduler} {spacing} {count}: {type(error).__name__}: {error}")


class Identity(nn.Module):
    """A network that costs nothing."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def overhead(repeats: int = 41, steps: int = 20) -> Iterator[Cell]:
    """Seconds a step of every loop, interleaved: each repeat times each of them once."""
    import diffusers

    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    schedule = Discrete.scaled_linear()
    times = torch.linspace(1, 0, steps + 1, dtype=F64)
    runs: dict[tuple[str, str], Callable[[], float]] = {}

    def clock(work: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) / steps

    def of(scheduler: Any) -> Callable[[], float]:
        def loop() -> None:
            state = x
            for t in scheduler.timesteps:
                state = scheduler.step(state, t, state, return_dict=False)[0]

        def run() -> float:
            scheduler.set_timesteps(steps)
            return clock(loop)

        return run

    def ours(table: Any, denoiser: Callable[..., Tensor]) -> Callable[[], float]:
        return lambda: clock(lambda: table(denoiser, x, None))

    wrapped = Denoiser(Identity(), schedule, "eps", clock="index")
    for name, sampler in (("UniPC-2", UniPC(2)), ("UniPC-3", UniPC(3)), ("DPM++ 2M", DPMSolver(2)), ("DDIM", DDIM())):
        table = plan(sampler, schedule, times)
        runs[name, "hasten"] = ours(table, Identity())
        runs[name, "hasten with Denoiser"] = ours(table, wrapped)
    scaled = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for peer in PEERS:
        if (peer.name, "hasten") in runs and peer.scheduler is not None:
            runs[peer.name, "diffusers"] = of(getattr(diffusers, peer.scheduler)(**scaled, **peer.options))
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    with torch.no_grad():
        for repeat in range(repeats + 2):
            for key, run in runs.items():
                seconds = run()
                if repeat >= 2:  # the first two warm the caches
                    taken[key].append(seconds)
    for (name, library), seconds in taken.items():
        yield Cell("overhead", "1x4x64x64", name, library, steps, steps, min(seconds), statistics.median(seconds))


def error_table(cells: list[Cell]) -> str:
    """Markdown: RMS as `hasten / diffusers`, a row per method; "-" where diffusers has no number."""
    counts = sorted({c.budget for c in cells})
    by_key = {(c.problem, c.method, c.library, c.budget): c for c in cells}
    lines = ["| problem, levels | method | " + " | ".join(f"NFE {n}" for n in counts) + " |"]
    lines.append("|---" * (2 + len(counts)) + "|")
    for problem, method in dict.fromkeys((c.problem, c.method) for c in cells):
        pairs = []
        for n in counts:
            ours, them = (by_key.get((problem, method, library, n)) for library in ("hasten", "diffusers"))
            other = f"{them.value:.4f}" if them is not None and math.isfinite(them.value) else "-"
            used = f" ({ours.nfe})" if ours is not None and ours.nfe != n else ""
            pairs.append(f"{ours.value:.4f} / {other}{used}" if ours is not None else "")
        lines.append(f"| {problem} | {method} | " + " | ".join(pairs) + " |")
    return "\n".join(lines)


def overhead_table(cells: list[Cell]) -> str:
    """Markdown: microseconds per step, median (minimum), and the ratio to diffusers."""
    by_key = {(c.method, c.library): c for c in cells}
    lines = ["| step of | hasten | with eps to x0 | diffusers | ratio | ratio with eps to x0 |", "|---" * 6 + "|"]
    for method in dict.fromkeys(c.method for c in cells):
        trio = [by_key[method, library] for library in ("hasten", "hasten with Denoiser", "diffusers")]
        numbers = " | ".join(f"{1e6 * c.median:.0f} ({1e6 * c.value:.0f}) us" for c in trio)
        ratios = " | ".join(f"{trio[2].median / c.median:.1f} ({trio[2].value / c.value:.1f})" for c in trio[:2])
        lines.append(f"| {method} | {numbers} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--problems", nargs="+", default=["M2 linear", "M2 cosine", "M64 linear", "M64 cosine"], help="mixture table"
    )
    parser.add_argument("--spacings", nargs="+", choices=list(SPACINGS), default=list(SPACINGS))
    parser.add_argument("--nfe", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--only", choices=["error", "overhead"])
    parser.add_argument("--out", type=Path, help="write one JSON line per cell here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    cells: list[Cell] = []
    if args.only != "error":
        cells += overhead()
        print(overhead_table(cells), flush=True)
    if args.only != "overhead":
        wrong = [c for p in args.problems for s in args.spacings for c in errors(p, s, tuple(args.nfe))]
        print("\nRMS error, hasten / diffusers\n\n" + error_table(wrong))
        cells += wrong
    if args.out is not None:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text("".join(json.dumps(asdict(c)) + "\n" for c in cells))
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
