"""Time of a sampling with a U-Net of Stable Diffusion 1.5's size under DeepCache, against the plain one and the count.

    OMP_NUM_THREADS=1 python -m benchmarks.deep_cache --branch 0 --every 5
    OMP_NUM_THREADS=1 python -m benchmarks.deep_cache --branch 0 --keys 0 1 5 --extrapolate 1      a forecast
    python -m benchmarks.deep_cache --count-sdxl           multiply-accumulates of SDXL's U-Net at every branch, no time
    python -m benchmarks.deep_cache --small                the same on a small network, for a trial

`--keys` in place of `--every` are the key steps. A forecast needs two of them after the first evaluation's.

The network has the configuration of Stable Diffusion 1.5 (860 million parameters, random weights); DDIM samples 64 x 64
x 4 latents, without guidance. Multiply-accumulates are counted on the meta device. The time of the plain sampling is
that of `--plain` of its evaluations, in proportion, since each costs the same; they run before and after the other.
`--clock cpu` counts CPU seconds of the process, for a shared device.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

import cyclopts
import torch

from hasten.accelerators import SamplingContext, accelerate
from hasten.accelerators.deep_cache import DeepCache
from hasten.adapters.diffusers.wrap import split_network
from hasten.denoiser import Denoiser
from hasten.performance.cost import macs
from hasten.performance.device import processor
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.sampling import Noise
from hasten.schedules import Discrete

from .reuse import network


def counted(net: Any, side: int, branch: int, **cond: Any) -> tuple[int, int]:
    """Multiply-accumulates of one evaluation, and of one between key steps, of a network on the meta device."""
    with torch.device("meta"), torch.no_grad():
        x, time_ = torch.zeros(1, 4, side, side), torch.zeros(1)
        emb = net.embed(time_, **cond)
        first = net.shallow_encode(x, emb, branch)
        up_input = net.deep(first, emb)
        cheap = macs(net.embed, time_, **cond) + macs(net.shallow_encode, x, emb, branch)
        cheap += macs(net.shallow_decode, first, up_input, emb)
        return cheap + macs(net.deep, first, emb), cheap


def count_sdxl(every: int) -> None:
    """Print the counts of SDXL's U-Net at 1024 x 1024 pixels, for every branch."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net: Any = split_network(
            UNet2DConditionModel(
                sample_size=128,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(320, 640, 1280),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ).eval()
        )
        cond = {"text": torch.zeros(1, 77, 2048), "added_text_embeds": torch.zeros(1, 1280)}
        cond["added_time_ids"] = torch.zeros(1, 6)
    for branch in range(net.branches + 1):
        whole, cheap = counted(net, 128, branch, **cond)
        result = {"branch": branch, "gmac": whole / 1e9, "cheap gmac": cheap / 1e9, "cheap": cheap / whole}
        print(json.dumps({**result, f"every {every}": every * whole / (whole + (every - 1) * cheap)}), flush=True)


def main(
    *,
    steps: int = 10,
    every: int = 5,
    keys: Annotated[list[int], cyclopts.Parameter(negative=(), consume_multiple=True)] = [],  # noqa: B006
    extrapolate: str = "0",
    branch: int = 0,
    plain: int = 2,
    side: int = 64,
    clock: Literal["wall", "cpu"] = "cpu",
    small: bool = False,
    count_sdxl_: Annotated[bool, cyclopts.Parameter(name="--count-sdxl")] = False,
) -> None:
    """Measure and count."""
    if count_sdxl_:
        count_sdxl(every)
        return
    with torch.device("meta"):
        whole, cheap = counted(network(small), side, branch, text=torch.zeros(1, 77, 768))
    key_steps = tuple(keys) or tuple(range(0, steps, every))
    count = len(key_steps)
    promised = steps * whole / (count * whole + (steps - count) * cheap)
    print(
        f"{whole / 1e9:.1f} GMAC, between key steps {cheap / 1e9:.1f} ({cheap / whole:.1%}): {promised:.3f}x",
        flush=True,
    )
    now = time.process_time if clock == "cpu" else time.perf_counter
    net = network(small)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    denoiser = Denoiser(net, Discrete(torch.cumprod(1 - betas, 0)), "eps", clock="index")
    times = pick("times", "uniform:start=0.999")(denoiser.schedule, steps)
    method = DeepCache(keys=key_steps, branch=branch, extrapolate=extrapolate)
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
                print(f"{steps} evaluations, {count} of them key steps: {accelerated:.2f} s", flush=True)
    one = sum(seconds[1:]) / len(seconds[1:])
    result = {
        "keys": key_steps,
        "extrapolate": extrapolate,
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
