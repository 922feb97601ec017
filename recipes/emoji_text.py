"""Train the text encoder of the bundled pipeline `emoji`, and the judge that measures it, by contrast with pictures.

    python -m recipes.emoji_text --data data/emoji --out runs/emoji/text --minutes 20
    python -m recipes.emoji_text --data data/emoji --out runs/emoji/judge --minutes 20 --seed 1

Each run trains a small `CLIPTextModel` and an image tower on the training pictures with the symmetric contrastive loss
(Radford et al. 2021, arXiv:2103.00020). The first run's text tower conditions the generator. The second run, of another
seed, is only a judge: features for distances, and the retrieval of the right caption among 100. `--out` receives
`tokenizer/`, `text_encoder/` (both in the layout of a diffusers pipeline) and `towers.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.nets.contrastive import ContrastiveTowers, ImageTower
from hasten.train.data import Batches, open_data
from hasten.train.fit import Ema, Fit
from hasten.train.trained_module import TrainedModule

VOCABULARY, LENGTH, HIDDEN, BATCH = 2000, 24, 128, 128
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: list[str], folder: Path) -> Any:
    """A `CLIPTokenizer` of byte pairs merged by their counts in the captions, saved in `folder`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    result = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=LENGTH)
    result.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


class Captions:
    """Batches of pictures with the tokens of their captions."""

    def __init__(self, batches: Batches, tokens: Tensor) -> None:
        self.batches, self.tokens = batches, tokens
        self.batch_size = batches.batch_size

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Batch `step`: `x` and `tokens`."""
        return {**self.batches[step], "tokens": self.tokens[self.batches.indices(step)]}


def read_captions(data: str, split: str, files: tuple[str, ...]) -> list[str]:
    """The captions of the pictures of a split, in the order of the files."""
    lines = (Path(data) / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    return [texts[Path(file).name] for file in files]


def build(seed: int, tokenizer: Any) -> ContrastiveTowers:
    """Untrained towers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ContrastiveTowers(CLIPTextModel(config), ImageTower(), HIDDEN)


@torch.no_grad()
def retrieval(towers: ContrastiveTowers, data: str, split: str, tokenizer: Any, among: int = 100) -> float:
    """How often the caption of a held-out picture is the nearest of `among`."""
    (
        images,
        captions,
    ) = held_out(data, split)
    tokens = encode(tokenizer, captions)
    picture = torch.cat([towers.image(part) for part in images.split(100)])
    text = torch.cat([towers.text(part) for part in tokens.split(100)])
    rng = random.Random(0)
    order = rng.sample(range(len(captions)), len(captions))
    right = total = 0
    for first in range(0, len(order) - among + 1, among):
        rows = torch.tensor(order[first : first + among])
        right += int((picture[rows] @ text[rows].T).argmax(1).eq(torch.arange(among)).sum())
        total += among
    return right / total


def held_out(data: str, split: str) -> tuple[Tensor, list[str]]:
    """Pictures in [-1, 1] and captions of a split."""
    from hasten.train.data import to_float

    source = open_data(data, split=split, label="none", report=False)
    files = sorted(p.name for p in (Path(data) / split).glob("*.png"))
    return to_float(source.images(list(range(len(source))))), read_captions(data, split, tuple(files))


def encode(tokenizer: Any, captions: list[str]) -> Tensor:
    """Tokens (n, LENGTH) int64."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = tuple(sorted(p.name for p in (Path(args.data) / "train").glob("*.png")))
    captions = read_captions(args.data, "train", files)
    source = open_data(args.data, label="none")
    assert len(source) == len(captions)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(captions, args.out / "tokenizer")
    tokens = encode(tokenizer, captions)
    print(captions[5], tokens[5].tolist(), "longest", int((tokens != tokenizer.pad_token_id).sum(1).max()), flush=True)
    towers = build(args.seed, tokenizer)
    for name, part in (("text", towers.text_model), ("image", towers.image_tower)):
        print(name, sum(p.numel() for p in part.parameters()), "parameters", flush=True)
    trained = TrainedModule("towers", towers, lambda b: towers.loss(b["x"], b["tokens"]), lr=1e-3, weight_decay=0.05)
    fit = Fit(minutes=args.minutes, precision="fp32", ema=Ema("power", gamma=12.0), seed=args.seed, log_steps=20)
    averaged: Any = fit([trained], Captions(Batches(source, BATCH, seed=args.seed), tokens), args.out)["towers"]
    averaged.eval()
    averaged.save(args.out)
    for split in ("test", "val"):
        print(split, "caption found among 100:", retrieval(averaged, args.data, split, tokenizer), flush=True)


if __name__ == "__main__":
    main()
