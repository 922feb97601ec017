"""`hasten sigmas`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ._common import sampling_config, warn
from ._processes import on_main_process
from .terminal import print_result

if TYPE_CHECKING:
    from ..plan.table import Plan


@on_main_process
def sigmas(
    model: str,
    *,
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    plan: str | None = None,
    mu: float | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Print the times of a model or plan as sigma lists for diffusers, ComfyUI and stable-diffusion.cpp.

    A list of sigmas says at which noise levels the network is evaluated. The coefficients of a multistep sampler or of
    a fitted plan stay behind, with a warning: the program that reads the list runs a sampler of its own on it.

    Args:
        model: A bundled name, a folder, the folder or hub id of a diffusers pipeline, or a plan's .json file. Of the
            folder of a pipeline only the scheduler is read.
        config: A SamplingConfig file (TOML or JSON); the options below override its fields.
        sampler: Such as ddim, unipc or dpm:order=2. Default: the model's recommended one, as for the next three.
        times: Time grid, such as uniform, lambda, trailing or karras:rho=7; of the folder of a pipeline also like,
            the times of its own scheduler.
        steps: Number of steps of the time grid.
        plan: A plan of the model by name, or a plan's .json file, in place of sampler, times and steps.
        mu: Of the folder of a pipeline whose shift depends on the image size: what the pipeline computes from it.
            Default: the smallest.
        json: Print the lists as JSON.

    Returns:
        The lists, the sampler, and the warnings.

    Raises:
        BadInput: For a sampler without fixed times, and for options beside a plan's file.
    """
    from ..adapters.diffusers.saved_schedulers import is_pipeline_folder, plan_of_folder
    from ..loading import load
    from ..model.sources import refuse_process
    from ..plan.sigma_lists import sigma_lists

    options = {"sampler": sampler, "times": times, "steps": steps, "plan": plan}
    folder = str(Path(model).parent) if Path(model).name in ("model.json", "model_index.json") else model
    if folder.endswith(".json"):
        given = [f"--{name}" for name, value in {**options, "config": config, "mu": mu}.items() if value is not None]
        if given:
            raise BadInput(f"a plan's file has its own times: remove {', '.join(given)}")
        lists = sigma_lists(read_plan(folder))
    elif is_pipeline_folder(folder):
        chosen = sampling_config(config, None, **options)
        table = None if chosen.plan is None else chosen.plan
        table = read_plan(table) if isinstance(table, str) else table
        lists = sigma_lists(*plan_of_folder(folder, chosen.sampler, chosen.times, chosen.steps, mu, table))
    else:
        if mu is not None:
            raise BadInput("--mu is for the folder of a pipeline whose shift depends on the image size: remove it")
        loaded = load(folder)
        refuse_process(loaded, "a list of sigmas")
        resolved = loaded.resolve(sampling_config(config, None, **options))
        if resolved.plan is None:
            raise BadInput(f"{resolved.config.sampler} chooses its times while it samples: name a sampler with steps")
        lists = sigma_lists(resolved.plan, loaded.denoiser.schedule)
    for line in lists.warnings:
        warn(line)
    result = lists.to_dict()
    print_result(result, lists.text(), json)
    return result


def read_plan(file: str) -> Plan:
    """The plan of a .json file.

    Raises:
        BadInput: where it cannot be read.
    """
    from ..plan.table import Plan

    try:
        return Plan.from_json(Path(file).read_text())
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error
