"""`compare` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, HastenError
from .terminal import progress, spell, tell
from ._common import cached, ends_as_stopped, hint, label_list, open_shared, processes, warn
from ._processes import together

if TYPE_CHECKING:
    from ..metrics import Measure


@together
def compare(
    model: str,
    *,
    out: Path = Path("compare"),
    variants: str = "demo",
    n: int | None = None,
    seed: int = 0,
    rounds: int | None = None,
    batch_size: int = 64,
    timing_batch: int = 16,
    reference: str | None = None,
    features: str | None = None,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    repeats: int = 1,
    runtime: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> list[dict[str, Any]]:
    """Sample a model in many ways from the same seeds, and report what each costs and what quality is left.

    Writes report.html, results.jsonl and pictures. The same command again goes on where an earlier one was stopped.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write.
        variants: What to compare: demo, full, or a TOML file.
        n: Images a variant. Left out: what the variants say; so is rounds.
        seed: Of the first image; image k has seed + k in every variant.
        rounds: Times that each variant is timed, in turns.
        batch_size: Images in the network at once.
        timing_batch: Images in a timed batch.
        reference: Statistics of real images, or a folder, zip or array of images of your own, with --features. Left
            out: the statistics that the model names.
        features: The network that looks at the images: fashion, efficientnet_lite0, inception. Left out: the
            reference's.
        prompt: Of a model that takes prompts; given several times, image k gets number k mod their count.
        prompts: A text file of prompts in their place, one a line.
        repeats: Blocks of n seeds, one after the other: figures are then means with their deviation.
        runtime: Number format of the network, fp32 or bf16; auto times them on this machine once.
        device: auto, cpu, cuda or cuda:1.
        json: Print the rows as JSON, not as a table.

    Returns:
        A row for each variant.
    """
    from ..compare.runner import compare as run

    asked: dict[str, Any] = {
        "variants": variants, "n": n, "seed": seed, "rounds": rounds, "batch_size": batch_size,
        "timing_batch": timing_batch, "runtime": runtime, "reference": reference, "features": features,
    }  # fmt: skip
    asked["repeats"] = repeats
    given = {"prompt": prompt, "prompts": prompts, "repeats": None if repeats == 1 else repeats}
    told = {**asked, **given, "runtime": None if runtime == "auto" else runtime, "out": out}
    texts = prompts_of(prompt, prompts)
    ranks = processes(device)
    loaded = open_shared(model, ranks)
    with ends_as_stopped():
        command = spell("compare", model, told)
        rows = run(loaded, out=out, **asked, show=not json, command=command, ranks=ranks, prompts=texts)
    if json:
        tell(rows, "", json)
    if lost := [row for row in rows if row.get("failed")]:
        also = "" if len(lost) == 1 else f" (and {len(lost) - 1} more)"
        first = f"{lost[0]['name']!r}: {lost[0]['failed']}"
        raise HastenError(
            f"{len(lost)} of {len(rows)} rows failed, {first}{also}; {out / 'report.html'} has the others"
        )
    return rows


def prompts_of(prompt: list[str] | None, prompts: Path | None) -> list[str] | None:
    """The prompts of the command line, None where there are none."""
    from ..compare.jobs import read_prompts

    if prompt and prompts is not None:
        raise BadInput("give --prompt or --prompts, not both")
    return read_prompts(prompts) if prompts is not None else prompt or None


@together
def evaluate(
    model: str,
    *,
    n: int = 2000,
    reference: str | None = None,
    features: str | None = None,
    seed: int = 0,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guide: list[str] | None = None,
    start: str | None = None,
    plan: str | None = None,
    label: str | None = None,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    repeats: int = 1,
    batch_size: int = 64,
    runtime: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Draw images from a model and measure how good they are: distances to real images, coverage, class accuracy.

    A figure means something beside its floor, which is what real images of the same count would get, and beside
    figures of the same features, reference and count only.

    Args:
        model: A bundled name (see models) or a folder.
        n: How many images; at least 10, better 2000 or more.
        reference: Bundled statistics, a folder of statistics, or a folder, zip or array of real images, whose
            statistics are made once. Left out: the one that the model names.
        features: The network that looks at the images: fashion, efficientnet_lite0 or inception. Left out: the
            reference's.
        seed: Of the first image; image k has seed + k.
        sampler: As for sample; so are the next three.
        times: Time grid.
        steps: Steps of the time grid.
        guidance_scale: Strength of the guidance.
        guide: A further guide, such as interval:low=0.2; may be given several times.
        start: Where sampling begins.
        plan: A plan of the model by name, or a plan's .json file.
        label: As for sample; none is no class. Left out, all classes take turns.
        prompt: Of a model that takes prompts; given several times, image k gets number k mod their count.
        prompts: A text file of prompts in their place, one a line.
        repeats: Blocks of n seeds, one after the other: figures are then means with their deviation.
        batch_size: Images in the network at once.
        runtime: Number format of the network.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The settings, and under `measures` each figure with its features, reference, count, floor and interval.
    """
    from ..errors import whole
    from ..compare.jobs import given_prompts, image_shape
    from ..workflows.sample import judge_many, kept, sample_many
    from ..metrics import without_neighbours
    from ..workflows.reference_images import judge

    whole("n", n, 10)
    whole("batch_size", batch_size, 1)
    whole("repeats", repeats, 1)
    texts = prompts_of(prompt, prompts)
    ranks = processes(device)
    loaded = open_shared(model, ranks)
    if loaded.conditioning is not None and texts is None and isinstance(label, str):
        texts = [label]  # as for sample, whose label is the prompt
    chosen: Any = given_prompts(loaded, texts, "the command") or label_list(loaded, label)
    asked = reference or loaded.card.get("reference")
    if asked is None:
        raise BadInput(f"{loaded.name} names no reference: give --reference, such as a folder of real images")
    say = warn if ranks.first else lambda line: None
    known, net = judge(asked, features, image_shape(loaded), loaded.device, ranks, say)
    assert known is not None and net is not None
    if line := without_neighbours(n, known):
        say(line)
    way: dict[str, Any] = {"guides": tuple(guide or ()), "start": start, "plan": plan}
    size = min(n, batch_size)
    setting = loaded.setting(sampler, times, steps, guidance_scale, "fp32", size, **way)
    setting["runtime"] = ranks.once(lambda: loaded.runtime_for(runtime, size))
    hint(ranks, n, batch_size)
    wanted = None if loaded.conditioning is not None else loaded.labels(n, chosen)
    blocks = []
    for block in range(repeats):
        first = seed + block * n
        keep = kept(cached("kept"), ranks, loaded, n, chosen, first, batch_size, setting)
        of = f", block {block + 1} of {repeats}" if repeats > 1 else ""
        with progress(f"sampling {n} images{of}") as tick:
            x = sample_many(
                loaded, n, chosen, first, batch_size, **setting, ranks=ranks, keep=keep, everywhere=True, progress=tick
            )
        assert x is not None
        blocks.append(judge_many(x, wanted, net, known, range(first, first + n), ranks, loaded.classes))
        ranks.wait()
        if keep is not None:
            keep.clear()
    found = [measures for measures in blocks if measures is not None]
    if not found:  # the first process has them
        return {}
    measures, deviation = over_blocks(found)
    result = {
        "model": loaded.name,
        "sha256": loaded.sha256,
        **setting,
        "n": n,
        "seeds": [seed, seed + repeats * n - 1],
        **({"prompts": texts} if texts else {}),
        "measures": {name: measure.to_dict() for name, measure in measures.items()},
        **({"repeats": repeats, "deviation": deviation} if repeats > 1 else {}),
        **({"blocks": [{name: m.value for name, m in each.items()} for each in found]} if repeats > 1 else {}),
        **({"processes": ranks.world} if ranks.world > 1 else {}),
    }
    lines = [f"{m}, deviation {deviation[name]:.2g} over {repeats} blocks" if name in deviation else str(m)
             for name, m in measures.items()]  # fmt: skip
    tell(result, "\n".join(lines), json)
    return result


def over_blocks(blocks: list[dict[str, Measure]]) -> tuple[dict[str, Measure], dict[str, float]]:
    """The means of the figures over blocks of seeds, and the standard deviation of one block, where there are several.

    The interval of a mean is not that of a block, so it has none.
    """
    import statistics
    from dataclasses import replace

    if len(blocks) == 1:
        return blocks[0], {}
    means, deviation = {}, {}
    for name, measure in blocks[0].items():
        values = [block[name].value for block in blocks if name in block]
        deviation[name] = statistics.stdev(values)
        seeds = ",".join(block[name].seeds for block in blocks)
        means[name] = replace(measure, value=statistics.fmean(values), interval=None, spread=None, seeds=seeds)
    return means, deviation
