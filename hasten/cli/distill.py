"""`distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..storage.provenance import command_line
from ._common import open_shared, processes
from ._processes import together
from .terminal import tell


@together
def distill(
    model: str,
    *,
    data: Path | None = None,
    out: Path = Path("students"),
    method: str = "guided",
    minutes: float | None = None,
    steps: int | None = None,
    evaluations: float | None = None,
    guidance_scale: float | None = None,
    init: str | None = None,
    batch_size: int = 128,
    accumulate: int = 1,
    shard: bool = False,
    seed: int = 0,
    runtime: str = "auto",
    device: str = "auto",
    dry_run: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Train a student that needs 1 to 16 network evaluations an image where its teacher needs hundreds.

    Writes a model for every stage, a picture of what it draws, and the last student as the model of the folder itself.
    The same command again goes on where an earlier one was stopped, and ends with the same students. Under torchrun,
    several processes share the work.

    Args:
        model: The teacher: a bundled name (see models) or a folder.
        data: Folder, zip or array of real images, with the teacher's labels. Some methods (reflow, dsno,
            denoising_student) do without: they train on what the teacher draws.
        out: The folder to write.
        method: Such as guided:steps=(16,8,4,2,1), progressive:steps=(8,4,2,1), tract, consistency or reflow.
        minutes: Time for the whole run. If no budget is given, 30.
        steps: Steps of training, all stages together.
        evaluations: Network evaluations of one image, training included; 1e6 or so for a start.
        guidance_scale: The strength of guidance that the student gives. Left out: the teacher's own choice.
        init: The model that the first student begins as, in place of the teacher: a bundled name or a folder, such as
            that of an earlier student.
        batch_size: Images a step.
        accumulate: Parts of a batch that are computed one after another, to need less memory.
        shard: Divide the network among the processes that torchrun started, where it is too large for one.
        seed: Of everything that is drawn.
        runtime: fp32 or bf16; auto times them on this machine once.
        device: auto, cpu, cuda or cuda:1.
        dry_run: Say what every stage costs, and train nothing.
        json: Print the result as JSON.

    Returns:
        The folder, the stages and what they cost, the students.
    """
    from ..workflows.distill import distill_model

    ranks = processes(device)
    loaded = open_shared(model, ranks)
    said = {"data": data, "out": out, "method": method, "minutes": minutes, "steps": steps, "evaluations": evaluations,
            "guidance_scale": guidance_scale, "init": init, "batch_size": batch_size, "seed": seed, "runtime": runtime,
            "accumulate": None if accumulate == 1 else accumulate, "shard": shard}  # fmt: skip
    result = distill_model(
        loaded, out, method=method, data=data, steps=steps, minutes=minutes, evaluations=evaluations,
        guidance_scale=guidance_scale, batch_size=batch_size, seed=seed, runtime=runtime, dry_run=dry_run,
        say=(lambda line: None) if json else lambda line: print(line, flush=True),
        command=command_line("distill", model, said), accumulate=accumulate, shard=shard,
        init=None if init is None else open_shared(init, ranks),
    )  # fmt: skip
    cost = f"{result['evaluations']:.3g} network evaluations"
    if dry_run:
        text = f"in all {cost}, {result['seconds'] / 60:.1f} min, {result['memory_bytes'] / 2**20:.0f} MiB at most"
    else:
        made = f"{len(result['students']) - 1} students, {cost} in {result['seconds'] / 60:.1f} min"
        verb = "restyle" if method.startswith("encoder") else "sample"
        text = f"{out}: {made}; try hasten {verb} {out}"
    tell(result, text, json)
    return result
