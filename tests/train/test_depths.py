"""Depths and ranges of pixels: each is read by a stated rule, or refused; none becomes black or washed out in silence."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hasten.errors import BadInput
from hasten.train.data import open_data

RAMP = np.tile(np.linspace(0, 1, 16), (16, 1))
WANTED = np.rint(RAMP * 255)


def read(path: Path) -> np.ndarray:
    return open_data(path).images([0])[0, 0].numpy()


FILES = {
    "float [0, 1]": RAMP.astype(np.float32),
    "float 0..255": (RAMP * 255).astype(np.float32),
    "int32 0..255": WANTED.astype(np.int32),
    "16 bits": (RAMP * 65535).astype(np.uint16),
}


@pytest.mark.parametrize("way", FILES)
def test_deep_image_files_keep_their_contrast(tmp_path: Path, way: str) -> None:
    Image.fromarray(FILES[way]).save(tmp_path / "a.tif")
    assert np.abs(read(tmp_path) - WANTED).max() <= 1
    assert np.abs(read(tmp_path / "a.tif") - WANTED).max() <= 1  # one file, as --images takes it


DOUBTFUL = {
    "12 bits in 16": ((RAMP * 4095).astype(np.uint16), "no value above 4095"),
    "int32 of 16 bits": ((RAMP * 65535).astype(np.int32), "must lie in 0..255"),
    "negative floats": ((2 * RAMP - 1).astype(np.float32), r"must lie in \[0, 1\] or 0..255"),
    "NaN": (np.full((16, 16), np.nan, np.float32), "must lie in"),
}


@pytest.mark.parametrize("way", DOUBTFUL)
def test_doubtful_image_files_are_refused(tmp_path: Path, way: str) -> None:
    pixels, message = DOUBTFUL[way]
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match=message):
        open_data(tmp_path)


def test_colours_of_12_bits_in_16_are_refused(tmp_path: Path) -> None:
    def png(values: np.ndarray) -> bytes:
        """A PNG of 16-bit colours, which Pillow reads and does not write."""
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.repeat(values[..., None], 3, -1))
        out = b"\x89PNG\r\n\x1a\n"
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        ):
            out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        return out

    (tmp_path / "a.png").write_bytes(png((RAMP * 65535).astype(np.uint16)))
    assert np.abs(read(tmp_path) - WANTED).max() <= 1
    (tmp_path / "a.png").write_bytes(png((RAMP * 4095).astype(np.uint16)))
    with pytest.raises(BadInput, match="few of its 16 bits"):
        open_data(tmp_path)


def test_float_files_of_two_ranges_are_not_mixed(tmp_path: Path) -> None:
    Image.fromarray(FILES["float [0, 1]"]).save(tmp_path / "a.tif")
    Image.fromarray(FILES["float 0..255"]).save(tmp_path / "b.tif")
    with pytest.raises(BadInput, match="one range"):
        open_data(tmp_path)


ARRAYS = {
    "uint8": WANTED.astype(np.uint8),
    "float [-1, 1]": (2 * RAMP - 1).astype(np.float32),
    "float [0, 1]": RAMP,
    "float16 [0, 1]": RAMP.astype(np.float16),
    "float 0..255": RAMP * 255,
    "overshoot": RAMP * 255.6 - 0.3,
    "int64": WANTED.astype(np.int64),
    "int16": WANTED.astype(np.int16),
    "16 bits": (RAMP * 65535).astype(np.uint16),
}


@pytest.mark.parametrize("way", ARRAYS)
def test_arrays_of_every_range(tmp_path: Path, way: str) -> None:
    np.save(tmp_path / "a.npy", np.stack([ARRAYS[way]] * 3))
    assert np.abs(read(tmp_path / "a.npy") - WANTED).max() <= 1


def test_the_range_is_that_of_the_whole_array_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dark = np.stack([RAMP * 0.01, RAMP])  # the first image alone would tell less
    np.save(tmp_path / "a.npy", dark)
    assert open_data(tmp_path / "a.npy").images([0]).max() == 3
    assert "float64 images from 0 to 1 are read as [0, 1]" in capsys.readouterr().err
    np.save(tmp_path / "b.npy", RAMP[None] > 0.5)
    assert sorted(np.unique(read(tmp_path / "b.npy"))) == [0, 255]


WRONG = {
    "int8": (WANTED - 128).astype(np.int8),
    "12 bits in 16": (RAMP * 4095).astype(np.uint16),
    "0 and 1": (RAMP > 0.5).astype(np.uint8),
    "0..2": RAMP * 2,
    "-1..2": RAMP * 3 - 1,
    "infinity": np.where(RAMP > 0.5, np.inf, RAMP),
    "complex": RAMP.astype(np.complex64),
}


@pytest.mark.parametrize("way", WRONG)
def test_arrays_of_no_known_range_are_refused(tmp_path: Path, way: str) -> None:
    np.save(tmp_path / "a.npy", np.stack([WRONG[way]] * 2))
    with pytest.raises(BadInput, match="images"):
        open_data(tmp_path / "a.npy")


def test_one_image_is_not_taken_for_many(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(BadInput, match=r"\(16, 16, 3\) is one"):
        open_data(tmp_path / "a.npy")
