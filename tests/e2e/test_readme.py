"""The README's examples work as they are printed, given a clip that exists and that their windows fit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx

from nvila.cli.lifecycle import RunningStack
from tests.clips import BIKES
from tests.e2e.asking import data_url

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_example_for_python_runs(stack: RunningStack, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "clip.mp4").symlink_to(BIKES)
    example = example.replace('"start_s": 60, "end_s": 120', '"start_s": 2, "end_s": 6')
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "NVILA": stack.config.url, "KEY": stack.config.api_key},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "video_tokens=" in done.stdout
    assert "frames_decoded" in done.stdout


async def test_the_body_of_the_example_for_curl_is_answered_as_a_stream_with_usage(http: httpx.AsyncClient) -> None:
    (body,) = re.findall(r"curl \$NVILA(?:[^`']|'Content-Type[^']*')*-d '(.*?)'\n```", README, re.DOTALL)
    asked = json.loads(body.replace("https://example.com/clip.mp4", data_url(BIKES)))
    answer = await http.post("/v1/chat/completions", json={**asked, "max_tokens": 8})
    *_, last, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert (answer.status_code, done) == (200, "[DONE]")
    assert json.loads(last)["usage"]["prompt_tokens_details"]["video_tokens"] > 0
    assert json.loads(last)["coverage"]["media"][0]["frames_asked"] == asked["media_io_kwargs"]["video"]["num_frames"]
