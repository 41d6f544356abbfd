"""The folder of one stack: what it was started with, what its supervisor last said about its parts, its logs.

.nvila/<name>/  config.json   what `nvila up` was asked for (readable by the owner only: it holds the API key)
                state.json    written by the supervisor at every change, read by everybody else
                lock          held by the supervisor while it lives
                logs/<part>.log  run/<part>/  …
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from nvila.cli import processes
from nvila.cli.processes import Identity


class Phase(StrEnum):
    """Of a stack."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class PartPhase(StrEnum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass
class PartState:
    """`since_s`: wall-clock time of the last change. `took_s`: how long the first start took, once it is ready."""

    phase: PartPhase = PartPhase.WAITING
    process: Identity | None = None
    since_s: float = 0.0
    took_s: float | None = None
    restarts: int = 0
    port: int = 0
    reason: str = ""
    """Why it failed or was restarted, in one line."""
    shared_memory: tuple[str, ...] = ()
    """Entries of /dev/shm with names of their own choosing that its processes were seen to use."""


@dataclass
class StackState:
    """`stack_id`: unique; marks the stack's processes (`processes.MARK`). `shared_memory`: prefixes in /dev/shm;
    `scratch`: folders elsewhere; both are removed at the end."""

    name: str
    stack_id: str
    supervisor: Identity
    phase: Phase = Phase.STARTING
    started_s: float = 0.0
    parts: dict[str, PartState] = field(default_factory=dict)
    shared_memory: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()

    @property
    def is_alive(self) -> bool:
        return self.supervisor.is_alive()

    def remove_traces(self) -> int:
        """Remove what the stack's processes, which must be gone, left outside its folder. Returns how many things."""
        folders = [Path(folder) for folder in self.scratch if Path(folder).exists()]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        seen = {name for part in self.parts.values() for name in part.shared_memory}
        removed = processes.remove_shared_memory(self.shared_memory) + processes.remove_unused_shared_memory(seen)
        return len(folders) + len(removed)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> StackState:
        parts = {
            name: PartState(
                **{
                    **part,
                    "phase": PartPhase(part["phase"]),
                    "process": Identity(**part["process"]) if part["process"] else None,
                    "shared_memory": tuple(part["shared_memory"]),
                }
            )
            for name, part in record["parts"].items()
        }
        return cls(
            **{
                **record,
                "phase": Phase(record["phase"]),
                "supervisor": Identity(**record["supervisor"]),
                "parts": parts,
                "shared_memory": tuple(record["shared_memory"]),
                "scratch": tuple(record["scratch"]),
            }
        )


@dataclass(frozen=True)
class StackFolder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, part: str) -> Path:
        return self.logs / f"{part}.log"

    def run(self, part: str) -> Path:
        """Where a part may keep files while it runs; emptied when it starts anew."""
        return self.path / "run" / part

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)
        self.logs.mkdir(exist_ok=True)

    def read(self) -> StackState | None:
        """None when there is no such stack (any more), or its state cannot be understood."""
        try:
            return StackState.from_json(json.loads((self.path / "state.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, state: StackState) -> None:
        write_whole(self.path / "state.json", json.dumps(state.to_json(), indent=1))


def home() -> Path:
    """Where stacks keep their folders: NVILA_HOME, or `.nvila` in the current folder."""
    return Path(os.environ.get("NVILA_HOME") or ".nvila").absolute()


def folder_of(name: str) -> StackFolder:
    return StackFolder(home() / name)


def all_folders() -> Iterator[StackFolder]:
    """Every stack that has ever been started under `home()` and not been cleaned away."""
    if home().is_dir():
        yield from (StackFolder(path) for path in sorted(home().iterdir()) if (path / "state.json").exists())


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that readers see the old or the new text, never a part; readable by the owner only."""
    beside = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    beside.replace(path)
