"""Folders and zips: links, names, splits, file formats, and unreadable files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from hasten.errors import BadInput
from hasten.train.data import Batches, open_data
from tests.factories import write_image


def member(archive: zipfile.ZipFile, name: str, value: int = 100) -> None:
    buffer, info = io.BytesIO(), zipfile.ZipInfo("x")
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    info.filename = name
    archive.writestr(info, buffer.getvalue())


# ---- folders ----


def test_linked_class_folders_are_followed_and_loops_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, name in enumerate(("cat", "dog", "eel")):
        write_image(tmp_path / "real" / name / "0.png", 50 * k)
    data = tmp_path / "data"
    write_image(data / "cat/0.png", 200)
    for name in ("dog", "eel"):
        (data / name).symlink_to(tmp_path / "real" / name)
    (data / "cat/up").symlink_to(data)
    (data / "cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    linked = open_data(data)
    assert linked.classes == ("cat", "dog", "eel") and len(linked) == 3
    output = capsys.readouterr().err
    assert "cat/up links to a folder that holds it" in output and "gone.png links to a missing file" in output
    (tmp_path / "all").symlink_to(data)
    assert len(open_data(tmp_path / "all")) == 3


def test_the_order_of_classes_is_the_same_in_every_process(tmp_path: Path) -> None:
    for name in ("1", "01", "001", "①", "²"):
        write_image(tmp_path / name / "0.png")
    code = f"from hasten.train import open_data; print(open_data({str(tmp_path)!r}).classes)"
    seed = "0" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # other hashes than those of this process
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    assert run.stdout == "('001', '01', '1', '²', '①')\n"
    assert open_data(tmp_path).classes == ("001", "01", "1", "²", "①")


def test_composed_and_decomposed_names_are_the_same(tmp_path: Path) -> None:
    write_image(tmp_path / unicodedata.normalize("NFD", "café") / "0.png")
    write_image(tmp_path / "tea/0.png")
    assert open_data(tmp_path).classes == (unicodedata.normalize("NFC", "café"), "tea")


SPLITS = {
    "unlabeled": (["train", "test", "unlabeled"], ("cat", "dog"), 2),
    "extra": (["train", "extra"], ("cat", "dog"), 2),
    "two of val": (["Train", "val", "validation"], ("cat", "dog"), 2),
    "dev": (["train", "dev"], ("cat", "dog"), 2),
    "masks": (["training", "testing", "masks", "other"], ("cat", "dog"), 2),
    "macos": (["train", "test", "__MACOSX"], ("cat", "dog"), 2),
    "vehicles": (["train", "plane"], ("plane", "train"), 4),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_and_folders_next_to_them_are_not_classes(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, classes, count = SPLITS[case]
    for part in parts:
        for name in ("cat", "dog"):
            write_image(tmp_path / part / name / "0.png")
    data = open_data(tmp_path)
    assert data.classes == classes and len(data) == count
    output = capsys.readouterr().err
    for part in parts[1:]:
        assert part in output or part == "__MACOSX"


def test_more_layouts_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/train/cat/0.png", "a/train/dog/0.png", "a/test/0.png", "a/preview.png"):
        write_image(tmp_path / name)
    data = open_data(tmp_path / "a")
    assert len(data) == 2 and data.classes == ("cat", "dog")
    assert "1 image next to the folders, such as preview.png" in capsys.readouterr().err
    for name in ("b/cat/train/0.png", "b/cat/test/1.png", "b/dog/train/2.png", "b/dog/test/3.png"):
        write_image(tmp_path / name)
    assert len(open_data(tmp_path / "b")) == len(open_data(tmp_path / "b", split="test")) == 2
    assert open_data(tmp_path / "b").classes == ("cat", "dog")
    for name in ("c/train/0.png", "c/training/0.png"):
        write_image(tmp_path / name)
    with pytest.raises(BadInput, match="several folders of the split 'train', train, training"):
        open_data(tmp_path / "c")
    for name in ("d/test/0.png", "d/val/0.png"):
        write_image(tmp_path / name)
    with pytest.raises(BadInput, match="no split 'train': it has test, val"):
        open_data(tmp_path / "d")


# ---- zips ----


def test_zip_names_of_other_operating_systems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for name in ("cat\\1.png", "cat\\2.png", "dog\\3.png"):
            member(archive, name)
    data = open_data(tmp_path / "w.zip")
    assert data.classes == ("cat", "dog") and data.labels is not None and data.labels.tolist() == [0, 0, 1]
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for k, name in enumerate(("../up/a.png", "/abs/b.png", "./ok/c.png", "ok/c.png")):
            member(archive, name, 10 * k)
    data = open_data(tmp_path / "s.zip")
    assert len(data) == 3 and data.classes == ("abs", "ok", "up")
    assert "in the zip twice, the last is used: 1 name" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "u.zip", "w") as archive:
        for name in ("日本/a.png", "кот/b.png"):
            member(archive, name)
    raw = (tmp_path / "u.zip").read_bytes()
    for head, place in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):  # without the mark of UTF-8, as some tools write it
        at = -1
        while (at := raw.find(head, at + 1)) >= 0:
            raw = raw[: at + place] + bytes([raw[at + place] & ~8]) + raw[at + place + 1 :]
    (tmp_path / "u.zip").write_bytes(raw)
    assert open_data(tmp_path / "u.zip").classes == ("кот", "日本")


@pytest.mark.parametrize(("flag", "method", "message"), [(1, None, "encrypted"), (0, 9, "method 9, deflate64")])
def test_zips_that_python_cannot_read_raise(tmp_path: Path, flag: int, method: int | None, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        member(archive, "a.png")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    for head, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = raw.find(head) + place
        raw[at] |= flag
        if method is not None:
            raw[at + 2] = method
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(BadInput, match=message):
        open_data(tmp_path / "a.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_of_every_supported_compression(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.write(write_image(tmp_path / "0.png"), "0.png")
    assert open_data(tmp_path / "a.zip").images([0]).unique().tolist() == [100]


# ---- kinds of files ----


def test_every_format_that_pillow_reads(tmp_path: Path) -> None:
    kinds = {".png": "PNG", ".jfif": "JPEG", ".bmp": "BMP", ".ppm": "PPM", ".pgm": "PPM", ".tif": "TIFF"}
    kinds |= {".jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    kinds |= {".webp": "WEBP"} if features.check("webp") else {}
    kinds |= {".avif": "AVIF"} if "avif" in features.modules and features.check("avif") else {}
    for suffix, kind in kinds.items():
        Image.new("RGB", (16, 16), (100, 100, 100)).convert("L" if suffix == ".pgm" else "RGB").save(
            tmp_path / f"a{suffix}", kind
        )
    data = open_data(tmp_path)
    assert len(data) == len(kinds)
    assert (data.images(range(len(data))).int() - 100).abs().max() <= 3


def test_unread_pages_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [Image.new("L", (4, 4), v) for v in (50, 100)]
    for name in ("a.gif", "b.tif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    assert len(open_data(tmp_path)) == 2
    assert "several pages or frames in 2 files, such as a.gif" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_the_exif_orientation_is_applied_in_every_format(tmp_path: Path, suffix: str, turn: int) -> None:
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:4, :8] = 255  # the upper left corner
    upright = {1: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}[turn]
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = turn
    image.save(tmp_path / f"a{suffix}", exif=exif)
    data = open_data(tmp_path)
    assert data.shape[1:] == upright.shape
    assert np.abs(data.images([0])[0, 0].numpy().astype(int) - upright).mean() < 6
    Image.fromarray(np.ascontiguousarray(upright)).save(tmp_path / "b.png")  # next to one that is upright
    assert len(open_data(tmp_path)) == 2


# ---- what cannot be read, and what is not read ----


@pytest.fixture
def lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("hasten.train.folders.MEMORY", 10)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    for k in range(8):
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels[k]).save(tmp_path / "ab"[k % 2] / f"{k}.png")
    return tmp_path


def test_an_unreadable_image_of_large_data_is_replaced(lazy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_data(lazy)
    original = before.images(range(8))
    file = lazy / "b/3.png"
    file.write_bytes(file.read_bytes()[:-40])
    data = open_data(lazy)
    assert data.lazy and len(data) == 8
    images = data.images(range(8))
    bad = 4 + 1  # of the order a/0, a/2, ..., b/1, b/3
    assert torch.equal(images[bad], original[bad + 1])  # the next of its class
    assert all(torch.equal(images[k], original[k]) for k in range(8) if k != bad)
    output = capsys.readouterr().err
    assert "cannot read" in output and "b/3.png" in output and "b/5.png is used instead" in output
    first, again = Batches(data, 4, seed=1), Batches(open_data(lazy), 4, seed=1)
    assert all(torch.equal(first[k]["x"], again[k]["x"]) for k in range(6))
    for k in (1, 5, 7):
        (lazy / f"b/{k}.png").write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match=r"cannot read .*b/3.png"):
        data.images([bad])


def test_an_ambiguous_image_of_large_data_is_replaced(lazy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((16, 16), 300, np.uint16)).save(lazy / "b/5.png")  # 12 bits in 16?
    images = open_data(lazy).images(range(8))
    assert torch.equal(images[6], images[7])
    assert "no value above 300" in capsys.readouterr().err


def test_only_headers_are_read(lazy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("an entire file was read")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert open_data(lazy).shape == (1, 16, 16)
    assert open_data(lazy, size=8).shape == (1, 8, 8)


def test_all_unreadable_images_of_small_data_are_named(tmp_path: Path) -> None:
    for k in range(4):
        file = write_image(tmp_path / f"{k}.png")
        if k % 2:
            file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(BadInput, match=r"cannot read .*1.png.*; also unreadable: 3.png"):
        open_data(tmp_path)
