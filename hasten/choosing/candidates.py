"""The candidates of a search: samplers, steps, plans, students and LoRAs at hand, then what makes these cheaper."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import zoo
from ..compare.jobs import load_other_model, location_of
from ..compare.variants import Variant
from ..errors import HastenError
from ..model.model import Model
from ..model.resolve import RECOMMENDED, grid_of
from ..plan.config import SamplingConfig, spec
from ..storage.model_folder import DESCRIPTION

__all__ = ["KINDS", "Space", "appliable", "plain_variant", "search_space"]

SAMPLERS = ("unipc", "unipc:order=3", "dpm:order=2", "ddim")
GRIDS = ("angle", "trailing")
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32, 40)
GUIDES = ("delta_reuse:every=2", "interval:high=2", "interval:low=0.2,high=5")
CACHES = ("deep_cache:every=2,extrapolate=1", "deep_cache:every=3,extrapolate=1", "encoder_propagation:keys=uniform")
BITS = ("quantize",)
COMPILE = ("compile",)
# What a search may try beside sampler and steps; `exclude` names what it leaves out.
KINDS = ("plan", "guidance", "cache", "bits", "student", "lora", "decoder")
CACHED_STEPS = 9  # below, a cache refuses: it has nothing to reuse


@dataclass(frozen=True)
class Space:
    """What a search tries.

    Args:
        first: methods by themselves: a sampler with its steps, a plan, a student, a LoRA.
        additions: what is then added to the best of these, each by its kind: fields of a `Variant`.
        source: where they come from, for messages.
    """

    first: tuple[Variant, ...]
    additions: tuple[tuple[str, dict[str, Any]], ...] = ()
    source: str = "choose"

    def expanded(self, variant: Variant, plain: Variant, kinds: Sequence[str] | None = None) -> list[Variant]:
        """A candidate with each addition (of these kinds) that it can take and has none of its kind."""
        found = []
        for kind, fields in self.additions:
            if kinds is not None and kind not in kinds:
                continue
            (name, value), *_ = fields.items()
            if has_kind(variant, kind) or not suits(variant, kind, plain):
                continue
            text = value[0] if isinstance(value, tuple) else value
            changes: dict[str, Any] = {"name": f"{variant.name} + {text}"}
            changes[name] = (*getattr(variant, name), *value) if isinstance(value, tuple) else value
            found.append(replace(variant, **changes))
        return found


def has_kind(variant: Variant, kind: str) -> bool:
    """Whether a candidate has an addition of this kind."""
    names = [text.partition(":")[0] for text in (*variant.accelerators, *variant.guides)]
    known = {
        "guidance": [one.partition(":")[0] for one in GUIDES],
        "cache": [one.partition(":")[0] for one in CACHES],
        "bits": [one.partition(":")[0] for one in BITS],
        "compile": list(COMPILE),
    }
    return variant.decoder is not None if kind == "decoder" else bool(set(known[kind]) & set(names))


def suits(variant: Variant, kind: str, plain: Variant) -> bool:
    """Whether an addition of this kind can help a candidate."""
    student = variant.model is not None or variant.lora is not None
    if kind == "guidance":  # students have theirs inside, plans with branches their own
        return variant.doubled and variant.guidance_scale != 1 and not student and variant.plan is None
    return kind != "cache" or (variant.steps >= CACHED_STEPS and not student)


def plain_variant(model: Model, config: SamplingConfig) -> Variant:
    """The plain model: as a config says, what it leaves open as the model recommends; a pipeline that hasten has not
    saved recommends nothing, and is sampled by DDIM (a flow by Euler) with the default number of steps of its call.

    Args:
        model: The model.
        config: Of `--config`.
    """
    if (steps := default_steps(model)) is not None and config.sampler is None and config.plan is None:
        own = {"sampler": "ddim", "times": config.times or "trailing", "steps": config.steps or steps}
        config = config.replace(**own)
    complete = model.resolve(config.replace(precision="fp32")).config
    plan = None if complete.plan is None else str(complete.plan)
    scale = float(complete.guidance_scale or 1.0)
    doubled = model.denoiser.guidance_range is None
    return Variant(
        name="the plain model",
        sampler="" if plan else str(spec(complete.sampler)),
        times="" if plan else str(spec(complete.times)),
        steps=int(complete.steps or 0),
        guidance_scale=scale,
        guides=tuple(str(spec(one)) for one in complete.guides),
        plan=plan,
        accelerators=tuple(str(spec(one)) for one in complete.accelerators),
        doubled=doubled,
        role="reference",
    )


def default_steps(model: Model) -> int | None:
    """The number of steps that a pipeline takes by default; None for what recommends its own: a model of hasten."""
    folder = str(getattr(getattr(model.pipeline, "config", None), "_name_or_path", ""))
    if model.pipeline is None or (folder and (Path(folder) / DESCRIPTION).is_file()):
        return None
    default = inspect.signature(type(model.pipeline).__call__).parameters.get("num_inference_steps")
    value = 50 if default is None else default.default
    return value if isinstance(value, int) and value > 0 else 50


def search_space(
    model: Model,
    plain: Variant,
    exclude: Sequence[str] = (),
    students: Sequence[str] = (),
    loras: Sequence[str] = (),
    compiled: bool = False,
) -> Space:
    """The candidates for a model.

    Args:
        model: The model.
        plain: How it is sampled without a search.
        exclude: Kinds that are excluded, of `KINDS`.
        students: Other models of the same images, by name or folder, beside the bundled ones.
        loras: LoRA files, beside the bundled ones.
        compiled: Also try `torch.compile`, whose first call takes minutes on a CPU.
    """
    first = list(method_variants(model, plain))
    if "plan" not in exclude:
        first += [
            replace(plain, name=f"plan {name}", sampler="", times="", steps=0, plan=name, role="variant")
            for name, table in model.plans.items()
            if table.nfe < plain.steps and name != plain.plan
        ]
    own = replace(plain, sampler="", times="", steps=0, plan=None, guides=(), accelerators=(), role="variant")
    names = [*students, *(() if "student" in exclude else bundled_students(model))]
    for name in dict.fromkeys(names):
        counts = step_counts(name, model)
        names_of = {n: f"{name}, {n} step{'s' * (n > 1)}" if n else name for n in counts}
        first += [replace(own, name=names_of[n], model=name, steps=n) for n in counts]
    known = zoo.additions()
    beside = {kind: [n for n, card in known.items() if card.kind == kind and card.of == model.name] for kind in KINDS}
    files = [*loras, *(() if "lora" in exclude else beside["lora"])]
    first += [replace(own, name=f"LoRA {name}", lora=name) for name in dict.fromkeys(files)]
    additions: list[tuple[str, dict[str, Any]]] = []
    kinds = {"guidance": GUIDES, "cache": CACHES, "bits": BITS}
    additions += [
        (kind, {"guides" if kind == "guidance" else "accelerators": (text,)})
        for kind, texts in kinds.items()
        if kind not in exclude
        for text in texts
    ]
    additions += [("compile", {"accelerators": (text,)}) for text in COMPILE if compiled]
    additions += [("decoder", {"decoder": name}) for name in beside["decoder"] if "decoder" not in exclude]
    return Space(tuple(first), tuple(additions))


def method_variants(model: Model, plain: Variant) -> list[Variant]:
    """Samplers and grids with fewer steps than the plain model."""
    limit = plain.steps
    samplers = dict.fromkeys(filter(None, (plain.sampler, model.sampler, *SAMPLERS)))
    grids = different_grids(model, dict.fromkeys(filter(None, (plain.times, model.times, *GRIDS))))
    made: dict[Any, Variant] = {}
    for steps in STEPS:
        for sampler in samplers:
            for grid in grids:
                if steps >= limit or (steps == 1 and sampler != "ddim"):
                    continue
                name = f"{sampler}, {grid} times, {steps} step" + ("" if steps == 1 else "s")
                fields: dict[str, Any] = {"sampler": sampler, "times": grid, "steps": steps, "plan": None}
                variant = replace(plain, name=name, role="variant", **fields)
                made.setdefault(variant.method, variant)
    return list(made.values())


def different_grids(model: Model, names: Iterable[str]) -> list[str]:
    """The grids that differ on the model's schedule: on the cosine path equal angles are equal times."""
    found: dict[tuple[float, ...], str] = {}
    for name in names:
        try:
            times = grid_of(model.denoiser.schedule, name, 5, 5)
        except HastenError:
            continue
        found.setdefault(tuple(round(t, 6) for t in times.tolist()), name)
    return list(found.values())


