"""Text conditions of a network (`Prompts`), and the image autoencoder of a latent one (`Latents`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from ...utils.devices import upload
from .library import short_truncation_notice

__all__ = ["Latents", "Prompts"]


class Prompts:
    """Conditions of a text-to-image network, computed by the pipeline's own `encode_prompt`.

    Args:
        pipe: the pipeline.
        size: height and width of the images in pixels, conditions of SDXL.
        negative: the prompt of guidance's unconditional branch. Default: the pipeline's.
    """

    def __init__(self, pipe: Any, size: tuple[int, int], negative: str | None = None) -> None:
        self.pipe, self.size, self.negative = pipe, size, negative

    def texts(self, n: int, prompt: Any = None) -> list[str]:
        """The prompts of n images.

        Args:
            n: images.
            prompt: one for all, or a sequence of which image k gets entry `k % len`; None means "".

        Raises:
            BadInput: for anything else.
        """
        prompts = [prompt] if prompt is None or isinstance(prompt, str) else prompt
        if (
            not isinstance(prompts, Sequence)
            or not prompts
            or not all(p is None or isinstance(p, str) for p in prompts)
        ):
            raise BadInput(f"this model takes prompts: a text or several, found {prompt!r}")
        return [prompts[k % len(prompts)] or "" for k in range(n)]

    @torch.no_grad()
    def cond(self, n: int, prompt: Any = None, seed: int = 0) -> dict[str, Tensor]:
        """The conditions of n images.

        Args:
            n: images.
            prompt: see `texts`.
            seed: not used.

        Returns:
            Each (n, ...) by name; `null_NAME` replaces NAME in guidance's unconditional branch.
        """
        texts = self.texts(n, prompt)
        known = {
            text: self._encoded(text) for text in dict.fromkeys(texts)
        }  # one by one: no prompt depends on the others
        return {key: torch.cat([known[text][key] for text in texts]) for key in known[texts[0]]}

    def to(self, device: Any) -> Prompts:
        """Move the text encoders to a device, in place."""
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            encoder = getattr(self.pipe, name, None)
            if encoder is not None and encoder.device != torch.device(device):  # transformers refuses quantised ones
                encoder.to(device)
        return self

    def _encoded(self, text: str) -> dict[str, Tensor]:
        """The conditions of one prompt, each (1, ...)."""
        encoder = getattr(self.pipe, "text_encoder", None) or self.pipe.text_encoder_2
        arguments: dict[str, Any] = {
            "prompt": text,
            "device": encoder.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            "negative_prompt": self.negative,
        }
        takes = inspect.signature(self.pipe.encode_prompt).parameters
        arguments |= {name: None for name in ("prompt_2", "prompt_3") if name in takes}
        try:
            with short_truncation_notice(text):
                output = self.pipe.encode_prompt(**arguments)
        except (TypeError, ValueError, AttributeError) as error:
            raise self._unsupported("encode_prompt", error) from error
        if not isinstance(output, tuple) or len(output) not in (2, 4):
            raise BadInput(f"{type(self.pipe).__name__}.encode_prompt returns a form that hasten does not know")
        names = ("text", "null_text", "added_text_embeds", "null_added_text_embeds")
        conditions = dict(zip(names, output))
        if hasattr(self.pipe, "_get_add_time_ids"):
            conditions |= self._sizes(conditions)
        return conditions

    def _sizes(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """SDXL's original size, crop and target size (1, 6), those of an uncropped image of this size.

        A refiner has the aesthetic score in place of the target size (1, 5), another one in the unconditional branch.
        """
        takes = inspect.signature(self.pipe._get_add_time_ids).parameters
        call = inspect.signature(type(self.pipe).__call__).parameters
        arguments: dict[str, Any] = {
            "original_size": self.size,
            "crops_coords_top_left": (0, 0),
            "target_size": self.size,
            "negative_original_size": self.size,
            "negative_crops_coords_top_left": (0, 0),
            "negative_target_size": self.size,
            "dtype": conditions["text"].dtype,
            "text_encoder_projection_dim": conditions["added_text_embeds"].shape[-1],
        }
        scores = ("aesthetic_score", "negative_aesthetic_score")
        arguments |= {name: call[name].default for name in scores if name in call}
        try:
            output = self.pipe._get_add_time_ids(**{key: value for key, value in arguments.items() if key in takes})
        except (TypeError, ValueError, AttributeError) as error:
            raise self._unsupported("_get_add_time_ids", error) from error
        names = ("added_time_ids", "null_added_time_ids")
        pairs = zip(names, output if isinstance(output, tuple) else (output,))
        return {name: ids.to(conditions["text"].device, conditions["text"].dtype) for name, ids in pairs}

    def _unsupported(self, method: str, error: Exception) -> BadInput:
        """The error for a pipeline whose method fails as hasten calls it."""
        message = " ".join(str(error).split())[:200]
        return BadInput(
            f"{type(self.pipe).__name__}.{method} cannot be called as hasten does ({type(error).__name__}: {message}): "
            "use the pipeline itself, with hasten.as_scheduler(...) or hasten.accelerate(pipe, ...)"
        )


class Latents:
    """An image autoencoder of `diffusers`: image in [-1, 1] = decode(z / scaling + shift).

    Args:
        vae: the autoencoder.
        rows: images per batch of the decoder and encoder.
        encoder: the autoencoder that encodes, where `vae` has an approximation of its encoder only.
    """

    def __init__(self, vae: Any, rows: int = 4, encoder: Any = None) -> None:
        self.vae, self.rows, self.encoder = vae, rows, encoder

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images (n, 3, H, W), float32, from latents (n, C, h, w)."""
        scale, shift = self._scales(z.float())
        z = z.float() / scale + shift
        with self._upcast():
            parts = z.to(self.vae.device, self.vae.dtype).split(self.rows)
            return torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in parts]).to(z.device)

    def pixels(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The shape (C, H, W) of the images of latents of this shape."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return int(self.vae.config.in_channels), factor * shape[1], factor * shape[2]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (n, C, h, w), float32, from images (n, 3, H, W): the mode of the posterior."""
        if self.encoder is not None:
            return Latents(self.encoder, self.rows).encode(images)
        with self._upcast():
            parts = upload(images, self.vae.device, self.vae.dtype).split(self.rows)
            outputs = [self.vae.encode(part) for part in parts]
        z = torch.cat([o.latent_dist.mode() if hasattr(o, "latent_dist") else o.latents for o in outputs]).float()
        scale, shift = self._scales(z)
        return ((z - shift) * scale).to(images.device)

    def to(self, device: Any) -> Latents:
        """Move the autoencoder to a device, in place."""
        self.vae.to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    @contextmanager
    def _upcast(self) -> Iterator[None]:
        """Within the block an autoencoder that overflows in half precision (`force_upcast`) is float32."""
        dtype = self.vae.dtype
        upcast = dtype == torch.float16 and bool(self.vae.config.get("force_upcast", False))
        if upcast:
            self.vae.to(torch.float32)
        try:
            yield
        finally:
            if upcast:
                self.vae.to(dtype)

    def _scales(self, z: Tensor) -> tuple[Any, Any]:
        """Scaling and shift: numbers, or tensors (1, C, 1, 1)."""
        config = self.vae.config
        scale, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return scale, shift
        mean, std = (torch.tensor(v, dtype=z.dtype, device=z.device).reshape(1, -1, 1, 1) for v in (mean, std))
        return scale / std, mean
