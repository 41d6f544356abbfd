"""Recordings and jobs as the command line sees them: resumable uploads, lists, and events that go on after a break."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx

from nvila.cli.client import error_of
from nvila.errors import Conflict, DeadlineExceeded, NvilaError, Overloaded, Unavailable, from_wire

_PIECE_BYTES = 8 << 20
_TUS = {"Tus-Resumable": "1.0.0"}
_PATIENCE = 8
_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_AGAIN = (Unavailable, DeadlineExceeded, Overloaded, Conflict)

Record = dict[str, Any]


class RecordingClient:
    def __init__(self, url: str, api_key: str, *, pause_s: float = _PAUSE_S) -> None:
        self._url = url
        self._pause_s = pause_s
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(60, connect=5),
            trust_env=not url.startswith("http://127.0.0.1"),  # no proxy stands before this machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    # -- plain calls

    def get(self, path: str, **query: Any) -> Record:
        given = {name: value for name, value in query.items() if value is not None}
        return self._json(self._send("GET", path, params=given))

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None) -> Record:
        headers = {"Idempotency-Key": key} if key else {}
        return self._json(self._send("POST", path, json=body, headers=headers))

    def delete(self, path: str) -> Record:
        return self._json(self._send("DELETE", path))

    def every(self, path: str, *, limit: int, **query: Any) -> Iterator[Record]:
        """Up to `limit` of a list, over as many pages as it takes."""
        cursor = None
        while limit > 0:
            page = self.get(path, limit=min(limit, 1000), cursor=cursor, **query)
            yield from page["data"]
            limit -= len(page["data"])
            cursor = page["next_cursor"]
            if cursor is None:
                return

    # -- uploads

    def upload(self, path: Path, on_progress: Callable[[int], None]) -> str:
        """The id of the file that it has become. A broken connection is taken up again where it broke."""
        size = path.stat().st_size
        name = base64.b64encode(path.name.encode()).decode()
        headers = {**_TUS, "Upload-Length": str(size), "Upload-Metadata": f"filename {name}"}
        made = self._send("POST", "/v1/uploads", headers=headers)
        url, offset = made.headers["location"], 0
        failures = 0
        with path.open("rb") as file:
            while True:
                file.seek(offset)
                try:
                    answer: httpx.Response | None = self._send_piece(url, offset, file.read(_PIECE_BYTES))
                    failures = 0
                except _AGAIN as error:
                    failures += 1
                    if failures > _PATIENCE:
                        raise
                    time.sleep(max(error.retry_after_s or 0, self._pause(failures)))
                    answer = self._looked(url)
                if answer is None:
                    continue
                offset = int(answer.headers["upload-offset"])
                on_progress(offset)
                if file_id := answer.headers.get("nvila-file-id"):
                    return str(file_id)

    def _send_piece(self, url: str, offset: int, data: bytes) -> httpx.Response:
        headers = {**_TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
        return self._send("PATCH", url, content=data, headers=headers)

    def _looked(self, url: str) -> httpx.Response | None:
        try:
            return self._send("HEAD", url, headers=_TUS)
        except _AGAIN:
            return None

    # -- jobs

    def follow(self, job_id: str) -> Iterator[tuple[str, Record]]:
        """What a job says until it is over: (kind, data). A broken connection goes on after the last event seen.

        Raises `Unavailable` when the gateway stays away."""
        last, failures = "0", 0
        while True:
            try:
                with self._stream(f"/v1/jobs/{job_id}/events", after=last) as answer:
                    if answer.status_code == 204:
                        return
                    for number, kind, data in _events(answer):
                        last, failures = number, 0
                        yield kind, data
            except _AGAIN:
                failures += 1
                if failures > _PATIENCE:
                    raise
            time.sleep(self._pause(failures))

    def lines(self, path: str) -> Iterator[str]:
        """JSON lines as they come. Raises the error that the last one may be."""
        with self._stream(path) as answer:
            for line in answer.iter_lines():
                told: Record = json.loads(line)
                if told["kind"] == "error":
                    raise from_wire(told["error"]["code"], told["error"]["message"])
                yield line

    # -- the wire

    def _pause(self, failures: int) -> float:
        return min(self._pause_s * 2.0**failures, _LONGEST_PAUSE_S)

    @contextmanager
    def _stream(self, path: str, **query: str) -> Iterator[httpx.Response]:
        with self._errors(), self._http.stream("GET", path, params=query) as answer:
            if answer.status_code >= 400:
                answer.read()
                raise error_of(answer)
            yield answer

    def _send(self, method: str, path: str, **sent: Any) -> httpx.Response:
        with self._errors():
            answer = self._http.request(method, path, **sent)
        if answer.status_code >= 400:
            raise error_of(answer)
        return answer

    @staticmethod
    def _json(answer: httpx.Response) -> Record:
        found: Record = answer.json()
        return found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise DeadlineExceeded(f"no answer from {self._url} in time") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"no gateway answers at {self._url}: {error}") from None


def _events(answer: httpx.Response) -> Iterator[tuple[str, str, Record]]:
    number, kind = "0", ""
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            number = value
        elif name == "event":
            kind = value
        elif name == "data":
            data = json.loads(value)
            if kind == "error":
                raise _told(data)
            yield number, kind, data


def _told(data: Record) -> NvilaError:
    error: Record = data.get("error") or {}
    return Unavailable(str(error.get("message") or "the stream broke off"))
