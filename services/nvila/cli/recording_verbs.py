"""What can be typed for `nvila recordings` and `nvila jobs`; the work is in the modules of their names."""

from __future__ import annotations

import argparse
from pathlib import Path


def recordings(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add(actions.add_parser("add", help="from a file, an address, a camera, or to be pushed to"))
    listing = actions.add_parser("list", help="all recordings, newest first")
    listing.add_argument("--state", metavar="STATE", help="waiting, ingesting, live, interrupted, complete or failed")
    listing.add_argument("--limit", type=int, default=100, metavar="N", help="at most so many (%(default)s)")
    shown = actions.add_parser("show", help="one recording: state, coverage, counters")
    shown.add_argument("-f", "--follow", action="store_true", help="until it is complete")
    ask = actions.add_parser("ask", help="a question, answered as it comes")
    ask.add_argument("--job", action="store_true", help="as a job, even if one request would do")
    ask.add_argument("--relevant", type=int, metavar="N", help="only of the N chunks most like it (then as a job)")
    ask.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="what takes longer is a job (%(default)s s)"
    )
    summary = actions.add_parser("summarize", help="a summary, with its times, as it grows")
    when = actions.add_parser("when", help="when something happens")
    timeline = actions.add_parser("timeline", help="a timeline of events")
    watch = actions.add_parser("watch", help="a standing question on what comes; each yes is told, and calls a webhook")
    watch.add_argument("--webhook", metavar="URL", help="to be called")
    watch.add_argument("--secret", metavar="TEXT", help="that calls are signed with")
    export = actions.add_parser("export", help="what its last finished job found, as JSON lines")
    export.add_argument("--kind", choices=["ask", "summary", "timeline", "when", "watch"], help="of jobs of this kind")
    export.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: standard output")
    delete = actions.add_parser("delete", help="forget recordings and all that was found in them")
    delete.add_argument("id", nargs="+", metavar="RECORDING")
    for action in (shown, ask, summary, when, timeline, watch, export):
        action.add_argument("id", metavar="RECORDING")
    for action in (ask, when, watch):
        action.add_argument("question")
    for action in (ask, summary, when, timeline):
        _window(action)
    for action in (ask, summary):
        action.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    for action in (summary, when, timeline, watch):
        action.add_argument("-d", "--detach", action="store_true", help="print the job's id and return")
    for action in (ask, summary, when, timeline, watch):
        action.add_argument("--idempotency-key", metavar="KEY", help="submit once, however often this is typed")
    for action in actions.choices.values():
        _common(action)


def _add(add: argparse.ArgumentParser) -> None:
    add.add_argument("source", metavar="SOURCE", help="file · http(s), s3, … address · rtsp://… · ….m3u8 · push")
    add.add_argument("--name", metavar="NAME", help="default: the file's name, or the address")
    add.add_argument("--username", metavar="USER", help="of a camera; its password is asked for")
    add.add_argument("--captured-at", type=float, metavar="T", help="capture time of the first frame, s since 1970")
    add.add_argument("--fps", type=float, metavar="X", help="sampled frames per second (1)")
    add.add_argument("--chunk", type=float, metavar="S", help="length of a chunk (32 s)")
    add.add_argument("--stride", type=float, metavar="S", help="from chunk to chunk: overlap or gap (the length)")
    add.add_argument("--no-gate", action="store_true", help="encode near-identical frames of still scenes, too")
    add.add_argument("--meta", action="append", default=[], metavar="NAME=VALUE", help="kept with it")
    add.add_argument("--wait", action="store_true", help="until it is complete")
    add.add_argument("--idempotency-key", metavar="KEY", help="add once, however often this is typed")


def jobs(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all jobs, newest first")
    listing.add_argument("--recording", metavar="RECORDING", help="about this one only")
    listing.add_argument("--kind", metavar="KIND", help="ask, summary, timeline, when, watch, ingest, delete, deliver")
    listing.add_argument("--state", metavar="STATE", help="queued, running, done, failed or cancelled")
    listing.add_argument("--limit", type=int, default=100, metavar="N", help="at most so many (%(default)s)")
    for name, said in (
        ("show", "one job: state, progress, result"),
        ("follow", "what it says, as it says it, from the beginning"),
        ("cancel", "stop it"),
        ("retry", "queue it again, after it failed or was cancelled"),
    ):
        actions.add_parser(name, help=said).add_argument("id", metavar="JOB")
    for action in actions.choices.values():
        _common(action)


def _window(action: argparse.ArgumentParser) -> None:
    action.add_argument("--start", metavar="T", help="from here: seconds, or 1:04:16 (default: the beginning)")
    action.add_argument("--end", metavar="T", help="to here (default: as far as it is ingested)")


def _common(action: argparse.ArgumentParser) -> None:
    action.add_argument("--stack", default="default", metavar="NAME", help="which stack (default: %(default)s)")
    action.add_argument("--url", help="a gateway elsewhere, such as http://host:8000")
    action.add_argument("--api-key", metavar="KEY", help="its API key")
    action.add_argument("--json", action="store_true", help="print JSON, for programs")
