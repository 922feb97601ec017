"""Embedded time and conditions of a network, which its encoder and decoder read."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

__all__ = ["Embeddings"]


class Embeddings:
    """Embedded time and conditions of a network.

    `tree_map` of torch's pytree maps over the tensors, so that they can be repeated or split along the batch.

    Args:
        tensors: by name, the batch first; those that are None are dropped.
        options: values without a batch.
    """

    def __init__(self, tensors: dict[str, Any], options: dict[str, Any] | None = None) -> None:
        self.tensors = {name: value for name, value in tensors.items() if value is not None}
        self.options = options or {}

    def __getitem__(self, name: str) -> Any:
        return self.tensors.get(name)

    def several(self, name: str) -> list[Any]:
        """The list of tensors name_0, name_1, ..."""
        values: list[Any] = []
        while (value := self.tensors.get(f"{name}_{len(values)}")) is not None:
            values.append(value)
        return values


def _flatten(emb: Embeddings) -> tuple[list[Any], Any]:
    """Flatten for torch's pytree."""
    return list(emb.tensors.values()), (tuple(emb.tensors), emb.options)


def _unflatten(values: Any, context: Any) -> Embeddings:
    """Unflatten for torch's pytree."""
    return Embeddings(dict(zip(context[0], values)), context[1])


pytree.register_pytree_node(Embeddings, _flatten, _unflatten)
