"""What makes models fast, of models that read a source image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten import load
from hasten.accelerators.encoder_propagation import EncoderPropagation
from hasten.accelerators.quantize import Quantize
from hasten.choosing import choose
from hasten.cli import main
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model.model import Model
from hasten.nets.quantized import layers
from hasten.nets.source_cache import caching_sources
from hasten.nets.source_unet import SourceUNet
from hasten.plan import plan
from hasten.plan.config import SamplingConfig
from hasten.samplers import DDIM
from hasten.schedules import VPCosine
from hasten.times import Trailing
from hasten.tuning import TuningTask
from hasten.tuning.optimized_steps import OptimizedSteps
from hasten.utils.resizing import enlarge
from hasten.workflows.quantize import quantize_model
from hasten.workflows.source_data import calibration_sources
from hasten.workflows.tune import tune_model
from tests.source_models import FACTOR, SIDE, lwtdm, pictures, source_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


# ---- features of the source ----


@torch.no_grad()
def test_features_of_a_source_are_computed_once_and_are_the_same() -> None:
    net = lwtdm()
    x, source = torch.randn(4, 2, 3, SIDE, SIDE), torch.randn(2, 3, 8, 8)
    times = torch.linspace(0.9, 0.1, 4)[:, None].expand(-1, 2)
    plain = [net(a, t, source) for a, t in zip(x, times)]
    assert net.source_cache.computed == 0  # nothing is kept outside
    with caching_sources(nn.Sequential(net)):
        assert all(torch.equal(net(a, t, source.clone()), b) for a, t, b in zip(x, times, plain))
        assert net.source_cache.computed == 1
        other = net(x[0], times[0], source.flip(0))
        assert net.source_cache.computed == 2 and not torch.equal(other, plain[0])
        assert torch.equal(net(x[0], times[0], source), plain[0])
        source += 1  # in place
        assert not torch.equal(net(x[0], times[0], source), plain[0])
        source -= 1
        before = net.source_cache.computed
        with torch.enable_grad():
            net(x[0], times[0], source)
        assert net.source_cache.computed == before
        with torch.inference_mode():
            inference = torch.ones(2, 3, 8, 8)
            a = net(x[0], times[0], inference)
            inference += 1
            assert not torch.equal(a, net(x[0], times[0], inference))
    assert net.source_cache.entry is None


def test_a_sampling_computes_them_once() -> None:
    model = source_model()
    net: Any = model.denoiser.net
    x = model.sample(2, images=torch.zeros(2, 3, 8, 8), steps=4, sampler="ddim")
    assert net.source_cache.computed == 1
    net.source_cache = None

    class NoCache:
        def features(self, source: Tensor, key: Any, compute: Any) -> Any:
            return compute()

    net.source_cache = NoCache()
    assert torch.equal(x, model.sample(2, images=torch.zeros(2, 3, 8, 8), steps=4, sampler="ddim"))


@pytest.mark.parametrize("kind", ["lwtdm", "unet"])
def test_the_split_network_is_the_network_and_its_encoder_can_be_propagated(kind: str) -> None:
    net: Any = lwtdm()
    if kind == "unet":
        net = SourceUNet(3, 3, source_factor=FACTOR, widths=(8, 8), embedding=16)
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
    model = source_model(net.eval())
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    middle, finish = model.denoiser.features(torch.ones(2, 3, SIDE, SIDE), 0.5, source=images)
    torch.testing.assert_close(finish(middle), model.denoiser(torch.ones(2, 3, SIDE, SIDE), 0.5, source=images))
    how: dict[str, Any] = {"images": images, "steps": 12, "sampler": "ddim"}
    plain = model.sample(2, **how)
    keys = EncoderPropagation(keys=tuple(range(12)))
    torch.testing.assert_close(model.sample(2, accelerators=[keys], **how), plain, rtol=0, atol=1e-6)
    fast = model.sample(2, accelerators=[EncoderPropagation(keys="uniform", every=2)], **how)
    assert 0 < float((fast - plain).abs().max())


# ---- integers ----


def test_all_convolutions_of_lwtdm_become_integers(tmp_path: Path) -> None:
    model = source_model(steps=2)
    result = quantize_model(model, tmp_path / "q", data=pictures(tmp_path / "data"), images=4)
    fast = load(tmp_path / "q")
    found = {name.removeprefix("net.") for name, _ in layers(fast.denoiser.net)}
    convolutions = {name for name, layer in model.denoiser.net.named_modules() if isinstance(layer, nn.Conv2d)}
    assert convolutions - found == {"conv_in", "conv_out"}
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert result["error"] < 0.02 and fast.residual_std == 0.2
    x = fast.sample(2, images=images)
    assert float((x - model.sample(2, images=images)).abs().mean()) < 0.02
    assert float((x - fast.sample(2, images=images.flip(0))).abs().max()) > 0.05
    with pytest.raises(BadInput, match="give --data"):
        quantize_model(model, tmp_path / "other")


def test_time_groups_do_not_share_the_features_of_a_source(tmp_path: Path) -> None:
    """The shared encoder's activation ranges differ from group to group, and so do the features."""
    model = calibration_sources(source_model(steps=4), pictures(tmp_path))
    fast: Any = Quantize(groups=2, images=2).apply(model.denoiser, _context(model))
    x, source = torch.randn(2, 3, SIDE, SIDE), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        plain = [fast(x, t, source=source) for t in (0.95, 0.2)]
        with caching_sources(fast):
            assert all(torch.equal(fast(x, t, source=source), y) for t, y in zip((0.95, 0.2), plain))


