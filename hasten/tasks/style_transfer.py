"""Style transfer without training for it: an image of one domain to noise, and the noise to an image of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_int
from ..images import to_image_tensor
from ..inversion import encode
from ..model.model import Label, Model
from ..plan.config import SamplingConfig
from ..plan.draw import draw
from ..progress import fraction_of
from ..samplers.ddim import invert
from ..sampling import Noise
from ..times import Trailing
from ..utils.config import Config

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Restyled", "restyle"]

Progress = Callable[[int, int], None]


class Restyled(NamedTuple):
    """The result of `restyle`.

    Args:
        images: (n, C, H, W) float32 in [-1, 1], on the CPU.
        noise: (n, C, H, W), the encoded sources; approximately N(0, I).
        encode_evaluations, decode_evaluations: model evaluations an image; guidance by two branches counts two.
    """

    images: Tensor
    noise: Tensor
    encode_evaluations: float
    decode_evaluations: float

    @property
    def evaluations(self) -> float:
        """Model evaluations an image, of encoder and decoder together."""
        return self.encode_evaluations + self.decode_evaluations


@dataclass(frozen=True)
class RestyleConfig(Config):
    """How to encode and decode.

    Args:
        encode_steps, decode_steps: None: those of the models. A distilled encoder has its own number only.
        guidance_scale: of the decoder; None: its recommended one.
        encode_guidance_scale: of the encoder; None: 1, or the nearest that a distilled one takes: guidance makes the
            noise less like N(0, I).
        sampler, times: of the decoder, as for `Model.sample`. A deterministic sampler preserves the layout, a
            stochastic one loses some of it.
        iterations: of the inversion of a model that is no distilled encoder, see `samplers.ddim.invert`.
        seed: of the noise of a stochastic sampler.
        batch_size: images at once.
    """

    encode_steps: int | None = None
    decode_steps: int | None = None
    guidance_scale: float | None = None
    encode_guidance_scale: float | None = None
    sampler: Any = None
    times: Any = None
    iterations: int = 0
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, 1)
        check_int("seed", self.seed, 0)
        check_int("iterations", self.iterations, 0)


class RestyleOptions(TypedDict, total=False):
    """The fields of `RestyleConfig` as keyword arguments."""

    encode_steps: int | None
    decode_steps: int | None
    guidance_scale: float | None
    encode_guidance_scale: float | None
    sampler: Any
    times: Any
    iterations: int
    seed: int
    batch_size: int


@torch.no_grad()
def restyle(
    encoder: Model,
    decoder: Model,
    images: Any,
    from_label: Label = None,
    to_label: Label = None,
    config: RestyleConfig | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[RestyleOptions],
) -> Restyled:
    """Images of domain A as images of domain B with the same layout: z_1 = encode_A(x), x' = decode_B(z_1).

    Domains are classes of one model, or models. The probability-flow ODE takes each domain's images to the same N(0, I)
    and back, so the noise of an image of A is that of some image of B, whose layout, as observed, it shares. A larger
    guidance scale of the decoder gives more of B, and less of the source.

    Cost: encode_steps + decode_steps model evaluations an image, twice that where guidance takes two.

    Args:
        encoder, decoder: a distilled encoder (`distillers.encoder`) and a distilled student for sampling; or any model,
            which then encodes by DDIM inversion and decodes by any sampler. They may be one model.
        images: (n, C, H, W) in [-1, 1].
        from_label, to_label: class of the images and of the result, as for `Model.labels`.
        config: steps, scales and sampler; None: as the models recommend.
        options: fields of it.
        progress: called with the number of finished network calls and their total.

    Returns:
        Images, noise and cost.

    Raises:
        BadInput: for models of other shapes, labels that they do not have, and a decoder that is an encoder.

    References:
        Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142, for distilled encoders.
        Su, Song, Meng, Ermon 2022, arXiv:2203.08382, for DDIM in both directions.
    """
    config = RestyleConfig.of(config, options)
    iterations, seed, batch_size = config.iterations, config.seed, config.batch_size
    images = to_image_tensor(images, encoder.shape)
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(encoder.shape) or encoder.shape != decoder.shape:
        raise BadInput(
            f"images, encoder and decoder must have one shape, found {tuple(images.shape)[1:]}, {tuple(encoder.shape)} "
            f"and {tuple(decoder.shape)}"
        )
    if is_encoder(decoder):
        raise BadInput(f"{decoder.name} can only encode: the decoder must be a model that generates images")
    if iterations and is_encoder(encoder):
        raise BadInput(f"{encoder.name} is a distilled encoder, whose steps need no iterations")
    count = len(images)
    encoding: Any = EvaluationCounter(encoder.denoiser)
    decoding: Any = EvaluationCounter(decoder.denoiser)
    to_noise = NoiseEncoder(
        replace(encoder, denoiser=encoding), config.encode_steps, config.encode_guidance_scale, iterations
    )
    sampling = SamplingConfig(config.sampler, config.times, config.decode_steps, config.guidance_scale)
    resolved = replace(decoder, denoiser=decoding).resolve(sampling)
    sources, targets = (
        required_labels(encoder, count, from_label, "from_label"),
        required_labels(decoder, count, to_label, "to_label"),
    )
    first_time = resolved.times[0] if resolved.plan is None or resolved.plan.begin is None else resolved.plan.begin
    start = float(decoder.denoiser.schedule.prior_std(first_time))
    noises, outputs = [], []
    for first in range(0, count, batch_size):
        rows = slice(first, min(first + batch_size, count))
        tick = fraction_of(progress, first, count, batch_size)
        z = to_noise(images[rows].to(encoder.device, torch.float32), None if sources is None else sources[rows], tick)
        noises.append(z.cpu())
        step_noise = Noise(range(seed + rows.start, seed + rows.stop), decoder.shape, torch.float32, decoder.device)
        cond = {} if targets is None else {"label": targets[rows].to(decoder.device)}
        x = start * z.to(decoder.device)
        x = draw(
            resolved.denoiser,
            resolved.sampler,
            resolved.times,
            step_noise,
            x=x,
            plan=resolved.plan,
            progress=tick,
            cond=cond,
        )
        outputs.append(x.float().clamp(-1, 1).cpu())
    return Restyled(torch.cat(outputs), torch.cat(noises), encoding.rows / count, decoding.rows / count)


def required_labels(model: Model, count: int, label: Label, name: str) -> Tensor | None:
    """`Model.labels`; a model with classes needs one, as it is the domain. Raises BadInput."""
    if label is None and model.classes is not None:
        raise BadInput(f"{model.name} has classes: {name} must be one of {', '.join(model.classes)}")
    return model.labels(count, label)


def is_encoder(model: Model) -> bool:
    """Whether the model was distilled to encode images, and so cannot generate them."""
    figures = model.card.get("distilled", {}).get("figures", {})
    return isinstance(figures, dict) and figures.get("direction") == "encode"


class NoiseEncoder:
    """Images to standard normal noise: by the steps of a distilled encoder, or by DDIM inversion of any other model.

    Args:
        model: the encoder.
        steps: None: those of the model.
        guidance_scale: None: 1, or the nearest that the model takes.
        iterations: of DDIM inversion.

    Raises:
        BadInput: for other steps than a distilled encoder's, and scales that the model does not take.
    """

    def __init__(self, model: Model, steps: int | None, guidance_scale: float | None, iterations: int) -> None:
        self.model, self.iterations, self.distilled = model, iterations, is_encoder(model)
        self.steps = model.steps if steps is None else steps
        check_int("encode_steps", self.steps, 1)
        if self.distilled and self.steps != model.steps:
            raise BadInput(f"{model.name} encodes in {model.steps} steps, got {self.steps}")
        low, high = model.denoiser.guidance_range or (1.0, 1.0)
        self.scale = min(max(1.0, low), high) if guidance_scale is None else guidance_scale
        self.guided = model.guided(self.scale)  # raises for an unsupported scale
        self.times = Trailing()(model.denoiser.schedule, self.steps)
        self.std = float(model.denoiser.schedule.prior_std(self.times[0]))

    def __call__(self, x: Tensor, label: Tensor | None, progress: Progress | None) -> Tensor:
        """The noise (B, C, H, W) of images (B, C, H, W)."""
        cond = {} if label is None else {"label": label.to(x.device)}
        if self.distilled:
            return encode(self.model.denoiser, x, self.steps, self.scale, progress, **cond) / self.std
        return invert(self.guided, x, self.times, self.iterations, **cond) / self.std


class EvaluationCounter(Wrapper):
    """A denoiser that counts the samples that it evaluates, by `forward` and by `raw`: `rows`."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.rows = 0

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's x0."""
        self.rows += len(x_t)
        return self.denoiser(x_t, t, **cond)

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The output of the inner denoiser's network."""
        self.rows += len(x_t)
        denoiser: Any = self.denoiser
        return denoiser.raw(x_t, t, **cond)
