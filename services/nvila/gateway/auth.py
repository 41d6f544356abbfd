"""Who asks: API keys, and the tenant that each belongs to."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable
from hashlib import sha256

from nvila.errors import Unauthenticated

DEFAULT_TENANT = "default"


class ApiKeys:
    """`keys`: each `key` or `key:tenant`. `is_open`: no key is asked for."""

    def __init__(self, keys: Iterable[str], *, is_open: bool = False) -> None:
        self._tenants = [
            (sha256(key.encode()).digest(), tenant or DEFAULT_TENANT)
            for key, _, tenant in (entry.partition(":") for entry in keys)
        ]
        self._is_open = is_open

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an `Authorization` header. Raises `Unauthenticated`, in the same words for every reason.

        All keys are compared, in constant time, whichever one fits.
        """
        if self._is_open:
            return DEFAULT_TENANT
        scheme, key = _credentials(authorization or "")
        given = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(digest, given)]
        if scheme not in ("bearer", "basic") or not found:
            raise Unauthenticated("a valid API key is needed: `Authorization: Bearer <key>`")
        return found[0]


def _credentials(authorization: str) -> tuple[str, str]:
    """Scheme and key. A browser, which can only send Basic, has the key as its password, under any user name."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(key, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            key = ""
    return scheme.lower(), key
