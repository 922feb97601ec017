"""Speed of sampling on several processes of one thread each, against one such process, interleaved.

    python -m benchmarks.many --out many.jsonl

One line per number of processes: the ratio of seconds (median, minimum, maximum over the rounds), of sampling alone, as
reported by `hasten sample` (without loading the model and starting Python; with distributing, collecting and merging),
and of the entire command. The files must be the same, byte for byte. Needs an idle device with a core per process.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cyclopts
import torch

from hasten.performance.device import processor


def main(
    *,
    out: Path | None = None,
    model: str = "fashion",
    n: int = 1000,
    batch_size: int = 50,
    steps: int = 4,
    guidance_scale: float = 1.0,
    processes: tuple[int, ...] = (2,),
    rounds: int = 3,
) -> None:
    """Measure interleaved and print a line for each number of processes.

    Args:
        out: A file to add the lines to.
        model: As for hasten sample; so are the next four.
        n: Number of images.
        batch_size: Images per model evaluation.
        steps: Steps of the time grid.
        guidance_scale: Strength of the guidance.
        processes: Numbers of processes to compare with one.
        rounds: Timings of each.
    """
    arguments = [
        "sample",
        model,
        "--n",
        str(n),
        "--batch-size",
        str(batch_size),
        "--steps",
        str(steps),
        "--sampler",
        "ddim",
        "--times",
        "uniform",
        "--guidance-scale",
        str(guidance_scale),
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--json",
        "--out",
    ]
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in (1, *processes)}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for count in list(times) if turn % 2 == 0 else list(times)[::-1]:
                file = Path(folder, f"{count}.png")
                start = time.perf_counter()
                result = run(count, [*arguments, str(file)])
                times[count].append((result["seconds"], time.perf_counter() - start))
                print(f"{count} processes: {times[count][-1][0]:.2f} s, {times[count][-1][1]:.2f} s in all", flush=True)
        files = {Path(folder, f"{count}.png").read_bytes() for count in times}
    for count in processes:
        line = {
            "model": model,
            "n": n,
            "batch_size": batch_size,
            "nfe": steps,
            "processes": count,
            "rounds": rounds,
            "sampling": spread([a[0] / b[0] for a, b in zip(times[1], times[count])]),
            "command": spread([a[1] / b[1] for a, b in zip(times[1], times[count])]),
            "images_per_second": n / statistics.median(seconds for seconds, _ in times[count]),
            "same_file": len(files) == 1,
            "hardware": processor(torch.device("cpu")),
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)
        if out is not None:
            with open(out, "a") as lines:
                lines.write(json.dumps(line) + "\n")


def run(count: int, arguments: list[str]) -> dict[str, Any]:
    """Run the command and return its report."""
    command = [sys.executable, "-m"]
    if count > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command += ["torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(port), "-m", "--"]
    done = subprocess.run(
        [*command, "hasten", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def spread(ratios: list[float]) -> list[float]:
    """Median, minimum and maximum."""
    return [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]


if __name__ == "__main__":
    cyclopts.run(main)
