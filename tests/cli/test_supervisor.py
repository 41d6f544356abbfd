"""The supervisor with small real processes for parts: nothing is faked but what the parts do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvila.cli import lifecycle, processes
from nvila.cli.processes import Identity
from nvila.cli.state import PartPhase, Phase, StackFolder, StackState

# A supervisor of two parts. `steady` starts a daemon that leaves its process group, and touches files as it lives;
# `other` runs what its argument says. Readiness is a file in the part's run folder.
PROGRAM = """
import sys, time
from pathlib import Path
from nvila.cli.stack import Command, Part
from nvila.cli.state import StackFolder, StackState
from nvila.cli.processes import Identity
from nvila.cli.supervisor import Supervisor, take_lock
import os

folder, other = StackFolder(Path(sys.argv[1])), sys.argv[2]
lock = take_lock(folder)
if lock is None:
    sys.exit(3)
STEADY = '''
import pathlib, signal, subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path("daemon").write_text(str(daemon.pid))
pathlib.Path("/dev/shm/" + sys.argv[1] + "-region").write_bytes(b"frames")
def drain(*_):
    pathlib.Path(sys.argv[2]).write_text("drained")
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
pathlib.Path("ready").touch()
print("up and running", flush=True)
time.sleep(600)
'''
prefix = "nvtest-" + folder.name
def part(name, code, *arguments, **more):
    return Part(
        name=name, port=1, command=lambda: Command([sys.executable, "-c", code, *arguments], {}),
        is_ready=lambda: (folder.run(name) / "ready").exists(), drain_s=5, **more,
    )
parts = [part("steady", STEADY, prefix, str(folder.path / "drained"), shared_memory=(prefix,)), part("other", other)]
state = StackState(
    name=folder.name, stack_id=folder.name, supervisor=Identity.of(os.getpid()), shared_memory=(prefix,)
)
sys.exit(Supervisor(
    folder=folder, state=state, parts=parts, stop_order=[["other"], ["steady"]], start_timeout_s=20,
    lifeline=sys.stdin.buffer,
).run())
"""
READY = "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(600)"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StackFolder]:
    """A new stack's folder; whatever a failed test left is killed."""
    made = StackFolder(tmp_path / f"s{os.getpid()}-{time.monotonic_ns()}")
    made.make()
    yield made
    processes.kill_all(lambda: processes.marked(made.name))


def supervise(folder: StackFolder, other: str = READY) -> subprocess.Popen[bytes]:
    with open(folder.log("supervisor"), "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder.path), other],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def close(supervisor: subprocess.Popen[bytes]) -> int:
    assert supervisor.stdin is not None
    supervisor.stdin.close()
    return supervisor.wait(60)


def await_state(folder: StackFolder, is_so: Callable[[StackState], bool]) -> StackState:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        state = folder.read()
        if state is not None and is_so(state):
            return state
        time.sleep(0.02)
    raise AssertionError(f"it did not come to that in 60 s: {folder.read()}")


def is_ready(state: StackState) -> bool:
    return state.phase is Phase.READY


def everything_is_gone(folder: StackFolder) -> bool:
    left_in_memory = [entry for entry in os.listdir("/dev/shm") if entry.startswith(f"nvtest-{folder.name}")]
    return not processes.marked(folder.name) and not left_in_memory


def test_when_told_to_stop_it_drains_the_parts_and_leaves_nothing(folder: StackFolder) -> None:
    supervisor = supervise(folder)
    await_state(folder, is_ready)
    assert len(processes.marked(folder.name)) == 3, "two parts and a daemon"

    supervisor.terminate()

    assert close(supervisor) == 0
    assert (folder.path / "drained").exists(), "SIGTERM came first"
    assert everything_is_gone(folder)
    state = folder.read()
    assert state is not None
    assert state.phase is Phase.STOPPED


def test_when_the_foreground_process_is_gone_it_stops_everything(folder: StackFolder) -> None:
    supervisor = supervise(folder)
    await_state(folder, is_ready)

    assert close(supervisor) == 0

    assert everything_is_gone(folder)


def test_once_detached_it_outlives_the_foreground_process(folder: StackFolder) -> None:
    supervisor = supervise(folder)
    await_state(folder, is_ready)

    assert supervisor.stdin is not None
    supervisor.stdin.write(b"detach\n")
    supervisor.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        supervisor.wait(1)

    assert lifecycle.stop(folder)
    assert supervisor.wait(60) == 0
    assert everything_is_gone(folder)


def test_a_part_that_is_killed_is_started_again_without_what_it_left(folder: StackFolder) -> None:
    supervisor = supervise(folder)
    before = await_state(folder, is_ready).parts["steady"]
    daemon = int((folder.run("steady") / "daemon").read_text())
    assert before.process is not None

    os.kill(before.process.pid, signal.SIGKILL)

    after = await_state(folder, lambda state: state.parts["steady"].restarts == 1 and is_all_ready(state))
    assert after.parts["steady"].process != before.process
    assert not Path(f"/proc/{daemon}").exists(), "the dead part's daemon must not linger"
    assert after.parts["other"].restarts == 0
    close(supervisor)


def is_all_ready(state: StackState) -> bool:
    return all(part.phase is PartPhase.READY for part in state.parts.values())


def test_a_part_that_dies_at_the_start_ends_the_start_with_its_reason(folder: StackFolder) -> None:
    supervisor = supervise(folder, "import sys; print('no such model', flush=True); sys.exit(4)")

    assert supervisor.wait(60) == 1
    close(supervisor)

    state = folder.read()
    assert state is not None
    assert state.phase is Phase.FAILED
    assert state.parts["other"].phase is PartPhase.FAILED
    assert state.parts["other"].reason == "it ended with status 4"
    assert lifecycle.log_tail(folder, "other") == ("no such model",)
    assert everything_is_gone(folder)


def test_parts_die_with_a_killed_supervisor_and_the_rest_is_found_later(folder: StackFolder) -> None:
    supervisor = supervise(folder)
    state = await_state(folder, is_ready)
    children = [part.process for part in state.parts.values() if part.process is not None]

    supervisor.kill()
    close(supervisor)

    assert all(processes.wait_until_gone(child, 30) for child in children)
    assert lifecycle.clear_leftovers(folder), "the daemon and the shared memory were left"
    assert everything_is_gone(folder)
    assert folder.read() is None


def test_a_second_supervisor_leaves_a_running_stack_alone(folder: StackFolder) -> None:
    first = supervise(folder)
    await_state(folder, is_ready)

    second = supervise(folder)

    assert second.wait(60) == 3
    close(second)
    assert first.poll() is None
    close(first)


def test_a_part_that_ignores_sigterm_is_killed_after_its_time(folder: StackFolder) -> None:
    supervisor = supervise(
        folder,
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY.replace("import ", "import ", 1),
    )
    await_state(folder, is_ready)

    began = time.monotonic()
    assert close(supervisor) == 0

    assert 4 < time.monotonic() - began < 30
    assert everything_is_gone(folder)


def test_a_process_number_used_again_is_not_the_process() -> None:
    me = Identity.of(os.getpid())
    assert me is not None

    assert me.is_alive()
    assert not Identity(me.pid, "00000000:1").is_alive()


def test_stopping_a_stack_that_does_not_run_does_nothing(folder: StackFolder) -> None:
    assert not lifecycle.stop(folder)
