"""`MobileUNet2DConditionModel`: a `TextUNet` as the network of a pipeline of `diffusers`.

This module imports diffusers; import it through `text_unet_class.text_unet_class`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from ...errors import BadInput, check_choice
from ...nets.text_unet import TextUNet, sd_like_table

__all__ = ["MobileUNet2DConditionModel"]


class MobileUNet2DConditionModel(ModelMixin, TextUNet, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """`hasten.nets.text_unet.TextUNet` in place of a pipeline's `UNet2DConditionModel`.

    `StableDiffusionPipeline(unet=...)` runs with it, `save_pretrained` writes it, and LoRA layers load into it. Saved
    pipelines name it as `hasten.MobileUNet2DConditionModel`: diffusers loads them where hasten has been imported. The
    parameters have the names of a `TextUNet`'s.

    Args:
        sample_size: height and width of the samples, one number where they are equal; it takes other sizes too.
        in_channels, out_channels, levels, middle, cross_attention_dim, norm_num_groups, time_cond_proj_dim: see
            `TextUNet`. Default: the table of Stable Diffusion 1.

    Raises:
        BadInput: for a table, widths or channels that are not valid.

    References:
        Zhao et al. 2023, arXiv:2311.16567.
    """

    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Any = None

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int | None = None,
        levels: Sequence[Mapping[str, Any]] | None = None,
        middle: Mapping[str, Any] | None = None,
        cross_attention_dim: int = 768,
        norm_num_groups: int = 32,
        time_cond_proj_dim: int | None = None,
    ) -> None:
        if (levels is None) != (middle is None):
            raise BadInput("a U-Net's table is levels= and middle=: give both, or none for Stable Diffusion's")
        rows: Any = levels
        center: Any = middle
        if levels is None:
            rows, center = sd_like_table((320, 640, 1280, 1280))
        TextUNet.__init__(
            self,
            rows,
            center,
            in_channels=in_channels,
            out_channels=out_channels,
            cross_attention_dim=cross_attention_dim,
            norm_num_groups=norm_num_groups,
            time_cond_proj_dim=time_cond_proj_dim,
        )
        plain = {key: self._settings[key] for key in ("levels", "middle", "out_channels")}
        ConfigMixin.register_to_config(self, **plain)

    @property
    def config(self) -> Any:
        """The constructor's arguments."""
        return self._internal_dict

    @classmethod
    def from_text_unet(cls, net: TextUNet, sample_size: int | Sequence[int]) -> MobileUNet2DConditionModel:
        """The same network with the same weights, which it shares with `net`.

        Args:
            net: the network.
            sample_size: height and width of the samples, one number where they are equal.
        """
        with torch.device("meta"):
            new = cls(sample_size, **net.config)
        new.load_state_dict(net.state_dict(keep_vars=True), assign=True)
        return new.train(net.training)

    def text_unet(self) -> TextUNet:
        """The same network, without diffusers, with the same weights, which it shares."""
        with torch.device("meta"):
            net = TextUNet(**self._settings)
        net.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return net.train(self.training)

    def forward(  # type: ignore[override]  # the signature of UNet2DConditionModel
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: None = None,
        down_block_additional_residuals: None = None,
        mid_block_additional_residual: None = None,
        down_intrablock_additional_residuals: None = None,
        encoder_attention_mask: None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Raw output at noisy samples.

        Args:
            sample: (B, C, H, W).
            timestep: 0 to 999, () or (B,).
            encoder_hidden_states: (B, L, D), the text encoder's output.
            timestep_cond: (B, time_cond_proj_dim), the embedded guidance scale, where it is an input.
            class_labels, attention_mask, added_cond_kwargs, down_block_additional_residuals,
                mid_block_additional_residual, down_intrablock_additional_residuals, encoder_attention_mask: None: it
                takes no conditions but the text.
            cross_attention_kwargs: None, or {"scale": 1}.
            return_dict: return an output object, else a tuple (sample,).

        Raises:
            BadInput: for other conditions.
        """
        refused = {
            "class_labels": class_labels,
            "attention_mask": attention_mask,
            "added_cond_kwargs": added_cond_kwargs or None,
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "encoder_attention_mask": encoder_attention_mask,
        }
        for name, value in refused.items():
            if value is not None:
                raise BadInput(f"a MobileUNet2DConditionModel takes no {name}: its only condition is the text")
        options = dict(cross_attention_kwargs or {})
        if options.pop("scale", 1.0) != 1.0:
            raise BadInput("a MobileUNet2DConditionModel takes no LoRA scale: use pipe.set_adapters(names, weights)")
        for name in options:
            check_choice("cross_attention_kwargs", name, ("scale",))
        time = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        raw = TextUNet.forward(self, sample, time, encoder_hidden_states, timestep_cond)
        return UNet2DConditionOutput(sample=raw) if return_dict else (raw,)


# diffusers imports no library that a folder names: it must be one that a user has imported, `import hasten`
MobileUNet2DConditionModel.__module__ = __name__.partition(".")[0]
