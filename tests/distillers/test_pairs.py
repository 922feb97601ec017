"""The store of pairs: reproducible from the seeds, and damage to its files is detected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distillers import DistillTask
from hasten.distillers._pair_making import make_pairs
from hasten.distillers._pairs import FIRST_SEED, Pairs
from hasten.errors import BadInput
from hasten.exact import GaussianMixture
from hasten.plan.draw import draw
from hasten.samplers.ddim import DDIM
from hasten.samplers.unipc import UniPC
from hasten.sampling import Noise
from hasten.schedules import VPCosine
from hasten.times import CosineAngle, Trailing
from tests.distillers import _toy

SHAPE = (1, 4, 4)


def pictures() -> GaussianMixture:
    """Three classes of images of 4 x 4 in closed form."""
    g = torch.Generator().manual_seed(1)
    means = 1.6 * torch.rand(3, *SHAPE, generator=g, dtype=torch.float64) - 0.8
    return GaussianMixture(torch.ones(3), means, torch.full_like(means, 0.01), VPCosine(offset=0.0), labels=[0, 1, 2])


class Blank:
    """Batches that only tell the shape, and that there are labels."""

    batch_size = 8

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(8, *SHAPE), "label": torch.zeros(8, dtype=torch.long)}


def task(out: Path, teacher: nn.Module | None = None, **more: Any) -> DistillTask:
    exact = pictures()
    more.setdefault("codec", "image")
    return DistillTask(
        teacher=teacher or exact, denoiser=exact, batches=Blank(), shape=SHAPE, out=out, show=False, **more
    )  # type: ignore[arg-type]


class Dies(nn.Module):
    """The same teacher, killed after some calls."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.inner, self.left = pictures(), after

    @property
    def schedule(self) -> Any:
        return self.inner.schedule

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner(x, t, **cond)


HOW: dict[str, Any] = {"steps": 6, "batch_size": 10, "block": 25}


def test_a_pair_is_made_again_from_its_seed(tmp_path: Path) -> None:
    pairs = task(tmp_path).pairs("a", 60, **HOW)
    assert len(pairs) == 60 and (tmp_path / "pairs" / "a" / "ends-00002.npy").is_file()
    seeds = [FIRST_SEED + k for k in (0, 24, 25, 59)]
    label = torch.tensor([0, 0, 1, 2])
    x = draw(pictures(), UniPC(), CosineAngle()(VPCosine(offset=0.0), 6), Noise(seeds, SHAPE), label=label)
    got = pairs[[0, 24, 25, 59]]
    assert x.abs().max() < 1 and x.std() > 0.3  # nothing was clipped, and there is something to see
    assert (got["x"] - x).abs().max() <= 0.5 / 127.5 + 1e-6
    assert torch.equal(got["noise"], Noise(seeds, SHAPE).initial())
    assert torch.equal(got["label"], label)
    assert torch.equal(pairs[25]["x"], got["x"][2]) and torch.equal(pairs[-1]["noise"], got["noise"][3])
    assert torch.equal(pairs[24:26]["x"], got["x"][1:3])
    assert torch.equal(pairs.subset(20)[5]["x"], got["x"][2])


def test_other_runs_have_other_noise(tmp_path: Path) -> None:
    """A CPU generator knows 2^32 seeds: runs must differ within those."""
    first = task(tmp_path / "0").pairs("a", 5, **HOW)
    second = task(tmp_path / "1", seed=3).pairs("a", 5, **HOW)
    assert (first[:]["noise"] - second[:]["noise"]).abs().amax((1, 2, 3)).min() > 0.1
    assert (second.config["seed"] - FIRST_SEED) % 2**32 >= 10_000_000


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("calls", [3, 6 * 3 + 2, 6 * 6 + 3])
def test_killed_and_gone_on_is_undisturbed(tmp_path: Path, calls: int) -> None:
    """At three places: in the first block, in the second, and between its batches. The teacher must count as the same."""
    whole = task(tmp_path / "whole", Dies(10**6)).pairs("a", 60, **HOW)
    with pytest.raises(KeyboardInterrupt):
        task(tmp_path / "cut", Dies(calls)).pairs("a", 60, **HOW)
    folder = tmp_path / "cut" / "pairs" / "a"
    done = len(json.loads((folder / "pairs.json").read_text())["blocks"]) if calls > 6 * 3 else 0
    assert done == (0 if calls < 18 else 1 if calls < 36 else 2)
    (folder / "ends-00002.npy.tmp").write_bytes(b"half of a")  # killed while a file was written
    (folder / "ends-00002.npy").write_bytes(b"written but not listed")
    pairs = task(tmp_path / "cut", Dies(10**6)).pairs("a", 60, **HOW)
    assert files(folder) == files(whole.folder)
    assert torch.equal(pairs[:]["x"], whole[:]["x"])


def test_a_whole_store_asks_the_teacher_nothing_and_can_grow(tmp_path: Path) -> None:
    small = task(tmp_path / "a", Dies(10**6)).pairs("a", 30, **HOW)
    again = task(tmp_path / "a", Dies(0)).pairs("a", 30, **HOW)
    assert torch.equal(small[:]["x"], again[:]["x"])
    assert len(task(tmp_path / "a", Dies(0)).pairs("a", 20, **HOW)) == 20
    grown = task(tmp_path / "a", Dies(10**6)).pairs("a", 60, **HOW)
    assert files(grown.folder) == files(task(tmp_path / "b", Dies(10**6)).pairs("a", 60, **HOW).folder)


