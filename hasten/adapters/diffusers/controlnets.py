"""ControlNets of a pipeline whose network reuses features: they run at key steps, and their residuals are reused."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from ...accelerators._caching.split import same_conditions
from ...accelerators._caching.wrapper import FeatureReuse
from ...denoiser import Wrapper
from .network import uncompiled
from .timeline import Timeline

if TYPE_CHECKING:
    from .accelerated_forward import AcceleratedForward

__all__ = ["reuse_controlnet"]


def reuse_controlnet(pipe: Any, forward: AcceleratedForward) -> None:
    """Let the ControlNet of an accelerated pipeline, if it has one, run only where the network's key steps are.

    Args:
        pipe: a copy of the user's pipeline, whose ControlNet itself does not change.
        forward: of its accelerated network.
    """
    controlnet = vars(pipe).get("controlnet")
    if not isinstance(controlnet, nn.Module) or uncompiled(controlnet) is not controlnet:
        return
    if "features" in forward.claimed and forward.patch is None:
        vars(pipe)["controlnet"] = _at_key_steps(controlnet, ControlNetReuse(forward))


class ControlNetReuse:
    """The residuals of the last key step.

    Between key steps DeepCache reads the residuals of its shallow skips, and encoder propagation none. They are
    computed again where anything but the noisy sample and the time has changed: the scale, the prompt, the image.

    Args:
        forward: of the network that reads them.
    """

    def __init__(self, forward: AcceleratedForward) -> None:
        self.forward, self.timeline = forward, Timeline()
        self.residuals: Any = None
        self.arguments: Any = None

    def __call__(self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The ControlNet's output: of `run`, or of the last key step."""
        named = {**dict(enumerate(args)), **kwargs}
        sample, timestep = named.pop(0, named.pop("sample", None)), named.pop(1, named.pop("timestep", None))
        arguments = (sample.shape, sample.dtype, named)
        begins = self.timeline.advance(self.forward._scheduler(), timestep)
        if begins or self._at_key_step() or not same_conditions(self.arguments, arguments):
            self.residuals = self.arguments = None  # before the new ones take their memory
            self.residuals, self.arguments = run(*args, **kwargs), arguments
        return self.residuals

    def _at_key_step(self) -> bool:
        """Whether the network's next evaluation is a key step, or it is not known which evaluation that is."""
        own, its = self.timeline, self.forward.timeline
        same = own.table is its.table and own.begin == its.begin and own.done == its.done + 1
        if not (same and own.regular and its.regular):
            return True
        denoiser = self.forward.denoiser
        while isinstance(denoiser, Wrapper) and not isinstance(denoiser, FeatureReuse):
            denoiser = denoiser.denoiser
        return denoiser.next_is_key if isinstance(denoiser, FeatureReuse) else True


def _at_key_steps(controlnet: nn.Module, reuse: ControlNetReuse) -> nn.Module:
    """The same ControlNet, of a subclass of the same name, whose calls go through `reuse`."""
    kind: Any = type(controlnet)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return reuse(super(reusing, self).__call__, args, kwargs)  # with hooks and offloading

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # another pipeline's, which has key steps of its own
        plain = object.__new__(kind)
        plain.__dict__ = vars(self)
        return copy.deepcopy(plain, memo)

    attributes = {
        "__call__": __call__,
        "__deepcopy__": __deepcopy__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    reusing: Any = type(kind.__name__, (kind,), attributes)
    module = object.__new__(reusing)
    module.__dict__ = vars(controlnet)
    return module
