"""Light decoders: the same latents, loading into diffusers and hasten, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.adapters.diffusers.autoencoders import build_light_decoder
from hasten.adapters.diffusers.pipelines import load_pipeline
from hasten.errors import BadInput
from hasten.train.data import Data
from hasten.workflows.decoder import DecoderConfig, distill_decoder, with_targets
from tests.adapters import tiny
from tests.factories import noise_images, run_cli

TINY: dict[str, Any] = {"steps": 2, "batch_size": 2, "show": False}


def images(n: int = 4) -> Data:
    return Data.of(noise_images(n, 16, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline's folder, and that of a light decoder for it."""
    folder = tmp_path_factory.mktemp("decoder")
    tiny.sd_pipeline(vae=tiny.vae(block_out_channels=(8, 16))).save_pretrained(folder / "pipe")
    distill_decoder(folder / "pipe", images(), folder / "light", widths=(4, 8), groups=4, **TINY)
    return folder / "pipe", folder / "light"


def test_diffusers_loads_it_into_a_pipeline(folders: tuple[Path, Path]) -> None:
    """Its encoder is exactly the pipeline's, its decoder is smaller, and it has the pipeline's scale."""
    from diffusers import AsymmetricAutoencoderKL, StableDiffusionPipeline

    pipe = tiny.quiet(StableDiffusionPipeline.from_pretrained(folders[0]))
    light = AsymmetricAutoencoderKL.from_pretrained(folders[1])
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(light.encode(x).latent_dist.mean, pipe.vae.encode(x).latent_dist.mean, atol=1e-6)
    assert light.config.scaling_factor == pipe.vae.config.scaling_factor == 0.5
    pipe.vae = light
    shared = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    image = pipe("a cat", **shared).images
    latents = pipe("a cat", **{**shared, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}).images
    with torch.no_grad():
        expected = (light.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    assert abs(torch.from_numpy(image).permute(0, 3, 1, 2) - expected).max() < 1e-5
    card = json.loads((folders[1] / "decoder.json").read_text())
    assert card["light"]["macs"] < card["full"]["macs"] / 2 and card["light"]["parameters"] < card["full"]["parameters"]


def test_a_model_decodes_with_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from diffusers import AsymmetricAutoencoderKL

    model = load_pipeline(folders[0])
    light = model.with_decoder(folders[1])
    z = torch.randn(1, 4, 8, 8)
    expected = AsymmetricAutoencoderKL.from_pretrained(folders[1]).decode(z / 0.5).sample
    assert torch.allclose(light.decoder.decode(z), expected, atol=1e-6)
    assert not torch.allclose(model.decoder.decode(z), expected, atol=1e-2), "the model itself is unchanged"
    assert type(model.pipeline.vae).__name__ == "AutoencoderKL"
    assert light.pipeline.vae is light.decoder.vae
    light.save(tmp_path / "saved")
    assert torch.allclose(load_pipeline(tmp_path / "saved").decoder.decode(z), expected, atol=1e-6)


def test_the_scale_is_that_of_the_model(folders: tuple[Path, Path]) -> None:
    pipe = tiny.sd_pipeline(vae=tiny.vae(block_out_channels=(8, 16), scaling_factor=0.25))
    light = load_pipeline(pipe).with_decoder(folders[1])
    assert light.decoder.vae.config.scaling_factor == 0.25


def test_a_decoder_for_other_latents_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    def model(**changes: Any) -> Any:
        return load_pipeline(tiny.sd_pipeline(vae=tiny.vae(**{"block_out_channels": (8, 16), **changes})))

    other = model()
    with torch.no_grad():
        other.decoder.vae.encoder.conv_out.weight.add_(0.1)
    with pytest.raises(BadInput, match="another encoder"):
        other.with_decoder(folders[1])
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    with pytest.raises(BadInput, match="enlarges latents 2 times, the model's autoencoder 4 times"):
        model(block_out_channels=(8, 8, 16), **levels).with_decoder(folders[1])
    with pytest.raises(BadInput, match="holds no autoencoder"):
        other.with_decoder(tmp_path)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**sizes, **blocks, latent_channels=4).save_pretrained(tmp_path / "taesd")
    z = torch.randn(1, 4, 8, 8)
    replaced = other.with_decoder(tmp_path / "taesd").decoder
    with torch.no_grad():
        assert torch.allclose(replaced.decode(z), replaced.vae.decode(z).sample), "it takes scaled latents"


def test_the_encoder_is_kept_without_attention_and_quantisation_layers() -> None:
    for changes in ({"mid_block_add_attention": False}, {"use_quant_conv": False, "use_post_quant_conv": False}):
        vae = tiny.vae(**changes)
        light = build_light_decoder(vae, (4, 4), 0, groups=4)
        x = torch.rand(1, 3, 16, 16)
        with torch.no_grad():
            expected = vae.encode(x).latent_dist.mean
            assert torch.allclose(light.encode(x).latent_dist.mean, expected, atol=1e-6), changes


def test_groups_of_one_channel_are_avoided() -> None:
    """They would take the mean of each channel of the pixels; with the autoencoder's own groups nothing is distilled."""
    vae = tiny.vae(block_out_channels=(16, 32), norm_num_groups=16)
    light = build_light_decoder(vae, (16, 16))
    assert light.config.norm_num_groups == 2 and all(p.requires_grad for p in light.encoder.parameters())
    same = build_light_decoder(vae, (16, 16), groups=16)
    assert same.config.norm_num_groups == 16 and not any(p.requires_grad for p in same.encoder.parameters())
    assert build_light_decoder(vae, (32, 32)).config.norm_num_groups == 16
    with pytest.raises(BadInput, match="multiples of 3"):
        build_light_decoder(vae, (16, 16), groups=3)