def test_damage_is_noticed(tmp_path: Path) -> None:
    pairs = task(tmp_path).pairs("a", 60, **HOW)
    file = pairs.folder / "ends-00001.npy"
    good = file.read_bytes()
    for bad in (good[:-3], good[:-3] + bytes([good[-3] ^ 1]) + good[-2:]):
        file.write_bytes(bad)
        with pytest.raises(BadInput, match="ends-00001.npy is damaged: remove .* again"):
            task(tmp_path).pairs("a", 60, **HOW)
    file.unlink()
    with pytest.raises(BadInput, match="ends-00001.npy is missing"):
        task(tmp_path).pairs("a", 60, **HOW)
    file.write_bytes(good)
    task(tmp_path).pairs("a", 60, **HOW)
    (pairs.folder / "pairs.json").write_text("{")
    with pytest.raises(BadInput, match="cannot read .*pairs.json"):
        task(tmp_path).pairs("a", 60, **HOW)


def test_pairs_of_other_settings_are_refused(tmp_path: Path) -> None:
    task(tmp_path).pairs("a", 10, **HOW)
    for options, word in (
        ({"steps": 7}, "grid"), ({"sampler": "ddim"}, "sampler"), ({"labels": "random"}, "labels"),
        ({"dtype": "float32"}, "dtype"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"pairs with {word} .* not .*use the same settings, or remove"):
            task(tmp_path).pairs("a", 10, **{**HOW, **options})
    with pytest.raises(BadInput, match="pairs with seed"):
        task(tmp_path, seed=1).pairs("a", 10, **HOW)
    other = pictures()
    other.means[0, 0] += 1e-3
    with pytest.raises(BadInput, match="pairs with teacher"):
        task(tmp_path, other).pairs("a", 10, **HOW)
    for options, word in (
        ({"sampler": "ddpm"}, "unknown sampler of pairs 'ddpm'.*ddim"), ({"times": "x"}, "unknown time grid"),
        ({"dtype": "int8"}, "uint8"), ({"sampler": "ddim", "states": (0.3,)}, "t = 0.3 is not on"),
        ({"states": (1.0,)}, "unipc evaluates the teacher elsewhere"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            task(tmp_path).pairs("b", 10, **{**HOW, **options})


def test_batches_are_permutations_and_repeat(tmp_path: Path) -> None:
    pairs = task(tmp_path).pairs("a", 30, labels="random", **HOW)
    batches = pairs.batches(8, seed=2)
    order = torch.cat([batches.indices(k) for k in range(15)])
    for epoch in range(4):
        assert torch.equal(order[30 * epoch : 30 * (epoch + 1)].sort().values, torch.arange(30))
    assert not torch.equal(order[:30], order[30:60])
    batch, again = batches[7], pairs.batches(8, seed=2)[7]
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert batch["x"].dtype == torch.float32 and batch["label"].dtype == torch.int64
    picked = pairs[batches.indices(7)]
    assert all(torch.equal(batch[key], picked[key]) for key in batch)  # noise, end and label stay together


def test_random_labels_are_even(tmp_path: Path) -> None:
    pairs = make_pairs(
        task(tmp_path), tmp_path, 3000, labels="random", steps=1, sampler="ddim", times="trailing", block=1000
    )
    counts = torch.bincount(pairs[:]["label"], minlength=3)
    assert (counts - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5
    assert (pairs[:]["label"][1:] == pairs[:]["label"][:-1]).float().mean() < 0.45


def test_states_are_those_of_the_path(tmp_path: Path) -> None:
    """On the way the teacher passes what a shorter grid, the first steps of the same one, ends with."""
    states = (0.75, 0.25)
    options = {"steps": 8, "sampler": DDIM(), "times": Trailing(), "states": states, "dtype": "float32"}
    pairs = task(tmp_path).pairs("a", 12, **options)
    grid = Trailing()(VPCosine(offset=0.0), 8)
    noise, label = Noise(range(FIRST_SEED, FIRST_SEED + 12), SHAPE), torch.arange(12) % 3
    assert pairs[3]["states"].shape == (2, *SHAPE)
    for number, stop in enumerate((3, 7)):
        z = draw(pictures(), DDIM(), grid[:stop], noise, label=label)
        assert (pairs[:]["states"][:, number] - z).abs().max() < 2e-3  # float16
    x = draw(pictures(), DDIM(), grid, noise, label=label)
    assert torch.equal(pairs[:]["x"], x)


def test_samples_that_are_no_images_are_stored_exactly(tmp_path: Path) -> None:
    toy = _toy.task(tmp_path, teacher=_toy.mixture())
    pairs = toy.pairs("a", 2000, steps=32)
    assert isinstance(pairs, Pairs) and pairs[:]["x"].dtype == torch.float32
    assert torch.equal(pairs[:]["label"], torch.arange(2000) % 3)
    assert pairs[:]["x"].abs().max() > 1.2  # nothing is clipped
    noise = Noise(range(FIRST_SEED, FIRST_SEED + 50), (2,), torch.float64)
    end = draw(_toy.mixture(), UniPC(3), CosineAngle()(VPCosine(offset=0.0), 400), noise, label=torch.arange(50) % 3)
    assert (pairs[:50]["x"] - end).abs().median() < 2e-3
