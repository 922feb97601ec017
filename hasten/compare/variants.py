"""Which ways of sampling a comparison runs: read from TOML, checked as a whole, with the equal-cost rows added.

A set of variants is a TOML file (`demo` and `full` are bundled beside this module):

    n = 400                       # images a row when the caller does not say; rounds = 3 for the timing likewise
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

What a variant leaves out (sampler, times, steps, guidance_scale) is the reference's; times and guidance_scale that the
reference leaves out are the model's own. `guides` (a list) and `start` are none unless the variant names them. Of a
variant with another `model`, sampler, times and steps that are left out are that model's own, as in `hasten sample
MODEL --steps 4`, and only its guidance_scale is the reference's. docs/variants.md has all of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BadInput, HastenError, nearest

FOLDER = Path(__file__).resolve().parent / "variant_sets"
KEYS = ("name", "model", "sampler", "times", "steps", "guidance_scale", "guides", "start", "plan", "accelerators")
LISTED = ("model", "sampler", "times", "steps", "guidance_scale", "start", "plan")


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: how to sample, and what the row is for.

    role: "reference" (all else is measured against it), "variant", or "equal-cost" (the reference with fewer steps).
    plan: in place of sampler and times, which are then "", and of steps, 0. model: another than the comparison's own;
    where sampler is "" and there is no plan, it is sampled as it recommends.
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
    role: str = "variant"

    @property
    def method(self) -> tuple[Any, ...]:
        """What is run, without what it is called: equal methods are the same row."""
        from ..pick import format_spec

        more = (self.guides, self.start, self.accelerators, *([] if self.model is None else [self.model]))
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
        """Declared network evaluations per image, a guided one counts 2; None where only the model or the run tells.

        An accelerated one is an evaluation like another: what it costs, the time tells.
        """
        if self.model is not None or self.plan is not None or self.guides or self.start is not None:
            return None
        queries = _cached_pick("samplers", self.sampler).nfe(self.steps)
        return None if queries is None else queries * (1 if self.guidance_scale == 1 else 2)


@dataclass(frozen=True)
class VariantSet:
    """A reference, the variants that are measured against it, and the set's own numbers where the caller gives none."""

    source: str
    reference: Variant
    variants: tuple[Variant, ...]
    n: int = 500
    rounds: int = 5
    prompts: tuple[str, ...] = ()

    def without_guidance_below_one(self) -> VariantSet:
        """The same set where a guidance_scale below 1 is 1: a pipeline then samples by the prompt alone."""
        first = replace(self.reference, guidance_scale=max(self.reference.guidance_scale, 1.0))
        others = tuple(replace(v, guidance_scale=max(v.guidance_scale, 1.0)) for v in self.variants)
        return replace(self, reference=first, variants=others)

    def rows(
        self, nfe: Callable[[Variant], float | None] = lambda variant: variant.nfe
    ) -> list[tuple[Variant, Variant | None]]:
        """Every row to run, with the row that is its equal-cost comparison (None for the reference).

        nfe: what a variant costs; asked for variants that cannot tell.

        For each NFE of a variant there is the reference with the most steps that do not cost more: a variant of the
        set where one is just that, else a row of role "equal-cost". Where one step costs more already there is none,
        and none for an accelerated variant, whose cost is a time.
        """
        rows: dict[tuple[Any, ...], Variant] = {self.reference.method: self.reference}
        for variant in self.variants:
            rows.setdefault(variant.method, variant)
        plain = {method: row for method, row in rows.items() if not row.accelerators}
        costs = {method: nfe(row) if row.nfe is None else row.nfe for method, row in plain.items()}
        equal: dict[float | None, Variant | None] = {None: None}
        for cost in sorted({cost for cost in costs.values() if cost is not None}):
            steps = range(self.reference.steps, 0, -1)
            known = (replace(self.reference, steps=count, role="equal-cost") for count in steps)
            fitting = next((row for row in known if (row.nfe or 0) <= cost), None)
            if fitting is not None:
                count = f"{fitting.steps} step" + ("" if fitting.steps == 1 else "s")
                name = f"Reference, {count}"
                name += ", equal cost" if name in {row.name for row in rows.values()} else ""
                fitting = rows.setdefault(fitting.method, replace(fitting, name=name))
            equal[cost] = fitting
        order = {"reference": 0, "variant": 1, "equal-cost": 1}
        ordered = sorted(rows.values(), key=lambda row: (order[row.role], row.role == "equal-cost"))
        equals = {"reference": lambda row: None, "equal-cost": lambda row: row}
        return [(row, equals.get(row.role, lambda row: equal[costs.get(row.method)])(row)) for row in ordered]


@functools.lru_cache(256)
def _cached_pick(folder: str, text: str) -> Any:
    """`pick`, remembered: a set asks for the same few methods many times."""
    from ..pick import pick

    return pick(folder, text)


