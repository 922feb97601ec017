"""Seams for the U-Nets of `diffusers`: `embed`, `encode` and `decode`, and the shallow part where there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import BadInput
from .split_network import Embeddings, SplitNetwork, dtype_of, guidance_features

__all__ = ["KINDS", "SplitConditionalUNet", "SplitUNet"]

# Down blocks that are residual blocks, with or without attention, and then a downsampler: they can be cut before it.
SHALLOW_BLOCKS = {"DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"}
CONDITIONS = ("text", "label", "guidance", "timestep_cond", "mask", "text_mask", "mid_residual", "attention_options")
PREFIXES = ("added_", "down_residual_", "adapter_")
Aside = dict[str, Any]  # what the contracting half carries beside its features: adapters still to come, an image


class _UNet(SplitNetwork):
    """What both kinds share: the order of the parts. Subclasses say how each part is called."""

    def embed(self, time: Tensor, **cond: Any) -> Embeddings:
        """Time (B,) and conditions as the blocks read them."""
        raise NotImplementedError

    def encode(self, x: Tensor, emb: Embeddings) -> tuple[list[Tensor], Tensor]:
        """The contracting half and the middle: (skips, middle), with what a ControlNet adds to them."""
        aside: Aside = {"adapters": emb.several("adapter")}
        x = self._stem(x, emb, aside)
        skips = [x]
        for block in self.net.down_blocks:
            x, more = self._down(block, x, emb, aside)
            skips += more
        return self._controlled(skips, emb), self._middle(x, emb, aside)

    def decode(self, skips: list[Tensor], middle: Tensor, emb: Embeddings) -> Tensor:
        """The expanding half: what `encode` returned, under an embedding that may be of another time -> raw."""
        return self._head(*self._ups(list(skips), middle, emb, 0, len(self.net.up_blocks)), emb)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """Raw output (B, *S) at noisy x (B, *S)."""
        emb = self.embed(time, **cond)
        return self.decode(*self.encode(x, emb), emb)

    def _ups(
        self, skips: list[Tensor], x: Tensor, emb: Embeddings, first: int, last: int
    ) -> tuple[Tensor, Tensor | None]:
        """The up blocks first..last-1, which take from the end of `skips`; and NCSN++'s image that grows beside x."""
        beside: Tensor | None = None
        doublings = 2 ** getattr(self.net, "num_upsamplers", 0)
        uneven = any(side % doublings for side in skips[0].shape[-2:])
        blocks = list(self.net.up_blocks)[first:last]
        if blocks and getattr(blocks[0], "b1", None):
            x = x.clone()  # FreeU multiplies it where it lies, and it may be kept for the next query
        for block in blocks:
            count = len(block.resnets)
            mine = tuple(skips[-count:])
            del skips[-count:]
            x, beside = self._up(block, x, mine, emb, skips[-1].shape[2:] if uneven and skips else None, beside)
        return x, beside

    def _controlled(self, skips: list[Tensor], emb: Embeddings, first: int = 0) -> list[Tensor]:
        """Skips, of which the first is number `first`, with the residuals of a ControlNet."""
        if emb["mid_residual"] is None:
            return skips
        return [skip + residual for skip, residual in zip(skips, emb.several("down_residual")[first:])]

    # the shallow part, which only some have: see `_Shallow`

    def _shallow_encode(self, x: Tensor, emb: Embeddings) -> list[Tensor]:
        if emb.several("adapter"):
            raise BadInput("the shallow part of this U-Net is not known under a T2I-Adapter: leave DeepCache or it out")
        x = self._stem(x, emb, {"adapters": []})
        block, first = self.net.down_blocks[0], [x]
        for k, resnet in enumerate(block.resnets):
            x = resnet(x, emb["time"])
            if getattr(block, "attentions", None) is not None:
                x = self._attention(block.attentions[k], x, emb)
            first.append(x)
        return first

    def _deep(self, first: list[Tensor], emb: Embeddings) -> Tensor:
        x, block, aside = first[-1], self.net.down_blocks[0], Aside(adapters=[])
        resnet = getattr(block, "downsample_type", "") == "resnet"
        for downsampler in block.downsamplers:
            x = downsampler(x, temb=emb["time"]) if resnet else downsampler(x)
        skips = [x]
        for down in list(self.net.down_blocks)[1:]:
            x, more = self._down(down, x, emb, aside)
            skips += more
        middle = self._middle(x, emb, aside)
        skips = self._controlled(skips, emb, len(first))
        return self._ups([*first, *skips], middle, emb, 0, len(self.net.up_blocks) - 1)[0]

    def _shallow_decode(self, first: list[Tensor], up_input: Tensor, emb: Embeddings) -> Tensor:
        last = len(self.net.up_blocks)
        return self._head(*self._ups(self._controlled(list(first), emb), up_input, emb, last - 1, last), emb)

    # how each part is called

    def _attention(self, attention: nn.Module, x: Tensor, emb: Embeddings) -> Tensor:
        return attention(x)

    def _stem(self, x: Tensor, emb: Embeddings, aside: Aside) -> Tensor:
        raise NotImplementedError

    def _down(self, block: nn.Module, x: Tensor, emb: Embeddings, aside: Aside) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError

    def _middle(self, x: Tensor, emb: Embeddings, aside: Aside) -> Tensor:
        raise NotImplementedError

    def _up(
        self, block: nn.Module, x: Tensor, skips: tuple[Tensor, ...], emb: Embeddings, size: Any, beside: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _head(self, x: Tensor, beside: Tensor | None, emb: Embeddings) -> Tensor:
        raise NotImplementedError


class SplitUNet(_UNet):
    """Seams of `UNet2DModel`. Conditions: `label`."""

    def embed(self, time: Tensor, **cond: Any) -> Embeddings:
        """The embedding of time and class, and the time itself (by which NCSN++ divides)."""
        self._known(cond, ("label",))
        net, label, dtype = self.net, cond.get("label"), dtype_of(self.net)
        time = time.long() if isinstance(net.time_proj, nn.Embedding) else time
        emb = net.time_embedding(net.time_proj(time).to(dtype))
        if net.class_embedding is not None:
            if label is None:
                raise BadInput(f"{type(net).__name__} is conditional: it needs label=, the classes")
            label = net.time_proj(label).to(dtype) if net.config.class_embed_type == "timestep" else label
            emb = emb + net.class_embedding(label).to(dtype)
        elif label is not None:
            raise BadInput(f"this {type(net).__name__} has no classes, so label= means nothing to it")
        return Embeddings({"time": emb, "clock": time})

    def _stem(self, x: Tensor, emb: Embeddings, aside: Aside) -> Tensor:
        x = 2 * x - 1.0 if self.config.center_input_sample else x
        aside["image"] = x  # which NCSN++ halves beside its features
        return self.net.conv_in(x)

    def _down(self, block: nn.Module, x: Tensor, emb: Embeddings, aside: Aside) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not hasattr(block, "skip_conv"):
            return block(hidden_states=x, temb=emb["time"])
        x, more, aside["image"] = block(hidden_states=x, temb=emb["time"], skip_sample=aside["image"])
        return x, more

    def _middle(self, x: Tensor, emb: Embeddings, aside: Aside) -> Tensor:
        return x if self.net.mid_block is None else self.net.mid_block(x, emb["time"])

    def _up(
        self, block: nn.Module, x: Tensor, skips: tuple[Tensor, ...], emb: Embeddings, size: Any, beside: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if hasattr(block, "skip_conv"):
            return block(x, skips, emb["time"], beside)
        return block(x, skips, emb["time"]), beside

    def _head(self, x: Tensor, beside: Tensor | None, emb: Embeddings) -> Tensor:
        x = self.net.conv_out(self.net.conv_act(self.net.conv_norm_out(x)))
        x = x if beside is None else x + beside
        if self.config.time_embedding_type == "fourier":
            x = x / emb["clock"].reshape(len(x), *[1] * (x.ndim - 1))
        return self._kept(x)


class SplitConditionalUNet(_UNet):
    """Seams of `UNet2DConditionModel` (Stable Diffusion 1, 2, XL and their kin).

    Conditions: see `_seams`; `attention_options` is its `cross_attention_kwargs`, without tensors.
    """

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Of a network that reads its guidance scale (a latent consistency model); 1 is no guidance."""
        return None if self.config.time_cond_proj_dim is None else (1.0, 15.0)

    def embed(self, time: Tensor, **cond: Any) -> Embeddings:
        """All that the blocks read but x."""
        cond = {**cond, **self.beside.conditions}
        self._known(cond, CONDITIONS, PREFIXES)
        net, dtype = self.net, dtype_of(self.net)
        text, told = cond.get("text"), cond.get("timestep_cond")
        if text is None:
            raise BadInput(f"{type(net).__name__} needs text=, what its text encoder makes of a prompt (B, L, D)")
        options = cond.get("attention_options") or {}
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(options)):
            raise BadInput(f"cross_attention_kwargs with tensors are not known to the seams, found {sorted(options)}")
        like = time.new_empty((len(time), 0), dtype=dtype)  # these want a sample for its length, dtype and device
        if told is None and cond.get("guidance") is not None:
            told = guidance_features(cond["guidance"], int(self.config.time_cond_proj_dim)).to(dtype)
        emb = net.time_embedding(net.get_time_embed(sample=like, timestep=time), told)
        classes = net.get_class_embed(sample=like, class_labels=cond.get("label"))
        if classes is not None:
            emb = torch.cat([emb, classes], dim=-1) if self.config.class_embeddings_concat else emb + classes
        added = _added(cond)
        more, hint = net.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added), None
        if self.config.addition_embed_type == "image_hint":
            more, hint = more
        emb = emb if more is None else emb + more
        emb = emb if net.time_embed_act is None else net.time_embed_act(emb)
        text = net.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
        text, beside = (text[0], text[1]) if isinstance(text, tuple) else (text, ())
        kept = {key: value for key, value in cond.items() if key.startswith(("down_residual_", "adapter_"))}
        images = {f"image_{k}": image for k, image in enumerate(beside)}
        masks = {key: _bias(cond.get(key), dtype) for key in ("mask", "text_mask")}
        told_all = {"time": emb, "text": text, "hint": hint, "mid_residual": cond.get("mid_residual")}
        return Embeddings({**told_all, **masks, **images, **kept}, dict(options))

    def _reading(self, emb: Embeddings) -> dict[str, Any]:
        """What blocks with cross-attention are given."""
        text, images = emb["text"], emb.several("image")
        return {
            "encoder_hidden_states": (text, images) if images else text,
            "attention_mask": emb["mask"],
            "encoder_attention_mask": emb["text_mask"],
            "cross_attention_kwargs": dict(emb.options) or None,
        }

    def _attention(self, attention: nn.Module, x: Tensor, emb: Embeddings) -> Tensor:
        if not getattr(self.net.down_blocks[0], "has_cross_attention", False):
            return attention(x, **emb.options)
        return attention(x, **self._reading(emb), return_dict=False)[0]

    def _stem(self, x: Tensor, emb: Embeddings, aside: Aside) -> Tensor:
        x = 2 * x - 1.0 if self.config.center_input_sample else x
        return self.net.conv_in(x if emb["hint"] is None else torch.cat([x, emb["hint"]], dim=1))

    def _down(self, block: nn.Module, x: Tensor, emb: Embeddings, aside: Aside) -> tuple[Tensor, tuple[Tensor, ...]]:
        adapter = aside["adapters"].pop(0) if aside["adapters"] else None
        if getattr(block, "has_cross_attention", False):
            more = {} if adapter is None else {"additional_residuals": adapter}
            return block(hidden_states=x, temb=emb["time"], **self._reading(emb), **more)
        x, skips = block(hidden_states=x, temb=emb["time"])
        if adapter is not None:
            x += adapter  # in place, as diffusers does: the last skip is this very tensor
        return x, skips

    def _middle(self, x: Tensor, emb: Embeddings, aside: Aside) -> Tensor:
        block = self.net.mid_block
        if block is not None:
            crossed = getattr(block, "has_cross_attention", False)
            x = block(x, emb["time"], **self._reading(emb)) if crossed else block(x, emb["time"])
            if aside["adapters"] and x.shape == aside["adapters"][0].shape:
                x = x + aside["adapters"].pop(0)
        return x if emb["mid_residual"] is None else x + emb["mid_residual"]

    def _up(
        self, block: nn.Module, x: Tensor, skips: tuple[Tensor, ...], emb: Embeddings, size: Any, beside: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        told = {"hidden_states": x, "temb": emb["time"], "res_hidden_states_tuple": skips, "upsample_size": size}
        crossed = getattr(block, "has_cross_attention", False)
        return (block(**told, **self._reading(emb)) if crossed else block(**told)), beside

    def _head(self, x: Tensor, beside: Tensor | None, emb: Embeddings) -> Tensor:
        if self.net.conv_norm_out is not None:
            x = self.net.conv_act(self.net.conv_norm_out(x))
        return self._kept(self.net.conv_out(x))


class _Shallow(_UNet):
    """DeepCache's seam: forward == shallow_decode(s, deep(s, emb), emb) with s = shallow_encode(x, emb)."""

    def shallow_encode(self, x: Tensor, emb: Embeddings) -> list[Tensor]:
        """All of the first down block but its end: the skips of the last up block, without a ControlNet's part."""
        return self._shallow_encode(x, emb)

    def deep(self, first: list[Tensor], emb: Embeddings) -> Tensor:
        """Everything between: what enters the last up block."""
        return self._deep(first, emb)

    def shallow_decode(self, first: list[Tensor], up_input: Tensor, emb: Embeddings) -> Tensor:
        """The last up block and the head -> raw."""
        return self._shallow_decode(first, up_input, emb)


class ShallowUNet(SplitUNet, _Shallow):
    """`UNet` whose first down block can be cut."""


class ShallowConditionalUNet(SplitConditionalUNet, _Shallow):
    """`ConditionalUNet` whose first down block can be cut."""


def unet(net: Any, whole: bool = False) -> SplitNetwork:
    """The seams of a `UNet2DModel`."""
    return (ShallowUNet if _has_shallow_split(net) else SplitUNet)(net, whole)


def conditional_unet(net: Any, whole: bool = False) -> SplitNetwork:
    """The seams of a `UNet2DConditionModel`."""
    return (ShallowConditionalUNet if _has_shallow_split(net) else SplitConditionalUNet)(net, whole)


KINDS = {"UNet2DModel": unet, "UNet2DConditionModel": conditional_unet}


def _has_shallow_split(net: Any) -> bool:
    """Whether the last up block needs what the first down block makes before its downsampler, and nothing else."""
    block = net.down_blocks[0]
    fits = len(net.up_blocks[-1].resnets) == len(block.resnets) + 1
    return type(block).__name__ in SHALLOW_BLOCKS and bool(getattr(block, "downsamplers", None)) and fits


def _added(cond: dict[str, Any]) -> dict[str, Any] | None:
    """`added_cond_kwargs`: added_NAME, of which added_image_embeds_0, _1, ... are a list."""
    found: dict[str, Any] = {}
    for key in sorted(key for key in cond if key.startswith("added_")):
        name, _, number = key.removeprefix("added_").rpartition("_")
        if number.isdigit():
            found.setdefault(name, []).append(cond[key])
        else:
            found[key.removeprefix("added_")] = cond[key]
    return found or None


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of 0 and 1 as what is added to the scores of attention, (B, 1, L)."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
