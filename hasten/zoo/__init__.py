"""The bundled models and reference statistics."""

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
    """One bundled model.

    Args:
        name: of the model and its folder.
        summary: one line.
        recipe: how it was trained.
        licence: of its weights.
    """

    name: str
    summary: str
    recipe: str = ""
    licence: str = ""

    @property
    def folder(self) -> Path:
        """The folder with its model.json and weights."""
        return HERE / self.name

    @property
    def size(self) -> int:
        """Total size of the folder in bytes."""
        return sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())


def cards() -> dict[str, Card]:
    """The bundled models by name, those that are installed."""
    with open(HERE / "zoo.toml", "rb") as f:
        table = tomllib.load(f)
    known = {name: Card(name, **entry) for name, entry in table.items()}
    return {name: card for name, card in known.items() if (card.folder / "model.json").is_file()}
