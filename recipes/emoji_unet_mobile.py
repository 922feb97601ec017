"""The mobile U-Net of the bundled pipeline `emoji`, at the widths of its plain U-Net."""

from __future__ import annotations

from hasten.nets.text_unet import TextUNet, mobile

WIDTHS, HEADS = (48, 96, 128), (2, 4, 4)


def emoji_mobile() -> TextUNet:
    """The untrained network, for latents (8, 16, 16) and a text encoder of width 128."""
    return mobile(WIDTHS, HEADS, in_channels=8, cross_attention_dim=128, norm_num_groups=16)
