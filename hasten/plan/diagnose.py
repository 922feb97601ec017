"""Finding where NaN or infinity first appeared while sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..utils.finite import check_images, first_non_finite, is_finite, not_finite
from ..utils.random import Noise


class _NonFiniteAt(Exception):
    """A non-finite value appeared while sampling again."""


class _Probe(Wrapper):
    """A denoiser that stops at the first evaluation with an input or an output that is not finite."""

    def __init__(self, denoiser: nn.Module, layers: list[str]) -> None:
        super().__init__(denoiser)
        self.layers, self.count = layers, 0

    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Any:
        """The inner denoiser's x0 (B, *S), checked."""
        return self._checked(self.denoiser, x_t, t, cond)

    def branch(self, x_t: Tensor, t: Any, **cond: Any) -> Any:
        """The inner denoiser's x0 of a branch of guidance, checked."""
        return self._checked(self.denoiser.branch, x_t, t, cond)

    def _checked(self, evaluate: Callable[..., Any], x_t: Tensor, t: Any, cond: dict[str, Any]) -> Any:
        self.count += 1
        at = f"t = {float(torch.as_tensor(t).flatten()[0]):.4g}"
        if not is_finite(x_t):
            if self.count == 1:
                raise _NonFiniteAt(f"the state that sampling begins from, at {at}, is not finite")
            raise _NonFiniteAt(f"the sampler's step after network evaluation {self.count - 1}, before {at}, overflowed")
        if bad := first_non_finite((key, value) for key, value in cond.items()):
            raise _NonFiniteAt(f"the condition {bad!r} of the network is not finite")
        self.layers.clear()
        x0 = evaluate(x_t, t, **cond)
        if not all(is_finite(value) for value in (x0 if isinstance(x0, tuple) else (x0,))):
            inside = f"in its layer {self.layers[0]}" if self.layers else "in the guidance around the network"
            raise _NonFiniteAt(f"it began in network evaluation {self.count}, at {at}, {inside}")
        return x0


def origin(
    denoiser: nn.Module, sample: Callable[[nn.Module], Tensor], decoder: Any = None, runtime: str = "fp32"
) -> str:
    """Where NaN or infinity first appeared, by sampling once more with hooks on all layers.

    Args:
        denoiser: as it was sampled, with the guides around it.
        sample: called with a denoiser, draws the same batch again, before `decoder`.
        decoder: of the samples, where there is one.
        runtime: the precision, for the hint.

    Returns:
        a phrase that completes the error message.
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
            samples = sample(_Probe(denoiser, layers))
        except _NonFiniteAt as location:
            return f"{location}{hint}"
        except Exception as error:  # the sampler's own error about the same values
            return str(error).splitlines()[0] if str(error) else type(error).__name__
    if decoder is not None and is_finite(samples):
        inner = next((value for value in vars(decoder).values() if isinstance(value, nn.Module)), None)
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
    """Append the names of layers whose output is not finite to `layers`, in the order of execution."""
    handles = []

    def make_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else [output]
            if not all(is_finite(value) for value in outputs if isinstance(value, Tensor)):
                layers.append(name)

        return hook

    if isinstance(net, nn.Module):
        for name, module in net.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(make_hook(name or type(net).__name__)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_result(x: Tensor, denoiser: Any, noise: Any, again: Callable[[Any, Any], Tensor]) -> Tensor:
    """The samples (B, *S) themselves, checked unless gradients are recorded.

    Args:
        x: the samples.
        denoiser: they were drawn with.
        noise: they were drawn with.
        again: `again(denoiser, noise)` draws the same samples once more.

    Raises:
        NonFinite: for NaN or infinity, with where it first appeared.
    """

    def where() -> str:
        if not isinstance(denoiser, nn.Module):
            return "check the output of the denoiser"
        restarted = noise.rows(slice(None)) if isinstance(noise, Noise) else noise
        with torch.no_grad():
            return origin(denoiser, lambda probe: again(probe, restarted))

    if not x.requires_grad:
        check_images(x, where=where, what="samples")
    return x
