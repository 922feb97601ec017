"""Restyling: there and back is the identity, the class changes, evaluations are counted; the command around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import hasten
from hasten.cli.restyle import restyle as command
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.images import read_png_text, to_uint8
from hasten.metrics.features import extract, feature_net
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import Flow, VPCosine
from hasten.tasks import restyle


@pytest.fixture(scope="module")
def fashion() -> Model:
    return hasten.load("fashion")


@pytest.fixture(scope="module")
def boots(fashion: Model) -> Tensor:
    return fashion.sample(4, "ankle boot", 0)


def tiny(name: str = "tiny", shape: tuple[int, int, int] = (1, 8, 8), classes: int = 3, **more: object) -> Model:
    torch.manual_seed(0)
    net = UNet(channels=shape[0], widths=(8,), classes=classes, embedding=16, **more)  # type: ignore[arg-type]
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    names = tuple("abcdefg"[:classes])
    return Model(
        Denoiser(net, VPCosine(offset=0.0), V()), name, shape, names, sampler="ddim", times="trailing", steps=4
    )


def encoding(model: Model, steps: int) -> Model:
    """The same model, said to be a distilled encoder."""
    return replace(model, name="enc", steps=steps, card={"distilled": {"figures": {"direction": "encode"}}})


def test_there_and_back_is_the_image() -> None:
    """The inverse of every step is solved for, so that the same steps down return the source."""
    model, x = tiny(), torch.rand(3, 1, 8, 8) * 1.6 - 0.8
    result = restyle(model, model, x, "a", "a", encode_steps=4, decode_steps=4, iterations=10)
    torch.testing.assert_close(result.images, x, rtol=0, atol=1e-5)
    assert (result.encode_evaluations, result.decode_evaluations) == (10 * 4 + 3, 4)
    other = restyle(model, model, x, "a", "b", encode_steps=4, decode_steps=4, iterations=10)
    assert torch.equal(other.noise, result.noise) and (other.images - x).abs().max() > 1e-3


def test_the_class_changes_and_the_layout_stays(fashion: Model, boots: Tensor) -> None:
    """Boots to bags with the bundled teacher: the classifier calls them bags, and they are nearer to their own source
    than to the others."""
    result = restyle(fashion, fashion, boots, "ankle boot", "bag", encode_steps=8, decode_steps=8, guidance_scale=2.0)
    _, logits = extract(feature_net("fashion"), result.images)
    assert logits is not None
    assert int((logits.argmax(1) == fashion.class_index("bag")).sum()) >= 3, logits.argmax(1)
    far = torch.cdist(result.images.flatten(1), boots.flatten(1))
    assert far.diagonal().mean() < 0.95 * far[~torch.eye(4, dtype=torch.bool)].mean(), far
    assert (result.encode_evaluations, result.decode_evaluations, result.evaluations) == (8, 16, 24)
    assert result.noise.shape == boots.shape and 0.4 < result.noise.std() < 1.2


def test_a_distilled_encoder_makes_its_own_steps() -> None:
    model, x = tiny(), torch.rand(5, 1, 8, 8) * 2 - 1
    result = restyle(
        encoding(model, 6), model, x, "a", "b", encode_steps=None, decode_steps=3, guidance_scale=2.0, batch_size=2
    )
    assert (result.encode_evaluations, result.decode_evaluations) == (6, 6)
    whole = restyle(encoding(model, 6), model, x, "a", "b", encode_steps=None, decode_steps=3, guidance_scale=2.0)
    torch.testing.assert_close(result.images, whole.images, rtol=0, atol=1e-5)
    ranged = tiny(guidance=(2.0, 5.0))  # at the scale nearest to 1, in one evaluation a step
    result = restyle(encoding(ranged, 6), ranged, x, "a", "b", encode_steps=None, decode_steps=3, guidance_scale=4.0)
    assert (result.encode_evaluations, result.decode_evaluations) == (6, 3)
    report = restyle(
        encoding(ranged, 6),
        ranged,
        x,
        "a",
        "b",
        encode_steps=None,
        decode_steps=3,
        guidance_scale=4.0,
        encode_guidance_scale=2.0,
    )
    assert torch.equal(result.noise, report.noise)


def test_models_of_two_schedules_meet_in_the_noise() -> None:
    """A flow model and a cosine model, both starting from N(0, I)."""
    one, x = tiny(), torch.rand(3, 1, 8, 8) * 2 - 1
    other = replace(one, denoiser=Denoiser(one.denoiser.net, Flow(), V()))
    for up, down in ((one, other), (other, one)):
        result = restyle(up, down, x, "a", "b", encode_steps=4, decode_steps=4)
        again = restyle(up, up, x, "a", "b", encode_steps=4, decode_steps=4)
        assert torch.isfinite(result.images).all() and torch.equal(result.noise, again.noise)


def test_what_cannot_be_is_refused() -> None:
    model, x = tiny(), torch.zeros(2, 1, 8, 8)
    enc = encoding(model, 6)
    with pytest.raises(BadInput, match="encodes in 6 steps, got 5"):
        restyle(enc, model, x, "a", "b", encode_steps=5)
    with pytest.raises(BadInput, match="enc can only encode"):
        restyle(model, enc, x, "a", "b")
    with pytest.raises(BadInput, match="one shape"):
        restyle(model, model, x[..., :4], "a", "b")
    with pytest.raises(BadInput, match="to_label must be one of a, b, c"):
        restyle(model, model, x, "a")
    with pytest.raises(BadInput, match="unknown label 'boot'"):
        restyle(model, model, x, "boot", "b")
    with pytest.raises(BadInput, match="no iterations"):
        restyle(enc, model, x, "a", "b", iterations=2)
    with pytest.raises(BadInput, match="distilled for guidance_scale 2 to 5, asked for 1"):
        ranged = tiny(guidance=(2.0, 5.0))
        restyle(ranged, ranged, x, "a", "b", encode_guidance_scale=1.0)


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_sources_above_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny().save(tmp_path / "model"))
    out = tmp_path / "grid.png"
    report = command(folder, from_label="a", to_label="b", out=out, n=3, encode_steps=3, decode_steps=2, json=True)
    assert json.loads(capsys.readouterr().out) == report
    assert (report["encode_evaluations"], report["decode_evaluations"], report["evaluations"]) == (3, 2, 5)
    model = hasten.load(folder)
    source = model.sample(3, "a", 0)
    result = restyle(model, model, source, "a", "b", encode_steps=3, decode_steps=2)
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (18, 28)
    for row, images in enumerate((source, result.images)):
        for k in range(3):
            assert (pixels[10 * row : 10 * row + 8, 10 * k : 10 * k + 8] == to_uint8(images)[k, ..., 0]).all()
    assert "--from-label a --to-label b" in read_png_text(out)["command"]
    assert "5 network evaluations" not in capsys.readouterr().out
    hasten.SamplingConfig(steps=2).save(tmp_path / "how.toml")
    again = {"from_label": "a", "to_label": "b", "out": tmp_path / "again.png", "n": 3, "encode_steps": 3}
    assert command(folder, **again, config=tmp_path / "how.toml")["decode_evaluations"] == 2
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), pixels)
    hasten.SamplingConfig(guides="rescale").save(tmp_path / "how.toml")
    with pytest.raises(BadInput, match="restyle uses no guides"):
        command(folder, **again, config=tmp_path / "how.toml")


def test_the_command_takes_images_of_the_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(tiny().save(tmp_path / "model")), tmp_path / "grid.png"
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.array([2, 0, 1, 0, 2, 1]))
    command(
        folder, from_label="a", to_label=2, out=out, images=tmp_path / "data.npz", n=2, encode_steps=2, decode_steps=1
    )
    assert (np.asarray(Image.open(out))[:8, :8] == pixels[1]).all() and (
        np.asarray(Image.open(out))[:8, 10:18] == pixels[3]
    ).all()
    assert "2 images in 3 network evaluations each" in capsys.readouterr().out
    with pytest.raises(BadInput, match="2 images of 'a', asked for 3"):
        command(folder, from_label="a", to_label=2, out=out, images=tmp_path / "data.npz", n=3)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    model = tiny()
    folder, enc = str(model.save(tmp_path / "model")), str(encoding(model, 4).save(tmp_path / "enc"))
    other = str(tiny("other", classes=2).save(tmp_path / "other"))
    png = tmp_path / "a.png"
    for words, match in (
        ({"out": tmp_path / "a.jpg"}, "must end in .png"),
        ({"encoder": enc}, "name the model that decodes"),
        ({"encoder": enc, "decoder": other, "from_label": "a"}, "give --images"),
        ({"from_label": None}, "--from-label must be one of a, b, c"),
        ({"to_label": "z"}, "unknown label 'z'"),
        ({"n": 0}, "n must be"),
    ):
        with pytest.raises(BadInput, match=match) as caught:
            command(**{"encoder": folder, "out": png, "from_label": "a", "to_label": "b", **words})
        assert "\n" not in str(caught.value)
    assert not png.exists()
