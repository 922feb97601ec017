"""Counting of network evaluations, in images: the progress and the NFE of a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..model.model import Model
from ..model.resolve import start_of
from ..progress import ProgressReporter
from .variants import Variant


@contextlib.contextmanager
def count_evaluations(model: Model, progress: ProgressReporter | None = None) -> Iterator[list[int]]:
    """Count the images that go through the network inside the block.

    Args:
        model: The model whose network is counted.
        progress: A progress display to advance by each count.

    Yields:
        A list of one entry, the count; a guided evaluation of an image counts 2.
    """
    count = [0]

    def hook(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any] | None = None) -> None:
        images = len(arguments[0] if arguments else next(iter((options or {}).values())))
        count[0] += images
        if progress is not None:
            progress.advance(images)

    denoiser: Any = model.denoiser
    net: nn.Module = denoiser.net if isinstance(denoiser, Denoiser) else denoiser
    nets: list[nn.Module] = getattr(denoiser, "counted", None) or [getattr(net, "counted", net)]
    handles = [one.register_forward_pre_hook(hook, with_kwargs=True) for one in nets]
    features = getattr(denoiser, "features", None)
    if features is not None:  # some guides evaluate the network through it, without its forward

        def counted_features(x_t: Tensor, *arguments: Any, **cond: Any) -> Any:
            hook(net, (x_t,))
            return features(x_t, *arguments, **cond)

        denoiser.features = counted_features
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
        if features is not None:
            del denoiser.features


def start_nfe(model: Model, variant: Variant) -> float:
    """Evaluations per image by other networks than the model's own: those of the initialisation."""
    start = start_of(model, variant.config)
    return 0 if start is None else float(start.nfe)
