"""`hasten choose`: does its bound hold on other seeds, and what does it find of what an exhaustive search finds?

    python -m benchmarks.choose coverage         `fashion`, few steps: about a minute on one idle core
    python -m benchmarks.choose fashion          every candidate measured, and a search: about a minute
    python -m benchmarks.choose folder           the same for a tiny random StableDiffusionPipeline in a folder

- coverage: one search with `--psnr`, whose certificate is then held against 20 further disjoint blocks of as many
  seeds, which neither the search nor the certificate has used. The bound that a try on each block gives, from as few of
  its seeds as keep the goal, is also held against the next block and against the mean of all.
- fashion, folder: samplers UniPC-2, DPM++ 2M and DDIM, the plain model's grid and equal angles, every number of steps
  below the plain model's that the search knows; of the folder each with full guidance, guidance in an interval, and
  reuse of the last difference. The exhaustive search measures all of these on the seeds 0 to n - 1 and takes the
  fastest whose mean PSNR keeps the goal, and the
  fastest of which a certificate could be given on n seeds (the bound at the confidence of a first try). Times are by
  evaluations, since all rows run the same network; costs are images through the network, with those of timings.
  `--searches K` runs the search K times, from seeds 0, 3000, 6000, ...
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hasten
from hasten.choosing import candidates
from hasten.choosing.bench import Bench
from hasten.choosing.candidates import plain_variant, search_space
from hasten.choosing.certificate import looks_of, risk_of_try, risks_of_looks
from hasten.choosing.losses import Psnr
from hasten.choosing.search import Entry, Search
from hasten.choosing.store import MeasurementStore
from hasten.metrics.paired_loss import mean_loss
from hasten.model import Model
from hasten.plan.config import SamplingConfig
from hasten.progress import ProgressReporter

EXCLUDED = ("plan", "cache", "bits", "student", "lora", "decoder")
FRESH = 100_000  # first seed of the blocks, far from those of searches


@dataclass
class Case:
    """A model, how it is sampled without a search, the goal, and the seeds of a certificate."""

    model: Model
    plain: SamplingConfig
    psnr: float
    n: int
    prompts: Any = None
    exclude: tuple[str, ...] = EXCLUDED

    def options(self) -> dict[str, Any]:
        """Of `hasten.choose`."""
        return {
            "psnr": self.psnr, "n": self.n, "plain": self.plain, "exclude": self.exclude, "precision": "fp32",
            "prompts": self.prompts, "rounds": 1, "timing_batch": 1,
        }  # fmt: skip


def bench_of(case: Case, folder: Path) -> Bench:
    """What measures a case outside a search."""
    store = MeasurementStore(folder, {})
    plain = plain_variant(case.model, case.plain)
    return Bench(case.model, plain, Psnr(), store, ProgressReporter(0, False), case.prompts)


def coverage(case: Case, blocks: int, out: Path) -> None:
    """Print how often the bounds hold on other blocks of seeds."""
    result = hasten.choose(case.model, out=out / "best.toml", **case.options())  # type: ignore[arg-type]
    bench = bench_of(case, out / "blocks")
    space = search_space(case.model, bench.plain, case.exclude)
    every = [*space.first, *(v for one in space.first for v in space.expanded(one, bench.plain))]
    best = next(v for v in every if v.name == result["best"])
    promised = result["certificate"]["bound"]
    risk = 1 - result["certificate"]["confidence"]
    losses = [bench.loss(best, [(FRESH + k * case.n, case.n)]) for k in range(blocks)]
    mean = sum(loss.value for loss in losses) / blocks
    looks = looks_of(case.n, 4 * Psnr.least)
    bounds, means = [], []
    for k in range(blocks):
        db = bench.rows(best, FRESH + k * case.n, case.n)["psnr"]
        for count, own in zip(looks, risks_of_looks(risk, len(looks))):
            loss = mean_loss(-db[:count])
            bound = loss.upper(own, others=case.n)
            if bound <= -case.psnr:
                break
        bounds.append(bound)
        means.append(loss.upper(own))
    held = sum(loss.value <= promised for loss in losses)
    after = sum(bound >= losses[(k + 1) % blocks].value for k, bound in enumerate(bounds))
    print(f"{best.name}: promised at least {-promised:.2f} dB on other {case.n} seeds ({1 - risk:.1%} confidence)")
    print(
        f"holds on {held} of {blocks} disjoint blocks: mean {-mean:.2f} dB, least {-max(x.value for x in losses):.2f}"
    )
    print(f"bounds of the blocks hold on the next block in {after} of {blocks}, for the mean of all in "
          f"{sum(bound >= mean for bound in means)} of {blocks}")  # fmt: skip


def exhaustive(case: Case, out: Path, searches: int) -> None:
    """Print what searches find, against all candidates measured."""
    results = []
    for k in range(searches):
        began, cpu = time.perf_counter(), time.process_time()
        path, seed = out / f"best{k}.toml", 3000 * k
        result = hasten.choose(case.model, out=path, show=False, seed=seed, **case.options())  # type: ignore[arg-type]
        print(f"choose: {result['summary']}")
        cpu, wall = time.process_time() - cpu, time.perf_counter() - began
        print(f"  {result['spent']['evaluations']} evaluations, {cpu:.0f} CPU s, {wall:.0f} s", flush=True)
        results.append(result)
    bench = bench_of(case, out / "every")
    space = search_space(case.model, bench.plain, case.exclude)
    every = [*space.first, *(v for one in space.first for v in space.expanded(one, bench.plain))]
    cpu = time.process_time()
    entries: list[Entry] = []
    search = Search(bench, space, hasten.choosing.goal.parse_goal(None, case.psnr, None), (case.n,), print)
    for variant in every:
        if (failed := bench.failure(variant, 0, case.n)) is not None:
            print(f"  failed: {variant.name}: {failed}")
            continue
        entries.append(search.entry(variant, [(0, case.n)]))
    cost = bench.store.state["spent"]["evaluations"]
    risk = risk_of_try(0.95, 1)
    passing = [e for e in entries if e.loss.value <= -case.psnr]
    safe = [e for e in entries if e.loss.upper(risk, others=case.n) <= -case.psnr]
    print(f"exhaustive: {len(entries)} candidates, {cost} evaluations, {time.process_time() - cpu:.0f} CPU s")
    for what, some in (("mean", passing), ("bound", safe)):
        best = min(some, key=lambda e: (e.nfe, e.loss.value))
        print(f"  fastest by its {what}: {best.name}, {best.nfe:g} evaluations, {-best.loss.value:.2f} dB")
        for result in results:
            chosen = next(e for e in entries if e.name == result["best"])
            print(
                f"    the choice: {chosen.name}, {-chosen.loss.value:.2f} dB: {chosen.nfe / best.nfe:.3f} of its time"
            )
    shares = ", ".join(f"{result['spent']['evaluations'] / cost:.3f}" for result in results)
    print(f"  cost of the search: {shares} of the exhaustive one")


def folder_case(where: Path) -> Case:
    """A tiny random pipeline in a folder, as the tests have it."""
    from tests.adapters.tiny import sd_pipeline

    sd_pipeline().save_pretrained(where)
    prompts = ["a photo of the cat", "a big dog", "the red cat", "a blue photo of the big dog", "the dog", "a cat"]
    model = hasten.load(str(where))
    return Case(model, SamplingConfig("unipc", times="angle", steps=10, guidance_scale=4), 30.0, 64, prompts)


def main() -> None:
    """Run a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("coverage", "fashion", "folder"))
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--n", type=int)
    parser.add_argument("--psnr", type=float)
    parser.add_argument("--searches", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    candidates.SAMPLERS = ("unipc", "dpm:order=2", "ddim")  # type: ignore[assignment]
    candidates.GRIDS = ("angle",)  # type: ignore[assignment]
    candidates.GUIDES = ("delta_reuse:every=2", "interval:high=2")  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        out = given.out or Path(scratch)
        if given.case == "folder":
            case = folder_case(out / "pipeline")
        elif given.case == "fashion":
            case = Case(
                hasten.load("fashion"), SamplingConfig(steps=8, guidance_scale=1), 28.0, 64,
                exclude=("guidance", *EXCLUDED),
            )  # fmt: skip
        else:
            case = Case(
                hasten.load("fashion"), SamplingConfig(steps=6, guidance_scale=1), 24.0, 24,
                exclude=("guidance", *EXCLUDED),
            )  # fmt: skip
        case.n, case.psnr = given.n or case.n, given.psnr or case.psnr
        (coverage(case, given.blocks, out) if given.case == "coverage" else exhaustive(case, out, given.searches))


if __name__ == "__main__":
    main()
