"""LoRA students: trained, saved, loaded again, extracted, merged, quantised; on the command line too."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten.cli import main
from hasten.cli.distill import is_lora
from hasten.errors import BadInput, Notice
from hasten.model import Model
from hasten.model.lora import lora_file, with_trainable_lora
from hasten.nets.lora import LowRank, lora_factors, target_layers
from hasten.nets.quantized import layers
from hasten.storage.lora_files import FILE, read_lora, write_lora
from hasten.train.data import Data
from hasten.workflows import students as students_module
from hasten.workflows.distill import distill_model
from hasten.workflows.lora import extract_lora
from hasten.workflows.train import train_model

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from .adapters import tiny

COMMON: Any = {"steps": 6, "batch_size": 4, "precision": "fp32", "show": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a run that trained a LoRA of rank 2, in two stages."""
    out = tmp_path_factory.mktemp("run") / "out"
    distill_model(hasten.load(tiny.ddpm_pipeline()), out, "progressive:steps=(4,2),lr=0.03", data, lora=2, **COMMON)
    return out


def test_training_writes_a_lora_that_gives_the_student(students: Path) -> None:
    """Of every stage; with the base it samples the same images as the student with merged weights."""
    base, last = hasten.load(tiny.ddpm_pipeline()), hasten.load(students)
    for folder, steps in ((students / "steps4", 4), (students, 2)):
        student, file = hasten.load(folder), read_lora(folder)
        assert file.ranks == [2] and set(file.components["unet"]) == set(target_layers(base.denoiser.net.net))
        again = base.with_lora(folder / FILE)
        assert (again.steps, again.sampler, again.times) == (steps, "ddim", "trailing")
        assert (again.sample(2) - student.sample(2)).abs().max() < 1e-5
        assert (again.sample(2) - base.sample(2, sampler="ddim", times="trailing", steps=steps)).abs().max() > 1e-3
        assert not lora_factors(again.denoiser.net) and not lora_factors(student.denoiser.net)  # merged
    before, after = base.denoiser.net.net.state_dict(), last.denoiser.net.net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in file.components["unet"]}
    assert last.card["distilled"]["lora"] == {"rank": 2, "layers": len(changed)}


def test_checkpoints_of_stages_are_small(students: Path) -> None:
    from safetensors import safe_open

    for folder in (students / "stages").iterdir():
        with safe_open(folder / "student.safetensors", "pt") as file:
            assert file.keys() and all("lora_" in name for name in file.keys())  # noqa: SIM118


def test_a_run_resumes_as_it_was_and_refuses_another_rank(students: Path, data: Path, tmp_path: Path) -> None:
    model = hasten.load(tiny.ddpm_pipeline())
    method = "progressive:steps=(4,2),lr=0.03"
    again = distill_model(model, students, method, data, lora=2, **COMMON)
    assert set(again["students"]) == {"steps4", "steps2", "."}
    with pytest.raises(BadInput, match="lora"):
        distill_model(model, students, method, data, lora=3, **COMMON)
    distill_model(model, tmp_path / "again", method, data, lora=2, **COMMON)
    one, two = read_lora(students), read_lora(tmp_path / "again")
    for name, factors in one.components["unet"].items():
        assert torch.equal(factors.up, two.components["unet"][name].up)


