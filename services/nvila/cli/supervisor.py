"""The one process that owns a stack's parts: starts them, restarts those that die, and leaves nothing behind.

`nvila up` starts it (`python -m nvila.cli.supervisor FOLDER`) and holds the other end of its standard input, the
lifeline: when that closes without the word `detach`, the foreground process is gone, however it went, and the stack is
stopped. Every descendant comes back to the supervisor when its own parent dies (it is a subreaper), so it finds them
all; direct children die with it even when it is killed itself. What it knows it writes to `state.json`.

One thread and no event loop, on purpose: a child's death signal is tied to the thread that forked it, and forking is
only safe without other threads. It knows nothing about what the parts do; `stack.py` says how each is started and when
it is ready.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from nvila.cli import processes, stack
from nvila.cli.stack import Part
from nvila.cli.state import PartPhase, PartState, Phase, StackFolder, StackState
from nvila.telemetry.logs import configure as configure_logs
from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)

TICK_S = 0.1
ASK_EVERY_S = 0.3
LOOK_AROUND_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
"""Pause before a part that died is started again; it doubles while the part keeps dying."""
STEADY_S = 60.0
"""A part that ran this long is taken to be well again: its next pause is the first."""
LONGEST_LOG_BYTES = 64 << 20


@dataclass
class _Running:
    """One part and where it stands. Times are on the monotonic clock."""

    part: Part
    state: PartState
    began: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    start_at: float = 0.0
    ask_at: float = 0.0
    child: subprocess.Popen[bytes] | None = None

    def move(self, phase: PartPhase, reason: str = "") -> None:
        self.state.phase, self.state.reason, self.state.since_s = phase, reason, time.time()


@dataclass
class Supervisor:
    """`stop_order`: groups of part names; a group is told to stop when the one before it is gone."""

    folder: StackFolder
    state: StackState
    parts: Sequence[Part]
    stop_order: Sequence[Sequence[str]]
    start_timeout_s: float
    lifeline: IO[bytes] | None = None
    _running: dict[str, _Running] = field(default_factory=dict)
    _signals: list[int] = field(default_factory=list)
    _written: str = ""

    def run(self) -> int:
        """Until told to stop (0), or until the stack could not be started (1)."""
        processes.become_subreaper()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda got, _: self._signals.append(got))
        self._running = {part.name: _Running(part, PartState(port=part.port)) for part in self.parts}
        self.state.parts = {name: running.state for name, running in self._running.items()}
        for running in self._running.values():
            self._start(running)
        try:
            self._keep()
        finally:
            self._stop()
        return 1 if self.state.phase is Phase.FAILED else 0

    # -- while it runs

    def _keep(self) -> None:
        began = time.monotonic()
        looked = began
        while not self._should_stop():
            gone = processes.reap()
            for running in self._running.values():
                self._look_after(running, gone)
            if self.state.phase is Phase.STARTING:
                self._check_start(time.monotonic() - began)
            if self.state.phase is Phase.FAILED:
                return
            if time.monotonic() - looked > LOOK_AROUND_S:
                looked = time.monotonic()
                self._shorten_logs()
                self._note_shared_memory()
            self._write()

    def _should_stop(self) -> bool:
        """Wait one tick; True when a signal came or the foreground process is gone."""
        try:
            readable = select.select([self.lifeline] if self.lifeline else [], [], [], TICK_S)[0]
        except InterruptedError:
            readable = []
        if readable and self.lifeline is not None:
            word = os.read(self.lifeline.fileno(), 64)
            self.lifeline = None
            if b"detach" not in word:
                _log.info("the foreground process is gone, stopping")
                return True
        return bool(self._signals)

    def _look_after(self, running: _Running, gone: dict[int, int]) -> None:
        state = running.state
        if running.child is not None and running.child.pid in gone:
            running.child.returncode = gone[running.child.pid]  # reaped here, so that Popen need not
            self._mourn(running, running.child.returncode)
        elif state.phase is PartPhase.RESTARTING and running.child is None:
            if time.monotonic() >= running.start_at:
                self._start(running)
        elif state.phase in (PartPhase.STARTING, PartPhase.RESTARTING) and self._is_ready(running):
            took_s = time.monotonic() - running.began
            state.took_s = took_s if state.took_s is None else state.took_s
            running.move(PartPhase.READY)
            self._note_shared_memory()
            _log.info("part is ready", extra=fields(part=running.part.name, seconds=round(took_s, 1)))

    def _is_ready(self, running: _Running) -> bool:
        """Asked a few times a second: a part that is starting has better things to do than to say that it is not."""
        now = time.monotonic()
        if now < running.ask_at:
            return False
        running.ask_at = now + ASK_EVERY_S
        return running.part.is_ready()

    def _start(self, running: _Running) -> None:
        part, state = running.part, running.state
        running.began = time.monotonic()
        try:
            shutil.rmtree(self.folder.run(part.name), ignore_errors=True)
            self.folder.run(part.name).mkdir(parents=True, mode=0o700)
            command = part.command()
            with open(self.folder.log(part.name), "ab") as log:
                running.child = subprocess.Popen(
                    list(command.argv),
                    env={**os.environ, **command.environment, processes.MARK: f"{self.state.stack_id}/{part.name}"},
                    cwd=self.folder.run(part.name),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=processes.die_with_parent(os.getpid()),
                )
        except OSError as error:
            running.move(PartPhase.FAILED, f"could not be started: {error}")
            return
        state.process = processes.Identity.of(running.child.pid)
        if state.phase is not PartPhase.RESTARTING:
            running.move(PartPhase.STARTING)
        _log.info("part started", extra=fields(part=part.name, pid=running.child.pid))

    def _mourn(self, running: _Running, status: int) -> None:
        """A part died: clear away what it left, then fail (while the stack starts) or plan its next start."""
        part, state = running.part, running.state
        lived_s = time.monotonic() - running.began
        self._clear_after(part)
        running.child, state.process = None, None
        if self.state.phase is Phase.STARTING:
            running.move(PartPhase.FAILED, _ending(status))
            return
        running.pause_s = FIRST_PAUSE_S if lived_s > STEADY_S else min(running.pause_s, LONGEST_PAUSE_S)
        running.start_at = time.monotonic() + running.pause_s
        state.restarts += 1
        running.move(PartPhase.RESTARTING, _ending(status))
        _log.warning(
            "part died, starting it again",
            extra=fields(part=part.name, ending=_ending(status), lived_s=round(lived_s, 1), pause_s=running.pause_s),
        )
        running.pause_s *= 2

    def _check_start(self, waited_s: float) -> None:
        phases = {running.state.phase for running in self._running.values()}
        if phases == {PartPhase.READY}:
            self.state.phase = Phase.READY
            _log.info("the stack is ready", extra=fields(seconds=round(waited_s, 1)))
        elif PartPhase.FAILED in phases:
            self.state.phase = Phase.FAILED
        elif waited_s > self.start_timeout_s:
            self.state.phase = Phase.FAILED
            for running in self._running.values():
                if running.state.phase is PartPhase.STARTING:
                    running.move(PartPhase.FAILED, f"not ready after {self.start_timeout_s:.0f} s")

    def _shorten_logs(self) -> None:
        """Parts append to their logs, so that a log can be cut under them: the last of it stays beside, as `.1`."""
        for path in self.folder.logs.glob("*.log"):
            if path.stat().st_size > LONGEST_LOG_BYTES:
                shutil.copyfile(path, path.with_suffix(".log.1"))
                os.truncate(path, 0)

    def _note_shared_memory(self) -> None:
        """Some libraries choose names at random (Python's semaphores): who uses which is only seen while it runs."""
        for name, running in self._running.items():
            family = processes.marked(f"{self.state.stack_id}/{name}")
            seen = processes.shared_memory_of(family) | set(running.state.shared_memory)
            running.state.shared_memory = tuple(sorted(seen & set(os.listdir("/dev/shm"))))

    # -- the end

    def _stop(self) -> None:
        """Drain and stop the parts in order; then whatever is left, at once. A second signal stops the waiting."""
        if self.state.phase is not Phase.FAILED:
            self.state.phase = Phase.STOPPING
        self._signals.clear()
        self._note_shared_memory()
        for group in self.stop_order:
            self._stop_group([self._running[name] for name in group if name in self._running])
        left = processes.kill_all(self._everything)
        removed = self.state.remove_traces()
        _log.info("everything is stopped", extra=fields(killed=left, traces_removed=removed))
        if self.state.phase is Phase.STOPPING:
            self.state.phase = Phase.STOPPED
        self._write()

    def _stop_group(self, group: Sequence[_Running]) -> None:
        began = time.monotonic()
        alive = {running.child.pid: running for running in group if running.child is not None}
        for running in group:
            if running.child is not None:
                running.move(PartPhase.STOPPING, running.state.reason)
                os.kill(running.child.pid, signal.SIGTERM)
            elif running.state.phase is not PartPhase.FAILED:
                running.move(PartPhase.STOPPED)
        self._write()
        while alive and not self._signals:
            for pid, status in processes.reap().items():
                if pid in alive:
                    self._bury(alive.pop(pid), status)
            for pid, running in list(alive.items()):
                if time.monotonic() - began > running.part.drain_s:
                    _log.warning("part did not stop in time, killing it", extra=fields(part=running.part.name))
                    os.kill(pid, signal.SIGKILL)
                    time.sleep(0.05)
            time.sleep(0.02)

    def _bury(self, running: _Running, status: int) -> None:
        assert running.child is not None
        running.child.returncode = status
        running.child, running.state.process = None, None
        running.move(PartPhase.STOPPED)
        self._clear_after(running.part)
        self._write()

    def _clear_after(self, part: Part) -> None:
        """Kill what a part that is gone left running, and remove its shared memory."""
        processes.kill_all(lambda: processes.marked(f"{self.state.stack_id}/{part.name}"))
        processes.remove_shared_memory(part.shared_memory)
        processes.remove_unused_shared_memory(self._running[part.name].state.shared_memory)

    def _everything(self) -> Iterator[int]:
        yield from processes.descendants(os.getpid())
        yield from processes.marked(self.state.stack_id)

    def _write(self) -> None:
        """Only when something changed: readers look at the file many times a second."""
        record = repr(self.state)
        if record != self._written:
            self._written = record
            self.folder.write(self.state)


def _ending(status: int) -> str:
    if status >= 0:
        return f"it ended with status {status}"
    return f"it was ended by {signal.Signals(-status).name}"


def take_lock(folder: StackFolder) -> IO[str] | None:
    """The stack's lock, for as long as the file stays open; None when another supervisor has it."""
    file = open(folder.lock, "w")  # noqa: SIM115 - stays open for as long as this process lives
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def main() -> int:
    folder = StackFolder(Path(sys.argv[1]))
    configure_logs("supervisor")
    lock = take_lock(folder)
    if lock is None:
        _log.error("another supervisor has this stack")
        return 3
    config = stack.StackConfig.read(folder)
    parts = stack.parts(config, folder)
    supervisor = Supervisor(
        folder=folder,
        state=stack.new_state(config, parts),
        parts=parts,
        stop_order=stack.STOP_ORDER,
        start_timeout_s=config.start_timeout_s,
        lifeline=sys.stdin.buffer,
    )
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
