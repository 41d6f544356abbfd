"""The deployment files, read for tests: compose layers with .env filled in, and Dockerfiles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
LAPTOP = ROOT / "docker-compose.yml"
GPU = ROOT / "deploy/compose/gpu.yml"
OBSERVABILITY = ROOT / "deploy/compose/observability.yml"
LAYERS = (LAPTOP, GPU, OBSERVABILITY)
IMAGES = ("gateway", "vision", "decode")
VARIABLE = re.compile(r"\$\{(\w+)(:?[?-][^}]*)?\}")


def env_file() -> dict[str, str]:
    lines = (ROOT / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose(path: Path) -> dict[str, Any]:
    """As Docker Compose reads it; variables that a person must give are the word `given`."""
    values = env_file()
    filled = VARIABLE.sub(lambda found: values.get(found[1], "given"), path.read_text())
    content: dict[str, Any] = yaml.safe_load(filled)
    return content


def services(*paths: Path) -> dict[str, dict[str, Any]]:
    """All services of these files, mappings merged one level deep (enough for what the layers add)."""
    merged: dict[str, dict[str, Any]] = {}
    for path in paths:
        for name, service in compose(path)["services"].items():
            into = merged.setdefault(name, {})
            for key, value in service.items():
                into[key] = {**into[key], **value} if isinstance(value, dict) and key in into else value
    return merged


@dataclass(frozen=True)
class Dockerfile:
    name: str
    lines: tuple[tuple[str, str], ...]
    """(instruction, rest), continuation lines joined."""

    @classmethod
    def read(cls, name: str) -> Dockerfile:
        text = (ROOT / f"deploy/images/{name}.Dockerfile").read_text()
        whole = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
        pairs = (line.split(None, 1) for line in whole.splitlines() if line.strip())
        return cls(name, tuple((pair[0], pair[1]) for pair in pairs))

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.lines if name == instruction]

    def final(self) -> list[tuple[str, str]]:
        """Of the last stage."""
        last = max(place for place, (name, _) in enumerate(self.lines) if name == "FROM")
        return list(self.lines[last + 1 :])

    def arguments(self) -> dict[str, str]:
        pairs = (rest.partition("=") for rest in self.all("ARG"))
        return {name: default for name, _, default in pairs}

    def ports(self) -> list[int]:
        return [int(port) for port in self.all("EXPOSE")[0].split()]
