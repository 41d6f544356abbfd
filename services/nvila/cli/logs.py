"""`nvila logs`: what a stack's parts wrote, one after the other or as it comes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from nvila.cli.state import StackFolder, folder_of
from nvila.errors import NotFound


def run(args: argparse.Namespace) -> int:
    folder = folder_of(args.stack)
    paths = _paths(folder, args.part)
    read_to = {path: _print_last(path, args.lines, _prefix(path, paths, args.json)) for path in paths}
    while args.follow:
        for path in paths:
            read_to[path] = _print_new(path, read_to[path], _prefix(path, paths, args.json))
        time.sleep(0.2)
    return 0


def _paths(folder: StackFolder, part: str | None) -> list[Path]:
    there = sorted(folder.logs.glob("*.log"))
    if part is not None:
        there = [path for path in there if path.stem == part]
    if not there:
        raise NotFound(f"stack {folder.name!r} has no log{f' of {part!r}' if part else 's'}")
    return there


def _prefix(path: Path, paths: list[Path], is_plain: bool) -> str:
    return "" if is_plain or len(paths) == 1 else f"{path.stem:10} │ "


def _print_last(path: Path, lines: int, prefix: str) -> int:
    content = path.read_bytes()
    for line in content.decode(errors="replace").splitlines()[-lines:] if lines else []:
        print(f"{prefix}{line}")
    return len(content)


def _print_new(path: Path, read_to: int, prefix: str) -> int:
    """Whole lines only; a log that became shorter was begun anew."""
    size = path.stat().st_size if path.exists() else 0
    if size <= read_to:
        return size
    with path.open("rb") as file:
        file.seek(read_to)
        new, _, rest = file.read().rpartition(b"\n")
    for line in new.decode(errors="replace").splitlines():
        print(f"{prefix}{line}")
    sys.stdout.flush()
    return size - len(rest)
