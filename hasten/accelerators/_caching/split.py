"""Split points of networks, and operations on features: any tree of tensors with the batch first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import BadInput

__all__ = [
    "BlocksSplit",
    "SplitPoint",
    "TransformerSplit",
    "UNetSplit",
    "has_attributes",
    "map_tensors",
    "repeat_batch",
    "same_conditions",
    "split_point_of",
]

Condition = dict[str, Any]


class UNetSplit:
    """A U-Net split after its middle: encoder and middle are reused, the decoder runs at every model evaluation.

    Args:
        net: with `embed`, `encode` and `decode`.
    """

    def __init__(self, net: Any) -> None:
        self.net = net

    def enter(self, x: Tensor, time: Tensor, cond: Condition) -> tuple[Any, Any]:
        """The encoder's input and the embedding."""
        return x, self.net.embed(time, **cond)

    def emb(self, x: Tensor, time: Tensor, cond: Condition) -> Any:
        """The embedding at several time steps.

        Args:
            x: (B, *S), the input at any of them.
            time: (s B,), of s time steps.
            cond: of one of them, for B rows.
        """
        return self.net.embed(time, **repeat_batch(cond, len(time) // len(x), len(x)))

    def encode(self, entry: Any, emb: Any) -> Any:
        """The features to reuse: skips and middle."""
        return self.net.encode(entry, emb)

    def evaluate(self, entry: Any, emb: Any) -> tuple[Any, Tensor]:
        """The features to reuse, and the raw output."""
        features = self.encode(entry, emb)
        return features, self.decode(features, emb)

    def decode(self, features: Any, emb: Any) -> Tensor:
        """The raw output (B, *S)."""
        skips, middle = features
        return self.net.decode(skips, middle, emb)


class TransformerSplit:
    """A transformer split after its first blocks: their tokens are reused, the other blocks run at every evaluation.

    Args:
        net: with `embed`, `blocks`, `run` and `finish`.
        first: how many blocks are the encoder.
    """

    def __init__(self, net: Any, first: int) -> None:
        self.net, self.first, self.depth = net, first, len(net.blocks)

    def enter(self, x: Tensor, time: Tensor, cond: Condition) -> tuple[Any, Any]:
        """The tokens and the embedding."""
        return self.net.embed(x, time, **cond)

    def emb(self, x: Tensor, time: Tensor, cond: Condition) -> Any:
        """The embedding at several time steps, see `UNetSplit.emb`."""
        count = len(time) // len(x)
        return self.net.embed(repeat_batch(x, count), time, **repeat_batch(cond, count, len(x)))[1]

    def encode(self, entry: Any, emb: Any) -> Any:
        """The features to reuse: the tokens after the first blocks."""
        return self.net.run(0, self.first, entry, emb)

    def evaluate(self, entry: Any, emb: Any) -> tuple[Any, Tensor]:
        """The features to reuse, and the raw output."""
        features = self.encode(entry, emb)
        return features, self.decode(features, emb)

    def decode(self, features: Any, emb: Any) -> Tensor:
        """The raw output (B, *S)."""
        return self.net.finish(self.net.run(self.first, self.depth, features, emb), emb)


class BlocksSplit:
    """A network of which only whole evaluations and those from features are known, split after its first blocks.

    Args:
        net: with `inputs`, `repeated_inputs`, `evaluate_blocks` and `decode_blocks` (`SplitBlocks`).
        first: how many blocks are the encoder; None: of a U-Net.
    """

    def __init__(self, net: Any, first: int | None) -> None:
        self.net, self.first = net, first

    def enter(self, x: Tensor, time: Tensor, cond: Condition) -> tuple[Any, Any]:
        """The inputs, twice."""
        inputs = self.net.inputs(x, time, cond)
        return inputs, inputs

    def emb(self, x: Tensor, time: Tensor, cond: Condition) -> Any:
        """The inputs at several time steps, see `UNetSplit.emb`."""
        return self.net.repeated_inputs(x, time, cond)

    def encode(self, entry: Any, emb: Any) -> Any:
        """The features to reuse: outputs of the first blocks."""
        return self.evaluate(entry, emb)[0]

    def evaluate(self, entry: Any, emb: Any) -> tuple[Any, Tensor]:
        """The features to reuse, and the raw output, in one evaluation."""
        return self.net.evaluate_blocks(self.first, emb)

    def decode(self, features: Any, emb: Any) -> Tensor:
        """The raw output (B, *S)."""
        return self.net.decode_blocks(features, emb)


SplitPoint = UNetSplit | TransformerSplit | BlocksSplit


def has_attributes(net: nn.Module, *names: str) -> bool:
    """Whether a network has all these attributes."""
    return all(hasattr(net, name) for name in names)


def split_point_of(net: nn.Module, who: str, first: int | None) -> SplitPoint:
    """The network's split point.

    Args:
        who: the accelerator, for messages.
        first: how many blocks of a transformer are its encoder; None: 18 of 28, as in DiT.

    Raises:
        BadInput: for a network without a split point, and for `first` of one without blocks.
    """
    any_net: Any = net
    if has_attributes(net, "embed", "run", "finish", "blocks"):
        return TransformerSplit(net, _encoder_depth(len(any_net.blocks), who, first))
    by_blocks = has_attributes(net, "evaluate_blocks", "decode_blocks", "depth")
    if by_blocks and not hasattr(type(net), "evaluate_blocks"):  # a wrapper, which would be bypassed
        raise BadInput(
            f"{who}: this network is split by its blocks, and cannot be compiled or have several time groups too: "
            f"use {who} alone, or quantize with groups=1"
        )
    if by_blocks and any_net.depth is not None:
        return BlocksSplit(net, _encoder_depth(any_net.depth, who, first))
    if first is not None:
        raise BadInput(f"{who}: first is for transformers, {type(net).__name__} has no blocks: do not set it")
    if by_blocks:
        return BlocksSplit(net, None)
    if has_attributes(net, "embed", "encode", "decode"):
        return UNetSplit(net)
    raise BadInput(
        f"{who}: {type(net).__name__} has no split point: supported are a U-Net with embed, encode and decode, and a "
        "transformer with embed, blocks, run and finish"
    )


def _encoder_depth(depth: int, who: str, first: int | None) -> int:
    """How many of `depth` blocks are the encoder: `first`, by default 18 of 28."""
    first = round(depth * 18 / 28) if first is None else first
    if not 1 <= first < depth:
        raise BadInput(f"{who}: the encoder is 1 to {depth - 1} of this network's {depth} blocks, found {first}")
    return first


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with every tensor changed.

    Args:
        change: is called with each tensor.
        tree: any tree of tensors and other values.
    """
    return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def repeat_batch(tree: Any, count: int, rows: int | None = None) -> Any:
    """Every tensor repeated `count` times along the batch, one copy after the other.

    Args:
        rows: repeat only tensors with this many rows; by default all.
    """
    if count == 1:
        return tree

    def repeated(leaf: Tensor) -> Tensor:
        if leaf.ndim == 0 or (rows is not None and len(leaf) != rows):
            return leaf
        return leaf.repeat(count, *[1] * (leaf.ndim - 1))

    return map_tensors(repeated, tree)


def same_conditions(a: Any, b: Any) -> bool:
    """Whether two trees of conditions are equal in structure, shapes, dtypes and values.

    Args:
        a: any tree of tensors and plain values.
        b: another.
    """
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    if len(left) != len(right) or pytree.tree_structure(a) != pytree.tree_structure(b):
        return False
    for one, other in zip(left, right):
        if one is other:
            continue
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
                return False
        elif isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
            return False
    return True
