"""The two branches of guidance on two processes against one, and both kinds of parts on four."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from hasten.accelerators import SamplingContext, accelerate
from hasten.accelerators.cfg_parallel import CfgParallel
from hasten.accelerators.deep_cache import DeepCache
from hasten.accelerators.patch_parallel import PatchParallel
from hasten.denoiser import reset
from hasten.errors import BadInput
from hasten.guides.cfg import CFG
from hasten.pick import pick
from hasten.samplers import DDIM

from ._ranks import together
from ._tiny import compiled, context_of, denoiser_of, relative, sampled, unet

PLAN = compiled(DDIM(), 12)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def branches(rank: int, ranks: int) -> dict[str, Any]:
    """Two processes: guidance and batches of all kinds."""
    net, result = unet(attention=(1,)), {}
    plain = denoiser_of(net)
    halved: Any = accelerate(plain, [CfgParallel()])
    sizes = []
    net.conv_in.register_forward_hook(lambda _module, given, _answer: sizes.append(len(given[0])))
    for B in (1, 2, 3, 6):
        x_t, label, t = noise(B, 2, 8, 8, seed=B), torch.arange(B) % 3, torch.linspace(0.1, 0.9, B)
        expected = plain(x_t, t, label=label), plain.raw(x_t, t, label=label)
        sizes.clear()
        outputs = halved(x_t, t, label=label), halved.raw(x_t, t, label=label)
        result[f"batch {B}"] = sizes[:], [relative(a, e) for a, e in zip(outputs, expected)], outputs[0], halved.traffic
    x_t, label = noise(3, 2, 8, 8), torch.tensor([0, 2, 1])
    for name, guide in (("guided", CFG(scale=3.0)), ("interval", CFG(scale=3.0, interval=(0.5, 2.0)))):
        for t in (0.9, 0.5, 0.1):
            result[f"{name} {t}"] = relative(
                guide.wrap(halved)(x_t, t, label=label), guide.wrap(plain)(x_t, t, label=label)
            )
    cached = accelerate(plain, [CfgParallel(), DeepCache(every=3)], context_of(PLAN, plain))
    alone = accelerate(plain, [DeepCache(every=3)], context_of(PLAN, plain))
    result["deep_cache"] = relative(sampled(cached, PLAN), sampled(alone, PLAN))
    result["samples"] = relative(sampled(halved, PLAN), sampled(plain, PLAN))
    with torch.enable_grad():
        try:
            halved(noise(2, 2, 8, 8).requires_grad_(), 0.5)
        except BadInput as error:
            result["gradient"] = str(error)
    return result


@torch.no_grad()
def both(rank: int, ranks: int) -> dict[str, Any]:
    """Four processes: two for each branch, which share its images."""
    net, result = unet(widths=(8, 16, 16), attention=(1,)), {}
    plain = denoiser_of(net)
    exact: Any = accelerate(plain, [CfgParallel(), PatchParallel(mode="sync")])
    ready = accelerate(plain, [PatchParallel(mode="sync", size=2)])
    result["ranks"] = exact.pair.ranks, exact.net.exchange.group.ranks
    label, guide, late = (
        torch.tensor([0, 2, 1]),
        CFG(scale=3.0),
        accelerate(plain, [PatchParallel(warmup=1), CfgParallel()]),
    )
    reset(late)
    errors = []
    for k, t in enumerate((0.9, 0.8, 0.7, 0.6)):
        x_t = noise(3, 2, 16, 8, seed=k)
        expected = guide.wrap(plain)(x_t, t, label=label)
        outputs = [guide.wrap(one)(x_t, t, label=label) for one in (exact, ready, late)]
        errors.append([relative(output, expected) for output in outputs])
        result[f"answer {k}"] = outputs
    result["errors"], result["traffic"] = errors, (exact.traffic, exact.net.traffic)
    try:
        CfgParallel().apply(plain, SamplingContext())
    except BadInput as error:
        result["alone"] = str(error)
    return result


def gone(rank: int, ranks: int, file: str) -> None:
    """A process that ends during a sampling: the other raises."""
    plain = denoiser_of(unet())
    fast = accelerate(plain, [PatchParallel(warmup=0)])
    for k in range(6):
        if rank == 1 and k == 3:
            os._exit(0)  # without a word
        try:
            fast(noise(1, 2, 8, 8, seed=k), 0.5)
        except RuntimeError as error:
            Path(file).write_text(f"{k} {error}")
            raise


@torch.no_grad()
def freed(rank: int, ranks: int) -> list[float]:
    """Networks that are freed while messages of the other process are on their way to them."""
    plain, errors = denoiser_of(unet()), []
    for turn in range(3):
        fast: Any = accelerate(plain, [PatchParallel(warmup=0)])
        finish = fast.net.exchange.finish
        for k in range(3):
            x_t = noise(1, 2, 8, 8, seed=turn)
            if rank == 1:  # it talks a little later than the other is done
                fast.net.exchange.finish = lambda finish=finish: (time.sleep(0.2), finish())
            output = fast(x_t, 0.5)
            if k == 0:
                errors.append(relative(output, plain(x_t, 0.5)))
        del fast, finish
        gc.collect()
    return errors


def test_two_processes_give_the_output_of_one(tmp_path: Path) -> None:
    ranks = together(branches, 2, tmp_path)
    for me, result in enumerate(ranks):
        for B in (1, 2, 3, 6):
            sizes, errors, output, traffic = result[f"batch {B}"]
            assert sizes == [-(-B // 2)] * 2 and max(errors) < 1e-6, B
            assert torch.equal(output, ranks[1 - me][f"batch {B}"][2])  # the same on both, to the bit
            assert traffic == {"rows": 4 * -(-B // 2) * 2 * 8 * 8}
        for name in ("guided", "interval"):
            assert max(result[f"{name} {t}"] for t in (0.9, 0.5, 0.1)) < 1e-5
        assert result["deep_cache"] < 1e-4 and result["samples"] < 1e-4 and "no gradient" in result["gradient"]


def test_patches_and_branches_together(tmp_path: Path) -> None:
    ranks = together(both, 4, tmp_path)
    assert [result["ranks"] for result in ranks] == [
        ((0, 2), (0, 1)),
        ((1, 3), (0, 1)),
        ((0, 2), (2, 3)),
        ((1, 3), (2, 3)),
    ]
    for result in ranks:
        for k, (exact, ready, late) in enumerate(result["errors"]):
            assert exact < 1e-5 and ready < 1e-5
            assert late < 1e-5 if k < 2 else 1e-4 < late < 1  # warm-up + 1 evaluations are exact
            assert all(torch.equal(mine, first) for mine, first in zip(result[f"answer {k}"], ranks[0][f"answer {k}"]))
        assert result["traffic"][0] == {"rows": 4 * 3 * 2 * 16 * 8}  # half of the doubled batch, all its rows
        assert result["traffic"][1]["rows"] == 4 * 3 * 2 * 8 * 8
        assert "cfg_parallel takes 2 processes, or 2 n with patch_parallel, found 4" in result["alone"]


def test_a_lost_process_ends_the_others(tmp_path: Path) -> None:
    message, begin = tmp_path / "said", time.monotonic()
    with pytest.raises(ProcessRaisedException, match="RuntimeError"):
        together(gone, 2, tmp_path, str(message), seconds=60)
    assert time.monotonic() - begin < 55  # no hang
    query, _, error = message.read_text().partition(" ")
    assert int(query) >= 3 and any(word in error.lower() for word in ("closed", "reset", "peer")), error


def test_a_freed_network_waits_for_its_messages(tmp_path: Path) -> None:
    for errors in together(freed, 2, tmp_path, seconds=40):
        assert len(errors) == 3 and max(errors) < 1e-5


def test_in_one_process_nothing_changes() -> None:
    plain = denoiser_of(unet(attention=(1,)))
    fast: Any = accelerate(plain, [CfgParallel(), PatchParallel()], context_of(PLAN, plain))
    assert torch.equal(sampled(fast, PLAN), sampled(plain, PLAN))
    assert fast.null_label == 3 and fast.traffic == {"rows": 0}
    assert pick("accelerators", "cfg_parallel").claims == {"branches"}
    assert CfgParallel.stage > PatchParallel.stage


def test_processes_that_were_not_joined_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    for accelerator in (CfgParallel(), PatchParallel()):
        with pytest.raises(BadInput, match=r"joined first: hasten.Ranks.start\(\)"):
            accelerate(denoiser_of(unet()), [accelerator])


def test_accelerators_read_the_claims_of_the_others() -> None:
    class Asks:
        stage, claims = 15, frozenset({"mine"})

        def apply(self, denoiser: Any, context: SamplingContext) -> Any:
            self.told = context.claimed
            return denoiser

    one = Asks()
    accelerate(denoiser_of(unet()), [CfgParallel(), one, PatchParallel()])
    assert one.told == {"mine", "space", "features", "branches"}
