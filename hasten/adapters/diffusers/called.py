"""Pipelines of `diffusers` that are sampled through their own call, where `load` cannot take them apart."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, HastenError, check_int
from ...images import to_image_tensor
from ...model.model import Label, Model
from ...performance.autotune import parse_runtime
from .library import is_pipeline, network_of, short_truncation_notice
from .pipelines import load_pipeline, open_pipeline
from .scheduler import as_scheduler
from .schedules import mu_of, read_scheduler

__all__ = ["CalledModel", "call_pipeline", "load_or_call"]

PROBE_STEPS = 2


class CalledNetwork(nn.Module):
    """The network of a pipeline that only the pipeline itself can call.

    Args:
        net: the network; `counted` is it, whose evaluations are counted.
        guidance_range: the guidance scales of a network that has the scale as an input or none at all; None where the
            pipeline guides by two branches.
    """

    null_conditions = True

    def __init__(self, net: nn.Module, guidance_range: tuple[float, float] | None) -> None:
        super().__init__()
        self.counted, self.guidance_range = net, guidance_range


class Routed:
    """A method of a pipeline's part that goes through an object, so that its time and memory can be measured."""

    def __init__(self, shape: tuple[int, ...] | None = None) -> None:
        self.image_shape = shape

    def texts(self, n: int, prompt: Any = None) -> list[str]:
        """The prompts of n images: of a sequence, image k gets entry `k % len`; None means ""."""
        prompts = [prompt] if prompt is None or isinstance(prompt, str) else list(prompt)
        if not prompts or not all(p is None or isinstance(p, str) for p in prompts):
            raise BadInput(f"this model takes prompts: a text or several, found {prompt!r}")
        return [prompts[k % len(prompts)] or "" for k in range(n)]

    def cond(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The pipeline's own `encode_prompt`."""
        return original(*arguments, **options)

    def decode(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The autoencoder's own `decode`."""
        return original(*arguments, **options)

    def to(self, device: Any) -> Routed:
        """Itself: the pipeline moves its parts."""
        return self


@dataclass
class CalledModel(Model):
    """A pipeline as a model whose samples are those of `pipeline(prompt, ...)` with a scheduler of hasten.

    Its network cannot be accelerated, guided or started in another way by hasten: these are refused.
    """

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, n: int = 1, label: Label = None, seed: int = 0, config: Any = None, *, batch_size: int = 64,
        progress: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """`n` images of prompts, (n, C, H, W) float32 in [-1, 1] on the CPU; see `Model.sample`.

        Raises:
            BadInput: for what the call of a pipeline does not have.
        """
        n, batch_size = check_int("n", n, 1, 10**8), check_int("batch_size", batch_size, 1)
        if options.pop("images", None) is not None or options.pop("callback", None) is not None:
            raise BadInput(f"{self.name} is sampled through its own call, which takes neither images nor callback here")
        resolved = self.resolve(config, batch_size=batch_size, **options)
        used = resolved.config
        if used.guides or used.start is not None or resolved.plan is None or resolved.inner is not self.denoiser:
            raise BadInput(
                f"{self.name} is sampled through its own call: only samplers that are linear, plans and guidance_scale "
                "apply to it"
            )
        texts = self.conditioning.texts(n, label)
        scheduler = as_scheduler(resolved.plan, like=self.pipeline)
        batches = []
        for first in range(0, n, batch_size):
            part = texts[first : first + batch_size]
            seeds = range(seed + first, seed + first + len(part))
            batches.append(self._call(part, seeds, resolved.plan.nfe, float(used.guidance_scale or 1.0), scheduler))
            if progress is not None:
                progress(min(first + batch_size, n), n)
        return torch.cat(batches)

    def precision_for(self, precision: str = "auto", batch_size: int = 64) -> str:
        """That in which the pipeline was loaded, recorded as fp32. Raises BadInput for any other."""
        if precision not in ("auto", "fp32"):
            raise BadInput(f"{self.name} runs in the precision that it was loaded in: load it in {precision}")
        parse_runtime("fp32")
        return "fp32"

    def _call(self, prompts: Sequence[str], seeds: range, steps: int, scale: float, scheduler: Any = None) -> Tensor:
        """Images of the pipeline's own call, one generator a seed."""
        pipe = self.pipeline
        names = inspect.signature(type(pipe).__call__).parameters
        device = self.device if self.device.type != "mps" else torch.device("cpu")
        options: dict[str, Any] = {"prompt": list(prompts), "num_inference_steps": steps, "output_type": "pt"}
        options["generator"] = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        options |= {"guidance_scale": scale} if "guidance_scale" in names else {}
        with self._routed(scheduler), short_truncation_notice(max(prompts, key=len)):
            output = pipe(**options)
        images = getattr(output, "images", None)
        if images is None:
            raise BadInput(f"{type(pipe).__name__} returns no images: only pipelines of images can be compared")
        if isinstance(images, Tensor):
            return (2 * images.float() - 1).clamp(-1, 1).cpu()
        return to_image_tensor(images, None)

    @contextmanager
    def _routed(self, scheduler: Any) -> Iterator[None]:
        """Within the block the pipeline has this scheduler (None: its own), no progress bar, and its text encoder and
        decoder go through `conditioning` and `decoder`."""
        pipe = self.pipeline
        bars, before = dict(getattr(pipe, "_progress_bar_config", {})), pipe.scheduler
        vae, encode = getattr(pipe, "vae", None), pipe.encode_prompt
        decode = getattr(vae, "decode", None)
        pipe.set_progress_bar_config(**{**bars, "disable": True})
        if scheduler is not None:
            pipe.scheduler = scheduler
        pipe.encode_prompt = lambda *a, **k: self.conditioning.cond(encode, *a, **k)
        if decode is not None and self.decoder is not None:
            vae.decode = lambda *a, **k: self.decoder.decode(decode, *a, **k)  # type: ignore[union-attr]
        try:
            yield
        finally:
            pipe.scheduler = before
            pipe._progress_bar_config = bars
            del pipe.encode_prompt
            if decode is not None and self.decoder is not None:
                del vae.decode  # type: ignore[union-attr]


def call_pipeline(pipe: Any, name: str | None = None, device: str | torch.device | None = None) -> CalledModel:
    """A pipeline of `diffusers` as a model that is sampled through the pipeline's own call.

    The call is made once, with two steps, to learn the size of its images.

    Args:
        pipe: the pipeline, its folder or its hub id.
        name: of the model. Default: the pipeline's.
        device: Default: where the pipeline is.

    Raises:
        BadInput: for a pipeline without prompts, whose call needs more than a prompt, or returns no images.
    """
    if not is_pipeline(pipe):
        pipe = open_pipeline(pipe)
    if device is not None:
        pipe = pipe.to(device)
    kind, parameters = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    needed = {"prompt", "generator", "num_inference_steps", "output_type"}
    if missing := sorted(needed - set(parameters)):
        raise BadInput(f"the call of {kind} takes no {missing[0]}: it cannot be compared")
    if not hasattr(pipe, "encode_prompt"):
        raise BadInput(f"{kind} has no encode_prompt: only pipelines of prompts are sampled through their own call")
    _, net = network_of(pipe)
    default = getattr(parameters.get("guidance_scale"), "default", None)
    span = guidance_range_of(net, "guidance_scale" in parameters)
    scale = float(default) if isinstance(default, (int, float)) else 1.0
    scale = scale if span is None else min(max(scale, span[0]), span[1])
    model = CalledModel(
        read_scheduler(pipe.scheduler, mu=mu_of(pipe.scheduler, 256)).denoiser(CalledNetwork(net, span)).eval(),
        name or Path(str(pipe.config.get("_name_or_path") or kind)).name,
        (3, 1, 1),
        guidance_scale=scale,
        steps=20,
        card={"pipeline": kind, "network": type(net).__name__, "scheduler": type(pipe.scheduler).__name__},
        conditioning=Routed(),
        pipeline=pipe,
    )
    shift: list[float] = []
    original = pipe.scheduler.set_timesteps

    @functools.wraps(original)  # pipelines look at its signature
    def noted(*arguments: Any, mu: float | None = None, **options: Any) -> Any:
        shift.extend([] if mu is None else [float(mu)])
        return original(*arguments, **options, **({} if mu is None else {"mu": mu}))

    pipe.scheduler.set_timesteps = noted
    try:
        images = model._call(["a photo"], range(1), PROBE_STEPS, scale)
    except HastenError:
        raise
    except Exception as error:  # of many kinds: an argument that the call needs, memory
        line = " ".join(str(error).split())[:200]
        raise BadInput(f"{kind} cannot be called with a prompt alone ({type(error).__name__}: {line})") from error
    finally:
        del pipe.scheduler.set_timesteps
    model.shape = tuple(images.shape[1:])
    model.decoder = Routed(model.shape) if getattr(pipe, "vae", None) is not None else None
    spec = read_scheduler(pipe.scheduler, mu=shift[-1] if shift else None)
    model.denoiser = spec.denoiser(CalledNetwork(net, span)).eval()
    return model


def guidance_range_of(net: nn.Module, takes_scale: bool) -> tuple[float, float] | None:
    """The guidance scales of a network that is guided inside, see `CalledNetwork`."""
    embedded = getattr(getattr(net, "config", None), "guidance_embeds", None)
    if not takes_scale or embedded is False:
        return 1.0, 1.0
    return (0.0, 1e6) if embedded else None


def load_or_call(
    name: Any, device: str | torch.device | None = None, report: Callable[[str], None] = lambda line: None
) -> Model:
    """`load_pipeline`, or where it refuses a pipeline of prompts, `call_pipeline`.

    Args:
        name: a pipeline, its folder or its hub id.
        device: Default: where the pipeline is; the CPU for one that is opened.
        report: receives a line where the pipeline is called, with the reason.

    Raises:
        BadInput: the reason of `load_pipeline`, and that of `call_pipeline`.
    """
    pipe = name if is_pipeline(name) else open_pipeline(name)
    try:
        return load_pipeline(pipe, device=device)
    except BadInput as refused:
        try:
            model = call_pipeline(pipe, device=device)
        except BadInput as error:
            raise BadInput(f"{refused}; nor is it sampled through its own call: {error}") from error
    report(f"{type(pipe).__name__} is sampled through its own call, with schedulers of hasten and no accelerators")
    return model
