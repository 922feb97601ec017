"""PNG files: pixels, grids, text, and writing all or nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hasten import images
from hasten.errors import BadInput
from hasten.files import check_writable, write_file


def test_pixels_are_exact_at_both_ends() -> None:
    """uint8 -> [-1, 1] -> uint8 is the identity on all 256 values, and what lies outside is clamped."""
    values = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert images.to_uint8(values.reshape(1, 1, 16, 16)).flatten().tolist() == list(range(256))
    assert images.to_uint8(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_the_images_row_by_row(channels: int) -> None:
    x = torch.rand(5, channels, 4, 6) * 2 - 1
    sheet = np.asarray(images.make_image_grid(x, columns=2, gap=1)).reshape(14, 13, channels)
    for k in range(5):
        row, column = divmod(k, 2)
        tile = sheet[5 * row : 5 * row + 4, 7 * column : 7 * column + 6]
        assert np.array_equal(tile, images.to_uint8(x[k : k + 1])[0])
    assert (sheet[10:, 7:] == 255).all()


def test_text_travels_with_a_png_and_pixels_stay() -> None:
    picture = images.to_pil(torch.rand(3, 5, 5) * 2 - 1)
    text = {"command": "hasten sample fashion --label 'ankle boot'", "seeds": "0-15", "note": "é λ"}
    data = images.encode_png(picture, text)
    assert data == images.encode_png(picture, text)
    with Image.open(io.BytesIO(data)) as back:
        assert np.array_equal(np.asarray(back), np.asarray(picture))


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    data = images.encode_png(images.to_pil(torch.zeros(1, 2, 2)), {"seeds": "3"})
    write_file(check_writable(tmp_path / "new" / "a.png"), data)
    assert images.read_png_text(tmp_path / "new" / "a.png") == {"seeds": "3"}
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match="cannot write .*a.png: No space left on device"):
        write_file(tmp_path / "a.png", b"new")
    assert (tmp_path / "a.png").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_what_cannot_be_written_or_shown(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot write"):
        check_writable(tmp_path / "file" / "a.png")
    with pytest.raises(BadInput, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(BadInput, match="C of 1, 3 or 4"):
        images.to_uint8(torch.zeros(1, 2, 4, 4))
    with pytest.raises(BadInput, match="columns"):
        images.make_image_grid(torch.zeros(2, 1, 4, 4), columns=0)
