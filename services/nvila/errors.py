"""What can go wrong, one class per meaning to the caller.

    NvilaError
    ├── InvalidRequest          the request itself is wrong; the same request will never work
    │   ├── InvalidMedia        the bytes are not a usable image or video
    │   │   └── UnsupportedMedia    a container, codec or type outside the allow-list
    │   ├── LimitExceeded       a size over a limit; carries both numbers
    │   └── ForbiddenURL        a media address that the fetch policy denies
    ├── Unauthenticated         no valid API key
    ├── NotFound                no such model, file or route
    ├── Conflict                the thing asked about is not as the request takes it to be, or somebody else is at it
    ├── Overloaded              no permit or queue full; worth trying again after `retry_after_s`
    ├── Unavailable             a service behind is down, not ready or broke; worth trying again
    │   └── MediaUnavailable    the host that a media address names is; nothing of ours
    ├── DeadlineExceeded        the request's time is up
    ├── InvalidCheckpoint       a model folder that does not hold what its own configuration says; for the operator
    └── Cancelled               the client left; never shown to it

Each face (HTTP, gRPC) maps a class to its status once, in its own module. Between our own services an error travels
as (`code`, message) and comes back as the same class through `from_wire`. Messages say what was expected and what came;
they never carry internals such as paths, addresses or stack traces.
"""

from __future__ import annotations


class NvilaError(Exception):
    """Base of all errors that nvila raises on purpose. `code` is stable and travels between services."""

    code = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request field at fault, in the public API's spelling, when there is one."""
        self.retry_after_s = retry_after_s


class InvalidRequest(NvilaError):
    code = "invalid_request"


class InvalidMedia(InvalidRequest):
    code = "invalid_media"


class UnsupportedMedia(InvalidMedia):
    code = "unsupported_media"


class LimitExceeded(InvalidRequest):
    """`LimitExceeded.of("frames", asked=300, limit=256)` words the message the same way everywhere."""

    code = "limit_exceeded"

    @classmethod
    def of(cls, what: str, *, asked: float, limit: float, param: str | None = None) -> LimitExceeded:
        return cls(f"{what}: {asked:,} asked, at most {limit:,} allowed", param=param)


class ForbiddenURL(InvalidRequest):
    code = "forbidden_url"


class Unauthenticated(NvilaError):
    code = "unauthenticated"


class NotFound(NvilaError):
    code = "not_found"


class Conflict(NvilaError):
    """An idempotency key that stands for another request, an upload that is further on, a job that is over."""

    code = "conflict"


class Overloaded(NvilaError):
    code = "overloaded"


class Unavailable(NvilaError):
    code = "unavailable"


class MediaUnavailable(Unavailable):
    code = "media_unavailable"


class DeadlineExceeded(NvilaError):
    code = "deadline_exceeded"


class InvalidCheckpoint(NvilaError):
    code = "invalid_checkpoint"


class Cancelled(NvilaError):
    code = "cancelled"


def _tree(cls: type[NvilaError]) -> list[type[NvilaError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _tree(sub))]


def from_wire(code: str, message: str, retry_after_s: float | None = None) -> NvilaError:
    """The error that `code` names, as another of our services sent it; an unknown code becomes a plain `NvilaError`."""
    by_code = {cls.code: cls for cls in _tree(NvilaError)}
    return by_code.get(code, NvilaError)(message, retry_after_s=retry_after_s)
