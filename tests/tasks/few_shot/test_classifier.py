"""The classifier: batched adapters are those of a loop, identical ones tie, the estimator protocol, bad input."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput, Notice
from hasten.model import Model
from hasten.nets.lora import merge_factors
from hasten.performance.cost import macs
from hasten.predictions import prediction_from
from hasten.schedules import VPLinear
from hasten.storage.lora_files import read_lora
from hasten.tasks.few_shot import (
    DiffusionClassifier,
    FewShotClassifier,
    PairedStop,
    Stages,
    export_loras,
    load_classifier,
    save_classifier,
)
from hasten.tasks.few_shot.adapters import ClassAdapters, layers_of
from hasten.tasks.few_shot.errors import ClassErrors
from tests.factories import tiny_model

FAST: dict[str, Any] = {"train_steps": 4, "times": 16, "prior_images": 4, "rank": 2, "shots_per_step": 2}


def model(**options: Any) -> Model:
    return tiny_model(network={"widths": (8, 16)}, **options)


def unconditional(**options: Any) -> Model:
    return tiny_model(None, network={"widths": (8, 8)}, **options)


def shots(n: int = 6, classes: int = 3, side: int = 8, channels: int = 1) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, channels, side, side, generator=generator) * 2 - 1
    return x, [f"kind {k % classes}" for k in range(n)]


def random_adapters(one: Model, placement: str, K: int, cond: dict[str, Tensor]) -> ClassAdapters:
    layers = layers_of(one.denoiser, one.shape, cond, placement, "all")
    adapters = ClassAdapters.start(one.denoiser.net, layers, K, 2)
    generator = torch.Generator().manual_seed(2)
    for name, (down, up) in adapters.factors.items():
        down = down + 0.1 * torch.randn(down.shape, generator=generator)
        adapters.factors[name] = down, 0.3 * torch.randn(up.shape, generator=generator)
    return adapters


def case(one: Model, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, rows, *one.shape, generator=generator).unbind()
    return x, noise, torch.linspace(0.2, 0.8, rows, dtype=torch.float64)


@pytest.mark.parametrize("placement", ["all", "decoder", "last"])
@pytest.mark.parametrize("mapped", [True, False])
def test_all_classes_at_once_are_a_loop_with_merged_weights(placement: str, mapped: bool) -> None:
    """The errors of each class are those of a network with the class's LoRA merged into its weights, whichever way the
    classes are batched."""
    one = model()
    cond = one.conditions(1, "none")
    adapters = random_adapters(one, placement, 4, cond)
    errors = ClassErrors(one.denoiser, adapters, cond, split=placement != "all")
    errors.mapped = mapped
    x, noise, t = case(one)
    with torch.no_grad():
        found = errors(x, noise, t, torch.tensor([2, 0, 3]))
        alpha, sigma = (
            f(t).float()[:, None, None, None] for f in (one.denoiser.schedule.alpha, one.denoiser.schedule.sigma)
        )
        for row, k in zip(found, (2, 0, 3)):
            net = copy.deepcopy(one.denoiser.net)
            merge_factors(net, adapters.low_rank(k))
            denoiser = one.denoiser.replace(net=net)
            x_t = alpha * x + sigma * noise
            label = cond["label"].expand(3)
            eps = (x_t - alpha * denoiser(x_t, t, label=label)) / sigma
            torch.testing.assert_close(row, (eps - noise).square().flatten(1).mean(1), rtol=2e-4, atol=1e-5)
    assert errors.mapped == mapped and errors.evaluations == 9
    assert not any(module._forward_hooks for module in one.denoiser.net.modules())


@pytest.mark.parametrize("prediction", ["eps", "x0", "flow", "edm"])
def test_errors_are_those_of_eps_whatever_the_network_predicts(prediction: str) -> None:
    one = unconditional(schedule=VPLinear(), prediction=prediction)
    x, noise, t = case(one)
    with torch.no_grad():
        found = ClassErrors(one.denoiser)(x, noise, t, torch.tensor([0, 1]))
        alpha, sigma = (
            f(t).float()[:, None, None, None] for f in (one.denoiser.schedule.alpha, one.denoiser.schedule.sigma)
        )
        x_t = alpha * x + sigma * noise
        eps = (x_t - alpha * one.denoiser(x_t, t)) / sigma
    torch.testing.assert_close(found[1], (eps - noise).square().flatten(1).mean(1), rtol=1e-3, atol=1e-5)


def test_the_encoder_runs_once_for_all_classes() -> None:
    """Multiply-accumulates of 20 classes against a loop: more than ten times fewer with adapters in the last block."""
    one = hasten.load("fashion")
    cond = one.conditions(1, "none")
    x, noise, t = case(one, 1)
    fewer = {}
    for placement in ("all", "decoder", "last"):
        adapters = random_adapters(one, placement, 20, cond)
        errors = ClassErrors(one.denoiser, adapters, cond, split=placement != "all")
        together = macs(errors, x, noise, t, torch.arange(20))
        fewer[placement] = 20 * macs(errors, x, noise, t, torch.tensor([0])) / together
        encoder = [0]
        hook = one.denoiser.net.conv_in.register_forward_hook(lambda *_, n=encoder: n.__setitem__(0, n[0] + 1))  # type: ignore
        with torch.no_grad():
            errors(x, noise, t, torch.arange(20))
        hook.remove()
        assert encoder == [1]
    assert fewer["last"] >= 10 and 1.4 < fewer["decoder"] < fewer["last"] and fewer["all"] < 1.1, fewer


def test_training_gives_each_class_what_it_would_get_alone() -> None:
    """Factors of three classes in one batch, and of groups of two; two classes with equal shots would tie exactly."""
    x, y = shots()
    one = unconditional()
    at_once = FewShotClassifier(one, **FAST, size=1.0).fit(x, y)
    grouped = FewShotClassifier(one, **FAST, size=1.0, batch_size=4).fit(x, y)
    assert at_once.adapters_ is not None and grouped.adapters_ is not None
    for name, pair in at_once.adapters_.factors.items():
        for a, b in zip(pair, grouped.adapters_.factors[name]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert float(pair[1].abs().max()) > 0 and not torch.equal(pair[1][0], pair[1][1])


def test_identical_adapters_tie() -> None:
    """Check (3): with the same noise for all, the errors of equal adapters differ by less than 1e-6."""
    x, y = shots(4, 2)
    fitted = FewShotClassifier(unconditional(), **FAST, elimination="all").fit(x, y)
    assert fitted.adapters_ is not None
    for down, up in fitted.adapters_.factors.values():
        down[1], up[1] = down[0], up[0]
    errors = fitted.decide(x).errors
    assert float((errors[:, 0] - errors[:, 1]).abs().max()) < 1e-6
    assert fitted.predict_proba(x) == pytest.approx(0.5, abs=0.2)


def test_adapters_learn_their_classes() -> None:
    """Bright and dark images; the probability, the score and the evaluations of an early stop."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([0.7 + 0.1 * torch.randn(6, 1, 8, 8, generator=generator), -0.7 + 0.1 * torch.randn(6, 1, 8, 8)])
    y = np.array([5] * 6 + [3] * 6)
    # the network of random weights knows no images, so no prior is preserved
    how = {**FAST, "train_steps": 40, "lr": 3e-2, "prior_weight": 0.0, "placement": "all", "times": 32}
    fitted = FewShotClassifier(unconditional(), **how, weights="uniform").fit(x[::2], y[::2])
    assert fitted.classes_.tolist() == [3, 5] and fitted.score(x[1::2], y[1::2]) == 1.0
    assert fitted.evaluations_.mean() < 0.8 * 2 * 32
    proba = fitted.predict_proba(x)
    assert np.allclose(proba.sum(1), 1) and (fitted.classes_[proba.argmax(1)] == fitted.predict(x)).all()
    exhaustive = fitted.replace(elimination="all")
    assert (exhaustive.predict(x) == fitted.predict(x)).all() and exhaustive.adapters_ is fitted.adapters_
    rows = x.flatten(1).numpy()  # as a Pipeline passes them
    assert (fitted.predict(rows) == fitted.predict(x)).all()


