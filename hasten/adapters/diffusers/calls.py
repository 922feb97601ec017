"""The arguments of each network's `forward` as x, a time and hasten's names for the conditions; and its answer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import BadInput

__all__ = ["RESIDUAL_PREFIXES", "ARGUMENT_READERS", "network_output", "raw_output"]

RESIDUAL_PREFIXES = ("down_residual_", "mid_residual", "adapter_")
ArgumentReader = Callable[[dict[str, Any]], tuple[Tensor, Any, dict[str, Any]]]


def network_output(net: nn.Module, raw: Tensor) -> Any:
    """The output object of the network's own forward."""
    module = importlib.import_module(type(net).__module__)
    for name in ("UNet2DOutput", "UNet2DConditionOutput", "Transformer2DModelOutput"):
        if hasattr(module, name):
            return getattr(module, name)(sample=raw)
    raise BadInput(f"the output of {type(net).__name__} is not known: call it with return_dict=False")


# From the arguments of each network's forward: x, the time, and hasten's names for the conditions (see `_seams`).


def unet_arguments(given: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    return given["sample"], given["timestep"], present({"label": given["class_labels"]})


def conditional_unet_arguments(given: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    cond: dict[str, Any] = {
        "text": given["encoder_hidden_states"], "label": given["class_labels"],
        "timestep_cond": given["timestep_cond"], "mask": given["attention_mask"],
        "text_mask": given["encoder_attention_mask"], "mid_residual": given["mid_block_additional_residual"],
    }  # fmt: skip
    for name, value in (given["added_cond_kwargs"] or {}).items():
        several = value if isinstance(value, (list, tuple)) else None
        cond |= {f"added_{name}": value} if several is None else numbered(f"added_{name}", several)
    down, within = given["down_block_additional_residuals"], given["down_intrablock_additional_residuals"]
    if down is not None and cond["mid_residual"] is None and within is None:
        down, within = None, down  # an old way to hand over a T2I-Adapter's
    cond |= numbered("down_residual", down or ()) | numbered("adapter", within or ())
    options = dict(given["cross_attention_kwargs"] or {})
    if options.pop("scale", 1.0) != 1.0:
        raise BadInput("a LoRA scale cannot be given to an accelerated network: pipe.fuse_lora(lora_scale=...) before")
    return given["sample"], given["timestep"], present({**cond, "attention_options": options or None})


def dit_arguments(given: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    if given["cross_attention_kwargs"]:
        raise BadInput("cross_attention_kwargs are not known to an accelerated DiT")
    return given["hidden_states"], given["timestep"], present({"label": given["class_labels"]})


def joint_dit_arguments(given: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    for name in ("block_controlnet_hidden_states", "joint_attention_kwargs", "skip_layers"):
        if given.get(name):
            raise BadInput(f"{name} is not known to an accelerated SD3 transformer")
    cond = {"text": given["encoder_hidden_states"], "added_text_embeds": given["pooled_projections"]}
    return given["hidden_states"], given["timestep"], present(cond)


ARGUMENT_READERS: dict[str, ArgumentReader] = {
    "UNet2DModel": unet_arguments, "UNet2DConditionModel": conditional_unet_arguments, "DiTTransformer2DModel": dit_arguments,
    "SD3Transformer2DModel": joint_dit_arguments,
}  # fmt: skip


def raw_output(denoiser: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """The raw output of an accelerated denoiser; of one that only says x0, what it amounts to (up to rounding)."""
    if hasattr(type(denoiser), "raw"):
        return denoiser.raw(x, t, **cond)
    _, skip, scale = denoiser.prediction.coefficients(denoiser.schedule.alpha(t), denoiser.schedule.sigma(t))
    return (denoiser(x, t, **cond) - x * float(skip)) / float(scale)


def present(cond: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cond.items() if value is not None}


def numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_{k}": value for k, value in enumerate(values)}
