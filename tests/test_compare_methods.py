"""Rows of a comparison that are more than a sampler on a grid: plans, guides, starts, samplers of unknown cost."""

# The fixtures are those of test_compare, so their names come up again as arguments.
# ruff: noqa: F401, F811

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.compare import variants
from hasten.errors import BadInput
from hasten.plan import plan
from hasten.samplers import DDIM, UniPC
from hasten.times import UniformLambda

from .factories import tiny_model
from .test_compare import SET, Corner, of, run, variant_file

MORE = """
[[variant]]
name = "planned"
plan = ["three", "PLAN"]
[[variant]]
name = "late"
sampler = "ddim"
steps = 6
guides = ["interval:low=0.5,high=5"]
[[variant]]
name = "adaptive"
sampler = "probability_flow:rtol=0.05,atol=0.05"
guidance_scale = 1
"""


def test_plans_guides_and_adaptive_samplers_are_rows(run: Any, variant_file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    schedule = model.denoiser.schedule
    model.plans = {"three": plan(DDIM(), schedule, UniformLambda()(schedule, 3))}
    (tmp_path / "five.json").write_text(plan(UniPC(), schedule, UniformLambda()(schedule, 5)).to_json())
    head = SET.split("[[variant]]", 1)[0]
    variant_file.write_text(head + MORE.replace("PLAN", str(tmp_path / "five.json")))
    rows = run(model)
    three, late, adaptive = of(rows, "planned three"), of(rows, "late"), of(rows, "adaptive")
    assert (three["nfe"], three["sampler"], three["steps"], three["plan"]) == (6, "plan", 3, "three")
    assert of(rows, f"planned {tmp_path / 'five.json'}")["nfe"] == 10
    q = schedule.q(UniformLambda()(schedule, 6)[:-1])
    assert late["nfe"] == 6 + int(((q > 0.5) & (q <= 5)).sum()) and late["guides"] == ["interval:low=0.5,high=5"]
    assert adaptive["nfe"] > 10 and adaptive["equal_cost"]
    for row in rows[1:]:
        equal = row["name"] if row["is_equal_cost"] else row["equal_cost"]
        assert equal and of(rows, equal)["nfe"] <= max(row["nfe"], 2)
    again = {row["name"]: row["key"] for row in run(model)}
    assert again == {row["name"]: row["key"] for row in rows}
    # another plan of the same name is another row
    model.plans = {"three": plan(UniPC(), schedule, UniformLambda()(schedule, 3))}
    assert of(run(model), "planned three")["key"] != three["key"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('plan = ["three", "PLAN"]', 'plan = "for"', r"'planned': tiny has no plan 'for'"),
        ('plan = ["three", "PLAN"]', 'plan = "a"\nsteps = 4', r"remove steps or the plan"),
        ('plan = ["three", "PLAN"]', "plan = 4", r"plan must be text"),
        ("interval:low", "intervall:low", r"guides: unknown guide 'intervall': did you mean 'interval'"),
        ('guides = ["interval:low=0.5,high=5"]', 'guides = "interval"', r"guides must be a list of texts"),
        ("steps = 6", 'steps = 6\nstart = "cdf"', r"start: unknown start 'cdf'"),
        ("guidance_scale = 1", 'guidance_scale = 1\nguides = ["interval:low=1"]', r"'adaptive': interval"),
        (
            "steps = 12\n",
            'steps = 12\nguides = ["interval:low=1"]\n',
            r"\[reference\]: the reference .* takes no guides",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Any, variant_file: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = SET.split("[[variant]]", 1)[0] + MORE
    assert old in text
    variant_file.write_text(text.replace(old, new, 1).replace('plan = ["three", "PLAN"]\n', 'sampler = "ddim"\n', 1))
    with pytest.raises(BadInput, match=said) as error:
        run()
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_bundled_sets_can_be_read() -> None:
    for name in variants.variant_set_names():
        assert variants.load_variants(name).variants
