"""`SplitBlocks`: split points of any network whose blocks can be read from its structure; its own `forward` runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...accelerators._caching.split import map_tensors
from ...errors import BadInput
from .replay import Trace, placeholder, replaced
from .split_network import SplitNetwork
from .structure import read_structure

__all__ = ["OWN_TIME", "Inputs", "SplitBlocks"]

OWN_TIME = "own_time"  # a side input: the time as the network was called with it
UNBATCHED = re.compile("^(img|txt)_ids$|rotary|rope|freqs")  # arguments of the positions of all samples
KINDS_OF_INPUTS = 8  # kinds of inputs, such as the two branches of guidance with texts of different lengths


class Inputs:
    """The arguments of one evaluation.

    Args:
        x: (B, *S), the sample.
        time: (B,), in the scheduler's units.
        cond: further arguments of the network's `forward`, by its own names.
        several: whether they are those of several evaluations in one batch.
    """

    def __init__(self, x: Tensor, time: Tensor, cond: dict[str, Any], several: bool = False) -> None:
        self.x, self.time, self.cond, self.several = x, time, cond, several


class Features:
    """What the second half of a network needs of the first: outputs of modules, by name.

    Args:
        outputs: trees of tensors with the batch first.
        trace: of the evaluation that they are part of.
    """

    def __init__(self, outputs: dict[str, Any], trace: Trace) -> None:
        self.outputs, self.trace = outputs, trace


def _flatten(features: Features) -> tuple[list[Any], Any]:
    """Flatten for torch's pytree."""
    return list(features.outputs.values()), (tuple(features.outputs), features.trace)


def _unflatten(values: Any, context: Any) -> Features:
    """Unflatten for torch's pytree."""
    return Features(dict(zip(context[0], values)), context[1])


pytree.register_pytree_node(Features, _flatten, _unflatten)


@dataclass(frozen=True)
class Split:
    """A split of a network for one kind of inputs.

    Attributes:
        encoder: names of the modules before it, in the order in which they run.
        needed: those whose outputs the others read.
        reads_x: whether the others read the noisy sample too.
    """

    encoder: tuple[str, ...]
    needed: tuple[str, ...]
    reads_x: bool


