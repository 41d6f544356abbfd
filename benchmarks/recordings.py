"""When things happen in a recording, and in which order: `python -m benchmarks.recordings`.

Draws a recording of minutes from the test split (`nvila.train.data.recording`), takes it in through a stack of its own
in chunks of 4 s at 8 frames a second (nvila-tiny's training clips last 4 to 12 s), and asks by the platform's jobs:

- *when* of every shape that is shown, and of as many that never are. Scored: the overlap (IoU) of the intervals that
  are found with those that are right, the share of questions at 0.5 and above; and of those that never happen, the
  share for which nothing is found.
- *order*: which of two colours comes first, in windows several times as long as a training clip. A model that guesses
  is right half the time; one that always names the first of the question, too.

Prints a table, or JSON (`--json`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvila.cli.checkpoint import find_model
from nvila.cli.client import Ask, GatewayClient
from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.recording_client import RecordingClient
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from nvila.train.data.recording import Shown, Story, overlap

POLICY = {"fps": 8.0, "chunk_s": 4.0}
ORDER_S = 48.0
"""Longest window of an order question: four times the longest clip of training."""
_QUIET_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a checkpoint's folder (default: what `nvila up` serves)")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--questions", type=int, default=20, help="of each kind, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stack = start(configure(name="bench", model=find_model(args.model)), StackFolder(folder / "stack"))
        try:
            story = Story.drawn(args.seed, 60 * args.minutes)
            found = measure(stack, story, folder / "recording.mp4", args.questions)
        finally:
            stack.stop()
    print(json.dumps(found, indent=2) if args.json else table(found))  # a command's result
    return 0


def measure(stack: RunningStack, story: Story, path: Path, questions: int) -> dict[str, Any]:
    """`path`: where the recording is written to."""
    story.write(path)
    with RecordingClient(stack.config.url, stack.config.api_key) as client:
        file_id = client.upload(path, lambda sent: None)
        source = {"type": "file", "file_id": file_id}
        recording = client.post("/v1/recordings", {"source": source, "policy": POLICY})["id"]
        while (shown := client.get(f"/v1/recordings/{recording}"))["state"] != "complete":
            assert shown["state"] != "failed", shown["error"]
            time.sleep(_QUIET_S)
        there = [_when(client, recording, name) for name in story.names[:questions]]
        absent = [_when(client, recording, name) for name in _spread(story.absent, questions)]
    ious = [overlap(one, story.times_of(name)) for one, name in zip(there, story.names, strict=False)]
    pairs = _spread(story.pairs(ORDER_S), questions)
    with GatewayClient(stack.config.url, stack.config.api_key) as gateway:
        orders = [_is_right(gateway, recording, *pair, is_turned=n % 2 == 1) for n, pair in enumerate(pairs)]
    return {
        "seconds": story.seconds,
        "shown": len(story.shown),
        "when": {
            "questions": len(ious),
            "mean_iou": sum(ious) / len(ious),
            "at_0.5": sum(iou >= 0.5 for iou in ious) / len(ious),
        },
        "absent": {"questions": len(absent), "nothing_found": sum(not one for one in absent) / len(absent)},
        "order": {
            "questions": len(orders),
            "right": sum(orders) / len(orders),
            "mean_window_s": sum(_window(*pair)[1] - _window(*pair)[0] for pair in pairs) / len(pairs),
        },
    }


def table(found: dict[str, Any]) -> str:
    when, absent, order = found["when"], found["absent"], found["order"]
    return (
        f"{found['seconds']:.0f} s, {found['shown']} things shown\n\n"
        "| asked | questions | |\n|---|---:|---|\n"
        f"| when, of what is shown | {when['questions']} | mean IoU {when['mean_iou']:.2f}; "
        f"{100 * when['at_0.5']:.0f} % at 0.5 and above |\n"
        f"| when, of what is never shown | {absent['questions']} | "
        f"nothing found for {100 * absent['nothing_found']:.0f} % |\n"
        f"| which of two is first, windows of {order['mean_window_s']:.0f} s | {order['questions']} | "
        f"{100 * order['right']:.0f} % right (guessing: 50 %) |"
    )


def _spread(things: Sequence[Any], most: int) -> list[Any]:
    """So many of them, evenly."""
    return [things[place * len(things) // most] for place in range(most)] if len(things) > most else list(things)


def _when(client: RecordingClient, recording: str, name: str) -> list[tuple[float, float]]:
    asked = {"kind": "when", "recording": recording, "params": {"question": f"When is the {name} visible?"}}
    job = client.post("/v1/jobs", asked)["id"]
    while (shown := client.get(f"/v1/jobs/{job}"))["state"] not in ("done", "failed", "cancelled"):
        time.sleep(_QUIET_S)
    assert shown["state"] == "done", shown["error"]
    return [(one["start_s"], one["end_s"]) for one in shown["result"]["intervals"]]


def _window(one: Shown, other: Shown) -> tuple[float, float]:
    return max(0.0, one.start_s - 0.5), other.end_s + 0.5


def _is_right(gateway: GatewayClient, recording: str, one: Shown, other: Shown, *, is_turned: bool) -> bool:
    """`is_turned`: the question names the later one first."""
    hues = [thing.name.split()[0] for thing in (one, other)]
    named = hues[::-1] if is_turned else hues
    start_s, end_s = _window(one, other)
    question = f"Which comes first: {named[0]} or {named[1]}?"
    part = {"type": "recording", "recording": {"id": recording, "start_s": start_s, "end_s": end_s}}
    *said, _ = gateway.ask_about(Ask(media=[], question=question, max_tokens=8), part)
    return "".join(map(str, said)).strip().casefold() == hues[0]


if __name__ == "__main__":
    sys.exit(main())
