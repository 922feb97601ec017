"""`hasten evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..progress import progress
from ._common import cached, hint, label_list, open_shared, processes, warn
from ._processes import together
from .compare import prompts_of
from .terminal import tell

if TYPE_CHECKING:
    from ..metrics import Measure


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
    from ..compare.jobs import check_prompts, image_shape
    from ..errors import check_int
    from ..metrics import without_neighbours
    from ..workflows.reference_images import judge
    from ..workflows.sample import evaluate_distributed, kept, sample_many

    check_int("n", n, 10)
    check_int("batch_size", batch_size, 1)
    check_int("repeats", repeats, 1)
    texts = prompts_of(prompt, prompts)
    ranks = processes(device)
    loaded = open_shared(model, ranks)
    if loaded.conditioning is not None and texts is None and isinstance(label, str):
        texts = [label]  # as for sample, whose label is the prompt
    chosen: Any = check_prompts(loaded, texts, "the command") or label_list(loaded, label)
    asked = reference or loaded.card.get("reference")
    if asked is None:
        raise BadInput(f"{loaded.name} names no reference: give --reference, such as a folder of real images")
    say = warn if ranks.is_main_process else lambda line: None
    known, net = judge(asked, features, image_shape(loaded), loaded.device, ranks, say)
    assert known is not None and net is not None
    if line := without_neighbours(n, known):
        say(line)
    way: dict[str, Any] = {"guides": tuple(guide or ()), "start": start, "plan": plan}
    size = min(n, batch_size)
    setting = loaded.setting(sampler, times, steps, guidance_scale, "fp32", size, **way)
    setting["runtime"] = ranks.on_main_process(lambda: loaded.runtime_for(runtime, size))
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
        blocks.append(evaluate_distributed(x, wanted, net, known, range(first, first + n), ranks, loaded.classes))
        ranks.barrier()
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
