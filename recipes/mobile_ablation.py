"""The switches of MobileDiffusion one by one: multiply-accumulates, parameters, time and validation loss of each.

python -m recipes.mobile_ablation --data runs/emoji/cache.pt --out runs/ablation --minutes 20
python -m recipes.mobile_ablation --out /tmp/ablation --steps 20  # on random data, to try it

Each row is Stable Diffusion's layout with one switch changed; the last one is the preset `mobile`, with all but ReLU
attention. DATA is what `recipes.emoji_unet encode` writes, or any file of torch.save with `latents` (n, C, H, W) and
`text` (n, L, D), or `text` (m, L, D) and `text_index` (n,). A run that was stopped continues with the next row.

References:
    Zhao et al. 2023, arXiv:2311.16567.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.nets.text_unet import Level, TextUNet, mobile_table, sd_like_table
from hasten.performance.cost import interleave, macs, parameters, ratio
from hasten.train.fit import Ema, Fit
from hasten.train.trained_module import TrainedModule
from recipes.emoji_unet import BATCH, SEED, Cached, Loss, validation
from recipes.emoji_unet_mobile import HEADS, WIDTHS

Table = tuple[list[Level], Level]
HELD_OUT = 200


def at(table: Table, change: Callable[[int, Level], Level], middle: bool = True) -> Table:
    """The table with each row changed by `change(number of the level, row)`; the middle counts as one more level."""
    levels, center = table
    changed = [change(k, row) for k, row in enumerate(levels)]
    return changed, change(len(levels), center) if middle else center


def every(**fields: Any) -> Callable[[Table], Table]:
    """A switch that sets fields of all rows."""
    return lambda table: at(table, lambda k, row: replace(row, **fields))


def below_the_finest(**fields: Any) -> Callable[[Table], Table]:
    """A switch that sets fields of all rows but the finest level's."""
    return lambda table: at(table, lambda k, row: replace(row, **fields) if k else row)


def only(level: int, **fields: Any) -> Callable[[Table], Table]:
    """A switch that sets fields of one level."""
    return lambda table: at(table, lambda k, row: replace(row, **fields) if k == level else row, middle=False)


def pruned(table: Table) -> Table:
    """One residual block per level of the encoder; in the decoder two, one in the coarsest level."""
    last = len(table[0]) - 1
    return at(table, lambda k, row: replace(row, down_blocks=1, up_blocks=1 if k == last else 2), middle=False)


def more_in_the_middle(table: Table) -> Table:
    """Two more transformer blocks in the middle."""
    return table[0], replace(table[1], transformer_blocks=table[1].transformer_blocks + 2)


SWITCHES: dict[str, Callable[[Table], Table]] = {
    "transformers in the middle": more_in_the_middle,
    "no attention at the finest level": only(0, transformer_blocks=0),
    "cross-attention only at the second": only(1, self_attention=False),
    "shared keys and values": every(shared_kv=True),
    "swish gates": every(activation="silu"),
    "ReLU attention": every(attention="relu"),
    "feed-forward factor 6": every(ff_factor=6),
    "separable convolutions": below_the_finest(convolution="separable"),
    "fewer residual blocks": pruned,
}


def tables(widths: Sequence[int], heads: Sequence[int], layers: int) -> dict[str, Table]:
    """The rows of the ablation by name."""
    base = sd_like_table(widths, heads, layers)
    rows = {name: switch(base) for name, switch in SWITCHES.items()}
    return {"sd_like": base, **rows, "mobile": mobile_table(widths, heads)}


