"""TDPM, ES-DDPM and DiffuseVAE: trained, saved and loaded; their losses; the second form of DiffuseVAE is DDPM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.denoiser import Denoiser
from hasten.distributed.ranks import Ranks
from hasten.errors import BadInput
from hasten.guides.cfg import CFG
from hasten.model import Model
from hasten.nets.prior import PriorNet
from hasten.nets.source_unet import SourceUNet
from hasten.nets.vae import VAE
from hasten.pick import pick
from hasten.samplers import DDPM
from hasten.sampling import Noise, walk
from hasten.schedules import Truncated, VPCosine
from hasten.starts.diffuse_vae import DiffuseVAE
from hasten.train import Data, Ema, Fit
from hasten.train.checkpoint import TrainingState
from hasten.train.data import Batches
from hasten.train.implicit_prior import PriorTraining
from hasten.train.losses import DenoisingLoss
from hasten.train.vae import vae_loss
from hasten.train_processes import TrainSettings
from tests.factories import tiny_unet

RUN: dict[str, Any] = {"widths": (8,), "patch": 1, "batch_size": 8, "device": "cpu", "show": False, "precision": "fp32"}
SMALL = "latent=4,widths=(8,)"


def data(n: int = 64, classes: bool = True) -> Data:
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Data.of(images, torch.arange(n) % 2, ("dark", "bright")) if classes else Data.of(images)


@pytest.mark.parametrize(
    "process, start, classes",
    [
        ("tdpm:time=0.3", "prior", True),
        ("tdpm:distance=ct,prior=own,prior_widths=(8,)", "prior", False),
        (f"es_ddpm:{SMALL},direct=true", "early_stop", True),
        ("diffuse_vae:latent=4,vae_widths=(8,)", "diffuse_vae", False),
        ("diffuse_vae:form=shifted,latent=4,vae_widths=(8,)", "diffuse_vae", True),
    ],
)
def test_trained_saved_loaded(process: str, start: str, classes: bool, tmp_path: Path) -> None:
    model = hasten.train_model(data(classes=classes), tmp_path / "m", process=process, steps=2, **RUN)
    again = hasten.load(tmp_path / "m")
    assert again.start == start and again.denoiser.schedule == model.denoiser.schedule
    x = model.sample(3, steps=3)
    assert torch.isfinite(x).all() and torch.equal(again.sample(3, steps=3), x)
    assert torch.allclose(model.sample(1, seed=2, label=None if not classes else 0, steps=3)[0], x[2], atol=1e-4)


def test_the_images_of_another_model_by_its_folder(tmp_path: Path) -> None:
    hasten.train_model(data(), tmp_path / "plain", steps=1, **RUN)
    process = f"es_ddpm:time=0.4,generator={tmp_path / 'plain'}"
    model = hasten.train_model(data(), tmp_path / "cut", process=process, steps=1, **RUN)
    assert not model.parts and float(model.resolve().times[0]) == 0.4
    plain = hasten.load(tmp_path / "plain")
    named = plain.sample(2, start=f"early_stop:time=0.4,generator={tmp_path / 'plain'}", steps=2)
    assert torch.equal(named, plain.sample(2, start=hasten.EarlyStop(0.4, plain), steps=2))
    assert torch.isfinite(model.sample(2)).all()
    with pytest.raises(BadInput, match="not a bundled name or the folder of a model"):
        plain.sample(1, start="early_stop:time=0.4,generator=nowhere")
    with pytest.raises(BadInput, match="draws other images or classes"):
        plain.sample(1, start="early_stop:time=0.4,generator=fashion")


@pytest.mark.parametrize("process", ["tdpm:r1=1", "tdpm:distance=ct,prior=own,prior_widths=(8,)", f"es_ddpm:{SMALL}"])
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(process: str, tmp_path: Path) -> None:
    def run(folder: Path, *budgets: int) -> dict[str, Tensor]:
        recipe, source = pick("train_processes", process), data()
        for steps in budgets:
            torch.manual_seed(0)
            denoiser = recipe.denoiser(source, lambda: tiny_unet(classes=2))
            denoiser.null_label = 2
            modules = recipe.modules(denoiser, source, TrainSettings(label_drop=0.1))
            fit = Fit(steps=steps, decay="constant", ema=Ema("constant"), device="cpu", tensorboard=False)
            averages = fit(modules, Batches(source, 8), folder, show=False)
        return {f"{name}.{key}": v for name, net in averages.items() for key, v in net.state_dict().items()}

    once, twice = run(tmp_path / "once", 4), run(tmp_path / "twice", 2, 4)
    assert all(torch.equal(once[key], twice[key]) for key in once) and once.keys() == twice.keys()


def test_the_denoiser_never_sees_times_above_the_cut_but_as_generator() -> None:
    recipe, seen = pick("train_processes", "tdpm:time=0.3"), []
    denoiser = recipe.denoiser(data(), lambda: tiny_unet(classes=2))
    denoiser.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[1]))
    modules = {m.name: m for m in recipe.modules(denoiser, data(), TrainSettings())}
    batch = Batches(data(), 64)[0]
    modules["model"].loss(batch)
    assert seen[-1].max() <= 0.3 and seen[-1].max() > 0.28 and seen[-1].min() < 0.03
    modules["prior"].loss(batch)
    assert bool((seen[-1] == 1).all())


@pytest.mark.parametrize("distance", ["gan", "ct"])
def test_a_network_with_two_optimisers_is_not_sharded(distance: str) -> None:
    recipe = pick("train_processes", f"tdpm:distance={distance}")
    denoiser = recipe.denoiser(data(), lambda: tiny_unet(classes=2))
    modules = recipe.modules(denoiser, data(), TrainSettings())
    with pytest.raises(BadInput, match="train the same weights, which cannot be sharded: leave out --fsdp"):
        TrainingState(modules, torch.device("cpu"), Ranks.start("cpu"), shard=True)


# ---- the generator's losses ----


def gaussian_training() -> tuple[Denoiser, PriorTraining]:
    torch.manual_seed(0)
    denoiser = Denoiser(nn.Linear(2, 2), Truncated(VPCosine(offset=0.0), 0.4), "v")
    return denoiser, PriorTraining(denoiser, PriorNet((2,), 0.4, widths=(16,)), (2,), 0, DenoisingLoss(0.0))


@pytest.mark.parametrize("distance", ["gan", "transport"])
def test_generator_and_judge_pull_in_opposite_directions(distance: str) -> None:
    """A step of the judge raises the distance that it measures, one of the generator lowers it, and each leaves the
    other's weights without a gradient."""
    _, training = gaussian_training()
    generator, judge = training.gan(1e-2, 1e-2, 0.0) if distance == "gan" else training.transport(1e-2, 1e-2)
    batch = {"x": torch.randn(64, 2) * 0.1 + 1.5}

    def value(module: Any) -> float:
        torch.manual_seed(1)
        return float(module.loss(batch).detach())

    for module, other in ((judge, generator), (generator, judge)):
        value(generator)  # leaves what was generated in the batch
        before, optimiser = (value(generator), value(judge)), module.optimizer()
        for _ in range(10):
            torch.manual_seed(1)
            optimiser.zero_grad()
            for p in other.module.parameters():
                p.grad = None
            module.loss(batch).backward()
            assert all(p.grad is None for p in other.module.parameters())
            optimiser.step()
        after = (value(generator), value(judge))
        mine, theirs = (1, 0) if module is judge else (0, 1)
        assert after[mine] < before[mine] and after[theirs] > before[theirs]


