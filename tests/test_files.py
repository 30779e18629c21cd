"""Outputs are whole or as they were, and one process at a time writes them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stemma.errors import OutputError
from stemma.files import locked, remove, replacing, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_succeeds_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "ä\n")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text(encoding="utf-8") == "ä\n"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "new"
    assert names(path.parent) == ["b.txt"]


def test_json_is_replaced_in_one_move(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("first", "second"):
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / content).touch()
    assert names(folder) == ["second"]
    with replacing(folder, overwrite=False) as temporary:  # somebody else was faster
        temporary.mkdir()
        (temporary / "third").touch()
    assert names(folder) == ["second"]
    with pytest.raises(ZeroDivisionError), replacing(folder) as temporary:
        fill_in_part(temporary)
    assert names(folder) == ["second"]
    assert names(tmp_path) == ["model"]
    remove(folder)
    assert names(tmp_path) == []


def fill_in_part(folder: Path) -> None:
    (folder / "inner").mkdir(parents=True)
    raise ZeroDivisionError


def run(code: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True, **options)


def killed(code: str) -> None:
    process = run(f"{code}\n    print(1, flush=True)\n    import time; time.sleep(60)")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed(f"""from stemma.files import *
with replacing({str(tmp_path / "model")!r}) as temporary:
    temporary.mkdir()""")
    running = tmp_path / f".model.{socket.gethostname()}.{os.getppid()}.tmp"
    elsewhere = tmp_path / ".model.another-host.1.tmp"
    for other in (running, elsewhere):
        other.touch()
    assert len(names(tmp_path)) == 3
    write_text(tmp_path / "model", "")
    assert names(tmp_path) == sorted([running.name, elsewhere.name, "model"])


def test_a_folder_is_never_there_in_part_while_it_is_removed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append((tmp_path / "old").exists()))
    seen: list[bool] = []
    remove(tmp_path / "old")
    assert seen == [False]


def test_a_second_owner_is_refused_by_name(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    me = rf"process {os.getpid()} on .* is writing .*out\.jsonl"
    with locked(output):
        with pytest.raises(OutputError, match=me), locked(output):
            raise AssertionError("two owners")
        process = run(f"from stemma.files import *\nwith locked({str(output)!r}): pass", stderr=subprocess.PIPE)
        assert re.search(me, process.communicate()[1])
        assert process.returncode == 1
        output.touch()
    assert names(output.parent) == ["out.jsonl"]
    with locked(output):
        pass


def test_the_lock_of_a_folder_is_inside(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OutputError, match="is writing"), locked(tmp_path):
        assert names(tmp_path) == [".lock"]
    assert names(tmp_path) == []


def test_the_lock_of_a_killed_process_is_taken_over_with_a_note(tmp_path: Path, capsys) -> None:
    killed(f"from stemma.files import *\nwith locked({str(tmp_path)!r}):")
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert "which is gone" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_the_lock_of_another_machine_says_what_to_remove(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("process 7 on elsewhere")
    with pytest.raises(OutputError, match=r"process 7 on elsewhere .* remove .*\.lock"), locked(tmp_path):
        raise AssertionError
    assert lock.read_text() == "process 7 on elsewhere"


def test_a_lock_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for folder in ("loop", "file"):
        with (
            pytest.raises(OutputError, match=r"cannot write .*; choose another output"),
            locked(tmp_path / folder / "l"),
        ):
            raise AssertionError


def test_without_the_locks_of_unix_outputs_are_still_replaced(tmp_path: Path) -> None:
    (tmp_path / f".a.json.{socket.gethostname()}.{2**22 + 1}.tmp").touch()
    process = run(
        f"""import os, sys
sys.platform, sys.modules["fcntl"], os.kill = "win32", None, None
from stemma.files import *
with locked({str(tmp_path)!r}), locked({str(tmp_path)!r}):
    write_json({str(tmp_path / "a.json")!r}, [1])"""
    )
    assert process.wait() == 0
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert len(names(tmp_path)) == 2
