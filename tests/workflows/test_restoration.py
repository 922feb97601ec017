"""Pairs of degraded and true images, the table of a model that restores them, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hasten import RestorationConfig, evaluate_restoration
from hasten.compare.restoration import best_row, restoration_table
from hasten.degradations.low_resolution import LowResolution
from hasten.errors import BadInput
from hasten.metrics.restoration import restoration_psnr
from hasten.model import Model
from hasten.train.data import to_float
from hasten.utils.resizing import enlarge
from hasten.workflows.restoration import open_pairs
from hasten.workflows.restoration_meter import RestorationMeter, open_meter

from ..factories import run_cli, tiny_model
from ..tasks.super_resolution.tiny import local_model, scene

SIDE = 16


class Means(nn.Module):
    """A feature network: the means of the channels of four quarters."""

    name = "means"

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def photographs(folder: Path, sizes: tuple[tuple[int, int], ...], split: str = "test") -> Path:
    """Scenes of these sizes (H, W)."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    for k, (height, width) in enumerate(sizes):
        Image.fromarray(scene(height, width, seed=k)).save(folder / split / f"{k}.png")
    return folder


def perfect(model: Model, truths: list[Tensor]) -> Model:
    """The model with samples that are the true images."""
    known = {
        Tensor(enlarge(to_float(LowResolution(2)(t[None], [0])), 2)).sum().item(): t for group in truths for t in group
    }

    class Perfect(Model):
        def sample(self, n: int = 1, *_: object, images: Tensor, **__: object) -> Tensor:  # type: ignore[override]
            return torch.stack([to_float(known[enlarge(one[None], 2).sum().item()]) for one in images])

    return Perfect(**{name: getattr(model, name) for name in ("denoiser", "name", "shape", "codec", "residual_std")})


