"""`compare` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HastenError
from ..storage.provenance import command_line
from ._common import open_shared, processes, prompts_of, sigterm_as_interrupt
from ._processes import on_all_processes
from .terminal import print_result

if TYPE_CHECKING:
    pass


@on_all_processes
def compare(
    model: str,
    *,
    out: Path = Path("compare"),
    variants: str = "demo",
    n: int | None = None,
    seed: int = 0,
    rounds: int | None = None,
    batch_size: int = 64,
    timing_batch: int = 16,
    reference: str | None = None,
    features: str | None = None,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    repeats: int = 1,
    minutes: float | None = None,
    precision: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> list[dict[str, Any]]:
    """Sample a model in many ways from the same seeds, and report what each costs and what quality is left.

    Writes report.html, results.jsonl and pictures. The same command again goes on where an earlier one was stopped.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write.
        variants: What to compare: demo, full, or a TOML file.
        n: Images a variant. Left out: what the variants say; so is rounds.
        seed: Of the first image; image k has seed + k in every variant.
        rounds: Times that each variant is timed, in turns.
        batch_size: Images in the network at once.
        timing_batch: Images in a timed batch.
        reference: Statistics of real images, or a folder, zip or array of images of your own, with --features. Left
            out: the statistics that the model names.
        features: The network that looks at the images: fashion, efficientnet_lite0, inception. Left out: the
            reference's.
        prompt: Of a model that takes prompts; given several times, image k gets number k mod their count.
        prompts: A text file of prompts in their place, one a line.
        repeats: Blocks of n seeds, one after the other: figures are then means with their deviation.
        minutes: Time budget. Default: none. The number of images is then chosen by the measured speed, n at most, and
            the last variants are skipped where even 64 images of each take longer.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once.
        device: auto, cpu, cuda or cuda:1.
        json: Print the rows as JSON, not as a table.

    Returns:
        A row for each variant.
    """
    from ..compare.runner import compare as run

    asked: dict[str, Any] = {
        "variants": variants, "n": n, "seed": seed, "rounds": rounds, "batch_size": batch_size,
        "timing_batch": timing_batch, "runtime": precision, "reference": reference, "features": features,
    }  # fmt: skip
    asked |= {"repeats": repeats, "minutes": minutes}
    given = {"prompt": prompt, "prompts": prompts, "repeats": None if repeats == 1 else repeats}
    told = {**asked, **given, "runtime": None, "precision": None if precision == "auto" else precision, "out": out}
    texts = prompts_of(prompt, prompts)
    ranks = processes(device)
    loaded = open_shared(model, ranks)
    with sigterm_as_interrupt():
        command = command_line("compare", model, told)
        rows = run(loaded, out=out, **asked, show=not json, command=command, ranks=ranks, prompts=texts)
    if json:
        print_result(rows, "", json)
    if lost := [row for row in rows if row.get("failed")]:
        also = "" if len(lost) == 1 else f" (and {len(lost) - 1} more)"
        first = f"{lost[0]['name']!r}: {lost[0]['failed']}"
        raise HastenError(
            f"{len(lost)} of {len(rows)} rows failed, {first}{also}; {out / 'report.html'} has the others"
        )
    return rows
