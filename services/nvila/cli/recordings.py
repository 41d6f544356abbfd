"""`nvila recordings`: long videos and cameras, from adding one to asking about it."""

from __future__ import annotations

import argparse
import getpass
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from nvila.cli import jobs, show
from nvila.cli.ask import find_gateway, print_answer
from nvila.cli.client import Ask, GatewayClient
from nvila.cli.recording_client import Record, RecordingClient
from nvila.errors import DeadlineExceeded, InvalidRequest, LimitExceeded, NotFound, from_wire

_LOOK_EVERY_S = 1.0
_KINDS = {"ask": "ask", "summarize": "summary", "when": "when", "timeline": "timeline", "watch": "watch"}
_STYLES = {"complete": "green", "live": "red", "ingesting": "cyan", "failed": "bold red", "interrupted": "yellow"}


def run(args: argparse.Namespace) -> int:
    if args.action == "ask" and not args.job and args.relevant is None:
        try:
            return _ask(args)
        except (LimitExceeded, DeadlineExceeded) as error:  # too long for one request, perhaps not for a job
            if args.json:
                raise
            show.console.print(Text(f"{error}; asking as a job", style="dim"))
    with RecordingClient(*find_gateway(args)) as gateway:
        match args.action:
            case "add":
                _add(gateway, args)
            case "list":
                _print_list(list(gateway.every("/v1/recordings", limit=args.limit, state=args.state)), args.json)
            case "show":
                _show(gateway, args)
            case "export":
                _export(gateway, args)
            case "delete":
                _delete(gateway, args)
            case _:
                return _job(gateway, args)
    return 0


# -- adding


def _add(gateway: RecordingClient, args: argparse.Namespace) -> None:
    body: Record = {"source": _source(gateway, args), "policy": _policy(args), "metadata": _metadata(args.meta)}
    body |= {name: value for name, value in (("name", args.name), ("captured_at", args.captured_at)) if value}
    recording = gateway.post("/v1/recordings", body, key=args.idempotency_key)
    if args.wait:
        recording = _until_over(gateway, recording["id"], is_quiet=args.json)
    if args.json:
        show.print_json(recording)
    else:
        print(recording["id"])
        if recording["source"]["type"] == "push":
            show.console.print(f"push MPEG-TS, fragmented MP4 or JPEGs to /v1/recordings/{recording['id']}/frames")


def _source(gateway: RecordingClient, args: argparse.Namespace) -> Record:
    if args.source == "push":
        return {"type": "push"}
    parts = urlsplit(args.source)
    if "://" not in args.source:
        return {"type": "file", "file_id": _upload(gateway, Path(args.source).expanduser(), is_quiet=args.json)}
    kind = "rtsp" if parts.scheme in ("rtsp", "rtsps") else "hls" if parts.path.endswith(".m3u8") else "url"
    source = {"type": kind, "url": args.source}
    if args.username is not None:
        source |= {"username": args.username, "password": getpass.getpass(f"password of {args.username}: ")}
    return source


def _upload(gateway: RecordingClient, path: Path, *, is_quiet: bool) -> str:
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder; name a file in it")
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    if is_quiet or not show.console.is_terminal:
        return gateway.upload(path, lambda _: None)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=show.console, transient=True) as progress:
        task = progress.add_task(f"sending {path.name}", total=path.stat().st_size)
        return gateway.upload(path, lambda sent: progress.update(task, completed=sent))


def _policy(args: argparse.Namespace) -> Record:
    given = {"fps": args.fps, "chunk_s": args.chunk, "stride_s": args.stride}
    return {name: value for name, value in given.items() if value is not None} | {"gate": not args.no_gate}


def _metadata(given: list[str]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in given]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise InvalidRequest(f"--meta {name!r}: must be NAME=VALUE")
    return {name: value for name, _, value in pairs}


# -- looking


def _show(gateway: RecordingClient, args: argparse.Namespace) -> None:
    if args.follow:
        _until_over(gateway, args.id, is_quiet=args.json)
    recording = gateway.get(f"/v1/recordings/{args.id}")
    coverage = gateway.get(f"/v1/recordings/{args.id}/coverage")
    if args.json:
        show.print_json({**recording, "coverage": coverage})
        return
    print(f"{recording['id']}  {recording['name']}")
    reached = show.clock(recording["ingested_s"])
    whole = f" of {show.clock(recording['duration_s'])}" if recording["duration_s"] else ""
    print(f"{recording['state']}  {reached}{whole} can be asked about")
    if recording["source"]["url"]:
        print(f"from  {recording['source']['url']}")
    if recording["error"]:
        print(f"error  {recording['error']['code']}: {recording['error']['message']}")
    for name, value in recording["counters"].items():
        if value:
            print(f"{name.replace('_', ' ')}  {value:,}")
    for gap in coverage["gaps"]:
        print(f"gap  {show.clock(gap['start_s'])}–{show.clock(gap['end_s'])}  {gap['reason']}")


