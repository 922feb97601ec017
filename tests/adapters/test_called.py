"""Pipelines that `load` refuses, sampled through their own call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.adapters.diffusers.called import call_pipeline, load_or_call
from hasten.compare import compare
from hasten.compare.counting import count_evaluations
from hasten.compare.parts import time_parts
from hasten.errors import BadInput

from . import tiny

pytest.importorskip("diffusers")


def t5() -> tuple[Any, Any]:
    """A tiny T5 encoder with the tokenizer of a handful of words."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tiny.tokenizer()), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return tiny.seeded(lambda: T5EncoderModel(config)), tiny.tokenizer()


def flux(guidance_embeds: bool = False) -> Any:
    """A FLUX pipeline whose images have 16 pixels a side."""
    import diffusers

    transformer = tiny.seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=guidance_embeds,
        )
    )
    second, words = t5()
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny.vae(shift_factor=0.1),
        transformer=transformer,
        text_encoder=tiny.text_encoder(),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=second,
        tokenizer_2=words,
    )
    pipe.default_sample_size = 8
    return tiny.quiet(pipe)


def test_its_samples_are_those_of_the_pipeline_with_its_own_euler() -> None:
    pipe = flux(guidance_embeds=True)
    lines: list[str] = []
    model = load_or_call(pipe, report=lines.append)
    assert lines == ["FluxPipeline is sampled through its own call, with schedulers of hasten and no accelerators"]
    assert model.shape == (3, 16, 16) and model.guidance_scale == 3.5
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    own = pipe(["a cat", "a dog"], num_inference_steps=3, generator=generators, output_type="pt").images
    before = (pipe.scheduler, dict(vars(pipe)))
    seconds: dict[str, float] = {}
    with count_evaluations(model) as count, time_parts(model, seconds):
        x = model.sample(2, ["a cat", "a dog"], seed=5, sampler="ddim", times="trailing", steps=3, batch_size=1)
    assert torch.allclose(x, 2 * own - 1, atol=1e-3) and count == [6]
    assert min(seconds["text"], seconds["decoder"]) > 0 and (pipe.scheduler, dict(vars(pipe))) == before
    other = model.sample(2, ["a cat", "a dog"], seed=5, sampler="ddim", times="trailing", steps=3, guidance_scale=9.0)
    assert float((other - x).abs().max()) > 1e-3  # the scale reaches the network
    with pytest.raises(BadInput, match="only samplers that are linear"):
        model.sample(1, "a cat", sampler="adaptive", steps=3)


def test_a_comparison_of_it_ends_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text = 'n = 10\nrounds = 1\n[reference]\nsampler = "ddim"\nsteps = 2\nguidance_scale = 3.0\n'
    Path("set.toml").write_text(text + '[[variant]]\nname = "one"\nsteps = 1\n')
    rows = compare(call_pipeline(flux()), "set.toml", out="out", show=False, timing_batch=2, prompts=["a cat", "a dog"])
    assert [(row["nfe"], row["guidance_scale"]) for row in rows] == [(2, 1.0), (1, 1.0)]
    assert rows[1]["diversity_ratio"] and rows[1]["seconds_by_part"]["text"] > 0
    page = Path("out/report.html").read_text()
    assert "Pictures by prompt" in page and "What should I use?" in page
    assert "has its guidance inside, with scale 1" in capsys.readouterr().err


def test_what_cannot_be_called_with_a_prompt_says_both_reasons() -> None:
    pipe = flux()
    pipe.text_encoder = None
    with pytest.raises(BadInput, match="load does not know .* nor is it sampled through its own call"):
        load_or_call(pipe)
