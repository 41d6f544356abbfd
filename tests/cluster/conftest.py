"""A kubeconfig that leads to a server of the test's own, and the command line run in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from nvila.cli.main import main
from tests.cluster.kube_server import State, kubeconfig, serve


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def finding(self, text: str) -> dict[str, str]:
        """The one finding of the doctor that says this."""
        found = [one for one in self.json["findings"] if text in one["what"]]
        assert len(found) == 1, (text, [one["what"] for one in self.json["findings"]])
        return dict(found[0])


class Run(Protocol):
    def __call__(self, state: State | None, *words: str, token: str = ...) -> Outcome: ...


@pytest.fixture
def nvila(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`nvila(state, "doctor", "--json")`: `nvila cluster doctor --json` against a server that holds this state."""
    with ExitStack() as servers:
        running: dict[int, str] = {}

        def run(state: State | None, *words: str, token: str = "token-of-the-tests") -> Outcome:
            if state is not None and id(state) not in running:
                running[id(state)] = servers.enter_context(serve(state))
            address = running[id(state)] if state is not None else "http://127.0.0.1:9"
            config = kubeconfig(tmp_path / "kubeconfig", address, token)
            capsys.readouterr()
            code = main(["cluster", words[0], "--kubeconfig", str(config), *words[1:]])
            return Outcome(code, *capsys.readouterr())

        yield run
