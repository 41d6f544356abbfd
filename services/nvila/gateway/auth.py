"""Who asks: API keys, and the tenant that each belongs to."""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Iterable
from hashlib import sha256
from urllib.parse import parse_qs, urlencode

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
        secrets = b"".join(sorted(digest for digest, _ in self._tenants))
        self._link_secret = sha256(b"nvila links\0" + secrets).digest()

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

    def sign(self, path: str, tenant: str, expires_at: int) -> str:
        """A query string with which `path` can be read in the tenant's name until `expires_at` (since 1970), for
        players that can send no key. All gateways with the same keys take it; a change of keys ends it."""
        return urlencode(
            {"tenant": tenant, "expires": expires_at, "signature": self._signature(path, tenant, expires_at)}
        )

    def signed_tenant(self, path: str, query: str) -> str:
        """The tenant in whose name a signed link reads. Raises `Unauthenticated`."""
        given = {name: values[0] for name, values in parse_qs(query).items()}
        tenant, expires = given.get("tenant", ""), given.get("expires", "")
        is_number = expires.isascii() and expires.isdecimal() and len(expires) < 12
        expected = self._signature(path, tenant, int(expires)) if is_number else ""
        is_ours = hmac.compare_digest(expected.encode(), given.get("signature", "").encode())
        if not is_number or not is_ours or int(expires) < time.time():
            raise Unauthenticated("this link has expired, or is none of ours")
        return tenant

    def _signature(self, path: str, tenant: str, expires_at: int) -> str:
        said = f"{path}\n{tenant}\n{expires_at}".encode()
        return hmac.new(self._link_secret, said, sha256).hexdigest()


def _credentials(authorization: str) -> tuple[str, str]:
    """Scheme and key. A browser, which can only send Basic, has the key as its password, under any user name."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(key, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            key = ""
    return scheme.lower(), key
