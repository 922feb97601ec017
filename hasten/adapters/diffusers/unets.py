"""Split points of the U-Nets of `diffusers`: `embed`, `encode`, `decode`, and the shallow part of some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import BadInput
from .block_layers import DOWN_BLOCKS, UP_BLOCKS, BlockLayers
from .guidance_input import TakesGuidance
from .split_network import Embeddings, SplitNetwork, as_dtype, dtype_of, guidance_features

__all__ = ["KINDS", "SplitConditionalUNet", "SplitUNet"]

CONDITIONS = ("text", "label", "guidance", "timestep_cond", "mask", "text_mask", "mid_residual", "attention_options")
PREFIXES = ("added_", "down_residual_", "adapter_")
Carry = dict[str, Any]  # state of the contracting half beside its features: remaining adapters, NCSN++'s image


class _SplitUNet(SplitNetwork):
    """The order of the parts, which both kinds share. Subclasses call each part with its arguments."""

    def embed(self, time: Tensor, **cond: Any) -> Embeddings:
        """Embeddings of time (B,) and conditions."""
        raise NotImplementedError

    def encode(self, x: Tensor, emb: Embeddings) -> tuple[list[Tensor], Tensor]:
        """The contracting half and the middle block: (skips, middle), with a ControlNet's residuals."""
        carry: Carry = {"adapters": emb.several("adapter")}
        x = self._stem(x, emb, carry)
        skips = [x]
        for block in self._parts.down_blocks:
            x, more = self._down(block, x, emb, carry)
            skips += more
        return self._controlled(skips, emb), self._middle(x, emb, carry)

    def decode(self, skips: list[Tensor], middle: Tensor, emb: Embeddings) -> Tensor:
        """The expanding half: raw output from `encode`'s features, with embeddings that may be of another time."""
        return self._head(*self._ups(list(skips), middle, emb, 0, len(self._parts.up_blocks)), emb)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """Raw output (B, *S) at noisy x (B, *S)."""
        emb = self.embed(time, **cond)
        return self.decode(*self.encode(x, emb), emb)

    def _ups(
        self, skips: list[Tensor], x: Tensor, emb: Embeddings, first: int, last: int, part: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """The up blocks first to last - 1, which take skips from the end of the list; also NCSN++'s output image.

        Args:
            part: of the one up block, in its place.
        """
        image: Tensor | None = None
        doublings = 2 ** getattr(self.net, "num_upsamplers", 0)
        uneven = any(side % doublings for side in skips[0].shape[-2:])
        blocks = list(self._parts.up_blocks)[first:last] if part is None else [part]
        if blocks and getattr(blocks[0], "b1", None):
            x = x.clone()  # FreeU scales it in place, and it may be cached for the next evaluation
        for block in blocks:
            count = len(block.resnets)
            mine = tuple(skips[-count:])
            del skips[-count:]
            x, image = self._up(block, x, mine, emb, skips[-1].shape[2:] if uneven and skips else None, image)
        return x, image

    def _controlled(self, skips: list[Tensor], emb: Embeddings, first: int = 0) -> list[Tensor]:
        """The skips, of which the first has index `first`, with the residuals of a ControlNet."""
        if emb["mid_residual"] is None:
            return skips
        return [skip + residual for skip, residual in zip(skips, emb.several("down_residual")[first:])]

    # the shallow part, public in `_Shallow`

    def _shallow_encode(self, x: Tensor, emb: Embeddings, branch: int | None) -> list[Tensor]:
        """See `_Shallow.shallow_encode`."""
        x, block = self._stem(x, emb, {"adapters": []}), self._parts.down_blocks[0]
        count = len(block.resnets)
        branch = count if branch is None else branch
        if branch == count and emb.several("adapter"):
            raise BadInput(
                f"deep_cache adds a T2I-Adapter's residuals at key steps: use it with branch=0 to {count - 1}, or "
                "remove the adapter"
            )
        more = self._down(BlockLayers(block, 0, branch), x, emb, {"adapters": []})[1] if branch else ()
        return [x, *more]

    def _deep(self, first: list[Tensor], emb: Embeddings) -> Tensor:
        """See `_Shallow.deep`."""
        carry: Carry = {"adapters": emb.several("adapter")}
        x, more = self._down(BlockLayers(self._parts.down_blocks[0], len(first) - 1), first[-1], emb, carry)
        skips = [*more]
        for down in list(self._parts.down_blocks)[1:]:
            x, more = self._down(down, x, emb, carry)
            skips += more
        middle = self._middle(x, emb, carry)
        skips = self._controlled(skips, emb, len(first))
        last = len(self._parts.up_blocks)
        x = self._ups([*first, *skips], middle, emb, 0, last - 1)[0]
        block = self._parts.up_blocks[-1]
        rest = len(block.resnets) - len(first)
        if rest:
            x = self._ups([*first, *skips[:rest]], x, emb, last - 1, last, BlockLayers(block, 0, rest))[0]
        return x

    def _shallow_decode(self, first: list[Tensor], up_input: Tensor, emb: Embeddings) -> Tensor:
        """See `_Shallow.shallow_decode`."""
        last, block = len(self._parts.up_blocks), self._parts.up_blocks[-1]
        rest = len(block.resnets) - len(first)
        part = BlockLayers(block, rest) if rest else block
        return self._head(*self._ups(self._controlled(list(first), emb), up_input, emb, last - 1, last, part), emb)

    # calls of the parts

    def _stem(self, x: Tensor, emb: Embeddings, carry: Carry) -> Tensor:
        """The input convolution."""
        raise NotImplementedError

    def _down(self, block: Any, x: Tensor, emb: Embeddings, carry: Carry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A down block: its output and its skips."""
        raise NotImplementedError

    def _middle(self, x: Tensor, emb: Embeddings, carry: Carry) -> Tensor:
        """The middle block."""
        raise NotImplementedError

    def _up(
        self, block: Any, x: Tensor, skips: tuple[Tensor, ...], emb: Embeddings, size: Any, image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """An up block: its output and NCSN++'s image."""
        raise NotImplementedError

    def _head(self, x: Tensor, image: Tensor | None, emb: Embeddings) -> Tensor:
        """The output layers."""
        raise NotImplementedError


class SplitUNet(_SplitUNet):
    """`UNet2DModel` with split points. Conditions: `label`."""

    def embed(self, time: Tensor, **cond: Any) -> Embeddings:
        """The embedding of time and class, and the time itself (by which NCSN++ divides its output)."""
        self._check_conditions(cond, ("label",))
        net, label, dtype = self._parts, cond.get("label"), dtype_of(self.net)
        time = time.long() if isinstance(net.time_proj, nn.Embedding) else time
        emb = net.time_embedding(net.time_proj(time).to(dtype))
        if net.class_embedding is not None:
            if label is None:
                raise BadInput(f"{type(net).__name__} is conditional: it needs label=, the classes")
            label = net.time_proj(label).to(dtype) if net.config.class_embed_type == "timestep" else label
            emb = emb + net.class_embedding(label).to(dtype)
        elif label is not None:
            raise BadInput(f"this {type(net).__name__} has no classes: do not pass label=")
        return Embeddings({"time": emb, "clock": time})

    def _stem(self, x: Tensor, emb: Embeddings, carry: Carry) -> Tensor:
        x = 2 * x - 1.0 if self.config.center_input_sample else x
        carry["image"] = x  # which NCSN++ downsamples along with its features
        return self._parts.conv_in(x)

    def _down(self, block: Any, x: Tensor, emb: Embeddings, carry: Carry) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not hasattr(block, "skip_conv"):
            return block(hidden_states=x, temb=emb["time"])
        x, more, carry["image"] = block(hidden_states=x, temb=emb["time"], skip_sample=carry["image"])
        return x, more

    def _middle(self, x: Tensor, emb: Embeddings, carry: Carry) -> Tensor:
        return x if self._parts.mid_block is None else self._parts.mid_block(x, emb["time"])

    def _up(
        self, block: Any, x: Tensor, skips: tuple[Tensor, ...], emb: Embeddings, size: Any, image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if hasattr(block, "skip_conv"):
            return block(x, skips, emb["time"], image)
        return block(x, skips, emb["time"]), image

    def _head(self, x: Tensor, image: Tensor | None, emb: Embeddings) -> Tensor:
        x = self._parts.conv_out(self._parts.conv_act(self._parts.conv_norm_out(x)))
        x = x if image is None else x + image
        if self.config.time_embedding_type == "fourier":
            x = x / emb["clock"].reshape(len(x), *[1] * (x.ndim - 1))
        return self._without_variance(x)


class SplitConditionalUNet(TakesGuidance, _SplitUNet):
    """`UNet2DConditionModel` (Stable Diffusion 1, 2, XL, ...) with split points.

    Conditions: see `split_network`; `attention_options` is its `cross_attention_kwargs`, without tensors.
    """

    def embed(self, time: Tensor, **cond: Any) -> Embeddings:
        """Embeddings of all that the blocks read except x."""
        net, dtype = self._parts, dtype_of(self.net)
        cond = {**cond, **self.side_inputs.conditions}
        cond = {key: value if key == "guidance" else as_dtype(value, dtype) for key, value in cond.items()}
        self._check_conditions(cond, CONDITIONS, PREFIXES)
        text, timestep_cond = cond.get("text"), cond.get("timestep_cond")
        if text is None:
            raise BadInput(f"{type(net).__name__} needs text=, the text encoder's output for a prompt (B, L, D)")
        options = cond.get("attention_options") or {}
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(options)):
            raise BadInput(
                f"cross_attention_kwargs with tensors are not supported with split points, found {sorted(options)}"
            )
        like = time.new_empty((len(time), 0), dtype=dtype)  # only its length, dtype and device are used
        if timestep_cond is None and cond.get("guidance") is not None:
            timestep_cond = guidance_features(cond["guidance"], int(self.config.time_cond_proj_dim)).to(dtype)
        emb = net.time_embedding(net.get_time_embed(sample=like, timestep=time), timestep_cond)
        classes = net.get_class_embed(sample=like, class_labels=cond.get("label"))
        if classes is not None:
            emb = torch.cat([emb, classes], dim=-1) if self.config.class_embeddings_concat else emb + classes
        added = _added(cond)
        augmented, hint = net.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added), None
        if self.config.addition_embed_type == "image_hint":
            augmented, hint = augmented
        emb = emb if augmented is None else emb + augmented
        emb = emb if net.time_embed_act is None else net.time_embed_act(emb)
        text = net.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
        text, image_embeds = (text[0], text[1]) if isinstance(text, tuple) else (text, ())
        residuals = {key: value for key, value in cond.items() if key.startswith(("down_residual_", "adapter_"))}
        images = {f"image_{k}": image for k, image in enumerate(image_embeds)}
        masks = {key: _bias(cond.get(key), dtype) for key in ("mask", "text_mask")}
        tensors = {"time": emb, "text": text, "hint": hint, "mid_residual": cond.get("mid_residual")}
        return Embeddings({**tensors, **masks, **images, **residuals}, dict(options))

    def _attention_arguments(self, emb: Embeddings) -> dict[str, Any]:
        """Keyword arguments of blocks with cross-attention."""
        text, images = emb["text"], emb.several("image")
        return {
            "encoder_hidden_states": (text, images) if images else text,
            "attention_mask": emb["mask"],
            "encoder_attention_mask": emb["text_mask"],
            "cross_attention_kwargs": dict(emb.options) or None,
        }

    def _stem(self, x: Tensor, emb: Embeddings, carry: Carry) -> Tensor:
        x = 2 * x - 1.0 if self.config.center_input_sample else x
        return self._parts.conv_in(x if emb["hint"] is None else torch.cat([x, emb["hint"]], dim=1))

    def _down(self, block: Any, x: Tensor, emb: Embeddings, carry: Carry) -> tuple[Tensor, tuple[Tensor, ...]]:
        adapter = carry["adapters"].pop(0) if carry["adapters"] else None
        if getattr(block, "has_cross_attention", False):
            more = {} if adapter is None else {"additional_residuals": adapter}
            return block(hidden_states=x, temb=emb["time"], **self._attention_arguments(emb), **more)
        x, skips = block(hidden_states=x, temb=emb["time"])
        if adapter is not None:
            x += adapter  # in place, as in diffusers: the last skip is the same tensor
        return x, skips

    def _middle(self, x: Tensor, emb: Embeddings, carry: Carry) -> Tensor:
        block = self._parts.mid_block
        if block is not None:
            crossed = getattr(block, "has_cross_attention", False)
            x = block(x, emb["time"], **self._attention_arguments(emb)) if crossed else block(x, emb["time"])
            if carry["adapters"] and x.shape == carry["adapters"][0].shape:
                x = x + carry["adapters"].pop(0)
        return x if emb["mid_residual"] is None else x + emb["mid_residual"]

    def _up(
        self, block: Any, x: Tensor, skips: tuple[Tensor, ...], emb: Embeddings, size: Any, image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        arguments = {"hidden_states": x, "temb": emb["time"], "res_hidden_states_tuple": skips, "upsample_size": size}
        crossed = getattr(block, "has_cross_attention", False)
        return (block(**arguments, **self._attention_arguments(emb)) if crossed else block(**arguments)), image

    def _head(self, x: Tensor, image: Tensor | None, emb: Embeddings) -> Tensor:
        if self._parts.conv_norm_out is not None:
            x = self._parts.conv_act(self._parts.conv_norm_out(x))
        return self._without_variance(self._parts.conv_out(x))


class _Shallow(_SplitUNet):
    """DeepCache's split point: forward == shallow_decode(s, deep(s, emb), emb) with s = shallow_encode(x, emb, b)."""

    @property
    def branches(self) -> int:
        """The largest `branch`: the layers of the first down block."""
        return len(self._parts.down_blocks[0].resnets)

    def shallow_encode(self, x: Tensor, emb: Embeddings, branch: int | None = None) -> list[Tensor]:
        """The first `branch + 1` skips, without a ControlNet's residuals.

        Args:
            x: (B, *S).
            emb: what `embed` returned.
            branch: how many layers of the first down block run, 0 (`conv_in` alone) to `branches`. Default: all.

        Raises:
            BadInput: for another `branch`, and for a T2I-Adapter's residuals where all layers run.
        """
        if branch is not None and not 0 <= branch <= self.branches:
            raise BadInput(f"branch must be 0 to {self.branches}, found {branch}")
        return self._shallow_encode(x, emb, branch)

    def deep(self, first: list[Tensor], emb: Embeddings) -> Tensor:
        """Everything between `shallow_encode` and `shallow_decode`: the input of the last layers."""
        return self._deep(first, emb)

    def shallow_decode(self, first: list[Tensor], up_input: Tensor, emb: Embeddings) -> Tensor:
        """The last up block's last layers, one for each of the first skips, and the output layers: raw output."""
        return self._shallow_decode(first, up_input, emb)


class SplitShallowUNet(SplitUNet, _Shallow):
    """`SplitUNet` whose first down block can be split."""


class SplitShallowConditionalUNet(SplitConditionalUNet, _Shallow):
    """`SplitConditionalUNet` whose first down block can be split."""


def unet(net: Any, with_variance: bool = False) -> SplitNetwork:
    """A `UNet2DModel` with split points."""
    return (SplitShallowUNet if _has_shallow_split(net) else SplitUNet)(net, with_variance)


def conditional_unet(net: Any, with_variance: bool = False) -> SplitNetwork:
    """A `UNet2DConditionModel` with split points."""
    return (SplitShallowConditionalUNet if _has_shallow_split(net) else SplitConditionalUNet)(net, with_variance)


KINDS = {"UNet2DModel": unet, "UNet2DConditionModel": conditional_unet}


def _has_shallow_split(net: Any) -> bool:
    """Whether the last up block has a layer for each skip of the first down block before its downsampler."""
    first, last = net.down_blocks[0], net.up_blocks[-1]
    known = type(first).__name__ in DOWN_BLOCKS and type(last).__name__ in UP_BLOCKS
    return known and bool(getattr(first, "downsamplers", None)) and len(last.resnets) == len(first.resnets) + 1


def _added(cond: dict[str, Any]) -> dict[str, Any] | None:
    """`added_cond_kwargs` of the conditions added_NAME; added_NAME_0, _1, ... are a list."""
    added: dict[str, Any] = {}
    for key in sorted(key for key in cond if key.startswith("added_")):
        name, _, number = key.removeprefix("added_").rpartition("_")
        if number.isdigit():
            added.setdefault(name, []).append(cond[key])
        else:
            added[key.removeprefix("added_")] = cond[key]
    return added or None


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask (B, L) of 0 and 1 as an additive bias of attention scores, (B, 1, L)."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
