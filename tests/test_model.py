"""Models: seeds, labels, guidance, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.plan import plan
from hasten.predictions import prediction_from
from hasten.samplers.ddim import DDIM
from hasten.schedules import VPCosine
from hasten.storage.weights import sha256
from hasten.times import UniformTime

CLASSES = ("coat", "bag", "boot")


def tiny(classes: tuple[str, ...] | None = CLASSES, seed: int = 0) -> Model:
    """A U-Net of random weights, none of them zero, on 1x8x8 images."""
    torch.manual_seed(seed)
    net = UNet(channels=1, widths=(8, 16), classes=len(classes or ()), embedding=16)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    null = len(classes) if classes else None
    denoiser = Denoiser(net, VPCosine(), prediction_from("v"), null_label=null).eval().requires_grad_(False)
    return Model(denoiser, "tiny", (1, 8, 8), classes, sampler="unipc", times="lambda", steps=5)


@pytest.fixture
def model() -> Model:
    return tiny()


def test_an_image_depends_on_its_seed_and_label_alone(model: Model) -> None:
    whole = model.sample(9, seed=20, guidance_scale=2.0, sampler="ddim:eta=1.0", batch_size=9)
    assert whole.shape == (9, 1, 8, 8)
    assert whole.dtype == torch.float32
    assert whole.abs().max() <= 1
    for batch_size in (1, 2, 64):
        again = model.sample(9, seed=20, guidance_scale=2.0, sampler="ddim:eta=1.0", batch_size=batch_size)
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-5)
    alone = model.sample(1, label=7 % 3, seed=27, guidance_scale=2.0, sampler="ddim:eta=1.0")
    torch.testing.assert_close(alone[0], whole[7], rtol=0, atol=1e-5)
    assert (whole[0] - whole[3]).abs().max() > 1e-3  # same label, other seed


def test_the_same_call_gives_the_same_bits(model: Model) -> None:
    assert torch.equal(model.sample(4, seed=3), model.sample(4, seed=3))


def test_labels_take_turns(model: Model) -> None:
    assert model.labels(5).tolist() == [0, 1, 2, 0, 1]
    assert model.labels(3, "Bag").tolist() == [1, 1, 1]
    assert model.labels(3, [2, "coat"]).tolist() == [2, 0, 2]
    assert model.labels(2, "2").tolist() == [2, 2]
    assert tiny(None).labels(5) is None


def test_the_label_reaches_the_network(model: Model) -> None:
    images = model.sample(2, label=[0, 2], seed=5)
    same_noise = model.sample(1, label=2, seed=5)
    assert (images[0] - same_noise[0]).abs().max() > 1e-3


@pytest.mark.parametrize("label", [3, -1, "bog", "-1", True, 1.5])
def test_unknown_label(model: Model, label: object) -> None:
    with pytest.raises(BadInput, match="unknown label"):
        model.labels(2, label)  # type: ignore[arg-type]


def test_unknown_label_names_the_nearest(model: Model) -> None:
    with pytest.raises(BadInput, match="did you mean 'boot'"):
        model.labels(1, "boots")


def test_guidance_is_the_line_through_both_branches(model: Model) -> None:
    """x0 = x0_null + s (x0_label - x0_null), Ho & Salimans 2022, so it is affine in s."""
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor(0.6), torch.tensor([0, 2])
    null = model.denoiser(x, t, label=torch.tensor([3, 3]))
    conditional = model.denoiser(x, t, label=label)
    expected = null + 2.5 * (conditional - null)
    torch.testing.assert_close(model.guided(2.5)(x, t, label=label), expected, rtol=1e-4, atol=1e-4)
    assert model.guided(1.0) is model.denoiser


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n": 0}, "n must be a whole number of at least 1"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"sampler": "unipcc"}, "unipc"),
        ({"sampler": "unipc:ordr=2"}, "order"),
        ({"times": "karas"}, "karras"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"label": "no such thing"}, "label"),
    ],
)
def test_bad_arguments(model: Model, asked: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        model.sample(**{"n": 1, **asked})


def test_an_unconditional_model_takes_neither_label_nor_guidance() -> None:
    model = tiny(None)
    assert model.sample(2, steps=2).shape == (2, 1, 8, 8)
    with pytest.raises(BadInput, match="no classes"):
        model.sample(1, label=0)
    with pytest.raises(BadInput, match="no classes"):
        model.sample(1, guidance_scale=2.0)


def test_a_saved_model_is_the_same_model(model: Model, tmp_path: Path) -> None:
    model.card = {"data": "noise", "figures": {"frechet": 1.5}}
    model.save(tmp_path / "a")
    back = hasten.load(tmp_path / "a")
    assert torch.equal(back.sample(3), model.sample(3))
    assert back.describe() == model.describe()
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["model.json", "weights.safetensors"]


def test_float16_weights_are_half_the_size_and_load_as_float32(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "full")
    model.save(tmp_path / "half", half=True)
    full, half = ((tmp_path / f / "weights.safetensors").stat().st_size for f in ("full", "half"))
    assert half < 0.75 * full
    back = hasten.load(tmp_path / "half")
    for (key, w), own in zip(back.denoiser.net.state_dict().items(), model.denoiser.net.state_dict().values()):
        assert w.dtype == torch.float32, key
        assert torch.equal(w, own.half().float()), key


def test_the_plan_of_a_model_is_its_recommended_sampling(model: Model, tmp_path: Path) -> None:
    schedule = model.denoiser.schedule
    model.plan = plan(DDIM(), schedule, UniformTime()(schedule, 3))
    model.save(tmp_path / "a")
    back = hasten.load(tmp_path / "a")
    assert back.plan is not None
    expected = model.sample(2, sampler="ddim", times="uniform", steps=3)
    torch.testing.assert_close(back.sample(2), expected, rtol=0, atol=1e-5)
    model.plan = None
    model.save(tmp_path / "a")
    assert hasten.load(tmp_path / "a").plan is None


def test_saving_into_a_folder_keeps_what_else_is_there(model: Model, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_text("precious")
    model.save(tmp_path / "run")
    tiny(seed=1).save(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_text() == "precious"
    assert torch.equal(hasten.load(tmp_path / "run").sample(1), tiny(seed=1).sample(1))


def test_a_save_that_fails_leaves_nothing(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hasten.storage.network_files.write_weights", full)
    with pytest.raises(BadInput, match="No space left"):
        model.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def edit(folder: Path, **changes: object) -> None:
    told = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**told, **changes}))


def test_weights_of_another_hash(model: Model, tmp_path: Path) -> None:
    file = model.save(tmp_path / "a") / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadInput, match="weights.safetensors is not the file that model.json names: sha256"):
        hasten.load(tmp_path / "a")


def test_weights_of_another_shape(model: Model, tmp_path: Path) -> None:
    file = model.save(tmp_path / "a") / "weights.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(weights, file)
    edit(tmp_path / "a", weights={"file": file.name, "sha256": sha256(file)})
    with pytest.raises(BadInput, match=r"conv_in.weight has shape \(8, 3, 3, 3\), the network needs \(8, 1, 3, 3\)"):
        hasten.load(tmp_path / "a")


def test_weights_with_a_tensor_missing(model: Model, tmp_path: Path) -> None:
    file = model.save(tmp_path / "a") / "weights.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file)
    edit(tmp_path / "a", weights={"file": file.name, "sha256": sha256(file)})
    with pytest.raises(BadInput, match="lacks 1 of the network's tensors, first conv_in.weight"):
        hasten.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"shape": [3, 8, 8]}, "shape"),
        ({"net": {"class": "UNot", "config": {}}}, "unknown network 'UNot': did you mean 'UNet'"),
        ({"net": {"class": "UNet", "config": {"wdths": 3}}}, "wdths"),
        ({"schedule": {"name": "VPCosin"}}, "VPCosine"),
        ({"weights": {"file": "gone.safetensors", "sha256": ""}}, "gone.safetensors is missing"),
        ({"shape": [1, 7, 8]}, "shape"),
        ({"shape": [8, 8]}, "takes images"),
        ({"classes": 5}, "does not describe a model"),
        ({"classes": ["coat"]}, "names 1 classes, its network has 3"),
    ],
)
def test_a_description_that_does_not_hold(model: Model, tmp_path: Path, changes: dict, message: str) -> None:
    edit(model.save(tmp_path / "a"), **changes)
    with pytest.raises(BadInput, match=message):
        hasten.load(tmp_path / "a")


def test_a_description_that_is_not_json(model: Model, tmp_path: Path) -> None:
    (model.save(tmp_path / "a") / "model.json").write_text("{")
    with pytest.raises(BadInput, match="cannot read"):
        hasten.load(tmp_path / "a")


def test_a_description_with_a_key_missing(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "a")
    told = json.loads((tmp_path / "a" / "model.json").read_text())
    del told["steps"]
    (tmp_path / "a" / "model.json").write_text(json.dumps(told))
    with pytest.raises(BadInput, match="lacks 'steps'"):
        hasten.load(tmp_path / "a")


def test_what_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    for name, message in {
        "empty": "no model.json in empty",
        "file": "file is a file",
        "pipeline": "diffusers cannot load pipeline",
        "nothing": "unknown model 'nothing'",
    }.items():
        with pytest.raises(BadInput, match=message):
            hasten.load(name)


def test_the_nearest_bundled_name(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.zoo.HERE", tmp_path)
    (tmp_path / "zoo.toml").write_text('[fashion]\nsummary = "clothes"\n[absent]\nsummary = "not here"\n')
    model.save(tmp_path / "fashion")
    assert hasten.load("fashion").name == "tiny"
    with pytest.raises(BadInput, match=r"unknown model 'fashoin': did you mean 'fashion'\? \(choices: fashion\)"):
        hasten.load("fashoin")


def test_bf16_is_near_fp32_and_not_the_same(model: Model) -> None:
    full, short = model.sample(2, steps=3), model.sample(2, steps=3, precision="bf16")
    assert not torch.equal(full, short)
    assert (full - short).abs().mean() < 0.1


def test_the_files_of_a_model_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    """A folder shared between people must be readable by the others where their system says so."""
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    folder = tiny().save(tmp_path / "model")
    assert {f.stat().st_mode for f in folder.iterdir()} == {plain.stat().st_mode}
