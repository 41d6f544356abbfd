"""Keys: equal for equal work, different for anything else."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nvila.cache.keys import content_digest, plan_key, record_key
from nvila.types import EncodeSettings, MediaKind, TokenDtype, VideoSampling

DIGEST = bytes(range(32))

settings_strategy = st.builds(
    EncodeSettings,
    kind=st.sampled_from(MediaKind),
    is_tiled=st.booleans(),
    pool_sizes=st.lists(st.tuples(*[st.integers(1, 64)] * 3), max_size=3).map(tuple),
    token_dtype=st.sampled_from(TokenDtype),
    vision_revision=st.text(max_size=6),
)
sampling_strategy = st.builds(
    VideoSampling,
    num_frames=st.none() | st.integers(1, 256),
    fps=st.none() | st.floats(0.01, 60),
    start_s=st.none() | st.floats(0, 1e4),
    end_s=st.none() | st.floats(0, 1e4),
)


def _frames(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_the_same_bytes_in_another_shape_have_another_digest() -> None:
    flat = _frames(1, 30, 150, 3).reshape(-1)
    shapes = [s for s in itertools.permutations((1, 30, 150)) if s[0] in (1, 30)]
    digests = {content_digest(flat.reshape(*shape, 3)) for shape in shapes}
    assert len(digests) == len(shapes)


def test_memory_order_of_the_array_does_not_change_the_digest() -> None:
    frames = _frames(2, 5, 7, 3)
    assert content_digest(np.asfortranarray(frames)) == content_digest(frames)


@given(st.integers(0, 2 * 4 * 6 * 3 - 1), st.integers(0, 7))
def test_one_flipped_bit_changes_the_digest(position: int, bit: int) -> None:
    frames = _frames(2, 4, 6, 3)
    flipped = frames.copy()
    flipped.reshape(-1)[position] ^= 1 << bit
    assert content_digest(flipped) != content_digest(frames)


@given(settings_strategy, settings_strategy, st.text(max_size=6), st.text(max_size=6))
def test_record_keys_are_equal_only_when_settings_and_tenant_are(
    a: EncodeSettings, b: EncodeSettings, tenant_a: str, tenant_b: str
) -> None:
    same = record_key(DIGEST, a, tenant_a) == record_key(DIGEST, b, tenant_b)
    assert same == ((a, tenant_a) == (b, tenant_b))


@given(sampling_strategy, sampling_strategy, st.integers(1, 64), st.integers(1, 64))
def test_plan_keys_are_equal_only_when_sampling_and_chunking_are(
    a: VideoSampling, b: VideoSampling, chunk_a: int, chunk_b: int
) -> None:
    settings = EncodeSettings(
        kind=MediaKind.VIDEO, is_tiled=False, pool_sizes=((8, 1, 1),), token_dtype=TokenDtype.INT8, vision_revision="r"
    )
    key_a, key_b = plan_key(DIGEST, a, chunk_a, settings, "t"), plan_key(DIGEST, b, chunk_b, settings, "t")
    assert (key_a == key_b) == ((a, chunk_a) == (b, chunk_b))


def test_moving_bytes_between_revision_and_tenant_changes_the_key() -> None:
    def key(revision: str, tenant: str) -> str:
        settings = EncodeSettings(
            kind=MediaKind.IMAGE,
            is_tiled=True,
            pool_sizes=(),
            token_dtype=TokenDtype.BFLOAT16,
            vision_revision=revision,
        )
        return record_key(DIGEST, settings, tenant)

    assert key("ab", "c") != key("a", "bc")
    assert len(key("ab", "c")) == 64
