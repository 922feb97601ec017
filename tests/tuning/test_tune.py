"""The tune verb: its task, the saved model, and bad input."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import hasten
from hasten.cli import main
from hasten.errors import BadInput
from hasten.nets.unet import UNet
from hasten.plan import plan
from hasten.samplers import DDIM
from hasten.times import UniformTime
from hasten.tuning import Tuned, Tuner, TuningTask, cached_result
from hasten.workflows import tune
from tests.test_model import tiny


@dataclass(frozen=True)
class Probe(Tuner):
    """A tuner that returns one result of each kind and records its tasks."""

    needs_data: ClassVar[bool] = False
    tasks: ClassVar[list[TuningTask]] = []

    def tune(self, task: TuningTask) -> Tuned:
        self.tasks.append(task)
        task.tick("looking", 1, 1, 0.5)
        result = plan(DDIM(), task.schedule, UniformTime()(task.schedule, task.steps))
        torch.manual_seed(1)
        part = UNet(channels=1, widths=(8,), embedding=8)
        return Tuned(result, {"gamma": torch.rand(4, dtype=torch.float64)}, {"helper": part}, {"error": 0.25})


@dataclass(frozen=True)
class NeedsData(Probe):
    needs_data: ClassVar[bool] = True


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> list[TuningTask]:
    methods = {"probe": Probe(), "needy": NeedsData()}
    real = tune.pick
    monkeypatch.setattr(tune, "pick", lambda folder, text: methods.get(text) or real(folder, text))
    Probe.tasks.clear()
    return Probe.tasks


def test_the_result_is_saved_and_used_by_sample(
    probe: list[TuningTask], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny().save(tmp_path / "a"))
    assert main(["tune", folder, "--method", "probe", "--steps", "3", "--guidance-scale", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["plan"], record["statistics"], record["parts"]) == ("probe-3-g2", ["gamma"], ["helper"])
    model = hasten.load(folder)
    assert (model.steps, model.guidance_scale, list(model.plans)) == (3, 2.0, ["probe-3-g2"])
    assert model.card["tuned"][0]["figures"] == {"error": 0.25}
    assert "hasten tune" in model.card["tuned"][0]["command"]
    expected = model.sample(2, sampler="ddim", times="uniform", steps=3)
    for asked in ({}, {"steps": 3}, {"plan": "probe-3-g2"}, {"plan": "recommended"}):
        torch.testing.assert_close(model.sample(2, **asked), expected, rtol=0, atol=1e-5)
    other = model.sample(2, steps=4)  # other steps than the plan's: the model's sampler
    torch.testing.assert_close(other, model.sample(2, sampler="unipc", times="lambda", steps=4), rtol=0, atol=0)
    again = model.save(tmp_path / "b")
    assert torch.equal(hasten.load(again).statistics["gamma"], model.statistics["gamma"])
    for p, q in zip(hasten.load(again).parts["helper"].parameters(), model.parts["helper"].parameters()):
        assert torch.equal(p, q)


def test_the_task_describes_the_sampling_configuration(probe: list[TuningTask], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    model = tiny()
    tune.tune_model(model, tmp_path / "out", "probe", steps=4, data=tmp_path / "images.npy", n=6, seed=50)
    (task,) = probe
    assert (task.steps, task.n, task.shape, task.seed) == (4, 6, (1, 8, 8), 50)
    assert task.noise(2, 3).seeds == (52, 53, 54)
    assert task.cond(2, first=2)["label"].tolist() == [2, 0]
    small, more = task.images(5)[0], task.images(9)[0]
    assert small.shape == (5, 1, 8, 8) and torch.equal(small, more[:5]) and small.abs().max() <= 1
    with pytest.raises(BadInput, match="holds 30 images, asked for 31"):
        task.images(31)


def test_weights_that_were_half_stay_half(probe: list[TuningTask], tmp_path: Path) -> None:
    tiny().save(tmp_path / "a", half=True)
    size = (tmp_path / "a" / "weights.safetensors").stat().st_size
    tune.tune_model(hasten.load(tmp_path / "a"), tmp_path / "b", "probe", steps=2)
    assert (tmp_path / "b" / "weights.safetensors").stat().st_size == size


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "needy"], "needs real images"),
        (["--method", "optimised_steps"], "optimized_steps"),
        (["--method", "probe", "--steps", "0"], "steps must be a whole number of at least 1"),
        (["--method", "probe", "--sampler", "unipcc"], "did you mean 'unipc'"),
        (["--method", "probe", "--n", "0"], "n must be a whole number"),
        (["--method", "probe", "--data", "nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_bad_input_is_a_one_line_error(
    probe: list[TuningTask], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    folder = str(tiny().save(tmp_path / "a"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["tune", folder, *words]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not probe
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundled_model_is_not_written_into(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "fashion", "--steps", "5"]) == 1
    assert "give --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"plan": "probe-4"}, "has no plan 'probe-4': did you mean 'probe-3'"),
        ({"plan": "probe-3", "sampler": "ddim"}, "leave sampler and times out"),
        ({"plan": "probe-3", "steps": 5}, "3 network evaluations, asked for 5"),
        ({"plan": "nowhere.json"}, "cannot read nowhere.json"),
    ],
)
def test_bad_plans(asked: dict[str, Any], said: str) -> None:
    model = tiny()
    schedule = model.denoiser.schedule
    model.plans = {"probe-3": plan(DDIM(), schedule, UniformTime()(schedule, 3))}
    with pytest.raises(BadInput, match=said):
        model.sample(1, **asked)


def test_damaged_statistics_and_parts_are_refused(probe: list[TuningTask], tmp_path: Path) -> None:
    tune.tune_model(tiny(), tmp_path / "a", "probe", steps=2)
    for name in ("statistics.safetensors", "parts/helper.safetensors"):
        file = tmp_path / "a" / name
        saved = file.read_bytes()
        file.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
        with pytest.raises(BadInput, match="is not the file that model.json names"):
            hasten.load(tmp_path / "a")
        file.unlink()
        with pytest.raises(BadInput, match="is missing"):
            hasten.load(tmp_path / "a")
        file.write_bytes(saved)
    hasten.load(tmp_path / "a")


def test_results_are_cached_bit_for_bit(tmp_path: Path) -> None:
    output = []

    def make() -> dict[str, Any]:
        output.append(1)
        return {"times": [0.1 + 0.2, 1 / 3]}

    key = {"schedule": {"name": "Flow"}, "steps": 3}
    first, second = cached_result(key, make), cached_result(dict(reversed(key.items())), make)
    assert first == second == {"times": [0.1 + 0.2, 1 / 3]} and len(output) == 1
    assert cached_result({**key, "steps": 4}, make) == first and len(output) == 2
    for file in (tmp_path / "cache" / "tuning").iterdir():
        file.write_text("{")
    assert cached_result(key, make) == first and len(output) == 3


def test_old_names_are_forwarded() -> None:
    import hasten.metrics
    import hasten.tuning

    for module, old, new in (
        (hasten.tuning, "Task", "TuningTask"),
        (hasten.tuning, "remembered", "cached_result"),
        (hasten.metrics, "Moments", "RunningMoments"),
    ):
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(module, old) is getattr(module, new)
