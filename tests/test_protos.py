"""Generated code is what protos/ says, and protos/ say what every field holds."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))


def test_generated_code_is_what_the_protos_give(tmp_path: Path) -> None:
    sources = [str(path.relative_to(ROOT / "protos")) for path in PROTOS]
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *out, *sources],
        check=True,
        capture_output=True,
    )
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    kept = {path: (ROOT / "services" / path).read_text() for path in made}
    assert made
    assert made == kept, "run `make protos`"


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_every_service_message_rpc_enum_and_field_is_explained(path: Path) -> None:
    lines = [line.strip() for line in path.read_text().splitlines()]
    said = re.compile(r"(message|enum|rpc|service|oneof) \w+|(repeated |optional |map<.*> )?[\w.]+ \w+ = \d+;")
    bare = [now for before, now in pairwise(lines) if said.match(now) and before[:2] != "//"]
    assert bare == []
