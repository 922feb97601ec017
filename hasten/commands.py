"""The verbs. Each is a plain function; the command line is built from their signatures and docstrings."""

from __future__ import annotations

import json as jsonlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput
from .terminal import plain, progress, spell, tell, versions

if TYPE_CHECKING:
    from .model import Model


def sample(
    model: str,
    *,
    out: Path = Path("samples.png"),
    n: int = 16,
    label: int | str | None = None,
    seed: int = 0,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    single: bool = False,
    columns: int | None = None,
    batch_size: int = 64,
    runtime: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Draw images from a model into a PNG grid that says inside how it was made.

    The same arguments give the same file. Image k depends on its own seed and label, not on n or batch_size, up to
    the rounding of the number format.

    Args:
        model: A bundled name (see models) or a folder.
        out: The PNG file to write; with single, the folder.
        n: How many images.
        label: Class index or name, or several parted by commas, taken in turn. Left out, all classes take turns.
        seed: Of the first image; image k has seed + k.
        sampler: Such as ddim, unipc or dpm:order=2,sde=true. Left out: the model's own choice, as for the next three.
        times: Time grid, such as uniform, lambda, trailing or karras:rho=7.
        steps: Steps of the time grid.
        guidance_scale: 1 is the plain conditional model; more follows the class more closely and costs twice.
        single: Write one file an image, named by its seed.
        columns: Images in a row of the grid. Left out: one of each class where all classes take turns, else a square.
        batch_size: Images in the network at once.
        runtime: Number format of the network, fp32 or bf16; auto times them on this machine once.
        device: auto, cpu, cuda or cuda:1. auto takes the GPU if there is one.
        json: Print the result as JSON.

    Returns:
        What was done: files, settings, seeds, labels, seconds.
    """
    from . import images
    from .model import whole

    whole("n", n, 1)
    if out.suffix.lower() != ".png" and not single:
        raise BadInput(f"the grid is a PNG file: --out must end in .png, got {str(out)!r} (or --single and a folder)")
    images.reserve(out / "0.png" if single else out)
    loaded = open_model(model, device)
    chosen = [part.strip() for part in label.split(",")] if isinstance(label, str) and "," in label else label
    labels = loaded.labels(n, chosen)
    setting = loaded.setting(sampler, times, steps, guidance_scale, runtime, min(n, batch_size))
    began = time.perf_counter()
    with progress(f"sampling {n} images") as tick:
        x = loaded.sample(n, chosen, seed, **setting, batch_size=batch_size, progress=tick)
    seconds = time.perf_counter() - began
    said = {"label": label, **setting, "n": n, "seed": seed, "single": single, "columns": columns}
    if columns is None and chosen is None and loaded.classes is not None and n > len(loaded.classes):
        columns = len(loaded.classes)
    text = {"command": spell("sample", model, said), "model": f"{loaded.name} {loaded.sha256}", "versions": versions()}

    def made(first: int, last: int) -> dict[str, str]:
        """What the file says inside; nothing of when and where, so that the same arguments give the same bytes."""
        span = f"{seed + first}" if first == last else f"{seed + first}-{seed + last}"
        told = [] if labels is None else labels[first : last + 1].tolist()
        return {**text, "seeds": span, "labels": ",".join(map(str, told))}

    if single:
        files = [
            images.write(out / f"{seed + k:06d}.png", images.png(images.picture(x[k]), made(k, k))) for k in range(n)
        ]
    else:
        files = [images.write(out, images.png(images.grid(x, columns), made(0, n - 1)))]
    result = {
        "files": [str(f) for f in files],
        "model": loaded.name,
        "sha256": loaded.sha256,
        **setting,
        "n": n,
        "seeds": [seed, seed + n - 1],
        "labels": None if labels is None else labels.tolist(),
        "seconds": seconds,
        "images_per_second": n / seconds,
    }
    where = f"{len(files)} files in {out}" if single else str(out)
    how = f"{setting['sampler']}, {setting['steps']} steps, {setting['runtime']}"
    line = f"{where}: {n} images of {loaded.name} ({how}) in {seconds:.2f} s"
    tell(result, line, json)
    return result


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
    from .compare import compare as run

    asked: dict[str, Any] = {
        "variants": variants, "n": n, "seed": seed, "rounds": rounds, "batch_size": batch_size,
        "timing_batch": timing_batch, "runtime": runtime, "reference": reference, "features": features,
    }  # fmt: skip
    told = {**asked, "runtime": None if runtime == "auto" else runtime, "out": out}
    rows = run(open_model(model, device), out=out, **asked, show=not json, command=spell("compare", model, told))
    if json:
        tell(rows, "", json)
    return rows


def train(
    data: Path,
    *,
    out: Path,
    minutes: float | None = None,
    steps: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    label: str | None = None,
    widths: str | None = None,
    blocks: int = 1,
    patch: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    label_drop: float = 0.1,
    flip: bool = False,
    seed: int = 0,
    runtime: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Train a model on a folder of images and save it.

    Sub-folders are classes, or a labels.csv names them. Ctrl-C keeps a checkpoint; the same command goes on from it.

    Args:
        data: A folder or zip of images, a folder of IDX files, a .npy or a .npz.
        out: The folder of the run, in which the model is saved.
        minutes: How long to train. Without steps, 30.
        steps: How many steps to train; with minutes, whichever comes first.
        size: Crop and resize the images to this side.
        channels: 1 or 3. Left out: what the images have.
        label: The column of labels.csv that holds the class.
        widths: Channels of each resolution, such as 64,128. Left out: by the size of the images.
        blocks: Residual blocks a resolution.
        patch: Side of the squares that the network takes as one pixel.
        batch_size: Images a step.
        lr: The highest learning rate.
        label_drop: Share of the labels that are dropped, so that the model can be guided.
        flip: Mirror images at random.
        seed: Of the weights, the order of the images and the noise.
        runtime: Number format, fp32 or bf16; auto takes what is faster here.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The folder, and what was trained on what for how long.
    """
    from .machine import device_for
    from .training import train_model

    try:
        channel_list = [int(w) for w in widths.split(",")] if widths else None
    except ValueError as e:
        raise BadInput(f"widths are whole numbers parted by commas, such as 64,128, got {widths!r}") from e
    model = train_model(
        data, out, steps=steps, minutes=minutes, size=size, channels=channels, label=label, widths=channel_list,
        blocks=blocks, patch=patch, batch_size=batch_size, lr=lr, label_drop=label_drop, flip=flip, runtime=runtime,
        seed=seed, device=str(device_for(device)),
    )  # fmt: skip
    result = {
        "folder": str(out),
        "shape": list(model.shape),
        "classes": model.classes,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        **model.card,
    }
    done = model.card["last"]
    tell(result, f"{out}: {done.get('step')} steps on {model.card['images']} images; try hasten sample {out}", json)
    return result


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
        features: The network that looks at the images: fashion, efficientnet, inception. Left out: the reference's.
        seed: Of the first image; image k has seed + k, and class k modulo the number of classes.
        sampler: As for sample; so are the next three.
        times: Time grid.
        steps: Steps of the time grid.
        guidance_scale: Strength of the guidance.
        batch_size: Images in the network at once.
        runtime: Number format of the network.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The settings, and under `measures` each figure with its features, reference, count, floor and interval.
    """
    from .metrics import evaluate_images, feature_net, reference_from_images
    from .metrics import reference as load_reference
    from .model import whole

    whole("n", n, 10)
    loaded = open_model(model, device)
    asked = reference or loaded.card.get("reference")
    if asked is None:
        raise BadInput(f"{loaded.name} names no reference: give --reference, such as a folder of real images")
    if is_images(asked):
        if features is None:
            raise BadInput(f"{asked} holds images: give --features, the network to look at them with")
        from .train.data import open_data

        channels, height, width = loaded.shape
        data = open_data(asked, size=(height, width), channels=channels)
        real = data.images(range(len(data)))
        known = reference_from_images(real, Path(asked).name, "all", feature_net(features))
    else:
        known = load_reference(asked)
    setting = loaded.setting(sampler, times, steps, guidance_scale, runtime, min(n, batch_size))
    with progress(f"sampling {n} images") as tick:
        x = loaded.sample(n, None, seed, **setting, batch_size=batch_size, progress=tick)
    measures = evaluate_images(x, loaded.labels(n), features or known.features, known, range(seed, seed + n))
    result = {
        "model": loaded.name,
        "sha256": loaded.sha256,
        **setting,
        "n": n,
        "seeds": [seed, seed + n - 1],
        "measures": {name: measure.to_dict() for name, measure in measures.items()},
    }
    tell(result, "\n".join(str(measure) for measure in measures.values()), json)
    return result


def models(*, json: bool = False) -> list[dict[str, Any]]:
    """List the models that travel with hasten.

    Args:
        json: Print the list as JSON.

    Returns:
        Name, size in bytes, summary, recipe, licence and folder of each.
    """
    from . import zoo

    found: list[dict[str, Any]] = [
        {
            "name": card.name,
            "bytes": card.size,
            "summary": card.summary,
            "recipe": card.recipe,
            "licence": card.licence,
            "folder": str(card.folder),
        }
        for card in zoo.cards().values()
    ]
    lines = [f"{m['name']:<12} {m['bytes'] / 1e6:6.1f} MB  {m['summary']}" for m in found]
    tell(found, "\n".join(lines) or "no models are bundled with this copy", json)
    return found


def show(
    what: str, *, sampler: str | None = None, times: str | None = None, steps: int | None = None, json: bool = False
) -> dict[str, Any]:
    """Show what a model is and the table of numbers that its sampler amounts to, or the table in a plan file.

    Args:
        what: A bundled name, a model's folder, or a plan's .json file.
        sampler: Of a model: show the table of this sampler; so with the next two.
        times: Time grid.
        steps: Steps of the time grid.
        json: Print it as JSON.

    Returns:
        The plan, and for a model its description.
    """
    from .model import load
    from .plan import Plan

    if what.endswith(".json") and Path(what).name != "model.json":
        try:
            plan = Plan.from_json(Path(what).read_text())
        except OSError as e:
            raise BadInput(f"cannot read {what}: {e.strerror}") from e
        result: dict[str, Any] = {"plan": jsonlib.loads(plan.to_json())}
        tell(result, plan.table(), json)
        return result
    loaded = load(Path(what).parent if Path(what).name == "model.json" else what)
    description = loaded.describe()
    compiled, _, _ = loaded.method(sampler, times, steps)
    result = {"model": description, "plan": None if compiled is None else jsonlib.loads(compiled.to_json())}
    parameters = sum(p.numel() for p in loaded.denoiser.parameters())
    lines = [f"{loaded.name}: {parameters / 1e6:.2f} M parameters, images {' x '.join(map(str, loaded.shape))}"]
    lines += [f"  {key}: {plain(value)}" for key, value in description.items() if key not in ("name", "shape", "card")]
    lines += [f"  {key}: {plain(value)}" for key, value in loaded.card.items()]
    lines += ["", compiled.table() if compiled else "a sampler that looks at the images has no table"]
    tell(result, "\n".join(lines), json)
    return result


def open_model(name: str, device: str) -> Model:
    """`load`, on the device that was asked for."""
    from .machine import device_for
    from .model import load

    return load(name, device_for(device))


def is_images(path: str) -> bool:
    """Whether a reference is real images, not statistics of them."""
    place = Path(path)
    return place.exists() and not (place / "features.json").is_file()


VERBS = (sample, compare, train, evaluate, models, show)
