"""`Accelerated`: a module that stands in a pipeline for its network and runs it under accelerators."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..accelerators import WRAP, Ahead, Call, accelerate, ordered
from ..errors import BadInput
from ..sampling import reset, spell
from ..times import Explicit
from ._recorded import drawn_calls, recorded
from ._schedules import Reading, begin_of, reading, set_steps
from ._seams import with_seams

__all__ = ["Accelerated"]

PASSING = ("down_residual_", "mid_residual", "adapter_")
KEPT = 4  # wrapped networks, one for each list of times
Place = Callable[[dict[str, Any]], tuple[Tensor, Any, dict[str, Any]]]


class Accelerated(nn.Module):
    """A network of `diffusers` under accelerators, called as the network itself and answering as it does.

    What it does not have is the network's: `config`, `dtype`, methods; and `isinstance` takes it for one. Accelerators
    see it as a denoiser, of which the pipeline is given the raw output: without any, to the bit that of the network.
    """

    def __init__(self, net: nn.Module, accelerators: Sequence[Any], scheduler: Any, steps: int) -> None:
        super(Accelerated, self).__init__()  # noqa: UP008  (`__class__` is taken, below)
        accelerators = ordered(accelerators)
        for one in accelerators:
            if getattr(one, "inject", 0):
                raise BadInput(
                    f"{spell(one)}: a pipeline's scheduler injects nothing: leave inject out, or load a Model"
                )
        self.claimed = frozenset[str]().union(*(one.claims for one in accelerators))
        self.__dict__["original"] = net  # not a child: an accelerator may have replaced its weights
        self.still = [one for one in accelerators if one.stage < WRAP]
        self.moving = [one for one in accelerators if one.stage >= WRAP]
        self.place = PLACES[next(kind.__name__ for kind in type(net).__mro__ if kind.__name__ in PLACES)]
        self.signature = inspect.signature(type(net).forward)
        self.scheduler, self.steps = scheduler, steps
        self.owner: Any = None  # a weak reference to the pipeline
        seams, self.known = with_seams(net, whole=True), reading(scheduler)
        self.beside = seams.beside  # which copies of the network share
        self.__dict__["plain"] = self.known.denoiser(seams).eval()  # no child either, but where `base` is it
        self.calls: Callable[..., Callable[[int, int], list[Call]] | None] = lambda times, whole: None
        self.base: nn.Module | None = None
        self.kept = nn.ModuleDict()
        self._reading: Reading | None = None
        self._seen: Any = None  # the timesteps of the scheduler in the sampling that is under way,
        self._own: list[float] = []  # those of its queries, which comes next, and what answers
        self._next = 0
        self._run: Any = None

    @staticmethod
    def put_into(
        pipe: Any, slot: str, net: nn.Module, accelerators: Sequence[Any], steps: int, seed: int, prompts: Any
    ) -> Any:
        """A copy of the pipeline with such a network in `slot`."""
        if isinstance(vars(pipe).get(slot), Accelerated):
            raise BadInput("this pipeline is accelerated already: give all accelerators together, to the original one")
        kind: Any = type(net)
        module, new = kind_for(kind)(net, accelerators, pipe.scheduler, steps), copy.copy(pipe)
        vars(new)[slot] = module  # past the pipeline's own __setattr__: its description stays, it is saved as it was
        module.owner = weakref.ref(new)
        module.calls = lambda times, whole: sampled(pipe, times, whole, prompts, seed)
        scheduler = copy.deepcopy(pipe.scheduler)
        set_steps(scheduler, steps)
        whole = tuple(module._read().time(scheduler.timesteps).tolist())
        module._wrapped(whole, whole)  # what cannot work fails now
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's own `forward`, whose arguments and answer these are."""
        bound = self.signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        dictionary = given.pop("return_dict", True)
        x, timestep, cond = self.place(given)
        own = torch.as_tensor(timestep).detach().to("cpu", torch.float64).flatten()
        if len(own) > 1 and bool((own != own[0]).any()):
            raise BadInput("an accelerated network must be asked at one time for all its batch")
        at = float(own[0])
        # what is added to the encoder's features changes at every query: accelerators must not take it for conditions
        passing = {name: cond.pop(name) for name in list(cond) if name.startswith(PASSING)}
        with self.beside.given(passing):
            raw = raw_of(self._at(at), x, self._read().time(at), cond)
        return answer(self.original, raw) if dictionary else (raw,)

    def _at(self, timestep: float) -> nn.Module:
        """The denoiser for a query at this network time: the same as before, or reset where a sampling begins."""
        scheduler = self._scheduler()
        same = scheduler.timesteps is self._seen
        if same and self._next < len(self._own) and abs(self._own[self._next] - timestep) <= 1e-6 * max(1.0, timestep):
            self._next += 1
            return self._run
        begin = begin_of(scheduler, timestep)
        self._seen, self._own, self._next = scheduler.timesteps, [], 1
        times: tuple[float, ...] | None = None
        whole = tuple(self._read().time(scheduler.timesteps).tolist())
        if begin >= 0:
            self._own, times = scheduler.timesteps[begin:].tolist(), whole[begin:]
        self._run = self._wrapped(times, whole)
        reset(self._run)
        return self._run

    def _wrapped(self, times: tuple[float, ...] | None, whole: tuple[float, ...]) -> nn.Module:
        """The accelerated denoiser for these times, the last few of which are kept; what swaps layers is done once.

        times: None where they are not known. whole: of the scheduler, of which `times` may be the last ones.
        """
        key = str(hash(times))
        if key in self.kept:
            self.kept[key] = made = self.kept.pop(key)  # the last is the one that was used last
            return made
        ahead = Ahead(times, None if times is None else self.calls(times, whole), self.claimed)
        if self.base is None:
            self.base = accelerate(self.__dict__.pop("plain"), self.still, ahead)
        made = accelerate(self.base, self.moving, ahead)
        if len(self.kept) >= KEPT:
            del self.kept[next(iter(self.kept))]
        self.kept[key] = made
        return made

    def _scheduler(self) -> Any:
        """The scheduler of the pipeline that it was made for, as long as that is there; else the last one."""
        pipe = None if self.owner is None else self.owner()
        if pipe is not None and pipe.scheduler is not self.scheduler:
            self.scheduler = pipe.scheduler
            self._reading = None
        return self.scheduler

    def _read(self) -> Reading:
        """What times mean: as the network was accelerated, whatever scheduler drives it now."""
        if self._reading is None:
            if reading(self._scheduler()).flow != self.known.flow:
                raise BadInput("the scheduler is of another kind than the one that the network was accelerated with")
            self._reading = self.known
        return self._reading

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weights = next(self.parameters(), None)
        return self.original.device if weights is None else weights.device

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance, in pipelines that look
        return type(vars(self)["original"]) if "original" in vars(self) else Accelerated

    def __getattr__(self, name: str) -> Any:
        try:
            return super(Accelerated, self).__getattr__(name)  # noqa: UP008
        except AttributeError:
            if "original" not in vars(self):
                raise
            return getattr(vars(self)["original"], name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "owner": None}  # a weak reference cannot be copied