def test_squares_are_cut_about_the_centre_the_first_of_every_image_first(tmp_path: Path) -> None:
    data = photographs(tmp_path, ((35, 50), (16, 16), (15, 40)))
    model, lines = local_model(side=SIDE // 2), []
    pairs = open_pairs(model, data, report=lines.append)
    (group,) = pairs.groups
    assert pairs.origins == [0, 1, 0, 0, 0, 0, 0] and pairs.degrade == "low_resolution:factor=2"
    assert lines == [f"{data}: 1 images are too small, and left out"]
    first = torch.from_numpy(np.array(Image.open(data / "test" / "0.png"))).permute(2, 0, 1)
    assert torch.equal(group.truths[0], first[:, 1:17, 1:17]) and torch.equal(group.truths[6], first[:, 17:33, 33:49])
    assert torch.equal(group.sources, LowResolution(2)(group.truths, list(range(7))))
    assert len(open_pairs(model, data, n=3)) == 3
    whole = open_pairs(model, data, whole=True)
    assert [tuple(g.truths.shape) for g in whole.groups] == [(1, 3, 34, 50), (1, 3, 16, 16), (1, 3, 14, 40)]
    larger = open_pairs(model, data, size=32, degrade="low_resolution:factor=2,noise=20")
    assert len(larger) == 1 and larger.description == "1 32x32 squares of 1 images"


def test_what_cannot_be_a_pair_is_refused_in_a_line(tmp_path: Path) -> None:
    data, model = photographs(tmp_path, ((20, 20),)), local_model(side=SIDE // 2)
    with pytest.raises(BadInput, match="size must be a multiple of 2 for local, such as 16, got 15"):
        open_pairs(model, data, size=15)
    with pytest.raises(BadInput, match="no image has crops of 32x32: the largest has 20 pixels"):
        open_pairs(model, data, size=32)
    with pytest.raises(BadInput, match="makes images of 4x4 with 3 channels from 16x16, and local reads 8x8"):
        open_pairs(model, data, degrade="low_resolution:factor=4")
    with pytest.raises(BadInput, match="restores nothing"):
        open_pairs(tiny_model(), data)
    with pytest.raises(BadInput, match="border 8 leaves nothing of images of 16 pixels: at most 7"):
        open_meter(open_pairs(model, data), border=8)
    flat, lines = photographs(tmp_path / "flat", ((20, 20),), "."), []
    assert len(open_pairs(model, flat, report=lines.append)) == 1 and "no split 'test': all its 1 images" in lines[0]


def test_the_true_images_are_perfect_and_bicubic_is_what_it_is(tmp_path: Path) -> None:
    pairs = open_pairs(local_model(side=SIDE // 2), photographs(tmp_path, ((32, 32), (32, 48), (16, 16))))
    meter = RestorationMeter(pairs, border=1, net=Means())
    best = meter.measure(meter.truth())
    assert (best["psnr"], best["ssim"], best["consistency"]) == (100, 1, 0)
    assert best["frechet"] == pytest.approx(0, abs=1e-6)
    (truth,), (large,) = (meter.truth(), pairs.enlarged())
    bicubic = meter.bicubic()
    assert bicubic["psnr"] == pytest.approx(float(restoration_psnr(large, truth, 1).mean()))
    assert 0 < bicubic["ssim"] < 1 and bicubic["frechet"] > best["frechet"]
    low, high = bicubic["interval"]["psnr"]
    assert low < bicubic["psnr"] < high
    with pytest.raises(BadInput, match="restored images must be"):
        meter.by_image([truth[:2]])
    assert (
        "frechet" not in RestorationMeter(open_pairs(local_model(side=SIDE // 2), tmp_path, n=4), net=Means()).bicubic()
    )


def test_a_model_that_knows_the_truth_has_the_best_row(tmp_path: Path) -> None:
    data = photographs(tmp_path, ((32, 32), (32, 48)))
    model = local_model(side=SIDE // 2)
    known = perfect(model, [group.truths for group in open_pairs(model, data).groups])
    result = evaluate_restoration(known, RestorationConfig(data=data, features=Means(), batch_size=4), steps=2)
    bicubic, row = result["rows"]
    assert (row["psnr"], row["ssim"], row["consistency"]) == (100, 1, 0) and bicubic["psnr"] < 60
    assert result["n"] == 10 and result["factor"] == 2 and result["features"] == "means" and "lpips" not in result


def test_rows_of_a_set_of_variants_and_their_cost(tmp_path: Path) -> None:
    data = photographs(tmp_path, ((32, 32), (32, 48)))
    (tmp_path / "set.toml").write_text(
        '[reference]\nname = "4 steps"\nsampler = "ddim"\nsteps = 4\n[[variant]]\nname = "Heun"\nsampler = "heun"\nsteps = 2\n'
        '[[variant]]\nname = "cool"\nstart = "temperature:value=0"\nsampler = "ddim"\nsteps = 1\n'
    )
    model = local_model(side=SIDE // 2)
    config = RestorationConfig(data=data, features=Means(), variants=tmp_path / "set.toml", n=10)
    result = evaluate_restoration(model, config)
    assert [(row["name"], row["nfe"]) for row in result["rows"]] == [
        ("bicubic", 0), ("4 steps", 4), ("Heun", 3), ("cool", 1),
    ]  # fmt: skip
    lines = restoration_table(result)
    assert lines[1].split()[:3] == ["PSNR", "dB", "SSIM"] and lines[2].startswith("bicubic") and "LPIPS" not in lines[1]
    assert best_row(result["rows"]) in result["rows"][1:]
    source = open_pairs(model, data, n=10)
    again = model.sample(1, seed=3, sampler="ddim", steps=4, images=source.sources_of([3]))
    figures = RestorationMeter(source).by_image(
        [model.sample(10, sampler="ddim", steps=4, images=source.sources_of(range(10)))]
    )
    assert float(figures["psnr"].mean()) == pytest.approx(result["rows"][1]["psnr"])
    assert float(restoration_psnr(again, source.groups[0].truths[3:4])) == pytest.approx(float(figures["psnr"][3]))
    with pytest.raises(BadInput, match="variants say how each row is sampled"):
        evaluate_restoration(model, config, steps=2)


def test_the_command_prints_a_table_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = photographs(tmp_path / "data", ((32, 32), (32, 48)))
    model, plain = local_model(side=SIDE // 2), tiny_model(None, "plain")
    monkeypatch.setattr("hasten.cli.evaluate.open_shared", lambda name, *_, **__: model if name == "own" else plain)
    common = ("--steps", 1, "--precision", "fp32", "--border", 2)
    code, out, err = run_cli("evaluate", "own", data, "--task", "super-resolution", *common)
    assert code == 0 and "bicubic" in out and "ddim, 1 step" in out
    assert "Fréchet distance and KID are left out" in err or "Fréchet" in out
    assert "LPIPS is left out" in err and "pip install --no-deps stlpips_pytorch==0.0.2" in err or "LPIPS" in out
    code, out, _ = run_cli("evaluate", "own", "--data", data, *common, "--n", 3, "--json")
    result = json.loads(out)
    assert code == 0 and result["n"] == 3 and result["border"] == 2 and result["rows"][1]["nfe"] == 1
    for words, line in {
        ("own", "--reference", "x"): "leave out --reference",
        ("own",): "give the true ones (data)",
        ("own", data, "--task", "generation"): "its task is restoration",
        ("plain", data, "--task", "super-resolution"): "plain is no model of super-resolution",
        ("plain", "--border", 2): "--border is for models that restore images",
        ("own", data, "--task", "upscaling"): "unknown task 'upscaling'",
        ("own", data, "--degrade", "low_resolutoin"): "low_resolution",
    }.items():
        code, _, err = run_cli("evaluate", *words)
        assert code == 1 and line in err and len(err.strip().splitlines()) == 1, (words, err)
