"""Starting and stopping a stack from outside: what `nvila up`, `down` and `demo` and the end-to-end tests call."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from nvila.cli import processes
from nvila.cli.stack import StackConfig
from nvila.cli.state import PartPhase, Phase, StackFolder, StackState, write_whole
from nvila.errors import NvilaError

LOOK_S = 0.1
STOP_WITHIN_S = 90.0
"""Longest drain of all parts together; what is left then is killed."""


class StartFailed(NvilaError):
    """A part did not come up. `part` names it, `log_tail` is the end of what it said."""

    code = "start_failed"

    def __init__(self, message: str, *, part: str = "", log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.part = part
        self.log_tail = log_tail


@dataclass
class RunningStack:
    """A stack that this process started and, until `detach`, holds: it stops when this process is gone."""

    config: StackConfig
    folder: StackFolder
    supervisor: subprocess.Popen[bytes]

    def detach(self) -> None:
        """Let the stack live on after this process."""
        assert self.supervisor.stdin is not None
        self.supervisor.stdin.write(b"detach\n")
        self.supervisor.stdin.close()

    def is_alive(self) -> bool:
        return self.supervisor.poll() is None

    def stop(self, on_change: Callable[[StackState], None] = lambda _: None) -> None:
        stop(self.folder, on_change)
        self.supervisor.wait()
        if self.supervisor.stdin is not None:
            self.supervisor.stdin.close()


def start(
    config: StackConfig, folder: StackFolder, on_change: Callable[[StackState], None] = lambda _: None
) -> RunningStack:
    """Start every part and wait until all are ready; `on_change` sees each new state. Raises `StartFailed`."""
    folder.make()
    clear_leftovers(folder)
    config.write(folder)
    write_whole(folder.path / "api-key", config.api_key + "\n")
    for log in folder.logs.glob("*.log"):
        log.replace(log.with_suffix(".log.1"))
    with open(folder.log("supervisor"), "ab") as log_file:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "nvila.cli.supervisor", str(folder.path)],
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,  # Ctrl-C is for the foreground process, which tells the supervisor
        )
    stack = RunningStack(config, folder, supervisor)
    try:
        _await_ready(stack, on_change)
    except BaseException:
        stack.stop(on_change)
        raise
    return stack


def _await_ready(stack: RunningStack, on_change: Callable[[StackState], None]) -> None:
    seen = ""
    while True:
        exited = not stack.is_alive()  # looked at before the state, whose last words would otherwise be missed
        state = stack.folder.read()
        if state is not None and state.stack_id == stack.config.stack_id:
            if repr(state) != seen:
                seen = repr(state)
                on_change(state)
            if state.phase is Phase.READY:
                return
            if state.phase is Phase.FAILED:
                raise _why(stack.folder, state)
        if exited:
            raise StartFailed("the supervisor ended", part="supervisor", log_tail=log_tail(stack.folder, "supervisor"))
        time.sleep(LOOK_S)


def _why(folder: StackFolder, state: StackState) -> StartFailed:
    for name, part in state.parts.items():
        if part.phase is PartPhase.FAILED:
            return StartFailed(f"{name} did not start: {part.reason}", part=name, log_tail=said_reasons(folder, name))
    return StartFailed("the stack did not start", part="supervisor", log_tail=log_tail(folder, "supervisor"))


def stop(folder: StackFolder, on_change: Callable[[StackState], None] = lambda _: None) -> bool:
    """Drain, stop and clean up after a stack, whoever started it. False when there was nothing to stop."""
    state = folder.read()
    if state is None:
        return False
    was_alive = state.is_alive
    if was_alive:
        os.kill(state.supervisor.pid, signal.SIGTERM)
        until = time.monotonic() + STOP_WITHIN_S
        while state.is_alive and time.monotonic() < until:
            if (now := folder.read()) is not None:
                on_change(now)
            time.sleep(LOOK_S)
        if state.is_alive:
            os.kill(state.supervisor.pid, signal.SIGKILL)
            processes.wait_until_gone(state.supervisor, 5)
        if (now := folder.read()) is not None:
            on_change(now)
    return clear_leftovers(folder) or was_alive


def clear_leftovers(folder: StackFolder) -> bool:
    """Clean up after a supervisor that was killed: processes with the stack's mark, shared memory, the state.

    Raises `StartFailed` when the stack is running. True when something was left.
    """
    state = folder.read()
    if state is None:
        return False
    if state.is_alive:
        raise StartFailed(
            f"the stack {folder.name!r} is running already; `nvila status` shows it, `nvila down` stops it"
        )
    killed = processes.kill_all(lambda: processes.marked(state.stack_id))
    removed = state.remove_traces()
    (folder.path / "state.json").unlink(missing_ok=True)
    return bool(killed or removed)


def log_tail(folder: StackFolder, part: str, lines: int = 12) -> tuple[str, ...]:
    """The last lines of a part's log."""
    return tuple(_log_lines(folder, part)[-lines:])


def said_reasons(folder: StackFolder, part: str, lines: int = 3) -> tuple[str, ...]:
    """What a part that failed says about why: its own error events if there are any, else lines of the programs it runs
    that speak of errors, else the end of its log. The last different ones."""
    said = [_RAY_PREFIX.sub("", line) for line in _log_lines(folder, part)]
    events = [_event_reason(line) for line in said]
    others = [_other_reason(line) for line in said]
    for found in (events, others):
        different = list(dict.fromkeys(reason[:_LONGEST_REASON] for reason in reversed(found) if reason))
        if different:
            return tuple(reversed(different[:lines]))
    return log_tail(folder, part)


_RAY_PREFIX = re.compile(r"^\x1b\[\d+m\([^)]*\)\x1b\[0m ")
"""Ray puts the process before each line of a replica, in colour."""
_TELLING = re.compile(r"\bE \d+ \S+\] |[a-z](Error|Exception)\b|\b(error|failed|refused)\b", re.IGNORECASE)
_SOURCE_PREFIX = re.compile(r"^.*?\.(cc|py):\d+\]\s*")
_LONGEST_REASON = 300


def _event_reason(line: str) -> str:
    """Of one of our own error events: its name and what it carries."""
    try:
        event = json.loads(line) if line.startswith("{") else {}
    except ValueError:
        return ""
    if event.get("level") not in ("ERROR", "CRITICAL"):
        return ""
    last_words = str(event.get("exception", "")).strip().rpartition("\n")[2]
    told = (event.get("event"), event.get("reason"), event.get("error"), last_words)
    return ": ".join(str(part) for part in told if part)


def _other_reason(line: str) -> str:
    """Of another program's line that speaks of an error, without what stands before and after it."""
    if line.startswith(("|", "+", "{", " ")) or not _TELLING.search(line):
        return ""
    return _SOURCE_PREFIX.sub("", line).split("\\n")[0].strip(' "')


def _log_lines(folder: StackFolder, part: str) -> list[str]:
    try:
        text = folder.log(part).read_text(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]
