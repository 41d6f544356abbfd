"""A real Triton over TLS: callers with a certificate of its authority are served, nobody else is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from nvila.gateway.tls import channel_credentials
from nvila.model.checkpoint import Checkpoint
from nvila.types import Deadline
from nvila.vision.client import VisionClient
from tests.certificates import make_certificate
from tests.vision.chunks import ref_of, video_chunk, video_settings
from tests.vision.triton_server import TritonServer


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint, certificate: Path
) -> Iterator[TritonServer]:
    environment = {"NVILA_VISION_MODEL": str(checkpoint.path)}
    made = TritonServer(tmp_path_factory.mktemp("triton"), environment, certificate)
    made.start()
    yield made
    made.stop()


async def test_a_chunk_is_encoded_for_a_caller_with_a_certificate(
    server: TritonServer, certificate: Path, checkpoint: Checkpoint
) -> None:
    client = VisionClient(server.url, credentials=channel_credentials(certificate))
    chunk, settings = video_chunk(checkpoint, 8), video_settings(checkpoint)
    assert await client.ready()
    encoded = await client.encode(
        chunk, ref_of(checkpoint, chunk, settings), settings, want_inline=True, deadline=Deadline.after(30)
    )
    await client.close()
    assert encoded.inline is not None


async def test_nobody_else_is_served(
    server: TritonServer, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    strangers = make_certificate(tmp_path_factory.mktemp("strangers"))
    (strangers / "ca.crt").write_bytes((certificate / "ca.crt").read_bytes())
    without = grpc.ssl_channel_credentials((certificate / "ca.crt").read_bytes())
    for credentials in (None, without, channel_credentials(strangers)):
        client = VisionClient(server.url, credentials=credentials)
        assert not await client.ready()
        await client.close()