def variant_set_names() -> list[str]:
    """The bundled sets."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_variants(source: str | Path | None, times: str = "angle", guidance_scale: float = 1.0) -> VariantSet:
    """A bundled set by name (None: "demo"), or a TOML file by path. Everything but the model's part is checked here.

    times, guidance_scale: of a reference that names none.
    Raises BadInput in one line with the file, the key and the nearest valid choice.
    """
    source = "demo" if source is None else source
    path = FOLDER / f"{source}.toml" if str(source) in variant_set_names() else Path(source)
    if not path.is_file():
        known = nearest(str(source), variant_set_names())
        raise BadInput(f"no set of variants {str(source)!r}: neither a file nor bundled; {known}")
    return parse_variants(_load(path), str(source), times, guidance_scale)


def _load(path: Path) -> dict[str, Any]:
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
    """A set from the mapping that its TOML holds; `source` begins each error."""
    top = ("reference", "variant", "n", "rounds", "prompts")
    _check_keys(data, top, source)
    for key, least, most in (("n", 10, 10**8), ("rounds", 1, 10**4)):
        if key in data and (type(data[key]) is not int or data[key] < least):
            raise BadInput(f"{source}: {key} must be a whole number from {least}, got {data[key]!r}")
        if data.get(key, 0) > most:
            raise BadInput(f"{source}: {key} must be a whole number of at most {most}, got {data[key]!r}")
    prompts = data.get("prompts", [])
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise BadInput(f"{source}: prompts must be a list of texts, got {prompts!r}")
    if not isinstance(data.get("reference"), dict):
        raise BadInput(f"{source}: there must be one [reference] table with a sampler and steps")
    if not isinstance(data.get("variant", []), list) or not all(isinstance(v, dict) for v in data.get("variant", [])):
        raise BadInput(f"{source}: write each variant as a [[variant]] table")
    head = {"name": "reference", "times": times, "guidance_scale": guidance_scale, **data["reference"]}
    for key in ("plan", "start", "guides", "model"):
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
                raise BadInput(f"{where}: a plan holds its sampler, times and steps: leave out {both[0]} or the plan")
            table = {"sampler": "", "times": "", "steps": 0, "guidance_scale": head["guidance_scale"], **table}
        elif "model" in table and "sampler" not in table:
            table = {"sampler": "", "times": "", "steps": None, "guidance_scale": head["guidance_scale"], **table}
        elif not set(table) & {"sampler", "times", "steps", "guidance_scale", "guides", "start", "accelerators"}:
            raise BadInput(f"{where}: it says nothing of how to sample, so it is the reference again")
        variants += _expand_lists({**rest, **table}, where)
    seen = {reference.name}
    for variant in variants:
        if variant.name in seen:
            raise BadInput(f"{source}: the name {variant.name!r} is used twice: each row needs its own")
        seen.add(variant.name)
    numbers = {key: data[key] for key in ("n", "rounds") if key in data}
    return VariantSet(source, reference, tuple(variants), **numbers, prompts=tuple(prompts))


def _check_keys(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise BadInput(f"{where}: unknown key {key!r}: {nearest(key, keys)}")


def _expand_lists(table: Mapping[str, Any], where: str, lists: bool = True) -> list[Variant]:
    """The product over a table's lists; what varies is added to the name."""
    _check_keys(table, KEYS, where)
    for key in ("sampler", "steps"):
        if key not in table:
            raise BadInput(f"{where}: has no {key}")
    if not isinstance(table["name"], str) or not table["name"].strip():
        raise BadInput(f"{where}: name must be text, got {table['name']!r}")
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
    for values in itertools.product(*choices.values()):
        asked = {**dict(zip(LISTED, values, strict=True)), **{key: tuple(value) for key, value in texts.items()}}
        _check_values(asked, where)
        name = " ".join(table["name"].split())
        if len(choices["model"]) > 1:
            name += f" {asked['model']}"
        if len(choices["sampler"]) > 1:
            name += f" {asked['sampler']}"
        if len(choices["plan"]) > 1:
            name += f" {asked['plan']}"
        if len(choices["start"]) > 1:
            name += f", from {asked['start']}"
        if len(choices["times"]) > 1:
            name += f", {asked['times']} times"
        if len(choices["steps"]) > 1:
            name += f", {asked['steps']} step" + ("" if asked["steps"] == 1 else "s")
        if len(choices["guidance_scale"]) > 1:
            name += f", guidance {asked['guidance_scale']:g}"
        asked |= {"steps": asked["steps"] or 0, "guidance_scale": float(asked["guidance_scale"])}
        result.append(Variant(name=name, **asked))
    return result


def _check_values(asked: Mapping[str, Any], where: str) -> None:
    if asked["model"] is not None and not isinstance(asked["model"], str):
        raise BadInput(f"{where}: model must be text, got {asked['model']!r}")
    own = asked["model"] is not None and asked["sampler"] == ""  # what it leaves out is the other model's
    planned = asked["plan"] is not None or own
    if asked["plan"] is not None and not isinstance(asked["plan"], str):
        raise BadInput(f"{where}: plan must be text, got {asked['plan']!r}")
    texts = [] if planned else [("sampler", "samplers", asked["sampler"]), ("times", "times", asked["times"])]
    texts += [("times", "times", asked["times"])] if own and asked["times"] != "" else []
    texts += [("guides", "guides", guide) for guide in asked["guides"]]
    texts += [("accelerators", "accelerators", one) for one in asked["accelerators"]]
    texts += [] if asked["start"] is None else [("start", "starts", asked["start"])]
    for key, folder, text in texts:
        if not isinstance(text, str):
            raise BadInput(f"{where}: {key} must be text, got {text!r}")
        try:
            _cached_pick(folder, text)
        except HastenError as e:
            raise BadInput(f"{where}: {key}: {e}") from e
    free = asked["plan"] is not None or (own and asked["steps"] is None)
    if not free and (type(asked["steps"]) is not int or asked["steps"] < 1):
        raise BadInput(f"{where}: steps must be a whole number from 1, got {asked['steps']!r}")
    if (asked["steps"] or 0) > 10**6:
        raise BadInput(f"{where}: steps must be a whole number of at most 1000000, got {asked['steps']}")
    scale = asked["guidance_scale"]
    if type(scale) not in (int, float) or not 0 <= scale < float("inf"):
        raise BadInput(f"{where}: guidance_scale must be a number from 0 (1: no guidance), got {scale!r}")
