"""Files written whole, leftovers of killed processes, cut lines, and the lock of a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hasten import files
from hasten.errors import BadInput
from hasten.utils.atomic import LEFTOVER


def child(code: str) -> int:
    """What `os.fork` of a snippet ends with: the exit status as `waitpid` gives it."""
    pid = os.fork()
    if not pid:
        try:
            exec(code, {"files": files, "os": os, "signal": signal})
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_file_is_the_old_or_the_new_one_whenever_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for place in ("os.fsync", "os.replace"):
        name = place.removeprefix("os.")
        code = f"os.{name} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\nfiles.write_atomic({str(path)!r}, b'new')"
        assert child(code) == signal.SIGKILL
        assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    files.write_atomic(path, "new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_leftovers_are_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    mine = [f".model.{os.getpid()}.tmp", "checkpoint.tmp", ".x.png.12345678abcdef00.tmp"]
    other = [".hidden.tmp", "notes.tmp", "a.png", ".gitignore"]
    for name in mine + other:
        (tmp_path / name).write_text("")
    (tmp_path / ".run.77.tmp").mkdir()
    (tmp_path / ".run.77.tmp" / "weights").write_text("")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".a.1.tmp").write_text("")
    with files.atomic_open(tmp_path / "live") as file:
        file.write(b"half")
        files.remove_leftovers(tmp_path)
        assert len([p for p in tmp_path.iterdir() if LEFTOVER.fullmatch(p.name)]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*other, "below", "live"])
    assert (tmp_path / "below" / ".a.1.tmp").exists()  # a folder that no run of ours makes


def test_cut_lines_are_left_out_and_do_not_swallow_the_next(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for tail in (b'{"step": 3, "sec', bytes(64), b"\xff\xfe", b"12", b"null\n", b""):
        log.write_bytes(b'{"step": 1}\n' + tail)
        assert files.read_json_lines(log) == [{"step": 1}]
        files.append_json_line(log, {"step": 4})
        assert files.read_json_lines(log) == [{"step": 1}, {"step": 4}]
    assert files.read_json_lines(tmp_path / "none") == []


# ---- locks ----


def test_the_second_process_is_refused_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with files.locked(out):
        with files.locked(out):  # the same thread may
            pass
        code = f"try:\n with files.locked({str(out)!r}): pass\nexcept files.BadInput: os._exit(7)"
        assert os.waitstatus_to_exitcode(child(code)) == 7
        (out / "kept").write_text("")
    assert [p.name for p in out.iterdir()] == ["kept"]
    killed = f"with files.locked({str(out)!r}): os.kill(os.getpid(), signal.SIGKILL)"
    assert child(killed) == signal.SIGKILL
    assert (out / files.LOCK).exists()
    with files.locked(out):
        pass
    assert [p.name for p in out.iterdir()] == ["kept"]


def test_the_refusal_is_one_line_that_names_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom hasten.files import locked\n"
        f"with locked({str(tmp_path)!r}):\n print('held', flush=True)\n time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        message = rf"another process \(number {process.pid}\) is writing to"
        with pytest.raises(BadInput, match=message) as error, files.locked(tmp_path):
            pass
        assert "\n" not in str(error.value)
    finally:
        process.kill()
        process.wait()
    with files.locked(tmp_path, wait=5):
        pass


def test_another_thread_is_refused(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def enter() -> None:
        try:
            with files.locked(tmp_path):
                pass
        except BadInput as e:
            refused.append(e)

    with files.locked(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_where_files_cannot_be_locked_the_lock_file_says_who_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "try_lock", lambda descriptor: None)
    with files.locked(tmp_path):
        code = (
            "files.try_lock = lambda descriptor: None\n"
            f"try:\n with files.locked({str(tmp_path)!r}): pass\nexcept files.BadInput: os._exit(7)"
        )
        assert os.waitstatus_to_exitcode(child(code)) == 7
    killed = f"with files.locked({str(tmp_path)!r}): os.kill(os.getpid(), signal.SIGKILL)"
    assert child(killed) == signal.SIGKILL
    with files.locked(tmp_path):
        pass


def test_a_full_disk_does_not_keep_a_folder_from_being_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with files.locked(tmp_path):
        assert (tmp_path / files.LOCK).read_bytes() == b""


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "a" / "b" / "c"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write in"), files.locked(tmp_path / "file"):
        pass


def test_the_decorator_locks_the_folder_of_its_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @files.holds_lock("out", only="wanted", unless="dry")
    def seen(out: Path | None, wanted: bool = True, dry: bool = False) -> bool:
        return out is not None and (out / files.LOCK).exists()

    out = tmp_path / "out"
    assert seen(out) and seen(out=out)
    assert not seen(out, False) and not seen(out, dry=True) and not seen(None)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert not seen(out)
    monkeypatch.setenv("RANK", "0")
    assert seen(out)


# ---- what a folder holds, and where it lies ----


def test_out_inside_the_data_is_refused_whatever_the_path_looks_like(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "class").mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    for out in (
        data,
        data / "run",
        data / "class" / "a" / "run",
        tmp_path / "link" / "run",
        data / "class" / ".." / "x",
    ):
        with pytest.raises(BadInput, match="lies inside the data folder"):
            files.refuse_inside(out, data)
    for out in (tmp_path, tmp_path / "data2", tmp_path / "run"):
        files.refuse_inside(out, data)
    files.refuse_inside(data / "run", None)
    files.refuse_inside(data / "run", data / "images.npy")


def test_the_first_difference_of_two_descriptions() -> None:
    known = {"seed": 0, "data": {"images": 4, "classes": ["a", "b"]}, "extra": 1}
    assert files.first_difference(known, {"seed": 0, "data": {"images": 4, "classes": ("a", "b")}}) is None
    assert files.first_difference(known, {"seed": 0, "data": {"images": 4, "classes": ["x"]}}) == (
        "data.classes",
        '["a", "b"]',
        '["x"]',
    )
    assert files.first_difference(known, {"lr": 0.1}) == ("lr", "null", "0.1")
    assert files.first_difference(known, {"lr": 0.1}, missing=False) is None
