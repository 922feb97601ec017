"""The support matrix of the README, cell by cell: what it says works runs, and what it says is refused raises BadInput."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators._patches.attention import TextVersion
from hasten.accelerators._patches.exchange import Exchange
from hasten.accelerators._patches.swap import Patched
from hasten.accelerators.compile import Compile
from hasten.accelerators.quantize import Quantize
from hasten.distributed.groups import ProcessGroup
from hasten.errors import BadInput
from hasten.nets.unet import UNet
from hasten.pick import pick
from hasten.workflows.distill import check_models

pytest.importorskip("diffusers")

from .adapters import tiny
from .adapters.test_scheduler_arguments import flux

README = (Path(__file__).parent.parent / "README.md").read_text()
STEPS = 10  # more than feature caching refuses
TRACED = ("DiT", "hasten's own U-Net")  # by torch.compile, which takes long; of others it is checked up to there
DISTILLER = "progressive:steps=(4,2)"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(7))


@dataclass(frozen=True)
class Family:
    """A row of the matrix: `build()` makes a tiny pipeline, or a `Model`; `call(pipe, steps)` samples from a pipeline."""

    build: Callable[[], Any]
    call: Callable[[Any, int], Any] | None = None


def text(pipe: Any, steps: int, **more: Any) -> Any:
    size = {"height": 16, "width": 16, "output_type": "latent"}
    return pipe("a cat", num_inference_steps=steps, generator=generator(), **size, **more).images


def embedded(width: int, side: int, **sizes: bool) -> Callable[[Any, int], Any]:
    """The call of a pipeline without text encoders: the embeddings of a prompt, and of none, are given."""

    def call(pipe: Any, steps: int) -> Any:
        given = {"prompt_embeds": noise(1, 5, width), "prompt_attention_mask": torch.ones(1, 5)}
        given |= {f"negative_{key}": value for key, value in given.items()}
        return pipe(
            prompt=None, negative_prompt=None, num_inference_steps=steps, output_type="latent", generator=generator(),
            height=side, width=side, use_resolution_binning=False, **given,
        ).images  # fmt: skip

    return call


def pixart() -> Any:
    import diffusers

    net = tiny.seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, cross_attention_dim=16, caption_channels=32, use_additional_conditions=False,
        )
    )  # fmt: skip
    table = diffusers.DPMSolverMultistepScheduler()
    return tiny.quiet(diffusers.PixArtSigmaPipeline(None, None, tiny.vae(), net, table))


def sana() -> Any:
    import diffusers

    net = tiny.seeded(
        lambda: diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
            sample_size=8,
        )
    )  # fmt: skip
    blocks = {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)), "layers_per_block": (1, 1),
        }.items()
    }  # fmt: skip
    vae = tiny.seeded(
        lambda: diffusers.AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2, downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
            scaling_factor=0.41407, **blocks,
        )
    )  # fmt: skip
    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return tiny.quiet(diffusers.SanaPipeline(None, None, vae, net, table))


def lcm() -> Any:
    import diffusers

    return tiny.sd_pipeline(
        "LatentConsistencyModelPipeline",
        unet=tiny.unet2d_condition(time_cond_proj_dim=8),
        scheduler=diffusers.LCMScheduler.from_config(tiny.SD_TABLE),
    )


def own_model(net: nn.Module, **options: Any) -> hasten.Model:
    denoiser = hasten.Denoiser(net.eval().requires_grad_(False), hasten.VPCosine(), prediction="v")
    return hasten.Model(denoiser, "own", (1, 8, 8), **options)


class Anything(nn.Module):
    """A network that hasten knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.out(torch.relu(self.conv(x)) * (1 + time.view(-1, 1, 1, 1)))


def flux_call(pipe: Any, steps: int) -> Any:
    return pipe(
        prompt_embeds=noise(1, 5, 32), pooled_prompt_embeds=noise(1, 16), num_inference_steps=steps, height=16, width=16,
        output_type="latent", generator=generator(),
    ).images  # fmt: skip


