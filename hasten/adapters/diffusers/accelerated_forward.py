"""`Runner`: how an accelerated network answers, query by query."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...accelerators import COMPILE, WRAP, Call, SamplingContext, accelerate
from ...denoiser import reset
from ...errors import BadInput
from ...nets.copies import copy_modules
from ...pick import format_spec
from .calls import ARGUMENT_READERS, RESIDUAL_PREFIXES, network_output, raw_output
from .network import ExchangedLayers, changed, sample_parameters, structure, without_hooks
from .schedules import SchedulerSpec, read_scheduler, set_steps
from .split_network import SplitNetwork
from .timeline import Timeline, single_timestep
from .wrap import split_network

__all__ = ["AcceleratedForward"]

CACHE_SIZE = 4  # accelerated denoisers, one for each list of times


class AcceleratedForward:
    """How an accelerated network answers: which accelerators, in which sampling, with which layers.

    Attributes:
        layers: those that an accelerator exchanged (`quantize`); the network keeps its own, and has these as it runs.
        run: the denoiser that answered last.
    """

    def __init__(self, module: nn.Module, accelerators: Sequence[Any], scheduler: Any) -> None:
        kind: Any = type(module).__mro__[2]
        core = object.__new__(kind)  # the same network, as an instance of its own class
        core.__dict__ = vars(module)
        vars(module)["runner"] = self
        self.module, self.core, self.accelerators = module, core, accelerators
        self.claimed = frozenset[str]().union(*(one.claims for one in accelerators))
        self.swapping = [one for one in accelerators if one.stage < COMPILE]
        self.still = [one for one in accelerators if COMPILE <= one.stage < WRAP]
        self.moving = [one for one in accelerators if one.stage >= WRAP]
        self.place = ARGUMENT_READERS[next(base.__name__ for base in kind.__mro__ if base.__name__ in ARGUMENT_READERS)]
        self.signature = inspect.signature(kind.forward)
        self.scheduler, self.known = scheduler, read_scheduler(scheduler)
        self.owner: Any = None  # a weak reference to the pipeline
        self.original: Any = None  # whose hooks and patch these are
        self.given: Any = None  # the network that it was made from, where that has other layers
        self.patch: Any = None
        self.hooks: list[Any] = []
        self.seams = split_network(core, whole=True)
        self.source: Any = self.known.denoiser(self.seams)
        self.source.training = False
        self.layers = ExchangedLayers(core)
        self.calls: Callable[..., Callable[[int, int], list[Call]] | None] = lambda times, whole: None
        self.timeline = Timeline()
        self.base: Any = None
        self.made_from: Any = None
        self.kept: dict[Any, Any] = {}
        self.warned: set[str] = set()
        self.run: Any = None
        self._reading: SchedulerSpec | None = None

    def prepare(self, steps: int) -> None:
        """Exchange layers, search and refuse now, for a sampling of so many steps."""
        if self.patch is not None:
            return
        scheduler = copy.deepcopy(self.scheduler)
        set_steps(scheduler, steps)
        times = tuple(self._read().time(scheduler.timesteps).tolist())
        ahead = SamplingContext(times, self.calls(times, times), self.claimed)
        if self.swapping:
            network = split_network(without_hooks(self.core), whole=True)
            network.beside = self.seams.beside
            found: Any = accelerate(self.known.denoiser(network).eval(), self.swapping, ahead)
            self._take(found, network)
        self._denoiser(times, times, self.moving)

    def _take(self, found: Any, network: nn.Module) -> None:
        """Take over the layers of an exchanged network, and what lies around it."""
        holder = found
        while not isinstance(holder.net, SplitNetwork):
            holder = holder.net
        self.layers = ExchangedLayers(self.core, holder.net.net)
        holder.net = self.seams
        self.source = found

    def answer(self, args: Any, kwargs: Any) -> Any:
        """As the network's own `forward`, whose arguments and answer these are."""
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(self.original, *args, **kwargs)
        made = self.patch(*args, **kwargs) if self.patch is not None else self._answer(args, kwargs)
        for hook in reversed(self.hooks):
            made = hook.post_forward(self.original, made)
        return made

    def _answer(self, args: Any, kwargs: Any) -> Any:
        bound = self.signature.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        dictionary = given.pop("return_dict", True)
        x, timestep, cond = self.place(given)
        # what is added to the encoder's features changes at every query: accelerators must not take it for conditions
        passing = {name: cond.pop(name) for name in list(cond) if name.startswith(RESIDUAL_PREFIXES)}
        scheduler = self._scheduler()
        if self.timeline.ask(scheduler, timestep):
            self._begin()
        t = self._time(timestep)
        with self.seams.beside.given(passing), self.layers.exchanged():
            raw = raw_output(self.run, x, t, cond)
        return network_output(self.core, raw) if dictionary else (raw,)

    def _time(self, timestep: Any) -> Tensor:
        """t in [0, 1] of this query."""
        line = self.timeline
        value = line.values[line.begin + line.done - 1] if line.begin >= 0 else single_timestep(timestep)
        return self._read().time(value)

    def _begin(self) -> None:
        """A sampling begins: check that the network is what was prepared, and forget what was kept."""
        if self.layers.outdated():
            names = ", ".join(format_spec(one) for one in self.swapping)
            raise BadInput(
                f"the weights of this {type(self.core).__name__} were changed after {names} (a fused LoRA, other "
                "weights): change the original pipeline first, and accelerate that"
            )
        if self.given is not None and "given" not in self.warned and self.given.left(self.core):
            self.warned.add("given")
            warnings.warn(
                f"the {type(self.core).__name__} of the pipeline that accelerate was given has other layers or weights "
                "than then (a LoRA?), which the accelerated pipeline does not have: load them into the accelerated "
                "pipeline, or accelerate the pipeline again",
                stacklevel=2,
            )
        self.layers.find()
        line, read = self.timeline, self._read()
        whole = tuple(read.time(torch.tensor(line.values, dtype=torch.float64)).tolist())
        times = whole[line.begin :] if line.begin >= 0 else None
        self.run = self._denoiser(times, whole, self._usable(times))
        reset(self.run)

    def _denoiser(self, times: tuple[float, ...] | None, whole: tuple[float, ...], moving: list[Any]) -> Any:
        """The accelerated denoiser for these times, the last few of which are kept.

        times: None where they are not known. whole: of the scheduler, of which `times` may be the last ones.
        """
        self._renew()
        key = times, len(moving)
        if key in self.kept:
            self.kept[key] = made = self.kept.pop(key)  # the last is the one that was used last
            return made
        ahead = SamplingContext(times, None if times is None else self.calls(times, whole), self.claimed)
        with self.layers.exchanged():
            if self.base is None:
                self.base = accelerate(self._source(), self.still, ahead)
            made = accelerate(self.base, moving, ahead)
        if len(self.kept) >= CACHE_SIZE:
            del self.kept[next(iter(self.kept))]
        self.kept[key] = made
        return made

    def _source(self) -> Any:
        """The denoiser for what copies or compiles the network: one without hooks around it."""
        parted = [one for one in self.still if one.stage > COMPILE]
        if not parted:
            return self.source
        network = split_network(without_hooks(self.core), whole=True)
        network.beside = self.seams.beside
        return self.known.denoiser(network).eval() if self.source.net is self.seams else self.source

    def _renew(self) -> None:
        """Compile or part the network anew where it has changed."""
        if not self.still:
            return
        parted = any(one.stage > COMPILE for one in self.still)
        now = structure(self.core) if parted else (), sample_parameters(list(self.core.modules()))
        if self.made_from is not None and (now[0] != self.made_from[0] or changed(now[1], self.made_from[1])):
            self.base = None
            self.kept.clear()
        self.made_from = now

    def _usable(self, times: tuple[float, ...] | None) -> list[Any]:
        """The accelerators that can work in this sampling; those that cannot are left out, with one warning."""
        wraps = [one for one in self.moving if one.stage == WRAP]
        left: list[Any] = []
        if not self.timeline.regular:
            left = wraps
            why = (
                "the network is asked more than once a step, or at other times than those of its own pipeline's "
                "scheduler (a pipeline made from the same parts must be accelerated itself)"
            )
        elif times is not None:
            left = [one for one in wraps if len(times) < getattr(one, "least_queries", 0)]
            why = f"this sampling has {len(times)} queries of the network, too few to reuse anything"
        if left:
            names = ", ".join(map(format_spec, left))
            if why not in self.warned:
                warnings.warn(f"{names}: left out, {why}", stacklevel=2)
            self.warned.add(why)
        return [one for one in self.moving if one not in left]

    def moved(self, fn: Any, outdated: bool) -> None:
        """The network was moved or cast, by this function: so are the layers that stand in."""
        for layer in self.layers.others:
            layer._apply(fn)
        if not outdated:
            self.layers.renew()
        if any(one.stage > COMPILE for one in self.still):
            self.base = None
            self.kept.clear()

    def plain_copy(self) -> nn.Module:
        """The network without its accelerators, on the same children."""
        net = without_hooks(self.core)
        vars(net).pop("runner")
        return net

    def copied(self, net: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A network with the same accelerators around `net`, a copy of this one."""
        module: Any = object.__new__(type(self.module))
        module.__dict__ = vars(net)
        memo[id(self.module)] = module
        made = AcceleratedForward(module, self.accelerators, copy.deepcopy(self.scheduler, memo))
        made.known, made.calls, made.patch, made.original = self.known, self.calls, self.patch, self.original
        made.hooks = list(self.hooks)
        if self.layers:
            made.layers = self.layers.copied(made.core, lambda layer: copy.deepcopy(layer, memo))
            holder = made.source = copy.copy(self.source) if self.source.net is self.seams else _copied(self.source)
            while holder.net is not self.seams:
                holder = holder.net
            holder.net = made.seams
        return module

    def _scheduler(self) -> Any:
        """The scheduler of the pipeline that it was made for, as long as that is there; else the last one."""
        pipe = None if self.owner is None else self.owner()
        if pipe is not None and pipe.scheduler is not self.scheduler:
            self.scheduler = pipe.scheduler
            self._reading = None
        return self.scheduler

    def _read(self) -> SchedulerSpec:
        """What times mean: as the network was accelerated, whatever scheduler drives it now."""
        if self._reading is None:
            if read_scheduler(self._scheduler()).flow != self.known.flow:
                raise BadInput("the scheduler is of another kind than the one that the network was accelerated with")
            self._reading = self.known
        return self._reading


def _copied(denoiser: Any) -> Any:
    """A denoiser and the networks around its own (`TimeGroups`), copied without what is inside."""
    return copy_modules(denoiser, modules={id(m): m for m in denoiser.modules() if isinstance(m, SplitNetwork)})
