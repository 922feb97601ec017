"""`restyle`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..progress import progress
from ..storage.provenance import command_line, versions
from ._common import open_model, sampling_config
from ._processes import on_main_process
from .terminal import print_result

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.model import Model
    from ..plan.config import SamplingConfig


@on_main_process
def restyle(
    encoder: str,
    decoder: str | None = None,
    *,
    from_label: str | None = None,
    to_label: str | None = None,
    out: Path = Path("restyled.png"),
    images: Path | None = None,
    n: int = 8,
    seed: int = 0,
    encode_steps: int | None = None,
    decode_steps: int | None = None,
    config: Path | None = None,
    sampler: str | None = None,
    times: str | None = None,
    guidance_scale: float | None = None,
    encode_guidance_scale: float | None = None,
    iterations: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Style transfer: turn images of one class, or one model's, into images of another with the same layout.

    The images are encoded to noise by DDIM inversion or a distilled encoder, and the noise is decoded. Writes a PNG
    grid, the results below their sources.

    Args:
        encoder: The model of the images: best a student of distill --method encoder; any other is inverted.
        decoder: The model of the results. Default: the encoder's own model, unless it is a distilled encoder.
        from_label: Class of the images, by index or name; none is no class.
        to_label: Class of the results.
        out: The PNG file to write.
        images: Folder, zip, array or file of images; where they have labels, those of the class are used.
            Default: samples of the model.
        n: Number of images.
        seed: Of the first image that is sampled; also of the noise that a stochastic sampler adds.
        encode_steps: Number of steps of the encoder. Default: the model's own, as for the next three.
        decode_steps: Number of steps of the decoder's time grid.
        config: A SamplingConfig file (TOML or JSON) of the decoder; the options here override its fields.
        sampler: Of the decoder, such as ddim.
        times: Time grid of the decoder.
        guidance_scale: Scale of classifier-free guidance of the decoder. Default: the model's recommended one.
        encode_guidance_scale: Of the encoder. Default: 1, or the nearest that it was distilled for.
        iterations: Fixed-point iterations of each inversion step, for a model that was not distilled to encode.
        batch_size: Images in the network at once.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        json: Print the result as JSON.

    Returns:
        The file, what was done, and the network evaluations that an image took.
    """
    from .. import images as pictures
    from ..errors import check_int
    from ..files import check_writable, refuse_inside, write_file
    from ..tasks.style_transfer import RestyleConfig, is_encoder, required_labels
    from ..tasks.style_transfer import restyle as run

    check_int("n", n, 1)
    check_int("seed", seed, 0)
    if out.suffix.lower() != ".png":
        raise BadInput(f"the grid is a PNG file: --out must end in .png, got {str(out)!r}")
    refuse_inside(out, images, "--out")
    check_writable(out)
    how = decoder_config(config, sampler=sampler, times=times, steps=decode_steps, guidance_scale=guidance_scale)
    decode_steps, sampler, times, guidance_scale = how.steps, how.sampler, how.times, how.guidance_scale
    up = open_model(encoder, device)
    down = up if decoder is None else open_model(decoder, device)
    if is_encoder(down):
        raise BadInput(f"{down.name} can only encode: name the model that decodes, {encoder} MODEL")
    for model, label, name in ((up, from_label, "--from-label"), (down, to_label, "--to-label")):
        required_labels(model, 1, label, name)
    if images is not None:
        source = of_class(images, n, up, from_label)
    elif is_encoder(up) and up.classes != down.classes:
        raise BadInput(f"{down.name} does not draw what {up.name} encodes: give --images")
    else:
        source = (down if is_encoder(up) else up).sample(n, from_label, seed, batch_size=batch_size)
    began = time.perf_counter()
    with progress(f"restyling {n} images") as tick:
        request = RestyleConfig(
            encode_steps,
            decode_steps,
            guidance_scale,
            encode_guidance_scale,
            sampler,
            times,
            iterations,
            seed,
            batch_size,
        )
        result = run(up, down, source, from_label, to_label, request, progress=tick)
    seconds = time.perf_counter() - began
    options = {
        "decoder": decoder, "from_label": from_label, "to_label": to_label, "images": images, "n": n, "seed": seed,
        "encode_steps": encode_steps, "decode_steps": decode_steps, "sampler": sampler, "times": times,
        "guidance_scale": guidance_scale, "encode_guidance_scale": encode_guidance_scale, "iterations": iterations,
    }  # fmt: skip
    text = {
        "command": command_line("restyle", encoder, options),
        "models": f"{up.name} {up.sha256}, {down.name} {down.sha256}", "versions": versions(),
    }  # fmt: skip
    write_file(
        out,
        pictures.encode_png(
            pictures.make_image_grid(pictures.interleave_rows(source, result.images), min(n, 16)), text
        ),
    )
    summary = {
        "file": str(out),
        **{key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "encoder": up.name,
        "decoder": down.name,
        "encode_evaluations": result.encode_evaluations,
        "decode_evaluations": result.decode_evaluations,
        "evaluations": result.evaluations,
        "seconds": seconds,
    }
    line = f"{out}: {n} images in {result.evaluations:g} network evaluations each, {seconds:.2f} s"
    print_result(summary, line, json)
    return summary


def decoder_config(file: Path | None, **options: Any) -> SamplingConfig:
    """The config of the decoder. Raises BadInput for what style transfer does not use."""
    config = sampling_config(file, None, **options)
    for name in ("guides", "start", "plan", "accelerators", "precision"):
        if getattr(config, name):
            raise BadInput(f"{file}: restyle uses no {name}: remove it")
    return config


def of_class(path: Path, n: int, model: Model, label: str | None) -> Tensor:
    """The first `n` images of a path, (n, C, h, w) in [-1, 1]; of one class, where both have any."""
    from ..train import open_data
    from ..train.data import to_float
    from ..train.names import class_of
    from ..train.start_images import is_image_file, read_images

    known = model.classes or ()
    index = None if label is None or not known else model.class_index(label)
    if index is None or index == model.denoiser.null_label or is_image_file(path):
        return read_images(path, n, model.shape[0])
    data = open_data(path, split=None, channels=model.shape[0])
    if data.labels is None:
        return read_images(path, n, model.shape[0])
    own = class_of(index, known, data.classes or ())
    if own is None:
        raise BadInput(f"{path} has no class {known[index]!r}: its classes are {', '.join(data.classes or ())}")
    rows = (data.labels == own).nonzero()[:n, 0]
    if len(rows) < n:
        raise BadInput(f"{path} holds {len(rows)} images of {known[index]!r}, asked for {n}")
    return to_float(data.images(rows.tolist()))