def test_peft_computes_the_same(students: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors import safe_open

    unet, student = tiny.ddpm_pipeline().unet, hasten.load(students)
    with safe_open(students / FILE, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        state = {key.removeprefix("unet."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    inject_adapter_in_model(LoraConfig(**{key.removeprefix("unet."): value for key, value in config.items()}), unet)
    assert not set_peft_model_state_dict(unet, state).unexpected_keys
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (net(x, torch.tensor(500)).sample for net in (student.denoiser.net.net, unet))
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": 0}, "rank of a LoRA must be a whole number of at least 1, got 0"),
        ({"lora": 2, "lora_targets": "to_p"}, "no linear layer or convolution 'to_p'"),
        ({"lora_targets": "conv"}, "set its rank too"),
        ({"lora": 2, "fsdp": True}, "without fsdp"),
        ({"lora": 2, "method": "guided"}, "guided gives its students' networks further inputs"),
        ({"lora": 2, "method": "dsno"}, "dsno gives its students' networks further inputs"),
    ],
)
def test_what_cannot_be_trained_is_refused(data: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        distill_model(
            hasten.load(tiny.ddpm_pipeline()), tmp_path, data=data, **{"method": "progressive", **COMMON, **options}
        )


@pytest.mark.parametrize(
    "method",
    ["dmd", *(pytest.param(one, marks=pytest.mark.slow) for one in ("consistency", "diffusion_gan:steps=1", "tract"))],
)
def test_other_methods_train_one(data: Path, tmp_path: Path, method: str) -> None:
    """Critics keep all their weights: only the student's are frozen."""
    base = hasten.load(tiny.ddpm_pipeline())
    distill_model(base, tmp_path / "out", method, data, lora=2, lora_targets="all", **{**COMMON, "steps": 4})
    student, again = hasten.load(tmp_path / "out"), base.with_lora(tmp_path / "out")
    assert (student.sample(2) - again.sample(2)).abs().max() < 1e-5
    assert any(one.up.any() for one in read_lora(tmp_path / "out").components["unet"].values())


def test_hastens_own_network(tmp_path: Path, data: Path) -> None:
    from .factories import tiny_model

    base = tiny_model(classes=None)
    samples = torch.randn(8, *base.shape)
    distill_model(base, tmp_path / "out", "progressive:steps=(2,)", samples, lora=2, **COMMON)
    again = base.with_lora(tmp_path / "out" / FILE)
    assert (again.sample(2) - hasten.load(tmp_path / "out").sample(2)).abs().max() < 1e-5


def test_a_student_of_prompts_in_a_stock_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of hasten, and of diffusers with the base pipeline, the LoRA file and no guidance, are equal."""
    from diffusers import DDIMScheduler

    monkeypatch.setattr(students_module, "PREVIEW_PROMPTS", 1)
    pixels = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Data.of(pixels, captions=("a cat", "a dog") * 4)
    base, out = hasten.load(tiny.sd_pipeline()), tmp_path / "out"
    method = "guided:steps=(2,),guidance=none,lr=0.03"
    distill_model(base, out, method, data, lora=2, lora_targets="attention,conv", guidance_scale=3.0, **COMMON)
    model = base.with_lora(out / FILE)
    assert model.steps == 2 and model.denoiser.guidance_range == (3.0, 3.0) and model.guidance_scale == 3.0
    with pytest.raises(BadInput, match="distilled for guidance_scale"):
        model.sample(1, "a cat", guidance_scale=7.0)
    ours = model.sample(1, "a cat", seed=0)
    assert (ours - base.sample(1, "a cat", sampler="ddim", times="trailing", steps=2)).abs().max() > 1e-3
    pipe = tiny.sd_pipeline()
    pipe.load_lora_weights(str(out / FILE))
    changes = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    latents = hasten.Noise(range(1), model.shape).initial()
    theirs = pipe("a cat", latents=latents, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert (2 * theirs - 1 - ours).abs().max() < 1e-3
    again = hasten.load(out)
    assert (again.sample(1, "a cat", seed=0) - ours).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_fine_tune_as_a_lora(tmp_path: Path, kind: str) -> None:
    """The saved pipeline has it merged; the file gives the same on the base, in hasten and in stock diffusers."""
    build = {"sd": tiny.sd_pipeline, "sd3": tiny.sd3_pipeline}[kind]
    pixels = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Data.of(pixels, captions=("a cat", "a dog") * 4)
    common: Any = {"steps": 4, "batch_size": 4, "precision": "fp32", "device": "cpu", "show": False, "lr": 0.1}
    tuned = train_model(data, tmp_path / "out", base=build(), lora=2, **common)
    file, stock = read_lora(tmp_path / "out"), build()
    base = hasten.load(build())
    assert list(file.components) == ["unet" if kind == "sd" else "transformer"] and "distilled" not in file.info
    ours = base.with_lora(tmp_path / "out")
    assert not ours.card["lora"][0]["transfer"] and ours.steps == base.steps
    stock.load_lora_weights(str(tmp_path / "out" / FILE))
    how: Any = {"steps": 2, "sampler": "ddim", "guidance_scale": 2.0}
    images = [model.sample(1, "a cat", **how) for model in (tuned, ours, base)]
    assert (images[1] - images[0]).abs().max() < 1e-4 and (images[2] - images[0]).abs().max() > 1e-3
    if kind == "sd":  # of layers inside peft's, hasten evaluates what the pipeline does
        net = hasten.load(stock).sample(1, "a cat", **how)
        assert (net - images[0]).abs().max() < 1e-4
    with pytest.raises(BadInput, match="lora is for a network of diffusers"):
        train_model(data, tmp_path / "other", lora=2, **common)
    with pytest.raises(BadInput, match="init=base"):
        train_model(data, tmp_path / "other", base=build(), init="random", lora=2, **common)


def test_averages_do_not_write_the_base(data: Path, tmp_path: Path) -> None:
    """A zero's sign would change, and with it the hash of the weights that the LoRA is for."""
    base = hasten.load(tiny.ddpm_pipeline())
    with torch.no_grad():
        for p in base.denoiser.net.parameters():
            p.view(-1)[0] = -0.0
    written = [p._version for p in base.denoiser.net.parameters()]
    options = {**COMMON, "steps": 3}
    distill_model(base, tmp_path, "consistency:momentum=0.9", data, lora=2, lora_targets="all", **options)
    assert written == [p._version for p in base.denoiser.net.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        base.with_lora(tmp_path)


def test_a_lora_is_trained_further(students: Path, data: Path, tmp_path: Path) -> None:
    """It begins as the student of the file, trains the file's factors, and stays a LoRA of the teacher."""
    base, file = hasten.load(tiny.ddpm_pipeline()), students / "steps4" / FILE
    began = with_trainable_lora(base, file)
    want = base.with_lora(file)
    assert torch.allclose(began.sample(2), want.sample(2), atol=1e-5) and began.steps == 4
    assert all(p.requires_grad == ("lora_" in name) for name, p in began.denoiser.net.named_parameters())
    out = tmp_path / "out"
    distill_model(base, out, "progressive:steps=(4,),lr=1e-9", data, init=file, **COMMON)
    same, first = read_lora(out).components["unet"], read_lora(file).components["unet"]
    assert same.keys() == first.keys()
    assert all((same[name].delta() - one.delta()).abs().max() < 1e-4 for name, one in first.items())
    assert torch.allclose(base.with_lora(out / FILE).sample(2), want.sample(2), atol=1e-3)
    distill_model(base, tmp_path / "more", "progressive:steps=(4,),lr=0.03", data, init=file, lora=2, **COMMON)
    trained = read_lora(tmp_path / "more").components["unet"]
    assert max(float((trained[name].delta() - one.delta()).abs().max()) for name, one in first.items()) > 1e-2
    again = base.with_lora(tmp_path / "more" / FILE)
    assert (again.sample(2) - hasten.load(tmp_path / "more").sample(2)).abs().max() < 1e-5
    for options, message in (({"lora": 4}, "of rank 2"), ({"lora_targets": "conv"}, "omit lora_targets")):
        with pytest.raises(BadInput, match=message):
            distill_model(base, tmp_path / "no", "progressive:steps=(4,)", data, init=file, **options, **COMMON)
    with pytest.raises(BadInput, match="is one already"):
        with_trainable_lora(hasten.load(students), file)


@pytest.mark.parametrize(
    ("init", "expected"),
    [("emoji_student_lora", True), ("a/b.safetensors", True), ("emoji", False), ("emoji_decoder", False)],
)
def test_init_is_a_lora_by_file_or_bundled_name(init: str, expected: bool) -> None:
    assert is_lora(init) is expected


def prompt_student(scale: float = 3.0) -> tuple[Model, Model]:
    """A tiny text-to-image model, and a student of it for 4 steps at one guidance scale that changes every parameter."""
    base = hasten.load(tiny.sd_pipeline())
    student = hasten.load(tiny.sd_pipeline())
    torch.manual_seed(0)
    for p in student.denoiser.net.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    card = {"distilled": {"teacher": base.name, "steps": 4, "guidance_scale": [scale, scale], "figures": {}}}
    denoiser = student.denoiser.replace(guidance_range=(scale, scale))
    named = {"sampler": "ddim", "times": "trailing", "steps": 4, "guidance_scale": scale}
    return base, replace(student, denoiser=denoiser, card=card, **named)


def test_a_student_is_reduced_to_a_lora(tmp_path: Path) -> None:
    base, student = prompt_student()
    result = extract_lora(base, student, 4, tmp_path / "x.safetensors")
    assert 0.3 < result["layers_error"] < result["total_error"] < 1
    assert any("norm" in name for name in result["lost"]) and "time_embedding.linear_1.bias" in result["lost"]
    merged = base.with_lora(tmp_path / "x.safetensors")
    assert (merged.sampler, merged.times, merged.steps, merged.guidance_scale) == ("ddim", "trailing", 4, 3.0)
    with pytest.raises(BadInput, match="guidance_scale"):
        merged.sample(1, "a cat", guidance_scale=5.0)
    errors = []
    want = student.sample(2, "a cat")
    for rank in (1, 4, 100):
        extract_lora(base, student, rank, tmp_path / "y.safetensors")
        errors.append(float((base.with_lora(tmp_path / "y.safetensors").sample(2, "a cat") - want).abs().mean()))
    assert errors[0] > errors[2]
    for name, p in base.denoiser.net.named_parameters():  # now all that a LoRA cannot hold is equal
        if name.removeprefix("net.") in result["lost"]:
            p.data = dict(student.denoiser.net.named_parameters())[name].data
    assert extract_lora(base, student, 100, tmp_path / "y.safetensors")["total_error"] < 1e-6
    assert (base.with_lora(tmp_path / "y.safetensors").sample(2, "a cat") - want).abs().max() < 1e-4


def test_a_student_stays_one(tmp_path: Path) -> None:
    """It is saved as a pipeline with its scheduler, takes no second student, and says what does not hold."""
    base, student = prompt_student()
    extract_lora(base, student, 4, tmp_path / "x.safetensors")
    file = tmp_path / "x.safetensors"
    merged = base.with_lora(file)
    merged.save(tmp_path / "merged")
    assert (hasten.load(tmp_path / "merged").sample(1, "a cat") - merged.sample(1, "a cat")).abs().max() < 1e-5
    with pytest.raises(BadInput, match="is one already"):
        merged.with_lora(file)
    with pytest.warns(Notice, match="hold at scale 1, not 0.5"):
        base.with_lora(file, 0.5)
    other = hasten.load(tiny.sd_pipeline(scheduler=tiny.scheduler(beta_end=0.02)))
    with pytest.raises(BadInput, match="another noise schedule"):
        other.with_lora(file)
    predicts = hasten.load(tiny.sd_pipeline(scheduler=tiny.scheduler(prediction_type="v_prediction")))
    with pytest.raises(BadInput, match="was made for a network that predicts"):
        predicts.with_lora(file)


def test_a_style_beside_a_student(tmp_path: Path) -> None:
    """The order does not matter to the weights, and the student's steps stay."""
    base, student = prompt_student()
    extract_lora(base, student, 4, tmp_path / "fast.safetensors")
    draw = torch.Generator().manual_seed(1)
    style = {
        name: LowRank(torch.randn(1, layer.in_features, generator=draw), torch.ones(layer.out_features, 1), 0.1)
        for name, layer in target_layers(base.denoiser.net.net, "to_q").items()
    }
    write_lora(lora_file(base, style), tmp_path / "style.safetensors")
    files = [tmp_path / "style.safetensors", tmp_path / "fast.safetensors"]
    with pytest.warns(Notice, match="transferred"):
        one, two = base.with_lora(files), base.with_lora(files[::-1])
    assert one.steps == two.steps == 4
    assert (one.sample(1, "a cat") - two.sample(1, "a cat")).abs().max() < 1e-4


def test_extraction_refuses_other_networks(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a LoRA needs two models of one network"):
        extract_lora(hasten.load(tiny.ddpm_pipeline()), hasten.load(tiny.sd_pipeline()), 2, tmp_path / "x.safetensors")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, student = prompt_student()
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    student.save(tmp_path / "student")
    file, names = tmp_path / "x.safetensors", ["base", "student"]

    def run(*words: object, code: int = 0) -> str:
        assert main([str(word) for word in words]) == code
        said = capsys.readouterr()
        return said.out if code == 0 else said.err

    said = run("extract-lora", *(tmp_path / name for name in names), "--out", file, "--rank", 4)
    assert "it leaves out" in said and "are lost, with their norms" in said and "conv_in" in said
    said = run("show", file)
    assert "names of diffusers" in said and "steps: 4" in said and "guidance_scale [3.0, 3.0]" in said
    run("convert-lora", file, "--to", "kohya", "--out", tmp_path / "k.safetensors")
    said = run(
        "sample", tmp_path / "base", "--lora", tmp_path / "k.safetensors", "--n", 1, "--prompt", "a cat", "--json",
        "--precision", "fp32", "--out", tmp_path / "a.png",
    )  # fmt: skip
    assert json.loads(said)["guidance_scale"] == 3.0 and json.loads(said)["steps"] == 4
    run("merge-lora", tmp_path / "base", file, "--out", tmp_path / "merged")
    assert (
        hasten.load(tmp_path / "merged").sample(1, "a cat") - base.with_lora(file).sample(1, "a cat")
    ).abs().max() < 1e-5
    wrong = ["sample", tmp_path / "base", "--lora", file, "--prompt", "a", "--guidance-scale", "7", "--n", 1]
    assert "guidance_scale" in run(*wrong, "--out", tmp_path / "b.png", code=1)
    wrong[3] = tmp_path / "no.safetensors"
    assert "no LoRA file" in run(*wrong, code=1)


def test_quantize_merges_first(tmp_path: Path) -> None:
    pipe = tiny.ddpm_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    base, draw = hasten.load(pipe), torch.Generator().manual_seed(0)
    factors = {
        name: LowRank(torch.randn(2, layer.in_features, generator=draw), torch.ones(layer.out_features, 2), 1.0)
        for name, layer in target_layers(base.denoiser.net.net, "attention").items()
    }
    file = write_lora(lora_file(base, factors), tmp_path / "x.safetensors")
    words = ["quantize", tmp_path / "base", "--lora", file, "--out", tmp_path / "q", "--images", 2]
    assert main([str(word) for word in words]) == 0
    quantized, merged = hasten.load(tmp_path / "q"), base.with_lora(file)
    integer = {name.split("net.", 2)[-1]: layer.weight.detach() for name, layer in layers(quantized.denoiser.net)}
    weights = {name: weight for name, weight in integer.items() if name in factors}
    assert len(weights) == len(factors)
    for name, weight in weights.items():
        plain, want = (model.denoiser.net.net.get_submodule(name).weight for model in (base, merged))
        assert (weight - want).norm() < 0.05 * (plain - want).norm()
    with pytest.raises(BadInput, match="is quantised or exported"):
        quantized.with_lora(file)
