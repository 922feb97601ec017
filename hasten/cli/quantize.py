"""`quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..storage.provenance import command_line
from ._common import open_model
from ._processes import alone
from .terminal import tell


@alone
def quantize(
    model: str,
    *,
    out: Path,
    weights: int = 8,
    acts: int = 8,
    rounding: str | None = None,
    learn_steps: bool = False,
    minutes: float | None = None,
    iterations: int | None = None,
    rank: int = 0,
    groups: int | None = None,
    no_split: bool = False,
    ranges: str = "search",
    keep: list[str] | None = None,
    eight: float = 0.0,
    images: int | None = None,
    spread: int = 20,
    seed: int = 2_000_000,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Turn a model's convolutions and linear layers into integers of 8 or 4 bits, calibrated on its own samplings.

    Writes a model that sample and compare take as any other. The same command again goes on where an earlier one was
    stopped, and ends with the same weights.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write.
        weights: Bits of the weights, 8 or 4.
        acts: Bits of the activations, 8; or 0, to make only the file smaller.
        rounding: nearest (seconds) or adaround (learned, block after block). Left out: adaround for 4 bits.
        learn_steps: Then learn the steps of the activations too.
        minutes: Time for all that is learned, divided over the blocks.
        iterations: Of every block, in place of minutes. Left out: 300.
        rank: Of a branch in floating point beside each layer, 0 for none.
        groups: Of times, each with activation ranges of its own. Left out: 6, or as many as there are.
        no_split: One range for what a U-Net's shortcuts are given, and not one for either half.
        ranges: search or minmax.
        keep: Names or patterns of modules that stay in floating point; may be given several times. Left out: conv_in
            and conv_out. none: nothing.
        eight: Share of the weights, 0 to 1, that get 8 bits where weights is 4: of the layers that need them most.
        images: To calibrate on. Left out: 16, with learned rounding 32.
        spread: How many of a sampling's queries are calibrated on, evenly spread.
        seed: Of the first calibration image; far from the seeds that sample and compare start with.
        sampler: Of the samplings. Left out: the model's own choice, as for the next three.
        times: The time grid.
        steps: Steps of the time grid.
        guidance_scale: Strength of the guidance.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The folder, the method, its calibration, the error and the size.
    """
    from ..workflows.quantize import quantize_model

    loaded = open_model(model, device)
    kept = None if keep is None else tuple(name for name in keep if name != "none")
    said = {"out": out, "weights": weights, "acts": acts, "rounding": rounding, "learn_steps": learn_steps,
            "minutes": minutes, "iterations": iterations, "rank": rank, "groups": groups, "no_split": no_split,
            "ranges": ranges, "keep": keep, "eight": eight, "images": images, "spread": spread, "seed": seed,
            "sampler": sampler, "times": times, "steps": steps, "guidance_scale": guidance_scale}  # fmt: skip
    result = quantize_model(
        loaded, out, weights, acts or None, rounding, learn_steps, minutes, iterations, rank, groups, not no_split,
        ranges, kept, eight, images, spread, seed, sampler, times, steps, guidance_scale,
        say=(lambda line: None) if json else lambda line: print(line, flush=True),
        command=command_line("quantize", model, said),
    )  # fmt: skip
    lines = [
        f"{out}: weights of {weights} bits, activations of {acts or 'all their'} bits, "
        f"{100 * result['error']:.2g} % off in x0; try hasten sample {out}"
    ]
    if "bytes" in result:
        lines.append(
            f"  {result['bytes'] / result['bytes_fp32']:.3f} of the bytes of fp32, in {result['seconds']:.0f} s"
        )
    tell(result, "\n".join(lines), json)
    return result
