"""`hasten classify`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..progress import progress
from ._common import open_model
from ._processes import on_main_process
from .terminal import print_result

if TYPE_CHECKING:
    from ..tasks.few_shot import FewShotClassifier


@on_main_process
def classify(
    images: Path,
    *,
    model: str | None = None,
    shots: Path | None = None,
    fitted: Path | None = None,
    classes: str | None = None,
    save: Path | None = None,
    condition: str | None = None,
    rank: int = 8,
    placement: str = "decoder",
    train_steps: int | None = None,
    lr: float | None = None,
    prior_images: int = 64,
    weights: str | None = None,
    times: int = 128,
    elimination: str = "paired",
    error: float = 0.05,
    resize: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Classify images by a diffusion model, from a few labelled ones (--shots), or by its own classes or prompts.

    With --shots an adapter (LoRA) is fitted for each class, and the class whose adapter denoises an image best at the
    times that matter is its class (TiF); without, the class or prompt under which the model denoises it best. See
    docs/few-shot.md.

    Args:
        images: Folder, zip or array of images, or one image. Where they have labels of the same names, the accuracy is
            printed.
        model: A folder, a bundled name (see models) or a pipeline of diffusers. Default: that of --fitted.
        shots: Folder with a sub-folder of images for each class.
        fitted: A folder of --save, in place of --shots.
        classes: Without --shots: classes of the model, or words for the {} of --condition, comma-separated.
            Default: all classes of the model.
        save: Folder to write the fitted classifier to.
        condition: What the network is conditioned on: none, class (the class of the same name), the name of one
            class, or a prompt, in which {} is the name of the class. Default: none with --shots, else class.
        rank: Of the adapters; 0: none.
        placement: Of the adapters: all layers, the decoder, or its last block. The rest runs once for all classes.
        train_steps: Of the adapters. Default: 60 for one shot to 1000 for 16.
        lr: Learning rate of the adapters. Default: 1e-4 with prompts, else 1e-3.
        prior_images: Images of the model itself that adapters are also trained on; 0: none.
        weights: Of the times: time_steps, uniform or inverse. Default: time_steps with --shots, else uniform.
        times: Number of times at which errors are compared.
        elimination: When classes are dropped: paired (a test), stages (of the paper) or all (never).
        error: How often paired may answer otherwise than all.
        resize: Crop and resize images of another size than the model's.
        seed: Of noise, adapters and times.
        batch_size: Images times classes in the network at once.
        device: auto, cpu, cuda, cuda:1, mps or xpu. auto uses the GPU if there is one.
        json: Print the result as JSON, with the probabilities of all classes.

    Returns:
        The class of each image with probabilities, network evaluations, seconds.
    """
    from ..performance.device import device_for
    from ..tasks.few_shot import DiffusionClassifier, FewShotClassifier, load_classifier, save_classifier
    from ..tasks.few_shot.shots import open_sized_images, read_shots
    from ..train.data import to_float

    began = time.perf_counter()
    if (shots is not None) + (fitted is not None) + (classes is not None) > 1:
        raise BadInput("give one of --shots, --fitted and --classes")
    if model is None and fitted is None:
        raise BadInput("give --model, or the --fitted classifier of a model")
    refuse_unused(images, save, shots)
    with progress("fitting") as tick:
        classifier: FewShotClassifier
        if fitted is not None:
            classifier = load_classifier(
                fitted, None if model is None else open_model(model, device), device_for(device)
            )
            changes: dict[str, Any] = {"elimination": elimination, "error": error, "batch_size": batch_size}
            classifier = classifier.replace(**changes, **({} if weights is None else {"weights": weights}))
        else:
            loaded = open_model(str(model), device)
            options: dict[str, Any] = {
                "rank": rank if shots is not None else 0, "placement": placement, "train_steps": train_steps, "lr": lr,
                "prior_images": prior_images, "times": times, "elimination": elimination, "error": error,
                "seed": seed, "batch_size": batch_size,
            }  # fmt: skip
            options |= {} if condition is None else {"condition": condition}
            options |= {} if weights is None else {"weights": weights}
            if shots is not None:
                x, y, _ = read_shots(shots, loaded, resize)
                classifier = FewShotClassifier(loaded, **options).fit(x, y, progress=tick)
            else:
                if weights not in (None, "uniform"):
                    raise BadInput(f"weights {weights} need the size of what tells the classes apart: give --shots")
                names = None if classes is None else [name.strip() for name in classes.split(",") if name.strip()]
                classifier = DiffusionClassifier(loaded, **options).fit(None, names)
    if save is not None:
        save_classifier(classifier, save)
    fitting = time.perf_counter() - began
    data = open_sized_images(images, classifier.model_, resize)
    with progress("classifying") as tick:
        decision = classifier.decide(to_float(data.images(range(len(data)))), progress=tick)
    probabilities = classifier.probabilities(decision)
    names = [str(one) for one in classifier.classes_.tolist()]
    files = data.files or tuple(f"image {k}" for k in range(len(data)))
    found = [
        {
            "file": file or str(images),
            "class": names[k],
            "probabilities": dict(zip(names, (round(float(p), 6) for p in row))),
            "evaluations": int(count),
        }
        for file, k, row, count in zip(files, decision.winner.tolist(), probabilities, classifier.evaluations_)
    ]
    result: dict[str, Any] = {
        "images": found, "classes": names, "model": classifier.model_.name, "size": classifier.size_,
        "smallest_time": classifier.time_floor_, "elimination": elimination,
        "evaluations": float(classifier.evaluations_.mean()), "evaluations_of_all": len(names) * classifier.times,
        "fitting_seconds": fitting, "seconds": time.perf_counter() - began,
        "saved": None if save is None else str(save),
    }  # fmt: skip
    if data.labels is not None and data.classes is not None and set(data.classes) <= set(names):
        truth = [data.classes[k] for k in data.labels.tolist()]
        result["accuracy"] = sum(one["class"] == name for one, name in zip(found, truth)) / len(truth)
    lines = [f"{one['file']}: {one['class']} ({max(probabilities[k]):.2f})" for k, one in enumerate(found)]
    accuracy = f", {100 * result['accuracy']:.1f} % right" if "accuracy" in result else ""
    lines.append(
        f"{len(found)} images{accuracy}: {result['evaluations']:.0f} of {result['evaluations_of_all']} network "
        f"evaluations an image, {result['seconds']:.1f} s"
    )
    print_result(result, "\n".join(lines), json)
    return result


def refuse_unused(images: Path, save: Path | None, shots: Path | None) -> None:
    """Refuse paths that cannot be, before anything is computed."""
    from ..files import check_writable, refuse_inside

    if not images.exists():
        raise BadInput(f"there is no file or folder {images}")
    if save is not None:
        for data in (images, shots):
            refuse_inside(save, data, "--save")
        check_writable(save / "few_shot.json")
