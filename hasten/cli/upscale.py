"""`hasten upscale`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..storage.provenance import command_line
from ._common import main_process_warning, open_shared, processes, sampling_config, sigterm_as_interrupt
from ._processes import on_all_processes
from .terminal import print_result


@on_all_processes
def upscale(
    images: list[Path],
    *,
    model: str,
    out: Path = Path("upscaled"),
    factor: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    consistent: bool = False,
    seed: int = 0,
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    start: str | None = None,
    temperature: float | None = None,
    plan: str | None = None,
    accelerate: list[str] | None = None,
    batch_size: int = 8,
    precision: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Enlarge images of any size by a model of super-resolution, see docs/super-resolution.md.

    Large images are enlarged in overlapping tiles with one noise field, in bounded memory. A command that was stopped
    resumes when it is repeated. Several processes (torchrun) share the tiles of each row.

    Args:
        images: Image files, and folders of them, which are searched to any depth.
        model: A folder, or a bundled name (see models).
        out: A folder, for a PNG file for each image (TIFF for TIFF) of the same name; for one image also a .png or .tif
            file.
        factor: Refuse a model that does not enlarge by this factor.
        tile: Side of a tile in pixels of the small image. Default: the size that the model was trained with.
        overlap: Of tiles, in pixels of the small image, at most a third of a tile. Default: a quarter.
        consistent: Correct the result so that it reduces to the small image, by iterative back-projection.
        seed: Of the noise field of each image.
        config: A SamplingConfig file (TOML or JSON); the options override its fields.
        sampler: Such as ddim. Default: the model's recommended one, as for the next three.
        times: Time grid, such as uniform.
        steps: Number of steps of the time grid.
        guidance_scale: Scale of classifier-free guidance; 1 is none, more costs two model evaluations a step.
        start: Initialisation, such as temperature:value=0.5, or noise. Default: the model's recommended one.
        temperature: Factor of the initial noise, 0 to 2: below 1 the result is nearer to the truth pixel by pixel, and
            smoother. The same as --start temperature:value=V.
        plan: A plan of the model by name, or a plan's .json file, in place of sampler, times and steps.
        accelerate: An accelerator, such as compile; may be given several times.
        batch_size: Tiles in the network at once.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once. Default: auto.
        device: auto, cpu, cuda, cuda:1, mps or xpu. auto uses the GPU if there is one.
        json: Print the result as JSON.

    Returns:
        The images with their files, sizes, consistency errors and seconds, the settings, and the images that failed.
    """
    from ..progress import ProgressReporter
    from ..tasks.super_resolution.enlarge_picture import UpscaleRequest
    from ..tasks.super_resolution.task import check_super_resolution
    from ..workflows.upscale import upscale_files

    request = UpscaleRequest(seed, tile, overlap, consistent, batch_size)
    if temperature is not None and start is not None:
        raise BadInput("give --start or --temperature, not both")
    start = start if temperature is None else f"temperature:value={temperature:g}"
    ranks = processes(device)
    loaded = open_shared(model, ranks)
    check_super_resolution(loaded, factor)
    how = sampling_config(
        config, sampler=sampler, times=times, steps=steps, guidance_scale=guidance_scale, start=start,
        plan=plan, accelerators=accelerate, precision=precision,
    )  # fmt: skip
    options = {
        "model": model, "tile": tile, "overlap": overlap, "consistent": consistent, "seed": seed, "sampler": sampler,
        "times": times, "steps": steps, "guidance_scale": guidance_scale, "start": start, "plan": plan,
        "accelerate": accelerate,
    }  # fmt: skip
    reporter = ProgressReporter(0, show=ranks.is_main_process)
    with sigterm_as_interrupt(), reporter.bar:
        result = upscale_files(
            loaded, images, out, request, how, ranks=ranks, reporter=reporter, warn=main_process_warning(ranks),
            command=command_line("upscale", " ".join(map(str, images)), options),
        )  # fmt: skip
    if not result:  # the main process has it
        return {}
    print_result(result, "\n".join(lines_of(result)), json)
    if result["failed"]:
        count = len(result["failed"]) + len(result["images"]) + len(result["kept"])
        raise BadInput(f"{len(result['failed'])} of {count} images could not be enlarged (see above)")
    return result


def lines_of(result: dict[str, Any]) -> list[str]:
    """What the command prints: a line for each image, and one for all."""
    lines = [
        f"{row['file']}: {row['width']}x{row['height']} of {row['tiles']} tile{'s' * (row['tiles'] > 1)} in "
        f"{row['seconds']:.2f} s, consistency error {row['consistency_error']:.2g} of 255 (largest "
        f"{row['largest_error']:.2g})"
        for row in result["images"]
    ]
    if result["kept"]:
        lines.append(f"{len(result['kept'])} results were there, made with the same settings")
    by = result.get("sampler") or f"plan {result['plan']}"
    return [
        *lines,
        f"{len(result['images'])} images {result['factor']} times larger by {result['model']} ({by}, {result['steps']} "
        f"steps) in {result['seconds']:.2f} s",
    ]
