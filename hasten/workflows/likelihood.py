"""`evaluate_likelihood`: the likelihood of real images under a model, in bits a dimension."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..denoiser import Denoiser, evaluating
from ..distributed.ranks import Ranks
from ..errors import BadInput, check_int
from ..likelihood import bits_per_dim
from ..model.model import Model
from ..model.sources import refuse_process
from ..pick import pick
from ..plan.config import SamplingConfig
from ..progress import ignore_messages
from ..sampling import Progress
from ..train.data import Data, open_data, to_float
from ..train.messages import print_once
from ..train.names import match_labels
from ..train.sources import NoSplits
from ..utils.config import Config

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LikelihoodConfig", "evaluate_likelihood"]

IMAGES = 256
Bars = Callable[[str], "AbstractContextManager[Progress | None]"]


@dataclass(frozen=True)
class LikelihoodConfig(Config):
    """Which images, and how their likelihood is computed.

    Args:
        method: "ode", "bound" with their options, as `pick("likelihood", ...)` reads them, or such a method.
        n: number of images, drawn at random with `seed`. None: 256, or all if there are fewer.
        levels: K, the number of values of a pixel.
        seed: of the images drawn, and of image k's numbers `seed + k`.
        split: of data that is a path: test, val or train.
        batch_size: images in the network at once.
    """

    method: Any = "ode"
    n: int | None = None
    levels: int = 256
    seed: int = 0
    split: str = "test"
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, least in (("levels", 2), ("batch_size", 1)):
            check_int(name, getattr(self, name), least)
        if self.n is not None:
            check_int("n", self.n, 2)


class LikelihoodOptions(TypedDict, total=False):
    """The fields of `LikelihoodConfig` as keyword arguments."""

    method: Any
    n: int | None
    levels: int
    seed: int
    split: str
    batch_size: int


def evaluate_likelihood(
    model: Model,
    data: str | Path | Data,
    config: LikelihoodConfig | None = None,
    *,
    ranks: Ranks | None = None,
    progress: Bars = lambda what: nullcontext(),
    warn: Callable[[str], None] = ignore_messages,
    **options: Unpack[LikelihoodOptions],
) -> dict[str, Any]:
    """The mean negative log-likelihood of real images under a model, in bits a dimension, with its standard error.

        result = hasten.evaluate_likelihood(model, "photos", method="ode", n=500)
        result["bits_per_dim"], result["standard_error"]

    It is that of the model at guidance scale 1, in fp32 with float64 sums; of a model with classes, given the class of
    each image.

    Args:
        data: the images, or the path of a folder, zip or array (`open_data`).
        config: which images and which method. options: fields of it.
        ranks: the processes of the run; None: this one alone.
        progress: makes a context whose value is called with (done, in all), or is None.
        warn: called with a line for what the user should know.

    Returns:
        A dict: model, bits_per_dim, standard_error (of the mean over the images), nats, parts (of a bound, in
        bits/dim), n, levels, protocol, dequantisation, nfe, images_per_second, images (the values one by one).
        Empty in other processes than the main one.

    Raises:
        BadInput: for a model whose likelihood is not defined: one of latents, or that takes prompts, a distilled
            student, another process than `x_t = alpha x + sigma eps`; and for data of another kind.
    """
    config = LikelihoodConfig.of(config, options)
    ranks = Ranks(model.device) if ranks is None else ranks
    method = pick("likelihood", config.method) if isinstance(config.method, str) else config.method
    check_likelihood_model(model)
    source = likelihood_data(model, data, config.split)
    n = min(len(source), IMAGES) if config.n is None else config.n
    if n > len(source):
        raise BadInput(f"n is {n}, and {source.source or 'the data'} holds {len(source)} images")
    if n < 2:
        raise BadInput(f"{source.source or 'the data'} holds one image: a mean with its error needs two or more")
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(config.seed))[:n].sort().values
    blocks = [range(first, min(first + config.batch_size, n)) for first in range(0, n, config.batch_size)]

    def block(number: int) -> tuple[Tensor, ...]:
        rows = blocks[number]
        indices = chosen[list(rows)]
        x = to_float(source.images(indices)).to(model.device)
        cond = {} if source.labels is None else {"label": source.labels[indices].to(model.device)}
        seeds = [config.seed + k for k in rows]
        result = method(model.denoiser, x, seeds, config.levels, **cond)
        return result.nats, torch.full((1,), float(result.nfe)), *result.parts.values()

    started = time.monotonic()
    what = f"likelihood of {n} images"
    with evaluating(model.denoiser), progress(what) as tick:
        pieces = ranks.distribute(len(blocks), block, tick=tick)
    seconds = time.monotonic() - started
    finished = [piece for piece in pieces if piece is not None]
    if not ranks.is_main_process or len(finished) < len(blocks):
        return {}
    D = math.prod(model.shape)
    columns = [torch.cat(column) for column in zip(*finished)]
    values = bits_per_dim(columns[0], D)
    mean, error = float(values.mean()), float(values.std()) / n**0.5
    names = PARTS if len(columns) > 2 else ()
    parts = {name: float(bits_per_dim(part, D).mean()) for name, part in zip(names, columns[2:])}
    nfe = float(columns[1].mean())
    given = "" if source.labels is None else ", given the class"
    lines = [
        f"bits/dim {mean:.4f} +- {error:.4f} (standard error, {n} images of {source.source or 'the data'}{given})",
        f"{method.protocol}; dequantisation: {method.dequantisation(config.levels)}",
        *(["  ".join(f"{name} {value:.4f}" for name, value in parts.items())] if parts else []),
        f"{nfe:.0f} evaluations an image, {n / seconds:.3g} images a second",
    ]
    return {
        "model": model.name,
        "sha256": model.sha256,
        "bits_per_dim": mean,
        "standard_error": error,
        "nats": float(columns[0].mean()),
        "parts": parts,
        "n": n,
        "data": source.source,
        "split": config.split,
        "seed": config.seed,
        "levels": config.levels,
        "conditional": source.labels is not None,
        "protocol": method.protocol,
        "dequantisation": method.dequantisation(config.levels),
        "nfe": nfe,
        "images_per_second": n / seconds,
        "images": values.tolist(),
        "summary": lines,
        **({"processes": ranks.world} if ranks.world > 1 else {}),
    }


PARTS = ("diffusion", "prior", "reconstruction")  # of a bound, in the order of `VariationalBound`


def check_likelihood_model(model: Model) -> None:
    """Raise BadInput for a model whose likelihood of images is not defined."""
    why = None
    if model.decoder is not None or model.codec == "latent":
        why = "is a model of latents: the likelihood of its images is that of an autoencoder too, which is not defined"
    elif model.conditioning is not None:
        why = "takes prompts: what is measured is p(image | class), or p(image) of a model without classes"
    elif "distilled" in model.card or model.denoiser.net_takes_guidance or model.denoiser.step_counts is not None:
        why = "is a distilled student, whose network is not the score of a density: measure its teacher"
    elif model.codec != "image":
        why = f"has samples of the kind {model.codec}, not images of a number of levels: call hasten.likelihood itself"
    elif not isinstance(model.denoiser, Denoiser):
        why = f"is sampled through {type(model.denoiser).__name__}, whose likelihood is not defined"
    if why is not None:
        raise BadInput(f"bits/dim: {model.name} {why}")
    refuse_process(model, "bits/dim")


def check_likelihood_options(sampling: SamplingConfig) -> None:
    """Raise BadInput for options of sampling, which say nothing of a likelihood."""
    scale = sampling.guidance_scale
    if scale is not None and scale != 1:
        raise BadInput(
            f"bits/dim at guidance scale {scale:g}: guided samples follow no density that the network gives; the "
            "likelihood is that of scale 1"
        )
    given = {name: getattr(sampling, name) for name in ("sampler", "times", "steps", "guides", "start", "plan")}
    given |= {"accelerators": sampling.accelerators}
    if stray := next((name for name, value in given.items() if value), None):
        raise BadInput(f"bits/dim does not depend on {stray}: leave it out")
    if sampling.precision not in (None, "auto", "fp32"):
        raise BadInput(f"bits/dim is computed in fp32, with sums in float64: leave out precision {sampling.precision}")


def images_of(path: str | Path, split: str) -> Data:
    """The images of a split, or all where there are no splits, which is said."""
    try:
        return open_data(path, split=split)
    except NoSplits:
        pass
    print_once(f"{path}: there is no split {split!r}: all images are used, also those that the model was trained on")
    return open_data(path, split=None)


def likelihood_data(model: Model, data: str | Path | Data, split: str) -> Data:
    """The images at the model's size, with the model's labels.

    Raises:
        BadInput: for images of another size or another number of channels, which would have to be interpolated: their
            likelihood is not that of the data; and where labels are missing.
    """
    source = data if isinstance(data, Data) else images_of(data, split)
    if tuple(source.shape) != tuple(model.shape):
        raise BadInput(
            f"{source.source or 'the data'} has images of {'x'.join(map(str, source.shape))}, {model.name} is a model "
            f"of {'x'.join(map(str, model.shape))}: resized images have another likelihood; give data of this size"
        )
    source = match_labels(replace(source, captions=None, conditions=None), model.classes, model.name, required=False)
    if model.classes is not None and source.labels is None and model.denoiser.null_label is None:
        raise BadInput(f"{model.name} needs a class for each image, and {source.source or 'the data'} has no labels")
    return source
