"""The bundled models, their LoRAs and light decoders, and reference statistics."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """One bundled model, or an addition to one.

    Args:
        name: of the model and its folder; of a LoRA without `.safetensors`.
        summary: one line.
        recipe: how it was trained.
        licence: of its weights.
        kind: `model`, or an addition to the model that `of` names: `lora`, `decoder`.
        of: the model that it is an addition to.
    """

    name: str
    summary: str
    recipe: str = ""
    licence: str = ""
    kind: str = "model"
    of: str = ""

    @property
    def folder(self) -> Path:
        """The folder with its model.json and weights; the file of a LoRA."""
        return HERE / (f"{self.name}.safetensors" if self.kind == "lora" else self.name)

    @property
    def size(self) -> int:
        """Total size of its files in bytes."""
        files = [self.folder] if self.folder.is_file() else self.folder.rglob("*")
        return sum(f.stat().st_size for f in files if f.is_file())


def cards() -> dict[str, Card]:
    """The bundled models by name, those that are installed."""
    models = {name: card for name, card in listed().items() if card.kind == "model"}
    return {name: card for name, card in models.items() if (card.folder / "model.json").is_file()}


def additions() -> dict[str, Card]:
    """The bundled LoRAs and decoders by name, those that are installed."""
    return {name: card for name, card in listed().items() if card.kind != "model" and card.folder.exists()}


def listed() -> dict[str, Card]:
    """All entries of zoo.toml."""
    with open(HERE / "zoo.toml", "rb") as f:
        return {name: Card(name, **entry) for name, entry in tomllib.load(f).items()}


def find_file(name: str | Path) -> Path:
    """A file or folder by its path, else a bundled LoRA, decoder or model by its name (or by its path in the zoo)."""
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    known = cards() | additions()
    if str(name) in known:
        return known[str(name)].folder
    return HERE / path if (HERE / path).exists() else path
