"""hasten's scheduler in the pipelines of `diffusers`: all are read, those that can be are run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.adapters.diffusers import as_scheduler
from hasten.errors import BadInput
from hasten.schedules import Flow

from . import tiny, walk
from .tiny_pipelines import STEPS, TRIED, both, noise, picture

DOCS = Path(__file__).parents[2] / "docs" / "pipelines.md"


@pytest.mark.parametrize("name", TRIED)
def test_a_tiny_pipeline(name: str) -> None:
    """Euler at times="like" is the pipeline under its own scheduler; a multistep sampler at own times runs."""
    one = TRIED[name]
    pipe = one.build(name)
    own = pipe.scheduler
    theirs, visited = one.sample(pipe), own.timesteps.float()
    pipe.scheduler = as_scheduler("ddim", "like", like=own)
    ours = one.sample(pipe)
    assert pipe.scheduler.timesteps.shape == visited.shape
    assert torch.allclose(pipe.scheduler.timesteps, visited, atol=2e-3)
    assert float((ours - theirs).abs().max()) < 2e-5 * float(theirs.abs().max()) and float(theirs.std()) > 1e-3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this pipeline gives its own sigmas")
        if name in OWN_SIGMAS:  # which are no function of the number of steps alone
            warnings.simplefilter("ignore")
        pipe.scheduler = as_scheduler("unipc:order=3", "angle", like=own)
        mine = one.sample(pipe)
    assert torch.isfinite(mine).all() and not torch.allclose(mine, theirs, atol=1e-4)
    if name in OWN_SIGMAS:
        assert torch.allclose(pipe.scheduler.timesteps, visited, atol=2e-3)
        pipe.scheduler = as_scheduler("unipc:order=3", "angle", like=own, override_sigmas=True)
        one.sample(pipe)
    assert not torch.allclose(pipe.scheduler.timesteps, visited, atol=1.0)


OWN_SIGMAS = ("MochiPipeline",)


def test_every_pipeline_sets_its_time_steps() -> None:
    """The calls of all pipelines that are not refused, with their default sigmas and mu, raise nothing."""
    found = walk.pipelines()
    assert len(found) >= 250 or not installed()
    given = [one for one in found if re.search(r"\b(mu|sigmas)\b", " ".join(one.calls))]
    assert len(given) > 100 or not installed()
    done = 0
    for one in walk.distinct().values():
        for dynamic in sorted({False, "mu" in " ".join(one.calls)}):
            for scheduler in walk.replay(one, dynamic):
                assert len(scheduler.timesteps) > 0 and bool((scheduler.timesteps.diff() < 0).all()) is not (
                    scheduler.spec.inverted
                ), one.name
                done += 1
    assert done > 100 or not installed()


def installed() -> bool:
    """Whether diffusers is the version that the table was made with."""
    import diffusers

    return f"diffusers {diffusers.__version__}" in DOCS.read_text()


def test_the_table_of_the_docs_is_true() -> None:
    if not installed():
        pytest.skip("the table is of another version of diffusers")
    text = DOCS.read_text()
    assert walk.table() in text, "run python -m tests.adapters.walk"
    refused = [one for one in walk.pipelines() if walk.refusal(one)]
    tried = [one for one in walk.pipelines() if one.name in TRIED or one.name in walk.ELSEWHERE]
    said = re.search(r"(\d+) pipelines .*?(\d+) are tried.*?(\d+) are refused", text, re.S)
    assert said is not None
    assert [int(number) for number in said.groups()] == [len(walk.pipelines()), len(tried), len(refused)]


def test_pipelines_of_other_tests() -> None:
    names = {one.name for one in walk.pipelines()}
    for name, file in walk.ELSEWHERE.items():
        assert name in (Path(__file__).parent / file).read_text() and (name in names or not installed())


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_base_and_refiner(sampler: str) -> None:
    """SDXL's `denoising_end` and `denoising_start`: a one-step sampler divided in two is the whole; one with history
    begins anew in the second pipeline."""
    base, refiner = TRIED["StableDiffusionXLPipeline"], TRIED["StableDiffusionXLImg2ImgPipeline"]
    first, second = base.build("StableDiffusionXLPipeline"), refiner.build("StableDiffusionXLImg2ImgPipeline")
    prompt = both(prompt_embeds=noise(1, 5, 32), pooled_prompt_embeds=noise(1, 16))
    size: dict[str, Any] = {"original_size": (16, 16), "target_size": (16, 16), "guidance_scale": 3.0}
    for pipe in (first, second):
        pipe.scheduler = as_scheduler(sampler, "trailing", like=pipe)
    whole = base.sample(first, 6, **prompt, **size)
    half = base.sample(first, 6, denoising_end=0.5, **prompt, **size)
    rest = {"image": half, "denoising_start": 0.5, "strength": 0.3}
    result = refiner.sample(second, 6, **prompt, **size, **rest)
    assert second.scheduler.begin_index == 3 and second.scheduler.step_index == 6
    close = torch.allclose(result, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    assert close is (sampler == "ddim")
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image_of_a_flow(strength: float) -> None:
    """FLUX: the begin index, the noise level of the image, and the steps of the pipeline's own scheduler."""
    one = TRIED["FluxImg2ImgPipeline"]
    pipe = one.build("FluxImg2ImgPipeline")
    theirs = one.sample(pipe, 10, strength=strength, image=picture())
    begin = pipe.scheduler.begin_index
    pipe.scheduler = as_scheduler("ddim", "like", like=pipe)
    ours = one.sample(pipe, 10, strength=strength, image=picture())
    assert torch.allclose(ours, theirs, atol=1e-5) and pipe.scheduler.begin_index == begin


def test_what_is_refused_says_so() -> None:
    import diffusers

    table = tiny.scheduler("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(BadInput, match="timestep_type 'continuous'"):
        as_scheduler("ddim", like=table)
    for name in ("EDMEulerScheduler", "DDPMWuerstchenScheduler", "HeliosScheduler"):
        with pytest.raises(BadInput, match=name):
            as_scheduler("ddim", like=getattr(diffusers, name)())


def test_sigmas_that_rise() -> None:
    """Stable Audio 3 from a sound: the level of its latents comes first, and a higher one after it has no step."""
    scheduler = as_scheduler("unipc", like=diffusers_flow())
    with pytest.warns(UserWarning, match="its own sigmas"):
        scheduler.set_timesteps(sigmas=[0.9, 0.967, 0.8, 0.4])
    assert torch.allclose(scheduler.sigmas, torch.tensor([0.9, 0.8, 0.4, 0.0]), atol=1e-6)
    with pytest.raises(BadInput, match="sigmas must decrease"):
        scheduler.set_timesteps(sigmas=[0.0, 0.3, 0.6, 1.0])
    assert scheduler.hasten_schedule == Flow(1.0) and STEPS == 4


def diffusers_flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()
