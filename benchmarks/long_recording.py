"""Hours of video through every part: `python -m benchmarks.long_recording`.

Makes a recording of a real clip's H.264 packets (every seventh repeat at half its rate, noise over half a percent of
the bytes in the middle), uploads it to a stack of its own, and takes it in

- *first*, and *again*, which is to encode nothing;
- *killed*: at another sampling rate, while parts are killed one after the other, in an order drawn from `--seed`;
- *undisturbed*: like that without a kill. Its chunks are to be those of the killed one.

Between the passes it asks about windows: short, across the damage, long, whole. Prints speed, frames, gaps, and the
resident memory of every process over all of it, as a table, a picture (`--plot`) and JSON (`--json`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ingest import say, write_busy
from nvila.cli.checkpoint import find_model
from nvila.cli.client import Ask, GatewayClient
from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.recording_client import Record, RecordingClient
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from nvila.errors import NvilaError, Unavailable

KILLED = ("recordings", "cache", "vision", "gateway", "decode")
SLOW_EVERY = 7
DAMAGED = 0.005
_LOOK_S = 0.5
_PART_BACK_S = 180.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--model", help="a checkpoint's folder (default: what `nvila up` serves)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of kills")
    parser.add_argument("--plot", type=Path, help="a picture of memory over time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as name:
        folder = Path(name)
        say("making the recording")
        path = write_long(folder / "long.mp4", 3600 * args.hours)
        stack = start(configure(name="bench", model=find_model(args.model)), StackFolder(folder / "stack"))
        try:
            with watched(stack) as memory:
                found = measure(stack, path, random.Random(args.seed)) | {"memory_mib": memory}
        finally:
            stack.stop()
    if args.plot:
        draw(found, args.plot)
    print(json.dumps(found) if args.json else table(found))  # a command's result
    return 0


def write_long(path: Path, seconds: float) -> Path:
    write_busy(path, seconds, slow_every=SLOW_EVERY)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(random.Random(0).randbytes(round(size * DAMAGED)))
    return path


# -- what is done -----------------------------------------------------------------------------------------------------


def measure(stack: RunningStack, path: Path, chance: random.Random) -> dict[str, Any]:
    with RecordingClient(stack.config.url, stack.config.api_key) as client:
        began = time.monotonic()
        file_id = client.upload(path, lambda sent: None)
        upload_s = time.monotonic() - began
        passes = {"first": _pass(client, file_id, 1.0)}
        asked = _ask(stack, passes["first"])
        passes["again"] = _pass(client, file_id, 1.0)
        passes["killed"] = _pass(client, file_id, 0.9, stack, chance)
        passes["undisturbed"] = _pass(client, file_id, 0.9)
        killed, undisturbed = (_chunks(client, passes[name]["id"]) for name in ("killed", "undisturbed"))
    return {
        "size_bytes": path.stat().st_size,
        "upload_s": upload_s,
        "passes": passes,
        "asked": asked,
        "killed_as_undisturbed": killed == undisturbed,
        "chunks": len(killed),
    }


def _pass(
    client: RecordingClient,
    file_id: str,
    fps: float,
    stack: RunningStack | None = None,
    chance: random.Random | None = None,
) -> dict[str, Any]:
    """One time through the file; with a stack, parts of it are killed on the way, each when the one before is back."""
    say(f"taking it in at {fps:g} frames a second" + (", with kills" if stack else ""))
    began = time.monotonic()
    recording = client.post("/v1/recordings", {"source": {"type": "file", "file_id": file_id}, "policy": {"fps": fps}})
    left = chance.sample(KILLED, len(KILLED)) if stack and chance else []
    killed: list[str] = []
    while (shown := _look(client, recording["id"]))["state"] != "complete":
        if shown["state"] == "failed":
            raise NvilaError(f"the recording failed: {shown['error']}")
        if stack and left and shown.get("counters", {}).get("chunks", 0) > len(killed) and _are_ready(stack):
            part = left.pop()
            say(f"killing {part}")
            killed.append(part)
            os.kill(_process(stack, part).pid, signal.SIGKILL)
        time.sleep(_LOOK_S)
    seconds = time.monotonic() - began
    if stack:
        _await_ready(stack)
    return {
        "id": recording["id"],
        "seconds": seconds,
        "duration_s": shown["duration_s"],
        "counters": shown["counters"],
        "gaps": client.get(f"/v1/recordings/{recording['id']}/coverage")["gaps"],
        "killed": killed,
    }


def _look(client: RecordingClient, recording: str) -> Record:
    try:
        return client.get(f"/v1/recordings/{recording}")
    except NvilaError:  # a part that was killed
        return {"state": "unknown"}


def _chunks(client: RecordingClient, recording: str) -> list[Record]:
    every = client.every(f"/v1/recordings/{recording}/chunks", limit=1_000_000)
    return [{name: value for name, value in one.items() if name != "thumbnail"} for one in every]


def _ask(stack: RunningStack, taken: dict[str, Any]) -> list[dict[str, Any]]:
    length = taken["duration_s"]
    middle = taken["gaps"][0]["start_s"] if taken["gaps"] else length / 2
    windows = {
        "32 s": (0.0, 32.0),
        "90 s across the damage": (middle - 30, middle + 60),
        "10 min": (length / 4, length / 4 + 600),
        "all of it": (0.0, length),
    }
    asked = []
    with GatewayClient(stack.config.url, stack.config.api_key) as gateway:
        for name, (start_s, end_s) in windows.items():
            bounds = {"start_s": max(0.0, start_s), "end_s": min(length, end_s)}
            part = {"type": "recording", "recording": {"id": taken["id"], **bounds}}
            began = time.monotonic()
            *words, _ = gateway.ask_about(Ask(media=[], question="What happens?", max_tokens=16), part)
            said = "".join(map(str, words))
            asked.append({"window": name, **bounds, "seconds": time.monotonic() - began, "answer": said})
    return asked


# -- parts and their memory -------------------------------------------------------------------------------------------


def _process(stack: RunningStack, part: str) -> psutil.Process:
    state = stack.folder.read()
    process = state.parts[part].process if state else None
    if process is None:
        raise Unavailable(f"{part} does not run")
    return psutil.Process(process.pid)


def _are_ready(stack: RunningStack) -> bool:
    state = stack.folder.read()
    return state is not None and all(part.phase.value == "ready" for part in state.parts.values())


def _await_ready(stack: RunningStack) -> None:
    deadline = time.monotonic() + _PART_BACK_S
    while not _are_ready(stack):
        if time.monotonic() > deadline:
            raise NvilaError(f"the parts were not all back {_PART_BACK_S:.0f} s after a kill")
        time.sleep(_LOOK_S)


def resident_mib(stack: RunningStack, part: str) -> float:
    """Of a part and its children."""
    process = _process(stack, part)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20


@contextmanager
def watched(stack: RunningStack) -> Iterator[dict[str, list[tuple[float, float]]]]:
    """Resident MiB of each part, its children among it, by seconds since the beginning."""
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    stopped, began = threading.Event(), time.monotonic()

    def look() -> None:
        state = stack.folder.read()
        for part in state.parts if state else ():
            with suppress(psutil.NoSuchProcess, Unavailable):  # a part that was killed
                seen[part].append((time.monotonic() - began, resident_mib(stack, part)))

    def keep_looking() -> None:
        while not stopped.wait(2 * _LOOK_S):
            look()

    thread = threading.Thread(target=keep_looking, name="memory")
    thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        thread.join()


# -- what is shown ----------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['size_bytes'] / 2**20:.0f} MiB, uploaded in {found['upload_s']:.0f} s",
        "",
        "| pass | seconds | × real time | sampled | encoded | reused | static | lost | gaps |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, one in found["passes"].items():
        told = "; ".join(f"{gap['start_s']:.0f}–{gap['end_s']:.0f} s: {gap['reason']}" for gap in one["gaps"]) or "–"
        numbers = [one["counters"][f"frames_{what}"] for what in ("sampled", "encoded", "reused", "static", "corrupt")]
        row = [name, f"{one['seconds']:.0f}", f"{one['duration_s'] / one['seconds']:.0f}", *map(str, numbers), told]
        lines.append(f"| {' | '.join(row)} |")
    same = "are" if found["killed_as_undisturbed"] else "ARE NOT"
    lines += [
        "",
        f"killed, in this order: {', '.join(found['passes']['killed']['killed'])}; "
        f"its {found['chunks']} chunks {same} those of the undisturbed pass",
        "",
        "| asked about | seconds |",
        "|---|---:|",
        *(f"| {one['window']} | {one['seconds']:.1f} |" for one in found["asked"]),
        "",
        "| resident MiB, children included | after 30 s | half-way | at the end |",
        "|---|---:|---:|---:|",
    ]
    for name, seen in found["memory_mib"].items():
        early = next((mib for at, mib in seen if at >= 30), seen[-1][1])
        lines.append(f"| {name} | {early:.0f} | {seen[len(seen) // 2][1]:.0f} | {seen[-1][1]:.0f} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, seen in found["memory_mib"].items():
        axes.plot([at / 60 for at, _ in seen], [mib for _, mib in seen], label=name)
    axes.set(xlabel="minutes", ylabel="resident MiB", yscale="log", title="Memory of each part, its children included")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
