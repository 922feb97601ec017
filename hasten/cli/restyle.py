"""`restyle`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..progress import progress
from ..storage.provenance import command_line, versions
from ._common import given_images, open_model
from ._processes import alone
from .terminal import tell

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.model import Model


@alone
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
    sampler: str | None = None,
    times: str | None = None,
    guidance_scale: float | None = None,
    encode_guidance_scale: float | None = None,
    iterations: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Turn images of one class, or one model's, into images of another that keep their layout.

    The images are encoded to noise, and the noise is decoded. Writes a PNG grid, the results below their sources.

    Args:
        encoder: The model of the images: best one that distill --method encoder made; any other is run backwards.
        decoder: The model of the results. Left out: the encoder's own model, if that can draw.
        from_label: Class of the images, by index or name; none is no class.
        to_label: Class of the results.
        out: The PNG file to write.
        images: Folder, zip, array or file of images; where they have labels, those of the class are taken.
            Left out, a model draws them.
        n: How many images.
        seed: Of the first image that is drawn; also of the noise that a stochastic sampler adds.
        encode_steps: Steps of the encoder. Left out: the model's own; so are the next three.
        decode_steps: Steps of the decoder's time grid.
        sampler: Of the decoder, such as ddim.
        times: Time grid of the decoder.
        guidance_scale: Of the decoder: more follows the class of the results more closely. Left out: the model's own.
        encode_guidance_scale: Of the encoder. Left out: 1, or the nearest that it was distilled for.
        iterations: Of solving for each step backwards, for a model that was not distilled to encode.
        batch_size: Images in the network at once.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The file, what was done, and the network evaluations that an image took.
    """
    from .. import images as pictures
    from ..errors import check_int
    from ..files import refuse_inside, reserve, write
    from ..tasks.style_transfer import is_encoder, required_labels
    from ..tasks.style_transfer import restyle as run

    check_int("n", n, 1)
    check_int("seed", seed, 0)
    if out.suffix.lower() != ".png":
        raise BadInput(f"the grid is a PNG file: --out must end in .png, got {str(out)!r}")
    refuse_inside(out, images, "--out")
    reserve(out)
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
        made = run(
            up, down, source, from_label, to_label, encode_steps, decode_steps, guidance_scale, encode_guidance_scale,
            sampler, times, iterations, seed, batch_size, tick,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    said = {
        "decoder": decoder, "from_label": from_label, "to_label": to_label, "images": images, "n": n, "seed": seed,
        "encode_steps": encode_steps, "decode_steps": decode_steps, "sampler": sampler, "times": times,
        "guidance_scale": guidance_scale, "encode_guidance_scale": encode_guidance_scale, "iterations": iterations,
    }  # fmt: skip
    text = {
        "command": command_line("restyle", encoder, said),
        "models": f"{up.name} {up.sha256}, {down.name} {down.sha256}", "versions": versions(),
    }  # fmt: skip
    write(out, pictures.png(pictures.grid(paired(source, made.images), min(n, 16)), text))
    result = {
        "file": str(out),
        **{key: str(value) if isinstance(value, Path) else value for key, value in said.items()},
        "encoder": up.name,
        "decoder": down.name,
        "encode_evaluations": made.encode_evaluations,
        "decode_evaluations": made.decode_evaluations,
        "evaluations": made.evaluations,
        "seconds": seconds,
    }
    line = f"{out}: {n} images in {made.evaluations:g} network evaluations each, {seconds:.2f} s"
    tell(result, line, json)
    return result


def of_class(path: Path, n: int, model: Model, label: str | None) -> Tensor:
    """The first `n` images of a path, (n, C, h, w) in [-1, 1]; of one class, where both have any."""
    from ..train import open_data
    from ..train.data import to_float
    from ..train.given import is_file
    from ..train.names import class_of

    known = model.classes or ()
    index = None if label is None or not known else model.class_index(label)
    if index is None or index == model.denoiser.null_label or is_file(path):
        return given_images(path, n, model.shape[0])
    data = open_data(path, split=None, channels=model.shape[0])
    if data.labels is None:
        return given_images(path, n, model.shape[0])
    own = class_of(index, known, data.classes or ())
    if own is None:
        raise BadInput(f"{path} has no class {known[index]!r}: its classes are {', '.join(data.classes or ())}")
    rows = (data.labels == own).nonzero()[:n, 0]
    if len(rows) < n:
        raise BadInput(f"{path} holds {len(rows)} images of {known[index]!r}, asked for {n}")
    return to_float(data.images(rows.tolist()))


def paired(sources: Tensor, results: Tensor, columns: int = 16) -> Tensor:
    """Rows of at most `columns` sources, each above the row of its results: (2 n, C, H, W), and white where n ends."""
    import torch

    rows = []
    for first in range(0, len(sources), columns):
        for row in (sources[first : first + columns], results[first : first + columns]):
            missing = min(columns, len(sources)) - len(row)
            rows.append(torch.cat([row, row.new_ones(missing, *row.shape[1:])]))
    return torch.cat(rows)
