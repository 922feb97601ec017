"""Estimates of the quality of speech that need no reference: DNSMOS and DistillMOS."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..audio.files import resample
from ..errors import BadInput
from .speech_recognition import package_folder

__all__ = ["DNSMOS", "DistillMOS"]

RATE = 16000
WINDOW = 144_160  # samples of 9.01 s, which the network was trained on
# From the network's outputs to mean opinion scores: coefficients of 1, x, x^2.
SCORES = {
    "signal": (0.0052439, 1.22083953, -0.08397278),
    "background": (-0.39604546, 1.60915514, -0.13166888),
    "overall": (0.04602535, 1.11546468, -0.06766283),
}


class DNSMOS:
    """DNSMOS P.835: estimated opinions of signal, background and the whole, 1 to 5.

    Args:
        file: `sig_bak_ovr.onnx`. Default: that of the package `speechmos`.
        threads: of the CPU; 0 for as many as onnxruntime takes.

    Raises:
        BadInput: without onnxruntime or the package.

    References:
        Reddy, Gopal, Cutler 2022, arXiv:2110.01763.
    """

    def __init__(self, file: str | Path | None = None, threads: int = 0) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise BadInput("DNSMOS needs onnxruntime: pip install onnxruntime speechmos")
        if file is None:
            file = package_folder("speechmos", "DNSMOS", "speechmos") / "dnsmos_models" / "sig_bak_ovr.onnx"
        if not Path(file).is_file():
            raise BadInput(f"there is no {file}, the network of DNSMOS: pip install speechmos==0.0.1.1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def __call__(self, audio: Tensor, sample_rate: int = RATE) -> dict[str, float]:
        """`signal`, `background` and `overall` of audio (n,), which is repeated to 9 s; means over windows a second
        apart.

        Raises:
            BadInput: for audio without samples.
        """
        x = resample(check_audio(audio), sample_rate, RATE)
        x = x.repeat(-(-WINDOW // len(x)))
        windows = x.unfold(0, WINDOW, RATE)
        name = self.session.get_inputs()[0].name
        (raw,) = self.session.run(None, {name: windows.numpy()})
        raw = torch.as_tensor(raw).double()
        return {
            what: float((a + b * raw[:, k] + c * raw[:, k].square()).mean())
            for k, (what, (a, b, c)) in enumerate(SCORES.items())
        }


class DistillMOS:
    """DistillMOS: an estimated opinion of the whole, 1 to 5. The package `distillmos` with `xls-r-sqa` has the network.

    Raises:
        BadInput: without these packages.

    References:
        Stahl, Gamper 2025, arXiv:2502.05356.
    """

    def __init__(self) -> None:
        package_folder("distillmos", "DistillMOS", "--no-deps distillmos xls-r-sqa")
        with without_torchaudio(), contextlib.redirect_stdout(io.StringIO()):  # it says what it loads
            self.net: Any = importlib.import_module("distillmos").ConvTransformerSQAModel().eval()

    @torch.no_grad()
    def __call__(self, audio: Tensor, sample_rate: int = RATE) -> float:
        """The score of audio (n,)."""
        return float(self.net(resample(check_audio(audio), sample_rate, RATE)[None]).flatten()[0])


@contextlib.contextmanager
def without_torchaudio() -> Iterator[None]:
    """An empty module in place of torchaudio, which the package only reads files with, where it is not installed."""
    names = [name for name in ("torchaudio",) if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def check_audio(audio: Tensor) -> Tensor:
    """Audio (n,) as float32 on the CPU. Raises BadInput where it is empty or of another shape."""
    if audio.ndim != 1 or not len(audio):
        raise BadInput(f"audio must be (n,) with at least one sample, got {tuple(audio.shape)}")
    return audio.detach().float().cpu()
