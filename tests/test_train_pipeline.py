"""Training of the network of a text-to-image pipeline on captioned images."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.cli.app import main
from hasten.denoiser import Denoiser
from hasten.distillers._memory import checkpoint_gradients
from hasten.errors import BadInput
from hasten.train.data import Data
from hasten.train.losses import DenoisingLoss
from hasten.workflows.train import train_model
from hasten.workflows.train_config import TrainConfig
from hasten.workflows.train_pipeline import initialise

from .adapters import tiny
from .factories import write_image

CAPTIONS = (
    "a red cat",
    "a blue dog",
    "the big cat",
    "a red cat",
    "a photo of the dog",
    "blue",
    "a dog",
    "red",
    "",
    "a",
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    rows = []
    for k, text in enumerate(CAPTIONS):
        write_image(folder / f"{k}.png", 25 * k, 16)
        rows.append({"file_name": f"{k}.png", "text": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(data: Any, out: Path, base: Any, **options: Any) -> hasten.Model:
    common: dict[str, Any] = {"steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu", "lr": 1e-3}
    return train_model(data, out, base=base, show=False, **{**common, **options})


def weights(model: hasten.Model) -> dict[str, torch.Tensor]:
    return dict(model.denoiser.net.net.state_dict())


def network_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("net.net."): value for name, value in state.items() if name.startswith("net.net.")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


PIPELINES = {
    "sd": tiny.sd_pipeline,
    "sd v": lambda: tiny.sd_pipeline(scheduler=tiny.scheduler(prediction_type="v_prediction")),
    "sdxl": tiny.sdxl_pipeline,
    "sd3": tiny.sd3_pipeline,
}


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_a_pipeline_is_trained_and_saved_as_a_pipeline(pictures: Path, tmp_path: Path, kind: str) -> None:
    """A stock pipeline opens the result, with the trained network, and the rest as it was."""
    import diffusers

    pipe = PIPELINES[kind]()
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipe.save_pretrained(tmp_path / "base")
    base = hasten.load(pipe) if left_out else str(tmp_path / "base")
    model = trained(pictures, tmp_path / "out", base)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", **left_out)
    assert type(stock) is type(pipe) and public(stock.scheduler.config) == public(pipe.scheduler.config)
    slot = "transformer" if kind == "sd3" else "unet"
    assert same(dict(getattr(stock, slot).state_dict()), weights(model))
    assert not same(weights(model), dict(getattr(pipe, slot).state_dict()))
    assert same(dict(stock.vae.state_dict()), dict(pipe.vae.state_dict()))
    assert same(dict(stock.text_encoder.state_dict()), dict(pipe.text_encoder.state_dict()))
    again = hasten.load(stock if left_out else tmp_path / "out")
    a, b = (one.sample(1, "a red cat", steps=2, guidance_scale=2.0) for one in (model, again))
    assert torch.equal(a, b) and model.card["captions"] == 9 and model.card["init"] == "base"
    assert (tmp_path / "out/encoded/latents.npy").is_file()


def test_a_base_object_is_left_unchanged(pictures: Path, tmp_path: Path) -> None:
    pipe = tiny.sd_pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    model = hasten.load(pipe)
    assert not same(weights(trained(pictures, tmp_path, model, steps=1)), before)
    assert same(weights(model), before) and same(dict(pipe.unet.state_dict()), before)
    assert not model.denoiser.training and model.denoiser.net.net.conv_in.weight.grad is None


def test_a_stopped_run_ends_with_the_same_weights(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = 2
    base = hasten.load(tiny.sd_pipeline())
    whole = trained(pictures, tmp_path / "whole", base, steps=3, label_drop=0.5, grad_accumulation=2)
    calls = []

    class Stopping(DenoisingLoss):
        def __call__(self, denoiser: Denoiser, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            calls.append(0)
            if len(calls) == 2 * stop:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(denoiser, batch)

    with monkeypatch.context() as patch:
        patch.setattr("hasten.workflows.train_pipeline.DenoisingLoss", Stopping)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after {stop} steps"):
            trained(pictures, tmp_path / "parts", base, steps=3, label_drop=0.5, grad_accumulation=2)
    assert not (tmp_path / "parts/model_index.json").exists()
    parts = trained(pictures, tmp_path / "parts", base, steps=3, label_drop=0.5, grad_accumulation=2)
    assert same(weights(whole), weights(parts))


def test_a_finished_run_is_extended_by_the_same_settings_only(pictures: Path, tmp_path: Path) -> None:
    base = hasten.load(tiny.sd_pipeline())
    first = trained(pictures, tmp_path / "out", base, steps=1)
    assert same(weights(trained(pictures, tmp_path / "out", base, steps=1)), weights(first))
    longer = trained(pictures, tmp_path / "out", base, steps=2)
    assert longer.card["last"]["step"] == 2 and not same(weights(longer), weights(first))
    state = torch.load(tmp_path / "out/checkpoint.pt")["players"]["model"]
    assert not same(ema := network_state(state["ema"]), network_state(state["module"])) and same(weights(longer), ema)
    other = hasten.load(tiny.sd_pipeline())
    other.denoiser.net.net.conv_in.weight.data.add_(1)
    for change, match in (
        ({"base": other}, "a run with base"),
        ({"label_drop": 0.3}, "label_drop 0.1"),
        ({"flip": True, "cache": str(tmp_path / "flipped")}, "images 10"),
    ):
        with pytest.raises(BadInput, match=match):
            trained(pictures, tmp_path / "out", **{"base": base, "steps": 3, **change})
    text = (pictures / "metadata.jsonl").read_text()
    (pictures / "metadata.jsonl").write_text(text.replace("a red cat", "a blue cat"))
    with pytest.raises(BadInput, match="another data"):
        trained(pictures, tmp_path / "out", base, steps=3)
    with pytest.raises(BadInput, match=r"data.captions"):
        trained(pictures, tmp_path / "out", base, steps=3, cache=str(tmp_path / "other"))


def test_random_weights_depend_on_the_seed_alone() -> None:
    results = []
    for number, seed in enumerate((0, 0, 1)):
        net = hasten.load(tiny.sd_pipeline()).denoiser.net
        net.net.conv_in.weight.data.add_(number)
        torch.manual_seed(seed)
        initialise(net)
        results.append({name: value.clone() for name, value in net.net.state_dict().items()})
    assert same(results[0], results[1])
    assert not torch.allclose(results[0]["conv_in.weight"], results[2]["conv_in.weight"], atol=1e-3)


@pytest.mark.parametrize("kind", PIPELINES)
def test_all_captions_dropped_is_the_unconditional_loss(kind: str) -> None:
    """With `label_drop` 1 the loss is that of the null conditions, whatever the captions; with 0 it depends on them."""
    model = hasten.load(PIPELINES[kind]())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *model.shape, generator=generator)

    def batch(prompts: Any) -> dict[str, torch.Tensor]:
        cond = model.conditioning.cond(4, prompts)
        return {"x": x, **{name: value for name, value in cond.items() if not name.startswith("null_")}}

    found = model.conditioning.cond(1, "a dog")
    nulls = {name: value for name, value in found.items() if name.startswith("null_")}
    plain = batch(list(CAPTIONS[:4]))
    empty = {**plain, **{name[5:]: value.expand(4, *value.shape[1:]) for name, value in nulls.items()}}

    def loss(batch: dict[str, torch.Tensor], drop: float) -> float:
        torch.manual_seed(1)
        skipped = torch.rand(4) if drop == 0 else None  # the random numbers of the dropout
        assert skipped is None or len(skipped) == 4
        with torch.no_grad():
            return float(DenoisingLoss(label_drop=drop, null_conditions=nulls)(model.denoiser, batch))

    assert loss(plain, 1.0) == loss(empty, 0.0) != loss(plain, 0.0)
    assert loss(plain, 0.0) != loss(batch(list(CAPTIONS[4:8])), 0.0)
    per_sample = {**plain, **{name: value.expand(4, *value.shape[1:]) for name, value in nulls.items()}}
    torch.manual_seed(1)
    with torch.no_grad():
        assert float(DenoisingLoss(label_drop=1.0)(model.denoiser, per_sample)) == loss(empty, 0.0)
        with pytest.raises(BadInput, match="null_text"):
            DenoisingLoss(label_drop=0.5)(model.denoiser, plain)


def test_a_sample_loses_all_its_conditions_or_none() -> None:
    cond = {"x": torch.zeros(400, 1), "text": torch.ones(400, 2, 3), "added_text_embeds": torch.ones(400, 2)}
    nulls = {"null_text": torch.zeros(1, 2, 3), "null_added_text_embeds": torch.zeros(1, 2)}
    torch.manual_seed(0)
    found = DenoisingLoss(label_drop=0.25, null_conditions=nulls).drop(cond, None)
    assert torch.equal(found["text"][:, 0, 0], found["added_text_embeds"][:, 0])
    assert set(found) == {"text", "added_text_embeds"} and 0.68 < float(found["text"].mean()) < 0.82


@pytest.mark.parametrize("kind", PIPELINES)
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(kind: str) -> None:
    gradients, calls = [], []
    for on in (False, True):
        model = hasten.load(PIPELINES[kind]())
        net = model.denoiser.net.requires_grad_(True)
        count = [0]
        if on:
            checkpoint_gradients(net)
        block = net.net.transformer_blocks[0] if kind == "sd3" else net.net.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        cond = model.conditioning.cond(2, ["a cat", "a dog"])
        torch.manual_seed(0)
        batch = {"x": torch.randn(2, *model.shape), **cond}
        DenoisingLoss(label_drop=0.0)(model.denoiser.train(), batch).backward()
        gradients.append([p.grad for p in net.parameters()])
        calls.append(count[0])
    assert calls == [1, 2]
    assert all((a is None and b is None) or torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_what_cannot_be_trained_is_refused(pictures: Path, tmp_path: Path) -> None:
    base = hasten.load(tiny.sd_pipeline())

    def refused(match: str, data: Any = pictures, base: Any = base, **options: Any) -> None:
        with pytest.raises(BadInput, match=match) as error:
            trained(data, tmp_path / "out", base, **options)
        assert "\n" not in str(error.value) and not (tmp_path / "out/checkpoint.pt").exists()

    for key, value in (("widths", (8,)), ("blocks", 2), ("patch", 2), ("label", "kind"), ("channels", 1)):
        refused(f"{key} is for a new network", **{key: value})
    refused("unknown init", init="zeros")
    refused("trained on images of 16 x 16", size=32)
    refused("takes no prompts", base=hasten.load(tiny.ddpm_pipeline()))
    refused("takes no prompts", base="fashion")
    quantized = hasten.load(tiny.sd_pipeline())
    quantized.denoiser.net.net.register_parameter(
        "q", torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    )
    refused("is quantised", base=quantized)
    student = hasten.load(tiny.sd_pipeline())
    student.card["distilled"] = {"steps": 4}
    refused("is a distilled student", base=student)
    lcm = hasten.load(tiny.sd_pipeline(unet=tiny.unet2d_condition(time_cond_proj_dim=8)))
    refused("is a distilled student", base=lcm)
    refused("unknown dtype", cache_dtype="fp8")
    refused("no metadata.jsonl or metadata.csv with a column 'title'", caption="title")
    refused("has no captions", caption="none")
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    refused("10 images but no caption for 9 of them")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/model_index.json").write_text("{}")
    data = Data.of(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), captions=("a", "b"))
    refused("holds a pipeline of diffusers already", data=data)


def test_captions_without_a_base_are_said_to_be_unused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"widths": (8,), "steps": 1, "batch_size": 2, "precision": "fp32", "device": "cpu"}
    train_model(pictures, tmp_path / "pixels", **options)
    assert "the captions are not used" in capsys.readouterr().err
    (pictures / "metadata.jsonl").write_text("".join(f'{{"file_name": "{k}.png", "text": "x"}}\n' for k in range(10)))
    train_model(pictures, tmp_path / "pixels", **{**options, "steps": 2})  # nor part of the run
    for change in ({"init": "random"}, {"cache": "x"}, {"gradient_checkpointing": True}):
        with pytest.raises(BadInput, match="set base"):
            train_model(pictures, tmp_path / "more", **options, **change)


def test_the_command_line_and_a_config_file(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.sd_pipeline(scheduler=tiny.scheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "base")
    config = TrainConfig(base=str(tmp_path / "base"), steps=1, batch_size=2, cache=str(tmp_path / "cache"))
    config.replace(gradient_checkpointing=True, cache_dtype="fp32").save(tmp_path / "train.toml")
    command = ["train", str(pictures), "--out", str(tmp_path / "out"), "--config", str(tmp_path / "train.toml")]
    assert main([*command, "--precision", "fp32", "--device", "cpu", "--lr", "1e-4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["lr"] == 1e-4 and result["images"] == 10 and result["label_drop"] == 0.1
    assert (tmp_path / "cache/encoded.json").is_file()
    assert hasten.load(tmp_path / "out").denoiser.prediction.name == "v"
    argv = ["train", str(pictures), "--out", str(tmp_path / "two"), "--base", str(tmp_path / "base"), "--steps", "1"]
    argv += ["--init", "random", "--caption", "text", "--cache", str(tmp_path / "cache"), "--cache-dtype", "fp32"]
    assert main([*argv, "--batch-size", "2", "--precision", "fp32", "--flip"]) == 1
    assert "made with another flip" in capsys.readouterr().err
    assert main([*argv, "--batch-size", "2", "--grad-accumulation", "2", "--precision", "fp32"]) == 0
    assert "try hasten sample" in (text := capsys.readouterr().out) and "--prompt TEXT" in text


def test_structure_of_latents_with_a_lora(pictures: Path, tmp_path: Path) -> None:
    """The relations of latents: the term changes what the factors become."""
    base = hasten.load(tiny.sd_pipeline())
    before = {name: value.clone() for name, value in weights(base).items()}
    plain, term = (
        weights(trained(pictures, tmp_path / f"{k}", base, structure=structure, lora=2))
        for k, structure in enumerate((None, "weight=2,width=8"))
    )
    assert not same(plain, term) and not same(before, plain) and same(before, weights(base))
    assert all(bool(value.isfinite().all()) for value in term.values())
