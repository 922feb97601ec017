"""`hasten distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..storage.provenance import command_line
from ._common import command_for, explicit_options, open_shared, processes
from ._processes import on_all_processes
from .terminal import print_result


@on_all_processes
def distill(
    model: str,
    *,
    data: Path | None = None,
    prompts: Path | None = None,
    out: Path = Path("students"),
    config: Path | None = None,
    method: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    nfe_budget: float | None = None,
    guidance_scale: float | None = None,
    init: str | None = None,
    structure: str | None = None,
    batch_size: int | None = None,
    grad_accumulation: int | None = None,
    fsdp: bool = False,
    lora: int | None = None,
    lora_targets: str | None = None,
    gradient_checkpointing: bool = False,
    optimizer: str | None = None,
    source: Path | None = None,
    degrade: str | None = None,
    seed: int | None = None,
    precision: str | None = None,
    device: str = "auto",
    dry_run: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Distil a model into students that need 1 to 16 model evaluations an image.

    Writes a model for every stage, a picture of its samples, and the last student as the model of the folder itself.
    The same command resumes where an earlier one was stopped, and ends with the same students. Under torchrun, several
    processes share the work.

    Args:
        model: The teacher: a bundled name (see models) or a folder.
        data: Folder, zip or array of real images, with the teacher's labels. Some methods (reflow, dsno,
            denoising_student) do without: they train on samples of the teacher. For a model of prompts: images with
            captions (metadata.jsonl with file_name and text, or a .txt beside each image). For a model that reads a
            source image, every method needs them: for super-resolution of any sizes.
        prompts: Text file with a prompt a line, in place of data: for methods that do without images.
        out: The folder to write.
        config: A DistillConfig file (TOML or JSON); the options below override its fields.
        method: Such as guided:steps=(16,8,4,2,1), progressive:steps=(8,4,2,1), tract, consistency or reflow. Default:
            guided.
        minutes: Time for the whole run. If no budget is given, 30.
        steps: Training steps, all stages together.
        nfe_budget: Model evaluations of one image, training included; 1e6 or so for a start.
        guidance_scale: Scale of guidance that the student gives. Default: the teacher's recommended one.
        init: The model that the first student begins as, in place of the teacher: a bundled name or a folder, such as
            that of an earlier student. Or a LoRA of the teacher (.safetensors, or a bundled name), which is trained
            further.
        structure: Weight of the structure term, relative to the loss, such as 0.1: the relations of a batch's samples
            are distilled too. Or its options, such as weight=0.1,gate=snr (see docs/structure.md). Default: 0.
        batch_size: Images a step. Default: 128.
        grad_accumulation: Parts of a batch that are computed one after another, to need less memory.
        fsdp: Shard the network among the processes of torchrun, where it is too large for one.
        lora: Rank of a LoRA that is trained in place of all weights, such as 16. It is written as a file of its own,
            which diffusers loads, beside the model with the LoRA merged.
        lora_targets: The layers that it adapts: attention, conv, all, or names of modules, comma-separated. Default:
            attention where the network has such layers, else all.
        gradient_checkpointing: Compute activations again in the backward pass, to need less memory (networks of
            diffusers).
        optimizer: adamw, muon (at 20 times the method's rate), or to need less memory on CUDA, with bitsandbytes:
            adamw8bit, paged-adamw8bit. Default: adamw.
        source: For a model that reads a source image: the folder of the sources, with the file names of the data.
        degrade: For a model that reads a source image: makes the sources from the data, such as
            low_resolution:factor=4. Default: as in the training of the model.
        seed: Of everything that is random. Default: 0.
        precision: fp32, bf16 (autocast), or auto, which times them on this device once. Default: auto.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        dry_run: Report what every stage costs, and train nothing.
        json: Print the result as JSON.

    Returns:
        The folder, the stages and what they cost, the students.
    """
    from ..workflows.distill import DistillConfig, distill_model
    from ..workflows.prompts import read_prompts

    if data is not None and prompts is not None:
        raise BadInput("--data has its own captions: give --data or --prompts")
    options = explicit_options(
        method=method, minutes=minutes, steps=steps, nfe_budget=nfe_budget, guidance_scale=guidance_scale,
        batch_size=batch_size, grad_accumulation=grad_accumulation, fsdp=fsdp or None, seed=seed, precision=precision,
        gradient_checkpointing=gradient_checkpointing or None, optimizer=optimizer, lora=lora,
        lora_targets=lora_targets, source=None if source is None else str(source), degrade=degrade,
        structure=structure,
    )  # fmt: skip
    request = (DistillConfig() if config is None else DistillConfig.load(config, "distill")).replace(**options)
    ranks = processes(device)
    loaded = open_shared(model, ranks)
    texts = None if prompts is None else read_prompts(prompts)
    result = distill_model(
        loaded, out, request, data=data if texts is None else texts, dry_run=dry_run,
        init=init if init is None or is_lora(init) else open_shared(init, ranks),
        log=(lambda line: None) if json else lambda line: print(line, flush=True),
        command=command_line("distill", model, {
            "data": data, "prompts": prompts, "out": out, "init": init, **request.to_dict(),
        }),
    )  # fmt: skip
    cost = f"{result['evaluations']:.3g} model evaluations"
    if dry_run:
        text = f"total: {cost}, {result['seconds'] / 60:.1f} min, peak memory {result['memory_bytes'] / 2**20:.0f} MiB"
    else:
        students = f"{len(result['students']) - 1} students, {cost} in {result['seconds'] / 60:.1f} min"
        encodes = request.method.startswith("encoder")
        text = f"{out}: {students}; try {f'hasten restyle {out}' if encodes else command_for(loaded, out)}"
    print_result(result, text, json)
    return result


def is_lora(init: str) -> bool:
    """Whether `--init` names a LoRA, a file or a bundled one, and no model."""
    from .. import zoo

    card = zoo.additions().get(init)
    return init.endswith(".safetensors") or (card is not None and card.kind == "lora")
