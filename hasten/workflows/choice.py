"""A choice of how to sample, as `hasten choose` writes it: a `SamplingConfig` and the files that belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, nearest
from ..plan.config import SamplingConfig
from ..utils.config import read_table

__all__ = ["Choice", "read_choice"]

FILES = ("name", "lora", "decoder")


@dataclass(frozen=True)
class Choice:
    """How to sample, and with which files.

    Args:
        sampling: the method.
        name: another model than the one that is sampled, by name or folder; None: the model itself.
        lora: a LoRA file that is merged into the weights.
        decoder: a folder of another image decoder.
    """

    sampling: SamplingConfig
    name: str | None = None
    lora: str | None = None
    decoder: str | None = None


def read_choice(config: SamplingConfig | Choice | str | Path) -> Choice:
    """The choice in a file, whose table [model] names its files; of a `SamplingConfig` that alone.

    Raises:
        BadInput: for a file that cannot be read, and unknown entries of its table.
    """
    if isinstance(config, Choice):
        return config
    if isinstance(config, SamplingConfig):
        return Choice(config)
    if not isinstance(config, (str, Path)):
        raise BadInput(f"config is a SamplingConfig or its file, found {type(config).__name__}")
    if isinstance(config, str) and not config.endswith((".toml", ".json")):
        return Choice(SamplingConfig.of(config, {}))
    sampling = SamplingConfig.load(config, "sampling")
    table: Any = read_table(config).get("model") or {}
    for key, value in table.items():
        if key not in FILES or not isinstance(value, str):
            raise BadInput(f"{config}: [model]: {key} = {value!r} is no file of a choice: {nearest(key, FILES)}")
    return Choice(sampling, **table)
