"""`compare` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..terminal import progress, spell, tell
from ._common import cached, hint, is_images, label_list, open_shared, processes
from ._together import together


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
        reference: Statistics of real images. Left out: those that the model names.
        features: The network that looks at the images. Left out: the reference's.
        runtime: Number format of the network, fp32 or bf16; auto times them on this machine once.
        device: auto, cpu, cuda or cuda:1.
        json: Print the rows as JSON, not as a table.

    Returns:
        A row for each variant.
    """
    from ..compare import compare as run

    asked: dict[str, Any] = {
        "variants": variants, "n": n, "seed": seed, "rounds": rounds, "batch_size": batch_size,
        "timing_batch": timing_batch, "runtime": runtime, "reference": reference, "features": features,
    }  # fmt: skip
    told = {**asked, "runtime": None if runtime == "auto" else runtime, "out": out}
    ranks = processes(device)
    loaded = open_shared(model, ranks)
    rows = run(loaded, out=out, **asked, show=not json, command=spell("compare", model, told), ranks=ranks)
    if json:
        tell(rows, "", json)
    return rows


def refuse_colour(features: str, model: Any) -> None:
    """Raises BadInput before a colour model draws what the fashion features cannot see."""
    if features == "fashion" and (model.shape[0] == 3 or model.decoder is not None):
        raise BadInput(
            f"{model.name} makes pictures in colour, and the fashion features see grey garments only: give --reference "
            "a folder of real images, and --features efficientnet_lite0 or inception"
        )


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
        reference: Bundled statistics, a folder of statistics, or a folder, zip or array of real images.
            Left out: the one that the model names.
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
        batch_size: Images in the network at once.
        runtime: Number format of the network.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The settings, and under `measures` each figure with its features, reference, count, floor and interval.
    """
    from ..errors import whole
    from ..many import judge_many, kept, sample_many
    from ..metrics import feature_net, reference_from_images
    from ..metrics import reference as load_reference

    whole("n", n, 10)
    whole("batch_size", batch_size, 1)
    ranks = processes(device)
    loaded = open_shared(model, ranks)
    asked = reference or loaded.card.get("reference")
    if asked is None:
        raise BadInput(f"{loaded.name} names no reference: give --reference, such as a folder of real images")
    if is_images(asked):
        if features is None:
            raise BadInput(f"{asked} holds images: give --features, the network to look at them with")
        from ..train.data import open_data

        channels, height, width = loaded.shape
        data = open_data(asked, size=(height, width), channels=channels)
        known = None
        if ranks.first:
            real = data.images(range(len(data)))
            net = feature_net(features).to(loaded.device)
            known = reference_from_images(real, Path(asked).name, "all", net)
    else:
        known = load_reference(asked)
    refuse_colour(features or known.features, loaded)  # type: ignore[union-attr]
    way: dict[str, Any] = {"guides": tuple(guide or ()), "start": start, "plan": plan}
    size = min(n, batch_size)
    setting = loaded.setting(sampler, times, steps, guidance_scale, "fp32", size, **way)
    setting["runtime"] = ranks.once(lambda: loaded.runtime_for(runtime, size))
    chosen = label_list(loaded, label)
    wanted = loaded.labels(n, chosen)
    keep = kept(cached("kept"), ranks, loaded, n, chosen, seed, batch_size, setting)
    hint(ranks, n, batch_size)
    with progress(f"sampling {n} images") as tick:
        x = sample_many(
            loaded, n, chosen, seed, batch_size, **setting, ranks=ranks, keep=keep, everywhere=True, progress=tick
        )
    looking = features or known.features  # type: ignore[union-attr]
    measures = judge_many(  # type: ignore[arg-type]
        x, wanted, looking, known, range(seed, seed + n), ranks, loaded.classes
    )
    ranks.wait()
    if keep is not None:
        keep.clear()
    if measures is None:  # the first process has them
        return {}
    result = {
        "model": loaded.name,
        "sha256": loaded.sha256,
        **setting,
        "n": n,
        "seeds": [seed, seed + n - 1],
        "measures": {name: measure.to_dict() for name, measure in measures.items()},
        **({"processes": ranks.world} if ranks.world > 1 else {}),
    }
    tell(result, "\n".join(str(measure) for measure in measures.values()), json)
    return result
