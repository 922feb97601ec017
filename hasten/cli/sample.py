"""`sample` and `train`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BadInput, NonFinite
from ..files import holds_lock, refuse_inside
from ..progress import progress
from ..storage.provenance import command_line, versions
from ._common import given_images, hint, label_list, open_shared, processes, warn
from ._processes import together
from .terminal import tell


@together
@holds_lock("out", only="single")
def sample(
    model: str,
    *,
    out: Path = Path("samples.png"),
    n: int = 16,
    label: str | None = None,
    seed: int = 0,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guide: list[str] | None = None,
    start: str | None = None,
    plan: str | None = None,
    images: Path | None = None,
    mask: Path | None = None,
    accelerate: list[str] | None = None,
    single: bool = False,
    columns: int | None = None,
    batch_size: int = 64,
    runtime: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Draw images from a model into a PNG grid that says inside how it was made.

    The same arguments give the same file. Image k depends on its own seed and label, not on n or batch_size, up to
    the rounding of the number format. Under torchrun, several processes share the batches, and make the same file,
    but for accelerators with which they share an image.

    Args:
        model: A bundled name (see models), a folder, or the folder or hub id of a diffusers pipeline.
        out: The PNG file to write; with single, the folder.
        n: How many images.
        label: Class name or index, or several separated by commas, taken in turn; none is no class. A number that is
            the name of a class is that class. Left out, all classes take turns. Of a model of prompts: the prompt.
        seed: Of the first image; image k has seed + k.
        sampler: Such as ddim, unipc or dpm:order=2,sde=true. Left out: the model's own choice, as for the next three.
        times: Time grid, such as uniform, lambda, trailing or karras:rho=7.
        steps: Steps of the time grid.
        guidance_scale: 1 is the plain conditional model; more follows the class more closely and costs twice.
        guide: A further guide, such as distribution:classes=uniform or interval:low=0.2; may be given several times.
        start: Where sampling begins, such as ccdf:time=0.3. Left out: at noise.
        plan: A plan of the model by name, or a plan's .json file, in place of sampler, times and steps.
        images: Folder, zip or array of images, or one image, that the start begins from.
        mask: For inpainting: an image, or as many as are sampled, whose white pixels are filled in. Left out: where the
            images are transparent.
        accelerate: What makes an evaluation cheaper, such as encoder_propagation or quantize:weights=8; may be given
            several times.
        single: Write one file an image, named by its seed.
        columns: Images in a row of the grid. Left out: one of each class where all classes take turns, else a square.
        batch_size: Images in the network at once.
        runtime: Number format of the network, fp32 or bf16; auto times them on this machine once.
        device: auto, cpu, cuda or cuda:1. auto takes the GPU if there is one.
        json: Print the result as JSON.

    Returns:
        What was done: files, settings, seeds, labels, seconds.
    """
    from .. import images as pictures
    from ..errors import check_int
    from ..files import check_writable, write_file
    from ..workflows.sample import kept, sample_many, sharing

    check_int("n", n, 1)
    check_int("batch_size", batch_size, 1)
    if out.suffix.lower() != ".png" and not single:
        raise BadInput(f"the grid is a PNG file: --out must end in .png, got {str(out)!r} (or --single and a folder)")
    refuse_inside(out, images, "--out")
    check_writable(out / "0.png" if single else out)
    ranks = processes(device)
    loaded = open_shared(model, ranks, sound=False)
    if loaded.codec == "raw":
        raise BadInput(
            f"{loaded.name} makes samples of shape {loaded.shape}, which are no images: "
            "draw them in Python, hasten.load(folder).sample(n)"
        )
    chosen = label_list(loaded, label)
    labels = loaded.labels(n, chosen)
    if loaded.conditioning is not None and label is None and ranks.is_main_process:
        warn(f"{loaded.name} takes a prompt and is given none: --label TEXT is what to draw; the empty prompt is used")
    asked: dict[str, Any] = {"guides": tuple(guide or ()), "start": start, "plan": plan}
    asked["accelerators"] = tuple(accelerate or ())
    size = min(n, batch_size)
    setting = loaded.setting(sampler, times, steps, guidance_scale, "fp32", size, **asked)
    setting["runtime"] = ranks.on_main_process(lambda: loaded.runtime_for(runtime, size))
    if mask is not None and images is None:
        raise BadInput("a mask belongs to --images, of which it says what to fill in")
    given = None if images is None else given_images(images, n, loaded.shape[0], start, mask)
    folder = (out if single else out.parent) / f".{'images' if single else out.name}.kept"
    keep = kept(folder, ranks, loaded, n, chosen, seed, batch_size, setting, given)
    shared = sharing(asked["accelerators"], ranks) is not None
    if ranks.world == 1 and sharing(asked["accelerators"], replace(ranks, world=2)) is not None:
        warn("what shares an image among processes does nothing in one: start several with torchrun")
    if not shared:
        hint(ranks, n, batch_size)
    began = time.perf_counter()
    with progress(f"sampling {n} images") as tick:
        try:
            x = sample_many(
                loaded, n, chosen, seed, batch_size, **setting, ranks=ranks, keep=keep, progress=tick, images=given
            )
        except NonFinite as e:
            if single or e.images is None or e.images.ndim != 4 or not ranks.is_main_process:
                raise
            write_file(
                out,
                pictures.encode_png(
                    pictures.make_image_grid(pictures.mark_non_finite(e.images), columns), {"failed": str(e)}
                ),
            )
            raise NonFinite(f"{e} ({out} has a cross in their place)") from e
    seconds = time.perf_counter() - began
    if x is None:  # the first process has them all
        ranks.barrier()
        if keep is not None:
            keep.clear()
        return {}
    flags = {"guides": "guide", "accelerators": "accelerate"}
    told = {flags.get(key, key): value for key, value in setting.items()}
    said = {"label": label, **told, "images": images, "mask": mask, "n": n, "seed": seed, "single": single}
    said["columns"] = columns
    if columns is None and chosen is None and loaded.classes is not None and n > len(loaded.classes):
        columns = len(loaded.classes)
    text = {
        "command": command_line("sample", model, said),
        "model": f"{loaded.name} {loaded.sha256}",
        "versions": versions(),
    }
    text |= {"processes": str(ranks.world)} if shared else {}  # which may differ in the last digits, or by more

    def made(first: int, last: int) -> dict[str, str]:
        """What the file says inside; nothing of when and where, so that the same arguments give the same bytes."""
        span = f"{seed + first}" if first == last else f"{seed + first}-{seed + last}"
        told = [] if labels is None else labels[first : last + 1].tolist()
        return {**text, "seeds": span, "labels": ",".join(map(str, told))}

    if single:
        whole_files = ((seed + k, pictures.encode_png(pictures.to_pil(x[k]), made(k, k))) for k in range(n))
        files = [write_file(out / f"{number:06d}.png", data) for number, data in whole_files]
    else:
        files = [write_file(out, pictures.encode_png(pictures.make_image_grid(x, columns), made(0, n - 1)))]
    ranks.barrier()
    if keep is not None:
        keep.clear()
    result = {
        "files": [str(f) for f in files],
        "model": loaded.name,
        "sha256": loaded.sha256,
        **setting,
        "n": n,
        "seeds": [seed, seed + n - 1],
        "labels": None if labels is None else labels.tolist(),
        "seconds": seconds,
        "images_per_second": n / seconds,
        **({"processes": ranks.world} if ranks.world > 1 else {}),
    }
    where = f"{len(files)} files in {out}" if single else str(out)
    by = setting.get("sampler") or f"plan {setting['plan']}"
    how = f"{by}, {setting['steps']} steps, {setting['runtime']}"
    how += f", {ranks.world} processes" if ranks.world > 1 else ""
    line = f"{where}: {n} images of {loaded.name} ({how}) in {seconds:.2f} s"
    tell(result, line, json)
    return result
