"""Names for what the cache holds: 256-bit BLAKE3 digests over content, everything that shapes the tokens, and tenant.

A key never contains a URL or a client's id: what is behind a URL changes, and one client's id could name another
client's media. The tenant is part of every key, so tenants share nothing, not even timing. Each field is hashed with
its length before it, so no two different sets of fields have the same byte form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nvila.types import EncodeSettings, VideoSampling

SCHEMA_VERSION = 1
"""Raised whenever the layout of a record, a plan or a key changes, or the model code computes other tokens from the
same inputs: releases that disagree then never read each other's records."""

_PIXEL_FORMAT = b"rgb24"


def content_digest(frames_FHWC: NDArray[np.uint8]) -> bytes:
    """Digest (32 bytes) of a chunk's pixels: shape, format and bytes.

    frames_FHWC: uint8 RGB, (frames, rows, columns, 3). The shape is hashed because 30x150 and 150x30 pixels can be the
    same bytes.
    """
    assert frames_FHWC.dtype == np.uint8, frames_FHWC.dtype
    assert frames_FHWC.ndim == 4, frames_FHWC.shape
    assert frames_FHWC.shape[3] == 3, frames_FHWC.shape
    shape = np.asarray(frames_FHWC.shape, dtype="<u8").tobytes()
    digest = blake3(_framed(_PIXEL_FORMAT, shape), derive_key_context="nvila content digest")
    digest.update(np.ascontiguousarray(frames_FHWC).reshape(-1).data)
    return digest.digest()


def record_key(digest: bytes, settings: EncodeSettings, tenant: str) -> str:
    """Key (64 hex digits) of the visual tokens of the chunk with this content digest.

    Sampling and resizing are in the digest, which is taken of the sampled, resized pixels.
    """
    return _key("nvila record key", _checked(digest), settings.canonical(), tenant.encode())


def plan_key(
    source_digest: bytes, sampling: VideoSampling, chunk_frames: int, settings: EncodeSettings, tenant: str
) -> str:
    """Key (64 hex digits) of what is remembered about a whole file: which records these frames of it gave.

    source_digest: BLAKE3 of the file's bytes, 32 bytes. chunk_frames: the largest chunk it was cut into. It lets a
    second question about the same file skip decoding.
    """
    bounds = (sampling.num_frames, sampling.fps, sampling.start_s, sampling.end_s, chunk_frames)
    plan = "|".join("" if bound is None else repr(bound) for bound in bounds)
    return _key("nvila plan key", _checked(source_digest), plan.encode(), settings.canonical(), tenant.encode())


def settings_key(settings: EncodeSettings) -> str:
    """Key (64 hex digits) of settings themselves: records of equal ones can be told apart by their pixels alone."""
    return _key("nvila encode settings", settings.canonical())


def renamed_key(key: str, settings: EncodeSettings) -> str:
    """Key (64 hex digits) of what these settings make of the frames whose record under others has `key`. It is known
    without the frames, and the tenant is in it, as in `key`."""
    return _key("nvila renamed record key", bytes.fromhex(key), settings.canonical())


def pooled_key(keys: Sequence[str]) -> str:
    """Key (64 hex digits) of the average of these records, in this order; the tenant is in theirs."""
    return _key("nvila pooled record key", *(bytes.fromhex(key) for key in keys))


def _key(context: str, *fields: bytes) -> str:
    version = SCHEMA_VERSION.to_bytes(4, "little")
    return blake3(_framed(version, *fields), derive_key_context=context).hexdigest()


def _framed(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)


def _checked(digest: bytes) -> bytes:
    assert len(digest) == 32, f"a digest has 32 bytes, not {len(digest)}"
    return digest