def read(path: Path | None) -> dict[str, Tensor]:
    """Latents and text embeddings of a training and a held-out set, and `null_text`; random ones without a file."""
    if path is None:
        generator = torch.Generator().manual_seed(SEED)
        data = {
            "latents": torch.randn(256, 8, 16, 16, generator=generator),
            "text": torch.randn(256, 24, 128, generator=generator),
        }
    else:
        data = torch.load(path, weights_only=True)
    if "train_latents" in data:
        return data
    if missing := {"latents", "text"} - data.keys():
        raise SystemExit(f"{path} has no {' and no '.join(sorted(missing))}: found {', '.join(data)}")
    latents, text = data["latents"], data["text"]
    text = text[data["text_index"].long()] if "text_index" in data else text
    if len(latents) != len(text):
        raise SystemExit(f"{path} has {len(latents)} latents and {len(text)} texts")
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(SEED))
    held = min(HELD_OUT, max(len(latents) // 10, 1))
    cache = {"null_text": data.get("null_text", torch.zeros_like(text[:1]))}
    for split, rows in (("test", order[:held]), ("train", order[held:])):
        cache |= {f"{split}_latents": latents[rows], f"{split}_text": text[rows]}
    return cache


def build(table: Table, cache: dict[str, Tensor]) -> TextUNet:
    """The untrained network of a table, for this data."""
    torch.manual_seed(SEED)
    groups = math.gcd(32, *(row.width for row in (*table[0], table[1])))
    channels, dim = cache["train_latents"].shape[1], cache["train_text"].shape[-1]
    return TextUNet(*table, in_channels=channels, cross_attention_dim=dim, norm_num_groups=groups)


def described(table: Table) -> dict[str, Any]:
    """A table as plain values."""
    return {"levels": [asdict(row) for row in table[0]], "middle": asdict(table[1])}


def loss_of(table: Table, cache: dict[str, Tensor], out: Path, settings: dict[str, Any]) -> float:
    """The validation loss of a row: of an earlier run with the same settings, else after training."""
    file, row = out / "row.json", {**settings, **described(table)}
    if not file.is_file():
        loss = train(table, cache, out, settings["steps"], settings["minutes"])
        file.write_text(json.dumps({"loss": loss, **row}) + "\n")
    known = json.loads(file.read_text())
    if different := [key for key, value in row.items() if known.get(key) != value]:
        raise SystemExit(f"{out} is of a run with other {' and '.join(different)}: give another --out")
    return float(known["loss"])


def train(table: Table, cache: dict[str, Tensor], out: Path, steps: int | None, minutes: float | None) -> float:
    """The validation loss after training."""
    net = build(table, cache)
    loss = Loss(net, cache["null_text"])
    trained = TrainedModule("unet", net, loss, lr=1.5e-3, optimiser="muon", muon_lr=0.015)
    fit = Fit(steps, minutes, precision="fp32", ema=Ema("power", gamma=12.0), seed=SEED)
    batches = Cached(cache["train_latents"], cache["train_text"], BATCH, SEED)
    averaged: Any = fit([trained], batches, out, settings=described(table))["unet"]
    return validation(averaged, cache)


@torch.no_grad()
def costs(rows: dict[str, Table], cache: dict[str, Tensor], batch: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Multiply-accumulates per image, parameters, milliseconds of an evaluation, and the speedup, interleaved."""
    nets = {name: build(table, cache).eval() for name, table in rows.items()}
    x = cache["train_latents"][:1].float().repeat(batch, 1, 1, 1)
    time, text = torch.full((batch,), 500.0), cache["train_text"][:1].float().repeat(batch, 1, 1)
    one = x[:1], time[:1], text[:1]
    seconds = interleave({name: lambda net=net: net(x, time, text) for name, net in nets.items()}, repeats)
    first = next(iter(seconds))
    return {
        name: {
            "macs": macs(net, *one),
            "parameters": parameters(net),
            "ms": 1000 * statistics.median(seconds[name]),
            "speedup": ratio(seconds[first], seconds[name]).median,
        }
        for name, net in nets.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="latents and texts; default: random ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="training steps of each row")
    parser.add_argument("--minutes", type=float, help="training minutes of each row")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--heads", type=int, nargs="+", default=list(HEADS))
    parser.add_argument("--layers", type=int, default=1, help="residual blocks per level of the start")
    parser.add_argument("--rows", nargs="+", help="some of the rows by name; default: all")
    parser.add_argument("--batch", type=int, default=64, help="samples of the timed evaluations")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        parser.error("give --steps or --minutes")
    cache = read(args.data)
    known = tables(args.widths, args.heads, args.layers)
    if unknown := [name for name in args.rows or () if name not in known]:
        parser.error(f"there are no rows {unknown}: {', '.join(known)}")
    rows = {name: table for name, table in known.items() if args.rows is None or name in args.rows}
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"data": str(args.data), "steps": args.steps, "minutes": args.minutes}
    cost = costs(rows, cache, args.batch, args.repeats)
    lines = ["| | parameters (M) | MACs (M) | ms | speed | validation loss |", "| --- | --- | --- | --- | --- | --- |"]
    for name, table in rows.items():
        loss, c = loss_of(table, cache, args.out / name.replace(" ", "_"), settings), cost[name]
        lines.append(
            f"| {name} | {c['parameters'] / 1e6:.2f} | {c['macs'] / 1e6:.1f} | {c['ms']:.1f} | {c['speedup']:.2f}x "
            f"| {loss:.4f} |"
        )
        print(lines[-1], flush=True)
    (args.out / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
