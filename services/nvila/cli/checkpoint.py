"""Which checkpoint a stack serves: the one that was named; else nvila-tiny, which lies in the project's folder; else,
where nvila was installed without it, a tiny one with random weights, made on first use."""

from __future__ import annotations

from pathlib import Path

import nvila
from nvila.cli.state import home
from nvila.errors import InvalidRequest
from nvila.model import hub

NVILA_TINY = Path(nvila.__file__).resolve().parents[2] / "models" / "nvila-tiny"


def find_model(named: str | None) -> Path:
    """The checkpoint's folder; a hub id is fetched. Raises `InvalidRequest` when it was named and is none."""
    if named is None:
        return NVILA_TINY if (NVILA_TINY / "config.json").is_file() else random_model()
    folder = Path(named).expanduser()
    if not folder.exists() and hub.is_id(named):
        return hub.locate(named)
    if not any((folder / place).is_file() for place in ("config.json", "model/config.json")):
        raise InvalidRequest(f"--model {named}: not a checkpoint folder, there is no config.json in it")
    return folder


def random_model() -> Path:
    """A deterministic tiny checkpoint with random weights. Making it takes a few seconds, once."""
    folder = home() / "models" / "random-tiny"
    if not (folder / "config.json").is_file():
        from nvila.cli.show import console, waiting  # heavy, and only needed here
        from nvila.model.tiny import make_random_checkpoint

        beside = folder.with_name(f".{folder.name}.new")
        with waiting("making a tiny checkpoint with random weights (first use)"):
            beside.parent.mkdir(parents=True, exist_ok=True)
            make_random_checkpoint(beside)
            beside.rename(folder)
        console.print("[dim]made a tiny checkpoint with random weights: [bold]its words mean nothing[/][/]")
    return folder
