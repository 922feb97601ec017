"""`hasten choose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ._common import open_shared, processes, prompts_of, sigterm_as_interrupt
from .terminal import print_result


def choose(
    model: str,
    *,
    loss: str | None = None,
    psnr: float | None = None,
    seconds: float | None = None,
    out: Path = Path("best.toml"),
    config: Path | None = None,
    confidence: float = 0.95,
    n: int | None = None,
    seed: int = 0,
    variants: str | None = None,
    exclude: list[str] | None = None,
    student: list[str] | None = None,
    lora: list[str] | None = None,
    compile: bool = False,
    for_diffusers: bool = False,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    data: Path | None = None,
    split: str = "test",
    judge: str | None = None,
    reference: str | None = None,
    features: str | None = None,
    batch_size: int = 64,
    timing_batch: int = 4,
    rounds: int = 3,
    precision: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Choose how to sample a model: the fastest way within a loss of quality, with a certificate.

    Searches samplers, steps, plans, guidance, caches, integers, students and LoRAs by measurement. Writes a file for
    hasten sample --config and hasten.apply. The same command again resumes where an earlier one was stopped.

    Args:
        model: A bundled name (see models), a folder, or the folder or hub id of a diffusers pipeline.
        loss: The largest loss, such as 5%: of the distance to real images, or without any of what another seed changes.
            Default: 5%, unless --psnr or --seconds is given.
        psnr: The least mean PSNR in dB to the plain model's images of the same seeds, in place of --loss.
        seconds: The longest time of an image, in place of --loss; the least loss within it is sought.
        out: The TOML file to write; what was measured is in a folder of the same name with .choose.
        config: A SamplingConfig file (TOML or JSON) of the plain model. Default: what the model recommends.
        confidence: Of the certificate.
        n: Fresh seeds of the certificate; the search uses up to half as many. Default: 480 for a distance to real
            images, else 64.
        seed: Seed of the first image.
        variants: A set of variants, bundled or a TOML file, whose rows are the candidates. Default: all that fits.
        exclude: A kind of candidates to leave out: plan, guidance, cache, bits, student, lora or decoder; may be given
            several times.
        student: Another model of the same images as a candidate; may be given several times.
        lora: A LoRA file as a candidate; may be given several times.
        compile: Also try torch.compile, whose first call takes minutes on a CPU.
        for_diffusers: Nothing that hasten.apply cannot put into a diffusers pipeline.
        prompt: Text prompt, of a model that takes prompts; given several times, image k gets number k mod their count.
        prompts: A file of prompts in their place: text with one per line, or .jsonl. Default: the captions of the data,
            or else a bundled list of 200.
        data: Of a model that takes prompts: a folder or zip of pictures with captions.
        split: Of the data, the pictures that are held out: test, val or train.
        judge: What features are of: a folder of contrastive towers or of a CLIPModel of transformers. Default: the one
            that the model names.
        reference: Statistics of real images, or a folder, zip or array of images of your own, with --features.
            Default: the statistics that the model names.
        features: The feature network: fashion, efficientnet_lite0, inception, or a folder of a CLIP, SigLIP or DINOv2
            of transformers. Default: that of the reference.
        batch_size: Images per batch.
        timing_batch: Images per timed batch.
        rounds: Timing rounds, each of which times every candidate in turn.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The choice, its certificate, the Pareto front, and why each other candidate was rejected.
    """
    from ..choosing.config import ChooseConfig
    from ..choosing.runner import choose as run_search

    options = ChooseConfig(
        loss=loss, psnr=psnr, seconds=seconds, confidence=confidence, n=n, seed=seed, plain=config, variants=variants,
        exclude=tuple(exclude or ()), students=tuple(student or ()), loras=tuple(lora or ()), compile=compile,
        for_diffusers=for_diffusers, data=data, split=split, judge=judge, prompts=prompts_of(prompt, prompts),
        reference=reference, features=features, precision=precision, batch_size=batch_size, timing_batch=timing_batch,
        rounds=rounds,
    )  # fmt: skip
    loaded = open_shared(model, processes(device), called=True)
    with sigterm_as_interrupt():
        result = run_search(loaded, options, out=out)  # prints what it does, and the result
    if json:
        print_result(result, result["summary"], json)
    return result
