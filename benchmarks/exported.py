"""Speed of one evaluation of a DDPM-CIFAR-size U-Net (35.7M weights, random), exported and compiled, against eager.

    OMP_NUM_THREADS=1 python -m benchmarks.exported --work /tmp/exported --out exported.jsonl

One line per batch size: for each variant the ratio of its time to fp32 eager, interleaved (median, minimum, maximum
over the rounds), its seconds, and the relative error of the output. `--clock cpu` counts CPU seconds, for a shared
device. The exports stay in `work`, so that a second run only measures. Needs hasten[onnx,openvino] and diffusers;
variants whose package is missing are omitted.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cyclopts
import torch
from torch import Tensor, nn

from hasten.accelerators import accelerate
from hasten.accelerators.compile import Compile
from hasten.adapters import onnx, openvino
from hasten.adapters._export import FlatNetwork, record_inputs
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.loading import load
from hasten.model import Model
from hasten.performance.device import processor
from hasten.schedules import VPLinear

WAYS = (
    "openvino fp32",
    "openvino bf16",
    "openvino int8",
    "openvino int8+bf16",
    "onnx fp32",
    "onnx int8",
    "eager bf16",
    "compile fp32",
)


class CifarNet(nn.Module):
    """The U-Net of DDPM for 32 x 32 pixels (Ho et al. 2020, 2006.11239), with random weights."""

    config = {"channels": 3}

    def __init__(self) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        down = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
        self.net = UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=down,
            up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.net(x, time).sample


def cifar() -> Model:
    """A model with that network and 10 steps."""
    torch.manual_seed(0)
    net = CifarNet().eval().requires_grad_(False)
    denoiser = Denoiser(net, VPLinear(), "v", clock="t1000")
    return Model(denoiser, "ddpm-cifar", (3, 32, 32), sampler="ddim", times="uniform", steps=10)


def export_or_load(model: Model, variant: str, work: Path) -> Model:
    """The model in one of the variants `WAYS`, exported into `work` if it is not there."""
    first, precision = variant.split()
    if first == "compile":
        denoiser = accelerate(model.denoiser, [Compile()])
        return replace(model, denoiser=denoiser)  # type: ignore[arg-type]
    if first == "eager":
        return model
    precision = precision.split("+")[0].replace("bf16", "fp32")
    folder = work / f"{first}-{precision}"
    if (folder / "model.json").is_file():
        return load(folder)
    return (onnx if first == "onnx" else openvino).export(model, folder, precision, n=4)


def evaluation(net: nn.Module, inputs: dict[str, Tensor], half: bool) -> Callable[[], Tensor]:
    """The timed function: the network at these inputs; half: with bfloat16 autocast."""

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return net(**inputs).float()

    return run


def main(
    *,
    work: Path,
    out: Path | None = None,
    batch: tuple[int, ...] = (4,),
    rounds: int = 9,
    ways: tuple[str, ...] = WAYS,
    clock: Literal["wall", "cpu"] = "wall",
) -> None:
    """Export the missing variants, then measure."""
    model, now = cifar(), time.perf_counter if clock == "wall" else time.process_time
    work.mkdir(parents=True, exist_ok=True)
    models: dict[str, Model] = {}
    for variant in ways:
        try:
            models[variant] = export_or_load(model, variant, work)
        except BadInput as e:
            print(f"{variant}: {e}", flush=True)
    for size in batch:
        (inputs,) = record_inputs(model, size, 1, calls=1)
        flat = {variant: FlatNetwork(one.denoiser.net, ()) for variant, one in {"eager fp32": model, **models}.items()}

        calls = {variant: evaluation(net, inputs, "bf16" in variant) for variant, net in flat.items()}
        outputs = {variant: run() for variant, run in calls.items()}
        truth = outputs["eager fp32"]
        seconds: dict[str, list[float]] = {variant: [] for variant in calls}
        for turn in range(rounds):
            for variant in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
                start = now()
                calls[variant]()
                seconds[variant].append(now() - start)
        record: dict[str, Any] = {"batch": size, "threads": torch.get_num_threads(), "clock": clock, "rounds": rounds}
        record |= {"machine": processor(torch.device("cpu")), "python": platform.python_version()}
        record |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "ways": {}}
        for variant, times in seconds.items():
            ratios = sorted(a / b for a, b in zip(seconds["eager fp32"], times))
            error = float((outputs[variant] - truth).norm() / truth.norm())
            row = {
                "ratio": statistics.median(ratios),
                "low": ratios[0],
                "high": ratios[-1],
                "seconds": statistics.median(times),
                "error": error,
            }
            record["ways"][variant] = {key: float(f"{value:.4g}") for key, value in row.items()}
            print(
                f"batch {size}  {variant:20s} {row['ratio']:5.2f}x  {row['seconds'] * 1e3:6.0f} ms  {error:.1e}",
                flush=True,
            )
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
