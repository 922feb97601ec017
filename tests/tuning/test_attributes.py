"""The classifiers of middle features, and how they are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.nets.attributes import Attributes
from hasten.pick import pick
from hasten.samplers import UniPC
from hasten.schedules import VPCosine
from hasten.times import UniformLambda
from hasten.tuning import TuningTask
from hasten.tuning.attributes import AttributePredictor
from tests.guides.test_features import unet

# ---- the part ----


def random_part(pool: int = 2) -> Attributes:
    torch.manual_seed(0)
    part = Attributes((6, 7, 5), {"class": 4, "tone": 2}, [0.1, 0.4, 1.0], pool)
    with torch.no_grad():
        for p in part.parameters():
            p.normal_()
    return part.requires_grad_(False)


@pytest.mark.parametrize("pool", [0, 1, 2, 3])
def test_the_flat_classifier_is_the_pooled_one(pool: int) -> None:
    part, middle = random_part(pool), torch.randn(9, 6, 7, 5)
    for t in (0.0, 0.1, 0.25, 0.7, 1.0):
        W, b = part.at("class", t)
        assert (part(middle, t, "class") - (middle.flatten(1) @ W.T + b)).abs().max() < 1e-4


def test_weights_are_linear_in_time_and_constant_beyond() -> None:
    part = random_part()
    knots = [part.at("tone", t)[0] for t in (0.1, 0.4, 1.0)]
    assert torch.allclose(part.at("tone", 0.25)[0], (knots[0] + knots[1]) / 2, atol=1e-6)
    assert torch.allclose(part.at("tone", 0.55)[0], 0.75 * knots[1] + 0.25 * knots[2], atol=1e-6)
    assert torch.equal(part.at("tone", 0.0)[0], knots[0])
    t = torch.tensor([0.02, 0.25, 0.9], dtype=torch.float64)
    middle = torch.randn(3, 6, 7, 5)
    each = torch.cat([part(middle[k : k + 1], t[k], "class") for k in range(3)])
    assert torch.allclose(part(middle, t, "class"), each, atol=1e-5)
    assert torch.allclose(part.blend(t).sum(1), torch.ones(3))
    assert torch.equal(Attributes((2, 1, 1), {"a": 2}, [0.5], 0).blend(t), torch.ones(3, 1))


def test_it_is_rebuilt_from_its_config() -> None:
    part, middle = random_part(), torch.randn(4, 6, 7, 5)
    again = Attributes(**part.config)
    again.load_state_dict({key: value.half() for key, value in part.state_dict().items()})
    assert torch.allclose(again(middle, 0.3, "class"), part(middle, 0.3, "class"), atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part(middle, 0.3, "class"), random_part()(middle, 0.3, "class"))


@pytest.mark.parametrize(
    "arguments",
    [
        ((6, 7), {"a": 2}, [0.5]),
        ((6, 7, 5), {"a": 1}, [0.5]),
        ((6, 7, 5), {}, [0.5]),
        ((6, 7, 5), {"a": 2}, [0.5, 0.1]),
        ((6, 7, 5), {"a": 2}, []),
        ((6, 7, 5), {"a": 2}, [0.5], 6),
    ],
)
def test_a_part_that_cannot_be(arguments: Any) -> None:
    with pytest.raises(ValueError, match="attributes need"):
        Attributes(*arguments)


# ---- the tuner ----


class Corners(nn.Module):
    """A classifier: which quarter of the image is brightest, next to the other images."""

    name = "corners"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quarters = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return quarters, quarters - quarters.mean(0)


def pictures(n: int) -> tuple[Tensor, Tensor]:
    """Images with one bright quarter, its index, three quarters of them in the upper half."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 4, (n,), generator=generator)
    labels = torch.where(torch.rand(n, generator=generator) < 0.5, labels % 2, labels)
    quarters = torch.zeros(n, 4).scatter_(1, labels[:, None], 1.0).reshape(n, 1, 2, 2)
    level = 1 + torch.rand(n, 1, 1, 1, generator=generator)
    images = -1 + level * nn.functional.interpolate(quarters, scale_factor=4.0)
    return images, labels


def task(**changes: Any) -> TuningTask:
    denoiser = Denoiser(unet(classes=4), VPCosine(offset=0.0), "v")
    settings: dict[str, Any] = {
        "denoiser": denoiser,
        "sampler": UniPC(),
        "times": UniformLambda()(denoiser.schedule, 3),
        "shape": (1, 8, 8),
        "labels": lambda n: torch.arange(n) % 4,
        "images": pictures,
        "n": 800,
    }
    return TuningTask(**(settings | changes))


def noise_says(part: nn.Module) -> float:
    """The share of group 0 that the classifiers expect where there is next to no image."""
    t = 0.9 + 0.1 * torch.rand(600, dtype=torch.float64)
    noise, _ = task().denoiser.features(torch.randn(600, 1, 8, 8), t)
    return float(torch.softmax(part(noise, t, "group"), 1)[:, 0].mean())


