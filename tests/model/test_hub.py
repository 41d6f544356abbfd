"""Hub ids, against a small server that speaks the hub's protocol on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nvila.errors import InvalidCheckpoint, Unavailable
from nvila.model import hub
from nvila.model.checkpoint import Checkpoint
from tests.model.conftest import GOLDEN

SOURCE = GOLDEN / "e2e" / "nvila-tiny-lite"
REPO, COMMIT = "organisation/nvila-tiny-lite", "0123456789abcdef0123456789abcdef01234567"
EXTRA = {"modeling_vila.py": b"raise SystemExit", "llm/pytorch_model.bin": b"\x80\x02", "README.md": b"# read me"}


class Hub(ThreadingHTTPServer):
    """One repository with one commit. `asked`: paths in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[str] = []
        self.files = {str(p.relative_to(SOURCE)): p.read_bytes() for p in SOURCE.rglob("*") if p.is_file()} | EXTRA

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.server.asked.append(self.path)
        body, headers, status = b"", {}, 404
        file = self.path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if self.path in (f"/api/models/{REPO}/revision/{name}" for name in ("main", COMMIT)):
            body, status = json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode(), 200
        elif self.path.startswith(f"/api/models/{REPO}/tree/{COMMIT}?"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            body, status = json.dumps(listed).encode(), 200
        elif self.path.startswith(f"/api/models/{REPO}/revision/"):
            headers = {"X-Error-Code": "RevisionNotFound"}
        elif self.path.startswith("/api/models/"):
            headers = {"X-Error-Code": "RepoNotFound"}
        elif file in self.server.files:
            body, status = self.server.files[file], 200
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not on stderr."""


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_an_id_brings_configuration_tokenizer_and_safetensors_and_no_code_or_pickle(
    server: Hub, tmp_path: Path
) -> None:
    folder = hub.locate(REPO, tmp_path, server.url)
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    assert there == set(server.files) - {"modeling_vila.py", "llm/pytorch_model.bin"}
    opened = Checkpoint.open(folder)
    assert opened.name == REPO
    assert opened.vision_revision == Checkpoint.open(SOURCE).vision_revision


def test_a_pinned_commit_is_taken_from_the_cache_without_asking(server: Hub, tmp_path: Path) -> None:
    first = hub.locate(f"{REPO}@{COMMIT}", tmp_path, server.url)
    server.asked.clear()

    assert hub.locate(f"{REPO}@{COMMIT}", tmp_path, server.url) == first
    assert server.asked == []


def test_without_network_a_cached_model_is_used_and_another_is_an_error_that_says_so(
    server: Hub, tmp_path: Path
) -> None:
    cached = hub.locate(REPO, tmp_path, server.url)
    nowhere = "http://127.0.0.1:9"

    assert hub.locate(REPO, tmp_path, nowhere) == cached
    with pytest.raises(Unavailable, match="'organisation/other' is no folder here and not in the local hub cache"):
        hub.locate("organisation/other", tmp_path, nowhere)


def test_unknown_models_and_revisions_are_told_apart(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="no model 'organisation/other'"):
        hub.locate("organisation/other", tmp_path, server.url)
    with pytest.raises(InvalidCheckpoint, match=f"no revision 'v9' of '{REPO}'"):
        hub.locate(f"{REPO}@v9", tmp_path, server.url)


@pytest.mark.parametrize("named", ["../secrets", "a/b/c", "/no/such/folder", "name", ""])
def test_what_is_no_id_is_a_folder_that_is_not_there(named: str, tmp_path: Path) -> None:
    assert not hub.is_id(named)
    with pytest.raises(InvalidCheckpoint, match="no folder"):
        hub.locate(named or "none", tmp_path)


def test_a_folder_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "organisation" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert hub.locate("organisation/name") == tmp_path / "organisation" / "name"
