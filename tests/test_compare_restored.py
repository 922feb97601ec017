"""Comparisons of models that restore images: figures against the truth, and the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.compare import compare, jobs, report
from hasten.compare.restored_rows import restored_row
from hasten.errors import BadInput
from hasten.metrics.restoration import consistency_error, restoration_psnr
from hasten.workflows.restoration import open_pairs

from .tasks.super_resolution.tiny import local_model
from .workflows.test_restoration import Means, photographs

SET = """
n = 12
rounds = 1
[reference]
name = "4 steps"
sampler = "ddim"
steps = 4
[[variant]]
name = "1 step"
sampler = "ddim"
steps = 1
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the rows of a comparison."""
    folder = tmp_path_factory.mktemp("restored")
    photographs(folder / "data", ((32, 32), (32, 48), (16, 32)))
    (folder / "set.toml").write_text(SET)
    options: dict[str, Any] = {"data": folder / "data", "variants": folder / "set.toml", "features": Means()}
    options |= {"precision": "fp32", "timing_batch": 2, "out": folder / "out", "show": False}
    with pytest.MonkeyPatch.context() as patch:  # plots and counts of operations are tested elsewhere
        for module, name in ((report, "plot_quality"), (report, "plot_guidance_sweep"), (jobs, "row_macs")):
            patch.setattr(module, name, lambda *_, **__: None)
        return folder, compare(local_model(side=8), n=11, **options)


def test_rows_are_measured_against_the_true_images(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = finished
    model = local_model(side=8)
    pairs = open_pairs(model, folder / "data", n=11)
    images = model.sample(11, sampler="ddim", times="uniform", steps=1, images=pairs.sources_of(range(11)))
    row, truths = rows[1], pairs.groups[0].truths
    assert [one["name"] for one in rows] == ["4 steps", "1 step"] and row["nfe"] == 1
    assert row["truth_psnr"] == pytest.approx(float(restoration_psnr(images, truths).mean()))
    expected = float(consistency_error(images, pairs.groups[0].sources, 2).mean())
    assert row["consistency"] == pytest.approx(expected)
    low, high = row["paired"]["truth_psnr"][1:]
    assert low < row["truth_psnr"] < high and row["frechet"] is not None and row["precision"] is None
    said = row["protocol"]["restoration"]
    assert said["factor"] == 2 and said["bicubic"]["truth_psnr"] > 0 and row["protocol"]["n"] == 11
    stored = np.load(folder / "out" / "samples" / f"{row['key']}.npy")
    assert stored.shape == (10, 3, 16, 16)
    assert np.abs(stored[0].astype(int) - ((images[0] + 1) * 127.5).round().numpy()).max() <= 1


def test_the_page_shows_input_bicubic_rows_and_truth(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = finished
    text = (folder / "out" / "report.html").read_text()
    for kind in ("qi-0", "qb-0", "p0-0", "p1-0", "qt-0"):
        assert text.count(f".{kind}{{background-image") == 1 and f'<i class="{kind}"></i>' in text, kind
    tiles = re.findall(r'<figure class="(\w+)"><button', text)
    assert tiles[:5] == ["input", "bicubic", "row", "row", "truth"] and len(tiles) == 50
    assert "input, 8x8" in text and "the input itself, enlarged" in text
    command = report.sample_command(rows[1])
    assert command == "hasten upscale IMAGES --model local --sampler ddim --times uniform --steps 1 --guidance-scale 1"
    assert "PSNR<br>to truth" in text and "LPIPS is left out" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text), "the page needs something beside itself"


def test_the_fastest_row_that_keeps_the_quality_is_recommended() -> None:
    def row(name: str, seconds: float, psnr: float, lpips: float | None, role: str = "variant") -> dict[str, Any]:
        return {"name": name, "role": role, "seconds_per_image": seconds, "truth_psnr": psnr, "truth_lpips": lpips}

    rows = [row("a", 9, 27, 0.2, "reference"), row("b", 4, 20, 0.21), row("c", 2, 27.5, 0.23), row("d", 3, 27, 0.22)]
    assert restored_row(rows) is rows[3]
    blind = [{**one, "truth_lpips": None} for one in rows]
    assert restored_row(blind) is blind[2]
    assert restored_row([rows[0], rows[2]]) is None and restored_row(rows[1:]) is None


def test_what_such_a_comparison_does_not_take_is_said(
    finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = finished
    model = local_model(side=8)
    with pytest.raises(BadInput, match="give --data, true images of a test split"):
        compare(model, out=tmp_path / "out", show=False)
    with pytest.raises(BadInput, match="takes no minutes"):
        compare(model, out=tmp_path / "out", show=False, data=folder / "data", minutes=1)
    few = photographs(tmp_path / "few", ((32, 32), (32, 32)))
    with pytest.raises(BadInput, match="gives 8 pairs: a comparison needs at least 10"):
        compare(model, out=tmp_path / "out", show=False, data=few)
    assert torch.equal(*(open_pairs(model, folder / "data", n=k).groups[0].truths[:9] for k in (9, 12)))