def bundled_students(model: Model) -> list[str]:
    """The bundled students of a bundled model."""
    cards, name = zoo.cards(), location_of(model)
    return [n for n in (f"{name}_student", f"{name}_one_step") if name in cards and n in cards]


def step_counts(name: str, model: Model) -> tuple[int, ...]:
    """The numbers of steps that a student is for; (0,) where that is what it recommends, or it cannot be loaded."""
    try:
        other = load_other_model(name, model, "choose")
    except HastenError:  # the candidate is then rejected, with the reason
        return (0,)
    return tuple(sorted(other.denoiser.step_counts or ())) or (0,)


def appliable(variant: Variant, model: Model) -> str | None:
    """Why `hasten.apply` cannot put a candidate into a pipeline of diffusers; None where it can."""
    if variant.model is not None:
        return f"it is another model, {variant.model}"
    if variant.guides:
        return f"the scheduler of a pipeline has no {variant.guides[0].partition(':')[0]}"
    if variant.start is not None:
        return "a pipeline has no initialisation of ours"
    plan = None if variant.plan is None else model.plans.get(variant.plan, model.plan)
    if plan is not None and variant.plan in {*model.plans, RECOMMENDED}:
        if plan.branches is not None:
            return "its plan evaluates the branches of guidance one by one"
        if plan.basis is not None:
            return "its plan works in a basis of its own"
    return None
