"""What the HTTP routes use, and how they come by it: FastAPI dependencies on the app's typed lifespan state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from fastapi import Depends, Request

from nvila.gateway.admission import Admission
from nvila.gateway.auth import ApiKeys
from nvila.gateway.files import FileStore
from nvila.gateway.front import Front
from nvila.gateway.recordings import Recordings, kept
from nvila.gateway.scratch import Scratch
from nvila.gateway.uploads import Uploads
from nvila.telemetry.metrics import Metrics


class Health(Protocol):
    def reasons(self) -> Sequence[str]:
        """Why the gateway cannot answer now; empty when it can."""
        ...


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """`body_s`, `upload_s`: for a body to arrive. `push_bytes`: of one body of pushed video. `heartbeat_s`: between
    comments in a silent stream."""

    body_bytes: int
    upload_bytes: int
    body_s: float
    upload_s: float
    push_bytes: int = 64 << 30
    heartbeat_s: float = 10.0
    docs: bool = True
    console: bool = True


@dataclass(frozen=True, kw_only=True)
class Services:
    """What the routes use; made by `app.py`, kept in the app's lifespan state. `uploads`: permits, of both kinds;
    `streams`: of what lasts as long as the client likes, pushed video and followed jobs. `recorded`: None where no
    recordings are kept."""

    keys: ApiKeys
    front: Front
    files: FileStore
    scratch: Scratch
    uploads: Admission
    resumable: Uploads
    recorded: Recordings | None
    streams: Admission
    health: Health
    metrics: Metrics

    @property
    def recordings(self) -> Recordings:
        """Raises `NotFound` where none are kept."""
        return kept(self.recorded)


def _services(request: Request) -> Services:
    services: Services = request.state.services
    return services


def _tenant(request: Request) -> str:
    tenant: str = request.state.tenant
    return tenant


Having = Annotated[Services, Depends(_services)]
Tenant = Annotated[str, Depends(_tenant)]
