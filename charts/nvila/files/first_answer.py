"""Ask one question about a video that is made here, and look at all of the answer: `helm test` runs it.

    first_answer.py URL [PATH]          API_KEY, TIMEOUT_S in the environment

PATH says when the gateway can be asked: /health/ready, or another where a pool may be empty until somebody asks.

The clip is a real MP4 file of a ball that crosses the picture, rendered with PyAV, the library that the gateway decodes
with; every run has another colour, so that the first question must really be encoded, and the second is about the same
clip, so that it must come from the cache where there is one. Exit status 0: both answers were whole.
"""

from __future__ import annotations

import base64
import io
import os
import secrets
import sys
import time

import av
import httpx
import numpy as np

FRAMES = 16
WIDTH_PX, HEIGHT_PX, FPS = 320, 240, 8


def main() -> int:
    url = sys.argv[1].rstrip("/")
    ready_path = sys.argv[2] if len(sys.argv) > 2 else "/health/ready"
    limit_s = float(os.environ.get("TIMEOUT_S", "300"))
    key = os.environ.get("API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    clip = "data:video/mp4;base64," + base64.b64encode(render(secrets.randbelow(1 << 24))).decode()
    with httpx.Client(base_url=url, headers=headers, timeout=limit_s, trust_env=False) as gateway:
        await_ready(gateway, ready_path, limit_s)
        model = gateway.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        first = ask(gateway, model, clip, "What moves in this video?")
        second = ask(gateway, model, clip, "Where does it go?")
    expect(first["frames_encoded"] == FRAMES, f"the first answer encoded {first['frames_encoded']} of {FRAMES} frames")
    print(f"ok: {model} answered; the second question took {second['frames_reused']} of {FRAMES} frames from the cache")
    return 0


def await_ready(gateway: httpx.Client, path: str, limit_s: float) -> None:
    until = time.monotonic() + limit_s / 2
    while True:
        answer = None
        try:
            answer = gateway.get(path)
            if answer.status_code == 200:
                return
        except httpx.TransportError as error:
            print(f"waiting: {error}")
        if time.monotonic() > until:
            raise SystemExit(f"the gateway is not ready: {answer.text if answer else 'it does not answer'}")
        time.sleep(1)


def ask(gateway: httpx.Client, model: str, clip: str, question: str) -> dict:
    """The coverage of the clip in the answer, once everything in it is as it should be."""
    trace_id = secrets.token_hex(16)
    answer = gateway.post(
        "/v1/chat/completions",
        headers={"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"},
        json={
            "model": model,
            "max_tokens": 32,
            "temperature": 0,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": clip, "num_frames": FRAMES}},
                        {"type": "text", "text": question},
                    ],
                }
            ],
        },
    )
    expect(answer.status_code == 200, f"status {answer.status_code}: {answer.text[:500]}")
    returned = answer.headers.get("traceparent", "")
    expect(trace_id in returned, f"the answer's traceparent is {returned!r}, the question's trace was {trace_id}")
    body = answer.json()
    text = body["choices"][0]["message"]["content"]
    expect(text.strip() != "", "the answer is empty")
    expect(body["usage"]["completion_tokens"] > 0, f"usage counts no answer: {body['usage']}")
    (coverage,) = body["coverage"]["media"]
    used = coverage["frames_encoded"] + coverage["frames_reused"]
    expect(used == FRAMES, f"coverage: the answer stands on {used} of {FRAMES} frames")
    expect(coverage["frames_dropped"] == 0, f"coverage: {coverage['frames_dropped']} frames dropped")
    print(f"{question} {text!r} (trace {trace_id})")
    return coverage


def render(colour: int) -> bytes:
    """An MP4 of `FRAMES` frames in which a ball of this colour goes from left to right."""
    file = io.BytesIO()
    y, x = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        for number in range(FRAMES):
            picture = np.full((HEIGHT_PX, WIDTH_PX, 3), 240, np.uint8)
            centre_px = 30 + number * (WIDTH_PX - 60) // (FRAMES - 1)
            picture[(x - centre_px) ** 2 + (y - HEIGHT_PX // 2) ** 2 < 900] = list(colour.to_bytes(3, "big"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise SystemExit(f"FAILED: {otherwise}")


if __name__ == "__main__":
    sys.exit(main())
