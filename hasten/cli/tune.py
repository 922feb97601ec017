"""`hasten tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..storage.provenance import command_line
from ._common import command_for, open_model, sampling_config
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def tune(
    model: str,
    *,
    out: Path | None = None,
    method: str = "optimized_steps",
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    data: Path | None = None,
    degrade: str | None = None,
    n: int | None = None,
    seed: int = 1_000_000,
    precision: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Tune the sampling of a model: optimise time steps or coefficients, estimate statistics, train small networks.

    Writes the model with the result into a folder. A plan becomes what sample does by default; sampling.toml beside it
    is the configuration for --config.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write. Default: the model's own, unless it is a bundled one.
        method: Such as optimized_steps:objective=trajectory, fitted_plan, dynamic_programming or moments.
        config: A SamplingConfig file (TOML or JSON) to start from; the options below override its fields.
        sampler: The sampler to tune. Default: the model's recommended one, as for the next three.
        times: Time grid to start from.
        steps: Number of steps of the time grid.
        guidance_scale: Scale of classifier-free guidance under which the result will be used.
        data: Folder, zip or array of real images, for the methods that need them, and for models that read a source
            image, such as super-resolution, of which the sources are made from them.
        degrade: What makes the sources. Default: as in the training of the model.
        n: Number of samples to calibrate on. Default: the method's own.
        seed: Of the first calibration sample; far from the seeds that sample and compare start with.
        precision: fp32 or bf16 (autocast). Default: fp32.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        json: Print the result as JSON.

    Returns:
        The folder, the plan, statistics and networks, and their figures.
    """
    from ..workflows.source_data import PairSettings
    from ..workflows.tune import tune_model

    loaded = open_model(model, device)
    folder = Path(model) if out is None else out
    if out is None and not (folder / "model.json").is_file():
        raise BadInput(f"{model} is a bundled model: give --out, the folder to write it to")
    sampling = {
        "sampler": sampler, "times": times, "steps": steps, "guidance_scale": guidance_scale, "precision": precision,
    }  # fmt: skip
    options = {
        "method": method,
        "config": config,
        **sampling,
        "data": data,
        "degrade": degrade,
        "n": n,
        "seed": seed,
        "out": out,
    }
    result = tune_model(
        loaded, folder, method, sampling_config(config, "fp32", **sampling), data=data, n=n, seed=seed,
        pairs=None if degrade is None else PairSettings.of(loaded, degrade=degrade),
        command=command_line("tune", model, options),
    )  # fmt: skip
    parts = [*([f"plan {result['plan']}"] if result["plan"] else []), *result["statistics"], *result["parts"]]
    lines = [f"{folder}: {', '.join(parts)} in {result['seconds']:.1f} s; try {command_for(loaded, folder)}"]
    lines += [f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}"
              for key, value in result["figures"].items()]  # fmt: skip
    print_result(result, "\n".join(lines), json)
    return result
