"""Data of unusual form: messages about what is used, and errors of one line for what cannot be used."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.errors import BadInput
from hasten.train import messages
from hasten.train.data import open_data
from tests.factories import write_images

IMAGES = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8)


@pytest.mark.parametrize("train, other", [
    ("train2017", "val2017"), ("training_set", "test_set"), ("seg_train", "seg_test"), ("train_images", "test_images"),
    ("train", "eval"), ("trainval", "test"), ("Train", "Evaluation"),
])  # fmt: skip
def test_splits_within_longer_names_are_not_classes(tmp_path: Path, train: str, other: str) -> None:
    write_images(tmp_path, f"{train}/cat/a.png", f"{train}/dog/a.png", f"{other}/cat/b.png")
    data = open_data(tmp_path)
    assert (len(data), data.classes) == (2, ("cat", "dog"))
    assert any(other in message for message in data.messages)


def test_splits_of_several_sets_raise(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="name one of them"):
        open_data(write_images(tmp_path, "trainA/a.png", "trainB/a.png", "testA/a.png", "testB/a.png"))


def test_classes_named_like_splits_stay_classes(tmp_path: Path) -> None:
    names = ("bullet_train", "test_tube", "testarossa", "cat")
    assert open_data(write_images(tmp_path, *(f"{name}/a.png" for name in names))).classes == tuple(sorted(names))


def test_a_folder_of_images_next_to_masks_is_the_data(tmp_path: Path) -> None:
    data = open_data(write_images(tmp_path, "images/cat/a.png", "images/dog/a.png", "masks/a.png"))
    assert (len(data), data.classes) == (2, ("cat", "dog")) and "masks" in data.messages[0]


@pytest.mark.parametrize("name, text", [
    ("dataset.json", '{"labels": 5}'), ("dataset.json", "[" * 100_000), ("metadata.jsonl", "[" * 100_000),
    ("labels.csv", "file,label\na.png,x\0\nb.png,y\n"),
    ("metadata.jsonl", '{"file_name": "a.png", "label": [1]}\n{"file_name": "b.png", "label": [0]}\n'),
    ("metadata.jsonl", '{"file_name": "a.png", "label": {"k": 1}}\n{"file_name": "b.png", "label": {"k": 0}}\n'),
])  # fmt: skip
def test_unusable_labels_raise(tmp_path: Path, name: str, text: str) -> None:
    (write_images(tmp_path, "a.png", "b.png") / name).write_text(text)
    with pytest.raises(BadInput, match=name):
        open_data(tmp_path)


@pytest.mark.parametrize("arrays", [
    {"labels": np.array(3)}, {"labels": np.array(list("ab") * 3, object)},
    {"labels": np.array([0, 1, 2**63, 0, 1, 1], np.uint64)}, {"Images": IMAGES},
    {"labels": np.arange(6) % 2, "class_names": np.array(["a", "a"])},
])  # fmt: skip
def test_unusable_arrays_raise(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, **arrays)
    with pytest.raises(BadInput) as error:
        open_data(tmp_path / "a.npz")
    assert "truncated" not in str(error.value) and "-9223" not in str(error.value)


def test_byte_strings_are_decoded_and_image_names_are_not_classes(tmp_path: Path) -> None:
    labels = np.arange(6) % 2
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=labels, class_names=np.array([b"a", b"b"]))
    assert open_data(tmp_path / "a.npz").classes == ("a", "b")
    np.savez(tmp_path / "b.npz", images=IMAGES, labels=labels, names=np.array(list("uvwxyz")))
    data = open_data(tmp_path / "b.npz")
    assert data.classes == ("0", "1") and any("names" in message for message in data.messages)


def test_an_array_with_the_wrong_suffix_raises(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    np.savez(tmp_path / "b.npz", images=IMAGES)
    (tmp_path / "a.npy").rename(tmp_path / "c.npz")
    (tmp_path / "b.npz").rename(tmp_path / "d.npy")
    for name, suffix in (("c.npz", ".npy"), ("d.npy", ".npz")):
        with pytest.raises(BadInput, match=f"name it {suffix}"):
            open_data(tmp_path / name)


def test_sixteen_bits_of_either_byte_order(tmp_path: Path) -> None:
    deep = IMAGES.astype(np.uint16) * 257
    for name, kind in (("a", "<u2"), ("b", ">u2")):
        np.save(tmp_path / f"{name}.npy", deep.astype(kind))
    assert torch.equal(*(open_data(tmp_path / f"{name}.npy").images(range(6)) for name in "ab"))


def test_few_of_sixteen_bits_with_alpha_raise(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.full((4, 4, 4), 1000, ">u2")
    rows[:, :, 3] = 65535
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", 4, 4, 16, 6, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(BadInput, match="16 bits"):
        open_data(tmp_path)


def test_masks_of_0_and_1_raise(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="masks"):
        open_data(write_images(tmp_path, "a.png", value=1))


def test_unused_labels_next_to_an_array_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_printed", set())
    np.save(tmp_path / "images.npy", IMAGES)
    (tmp_path / "labels.csv").write_text("file,label\n")
    open_data(tmp_path)
    assert "not used as labels, the arrays are read: labels.csv" in capsys.readouterr().err


@pytest.mark.parametrize("data", [None, 5, ["a"], IMAGES, torch.zeros(2, 1, 4, 4), ""])
def test_paths_of_other_types_raise(data: Any) -> None:
    with pytest.raises(BadInput):
        open_data(data)


@pytest.mark.parametrize("option", [{"size": 8.0}, {"size": "8"}, {"size": True}, {"channels": True}])
def test_invalid_sizes_raise(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="must be"):
        open_data(write_images(tmp_path, "a.png"), **option)


def test_a_path_too_long_raises() -> None:
    with pytest.raises(BadInput, match="no file or folder"):
        open_data("a" * 5000)


@pytest.mark.parametrize("words", [["sample", "", "--out", "x.png"], ["train", "", "--out", "x"],
                                   ["train", "x", "--out", ""], ["evaluate", "fashion", "--reference", ""]])  # fmt: skip
def test_an_empty_path_on_the_command_line_raises(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from hasten.cli import main

    assert main(words) == 2
    assert "empty" in capsys.readouterr().err


def test_an_error_with_a_very_long_name_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    from hasten.cli import main

    assert main(["sample", "a" * 5000, "--out", "x.png"]) == 1
    assert len(capsys.readouterr().err) < 1500
