"""Super-resolution of Fashion-MNIST, 7x7 to 28x28: bridges against diffusion from noise, at equal training minutes.

    python -m benchmarks.bridges --data DATA --out runs/bridges --minutes 40

DATA is a folder with the IDX files of Fashion-MNIST. Each model is trained for as many minutes, without labels: an I2SB
bridge, one whose network reads the degraded image too, DDBM bridges (VP and VE), and diffusion from noise whose network
reads the degraded image. Then each restores the first --n degraded images of the test split with 1, 2, 5, 10 and 50
model evaluations (the hybrid sampler, with 3 a step less 1, 8 in the place of 10). One row a model, sampler and number
of evaluations: PSNR to the originals (mean over images, dB) and Frechet distance in the bundled features to the test
split. The row "degraded" has the enlarged images themselves.

A stopped run resumes, and rows that are there are not measured again (`rows.jsonl`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.degradations.downscale import Downscale
from hasten.metrics import evaluate_images
from hasten.metrics.paired import psnr_by_image
from hasten.samplers.ddbm import DDBMSampler
from hasten.train import open_data
from hasten.train.data import to_float
from hasten.workflows.train import train_model

MODELS = {
    "i2sb": "i2sb",
    "i2sb, concat": "i2sb:concat=true",
    "ddbm": "ddbm",
    "ddbm, ve": "ddbm:base=ve,sigma_max=2",
    "noise": "conditional",
}
COUNTS = (1, 2, 5, 10, 50)


def settings(model: str, count: int) -> list[dict[str, Any]]:
    """How a model is sampled with so many model evaluations, by sampler; the hybrid sampler has 3 a step but 2."""
    if model == "noise":
        return [{"sampler": "unipc", "times": "lambda:low=0.03" if count > 1 else "trailing", "steps": count}]
    if model == "i2sb":
        return [{"sampler": "i2sb", "times": "trailing", "steps": count}]
    orders = (1, 2) if count > 2 else (1,)
    dbim = [{"sampler": f"dbim:order={order}", "times": "karras", "steps": count} for order in orders]
    if model == "i2sb, concat":
        dbim = [{**one, "times": "trailing"} for one in dbim]
        return [{"sampler": "i2sb", "times": "trailing", "steps": count}, *dbim]
    hybrid = {"sampler": "ddbm", "times": "karras", "steps": (count + 1) // 3}
    return [hybrid, *dbim] if count >= 2 else dbim


def measured(images: Tensor, originals: Tensor) -> dict[str, float]:
    """PSNR and Frechet distance."""
    distance = evaluate_images(images, features="fashion", reference="fashion", bootstrap=0)["frechet"].value
    return {"psnr": round(float(psnr_by_image(images, originals).mean()), 3), "frechet": round(float(distance), 3)}


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--out", type=Path, default=Path("runs/bridges"))
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--widths", type=int, nargs="+", default=(32, 64))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    given = parser.parse_args()
    degrade, test = Downscale(4), open_data(given.data, split="test", label="none")
    rows = list(range(given.n))
    originals, low = to_float(test.images(rows)), to_float(degrade(test.images(rows), rows))
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = given.out / "rows.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    known = {(row["model"], row["sampler"], row["nfe"], row["n"]) for row in done}

    def record(**row: Any) -> None:
        with ledger.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    if ("degraded", "", 0, given.n) not in known:
        record(model="degraded", sampler="", nfe=0, n=given.n, **measured(low, originals))
    for name in given.models:
        folder = given.out / name.replace(", ", "_")
        model = train_model(
            given.data, folder, process=MODELS[name], degrade="downscale:factor=4", label="none", seed=given.seed,
            minutes=given.minutes, widths=tuple(given.widths), batch_size=given.batch_size, precision="fp32",
            device=given.device,
        )  # fmt: skip
        model = model.to(given.device) if given.device else model
        steps = model.card["last"]["step"]
        for count in given.counts:
            for how in settings(name, count):
                nfe = DDBMSampler().nfe(how["steps"]) if how["sampler"] == "ddbm" else count
                key = (name, how["sampler"], nfe, given.n)
                if key in known:
                    continue
                began = time.monotonic()
                images = model.sample(given.n, images=low, seed=given.seed, batch_size=250, **how)
                row = {"model": name, "sampler": how["sampler"], "nfe": nfe, "n": given.n, "train_steps": steps}
                record(**row, **measured(images, originals), seconds=round(time.monotonic() - began, 1))


if __name__ == "__main__":
    main()
