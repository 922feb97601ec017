"""NaN and infinity are errors that say where they began: in samples, weights, pictures, figures, tuning, JSON."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import hasten
from hasten.cli.terminal import print_result
from hasten.denoiser import Denoiser
from hasten.errors import BadInput, NonFinite, Notice
from hasten.images import make_image_grid, mark_non_finite, to_pil, to_uint8
from hasten.metrics import evaluate_features, make_reference
from hasten.metrics.references import narrow, reference, save_reference
from hasten.model import Model
from hasten.plan import diagnose
from hasten.schedules import VPCosine
from hasten.utils import finite
from hasten.workflows.quantize import quantize_model
from hasten.workflows.tune import tune_model

from .factories import break_weight, run_cli, tiny_model


def broken() -> Model:
    """A model with a NaN in its first weight."""
    return break_weight(tiny_model(steps=4))


# Samples


def test_the_message_names_the_seeds_and_the_weight() -> None:
    with pytest.raises(NonFinite, match=r"3 of 3 images .*\(seeds 7, 8, 9\).* weight conv_in.weight of the network"):
        broken().sample(3, seed=7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_the_first_layer_and_evaluation_are_found(value: float, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = tiny_model(steps=4), [0]

    def spoil(module: nn.Module, given: Any, made: Tensor) -> Tensor:
        count[0] += 1
        return made if count[0] % 100 < 3 else made.index_fill(0, torch.tensor([1]), value)

    layer = next(n for n, m in model.denoiser.net.named_modules() if isinstance(m, nn.Conv2d) and n != "conv_in")
    module = model.denoiser.net.get_submodule(layer)
    module.register_forward_hook(spoil)
    origin = diagnose.origin

    def again(*arguments: Any, **options: Any) -> str:
        count[0] = 0
        return origin(*arguments, **options)

    monkeypatch.setattr("hasten.model.finite.origin", again)
    with pytest.raises(NonFinite) as caught:
        model.sample(2, sampler=sampler, steps=4)
    assert "began in network evaluation 3" in str(caught.value) and layer in str(caught.value)
    assert "1 of 2 images" in str(caught.value) and "(seed 1)" in str(caught.value)
    assert torch.isfinite(caught.value.images[0]).all() and not torch.isfinite(caught.value.images[1]).all()


def test_infinity_is_not_cut_to_white() -> None:
    with pytest.raises(NonFinite, match="evaluation"):
        tiny_model().sample(2, sampler="ddim", steps=2, guidance_scale=1e38)


def test_guidance_that_overflows_is_named_and_no_layer_is() -> None:
    class Large(nn.Module):
        null_label = 2

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return 1e30 * (1.0 + label.float().view(-1, 1, 1, 1)) * torch.ones_like(x) * self.one

    model = Model(Denoiser(Large(), VPCosine(), "x0"), "large", (1, 4, 4), ("a", "b"))
    with pytest.raises(NonFinite, match="evaluation 1, at t = .*, in the guidance around the network"):
        model.sample(1, sampler="ddim", steps=2, guidance_scale=1e20)


def test_the_decoder_is_named_where_the_latents_are_finite() -> None:
    class Decoder:
        def __init__(self) -> None:
            self.vae = nn.Conv2d(1, 3, 1)
            self.vae.weight.data[0] = math.nan

        def decode(self, z: Tensor) -> Tensor:
            return self.vae(z)

    model = tiny_model(steps=4)
    model.decoder = Decoder()
    with pytest.raises(NonFinite, match="samples are finite, the decoder Conv2d is not: its weight weight"):
        model.sample(1)


def test_a_condition_that_is_not_finite_is_named() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return x * self.one + text.view(-1, 1, 1, 1)

    class Prompts:
        def cond(self, n: int, prompt: Any, seed: int) -> dict[str, Tensor]:
            return {"text": torch.full((n,), math.inf)}

    model = Model(Denoiser(Asks(), VPCosine(), "v"), "asks", (1, 4, 4), conditioning=Prompts())
    with pytest.raises(NonFinite, match="condition 'text'"):
        model.sample(1, "a cat")


# Weights


def test_a_saved_and_a_loaded_network_say_which_tensor(tmp_path: Path) -> None:
    with pytest.warns(Notice, match=r"conv_in.weight.* holds NaN"):
        broken().save(tmp_path / "m")
    with pytest.warns(Notice, match=r"weights.safetensors: the tensor conv_in.weight"):
        hasten.load(tmp_path / "m")


@pytest.mark.filterwarnings("ignore::hasten.errors.Notice")
def test_verbs_that_work_for_long_refuse_at_once(tmp_path: Path) -> None:
    broken().save(tmp_path / "m")
    for verb in (["quantize"], ["tune"], ["evaluate", "--n", 10], ["compare"], ["export"]):
        out = [] if verb[0] == "evaluate" else ["--out", tmp_path / "x"]
        code, _, said = run_cli(verb[0], tmp_path / "m", *verb[1:], *out)
        assert code == 1 and "conv_in.weight holds NaN" in said.splitlines()[-1], (verb, said)
        assert not (tmp_path / "x").exists()
    for run in (lambda: quantize_model(broken(), tmp_path / "y"), lambda: tune_model(broken(), tmp_path / "y")):
        with pytest.raises(NonFinite, match="conv_in.weight"):
            run()


def test_a_mask_of_minus_infinity_is_no_fault() -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert finite.not_finite(net) is None
    net.mask[0] = math.nan  # type: ignore[operator]
    assert finite.not_finite(net) == "mask"


def test_large_finite_numbers_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert finite.is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
        assert not finite.is_finite(torch.tensor([1, math.inf, -math.inf], dtype=dtype))
    assert finite.is_finite(torch.empty(0)) and finite.is_finite(torch.arange(3))


def test_quantize_names_the_layer_with_nan_inputs_in_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.accelerators import SamplingContext
    from hasten.accelerators.quantize import Quantize

    model = tiny_model(steps=4)
    x, t, cond = model.calls(2, 0, steps=2)[0]
    with pytest.raises(NonFinite, match="quantize: layer conv_in has NaN or infinite inputs"):
        calls = [(torch.full_like(x, math.nan), t, cond)]
        Quantize(images=1, steps=1, keep=()).apply(model.denoiser, SamplingContext(None, lambda n, seed: calls))
    with pytest.raises(NonFinite, match="quantize: the tensor conv_in.weight"):
        Quantize(images=1, steps=1).apply(broken().denoiser, SamplingContext(None, lambda n, seed: [(x, t, cond)]))


def test_a_damaged_reference_is_refused(tmp_path: Path) -> None:
    known = make_reference(torch.randn(300, 3), "n", "all", "x")
    known.mean[1] = math.nan
    save_reference(known, tmp_path)
    with pytest.raises(NonFinite, match="statistics mean"):
        reference(tmp_path)


# Pictures


def test_no_picture_is_made_of_what_is_not_finite() -> None:
    x = torch.zeros(3, 1, 4, 4)
    x[1, 0, 0, 0] = math.nan
    for make in (to_uint8, make_image_grid, lambda x: to_pil(x[1])):
        with pytest.raises(NonFinite, match="1 of"):
            make(x)
    shown = mark_non_finite(x)
    assert torch.isfinite(shown).all() and shown[1].unique().numel() == 2 and not shown[::2].any()


@pytest.mark.filterwarnings("ignore::hasten.errors.Notice")
def test_sample_ends_with_an_error_and_crosses_out_what_failed(tmp_path: Path) -> None:
    broken().save(tmp_path / "m")
    code, out, said = run_cli("sample", tmp_path / "m", "--n", 2, "--precision", "fp32", "--out", tmp_path / "x.png")
    assert code == 1 and not out
    assert "2 of 2 images hold NaN or infinity (seeds 0, 1): the weight conv_in.weight" in said.splitlines()[-1]
    assert set(np.unique(np.asarray(Image.open(tmp_path / "x.png")))) == {128, 255}


# Figures


def test_figures_are_finite_or_an_error() -> None:
    known = make_reference(torch.randn(300, 3), "n", "all", "x")
    for value in (math.nan, math.inf):
        features = torch.randn(20, 3)
        features[4, 1] = value
        with pytest.raises(NonFinite, match=r"1 of 20 images.* numbers 4"):
            evaluate_features(features, known)


def test_features_that_half_precision_cannot_hold_are_kept_whole(tmp_path: Path) -> None:
    features = torch.randn(300, 3) * 1e6
    known = make_reference(features, "n", "all", "x")
    assert torch.isfinite(known.sample).all() and narrow(features / 1e6).dtype == torch.float16
    save_reference(known, tmp_path)
    assert torch.equal(reference(tmp_path).sample, known.sample)
    found = evaluate_features(torch.randn(300, 3) * 1e6, known, bootstrap=0)
    assert math.isfinite(found["kid"].value) and found["precision"].value > 0.5


def test_few_samples_get_no_precision() -> None:
    known = make_reference(torch.randn(300, 3), "n", "all", "x")
    assert "precision" not in evaluate_features(torch.randn(199, 3), known, bootstrap=0)
    assert "precision" in evaluate_features(torch.randn(200, 3), known, bootstrap=0)
    few = make_reference(torch.randn(100, 3), "n", "all", "x")
    assert "precision" not in evaluate_features(torch.randn(300, 3), few, bootstrap=0)
    assert "100 reference images" in str(hasten.metrics.without_neighbours(300, few))


def test_tuning_refuses_figures_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.tuning import Tuned
    from hasten.tuning.moments import Moments

    pictures = torch.randint(0, 256, (4, 8, 8), dtype=torch.uint8).numpy()
    (tmp_path / "d").mkdir()
    for k in range(4):
        Image.fromarray(pictures[k]).save(tmp_path / "d" / f"{k}.png")
    for found in (Tuned(None, figures={"loss": math.nan}), Tuned(None, statistics={"m": torch.tensor([math.inf])})):
        monkeypatch.setattr(Moments, "tune", lambda self, task, found=found: found)
        with pytest.raises(NonFinite, match="moments: the (figures|statistics) are not finite"):
            tune_model(tiny_model(), tmp_path / "m", method="moments", data=tmp_path / "d")
    assert not (tmp_path / "m" / "model.json").exists()


def test_what_is_printed_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_result({"a": [math.nan, 1.0], "b": {"c": math.inf}}, "", True)

    def no(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(capsys.readouterr().out, parse_constant=no) == {"a": [None, 1.0], "b": {"c": None}}


def test_check_finite_names_the_place() -> None:
    for value in ({"a": {"b": [1.0, math.nan]}}, {"a": {"b": torch.tensor([1.0, math.inf])}}):
        with pytest.raises(NonFinite, match="record: a: b"):
            finite.check_finite("record", value)
    finite.check_finite("record", {"a": 1, "b": "x", "c": [None, 2.0], "d": torch.zeros(2)})
    assert issubclass(NonFinite, BadInput)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model()
