"""`hasten quantize`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..storage.provenance import command_line
from ._common import command_for, open_model, prompts_of, sampling_config
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def quantize(
    model: str,
    *,
    out: Path,
    lora: list[str] | None = None,
    weight_bits: int = 8,
    act_bits: int = 8,
    rounding: str | None = None,
    learn_step_sizes: bool = False,
    minutes: float | None = None,
    iterations: int | None = None,
    rank: int = 0,
    time_groups: int | None = None,
    no_split: bool = False,
    calibration: str = "search",
    exclude: list[str] | None = None,
    int8_fraction: float = 0.0,
    images: int | None = None,
    calibration_steps: int = 20,
    seed: int = 2_000_000,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    data: Path | None = None,
    degrade: str | None = None,
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Quantise a model's convolutions and linear layers to 8 or 4 bits, calibrated on its own samplings.

    Writes a model that sample and compare take as any other. The same command resumes where an earlier one was
    stopped, and ends with the same weights.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write.
        lora: A LoRA file that is merged into the weights before, or FILE:SCALE; may be given several times. That of a
            student brings its steps, sampler and guidance scale.
        weight_bits: Bits of the weights, 8 or 4.
        act_bits: Bits of the activations, 8; or 0 for floating point, which only makes the file smaller.
        rounding: nearest (seconds) or adaround (learned, block by block). Default: adaround for 4 bits.
        learn_step_sizes: Then learn the step sizes of the activations too.
        minutes: Time for all that is learned, divided over the blocks.
        iterations: Of every block, in place of minutes. Default: 300.
        rank: Rank of a floating-point branch in parallel to each layer, 0 for none.
        time_groups: Groups of times, each with activation ranges of its own. Default: 6, or as many as there are.
        no_split: One range for the input of a U-Net's skip connections, rather than one for either half.
        calibration: Of the ranges: search or minmax.
        exclude: Names or patterns of modules that stay in floating point; may be given several times. Default: conv_in
            and conv_out. none: nothing.
        int8_fraction: Fraction of the weights, 0 to 1, that get 8 bits where weight-bits is 4: those of the most
            sensitive layers.
        images: Number of images to calibrate on. Default: 16, with learned rounding 32.
        calibration_steps: Model evaluations of a sampling that are calibrated on, evenly spaced.
        seed: Of the first calibration image; far from the seeds that sample and compare start with.
        prompt: Of a model that takes prompts: text prompt of the calibration images; may be given several times.
        prompts: A text file of prompts in their place, one per line.
        data: Of a model that reads a source image, such as super-resolution: folder, zip or array of images, from which
            the sources of the calibration are made.
        degrade: What makes the sources. Default: as in the training of the model.
        config: A SamplingConfig file (TOML or JSON) of the samplings; the options below override its fields.
        sampler: Of the samplings. Default: the model's recommended one, as for the next three.
        times: Time grid.
        steps: Number of steps of the time grid.
        guidance_scale: Scale of classifier-free guidance.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        json: Print the result as JSON.

    Returns:
        The folder, the method, its calibration, the error and the size.
    """
    from ..workflows.prompts import prompts_for
    from ..workflows.quantize import QuantizeConfig, quantize_model
    from ..workflows.source_data import PairSettings

    loaded = open_model(model, device, lora)
    texts = prompts_for(loaded, prompts_of(prompt, prompts), "the command")
    loaded = loaded if texts is None else replace(loaded, calibration_prompts=tuple(texts))
    options = {
        "weight_bits": weight_bits, "act_bits": act_bits, "rounding": rounding, "learn_step_sizes": learn_step_sizes,
        "minutes": minutes, "iterations": iterations, "rank": rank, "time_groups": time_groups,
        "calibration": calibration, "exclude": exclude, "int8_fraction": int8_fraction, "images": images,
        "calibration_steps": calibration_steps, "seed": seed,
    }  # fmt: skip
    sampling = {"sampler": sampler, "times": times, "steps": steps, "guidance_scale": guidance_scale}
    excluded = None if exclude is None else tuple(name for name in exclude if name != "none")
    result = quantize_model(
        loaded,
        out,
        QuantizeConfig(**{**options, "act_bits": act_bits or None, "exclude": excluded, "split": not no_split}),  # type: ignore[arg-type]
        sampling_config(config, None, **sampling),
        data=data,
        pairs=None if degrade is None else PairSettings.of(loaded, degrade=degrade),
        log=(lambda line: None) if json else lambda line: print(line, flush=True),
        command=command_line(
            "quantize",
            model,
            {
                "out": out,
                "lora": lora,
                **options,
                "no_split": no_split,
                "prompt": prompt,
                "prompts": prompts,
                "data": data,
                "degrade": degrade,
                "config": config,
                **sampling,
            },
        ),
    )
    lines = [
        f"{out}: weights of {weight_bits} bits, activations of {act_bits or 'all their'} bits, "
        f"{100 * result['error']:.2g} % error in x0; try {command_for(loaded, out)}"
    ]
    if "bytes" in result:
        lines.append(
            f"  {result['bytes'] / result['bytes_fp32']:.3f} of the bytes of fp32, in {result['seconds']:.0f} s"
        )
    print_result(result, "\n".join(lines), json)
    return result
