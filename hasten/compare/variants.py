"""Sets of variants: the methods that a comparison runs, read from TOML, with rows of equal cost added.

A set of variants is a TOML file (bundled ones are in `variant_sets`):

    n = 400                       # images per row, unless the caller sets it; likewise rounds = 3 of the timing
    prompts = ["a red fox"]       # of a model that takes prompts: image k gets number k mod their count
    [reference]
    sampler = "unipc:order=3"
    times = "lambda"
    steps = 64
    guidance_scale = 2.0
    [[variant]]
    name = "DDIM"
    sampler = "ddim"              # sampler, times, steps and guidance_scale may be lists: the product is run
    steps = [4, 8, 16]
    [[variant]]
    name = "fitted"
    plan = ["fitted-6", "fitted-8"]   # plans of the model, or .json files, in place of sampler, times and steps
    [[variant]]
    name = "student"
    model = ["runs/g/steps4", "runs/g/steps1"]   # other models of the same images: bundled names or folders
    [[variant]]
    name = "8 steps, light decoder"
    lora = "eight_steps.safetensors"  # merged into the weights; decoder: another image decoder, a folder
    decoder = "runs/decoder"
    optional = true                   # skipped, with a line, where the files are not there
    [[variant]]
    name = "student, first evaluation by the teacher"
    model = "runs/g/steps4"
    first_evaluation = "{model}"      # which restores diversity (2503.10637)

A variant's sampler, times, steps and guidance_scale default to the reference's; those of a variant with another `model`
or a `lora` to that model's own, but for guidance_scale. `guides` (a list) and `start` default to none. `{model}` is the
name or folder of the command's model. See docs/variants.md.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BadInput, HastenError, nearest
from ..plan.config import SamplingConfig

FOLDER = Path(__file__).resolve().parent / "variant_sets"
FILES = ("model", "lora", "decoder", "first_evaluation")
METHOD = ("sampler", "times", "steps", "guidance_scale", "guides", "start", "accelerators", *FILES[2:])
KEYS = ("name", *METHOD, "model", "lora", "plan", "optional")
LISTED = (*FILES, "sampler", "times", "steps", "guidance_scale", "start", "plan")


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: how to sample, and the role of the row.

    Args:
        name: Name of the row.
        sampler: Sampler as `--sampler` takes it; "" with a plan, or for the recommended method of `model`.
        times: Time grid; "" where `sampler` is.
        steps: Steps of the sampler; 0 with a plan.
        guidance_scale: Guidance scale, 1 for none.
        guides: Further guides.
        start: Initialisation; None for noise.
        plan: A plan of the model by name, or a .json file.
        model: Another model than that of the comparison, by name or folder.
        accelerators: Accelerators.
        lora: A LoRA file that is merged into the weights.
        decoder: Another image decoder of a model of latents, a folder.
        first_evaluation: Another model whose answer the first model evaluation is, a name or folder, unguided or with
            `:SCALE`.
        optional: Skipped where the model cannot run it, such as without its files.
        doubled: Whether guidance runs the network twice; False for networks that have it inside.
        role: "reference" (which the others are measured against), "variant", or "equal-cost" (the reference with fewer
            steps).
    """

    name: str
    sampler: str
    times: str
    steps: int
    guidance_scale: float = 1.0
    guides: tuple[str, ...] = ()
    start: str | None = None
    plan: str | None = None
    model: str | None = None
    accelerators: tuple[str, ...] = ()
    lora: str | None = None
    decoder: str | None = None
    first_evaluation: str | None = None
    optional: bool = False
    doubled: bool = True
    role: str = "variant"

    @property
    def config(self) -> SamplingConfig:
        """The method as a `SamplingConfig`; fields that are "" or 0 default to the model's recommendation."""
        return SamplingConfig(
            sampler=self.sampler or None,
            times=self.times or None,
            steps=self.steps or None,
            guidance_scale=self.guidance_scale,
            guides=self.guides,
            start=self.start,
            plan=self.plan,
            accelerators=self.accelerators,
        )

    @property
    def method(self) -> tuple[Any, ...]:
        """The method without its name: equal methods are the same row."""
        from ..pick import format_spec

        more = (self.guides, self.start, self.accelerators, *([] if self.model is None else [self.model]))
        more += tuple((name, getattr(self, name)) for name in FILES[1:] if getattr(self, name) is not None)
        if not self.sampler and self.plan is None:
            return "model", self.guidance_scale, *more, *([self.times, self.steps] if self.times or self.steps else [])
        if self.plan is not None:
            return "plan", self.plan, self.guidance_scale, *more
        sampler, times = (
            format_spec(_cached_pick("samplers", self.sampler)),
            format_spec(_cached_pick("times", self.times)),
        )
        return sampler, times, self.steps, self.guidance_scale, *more

    @property
    def nfe(self) -> float | None:
        """Declared network evaluations per image, of which a guided one counts 2 and an accelerated one 1; None where
        it depends on the model or on the images."""
        if (
            any(one is not None for one in (self.model, self.lora, self.plan, self.start, self.first_evaluation))
            or self.guides
        ):
            return None
        queries = _cached_pick("samplers", self.sampler).nfe(self.steps)
        return None if queries is None else queries * (1 if self.guidance_scale == 1 or not self.doubled else 2)


