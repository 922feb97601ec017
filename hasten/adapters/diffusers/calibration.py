"""What a pipeline's network is asked in a call of the user's own, for accelerators that look at samplings first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...accelerators import Call, Recorder
from ...accelerators._calls import empty_prompt, in_batches
from ...errors import BadInput
from .schedules import read_scheduler

__all__ = ["record_model_calls", "record_pipeline_calls"]


def record_pipeline_calls(
    pipe: Any, call: Callable[[Any], Any], net: nn.Module, place: Any, seed: int
) -> Callable[..., list[Call]]:
    """`SamplingContext.calls` made of a call of the pipeline itself, with all that its network is given there.

    Args:
        call: `call(pipe)` runs the pipeline as it will be used: its prompts, images, ControlNets, size and batch.
        net: the pipeline's network.
        place: from the arguments of the network's forward to (x, time, conditions).
        seed: of torch's generator within the call, where it is given none.
    """

    def calls(n: int, first: int) -> list[Call]:
        found: list[Call] = []
        signature = inspect.signature(type(net).forward)

        def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            bound = signature.bind(module, *positional, **named)
            bound.apply_defaults()
            given = {name: value for name, value in bound.arguments.items() if name not in ("self", "return_dict")}
            x, timestep, cond = place(given)
            time = read_scheduler(pipe.scheduler).time(timestep).flatten()
            if bool((time != time[0]).any()):
                raise BadInput("the network was asked at several times in one batch: calls= must ask at one")
            found.append((x.detach().clone(), float(time[0]), cond))

        handle = net.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed + first)
                call(pipe)
        finally:
            handle.remove()
        if not found:
            raise BadInput("calls= must call the pipeline that it is given, as calls=lambda pipe: pipe('a cat')")
        if any(x.shape != found[0][0].shape for x, _, _ in found):
            raise BadInput("calls= asked the network for samples of several shapes: give one batch and size")
        return found

    return calls


def record_model_calls(
    model: Any, n: int, prompts: Any, seed: int, times: Sequence[float], setting: dict[str, Any]
) -> list[Call]:
    """What a model's network is asked at these times when n images are drawn; large images not all in one batch."""
    texts = None if model.conditioning is None else model.conditioning.texts(n, prompts)
    if texts is not None and not any(texts):
        empty_prompt(model.name)

    def some(first: int, rows: int) -> list[Call]:
        recorder = Recorder(model.denoiser)
        drawn: Any = replace(model, denoiser=recorder, decoder=None)
        told = prompts if texts is None else texts[first : first + rows]
        drawn.sample(rows, told, seed=seed + first, batch_size=rows, **setting)
        return [call for call in recorder.calls if any(abs(call[1] - t) < 1e-9 for t in times)]

    return in_batches(n, model.shape, some)
