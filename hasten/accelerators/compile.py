"""Compilation of a network's parts by `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..errors import BadInput, check_choice, nearest
from . import COMPILE, Accelerator, SamplingContext
from ._compile import CompiledNet, freezing_weights

__all__ = ["Compile"]

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Compile(Accelerator):
    """The same network through `torch.compile`, part by part: fused loops around matrix products and convolutions.

    The compiled parts are stateless: `embed`, `encode` and `decode` of a U-Net, `embed`, `run` and `finish` of a
    transformer, the whole of another network. Encoder propagation and DeepCache wrap them and work as before. Outputs
    differ from the network's by rounding.

    The first call at each batch size takes long, a minute for a large network; the network's `cold_seconds` and
    `warm_seconds` are what it took, and what an evaluation takes since.

    Args:
        mode: of `torch.compile`; "reduce-overhead" and "max-autotune" replay CUDA graphs.
        dynamic: one graph for all batch sizes, a little slower than one for each.
        graphs: the maximum number of graphs per part, one for each batch size (and number format); other batches, such
            as the smaller last one of a sampling, run uncompiled.
        freezing: weights become constants that are packed for their layer, which takes their memory once more; later
            changes of the network's weights are ignored. Inductor only.
        backend: of `torch.compile`: "inductor"; "aot_eager" and "eager" only trace, for debugging.

    Raises:
        BadInput: for an unknown backend or mode, where inductor finds no C++ compiler, and for a network that another
            library runs.

    References:
        Ansel et al. 2024, "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
        Compilation", ASPLOS, doi:10.1145/3620665.3640366.
    """

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    dynamic: bool = False
    graphs: int = 4
    freezing: bool = True
    backend: str = "inductor"
    stage: ClassVar[int] = COMPILE
    claims: ClassVar[frozenset[str]] = frozenset({"graph"})

    def __post_init__(self) -> None:
        if self.graphs < 1:
            raise BadInput(f"compile needs graphs of at least 1, found {self.graphs}")
        check_choice("compile mode", self.mode, MODES)
        if self.mode != "default" and self.backend != "inductor":
            raise BadInput(f"compile: mode is inductor's, found mode {self.mode!r} with backend {self.backend!r}")

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        """The denoiser with a `CompiledNet` of its network, which compiles at its first calls.

        Raises:
            BadInput: see the class.
        """
        net, replace = getattr(denoiser, "net", None), getattr(denoiser, "replace", None)
        if not isinstance(net, nn.Module) or not callable(replace):
            raise BadInput(f"compile works on a Denoiser and its network, found {type(denoiser).__name__}")
        if getattr(net, "runs_elsewhere", False):
            raise BadInput(f"compile has nothing to do on a {type(net).__name__}, which another library runs compiled")
        self._check_backend(next((p.device.type for p in net.parameters()), "cpu"))
        copies = self.mode in ("reduce-overhead", "max-autotune")
        return replace(net=CompiledNet(net, self._compiler(), self.graphs, self.dynamic, copies))

    def _compiler(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """`torch.compile` with these options."""
        options: dict[str, Any] = {"backend": self.backend, "dynamic": None if self.dynamic else False}
        if self.backend == "inductor":
            options["mode"] = self.mode
        freezing = self.freezing and self.backend == "inductor"

        def compiler(plain: Callable[..., Any]) -> Callable[..., Any]:
            fast = torch.compile(plain, **options)
            done = False

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                if done:
                    return fast(*args, **kwargs)
                with freezing_weights(freezing):  # read while it compiles, in the first call
                    output = fast(*args, **kwargs)
                done = True
                return output

            return call

        return compiler

    def _check_backend(self, device: str) -> None:
        """Refuse an unknown backend, and inductor on a CPU without a C++ compiler."""
        from torch import _dynamo

        backends = _dynamo.list_backends(exclude_tags=())
        if self.backend not in backends:
            raise BadInput(f"compile has no backend {self.backend!r}: {nearest(self.backend, backends)}")
        if self.backend != "inductor" or device != "cpu":
            return
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as e:  # of a class that only torch knows
            raise BadInput(
                "compile needs a C++ compiler and found none: install g++, or name yours in the variable CXX"
            ) from e
