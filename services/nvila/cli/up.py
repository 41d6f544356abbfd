"""`nvila up`: start a stack, show how it comes up, hold it until Ctrl-C (or let it go with `--detach`)."""

from __future__ import annotations

import argparse
import signal
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.markup import escape

from nvila.cli import lifecycle, show
from nvila.cli.checkpoint import find_model
from nvila.cli.stack import StackConfig, configure
from nvila.cli.state import PartPhase, StackFolder, StackState, folder_of


def run(args: argparse.Namespace) -> int:
    folder = folder_of(args.stack)
    lifecycle.clear_leftovers(folder)
    config = configure(
        name=args.stack,
        model=find_model(args.model),
        port=args.port,
        base_port=args.base_port,
        api_key=args.api_key,
        engine=args.engine,
        log_level=args.log_level,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    began = time.monotonic()
    with show.Progress(is_quiet=args.json) as progress:
        stack = lifecycle.start(config, folder, progress.show)
    took_s = time.monotonic() - began
    if args.json:
        show.print_json(summary(config, folder, took_s))
    else:
        _print_ready(config, folder, took_s, is_detached=args.detach)
    if args.detach:
        stack.detach()
        return 0
    return _hold(stack, is_quiet=args.json)


def _hold(stack: lifecycle.RunningStack, *, is_quiet: bool) -> int:
    """Until Ctrl-C, saying what dies and comes back; 1 when the supervisor goes by itself."""
    teller = _Teller(is_quiet=is_quiet)
    try:
        while stack.is_alive():
            if (state := stack.folder.read()) is not None:
                teller.tell(state)
            time.sleep(0.5)
    except KeyboardInterrupt:
        with show.Progress(is_quiet=is_quiet) as progress:
            stack.stop(progress.show)
        return 0
    was_stopped = stack.folder.read() is None or stack.supervisor.returncode == 0
    lifecycle.stop(stack.folder)
    if not was_stopped:
        raise lifecycle.StartFailed("the supervisor was killed; everything it ran is stopped", part="supervisor")
    return 0


class _Teller:
    """Says once when a part dies and when it is back."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._phases: dict[str, PartPhase] = {}

    def tell(self, state: StackState) -> None:
        for name, part in state.parts.items():
            before = self._phases.get(name, PartPhase.READY)
            self._phases[name] = part.phase
            if self._is_quiet or part.phase is before:
                continue
            if part.phase is PartPhase.RESTARTING:
                show.console.print(f"[yellow]↻[/] [bold]{name}[/] died ({part.reason}); starting it again")
            elif part.phase is PartPhase.READY:
                show.console.print(f"[green]✓[/] [bold]{name}[/] is back")


def summary(config: StackConfig, folder: StackFolder, took_s: float) -> dict[str, Any]:
    """What `--json` prints: enough for a program to use the stack."""
    state = folder.read()
    return {
        "name": config.name,
        "url": config.url,
        "api_base": f"{config.url}/v1",
        "grpc": f"127.0.0.1:{config.ports.gateway_grpc}",
        "api_key": config.api_key,
        "model": config.model,
        "folder": str(folder.path),
        "ready_s": round(took_s, 2),
        "parts": {
            name: {"pid": part.process.pid if part.process else None, "port": part.port, "ready_s": part.took_s}
            for name, part in (state.parts if state else {}).items()
        },
    }


def _print_ready(config: StackConfig, folder: StackFolder, took_s: float, *, is_detached: bool) -> None:
    tell = partial(show.results().print, soft_wrap=True)
    option = "" if config.name == "default" else f" --stack {config.name}"
    tell(f"\n[bold green]nvila is ready[/] after {took_s:.0f} s\n")
    tell(f"  OpenAI API   {config.url}/v1      [dim]key in {_short(folder.path / 'api-key')}[/]")
    tell(f"  gRPC         127.0.0.1:{config.ports.gateway_grpc}")
    tell(f"  API docs     {config.url}/docs")
    tell(f'\n  [dim]next:[/]  {escape(show.command())} ask{option} video.mp4 "What happens here?"')
    tell(f"  [dim]stop:[/]  {escape(show.command()) + ' down' + option if is_detached else 'Ctrl-C'}\n")


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM and SIGHUP end a foreground stack as Ctrl-C does."""
    raise KeyboardInterrupt
