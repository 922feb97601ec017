"""Conversion of the arguments of each network's `forward` to (x, time, conditions), and of its output."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import BadInput
from .structure import input_names

__all__ = ["argument_reader", "is_residual", "known_class", "network_output", "raw_output"]

RESIDUALS = re.compile("^(down_residual_|mid_residual|adapter_)|controlnet|additional_residual|control_hidden_states")
ArgumentReader = Callable[[dict[str, Any]], tuple[Tensor, Any, dict[str, Any]]]


def is_residual(name: str) -> bool:
    """Whether a condition is a residual of a ControlNet or an adapter, which changes at every evaluation."""
    return RESIDUALS.search(name) is not None


def network_output(net: nn.Module, raw: Tensor, output_class: Any = None) -> Any:
    """The output object of the network's own forward.

    Args:
        net: the network.
        raw: the output.
        output_class: what its forward returns, where that is known.

    Raises:
        BadInput: for an unknown network.
    """
    if output_class is not None:
        return raw if issubclass(output_class, Tensor) else (raw,) if output_class is tuple else output_class(raw)
    for module in map(importlib.import_module, (type(net).__module__, type(net).forward.__module__)):
        for name in ("UNet2DOutput", "UNet2DConditionOutput", "Transformer2DModelOutput"):
            if hasattr(module, name):
                return getattr(module, name)(sample=raw)
    raise BadInput(f"the output class of {type(net).__name__} is unknown: call it with return_dict=False")


# From the arguments of each network's forward to x, the time, and conditions as `split_network` names them.


def unet_arguments(arguments: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Of `UNet2DModel`."""
    return arguments["sample"], arguments["timestep"], present({"label": arguments["class_labels"]})


def conditional_unet_arguments(arguments: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Of `UNet2DConditionModel`."""
    cond: dict[str, Any] = {
        "text": arguments["encoder_hidden_states"],
        "label": arguments["class_labels"],
        "timestep_cond": arguments["timestep_cond"],
        "mask": arguments["attention_mask"],
        "text_mask": arguments["encoder_attention_mask"],
        "mid_residual": arguments["mid_block_additional_residual"],
    }
    for name, value in (arguments["added_cond_kwargs"] or {}).items():
        several = value if isinstance(value, (list, tuple)) else None
        cond |= {f"added_{name}": value} if several is None else numbered(f"added_{name}", several)
    down, within = arguments["down_block_additional_residuals"], arguments["down_intrablock_additional_residuals"]
    if down is not None and cond["mid_residual"] is None and within is None:
        down, within = None, down  # the former argument for a T2I-Adapter's
    cond |= numbered("down_residual", down or ()) | numbered("adapter", within or ())
    options = dict(arguments["cross_attention_kwargs"] or {})
    if options.pop("scale", 1.0) != 1.0:
        raise BadInput("an accelerated network takes no LoRA scale: call pipe.fuse_lora(lora_scale=...) before")
    return arguments["sample"], arguments["timestep"], present({**cond, "attention_options": options or None})


def dit_arguments(arguments: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Of `DiTTransformer2DModel`."""
    if arguments["cross_attention_kwargs"]:
        raise BadInput("cross_attention_kwargs are not supported by an accelerated DiT")
    return arguments["hidden_states"], arguments["timestep"], present({"label": arguments["class_labels"]})


def joint_dit_arguments(arguments: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Of `SD3Transformer2DModel`."""
    for name in ("block_controlnet_hidden_states", "joint_attention_kwargs", "skip_layers"):
        if arguments.get(name):
            raise BadInput(f"{name} is not supported by an accelerated SD3 transformer")
    cond = {"text": arguments["encoder_hidden_states"], "added_text_embeds": arguments["pooled_projections"]}
    return arguments["hidden_states"], arguments["timestep"], present(cond)


ARGUMENT_READERS: dict[str, ArgumentReader] = {
    "UNet2DModel": unet_arguments,
    "UNet2DConditionModel": conditional_unet_arguments,
    "MobileUNet2DConditionModel": conditional_unet_arguments,
    "DiTTransformer2DModel": dit_arguments,
    "SD3Transformer2DModel": joint_dit_arguments,
}


def known_class(kind: type[nn.Module]) -> str | None:
    """The name of the class whose parts hasten calls, if a class of networks is that or has its `forward`."""
    for base in kind.__mro__:
        if base.__name__ in ARGUMENT_READERS and base.__module__.partition(".")[0] in ("diffusers", "hasten"):
            return base.__name__ if vars(base).get("forward") is kind.forward else None
    return None


def argument_reader(kind: type[nn.Module]) -> ArgumentReader:
    """The conversion of the arguments of `forward` for a class of networks with split points.

    Raises:
        BadInput: where they are not those of a network.
    """
    name = known_class(kind)
    if name is not None:
        return ARGUMENT_READERS[name]
    sample, time = input_names(kind)

    def block_arguments(arguments: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
        x = arguments[sample]
        if not isinstance(x, Tensor):
            raise BadInput(
                f"{kind.__name__} takes {sample} as a {type(x).__name__}, not as one tensor: it cannot be split"
            )
        return x, arguments[time], present({key: v for key, v in arguments.items() if key not in (sample, time)})

    return block_arguments


def raw_output(denoiser: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """The raw output of an accelerated denoiser, converted from x0 (up to rounding) where it has no `raw`."""
    if hasattr(type(denoiser), "raw"):
        return denoiser.raw(x, t, **cond)
    _, skip, scale = denoiser.prediction.coefficients(denoiser.schedule.alpha(t), denoiser.schedule.sigma(t))
    return (denoiser(x, t, **cond) - x * float(skip)) / float(scale)


def present(cond: dict[str, Any]) -> dict[str, Any]:
    """The conditions that are not None."""
    return {name: value for name, value in cond.items() if value is not None}


def numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """{name_0: values[0], name_1: values[1], ...}."""
    return {f"{name}_{k}": value for k, value in enumerate(values)}
