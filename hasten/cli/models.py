"""`models` and `show`."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

from ..errors import BadInput, nearest
from ._processes import on_main_process
from .terminal import plain_value, print_result


@on_main_process
def models(*, path: str | None = None, json: bool = False) -> list[dict[str, Any]]:
    """List the bundled models, and the LoRAs and light decoders of them.

    Args:
        path: Name of one of them: print the path of its folder or file and nothing else.
        json: Print the list as JSON.

    Returns:
        Name, size in bytes, summary, recipe, licence, folder (or file) and kind of each.

    Raises:
        BadInput: If no bundled model has the name.
    """
    from .. import zoo

    bundled = zoo.cards() | zoo.additions()
    cards: list[dict[str, Any]] = [
        {
            "name": card.name,
            "bytes": card.size,
            "summary": card.summary,
            "recipe": card.recipe,
            "licence": card.licence,
            "folder": str(card.folder),
            "kind": card.kind,
        }
        for card in bundled.values()
    ]
    if path is not None:
        if path not in bundled:
            raise BadInput(f"no bundled model {path!r}: {nearest(path, bundled)}")
        cards = [m for m in cards if m["name"] == path]
        print_result(cards, cards[0]["folder"], json)
        return cards
    width = max((len(m["name"]) for m in cards), default=0)
    lines = [f"{m['name']:<{width}} {m['bytes'] / 1e6:6.1f} MB  {m['summary']}" for m in cards]
    print_result(cards, "\n".join(lines) or "no models are bundled with this copy", json)
    return cards


@on_main_process
def show(
    what: str, *, sampler: str | None = None, times: str | None = None, steps: int | None = None, json: bool = False
) -> dict[str, Any]:
    """Show a model's description and its sampler's coefficients at every step, those in a plan file, or a LoRA file.

    Args:
        what: A bundled name, a model's folder, a plan's .json file, or a LoRA's .safetensors file.
        sampler: Of a model: show the coefficients of this sampler; likewise the next two.
        times: Time grid.
        steps: Number of steps of the time grid.
        json: Print it as JSON.

    Returns:
        The plan, and for a model its description; of a LoRA its layers, ranks and what it says of a student.
    """
    from ..loading import load
    from ..plan.table import Plan

    if what.endswith(".json") and Path(what).name != "model.json":
        try:
            plan = Plan.from_json(Path(what).read_text())
        except OSError as e:
            raise BadInput(f"cannot read {what}: {e.strerror}") from e
        result: dict[str, Any] = {"plan": jsonlib.loads(plan.to_json())}
        print_result(result, plan.table(), json)
        return result
    if what.endswith(".safetensors"):
        from ..workflows.lora import describe_lora

        result, lines = describe_lora(what)
        print_result(result, "\n".join(lines), json)
        return result
    loaded = load(Path(what).parent if Path(what).name == "model.json" else what)
    description = loaded.describe()
    compiled = loaded.resolve(sampler=sampler, times=times, steps=steps).plan
    result = {"model": description, "plan": None if compiled is None else jsonlib.loads(compiled.to_json())}
    parameters = sum(p.numel() for p in loaded.denoiser.parameters())
    lines = [f"{loaded.name}: {parameters / 1e6:.2f} M parameters, images {' x '.join(map(str, loaded.shape))}"]
    lines += [
        f"  {key}: {plain_value(value)}" for key, value in description.items() if key not in ("name", "shape", "card")
    ]
    lines += [f"  {key}: {plain_value(value)}" for key, value in loaded.card.items()]
    lines += ["", compiled.table() if compiled else "a sampler that adapts to the images has no table of coefficients"]
    print_result(result, "\n".join(lines), json)
    return result
