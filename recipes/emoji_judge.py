"""Make the bundled judge of emoji from a training run of `recipes.emoji_text`.

    python -m recipes.emoji_judge --data data/emoji --judge runs/emoji/judge --out hasten/zoo/emoji_judge

`--out` receives the towers, text encoder and tokenizer in half precision, the captions of the held-out pictures, their
statistics in the judge's features with the real-data baseline, and captions for calibration: with these
`hasten evaluate emoji` needs no data.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from hasten.metrics.text_judge import load_judge
from hasten.nets.contrastive import ContrastiveTowers
from hasten.workflows.captioned import open_captioned, save_captioned

SIDE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ContrastiveTowers.load(args.judge).half().save(args.out)
    shutil.copytree(args.judge / "tokenizer", args.out / "tokenizer", dirs_exist_ok=True)
    found = open_captioned(args.data, load_judge(args.out), (3, SIDE, SIDE), report=print)
    save_captioned(found, args.out)
    print(f"{found.judge.name}: prompt match of real pictures {found.match}")


if __name__ == "__main__":
    main()
