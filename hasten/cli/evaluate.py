"""`hasten evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..progress import progress
from ._common import (
    choice_config,
    chosen_files,
    label_list,
    main_process_warning,
    open_shared,
    processes,
    prompts_of,
)
from ._processes import on_all_processes
from .terminal import print_result


@on_all_processes
def evaluate(
    model: str,
    *,
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
    data: Path | None = None,
    split: str = "test",
    judge: str | None = None,
    images_per_prompt: int = 4,
    repeats: int = 1,
    bits_per_dim: str | None = None,
    levels: int = 256,
    batch_size: int = 64,
    precision: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Sample images from a model and measure them: distances to real images, coverage, class accuracy.

    With bits-per-dim, measure the likelihood of real images instead. Compare a distance with its real-data baseline,
    which is what as many real images get, and with figures of the same features, reference and number of images only.

    Args:
        model: A bundled name (see models) or a folder.
        lora: A LoRA file that is merged into the weights, or FILE:SCALE; may be given several times. That of a student
            brings its steps, sampler and guidance scale.
        n: Number of images; at least 10, better 2000 or more. Default: one of each caption of the data, otherwise 2000.
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
        data: Of a model that takes prompts: a folder or zip of pictures with captions. The captions are the prompts,
            the pictures the reference. With bits-per-dim: the images, of the model's size.
        split: Of the data, the pictures that are held out: test, val or train.
        judge: What features are of, and what compares images with prompts: a folder of contrastive towers or of a
            CLIPModel of transformers. Default: the one that the model names.
        images_per_prompt: Images of each prompt from which diversity is measured; 1 leaves it out.
        repeats: Number of blocks of n seeds: figures are then means with their standard deviation.
        bits_per_dim: The negative log-likelihood of the images of data: ode, by the probability-flow ODE; or bound, the
            variational bound. With options, such as bound:steps=1000,samples=50 or ode:rtol=0.001. Default n: 256.
        levels: With bits-per-dim, the number of values of a pixel.
        batch_size: Images in the network at once.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once. Default: auto.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        json: Print the result as JSON.

    Returns:
        The settings, and under `measures` each figure with its features, reference, count, real-data baseline and
        interval. Of prompts also prompt_match, diversity and nearest.
    """
    from ..workflows.evaluate import EvaluateConfig, evaluate_model
    from ..workflows.likelihood import LikelihoodConfig, check_likelihood_options, evaluate_likelihood

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
    if bits_per_dim is not None:
        if data is None:
            raise BadInput("--bits-per-dim is of real images: give --data, a folder, zip or array of them")
        check_likelihood_options(how)
        given: dict[str, Any] = {
            "reference": reference,
            "features": features,
            "prompt": texts,
            "label": label,
            "judge": judge,
        }
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
