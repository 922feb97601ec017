"""Small images: what super-resolution enlarges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput, check_int, check_number
from ..utils.random import make_generator
from ..utils.resizing import reduce
from ._base import Degradation, to_pixels
from .blur import Blur
from .jpeg import Jpeg


@dataclass(frozen=True)
class LowResolution(Degradation):
    """Bicubic reduction with antialiasing, after a Gaussian blur and before noise and JPEG, if those are given: uint8
    (n, C, H, W) -> (n, C, H / factor, W / factor).

    Of each of the three an image gets a random amount, uniform between none (for `jpeg` quality 95) and the given one.

    Args:
        factor: of the reduction, which must divide height and width; at least 2.
        blur: largest standard deviation of the blur, in pixels of the large image; 0: none.
        noise: largest standard deviation of Gaussian noise, in units of 1/255; 0: none.
        jpeg: lowest quality of the compression, 1 to 95; 0: none.

    References:
        Wang, Xie, Dong, Shan 2021, arXiv:2107.10833 (the first-order degradation model).
    """

    factor: int = 4
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int = 0

    def __post_init__(self) -> None:
        check_int("low_resolution: factor", self.factor, 2)
        for name, most in (("blur", 32), ("noise", 255)):
            if not 0 <= check_number(f"low_resolution: {name}", getattr(self, name)) <= most:
                raise BadInput(f"low_resolution: {name} lies in 0..{most}, found {getattr(self, name)}")
        check_int("low_resolution: jpeg", self.jpeg, 0, 95)

    def __call__(self, images: Tensor, indices: list[int]) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise BadInput(f"low_resolution: factor {self.factor} does not divide images of {width}x{height}")
        if not (self.blur or self.noise or self.jpeg):
            return to_pixels(reduce(images.float(), self.factor))
        return torch.cat([self._one(image[None], index) for image, index in zip(images, indices, strict=True)])

    def _one(self, image: Tensor, index: int) -> Tensor:
        """One image with its own amounts, uint8 (1, C, h, w)."""
        generator = make_generator(index)
        blur, noise, quality = torch.rand(3, generator=generator).tolist()
        if self.blur * blur > 1e-3:
            image = Blur(self.blur * blur)(image, [index])
        x = reduce(image.float(), self.factor)
        if self.noise:
            x = x + self.noise * noise * torch.randn(x.shape, generator=generator)
        pixels = to_pixels(x)
        return Jpeg(round(95 - quality * (95 - self.jpeg)))(pixels, [index]) if self.jpeg else pixels
