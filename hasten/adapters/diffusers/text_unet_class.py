"""Lazy access to `MobileUNet2DConditionModel`, whose module imports diffusers.

Saved pipelines name the class as `hasten.MobileUNet2DConditionModel`: diffusers loads them where hasten has been
imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .library import diffusers

if TYPE_CHECKING:
    from .text_unet import MobileUNet2DConditionModel

__all__ = ["MobileUNet2DConditionModel", "text_unet_class"]


def __getattr__(name: str) -> Any:
    if name == "MobileUNet2DConditionModel":
        return text_unet_class()
    if name == "ModelMixin":  # diffusers looks here for the base class, which tells how a component is loaded
        return text_unet_class().__mro__[1]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def text_unet_class() -> type[MobileUNet2DConditionModel]:
    """The class `MobileUNet2DConditionModel`.

    Raises:
        BadInput: where `diffusers` is missing or too old.
    """
    diffusers()
    from .text_unet import MobileUNet2DConditionModel

    return MobileUNet2DConditionModel
