"""Checks of user networks before any work: whether they can be trained, and saved so that they load the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, device_of, evaluating
from ..errors import BadInput
from ..nets.quantized import quantization_config
from .weights import is_diffusers, is_hasten_network, network_identity, save_refusal, user_class, wrapped_network

FAILURES = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, NotImplementedError, AssertionError)
SEED = 20240229  # of the sample on which both networks are compared


def check_reopens(name: str, net: nn.Module, denoiser: Denoiser | None, shape: tuple[int, ...], labels: bool) -> None:
    """Refuse a network that could not be saved so that it loads as the same function.

    Of a user's network the class and `config` are saved beside the tensors. What changes its output and is in neither
    (an argument with a default, a non-persistent buffer, a layer replaced by hand) would be lost silently: so the
    network is built again from its config, given the same tensors, and both outputs are compared on one sample. A
    network that fails on that sample is not compared.

    Args:
        name: of the model, for messages.
        net: the network.
        denoiser: the denoiser around it; None: the outputs are not compared.
        shape: S of a sample.
        labels: whether it takes labels.

    Raises:
        BadInput: with what to do.
    """
    if why := save_refusal(net):
        raise BadInput(f"{name} cannot be saved: {why}")
    inner = net
    while (wrapped := wrapped_network(inner)) is not None:
        inner = wrapped
    if denoiser is None or is_hasten_network(inner) or is_diffusers(inner) or quantization_config(inner):
        return  # integer layers are hasten's, made from a network that was compared
    again = rebuild(inner)
    try:
        first = probe_output(denoiser, inner, shape, labels)
    except FAILURES:
        return
    kind = type(inner).__name__
    try:
        second = probe_output(denoiser, again, shape, labels)
    except FAILURES as e:
        raise BadInput(
            f"{name} cannot be saved: {kind}, built again from its config, fails ({first_line(e)}): its config does "
            "not describe it"
        ) from e
    scale = float(first.abs().max())
    tolerance = 1e-4 if all(w.itemsize >= 4 for w in inner.state_dict().values() if w.is_floating_point()) else 0.05
    if not bool(((first - second).abs() <= tolerance * max(scale, 1e-6)).all()) and bool(first.isfinite().all()):
        raise BadInput(
            f"{name} cannot be saved: {kind}, built again from its config with the same tensors, has another output "
            f"(by {float((first - second).abs().max()):.3g} of {scale:.3g}): what changes its output belongs into "
            "net.config, as its constructor's keyword arguments, or into a buffer that is saved (persistent=True)"
        )


def rebuild(net: nn.Module) -> nn.Module:
    """The network as `load` would build it, on the same device."""
    description = network_identity(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 1)  # random buffers must not agree by chance
        again = user_class(description["module"], description["class"], [type(net)])(**description["config"])
    again.load_state_dict(net.state_dict())
    return again.to(device_of(net))


def probe_output(denoiser: Denoiser, net: nn.Module, shape: tuple[int, ...], labels: bool) -> Tensor:
    """The raw output, float32, for two samples of noise in the middle of the schedule; `net` is left unchanged."""
    device = device_of(net)
    around = copy.copy(denoiser)  # `replace` would set the network's mode
    around._modules = {**denoiser._modules, "net": net}
    with torch.no_grad(), evaluating(net), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        x = torch.randn(2, *shape).to(device)
        cond: dict[str, Any] = {"label": torch.zeros(2, dtype=torch.int64, device=device)} if labels else {}
        return around.raw(x, 0.5, **cond).float()


def check_trainable(name: str, denoiser: Denoiser, shape: tuple[int, ...], cond: dict[str, Tensor]) -> None:
    """Refuse a network that cannot be trained: without parameters, that cannot be copied, or that fails on a sample.

    Args:
        name: of the model, for messages.
        denoiser: with the network.
        shape: S of a sample.
        cond: conditions of two samples.

    Raises:
        BadInput: with the reason.
    """
    net = denoiser.net
    if next((p for p in net.parameters() if p.is_floating_point() or p.is_complex()), None) is None:
        raise BadInput(f"{name} has no weights that could be trained: {type(net).__name__} has no parameters")
    try:
        with evaluating(denoiser), torch.random.fork_rng(devices=[]):
            x = torch.zeros(2, *shape, device=device_of(denoiser))
            denoiser.raw(x, 0.5, **cond)  # with gradients, as in training: it may cache what cannot be copied
    except torch.OutOfMemoryError:
        raise
    except FAILURES as e:
        raise BadInput(
            f"the network of {name}, {type(net).__name__}, fails on samples of shape {tuple(shape)} "
            f"with {', '.join(['the time', *cond])} ({first_line(e)})"
        ) from e
    try:
        copy.deepcopy(net)
    except FAILURES as e:
        raise BadInput(
            f"{name} cannot be copied, as every student is ({first_line(e)}): make its weights parameters "
            "(torch.nn.utils.parametrizations.weight_norm in place of torch.nn.utils.weight_norm)"
        ) from e


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