@cache
def kind_for(kind: Any) -> type[Accelerated]:
    """`Accelerated` for networks of this class, with the signature of their `forward`."""

    @wraps(kind.forward)  # type: ignore[attr-defined]
    def forward(self: Accelerated, *args: Any, **kwargs: Any) -> Any:
        return Accelerated.forward(self, *args, **kwargs)

    return type(f"Accelerated{kind.__name__}", (Accelerated,), {"forward": forward})


def sampled(
    pipe: Any, times: tuple[float, ...], whole: tuple[float, ...], prompts: Any, seed: int
) -> Callable[[int, int], list[Call]] | None:
    """`Ahead.calls` for a pipeline: what its network is asked at `times` when DDIM draws images on the `whole` times.

    None where the network wants more than hasten can give it by itself (an image to inpaint).
    """
    from .diffusers import load_pipeline, network_of

    if callable(prompts):
        net = network_of(pipe)[1]
        place = PLACES[next(kind.__name__ for kind in type(net).__mro__ if kind.__name__ in PLACES)]
        return recorded(pipe, prompts, net, place, seed)
    try:
        model = load_pipeline(pipe)
    except BadInput:
        return None

    def calls(n: int, first: int) -> list[Call]:
        grid = torch.unique(torch.tensor([*whole, 0.0], dtype=torch.float64)).flip(0)
        told: Any = {"sampler": "ddim", "times": spell(Explicit(tuple(grid.tolist()))), "steps": len(grid) - 1}
        return drawn_calls(model, n, prompts, seed + first, times, told)

    return calls


