"""The labels of images: the sources that are read, and errors for unusable ones."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import BadInput
from hasten.train.data import Data, open_data
from tests.factories import write_image

NAMES = ("a.png", "b.png", "c.png")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for k, name in enumerate(NAMES):
        write_image(tmp_path / name, 10 * k)
    return tmp_path


def classes_of(data: Data) -> list[str] | None:
    return None if data.labels is None or data.classes is None else [data.classes[k] for k in data.labels.tolist()]


EXPECTED = ["cat", "dog", "cat"]
READ = {
    "comma": ("labels.csv", "file,label\na.png,cat\nb.png,dog\nc.png,cat\n"),
    "semicolon": ("labels.csv", "file;label\na.png;cat\nb.png;dog\nc.png;cat\n"),
    "tab": ("labels.tsv", "file\tlabel\na.png\tcat\nb.png\tdog\nc.png\tcat\n"),
    "spaces": ("labels.csv", "file, label\na.png, cat\nb.png, dog\nc.png , cat\n"),
    "spaces and quotes": ("labels.csv", 'file, label\n"a.png", "cat"\n"b.png", "dog"\n"c.png", "cat"\n'),
    "capitals": ("Labels.CSV", "File,LABEL\na.png,cat\nb.png,dog\nc.png,cat\n"),
    "other names": ("labels.csv", "image,class\na.png,cat\nb.png,dog\nc.png,cat\n"),
    "no header": ("labels.csv", "a.png;cat\nb.png;dog\nc.png;cat\n"),
    "no suffixes": ("labels.csv", "id,category\na,cat\nb,dog\nc,cat\n"),
    "windows": ("labels.csv", "\ufefffilename,label\r\n.\\a.png,cat\r\n.\\b.png,dog\r\n.\\c.png,cat\r\n"),
    "hugging face csv": ("metadata.csv", "file_name,label\na.png,cat\nb.png,dog\nc.png,cat\n"),
    "hugging face jsonl": ("metadata.jsonl", "".join(
        json.dumps({"file_name": n, "text": "x", "label": c}) + "\n" for n, c in zip(NAMES, EXPECTED))),
    "dataset tools": ("dataset.json", json.dumps({"labels": [[n, c] for n, c in zip(NAMES, EXPECTED)]})),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_label_files_are_read(flat: Path, case: str) -> None:
    name, text = READ[case]
    (flat / name).write_text(text, newline="")
    assert classes_of(open_data(flat)) == EXPECTED


REFUSED = {
    "empty": ("labels.csv", "", "is empty"),
    "one column": ("labels.csv", "a.png\nb.png\n", "one column only"),
    "gone": ("labels.csv", "gone.png,cat\na.png,cat\nb.png,dog\nc.png,cat\n", "names gone.png, which does not exist"),
    "no class column": ("labels.csv", "file,age\na.png,1\nb.png,2\nc.png,3\n", "no column 'label'.*file, age"),
    "twice": ("labels.csv", "file,label\na.png,cat\na.png,dog\nb.png,dog\nc.png,cat\n", "a.png twice"),
    "a label is missing": ("labels.csv", "file,label\na.png,cat\nb.png,\nc.png,cat\n", "has no label"),
    "too many columns": ("labels.csv", "file,label\na.png,cat, small\nb.png,dog\nc.png,cat\n", "more columns"),
    "no header of three": ("labels.csv", "a.png,cat,1\nb.png,dog,2\nc.png,cat,3\n", "no header"),
    "not text": ("labels.csv", b"file,label\na.png,caf\xe9\n", "not UTF-8"),
    "bad json": ("metadata.jsonl", '{"file_name": "a.png"', "line 1"),
    "vectors": ("dataset.json", '{"labels": [["a.png", [0.1, 0.2]]]}', "pairs"),
    "too few": ("dataset.json", '{"labels": [["a.png", 0]]}', "no label for 2 of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_labels_raise(flat: Path, case: str) -> None:
    name, text, message = REFUSED[case]
    (flat / name).write_bytes(text if isinstance(text, bytes) else text.encode())  # type: ignore[union-attr]
    with pytest.raises(BadInput, match=message):
        open_data(flat)
    assert open_data(flat, label="none").labels is None


def test_unused_files_and_columns_are_reported(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (flat / "metadata.csv").write_text("file_name,text,score\na.png,x,1\nb.png,y,2\nc.png,z,3\n")
    (flat / "notes.txt").write_text("x")
    (flat / "raw.heic").write_bytes(b"x")
    (flat / "other.csv").write_text("a,b\n")
    data = open_data(flat)
    assert data.labels is None
    output = capsys.readouterr().err
    assert "3 images 4 x 4 grey, with captions, " in output and data.captions == ("x", "y", "z")
    assert "captions (text)" not in output and "columns not used: score" in output
    assert "other.csv not read: labels are read from labels.csv" in output and ".txt 1" in output
    open_data(flat)
    assert capsys.readouterr().err == ""  # once
    data = open_data(flat, label="score")
    assert classes_of(data) == ["1", "2", "3"]


def test_bare_names_are_found_in_folders(tmp_path: Path) -> None:
    for name in NAMES:
        write_image(tmp_path / "images" / name)
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{n},{c}\n" for n, c in zip(NAMES, EXPECTED)))
    assert classes_of(open_data(tmp_path)) == EXPECTED
    write_image(tmp_path / "images/more/a.png")
    with pytest.raises(BadInput, match=r"names a.png, which does not exist"):
        open_data(tmp_path)


def test_classes_without_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        write_image(tmp_path / name / "0.png")
    (tmp_path / "eel").mkdir()
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox/0.heic").write_bytes(b"x")
    assert open_data(tmp_path).classes == ("cat", "dog")
    assert "no images in the folders eel, fox" in capsys.readouterr().err


def test_a_single_other_column_of_metadata_is_a_class_where_its_values_repeat(flat: Path) -> None:
    write_image(flat / "d.png")
    rows = "a.png,x\nb.png,y\nc.png,x\nd.png,y\n"
    (flat / "metadata.csv").write_text("file_name,kind\n" + rows)
    assert classes_of(open_data(flat)) == ["x", "y", "x", "y"]
    (flat / "metadata.csv").write_text("file_name,kind\n" + rows.replace("y", "z", 1).replace("x", "w", 1))
    assert open_data(flat).labels is None


def test_labels_and_class_folders_must_agree(tmp_path: Path) -> None:
    for k, name in enumerate(("cat/0.png", "cat/1.png", "dog/2.png")):
        write_image(tmp_path / name, 10 * k)
    labels = tmp_path / "labels.csv"
    for text in ("cat/0.png,dog\ncat/1.png,cat\ndog/2.png,dog\n", "cat/0.png,x\ncat/1.png,y\ndog/2.png,y\n"):
        labels.write_text("file,label\n" + text)
        with pytest.raises(BadInput, match="cat/0.png lies in 'cat' and is labelled"):
            open_data(tmp_path)
    assert classes_of(open_data(tmp_path, label="label")) == ["x", "y", "y"]
    assert classes_of(open_data(tmp_path, label="folders")) == ["cat", "cat", "dog"]
    labels.write_text("file,label\ncat/0.png,Cat\ncat/1.png,Cat\ndog/2.png,Dog\n")
    assert classes_of(open_data(tmp_path)) == ["Cat", "Cat", "Dog"]
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/0.png,Dog\ncat/1.png,Cat\ndog/2.png,Dog\n")
    with pytest.raises(BadInput, match="differ: cat/0.png"):
        open_data(tmp_path)


def test_shards_of_the_dataset_tools_are_not_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, pairs = [3, 1, 0, 2, 1, 3], []
    with zipfile.ZipFile(tmp_path / "edm.zip", "w") as archive:
        for k, label in enumerate(expected):
            write_image(tmp_path / "one.png", 10 * k)
            name = f"{k // 3:05d}/img{k:08d}.png"
            archive.write(tmp_path / "one.png", name)
            pairs.append([name, label])
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))
    data = open_data(tmp_path / "edm.zip")
    assert data.labels is not None and data.labels.tolist() == expected and data.classes == ("0", "1", "2", "3")
    capsys.readouterr()
    with zipfile.ZipFile(tmp_path / "edm.zip") as archive:
        archive.extractall(tmp_path / "out")
    assert open_data(tmp_path / "out").labels.tolist() == expected  # type: ignore[union-attr]
    (tmp_path / "out/dataset.json").write_text('{"labels": null}')
    open_data(tmp_path / "out")
    assert "if they are shards, set label to 'none'" in capsys.readouterr().err


def test_label_files_of_a_split_are_in_it_or_above(tmp_path: Path) -> None:
    for name in ("train/0.png", "train/1.png", "test/0.png"):
        write_image(tmp_path / name)
    (tmp_path / "labels.csv").write_text("file,label\ntrain/0.png,x\ntrain/1.png,y\ntest/0.png,y\n")
    assert classes_of(open_data(tmp_path)) == ["x", "y"] and classes_of(open_data(tmp_path, split="test")) == ["y"]
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "train/metadata.jsonl").write_text(
        '{"file_name": "0.png", "label": 1}\n{"file_name": "1.png", "label": 0}\n'
    )
    assert classes_of(open_data(tmp_path)) == ["1", "0"]


# ---- arrays ----

X = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])
ARRAYS = {
    "medmnist": ({"train_images": X, "train_labels": Y[:, None], "test_images": X[:2], "test_labels": Y[:2, None]}, list("012012")),
    "singular": ({"images": X, "label": Y}, list("012012")),
    "targets": ({"data": X, "targets": Y}, list("012012")),
    "capitals": ({"X_train": X, "Y_train": Y, "X_test": X[:2]}, list("012012")),
    "one-hot": ({"images": X, "labels": np.eye(3)[Y]}, list("012012")),
    "floats": ({"images": X, "labels": Y.astype(float)}, list("012012")),
    "from 1": ({"images": X, "labels": Y + 1}, list("123123")),
    "words": ({"images": X, "labels": np.array(["b", "a", "c", "b", "a", "c"])}, list("bacbac")),
    "named": ({"images": X, "labels": Y, "class_names": np.array(["c", "b", "a"])}, list("cbacba")),
    "numbered": ({"arr_0": X, "arr_1": Y}, list("012012")),
    "ids": ({"images": X, "ids": np.arange(6)}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
def test_labels_in_arrays(tmp_path: Path, case: str) -> None:
    arrays, expected = ARRAYS[case]
    np.savez(tmp_path / "a.npz", **arrays)
    assert classes_of(open_data(tmp_path / "a.npz")) == expected


def test_integer_labels_from_1_have_no_class_0(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=X, labels=Y + 1)
    assert open_data(tmp_path / "a.npz").classes == ("1", "2", "3")


def test_unused_arrays_are_reported_and_unused_labels_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", images=X, kind=Y // 2)
    with pytest.raises(BadInput, match="'kind' could hold labels"):
        open_data(tmp_path / "a.npz")
    assert classes_of(open_data(tmp_path / "a.npz", label="kind")) == list("001001")
    assert open_data(tmp_path / "a.npz", label="none").labels is None
    np.savez(tmp_path / "b.npz", images=X, labels=Y, test_images=X[:1], more=np.zeros(3))
    open_data(tmp_path / "b.npz")
    assert "arrays not used: test_images, more" in capsys.readouterr().err
    np.savez(tmp_path / "c.npz", images=X, labels=np.ones((6, 3), int))
    with pytest.raises(BadInput, match="one-hot"):
        open_data(tmp_path / "c.npz")
    np.save(tmp_path / "pictures.npy", X)
    np.save(tmp_path / "labels.npy", Y)
    open_data(tmp_path / "pictures.npy")
    assert "labels.npy next to it not used" in capsys.readouterr().err


def test_images_next_to_an_array_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "images.npy", X)
    write_image(tmp_path / "a.png")
    assert len(open_data(tmp_path)) == 6
    assert "not 1 image next to them, such as a.png" in capsys.readouterr().err
    open_data(tmp_path, split=None, size=3, report=False)
    assert capsys.readouterr().err == ""


def test_several_idx_sets_in_a_folder_are_not_mixed(tmp_path: Path) -> None:
    for kind in ("emnist-letters", "emnist-digits"):
        (tmp_path / f"{kind}-train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + bytes([0, 0, 0, 1] * 3) + b"\x07")
    with pytest.raises(BadInput, match="several sets"):
        open_data(tmp_path)
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + bytes([0, 0, 0, 1]) + b"\x01")
    data = open_data(tmp_path / "emnist-letters-train-images-idx3-ubyte")
    assert classes_of(data) == ["1"]
