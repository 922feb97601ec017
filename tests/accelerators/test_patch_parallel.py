"""Patches on four processes against one: exact evaluations, and the order of the error of others."""

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
    "sync": {"mode": "sync"},
    "corrected": {},
    "separate": {"norm": "separate"},
    "naive": {"mode": "naive"},
    "stale": {"norm": "stale"},
    "full": {"norm": "full"},
}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(name: str, dtype: torch.dtype) -> tuple[Any, int, int, dict[str, Tensor]]:
    """A network, its channels, its multiple of rows, and conditions for two images."""
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


def guided_denoiser(net: nn.Module, cond: dict[str, Tensor], options: dict[str, Any] | None) -> nn.Module:
    """The guided denoiser, in patches where there are options."""
    plain = Denoiser(net, VPCosine(), "v", clock="t1000").eval()
    inner = plain if options is None else accelerate(plain, [PatchParallel(**options)])
    reset(inner)
    return CFG(scale=3.0).wrap(inner) if cond else inner


# What the four processes do; each returns a dictionary of what the tests look at.


@torch.no_grad()
def exact(ranks: int) -> dict[Any, Any]:
    """Relative errors of synchronous evaluations along a path of given x_t, and the last answer."""
    result: dict[Any, Any] = {}
    for name in NETS:
        for dtype in (torch.float32, torch.float64)[: 2 if name in ("hasten", "sd") else 1]:
            net, channels, multiple, cond = problem(name, dtype)
            for size, rows in WAYS[name]:
                fast = guided_denoiser(net, cond, {"mode": "sync", "size": size})
                plain, errors = guided_denoiser(net, cond, None), []
                for k, t in enumerate((0.9, 0.5, 0.2)[: 3 if size == 4 and rows == 4 else 1]):
                    x_t = noise(2, channels, rows * multiple, 8, seed=k, dtype=dtype)
                    output, expected = fast(x_t, t, **cond), plain(x_t, t, **cond)
                    errors.append(relative(output, expected))
                result[name, dtype, size, rows] = errors, output
    return result


