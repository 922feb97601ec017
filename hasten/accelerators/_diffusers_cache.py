"""What the caches of `diffusers` have in common as accelerators: `enable_cache` of a pipeline's transformer."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NoReturn

from torch import nn

from ..errors import BadInput
from . import WRAP, Accelerator, SamplingContext

__all__ = ["DiffusersCache"]


class DiffusersCache(Accelerator):
    """A cache of `diffusers` (`enable_cache` of its transformers), for `hasten.accelerate(pipeline, ...)`.

    A subclass is a frozen dataclass whose fields have the names and defaults of the configuration of diffusers.

    Attributes:
        config_name: of the configuration of diffusers.
        transformers: names of the classes that it is for; none: all with `enable_cache`.
        needs_timestep: it asks the pipeline for its present timestep.
    """

    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset({"features"})
    config_name: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]] = ()
    needs_timestep: ClassVar[bool] = False

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> NoReturn:
        """Not for denoisers.

        Raises:
            BadInput: always: the cache runs in the transformer's own forward, in its pipeline.
        """
        name = type(self).__module__.rpartition(".")[2]
        raise BadInput(
            f"{name} is a cache of diffusers and runs in a pipeline's transformer: use hasten.accelerate(pipe, "
            f"'{name}'), with diffusers' pipeline itself"
        )

    def options(self, steps: int) -> dict[str, Any]:
        """Keyword arguments of the configuration of diffusers.

        Args:
            steps: of the samplings to come.
        """
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # of the subclass
        return {field.name: getattr(self, field.name) for field in fields}
