"""Pipelines that `load` supports, and those that it refuses by name because it would drop a part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.accelerators.encoder_propagation import EncoderPropagation
from hasten.adapters.diffusers import times_like
from hasten.errors import BadInput
from hasten.pick import format_spec
from hasten.schedules import Flow
from hasten.times import Explicit

from . import tiny

STEPS = 4


def start(n: int = 1, seed: int = 7) -> Tensor:
    return hasten.Noise(range(seed, seed + n), (4, 8, 8)).initial()


def sdxl(kind: str, refiner: bool = False) -> Any:
    import diffusers

    config: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "transformer_layers_per_block": (1, 1),
        "cross_attention_dim": 16 if refiner else 32,
        "projection_class_embeddings_input_dim": 16 + (5 if refiner else 6) * 4,
    }
    return tiny.quiet(
        getattr(diffusers, kind)(
            vae=tiny.vae(),
            text_encoder=None if refiner else tiny.text_encoder(),
            text_encoder_2=tiny.text_encoder(True, 4),
            tokenizer=None if refiner else tiny.tokenizer(),
            tokenizer_2=tiny.tokenizer(),
            unet=tiny.unet2d_condition(**config),
            add_watermarker=False,
            requires_aesthetics_score=refiner,
            scheduler=tiny.scheduler(timestep_spacing="trailing"),
        )
    )


@pytest.mark.parametrize("refiner", [False, True])
@pytest.mark.parametrize("kind", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_sdxl_image_pipelines_have_their_own_sizes(kind: str, refiner: bool) -> None:
    """Sizes, crops and aesthetic scores in both branches are those of the pipeline."""
    pipe, heard = sdxl(kind, refiner), []
    handle = pipe.unet.register_forward_pre_hook(
        lambda net, args, named: heard.append(named["added_cond_kwargs"]), with_kwargs=True
    )
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"image": image, "strength": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    call |= {"mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16} if "Inpaint" in kind else {}
    pipe("a cat", guidance_scale=3.0, **call)
    handle.remove()
    model = hasten.load(pipe)
    cond = model.conditions(1, "a cat")
    ids = heard[0]["time_ids"]  # without a class first
    assert torch.equal(cond["added_time_ids"], ids[1:]) and torch.equal(cond["null_added_time_ids"], ids[:1])
    assert torch.equal(cond["added_time_ids"], cond["null_added_time_ids"]) is not refiner
    assert torch.allclose(
        torch.cat([cond["null_added_text_embeds"], cond["added_text_embeds"]]), heard[0]["text_embeds"], atol=1e-6
    )
    assert model.sample(1, "a cat", steps=2).shape == (1, 3, 16, 16)


def test_sd3_with_dynamic_shifting_is_loaded_with_the_shift_of_its_size() -> None:
    pipe = tiny.sd3_pipeline(use_dynamic_shifting=True)
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt"}
    theirs = pipe("a cat", latents=start(), **call).images
    model = hasten.load(pipe)
    assert isinstance(model.denoiser.schedule, Flow) and 1 < model.denoiser.schedule.shift < 1.65
    mu = float(torch.log(torch.tensor(model.denoiser.schedule.shift)))
    times_spec = format_spec(Explicit(tuple(times_like(pipe.scheduler, STEPS, mu=mu).tolist())))
    ours = model.sample(1, "a cat", 7, sampler="ddim", times=times_spec, steps=STEPS, guidance_scale=3.0)
    assert torch.allclose(ours, theirs * 2 - 1, atol=1e-5)
    keys = tuple(range(9))  # every evaluation
    fast = hasten.accelerate(pipe, [EncoderPropagation(keys=keys)], steps=9)
    call["num_inference_steps"] = 9
    theirs = pipe("a cat", latents=start(), **call).images
    assert torch.allclose(fast("a cat", latents=start(), **call).images, theirs, atol=1e-5)


def test_no_guidance_keeps_the_prompt() -> None:
    """A scale of 0 is what turbo models are published with: the prompt, once a step."""
    pipe = tiny.sd_pipeline(scheduler=tiny.scheduler(timestep_spacing="trailing"))
    times_spec = format_spec(Explicit(tuple(times_like(pipe.scheduler, STEPS).tolist())))
    theirs = pipe("a cat", latents=start(), num_inference_steps=STEPS, guidance_scale=0.0, output_type="pt").images
    model = hasten.load(pipe)
    ours = model.sample(1, "a cat", 7, sampler="ddim", times=times_spec, steps=STEPS, guidance_scale=0.0)
    assert torch.allclose(ours, theirs * 2 - 1, atol=1e-5)
    assert torch.equal(
        ours, model.sample(1, "a cat", 7, sampler="ddim", times=times_spec, steps=STEPS, guidance_scale=1.0)
    )
    assert (
        ours - model.sample(1, "the dog", 7, sampler="ddim", times=times_spec, steps=STEPS, guidance_scale=0.0)
    ).abs().max() > 1e-3
    with pytest.raises(BadInput, match="finite"):
        model.sample(1, "a cat", steps=2, guidance_scale=float("nan"))


def adapter() -> Any:
    from diffusers import T2IAdapter

    return tiny.seeded(lambda: T2IAdapter(in_channels=3, channels=(16, 32), num_res_blocks=1, downscale_factor=2))


def deepfloyd(second: bool = False) -> Any:
    import diffusers
    from transformers import T5Config, T5EncoderModel

    more: dict[str, Any] = {"class_embed_type": "timestep", "in_channels": 6} if second else {"in_channels": 3}
    unet = tiny.seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(32, 64),
            cross_attention_dim=32,
            encoder_hid_dim=32,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            attention_head_dim=8,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            **more,
        )
    )
    encoder = T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()
    table = diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True)
    parts = {"image_noising_scheduler": diffusers.DDPMScheduler()} if second else {}
    kind = diffusers.IFSuperResolutionPipeline if second else diffusers.IFPipeline
    return tiny.quiet(
        kind(
            tokenizer=None,
            text_encoder=encoder,
            unet=unet,
            scheduler=table,
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
            **parts,
        )
    )


def refused() -> dict[str, Any]:
    """Name: (a pipeline, what the refusal says)."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    def image_encoder() -> Any:
        config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=16,
        )
        return CLIPVisionModelWithProjection(config)

    def ip() -> Any:
        pipe = tiny.sd_pipeline()
        pipe.unet.config["encoder_hid_dim_type"] = "ip_image_proj"
        return pipe

    def variation() -> Any:
        import diffusers

        return diffusers.StableDiffusionImageVariationPipeline(
            tiny.vae(), image_encoder(), tiny.unet2d_condition(), tiny.scheduler(), None, None, False
        )

    def own() -> Any:
        """A user's pipeline with another network."""
        from diffusers import StableDiffusionPipeline

        class Mine(StableDiffusionPipeline):
            @property
            def components(self) -> dict[str, Any]:
                return {**super().components, "styler": torch.nn.Linear(1, 1)}

        return Mine(**tiny.sd_pipeline().components, requires_safety_checker=False)

    return {
        "controlnet": (
            lambda: tiny.sd_pipeline("StableDiffusionControlNetPipeline", controlnet=tiny.controlnet()),
            "has a controlnet",
        ),
        "controlnet_img2img": (
            lambda: tiny.sd_pipeline("StableDiffusionControlNetImg2ImgPipeline", controlnet=tiny.controlnet()),
            "has a controlnet",
        ),
        "adapter": (
            lambda: tiny.sd_pipeline("StableDiffusionAdapterPipeline", adapter=adapter()),
            "has a adapter|has an adapter",
        ),
        "pag": (lambda: tiny.sd_pipeline("StableDiffusionPAGPipeline"), "StableDiffusionPAGPipeline does more"),
        "sag": (lambda: tiny.sd_pipeline("StableDiffusionSAGPipeline"), "StableDiffusionSAGPipeline does more"),
        "pix2pix": (
            lambda: tiny.sd_pipeline(
                "StableDiffusionInstructPix2PixPipeline", unet=tiny.unet2d_condition(in_channels=8)
            ),
            "beside the noisy one",
        ),
        "inpaint": (
            lambda: tiny.sd_pipeline("StableDiffusionInpaintPipeline", unet=tiny.unet2d_condition(in_channels=9)),
            "beside the noisy one",
        ),
        "eight of eight": (
            lambda: tiny.sd_pipeline(unet=tiny.unet2d_condition(in_channels=8, out_channels=8)),
            "takes 8 channels and samples have 4",
        ),
        "variation": (variation, "ImageVariationPipeline does more"),
        "if second stage": (lambda: deepfloyd(True), "does more than sample its unet"),
        "class embedding": (
            lambda: tiny.sd_pipeline(unet=tiny.unet2d_condition(class_embed_type="timestep")),
            "class embedding .'timestep'.",
        ),
        "noise level": (
            lambda: tiny.sd_pipeline(unet=tiny.unet2d_condition(num_class_embeds=7)),
            "7 classes beside text",
        ),
        "sizes": (lambda: tiny.sd_pipeline(unet=tiny.sdxl_unet()), "'text_time'"),
        "ip adapter": (ip, "unload_ip_adapter"),
        "without encoders": (lambda: tiny.sd_pipeline(text_encoder=None, tokenizer=None), "no text encoder"),
        "mine": (own, "has a styler"),
    }


