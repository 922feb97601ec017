"""Bit depths and value ranges: each is converted by a documented rule, or an error."""

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
EXPECTED = np.rint(RAMP * 255)


def read(path: Path) -> np.ndarray:
    return open_data(path).images([0])[0, 0].numpy()


FILES = {
    "float [0, 1]": RAMP.astype(np.float32),
    "float 0..255": (RAMP * 255).astype(np.float32),
    "int32 0..255": EXPECTED.astype(np.int32),
    "16 bits": (RAMP * 65535).astype(np.uint16),
}


@pytest.mark.parametrize("case", FILES)
def test_image_files_of_more_bits_keep_their_contrast(tmp_path: Path, case: str) -> None:
    Image.fromarray(FILES[case]).save(tmp_path / "a.tif")
    assert np.abs(read(tmp_path) - EXPECTED).max() <= 1
    assert np.abs(read(tmp_path / "a.tif") - EXPECTED).max() <= 1  # a single file, as for --images


AMBIGUOUS = {
    "12 bits in 16": ((RAMP * 4095).astype(np.uint16), "no value above 4095"),
    "int32 of 16 bits": ((RAMP * 65535).astype(np.int32), "must lie in 0..255"),
    "negative floats": ((2 * RAMP - 1).astype(np.float32), r"must lie in \[0, 1\] or 0..255"),
    "NaN": (np.full((16, 16), np.nan, np.float32), "must lie in"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_image_files_raise(tmp_path: Path, case: str) -> None:
    pixels, message = AMBIGUOUS[case]
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match=message):
        open_data(tmp_path)


def test_colors_of_12_bits_in_16_raise(tmp_path: Path) -> None:
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
    assert np.abs(read(tmp_path) - EXPECTED).max() <= 1
    (tmp_path / "a.png").write_bytes(png((RAMP * 4095).astype(np.uint16)))
    with pytest.raises(BadInput, match="few of its 16 bits"):
        open_data(tmp_path)


def test_float_files_of_two_ranges_are_not_mixed(tmp_path: Path) -> None:
    Image.fromarray(FILES["float [0, 1]"]).save(tmp_path / "a.tif")
    Image.fromarray(FILES["float 0..255"]).save(tmp_path / "b.tif")
    with pytest.raises(BadInput, match="one range"):
        open_data(tmp_path)


ARRAYS = {
    "uint8": EXPECTED.astype(np.uint8),
    "float [-1, 1]": (2 * RAMP - 1).astype(np.float32),
    "float [0, 1]": RAMP,
    "float16 [0, 1]": RAMP.astype(np.float16),
    "float 0..255": RAMP * 255,
    "overshoot": RAMP * 255.6 - 0.3,
    "int64": EXPECTED.astype(np.int64),
    "int16": EXPECTED.astype(np.int16),
    "16 bits": (RAMP * 65535).astype(np.uint16),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_every_range(tmp_path: Path, case: str) -> None:
    np.save(tmp_path / "a.npy", np.stack([ARRAYS[case]] * 3))
    assert np.abs(read(tmp_path / "a.npy") - EXPECTED).max() <= 1


def test_the_range_is_that_of_the_entire_array_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = np.stack([RAMP * 0.01, RAMP])  # the range of the first image alone would be wrong
    np.save(tmp_path / "a.npy", dark)
    assert open_data(tmp_path / "a.npy").images([0]).max() == 3
    assert "float64 images from 0 to 1 are read as [0, 1]" in capsys.readouterr().err
    np.save(tmp_path / "b.npy", RAMP[None] > 0.5)
    assert sorted(np.unique(read(tmp_path / "b.npy"))) == [0, 255]


WRONG = {
    "int8": (EXPECTED - 128).astype(np.int8),
    "12 bits in 16": (RAMP * 4095).astype(np.uint16),
    "0 and 1": (RAMP > 0.5).astype(np.uint8),
    "0..2": RAMP * 2,
    "-1..2": RAMP * 3 - 1,
    "infinity": np.where(RAMP > 0.5, np.inf, RAMP),
    "complex": RAMP.astype(np.complex64),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_of_unknown_range_raise(tmp_path: Path, case: str) -> None:
    np.save(tmp_path / "a.npy", np.stack([WRONG[case]] * 2))
    with pytest.raises(BadInput, match="images"):
        open_data(tmp_path / "a.npy")


def test_one_image_is_not_taken_for_many(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(BadInput, match=r"\(16, 16, 3\) is one"):
        open_data(tmp_path / "a.npy")
