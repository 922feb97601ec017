"""I2SB: the bridge's marginals, its exact composition, the sampler as a plan, and a model from training to file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.cli import main
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.predictions import Eps
from hasten.processes import I2SB
from hasten.sampling import Noise, walk
from hasten.schedules.continuous import VPCosine
from hasten.schedules.serialize import schedule_from_dict
from hasten.workflows.train import train_model

TIMES = torch.linspace(1, 0, 6, dtype=torch.float64)


class Given(nn.Module):
    """An eps network with the exact `E[x_0 | z_t, x_1]` where x_0 | x_1 ~ N(mean, std^2), for sources that are 0."""

    def __init__(self, process: I2SB, mean: float, std: float) -> None:
        super().__init__()
        self.process, self.mean, self.std = process, mean, std

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None].double()
        V, total = self.process.variance(t), self.process.total
        near, noise = 1 - V / total, self.process.bridge_std(t) ** 2
        gain = near * self.std**2 / (near**2 * self.std**2 + noise + 1e-30)
        x0 = self.mean + gain * (x - near * self.mean)
        return ((x - x0) / torch.sqrt(V)).to(x.dtype)


def test_the_integral_of_beta() -> None:
    # V and the largest standard deviation of the paper's two settings
    for beta_max, total, middle in ((0.3, 0.141, 0.188), (1.0, 0.247, 0.248)):
        process = I2SB(beta_max=beta_max)
        assert process.total == pytest.approx(total, abs=6e-4)
        assert float(process.bridge_std(0.5)) == pytest.approx(middle, abs=6e-4)
        t = torch.linspace(0, 1, 101, dtype=torch.float64)
        V = process.variance(t)
        assert bool((V.diff() > 0).all()) and float(V[0]) == 0 and float(V[-1]) == pytest.approx(process.total)
        torch.testing.assert_close(V + process.variance(1 - t), torch.full_like(t, process.total))
        torch.testing.assert_close(process.time(process.lam(t[1:])), t[1:], rtol=0, atol=1e-9)
    flat = I2SB(beta_min=0.2, beta_max=0.2)
    torch.testing.assert_close(flat.time(flat.lam(t[1:])), t[1:], rtol=0, atol=1e-9)


def test_the_posterior_composes_with_the_marginal() -> None:
    """q(z_s | x_0, z_t) after q(z_t | x_0, x_1) is q(z_s | x_0, x_1), for the coefficients that the sampler uses."""
    process = I2SB(beta_max=1.0)
    for t, s in ((0.9, 0.4), (1.0, 0.99), (0.3, 1e-3)):
        V_t, V_s = (process.variance(u) for u in (t, s))
        table = hasten.plan(pick("samplers", "i2sb"), process, torch.tensor([t, s, 0.0], dtype=torch.float64))
        on_state, on_x0, noise = table.a[0], table.B[0, 0], table.C[0, 0]
        far, near = on_state * V_t / process.total, on_x0 + on_state * (1 - V_t / process.total)
        assert float(far) == pytest.approx(float(V_s / process.total), abs=1e-15)
        assert float(near) == pytest.approx(float(1 - V_s / process.total), abs=1e-15)
        variance = on_state**2 * process.bridge_std(t) ** 2 + noise**2
        assert float(variance) == pytest.approx(float(process.bridge_std(s) ** 2), abs=1e-15)


@pytest.mark.parametrize(("nfe", "std"), [(1, 0.0), (2, 0.139), (5, 0.208), (10, 0.241), (50, 0.280)])
def test_one_step_is_the_mean_and_more_steps_spread(nfe: int, std: float) -> None:
    process = I2SB()
    denoiser = Denoiser(Given(process, 0.6, 0.3), process, Eps())
    V = process.total * torch.linspace(1, 0, nfe + 1, dtype=torch.float64)  # uniform in V_t
    times = process.time(-torch.log(V) / 2)
    noise = Noise(range(2000), (1,), torch.float64)
    x = walk(pick("samplers", "i2sb"), denoiser, torch.zeros(2000, 1, dtype=torch.float64), times, noise)
    assert float(x.mean()) == pytest.approx(0.6, abs=0.015)
    assert float(x.std()) == pytest.approx(std, abs=0.02)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4, 6)])
@pytest.mark.parametrize("noisy", [True, False])
def test_the_plan_is_the_sampler(shape: tuple[int, ...], noisy: bool) -> None:
    process = I2SB(noise=noisy)
    net = nn.Module()
    net.forward = lambda x, time: torch.sin(x)  # type: ignore[method-assign]
    denoiser = Denoiser(net, process, Eps())
    source = torch.randn(2, *shape, dtype=torch.float64)
    sampler = pick("samplers", "i2sb")
    table = hasten.plan(sampler, process, TIMES)
    walked = walk(sampler, denoiser, source, TIMES, Noise(range(2), shape, torch.float64))
    planned = table(denoiser, source, Noise(range(2), shape, torch.float64))
    torch.testing.assert_close(walked, planned, rtol=1e-12, atol=1e-12)
    assert table.stochastic is noisy
    again = type(table).from_json(table.to_json())
    torch.testing.assert_close(again(denoiser, source, Noise(range(2), shape, torch.float64)), planned)
    assert schedule_from_dict(process.to_dict()) == process


def test_the_loss_is_the_papers() -> None:
    """The target of the raw output is (z_t - x_0) / sqrt(V_t)."""
    process, x, source = I2SB(), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    eps = torch.randn_like(x)
    z = process.corrupt(x, t, eps, source)

    class Target(nn.Module):
        def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
            assert torch.equal(x_t, z)
            return (z - x) / process.variance(t).sqrt().float().view(-1, 1, 1, 1)

    assert float(process.loss(Denoiser(Target(), process, "eps"), x, t, eps, {}, source).max()) < 1e-10
    assert float((process.corrupt(x, torch.ones(4), eps, source) - source).abs().max()) < 1e-6


def test_what_it_cannot_be() -> None:
    for bad in ({"beta_max": 0.0}, {"beta_min": -1.0}, {"beta_max": math.inf}):
        with pytest.raises(BadInput, match="positive betas"):
            I2SB(**bad)
    process = I2SB()
    denoiser = Denoiser(Given(process, 0, 1), process, Eps())
    noise = Noise(range(2), (1,), torch.float32)
    with pytest.raises(BadInput, match="begins from source images"):
        draw(denoiser, pick("samplers", "i2sb"), TIMES, noise)
    with pytest.raises(BadInput, match="use i2sb"):
        draw(denoiser, "unipc", TIMES, noise, x=torch.zeros(2, 1))
    with pytest.raises(BadInput, match="sampler of I2SB"):
        hasten.plan(pick("samplers", "i2sb"), VPCosine(), TIMES)
    with pytest.raises(BadInput, match="begins at t = 1"):
        process.begin(torch.zeros(2, 1), 0.5, torch.zeros(2, 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of targets and one of sources with the same names, and a model that was trained on them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pairs")
    g = np.random.default_rng(0)
    for k in range(8):
        a = g.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        for name, pixels, end in (("high", a, "png"), ("low", a // 2, "jpg")):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{k}.{end}")
    for process in ("i2sb", "i2sb:concat=true", "conditional"):
        train_model(
            folder / "high", folder / process, steps=2, widths=(8,), patch=1, batch_size=4, precision="fp32",
            process=process, source=str(folder / "low"), show=False, device="cpu",
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("process", ["i2sb", "i2sb:concat=true", "conditional"])
def test_a_trained_model_from_its_file(place: Path, process: str) -> None:
    model = hasten.load(place / process)
    assert model.source_shape == (3, 8, 8)
    assert model.sampler == ("unipc" if process == "conditional" else "i2sb")
    source = torch.rand(3, 3, 8, 8) * 2 - 1
    x = model.sample(3, images=source, steps=3, batch_size=2)
    torch.testing.assert_close(x[2:], model.sample(1, seed=2, images=source[2:], steps=3), rtol=0, atol=1e-5)
    last = model.denoiser.net.state_dict()[
        "unet.conv_out.weight" if model.denoiser.source_channels else "conv_out.weight"
    ]
    last.copy_(torch.randn_like(last) / 10)  # which training begins from 0
    changed = model.sample(3, images=source, steps=3)
    assert float((changed - model.sample(3, images=-source, steps=3)).abs().max()) > 1e-3
    with pytest.raises(BadInput, match="give images of 8x8"):
        model.sample(3)
    with pytest.raises(BadInput, match="found 2"):
        model.sample(3, images=source[:2])
    with pytest.raises(BadInput, match=r"shape \(3, 8, 8\), found \(3, 4, 4\)"):
        model.sample(3, images=source[..., :4, :4])
    with pytest.raises(BadInput, match="takes no start"):
        model.sample(3, images=source, start="ccdf:time=0.3")


def test_translate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(place / "i2sb")
    assert main(["translate", model, str(place / "low"), "--out", str(place / "out"), "--steps", "2"]) == 0
    assert sorted(p.name for p in (place / "out").iterdir() if not p.name.startswith(".")) == [
        f"{k}.png" for k in range(8)
    ]
    assert main(["translate", model, str(place / "low"), "--out", str(place / "grid.png"), "--steps", "2"]) == 0
    text = hasten.images.read_png_text(place / "grid.png")["command"]
    assert text.startswith(f"hasten translate {model}") and "--steps 2" in text
    capsys.readouterr()
    for words, message in (
        (["translate", "fashion", str(place / "low")], "from noise, not from images"),
        (["translate", model, str(place / "nowhere")], "there is no file or folder"),
        (["translate", model, str(place / "low"), "--n", "9"], "holds 8 images"),
        (["tune", model, "--method", "optimized_steps", "--out", str(place / "t")], "see hasten translate"),
        (["distill", model, "--method", "progressive", "--out", str(place / "d")], "see hasten translate"),
        (["compare", model, "--out", str(place / "c")], "give --data"),
        (["sample", model, "--out", str(place / "s.png")], "give images of 8x8"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error, error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": "i2sb"}, "trains on pairs"),
        ({"process": "i2sb", "degrade": "downscale:factor=3"}, "does not divide"),
        ({"process": "i2sb", "degrade": "downscale", "source": "low"}, "leave one out"),
        ({"process": "i2sb", "degrade": "blurr"}, "did you mean 'blur'"),
        ({"process": "isb", "degrade": "blur"}, "did you mean 'i2sb'"),
        ({"degrade": "blur"}, "for processes that train on pairs"),
        ({"process": "i2sb", "degrade": "blur", "flip": True}, "mirror the targets"),
        ({"process": "i2sb", "source": "other"}, "has no image named as 1.png"),
    ],
)
def test_pairs_that_cannot_be(place: Path, options: dict[str, object], message: str) -> None:
    from PIL import Image

    (place / "other").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(place / "other" / "0.png")
    options = {key: str(place / str(value)) if key == "source" else value for key, value in options.items()}
    with pytest.raises(BadInput, match=message):
        train_model(place / "high", place / "never", steps=1, show=False, device="cpu", **options)  # type: ignore[arg-type]
    assert not (place / "never").exists()
