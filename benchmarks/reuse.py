"""Time of a guided sampling with a U-Net of Stable Diffusion's size whose encoder is reused, against the plain one.

    OMP_NUM_THREADS=1 python -m benchmarks.reuse --out reuse.jsonl
    python -m benchmarks.reuse --small --rounds 1          the same loop on a small network, to try it

The network has the configuration of Stable Diffusion 1.5 (860 million parameters, random weights) and draws 64 x 64 x 4
latents with DDIM under guidance: every evaluation is two rows. Ways take turns, a whole trajectory each; every one gets
the median of its ratios to the plain loop in the same round, and what the count of multiply-accumulates promises.
`--clock cpu` counts CPU seconds of the process, for a machine that others use too. On a GPU: `--device cuda --half`.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import cyclopts
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hasten.accelerators import SamplingContext, accelerate
from hasten.adapters.diffusers.seams import SplitNetwork
from hasten.adapters.diffusers.wrap import split_network
from hasten.denoiser import Denoiser
from hasten.guides.cfg import CFG
from hasten.performance.device import processor
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.sampling import Noise
from hasten.schedules import Discrete


def network(small: bool) -> SplitNetwork:
    """The U-Net: Stable Diffusion's own, or one with a tenth of the channels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    changes = {"block_out_channels": (32, 64, 128, 128)} if small else {}
    return split_network(UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **changes).eval())


def macs(net: SplitNetwork, x: Tensor, cond: dict[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates of one evaluation and of its decoder, convolutions, products and attention."""
    net, x = copy.deepcopy(net).to("meta"), x.to("meta")
    told = {key: value.to("meta") for key, value in cond.items()}
    time_ = torch.zeros(len(x), device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as whole:
            emb = net.embed(time_, **told)
            skips, middle = net.encode(x, emb)
            net.decode(skips, middle, emb)
        with FlopCounterMode(display=False) as second:
            net.decode(skips, middle, net.embed(time_, **told))
    return {"whole": whole.get_total_flops() // 2, "decoder": second.get_total_flops() // 2}


def main(
    *,
    steps: int = 10,
    keys: tuple[int, ...] = (0, 5),
    rounds: int = 2,
    batch: int = 1,
    side: int = 64,
    ways: tuple[str, ...] = ("encoder_propagation", "encoder_propagation:parallel=2"),
    clock: Literal["wall", "cpu"] = "wall",
    device: str = "cpu",
    half: bool = False,
    small: bool = False,
    out: Path | None = None,
) -> None:
    """Measure. `ways` are accelerators as they are spelled, to which the keys are added."""
    net = network(small).to(device)
    net = net.half() if half else net
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    denoiser = Denoiser(net, Discrete(torch.cumprod(1 - betas, 0)), "eps", clock="index")
    sampler = pick("samplers", "ddim")
    times = pick("times", "uniform:start=0.999")(denoiser.schedule, steps)
    text = torch.randn(2, batch, 77, 768, generator=torch.Generator().manual_seed(1))
    text = text.to(device, next(net.parameters()).dtype)
    noise = Noise(range(batch), (4, side, side), torch.float32, device)
    cond = {"text": text[0], "null_text": text[1]}
    asked = tuple(times[:-1].tolist())
    spelled = "(" + ",".join(map(str, keys)) + ")"
    runs: dict[str, Any] = {"plain": denoiser}
    for way in ways:
        one = pick("accelerators", f"{way}{',' if ':' in way else ':'}keys={spelled}")
        runs[way] = accelerate(denoiser, [one], SamplingContext(asked))
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    with torch.no_grad():
        net(
            torch.randn(2 * batch, 4, side, side).to(text),
            torch.full((2 * batch,), 500.0, device=device),
            text=text.flatten(0, 1),
        )
        for turn in range(rounds):
            for way in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
                began = now()
                draw(CFG(7.5).wrap(runs[way]), sampler, times, noise, **cond)
                if device != "cpu":
                    torch.cuda.synchronize()
                seconds[way].append(now() - began)
                print(f"round {turn + 1}, {way}: {seconds[way][-1]:.1f} s", flush=True)
    work = macs(net, torch.zeros(2 * batch, 4, side, side), {"text": text.flatten(0, 1)})
    share, parts = work["decoder"] / work["whole"], len(keys) / steps
    promised = 1 / (1 - (1 - share) * (1 - parts))
    row: dict[str, Any] = {
        "macs": work["whole"] // (2 * batch),
        "decoder_share": share,
        "steps": steps,
        "keys": list(keys),
        "promised": promised,
        "rounds": rounds,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "machine": processor(torch.device(device)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "ways": {},
    }
    for way, taken in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["plain"], taken))
        row["ways"][way] = {
            "ratio": statistics.median(ratios),
            "low": ratios[0],
            "high": ratios[-1],
            "seconds": statistics.median(taken),
        }
        print(f"{way:40s} {statistics.median(ratios):5.3f}x, promised {1 if way == 'plain' else promised:5.3f}x")
    print(f"{row['macs'] / 1e9:.1f} GMAC an image, decoder {share:.1%}")
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
