"""`AcceleratedForward`: the forward pass of a pipeline's network under accelerators."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...accelerators import COMPILE, WRAP, Call, SamplingContext, accelerate, with_defaults
from ...denoiser import reset
from ...errors import BadInput
from ...nets.copies import copy_modules
from ...pick import format_spec
from .calls import argument_reader, is_residual, network_output, raw_output
from .hooks import check_hooks
from .network import ExchangedLayers, changed, sample_parameters, structure, without_hooks
from .schedules import SchedulerSpec, read_scheduler, set_steps
from .split_blocks import OWN_TIME, SplitBlocks
from .split_network import SplitNetwork
from .time_scale import scheduler_timestep
from .timeline import Branches, Timeline, single_timestep
from .wrap import split_network

__all__ = ["AcceleratedForward"]

CACHE_SIZE = 4  # accelerated denoisers, one per list of times


class AcceleratedForward:
    """The forward pass of one network of a pipeline under accelerators.

    Args:
        module: the accelerated network, of a class of `accelerated_class`.
        accelerators: in the order of their stages.
        scheduler: of the pipeline.

    Attributes:
        layers: replaced by an accelerator (`quantize`); the network has them only while it is evaluated.
        denoiser: the accelerated denoiser that was evaluated last.
    """

    def __init__(self, module: nn.Module, accelerators: Sequence[Any], scheduler: Any) -> None:
        kind: Any = type(module).__mro__[2]
        core = object.__new__(kind)  # the same network as an instance of its original class
        core.__dict__ = vars(module)
        vars(module)["accelerated_forward"] = self
        self.module, self.core, self.accelerators = module, core, accelerators
        self.claimed = frozenset[str]().union(*(with_defaults(one).claims for one in accelerators))
        self.swapping = [one for one in accelerators if with_defaults(one).stage < COMPILE]
        self.compiling = [one for one in accelerators if COMPILE <= with_defaults(one).stage < WRAP]
        self.wrapping = [one for one in accelerators if with_defaults(one).stage >= WRAP]
        self.reader = argument_reader(kind)
        self.signature = inspect.signature(kind.forward)
        self.scheduler, self.spec = scheduler, read_scheduler(scheduler)
        self.owner: Any = None  # a weak reference to the pipeline
        self.original: Any = None  # the network whose hooks and patch these are
        self.original_network: Any = None  # an `OriginalNetwork`, to detect changes
        self.patch: Any = None
        self.hooks: list[Any] = []
        self.network = split_network(core, with_variance=True)
        self.side_inputs = self.network.side_inputs
        self.source: Any = self.spec.denoiser(self.network)
        self.source.training = False
        self.layers = ExchangedLayers(core)
        self.calls: Callable[..., Callable[[int, int], list[Call]] | None] = lambda times, all_times: None
        self.branches = Branches()
        self.base: Any = None
        self.base_state: Any = None
        self.cache: dict[Any, Any] = {}
        self.warned: set[str] = set()
        self.denoiser: Any = None
        self.denoisers: dict[int, Any] = {}  # by branch of guidance, where a pipeline evaluates them one by one
        self._spec: SchedulerSpec | None = None

    def prepare(self, steps: int) -> None:
        """Replace layers, search and check now, for a sampling of so many steps."""
        if self.patch is not None:
            return
        scheduler = copy.deepcopy(self.scheduler)
        set_steps(scheduler, steps)
        times = tuple(self._current_spec().time(scheduler.timesteps).tolist())
        context = SamplingContext(times, self.calls(times, times), self.claimed)
        if self.swapping:
            network = split_network(without_hooks(self.core), with_variance=True)
            network.side_inputs = self.side_inputs
            self._take_layers(accelerate(self.spec.denoiser(network).eval(), self.swapping, context))
        self._cached_denoiser(times, times, self.wrapping)

    def _take_layers(self, denoiser: Any) -> None:
        """Take over the replaced layers of an accelerated denoiser, and the wrappers around its network."""
        holder = denoiser
        while not isinstance(holder.net, SplitNetwork):
            holder = holder.net
        self.layers = ExchangedLayers(self.core, holder.net.net)
        holder.net = self.network
        self.source = denoiser

    def forward(self, args: Any, kwargs: Any) -> Any:
        """The network's own `forward` under accelerators: the same arguments, the same output."""
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(self.original, *args, **kwargs)
        output = self.patch(*args, **kwargs) if self.patch is not None else self._forward(args, kwargs)
        for hook in reversed(self.hooks):
            output = hook.post_forward(self.original, output)
        return output

    def _forward(self, args: Any, kwargs: Any) -> Any:
        """`forward` without hooks."""
        bound = self.signature.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        return_dict = arguments.pop("return_dict", True)
        x, timestep, cond = self.reader(arguments)
        # residuals of the encoder's features change at every evaluation: accelerators must not see them as conditions
        residuals = {name: cond.pop(name) for name in list(cond) if is_residual(name)}
        scheduler = self._scheduler()
        if isinstance(self.network, SplitBlocks):
            residuals[OWN_TIME] = timestep
            timestep = self._scheduler_timestep(timestep, x)
        if self.branches.advance(scheduler, timestep, x):
            self._begin()
        self.denoiser = self.denoisers[self.branches.current]
        t = self._time(timestep)
        with self.side_inputs.using(residuals), self.layers.exchanged():
            raw = raw_output(self.denoiser, x, t, cond)
        output_class = getattr(self.network, "output_class", None)
        return network_output(self.core, raw, output_class) if return_dict else (raw,)

    @property
    def timeline(self) -> Timeline:
        """Where the sampling is, in the present branch of guidance."""
        return self.branches.timeline

    def _scheduler_timestep(self, timestep: Any, x: Tensor) -> Any:
        """The scheduler's timestep for a time of a network whose pipeline may scale it."""
        at, scheduler = self.branches.timelines[0], self._scheduler()
        known = at.done > 0 and at.begin >= 0 and at.table is scheduler.timesteps
        expected = at.begin + at.done - self.branches.repeats(x) if known else None
        return scheduler_timestep(timestep, scheduler, self.core, self.side_inputs, expected)

    def _time(self, timestep: Any) -> Tensor:
        """t in [0, 1] of this evaluation."""
        at = self.timeline
        value = at.values[at.begin + at.done - 1] if at.begin >= 0 else single_timestep(timestep)
        return self._current_spec().time(value)

    def _begin(self) -> None:
        """Begin a sampling: check that the network is unchanged, and reset the accelerators' state."""
        check_hooks(self.core, self.accelerators)
        if self.layers.outdated():
            names = ", ".join(format_spec(one) for one in self.swapping)
            raise BadInput(
                f"the weights of this {type(self.core).__name__} were changed after {names} (a fused LoRA, other "
                "weights): change the original pipeline first, and accelerate that"
            )
        original = self.original_network
        if original is not None and "original" not in self.warned and original.diverged(self.core):
            self.warned.add("original")
            warnings.warn(
                f"the {type(self.core).__name__} of the original pipeline now has other layers or weights (a LoRA?), "
                "which the accelerated pipeline does not have: load them into the accelerated pipeline, or accelerate "
                "the pipeline again",
                stacklevel=2,
            )
        self.layers.locate()
        at, spec = self.timeline, self._current_spec()
        all_times = tuple(spec.time(torch.tensor(at.values, dtype=torch.float64)).tolist())
        times = all_times[at.begin :] if at.begin >= 0 else None
        denoiser = self._cached_denoiser(times, all_times, self._applicable(times))
        self.denoisers[self.branches.current] = denoiser
        reset(denoiser)

    def _cached_denoiser(
        self, times: tuple[float, ...] | None, all_times: tuple[float, ...], wrapping: list[Any]
    ) -> Any:
        """The accelerated denoiser for a sampling, from a small cache.

        Args:
            times: of the sampling; None where they are not known.
            all_times: of the scheduler, of which `times` may be the last ones.
            wrapping: accelerators of the last stage.
        """
        self._renew()
        key = times, len(wrapping), self.branches.current
        if key in self.cache:
            self.cache[key] = denoiser = self.cache.pop(key)  # ordered by last use
            return denoiser
        context = SamplingContext(times, None if times is None else self.calls(times, all_times), self.claimed)
        with self.layers.exchanged():
            if self.base is None:
                self.base = accelerate(self._source(), self.compiling, context)
            denoiser = accelerate(self.base, wrapping, context)
        if len(self.cache) >= CACHE_SIZE:
            del self.cache[next(iter(self.cache))]
        self.cache[key] = denoiser
        return denoiser

    def _source(self) -> Any:
        """The denoiser that is compiled or copied: without hooks around its network where it is copied."""
        copying = [one for one in self.compiling if with_defaults(one).stage > COMPILE]
        if not copying:
            return self.source
        network = split_network(without_hooks(self.core), with_variance=True)
        network.side_inputs = self.side_inputs
        return self.spec.denoiser(network).eval() if self.source.net is self.network else self.source

    def _renew(self) -> None:
        """Drop what was compiled or copied from the network where that has changed."""
        if not self.compiling:
            return
        copying = any(with_defaults(one).stage > COMPILE for one in self.compiling)
        now = structure(self.core) if copying else (), sample_parameters(list(self.core.modules()))
        if self.base_state is not None and (now[0] != self.base_state[0] or changed(now[1], self.base_state[1])):
            self.base = None
            self.cache.clear()
        self.base_state = now

    def _applicable(self, times: tuple[float, ...] | None) -> list[Any]:
        """The accelerators of the last stage that apply to this sampling; a warning names the others."""
        reusing = [one for one in self.wrapping if with_defaults(one).stage == WRAP]
        skipped: list[Any] = []
        if not self.timeline.regular:
            skipped = reusing
            why = (
                "the network is evaluated more than once per step, or at other times than those of its own pipeline's "
                "scheduler (a pipeline made from the same parts must be accelerated itself)"
            )
        elif times is not None:
            skipped = [one for one in reusing if len(times) < with_defaults(one).min_queries]
            why = f"this sampling has {len(times)} model evaluations, too few to reuse anything"
        if skipped:
            names = ", ".join(map(format_spec, skipped))
            if why not in self.warned:
                warnings.warn(f"{names}: not applied, {why}", stacklevel=2)
            self.warned.add(why)
        return [one for one in self.wrapping if one not in skipped]

    def moved(self, fn: Any, outdated: bool) -> None:
        """After the network was moved or cast by `fn`: do the same with the replaced layers."""
        for layer in self.layers.replacements:
            layer._apply(fn)
        if not outdated:
            self.layers.renew()
        if any(with_defaults(one).stage > COMPILE for one in self.compiling):
            self.base = None
            self.cache.clear()

    def plain_copy(self) -> nn.Module:
        """The network without accelerators, with the same children."""
        net = without_hooks(self.core)
        vars(net).pop("accelerated_forward")
        return net

    def copied(self, net: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """The accelerated network around `net`, a deep copy of this one's."""
        module: Any = object.__new__(type(self.module))
        module.__dict__ = vars(net)
        memo[id(self.module)] = module
        forward = AcceleratedForward(module, self.accelerators, copy.deepcopy(self.scheduler, memo))
        forward.spec, forward.calls, forward.patch, forward.original = self.spec, self.calls, self.patch, self.original
        forward.hooks = list(self.hooks)
        if self.layers:
            forward.layers = self.layers.copied(forward.core, lambda layer: copy.deepcopy(layer, memo))
            direct = self.source.net is self.network
            holder = forward.source = copy.copy(self.source) if direct else _copied(self.source)
            while holder.net is not self.network:
                holder = holder.net
            holder.net = forward.network
        return module

    def _scheduler(self) -> Any:
        """The scheduler of the pipeline, as long as that exists; else its last one."""
        pipe = None if self.owner is None else self.owner()
        if pipe is not None and pipe.scheduler is not self.scheduler:
            self.scheduler = pipe.scheduler
            self._spec = None
        return self.scheduler

    def _current_spec(self) -> SchedulerSpec:
        """The spec with which the network was accelerated, after a check of the present scheduler against it."""
        if self._spec is None:
            if read_scheduler(self._scheduler()).flow != self.spec.flow:
                raise BadInput("the scheduler is of another kind than the one that the network was accelerated with")
            self._spec = self.spec
        return self._spec


def _copied(denoiser: Any) -> Any:
    """A denoiser and the wrappers of its network (`TimeGroups`), copied without the split network inside."""
    return copy_modules(denoiser, modules={id(m): m for m in denoiser.modules() if isinstance(m, SplitNetwork)})