def test_what_is_judged_as_real_is_the_data_at_the_cut_with_fresh_noise() -> None:
    denoiser, training = gaussian_training()
    x = torch.full((4000, 2), 1.5)
    z, other = training.diffused({"x": x}), training.diffused({"x": x})
    alpha, sigma = float(denoiser.schedule.alpha(0.4)), float(denoiser.schedule.sigma(0.4))
    assert abs(float(z.mean()) - 1.5 * alpha) < 0.03 and abs(float(z.std()) - sigma) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([z.flatten(), other.flatten()]))[0, 1])) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("distance, fraction", [("gan", 1 / 3), ("transport", 0.8)])
def test_the_generator_learns_the_law_of_the_cut_state(distance: str, fraction: float, tmp_path: Path) -> None:
    """Two modes at -1 and 1: the Wasserstein-1 distance of G(xi) to the data at T' is a fraction of that of N(0, 1)."""
    torch.manual_seed(0)
    denoiser = Denoiser(nn.Linear(1, 1), Truncated(VPCosine(offset=0.0), 0.25), "v")
    prior = PriorNet((1,), 0.25, widths=(64,))
    training = PriorTraining(denoiser, prior, (1,), 0, DenoisingLoss(0.0))
    modules = training.gan(1e-3, 2e-3, 0.1) if distance == "gan" else training.transport(1e-3, 2e-3)

    class Modes:
        batch_size = 256 if distance == "gan" else 64

        def __getitem__(self, k: int) -> dict[str, Tensor]:
            g = torch.Generator().manual_seed(k)
            sign = torch.randint(0, 2, (self.batch_size, 1), generator=g) * 2.0 - 1
            return {"x": sign + 0.1 * torch.randn(sign.shape, generator=g)}

    Fit(steps=1500 if distance == "gan" else 1000, device="cpu", tensorboard=False, warmup=20)(
        modules, Modes(), tmp_path, show=False
    )
    x = torch.cat([Modes()[10_000 + k]["x"] for k in range(60)])
    z = training.diffused({"x": x}).flatten().sort().values
    with torch.no_grad():
        xi = torch.randn_like(x)
        ours = prior(denoiser, xi).flatten().sort().values
    assert float((ours - z).abs().mean()) < float((xi.flatten().sort().values - z).abs().mean()) * fraction


