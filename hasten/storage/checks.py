"""Whether one's own network is the same when it is built again from what model.json would hold of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, device_of, evaluating
from ..errors import BadInput
from ..nets.quantized import described
from .weights import WRAPPERS, identity, is_diffusers, is_hasten_network, save_refusal, user_class

FAILURES = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, NotImplementedError, AssertionError)
SEED = 20240229  # of the sample that is shown to both


def check_reopens(name: str, net: nn.Module, denoiser: Denoiser | None, shape: tuple[int, ...], labels: bool) -> None:
    """Refuse a network that could not be saved so that it opens again as the same function.

    Of one's own network its class and `config` are saved beside the tensors. What changes the answer and is in neither
    (an argument with a default, a buffer that is not kept, a layer exchanged by hand) would be lost without a word: so
    the network is built again, given its tensors, and both are asked about one sample (denoiser: the one around it;
    None: they are not). A network that cannot be asked so is not compared.

    Raises BadInput with what to do.
    """
    if why := save_refusal(net):
        raise BadInput(f"{name} cannot be saved: {why}")
    inside = net
    while is_hasten_network(inside) and type(inside).__name__ in WRAPPERS:
        inside = inside.net  # type: ignore[assignment]
    if denoiser is None or is_hasten_network(inside) or is_diffusers(inside) or described(inside):
        return  # integer layers are made by hasten, of a network that was compared
    again = rebuild(inside)
    try:
        first = probe_output(denoiser, inside, shape, labels)
    except FAILURES:
        return
    kind = type(inside).__name__
    try:
        second = probe_output(denoiser, again, shape, labels)
    except FAILURES as e:
        raise BadInput(
            f"{name} cannot be saved: {kind}, built again from its config, fails ({first_line(e)}): its config does "
            "not describe it"
        ) from e
    scale = float(first.abs().max())
    slack = 1e-4 if all(w.itemsize >= 4 for w in inside.state_dict().values() if w.is_floating_point()) else 0.05
    if not bool(((first - second).abs() <= slack * max(scale, 1e-6)).all()) and bool(first.isfinite().all()):
        raise BadInput(
            f"{name} cannot be saved: {kind}, built again from its config with the same tensors, answers otherwise "
            f"(by {float((first - second).abs().max()):.3g} of {scale:.3g}): what changes its answer belongs into "
            "net.config, as its constructor's keyword arguments, or into a buffer that is saved (persistent=True)"
        )


def rebuild(net: nn.Module) -> nn.Module:
    """The network as `load` would make it, on the device of this one."""
    told = identity(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 1)  # buffers that are drawn must not agree by luck
        again = user_class(told["module"], told["class"], [type(net)])(**told["config"])
    again.load_state_dict(net.state_dict())
    return again.to(device_of(net))


def probe_output(denoiser: Denoiser, net: nn.Module, shape: tuple[int, ...], labels: bool) -> Tensor:
    """What a network says about two samples of noise, in the middle of the schedule, float32. It is left as it is."""
    device = device_of(net)
    around = copy.copy(denoiser)  # `replace` would set the network's mode
    around._modules = {**denoiser._modules, "net": net}
    with torch.no_grad(), evaluating(net), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        x = torch.randn(2, *shape).to(device)
        cond: dict[str, Any] = {"label": torch.zeros(2, dtype=torch.int64, device=device)} if labels else {}
        return around.raw(x, 0.5, **cond).float()


def check_trainable(name: str, denoiser: Denoiser, shape: tuple[int, ...], cond: dict[str, Tensor]) -> None:
    """Refuse a network that cannot be trained: without weights, that cannot be copied, or that fails on a sample.

    cond: what it is told with two samples.
    """
    net = denoiser.net
    if next((p for p in net.parameters() if p.is_floating_point() or p.is_complex()), None) is None:
        raise BadInput(f"{name} has no weights that could be trained: {type(net).__name__} has no parameters")
    try:
        with evaluating(denoiser), torch.random.fork_rng(devices=[]):
            x = torch.zeros(2, *shape, device=device_of(denoiser))
            denoiser.raw(x, 0.5, **cond)  # with gradients, as in training: it may keep what cannot be copied
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
