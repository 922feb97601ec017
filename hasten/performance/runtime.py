"""Settings for running a network fast on this device, selected by measurement."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choice
from ..utils.devices import synchronize

__all__ = ["Runtime", "probe"]

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("highest", "high", "medium")
MIN_GAIN = 1.1  # a smaller gain is noise, or not worth the accuracy
MIN_GAIN_LAYOUT = 1.25  # channels_last is slower at other sizes (2x on some CPUs), so its gain must be clear


@dataclass(frozen=True)
class Runtime:
    """Settings for running a denoiser, and their measured error and speed.

    Args:
        dtype: "float32", or "bfloat16" for autocast (weights stay as they are).
        matmul: float32 matrix products, "highest", "high" or "medium" (`torch.set_float32_matmul_precision`).
        channels_last: the memory format.
        threads: of the CPU; 0: unchanged.
        device: type of the device: "cpu", "cuda", "mps", "xpu".
        error: relative root-mean-square error of the output, relative to plain float32.
        speedup: over plain float32.
        seconds: of one call with the probed batch.
        measured: seconds of each setting that was measured.

    Raises:
        BadInput: for an unknown dtype or precision, and a negative number of threads.
    """

    dtype: str = "float32"
    matmul: str = "highest"
    channels_last: bool = False
    threads: int = 0
    device: str = "cpu"
    error: float | None = None
    speedup: float | None = None
    seconds: float | None = None
    measured: dict[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("matmul precision", self.matmul, PRECISIONS)
        if self.threads < 0:
            raise BadInput(f"{self.threads} threads cannot be used: give 1 or more, or 0 for the current number")

    @contextlib.contextmanager
    def apply(self) -> Iterator[Runtime]:
        """A context manager that sets autocast, matmul precision and threads, and restores them afterwards."""
        precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")
        try:
            if self.matmul != precision:
                torch.set_float32_matmul_precision(self.matmul)
            if self.threads:
                torch.set_num_threads(self.threads)
            with autocast:
                yield self
        finally:
            if self.matmul != precision:
                torch.set_float32_matmul_precision(precision)
            if self.threads:
                torch.set_num_threads(threads)

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module itself, with its weights in the memory format."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        to: Callable[..., nn.Module] = module.to  # torch's annotations lack memory_format
        return to(memory_format=layout) if _has_images(module) else module

    def override(self, **settings: Any) -> Runtime:
        """The runtime with some settings changed, where they are not None; then without its measurements."""
        changed = {k: v for k, v in settings.items() if v is not None and v != getattr(self, k)}
        if not changed:
            return self
        return dataclasses.replace(self, error=None, speedup=None, seconds=None, **changed)

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "channels_first"
        threads = self.threads or torch.get_num_threads()
        plain = f"{self.dtype}{' autocast' if self.dtype == 'bfloat16' else ''}, matmul {self.matmul}, {layout}"
        where = f"{self.device}, {threads} thread{'s' if threads > 1 else ''}" if self.device == "cpu" else self.device
        if self.speedup is None:
            return f"{plain}, {where}"
        return f"{plain}, {where}: {self.speedup:.2f}x plain float32, relative error {self.error:.1e}"


def probe(
    denoiser: nn.Module, x: Tensor, t: float | Tensor = 0.5, budget: float = 3.0, tolerance: float = 0.03, **cond: Any
) -> Runtime:
    """The fastest settings for `denoiser(x, t, **cond)` on this device with an error within `tolerance`.

    Measured in turns within about `budget` seconds: plain float32; bfloat16 autocast; with the faster of the two,
    matmul "medium"; then channels_last. A setting is selected only for a gain of 10 % (channels_last: 25 %) in both the
    minimum and the median time, at a relative error `||y - y32|| / ||y32||` of at most `tolerance`. A network whose one
    call takes more than an eighth of the budget is measured by single calls, and the probe ends when the budget is
    spent. The call must be repeatable (an accelerator with a cache is applied after the probe).

    Args:
        denoiser: the network to run.
        x: (B, *S), a batch of the size that will be used, on which the result depends (bfloat16 autocast gains from
            about 16 images on a CPU, and loses with one).
        t: () or (B,), in [0, 1].
        budget: seconds, above 0.
        tolerance: of the relative error, 0 or more.
        cond: conditions of the denoiser.

    Raises:
        BadInput: for a budget or a tolerance outside these ranges.
    """
    if budget <= 0 or not tolerance >= 0:
        raise BadInput(f"a probe needs a positive budget and tolerance, found {budget} s and {tolerance}")
    device = x.device.type
    threads = torch.get_num_threads() if device == "cpu" else 0
    plain = Runtime(device=device, threads=threads)
    end = time.perf_counter() + budget

    def run(runtime: Runtime) -> Tensor:
        with torch.inference_mode(), runtime.apply():
            y = denoiser(x.contiguous(memory_format=torch.channels_last) if runtime.channels_last else x, t, **cond)
        synchronize(x.device)
        return y.float()

    def timed(runtime: Runtime) -> tuple[float, Tensor]:
        runtime.prepare(denoiser)
        start = time.perf_counter()
        y = run(runtime)
        return time.perf_counter() - start, y

    first, expected = timed(plain)
    if budget / 8 < first < budget / 2:  # perhaps only because it was the first call of the process
        first, expected = timed(plain)
    slow = first > budget / 8
    measured: dict[str, float] = {}

    def faster(best: Runtime, rival: Runtime, fraction: float, min_gain: float) -> Runtime:
        """`rival` if it is faster by `min_gain` and accurate; both timed in turns within a fraction of the budget."""
        seconds, y = timed(rival)  # also its warm-up
        error = float((y - expected).norm() / expected.norm().clamp(min=1e-30))
        times: dict[Runtime, list[float]] = {best: [], rival: []}
        if slow:
            times = {best: [best.seconds or first], rival: [seconds]}
        stop = min(time.perf_counter() + fraction * budget, end)
        while len(times[rival]) < (1 if slow else 2) or (time.perf_counter() < stop and len(times[rival]) < 50):
            for runtime, values in times.items():
                values.append(timed(runtime)[0])
        old, new = min(times[best]), min(times[rival])
        measured.setdefault(_setting_label(best), old)
        measured[_setting_label(rival)] = new
        gain = min(old / new, statistics.median(times[best]) / statistics.median(times[rival]))
        if not (error <= tolerance and gain >= min_gain):  # NaN fails as well
            return best
        speedup = (best.speedup or 1.0) * old / new
        return dataclasses.replace(rival, error=error, speedup=speedup, seconds=new)

    best = faster(plain, dataclasses.replace(plain, dtype="bfloat16"), 0.35, MIN_GAIN)
    if time.perf_counter() < end:
        best = faster(best, dataclasses.replace(best, matmul="medium"), 0.2, MIN_GAIN)
    if time.perf_counter() < end and x.ndim == 4 and _has_images(denoiser):
        best = faster(best, dataclasses.replace(best, channels_last=True), 0.2, MIN_GAIN_LAYOUT)
    best.prepare(denoiser)
    if best.speedup is None:
        best = dataclasses.replace(best, error=0.0, speedup=1.0, seconds=measured[_setting_label(plain)])
    return dataclasses.replace(best, measured=measured)


def _setting_label(runtime: Runtime) -> str:
    """The key of a setting in `Runtime.measured`."""
    return f"{runtime.dtype}, {runtime.matmul}{', channels_last' if runtime.channels_last else ''}"


def _has_images(module: nn.Module) -> bool:
    """Whether a module has 4-D weights, which have a memory format, and no 5-D ones, which do not accept it."""
    dims = {p.ndim for p in module.parameters()}
    return 4 in dims and 5 not in dims
