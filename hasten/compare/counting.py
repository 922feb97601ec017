"""What a comparison shows on its way, counted in images through the network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..model.model import Model
from ..model.resolve import bound
from ..progress import ProgressReporter
from .variants import Variant


@contextlib.contextmanager
def counting(model: Model, progress: ProgressReporter | None = None) -> Iterator[list[int]]:
    """A list whose one entry counts images through the network: a guided evaluation of an image counts 2."""
    count = [0]

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        count[0] += len(arguments[0])
        if progress is not None:
            progress.advance(len(arguments[0]))

    denoiser = model.denoiser
    net: nn.Module = denoiser.net if isinstance(denoiser, Denoiser) else denoiser
    handle = net.register_forward_pre_hook(hook)
    features = getattr(denoiser, "features", None)
    if features is not None:  # the seam by which some guides ask the network, past its forward

        def counted(x_t: Tensor, *arguments: Any, **cond: Any) -> Any:
            hook(net, (x_t,))
            return features(x_t, *arguments, **cond)

        denoiser.features = counted  # type: ignore[method-assign]
    try:
        yield count
    finally:
        handle.remove()
        if features is not None:
            del denoiser.features


def extra(model: Model, v: Variant) -> float:
    """Evaluations an image of what is not the model's own network: those of the start."""
    return 0 if v.start is None else bound(model, "starts", v.start).nfe
