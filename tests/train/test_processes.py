"""Training in processes of their own: stopped by a signal, and several at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hasten.train.checkpoint import read_log

SCRIPT = """
import sys, torch
from torch import nn
from hasten.train.data import Batches, Data
from hasten.train.fit import Fit, TrainedModule
out, mode = sys.argv[1], sys.argv[2]
torch.manual_seed(1)
module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 16))
g = torch.Generator().manual_seed(0)
data = Data.of(torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=g))
trained = TrainedModule("net", module, lambda b: (module(b["x"]) - b["x"].flatten(1)).square().mean())
other = nn.Linear(16, 1)
if mode == "ranks":
    # Each process starts from other weights, which must be synchronised.
    import os
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    nn.init.normal_(other.weight)
modules = [trained, TrainedModule("other", other, lambda b: other(b["x"].flatten(1)).square().mean())]
fit = Fit(steps=10**9 if mode == "endless" else 12, warmup=4, log_steps=5, tensorboard=False)
try:
    emas = fit(modules, Batches(data, 8), out)
except KeyboardInterrupt as stop:
    print(stop)
    sys.exit(130)
rank = os.environ.get("RANK", 0) if mode == "ranks" else 0
torch.save({n: m.state_dict() for n, m in emas.items()}, f"{out}/ema{rank}.pt")
"""


def start(out: Path, mode: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", SCRIPT, str(out), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.slow
def test_a_terminated_process_prints_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "endless")
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "log.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert out.count("\n") == 1 and f"stopped after {saved['step']} steps" in out and "checkpoint.pt is written" in out
    assert saved["step"] >= 5
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == saved["step"]


@pytest.mark.slow
def test_two_processes_match_one_at_the_same_global_batch(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if sys.platform == "linux":
        common["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the name of this machine resolves to
    processes = [start(tmp_path / "two", "ranks", RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    processes.append(start(tmp_path / "one", "ranks"))
    try:
        for process in processes:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()
    one = torch.load(tmp_path / "one/ema0.pt")
    for rank in range(2):
        two = torch.load(tmp_path / f"two/ema{rank}.pt")
        for name in ("net", "other"):
            for key, value in one[name].items():
                assert torch.allclose(two[name][key], value, rtol=1e-5, atol=1e-6), (rank, name, key)
    logs = [read_log(tmp_path / d / "log.jsonl") for d in ("one", "two")]
    assert [line["step"] for line in logs[1]] == [5, 10, 12]
    for a, b in zip(*logs, strict=True):
        assert a["net"] == pytest.approx(b["net"], rel=1e-5)  # the mean over both, not the first one's own
