"""Networks of integer layers on disk: small, the same in another process, refused when damaged."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.nets import _int8
from hasten.nets.quantized import QConv2d, execution, quantization_config, replace_layers, set_group
from hasten.nets.time_groups import TimeGroups
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine
from hasten.storage.weights import describe_network, network_from_description, write_weights
from tests.nets.test_quantized import ACTS, images, integers, rounded
from tests.nets.test_unet import lively


def test_bytes_on_disk_of_a_network_of_36_million(tmp_path):
    torch.manual_seed(0)
    net = lively(UNet(channels=3, widths=(128, 256, 256, 256), blocks=2, attention=(1,)))
    count = sum(p.numel() for p in net.parameters())
    assert 3e7 < count < 5e7
    for bits, fraction in ((4, 0.14), (8, 0.27)):
        write_weights(integers(net, bits), tmp_path / "weights")
        assert (tmp_path / "weights").stat().st_size <= fraction * 4 * count


@pytest.fixture
def model():
    denoiser = Denoiser(integers(lively(UNet(channels=1, widths=(16, 32), classes=3)), 4), VPCosine(), V())
    return hasten.Model(denoiser.eval(), "integers", (1, 8, 8), classes=("a", "b", "c"))


READ = """
import sys, torch, hasten
model = hasten.load(sys.argv[1])
from hasten.nets.quantized import execution
x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    y = model.denoiser(x, torch.tensor(0.6), label=torch.tensor([0, 2, 1]))
torch.save((y, execution(model.denoiser.net)), sys.argv[2])
"""


def test_a_saved_model_is_the_same_in_another_process(model, tmp_path):
    model.save(tmp_path / "saved")
    subprocess.run([sys.executable, "-c", READ, tmp_path / "saved", tmp_path / "out"], check=True, timeout=120)
    result, kind = torch.load(tmp_path / "out")
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.denoiser(x, torch.tensor(0.6), label=torch.tensor([0, 2, 1]))
    assert torch.equal(result, expected)
    assert kind == execution(model.denoiser.net) == ("int8" if _int8.onednn_works() else "simulated")
    (row,) = json.loads((tmp_path / "saved" / "model.json").read_text())["net"]["quantized"]
    assert (
        row["bits"] == 4 and row["act_bits"] == 8 and len(row["layers"]) == len(quantization_config(model.denoiser.net))
    )


def test_half_precision_keeps_the_scales(model, tmp_path):
    model.save(tmp_path / "half", half=True)
    mine, other = model.denoiser.net, hasten.load(tmp_path / "half").denoiser.net
    assert torch.equal(mine.conv_in.parts[0].scale, other.conv_in.parts[0].scale)
    assert torch.equal(mine.conv_in.weight, other.conv_in.weight)
    assert torch.equal(mine.norm_out.weight.detach().half().float(), other.norm_out.weight)


def test_a_damaged_file_is_refused_in_one_line(model, tmp_path):
    model.save(tmp_path / "saved")
    file = tmp_path / "saved" / "weights.safetensors"
    full = file.read_bytes()
    for damaged in (full[: len(full) // 2], full[:-1] + bytes([full[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match="is not the file that model.json names") as refused:
            hasten.load(tmp_path / "saved")
        assert "\n" not in str(refused.value)
    file.write_bytes(full)
    hasten.load(tmp_path / "saved")
    description = tmp_path / "saved" / "model.json"
    text = description.read_text()
    for wrong in (
        text.replace('"conv_in"', '"conv_inn"'),
        text.replace('"bits": 4', '"bits": 8'),
        text.replace('"groups": 1', '"rank": 0'),
        text.replace('"parts"', '"part"'),
    ):
        assert wrong != text
        description.write_text(wrong)
        with pytest.raises(BadInput) as refused:
            hasten.load(tmp_path / "saved")
        assert "\n" not in str(refused.value)


def test_a_network_is_described_and_restored():
    net = lively(UNet(channels=1, widths=(16, 32), attention=(1,)))
    assert "quantized" not in describe_network(net)
    some = {
        name: QConv2d.from_layer(getattr(net, name), rounded(getattr(net, name), 8, acts=ACTS))
        for name in ("conv_out",)
    }
    fast = replace_layers(net, some)
    again = network_from_description(json.loads(json.dumps(describe_network(fast))))
    again.load_state_dict(fast.state_dict())
    x, t = images(1, 1, 8), torch.tensor([0.4])
    with torch.no_grad():
        set_group(fast, 2)
        set_group(again, 2)
        assert torch.equal(again(x, t), fast(x, t))


def test_a_network_with_time_groups_is_described_too():
    net = TimeGroups(integers(lively(UNet(channels=1, widths=(16, 32))), acts=ACTS), (0.3, 0.6))
    again = network_from_description(json.loads(json.dumps(describe_network(net))))
    again.load_state_dict(net.state_dict())
    x = images(1, 1, 8)
    with torch.no_grad():
        result = [net(x, torch.tensor([t])) for t in (0.5, 0.9)]
        assert all(torch.equal(again(x, torch.tensor([t])), y) for t, y in zip((0.5, 0.9), result, strict=True))
