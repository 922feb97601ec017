"""`evaluate_model`: sample images and measure how good they are; figures of images on several processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..errors import BadInput, check_int
from ..metrics import (
    Measure,
    Reference,
    evaluate_features,
    evaluate_images,
    extract,
    feature_net,
    net_name,
    without_neighbours,
)
from ..metrics.fashion import CLASSES as FASHION
from ..model.model import Label, Model
from ..plan.config import SamplingConfig
from ..progress import ignore_messages
from ..sampling import Progress
from ..train.messages import join_names, print_once
from ..train.names import class_of, is_number
from ..utils.config import Config
from ..utils.environment import cache_folder
from .distribute import idle_processes, sample_many, saved_batches
from .evidence import Evidence, collect_evidence
from .prompt_figures import IMAGES_PER_PROMPT, PromptDetails, captions_for, diversity_features
from .prompts import bundled_prompts, image_shape, prompts_for
from .reference_images import resolve_reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..plan.config import SamplingOptions

__all__ = ["EvaluateConfig", "evaluate_distributed", "evaluate_model"]

IMAGES = 2000
Bars = Callable[[str], "AbstractContextManager[Progress | None]"]


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Which images to sample, and what to measure them against.

    Args:
        n: number of images, at least 10; better 2000 or more. None: one of each caption of `data`, otherwise 2000.
        reference: bundled statistics, a folder of statistics, or a folder, zip or array of real images, whose
            statistics are computed once; None: the one that the model's card names.
        features: name of the feature network, a folder of a CLIP, SigLIP or DINOv2 of transformers, or the network
            itself; None: the reference's.
        seed: of image 0; image k uses `seed + k`.
        label: of the images, see `Model.labels`.
        prompts: of a model that takes prompts: image k gets number k mod their count. None: the captions of `data`, or
            without real pictures a bundled list of 200.
        data: of a model that takes prompts: a folder or zip of pictures with captions, which are the reference.
        split: of `data`, the pictures that are held out.
        judge: the features, and what compares images with prompts, see `metrics.text_judge.load_judge`; None: the one
            that the model's card names.
        images_per_prompt: from how many images of each prompt the diversity within a prompt is measured; 1: it is not.
        repeats: blocks of n seeds, one after the other: figures are then means, with the deviation of a block.
        batch_size: images in the network at once.
    """

    n: int | None = None
    reference: Any = None
    features: Any = None
    seed: int = 0
    label: Label = None
    prompts: Sequence[str] | None = None
    data: str | Path | None = None
    split: str = "test"
    judge: Any = None
    images_per_prompt: int = IMAGES_PER_PROMPT
    repeats: int = 1
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.n is not None:
            check_int("n", self.n, 10)
        check_int("images_per_prompt", self.images_per_prompt, 1)
        check_int("batch_size", self.batch_size, 1)
        check_int("repeats", self.repeats, 1)


