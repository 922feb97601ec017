"""The seams that feature reuse needs of a network, and what is done to features (any tree of tensors, batch first)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import BadInput

Condition = dict[str, Any]


class UNetSeam:
    """The encoder with the middle is what is kept, the decoder is what is run. `entry` is the network's input."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def enter(self, x: Tensor, time: Tensor, cond: Condition) -> tuple[Any, Any]:
        return x, self.net.embed(time, **cond)

    def emb(self, x: Tensor, time: Tensor, cond: Condition) -> Any:
        """The embedding for times (s B,) of s queries, the conditions repeated as often; x (B, *S) of any query."""
        return self.net.embed(time, **cond)

    def encode(self, entry: Any, emb: Any) -> Any:
        return self.net.encode(entry, emb)

    def decode(self, features: Any, emb: Any) -> Tensor:
        skips, middle = features
        return self.net.decode(skips, middle, emb)


class TransformerSeam:
    """The first blocks are the encoder, the others with the end the decoder; what is kept are the tokens between."""

    def __init__(self, net: Any, first: int) -> None:
        self.net, self.first, self.depth = net, first, len(net.blocks)

    def enter(self, x: Tensor, time: Tensor, cond: Condition) -> tuple[Any, Any]:
        return self.net.embed(x, time, **cond)

    def emb(self, x: Tensor, time: Tensor, cond: Condition) -> Any:
        return self.net.embed(tiled(x, len(time) // len(x)), time, **cond)[1]

    def encode(self, entry: Any, emb: Any) -> Any:
        return self.net.run(0, self.first, entry, emb)

    def decode(self, features: Any, emb: Any) -> Tensor:
        return self.net.finish(self.net.run(self.first, self.depth, features, emb), emb)


def has(net: nn.Module, *names: str) -> bool:
    return all(hasattr(net, name) for name in names)


def seam(net: nn.Module, who: str, first: int | None) -> UNetSeam | TransformerSeam:
    """The network's seam. first: how many blocks of a transformer are its encoder; None: 18 of 28, as in DiT.

    Raises:
        BadInput: for a network without a seam, and for `first` where it means nothing.
    """
    if has(net, "embed", "run", "finish", "blocks"):
        depth = len(net.blocks)  # type: ignore[arg-type]
        first = round(depth * 18 / 28) if first is None else first
        if not 1 <= first < depth:
            raise BadInput(f"{who}: the encoder is 1 to {depth - 1} of this network's {depth} blocks, found {first}")
        return TransformerSeam(net, first)
    if first is not None:
        raise BadInput(f"{who}: first is for transformers, {type(net).__name__} has no blocks: leave it out")
    if has(net, "embed", "encode", "decode"):
        return UNetSeam(net)
    raise BadInput(
        f"{who}: {type(net).__name__} has no seam: what works is a U-Net with embed, encode and decode, or a "
        "transformer with embed, blocks, run and finish"
    )


def mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with every tensor changed."""
    return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def tiled(tree: Any, many: int, rows: int | None = None) -> Any:
    """Every tensor `many` times along the batch, the copies one after the other. rows: only those with so many rows."""
    if many == 1:
        return tree

    def tile(leaf: Tensor) -> Tensor:
        if leaf.ndim == 0 or (rows is not None and len(leaf) != rows):
            return leaf
        return leaf.repeat(many, *[1] * (leaf.ndim - 1))

    return mapped(tile, tree)


def drawn(older: Any, newer: Any, ratios: list[float]) -> Any:
    """`newer + r (newer - older)` for every ratio, one after the other along the batch: features forecast in time."""

    def line(old: Any, new: Any) -> Any:
        if not isinstance(new, Tensor):
            return new
        if not new.is_floating_point():
            return torch.cat([new] * len(ratios))
        return torch.cat([new if r == 0 else torch.lerp(old, new, 1 + r) for r in ratios])

    return pytree.tree_map(line, older, newer)


def same(a: Any, b: Any) -> bool:
    """Whether two trees of conditions say the same."""
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
