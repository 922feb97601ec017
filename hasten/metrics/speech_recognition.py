"""Speech recognition with Moonshine, for word error rates."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from ..audio.files import resample
from ..errors import BadInput

__all__ = ["Moonshine", "package_folder"]

RATE = 16000
FIRST, LAST = 1, 2  # tokens at the beginning and the end
LAYERS, HEADS, WIDTH = 6, 8, 36  # of the tiny model's decoder
SPEED = 8.0  # tokens a second at most, against loops in sounds without words


class Moonshine:
    """Moonshine tiny for English, as the package `moonshine-voice` 0.0.73 ships it, run by onnxruntime.

    Args:
        folder: with `encoder_model.ort`, `decoder_model_merged.ort` and `tokenizer.bin`. Default: that of the package.
        threads: of the CPU; 0 for as many as onnxruntime takes.

    Raises:
        BadInput: without onnxruntime or the package.

    References:
        Jeffries et al. 2024, arXiv:2410.15608.
    """

    def __init__(self, folder: str | Path | None = None, threads: int = 0) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise BadInput("a word error rate needs onnxruntime: pip install onnxruntime moonshine-voice==0.0.73")
        if folder is None:
            folder = (
                package_folder("moonshine_voice", "a word error rate", "moonshine-voice==0.0.73") / "assets/tiny-en"
            )
        folder = Path(folder)
        for name in ("encoder_model.ort", "decoder_model_merged.ort", "tokenizer.bin"):
            if not (folder / name).is_file():
                raise BadInput(
                    f"{folder} has no {name}: pip install moonshine-voice==0.0.73 (later ones ship no model)"
                )
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in ("encoder_model.ort", "decoder_model_merged.ort")
        )
        self.pieces = token_pieces((folder / "tokenizer.bin").read_bytes())

    def __call__(self, audio: Tensor, sample_rate: int = RATE) -> str:
        """The words of audio (n,) at `sample_rate` Hz, by greedy decoding."""
        import numpy as np

        x = resample(audio.detach().cpu().float(), sample_rate, RATE).numpy()[None]
        if x.shape[1] < RATE // 10:
            x = np.pad(x, ((0, 0), (0, RATE // 10)))
        mask = np.ones(x.shape, np.int64)
        (hidden,) = self.encoder.run(None, {"input_values": x, "attention_mask": mask})
        past: dict[str, Any] = {
            f"past_key_values.{k}.{part}.{kind}": np.zeros((1, HEADS, 0 if part == "decoder" else 1, WIDTH), np.float32)
            for k in range(LAYERS)
            for part in ("decoder", "encoder")
            for kind in ("key", "value")
        }
        tokens = [FIRST]
        names = [output.name for output in self.decoder.get_outputs()]
        for step in range(int(SPEED * x.shape[1] / RATE) + 4):
            inputs = {
                "input_ids": np.array([[tokens[-1]]], np.int64), "encoder_hidden_states": hidden,
                "encoder_attention_mask": mask, "use_cache_branch": np.array([step > 0]), **past,
            }  # fmt: skip
            outputs = dict(zip(names, self.decoder.run(None, inputs)))
            for name in past:
                if step == 0 or ".decoder." in name:  # those of the encoder stay as they were at the first step
                    past[name] = outputs[name.replace("past_key_values", "present")]
            tokens.append(int(outputs["logits"][0, -1].argmax()))
            if tokens[-1] == LAST:
                break
        return joined_pieces([self.pieces[token] for token in tokens if token not in (FIRST, LAST)])


def token_pieces(content: bytes) -> list[bytes]:
    """The pieces of the tokens: each after its length, in one byte, or in two from 128 on."""
    pieces, at = [], 0
    while at < len(content):
        length = content[at]
        at += 1
        if length >= 128:
            length = content[at] * 128 + length - 128
            at += 1
        pieces.append(content[at : at + length])
        at += length
    return pieces


def joined_pieces(pieces: list[bytes]) -> str:
    """The text of tokens' pieces."""
    return b"".join(pieces).decode("utf-8", errors="replace").replace("▁", " ").strip()


def package_folder(package: str, what: str, requirement: str) -> Path:
    """The folder of an installed package, without importing it.

    Args:
        package: its import name.
        what: needs it, which begins the message.
        requirement: what pip is given.

    Raises:
        BadInput: where it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise BadInput(f"{what} needs {package}: pip install {requirement}")
    return Path(found.submodule_search_locations[0])