@dataclass(frozen=True)
class VariantSet:
    """A reference and the variants that are measured against it.

    Args:
        source: Name or path of the set, for error messages.
        reference: The reference.
        variants: The other rows.
        n: Default images per row.
        rounds: Default timing rounds.
        prompts: Default prompts, for models that take prompts.
    """

    source: str
    reference: Variant
    variants: tuple[Variant, ...]
    n: int = 500
    rounds: int = 5
    prompts: tuple[str, ...] = ()

    def with_guidance(self, low: float, high: float = math.inf, doubled: bool = True) -> VariantSet:
        """The same set with every guidance_scale moved into a range, for models that know no other.

        Args:
            low, high: The range: from 1 for pipelines, which sample without guidance below; that of a network that has
                its guidance inside, where rows that differ in nothing else become one.
            doubled: Whether a guided evaluation runs the network twice.
        """

        def moved(v: Variant) -> Variant:
            return replace(v, guidance_scale=min(max(v.guidance_scale, low), high), doubled=doubled)

        return replace(self, reference=moved(self.reference), variants=tuple(map(moved, self.variants)))

    def for_model(self, location: str) -> VariantSet:
        """The same set with `location` in the place of `{model}` in the names of models, LoRAs and decoders."""

        def filled(v: Variant) -> Variant:
            texts = {key: text for key in FILES if (text := getattr(v, key)) is not None}
            return replace(v, **{key: text.replace("{model}", location) for key, text in texts.items()})

        return replace(self, variants=tuple(map(filled, self.variants)))

    def rows(
        self, nfe: Callable[[Variant], float | None] = lambda variant: variant.nfe
    ) -> list[tuple[Variant, Variant | None]]:
        """Every row to run, with its equal-cost row.

        The equal-cost row is the reference with the maximum number of steps that cost no more: a variant of the set
        with that method, else a row of role "equal-cost".

        Args:
            nfe: NFE of a variant that does not declare it.

        Returns:
            Pairs (row, equal-cost row). The second is None for the reference, for accelerated variants, whose cost is a
            time, and where one step of the reference costs more already.
        """
        rows: dict[tuple[Any, ...], Variant] = {self.reference.method: self.reference}
        for variant in self.variants:
            rows.setdefault(variant.method, variant)
        plain = {method: row for method, row in rows.items() if not row.accelerators}
        costs = {method: nfe(row) if row.nfe is None else row.nfe for method, row in plain.items()}
        equal: dict[float | None, Variant | None] = {None: None}
        for cost in sorted({cost for cost in costs.values() if cost is not None}):
            steps = range(self.reference.steps, 0, -1)
            shorter = (replace(self.reference, steps=count, role="equal-cost") for count in steps)
            fitting = next((row for row in shorter if (row.nfe or 0) <= cost), None)
            if fitting is not None:
                name = shorter_name(self.reference.name, fitting.steps)
                name += ", equal cost" if name in {row.name for row in rows.values()} else ""
                fitting = rows.setdefault(fitting.method, replace(fitting, name=name))
            equal[cost] = fitting
        order = {"reference": 0, "variant": 1, "equal-cost": 1}
        ordered = sorted(rows.values(), key=lambda row: (order[row.role], row.role == "equal-cost"))
        equals = {"reference": lambda row: None, "equal-cost": lambda row: row}
        return [(row, equals.get(row.role, lambda row: equal[costs.get(row.method)])(row)) for row in ordered]


