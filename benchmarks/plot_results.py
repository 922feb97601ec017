"""Draw docs/images/speed.svg from the recorded table "Together" of RESULTS.md: speed-up against Fréchet distance.

python -m benchmarks.plot_results
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "images" / "speed.svg"
# row of the table: its label in the plot, and where the label goes (points)
LABELS = {
    "DDIM, 50 steps": ("DDIM, 50 steps", (-8, -15)),
    "DDIM, 8 steps": ("DDIM, 8 steps", (6, -3)),
    "DeepCache, every 3, extrapolated": ("DeepCache", (-22, 8)),
    "W8A8": ("int8", (-8, -15)),
    "**W8A8 and encoder propagation (14 key steps)**": ("int8 + encoder propagation", (-20, 8)),
    "UniPC-3, 8 steps": ("UniPC-3, 8 steps", (-50, -15)),
    "**UniPC-3, 8 steps, W8A8**": ("UniPC-3, 8 steps, int8", (-30, -15)),
    "student, 8 steps, W8A8": ("student, 8 steps, int8", (-88, 8)),
    "**student, 4 steps, W8A8**": ("student, 4 steps, int8", (-86, 8)),
}


@dataclass(frozen=True)
class Row:
    """A row of the table: what was sampled how, evaluations an image, speed-up, Fréchet distance."""

    name: str
    nfe: int
    speedup: float
    distance: float


def rows() -> list[Row]:
    """The recorded rows, the first of which is the baseline."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    table = re.search(r"\| *\| evaluations an image \| speed-up \| distance \|.*\n\|[- |]+\n((?:\|.*\n)+)", text)
    assert table is not None
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table[1].splitlines()]
    return [Row(c[0], int(c[1]), float(c[2].strip("*")), float(c[3].strip("*"))) for c in cells]


def main() -> None:
    """Write the plot, without a date, so that the same table gives the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "hasten", "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    for row in rows():
        label, offset = LABELS.get(row.name, ("", (0, 0)))
        axes.plot(row.speedup, row.distance, "o", color="#1a6fb0" if label else "#b0c4d4", markersize=6 if label else 4)
        if label:
            axes.annotate(label, (row.speedup, row.distance), offset, textcoords="offset points")
    axes.axhline(rows()[0].distance, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 35])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.minorticks_off()
    axes.set_ylim(0.8, 1.9)
    axes.set_xlabel("times faster than 50 guided steps of DDIM (one CPU thread)")
    axes.set_ylabel("Fréchet distance (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
