"""The training of the first step: its minimum is the table of class means, and the network's training gets there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import Gaussian, m2
from hasten.nets.first_step import FirstStepNet
from hasten.samplers import DDIM
from hasten.schedules import Discrete
from hasten.starts import SingDiffusion
from hasten.storage.weights import build_network
from hasten.tuning import TuningTask
from hasten.tuning.first_step import FirstStep, class_means, distance_to_means

TABLE = Discrete.scaled_linear()


def patterns(n: int) -> tuple[Tensor, Tensor]:
    """Three classes of 8x8 images: a bright left half, a bright top, all dark; with noise of deviation .2."""
    generator = torch.Generator().manual_seed(n)
    means = torch.full((3, 1, 8, 8), -0.8)
    means[0, :, :, :4] = 0.8
    means[1, :, :4] = 0.5
    label = torch.arange(n) % 3
    return means[label] + 0.2 * torch.randn(n, 1, 8, 8, generator=generator), label


def task(images: object = patterns, labelled: bool = True, seed: int = 0) -> TuningTask:
    model = Gaussian(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), TABLE)
    if labelled:
        model.null_label = 3  # type: ignore[assignment]
    return TuningTask(
        model, DDIM(), torch.tensor([1.0, 0.0], dtype=torch.float64), (1, 8, 8), images=images, n=900, seed=seed
    )  # type: ignore[arg-type]


def test_the_table_is_the_minimum() -> None:
    """Means of the classes and of all, and the loss on held-out images is their variance inside the classes."""
    tuned = FirstStep().tune(task())
    net = tuned.parts["first_step"]
    x, label = patterns(900)
    assert (net.mean - class_means(x[:810], label[:810], 3)).abs().max() < 1e-6  # type: ignore[operator]
    assert abs(tuned.figures["loss_table"] - 0.04) < 0.002
    assert tuned.figures["distance_table"] < 0.05 and "loss" not in tuned.figures
    z = torch.randn(4, 1, 8, 8)
    assert torch.equal(net(z, None), net(z, torch.full((4,), 3)))


@pytest.mark.parametrize("null_label", [None, 0, 2, 3, 4])
def test_every_label_has_its_mean_whatever_the_null_label_is(null_label: int | None) -> None:
    """A model with three classes and its null label: none, one of theirs (which no image then has), or above them.

    Each label that an image has gets the mean of its class, and the null label the mean of all.
    """

    def images(n: int) -> tuple[Tensor, Tensor]:
        x, label = patterns(n)
        return (x, label) if null_label not in (0, 2) else (x, label + (label >= null_label).long())

    inputs = task(images, labelled=False)
    inputs.denoiser.net = torch.nn.Module()  # type: ignore[assignment]
    inputs.denoiser.net.classes = 4 if null_label in (0, 2) else 3  # type: ignore[assignment]
    inputs.denoiser.null_label = null_label  # type: ignore[assignment]
    net = FirstStep().tune(inputs).parts["first_step"]
    x, label = images(900)
    z = torch.randn(1, 1, 8, 8)
    for c in label.unique():
        assert (net(z, c[None])[0] - x[:810][label[:810] == c].mean(0)).abs().max() < 1e-6
    for null in (None, *(() if null_label is None else (torch.tensor([null_label]),))):
        assert (net(z, null)[0] - x[:810].mean(0)).abs().max() < 1e-6


def test_the_network_learns_the_means_from_noise_alone() -> None:
    """As in the paper, without a table: the excess of the held-out loss over its minimum falls below a tenth of what
    one constant image for all leaves."""
    asked = FirstStep(widths=(8, 16), patch=1, table=False, steps=150, batch_size=32, lr=5e-3, minutes=600.0)
    recorded = []
    inputs = task()
    inputs.tick = lambda what, done, total, value: recorded.append((what, done, total))
    tuned = asked.tune(inputs)
    x, _ = patterns(900)
    minimum, constant = tuned.figures["loss_table"], float((x - x.mean(0)).square().mean())
    assert tuned.figures["steps"] == 150 and recorded[-1][1:] == (150, 150)
    assert tuned.figures["loss"] - minimum < 0.1 * (constant - minimum)
    net = tuned.parts["first_step"]
    short = FirstStep(widths=(8, 16), patch=1, table=False, steps=3, batch_size=8, minutes=600.0)
    one, two = (short.tune(task()).parts["first_step"].state_dict().values() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    copy = build_network("FirstStepNet", net.config)  # type: ignore[arg-type]
    copy.load_state_dict(net.state_dict())
    z, label = torch.randn(6, 1, 8, 8), torch.arange(6) % 4
    assert torch.equal(copy.eval()(z, label), net(z, label))


def test_an_unlabelled_model_has_one_row() -> None:
    net = FirstStep().tune(task(lambda n: (patterns(n)[0], None), labelled=False)).parts["first_step"]
    assert net.mean.shape == (1, 1, 8, 8)  # type: ignore[union-attr]
    from hasten.sampling import Noise

    start = SingDiffusion().bind({}, {"first_step": net})
    model, noise, t = task(labelled=False).denoiser, Noise([0, 1], (1, 8, 8)), torch.tensor(1.0, dtype=torch.float64)
    x = start.begin(model, noise, t)
    a, s = float(TABLE.alpha(1.0)), float(TABLE.sigma(1.0))
    assert torch.allclose(x, a * net.mean[0] + s * noise.initial())  # type: ignore[index]


def test_a_model_with_classes_and_images_without() -> None:
    """Every class has the mean of all."""
    assert distance_to_means(FirstStepNet((2,), 2), torch.zeros(3, 2)) == 0.0
    data = m2(TABLE, labels=[0, 0, 0, 1, 1, 1])
    x = data.sample(4000, torch.Generator().manual_seed(0)).float()
    inputs = TuningTask(data, DDIM(), torch.tensor([1.0, 0.0]), (2,), images=lambda n: (x[:n], None), n=4000)
    fitted = FirstStep().tune(inputs).parts["first_step"]
    assert torch.allclose(fitted.mean.data, x[:3600].mean(0).expand(3, 2), atol=1e-6)  # type: ignore[union-attr,operator]


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="--data"):
        FirstStep().tune(task(None))
    with pytest.raises(BadInput, match="not multiples"):
        FirstStep(widths=(8, 8, 8), patch=4).tune(task())
    for wrong in ({"minutes": 0.0}, {"label_drop": 2.0}, {"table": False}, {"steps": 0}):
        with pytest.raises(BadInput):
            FirstStep(**wrong)  # type: ignore[arg-type]