def shorter_name(name: str, steps: int) -> str:
    """The reference's name with another number of steps: "DDIM, 50 steps" becomes "DDIM, 8 steps"."""
    count = "1 step" if steps == 1 else f"{steps} steps"
    return re.sub(r"\b\d+ steps?\b", count, name) if re.search(r"\b\d+ steps?\b", name) else f"{name}, {count}"


@functools.lru_cache(256)
def _cached_pick(folder: str, text: str) -> Any:
    """`pick` with a cache, since the rows of a set share a few methods."""
    from ..pick import pick

    return pick(folder, text)


def variant_set_names() -> list[str]:
    """Names of the bundled sets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_variants(source: str | Path | None, times: str = "angle", guidance_scale: float = 1.0) -> VariantSet:
    """Read and check a set of variants.

    Args:
        source: A bundled set by name, or a TOML file by path. Default: "demo".
        times: Default time grid of the reference.
        guidance_scale: Default guidance scale of the reference.

    Raises:
        BadInput: for a file that cannot be read and for a value that no model accepts, with the file, the key and the
            nearest valid choice.
    """
    source = "demo" if source is None else source
    path = FOLDER / f"{source}.toml" if str(source) in variant_set_names() else Path(source)
    if not path.is_file():
        choices = nearest(str(source), variant_set_names())
        raise BadInput(f"no set of variants {str(source)!r}: neither a file nor bundled; {choices}")
    return parse_variants(_load_toml(path), str(source), times, guidance_scale)


def _load_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: not valid TOML: {e}") from e
    except OSError as e:
        raise BadInput(f"{path}: cannot be read: {e.strerror or e}") from e


def parse_variants(
    data: Mapping[str, Any], source: str = "variants", times: str = "angle", guidance_scale: float = 1.0
) -> VariantSet:
    """`load_variants` for the contents of a TOML file; `source` begins each error message."""
    top = ("reference", "variant", "n", "rounds", "prompts")
    _check_keys(data, top, source)
    for key, minimum, maximum in (("n", 10, 10**8), ("rounds", 1, 10**4)):
        if key in data and (type(data[key]) is not int or data[key] < minimum):
            raise BadInput(f"{source}: {key} must be an integer of at least {minimum}, got {data[key]!r}")
        if data.get(key, 0) > maximum:
            raise BadInput(f"{source}: {key} must be an integer of at most {maximum}, got {data[key]!r}")
    prompts = data.get("prompts", [])
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise BadInput(f"{source}: prompts must be a list of texts, got {prompts!r}")
    if not isinstance(data.get("reference"), dict):
        raise BadInput(f"{source}: there must be one [reference] table with a sampler and steps")
    if not isinstance(data.get("variant", []), list) or not all(isinstance(v, dict) for v in data.get("variant", [])):
        raise BadInput(f"{source}: write each variant as a [[variant]] table")
    head = {"name": "reference", "times": times, "guidance_scale": guidance_scale, **data["reference"]}
    for key in ("plan", "start", "guides", *FILES, "optional"):
        if key in head:
            raise BadInput(f"{source}: [reference]: the reference is a sampler with steps: it takes no {key}")
    reference = _expand_lists(head, f"{source}: [reference]", lists=False)[0]
    reference = replace(reference, role="reference")
    rest = {key: head[key] for key in ("sampler", "times", "steps", "guidance_scale") if key in head}
    variants: list[Variant] = []
    for i, table in enumerate(data.get("variant", []), 1):
        where = f"{source}: variant {i}" + (f" ({table['name']!r})" if isinstance(table.get("name"), str) else "")
        if "name" not in table:
            raise BadInput(f"{where}: has no name")
        _check_keys(table, KEYS, where)
        if "plan" in table:
            if both := [key for key in ("sampler", "times", "steps") if key in table]:
                raise BadInput(f"{where}: a plan holds its sampler, times and steps: remove {both[0]} or the plan")
            table = {"sampler": "", "times": "", "steps": 0, "guidance_scale": head["guidance_scale"], **table}
        elif ("model" in table or "lora" in table) and "sampler" not in table:
            table = {"sampler": "", "times": "", "steps": None, "guidance_scale": head["guidance_scale"], **table}
        elif not set(table) & set(METHOD):
            raise BadInput(f"{where}: it sets nothing of the method, so it is the reference again")
        variants += _expand_lists({**rest, **table}, where)
    seen = {reference.name}
    for variant in variants:
        if variant.name in seen:
            raise BadInput(f"{source}: the name {variant.name!r} is used twice: each row needs its own")
        seen.add(variant.name)
    numbers = {key: data[key] for key in ("n", "rounds") if key in data}
    return VariantSet(source, reference, tuple(variants), **numbers, prompts=tuple(prompts))


def _check_keys(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raise BadInput for an unknown key."""
    for key in table:
        if key not in keys:
            raise BadInput(f"{where}: unknown key {key!r}: {nearest(key, keys)}")


