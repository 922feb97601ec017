"""`hasten evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput, check_choice
from ..progress import progress
from ._common import (
    choice_config,
    chosen_files,
    label_list,
    main_process_warning,
    open_shared,
    processes,
    prompts_of,
    warn,
)
from ._evaluate_speech import evaluate_spoken
from ._processes import on_all_processes
from .terminal import print_result


@on_all_processes
def evaluate(
    model: str,
    data: Path | None = None,
    *,
    task: str | None = None,
    lora: list[str] | None = None,
    n: int | None = None,
    reference: str | None = None,
    features: str | None = None,
    seed: int = 0,
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guide: list[str] | None = None,
    start: str | None = None,
    plan: str | None = None,
    accelerate: list[str] | None = None,
    label: str | None = None,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    split: str = "test",
    size: int | None = None,
    whole: bool = False,
    border: int = 0,
    degrade: str | None = None,
    variants: str | None = None,
    lpips: str | None = None,
    judge: str | None = None,
    images_per_prompt: int = 4,
    repeats: int = 1,
    bits_per_dim: str | None = None,
    levels: int = 256,
    batch_size: int = 64,
    precision: str | None = None,
    vocoder: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Sample images from a model and measure them: distances to real images, coverage, class accuracy.

    Of a model that restores images, such as one of super-resolution: restore degraded test images and measure how near
    they are to the true ones. With bits-per-dim, measure the likelihood of real images instead. Compare a distance with
    its real-data baseline, which is what as many real images get, and with figures of the same features, reference and
    number of images only.

    Args:
        model: A bundled name (see models) or a folder.
        data: Of a model that takes prompts: a folder or zip of pictures with captions. The captions are the prompts,
            the pictures the reference. Of a model that restores images: true images of any sizes, from which the
            degraded ones are made. With bits-per-dim: the images, of the model's size.
        task: What is measured: generation, or super-resolution and restoration, of a model that reads a degraded image;
            or speech, of a model that speaks the texts of the recordings of data. Default: what the model is for.
        lora: A LoRA file that is merged into the weights, or FILE:SCALE; may be given several times. That of a student
            brings its steps, sampler and guidance scale.
        n: Number of images; at least 10, better 2000 or more. Default: one of each caption of the data, all squares of
            a restoration, up to 1000, otherwise 2000.
        reference: Bundled statistics, a folder of statistics, or a folder, zip or array of real images, whose
            statistics are computed once. Default: the one that the model names.
        features: Feature network: fashion, efficientnet_lite0, inception, or a folder of a CLIP, SigLIP or DINOv2 of
            transformers. Default: the reference's.
        seed: Seed of the first image; image k has seed + k.
        config: A SamplingConfig file (TOML or JSON); the options below override its fields.
        sampler: As for sample; so are the next three.
        times: Time grid.
        steps: Number of steps of the time grid.
        guidance_scale: Scale of classifier-free guidance.
        guide: A further guide, such as interval:low=0.2; may be given several times.
        start: Initialisation.
        plan: A plan of the model by name, or a plan's .json file.
        accelerate: An accelerator, such as encoder_propagation; may be given several times.
        label: As for sample; none is no class. Default: all classes in turn.
        prompt: Text prompt, of a model that takes prompts; given several times, image k gets number k mod their count.
        prompts: A file of prompts in place of prompt: text with one a line, or .jsonl. Default: the captions of the
            data, or without real pictures a bundled list of 200.
        split: Of the data, the pictures that are held out: test, val or train.
        size: Of a restoration: side of the squares that images are cut into. Default: that of the model's images.
        whole: Of a restoration: take whole images in place of squares.
        border: Of a restoration: pixels at each side that PSNR and SSIM leave out.
        degrade: Of a restoration: what makes the degraded images, such as low_resolution:factor=4. Default: what the
            model was trained with.
        variants: Of a restoration: a set of variants as for compare, a row of the table each.
        lpips: Of a restoration: the weights of LPIPS: alex, vgg, alex_shift_tolerant or vgg_shift_tolerant, which are
            on this machine, or a file or folder. Default: those that are found.
        judge: What features are of, and what compares images with prompts: a folder of contrastive towers or of a
            CLIPModel of transformers. Default: the one that the model names.
        images_per_prompt: Images of each prompt from which diversity is measured; 1 leaves it out.
        repeats: Number of blocks of n seeds: figures are then means with their standard deviation.
        bits_per_dim: The negative log-likelihood of the images of data: ode, by the probability-flow ODE; or bound, the
            variational bound. With options, such as bound:steps=1000,samples=50 or ode:rtol=0.001. Default n: 256.
        levels: With bits-per-dim, the number of values of a pixel.
        batch_size: Images in the network at once.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once. Default: auto.
        vocoder: Of speech: the folder or file of a vocoder, or griffin_lim. Default: the folder vocoder in the model's.
        out: Of speech: a file for a report with players and spectrograms, such as report.html.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        json: Print the result as JSON.

    Returns:
        The settings, and under `measures` each figure with its features, reference, count, real-data baseline and
        interval. Of prompts also prompt_match, diversity and nearest. Of a restoration `rows`, the first of which has
        the degraded images, enlarged.
    """
    from ..compare.restoration import RestorationConfig, evaluate_restoration, restoration_table
    from ..workflows.evaluate import EvaluateConfig, evaluate_model
    from ..workflows.likelihood import LikelihoodConfig, check_likelihood_options, evaluate_likelihood

    given: dict[str, Any]
    texts = prompts_of(prompt, prompts)
    ranks = processes(device)
    model, lora, decoder = chosen_files(config, model, lora)
    loaded = open_shared(model, ranks, lora=lora, called=True)
    loaded = loaded if decoder is None else loaded.with_decoder(decoder)
    if loaded.conditioning is not None and texts is None and label is not None:
        texts = [label]  # as for sample
    how = choice_config(
        config, sampler=sampler, times=times, steps=steps, guidance_scale=guidance_scale, guides=guide, start=start,
        plan=plan, accelerators=accelerate, precision=precision,
    )  # fmt: skip
    if task == "speech" or (task is None and "speech" in loaded.card and bits_per_dim is None):
        if data is None:
            raise BadInput("speech is measured beside recordings: give a folder or zip with metadata.csv and wavs/")
        return evaluate_spoken(loaded, model, data, {"split": split, "n": n, "seed": seed}, steps, vocoder, out, json)
    if stray := next((name for name, value in (("vocoder", vocoder), ("out", out)) if value is not None), None):
        raise BadInput(f"--{stray} is for models that speak, and {loaded.name} makes images")
    if is_restoration(loaded, task) and bits_per_dim is None:
        given = {
            "reference": reference, "label": label, "prompt": texts, "judge": judge,
            "repeats": None if repeats == 1 else repeats,
        }  # fmt: skip
        if stray := next((name for name, value in given.items() if value is not None), None):
            raise BadInput(f"a restoration is measured against the true images: leave out --{stray}")
        if ranks.world > 1:
            raise BadInput("a restoration is evaluated by one process: run it without torchrun")
        wanted = RestorationConfig(
            data=None if data is None else str(data), split=split, size=size, whole=whole, n=n, border=border,
            degrade=degrade, variants=variants, features=features, lpips=lpips, seed=seed, batch_size=batch_size,
        )  # fmt: skip
        result = evaluate_restoration(loaded, wanted, how, progress=progress, warn=warn)
        print_result(result, "\n".join(restoration_table(result)), json)
        return result
    given = {
        "size": size, "whole": whole or None, "border": border or None, "degrade": degrade, "variants": variants,
        "lpips": lpips,
    }  # fmt: skip
    if stray := next((name for name, value in given.items() if value is not None), None):
        raise BadInput(f"--{stray} is for models that restore images, and {loaded.name} makes them from noise")
    if bits_per_dim is not None:
        if data is None:
            raise BadInput("--bits-per-dim is of real images: give --data, a folder, zip or array of them")
        check_likelihood_options(how)
        given = {"reference": reference, "features": features, "prompt": texts, "label": label, "judge": judge}
        given["repeats"] = None if repeats == 1 else repeats
        if stray := next((name for name, value in given.items() if value is not None), None):
            raise BadInput(f"--bits-per-dim does not depend on --{stray}: leave it out")
        asked = LikelihoodConfig(bits_per_dim, n, levels, seed, split, batch_size)
        result = evaluate_likelihood(
            loaded, data, asked, ranks=ranks, progress=progress, warn=main_process_warning(ranks)
        )
        if result:
            print_result(result, "\n".join(result.pop("summary")), json)
        return result
    if levels != 256:
        raise BadInput("--levels is for --bits-per-dim")
    request = EvaluateConfig(
        n=n, reference=reference, features=features, seed=seed, repeats=repeats, batch_size=batch_size,
        data=None if data is None else str(data), split=split, judge=judge, images_per_prompt=images_per_prompt,
    )  # fmt: skip
    labels = label_list(loaded, label) if loaded.conditioning is None else None
    request = request.replace(label=labels, prompts=texts)
    result = evaluate_model(loaded, request, how, ranks=ranks, progress=progress, warn=main_process_warning(ranks))
    if not result:
        return {}
    summary = result.pop("summary")
    print_result(result, "\n".join(summary), json)
    return result


TASKS = ("generation", "super-resolution", "restoration", "speech")


def is_restoration(model: Any, task: str | None) -> bool:
    """Whether a model is measured on degraded images. Raises BadInput for a task that it is not for."""
    task = task if task is None else check_choice("task", task, TASKS)
    reads, larger = model.source_shape is not None, model.source_factor > 1
    if task in (None, "generation"):
        if reads and task:
            raise BadInput(f"{model.name} makes its images from degraded ones: its task is restoration")
        return reads
    if not reads or (task == "super-resolution" and not larger):
        raise BadInput(f"{model.name} is no model of {task}: its task is {'restoration' if reads else 'generation'}")
    return True
