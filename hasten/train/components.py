"""Hashes of the autoencoder and the text encoders of a pipeline, to recognise what was computed with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

TEXT = tuple(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
# Entries of a config that do not change what a module computes.
IRRELEVANT = ("transformers_version", "torch_dtype", "dtype", "architectures")
PLAIN = (bool, int, float, str, type(None), tuple, list)


def component_hash(component: Any, texts: Sequence[str] = ()) -> str:
    """16 hexadecimal digits of the weights and settings of what encodes images or prompts.

    Args:
        component: a module, or an object with modules, tokenizers, a pipeline and plain values as attributes.
        texts: whose tokens are part of the hash, for tokenizers that differ in more than their vocabulary.
    """
    digest = hashlib.sha256()
    parts: dict[str, Any] = {"": component} if isinstance(component, nn.Module) else dict(vars(component))
    pipe = parts.pop("pipe", None)
    parts |= {name: getattr(pipe, name, None) for name in TEXT} if pipe is not None else {}
    digest.update(f"{type(component).__name__} {type(pipe).__name__}".encode())
    settings = getattr(pipe, "config", None)
    if isinstance(settings, Mapping):  # such as force_zeros_for_empty_prompt
        parts |= {f"config.{name}": value for name, value in settings.items() if type(value) in (bool, int, float)}
    for name, value in sorted(parts.items()):
        if name == "rows":  # a batch size
            continue
        digest.update(f"{name} {type(value).__name__}".encode())
        if isinstance(value, nn.Module):
            _add_module(digest, value)
        elif callable(getattr(value, "get_vocab", None)):
            _add_tokenizer(digest, value, texts)
        elif isinstance(value, PLAIN):
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def _add_module(digest: Any, module: nn.Module) -> None:
    """Add the tensors and the config of a module."""
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    config: Any = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(config, Mapping):
        kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in IRRELEVANT}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())


def _add_tokenizer(digest: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Add the vocabulary and the length of a tokenizer, and the tokens of some texts."""
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items()), default=str).encode())
    digest.update(f"{getattr(tokenizer, 'model_max_length', None)}".encode())
    if texts:
        digest.update(json.dumps(tokenizer(list(texts))["input_ids"]).encode())
