"""The bundled text-to-image pipeline `emoji`: hasten and stock diffusers load it, and sample the same pictures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten import zoo
from hasten.cli import main
from hasten.errors import Notice
from hasten.model import Model

PROMPTS = ["a red heart, google style", "a cat face, 3d style"]
SIZE = 20e6  # bytes of everything that belongs to it


@pytest.fixture(scope="module")
def model() -> Model:
    return hasten.load("emoji")


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(str(zoo.cards()["emoji"].folder), torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def emoji_cards() -> list[zoo.Card]:
    """All that belongs to it."""
    return [card for name, card in (zoo.cards() | zoo.additions()).items() if name.startswith("emoji")]


def test_everything_of_it_is_small_and_nothing_is_left_out() -> None:
    assert sum(card.size for card in emoji_cards()) <= SIZE
    listed = {card.folder for card in emoji_cards()}
    assert {path for path in zoo.HERE.glob("emoji*") if path.name != "emoji_judge"} == listed


def test_every_network_and_lora_of_it_samples() -> None:
    for card in emoji_cards():
        model = hasten.load(card.of or card.name)
        if card.kind == "lora":
            with warnings.catch_warnings():  # no notice that it is for other weights
                warnings.simplefilter("error", Notice)
                model = model.with_lora(card.name)
        elif card.kind == "decoder":
            model = model.with_decoder(card.name)
        steps = min(model.plan.nfe if model.plan is not None else 2, 8)
        pictures = model.sample(1, PROMPTS[0], steps=None if model.plan is not None else steps)
        assert pictures.shape == (1, 3, 64, 64) and pictures[0, :, :4, :4].mean() > 0.7, card.name


def test_its_weights_are_half_precision_and_are_loaded_in_single(model: Model, pipe: Any) -> None:
    from safetensors import safe_open

    files = [card.folder if card.folder.is_file() else card.folder.rglob("*.safetensors") for card in emoji_cards()]
    for file in [f for found in files for f in ([found] if isinstance(found, Path) else found)]:
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118
        assert torch.float32 not in kinds, file
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, model.decoder.vae, model.conditioning.pipe.text_encoder):
        assert part.dtype == torch.float32


def test_the_stock_pipeline_samples_what_hasten_samples(model: Model, pipe: Any) -> None:
    noise = torch.stack([torch.randn(model.shape, generator=torch.Generator().manual_seed(k)) for k in (3, 4)])
    stock = pipe(PROMPTS, num_inference_steps=10, guidance_scale=3.0, latents=noise, output_type="pt").images * 2 - 1
    ours = model.sample(2, PROMPTS, seed=3, sampler="ddim", times="trailing", steps=10, guidance_scale=3.0)
    assert (stock - ours).abs().max() < 2e-3


def test_pictures_follow_their_prompts(model: Model) -> None:
    """A red heart is red and a blue one blue, on white."""
    pictures = model.sample(
        4, ["a red heart, twitter style", "a blue heart, twitter style"], sampler="unipc", steps=12, guidance_scale=3.0
    )
    middle = pictures[:, :, 24:40, 24:40].mean((2, 3))
    for k in (0, 2):
        assert middle[k, 0] - middle[k, 2] > 0.3, middle[k]
    for k in (1, 3):
        assert middle[k, 2] - middle[k, 0] > 0.3, middle[k]
    assert pictures[:, :, :4, :4].mean() > 0.8


def test_the_command_line_prints_its_path_and_samples_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--path", "emoji"]) == 0
    assert capsys.readouterr().out.strip() == str(zoo.cards()["emoji"].folder)
    out = tmp_path / "heart.png"
    assert main(["sample", "emoji", "--prompt", PROMPTS[0], "--steps", "4", "--out", str(out)]) == 0
    assert out.is_file()


@pytest.mark.parametrize("prompt", ["", " ".join(["heart"] * 2000)])
def test_an_empty_or_a_very_long_prompt_gives_one_line_and_a_picture(
    prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["sample", "emoji", "--prompt", prompt, "--steps", "2", "--out", str(tmp_path / "a.png")])
    captured = capsys.readouterr()
    assert code == 0 and "Traceback" not in captured.err
    assert all(len(line) < 300 for line in captured.err.splitlines())