@pytest.mark.parametrize("name", refused())
def test_what_load_would_drop_is_refused_by_name(name: str) -> None:
    make, messages = refused()[name]
    pipe = make()
    with pytest.raises(BadInput, match=messages) as caught:
        hasten.load(pipe)
    assert "\n" not in str(caught.value) and ("as_scheduler" in str(caught.value))


def test_what_is_loaded() -> None:
    """Pixels of DeepFloyd's first stage, and a pipeline class of a user's own without parts of its own."""
    from diffusers import StableDiffusionPipeline

    pipe = deepfloyd()
    assert hasten.load(pipe).codec == "image" and hasten.load(pipe).shape == (3, 8, 8)

    class Mine(StableDiffusionPipeline):
        pass

    mine = Mine(**tiny.sd_pipeline().components, requires_safety_checker=False)
    assert hasten.load(mine).card["pipeline"] == "Mine"


def test_an_unsupported_encoder_is_refused_in_a_line() -> None:
    pipe = tiny.sd_pipeline()
    pipe.encode_prompt = lambda prompt, device: None  # type: ignore[method-assign]
    with pytest.raises(BadInput, match="encode_prompt cannot be called as hasten does .TypeError"):
        hasten.load(pipe).sample(1, "a cat", steps=2)


def test_saving_an_accelerated_pipeline_says_what_is_not_saved(tmp_path: Path) -> None:
    pipe = tiny.sd_pipeline()
    fast = hasten.accelerate(pipe, ["quantize:images=1,steps=2"], steps=3, prompts="a cat")
    with pytest.raises(BadInput, match="would write the weights before quantize:.*, not those that run"):
        fast.unet.save_pretrained(tmp_path / "int8")
    with pytest.raises(BadInput, match="takes only the folder, found .'safe_serialization'"):
        fast.save_pretrained(tmp_path / "int8", safe_serialization=False)  # see test_quantized_pipelines
    assert not (tmp_path / "int8").exists()
    cached = hasten.accelerate(pipe, ["encoder_propagation:keys=uniform"], steps=9)
    with pytest.warns(UserWarning, match="saved without encoder_propagation:keys=uniform: call hasten.accelerate"):
        cached.save_pretrained(tmp_path / "cached")
    again = type(pipe).from_pretrained(tmp_path / "cached")
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)
    pipe.save_pretrained(tmp_path / "plain")  # which stays as it was
