"""Some of the layers of a block of a U-Net of `diffusers`, called as the block is: DeepCache's split inside a block."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import BadInput
from .network import diffusers_hooks, replaced_forward

__all__ = ["DOWN_BLOCKS", "UP_BLOCKS", "BlockLayers"]

# Blocks whose forward runs layer k of each of its lists for k = 0, 1, ..., and then its down- or upsamplers.
DOWN_BLOCKS = {
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
}
UP_BLOCKS = {
    "UpBlock2D",
    "AttnUpBlock2D",
    "CrossAttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "SimpleCrossAttnUpBlock2D",
}
ENDS = ("downsamplers", "upsamplers")


class BlockLayers:
    """Layers `first` to `last` - 1 of a block, by the block's own `forward`.

    All other attributes are the block's at the time of the call: FreeU, LoRA layers and attention processors that are
    set later take effect. Hooks of `diffusers` around the block (group offloading) run.

    Args:
        block: of one of the classes `DOWN_BLOCKS` and `UP_BLOCKS`.
        first: the first layer.
        last: after the last layer; None: all that follow, and the block's down- or upsamplers.
    """

    def __init__(self, block: nn.Module, first: int, last: int | None = None) -> None:
        self.block, self.first, self.last = block, first, last

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.block, name)
        if name in ENDS:
            return value if self.last is None else None
        if isinstance(value, nn.ModuleList) and len(value) == len(self.block.resnets):  # type: ignore[arg-type]
            return list(value)[self.first : self.last]
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's `forward` returns: of a down block the output and the skips, of an up block the output.

        Raises:
            BadInput: for a block whose `forward` was replaced, which would not run.
        """
        block: Any = self.block
        if "forward" not in vars(block):
            return type(block).forward(self, *args, **kwargs)
        if replaced_forward(block) is not None:
            raise BadInput(
                f"deep_cache runs a part of the layers of {type(block).__name__}, whose forward was replaced: remove "
                "that first"
            )
        hooks = diffusers_hooks(block)
        for hook in hooks:
            args, kwargs = hook.pre_forward(block, *args, **kwargs)
        output = type(block).forward(self, *args, **kwargs)
        for hook in reversed(hooks):
            output = hook.post_forward(block, output)
        return output
