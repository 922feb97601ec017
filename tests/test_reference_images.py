"""One's own images as a reference: cached statistics with a real-data baseline, the same in compare and evaluate."""

# Fixtures are imported from another test file.
# ruff: noqa: F401

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.distributed.ranks import Ranks
from hasten.errors import BadInput
from hasten.workflows.reference_images import cached_reference, real_baseline, resolve_reference

from .factories import image_folder, run_cli, tiny_model
from .test_compare import Corner
from .test_compare_more import SMALL, no_page, run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_own_images_are_a_cached_reference_with_a_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lines = image_folder(tmp_path / "real", 60), []
    statistics = cached_reference(folder, Corner(), (1, 8, 8), lines.append)
    assert statistics.count == 60 and statistics.features == "corner" and len(lines) == 1 and "60 images" in lines[0]
    assert statistics.floor_at("frechet", 30) is not None and statistics.floor_at("frechet", 10) is not None
    again = cached_reference(folder, Corner(), (1, 8, 8), lines.append)
    assert len(lines) == 1 and torch.allclose(again.mean, statistics.mean) and again.floor == statistics.floor
    Image.new("L", (12, 12), 7).save(folder / "new.png")
    assert cached_reference(folder, Corner(), (1, 8, 8), lines.append).count == 61 and len(lines) == 2
    rows = run(tiny_model(), tmp_path, SMALL.format(1.0), reference=folder, features=Corner())
    p = rows["less"]["protocol"]
    assert rows["less"]["frechet"] > 0 and p["reference"] == "real, all split, 61 images" and p["features"] == "corner"
    assert p["floors"]["frechet"] == pytest.approx(
        cached_reference(folder, Corner(), (1, 8, 8), print).floor_at("frechet", 10)
    )


def test_the_baseline_compares_two_random_halves() -> None:
    torch.manual_seed(0)
    table = real_baseline(torch.randn(400, 4))["frechet"]
    assert list(table) == [12, 25, 50, 100, 200]
    assert table[12] > 3 * table[200] > 0  # falls with n
    spread = real_baseline(torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 5]))["frechet"]
    assert 0 < spread[200] < 2  # the halves are random ones


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_references_that_do_not_fit_raise_one_line(tmp_path: Path) -> None:
    folder, here = image_folder(tmp_path / "real", 12), torch.device("cpu")
    ranks = Ranks(here)
    for reference, features, shape, message in [
        (folder, None, (1, 8, 8), "give --features"),
        (folder, "fashion", (3, 8, 8), "grey garments"),
        ("fashion", "fashion", (3, 28, 28), "grey garments"),
        (folder, Corner(), (1, 8, 8), "at least 20"),
        ("fashion", Corner(), (1, 8, 8), "not those of corner"),
        (None, "fashion", (1, 8, 8), "give --reference"),
        (folder, "fasion", (1, 8, 8), "did you mean 'fashion'"),
    ]:
        with pytest.raises(BadInput, match=message):
            resolve_reference(reference, features, shape, here, ranks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compare_and_evaluate_agree_on_own_images(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "m")
    image_folder(tmp_path / "real", 40)
    options = ["--reference", tmp_path / "real", "--features", "fashion", "--precision", "fp32", "--n", 10, "--json"]
    (tmp_path / "set.toml").write_text(SMALL.format(1.0))
    code, out, err = run_cli("compare", tmp_path / "m", "--variants", tmp_path / "set.toml", "--timing-batch", 1,
                         "--out", tmp_path / "out", *options)  # fmt: skip
    assert code == 0, err
    assert "reference: 40 images of" in err and "too few for precision" in err
    row = json.loads(out)[1]
    code, out, err = run_cli(
        "evaluate", tmp_path / "m", "--sampler", "ddim", "--steps", 2, "--times", row["times"], *options
    )
    assert code == 0 and "reference: 40 images" not in err, err
    measures = json.loads(out)["measures"]
    assert measures["frechet"]["value"] == pytest.approx(row["frechet"], rel=1e-4)
    assert measures["frechet"]["floor"] == pytest.approx(row["protocol"]["floors"]["frechet"])
    assert "precision" not in measures and row["precision"] is None
