"""`nvila status`: each part's process, port, health, version and memory, as they are now."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import dataclass

import psutil
from rich.console import RenderableType
from rich.table import Table

from nvila.cli import processes, show, stack
from nvila.cli.client import GatewayClient
from nvila.cli.stack import StackConfig
from nvila.cli.state import PartPhase, PartState, StackFolder, StackState, folder_of
from nvila.errors import NvilaError, Unavailable

_COLUMNS = ("part", "health", "pid", "port", "memory", "restarts", "up", "version")
_LEFT_OUT = ("restarts", "up", "version")
"""On a terminal narrower than `_WHOLE_WIDTH`; `--json` has all."""
_WHOLE_WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """`memory_bytes`: resident, with all descendants; pages they share are counted once per process."""

    name: str
    pid: int | None
    port: int
    health: str
    version: str
    memory_bytes: int
    processes: int
    restarts: int
    uptime_s: float
    reason: str


def run(args: argparse.Namespace) -> int:
    folder = folder_of(args.stack)
    state = folder.read()
    if state is None:
        raise Unavailable(f"no stack {args.stack!r} here; start one with `nvila up`")
    if not state.is_alive:
        raise Unavailable(f"the stack {args.stack!r} does not run any more; `nvila up` starts it anew")
    config = StackConfig.read(folder)
    statuses = look(config, folder, state)
    model = _model(config)
    if args.json:
        show.print_json(
            {
                "name": state.name,
                "phase": state.phase,
                "url": config.url,
                "folder": str(folder.path),
                "supervisor": state.supervisor.pid,
                "model": model,
                "parts": {status.name: vars(status) for status in statuses},
            }
        )
    else:
        _print(config, state, statuses, model)
    return 0 if all(status.health == "ready" for status in statuses) else 7


def look(config: StackConfig, folder: StackFolder, state: StackState) -> list[PartStatus]:
    """Ask every part now."""
    return [
        _look(part, state.parts.get(part.name, PartState()), state.stack_id) for part in stack.parts(config, folder)
    ]


def _look(part: stack.Part, state: PartState, stack_id: str) -> PartStatus:
    family = set(processes.marked(f"{stack_id}/{part.name}"))
    if state.process is not None:  # not all keep the mark: Redis writes its title over it
        family |= {state.process.pid, *processes.descendants(state.process.pid)}
    is_running = state.process is not None and state.process.is_alive()
    if state.phase is PartPhase.READY:
        health = ("ready" if part.is_ready() else "not ready") if is_running else "dead"
    else:
        health = str(state.phase)
    return PartStatus(
        name=part.name,
        pid=state.process.pid if state.process else None,
        port=part.port,
        health=health,
        version=part.version() if is_running else "",
        memory_bytes=sum(_memory(pid) for pid in family),
        processes=len(family),
        restarts=state.restarts,
        uptime_s=round(time.time() - psutil.Process(state.process.pid).create_time(), 1)
        if is_running and state.process
        else 0.0,
        reason=state.reason,
    )


def _memory(pid: int) -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def _model(config: StackConfig) -> str:
    try:
        with GatewayClient(config.url, config.api_key) as gateway:
            return ", ".join(model["id"] for model in gateway.models())
    except (NvilaError, json.JSONDecodeError):
        return ""


def _print(config: StackConfig, state: StackState, statuses: list[PartStatus], model: str) -> None:
    console = show.results()
    console.print(
        f"\n[bold]{state.name}[/]  {config.url}  [dim]model[/] {model or config.model}  "
        f"[dim]supervisor[/] {state.supervisor.pid}\n",
        soft_wrap=True,
    )
    columns = [column for column in _COLUMNS if not (console.width < _WHOLE_WIDTH and column in _LEFT_OUT)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("part", "health", "version") else "right", no_wrap=True)
    for status in statuses:
        cells: tuple[RenderableType, ...] = (
            status.name,
            show.phase_text(status.health),
            str(status.pid or ""),
            str(status.port),
            _size(status.memory_bytes),
            str(status.restarts),
            _duration(status.uptime_s),
            status.version,
        )
        table.add_row(*(cell for column, cell in zip(_COLUMNS, cells, strict=True) if column in columns))
    console.print(table)
    console.print()


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
