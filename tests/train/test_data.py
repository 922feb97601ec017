"""Sources of images, and the order of batches."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.errors import BadInput
from hasten.train import sources
from hasten.train.data import Batches, Data, open_data


def pixels(n: int, height: int = 6, width: int = 5, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(array).save(path)


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def same(data: Data, arrays: np.ndarray) -> bool:
    return np.array_equal(data.images(range(len(data))).permute(0, 2, 3, 1).numpy(), arrays)


# ---- what a source holds ----


def test_class_folders_give_labels_in_natural_order(tmp_path: Path) -> None:
    arrays = pixels(6)
    for k, name in enumerate(["2", "2", "10", "10", "cat", "cat"]):
        save(tmp_path / name / f"{k}.png", arrays[k])
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    data = open_data(tmp_path)
    assert data.classes == ("2", "10", "cat")
    assert data.shape == (3, 6, 5)
    for k in range(6):
        image = data.images([k])[0].permute(1, 2, 0).numpy()
        source = next(i for i in range(6) if np.array_equal(arrays[i], image))
        assert data.labels is not None and int(data.labels[k]) == source // 2


def test_flat_folder_has_no_labels_and_zip_equals_folder(tmp_path: Path) -> None:
    arrays = pixels(4)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for k in range(4):
            save(tmp_path / "set" / f"{k}.png", arrays[k])
            archive.write(tmp_path / "set" / f"{k}.png", f"top/{k}.png")
        archive.writestr("__MACOSX/top/._0.png", b"junk")
    for path in (tmp_path / "set", tmp_path / "a.zip"):
        data = open_data(path)
        assert data.labels is None and data.classes is None
        assert same(data, arrays)


def test_splits(tmp_path: Path) -> None:
    arrays = pixels(3)
    save(tmp_path / "top/train/a.png", arrays[0])
    save(tmp_path / "top/train/b.png", arrays[1])
    save(tmp_path / "top/Test/a.png", arrays[2])
    assert same(open_data(tmp_path), arrays[:2])
    assert same(open_data(tmp_path, split="test"), arrays[2:])
    assert len(open_data(tmp_path, split=None)) == 3
    with pytest.raises(BadInput, match="has no split 'val': it has test, train"):
        open_data(tmp_path, split="val")
    with pytest.raises(BadInput, match="unknown split 'tset'"):
        open_data(tmp_path, split="tset")


@pytest.mark.parametrize("header", [True, False])
def test_labels_csv(tmp_path: Path, header: bool) -> None:
    for k, array in enumerate(pixels(3)):
        save(tmp_path / f"{k}.png", array)
    rows = ["0.png,shoe", "2.png,bag", "1.png,shoe"]
    (tmp_path / "labels.csv").write_text("\n".join((["file,label"] if header else []) + rows))
    data = open_data(tmp_path)
    assert data.classes == ("bag", "shoe")
    assert data.labels is not None and data.labels.tolist() == [1, 1, 0]


def test_labels_csv_column(tmp_path: Path) -> None:
    for k, array in enumerate(pixels(2)):
        save(tmp_path / "train" / f"{k}.png", array)
    (tmp_path / "labels.csv").write_text("file,age\ntrain/0.png,old\ntrain/1.png,new\n")
    with pytest.raises(BadInput, match=r"no column 'label' \(columns: file, age"):
        open_data(tmp_path)
    assert open_data(tmp_path, label="none").labels is None
    data = open_data(tmp_path, label="age")
    assert data.classes == ("new", "old") and data.labels is not None and data.labels.tolist() == [1, 0]
    with pytest.raises(BadInput, match=r"labels.csv has no column 'race' \(columns: file, age\)"):
        open_data(tmp_path, label="race")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path: Path, suffix: str) -> None:
    arrays, labels = pixels(5, channels=1), np.array([0, 2, 1, 1, 0], np.uint8)
    for split, part in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", arrays[part, ..., 0])
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", labels[part])
    train, test = open_data(tmp_path), open_data(tmp_path, split="test")
    assert train.shape == (1, 6, 5) and same(train, arrays[:3]) and same(test, arrays[3:])
    assert train.labels is not None and train.labels.tolist() == [0, 2, 1] and train.classes == ("0", "1", "2")
    one = open_data(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    assert same(one, arrays[3:]) and one.labels is not None and one.labels.tolist() == [1, 0]


def test_numpy(tmp_path: Path) -> None:
    arrays, labels = pixels(4), np.array([1, 0, 1, 0])
    np.save(tmp_path / "images.npy", arrays)
    np.save(tmp_path / "labels.npy", labels)
    np.savez(tmp_path / "a.npz", x_train=arrays.transpose(0, 3, 1, 2), y_train=labels[:, None], x_test=arrays[:1])
    np.save(tmp_path / "floats.npy", arrays.astype(np.float32) / 127.5 - 1)
    for path in (tmp_path, tmp_path / "images.npy", tmp_path / "a.npz", tmp_path / "floats.npy"):
        assert same(open_data(path), arrays), path
    assert open_data(tmp_path / "a.npz").labels.tolist() == [1, 0, 1, 0]  # type: ignore[union-attr]
    assert open_data(tmp_path).labels.tolist() == [1, 0, 1, 0]  # type: ignore[union-attr]
    assert open_data(tmp_path / "floats.npy").labels is None
    assert same(open_data(tmp_path / "a.npz", split="test"), arrays[:1])


def test_size_and_channels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels(1, 8, 12)[0])
    save(tmp_path / "b.png", pixels(1, 8, 8)[0])
    with pytest.raises(BadInput, match=r"a.png is 12x8 and b.png is 8x8; set size"):
        open_data(tmp_path)
    assert open_data(tmp_path, size=4).shape == (3, 4, 4)
    assert open_data(tmp_path, size=(4, 6), channels=1).shape == (1, 4, 6)
    # The crop is centred: a white bar at the left edge of a wide image is cut away.
    wide = np.zeros((8, 12, 3), np.uint8)
    wide[:, :2] = 255
    save(tmp_path / "a.png", wide)
    assert int(open_data(tmp_path, size=8).images([0]).max()) == 0
    grey = pixels(2, channels=1)
    np.save(tmp_path / "g.npy", grey)
    data = open_data(tmp_path / "g.npy", channels=3, size=(3, 3))
    assert data.shape == (3, 3, 3) and torch.equal(data.images([0])[0, 0], data.images([0])[0, 2])


def test_modes_are_converted_to_eight_bits(tmp_path: Path) -> None:
    deep = np.array([[0, 256 * 200], [256 * 100 + 255, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert open_data(tmp_path).images([0])[0, 0].tolist() == [[0, 200], [100, 255]]
    (tmp_path / "deep.png").unlink()
    clear = np.full((2, 2, 4), 10, np.uint8)
    clear[..., 3] = [[0, 255], [255, 255]]
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    assert open_data(tmp_path).images([0])[0, :, 0].T.tolist() == [[255] * 3, [10] * 3]
    (tmp_path / "clear.png").unlink()
    turned = Image.fromarray(pixels(1, 8, 16)[0])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_data(tmp_path).shape == (3, 16, 8)


def test_lazy_equals_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = pixels(5)
    for k in range(5):
        save(tmp_path / "set" / "ab"[k % 2] / f"{k}.png", arrays[k])
    np.save(tmp_path / "x.npy", arrays)
    eager = [open_data(tmp_path / "set"), open_data(tmp_path / "x.npy")]
    for module in ("hasten.train.sources.MEMORY", "hasten.train.folders.MEMORY"):
        monkeypatch.setattr(module, 100)
    for before, path in zip(eager, (tmp_path / "set", tmp_path / "x.npy"), strict=True):
        lazy = open_data(path)
        assert lazy.lazy and not before.lazy
        assert torch.equal(lazy.images([3, 0, 3]), before.images([3, 0, 3]))
        assert (lazy.labels is None) == (before.labels is None)


# ---- what goes wrong ----


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no file or folder .*nowhere"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no images"):
        open_data(tmp_path)
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(BadInput, match=r"e.zip holds no images"):
        open_data(tmp_path / "e.zip")
    np.save(tmp_path / "e.npy", np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(BadInput, match=r"e.npy holds no images"):
        open_data(tmp_path / "e.npy")
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"film.mp4 is no source of images"):
        open_data(tmp_path / "film.mp4")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("damage", ["cut", "junk", "empty"])
def test_a_damaged_image_is_named_in_the_error(tmp_path: Path, suffix: str, damage: str) -> None:
    for k, array in enumerate(pixels(3, 40, 40)):
        save(tmp_path / f"{k}{suffix}", array)
    bad = tmp_path / f"1{suffix}"
    raw = bad.read_bytes()
    bad.write_bytes({"cut": raw[: len(raw) // 2], "junk": b"not an image at all", "empty": b""}[damage])
    with pytest.raises(BadInput, match=f"cannot read .*1{suffix}") as error:
        open_data(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_zip(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(pixels(1, 40, 40)[0]).save(buffer, "png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.png", buffer.getvalue())
        archive.writestr("cut.png", buffer.getvalue()[:800])
    with pytest.raises(BadInput, match=r"cannot read .*a.zip/cut.png"):
        open_data(tmp_path / "a.zip")
    raw = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(raw[: len(raw) - 60])
    with pytest.raises(BadInput, match=r"b.zip is not a zip file"):
        open_data(tmp_path / "b.zip")
    flipped = bytearray(raw)
    flipped[200] ^= 255  # inside the stored bytes of good.png: the checksum no longer holds
    (tmp_path / "c.zip").write_bytes(flipped)
    with pytest.raises(BadInput, match=r"cannot read .*c.zip/cut.png.*; also unreadable: good.png"):
        open_data(tmp_path / "c.zip")


def test_loose_images_next_to_classes(tmp_path: Path) -> None:
    save(tmp_path / "a/0.png", pixels(1)[0])
    save(tmp_path / "b/0.png", pixels(1)[0])
    save(tmp_path / "stray.png", pixels(1)[0])
    with pytest.raises(BadInput, match=r"loose images as well .*stray.png"):
        open_data(tmp_path)


def test_csv_that_does_not_match_the_images(tmp_path: Path) -> None:
    for k, array in enumerate(pixels(2)):
        save(tmp_path / f"{k}.png", array)
    for text, message in (
        ("file,label\n0.png,a\n", "2 images but no label for 1 of them, such as 1.png"),
        ("file,label\n0.png,a\n1.png,b\n9.png,b\n", "names 9.png, which does not exist"),
        ("file,label\n0.png,a\n1.png\n", "the row '1.png' has no label"),
        ("index,label\n0,a\n", "no column 'file'"),
    ):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(BadInput, match=message):
            open_data(tmp_path)


def test_damaged_idx(tmp_path: Path) -> None:
    good = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(good, pixels(3, channels=1)[..., 0])
    raw = good.read_bytes()
    good.write_bytes(raw[:-20])
    with pytest.raises(BadInput, match=r"cannot read .*train-images-idx3-ubyte.gz.*truncated"):
        open_data(tmp_path)
    good.write_bytes(gzip.compress(gzip.decompress(raw)[:-7]))
    with pytest.raises(BadInput, match=r"should hold 106 bytes for sizes \(3, 6, 5\) but holds 99"):
        open_data(tmp_path)
    good.write_bytes(gzip.compress(b"\x00\x00\x0d\x03" + bytes(100)))
    with pytest.raises(BadInput, match="not an IDX file of bytes: it starts with 00 00 0d 03"):
        open_data(tmp_path)
    good.write_bytes(b"")
    with pytest.raises(BadInput, match="starts with nothing"):
        open_data(tmp_path)
    write_idx(good, pixels(3, channels=1)[..., 0])
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(4, np.uint8))
    with pytest.raises(BadInput, match="3 images but 4 labels"):
        open_data(tmp_path)
    with pytest.raises(BadInput, match="no IDX file of the split 'test'"):
        open_data(tmp_path, split="test")


def test_damaged_numpy(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels(3), labels=np.arange(3))
    raw = path.read_bytes()
    for broken in (raw[: len(raw) // 2], b"junk", b""):
        path.write_bytes(broken)
        with pytest.raises(BadInput, match=r"cannot read .*a.npz"):
            open_data(path)
    np.savez(path, pictures=pixels(3))
    with pytest.raises(BadInput, match=r"no array of images: looked for images, .* found pictures"):
        open_data(path)
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadInput, match=r"cannot read .*a.npz"):
        open_data(path)
    for kwargs, message in (
        ({"images": pixels(3).astype(np.int32) + 1}, "must be uint8"),
        ({"images": pixels(3).astype(np.float32) - 1}, r"floats? .*\[-1, 1\], .*found -1 to 2"),
        ({"images": np.full((2, 4, 4, 3), np.nan)}, r"must lie in \[-1, 1\]"),
        ({"images": pixels(3)[0, 0]}, "must be .n, H, W, C."),
        ({"images": pixels(3), "labels": np.arange(2)}, "3 images but 2 labels"),
        ({"images": pixels(3), "labels": np.array([0, -1, 0])}, "labels run from -1 to 0"),
        ({"images": pixels(3), "labels": np.array([0, 10**9, 0])}, "labels run from 0 to 1000000000"),
        ({"images": pixels(3), "labels": np.array([0.5, 1, 2])}, "labels must be integers"),
    ):
        np.savez(path, **kwargs)
        with pytest.raises(BadInput, match=message):
            open_data(path)


# ---- the order ----


def numbered(n: int, labels: bool = True) -> Data:
    """Image k has the value k in its only pixel."""
    return Data.of(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n) % 3 if labels else None)


def values(batch: dict[str, torch.Tensor]) -> list[int]:
    return ((batch["x"] + 1) * 127.5).round().flatten().int().tolist()


def test_an_epoch_is_a_permutation() -> None:
    batches = Batches(numbered(10), 4, seed=3)
    order = [v for k in range(5) for v in values(batches[k])]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    for k in range(5):
        assert batches[k]["label"].tolist() == [v % 3 for v in values(batches[k])]
    assert batches[0]["x"].dtype == torch.float32 and batches[0]["label"].dtype == torch.int64
    assert "label" not in Batches(numbered(4, labels=False), 2)[0]


def test_a_batch_depends_on_seed_and_number_only() -> None:
    batches = Batches(numbered(10), 4, seed=3, flip=True)
    iterator = iter(batches)
    long_run = [next(iterator) for _ in range(9)]
    torch.manual_seed(99)  # the global stream has no part in it
    resumed = iter(Batches(numbered(10), 4, seed=3, start_step=5, flip=True))
    for k in range(5, 9):
        assert torch.equal(next(resumed)["x"], long_run[k]["x"])
    assert values(batches[2]) == values(long_run[2])
    assert [values(Batches(numbered(10), 4, seed=4)[k]) for k in range(3)] != [values(batches[k]) for k in range(3)]
    state = torch.get_rng_state()
    batches[7]
    assert torch.equal(state, torch.get_rng_state())


def test_ranks_split_the_global_batch() -> None:
    data = Data.of(torch.randint(0, 256, (11, 1, 2, 2), dtype=torch.uint8), torch.arange(11) % 2)
    global_batches = Batches(data, 6, seed=1, flip=True)
    parts = [Batches(data, 6, seed=1, rank=r, world=3, flip=True) for r in range(3)]
    for k in range(4):
        for key in ("x", "label"):
            assert torch.equal(torch.cat([p[k][key] for p in parts]), global_batches[k][key])
    with pytest.raises(BadInput, match="multiple of the 3 processes"):
        Batches(data, 4, world=3)


def test_flip_mirrors_about_half() -> None:
    image = torch.tensor([[0, 255]], dtype=torch.uint8).view(1, 1, 1, 2)
    data = Data.of(image)
    flipped = Batches(data, 64, flip=True)
    fraction = torch.cat([flipped[k]["x"][:, 0, 0, 0] for k in range(16)]).gt(0).float().mean()
    assert abs(float(fraction) - 0.5) < 0.07  # 1,024 images: 4.5 standard deviations
    assert (Batches(data, 64)[0]["x"][:, 0, 0, 0] == -1).all()


def test_range() -> None:
    assert Batches(numbered(256), 256)[0]["x"].aminmax() == (-1.0, 1.0)


def test_data_of_checks_its_arguments() -> None:
    with pytest.raises(BadInput, match="uint8"):
        Data.of(torch.zeros(2, 1, 4, 4))
    with pytest.raises(BadInput, match="2 images but 3 labels"):
        Data.of(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.long))
    assert sources.Data is Data
