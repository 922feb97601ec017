"""`hasten sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import check_int
from ..progress import progress
from ..storage.provenance import command_line
from ._common import choice_config, chosen_files, label_list, main_process_warning, open_shared, processes
from ._processes import on_all_processes
from .terminal import print_result


@on_all_processes
def sample(
    model: str,
    *,
    out: Path = Path("samples.png"),
    n: int = 16,
    label: str | None = None,
    prompt: list[str] | None = None,
    lora: list[str] | None = None,
    seed: int = 0,
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guide: list[str] | None = None,
    start: str | None = None,
    plan: str | None = None,
    images: Path | None = None,
    mask: Path | None = None,
    accelerate: list[str] | None = None,
    decoder: Path | None = None,
    separate_files: bool = False,
    columns: int | None = None,
    batch_size: int = 64,
    precision: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Sample images from a model into a PNG grid that says inside how it was made.

    The same arguments give the same file. Image k depends on its own seed and label, not on n or batch_size, up to
    rounding. Under torchrun, several processes share the batches, and write the same file, except with accelerators
    that split one image among processes.

    Args:
        model: A bundled name (see models), a folder, or the folder or hub id of a diffusers pipeline.
        out: The PNG file to write; with --separate-files, the folder.
        n: Number of images.
        label: Class name or index, or several, comma-separated, used in turn; none is no class. A number that is the
            name of a class is that class. Default: all classes in turn.
        prompt: Text prompt, of a model that takes prompts; given several times, image k gets number k mod their count.
        lora: A LoRA file that is merged into the weights, or FILE:SCALE; may be given several times. That of a student
            brings its steps, sampler and guidance scale.
        seed: Seed of the first image; image k has seed + k.
        config: A SamplingConfig file (TOML or JSON), such as hasten choose writes; the options override its fields.
        sampler: Such as ddim, unipc or dpm:order=2,sde=true. Default: the model's recommended one,
            as for the next three.
        times: Time grid, such as uniform, lambda, trailing or karras:rho=7.
        steps: Number of steps of the time grid.
        guidance_scale: Scale of classifier-free guidance; 1 is none, more costs two model evaluations a step.
        guide: A further guide, such as distribution:classes=uniform or interval:low=0.2; may be given several times.
        start: Initialisation, such as ccdf:time=0.3. Default: noise.
        plan: A plan of the model by name, or a plan's .json file, in place of sampler, times and steps.
        images: Folder, zip or array of images, or one image, that the initialisation begins from.
        mask: For inpainting: an image, or as many as are sampled, whose white pixels are filled in. Default: where the
            images are transparent.
        accelerate: An accelerator, such as encoder_propagation or quantize:weights=8; may be given several times.
        decoder: Folder of another image decoder for the latents, such as a light one (train --kind decoder).
        separate_files: Write one file an image, named by its seed.
        columns: Images in a row of the grid. Default: one of each class where all classes are used in turn, else a
            square.
        batch_size: Images in the network at once.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once. Default: auto.
        device: auto, cpu, cuda, cuda:1, mps or xpu. auto uses the GPU if there is one.
        json: Print the result as JSON.

    Returns:
        Files, settings, seeds, labels, seconds.
    """
    from ..workflows.sample import SampleRequest, check_output, sample_to_files

    check_int("n", n, 1)
    check_int("batch_size", batch_size, 1)
    check_output(out, separate_files, images)
    ranks = processes(device)
    model, lora, decoder = chosen_files(config, model, lora, decoder)
    loaded = open_shared(model, ranks, sound=False, lora=lora)
    loaded = loaded if decoder is None else loaded.with_decoder(decoder)
    how = choice_config(
        config, sampler=sampler, times=times, steps=steps, guidance_scale=guidance_scale, guides=guide, start=start,
        plan=plan, accelerators=accelerate, precision=precision,
    )  # fmt: skip
    warn = main_process_warning(ranks)
    labels = label_list(loaded, label, prompt, warn)
    request = SampleRequest(
        n=n, label=labels, seed=seed, batch_size=batch_size, images=images, mask=mask, separate_files=separate_files,
        columns=columns,
    )  # fmt: skip

    def command(settings: dict[str, Any]) -> str:
        """The command line that writes the same file again."""
        flags = {"guides": "guide", "accelerators": "accelerate"}
        options = {flags.get(key, key): value for key, value in settings.items()}
        return command_line("sample", model, {
            "label": label, "prompt": prompt, "lora": lora, **options, "images": images, "mask": mask,
            "decoder": decoder, "n": n, "seed": seed, "separate_files": separate_files, "columns": columns,
        })  # fmt: skip

    with progress(f"sampling {n} images") as tick:
        result = sample_to_files(loaded, out, request, how, ranks=ranks, progress=tick, warn=warn, command=command)
    if not result:
        return {}
    where = f"{len(result['files'])} files in {out}" if separate_files else str(out)
    by = result.get("sampler") or f"plan {result['plan']}"
    method = f"{by}, {result['steps']} steps, {result['precision']}"
    method += f", {ranks.world} processes" if ranks.world > 1 else ""
    print_result(result, f"{where}: {n} images of {loaded.name} ({method}) in {result['seconds']:.2f} s", json)
    return result
