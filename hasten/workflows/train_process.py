"""The process of a training run, and the pairs that it trains on."""

from __future__ import annotations

from typing import Any

from ..errors import BadInput
from ..loading import load
from ..pick import format_spec, pick
from ..train.data import open_data
from ..train.messages import print_once
from ..train.pairs import degraded_pairs, folder_pairs
from ..train.sadm import Sadm, structure_options
from ..train.sources import Data
from ..train.unpaired import unpaired_sources
from ..train_processes import TrainProcess
from .train_config import TrainConfig

__all__ = ["process_recipe", "training_structure", "with_sources"]


def process_recipe(config: TrainConfig) -> TrainProcess:
    """The process of a config.

    Raises:
        BadInput: for an unknown one.
    """
    recipe: TrainProcess = pick("train_processes", config.process or "diffusion")
    return recipe


def training_structure(config: TrainConfig, fine_tuning: bool) -> Sadm | None:
    """The structure term that a config asks for; None without one.

    Args:
        config: of the run.
        fine_tuning: of a trained network, where the term begins at once.

    Raises:
        BadInput: for what it does not go with.
    """
    options = structure_options(config.structure, trained=fine_tuning)
    if options is None:
        return None
    if config.fsdp:
        raise BadInput("structure compares whole batches in an encoder of its own: it does not go with fsdp")
    if config.batch_size // config.grad_accumulation < 32:
        print_once(
            f"structure compares the samples of a batch: {config.batch_size // config.grad_accumulation} at once are "
            "few, 32 or more show more of it (batch_size, grad_accumulation)"
        )
    return options


def with_sources(data: Data, config: TrainConfig, recipe: TrainProcess) -> Data:
    """The data with the sources that the config names.

    Args:
        data: the targets.
        config: with `source` or `degrade`, or neither.
        recipe: of the process.

    Raises:
        BadInput: for sources that are missing, not used, given twice, or that do not fit the data.
    """
    if generator := getattr(recipe, "generator", ""):
        check_generator(generator, data)
    given: Any = config.source if config.source is not None else config.degrade
    if given is None:
        if recipe.needs_source:
            raise BadInput(
                f"{format_spec(recipe)} trains on two sets: give --source, the folder of the other one"
                if recipe.unpaired
                else f"{format_spec(recipe)} trains on pairs: give --source, a folder with the same file names, or "
                "--degrade, such as downscale:factor=4"
            )
        return data
    if not recipe.takes_source:
        name = "source" if config.source is not None else "degrade"
        raise BadInput(f"--{name} is for processes that train on pairs, such as i2sb, not for {format_spec(recipe)}")
    if config.source is not None and config.degrade is not None:
        raise BadInput("--source and --degrade both give the sources of the pairs: leave one out")
    if config.flip and not config.crop:
        raise BadInput("--flip would mirror the targets of pairs and not their sources: leave it out")
    if config.degrade is not None:
        pairs = degraded_pairs(data, pick("degradations", config.degrade))
        assert pairs.conditions is not None
        small = tuple(pairs.conditions([0])["source"].shape[1:])
        if small != tuple(data.shape) and not hasattr(recipe, "degradation"):
            raise BadInput(
                f"{format_spec(recipe)} needs sources of the size of the data, and {config.degrade} makes them "
                f"{small[2]}x{small[1]}: downscale enlarges them again"
            )
        return pairs
    if config.crop:
        raise BadInput("--crop takes crops of the targets of pairs and not of their sources: give --degrade")
    if hasattr(recipe, "degradation"):
        raise BadInput(f"{format_spec(recipe)} makes its small images from the data: give --degrade, not --source")
    sources = open_data(
        str(config.source), size=config.size, channels=data.shape[0], label="none", caption="none"
    )  # the split of the targets
    return unpaired_sources(data, sources) if recipe.unpaired else folder_pairs(data, sources)


def check_generator(name: str, data: Data) -> None:
    """Refuse, before any training, a generator that is not there or that draws other images than the data."""
    model = load(name)
    if tuple(model.shape) != tuple(data.shape):
        raise BadInput(
            f"the generator {name} draws samples of {'x'.join(map(str, model.shape))}, and {data.source or 'the data'} "
            f"has images of {'x'.join(map(str, data.shape))}"
        )
