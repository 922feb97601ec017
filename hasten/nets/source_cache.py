"""What a network computes of its source image alone: once for all evaluations of a sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["SourceCache", "caching_sources"]

T = TypeVar("T")


class SourceCache:
    """Features of the last source image, kept within `caching_sources`; the results are the same, bit for bit.

    A network has it as its attribute `source_cache`. It is not used with gradients, and not in compiled or exported
    graphs, which compute the features each time.
    """

    def __init__(self) -> None:
        self.users = 0  # blocks of `caching_sources` that are open
        self.entry: tuple[Hashable, SeenImage, object] | None = None
        self.computed = 0  # times

    def features(self, source: Tensor, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, or its last result where source and key are the same.

        Args:
            source: the image.
            key: what else the features depend on.
            compute: of this source.
        """
        usable = self.users and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not usable or torch.jit.is_tracing():
            return compute()
        autocast = torch.is_autocast_enabled(source.device.type), torch.get_autocast_dtype(source.device.type)
        key = (key, autocast, source.device, source.dtype)
        entry = self.entry  # read once: another thread may replace it
        if entry is not None and entry[0] == key and entry[1].equals(source):
            return entry[2]  # type: ignore[return-value]
        self.computed += 1
        value = compute()
        self.entry = key, SeenImage(source), value
        return value

    def __deepcopy__(self, memo: object) -> SourceCache:
        return SourceCache()

    def __getstate__(self) -> dict[str, object]:
        return SourceCache().__dict__


class SeenImage:
    """An image as it was, to be compared with later ones."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.version, self.copy = image, version(image), image.detach().clone()

    def equals(self, image: Tensor) -> bool:
        """Whether another image has the same values; for the same unchanged tensor without waiting for its device."""
        if image is self.image and self.version is not None and self.version == version(image):
            return True
        return image.shape == self.copy.shape and torch.equal(image, self.copy)


def version(x: Tensor) -> int | None:
    """A number that grows when a tensor is changed in place; None where torch keeps none."""
    return None if x.is_inference() else x._version


@contextlib.contextmanager
def caching_sources(net: nn.Module) -> Iterator[None]:
    """Within the block the networks inside `net` whose weights stay as they are compute the features of a source once.

    Args:
        net: a network or denoiser.
    """
    found = (getattr(module, "source_cache", None) for module in net.modules())
    caches = list({id(cache): cache for cache in found if isinstance(cache, SourceCache)}.values())
    for cache in caches:
        cache.users += 1
    try:
        yield
    finally:
        for cache in caches:
            cache.users -= 1
            if not cache.users:
                cache.entry = None
