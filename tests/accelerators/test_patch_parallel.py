"""Patches on four processes against one: exact where it says so, and off in the right order where it does not."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators import Conflict, SamplingContext, accelerate
from hasten.accelerators.deep_cache import DeepCache
from hasten.accelerators.patch_parallel import PatchParallel
from hasten.denoiser import Denoiser, reset
from hasten.errors import BadInput
from hasten.guides.cfg import CFG
from hasten.pick import pick
from hasten.samplers import DDIM
from hasten.schedules import VPCosine

from ._ranks import together
from ._tiny import compiled, context_of, denoiser_of, relative, sampled, unet

THERE = all(importlib.util.find_spec(name) for name in ("diffusers", "transformers"))
NETS = ("hasten", "patch2", *(("model", "sd", "sdxl") if THERE else ()))
# How many processes share an image of how many rows of the coarsest level; with 6 for 4 some have two.
WAYS = {"hasten": ((2, 4), (4, 4), (4, 6)), "patch2": ((4, 6),), "model": ((4, 4),), "sd": ((2, 4), (4, 4)),
        "sdxl": ((2, 6),)}  # fmt: skip
MODES: dict[str, Any] = {
    "sync": {"mode": "sync"}, "corrected": {}, "separate": {"norm": "separate"}, "naive": {"mode": "naive"},
    "stale": {"norm": "stale"}, "full": {"norm": "full"},
}  # fmt: skip


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(name: str, dtype: torch.dtype) -> tuple[Any, int, int, dict[str, Tensor]]:
    """A network, its channels, its multiple of rows, and what it is told with two images."""
    if name in ("hasten", "patch2"):
        patch = 1 if name == "hasten" else 2
        net = unet(widths=(8, 16, 16), attention=(1,), patch=patch)
        return net.to(dtype), 2, 4 * patch, {"label": torch.tensor([0, 2])}
    from hasten.adapters.diffusers.wrap import split_network

    from ..adapters import tiny

    if name == "model":  # its downsampler adds its zeros itself, on one side
        return split_network(tiny.unet2d(downsample_padding=0).to(dtype)), 3, 2, {}
    net = tiny.unet2d_condition() if name == "sd" else tiny.sdxl_unet()
    width = 16 if name == "sd" else 32
    cond = {"text": noise(2, 5, width, seed=3, dtype=dtype), "null_text": noise(2, 5, width, seed=4, dtype=dtype)}
    if name == "sdxl":
        cond |= {
            "added_text_embeds": noise(2, 16, seed=5, dtype=dtype),
            "added_time_ids": torch.ones(2, 6, dtype=dtype),
        }
    return split_network(net.to(dtype)), 4, 2, cond


def asked(net: nn.Module, cond: dict[str, Tensor], options: dict[str, Any] | None) -> nn.Module:
    """The guided denoiser, in patches where there are options."""
    plain = Denoiser(net, VPCosine(), "v", clock="t1000").eval()
    inner = plain if options is None else accelerate(plain, [PatchParallel(**options)])
    reset(inner)
    return CFG(scale=3.0).wrap(inner) if cond else inner


# What the four processes do; each returns a dictionary of what the tests look at.


@torch.no_grad()
def exact(ranks: int) -> dict[Any, Any]:
    """Relative errors of synchronous evaluations along a path of given x_t, and the last answer."""
    found: dict[Any, Any] = {}
    for name in NETS:
        for dtype in (torch.float32, torch.float64)[: 2 if name in ("hasten", "sd") else 1]:
            net, channels, multiple, cond = problem(name, dtype)
            for size, rows in WAYS[name]:
                fast = asked(net, cond, {"mode": "sync", "size": size})
                plain, errors = asked(net, cond, None), []
                for k, t in enumerate((0.9, 0.5, 0.2)[: 3 if size == 4 and rows == 4 else 1]):
                    x_t = noise(2, channels, rows * multiple, 8, seed=k, dtype=dtype)
                    answer, expected = fast(x_t, t, **cond), plain(x_t, t, **cond)
                    errors.append(relative(answer, expected))
                found[name, dtype, size, rows] = errors, answer
    return found


@torch.no_grad()
def late(ranks: int) -> dict[Any, Any]:
    """Mean relative errors of what the network says, after the first evaluation of a path from noise to an image."""
    net, schedule = unet(widths=(16, 32, 32), attention=(1,)), VPCosine()
    plain, found = denoiser_of(net), {}
    x0, eps, label = noise(1, 2, 16, 16, seed=1), noise(1, 2, 16, 16, seed=2), torch.tensor([1])
    ways = {8: MODES, 16: dict(list(MODES.items())[:4])}
    both: dict[str, Any] = {"full": {"norm": "full"}, "full, drawn on": {"norm": "full", "forecast": 1}}
    ways |= {32: both, 64: both}
    for T, modes in ways.items():
        times = [0.95 - 0.9 * k / (T - 1) for k in range(T)]
        if T == 32:  # three of the coarsest rows each, for with fewer nothing is drawn on
            x0, eps = noise(1, 2, 48, 16, seed=1), noise(1, 2, 48, 16, seed=2)
        path = [float(schedule.alpha(t)) * x0 + float(schedule.sigma(t)) * eps for t in times]
        expected = [plain.raw(x_t, t, label=label) for x_t, t in zip(path, times)]
        for name, options in modes.items():
            fast: Any = accelerate(plain, [PatchParallel(**{"warmup": 0, "forecast": 0, **options})])
            reset(fast)
            answers = [fast.raw(x_t, t, label=label) for x_t, t in zip(path, times)]
            errors = [relative(a, e) for a, e in zip(answers, expected)]
            found[T, name] = errors[0], sum(errors[1:]) / (T - 1), answers[-1]
    return found


@torch.no_grad()
def counted(ranks: int) -> dict[str, Any]:
    """Messages and bytes of the steady state; again with small chunks, and a trajectory later."""
    net = unet(widths=(8, 16, 16), attention=(1,))
    plain, label, found = denoiser_of(net), torch.tensor([0, 2]), {}
    for chunk, times in ((60, 1), (5, 2)):
        fast: Any = accelerate(plain, [PatchParallel(warmup=1, chunk=chunk)])
        talk = fast.net.exchange
        for again in range(times):
            reset(fast)
            seen = []
            for k in range(4):
                answer = fast.raw(noise(2, 2, 16, 8, seed=k), 0.5, label=label)
                seen.append((talk.step, dict(fast.net.collectives), dict(fast.net.traffic)))
            found[f"{chunk}, {again}"] = seen, answer
        slots = (len(talk.gathers.tracks[0].slots), len(talk.halos.tracks[0].slots))
    found["slots"] = slots
    few = noise(1, 2, 16, 8)  # a batch of another size begins anew, once
    errors = []
    for k in range(3):
        expected = plain.raw(few * (1 + k), 0.5, label=label[:1])
        errors.append(relative(fast.raw(few * (1 + k), 0.5, label=label[:1]), expected))
    found["batch"] = errors
    half: Any = accelerate(plain, [PatchParallel(mode="sync", keys="bf16")])
    x_t = noise(2, 2, 16, 8)
    found["bf16"] = relative(half.raw(x_t, 0.5, label=label), plain.raw(x_t, 0.5, label=label)), dict(half.net.traffic)
    return found


@torch.no_grad()
def along(ranks: int) -> dict[str, Any]:
    """Whole trajectories, other accelerators, texts, and what cannot be."""
    net, found = unet(widths=(8, 16), attention=(1,)), {}
    plain, plan = denoiser_of(net), compiled(DDIM(), 9)
    sync: Any = accelerate(plain, [PatchParallel(mode="sync")], context_of(plan, plain))
    both = accelerate(plain, [DeepCache(every=3), PatchParallel(mode="sync")], context_of(plan, plain))
    alone = accelerate(plain, [DeepCache(every=3)], context_of(plan, plain))
    found["deep_cache"] = relative(sampled(both, plan), sampled(alone, plan))
    short: Any = accelerate(plain, [PatchParallel(warmup=8)], context_of(plan, plain))
    found["warm-up"] = relative(sampled(short, plan), sampled(plain, plan))
    for name, size in (("few", (2, 2, 6, 8)), ("odd", (2, 2, 9, 8))):
        try:
            sync(torch.zeros(size), 0.5)
        except BadInput as error:
            found[name] = str(error)
    try:
        PatchParallel(size=3).apply(plain, SamplingContext())
    except BadInput as error:
        found["size"] = str(error)
    with torch.enable_grad():
        try:
            sync(torch.zeros(2, 2, 8, 8, requires_grad=True), 0.5)
        except BadInput as error:
            found["gradient"] = str(error)
    if not THERE:
        return found
    net, channels, _, cond = problem("sd", torch.float32)
    fast: Any = accelerate(Denoiser(net, VPCosine(), "v", clock="t1000").eval(), [PatchParallel(warmup=0)])
    calls = []
    for name, module in fast.net.net.named_modules():
        if name.endswith(("attn1.to_k", "attn2.to_k")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name.rpartition(".attn")[2]))
    texts = [cond["text"]] * 3 + [cond["text"].clone(), cond["null_text"]]
    count = []
    for text in texts:
        fast(noise(2, channels, 8, 8), 0.5, text=text)
        count.append((calls.count("1.to_k"), calls.count("2.to_k")))
    found["text"] = count
    plain, times = Denoiser(net, VPCosine(), "v", clock="t1000").eval(), [0.9 - 0.1 * k for k in range(9)]
    cached, sync, both = (
        accelerate(plain, ways, SamplingContext(tuple(times)))
        for ways in (
            [DeepCache(every=2)], [PatchParallel(mode="sync")], [DeepCache(every=2), PatchParallel(mode="sync")],
        )
    )  # fmt: skip
    for rows in (8, 12):  # the second does not divide, and with a cache it must be known before x_t is seen
        more = {
            f"down_residual_{k}": noise(2, *shape, seed=k)
            for k, shape in enumerate(((16, rows, 8), (16, rows, 8), (16, rows // 2, 4), (32, rows // 2, 4)))
        }
        more |= {"mid_residual": noise(2, 32, rows // 2, 4, seed=9), "text": cond["text"]}
        for name, fast, alone in (("controlnet", sync, plain), ("controlnet, deep_cache", both, cached)):
            for each in (fast, alone):
                reset(each)
            x_t = [noise(2, channels, rows, 8, seed=k) for k in range(9)]
            errors = [relative(fast(x, t, **more), alone(x, t, **more)) for x, t in zip(x_t, times)]
            found[f"{name}, {rows}"] = max(errors)
    from ..adapters import tiny

    pipe: Any = tiny.sd_pipeline()
    told = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", "height": 32, "width": 32}
    images = [
        each("a photo of the cat", generator=torch.Generator().manual_seed(0), **told).images
        for each in (pipe, hasten.accelerate(pipe, ["patch_parallel:mode=sync"], steps=3))
    ]
    found["pipeline"] = relative(images[1], images[0])
    return found


def everything(rank: int, ranks: int) -> dict[str, Any]:
    return {"exact": exact(ranks), "late": late(ranks), "counted": counted(ranks), "along": along(ranks)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(everything, 4, tmp_path_factory.mktemp("ranks"), seconds=240)


@pytest.mark.parametrize("name", NETS)
def test_synchronous_evaluations_are_those_of_one_process(seen: list[dict[str, Any]], name: str) -> None:
    for key in [key for key in seen[0]["exact"] if key[0] == name]:
        limit = 1e-5 if key[1] is torch.float32 else 1e-12
        for rank in seen:
            errors, answer = rank["exact"][key]
            assert max(errors) < limit, (key, errors)
            assert torch.equal(answer, seen[0]["exact"][key][1]), key  # the same on all, to the bit


def test_what_is_stale_is_off_in_the_right_order(seen: list[dict[str, Any]]) -> None:
    found = seen[0]["late"]
    for T in (8, 16):
        names = [name for each, name in found if each == T]
        first, mean = ({name: found[T, name][k] for name in names} for k in (0, 1))
        assert all(first[name] < 1e-5 for name in names if name != "naive"), first
        assert mean["sync"] < 1e-5 < mean["corrected"] < mean["separate"] < mean["naive"], mean
        for name in names:
            assert all(torch.equal(rank["late"][T, name][2], found[T, name][2]) for rank in seen)
    assert found[8, "full"][1] < found[8, "separate"][1]
    assert found[16, "corrected"][1] < 0.75 * found[8, "corrected"][1]  # smaller steps, less of a change between them


def test_what_is_drawn_on_is_off_in_the_second_order(seen: list[dict[str, Any]]) -> None:
    """Half the step: half the error where others' features are held, a quarter of it where they are drawn on."""
    held, drawn = ([seen[0]["late"][T, name][1] for T in (32, 64)] for name in ("full", "full, drawn on"))
    assert 1.7 < held[0] / held[1] < 2.3 and 3 < drawn[0] / drawn[1] < 6
    assert drawn[1] < 0.5 * held[1]


