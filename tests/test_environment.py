"""The launcher, the standard streams, the cache folder and the end of memory, as the process finds them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hasten.cli import main
from hasten.cli.app import error_line
from hasten.distributed.heartbeat import ProcessLost, peer_errors
from hasten.errors import BadInput, HastenError
from hasten.utils import environment

LAUNCHER = environment.LAUNCHER


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def shell(command: str, tmp_path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A command line with `$H` for hasten."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HASTEN_CACHE": str(tmp_path / "cache"), **more}
    env["H"] = f"{sys.executable} -m hasten"
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=120)


# ---- streams ----


@pytest.mark.parametrize(
    ("command", "code", "out"),
    [
        ("$H models >&-", 0, ""),
        ("$H show fashion >&- 2>&-", 0, ""),
        ("$H sample nope 2>&-", 1, ""),
        ("$H smaple nope 2>&- <&-", 2, ""),
        ("$H sample nope 2>/dev/full", 1, ""),
    ],
)
def test_closed_streams_are_no_error(tmp_path: Path, command: str, code: int, out: str) -> None:
    done = shell(command, tmp_path)
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr == ""


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """A library that prints to descriptor 2 must not print into the picture."""
    code = (
        "import os, sys\nfrom hasten.utils.environment import open_standard_streams\nopen_standard_streams()\n"
        f"file = open({str(tmp_path / 'x')!r}, 'wb')\nassert file.fileno() > 2, file.fileno()\n"
        "os.write(2, b'noise'); os.write(1, b'noise'); print('fine'); print('fine', file=sys.stderr)\n"
    )
    (tmp_path / "code.py").write_text(code)
    root = str(Path(environment.__file__).parent.parent)
    done = shell(f"{sys.executable} {tmp_path / 'code.py'} <&- >&- 2>&-", tmp_path, PYTHONPATH=root)
    assert done.returncode == 0 and (tmp_path / "x").read_bytes() == b""


def test_a_full_stdout_is_one_line(tmp_path: Path) -> None:
    done = shell("$H models >/dev/full", tmp_path)
    assert done.returncode == 1 and done.stderr == "hasten: No space left on device\n"


def test_names_beyond_the_encoding_of_stdout_are_escaped(tmp_path: Path) -> None:
    code = "import sys; from hasten.cli import main; main([]); print('\\u00d7 \\u4e00')"
    done = shell(f'{sys.executable} -c "{code}"', tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\xd7 \\u4e00" in done.stdout


def test_no_stream_is_no_terminal() -> None:
    assert not environment.is_terminal(None)
    closed = open(os.devnull)  # noqa: SIM115
    closed.close()
    assert not environment.is_terminal(closed)


# ---- the cache ----


def test_the_cache_is_where_the_user_said_or_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    own = tmp_path / "tmp" / f"hasten-{os.getuid()}"
    home = tmp_path / "home"
    for variables, expected in (
        ({"HASTEN_CACHE": "/a/b", "HOME": str(home)}, Path("/a/b")),
        ({"HASTEN_CACHE": "~/c", "HOME": str(home)}, home / "c"),
        ({"HASTEN_CACHE": "", "HOME": str(home)}, home / ".cache" / "hasten"),
        ({"HASTEN_CACHE": " ", "XDG_CACHE_HOME": "/x", "HOME": str(home)}, Path("/x/hasten")),
        ({"XDG_CACHE_HOME": "", "HOME": str(home)}, home / ".cache" / "hasten"),
        ({"XDG_CACHE_HOME": "relative", "HOME": str(home)}, home / ".cache" / "hasten"),
        ({"HOME": "/"}, own),
        ({"HOME": ""}, own),
    ):
        for name in ("HASTEN_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert environment.cache_folder() == expected, variables
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda text: text)  # a user without an entry (docker --user)
    assert environment.cache_folder() == own


# ---- memory ----


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.2 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_the_end_of_memory_is_one_line_that_helps(error: Exception) -> None:
    assert "out of memory; a smaller --batch-size needs less" in error_line(error)
    with pytest.raises(type(error)), peer_errors():  # not the loss of another process
        raise error


def test_other_errors_are_not_the_end_of_memory() -> None:
    for error in (
        RuntimeError("shapes differ"),
        ValueError("out of memory"),
        HastenError("x"),
        OSError(28, "No space"),
    ):
        assert "out of memory" not in error_line(error) or isinstance(error, ValueError)
        assert not environment.is_out_of_memory(error)
    with pytest.raises(ProcessLost), peer_errors():
        raise RuntimeError("Connection closed by peer")


# ---- the launcher ----


def test_variables_of_a_cluster_without_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert environment.launched() == 1 and environment.without_launcher() is None
    assert main(["models"]) == 0  # it works and speaks, whatever its number
    assert "fashion" in capsys.readouterr().out
    assert main(["--help"]) == 0 and "sample" in capsys.readouterr().out
    assert main(["smaple"]) == 2 and "Did you mean" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert environment.launched() == 1
    assert main(["models"]) == 0
    out, err = capsys.readouterr()
    assert "fashion" in out
    assert err == (
        "hasten: WORLD_SIZE is 8, but MASTER_ADDR and MASTER_PORT not set: running as one process "
        "(torchrun starts several)\n"
    )
    assert main(["sample", "nope"]) == 1 and "unknown model 'nope'" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert environment.launched() == 8
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(BadInput, match=r"\$WORLD_SIZE must be a whole number, found 'x'"):
        environment.launched()
