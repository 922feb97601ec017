"""Calibration inputs of a pipeline's network, for accelerators that need samplings in advance."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...accelerators import Call, Recorder
from ...accelerators._calls import in_batches, warn_empty_prompt
from ...errors import BadInput
from .calls import known_class
from .schedules import read_scheduler
from .split_network import SideInputs
from .time_scale import scheduler_timestep

__all__ = ["record_model_calls", "record_pipeline_calls"]


def record_pipeline_calls(
    pipe: Any, call: Callable[[Any], Any], net: nn.Module, reader: Any, seed: int, side_inputs: SideInputs | None = None
) -> Callable[..., list[Call]]:
    """`SamplingContext.calls` that records a call of the pipeline itself.

    Args:
        pipe: the pipeline.
        call: `call(pipe)` runs the pipeline as it will be used: its prompts, images, ControlNets, size and batch.
        net: the pipeline's network.
        reader: from the arguments of the network's forward to (x, time, conditions).
        seed: of torch's generator within the call, where the call passes none.
        side_inputs: of the split network, which learn in which scale the network takes its time.

    Raises:
        BadInput: by the result, where the call does not use the pipeline, or in several shapes or times per batch.
    """

    scales = side_inputs or SideInputs()

    def calls(n: int, first: int) -> list[Call]:
        inputs: list[Call] = []
        signature = inspect.signature(type(net).forward)

        def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            bound = signature.bind(module, *positional, **named)
            bound.apply_defaults()
            arguments = {name: value for name, value in bound.arguments.items() if name not in ("self", "return_dict")}
            x, timestep, cond = reader(arguments)
            if known_class(type(net)) is None:
                timestep = scheduler_timestep(timestep, pipe.scheduler, net, scales)
            time = read_scheduler(pipe.scheduler).time(timestep).flatten()
            if bool((time != time[0]).any()):
                raise BadInput("calls= evaluates the network at several times in one batch: it must be one")
            inputs.append((x.detach().clone(), float(time[0]), cond))

        handle, own = net.register_forward_pre_hook(hook, with_kwargs=True), pipe.scheduler
        vars(pipe)["scheduler"] = copy.deepcopy(own)  # a sampling with it may have begun
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed + first)
                call(pipe)
        finally:
            handle.remove()
            vars(pipe)["scheduler"] = own
        if not inputs:
            raise BadInput("calls= must call the pipeline that it is passed, as calls=lambda pipe: pipe('a cat')")
        if any(x.shape != inputs[0][0].shape for x, _, _ in inputs):
            raise BadInput("calls= evaluates the network on samples of several shapes: use one batch and image size")
        return inputs

    return calls


def record_model_calls(
    model: Any, n: int, prompts: Any, seed: int, times: Sequence[float], config: dict[str, Any]
) -> list[Call]:
    """The inputs of a model's network at these times while n images are sampled; large images in several batches.

    Args:
        model: to sample.
        n: images.
        prompts: of them, see `Model.sample`.
        seed: of the first image.
        times: to return the inputs of.
        config: keyword arguments of `Model.sample`.
    """
    texts = None if model.conditioning is None else model.conditioning.texts(n, prompts)
    if texts is not None and not any(texts):
        warn_empty_prompt(model.name)

    def record(first: int, rows: int) -> list[Call]:
        recorder = Recorder(model.denoiser)
        recorded: Any = replace(model, denoiser=recorder, decoder=None)
        conditions = prompts if texts is None else texts[first : first + rows]
        recorded.sample(rows, conditions, seed=seed + first, batch_size=rows, **config)
        return [call for call in recorder.calls if any(abs(call[1] - t) < 1e-9 for t in times)]

    return in_batches(n, model.shape, record)