def _until_over(gateway: RecordingClient, recording_id: str, *, is_quiet: bool) -> Record:
    """Follow a recording until it is complete. Raises the error that it failed with."""
    is_shown = not is_quiet and show.console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[reached]}"))
    with Progress(*columns, console=show.console, transient=True, disable=not is_shown) as progress:
        task = progress.add_task("waiting", total=None, reached="")
        while True:
            recording = gateway.get(f"/v1/recordings/{recording_id}")
            if recording["progress"] is not None:
                progress.update(task, total=1.0, completed=recording["progress"])
            reached = show.clock(recording["ingested_s"])
            progress.update(task, description=recording["state"], reached=reached)
            if recording["state"] == "failed":
                error = recording["error"] or {}
                raise from_wire(error.get("code", "internal"), error.get("message", "the recording failed"))
            if recording["state"] == "complete":
                return recording
            time.sleep(_LOOK_EVERY_S)


def _print_list(found: list[Record], as_json: bool) -> None:
    if as_json:
        show.print_json(found)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("recording", "state", "length", "from", "age", "name"):
        table.add_column(title, no_wrap=title != "name", justify="right" if title == "length" else "left")
    for one in found:
        length = show.clock(one["duration_s"] or one["ingested_s"])
        progress = f" {one['progress']:.0%}" if one["state"] == "ingesting" and one["progress"] is not None else ""
        state = Text(one["state"] + progress + jobs.error_of(one), style=_STYLES.get(one["state"], "dim"))
        table.add_row(one["id"], state, length, one["source"]["type"], jobs.age(one["created_at"]), Text(one["name"]))
    show.results().print(table)


# -- asking


def _ask(args: argparse.Namespace) -> int:
    ask = Ask(media=[], question=args.question, max_tokens=args.max_tokens or 256, timeout_s=args.timeout)
    part = {"type": "recording", "recording": {"id": args.id, **_window(args)}}
    with GatewayClient(*find_gateway(args)) as gateway:
        print_answer(ask, gateway.ask_about(ask, part), as_json=args.json, at_once=False)
    return 0


def _job(gateway: RecordingClient, args: argparse.Namespace) -> int:
    params: dict[str, Any] = {
        "question": getattr(args, "question", None),
        "max_tokens": getattr(args, "max_tokens", None),
        "relevant_chunks": getattr(args, "relevant", None),
        "webhook_url": getattr(args, "webhook", None),
        "secret": getattr(args, "secret", None),
    }
    body = {
        "kind": _KINDS[args.action],
        "recording": args.id,
        "window": _window(args),
        "params": {name: value for name, value in params.items() if value is not None},
    }
    job = gateway.post("/v1/jobs", body, key=args.idempotency_key)
    if getattr(args, "detach", False):
        show.print_json(job) if args.json else print(job["id"])
        return 0
    return jobs.follow(gateway, job["id"], as_json=args.json)


def _window(args: argparse.Namespace) -> dict[str, float]:
    bounds = {"start_s": getattr(args, "start", None), "end_s": getattr(args, "end", None)}
    return {name: seconds(value) for name, value in bounds.items() if value is not None}


def seconds(told: str) -> float:
    """From 90, 90.5, 1:30 or 1:04:16. Raises `InvalidRequest`."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", told):
        raise InvalidRequest(f"{told!r} is no time; write seconds, or 1:04:16")
    total = 0.0
    for part in told.split(":"):
        total = total * 60 + float(part)
    return total


# -- taking out, taking away


def _export(gateway: RecordingClient, args: argparse.Namespace) -> None:
    kinds = [args.kind] if args.kind else [*dict.fromkeys(_KINDS.values())]
    found = [
        job for kind in kinds for job in gateway.every("/v1/jobs", limit=1, recording=args.id, state="done", kind=kind)
    ]
    if not found:
        raise NotFound(f"no finished job{f' of kind {args.kind}' if args.kind else ''} about {args.id}")
    last = max(found, key=lambda job: job["created_at"])
    output = args.output.open("w") if args.output else sys.stdout
    try:
        for line in gateway.lines(f"/v1/jobs/{last['id']}/results"):
            output.write(line + "\n")
    finally:
        if args.output:
            output.close()


def _delete(gateway: RecordingClient, args: argparse.Namespace) -> None:
    deleted = [gateway.delete(f"/v1/recordings/{recording_id}") for recording_id in args.id]
    if args.json:
        show.print_json(deleted)
    else:
        for one in deleted:
            print(f"{one['id']} is gone; its data are being removed ({one['job']})")