def test_the_loss_of_the_autoencoder_is_its_bound() -> None:
    """In closed form for a decoder and posterior of zeros: |x|^2 / (2 v D), and log(|x|^2 / D) / 2 with the best v."""
    torch.manual_seed(0)
    vae = VAE((6,), 2, widths=(8,))
    for p in vae.parameters():
        nn.init.zeros_(p)
    x = torch.randn(32, 6)
    error = x.square().mean()
    assert torch.allclose(vae_loss(vae, x, variance=0.7), error / 1.4)
    assert torch.allclose(vae_loss(vae, x), 0.5 * error.log(), atol=1e-6)
    nn.init.constant_(vae.to_posterior.bias[:2], 1.0)  # mean 1, variance 1: KL = 1/2 for each of two latents
    assert torch.allclose(vae_loss(vae, x, variance=0.7), error / 1.4 + 1 / 6)


# ---- DiffuseVAE ----


def second_form(denoiser: Denoiser, z: Tensor, source: Tensor, times: Tensor, noise: Noise) -> Tensor:
    """The published chain of `z_t = alpha x + source + sigma eps` on its own states z, by its own posterior: the mean
    `c_x x + c_z z_t + (1 - c_z) source`, and the source is subtracted after the last step."""
    schedule, net = denoiser.schedule, denoiser.net.unet
    for t, s in zip(times[:-1], times[1:]):
        (at, st), (a, sg) = ([float(f(u)) for f in (schedule.alpha, schedule.sigma)] for u in (t, s))
        v = net(torch.cat([z, source], 1), t.to(z.dtype).expand(len(z)))
        x = at * (z - source) - st * v  # v-prediction of z - source
        ratio = at / a
        added = st**2 - ratio**2 * sg**2
        c_z, c_x = ratio * sg**2 / st**2, a * added / st**2
        z = c_x * x + c_z * z + (1 - c_z) * source
        if float(s) > 0:
            z = z + sg * (added / st**2) ** 0.5 * noise()
    return z - source


def refiner(shifted: bool) -> Denoiser:
    torch.manual_seed(0)
    net = SourceUNet(1, 1, shifted=shifted, widths=(8,)).double()
    for p in net.parameters():
        p.data = 0.15 * torch.randn_like(p)
    return Denoiser(net.eval().requires_grad_(False), VPCosine(), "v")


class Image(nn.Module):
    """A generator with latents of three numbers."""

    latent_shape = (3,)

    def forward(self, u: Tensor, **cond: Any) -> Tensor:
        return 0.3 * u.sum(1).reshape(-1, 1, 1, 1) + torch.linspace(-1, 1, 64, dtype=u.dtype).reshape(1, 1, 8, 8)


