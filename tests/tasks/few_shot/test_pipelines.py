"""Few-shot classifiers on pipelines of diffusers, prompts of each class in the decoder alone, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hasten
from hasten.errors import BadInput
from hasten.tasks.few_shot import DiffusionClassifier, FewShotClassifier
from hasten.tasks.few_shot.adapters import ClassAdapters, layers_of
from hasten.tasks.few_shot.errors import ClassErrors
from hasten.tasks.few_shot.shots import pixels_of
from tests.factories import run_cli, tiny_model

tiny = pytest.importorskip("tests.adapters.tiny")
FAST: dict[str, Any] = {"train_steps": 2, "times": 8, "prior_images": 2, "rank": 2, "shots_per_step": 2}


@pytest.mark.parametrize("kind", ["sd", "ddpm", "dit"])
def test_pipelines(kind: str) -> None:
    one = hasten.load(getattr(tiny, f"{kind}_pipeline")())
    torch.manual_seed(0)
    x, y = torch.rand(4, *pixels_of(one)) * 2 - 1, ["cat", "dog"] * 2
    condition = "a photo of the {}" if kind == "sd" else "none"
    fitted = FewShotClassifier(one, **FAST, condition=condition).fit(x, y)
    assert set(fitted.predict(x)) <= {"cat", "dog"} and np.allclose(fitted.predict_proba(x).sum(1), 1)
    assert fitted.adapters_ is not None and all("up_blocks" in n or "blocks.2" in n for n in fitted.adapters_.factors)


def test_prompts_of_each_class_reach_the_decoder_alone() -> None:
    """Under `torch.vmap` and in one batch, with random adapters: the encoder gets the common prompt."""
    one = hasten.load(tiny.sd_pipeline())
    fitted = FewShotClassifier(one, **FAST, condition="a photo of the {}")
    fitted._set(one, np.array(["cat", "dog"]))
    assert not torch.equal(fitted._own["text"][0], fitted._own["text"][1])
    layers = layers_of(one.denoiser, one.shape, fitted._common, "decoder")
    adapters = ClassAdapters.start(one.denoiser.net, layers, 2, 2)
    torch.manual_seed(0)
    adapters.factors = {name: (down, 0.3 * torch.randn_like(up)) for name, (down, up) in adapters.factors.items()}
    x, noise = torch.randn(2, 3, *one.shape)
    t, found = torch.tensor([0.2, 0.5, 0.8]).double(), []
    net = one.denoiser.net
    for mapped in (True, False):
        errors = ClassErrors(one.denoiser, adapters, fitted._common, fitted._own, split=True)
        errors.mapped = mapped
        calls: list[int] = []
        hook = net.net.conv_in.register_forward_hook(lambda m, a, o, c=calls: c.append(len(a[0])))  # type: ignore[misc]
        with torch.no_grad():
            found.append(errors(x, noise, t, torch.arange(2)))
        hook.remove()
        assert sum(calls) == 3 and errors.mapped == mapped
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    whole = ClassErrors(one.denoiser, adapters, fitted._common, fitted._own)  # with the class everywhere
    with torch.no_grad():
        assert float((whole(x, noise, t, torch.arange(2)) - found[0]).abs().max()) > 1e-4


def test_diffusion_classifier_of_prompts() -> None:
    one = hasten.load(tiny.sd_pipeline())
    plain = DiffusionClassifier(one, times=4, condition="a photo of the {}").fit(None, ["cat", "dog", "blue"])
    x = torch.rand(2, *pixels_of(one)) * 2 - 1
    assert plain.classes_.tolist() == ["blue", "cat", "dog"] and plain.predict(x).shape == (2,)
    with pytest.raises(BadInput, match="takes prompts"):
        DiffusionClassifier(one).fit(None, ["cat", "dog"])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("shots", 2), ("test", 1)):
        for name in ("bright", "dark"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                low = 150 if name == "bright" else 0
                Image.fromarray(rng.integers(low, low + 100, (8, 8), dtype=np.uint8)).save(folder / f"{k}.png")
    tiny_model(None).save(tmp_path / "model")
    return tmp_path


def run(folders: Path, *more: str) -> tuple[int, str, str]:
    shots = [] if "--fitted" in more or "--classes" in more else ["--shots", str(folders / "shots")]
    model = ["--model", str(folders / "model")]
    fast = ["--train-steps", "2", "--times", "8", "--prior-images", "2"]
    return run_cli("classify", str(folders / "test"), *model, *shots, *fast, *more)


def test_the_command(folders: Path) -> None:
    code, out, err = run(folders, "--save", str(folders / "fitted"), "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["classes"] == ["bright", "dark"] and len(result["images"]) == 2 and "accuracy" in result
    one = result["images"][0]
    assert one["file"] == "bright/0.png" and sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert result["evaluations"] <= result["evaluations_of_all"] == 16
    code, out, err = run(folders, "--fitted", str(folders / "fitted"))
    assert code == 0 and "network evaluations an image" in out and "% right" in out, err


def test_the_commands_errors_are_one_line(folders: Path) -> None:
    def refused(*more: str) -> str:
        code, _, err = run(folders, *more)
        assert code != 0 and len(err.strip().splitlines()) == 1, err
        return err

    assert "give one of" in refused("--shots", str(folders / "shots"), "--classes", "a,b")
    assert "--save" in refused("--save", str(folders / "shots" / "x"))
    (folders / "shots" / "empty").mkdir()
    assert "the class empty has no images" in refused()
    (folders / "shots" / "empty").rmdir()
    Image.new("L", (9, 9)).save(folders / "shots" / "dark" / "big.png")
    assert "--resize" in refused()
    (folders / "shots" / "dark" / "big.png").unlink()
    Image.open(folders / "shots" / "dark" / "0.png").save(folders / "shots" / "bright" / "copy.png")
    assert "have the same picture" in refused()
