"""The images that samples are made from: sources of bridges, conditions, and what initialisations begin from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import BadInput
from ..images import to_image_tensor
from ..pick import pick
from ..schedules.truncated import Truncated

__all__ = ["refuse_process", "source_images"]


def source_images(model: Any, n: int, images: Any, start: Any) -> Tensor | None:
    """The images for `n` samples, checked, float32 (n, ...); None where there are none and none are needed.

    Args:
        model: a `Model` to sample from.
        n: number of samples.
        images: as `Model.sample` takes them, or None.
        start: the initialisation, or None.

    Raises:
        BadInput: for images that are missing, too few, of another size, or not used.
    """
    shape = None if getattr(start, "gives_source", False) else model.source_shape
    reads = start is not None and getattr(start, "reads_images", True)
    if shape is not None and reads:
        raise BadInput(f"{model.name} makes samples from source images: it takes no start")
    if images is None:
        if shape is not None:
            size = f"{shape[2]}x{shape[1]}" if len(shape) == 3 else f"shape {tuple(shape)}"
            how = f"give images of {size}, one a sample" + (": see hasten upscale" if model.source_factor > 1 else "")
            raise BadInput(f"{model.name} makes its samples from source images: {how}")
        return None
    if shape is None and not reads:
        raise BadInput("images are for a start that begins from them, such as start='ccdf:time=0.3'")
    pixels = model.codec in ("image", "residual") and model.decoder is None
    wanted = shape or model.shape
    result = to_image_tensor(images, wanted if pixels or shape is None and model.decoder is None else None)
    if len(result) != n:
        raise BadInput(f"images must be one for each of the {n} samples, found {len(result)}")
    if shape is not None and tuple(result.shape[1:]) != tuple(shape) and not fits(model, result, shape):
        raise BadInput(f"{model.name} takes sources of shape {tuple(shape)}, found {tuple(result.shape[1:])}")
    return result


def fits(model: Any, source: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a network of super-resolution takes these small images, of another size than it was trained with."""
    factor = model.source_factor
    step = max(int(getattr(model.denoiser.net, "multiple", 1)) // factor, 1)
    if factor == 1 or source.ndim != 4 or source.shape[1] != shape[0]:
        return False
    if bad := [side for side in source.shape[2:] if side % step]:
        raise BadInput(
            f"{model.name} takes small images with sides that {step} divides, found {bad[0]}: see hasten upscale for "
            "images of any size"
        )
    return True


WITH_TEXTS = ("distillation", "tuning")  # what gives the conditions of a text to a model that speaks


def refuse_process(model: Any, what: str, bridges_only: bool = False, sources: bool = False) -> None:
    """Raise BadInput for a model of another process, or one whose samples do not begin from noise alone.

    Args:
        model: a `Model`.
        what: what cannot work on it, for the message, such as "tuning".
        bridges_only: it works on other processes and on generators, only not on source images.
        sources: it works on models that draw from noise and read a source image as a condition.
    """
    schedule = model.denoiser.schedule
    if "speech" in model.card and what not in WITH_TEXTS:
        raise BadInput(
            f"{what} would run {model.name}, which speaks, without a text: what works is hasten speak, distill and tune"
        )
    if model.start is not None and getattr(pick("starts", model.start), "gives_source", False):
        if bridges_only:
            return
        raise BadInput(
            f"{what} is for models that draw from noise alone, and {model.name} also reads an image of a generator "
            f"(start={model.start})"
        )
    if model.source_shape is not None and (schedule.bridge or not sources):
        raise BadInput(
            f"{what} is for models that draw from noise alone, and {model.name} makes its samples from source images: "
            "see hasten translate"
        )
    if isinstance(schedule, Truncated) and not bridges_only:
        raise BadInput(
            f"{what} is for models that begin from noise, and {model.name} begins at t = {schedule.end:g} from a "
            f"generator (start={model.start})"
        )
    if not schedule.ordinary and not bridges_only:
        raise BadInput(
            f"{what} is for models of x_t = alpha x + sigma eps, and {model.name} is one of the process "
            f"{type(schedule).__name__}"
        )
