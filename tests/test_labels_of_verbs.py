"""Images and labels are read alike by every command: train, distill, tune, sample, evaluate, restyle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hasten
from hasten.cli import main
from hasten.cli.restyle import of_class
from hasten.distributed.ranks import Ranks
from hasten.errors import BadInput
from hasten.images import read_png_text, to_image_tensor
from hasten.metrics import extract, feature_net, reference
from hasten.metrics.fashion import CLASSES
from hasten.model import Model
from hasten.workflows.distill_data import training_images
from hasten.workflows.distribute import part_of
from hasten.workflows.evaluate import classifier_labels, evaluate_distributed
from hasten.workflows.tune import calibration_images

FAST = ("--steps", 1, "--precision", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def fashion() -> Model:
    return hasten.load("fashion")


@pytest.fixture
def folders(fashion: Model, tmp_path: Path) -> Path:
    """An image of each class, of value 20 k, in a folder of its name: their order is not the model's."""
    for k, name in enumerate(fashion.classes or ()):
        (tmp_path / "data" / name.upper()).mkdir(parents=True)
        Image.new("L", (28, 28), 20 * k).save(tmp_path / "data" / name.upper() / "0.png")
    return tmp_path / "data"


def test_every_command_labels_an_image_by_its_folder(fashion: Model, folders: Path) -> None:
    data = training_images(fashion, folders)
    assert data.labels is not None
    assert (data.images(range(10))[:, 0, 0, 0] // 20).tolist() == data.labels.tolist()
    x, labels = calibration_images(fashion, folders)(10)
    assert labels is not None and ((x[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist() == labels.tolist()
    for k, name in enumerate(fashion.classes or ()):
        assert float(of_class(folders, 1, fashion, name)[0, 0, 0, 0] + 1) * 127.5 == pytest.approx(20 * k, abs=0.01)


def test_other_classes_raise_with_both_lists(fashion: Model, tmp_path: Path) -> None:
    for k in range(10):
        (tmp_path / f"animal{k}").mkdir()
        Image.new("L", (28, 28), 20 * k).save(tmp_path / f"animal{k}" / "0.png")
    for read in (lambda: training_images(fashion, tmp_path), lambda: calibration_images(fashion, tmp_path)):
        with pytest.raises(BadInput, match=r"animal0.*t-shirt"):
            read()
    with pytest.raises(BadInput, match="no class 'bag': its classes are animal0"):
        of_class(tmp_path, 1, fashion, "bag")


def test_numbers_of_data_are_indices_of_named_classes(fashion: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 28, 28), np.uint8), labels=np.array([9, 0, 3, 3]))
    data = training_images(fashion, tmp_path / "a.npz")
    assert data.labels is not None and data.labels.tolist() == [9, 0, 3, 3]


def test_the_command_takes_names_that_are_numbers_or_contain_commas(tmp_path: Path) -> None:
    rows, source = [], tmp_path / "data"
    source.mkdir()
    for name, value in (("1", 0), ("2", 40), ("3", 80)):
        Image.new("L", (8, 8), value).save(source / f"{value}.png")
        rows.append(f'{value}.png,"{name}, x"' if name == "3" else f"{value}.png,{name}")
    (source / "labels.csv").write_text("file,label\n" + "\n".join(rows))
    small = ("--widths", "16,16", "--patch", 1, "--batch-size", 2)
    assert main([str(w) for w in ("train", source, "--out", tmp_path / "m", *FAST, *small)]) == 0
    for label, index in (("1", "0,0"), ("2,1", "1,0"), ("3, x", "2,2"), ("3, x,2", "2,1")):
        words = ("sample", tmp_path / "m", "--n", 2, "--label", label, "--out", tmp_path / "x.png", *FAST)
        assert main([str(w) for w in words]) == 0
        assert read_png_text(tmp_path / "x.png")["labels"] == index
    model = hasten.load(str(tmp_path / "m"))
    assert torch.equal(model.sample(1, 1, steps=1), model.sample(1, "1", steps=1))
    assert part_of(model, 3, None, slice(1, 3)).tolist() == [1, 2]  # type: ignore[union-attr]


def test_class_accuracy_is_measured_by_name_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = ("bag", "T-Shirt", "coat")
    labels = classifier_labels(torch.tensor([0, 1, 2, 0]), mixed, "fashion")
    assert labels is not None and [CLASSES[k] for k in labels.tolist()] == ["bag", "t-shirt", "coat", "bag"]
    assert classifier_labels(torch.tensor([0, 3]), mixed, "fashion") is None  # 3: no class
    assert "have no class" in capsys.readouterr().err
    assert classifier_labels(torch.tensor([0]), ("zebra",), "fashion") is None
    assert "does not know the classes zebra" in capsys.readouterr().err
    digits = tuple(map(str, range(10)))
    assert classifier_labels(torch.tensor([9, 0]), digits, "fashion").tolist() == [9, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("label", ["0,1", "Bag, ankle boot", "none", "0,none"])
def test_evaluate_takes_the_labels_that_sample_takes(label: str) -> None:
    assert main([str(w) for w in ("evaluate", "fashion", "--n", 10, "--label", label, *FAST)]) == 0


def test_inpainting_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.full((28, 28, 2), 255, np.uint8)
    pixels[..., 0] = 200
    pixels[10:18, 10:18, 1] = 0
    Image.fromarray(pixels, "LA").save(tmp_path / "hole.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "opaque.png")
    Image.fromarray(255 - pixels[..., 1]).save(tmp_path / "mask.png")
    start = ("sample", "fashion", "--start", "ccdf:task=inpainting,time=0.5", "--n", 1, *FAST[2:], "--steps", 2)
    outputs = []
    for more in (
        ("--images", tmp_path / "hole.png"),
        ("--images", tmp_path / "opaque.png", "--mask", tmp_path / "mask.png"),
    ):
        out = tmp_path / f"{len(outputs)}.png"
        assert main([str(w) for w in (*start, *more, "--out", out)]) == 0
        outputs.append(np.asarray(Image.open(out)).astype(int))
        outside = outputs[-1].copy()
        outside[10:18, 10:18] = 200
        assert np.abs(outside - 200).max() <= 1
        assert np.abs(outputs[-1][10:18, 10:18] - 200).max() > 1
    assert np.array_equal(*outputs)
    for more, message in (
        (("--images", tmp_path / "opaque.png"), "what is white in --mask"),
        (("--mask", tmp_path / "mask.png"), "a mask belongs to --images"),
    ):
        assert main([str(w) for w in (*start, *more, "--out", tmp_path / "no.png")]) == 1
        assert message in capsys.readouterr().err


GREY = np.full((2, 28, 28), 128, np.uint8)
START_IMAGES = {
    "uint8": torch.from_numpy(GREY)[:, None],
    "NumPy": GREY[:, None],
    "NumPy without channels": GREY,
    "NumPy, channels last": GREY[..., None],
    "floats": (GREY[:, None] / 127.5 - 1),
    "PIL": [Image.fromarray(GREY[0]), Image.fromarray(GREY[1]).convert("RGB")],
    "a list of tensors": [torch.from_numpy(GREY[k])[None] for k in range(2)],
}


@pytest.mark.parametrize("case", START_IMAGES)
def test_start_images_of_every_type(fashion: Model, case: str) -> None:
    x = to_image_tensor(START_IMAGES[case], fashion.shape)
    assert x.shape == (2, 1, 28, 28) and (x - (128 / 127.5 - 1)).abs().max() < 1e-6
    outputs = fashion.sample(2, 0, steps=1, start="ccdf:task=restoration,time=0.05", images=START_IMAGES[case])
    assert outputs.mean().abs() < 0.3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 1, 28, 28), 128.0), r"lie in \[-1, 1\], found values up to 128"),
        (torch.full((2, 1, 28, 28), 128), "floats in .* or uint8"),
        (torch.ones(2, 1, 28, 28, dtype=torch.bool), "floats in .* or uint8"),
        (["a.png", "b.png"], "a list of str"),
        ("a.png", "got str"),
        ([Image.new("L", (28, 28)), Image.new("L", (28, 14))], "one size"),
    ],
)
def test_invalid_start_images_raise(fashion: Model, images: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fashion.sample(2, 0, steps=1, start="ccdf:task=restoration,time=0.3", images=images)


def test_names_with_brackets_are_printed_verbatim() -> None:
    from rich.console import Console

    from hasten.compare.report import results_table
    from tests.test_report import row

    console = Console(width=200)
    with console.capture() as captured:
        console.print(results_table([row("[red]x[/b] y", "ddim", 4, 4.0, 3.0)]))
    assert "[red]x[/b] y" in captured.get()


def test_accuracy_of_a_model_whose_classes_have_another_order(fashion: Model) -> None:
    names = tuple(sorted(fashion.classes or ()))
    x, own = fashion.sample(20, steps=2), fashion.labels(20)
    assert own is not None
    reordered = torch.tensor([names.index((fashion.classes or ())[k]) for k in own.tolist()])
    known, ranks = reference("fashion"), Ranks(torch.device("cpu"))
    measured = [
        evaluate_distributed(x, labels, "fashion", known, range(20), ranks, classes)["accuracy"].value  # type: ignore[index]
        for labels, classes in ((own, fashion.classes), (reordered, names), (reordered, fashion.classes))
    ]
    assert measured[0] == measured[1] > 0.5 > measured[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x + 1) / 2, r"found 0 to 1: multiply by 2"),
        (lambda x: (x + 1) * 127.5 - 0.01, "divide by 127.5"),
        (lambda x: x.to(torch.int8), "int8"),
        (lambda x: x > 0, "bool"),
    ],
)
def test_metrics_raise_for_other_ranges(change: Callable[[torch.Tensor], object], message: str) -> None:
    x = torch.rand(12, 1, 28, 28) * 2 - 1
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -1, 1
    net = feature_net("fashion")
    extract(net, x)
    with pytest.raises(BadInput, match=message):
        extract(net, change(x))  # type: ignore[arg-type]


def test_metrics_take_numpy_arrays() -> None:
    x = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8)
    net = feature_net("fashion")
    assert torch.equal(extract(net, x.numpy())[0], extract(net, x)[0])  # type: ignore[arg-type]
