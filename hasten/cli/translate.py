"""`hasten translate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..progress import progress
from ..storage.provenance import command_line
from ._common import open_model, sampling_config, warn
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def translate(
    model: str,
    images: Path,
    *,
    out: Path = Path("translated.png"),
    n: int | None = None,
    label: str | None = None,
    seed: int = 0,
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    plan: str | None = None,
    accelerate: list[str] | None = None,
    batch_size: int = 64,
    precision: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Translate images by a bridge, or by a model that reads a source image: degraded to clean, one set to another.

    Such models are trained by train --process i2sb and others on pairs, see docs/bridges.md.

    Args:
        model: A folder, or a bundled name (see models).
        images: Folder, zip or array of the source images, or one image. Those of another size are cropped and resized.
        out: A PNG file for a grid, results below their sources, or a folder for one file each, named as its source.
        n: The first n images. Default: all; in a grid 64 at most.
        label: Class of the results, by name or index; several, comma-separated, are used in turn.
        seed: Of the noise of the first image; image k has seed + k.
        config: A SamplingConfig file (TOML or JSON); the options override its fields.
        sampler: Such as i2sb. Default: the model's recommended one, as for the next three.
        times: Time grid, such as uniform.
        steps: Number of steps of the time grid.
        guidance_scale: Scale of classifier-free guidance; 1 is none, more costs two model evaluations a step.
        plan: A plan of the model by name, or a plan's .json file, in place of sampler, times and steps.
        accelerate: An accelerator, such as compile; may be given several times.
        batch_size: Images in the network at once.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once. Default: auto.
        device: auto, cpu, cuda, cuda:1, mps or xpu. auto uses the GPU if there is one.
        json: Print the result as JSON.

    Returns:
        Files, settings, seconds.
    """
    from ..train.names import split_labels
    from ..workflows.translate import TranslateRequest, translate_images

    loaded = open_model(model, device)
    how = sampling_config(
        config, sampler=sampler, times=times, steps=steps, guidance_scale=guidance_scale, plan=plan,
        accelerators=accelerate, precision=precision,
    )  # fmt: skip
    request = TranslateRequest(
        n=n, label=None if label is None else split_labels(label, loaded.classes), seed=seed, batch_size=batch_size
    )
    options = {
        "images": images, "n": n, "label": label, "seed": seed, "sampler": sampler, "times": times, "steps": steps,
        "guidance_scale": guidance_scale, "plan": plan, "accelerate": accelerate,
    }  # fmt: skip
    with progress("translating") as tick:
        result = translate_images(
            loaded, images, out, request, how, progress=tick, warn=warn,
            command=command_line("translate", model, options),
        )  # fmt: skip
    many = f"{len(result['files'])} files in {out}" if out.suffix.lower() != ".png" else str(out)
    by = result.get("sampler") or f"plan {result['plan']}"
    line = f"{many}: {result['n']} images by {loaded.name} ({by}, {result['steps']} steps) in {result['seconds']:.2f} s"
    print_result(result, line, json)
    return result
