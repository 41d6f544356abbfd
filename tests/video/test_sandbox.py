"""What a decode worker cannot do any more, tried in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, json, os, socket, subprocess, sys, threading
from nvila.video import sandbox
sandbox.die_with_parent(os.getppid())
sandbox.limit_resources(256 * 1024**2)
assert sandbox.deny_system_calls()
out = {}
def attempt(name, action):
    try:
        action()
        out[name] = "done"
    except BaseException as error:
        out[name] = type(error).__name__
attempt("socket", lambda: socket.socket())
attempt("fork", os.fork)
attempt("run", lambda: subprocess.run(["true"]))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("write", lambda: open(sys.argv[1] + "/new", "w"))
attempt("append", lambda: open(sys.argv[1] + "/old", "a"))
attempt("unlink", lambda: os.unlink(sys.argv[1] + "/old"))
attempt("rename", lambda: os.rename(sys.argv[1] + "/old", sys.argv[1] + "/new"))
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("memory", lambda: bytearray(512 * 1024**2))
attempt("read", lambda: open(sys.argv[1] + "/old").read())
attempt("little memory", lambda: bytearray(64 * 1024**2))
inside = []
def in_thread():
    try:
        socket.socket()
    except PermissionError:
        inside.append("refused")
thread = threading.Thread(target=in_thread); thread.start(); thread.join()
out["socket in a thread"] = inside
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("sandbox")
    Path(folder, "old").write_text("x")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=True)
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("what", ["socket", "fork", "run", "exec", "write", "append", "unlink", "rename", "kill"])
def test_a_shut_in_process_cannot(what: str, attempts: dict[str, object]) -> None:
    assert attempts[what] == "PermissionError"


def test_memory_beyond_the_limit_is_refused_and_within_it_is_not(attempts: dict[str, object]) -> None:
    assert (attempts["memory"], attempts["little memory"]) == ("MemoryError", "done")


def test_reading_files_and_starting_threads_still_work_and_threads_are_shut_in_too(attempts: dict[str, object]) -> None:
    assert (attempts["read"], attempts["socket in a thread"]) == ("done", ["refused"])