def answer(net: nn.Module, raw: Tensor) -> Any:
    """The output object of the network's own forward."""
    import importlib

    module = importlib.import_module(type(net).__module__)
    for name in ("UNet2DOutput", "UNet2DConditionOutput", "Transformer2DModelOutput"):
        if hasattr(module, name):
            return getattr(module, name)(sample=raw)
    raise BadInput(f"the output of {type(net).__name__} is not known: call it with return_dict=False")


# From the arguments of each network's forward: x, the time, and hasten's names for the conditions (see `_seams`).


def of_unet(given: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    return given["sample"], given["timestep"], present({"label": given["class_labels"]})


def of_conditional_unet(given: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    cond: dict[str, Any] = {
        "text": given["encoder_hidden_states"], "label": given["class_labels"],
        "timestep_cond": given["timestep_cond"], "mask": given["attention_mask"],
        "text_mask": given["encoder_attention_mask"], "mid_residual": given["mid_block_additional_residual"],
    }  # fmt: skip
    for name, value in (given["added_cond_kwargs"] or {}).items():
        several = value if isinstance(value, (list, tuple)) else None
        cond |= {f"added_{name}": value} if several is None else numbered(f"added_{name}", several)
    down, within = given["down_block_additional_residuals"], given["down_intrablock_additional_residuals"]
    if down is not None and cond["mid_residual"] is None and within is None:
        down, within = None, down  # an old way to hand over a T2I-Adapter's
    cond |= numbered("down_residual", down or ()) | numbered("adapter", within or ())
    options = dict(given["cross_attention_kwargs"] or {})
    if options.pop("scale", 1.0) != 1.0:
        raise BadInput("a LoRA scale cannot be given to an accelerated network: pipe.fuse_lora(lora_scale=...) before")
    return given["sample"], given["timestep"], present({**cond, "attention_options": options or None})


def of_dit(given: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    if given["cross_attention_kwargs"]:
        raise BadInput("cross_attention_kwargs are not known to an accelerated DiT")
    return given["hidden_states"], given["timestep"], present({"label": given["class_labels"]})


def of_joint_dit(given: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    for name in ("block_controlnet_hidden_states", "joint_attention_kwargs", "skip_layers"):
        if given.get(name):
            raise BadInput(f"{name} is not known to an accelerated SD3 transformer")
    cond = {"text": given["encoder_hidden_states"], "added_text_embeds": given["pooled_projections"]}
    return given["hidden_states"], given["timestep"], present(cond)


PLACES: dict[str, Place] = {
    "UNet2DModel": of_unet, "UNet2DConditionModel": of_conditional_unet, "DiTTransformer2DModel": of_dit,
    "SD3Transformer2DModel": of_joint_dit,
}  # fmt: skip


def raw_of(denoiser: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """The raw output of an accelerated denoiser; of one that only says x0, what it amounts to (up to rounding)."""
    if hasattr(type(denoiser), "raw"):
        return denoiser.raw(x, t, **cond)
    _, skip, scale = denoiser.prediction.coefficients(denoiser.schedule.alpha(t), denoiser.schedule.sigma(t))
    return (denoiser(x, t, **cond) - x * float(skip)) / float(scale)


def present(cond: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cond.items() if value is not None}


def numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_{k}": value for k, value in enumerate(values)}
