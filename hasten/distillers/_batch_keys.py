"""The keys of a batch."""

from __future__ import annotations

from typing import Any

from ..errors import BadInput

# keys of a batch through which the losses of one step pass values to one another
RESERVED_KEYS = ("fake", "t", "z", "chain", "advantage", "k", "structure")


def check_batch_keys(batches: Any) -> None:
    """Refuse batches with keys that distillers use to pass values between losses.

    Raises:
        BadInput: naming the key.
    """
    reserved = sorted(set(RESERVED_KEYS) & set(batches[0]))
    if reserved:
        others = ", ".join(key for key in RESERVED_KEYS if key != reserved[0])
        raise BadInput(
            f"batches have the key {reserved[0]!r}, which distillers use themselves: rename it (to none of {others})"
        )
