"""`nvila jobs`: what is being done about recordings, followed and steered."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nvila.cli import show
from nvila.cli.ask import find_gateway
from nvila.cli.recording_client import Record, RecordingClient
from nvila.errors import Cancelled, from_wire

_STYLES = {"done": "green", "failed": "bold red", "running": "cyan", "queued": "dim", "cancelled": "yellow"}


def run(args: argparse.Namespace) -> int:
    with RecordingClient(*find_gateway(args)) as gateway:
        match args.action:
            case "list":
                query = {"recording": args.recording, "kind": args.kind, "state": args.state}
                _print_list(list(gateway.every("/v1/jobs", limit=args.limit, **query)), as_json=args.json)
            case "show":
                print_job(gateway.get(f"/v1/jobs/{args.id}"), as_json=args.json)
            case "follow":
                return follow(gateway, args.id, as_json=args.json)
            case "cancel" | "retry":
                print_job(gateway.post(f"/v1/jobs/{args.id}/{args.action}"), as_json=args.json)
    return 0


def follow(gateway: RecordingClient, job_id: str, *, as_json: bool) -> int:
    """Show how far a job is until it is over, then its result; alerts, which no result repeats, as they come.

    As JSON: each event a line, then the job.

    Raises the error that the job failed with, or `Cancelled`."""
    with _bar("working") as (progress, found):
        for kind, data in gateway.follow(job_id):
            if as_json:
                _print_line({"event": kind, **data})
            elif kind == "progress":
                progress(data)
            elif kind == "alert":
                print(finding(data), flush=True)
            elif line := finding(data):
                found(line)
    job = gateway.get(f"/v1/jobs/{job_id}")
    if as_json:
        _print_line(job)
    if job["state"] == "failed":
        error = job["error"] or {}
        raise from_wire(error.get("code", "internal"), error.get("message", "the job failed"))
    if job["state"] == "cancelled":
        raise Cancelled("the job was cancelled")
    if not as_json:
        _print_result(job["result"] or {})
    return 0


def finding(data: Record) -> str:
    """What was found between two times, in one line; empty when it is nothing of the kind."""
    said = data.get("text") or data.get("label") or data.get("answer") or ""
    if "start_s" not in data or not said:
        return ""
    return f"{show.clock(data['start_s'])}–{show.clock(data['end_s'])}  {said}"


def _print_result(result: Record) -> None:
    if text := result.get("text"):
        print(text)
    found = result.get("events", result.get("intervals"))
    for one in found or ():
        label = one.get("label", "")
        print(f"{show.clock(one['start_s'])}–{show.clock(one['end_s'])}{f'  {label}' if label else ''}")
    if found == []:
        print("nothing was found in this window", file=sys.stderr)
    for gap in result.get("gaps", []):
        show.console.print(
            Text(f"gap {show.clock(gap['start_s'])}–{show.clock(gap['end_s'])}: {gap['reason']}", style="yellow")
        )


def print_job(job: Record, *, as_json: bool) -> None:
    if as_json:
        show.print_json(job)
        return
    print(f"{job['id']}  {job['kind']}  {job['state']}")
    if job["recording"]:
        print(f"recording  {job['recording']}")
    for name, value in {**job["params"], **job["progress"]}.items():
        print(f"{name}  {value}")
    if job["error"]:
        print(f"error  {job['error']['code']}: {job['error']['message']}")
    if job["result"]:
        _print_result(job["result"])


def _print_list(jobs: list[Record], *, as_json: bool) -> None:
    if as_json:
        show.print_json(jobs)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("job", "kind", "state", "recording", "age"):
        table.add_column(title, no_wrap=True)
    for job in jobs:
        state = Text(job["state"] + error_of(job), style=_STYLES.get(job["state"], ""))
        table.add_row(job["id"], job["kind"], state, job["recording"] or "", age(job["created_at"]))
    show.results().print(table)


def error_of(record: Record) -> str:
    """The code of its error, to stand behind its state; empty where there is none."""
    return f": {record['error']['code']}" if record["error"] else ""


def age(at: float) -> str:
    seconds = max(0.0, time.time() - at)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _print_line(record: Record) -> None:
    print(json.dumps(record), flush=True)


@contextmanager
def _bar(what: str) -> Iterator[tuple[Callable[[Record], None], Callable[[str], None]]]:
    """A progress bar on a terminal, nothing elsewhere; gives what takes a job's progress, and what was found last."""
    if not show.console.is_terminal:
        yield lambda _: None, lambda _: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[part]}"))
    latest = Text("", style="dim", no_wrap=True, overflow="ellipsis")
    with Live(Group(), console=show.console, transient=True) as live:
        progress = Progress(*columns, TimeElapsedColumn(), console=show.console)
        live.update(Group(progress, latest))
        task = progress.add_task(what, total=None, part="")

        def told(data: Record) -> None:
            done, total = data.get("done"), data.get("total", data.get("of"))
            if done is not None and total:
                progress.update(task, completed=done, total=total, part=f"{done} of {total}")

        def found(line: str) -> None:
            latest.plain = line.replace("\n", " ")

        yield told, found
