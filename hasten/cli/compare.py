"""`hasten compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HastenError
from ..storage.provenance import command_line
from ._common import open_shared, processes, prompts_of, sigterm_as_interrupt
from ._processes import on_all_processes
from .terminal import print_result


@on_all_processes
def compare(
    model: str,
    *,
    out: Path = Path("compare"),
    variants: str | None = None,
    n: int | None = None,
    seed: int = 0,
    rounds: int | None = None,
    batch_size: int = 64,
    timing_batch: int = 16,
    reference: str | None = None,
    features: str | None = None,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    data: Path | None = None,
    split: str = "test",
    judge: str | None = None,
    lpips: str | None = None,
    repeats: int = 1,
    minutes: float | None = None,
    precision: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> list[dict[str, Any]]:
    """Compare sampling methods on one model, from the same seeds: what each costs, and its quality.

    Writes report.html, results.jsonl and pictures. The same command again resumes where an earlier one was stopped.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write.
        variants: The set of variants: demo, full, text_to_image, everything, or a TOML file. Default: demo; for a
            model of another process its own sampler in several numbers of steps.
        n: Images per variant. Default: that of the set.
        seed: Seed of the first image; image k has seed + k in every variant.
        rounds: Timing rounds, each of which times every variant in turn. Default: that of the set.
        batch_size: Images per batch.
        timing_batch: Images per timed batch.
        reference: Statistics of real images, or a folder, zip or array of images of your own, with --features.
            Default: the statistics that the model names.
        features: The feature network: fashion, efficientnet_lite0, inception, or a folder of a CLIP, SigLIP or DINOv2
            of transformers. Of a model that takes prompts also that of distances between images of the same seeds, and
            of diversity. Default: that of the reference.
        prompt: Text prompt, of a model that takes prompts; given several times, image k gets number k mod their count.
        prompts: A file of prompts in their place: text with one per line, or .jsonl. Default: the captions of the data,
            the prompts of the set, or else a bundled list of 200.
        data: Of a model that takes prompts: a folder or zip of pictures with captions. The captions are the prompts,
            the pictures the reference; accelerators are calibrated on the captions of the training pictures. Of a model
            that restores images, such as one of super-resolution: true images of any sizes.
        split: Of the data, the pictures that are held out: test, val or train.
        judge: What features are of, and what compares images with prompts: a folder of contrastive towers or of a
            CLIPModel of transformers. Default: the one that the model names.
        lpips: The weights of LPIPS: alex, vgg, alex_shift_tolerant or vgg_shift_tolerant, whose files are on this
            machine, or a file or folder. Default: those that are found.
        repeats: Disjoint blocks of n seeds: figures are then means with their deviation.
        minutes: Time budget. Default: none. The measured speed then decides the number of images, n at most; the last
            variants are skipped where 64 images of each would take longer.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        json: Print the rows as JSON, not as a table.

    Returns:
        A row for each variant.
    """
    from ..compare.runner import compare as run_comparison

    options: dict[str, Any] = {
        "variants": variants,
        "n": n,
        "seed": seed,
        "rounds": rounds,
        "batch_size": batch_size,
        "timing_batch": timing_batch,
        "reference": reference,
        "features": features,
        "minutes": minutes,
        "data": None if data is None else str(data),
        "judge": judge,
        "lpips": lpips,
    }
    more: dict[str, Any] = {
        "precision": None if precision == "auto" else precision,
        "prompt": prompt,
        "prompts": prompts,
        "out": out,
    }
    more |= {"repeats": None if repeats == 1 else repeats, "split": None if data is None else split}
    command = command_line("compare", model, {**options, **more})
    options |= {"split": split}
    options |= {"prompts": prompts_of(prompt, prompts), "repeats": repeats, "precision": precision}
    ranks = processes(device)
    loaded = open_shared(model, ranks, called=True)
    with sigterm_as_interrupt():
        rows = run_comparison(loaded, out=out, **options, show=not json, command=command, ranks=ranks)
    if json:
        print_result(rows, "", json)
    if failed := [row for row in rows if row.get("failed")]:
        others = "" if len(failed) == 1 else f" (and {len(failed) - 1} more)"
        first = f"{failed[0]['name']!r}: {failed[0]['failed']}"
        raise HastenError(
            f"{len(failed)} of {len(rows)} rows failed, {first}{others}; {out / 'report.html'} has the others"
        )
    return rows