def test_one_images_answer_does_not_depend_on_the_batch() -> None:
    x, y = shots()
    fitted = FewShotClassifier(unconditional(), **FAST).fit(x, y)
    together = fitted.decide(x).errors
    alone = fitted.replace(batch_size=2).decide(x[2:3]).errors
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_the_protocol_of_an_estimator() -> None:
    one = unconditional()
    first = FewShotClassifier(one, rank=3, times=20)
    params = first.get_params()
    assert params["model"] is one and params["rank"] == 3
    clone = first.__sklearn_clone__()
    assert clone is not first and clone.get_params() == params and not clone.__sklearn_is_fitted__()
    assert first.set_params(rank=4) is first and first.rank == 4 and clone.rank == 3
    assert type(first)(**first.get_params()).get_params() == first.get_params()
    with pytest.raises(BadInput, match="rank"):
        first.set_params(ranks=1)
    with pytest.raises(BadInput, match="not fitted"):
        first.predict(shots()[0])


def test_scikit_learn_clones_it() -> None:
    sklearn, first = pytest.importorskip("sklearn.base"), FewShotClassifier(unconditional(), rank=3)
    assert sklearn.clone(first).get_params() == first.get_params() and sklearn.is_classifier(first)


def test_saved_and_loaded(tmp_path: Path) -> None:
    x, y = shots()
    one = unconditional()
    fitted = FewShotClassifier(one, **FAST, elimination=Stages((4, 16), (2, 1)), weights="inverse").fit(x, y)
    save_classifier(fitted, tmp_path / "fitted")
    loaded = load_classifier(tmp_path / "fitted", one)
    assert loaded.elimination == fitted.elimination and loaded.classes_.tolist() == fitted.classes_.tolist()
    assert np.array_equal(loaded.predict_proba(x), fitted.predict_proba(x))
    other = unconditional(seed=7)
    with pytest.raises(BadInput, match="weights are others"):
        load_classifier(tmp_path / "fitted", other)
    files = export_loras(fitted, tmp_path / "loras")
    assert sorted(files) == ["kind 0", "kind 1", "kind 2"]
    lora = read_lora(files["kind 1"]).components["unet"]
    assert fitted.adapters_ is not None
    name, factors = next(iter(fitted.adapters_.low_rank(1).items()))
    torch.testing.assert_close(lora[name].delta(), factors.delta())
    (tmp_path / "fitted" / "adapters.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(BadInput, match="cannot read"):
        load_classifier(tmp_path / "fitted", one)
    with pytest.raises(BadInput, match="no fitted"):
        load_classifier(tmp_path, one)


def test_diffusion_classifier_is_the_plain_case() -> None:
    """The class of least mean error under the model's own labels, uniform in time, without adapters."""
    one = model()
    plain = DiffusionClassifier(one, times=8, elimination="all").fit(None)
    assert plain.classes_.tolist() == ["bag", "boot", "coat"]
    x = shots(2)[0]
    errors = plain.decide(x).errors
    noise = hasten.utils.random.Noise(range(8), one.shape, torch.float32, torch.device("cpu")).initial()
    for n, label in enumerate(("bag", "boot", "coat")):
        i = one.class_index(label)
        mine = ClassErrors(one.denoiser, None, {"label": torch.tensor([i])})
        with torch.no_grad():
            expected = mine(x[:1].expand(8, -1, -1, -1), noise, plain.times_, torch.tensor([0]))[0]
        torch.testing.assert_close(errors[0, n].float(), expected.float(), rtol=1e-4, atol=1e-6)
    assert (plain.weights_ == 1).all() and plain.evaluations_.tolist() == [24, 24]
    with pytest.raises(BadInput, match="no class 'hat'"):
        DiffusionClassifier(one).fit(None, ["hat", "bag"])


def test_bad_input_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    one = unconditional()
    x, y = shots()
    for images, labels, message in (
        (x, ["a"] * 6, "two classes or more, found only a"),
        (x, y[:5], "one label for each of the 6 images"),
        (shots(side=16)[0], y, "found 1x16x16: resize"),
        (shots(channels=3)[0], y, "found 3x8x8"),
        (x[[0, 1, 2, 3, 4, 0]], y, "kind 0 and kind 2 have the same picture .image 0 and image 5"),
        (x.index_fill(0, torch.tensor([2]), float("nan")), y, "NaN"),
    ):
        with pytest.raises(BadInput, match=message) as error:
            FewShotClassifier(one, **FAST).fit(images, labels)
        assert "\n" not in str(error.value)
    for params, message in (
        ({"weights": "time"}, "time_steps"), ({"placement": "encoder"}, "decoder"), ({"elimination": "t"}, "paired"),
        ({"condition": "class"}, "condition must be 'none'"), ({"rank": -1}, "rank"), ({"temperature": 0}, "temperature"),
        ({"spacing": "odd"}, "even"), ({"train_steps": 0}, "train_steps"), ({"lr": 0.0}, "lr must be positive"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            FewShotClassifier(one, **{**FAST, **params}).fit(x, y)
    monkeypatch.setattr("hasten.tasks.few_shot.adapters.memory_left", lambda device: 10_000)
    with pytest.raises(BadInput, match="adapters of 3 classes need .* at most 0 classes of rank 2"):
        FewShotClassifier(one, **FAST).fit(x, y)
    student = replace(one, card={"distilled": {}})
    with pytest.raises(BadInput, match="use its teacher"):
        FewShotClassifier(student, **FAST).fit(x, y)


class Odd(nn.Module):
    """A network that `torch.vmap` cannot map: its path depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x).relu() + time[:, None, None, None]
        return self.last(h if float(h.detach().sum()) > -1e9 else -h)


def test_networks_that_cannot_be_mapped_are_one_batch() -> None:
    """Somebody's own network with a branch on values, with the same result as with the classes one by one."""
    torch.manual_seed(0)
    denoiser = Denoiser(Odd(), VPLinear(), prediction_from("eps")).eval().requires_grad_(False)
    one = Model(denoiser, "odd", (1, 8, 8), None, sampler="ddim", times="trailing", steps=2)
    x, y = shots()
    with pytest.warns(Notice, match="cannot be mapped"):
        fitted = FewShotClassifier(one, **{**FAST, "placement": "all"}, elimination="all").fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = fitted.decide(x).errors
        for k in range(3):
            errors = ClassErrors(denoiser, fitted.adapters_)
            noise = hasten.utils.random.Noise(range(16), one.shape, torch.float32, torch.device("cpu")).initial()
            with torch.no_grad():
                alone = errors(x[:1].expand(16, -1, -1, -1), noise, fitted.times_, torch.tensor([k]))[0]
            torch.testing.assert_close(together[0, k].float(), alone * fitted.weights_.float(), rtol=1e-4, atol=1e-6)


def test_elimination_object_and_half_precision() -> None:
    one = unconditional()
    half = replace(one, denoiser=one.denoiser.replace(net=copy.deepcopy(one.denoiser.net).bfloat16()))
    x, y = shots()
    fitted = FewShotClassifier(half, **FAST, elimination=PairedStop(0.2, first=4)).fit(x, y)
    assert set(fitted.predict(x)) <= set(y) and fitted.evaluations_.max() <= 48