def test_a_distilled_encoder(tmp_path: Path) -> None:
    """It comes near the full one's latents, is measured, and never encodes for a model that has the full one."""
    vae = tiny.vae(block_out_channels=(8, 16), norm_num_groups=4)
    pipe = tiny.sd_pipeline(vae=vae)
    options = {**TINY, "steps": 60, "batch_size": 4, "lr": 3e-3}
    card = distill_decoder(vae, images(), tmp_path / "light", widths=(4, 8), groups=2, **options)
    assert {"psnr", "measured"} <= card["with_light_encoder"].keys() and card["light"] != card["with_light_encoder"]
    x = images().images([0, 1]).float() / 127.5 - 1

    def distance(other: Any) -> float:
        with torch.no_grad():
            mine, theirs = (net.encode(x).latent_dist for net in (vae, other))
        return float((mine.mean - theirs.mean).square().mean() + (mine.logvar - theirs.logvar).square().mean() / 10)

    model = load_pipeline(pipe)
    light = model.with_decoder(tmp_path / "light")
    assert distance(light.decoder.vae) < distance(build_light_decoder(vae, (4, 8), groups=2)) / 2
    assert torch.equal(light.decoder.encode(x), model.decoder.encode(x)), "the full encoder encodes"
    z = torch.randn(1, 4, 8, 8)
    assert not torch.allclose(light.decoder.decode(z), model.decoder.decode(z), atol=1e-2)
    again = light.with_decoder(tmp_path / "light")
    assert torch.equal(again.decoder.encode(x), model.decoder.encode(x))
    other = load_pipeline(tiny.sd_pipeline(vae=tiny.vae(block_out_channels=(8, 16), norm_num_groups=4)))
    with torch.no_grad():
        other.decoder.vae.encoder.conv_out.weight.mul_(1.1)
    with pytest.raises(BadInput, match="latents of another autoencoder"):
        other.with_decoder(tmp_path / "light")


def test_equal_sizes_start_as_the_full_decoder() -> None:
    vae = tiny.vae()
    light = build_light_decoder(vae, (8, 8), 1)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(light.decode(z).sample, vae.decode(z).sample, atol=1e-6)


def test_only_the_decoder_is_trained(folders: tuple[Path, Path]) -> None:
    states = torch.load(folders[1] / "checkpoint.pt", weights_only=True)["players"]["decoder"]
    untouched = [k for k in states["module"] if torch.equal(states["module"][k], states["ema"][k])]
    assert all(k in untouched for k in states["module"] if k.startswith(("encoder.", "quant_conv.")))
    assert "decoder.conv_in.weight" not in untouched
    assert not any(states["module"][k].any() for k in states["module"] if "condition_encoder" in k)


def test_targets_in_memory_are_those_of_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.workflows import decoder

    vae, data = tiny.vae(), images()
    cached = with_targets(vae, data, DecoderConfig(), lambda line: None)
    assert cached.conditions is not None
    batch = cached.conditions([2, 0])
    mean, logvar, target = decoder.targets_of(vae, data.images([2, 0]).float() / 127.5 - 1)
    for name, value in (("mean", mean), ("logvar", logvar), ("target", target)):
        assert torch.allclose(batch[name].float(), value, rtol=2e-3, atol=2e-3), name
    monkeypatch.setattr(decoder, "MEMORY", 10)
    assert with_targets(vae, data, DecoderConfig(), lambda line: None) is data


def test_what_cannot_be_distilled_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has a shift_factor"):
        build_light_decoder(tiny.vae(shift_factor=0.1))
    with pytest.raises(BadInput, match=r"multiples of 4 \(the groups of the normalisation\), got 6"):
        build_light_decoder(tiny.vae(), (8, 6))
    with pytest.raises(BadInput, match="needs 2 widths"):
        build_light_decoder(tiny.vae(), (4, 4, 4))
    with pytest.raises(BadInput, match="do not fit a factor of 2: set --size 16"):
        distill_decoder(tiny.vae(), Data.of(noise_images(4, 15, 3)), tmp_path, **TINY)
    with pytest.raises(BadInput, match="holds no autoencoder of diffusers"):
        distill_decoder("fashion", images(), tmp_path, **TINY)
    with pytest.raises(BadInput, match="distilled from an AutoencoderKL"):
        distill_decoder(build_light_decoder(tiny.vae(), (4, 4)), images(), tmp_path, **TINY)


def test_models_of_pixels_have_no_decoder() -> None:
    with pytest.raises(BadInput, match="no image decoder to replace"):
        load_pipeline(tiny.ddpm_pipeline()).with_decoder("x")


def test_the_command_samples_with_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shared = ["sample", folders[0], "--n", "1", "--steps", "1", "--sampler", "ddim", "--prompt", "a cat"]
    code, _, err = run_cli(*shared, "--decoder", folders[1], "--out", tmp_path / "light.png")
    assert code == 0, err
    run_cli(*shared, "--out", tmp_path / "full.png")
    from PIL import Image

    pictures = [Image.open(tmp_path / f"{name}.png") for name in ("light", "full")]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert f"--decoder {folders[1]}" in " ".join(str(value) for value in pictures[0].text.values())  # type: ignore[attr-defined]


def test_a_copy_of_the_base_in_half_precision_is_the_same_encoder(folders: tuple[Path, Path]) -> None:
    model = load_pipeline(folders[0])
    model.decoder.vae = copy.deepcopy(model.decoder.vae).half()
    assert model.with_decoder(folders[1]).decoder.vae.dtype == torch.float16