FAMILIES = {
    "Stable Diffusion 1, 2": Family(tiny.sd_pipeline, text),
    "Stable Diffusion XL": Family(tiny.sdxl_pipeline, text),
    "Stable Diffusion with ControlNet": Family(
        lambda: tiny.sd_pipeline("StableDiffusionControlNetPipeline", controlnet=tiny.controlnet()),
        lambda pipe, steps: text(pipe, steps, image=noise(1, 3, 16, 16).sigmoid()),
    ),
    "Latent consistency (LCM)": Family(lcm, lambda pipe, steps: text(pipe, steps, original_inference_steps=50)),
    "Stable Diffusion 3": Family(tiny.sd3_pipeline, text),
    "FLUX.1": Family(flux, flux_call),
    "PixArt": Family(pixart, embedded(32, 16)),
    "Sana": Family(sana, embedded(8, 32)),
    "DiT": Family(
        tiny.dit_pipeline,
        lambda pipe, steps: pipe([1], num_inference_steps=steps, output_type="latent", generator=generator()).images,
    ),
    "Unconditional U-Net (DDPM)": Family(
        tiny.ddpm_pipeline,
        lambda pipe, steps: pipe(num_inference_steps=steps, output_type="np", generator=generator()).images,
    ),
    "hasten's own U-Net": Family(lambda: own_model(tiny.seeded(lambda: UNet(1, widths=(8, 16))))),
    "Any PyTorch module": Family(lambda: own_model(tiny.seeded(Anything))),
}


def samples(family: Family, accelerator: Any, steps: int = STEPS) -> Any:
    """Samples of a family under an accelerator; a pipeline that runs without it after all is an error."""
    thing = family.build()
    if family.call is None:
        return thing.sample(2, steps=steps, sampler="ddim", times="trailing", accelerators=[accelerator])
    call = family.call
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(without|left out|disabled).*")
        fast = hasten.accelerate(thing, [accelerator], steps=steps, calls=lambda pipe: call(pipe, steps))
        return call(fast, steps)


def sampler(family: Family) -> Any:
    thing = family.build()
    if family.call is None:
        return thing.sample(2, sampler="unipc:order=3", steps=4)
    thing.scheduler = hasten.as_scheduler("unipc:order=3", like=thing)
    return family.call(thing, 4)


def load(family: Family) -> Any:
    model = family.build()
    return (hasten.load(model) if family.call else model).sample(1, steps=2)


def caching(family: Family) -> Any:
    """DeepCache, or where that needs a U-Net encoder propagation."""
    try:
        return samples(family, "deep_cache:every=3")
    except BadInput:
        return samples(family, "encoder_propagation:keys=uniform,every=3")


def split_by_rows(family: Family) -> Any:
    """The copy of the network that a rank would run: in one process `patch_parallel` alone changes nothing."""
    from hasten.adapters.diffusers.library import network_of
    from hasten.adapters.diffusers.wrap import split_network

    thing = family.build()
    net = thing.denoiser.net if family.call is None else split_network(network_of(thing)[1])
    Patched(net, Exchange(ProcessGroup(), "sync", "full", 1, "same", 60, 0), TextVersion())
    return samples(family, "patch_parallel:mode=sync", 4)


def distil(family: Family) -> Any:
    model = family.build()
    check_models(hasten.load(model) if family.call else model, None, pick("distillers", DISTILLER), DISTILLER)


CHECKS: dict[str, Callable[[Family], Any]] = {
    "sampler": sampler,
    "load": load,
    "caching": caching,
    "quantize": lambda family: samples(family, Quantize(images=1, steps=2, groups=1, ranges="minmax"), 2),
    "compile": lambda family: samples(family, Compile(backend="eager"), 2),
    "CFG parallel": lambda family: samples(family, "cfg_parallel", 2),
    "patch parallel": split_by_rows,
    "distil": distil,
}


def matrix() -> dict[str, dict[str, str]]:
    """The table of the README: family, column, cell."""
    lines = re.findall(r"^\| (.*) \|$", README.partition("[start:support]")[2].partition("[end:support]")[0], re.M)
    head, _, *rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    assert all(len(row) == len(head) for row in rows)
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}


def test_the_matrix_names_the_families_and_columns_that_are_checked() -> None:
    table = matrix()
    assert list(table) == list(FAMILIES)
    assert all(list(row) == list(CHECKS) for row in table.values())
    for cell in (cell for row in table.values() for cell in row.values()):
        assert re.fullmatch(r"yes( \[[a-z]\])?|refused \[[a-z]\]", cell), cell


@pytest.mark.parametrize("column", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_says_what_happens(family: str, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if column == "compile" and family not in TRACED:
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    if matrix()[family][column].startswith("refused"):
        with pytest.raises(BadInput):
            CHECKS[column](FAMILIES[family])
    else:
        made = CHECKS[column](FAMILIES[family])
        assert made is None or torch.isfinite(torch.as_tensor(made)).all()
