"""`hasten evaluate --bits-per-dim`."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import hasten
from hasten.errors import BadInput
from hasten.likelihood import OdeLikelihood, VariationalBound
from hasten.train.data import Data, to_float
from tests.factories import run_cli, tiny_denoiser, tiny_model

FAST = OdeLikelihood(rtol=1e-2, atol=1e-2)


def images(n=12, levels=256, seed=0, side=4):
    """Random images of some levels, as bytes, of two classes."""
    k = torch.randint(0, levels, (n, 1, side, side), generator=torch.Generator().manual_seed(seed))
    return Data.of((k * 255 / (levels - 1)).round().to(torch.uint8), torch.arange(n) % 2, ("a", "b"), "noise")


def small(classes=("a", "b"), **options):
    return tiny_model(classes, shape=(1, 4, 4), **options)


def test_the_mean_its_error_and_the_values_one_by_one():
    model, data = small(), images()
    result = hasten.evaluate_likelihood(model, data, method=FAST, n=10, batch_size=4)
    values = torch.tensor(result["images"])
    assert len(values) == 10 and result["conditional"]
    assert result["bits_per_dim"] == pytest.approx(float(values.mean()))
    assert result["standard_error"] == pytest.approx(float(values.std()) / 10**0.5)
    # the class of each image is used
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:10].sort().values
    x, label = to_float(data.images(chosen[:4])), data.labels[chosen[:4]]
    own = FAST(model.denoiser, x, range(4), 256, label=label).nats / 16 / torch.log(torch.tensor(2.0))
    assert torch.allclose(own, values[:4].double(), atol=1e-5)
    assert "Hutchinson" in result["protocol"] and "uniform, 256 levels" in result["dequantisation"]


def test_an_untrained_network_does_not_beat_uniform_noise():
    # no model has less than 8 bits/dim on average on images of 256 equally likely levels
    result = hasten.evaluate_likelihood(small(), images(12), method=VariationalBound(samples=16))
    assert result["bits_per_dim"] + 3 * result["standard_error"] > 8
    assert result["bits_per_dim"] == pytest.approx(sum(result["parts"].values()))


def test_fewer_levels_cost_fewer_bits():
    many = hasten.evaluate_likelihood(small(), images(levels=17), method=FAST)
    with pytest.raises(BadInput, match="not of 16 levels"):
        hasten.evaluate_likelihood(small(), images(levels=17), method=FAST, levels=16)
    few = hasten.evaluate_likelihood(small(), images(levels=17), method=FAST, levels=17)
    assert 3.5 < many["bits_per_dim"] - few["bits_per_dim"] < 4.5  # log2(255 / 16) = 4


@pytest.mark.parametrize(
    "model, words",
    [
        (small(card={"distilled": {"method": "progressive"}}), "distilled student"),
        (small(decoder=object()), "latents"),
        (small(conditioning=object()), "prompts"),
        (small(codec="raw"), "kind raw"),
        (tiny_model(None, shape=(1, 8, 8)), "of this size"),
        (tiny_model(("x", "y"), shape=(1, 4, 4)), "noise"),
    ],
)
def test_what_has_no_likelihood_is_refused(model, words):
    with pytest.raises(BadInput, match=words) as caught:
        hasten.evaluate_likelihood(model, images(), method=FAST)
    assert "\n" not in str(caught.value)


def test_another_process_is_refused():
    from hasten.schedules import VPLinear
    from hasten.schedules.truncated import Truncated

    @dataclasses.dataclass(frozen=True)
    class Process(VPLinear):
        ordinary = False

    model = small(None)
    model.denoiser = tiny_denoiser(schedule=Process())
    with pytest.raises(BadInput, match="one of the process Process"):
        hasten.evaluate_likelihood(model, images(), method=FAST)
    with pytest.raises(BadInput, match="this model's process is Process"):
        FAST(model.denoiser, to_float(images().images([0])), [0], 256)
    # a chain that begins from the images of a generator, whose density is not known
    cut = small(None)
    cut.denoiser = tiny_denoiser(schedule=Truncated(VPLinear(), 0.4))
    with pytest.raises(BadInput, match="begin from noise"):
        hasten.evaluate_likelihood(cut, images(), method=FAST)


def test_the_command(tmp_path):
    import numpy as np

    small(None).save(tmp_path / "model")
    path = tmp_path / "data.npy"
    np.save(path, images().images(range(12))[:, 0].numpy())
    words = ["evaluate", tmp_path / "model", "--data", path, "--split", "train", "--n", 4, "--batch-size", 2]
    code, out, _ = run_cli(*words, "--bits-per-dim", "bound:samples=2")
    assert code == 0 and "bits/dim" in out and "standard error, 4 images" in out and "softmax decoder" in out
    code, out, _ = run_cli(*words, "--bits-per-dim", "ode:rtol=0.1,atol=0.1", "--json")
    result = json.loads(out)
    assert code == 0 and result["n"] == 4 and result["standard_error"] > 0 and result["nfe"] > 6
    for more, message in (
        (["--guidance-scale", 2], "guidance scale 2"),
        (["--steps", 8], "does not depend on steps"),
        (["--levels", 17], "not of 17 levels"),
        (["--precision", "bf16"], "fp32"),
    ):
        code, out, err = run_cli(*words, "--bits-per-dim", "bound:samples=2", *more)
        assert code != 0 and message in err, err
    code, _, err = run_cli("evaluate", tmp_path / "model", "--bits-per-dim", "ode")
    assert code != 0 and "--data" in err
    code, _, err = run_cli(*words, "--bits-per-dim", "odd")
    assert code != 0 and "bound, ode" in err
