"""What went wrong in silence: features that fp16 makes infinite, pictures that a network cannot see, defaults that
nothing looked at, and the device on which the networks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.cli.evaluate import evaluate as evaluate_command
from hasten.distributed.ranks import Ranks
from hasten.errors import BadInput
from hasten.metrics import evaluate as evaluation
from hasten.metrics import (
    evaluate_features,
    evaluate_images,
    extract,
    feature_net,
    make_reference,
    reference,
    reference_from_images,
    save_reference,
)
from hasten.metrics.difference import image_difference
from hasten.metrics.frechet import frechet_distance
from hasten.metrics.inception_score import class_accuracy, inception_score
from hasten.metrics.kid import kid, polynomial_mmd2
from hasten.metrics.precision_recall import manifold
from hasten.workflows.evaluate import evaluate_distributed


def test_features_beyond_half_precision_are_stored(tmp_path: Path) -> None:
    x, y = (3e5 * torch.randn(400, 4, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    output = make_reference(x, "big", "all", "net", keep=300)
    save_reference(output, tmp_path)
    read = reference(tmp_path)
    assert torch.equal(read.sample, output.sample) and read.sample.dtype == torch.float32
    for expected in (output, read):
        result = evaluate_features(y, expected, bootstrap=0)
        assert all(torch.isfinite(torch.tensor(m.value)) for m in result.values())
        assert result["precision"].value > 0.8 and result["coverage"].value > 0.8
    small = make_reference(x / 1e5, "small", "all", "net", keep=300)
    assert torch.equal(small.sample, small.sample.half().float()), "what fits is stored as before"


def test_a_network_whose_features_are_not_finite_is_refused() -> None:
    class Broken(nn.Module):
        name = "broken"

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) / 0.0

    with pytest.raises(BadInput, match="broken returned features that are not finite"):
        extract(Broken(), 2 * torch.rand(12, 1, 4, 4) - 1)


def test_fashion_features_refuse_pictures_in_colour() -> None:
    grey, colour = torch.rand(12, 1, 28, 28) * 2 - 1, torch.rand(12, 3, 28, 28) * 2 - 1
    same = grey.expand(-1, 3, -1, -1)
    assert torch.allclose(extract(feature_net("fashion"), same)[0], extract(feature_net("fashion"), grey)[0], atol=1e-5)
    for images in (colour, (colour * 127).abs().byte()):
        with pytest.raises(BadInput, match="12 of 12 images are in colour.*efficientnet_lite0"):
            evaluate_images(images)
    with pytest.raises(BadInput, match="in colour"):
        reference_from_images(colour, "mine", "all", feature_net("fashion"))


def test_the_names_that_the_help_offers_are_known(tmp_path: Path) -> None:
    message = (evaluate_command.__doc__ or "").partition("features: Feature network:")[2]
    offered = " ".join(message.partition(". Default")[0].split()).split(", ", 3)
    offered = [" ".join(name.split()) for name in offered]
    assert offered.pop() == "or a folder of a CLIP, SigLIP or DINOv2 of transformers"
    assert offered == ["fashion", "efficientnet_lite0", "inception"]
    for name in (*offered, "efficientnet", "efficientnet@64", "inception_v3"):
        try:
            feature_net(name)
        except BadInput as e:  # without the weights
            assert "no feature network" not in str(e)


def test_the_kernel_distance_takes_subsets_of_a_thousand() -> None:
    x, y = torch.randn(1500, 4), torch.randn(1500, 4) + 0.5
    assert kid(x, y, subsets=2) == kid(x, y, subsets=2, size=1000)
    order = torch.Generator().manual_seed(0)
    rows = [torch.randperm(1500, generator=order)[:1000] for _ in range(2)]
    assert kid(x, y, subsets=1)[0] == pytest.approx(polynomial_mmd2(x[rows[0]], y[rows[1]]))


@pytest.mark.parametrize("width, asked, repeats", [(4, 100, 100), (512, 30, 30), (513, 100, 10), (513, 3, 3)])
def test_an_interval_has_the_requested_repeats(
    width: int, asked: int, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten where the covariance is wider than 512, as many as asked for elsewhere."""
    recorded = []

    def spy(features: Tensor, mean: Tensor, covariance: Tensor, repeats: int) -> tuple[float, float]:
        recorded.append(repeats)
        return 0.0, 1.0

    monkeypatch.setattr(evaluation, "frechet_interval", spy)
    monkeypatch.setattr(evaluation, "frechet_distance", lambda *a: 0.5)
    expected = make_reference(torch.randn(12, width), "x", "all", "net")
    assert evaluate_features(torch.randn(12, width), expected, bootstrap=asked)["frechet"].interval == (0.0, 1.0)
    assert recorded == [repeats]


class Seen(nn.Module):
    """A feature network that keeps where it was sent, and where and how many at once the images came."""

    name = "seen"

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[torch.device] = []
        self.sizes: list[int] = []

    def to(self, *args: Any, **kwargs: Any) -> Seen:
        self.sent.append(torch.device(args[0]))
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return x.flatten(1)[:, :3]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_named_network_runs_on_the_given_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = Seen(), 2 * torch.rand(600, 1, 4, 4) - 1
    monkeypatch.setattr(evaluation, "feature_net", lambda which: net)
    expected = make_reference(images.flatten(1)[:, :3], "x", "all", "seen")
    evaluate_images(images, features="seen", reference=expected, bootstrap=0, device=device)
    evaluate_distributed(images, None, "seen", expected, range(600), Ranks(torch.device(device)))
    assert net.sent == 2 * [torch.device(device)] and net.sizes == 2 * [256, 256, 88]
    evaluate_images(images, features=net, reference=expected, bootstrap=0, device=device)
    assert len(net.sent) == 2, "a network of one's own stays where it is"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    good, bad = torch.randn(12, 4), torch.randn(12, 4)
    bad[3, 1] = bad[5, 0] = value
    covariance = torch.eye(4)
    for figure in (
        lambda: kid(bad, good),
        lambda: manifold(good, bad),
        lambda: manifold(bad, good),
        lambda: inception_score(bad, 2),
        lambda: class_accuracy(bad, torch.zeros(12, dtype=torch.long)),
        lambda: image_difference(bad, good),
    ):
        with pytest.raises(BadInput, match="2 of 12 .* hold NaN or infinity"):
            figure()
    with pytest.raises(BadInput, match="hold NaN or infinity"):
        frechet_distance(bad[3], covariance, good[0], covariance)
