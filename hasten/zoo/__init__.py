"""The models that travel with hasten, and the statistics they are measured against."""

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
    """One bundled model: its name, its folder, and a line on what it is, how it was made and its licence."""

    name: str
    summary: str
    recipe: str = ""
    licence: str = ""

    @property
    def folder(self) -> Path:
        """Where its model.json and weights lie."""
        return HERE / self.name

    @property
    def size(self) -> int:
        """Bytes of everything in the folder."""
        return sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())


def cards() -> dict[str, Card]:
    """The bundled models by name; only those whose files are here."""
    with open(HERE / "zoo.toml", "rb") as f:
        table = tomllib.load(f)
    found = {name: Card(name, **entry) for name, entry in table.items()}
    return {name: card for name, card in found.items() if (card.folder / "model.json").is_file()}
