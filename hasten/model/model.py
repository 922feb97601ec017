"""`Model`: a denoiser and what a user needs beside it; `storage` reads and writes its folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import zoo
from ..accelerators import Call
from ..accelerators._calls import model_calls
from ..adapters.diffusers.autoencoders import replace_decoder
from ..denoiser import Denoiser, device_of
from ..errors import BadInput, check_int
from ..guides.cfg import with_step_count
from ..nets.prequantized import check_movable
from ..performance.autotune import autotune, format_runtime, parse_runtime
from ..plan.config import SamplingConfig
from ..plan.table import Plan
from ..sampling import Callback, Progress
from ..storage import model_folder
from ..storage.lora_files import LoRAFile
from ..train.names import class_index, label_indices
from ..utils.devices import upload
from ..utils.random import MAX_SEED, Noise
from .first_evaluation import FirstEvaluation
from .lora import load_lora_weights
from .residual import decode_residual, encode_residual
from .resolve import Resolved, accelerate_model, guided, resolve
from .sample_batches import sample_batches
from .sources import source_images
from .weak import fields_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..plan.config import SamplingOptions

Label: TypeAlias = int | str | Sequence[int | str] | Tensor | None


@dataclass
class Model:
    """A denoiser plus what a user needs: shape, classes, recommended sampling, card.

    denoiser: `forward(x_t (B, C, H, W), t, label=) -> x0 (B, C, H, W)`.
    shape: `(C, H, W)` of one sample. classes: class names in label order, or None for an unconditional model.
    codec: what a sample is: `image`, pixels in [-1, 1]; `latent`, of an autoencoder; `residual`, what an enlarged
        source image lacks, over `residual_std` (super-resolution); `raw`, anything else, which is left as it is
        (points, audio, video): what a shape other than (C, H, W), C of 1, 3 or 4, is taken for.
    sampler, times, steps, guidance_scale, start: what `sample` uses by default, as `pick` reads them.
    plan: what `sample` uses by default in their place. plans: further ones, by name.
    statistics, parts: tensors measured on the model and small networks beside it, by name: what tuning leaves for the
        methods that need it.
    conditioning: of a model that takes prompts where others take labels: `cond(n, prompt, seed)` gives what the network
        is conditioned on (n, ...). decoder: of a model of latents: `decode(samples)` gives the images.
    pipeline: of diffusers, with which the network was loaded and can be saved again.
    calibration_prompts: of a model that takes prompts: those on which accelerators are calibrated; none: the empty one.
    calibration_sources: of a model that reads source images: those (n, C, H, W) in [-1, 1] on which it is calibrated.
    card: anything JSON about training, data, figures and licence.
    sha256: of the weights file that the model was loaded from or saved to.
    """

    denoiser: Denoiser
    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None = None
    codec: str = "image"
    sampler: str = "unipc"
    times: str = "angle"
    steps: int = 16
    guidance_scale: float = 1.0
    plan: Plan | None = None
    card: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, nn.Module] = field(default_factory=dict)
    conditioning: Any = None
    decoder: Any = None
    pipeline: Any = None
    calibration_prompts: tuple[str, ...] = ()
    calibration_sources: Tensor | None = None
    start: str | None = None
    residual_std: float | None = None
    _accelerated: dict[Any, nn.Module] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.codec == "image" and (len(self.shape) != 3 or self.shape[0] not in (1, 3, 4)):
            self.codec = "raw"

    @property
    def source_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of the source images that each sample is made from: of a bridge, and of a network that reads them;
        None where samples are made from noise alone."""
        channels = int(getattr(self.denoiser, "source_channels", 0))
        if channels:
            return (channels, *(side // self.source_factor for side in self.shape[1:]))
        return self.shape if self.denoiser.schedule.bridge else None

    @property
    def source_factor(self) -> int:
        """How many times larger than its source image a sample is; 1 but for super-resolution."""
        return int(getattr(self.denoiser, "source_factor", 1))

    def encode(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Samples as the process has them, (n, C, H, W): of images in [-1, 1] with the codec `residual`
        `(x - enlarge(source)) / residual_std`, otherwise `x`."""
        return encode_residual(x, source, self.source_factor, self.residual_std) if self.codec == "residual" else x

    def decode(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Images of samples of the process: the inverse of `encode`; of latents by the decoder."""
        if self.codec == "residual":
            return decode_residual(x, source, self.source_factor, self.residual_std)
        return x if self.decoder is None else self.decoder.decode(x)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.denoiser)

    def to(self, device: str | torch.device) -> Model:
        """The same model with its weights moved.

        Raises:
            BadInput: for a network that bitsandbytes quantised, which stays where it is.
        """
        check_movable(self.denoiser, device)
        parts = {name: net.to(device) for name, net in self.parts.items()}
        beside = {
            key: one and one.to(device) for key, one in (("conditioning", self.conditioning), ("decoder", self.decoder))
        }
        return replace(self, denoiser=self.denoiser.to(device), parts=parts, **beside)

    def with_decoder(self, folder: str | Path) -> Model:
        """The same model of latents with another image decoder, such as a light one (`distill_decoder`).

        Args:
            folder: of an autoencoder of diffusers with the same encoder, or of an `AutoencoderTiny`; or the name of a
                bundled one.

        Raises:
            BadInput: for a model without an autoencoder, and for an autoencoder of other latents.
        """
        if self.decoder is None:
            raise BadInput(f"{self.name} is no model of latents: it has no image decoder to replace")
        decoder, pipeline = replace_decoder(self.decoder, self.pipeline, zoo.find_file(folder))
        return replace(self, decoder=decoder, pipeline=pipeline)

    def with_first_evaluation(
        self, teacher: Model, guidance_scale: float | None = None, teacher_guidance_scale: float = 1.0
    ) -> Model:
        """This few-step student with its first evaluation by its teacher, which restores diversity within a prompt or
        class for the cost of one evaluation of the teacher.

        Args:
            teacher: of the same samples, conditions and noise schedule.
            guidance_scale: of the student; None: this model's. Of the result it cannot be changed.
            teacher_guidance_scale: of the teacher; 1: without guidance. Its guided answer to pure noise is nearly the
                same picture for every seed, which restores no diversity, and costs two evaluations.

        Raises:
            BadInput: for another schedule, shape or other classes, and for a student of one step, which would have no
                evaluation left.

        References:
            Gandikota, Bau 2025, arXiv:2503.10637.
        """
        scale = float(self.guidance_scale if guidance_scale is None else guidance_scale)
        if (teacher.shape, teacher.classes) != (self.shape, self.classes):
            raise BadInput(f"{teacher.name} draws other images or classes than {self.name}: it cannot be its teacher")
        if self.steps < 2:
            raise BadInput(f"{self.name} has one step, which would be the teacher's alone: it needs two or more")
        student = with_step_count(self.guided(scale), self.steps)
        first = teacher.guided(teacher_guidance_scale)
        denoiser: Any = FirstEvaluation(student, first, scale)
        return replace(self, denoiser=denoiser.eval(), guidance_scale=scale)

    def labels(self, n: int, label: Label = None) -> Tensor | None:
        """Labels of `n` images, `(n,)` int64: None for an unconditional model, and for one that takes prompts.

        label: one class for all images: its name in any case, or its index (a number that is the name of a class is
            that name); a sequence, of which image k gets entry `k % len`; `"none"`: no class, the label that guidance
            calls unconditional; a tensor of integers: indices, as the network takes them; None: class `k % C`.
        Raises BadInput for a label that the model does not have.
        """
        if self.conditioning is not None:
            return None
        if self.classes is None:
            if label is not None:
                raise BadInput(f"{self.name} has no classes, so label={label!r} means nothing to it")
            return None
        return label_indices(n, label, self.classes, self.denoiser.null_label, self.name)

    def conditions(self, n: int, label: Label = None, seed: int = 0) -> dict[str, Tensor]:
        """The conditions of `n` samples, each (n, ...): their labels, or the embeddings of their prompts."""
        if self.conditioning is not None:
            cond = self.conditioning.cond(n, label, seed)
            return {key: upload(value, self.device) for key, value in cond.items()}
        labels = self.labels(n, label)
        return {} if labels is None else {"label": upload(labels, self.device)}

    def cond(self, n: int) -> dict[str, Tensor]:
        """All conditions of the denoiser for `n` samples: also the guidance scale and step count of a student."""
        cond = self.conditions(n)
        if self.denoiser.net_takes_guidance:
            cond["guidance"] = torch.full((n,), float(self.guidance_scale), device=self.device)
        if self.denoiser.source_channels and self.source_shape is not None:
            cond["source"] = torch.zeros(n, *self.source_shape, device=self.device)
        if self.denoiser.step_counts is not None:
            cond["steps"] = torch.full((n,), self.denoiser.step_counts[0], device=self.device)
        return cond

    def class_index(self, label: int | str) -> int:
        """The index of a class given by name in any case, or by index where no class is named by a number; of "none"
        the null label."""
        return class_index(label, self.classes or (), self.denoiser.null_label, self.name)

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        label: Label = None,
        seed: int = 0,
        config: SamplingConfig | Resolved | None = None,
        *,
        batch_size: int = 64,
        images: Any = None,
        noise: Tensor | Noise | None = None,
        progress: Progress | None = None,
        callback: Callback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Tensor:
        """`n` images, `(n, C, H, W)` float32 in [-1, 1], on the CPU; other samples (see `codec`) as `(n, *shape)`.

        Image k depends on `seed + k` and its label alone, not on `n` or `batch_size` (but under a guide that steers a
        whole batch, which says so).

        Args:
            label: see `labels`.
            seed: of image 0, from 0 to 2^64 - n; image k uses `seed + k`.
            config: how to sample; None: as the model recommends, in fp32.
            batch_size: images in the network at once.
            images: (n, ...), what an initialisation such as `ccdf` begins from, or the sources of a bridge and of a
                network that reads them (`source_shape`): a tensor or NumPy array, floats in [-1, 1] or uint8, or PIL
                images. A network of super-resolution takes small images of other sizes than `source_shape` too, and
                its samples are then larger or smaller than `shape`.
            noise: (n, C, H, W), the initial standard normal noise in place of that of the seeds; or a `Noise` of n
                samples, which gives that of the steps too.
            progress: called with (model evaluations done, of how many).
            callback: called after each model evaluation as `callback(step, t, x, x0)`, for one batch after the other;
                see `walk`.
            options: fields of `SamplingConfig`, which take the place of those of `config`: `sampler="unipc"`,
                `steps=8`, `guidance_scale=2`, ...

        Raises:
            BadInput: for a value that cannot be, with the nearest that can.
        """
        n, batch_size = check_int("n", n, 1, 10**8), check_int("batch_size", batch_size, 1)
        seed = check_int("seed", seed, 0, MAX_SEED + 1 - n)
        if self.card.get("distilled", {}).get("figures", {}).get("direction") == "encode":
            raise BadInput(f"{self.name} encodes images into noise and draws none: see hasten restyle")
        resolved = self.resolve(config, batch_size=min(n, batch_size), **options)
        images = source_images(self, n, images, resolved.start)
        return sample_batches(self, resolved, n, label, seed, batch_size, images, noise, progress, callback)

    def resolve(
        self,
        config: SamplingConfig | Resolved | None = None,
        *,
        batch_size: int = 64,
        **options: Unpack[SamplingOptions],
    ) -> Resolved:
        """What a config amounts to for this model: methods bound to it, the plan compiled, the precision chosen.

        Args:
            config: None: what the model recommends. Of a `Resolved`, nothing is done again.
            batch_size: for which `precision="auto"` is timed.
            options: fields of `SamplingConfig`, in place of those of `config`.

        Raises:
            BadInput: for what cannot be, with the nearest that can.
        """
        if isinstance(config, Resolved):
            if config.base is not self.denoiser:
                raise BadInput(f"the config was resolved for another model than {self.name}")
            if not options:
                return config
            config = config.config
        config = SamplingConfig.of(config, options)
        precision = self.precision_for(config.precision or "fp32", batch_size)
        return resolve(
            self,
            config,
            precision,
            lambda methods, plan, how: accelerate_model(self, methods, plan, how, self._accelerated),
            self._generator,
        )

    def _generator(self, name: str) -> Model:
        """The model of this name, whose images a start begins from, on the same device."""
        other = "of a pipeline pass a function: EarlyStop(generator=lambda latents, **cond: images)"
        found = Model(**fields_of("early_stop", name, other)).to(self.device)
        if found.shape != self.shape or found.classes not in (None, self.classes):
            raise BadInput(f"early_stop: {name} draws other images or classes than {self.name}")
        return found

    def calls(
        self, n: int, seed: int, config: SamplingConfig | None = None, **options: Unpack[SamplingOptions]
    ) -> list[Call]:
        """What the plain network is given, call by call, when n images are sampled at once with this config."""
        return model_calls(self, n, seed, {"config": config, **options})

    def guided(self, guidance_scale: float | None = None, guides: Sequence[Any] = ()) -> nn.Module:
        """The denoiser under classifier-free guidance (None: the recommended scale) and then other guides."""
        return guided(self, self.denoiser, guidance_scale, guides)

    def precision_for(self, precision: str = "auto", batch_size: int = 64) -> str:
        """`auto` as what a timing of this network on this device found fastest; anything else as it is spelled.

        Args:
            precision: `fp32` or `bf16` (autocast), with `+medium` (matrix products) and `+channels_last` as wanted.
            batch_size: The timing is done once for a network, device and power of two that it reaches, and cached.
        """
        if precision != "auto":
            return format_runtime(parse_runtime(precision))
        size = 2 ** (batch_size.bit_length() - 1)
        x = torch.randn((size, *self.shape), generator=torch.Generator().manual_seed(0)).to(self.device)
        cond: dict[str, Any] = self.cond(size)
        return format_runtime(autotune(self.denoiser, x, self.sha256 or str(self.denoiser.net), **cond))

    def runtime_for(self, runtime: str = "auto", batch_size: int = 64) -> str:
        """Deprecated: `precision_for`."""
        warnings.warn("Model.runtime_for is now called precision_for", DeprecationWarning, stacklevel=2)
        return self.precision_for(runtime, batch_size)

    def way(self, *arguments: Any, **options: Any) -> Resolved:
        """Deprecated: `resolve`."""
        warnings.warn("Model.way is now called resolve", DeprecationWarning, stacklevel=2)
        names = ("sampler", "times", "steps", "guidance_scale", "guides", "start", "plan", "accelerators")
        return self.resolve(None, **{**dict(zip(names, arguments)), **options})

    def setting(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Deprecated: `resolve(...).settings()`."""
        warnings.warn("Model.setting is now resolve(...).settings()", DeprecationWarning, stacklevel=2)
        names = ("sampler", "times", "steps", "guidance_scale", "runtime", "batch_size", "guides", "start", "plan")
        values = {**dict(zip((*names, "accelerators"), arguments)), **options}
        return self.resolve(None, **values).settings()

    def save(self, folder: str | Path, half: bool = False, components_from: str | Path | None = None) -> Path:
        """Write the model's folder: model.json, weights.safetensors, and what it has of plans, statistics and parts.

        A new folder appears whole or not at all. In a folder that is there (a training run's), the files take their
        names one by one, the description last, and nothing else in it is touched.

        Args:
            folder: to write.
            half: weights as float16; those of a pipeline stay as they are: `model.pipeline.to(torch.float16)`.
            components_from: a bundled pipeline or the folder of one, such as the teacher of a student. Components that
                are the same there (text encoders, autoencoder) are left out, and taken from there by `hasten.load`,
                which checks that they have not changed.

        Returns:
            The folder.

        Raises:
            BadInput: where the model cannot be saved, and for a base that has none of its components.
        """
        return model_folder.save(self, Path(folder), half, components_from)

    def with_lora(self, lora: str | Path | LoRAFile | Sequence[str | Path | LoRAFile], scale: float = 1.0) -> Model:
        """A copy with LoRAs merged into its weights; that of a student brings its steps, sampler and guidance scale.

        Args:
            lora: a safetensors file in the layout of diffusers and peft or with kohya's names, or several; a file may
                be followed by its scale, `"style.safetensors:0.7"`.
            scale: factor of the change of the weights, for files that name none.

        Raises:
            BadInput: for a LoRA of another model, one with parts that this model has no place for, and the LoRA of a
                student where the model is a student.
        """
        return load_lora_weights(self, lora, scale)

    def describe(self) -> dict[str, Any]:
        """What `model.json` holds, but for the hashes of the files, which are known once they are written."""
        return model_folder.model_description(self)
