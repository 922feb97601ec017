"""Model: a denoiser and what a user needs beside it; `shelf` reads and writes its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..accelerators import Call, SamplingContext, accelerate
from ..accelerators._calls import model_calls
from ..denoiser import Denoiser, device_of, evaluating
from ..errors import BadInput, HastenError, check_int, check_number, nearest
from ..guides.cfg import CFG, with_step_count
from ..images import to_image_tensor
from ..performance.autotune import autotune, format_runtime, parse_runtime
from ..pick import pick
from ..plan.draw import compile_plan
from ..plan.draw import draw_unchecked as draw
from ..plan.table import Plan
from ..sampling import Callback, Noise, Progress, batch_progress
from ..storage import model_folder as shelf
from ..times import check_steps
from ..utils.random import LARGEST_SEED
from .finite import check_sample
from .resolve import Way, checked, grid_of, several, spelled

Label: TypeAlias = int | str | Sequence[int | str] | Tensor | None
RECOMMENDED = "recommended"
KEPT = 4  # accelerated denoisers of a model


@dataclass
class Model:
    """A denoiser plus what a user needs: shape, classes, recommended sampling, card.

    denoiser: `forward(x_t (B, C, H, W), t, label=) -> x0 (B, C, H, W)`.
    shape: `(C, H, W)` of one sample. classes: class names in label order, or None for an unconditional model.
    codec: what a sample is: `image`, pixels in [-1, 1]; `latent`, of an autoencoder; `raw`, anything else, which is
        left as it is (points, audio, video): what a shape other than (C, H, W), C of 1, 3 or 4, is taken for.
    sampler, times, steps, guidance_scale: what `sample` uses where it is not told, spelled as `pick` reads them.
    plan: what `sample` uses instead where it is told none of sampler, times and other steps. plans: more, by name.
    statistics, parts: tensors measured on the model and small networks beside it, by name: what tuning leaves for the
        methods that need it.
    conditioning: of a model that takes prompts where others take labels: `cond(n, prompt, seed)` gives what the network
        is told (n, ...). decoder: of a model of latents: `decode(samples)` gives the images.
    pipeline: of diffusers, with which the network was loaded and can be saved again.
    card: anything JSON about training, data, figures and licence.
    sha256: of the weights file that the model was loaded from or saved to.
    """

    denoiser: Denoiser
    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None = None
    codec: str = "image"
    sampler: str = "unipc"
    times: str = "angle"
    steps: int = 16
    guidance_scale: float = 1.0
    plan: Plan | None = None
    card: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, nn.Module] = field(default_factory=dict)
    conditioning: Any = None
    decoder: Any = None
    pipeline: Any = None
    _accelerated: dict[Any, nn.Module] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.codec == "image" and (len(self.shape) != 3 or self.shape[0] not in (1, 3, 4)):
            self.codec = "raw"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.denoiser)

    def to(self, device: str | torch.device) -> Model:
        """The same model with its weights moved."""
        parts = {name: net.to(device) for name, net in self.parts.items()}
        beside = {
            key: one and one.to(device) for key, one in (("conditioning", self.conditioning), ("decoder", self.decoder))
        }
        return replace(self, denoiser=self.denoiser.to(device), parts=parts, **beside)

    def labels(self, n: int, label: Label = None) -> Tensor | None:
        """Labels of `n` images, `(n,)` int64: None for an unconditional model, and for one that takes prompts.

        label: one class for all images: its name in any case, or its index (a number that is the name of a class is
            that name); a sequence, of which image k gets entry `k % len`; `"none"`: no class, the label that guidance
            calls unconditional; a tensor of integers: indices, as the network takes them; None: class `k % C`.
        Raises BadInput for a label that the model does not have.
        """
        if self.conditioning is not None:
            return None
        if self.classes is None:
            if label is not None:
                raise BadInput(f"{self.name} has no classes, so label={label!r} means nothing to it")
            return None
        from ..train.names import label_indices

        return label_indices(n, label, self.classes, self.denoiser.null_label, self.name)

    def conditions(self, n: int, label: Label = None, seed: int = 0) -> dict[str, Tensor]:
        """What tells the network apart the `n` samples (n, ...): their labels, or what is made of their prompts."""
        if self.conditioning is not None:
            made = self.conditioning.cond(n, label, seed)
            return {key: value.to(self.device) for key, value in made.items()}
        labels = self.labels(n, label)
        return {} if labels is None else {"label": labels.to(self.device)}

    def cond(self, n: int) -> dict[str, Tensor]:
        """What the denoiser itself must be told with `n` samples: their labels, and the guidance scale of a student."""
        told = self.conditions(n)
        if self.denoiser.net_takes_guidance:
            told["guidance"] = torch.full((n,), float(self.guidance_scale), device=self.device)
        if self.denoiser.step_counts is not None:
            told["steps"] = torch.full((n,), self.denoiser.step_counts[0], device=self.device)
        return told

    def class_index(self, label: int | str) -> int:
        """The index of a class given by name in any case, or by index where no class is named by a number; of "none"
        the null label."""
        from ..train.names import class_index

        return class_index(label, self.classes or (), self.denoiser.null_label, self.name)

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        label: Label = None,
        seed: int = 0,
        sampler: Any = None,
        times: Any = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
        runtime: str = "fp32",
        guides: Sequence[Any] = (),
        start: Any = None,
        plan: Any = None,
        images: Any = None,
        accelerators: Sequence[Any] = (),
        callback: Callback | None = None,
    ) -> Tensor:
        """`n` images, `(n, C, H, W)` float32 in [-1, 1], on the CPU; other samples (see `codec`) as `(n, *shape)`.

        Image k depends on `seed + k` and its label alone, not on `n` or `batch_size` (but under a guide that steers a
        whole batch, which says so).

        label: see `labels`. seed: of image 0, from 0 to 2^64 - n; image k uses `seed + k`.
        sampler, times: as `pick` spells them, such as `"dpm:order=2"` and `"karras"`, or made, such as
            `DPMSolver(order=2)` and `Karras()`; times may be a float64 tensor. steps: of the time grid.
        guidance_scale: 1 is the plain conditional model; more than 1 costs two network evaluations a step
            (Ho & Salimans 2022, 2207.12598).
        batch_size: images in the network at once. progress: called with (network calls done, of how many).
        runtime: `fp32`, `bf16` (autocast; faster from about 16 images on, 1 % off), `auto`, see `runtime_for`.
        guides: more guides, such as `"interval:low=0.2,high=5"`, in the order in which they wrap the model.
        start: where sampling begins, such as `"ccdf:time=0.3"`; None: from noise.
        plan: one of `plans` by name, a plan's .json file, or a `Plan`, in place of sampler, times and steps.
        images: (n, ...), what a start such as `ccdf` begins from: a tensor or NumPy array, floats in [-1, 1] or uint8,
            or PIL images.
        accelerators: what makes an evaluation cheaper, such as `"encoder_propagation"`, in any order.
        callback: called after each evaluation as `callback(step, t, x, x0)`, for one batch after the other; see `walk`.
        Raises BadInput for a value that cannot be, with the nearest that can.
        """
        n, batch_size = check_int("n", n, 1, 10**8), check_int("batch_size", batch_size, 1)
        seed = check_int("seed", seed, 0, LARGEST_SEED + 1 - n)
        if self.card.get("distilled", {}).get("figures", {}).get("direction") == "encode":
            raise BadInput(f"{self.name} encodes images into noise and draws none: see hasten restyle")
        way = self.way(sampler, times, steps, guidance_scale, guides, start, plan, accelerators)
        if images is not None:
            images = to_image_tensor(images, self.shape if self.decoder is None else None)
        if images is not None and len(images) != n:
            raise BadInput(f"images must be one for each of the {n} samples, found {len(images)}")
        if images is not None and start is None:
            raise BadInput("images are for a start that begins from them, such as start='ccdf:time=0.3'")
        conditions = self.conditions(n, label, seed)
        device = self.device
        made: list[Tensor] = []
        machine = parse_runtime(self.runtime_for(runtime, min(n, batch_size)), device.type)
        machine.prepare(self.denoiser)
        with machine.apply(), evaluating(self.denoiser):
            for first in range(0, n, batch_size):
                count = min(batch_size, n - first)
                noise = Noise(range(seed + first, seed + first + count), self.shape, torch.float32, device)
                cond = {key: value[first : first + count] for key, value in conditions.items()}
                denoiser, x, given = way.denoiser, None, None
                if way.start is not None:
                    given = None if images is None else images[first : first + count].to(device)
                    denoiser = way.start.wrap(denoiser, given) if hasattr(way.start, "wrap") else denoiser
                    x = way.start.begin(denoiser, noise, way.times[0], given, **cond)
                tick = batch_progress(progress, first, n, batch_size)
                how: dict[str, Any] = {"plan": way.plan, "progress": tick, "callback": callback, "cond": cond}
                x = draw(denoiser, way.sampler, way.times, noise, x=x, **how)
                x = x if self.decoder is None else self.decoder.decode(x)
                check_sample(x, made, way, denoiser, noise, given, cond, self.decoder, runtime)
                pixels = self.codec == "image" or self.decoder is not None
                made.append((x.float().clamp(-1, 1) if pixels else x.float()).cpu())
        return torch.cat(made)

    def way(
        self,
        sampler: Any = None,
        times: Any = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guides: Sequence[Any] = (),
        start: Any = None,
        plan: Any = None,
        accelerators: Sequence[Any] = (),
    ) -> Way:
        """What these arguments of `sample` amount to, checked and bound to the model (None: what it recommends)."""
        guides, accelerators = several("guides", guides), several("accelerators", accelerators)
        begin = self.bound("starts", start) if start is not None else None
        table, method, grid = self.method(sampler, times, steps, plan, None if begin is None else begin.time)
        base, chosen = self, [pick("accelerators", one) if isinstance(one, str) else one for one in accelerators]
        if chosen:
            again = {"sampler": sampler, "times": times, "steps": steps, "guidance_scale": guidance_scale, "plan": plan}
            base = replace(self, denoiser=self.accelerated(chosen, table, again))  # type: ignore[arg-type]
        for one in chosen:
            if hasattr(one, "plan") and table is not None:
                table = one.plan(table, self.denoiser)
        denoiser = with_step_count(base.guided(guidance_scale, guides), len(grid) - 1)
        if hasattr(method, "wrap"):
            denoiser = method.wrap(denoiser)
        return Way(denoiser, base.denoiser, table, method, grid, begin)

    def accelerated(self, chosen: Sequence[Any], plan: Plan | None, setting: dict[str, Any]) -> nn.Module:
        """The denoiser with these accelerators, for a sampling by `plan` with this `setting` of `sample`.

        The last few are kept: to calibrate or to compile may take long.
        """
        ahead_times = None if plan is None else tuple(plan.times[:-1].tolist())
        key = (self.denoiser, tuple(map(repr, chosen)), ahead_times, str(setting), self.device)
        made = self._accelerated.pop(key, None)
        if made is None:
            if len(self._accelerated) >= KEPT:
                self._accelerated.pop(next(iter(self._accelerated)))
            made = accelerate(
                self.denoiser, chosen, SamplingContext(ahead_times, lambda n, seed: self.calls(n, seed, **setting))
            )
        self._accelerated[key] = made  # the last is the one that was used last
        return made

    def calls(self, n: int, seed: int, **setting: Any) -> list[Call]:
        """What the plain network is asked, call by call, when n images are sampled at once with this `setting`."""
        return model_calls(self, n, seed, setting)

    def guided(self, guidance_scale: float | None = None, guides: Sequence[Any] = ()) -> nn.Module:
        """The denoiser under classifier-free guidance (None: the recommended scale) and then other guides."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        scale = check_number("guidance_scale", scale)
        if self.conditioning is not None and self.denoiser.guidance_range is None:
            scale = max(scale, 1)  # as in pipelines, where 1 or less is none and turbo models are published with 0
        unguided = self.classes is None and self.conditioning is None
        if scale != 1 and unguided and self.denoiser.guidance_range is None:
            raise BadInput(f"{self.name} has no classes to guide towards: guidance_scale must be 1, got {scale:g}")
        denoiser = CFG(scale=float(scale)).wrap(self.denoiser)
        for guide in guides:
            denoiser = self.bound("guides", guide).wrap(denoiser)
        return denoiser

    def method(
        self,
        sampler: Any,
        times: Any,
        steps: int | None,
        plan: Any = None,
        begin: float | None = None,
    ) -> tuple[Plan | None, Any, Tensor]:
        """What to run for these choices (None: the recommended one): plan or None, sampler, times. begin: the first."""
        steps = None if steps is None else check_steps(steps)
        free = sampler is None and times is None
        if plan is None and self.plan is not None and free and begin is None:
            plan = RECOMMENDED if steps in (None, self.plan.nfe) else None
        if plan is not None:
            if not free:
                raise BadInput("a plan holds its sampler and times: leave sampler and times out, or the plan")
            found = self.named_plan(plan)
            if steps not in (None, found.nfe):
                raise BadInput(f"the plan has {found.nfe} network evaluations, asked for {steps} steps")
            if begin is not None and abs(float(found.times[0]) - begin) > 1e-9:
                raise BadInput(f"the plan begins at t = {float(found.times[0]):g}, the start at {begin:g}")
            return found, self.bound("samplers", self.sampler, quiet=True), found.times
        method = self.bound("samplers", self.sampler if sampler is None else sampler)
        grid = grid_of(self.denoiser.schedule, self.times if times is None else times, steps, self.steps, begin)
        return (compile_plan(method, self.denoiser.schedule, grid) if method.linear else None), method, grid

    def named_plan(self, plan: str | Plan) -> Plan:
        """One of `plans` by name, the recommended one, or the plan in a .json file.

        Raises BadInput for a plan that is not there, and for one of another schedule than the model's.
        """
        found = self._found_plan(plan)
        found.check_schedule(self.denoiser.schedule)
        return found

    def _found_plan(self, plan: str | Plan) -> Plan:
        if isinstance(plan, Plan):
            return plan
        known = {**self.plans, **({} if self.plan is None else {RECOMMENDED: self.plan})}
        if isinstance(plan, str) and plan in known:
            return known[plan]
        if str(plan).endswith(".json"):
            try:
                return Plan.from_json(Path(plan).read_text())
            except OSError as e:
                raise BadInput(f"cannot read {plan}: {e.strerror or e}") from e
        hint = nearest(str(plan), known) if known else "it has none"
        raise BadInput(f"{self.name} has no plan {str(plan)!r}: {hint}, or a plan's .json file")

    def bound(self, folder: str, method: Any, quiet: bool = False) -> Any:
        """A method, spelled or made, with what it needs of this model. quiet: as it is, where the model lacks that."""
        method = pick(folder, method) if isinstance(method, str) else checked(folder, method)
        if not hasattr(method, "bind"):
            return method
        try:
            return method.bind(self.statistics, self.parts)
        except HastenError:
            if quiet:
                return method
            raise

    def setting(
        self,
        sampler: Any = None,
        times: Any = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        runtime: str = "fp32",
        batch_size: int = 64,
        guides: Sequence[str] = (),
        start: str | None = None,
        plan: str | None = None,
        accelerators: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The arguments of `sample` that a record must name, with the recommended ones filled in, checked."""
        way = self.way(sampler, times, steps, guidance_scale, guides, start, plan, accelerators)
        told: dict[str, Any] = {
            "sampler": spelled(self.sampler if sampler is None else sampler),
            "times": spelled(self.times if times is None else times),
        }
        told["steps"] = len(way.times) - 1
        if way.plan is not None and (plan is not None or way.plan is self.plan):
            told = {"plan": plan or RECOMMENDED, "steps": way.plan.nfe}
        told["guidance_scale"] = float(self.guidance_scale if guidance_scale is None else guidance_scale)
        told |= {"guides": tuple(guides)} if guides else {}
        told |= {"start": start} if start is not None else {}
        told |= {"accelerators": tuple(accelerators)} if accelerators else {}
        return {**told, "runtime": self.runtime_for(runtime, batch_size)}

    def runtime_for(self, runtime: str = "auto", batch_size: int = 64) -> str:
        """`auto` as what a timing of this network on this machine found fastest; anything else as it is spelled.

        `fp32` or `bf16` (autocast), with `+medium` (matrix products) and `+channels_last` as wanted. The timing is
        done once for a network, machine and power of two that `batch_size` reaches, and remembered.
        """
        if runtime != "auto":
            return format_runtime(parse_runtime(runtime))
        size = 2 ** (batch_size.bit_length() - 1)
        x = torch.randn((size, *self.shape), generator=torch.Generator().manual_seed(0)).to(self.device)
        cond = self.cond(size)
        identity = self.sha256 or str(self.denoiser.net)
        return format_runtime(autotune(self.denoiser, x, identity, **cond))

    def save(self, folder: str | Path, half: bool = False) -> Path:
        """Write the model's folder: model.json, weights.safetensors, and what it has of plans, statistics and parts.

        half: weights as float16. A new folder appears whole or not at all. In a folder that is there (a training
        run's), the files take their names one by one, the description last, and nothing else in it is touched.
        """
        return shelf.save(self, Path(folder), half)

    def describe(self) -> dict[str, Any]:
        """What `model.json` holds, but for the hashes of the files, which are known once they are written."""
        return shelf.describe(self)
