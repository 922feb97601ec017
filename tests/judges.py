"""Tiny judges with random weights: contrastive towers, and a CLIP folder of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


def towers_folder(folder: Path, seed: int = 0, half: bool = False) -> Path:
    """A folder of contrastive towers with their tokenizer."""
    from hasten.nets.contrastive import ContrastiveTowers, ImageTower

    from .adapters import tiny

    torch.manual_seed(seed)
    towers = ContrastiveTowers(tiny.text_encoder(), ImageTower((8, 16)), dim=8)
    torch.nn.init.normal_(towers.text_projection.weight)
    towers = towers.half() if half else towers
    folder.mkdir(parents=True, exist_ok=True)
    towers.save(folder)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """A `CLIPModel` of transformers with its tokenizer and image processor."""
    import json

    from transformers import CLIPConfig, CLIPModel

    from .adapters import tiny

    words = tiny.tokenizer()
    text: dict[str, Any] = {"vocab_size": len(words), "max_position_embeddings": 12, "num_hidden_layers": 2}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    common = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2}
    torch.manual_seed(seed)
    config = CLIPConfig(text_config={**text, **common}, vision_config={**vision, **common}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
