"""Secrets of clients (a camera's user and password, what signs a webhook) are sealed where they come in, lie sealed in
the database and in every job, and are opened where they are used, by nobody else.

A sealed text is `sealed:` and a Fernet token (AES-128-CBC and HMAC-SHA256, github.com/fernet/spec). The first key
seals, all of them open, so keys are changed without a pause: the new one is added behind the old one everywhere, then
moved to the front, and the old one is taken away once the workers have started with it (`reseal.py`). Without keys
nothing is sealed, and what lay there in clear is still read with keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from nvila.errors import InvalidRequest, Unavailable

SECRET = "secret"
"""The param of a job that is sealed."""
UNSEALED = "passwords of cameras and secrets of webhooks lie in clear in the database: no key to seal them is set"

_MARK = "sealed:"
_KEY = re.compile(r"[A-Za-z0-9_-]{43}=")


class Seal:
    """`keys`: each 32 random bytes in URL-safe base64; `ValueError` for one that is not."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys = [_key(text, position) for position, text in enumerate(keys, 1)]
        self._all = MultiFernet(self._keys) if self._keys else None

    @property
    def is_on(self) -> bool:
        return self._all is not None

    def close(self, secret: str) -> str:
        """As it may be kept. Without keys: as it is."""
        if self._all is None:
            if secret.startswith(_MARK):
                raise InvalidRequest(f"a secret must not begin with {_MARK!r}", param=SECRET)
            return secret
        return _MARK + self._all.encrypt(secret.encode()).decode()

    def open(self, kept: str) -> str:
        """What was closed. Raises `Unavailable` for what was sealed with none of these keys."""
        if not kept.startswith(_MARK):
            return kept
        try:
            if self._all is not None:
                return self._all.decrypt(kept.removeprefix(_MARK).encode()).decode()
        except InvalidToken:
            pass
        raise Unavailable("a secret of this recording was sealed with a key that this process does not have")

    def is_current(self, kept: str) -> bool:
        """Whether it is as `close` would make it now."""
        if not self._keys:
            return not kept.startswith(_MARK)
        try:
            self._keys[0].decrypt(kept.removeprefix(_MARK).encode())
        except InvalidToken:
            return False
        return kept.startswith(_MARK)


def _key(text: str, position: int) -> Fernet:
    if not _KEY.fullmatch(text):
        raise ValueError(f"key {position} is not 32 bytes in URL-safe base64 ({len(text)} characters given)")
    return Fernet(text)
