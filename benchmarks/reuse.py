"""Time of a guided sampling with a U-Net of Stable Diffusion's size with encoder reuse, against the plain one.

    OMP_NUM_THREADS=1 python -m benchmarks.reuse --out reuse.jsonl
    python -m benchmarks.reuse --small --rounds 1          the same loop on a small network, for a trial

The network has the configuration of Stable Diffusion 1.5 (860 million parameters, random weights) and samples 64 x 64 x
4 latents with DDIM and guidance: every evaluation is two rows. Methods are interleaved, a trajectory each; reported are
the median of the ratios to the plain loop in the same round, and the ratio predicted from multiply-accumulates.
`--clock cpu` counts CPU seconds of the process, for a shared device. On a GPU: `--device cuda --half`.
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
from hasten.adapters.diffusers.split_network import SplitNetwork
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
    meta_cond = {key: value.to("meta") for key, value in cond.items()}
    time_ = torch.zeros(len(x), device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as total:
            emb = net.embed(time_, **meta_cond)
            skips, middle = net.encode(x, emb)
            net.decode(skips, middle, emb)
        with FlopCounterMode(display=False) as second:
            net.decode(skips, middle, net.embed(time_, **meta_cond))
    return {"whole": total.get_total_flops() // 2, "decoder": second.get_total_flops() // 2}


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
    """Measure. `ways` are accelerator specs, to which the key steps are added."""
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
    step_times = tuple(times[:-1].tolist())
    keys_text = "(" + ",".join(map(str, keys)) + ")"
    runs: dict[str, Any] = {"plain": denoiser}
    for method in ways:
        one = pick("accelerators", f"{method}{',' if ':' in method else ':'}keys={keys_text}")
        runs[method] = accelerate(denoiser, [one], SamplingContext(step_times))
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    with torch.no_grad():
        net(
            torch.randn(2 * batch, 4, side, side).to(text),
            torch.full((2 * batch,), 500.0, device=device),
            text=text.flatten(0, 1),
        )
        for turn in range(rounds):
            for method in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
                start = now()
                draw(CFG(7.5).wrap(runs[method]), sampler, times, noise, **cond)
                if device != "cpu":
                    torch.cuda.synchronize()
                seconds[method].append(now() - start)
                print(f"round {turn + 1}, {method}: {seconds[method][-1]:.1f} s", flush=True)
    work = macs(net, torch.zeros(2 * batch, 4, side, side), {"text": text.flatten(0, 1)})
    decoder_fraction, parts = work["decoder"] / work["whole"], len(keys) / steps
    predicted = 1 / (1 - (1 - decoder_fraction) * (1 - parts))
    row: dict[str, Any] = {
        "macs": work["whole"] // (2 * batch),
        "decoder_share": decoder_fraction,
        "steps": steps,
        "keys": list(keys),
        "promised": predicted,
        "rounds": rounds,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "machine": processor(torch.device(device)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "ways": {},
    }
    for method, times_of_method in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["plain"], times_of_method))
        row["ways"][method] = {
            "ratio": statistics.median(ratios),
            "low": ratios[0],
            "high": ratios[-1],
            "seconds": statistics.median(times_of_method),
        }
        print(f"{method:40s} {statistics.median(ratios):5.3f}x, promised {1 if method == 'plain' else predicted:5.3f}x")
    print(f"{row['macs'] / 1e9:.1f} GMAC an image, decoder {decoder_fraction:.1%}")
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
