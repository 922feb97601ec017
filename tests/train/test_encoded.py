"""Latents and text embeddings of captioned images on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import BadInput, load
from hasten.errors import HastenError
from hasten.train.data import Batches, Data, to_float
from hasten.train.encoded import encode_captioned, image_size
from hasten.train.row_store import RowStore

from ..adapters import tiny

WORDS = ("a cat", "a dog", "a red cat", "a cat", "the big dog", "a photo of the dog", "a cat", "blue")


def model_of(pipe: Any = None) -> Any:
    return load(tiny.sd_pipeline() if pipe is None else pipe)


def captioned(model: Any, captions: tuple[str, ...] = WORDS, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(captions), *image_size(model)), dtype=torch.uint8, generator=generator)
    return Data.of(images, captions=captions)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def refused(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(BadInput, match=match) as error:
        encode_captioned(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [tiny.sd_pipeline, tiny.sdxl_pipeline, tiny.sd3_pipeline])
def test_rows_are_what_the_pipeline_computes(make: Any, tmp_path: Path) -> None:
    """Every row equals the autoencoder's and the text encoder's own output, captions that repeat included."""
    model = model_of(make())
    data = captioned(model)
    encoded = encode_captioned(model, data, tmp_path / "cache", batch_size=3, dtype="fp32")
    rows = [7, 0, 3, 2]
    expected = model.conditioning.cond(4, [WORDS[row] for row in rows])
    found = encoded.conditions(rows)
    assert set(found) == {name for name in expected if not name.startswith("null_")}
    for name, value in found.items():
        assert torch.equal(value, expected[name])
    for name, value in encoded.null_conditions.items():
        assert torch.equal(value, expected[name][:1])
    assert {name for name in expected if name.startswith("null_")} == set(encoded.null_conditions)
    # each in a batch of one: convolutions of other batch sizes round differently
    alone = torch.cat([model.decoder.encode(to_float(data.images([row]))) for row in rows])
    assert torch.allclose(encoded.images(rows), alone, atol=1e-5)
    assert encoded.captions == WORDS and encoded.shape == model.shape
    batch = Batches(encoded, 4, seed=1)[0]
    order = Batches(encoded, 4, seed=1).indices(0).tolist()
    assert torch.equal(batch["text"], encoded.conditions(order)["text"])


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    model = model_of()
    data = captioned(model)
    encode_captioned(model, data, tmp_path / "whole", batch_size=2)
    monkeypatch.setattr("hasten.train.row_store.SAVE_SECONDS", -1.0)
    calls = {"encode": 0, "cond": 0}

    def interrupted(name: str, method: Any, last: int) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            if calls[name] > last:
                raise KeyboardInterrupt
            return method(*args)

        return call

    methods = {"encode": (type(model.decoder), "encode"), "cond": (type(model.conditioning), "cond")}
    for name, last in (("cond", 2), ("encode", 1), ("encode", 2)):
        calls[name] = 0
        with monkeypatch.context() as patch:
            patch.setattr(*methods[name], interrupted(name, getattr(*methods[name]), last))
            with pytest.raises(KeyboardInterrupt):
                encode_captioned(model, data, tmp_path / "killed", batch_size=2)
    assert contents(tmp_path / "killed") != contents(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(*methods["cond"], None)  # the text is finished: it is not computed again
        calls["encode"] = 0
        patch.setattr(*methods["encode"], interrupted("encode", getattr(*methods["encode"]), 1))  # the last batch
        encode_captioned(model, data, tmp_path / "killed", batch_size=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_complete_folder_is_opened_without_computing(tmp_path: Path, monkeypatch: Any) -> None:
    model = model_of()
    data = captioned(model)
    first = encode_captioned(model, data, tmp_path)
    monkeypatch.setattr(type(model.conditioning), "cond", None)
    monkeypatch.setattr(type(model.decoder), "encode", None)
    again = encode_captioned(model, data, tmp_path, batch_size=5)
    assert torch.equal(first.images(range(8)), again.images(range(8)))


def test_files_of_anything_else_are_refused(tmp_path: Path) -> None:
    model = model_of()
    data = captioned(model)
    encode_captioned(model, data, tmp_path)
    refused("another data", model, captioned(model, seed=1), tmp_path)
    refused("another data", model, replace(data, captions=("a dog", *WORDS[1:])), tmp_path)
    refused("another dtype", model, data, tmp_path, dtype="fp32")
    refused("another flip", model, data, tmp_path, flip=True)
    other = model_of(tiny.sd_pipeline(text_encoder=tiny.text_encoder(seed=9)))
    refused("another text encoder", other, data, tmp_path)
    other = model_of(tiny.sd_pipeline(vae=tiny.vae(scaling_factor=0.25)))
    refused("another autoencoder", other, data, tmp_path)
    model.conditioning.negative = "a dog"
    refused("another text encoder", model, data, tmp_path)
    (tmp_path / "encoded.json").write_text("{")
    refused("cannot read .*encoded.json", model, data, tmp_path)


def test_another_network_shares_the_files(tmp_path: Path, monkeypatch: Any) -> None:
    """They depend on the autoencoder and the text encoder alone."""
    model = model_of()
    encode_captioned(model, captioned(model), tmp_path)
    other = model_of(tiny.sd_pipeline(unet=tiny.unet2d_condition(block_out_channels=(8, 16))))
    monkeypatch.setattr(type(other.conditioning), "cond", None)
    encode_captioned(other, captioned(model), tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = model_of()
    encode_captioned(model, captioned(model), tmp_path)
    file = tmp_path / "latents.npy"
    file.write_bytes(file.read_bytes()[:-8])
    refused("latents.npy is damaged", model, captioned(model), tmp_path)
    file.unlink()
    refused("latents.npy is missing", model, captioned(model), tmp_path)


def test_mirrored_images_are_encoded_themselves(tmp_path: Path) -> None:
    model = model_of()
    data = captioned(model)
    encoded = encode_captioned(model, data, tmp_path, dtype="fp32", batch_size=8, flip=True)
    assert len(encoded) == 16 and encoded.captions == WORDS + WORDS
    assert torch.equal(encoded.images(range(8, 16)), model.decoder.encode(to_float(data.images(range(8))).flip(-1)))
    assert not torch.allclose(encoded.images([8]), encoded.images([0]).flip(-1), atol=1e-3)
    assert torch.equal(encoded.conditions([10])["text"], encoded.conditions([2])["text"])


def test_numbers_beyond_half_precision_are_an_error(tmp_path: Path) -> None:
    vae = tiny.vae(scaling_factor=1e6)
    model = model_of(tiny.sd_pipeline(vae=vae))
    refused("latents of image 0 reaches .* beyond fp16", model, captioned(model), tmp_path)
    encode_captioned(model, captioned(model), tmp_path / "fp32", dtype="fp32")
    with torch.no_grad():
        next(vae.parameters()).fill_(float("nan"))
    refused("latents of image 0 is not finite", model, captioned(model), tmp_path / "nan")
    store = RowStore(tmp_path / "none", {}, torch.float16)
    half = store.stored("text", torch.full((2, 100), 7e4 - 4.6e3), lambda row: "")
    assert half.dtype.name == "float16" and float(half.max()) < 65504


def test_what_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    model = model_of()
    refused("has no captions", model, replace(captioned(model), captions=None), tmp_path)
    refused(
        "image 3 is missing",
        model,
        replace(captioned(model), captions=None, caption_problem="image 3 is missing"),
        tmp_path,
    )
    small = Data.of(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), captions=("a", "b"))
    refused("is trained on images of 16 x 16", model, small, tmp_path)
    refused("unknown dtype", model, captioned(model), tmp_path, dtype="fp8")
    refused("takes no prompts", load(tiny.ddpm_pipeline()), small, tmp_path)
    damaged = replace(captioned(model), unreadable={3})
    refused("image 3 cannot be read", model, damaged, tmp_path)


def test_long_captions_are_counted_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of()
    encode_captioned(model, captioned(model, (*WORDS, "a cat " * 30, "a dog " * 30)), tmp_path)
    error = capsys.readouterr().err
    assert "2 captions of 8 are longer than 12 tokens" in error and "truncated" not in error


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    model = model_of()
    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(HastenError, match="cannot write in .*: No space left"):
        encode_captioned(model, captioned(model), tmp_path)


def test_an_autoencoder_in_half_precision_that_overflows_encodes_in_float32(tmp_path: Path) -> None:
    vae = tiny.vae().half()
    assert vae.config.force_upcast
    model = model_of(tiny.sd_pipeline(vae=vae))
    data = captioned(model)
    encoded = encode_captioned(model, data, tmp_path, dtype="fp32", batch_size=8)
    assert vae.dtype == torch.float16
    assert torch.equal(
        encoded.images(range(8)), 0.5 * vae.float().encode(to_float(data.images(range(8)))).latent_dist.mode()
    )