def expected_traffic(me: int, ranks: int, B: int = 2) -> dict[str, int]:
    """Bytes from the shapes that the plain network's layers are given, in float32."""
    net, size = unet(widths=(8, 16, 16), attention=(1,)), {"halo": 0, "keys": 0, "moments": 0, "rows": 0}

    def look(module: Any, given: Any, answer: Tensor) -> None:
        x, kind = given[0], type(module).__name__
        if kind == "Conv2d" and module.kernel_size == (3, 3) and module is not net.conv_in:
            down, up = 1, int(module.stride == (1, 1))  # a window of stride 2 ends with the part
            row = 4 * x.shape[0] * x.shape[1] * x.shape[3]
            size["halo"] += row * (down * (me < ranks - 1) + up * (me > 0))
        elif kind == "GroupNorm":
            size["moments"] += 4 * 2 * x.shape[0] * module.num_groups * (ranks - 1)
        elif kind == "Attention":
            size["keys"] += 4 * 2 * x.numel() // ranks * (ranks - 1)

    for module in net.modules():
        module.register_forward_hook(look)
    answer = net(noise(B, 2, 16, 8), torch.ones(B))
    return {**size, "rows": 4 * answer.numel() // ranks * (ranks - 1)}


def test_messages_and_bytes_are_counted(seen: list[dict[str, Any]]) -> None:
    for me, rank in enumerate(seen):
        found = rank["counted"]
        gathers, halos = found["slots"]
        assert gathers > 10 and halos > 10
        for chunk in (60, 5):
            for again in range(1 if chunk == 60 else 2):
                steps, answer = found[f"{chunk}, {again}"]
                assert [step for step, *_ in steps] == [1, 2, 3, 4]
                assert all(traffic == expected_traffic(me, 4) for *_, traffic in steps)
                at_once = {"gather": gathers, "neighbours": halos, "rows": 1}
                chunks = {"gather": -(-gathers // chunk), "neighbours": -(-halos // chunk), "rows": 1}
                assert [spoke for _, spoke, _ in steps] == [at_once] * 2 + [chunks] * 2
                assert torch.equal(answer, found["60, 0"][1])  # nothing depends on when it is sent, or on the last run
        first, second, _ = found["batch"]
        assert first < 1e-5 < second
        error, traffic = found["bf16"]
        assert 1e-6 < error < 1e-2 and 2 * traffic["keys"] == expected_traffic(me, 4)["keys"]


def test_trajectories_conditions_and_what_cannot_be(seen: list[dict[str, Any]]) -> None:
    found = seen[1]["along"]
    assert found["deep_cache"] < 1e-4 and found["warm-up"] < 1e-4
    assert "6 rows are 3 at the coarsest level" in found["few"] and "found 4 processes" in found["few"]
    assert "choices: 1 to 3" in found["few"] and "multiples of 2 rows, found 9" in found["odd"]
    assert "4 processes make no groups of 3 (choices: 1, 2, 4)" in found["size"]
    assert "no gradient" in found["gradient"]
    if THERE:
        first = found["text"][0][1]
        assert [own for own, _ in found["text"]] == [k * found["text"][0][0] for k in range(1, 6)]
        assert [other for _, other in found["text"]] == [first] * 4 + [2 * first]  # once, until the text is another
        told = [error for name, error in found.items() if name.startswith("controlnet")]
        assert len(told) == 4 and max(told) < 1e-5 and found["pipeline"] < 1e-5


def test_in_one_process_nothing_changes() -> None:
    plain = denoiser_of(unet(attention=(1,)))
    fast: Any = PatchParallel().apply(plain, SamplingContext())
    plan = compiled(DDIM(), 10)
    assert torch.equal(sampled(fast, plan), sampled(plain, plan))
    assert fast.net.net is plain.net and not any(fast.net.traffic.values())
    assert fast.null_label == plain.null_label == 3


def test_claims_and_names() -> None:
    assert pick("accelerators", "patch_parallel:warmup=2,mode=sync").claims == {"space"}
    with pytest.raises(Conflict, match="'features'"):
        accelerate(denoiser_of(unet()), [PatchParallel(), DeepCache()], SamplingContext(tuple(range(10))))
