"""`SuperResolution`: enlarge images of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BadInput
from ...loading import load
from ...model.model import Model
from ...plan.config import SamplingConfig
from .consistency import ConsistencyResult, measure_consistency
from .enlarge_picture import UpscaleRequest, enlarge_picture, to_tensor
from .pictures import Picture, picture_of, read_picture
from .tile_store import to_unit

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ...plan.config import SamplingOptions

__all__ = ["SuperResolution", "check_super_resolution"]


def check_super_resolution(model: Model, factor: int | None = None) -> int:
    """The factor of a model of super-resolution.

    Args:
        model: to check.
        factor: the wanted one, or None.

    Raises:
        BadInput: for another model, and another factor.
    """
    own = model.source_factor if model.source_shape is not None else 1
    if own < 2:
        other = "it draws samples from noise" if model.source_shape is None else "hasten translate applies it"
        raise BadInput(
            f"{model.name} is no model of super-resolution ({other}): hasten train --task super-resolution trains one"
        )
    if factor is not None and factor != own:
        raise BadInput(f"{model.name} enlarges images {own} times, not {factor}: name a model of factor {factor}")
    return own


class SuperResolution:
    """Enlargement of images of any size and kind by a diffusion model that reads small images.

    Args:
        model: a `Model`, or what `hasten.load` takes: the name of a bundled one, or a folder.
        device: of a model that is loaded. Default: the CPU.

    Raises:
        BadInput: for a model of another task.
    """

    def __init__(self, model: Model | str | Path, device: Any = None) -> None:
        self.model = model if isinstance(model, Model) else load(model, device)
        self.factor = check_super_resolution(self.model)

    def upscale(
        self,
        images: Any,
        *,
        seed: int = 0,
        tile: int | None = None,
        overlap: int | None = None,
        consistent: bool = False,
        batch_size: int = 8,
        config: SamplingConfig | None = None,
        progress: Callable[[float], Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Enlarged images, each `factor` times as wide and high, of the type of the small ones.

        An image that is larger than a tile is enlarged in overlapping tiles, which share one noise and are blended.

        Args:
            images: one or a list of: a PIL image, a path (which gives a PIL image; of 16-bit colours, which PIL
                lacks, a uint16 array), a NumPy array (h, w) or (h, w, C) of uint8 or uint16, a tensor (C, h, w) of
                floats in [-1, 1] or uint8; or a tensor (n, C, h, w).
            seed: of the noise of each image.
            tile, overlap, consistent, batch_size: see `UpscaleRequest`.
            config: how to sample; None: as the model recommends.
            progress: called with the tiles, or parts of them, that have been enlarged since the last call.
            options: fields of `SamplingConfig`, such as `steps=20`, in place of those of `config`.

        Raises:
            BadInput: for images that cannot be read, and values out of range.
        """
        request = UpscaleRequest(seed, tile, overlap, consistent, batch_size)
        resolved = self.model.resolve(config, batch_size=batch_size, **options)

        def one(image: Any) -> Any:
            picture = self.picture(image)
            advance = progress if progress is not None else lambda tiles: None
            enlarged = enlarge_picture(self.model, resolved, picture, request, advance=advance)
            assert enlarged is not None  # of one process
            return self._as(image, picture, enlarged.values(0, enlarged.shape[0]))

        if isinstance(images, Tensor) and images.ndim == 4:
            return torch.stack([one(image) for image in images])
        if isinstance(images, Sequence) and not isinstance(images, str):
            return [one(image) for image in images]
        return one(images)

    def consistency(self, image: Any, enlarged: Any) -> ConsistencyResult:
        """How far an enlarged image, reduced again (bicubic), is from the small one.

        Args:
            image: small, as `upscale` takes it.
            enlarged: what it gave.

        Raises:
            BadInput: for an enlarged image of another size.
        """
        small, large = self.picture(image), self.picture(enlarged)
        height, width = small.size
        if large.size != (height * self.factor, width * self.factor):
            raise BadInput(
                f"the enlarged image of {width}x{height} is {width * self.factor}x{height * self.factor}, found "
                f"{large.size[1]}x{large.size[0]}"
            )
        return measure_consistency(
            lambda begin, end: to_unit(small.pixels[begin:end], small.white),
            lambda begin, end: to_unit(large.pixels[begin:end], small.white if large.white > 255 else large.white),
            height,
            self.factor,
        )

    def picture(self, image: Any) -> Picture:
        """An image, as `upscale` takes it, with its opacity apart.

        Raises:
            BadInput: for what is no image.
        """
        four = self.model.shape[0] == 4
        if isinstance(image, (str, Path)):
            return read_picture(Path(image), four)
        if isinstance(image, Tensor):
            if image.ndim != 3 or image.dtype != torch.uint8 and not image.is_floating_point():
                raise BadInput(f"a tensor must be (C, h, w), floats in [-1, 1] or uint8, got {_kind(image)}")
            values = image.detach().cpu().permute(1, 2, 0)
            if values.is_floating_point() and values.numel() and not bool((values.abs() <= 1.5).all()):
                raise BadInput("the floats of a tensor must lie in [-1, 1]")
            image = np.ascontiguousarray((values if values.dtype == torch.uint8 else values.float()).numpy())
            return self._split(image, four)
        if isinstance(image, np.ndarray):
            if image.ndim not in (2, 3) or image.dtype not in (np.uint8, np.uint16):
                raise BadInput(f"an array must be (h, w) or (h, w, C) of uint8 or uint16, got {_kind(image)}")
            return self._split(image[..., None] if image.ndim == 2 else image, four)
        if hasattr(image, "getexif") and hasattr(image, "convert"):
            return picture_of(image, four)
        raise BadInput(f"an image must be a PIL image, a path, an array or a tensor, got {type(image).__name__}")

    def _split(self, pixels: np.ndarray, four: bool) -> Picture:
        """A picture of an array (h, w, C), whose second or fourth channel is the opacity."""
        channels = pixels.shape[2]
        if not 1 <= channels <= 4 or 0 in pixels.shape:
            raise BadInput(f"images have 1 to 4 channels, got shape {pixels.shape}")
        white = 2**16 - 1 if pixels.dtype == np.uint16 else 255
        opaque = channels in (1, 3) or channels == 4 and four or pixels.dtype == np.float32
        if opaque:
            return Picture(pixels, white=white)
        return Picture(pixels[..., :-1], np.ascontiguousarray(pixels[..., -1]), white)

    @staticmethod
    def _as(image: Any, picture: Picture, values: np.ndarray) -> Any:
        """The result (h, w, C) as the type of the small image."""
        if isinstance(image, Tensor):
            return to_tensor(values).to(image.device, image.dtype)
        if isinstance(image, np.ndarray):
            return values[..., 0] if image.ndim == 2 else values
        if values.dtype == np.uint16 and values.shape[2] > 1:
            return values
        from PIL import Image

        result = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
        if picture.profile:
            result.info["icc_profile"] = picture.profile
        return result


def _kind(value: Any) -> str:
    """Type and shape, for messages."""
    return f"{value.dtype} {tuple(value.shape)}"
