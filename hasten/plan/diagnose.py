"""Where a value that is not finite began."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..utils.finite import check_images, first_non_finite, is_finite, not_finite
from ..utils.random import Noise


class _Found(Exception):
    """A non-finite value was met while sampling again."""


class _Probe(Wrapper):
    """A denoiser that stops at the first evaluation that is given, or gives, what is not finite."""

    def __init__(self, denoiser: nn.Module, layers: list[str]) -> None:
        super().__init__(denoiser)
        self.layers, self.count = layers, 0

    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        self.count += 1
        at = f"t = {float(torch.as_tensor(t).flatten()[0]):.4g}"
        if not is_finite(x_t):
            if self.count == 1:
                raise _Found(f"the state that sampling begins from, at {at}, is not finite")
            raise _Found(f"the sampler's step after network evaluation {self.count - 1}, before {at}, overflowed")
        if bad := first_non_finite((key, value) for key, value in cond.items()):
            raise _Found(f"the condition {bad!r} that the network is given is not finite")
        self.layers.clear()
        x0 = self.denoiser(x_t, t, **cond)
        if not is_finite(x0):
            inside = f"in its layer {self.layers[0]}" if self.layers else "in the guidance around the network"
            raise _Found(f"it began in network evaluation {self.count}, at {at}, {inside}")
        return x0


def origin(
    denoiser: nn.Module, sample: Callable[[nn.Module], Tensor], decoder: Any = None, runtime: str = "fp32"
) -> str:
    """Where the NaN or infinity of a sampling began, found by sampling once more with all layers watched.

    denoiser: as it is sampled, guides around it. sample: draws the same batch with the denoiser it is given, to the
        samples that `decoder` would decode. runtime: the number format, for the hint.
    """
    net = getattr(denoiser, "net", denoiser)
    layers: list[str] = []
    weights = not_finite(net) if isinstance(net, nn.Module) else None
    if weights is not None:
        return f"the weight {weights} of the network is not finite"
    narrow = runtime.startswith("bf16") or any(p.dtype == torch.float16 for p in denoiser.parameters())
    hint = "; float16 overflows beyond 65,504: try float32" if narrow and not runtime.startswith("bf16") else ""
    with _record_layers(net, layers):
        try:
            made = sample(_Probe(denoiser, layers))
        except _Found as found:
            return f"{found}{hint}"
        except Exception as error:  # the sampler's own complaint about the same numbers
            return str(error).splitlines()[0] if str(error) else type(error).__name__
    if decoder is not None and is_finite(made):
        inner = next((part for part in vars(decoder).values() if isinstance(part, nn.Module)), None)
        bad = None if inner is None else not_finite(inner)
        name = type(decoder if inner is None else inner).__name__
        weight = "" if bad is None else f": its weight {bad} is not finite"
        half = inner is not None and any(p.dtype == torch.float16 for p in inner.parameters())
        return f"the samples are finite, the decoder {name} is not{weight}" + (
            "; it runs in float16: try float32" if half and bad is None else ""
        )
    return "the last step of the sampler overflowed"


@contextlib.contextmanager
def _record_layers(net: Any, layers: list[str]) -> Iterator[None]:
    """The names of the layers that make what is not finite of what is, in the order of the run."""
    handles = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            answers = [v for v in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(v, Tensor)]
            if not all(map(is_finite, answers)):
                layers.append(name)

        return hook

    if isinstance(net, nn.Module):
        for name, module in net.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(look(name or type(net).__name__)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_result(x: Tensor, denoiser: Any, noise: Any, again: Callable[[Any, Any], Tensor]) -> Tensor:
    """The samples (B, *S) themselves. Raises NonFinite, with where it began, for NaN or infinity, unless gradients are
    recorded.

    again: draws the same samples once more with the denoiser and the noise that it is given.
    """

    def where() -> str:
        if not isinstance(denoiser, nn.Module):
            return "look at what the denoiser answers"
        fresh = noise.rows(slice(None)) if isinstance(noise, Noise) else noise
        with torch.no_grad():
            return origin(denoiser, lambda watched: again(watched, fresh))

    if not x.requires_grad:
        check_images(x, where=where, what="samples")
    return x