def _context(model: Model) -> Any:
    from hasten.accelerators import SamplingContext

    times = plan(DDIM(), model.denoiser.schedule, Trailing()(model.denoiser.schedule, 4)).times[:-1]
    return SamplingContext(tuple(times.tolist()), lambda n, seed: model.calls(n, seed, SamplingConfig(steps=4)))


def test_ranges_hold_for_both_images_that_pass_the_shared_encoder() -> None:
    """A single bright pixel is normalised to values that no noise has."""
    source = torch.full((8, 3, 8, 8), -1.0)
    source[range(8), :, range(8), 3] = 1.0
    model = source_model(steps=2, calibration_sources=source)
    fast: Any = Quantize(groups=1, images=8).apply(model.denoiser, _context(model))
    x = torch.randn(8, 3, SIDE, SIDE)
    with torch.no_grad():
        a, b = (d.net.embed(torch.full((8,), 0.5), source)["added_0"] for d in (model.denoiser, fast))
    assert float((a - b).abs().max()) < 0.05 * float(a.abs().max())
    assert fast(x, 0.5, source=source).isfinite().all()


# ---- time steps ----


class GaussianOf(nn.Module):
    """Exact for x ~ N(enlarged source + shift, .5^2)."""

    source_channels, source_factor = 3, FACTOR

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.config = {"shift": shift}
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor, time: Tensor, source: Tensor) -> Tensor:
        schedule = VPCosine(offset=0.0)
        alpha, sigma = (f(time.double())[:, None, None, None].to(x.dtype) for f in (schedule.alpha, schedule.sigma))
        mean = enlarge(source, FACTOR) + self.shift
        return mean + 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * (x - alpha * mean)


