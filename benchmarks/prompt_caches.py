"""Cached features on the bundled text-to-image model: distance, prompt match, PSNR to the plain images, and time.

    python -m benchmarks.prompt_caches --row deep_cache:branch=1,every=2 --row deep_cache:branch=1,every=4,extrapolate=1
    python -m benchmarks.prompt_caches --paired 16 --n 16 --row ...         a trial without distances
    python -m benchmarks.prompt_caches --count                              multiply-accumulates alone

`emoji`, DDIM with 50 steps under guidance 4, the captions of the bundled judge's held-out pictures. The first
`--paired` images are also sampled plainly, in batches of `--batch`, in turns: for PSNR (mean of the images') and for
the ratio of CPU seconds of sampling and decoding (median, smallest and largest over the batches). The others are
sampled with the caches alone. The plain images' distance is measured with `--row plain`. "count" is the speed-up in
multiply-accumulates of the U-Net that the key steps promise. Key steps and weights that are searched see captions of
training pictures. Rows of `--short` have the first images alone, and no distance. With `--images FOLDER` finished
batches are kept, and found again.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from torch import Tensor

import hasten
from hasten.accelerators._caching.wrapper import FeatureReuse
from hasten.metrics.difference import image_difference
from hasten.performance.cost import macs, ratio
from hasten.workflows.captioned import bundled_captions
from hasten.workflows.prompt_figures import measure_prompts

from .turns import in_turns, timed_draw

PLAIN = "plain"


def key_fractions(model: hasten.Model) -> dict[str, float]:
    """The fraction of multiply-accumulates that only key steps spend, by accelerator and branch."""
    net: Any = model.denoiser.net
    x, time_, text = torch.zeros(1, *model.shape), torch.zeros(1), model.conditions(1, "")["text"]
    with torch.no_grad():
        emb = net.embed(time_, text=text)
        whole = macs(net, x, time_, text=text)
        result = {"encoder_propagation": macs(net.encode, x, emb) / whole}
        for branch in range(net.branches + 1):
            result[f"deep_cache {branch}"] = macs(net.deep, net.shallow_encode(x, emb, branch), emb) / whole
    return result


def promised(fast: FeatureReuse, spec: str, fractions: dict[str, float], branches: int) -> float:
    """The speed-up by the count."""
    name, _, options = spec.partition(":")
    branch = dict(option.partition("=")[::2] for option in options.split(",")).get("branch", branches)
    return fast.expected_speedup(fractions[name if name in fractions else f"{name} {branch}"])


class Row:
    """A way of sampling, and its images."""

    def __init__(self, model: hasten.Model, spec: str, setting: dict[str, Any], folder: Path | None) -> None:
        self.spec, self.model, self.folder = spec, model, folder
        begin = time.process_time()
        self.resolved = model.resolve(**setting, accelerators=() if spec == PLAIN else (spec,))
        self.search = time.process_time() - begin
        self.fast = next((m for m in self.resolved.denoiser.modules() if isinstance(m, FeatureReuse)), None)
        self.images: list[Tensor] = []
        self.seconds: list[float] = []
        self.mark = hashlib.sha256(f"{spec} {setting}".encode()).hexdigest()[:12]

    def sample(self, first: int, prompts: list[str], timed: bool) -> None:
        """Images of these prompts, of seeds `first` and on; taken from the folder where they need not be timed."""
        file = self.folder and self.folder / f"{self.mark}-{first}-{len(prompts)}.pt"
        if file and file.exists():
            self.images.append(found := torch.load(file)["images"])
            assert len(found) == len(prompts)
            self.seconds += torch.load(file)["seconds"]
            return
        cond, seeds = self.model.conditions(len(prompts), prompts), range(first, first + len(prompts))
        x, seconds = timed_draw(self.resolved, seeds, self.model.shape, cond, self.model.decoder.decode)
        x = x.float().clamp(-1, 1)
        taken = [seconds] if timed else []
        self.seconds += taken
        self.images.append(x)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"images": x, "seconds": taken}, file)


@torch.no_grad()
def main(
    *,
    row: Annotated[list[str], cyclopts.Parameter(negative=())] = [],  # noqa: B006
    short: Annotated[list[str], cyclopts.Parameter(negative=())] = [],  # noqa: B006
    n: int = 200,
    paired: int = 32,
    batch: int = 8,
    steps: int = 50,
    images: Path | None = None,
    count: bool = False,
    out: Path | None = None,
) -> None:
    """Measure the rows; `images`: where finished batches are kept."""
    model = hasten.load("emoji")
    captioned = bundled_captions(model.card["judge"])
    assert captioned is not None
    model = replace(model, calibration_prompts=captioned.calibration_prompts)
    fractions, branches = key_fractions(model), model.denoiser.net.branches
    print(json.dumps({"between key steps": {name: round(1 - part, 4) for name, part in fractions.items()}}), flush=True)
    if count:
        return
    setting: dict[str, Any] = {"sampler": "ddim", "times": "trailing", "steps": steps, "guidance_scale": 4.0}
    rows = []
    for spec in (PLAIN, *[spec for spec in row if spec != PLAIN], *short):
        rows.append(Row(model, spec, setting, images))
        if (fast := rows[-1].fast) is not None:
            print(f"{spec}: key steps {fast.keys}, found in {rows[-1].search:.0f} CPU seconds", flush=True)
    prompts = captioned.prompts(n)
    starts = [*range(0, paired, batch), *range(paired, n, 2 * batch)]
    batches = [(first, min(batch * (1 + (first >= paired)), n - first)) for first in starts]

    def sample(each: Row, first: int, number: int) -> None:
        if first < paired or each.spec in row:
            each.sample(first, prompts[first : first + number], first < paired)

    in_turns(rows, batches, sample)
    usual = torch.cat(rows[0].images)
    for each in rows:
        found = torch.cat(each.images)
        result: dict[str, Any] = {"name": each.spec, "n": len(found), "paired": paired}
        if each.fast is not None:
            result |= {"keys": each.fast.keys, "count": promised(each.fast, each.spec, fractions, branches)}
            result["psnr"] = round(image_difference(found[:paired], usual[:paired])["psnr"], 2)
            times = ratio(rows[0].seconds, each.seconds)
            result["time"] = [round(value, 2) for value in (times.median, times.low, times.high)]
        if len(found) == n and n >= 50:
            measures = measure_prompts(captioned, found, prompts, range(n), bootstrap=0)[0]
            result |= {name: round(measure.value, 4) for name, measure in measures.items()}
        print(json.dumps(result), flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
