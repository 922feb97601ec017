"""hasten makes diffusion models fast, and shows on one page what each method costs and what quality is left.

    import hasten
    model = hasten.load("fashion")
    images = model.sample(16, label=9, sampler="unipc", steps=8, guidance_scale=2)

The public names below are imported when they are first used; `import hasten` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__  # noqa: F401  read as hasten.__version__

# public name: the module that defines it (`pick` and `plan` are modules that can be called)
_HOMES = {
    **dict.fromkeys(["Model"], "model"),
    **dict.fromkeys(["load"], "loading"),
    **dict.fromkeys(["BadInput", "HastenError"], "errors"),
    **dict.fromkeys(["Denoiser", "Wrapper"], "denoiser"),
    **dict.fromkeys(["Noise", "Query", "Sampler", "walk"], "sampling"),
    **dict.fromkeys(["draw"], "plan.draw"),
    **dict.fromkeys(
        ["CosineAngle", "Explicit", "Karras", "Quadratic", "TimeGrid", "Trailing", "UniformLambda", "UniformTime"],
        "times",
    ),
    **dict.fromkeys(["EDM", "VE", "Flow", "SubVP", "VPCosine", "VPLinear"], "schedules"),
    **dict.fromkeys(["Discrete", "Truncated", "rescale_zero_snr"], "schedules"),
    **dict.fromkeys(
        [
            "DDIM", "DDPM", "DEIS", "PLMS", "SNDPM", "AdaptiveSDE", "AnalyticDPM", "Consistency", "DPMSolver",
            "FastDPM", "Heun", "NoiseLevel", "Picard", "Preconditioned", "PredictorCorrector", "ProbabilityFlow",
            "SASolver", "StochasticDistilled", "UniPC", "invert",
        ],
        "samplers",
    ),
    **dict.fromkeys(["CFG", "Distribution", "DynamicThreshold", "Interval", "Rescale"], "guides"),
    **dict.fromkeys(["CCDF", "Auxiliary", "DiffuseVAE", "EarlyStop"], "starts"),
    **dict.fromkeys(["Prior", "SingDiffusion", "Temperature"], "starts"),
    **dict.fromkeys(["accelerate", "as_scheduler", "open_quantized", "times_like"], "adapters.diffusers"),
    # diffusers looks these up where a pipeline was saved with such a scheduler or network
    **dict.fromkeys(["PlanScheduler", "SchedulerMixin"], "adapters.diffusers.scheduler_class"),
    **dict.fromkeys(["MobileUNet2DConditionModel", "ModelMixin"], "adapters.diffusers.text_unet_class"),
    **dict.fromkeys(["DistillConfig", "distill_model"], "workflows.distill"),
    **dict.fromkeys(["LikelihoodConfig", "evaluate_likelihood"], "workflows.likelihood"),
    **dict.fromkeys(["QuantizeConfig", "quantize_model"], "workflows.quantize"),
    **dict.fromkeys(["tune_model"], "workflows.tune"),
    **dict.fromkeys(["Plan"], "plan"),
    **dict.fromkeys(["Ranks"], "distributed.ranks"),
    **dict.fromkeys(["sample_many"], "workflows.distribute"),
    **dict.fromkeys(["SampleRequest", "sample_to_files"], "workflows.sample"),
    **dict.fromkeys(["apply"], "workflows.apply"),
    **dict.fromkeys(["EvaluateConfig", "evaluate_model"], "workflows.evaluate"),
    **dict.fromkeys(["RestorationConfig", "evaluate_restoration"], "compare.restoration"),
    **dict.fromkeys(["ChooseConfig"], "choosing.config"),
    **dict.fromkeys(["choose"], "choosing.runner"),
    **dict.fromkeys(["TrainConfig", "train_model"], "workflows.train"),
    **dict.fromkeys(["AutoencoderConfig", "train_autoencoder"], "workflows.autoencoder"),
    **dict.fromkeys(["DecoderConfig", "distill_decoder"], "workflows.decoder"),
    **dict.fromkeys(["SamplingConfig"], "plan.config"),
}  # fmt: skip
__all__ = [
    "CCDF", "CFG", "DDIM", "DDPM", "DEIS", "EDM", "PLMS", "SNDPM", "VE", "AdaptiveSDE", "AnalyticDPM",
    "AutoencoderConfig", "Auxiliary", "BadInput", "ChooseConfig", "Consistency", "CosineAngle", "DPMSolver",
    "DecoderConfig", "Denoiser", "DiffuseVAE", "Discrete", "DistillConfig", "Distribution", "DynamicThreshold",
    "EarlyStop", "EvaluateConfig", "Explicit", "FastDPM", "Flow", "HastenError", "Heun", "Interval", "Karras",
    "LikelihoodConfig", "Model", "Noise", "NoiseLevel", "Picard", "Plan", "Preconditioned", "PredictorCorrector",
    "Prior", "ProbabilityFlow", "Quadratic", "QuantizeConfig", "Query", "Ranks", "Rescale", "RestorationConfig",
    "SASolver", "SampleRequest", "Sampler", "SamplingConfig", "SingDiffusion", "StochasticDistilled", "SubVP",
    "Temperature", "TimeGrid", "Trailing", "TrainConfig", "Truncated", "UniPC", "UniformLambda", "UniformTime",
    "VPCosine", "VPLinear", "Wrapper", "accelerate", "apply", "as_scheduler", "choose", "distill_decoder",
    "distill_model", "draw", "evaluate_likelihood", "evaluate_model", "evaluate_restoration", "invert", "load",
    "open_quantized", "pick", "plan", "quantize_model", "rescale_zero_snr", "sample_many", "sample_to_files",
    "times_like", "train_autoencoder", "train_model", "tune_model", "walk",
]  # fmt: skip

if TYPE_CHECKING:
    from .adapters.diffusers import times_like
    from .adapters.diffusers.acceleration import accelerate
    from .adapters.diffusers.quantized_pipelines import open_quantized
    from .adapters.diffusers.scheduler import as_scheduler
    from .choosing.config import ChooseConfig
    from .choosing.runner import choose
    from .compare.restoration import RestorationConfig, evaluate_restoration
    from .denoiser import Denoiser, Wrapper
    from .distributed.ranks import Ranks
    from .errors import BadInput, HastenError
    from .guides import CFG, Distribution, DynamicThreshold, Interval, Rescale
    from .loading import load
    from .model.model import Model
    from .pick import pick
    from .plan.config import SamplingConfig
    from .plan.draw import draw
    from .plan.table import Plan, plan
    from .samplers import (
        DDIM,
        DDPM,
        DEIS,
        PLMS,
        SNDPM,
        AdaptiveSDE,
        AnalyticDPM,
        Consistency,
        DPMSolver,
        FastDPM,
        Heun,
        NoiseLevel,
        Picard,
        Preconditioned,
        PredictorCorrector,
        ProbabilityFlow,
        SASolver,
        StochasticDistilled,
        UniPC,
        invert,
    )
    from .sampling import Noise, Query, Sampler, walk
    from .schedules.continuous import EDM, VE, Flow, SubVP, VPCosine, VPLinear
    from .schedules.discrete import Discrete, rescale_zero_snr
    from .schedules.truncated import Truncated
    from .starts import CCDF, Auxiliary, DiffuseVAE, EarlyStop, Prior, SingDiffusion, Temperature
    from .times import CosineAngle, Explicit, Karras, Quadratic, TimeGrid, Trailing, UniformLambda, UniformTime
    from .workflows.apply import apply
    from .workflows.autoencoder import AutoencoderConfig, train_autoencoder
    from .workflows.decoder import DecoderConfig, distill_decoder
    from .workflows.distill import DistillConfig, distill_model
    from .workflows.distribute import sample_many
    from .workflows.evaluate import EvaluateConfig, evaluate_model
    from .workflows.likelihood import LikelihoodConfig, evaluate_likelihood
    from .workflows.quantize import QuantizeConfig, quantize_model
    from .workflows.sample import SampleRequest, sample_to_files
    from .workflows.train import TrainConfig, train_model
    from .workflows.tune import tune_model


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:  # a submodule: hasten.times, hasten.exact
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