def evaluate_model(
    model: Model,
    evaluation: EvaluateConfig | None = None,
    config: SamplingConfig | None = None,
    *,
    ranks: Ranks | None = None,
    progress: Bars = lambda what: nullcontext(),
    warn: Callable[[str], None] = ignore_messages,
    **options: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Sample images from a model and measure them: distances to real images, coverage, class accuracy.

        result = hasten.evaluate_model(model, EvaluateConfig(n=5000, reference="photos"), steps=8)
        result["measures"]["fid"]["value"]

    A figure can be compared with its real-data baseline, which is what as many real images get, and with figures of
    the same features, reference and count.

    A model that takes prompts is measured with the captions of `data` against its pictures, in the features of a judge:
    also how often the right caption is retrieved (prompt match), how much the images of a prompt differ (diversity),
    and whether images are nearer to training pictures than unseen real ones are.

    Args:
        evaluation: which images and which reference; None: 2000 images and the model's own reference.
        config: how to sample; None: as the model recommends. options: fields of it.
        ranks: the processes of the run, `Ranks.start()`; None: this one alone.
        progress: makes a context for each block of images whose value is called with (done, in all), or is None.
        warn: called with a line for what the user should know.

    Returns:
        A dict: model, sha256, the sampling settings, n, seeds, and `measures`, by name a dict of value, features,
        reference, count, baseline and interval; of a judge also `judge`, `prompt_match`, `diversity` and `nearest`.
        Empty in other processes than the main one.

    Raises:
        BadInput: before anything is sampled, for what cannot be.

    References:
        Heusel et al. 2017, arXiv:1706.08500 (Fréchet distance); Kynkäänniemi et al. 2019, arXiv:1904.06991 (precision
        and recall).
    """
    evaluation = EvaluateConfig() if evaluation is None else evaluation
    ranks = Ranks(model.device) if ranks is None else ranks
    tell = warn if ranks.is_main_process else ignore_messages
    seed, batch_size, repeats = evaluation.seed, evaluation.batch_size, evaluation.repeats
    chosen = (evaluation.data, evaluation.split, evaluation.judge)
    captioned = captions_for(model, chosen, (evaluation.reference, evaluation.features), ranks, tell)
    reference = evaluation.reference or model.card.get("reference")
    blind = captioned is None and reference is None and model.conditioning is not None
    given = len(captioned.captions) if captioned is not None and evaluation.prompts is None else IMAGES
    if blind:  # one image of each prompt
        given = len(evaluation.prompts or bundled_prompts())
    n = max(given, 10) if evaluation.n is None else evaluation.n
    if captioned is not None:
        captioned = captioned.with_baseline(n)
    known_prompts = captioned.prompts(n) if captioned is not None and evaluation.prompts is None else evaluation.prompts
    if blind and known_prompts is None:
        known_prompts = bundled_prompts()[:n]
        tell(f"no prompts were given: {len(known_prompts)} of the bundled list of 200; give --prompts FILE or --data")
    prompts = prompts_for(model, known_prompts, "the evaluation")
    label: Label = evaluation.label if prompts is None else prompts
    if prompts is not None and not model.calibration_prompts:
        calibration = () if captioned is None else captioned.calibration_prompts
        model = replace(model, calibration_prompts=calibration or tuple(dict.fromkeys(prompts)))
    if captioned is None and reference is None and not blind:
        raise BadInput(f"{model.name} names no reference: give --reference, such as a folder of real images")
    config = SamplingConfig.of(config, options)
    precision = ranks.on_main_process(lambda: model.precision_for(config.precision or "fp32", min(n, batch_size)))
    resolved = model.resolve(config, precision=precision)
    labels = None if model.conditioning is not None else model.labels(n, label)
    known: Reference | None = None
    net: nn.Module | None = None
    evidence: Evidence | None = None
    if blind:
        tell("real pictures were not given: how the images differ from a plain pipeline's, hasten compare measures")
        features, judge = evaluation.features, evaluation.judge
        evidence = collect_evidence(features, judge, None, None, model.device, tell)
    elif captioned is None:
        known, net = resolve_reference(reference, evaluation.features, image_shape(model), model.device, ranks, tell)
        assert known is not None and net is not None
    else:
        known, net = captioned.reference, captioned.judge
    for line in (known and without_neighbours(n, known), idle_processes(ranks, n, batch_size)):
        if line:
            tell(line)
    blocks, details = [], PromptDetails()
    for block in range(repeats):
        first = seed + block * n
        request = {"n": n, "label": label, "seed": first, "batch_size": batch_size}
        saved = saved_batches(cache_folder() / "kept", ranks, model, resolved, request)
        of = f", block {block + 1} of {repeats}" if repeats > 1 else ""
        with progress(f"sampling {n} images{of}") as tick:
            x = sample_many(
                model, n, label, first, batch_size, ranks=ranks, config=resolved, keep=saved, everywhere=True,
                progress=tick,
            )  # fmt: skip
        assert x is not None
        seeds = range(first, first + n)

        def extra(count: int, texts: Sequence[str], start: int) -> Tensor | None:
            return sample_many(model, count, list(texts), start, batch_size, ranks=ranks, config=resolved)

        if evidence is not None:
            per_prompt, features = evaluation.images_per_prompt, evidence.net
            groups = None
            if per_prompt > 1 and features is not None:
                groups = diversity_features(features, x, prompts or [], first, extra, per_prompt)
            blocks.append(evidence.measures(x, prompts or [], seeds, groups) if ranks.is_main_process else None)
        elif captioned is None:
            assert net is not None
            blocks.append(evaluate_distributed(x, labels, net, known, seeds, ranks, model.classes))
        else:
            measured = details.measure(captioned, x, prompts or [], seeds, extra, evaluation.images_per_prompt)
            blocks.append(measured if ranks.is_main_process else None)
        ranks.barrier()
        if saved is not None:
            saved.clear()
    finished = [measures for measures in blocks if measures is not None]
    if not finished:  # the main process has them
        return {}
    measures, deviation = over_blocks(finished)
    return {
        "model": model.name,
        "sha256": model.sha256,
        **resolved.settings(),
        "n": n,
        "seeds": [seed, seed + repeats * n - 1],
        **({"prompts": prompts} if prompts else {}),
        "measures": {name: measure.to_dict() for name, measure in measures.items()},
        **details.to_dict(),
        "summary": [
            f"{measure}, deviation {deviation[name]:.2g} over {repeats} blocks" if name in deviation else str(measure)
            for name, measure in measures.items()
        ]
        + details.lines,
        **({"repeats": repeats, "deviation": deviation} if repeats > 1 else {}),
        **({"blocks": [{name: m.value for name, m in each.items()} for each in finished]} if repeats > 1 else {}),
        **({"processes": ranks.world} if ranks.world > 1 else {}),
    }


def over_blocks(blocks: list[dict[str, Measure]]) -> tuple[dict[str, Measure], dict[str, float]]:
    """The means of the figures over blocks of seeds, and the standard deviation of one block, where there are several.

    The interval of a mean is not that of a block, so it has none.
    """
    if len(blocks) == 1:
        return blocks[0], {}
    means, deviation = {}, {}
    for name, measure in blocks[0].items():
        values = [block[name].value for block in blocks if name in block]
        deviation[name] = statistics.stdev(values)
        seeds = ",".join(block[name].seeds for block in blocks)
        means[name] = replace(measure, value=statistics.fmean(values), interval=None, spread=None, seeds=seeds)
    return means, deviation


def evaluate_distributed(
    images: Tensor,
    labels: Tensor | None,
    features: str | nn.Module,
    known: Reference | None,
    seeds: range,
    ranks: Ranks,
    classes: Sequence[str] | None = None,
) -> dict[str, Measure] | None:
    """`evaluate_images` with the looking done by all processes, each with all the images (N, C, H, W) in [-1, 1].

    known: needed by the first process alone, which gets the figures; the others get None. classes: what `labels` are
    indices of, matched by name to the classes of the feature network (None: these are the same).
    """
    labels = labels if classes is None else classifier_labels(labels, classes, features)
    if ranks.world == 1:
        assert known is not None
        return evaluate_images(images, labels, features, known, seeds, device=ranks.device)
    net, size = feature_net(features), 256
    net = net.to(ranks.device) if isinstance(features, str) else net
    if known is not None and net_name(net) != known.features:
        raise BadInput(f"the reference holds {known.features} features: {net_name(net)} gives others")

    def extract_batch(number: int) -> tuple[Tensor, ...]:
        seen, logits = extract(net, images[number * size : (number + 1) * size], size)
        return (seen,) if logits is None else (seen, logits)

    pieces = ranks.distribute(-(-len(images) // size), extract_batch)
    if not ranks.is_main_process or known is None:
        return None
    columns = [torch.cat(column) for column in zip(*[piece for piece in pieces if piece is not None])]
    return evaluate_features(columns[0], known, columns[1] if len(columns) > 1 else None, labels, seeds)


def classifier_labels(labels: Tensor | None, classes: Sequence[str], features: str | nn.Module) -> Tensor | None:
    """Labels (n,) of a model's `classes` as those of a classifier, matched by name.

    None, which is printed, where class accuracy cannot be measured: it does not know them all, or an image has none.
    """
    names = FASHION if features == "fashion" else getattr(features, "classes", None)
    if labels is None:
        return None
    used = sorted(set(labels.tolist()))
    if used and used[-1] >= len(classes):
        print_once("class accuracy is not measured: some images have no class")
        return None
    if names is None or isinstance(names, int):
        return labels
    index = {k: class_of(k, classes, names) for k in used}
    if all(map(is_number, classes)) and None in index.values() and len(classes) == len(names):
        index = {k: class_of(int(classes[k]), names, names) if int(classes[k]) < len(names) else None for k in used}
    unknown = [classes[k] for k, other in index.items() if other is None]
    if unknown:
        print_once(
            f"class accuracy is not measured: the feature network does not know the classes {join_names(unknown)}"
        )
        return None
    return torch.tensor([index[k] for k in labels.tolist()])