@torch.no_grad()
def late(ranks: int) -> dict[Any, Any]:
    """Mean relative errors of raw outputs, after the first evaluation of a path from noise to an image."""
    net, schedule = unet(widths=(16, 32, 32), attention=(1,)), VPCosine()
    plain, result = denoiser_of(net), {}
    x0, eps, label = noise(1, 2, 16, 16, seed=1), noise(1, 2, 16, 16, seed=2), torch.tensor([1])
    methods: dict[int, dict[str, Any]] = {8: MODES, 16: {"corrected": {}}}
    both: dict[str, Any] = {"full": {"norm": "full"}, "full, extrapolated": {"norm": "full", "forecast": 1}}
    methods |= {32: both, 64: both}
    for T, modes in methods.items():
        times = [0.95 - 0.9 * k / (T - 1) for k in range(T)]
        if T == 32:  # three of the coarsest rows each, for with fewer nothing is extrapolated
            x0, eps = noise(1, 2, 48, 16, seed=1), noise(1, 2, 48, 16, seed=2)
        if T >= 32:  # the middle of the path, from 0.65 to 0.42, at the same steps
            times = times[T // 3 : 3 * T // 5]
        path = [float(schedule.alpha(t)) * x0 + float(schedule.sigma(t)) * eps for t in times]
        expected = [plain.raw(x_t, t, label=label) for x_t, t in zip(path, times)]
        for name, options in modes.items():
            fast: Any = accelerate(plain, [PatchParallel(**{"warmup": 0, "forecast": 0, **options})])
            reset(fast)
            outputs = [fast.raw(x_t, t, label=label) for x_t, t in zip(path, times)]
            errors = [relative(a, e) for a, e in zip(outputs, expected)]
            later = errors[2 if T >= 32 else 1 :]  # two evaluations make a line
            result[T, name] = errors[0], sum(later) / len(later), outputs[-1]
    return result


@torch.no_grad()
def counted(ranks: int) -> dict[str, Any]:
    """Messages and bytes of the steady state; again with small chunks, and a trajectory later."""
    net = unet(widths=(8, 16, 16), attention=(1,))
    plain, label, result = denoiser_of(net), torch.tensor([0, 2]), {}
    for chunk, times in ((60, 1), (5, 2)):
        fast: Any = accelerate(plain, [PatchParallel(warmup=1, chunk=chunk)])
        talk = fast.net.exchange
        for again in range(times):
            reset(fast)
            recorded = []
            for k in range(4):
                output = fast.raw(noise(2, 2, 16, 8, seed=k), 0.5, label=label)
                recorded.append((talk.step, dict(fast.net.collectives), dict(fast.net.traffic)))
            result[f"{chunk}, {again}"] = recorded, output
        slots = (len(talk.gathers.tracks[0].slots), len(talk.halos.tracks[0].slots))
    result["slots"] = slots
    few = noise(1, 2, 16, 8)  # a batch of another size begins anew, once
    errors = []
    for k in range(3):
        expected = plain.raw(few * (1 + k), 0.5, label=label[:1])
        errors.append(relative(fast.raw(few * (1 + k), 0.5, label=label[:1]), expected))
    result["batch"] = errors
    half: Any = accelerate(plain, [PatchParallel(mode="sync", keys="bf16")])
    x_t = noise(2, 2, 16, 8)
    result["bf16"] = relative(half.raw(x_t, 0.5, label=label), plain.raw(x_t, 0.5, label=label)), dict(half.net.traffic)
    return result


@torch.no_grad()
def along(ranks: int) -> dict[str, Any]:
    """Whole trajectories, other accelerators, texts, and what cannot be."""
    net, result = unet(widths=(8, 16), attention=(1,)), {}
    plain, plan = denoiser_of(net), compiled(DDIM(), 9)
    sync: Any = accelerate(plain, [PatchParallel(mode="sync")], context_of(plan, plain))
    both = accelerate(plain, [DeepCache(every=3), PatchParallel(mode="sync")], context_of(plan, plain))
    alone = accelerate(plain, [DeepCache(every=3)], context_of(plan, plain))
    result["deep_cache"] = relative(sampled(both, plan), sampled(alone, plan))
    short: Any = accelerate(plain, [PatchParallel(warmup=8)], context_of(plan, plain))
    result["warm-up"] = relative(sampled(short, plan), sampled(plain, plan))
    for name, size in (("few", (2, 2, 6, 8)), ("odd", (2, 2, 9, 8))):
        try:
            sync(torch.zeros(size), 0.5)
        except BadInput as error:
            result[name] = str(error)
    try:
        PatchParallel(size=3).apply(plain, SamplingContext())
    except BadInput as error:
        result["size"] = str(error)
    with torch.enable_grad():
        try:
            sync(torch.zeros(2, 2, 8, 8, requires_grad=True), 0.5)
        except BadInput as error:
            result["gradient"] = str(error)
    if not THERE:
        return result
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
    result["text"] = count
    plain, times = Denoiser(net, VPCosine(), "v", clock="t1000").eval(), [0.9 - 0.1 * k for k in range(9)]
    cached, sync, both = (
        accelerate(plain, methods, SamplingContext(tuple(times)))
        for methods in (
            [DeepCache(every=2)],
            [PatchParallel(mode="sync")],
            [DeepCache(every=2), PatchParallel(mode="sync")],
        )
    )
    for rows in (8, 12):  # the second does not divide, and with a cache it must be known before x_t is seen
        more = {
            f"down_residual_{k}": noise(2, *shape, seed=k)
            for k, shape in enumerate(((16, rows, 8), (16, rows, 8), (16, rows // 2, 4), (32, rows // 2, 4)))
        }
        more |= {"mid_residual": noise(2, 32, rows // 2, 4, seed=9), "text": cond["text"]}
        for name, fast, alone in (("controlnet", sync, plain), ("controlnet, deep_cache", both, cached)):
            for each in (fast, alone):
                reset(each)
            x_t = [noise(2, channels, rows, 8, seed=k) for k in range(4)]  # two key steps
            errors = [relative(fast(x, t, **more), alone(x, t, **more)) for x, t in zip(x_t, times)]
            result[f"{name}, {rows}"] = max(errors)
    from ..adapters import tiny

    pipe: Any = tiny.sd_pipeline()
    info = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", "height": 32, "width": 32}
    images = [
        each("a photo of the cat", generator=torch.Generator().manual_seed(0), **info).images
        for each in (pipe, hasten.accelerate(pipe, ["patch_parallel:mode=sync"], steps=3))
    ]
    result["pipeline"] = relative(images[1], images[0])
    return result


def everything(rank: int, ranks: int) -> dict[str, Any]:
    return {"exact": exact(ranks), "late": late(ranks), "counted": counted(ranks), "along": along(ranks)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(everything, 4, tmp_path_factory.mktemp("ranks"), seconds=240)


@pytest.mark.parametrize("name", NETS)
def test_synchronous_evaluations_are_those_of_one_process(recorded: list[dict[str, Any]], name: str) -> None:
    for key in [key for key in recorded[0]["exact"] if key[0] == name]:
        limit = 1e-5 if key[1] is torch.float32 else 1e-12
        for rank in recorded:
            errors, output = rank["exact"][key]
            assert max(errors) < limit, (key, errors)
            assert torch.equal(output, recorded[0]["exact"][key][1]), key  # the same on all, to the bit


def test_stale_features_have_first_order_errors(recorded: list[dict[str, Any]]) -> None:
    result = recorded[0]["late"]
    first, mean = ({name: result[8, name][k] for name in MODES} for k in (0, 1))
    assert all(first[name] < 1e-5 for name in MODES if name != "naive"), first
    assert mean["sync"] < 1e-5 < mean["corrected"] < mean["separate"] < mean["naive"], mean
    for key in result:
        assert all(torch.equal(rank["late"][key][2], result[key][2]) for rank in recorded), key
    assert result[8, "full"][1] < result[8, "separate"][1]
    assert result[16, "corrected"][1] < 0.75 * result[8, "corrected"][1]  # smaller steps, less of a change between them


def test_extrapolated_features_have_second_order_errors(recorded: list[dict[str, Any]]) -> None:
    """Half the step: half the error where others' features are reused, a quarter of it where they are extrapolated."""
    reused, extrapolated = (
        [recorded[0]["late"][T, name][1] for T in (32, 64)] for name in ("full", "full, extrapolated")
    )
    assert 1.7 < reused[0] / reused[1] < 2.3 and 3 < extrapolated[0] / extrapolated[1] < 6
    assert extrapolated[1] < 0.7 * reused[1]


def expected_traffic(me: int, ranks: int, B: int = 2) -> dict[str, int]:
    """Bytes from the shapes that the plain network's layers are given, in float32."""
    net, size = unet(widths=(8, 16, 16), attention=(1,)), {"halo": 0, "keys": 0, "moments": 0, "rows": 0}

    def look(module: Any, given: Any, output: Tensor) -> None:
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
    output = net(noise(B, 2, 16, 8), torch.ones(B))
    return {**size, "rows": 4 * output.numel() // ranks * (ranks - 1)}


def test_messages_and_bytes_are_counted(recorded: list[dict[str, Any]]) -> None:
    for me, rank in enumerate(recorded):
        result = rank["counted"]
        gathers, halos = result["slots"]
        assert gathers > 10 and halos > 10
        for chunk in (60, 5):
            for again in range(1 if chunk == 60 else 2):
                steps, output = result[f"{chunk}, {again}"]
                assert [step for step, *_ in steps] == [1, 2, 3, 4]
                assert all(traffic == expected_traffic(me, 4) for *_, traffic in steps)
                at_once = {"gather": gathers, "neighbours": halos, "rows": 1}
                chunks = {"gather": -(-gathers // chunk), "neighbours": -(-halos // chunk), "rows": 1}
                assert [spoke for _, spoke, _ in steps] == [at_once] * 2 + [chunks] * 2
                assert torch.equal(output, result["60, 0"][1])  # nothing depends on when it is sent, or on the last run
        first, second, _ = result["batch"]
        assert first < 1e-5 < second
        error, traffic = result["bf16"]
        assert 1e-6 < error < 1e-2 and 2 * traffic["keys"] == expected_traffic(me, 4)["keys"]


def test_trajectories_conditions_and_errors(recorded: list[dict[str, Any]]) -> None:
    result = recorded[1]["along"]
    assert result["deep_cache"] < 1e-4 and result["warm-up"] < 1e-4
    assert "6 rows are 3 at the coarsest level" in result["few"] and "found 4 processes" in result["few"]
    assert "choices: 1 to 3" in result["few"] and "multiples of 2 rows, found 9" in result["odd"]
    assert "4 processes make no groups of 3 (choices: 1, 2, 4)" in result["size"]
    assert "no gradient" in result["gradient"]
    if THERE:
        first = result["text"][0][1]
        assert [own for own, _ in result["text"]] == [k * result["text"][0][0] for k in range(1, 6)]
        assert [other for _, other in result["text"]] == [first] * 4 + [2 * first]  # once, until the text is another
        info = [error for name, error in result.items() if name.startswith("controlnet")]
        assert len(info) == 4 and max(info) < 1e-5 and result["pipeline"] < 1e-5


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
