"""What a person sees: live lines on a terminal, plain lines elsewhere. On stderr, but for `results`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from nvila.cli.state import PartPhase, PartState, Phase, StackState

console = Console(stderr=True, highlight=False)


def results() -> Console:
    """What was asked for, on stdout; a file has no edge at which lines would have to end."""
    printer = Console(highlight=False)
    if not printer.is_terminal:
        printer.width = 240
    return printer


TITLES = {
    "cache": "Redis",
    "vision": "Triton",
    "decode": "Ray Serve + vLLM",
    "gateway": "FastAPI",
    "recordings": "SQLite",
}
"""What each part runs on."""


_STYLES = {
    PartPhase.READY: ("✓", "green"),
    PartPhase.FAILED: ("✗", "bold red"),
    PartPhase.RESTARTING: ("↻", "yellow"),
    PartPhase.STOPPED: ("·", "dim"),
}


_LEFT_OF_NOTE = 42
_STARTING = {
    "vision": "starting the server, loading the vision tower",
    "decode": "starting Ray, then the language model's engine",
    "gateway": "waiting for the others",
    "recordings": "waiting for the others",
}


class Progress:
    """Follows a stack's states: a table that moves on a terminal, a line per change elsewhere, nothing when quiet."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._live = Live(console=console, refresh_per_second=10, transient=False) if console.is_terminal else None
        self._spinners: dict[str, Spinner] = {}
        self._said: dict[str, str] = {}

    def __enter__(self) -> Progress:
        if self._live is not None and not self._is_quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None and not self._is_quiet:
            self._live.stop()

    def show(self, state: StackState) -> None:
        if self._is_quiet:
            return
        if self._live is not None:
            self._live.update(_Lines(state, self._spinners))
            return
        for name, part in state.parts.items():
            line = f"{part.phase}{_took(part)}{' - ' + part.reason if part.reason else ''}"
            if part.phase is not PartPhase.WAITING and self._said.get(name) != line:
                self._said[name] = line
                console.print(f"{name:10} {TITLES.get(name, ''):17} {line}")


class _Lines:
    """Drawn anew at each refresh, so that seconds count and spinners turn between changes."""

    def __init__(self, state: StackState, spinners: dict[str, Spinner]) -> None:
        self._state, self._spinners = state, spinners

    def __rich__(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=1)
        grid.add_column(style="bold", width=8)
        grid.add_column(style="dim", width=17)
        grid.add_column(justify="right", width=7)
        grid.add_column(style="dim", no_wrap=True, overflow="ellipsis", width=max(console.width - _LEFT_OF_NOTE, 10))
        for name, part in self._state.parts.items():
            grid.add_row(self._sign(name, part), name, TITLES.get(name, ""), _seconds(part), self._note(name, part))
        return grid

    def _sign(self, name: str, part: PartState) -> RenderableType:
        if part.phase in _STYLES:
            sign, style = _STYLES[part.phase]
            return Text(sign, style=style)
        return self._spinners.setdefault(name, Spinner("dots", style="cyan"))

    def _note(self, name: str, part: PartState) -> str:
        if part.reason:
            return part.reason
        if part.phase is PartPhase.READY:
            return f"port {part.port}"
        if part.phase is PartPhase.STARTING:
            return _STARTING.get(name, "")
        return str(part.phase)


def _seconds(part: PartState) -> str:
    if part.phase is PartPhase.STARTING:
        return f"{max(time.time() - part.since_s, 0):.0f} s"
    return f"{part.took_s:.1f} s" if part.took_s is not None else ""


def _took(part: PartState) -> str:
    return f" after {part.took_s:.1f} s" if part.phase is PartPhase.READY and part.took_s is not None else ""


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner while something is awaited; nothing where there is no terminal."""
    if not console.is_terminal:
        yield
        return
    with console.status(what, spinner="dots"):
        yield


class Typist:
    """Writes text on stdout as it comes, indented, and broken between words at the terminal's width."""

    def __init__(self, indent: int = 2) -> None:
        self._indent = indent
        self._width = max(min(console.width, 100) - indent, 20)
        self._column = 0
        self._word = ""

    def write(self, text: str) -> None:
        for character in text:
            if character.isspace():
                self._flush()
                if character == "\n":
                    self._break()
                elif self._column:
                    self._put(" ")
            else:
                self._word += character
        sys.stdout.flush()

    def end(self) -> None:
        self._flush()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _flush(self) -> None:
        if self._column and self._column + len(self._word) > self._width:
            self._break()
        self._put(self._word)
        self._word = ""

    def _put(self, text: str) -> None:
        if not self._column and text:
            sys.stdout.write(" " * self._indent)
        sys.stdout.write(text)
        self._column += len(text)

    def _break(self) -> None:
        sys.stdout.write("\n")
        self._column = 0


def command() -> str:
    """How this command is to be typed here: `nvila` where it is on PATH, else its path from the current folder."""
    if shutil.which("nvila") is not None:
        return "nvila"
    return os.path.relpath(Path(sys.executable).with_name("nvila"))


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
    sys.stdout.flush()


def phase_text(phase: Phase | PartPhase | str) -> Text:
    style = {"ready": "green", "failed": "bold red", "restarting": "yellow", "starting": "cyan"}.get(str(phase), "dim")
    return Text(str(phase), style=style)


def coverage(report: dict[str, Any]) -> RenderableType:
    """What an answer stands on, as a small table: `report` is the API's coverage object."""
    is_wide = any(media.get("recording") for media in report.get("media", []))  # times with hours, in 80 columns
    table = Table(box=None, padding=(0, 1 if is_wide else 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("media", "frames", "decoded", "encoded", "cached", "dropped", "chunks", "tokens", "seconds"):
        table.add_column(title, justify="left" if title == "media" else "right", no_wrap=True)
    for media in report.get("media", []):
        is_video = media["kind"] == "video"
        reused = media["frames_reused"]
        table.add_row(
            media["kind"],
            str(media["frames_asked"]),
            str(media["frames_decoded"]),
            str(media["frames_encoded"]),
            Text(str(reused), style="green" if reused else ""),
            Text(str(media["frames_dropped"]), style="yellow" if media["frames_dropped"] else ""),
            str(media["chunks"]),
            f"{media['tokens']:,}",
            _span(media, is_long=bool(media.get("recording"))).removesuffix(" s") if is_video else "",
        )
    gaps = [
        Text(f"gap {_span(gap, is_long=bool(media.get('recording')))}: {gap['reason']}", style="yellow")
        for media in report.get("media", [])
        for gap in media.get("gaps", [])
    ]
    return Group(table, *gaps)


def _span(of: dict[str, Any], *, is_long: bool) -> str:
    """From when to when: in seconds of a clip, on the clock of a recording, to which a user goes by hand."""
    start_s, end_s = of["start_s"], of["end_s"]
    return f"{clock(start_s)}–{clock(end_s)}" if is_long else f"{start_s:.1f}–{end_s:.1f} s"


def clock(at_s: float) -> str:
    """1:04:16, or 4:16."""
    minutes, seconds = divmod(int(at_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def stages(stage_ms: dict[str, float]) -> RenderableType:
    """Milliseconds per stage in one line; parts of stages (`vision.tower`) are left to `--json`."""
    line = Text()
    for name, ms in stage_ms.items():
        if "." in name or name in ("total", "plan"):
            continue
        line.append(f"{name.replace('_', ' ')} ", style="dim")
        line.append(f"{_ms(ms)}  ", style="bold" if name == "first_token" else "")
    line.append("total ", style="dim")
    line.append(_ms(stage_ms.get("total", 0.0)))
    return line


def _ms(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.0f} ms"
