"""Linear layers in 8 bits by the kernels of torchao, on CUDA devices."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..denoiser import Denoiser, device_of
from ..errors import BadInput, check_choice
from ..nets.copies import copy_modules, own_parameters
from ..nets.prequantized import check_original_weights
from . import EXCHANGE, Accelerator, SamplingContext

CONFIGS = {
    "int8": "Int8DynamicActivationInt8WeightConfig",
    "int8_weights": "Int8WeightOnlyConfig",
    "float8": "Float8DynamicActivationFloat8WeightConfig",
}
MULTIPLE = 16  # of the features of a layer that the kernels take
FLOAT8 = (8, 9)  # the compute capability that has float8 products (Ada, Hopper)


@dataclass(frozen=True)
class TorchAO(Accelerator):
    """The linear layers of a copy of the network compute in 8 bits, by `torchao.quantization.quantize_`.

    Nothing is calibrated: activations get a scale of their own at every evaluation. For transformers on CUDA, together
    with `compile`; convolutions stay as they are. On CPUs use `quantize`.

    Args:
        dtype: "int8" (weights and activations), "int8_weights" (weights alone: less memory, not faster) or "float8"
            (weights and activations, compute capability 8.9 or newer).
    """

    dtype: str = "int8"
    stage: ClassVar[int] = EXCHANGE
    claims: ClassVar[frozenset[str]] = frozenset({"arithmetic"})

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, CONFIGS)

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        """The denoiser with a network whose linear layers are torchao's; other weights are shared with the original.

        Raises:
            BadInput: without torchao, on another device than CUDA, and for a network without linear layers.
        """
        if not isinstance(denoiser, Denoiser):
            raise BadInput(f"torchao needs a Denoiser with its network, found {type(denoiser).__name__}")
        check_original_weights(denoiser.net, "torchao", "load it without quantization_config, or use it as it is")
        library = quantization_library()
        device = device_of(denoiser)
        if device.type != "cuda":
            raise BadInput(f"torchao: its 8-bit kernels are for CUDA, found a network on {device}: use quantize")
        if self.dtype == "float8" and (capability := torch.cuda.get_device_capability(device)) < FLOAT8:
            raise BadInput(
                f"torchao: float8 needs compute capability 8.9 or newer, found {'.'.join(map(str, capability))}: use "
                "dtype=int8"
            )
        if not any(takes_kernels(module) for module in denoiser.net.modules()):
            raise BadInput(
                f"torchao: {type(denoiser.net).__name__} has no Linear with a multiple of {MULTIPLE} features"
            )
        net = copy_modules(denoiser.net, own_parameters(denoiser.net))
        library.quantize_(net, getattr(library, CONFIGS[self.dtype])(), filter_fn=takes_kernels)
        return denoiser.replace(net=net)


def takes_kernels(module: nn.Module, name: str = "") -> bool:
    """Whether a module is a linear layer that torchao's kernels take.

    Args:
        module: any.
        name: of it, which torchao passes.
    """
    if not isinstance(module, nn.Linear) or "forward" in vars(module):
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def quantization_library() -> Any:
    """`torchao.quantization`.

    Raises:
        BadInput: where torchao is not installed, or too old.
    """
    try:
        library = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise BadInput(f"torchao: this accelerator needs the package torchao: pip install torchao ({error})") from error
    if missing := [name for name in ("quantize_", *CONFIGS.values()) if not hasattr(library, name)]:
        raise BadInput(f"torchao: the installed version has no {missing[0]}: pip install -U torchao")
    return library
