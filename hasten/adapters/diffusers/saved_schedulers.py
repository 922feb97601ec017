"""Plans on the schedule of a saved pipeline, from its scheduler alone: no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...plan.table import Plan
from ...schedules.base import Schedule
from .given_times import make_original
from .library import INDEX
from .scheduler import as_scheduler
from .scheduler_class import plan_scheduler

__all__ = ["is_pipeline_folder", "plan_of_folder"]

CONFIG = "scheduler_config.json"


def is_pipeline_folder(folder: str | Path) -> bool:
    """Whether a folder is a saved pipeline of `diffusers` with one scheduler."""
    return (Path(folder) / INDEX).is_file() and (Path(folder) / "scheduler" / CONFIG).is_file()


def plan_of_folder(
    folder: str | Path,
    sampler: Any = None,
    times: Any = None,
    steps: int | None = None,
    mu: float | None = None,
    plan: Plan | None = None,
) -> tuple[Plan, Schedule]:
    """The plan of a sampler inside a saved pipeline, and the schedule of its network.

    Args:
        folder: of the pipeline.
        sampler: as in `as_scheduler`. Default: that of the folder, where its scheduler is hasten's, else "unipc".
        times: a grid, as a text, or "like". Default: that of the folder, else "angle".
        steps: Default: 20.
        mu: of a flow whose shift depends on the image size. Default: the smallest.
        plan: in place of the sampler, its times and steps.

    Raises:
        BadInput: for a scheduler that is not supported.
    """
    file = Path(folder) / "scheduler" / CONFIG
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}") from error
    name = config.get("_class_name")
    if name == "PlanScheduler":
        scheduler = plan_scheduler().from_config(config)
        sampler, times = sampler or config.get("sampler"), times or config.get("times")
    else:
        scheduler = make_original(config)
        if scheduler is None:
            raise BadInput(f"{file} names {name}, which is no scheduler of diffusers")
    if (
        plan is None
        and scheduler.config.get("plan")
        and (sampler, times, steps) == (config["sampler"], config["times"], None)
    ):
        plan = Plan.from_json(scheduler.config.plan)
    made = as_scheduler(plan if plan is not None else sampler or "unipc", None if plan else times, like=scheduler)
    made.set_timesteps(plan.nfe if plan is not None else steps or 20, mu=mu if made.spec.flow else None)
    return made._full_plan, made.hasten_schedule
