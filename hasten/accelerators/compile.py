"""Compilation of a network's parts by torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..errors import BadInput, nearest
from . import COMPILE, SamplingContext
from ._compile import CompiledNet, frozen

__all__ = ["Compile"]


@dataclass(frozen=True)
class Compile:
    """The same network through `torch.compile`, part by part: fused loops around matrix products and convolutions.

    What is compiled keeps nothing from call to call: `embed`, `encode` and `decode` of a U-Net, `embed`, `run` and
    `finish` of a transformer, the whole of another network. Encoder propagation and the like lie around it and work as
    before. Answers differ from the network's by rounding.

    The first call of a size of batch takes long, a minute for a large network; the network's `cold_seconds` and
    `warm_seconds` tell what it took, and what an evaluation takes since.

    Args:
        mode: as torch spells them; "reduce-overhead" and "max-autotune" replay recorded launches on a GPU.
        dynamic: one graph for all sizes of batch, a little slower than one made for its size.
        graphs: how many graphs a part gets, one for each size of batch (and number format); what comes after those,
            such as the smaller last batch of a sampling, runs uncompiled.
        freezing: weights become constants that are packed for their layer, once more in memory; a change of the
            network's weights is then no longer seen. Inductor only.
        backend: what compiles: "inductor"; "aot_eager" and "eager" only trace, for looking into faults.

    Raises:
        BadInput: for a backend or a mode that there is not, where inductor finds no C++ compiler, and for a network
            that another library runs.

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
        modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
        if self.mode not in modes:
            raise BadInput(f"compile has no mode {self.mode!r}: {nearest(self.mode, modes)}")
        if self.mode != "default" and self.backend != "inductor":
            raise BadInput(f"compile: mode is inductor's, found mode {self.mode!r} with backend {self.backend!r}")

    def apply(self, denoiser: nn.Module, ahead: SamplingContext) -> nn.Module:
        """The denoiser with a `CompiledNet` of its network; nothing is compiled before it is first asked."""
        net, replace = getattr(denoiser, "net", None), getattr(denoiser, "replace", None)
        if not isinstance(net, nn.Module) or not callable(replace):
            raise BadInput(f"compile works on a Denoiser and its network, found {type(denoiser).__name__}")
        if getattr(net, "runs_elsewhere", False):
            raise BadInput(f"compile has nothing to do on a {type(net).__name__}, which another library runs compiled")
        self._checked(next((p.device.type for p in net.parameters()), "cpu"))
        copies = self.mode in ("reduce-overhead", "max-autotune")
        return replace(net=CompiledNet(net, self._compiler(), self.graphs, self.dynamic, copies))

    def _compiler(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        settings: dict[str, Any] = {"backend": self.backend, "dynamic": None if self.dynamic else False}
        if self.backend == "inductor":
            settings["mode"] = self.mode
        freezing = self.freezing and self.backend == "inductor"

        def compiler(plain: Callable[..., Any]) -> Callable[..., Any]:
            fast = torch.compile(plain, **settings)
            done = False

            def call(*given: Any, **named: Any) -> Any:
                nonlocal done
                if done:
                    return fast(*given, **named)
                with frozen(freezing):  # read while it compiles, in the first call
                    answer = fast(*given, **named)
                done = True
                return answer

            return call

        return compiler

    def _checked(self, device: str) -> None:
        from torch import _dynamo

        known = _dynamo.list_backends(exclude_tags=())
        if self.backend not in known:
            raise BadInput(f"compile has no backend {self.backend!r}: {nearest(self.backend, known)}")
        if self.backend != "inductor" or device != "cpu":
            return
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as e:  # of a class that only torch knows
            raise BadInput(
                "compile needs a C++ compiler and found none: install g++, or name yours in the variable CXX"
            ) from e
