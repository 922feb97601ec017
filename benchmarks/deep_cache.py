"""Time of a sampling with a U-Net of Stable Diffusion 1.5's size under DeepCache, against the plain one and the count.

    OMP_NUM_THREADS=1 python -m benchmarks.deep_cache --branch 0 --every 5
    python -m benchmarks.deep_cache --small                the same on a small network, for a trial

The network has the configuration of Stable Diffusion 1.5 (860 million parameters, random weights); DDIM samples 64 x 64
x 4 latents, without guidance. Multiply-accumulates are counted on the meta device. The time of the plain sampling is
that of `--plain` of its evaluations, in proportion, since each costs the same; they run before and after the other.
`--clock cpu` counts CPU seconds of the process, for a shared device.
"""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import cyclopts
import torch

from hasten.accelerators import SamplingContext, accelerate
from hasten.accelerators.deep_cache import DeepCache
from hasten.denoiser import Denoiser
from hasten.performance.cost import macs
from hasten.performance.device import processor
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.sampling import Noise
from hasten.schedules import Discrete

from .reuse import network


def counted(small: bool, side: int, branch: int) -> tuple[int, int]:
    """Multiply-accumulates of one evaluation, and of one between key steps."""
    with torch.device("meta"), torch.no_grad():
        net: Any = network(small)
        x, time_, text = torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, 77, 768)
        emb = net.embed(time_, text=text)
        first = net.shallow_encode(x, emb, branch)
        up_input = net.deep(first, emb)
        cheap = macs(net.embed, time_, text=text) + macs(net.shallow_encode, x, emb, branch)
        cheap += macs(net.shallow_decode, first, up_input, emb)
        return cheap + macs(net.deep, first, emb), cheap


def main(
    *,
    steps: int = 10,
    every: int = 5,
    branch: int = 0,
    plain: int = 2,
    side: int = 64,
    clock: Literal["wall", "cpu"] = "cpu",
    small: bool = False,
) -> None:
    """Measure and count."""
    whole, cheap = counted(small, side, branch)
    keys = len(range(0, steps, every))
    promised = steps * whole / (keys * whole + (steps - keys) * cheap)
    print(
        f"{whole / 1e9:.1f} GMAC, between key steps {cheap / 1e9:.1f} ({cheap / whole:.1%}): {promised:.3f}x",
        flush=True,
    )
    now = time.process_time if clock == "cpu" else time.perf_counter
    net = network(small)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    denoiser = Denoiser(net, Discrete(torch.cumprod(1 - betas, 0)), "eps", clock="index")
    times = pick("times", "uniform:start=0.999")(denoiser.schedule, steps)
    method = DeepCache(every=every, branch=branch)
    fast = accelerate(denoiser, [method], SamplingContext(tuple(times[:-1].tolist())))
    noise, text = Noise([0], (4, side, side), torch.float32, "cpu"), torch.randn(1, 77, 768)
    x, seconds = noise.initial(), list[float]()
    with torch.no_grad():
        for first in (True, False):
            for k in range(plain // 2 + first):  # the first one is not counted: it allocates
                start = now()
                denoiser(x, times[k], text=text)
                seconds.append(now() - start)
                print(f"plain evaluation: {seconds[-1]:.2f} s", flush=True)
            if first:
                start = now()
                draw(fast, pick("samplers", "ddim"), times, noise, text=text)
                accelerated = now() - start
                print(f"{steps} evaluations, {keys} of them key steps: {accelerated:.2f} s", flush=True)
    one = sum(seconds[1:]) / len(seconds[1:])
    result = {
        "gmac": whole / 1e9,
        "cheap": cheap / whole,
        "promised": promised,
        "measured": steps * one / accelerated,
        "fraction": steps * one / accelerated / promised,
        "threads": torch.get_num_threads(),
        "machine": processor(torch.device("cpu")),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    cyclopts.run(main)