def _expand_lists(table: Mapping[str, Any], where: str, lists: bool = True) -> list[Variant]:
    """The variants of a table: the product over its lists, with the values that differ added to the name."""
    _check_keys(table, KEYS, where)
    for key in ("sampler", "steps"):
        if key not in table:
            raise BadInput(f"{where}: has no {key}")
    if not isinstance(table["name"], str) or not table["name"].strip():
        raise BadInput(f"{where}: name must be text, got {table['name']!r}")
    if not isinstance(table.get("optional", False), bool):
        raise BadInput(f"{where}: optional must be true or false, got {table['optional']!r}")
    texts = {key: table.get(key, []) for key in ("guides", "accelerators")}
    for key, value in texts.items():
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise BadInput(f"{where}: {key} must be a list of texts, got {value!r}")
    choices: dict[str, list[Any]] = {}
    for key in LISTED:
        value = table.get(key)
        if isinstance(value, list) and (not lists or not value):
            raise BadInput(f"{where}: {key} must be {'one or more values' if lists else 'one value'}, got {value!r}")
        choices[key] = value if isinstance(value, list) else [value]
    result = []
    for combination in itertools.product(*choices.values()):
        fields = {**dict(zip(LISTED, combination, strict=True)), **{key: tuple(value) for key, value in texts.items()}}
        _check_values(fields, where)
        name = " ".join(table["name"].split())
        name += "".join(f" {fields[key]}" for key in (*FILES, "sampler", "plan") if len(choices[key]) > 1)
        if len(choices["start"]) > 1:
            name += f", from {fields['start']}"
        if len(choices["times"]) > 1:
            name += f", {fields['times']} times"
        if len(choices["steps"]) > 1:
            name += f", {fields['steps']} step" + ("" if fields["steps"] == 1 else "s")
        if len(choices["guidance_scale"]) > 1:
            name += f", guidance {fields['guidance_scale']:g}"
        fields |= {"steps": fields["steps"] or 0, "guidance_scale": float(fields["guidance_scale"])}
        result.append(Variant(name=name, optional=table.get("optional", False), **fields))
    return result


def _check_values(values: Mapping[str, Any], where: str) -> None:
    """Raise BadInput for a value that no model accepts."""
    for key in FILES:
        if values[key] is not None and not isinstance(values[key], str):
            raise BadInput(f"{where}: {key} must be text, got {values[key]!r}")
    other = values["model"] is not None or values["lora"] is not None
    own = other and values["sampler"] == ""  # its defaults are the other model's
    planned = values["plan"] is not None or own
    if values["plan"] is not None and not isinstance(values["plan"], str):
        raise BadInput(f"{where}: plan must be text, got {values['plan']!r}")
    texts = [] if planned else [("sampler", "samplers", values["sampler"]), ("times", "times", values["times"])]
    texts += [("times", "times", values["times"])] if own and values["times"] != "" else []
    texts += [("guides", "guides", guide) for guide in values["guides"]]
    texts += [("accelerators", "accelerators", one) for one in values["accelerators"]]
    texts += [] if values["start"] is None else [("start", "starts", values["start"])]
    for key, folder, text in texts:
        if not isinstance(text, str):
            raise BadInput(f"{where}: {key} must be text, got {text!r}")
        try:
            _cached_pick(folder, text)
        except HastenError as e:
            raise BadInput(f"{where}: {key}: {e}") from e
    free = values["plan"] is not None or (own and values["steps"] is None)
    if not free and (type(values["steps"]) is not int or values["steps"] < 1):
        raise BadInput(f"{where}: steps must be an integer of at least 1, got {values['steps']!r}")
    if (values["steps"] or 0) > 10**6:
        raise BadInput(f"{where}: steps must be an integer of at most 1000000, got {values['steps']}")
    scale = values["guidance_scale"]
    if type(scale) not in (int, float) or not 0 <= scale < float("inf"):
        raise BadInput(f"{where}: guidance_scale must be a number from 0 (1: no guidance), got {scale!r}")