class SplitBlocks(SplitNetwork):
    """A network of `diffusers`, or one built like them, that is split between its blocks.

    Its own `forward` runs, and where features are reused the modules that gave them are not called: those of the
    encoder whose outputs are needed give them again, the others a tensor of NaN. The first evaluation of every kind of
    inputs checks that this is the network's output; a network of which it is not is refused.

    Conditions are the arguments of the network's `forward` by its own names; position ids, ControlNet residuals and
    attention kwargs among them.

    Args:
        net: the network, left unchanged.
        with_variance: see `SplitNetwork`.

    Raises:
        BadInput: where its structure cannot be read.
    """

    def __init__(self, net: nn.Module, with_variance: bool = False) -> None:
        super().__init__(net, with_variance)
        self.structure = read_structure(net)
        self.output_class: Any = None
        self._splits: dict[Any, Split] = {}  # by kind of inputs
        self._copying = False  # whether later modules change the features in place

    @property
    def null_conditions(self) -> bool:
        """See `SplitNetwork`: a pipeline passes the conditions of both branches itself."""
        return False

    @property
    def config(self) -> Any:
        """The configuration of the network, empty where it has none."""
        return getattr(self.net, "config", {})

    @property
    def depth(self) -> int | None:
        """The number of blocks, among which a transformer can be split; None: a U-Net, split after its middle."""
        return None if self.structure.halves else len(self.structure.blocks)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """Raw output (B, *S) at noisy x (B, *S)."""
        return self._run(Inputs(x, time, cond), {})

    def inputs(self, x: Tensor, time: Tensor, cond: dict[str, Any]) -> Inputs:
        """The arguments of one evaluation: x (B, *S), time (B,) and conditions."""
        return Inputs(x, time, cond)

    def repeated_inputs(self, x: Tensor, time: Tensor, cond: dict[str, Any]) -> Inputs:
        """The arguments of as many evaluations in one batch as `time` (s B,) has values for x (B, *S)."""
        count, rows = len(time) // len(x), len(x)
        x = x.repeat(count, *[1] * (x.ndim - 1))
        return Inputs(x, time, _repeated({**cond, **self.side_inputs.conditions}, count, rows), count > 1)

    def evaluate_blocks(self, first: int | None, inputs: Inputs) -> tuple[Features, Tensor]:
        """The features after the first blocks, and the raw output (B, *S), of one evaluation.

        Args:
            first: how many blocks; None: of a U-Net.
            inputs: of the evaluation.

        Raises:
            BadInput: at the first evaluation, where the output does not follow from the features.
        """
        key = first, _signature(inputs)
        if key not in self._splits:
            return self._first_evaluation(first, inputs, key)
        split, trace = self._splits[key], Trace(len(inputs.x), inputs.x.device)
        outputs: dict[str, Any] = {}

        def store(name: str, output: Any) -> None:
            if name in split.needed:
                outputs[name] = _copied(output) if self._copying else output

        raw = self._run(inputs, self._recording(split.encoder, trace, store))
        return Features(outputs, trace), raw

    def decode_blocks(self, first: int | None, features: Features, inputs: Inputs) -> Tensor:
        """The raw output (B, *S), from features.

        Args:
            first: see `evaluate_blocks`.
            features: of `evaluate_blocks`, possibly repeated for several evaluations.
            inputs: of the evaluation; of its sample only the shape is read, by most networks.

        Raises:
            BadInput: where several evaluations cannot be decoded in one batch.
        """
        split = next(split for key, split in self._splits.items() if key[0] == first and _fits(split, features))
        if inputs.several and split.reads_x:
            raise BadInput(
                f"the last blocks of {type(self.net).__name__} read the noisy sample, so that it decodes one step at a "
                "time: use parallel=1"
            )
        raw = self._replay(split.encoder, features, inputs)
        if len(raw) != len(inputs.x):
            raise BadInput(
                f"{type(self.net).__name__} gave {len(raw)} samples for a batch of {len(inputs.x)}: use parallel=1"
            )
        return raw

    def _first_evaluation(self, first: int | None, inputs: Inputs, key: Any) -> tuple[Features, Tensor]:
        """An evaluation that shows of which modules the second half needs the outputs."""
        blocks, halves = self.structure.blocks, self.structure.halves
        last = {name.rpartition(".")[0]: name for name in blocks}.values()  # of each list
        for every in (True,) if halves else (False, True):  # False: later blocks read only the last ones' outputs
            trace, live, outputs = Trace(len(inputs.x), inputs.x.device), dict[str, Any](), dict[str, Any]()

            def store(
                name: str,
                output: Any,
                every: bool = every,
                trace: Any = trace,
                live: Any = live,
                outputs: Any = outputs,
            ) -> None:
                count = len(trace.residual)
                if halves or count == first or (count < (first or 0) and (every or name in last)):
                    live[name], outputs[name] = output, _copied(output)

            raw = self._run(inputs, self._recording((*blocks, *self.structure.stem), trace, store))
            encoder = self._encoder(trace, first)
            outputs = {name: outputs[name] for name in encoder if name in outputs}
            self._copying |= any(not _same(live[name], outputs[name]) for name in outputs)
            for needed in [tuple(outputs)] if every else [(encoder[-1],), tuple(outputs)]:
                features = Features({name: outputs[name] for name in needed}, trace)
                split = self._checked(encoder, features, inputs, raw)
                if split is not None:
                    if len(self._splits) >= KINDS_OF_INPUTS:
                        del self._splits[next(iter(self._splits))]
                    self._splits[key] = split
                    return features, raw
        raise BadInput(
            f"{type(self.net).__name__} cannot be split after {encoder[-1]}: its output does not follow from what the "
            "blocks before return"
        )

    def _checked(self, encoder: tuple[str, ...], features: Features, inputs: Inputs, raw: Tensor) -> Split | None:
        """The split, if the output follows from these features."""
        hidden = Inputs(torch.full_like(inputs.x, float("nan")), inputs.time, inputs.cond)
        for reads_x in (False, True):
            ours = self._replay(
                encoder, Features(_copied(features.outputs), features.trace), inputs if reads_x else hidden
            )
            if _equal(ours, raw):
                return Split(encoder, tuple(features.outputs), reads_x)
        return None

    def _recording(self, names: Sequence[str], trace: Trace, store: Any) -> dict[str, Any]:
        """Calls of modules that are recorded in a trace."""
        return {name: trace.recording(name, self.net.get_submodule(name), store) for name in names}

    def _encoder(self, trace: Trace, first: int | None) -> tuple[str, ...]:
        """The modules that run before the split, in order."""
        order, blocks, name = trace.order, self.structure.blocks, type(self.net).__name__
        if self.structure.halves:
            if [block for block in order if block in blocks] != list(blocks):
                raise BadInput(
                    f"{name} cannot be split: it does not run {blocks[0]} to {blocks[-1]} once each, in order"
                )
            end = blocks[self.structure.encoder - 1]
            within = order[order.index(blocks[0]) : order.index(end) + 1]
            return tuple(block for block in within if block in blocks or block in trace.residual)
        twice = [block for block in order if order.count(block) > 1]
        if twice:
            raise BadInput(f"{name} cannot be split: it runs {twice[0]} more than once per evaluation")
        if first is None or first >= len(trace.residual):
            ran = f"{len(trace.residual)} of its {len(blocks)} blocks ran and return what has the shape of an input"
            raise BadInput(f"{name} cannot be split after {first} blocks: {ran}")
        return tuple(trace.residual[:first])

    def _replay(self, encoder: Sequence[str], features: Features, inputs: Inputs) -> Tensor:
        """The output of the network's forward, with features in place of its encoder."""
        trace, calls = features.trace, {}
        for name in encoder:
            if name in features.outputs:
                value = features.outputs[name]
                calls[name] = _constant(_copied(value) if self._copying else value)
            else:
                value = placeholder(trace.outputs[name], len(inputs.x) // trace.rows, trace.device)
                calls[name] = _constant(value)
        return self._run(inputs, calls)

    def _run(self, inputs: Inputs, calls: dict[str, Any]) -> Tensor:
        """The raw output of the network's own forward, with other calls in place of some modules."""
        net, structure = self._parts, self.structure
        cond = dict(inputs.cond) if inputs.several else {**inputs.cond, **self.side_inputs.conditions}
        own = cond.pop(OWN_TIME, None)
        cond = {key: dict(value) if isinstance(value, dict) else value for key, value in cond.items()}
        known = own is not None and not inputs.several
        time = _rows_of(own, inputs.x) if known else self._time(inputs.time, own)
        arguments = {structure.sample: inputs.x, structure.time: time, **cond}
        with replaced(net, calls):
            output = type(net).forward(net, **arguments)
        self.output_class = type(output)
        return _single(output, type(net).__name__)

    def _time(self, time: Tensor, own: Any) -> Tensor:
        """What the network takes as its time, for times of its scheduler."""
        scale = self.side_inputs.scale
        value = time if scale is None else scale.argument(time)
        return value.to(own.dtype) if isinstance(own, Tensor) and own.is_floating_point() else value


def _constant(value: Any) -> Any:
    """A function of anything that returns a value."""
    return lambda *args, **kwargs: value


def _rows_of(time: Any, x: Tensor) -> Any:
    """The time argument as the network was called with it, for a part of its batch."""
    if isinstance(time, Tensor) and time.ndim == 1 and len(time) > len(x):
        return time[: len(x)]
    return time


def _single(output: Any, name: str) -> Tensor:
    """The one tensor among a network's outputs."""
    values = [output] if isinstance(output, Tensor) else list(output.values() if hasattr(output, "values") else output)
    tensors = [value for value in values if value is not None]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise BadInput(f"{name} returns {len(tensors)} values, not one tensor: hasten cannot run it by its blocks")
    return tensors[0]


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two outputs are equal up to rounding; NaN is not."""
    if torch.equal(ours, theirs):
        return True
    scale = theirs.abs().max() if theirs.numel() else 0.0
    return ours.shape == theirs.shape and bool(
        (ours - theirs).abs().max() <= 16 * torch.finfo(theirs.dtype).eps * scale
    )


def _signature(inputs: Inputs) -> Any:
    """What the shapes inside the network follow from."""
    leaves, structure = pytree.tree_flatten((inputs.x, inputs.cond))
    kinds = [
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf)[:200]
        for leaf in leaves
    ]
    return str(structure), tuple(kinds)


def _repeated(cond: dict[str, Any], count: int, rows: int) -> dict[str, Any]:
    """Conditions repeated along the batch, those of frames of a batch too; positions have no batch."""

    def repeated(leaf: Tensor) -> Tensor:
        return leaf if leaf.ndim == 0 or len(leaf) % rows else leaf.repeat(count, *[1] * (leaf.ndim - 1))

    return {
        key: value if key == OWN_TIME or UNBATCHED.search(key) else map_tensors(repeated, value)
        for key, value in cond.items()
    }


def _copied(tree: Any) -> Any:
    """The tree with copies of its tensors."""
    return map_tensors(torch.clone, tree)


def _same(one: Any, other: Any) -> bool:
    """Whether two trees of the same structure have equal tensors."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other))
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


def _fits(split: Split, features: Features) -> bool:
    """Whether features are those of a split."""
    return split.needed == tuple(features.outputs) and set(split.encoder) <= set(features.trace.outputs)
