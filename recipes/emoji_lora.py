"""The 8-step student of `emoji` as a LoRA, trained and by SVD, and its transfer to a fine-tune on one style.

    python -m recipes.emoji_lora --pipeline emoji --data data/emoji --judge runs/emoji/judge --out runs/emoji/lora

1. The student with all weights (or `--student`, an earlier one), and one whose LoRA of rank 16 alone is trained for
   as long; the first reduced to LoRAs of several ranks by SVD. Each samples 8 steps with the guidance built in.
2. A fine-tune of the pipeline on the pictures of one style; its own 8 guided steps, and 8 steps with each LoRA of 1,
   which was made on the base and never saw the fine-tune.

With `--lora FILE` (of one or more students of the pipeline) only the fine-tune is made and measured.

Every model is measured on the held-out pictures in the judge's features, the fine-tune on those of its style. Finished
parts are not done again. Writes `lora.json`, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hasten
from hasten.model import Model
from hasten.storage.lora_files import FILE
from hasten.workflows.distill import distill_model
from hasten.workflows.evaluate import EvaluateConfig, evaluate_model
from hasten.workflows.lora import extract_lora
from hasten.workflows.train import train_model

RANK, SVD_RANKS, STEPS = 16, (4, 16, 64), 8
FIGURES = {"prompt_match": "value", "diversity": "within"}  # of a judge, and which of their numbers is kept


def style_folder(data: Path, style: str, out: Path) -> Path:
    """The pictures of one style, in the layout of `data`: links and captions."""
    for split in ("train", "test", "val"):
        lines = (data / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["text"].endswith(f", {style} style")]
        if not rows:
            raise SystemExit(f"no picture in {data / split} has a caption that ends in ', {style} style'")
        (out / split).mkdir(parents=True, exist_ok=True)
        for row in rows:
            source, target = data / split / row["file_name"], out / split / row["file_name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                try:
                    os.link(source, target)
                except OSError:  # another disk
                    shutil.copy(source, target)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / split / "metadata.jsonl").write_text(text, encoding="utf-8")
    return out


def once(record: dict[str, Any], file: Path, key: str, compute: Callable[[], Any]) -> Any:
    """An entry of the record, computed and saved where it is missing."""
    if key not in record:
        start = time.perf_counter()
        record[key] = compute()
        print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
        file.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return record[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="the base: a bundled name or a folder")
    parser.add_argument("--data", type=Path, required=True, help="captioned pictures, with train, test and val")
    parser.add_argument("--judge", type=Path, help="of the figures. Default: the one that the model names")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", type=Path, help="an 8-step student of the pipeline with all weights")
    parser.add_argument("--lora", nargs="+", type=Path, default=[], help="LoRAs of the base, in place of training any")
    parser.add_argument("--style", default="google")
    parser.add_argument("--guidance-scale", type=float, help="Default: the model's")
    parser.add_argument("--minutes", type=float, default=30.0, help="of each training")
    parser.add_argument("--steps", type=int, help="training steps, in place of minutes")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4, help="of the student with all weights")
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--tune-lr", type=float, default=1e-4, help="of the fine-tune")
    parser.add_argument("--targets", default="all", help="layers of the LoRAs")
    parser.add_argument("--split", default="test", help="of the figures")
    parser.add_argument("--style-split", default="val", help="of the fine-tune's figures")
    parser.add_argument("--n", type=int, help="images of each figure. Default: one of each caption")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    base = hasten.load(args.pipeline)
    scale = base.guidance_scale if args.guidance_scale is None else args.guidance_scale
    budget: Any = {"steps": args.steps} if args.steps else {"minutes": args.minutes}
    file = out / "lora.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def figures(model: Model, data: Path, split: str, **sampling: Any) -> dict[str, Any]:
        """What is measured of a model."""
        judge = None if args.judge is None else str(args.judge)
        request = EvaluateConfig(n=args.n, data=str(data), split=split, judge=judge)
        result = evaluate_model(model, request, **sampling)
        measures = {name: entry["value"] for name, entry in result["measures"].items()}
        judged = {key: result[key][number] for key, number in FIGURES.items() if result.get(key)}
        return {**measures, **judged, "steps": result["steps"]}

    def student(name: str, lr: float, **lora: Any) -> Path:
        """An 8-step student of the base; resumes, or is there already."""
        method = f"guided:steps=({STEPS},),guidance=none,lr={lr}"
        more = {"guidance_scale": scale, "batch_size": args.batch_size, "precision": "fp32", **budget, **lora}
        distill_model(base, out / name, method, args.data / "train", log=print, **more)
        return out / name

    held_out, split = args.data, args.split
    ddim: Any = {"sampler": "ddim", "times": "trailing", "guidance_scale": scale}
    rows: list[str] = []
    loras = {path.stem: path for path in args.lora}
    if not loras:
        full = args.student or student("full", args.lr)
        loras = {"lora": student("lora", args.lora_lr, lora=RANK, lora_targets=args.targets) / FILE}
        for rank in SVD_RANKS:
            loras[f"svd{rank}"] = path = out / f"svd{rank}.safetensors"
            once(record, file, f"svd{rank}: weights", lambda rank=rank, path=path: {
                key: value for key, value in
                extract_lora(base, hasten.load(full), rank, path, targets=args.targets).items() if key != "errors"
            })  # fmt: skip
        rows = [
            "teacher: 50 steps",
            "teacher: 8 steps",
            "student: all weights",
            *(f"student: {name}" for name in loras),
        ]
        once(record, file, rows[0], lambda: figures(base, held_out, split, steps=50, **ddim))
        once(record, file, rows[1], lambda: figures(base, held_out, split, steps=STEPS, **ddim))
        once(record, file, rows[2], lambda: figures(hasten.load(full), held_out, split))
        for name, path in loras.items():
            rows.append(f"student: {name}")
            once(record, file, rows[-1], lambda path=path: figures(base.with_lora(path), held_out, split))

    style = style_folder(args.data, args.style, out / args.style)
    if not (out / "tuned" / "model.json").is_file():
        train_model(
            style / "train", out / "tuned", base=args.pipeline, batch_size=args.batch_size, lr=args.tune_lr, **budget
        )
    tuned, split = hasten.load(out / "tuned"), args.style_split
    own = ["fine-tune: 50 steps", "fine-tune: 8 steps", "base on the style: 50 steps"]
    once(record, file, own[0], lambda: figures(tuned, style, split, steps=50, **ddim))
    once(record, file, own[1], lambda: figures(tuned, style, split, steps=STEPS, **ddim))
    once(record, file, own[2], lambda: figures(base, style, split, steps=50, **ddim))
    for name, path in loras.items():
        own.append(f"fine-tune: 8 steps with {name}")
        once(record, file, own[-1], lambda path=path: figures(tuned.with_lora(path), style, split, steps=STEPS))

    for row in (*rows, *own):
        shown = (f"{key} {value:.4g}" for key, value in record[row].items() if isinstance(value, (int, float)))
        print(f"{row:<34}", "  ".join(shown))
    for rank in () if args.lora else SVD_RANKS:
        weights = record[f"svd{rank}: weights"]
        print(
            f"rank {rank}: {100 * weights['total_error']:.3g} % of the difference left out, {len(weights['lost'])} lost"
        )


if __name__ == "__main__":
    main()