class Gaussian(GaussianOf):
    """The same without a source."""

    source_channels = 0

    def forward(self, x: Tensor, time: Tensor, source: Tensor | None = None) -> Tensor:
        return super().forward(x, time, torch.zeros(len(x), 3, SIDE // FACTOR, SIDE // FACTOR))


def test_tuning_with_a_constant_source_is_tuning_without_one() -> None:
    tuner = OptimizedSteps(objective="trajectory", iterations=4, fine=16, starts=("narrow_angle",))
    schedule = VPCosine(offset=0.0)
    times = Trailing()(schedule, 4)
    common: dict[str, Any] = {"n": 8}

    def tuned(net: nn.Module, **options: Any) -> Any:
        return tuner.tune(
            TuningTask(Denoiser(net, schedule, "x0"), DDIM(), times, (3, SIDE, SIDE), **common, **options)
        )

    plain = tuned(Gaussian(0.4))
    given = tuned(GaussianOf(0.0), sources=torch.full((1, 3, 8, 8), 0.4))
    torch.testing.assert_close(given.plan.times, plain.plan.times, rtol=1e-4, atol=1e-5)
    assert given.figures["error"] < 0.9 * given.figures["error_given"]
    # several sources, one after the other
    task = TuningTask(Denoiser(GaussianOf(), schedule, "x0"), DDIM(), times, (3, 16, 16), sources=torch.arange(3.0))
    assert task.cond(4, 2)["source"].tolist() == [2, 0, 1, 2]
    cold = TuningTask(task.denoiser, DDIM(), times, (3, 16, 16), temperature=0.5)
    torch.testing.assert_close(cold.noise(0, 2).initial(), 0.5 * task.noise(0, 2).initial())


def test_a_model_is_tuned_with_the_sources_of_its_data(tmp_path: Path) -> None:
    model, data = source_model(GaussianOf(), prediction="x0"), pictures(tmp_path / "data")
    for method in (
        "optimized_steps:objective=trajectory,iterations=2,fine=8,starts=(narrow_angle,)",
        "fitted_plan:iterations=2,held_out=4",
    ):
        result = tune_model(
            model, tmp_path / method[:4], method, SamplingConfig(sampler="ddim", steps=3), data=data, n=4
        )
        again = load(tmp_path / method[:4], networks=[GaussianOf])
        assert again.plan is not None and again.plan.nfe == 3 and result["figures"]
        assert again.sample(1, images=torch.zeros(1, 3, 8, 8)).shape == (1, 3, SIDE, SIDE)
    with pytest.raises(BadInput, match="reads one: cached_plan, fitted_plan"):
        tune_model(model, tmp_path / "m", "moments", data=data)
    with pytest.raises(BadInput, match="give data"):
        tune_model(model, tmp_path / "m")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source_model(steps=2).save(tmp_path / "model")
    data, model = pictures(tmp_path / "data"), tmp_path / "model"
    assert main(f"quantize {model} --data {data} --out {tmp_path / 'q'} --images 2 --steps 2".split()) == 0
    method = "optimized_steps:iterations=2"
    line = f"tune {model} --data {data} --out {tmp_path / 't'} --method {method} --steps 3"
    code = main([*line.split(), "--degrade", "low_resolution:factor=2,blur=1"])
    assert code == 0, capsys.readouterr().err
    assert "3" in capsys.readouterr().out and load(tmp_path / "t").plan is not None


def test_an_exported_network_takes_the_input_source(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from hasten.adapters import onnx

    model = source_model(steps=2)
    exported = onnx.export(model, tmp_path / "x")
    again = load(tmp_path / "x")
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    assert again.source_shape == (3, 8, 8) and again.residual_std == 0.2 and exported.source_factor == FACTOR
    torch.testing.assert_close(again.sample(3, images=images), model.sample(3, images=images), rtol=0, atol=1e-4)


# ---- the fastest way ----

ROWS = """
[reference]
name = "all"
sampler = "ddim"
times = "trailing"
steps = 4
[[variant]]
name = "two"
sampler = "ddim"
times = "trailing"
steps = 2
[[variant]]
name = "int8"
sampler = "ddim"
times = "trailing"
steps = 2
accelerators = ["quantize:images=2"]
"""


def test_a_way_is_chosen_on_sources_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "rows.toml").write_text(ROWS)
    common: dict[str, Any] = {"psnr": 5.0, "n": 16, "variants": tmp_path / "rows.toml", "precision": "fp32",
                              "rounds": 1, "timing_batch": 1, "show": False, "out": tmp_path / "best.toml"}  # fmt: skip
    result = choose(source_model(), data=pictures(tmp_path / "data"), **common)
    assert {"two", "int8"} <= {entry["name"] for entry in result["candidates"]} or result["best"]
    assert SamplingConfig.load(tmp_path / "best.toml", "sampling") is not None
    with pytest.raises(BadInput, match="give --data"):
        choose(source_model(), **common)
