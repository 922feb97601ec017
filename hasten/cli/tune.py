"""`tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..storage.provenance import command_line
from ._common import open_model
from ._processes import alone
from .terminal import tell


@alone
def tune(
    model: str,
    *,
    out: Path | None = None,
    method: str = "optimized_steps",
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    data: Path | None = None,
    n: int | None = None,
    seed: int = 1_000_000,
    runtime: str = "fp32",
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Make sampling better for this very model: find times, coefficients, statistics or small networks beside it.

    Writes the model with what was found into a folder; a plan that was found becomes what sample does by default.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write. Left out: the model's own, unless it is a bundled one.
        method: Such as optimized_steps:objective=trajectory, fitted_plan, dynamic_programming or moments.
        sampler: The sampler to improve. Left out: the model's own choice, as for the next three.
        times: The time grid to start from.
        steps: Steps of the time grid.
        guidance_scale: Strength of the guidance under which the result will be used.
        data: Folder, zip or array of real images, for the methods that need them.
        n: Samples to calibrate on. Left out: the method's own number.
        seed: Of the first calibration sample; far from the seeds that sample and compare start with.
        runtime: Number format of the network, fp32 or bf16.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The folder, what was found and what it reached.
    """
    from ..workflows.tune import tune_model

    loaded = open_model(model, device)
    folder = Path(model) if out is None else out
    if out is None and not (folder / "model.json").is_file():
        raise BadInput(f"{model} is a bundled model: give --out, the folder to write it to")
    said = {"method": method, "sampler": sampler, "times": times, "steps": steps, "guidance_scale": guidance_scale,
            "data": data, "n": n, "seed": seed, "runtime": runtime, "out": out}  # fmt: skip
    result = tune_model(
        loaded, folder, method=method, sampler=sampler, times=times, steps=steps, guidance_scale=guidance_scale,
        data=data, n=n, seed=seed, runtime=runtime, command=command_line("tune", model, said),
    )  # fmt: skip
    found = [*([f"plan {result['plan']}"] if result["plan"] else []), *result["statistics"], *result["parts"]]
    lines = [f"{folder}: {', '.join(found)} in {result['seconds']:.1f} s; try hasten sample {folder}"]
    lines += [f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}"
              for key, value in result["figures"].items()]  # fmt: skip
    tell(result, "\n".join(lines), json)
    return result