def test_it_learns_the_information_in_the_features() -> None:
    """Random features of pictures that a line can tell apart: read well near the image, not at all in pure noise."""
    record: list[str] = []
    tuned = AttributePredictor(("class", "group", "brightness"), groups=((0, 1), (2, 3)), steps=300).tune(
        task(tick=lambda what, done, total, value: record.append(what))
    )
    part, figures = tuned.parts["attributes"], tuned.figures
    assert part.classes == {"class": 4, "group": 2, "brightness": 2}
    assert figures["class accuracy t 0.0-0.2"] > 0.9 and figures["group accuracy t 0.0-0.2"] > 0.9
    assert figures["class accuracy t 0.8-1.0"] < figures["class accuracy t 0.0-0.2"] - 0.2
    assert figures["images"] == 800 and figures["source"] == "data"
    assert figures["group commonest"] == pytest.approx(0.75, abs=0.1)
    assert {"encode", "train class", "train group", "train brightness"} <= set(record)
    # the part alone, on new images, and the priors of pure noise
    images, labels = (value[800:] for value in pictures(1000))
    middle, _ = task().denoiser.features(images, 0.05)
    assert (part(middle, 0.05, "class").argmax(1) == labels).double().mean() > 0.9
    assert noise_says(part) == pytest.approx(0.75, abs=0.12)


def test_class_means_are_the_means() -> None:
    """At a time near a knot: the mean of the middle features of that class, measured on its own."""
    inputs = task(n=1500)
    part = AttributePredictor(("group",), groups=((0, 1), (2, 3)), steps=2, views=4).tune(inputs).parts["attributes"]
    images, labels = pictures(1500)
    t = part.times[3]
    alpha, sigma = (float(f(t)) for f in (inputs.schedule.alpha, inputs.schedule.sigma))
    middle, _ = inputs.denoiser.features(alpha * images + sigma * torch.randn_like(images), t)
    direct = torch.stack([middle[labels < 2].mean(0), middle[labels >= 2].mean(0)]).flatten(1)
    distance = direct[1] - direct[0]
    towards = part.towards("group", t)
    assert torch.allclose(towards.sum(0), torch.zeros_like(distance), atol=1e-4)
    assert ((towards[1] - towards[0]) - distance).norm() < 0.25 * distance.norm()
    assert AttributePredictor(steps=2, views=1, means=False).tune(task(n=100)).parts["attributes"].means is False


def test_the_same_again_and_in_float16_at_most_a_megabyte() -> None:
    tuner = AttributePredictor(steps=20)
    first, second = (tuner.tune(task(n=200)).parts["attributes"].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    teacher = Attributes((128, 7, 7), {"class": 10}, [k / 8 for k in range(7)], means=True)
    assert sum(2 * p.numel() for p in teacher.parameters()) < 2**20


def test_balanced_classes_have_no_prior() -> None:
    parts = [
        AttributePredictor(("group",), groups=((0, 1), (2, 3)), steps=300, balanced=balanced).tune(task()).parts
        for balanced in (False, True)
    ]
    plain, even = (noise_says(p["attributes"]) for p in parts)
    assert plain > 0.63 and even == pytest.approx(0.5, abs=0.12)


def test_images_outside_the_groups_are_left_out() -> None:
    figures = AttributePredictor(("group",), groups=((0,), (3,)), steps=5).tune(task()).figures
    assert 0.6 < figures["group commonest"] < 0.85  # 3 : 1


class Told(nn.Module):
    """A U-Net that remembers the labels it was told."""

    null_label = 4

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = unet(classes=4), []

    def embed(self, time: Tensor, label: Tensor | None = None) -> Tensor:
        self.seen.append(label)
        return self.net.embed(time, label)

    def encode(self, x: Tensor, emb: Tensor) -> Any:
        return self.net.encode(x, emb)

    def decode(self, *arguments: Any) -> Tensor:
        return self.net.decode(*arguments)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        emb = self.embed(time, label)
        return self.decode(*self.encode(x, emb), emb)


def test_the_labels_that_the_model_gets() -> None:
    net = Told()
    inputs = task(denoiser=Denoiser(net, VPCosine(offset=0.0), "v"), n=100)
    AttributePredictor(steps=2, views=1).tune(inputs)
    assert torch.cat(net.seen).eq(4).all()
    net.seen.clear()
    AttributePredictor(steps=2, views=1, conditional=True).tune(inputs)
    assert torch.equal(torch.cat(net.seen), pictures(100)[1])


def test_without_data_the_model_makes_images_and_a_classifier_labels_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten.metrics.features as features

    asked: list[str] = []
    monkeypatch.setattr(features, "feature_net", lambda name: asked.append(name) or Corners())
    net = Told()
    inputs = task(denoiser=Denoiser(net, VPCosine(offset=0.0), "v"), images=None, n=150)
    tuned = AttributePredictor(("class", "brightness"), classifier="corners", steps=20).tune(inputs)
    assert asked == ["corners"] and tuned.figures["source"] == "generated"
    assert tuned.figures["labels"] == "classifier corners" and torch.cat(net.seen).eq(4).all()
    assert tuned.parts["attributes"].classes["brightness"] == 2


def test_a_classifier_without_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten.metrics.features as features

    monkeypatch.setattr(features, "feature_net", lambda name: nn.Flatten())
    with pytest.raises(BadInput, match="has no classes"):
        AttributePredictor(steps=2).tune(task(images=lambda n: (pictures(n)[0], None), n=100))


def test_spelled() -> None:
    result = pick("tuning", "attributes:attributes=(class,group),groups=((0,2),(5,7,9)),knots=6")
    assert result == AttributePredictor(("class", "group"), groups=((0, 2), (5, 7, 9)), knots=6)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: AttributePredictor(("clas",)), "unknown attribute 'clas'.*class"),
        (lambda: AttributePredictor(()), "at least one attribute"),
        (lambda: AttributePredictor(("group",)), "groups="),
        (lambda: AttributePredictor(views=0), "views"),
        (lambda: AttributePredictor(("group",), groups=((0,), (9,))).tune(task(n=50)), "every class of 'group'"),
    ],
)
def test_bad_input(make: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()
