"""`hasten train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ._common import processes
from ._processes import together
from .terminal import tell


@together
def train(
    data: Path,
    *,
    out: Path,
    minutes: float | None = None,
    steps: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    label: str | None = None,
    widths: str | None = None,
    blocks: int = 1,
    patch: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    label_drop: float = 0.1,
    flip: bool = False,
    accumulate: int = 1,
    shard: bool = False,
    seed: int = 0,
    runtime: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Train a model on a folder of images and save it.

    Sub-folders are classes, or a file beside the images gives them: labels.csv, metadata.csv, metadata.jsonl or
    dataset.json. What was found, and what of it is not used, is printed. Ctrl-C keeps a checkpoint; the same command
    goes on from it, also on another number of processes: under torchrun, each takes its share of every batch. Steps and
    minutes may be more than before; other images or settings are refused.

    Args:
        data: A folder or zip of images, a folder of IDX files, a .npy or a .npz.
        out: The folder of the run, in which the model is saved.
        minutes: How long to train. Without steps, 30.
        steps: How many steps to train; with minutes, whichever comes first.
        size: Crop and resize the images to this side.
        channels: 1 or 3. Left out: what the images have.
        label: The column of the file of labels (or the array of an .npz) that holds the class; folders for the class
            folders, none to train without classes.
        widths: Channels of each resolution, such as 64,128. Left out: by the size of the images.
        blocks: Residual blocks a resolution.
        patch: Side of the squares that the network takes as one pixel.
        batch_size: Images a step.
        lr: The highest learning rate.
        label_drop: Share of the labels that are dropped, so that the model can be guided.
        flip: Mirror images at random.
        accumulate: Parts of a batch that are computed one after another, to need less memory.
        shard: Divide the network among the processes that torchrun started, where it is too large for one.
        seed: Of the weights, the order of the images and the noise.
        runtime: Number format, fp32 or bf16; auto takes what is faster here. With +high (TF32 on GPUs), +medium or
            +channels_last, such as fp32+high, also the precision of matrix products and the memory layout.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The folder, and what was trained on what for how long.
    """
    from ..workflows.train import train_model

    try:
        channel_list = [int(w) for w in widths.split(",")] if widths else None
    except ValueError as e:
        raise BadInput(f"widths are whole numbers parted by commas, such as 64,128, got {widths!r}") from e
    model = train_model(
        data, out, steps=steps, minutes=minutes, size=size, channels=channels, label=label, widths=channel_list,
        blocks=blocks, patch=patch, batch_size=batch_size, lr=lr, label_drop=label_drop, flip=flip, runtime=runtime,
        seed=seed, device=str(processes(device).device), accumulate=accumulate, shard=shard,
    )  # fmt: skip
    result = {
        "folder": str(out),
        "shape": list(model.shape),
        "classes": model.classes,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        **model.card,
    }
    done = model.card["last"]
    tell(result, f"{out}: {done.get('step')} steps on {model.card['images']} images; try hasten sample {out}", json)
    return result