def test_the_second_form_is_ddpm_in_the_shifted_state() -> None:
    denoiser, times = refiner(True), torch.tensor([0.99, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)
    start = DiffuseVAE().bind({}, {"generator": Image()})
    noise = Noise([3, 4], (1, 8, 8), torch.float64)
    wrapped: Any = start.wrap(denoiser)
    e = start.begin(wrapped, noise, times[0])
    ours = walk(DDPM(), wrapped, e, times, noise)
    fresh = Noise([3, 4], (1, 8, 8), torch.float64)
    expected = second_form(denoiser, e + wrapped.source, wrapped.source, times, fresh)
    assert (ours - expected).abs().max() < 1e-13
    assert wrapped.source.std() > 0.1


def test_without_a_source_both_forms_are_ddpm() -> None:
    times, x = torch.tensor([0.99, 0.6, 0.3, 0.0], dtype=torch.float64), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    ends = []
    for shifted in (False, True):
        wrapped = DiffuseVAE(Image()).wrap(refiner(shifted), torch.zeros(2, 1, 8, 8))
        ends.append(walk(DDPM(), wrapped, x, times, Noise([0, 1], (1, 8, 8), torch.float64)))
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="the channels of x"):
        SourceUNet(1, 3, shifted=True)


def test_both_branches_of_guidance_get_the_source() -> None:
    torch.manual_seed(0)
    net = SourceUNet(1, 1, widths=(8,), classes=2)
    for p in net.parameters():
        p.data = 0.15 * torch.randn_like(p)
    denoiser = Denoiser(net.eval().requires_grad_(False), VPCosine(), "v")
    x, source, label = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    guided = DiffuseVAE(Image()).wrap(CFG(scale=3.0).wrap(denoiser), source)(x, 0.5, label=label)
    cond, null = (denoiser(x, 0.5, label=k, source=source) for k in (label, torch.full((2,), 2)))
    assert torch.allclose(guided, null + 3 * (cond - null), atol=1e-5) and not torch.allclose(cond, null, atol=1e-3)


def test_images_may_take_the_place_of_the_autoencoders() -> None:
    """Also without the start, and never are both missing in silence; every sample has the source of its own seed."""
    denoiser = refiner(False).float()
    model = Model(denoiser, "m", (1, 8, 8), steps=3, start="diffuse_vae", parts={"generator": VAE((1, 8, 8), 4)})
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    x = model.sample(2, images=images)
    assert torch.equal(x, model.sample(2, images=images, start="noise"))
    assert not torch.equal(x, model.sample(2))
    assert torch.allclose(model.sample(3, batch_size=1), model.sample(3), atol=1e-5)
    with pytest.raises(BadInput, match="give images"):
        model.sample(2, start="noise")


def test_compared_with_its_own_start_and_not_tuned_or_distilled(tmp_path: Path) -> None:
    """A comparison begins every row from the generator and counts its evaluation; what assumes noise refuses."""
    from hasten.compare.counting import count_evaluations, start_nfe
    from hasten.compare.variants import parse_variants
    from hasten.workflows.distill import distill_model
    from hasten.workflows.tune import tune_model

    shared = hasten.train_model(data(), tmp_path / "m", process="tdpm", steps=1, **RUN)
    own = hasten.train_model(data(), tmp_path / "o", process="tdpm:prior=own,prior_widths=(8,)", steps=1, **RUN)
    table = {"reference": {"sampler": "ddim", "steps": 4}, "variant": [{"name": "v", "sampler": "unipc", "steps": 3}]}
    variant = parse_variants(table).variants[0]
    for model, others in ((shared, 0), (own, 1)):
        with count_evaluations(model) as count:
            model.sample(2, config=variant.config, guidance_scale=1.0)
        assert count[0] / 2 + start_nfe(model, variant) == 4 and start_nfe(model, variant) == others
    with pytest.raises(BadInput, match=r"tuning is .* begins at t = 0.4 from a generator"):
        tune_model(shared, tmp_path / "t", method="moments", data=tmp_path)
    with pytest.raises(BadInput, match=r"distillation is .* begins at t = 0.4"):
        distill_model(shared, tmp_path / "d", "progressive", data(), steps=1)
    refined = Model(refiner(False).float(), "r", (1, 8, 8), start="diffuse_vae")
    with pytest.raises(BadInput, match="also reads an image of a generator"):
        distill_model(refined, tmp_path / "d", "progressive", data(), steps=1)


@pytest.mark.parametrize(
    "process, says",
    [
        ("tdpm:time=1.5", "0 < time < 1"),
        ("tdpm:distance=wasserstein", "gan, ct"),
        ("tdpm:critic_lr=0", "above 0"),
        ("es_ddpm:time=0", "0 < time < 1"),
        ("es_ddpm:latent=0", "at least 1"),
        ("diffuse_vae:form=3", "a word"),
    ],
)
def test_bad_input(process: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        pick("train_processes", process)
