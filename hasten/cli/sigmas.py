"""`hasten sigmas`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ._common import sampling_config, warn
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def sigmas(
    model: str,
    *,
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    plan: str | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Print the times of a model or plan as sigma lists for diffusers, ComfyUI and stable-diffusion.cpp.

    A list of sigmas says at which noise levels the network is evaluated. The coefficients of a multistep sampler or of
    a fitted plan stay behind, with a warning: the program that reads the list runs a sampler of its own on it.

    Args:
        model: A bundled name, a folder, the folder or hub id of a diffusers pipeline, or a plan's .json file.
        config: A SamplingConfig file (TOML or JSON); the options below override its fields.
        sampler: Such as ddim, unipc or dpm:order=2. Default: the model's recommended one, as for the next three.
        times: Time grid, such as uniform, lambda, trailing or karras:rho=7.
        steps: Number of steps of the time grid.
        plan: A plan of the model by name, or a plan's .json file, in place of sampler, times and steps.
        json: Print the lists as JSON.

    Returns:
        The lists, the sampler, and the warnings.

    Raises:
        BadInput: For a sampler without fixed times, and for options beside a plan's file.
    """
    from ..loading import load
    from ..plan.sigma_lists import sigma_lists
    from ..plan.table import Plan

    options = {"sampler": sampler, "times": times, "steps": steps, "plan": plan}
    if model.endswith(".json") and Path(model).name not in ("model.json", "model_index.json"):
        given = [f"--{name}" for name, value in {**options, "config": config}.items() if value is not None]
        if given:
            raise BadInput(f"a plan's file has its own times: remove {', '.join(given)}")
        try:
            table = Plan.from_json(Path(model).read_text())
        except OSError as e:
            raise BadInput(f"cannot read {model}: {e.strerror}") from e
        lists = sigma_lists(table)
    else:
        loaded = load(Path(model).parent if Path(model).name in ("model.json", "model_index.json") else model)
        resolved = loaded.resolve(sampling_config(config, None, **options))
        if resolved.plan is None:
            raise BadInput(f"{resolved.config.sampler} chooses its times while it samples: name a sampler with steps")
        lists = sigma_lists(resolved.plan, loaded.denoiser.schedule)
    for line in lists.warnings:
        warn(line)
    result = lists.to_dict()
    print_result(result, lists.text(), json)
    return result
