"""The captions of images: the sources that are read, and errors for unusable ones."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import BadInput
from hasten.train.data import open_data
from hasten.train.fingerprint import describe_data
from tests.factories import write_image

NAMES = ("a.png", "b.png", "c.png")
TEXTS = ("a red heart, google style", "ein Bär", "x")


def lines(texts: dict[str, object], column: str = "text", **more: object) -> str:
    return "".join(json.dumps({"file_name": name, column: text, **more}) + "\n" for name, text in texts.items())


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for k, name in enumerate(NAMES):
        write_image(tmp_path / name, 10 * k)
    return tmp_path


def beside(folder: Path, texts: tuple[str, ...] = TEXTS) -> None:
    for name, text in zip(NAMES, texts, strict=False):
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")


CSV = 'a.png,"a red heart, google style"\nb.png,ein Bär\nc.png,x\n'
READ = {
    "jsonl": ("metadata.jsonl", lines(dict(zip(NAMES, TEXTS)))),
    "jsonl caption": ("metadata.jsonl", lines(dict(zip(NAMES, TEXTS)), "caption")),
    "jsonl prompt": ("metadata.jsonl", lines(dict(zip(NAMES, TEXTS)), "prompt")),
    "csv": ("metadata.csv", "file_name,text\n" + CSV),
    "csv capitals": ("metadata.csv", "File_Name,Caption\n" + CSV),
    "utf-16": ("metadata.csv", ("file_name,text\n" + CSV).encode("utf-16")),
    "windows": ("metadata.csv", b"\xef\xbb\xbf" + ("file_name,text\n" + CSV).replace("\n", "\r\n").encode()),
    "another order": ("metadata.jsonl", lines(dict(reversed(list(zip(NAMES, TEXTS)))))),
    "both": ("metadata.csv", "file_name,text,caption\n" + "".join(f"{n},{t!r},no\n" for n, t in zip(NAMES, "abc"))),
}


@pytest.mark.parametrize("case", READ)
def test_metadata_files_are_read(flat: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, text = READ[case]
    (flat / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    data = open_data(flat)
    assert data.captions == (TEXTS if case != "both" else ("'a'", "'b'", "'c'"))
    assert data.labels is None and not data.caption_problem
    output = capsys.readouterr().err
    assert "3 images 4 x 4 grey, with captions\n" in output and "skipped" not in output
    assert output.count("\n") == (2 if case == "both" else 1)  # the other column is named


def test_text_files_beside_the_images(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside(flat, ("a red heart, google style\n", "ein\nBär", "  "))
    (flat / "notes.txt").write_text("no image of this name")
    data = open_data(flat)
    assert data.captions == ("a red heart, google style", "ein\nBär", "")
    output = capsys.readouterr().err
    assert "with captions (1 empty), 1 file skipped: .txt 1" in output
    assert open_data(flat, caption="none").captions is None


def test_boxes_of_detection_data_are_not_captions(flat: Path) -> None:
    beside(flat, ("0 0.5 0.5 0.1 0.25\n1 .5 1e-2 0 0\n", "", "3 0 0 1 1"))
    assert open_data(flat).captions is None and not open_data(flat).caption_problem


@pytest.mark.parametrize("zipped", [False, True])
def test_each_split_has_its_own_captions(tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for k, name in enumerate(NAMES):
            write_image(tmp_path / split / name, 10 * k)
        texts = {name: f"{split} {name}" for name in NAMES}
        (tmp_path / split / "metadata.jsonl").write_text(lines(texts))
    place = tmp_path
    if zipped:
        place = tmp_path / "all.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for split in ("train", "test"):
                for file in sorted((tmp_path / split).iterdir()):
                    archive.write(file, f"set/{split}/{file.name}")
    assert open_data(place).captions == tuple(f"train {name}" for name in NAMES)
    assert "metadata" not in capsys.readouterr().err.replace(str(place), "")  # the other split is named, not its file
    assert open_data(place, split="test").captions == tuple(f"test {name}" for name in NAMES)


def test_one_file_for_all_splits_and_files_in_sub_folders(tmp_path: Path) -> None:
    for name in ("train/a.png", "train/sub/b.png", "test/c.png"):
        write_image(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(lines({"train/a.png": "x", "train/sub/b.png": "y", "test/c.png": "z"}))
    assert open_data(tmp_path).captions == ("x", "y")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "train/metadata.jsonl").write_text(lines({"a.png": "x"}))
    (tmp_path / "train/sub/metadata.jsonl").write_text(lines({"b.png": "w"}))
    assert open_data(tmp_path).captions == ("x", "w")


def test_labels_and_captions_of_one_file(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file_name": n, "label": c, "text": t} for n, c, t in zip(NAMES, ("cat", "dog", "cat"), TEXTS)]
    (flat / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_data(flat)
    assert data.captions == TEXTS and data.classes == ("cat", "dog") and data.labels.tolist() == [0, 1, 0]
    assert "2 classes from metadata.jsonl (cat, dog), with captions\n" in capsys.readouterr().err
    # a column may be read as classes and as captions, if it is named so
    assert open_data(flat, label="label", caption="label").captions == ("cat", "dog", "cat")
    assert open_data(flat, label="none", caption="label").labels is None


def test_class_folders_and_captions(tmp_path: Path) -> None:
    for k, name in enumerate(("cat/0.png", "cat/1.png", "dog/2.png")):
        write_image(tmp_path / name, 10 * k)
        (tmp_path / name).with_suffix(".txt").write_text(f"picture {k}")
    data = open_data(tmp_path)
    assert data.classes == ("cat", "dog") and data.captions == ("picture 0", "picture 1", "picture 2")


def test_another_column_is_named(flat: Path) -> None:
    (flat / "metadata.csv").write_text("file_name,Title,text\na.png,A,1\nb.png,B,2\nc.png,C,3\n")
    assert open_data(flat).captions == ("1", "2", "3")
    assert open_data(flat, caption="Title").captions == open_data(flat, caption="title").captions == ("A", "B", "C")
    beside(flat)
    assert open_data(flat, caption="text").captions == ("1", "2", "3")
    assert open_data(flat, caption="txt").captions == TEXTS
    for column, message in (("nothing", "no metadata.jsonl or metadata.csv with a column 'nothing'"),):
        with pytest.raises(BadInput, match=message):
            open_data(flat, caption=column)


REFUSED = {
    "missing images": (
        lines(dict.fromkeys((*NAMES, "d.png", "e.png"), "x")),
        "names d.png, which does not exist, and 1",
    ),
    "an image without": (lines({"a.png": "x", "c.png": "z"}), "3 images but no caption for 1 of them, such as b.png"),
    "broken line": (lines({"a.png": "x"}) + '{"file_name": "b.png", "text": \n', "line 2"),
    "no object": (lines({"a.png": "x"}) + "\n3\n", "line 3 is no JSON object"),
    "two captions": (lines(dict.fromkeys(NAMES, "x")) + lines({"b.png": "y"}), "two captions of b.png, 'x' and 'y'"),
    "all empty": (lines(dict.fromkeys(NAMES, "")), "all captions are empty"),
    "lists": (lines({name: ["x", "y"] for name in NAMES}), "a caption is a text, got"),
    "not text": (b'{"file_name": "a.png", "text": "caf\xe9"}\n', "not UTF-8"),
    "empty file": ("", "is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_captions_are_refused_in_one_line(flat: Path, case: str) -> None:
    content, message = REFUSED[case]
    (flat / "metadata.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message) as error:
        open_data(flat, label="none", caption="text")
    assert "\n" not in str(error.value)
    data = open_data(flat, label="none")  # images can be used without them
    assert data.captions is None and message.split(",")[0].split("'")[0] in data.caption_problem
    assert any(data.caption_problem in line for line in data.messages)
    assert open_data(flat, label="none", caption="none").caption_problem == ""


def test_an_unquoted_comma_is_refused(flat: Path) -> None:
    (flat / "metadata.csv").write_text("file_name,text\na.png,a heart, red\nb.png,y\nc.png,z\n")
    with pytest.raises(BadInput, match="more columns than the header"):
        open_data(flat, caption="text")


def test_a_null_caption_is_empty(flat: Path) -> None:
    (flat / "metadata.jsonl").write_text(lines({"a.png": "x", "b.png": None}) + '{"file_name": "c.png"}\n')
    data = open_data(flat)
    assert data.captions == ("x", "", "") and "with captions (2 empty)" in data.summary


def test_text_files_for_some_images(flat: Path) -> None:
    beside(flat, TEXTS[:2])
    with pytest.raises(BadInput, match=r"3 images but no .txt with a caption for 1 of them, such as c.png"):
        open_data(flat, caption="txt")
    assert "such as c.png" in open_data(flat).caption_problem
    (flat / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"a.txt: it is not UTF-8"):
        open_data(flat, caption="txt")
    (flat / "a.txt").unlink()
    (flat / "b.txt").unlink()
    with pytest.raises(BadInput, match=r"no .txt beside its images"):
        open_data(flat, caption="txt")


def test_text_files_and_metadata_must_agree(flat: Path) -> None:
    (flat / "metadata.jsonl").write_text(lines({"a.png": TEXTS[0], "b.png": "y"}))
    (flat / "c.txt").write_text("z")
    assert "2 captions are in a metadata file and those of 1 other image are not" in open_data(flat).caption_problem
    beside(flat)
    (flat / "metadata.jsonl").write_text(lines(dict(zip(NAMES, TEXTS))))
    assert open_data(flat).captions == TEXTS  # the same in both
    (flat / "b.txt").write_text("another")
    data = open_data(flat)
    assert data.captions is None and "two captions of b.png, 'ein Bär' in metadata.jsonl and" in data.caption_problem


def test_captions_are_part_of_the_fingerprint(flat: Path) -> None:
    (flat / "metadata.jsonl").write_text(lines(dict(zip(NAMES, TEXTS))))
    first = describe_data(open_data(flat))
    (flat / "metadata.jsonl").write_text(lines(dict(zip(NAMES, ("b", *TEXTS[1:])))))
    second = describe_data(open_data(flat))
    assert {name for name in first if first[name] != second[name]} == {"captions"}


def test_arrays_have_no_captions(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((3, 4, 4), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None])
    with pytest.raises(BadInput, match="is an array"):
        open_data(tmp_path / "images.npy", caption="text")
    write_image(tmp_path / "a.png")
    with pytest.raises(BadInput, match="is one image"):
        open_data(tmp_path / "a.png", caption="text")
