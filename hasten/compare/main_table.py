"""The columns of the main table of a report: what every row costs, and its figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MainColumn:
    """A column of the main table.

    Args:
        cell: of `report.format_cells`.
        head: HTML.
        title: what it is.
        below: cells that are shown in small print below.
        quality: whether it is there only where distances to real images were measured.
        real: whether real images have this figure.
        strong: whether it is emphasised.
    """

    cell: str
    head: str
    title: str = ""
    below: tuple[str, ...] = ()
    quality: bool = False
    real: bool = False
    strong: bool = False

    def small(self, cells: Mapping[str, str], absent: Collection[str]) -> str:
        """What is shown in small print: the cells below that have a figure; nothing below a missing one."""
        texts = [cells[name] for name in self.below if name not in absent]
        return " · ".join(text for text in texts if text not in ("", "–"))


EQUAL = (
    "this row's distance over that of the reference with as few evaluations; of an accelerated row, over that of the "
    "best plain row that takes no more time"
)
MATCH = "how often the judge finds the right caption among the others, with its standard error"
PARTS = "below: milliseconds of text encoder + network + image decoder"
TRUTH_HEADS = {
    "truth_psnr": ("PSNR<br>to truth", "dB to the true images, on 8 bits"),
    "truth_ssim": ("SSIM", "structural similarity to the true images"),
    "truth_lpips": ("LPIPS", "perceptual distance to the true images"),
    "consistency": ("consis-<br>tency", "RMS error of the images, reduced again, to the inputs, in units of 1/255"),
}
SAME = "to the reference's images of the same seeds"


def main_columns(quality: bool, absent: Collection[str]) -> list[MainColumn]:
    """The columns in their order.

    Args:
        quality: whether distances to real images were measured.
        absent: cells that no row has.
    """
    psnr = "PSNR dB<br>RMS" + ("" if "ssim" in absent else "<br>SSIM")
    every = [
        MainColumn("speedup", "speed-<br>up", below=("speedup_spread",), strong=True),
        MainColumn("frechet", "Fréchet<br>distance", below=("frechet_spread",), quality=True, real=True, strong=True),
        MainColumn("ratio", "× reference<br>at equal cost", EQUAL, quality=True),
        *(
            MainColumn(name, head, title, (f"{name}_spread",), real=True, strong=name in ("truth_psnr", "truth_lpips"))
            for name, (head, title) in TRUTH_HEADS.items()
        ),
        MainColumn("match", "prompt<br>match", MATCH, ("match_spread",), real=True, strong=True),
        MainColumn("diversity", "diver-<br>sity", "mean distance of two images of one prompt", ("diversity_spread",)),
        MainColumn("psnr", psnr, SAME, ("psnr_spread", "rms", "ssim"), strong=not quality),
        MainColumn("nfe", "NFE", "network evaluations of an image; a guided one counts 2"),
        MainColumn("seconds", "seconds<br>/image", "" if "parts" in absent else PARTS, ("parts",)),
        MainColumn("guidance", "guidance<br>scale"),
        MainColumn("macs", "GMACs<br>/image", "multiply-accumulates of the network, 10⁹"),
        MainColumn("kid", "KID<br>×10³", "kernel inception distance", ("kid_spread",), quality=True, real=True),
        *(
            MainColumn(name, name, below=(f"{name}_spread",), quality=True, real=True)
            for name in ("precision", "recall", "coverage")
        ),
        MainColumn("accuracy", "class<br>acc.", "", ("accuracy_spread",), quality=True, real=True),
        MainColumn("memory", "peak<br>MiB", "peak memory while the row was sampled"),
    ]
    return [column for column in every if column.cell not in absent and (quality or not column.quality)]


def format_parts(parts: Mapping[str, float] | None) -> str:
    """Milliseconds of an image by part: text encoder, network, image decoder."""
    if parts is None:
        return ""
    times = [1e3 * parts[name] for name in ("text", "network", "decoder")]
    return " + ".join(f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in times)
