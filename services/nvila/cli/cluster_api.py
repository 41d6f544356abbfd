"""The Kubernetes API as `nvila cluster` uses it: plain JSON objects by path, and errors that name their mend.

The official client brings what a kubeconfig needs (certificates, tokens, exec plugins); its typed models are left
alone, because they refuse objects of other versions than their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlencode

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3 import exceptions as http

from nvila.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NvilaError,
    Overloaded,
    Unauthenticated,
    Unavailable,
)

Json = dict[str, Any]

CONNECT_S, READ_S = 5.0, 20.0
"""Longest wait for a connection, and for an answer's next bytes."""
PAGE = 500
"""Objects of one list call; further ones come in further calls."""
_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)
_VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "PUT": "update"}


class Forbidden(NvilaError):
    """These credentials may not do that. `rule` is the RBAC rule that allows it."""

    code = "forbidden"

    def __init__(self, message: str, *, rule: str = "", **more: Any) -> None:
        super().__init__(message, **more)
        self.rule = rule


class Gone(NvilaError):
    """What a list or watch went on from is too old; list again."""

    code = "gone"


@dataclass(frozen=True)
class Access:
    """What a request asks of RBAC."""

    verb: str
    group: str
    resource: str
    namespace: str

    @classmethod
    def of(cls, method: str, path: str, *, is_watch: bool = False) -> Self:
        found = _PATH.match(path)
        if not found:
            return cls(method.lower(), "", path, "")
        verb = _VERBS.get(method) or ("watch" if is_watch else "get" if found["name"] else "list")
        resource = found["resource"] + (f"/{found['sub']}" if found["sub"] else "")
        return cls(verb, found["group"] or "", resource, found["namespace"] or "")

    @property
    def rule(self) -> str:
        return f'{{apiGroups: ["{self.group}"], resources: ["{self.resource}"], verbs: ["{self.verb}"]}}'

    @property
    def mend(self) -> str:
        """The command that gives the right to this user."""
        kind, where = ("role", f" -n {self.namespace}") if self.namespace else ("clusterrole", "")
        resource = self.resource.partition("/")
        full = resource[0] + (f".{self.group}" if self.group else "") + resource[1] + resource[2]
        return f"kubectl create {kind} nvila-operator --verb={self.verb} --resource={full}{where}"


class Cluster:
    """One connection, one namespace."""

    def __init__(self, api: client.ApiClient, context: str, namespace: str) -> None:
        self._api = api
        self.context = context
        self.namespace = namespace
        self.server = str(api.configuration.host)
        self._groups: dict[str, Json] | None = None

    @classmethod
    def connect(cls, *, kubeconfig: str | None, context: str | None, namespace: str | None) -> Self:
        """As kubectl would; nothing is sent yet. Raises `InvalidRequest` when no configuration can be used."""
        try:
            contexts, active = config.list_kube_config_contexts(kubeconfig)  # type: ignore[no-untyped-call]  # untyped
        except (ConfigException, OSError) as error:
            raise InvalidRequest(
                f"no usable kubeconfig: {_line(error)}; name one with --kubeconfig or KUBECONFIG"
            ) from None
        chosen = next((one for one in contexts if one["name"] == context), None) if context else active
        if chosen is None:
            names = ", ".join(one["name"] for one in contexts) or "none"
            raise InvalidRequest(f"no context {context!r} in the kubeconfig; it has {names}")
        settings = type.__call__(client.Configuration)
        settings.retries = 0
        try:
            config.load_kube_config(kubeconfig, chosen["name"], settings, False)  # type: ignore[no-untyped-call]  # untyped
        except (ConfigException, OSError) as error:
            raise Unauthenticated(f"context {chosen['name']}: {_line(error)}; log in again") from None
        where = namespace or chosen.get("context", {}).get("namespace") or "default"
        return cls(client.ApiClient(settings), chosen["name"], where)

    def close(self) -> None:
        self._api.rest_client.pool_manager.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one request

    def get(self, path: str, **query: Any) -> Json:
        found: Json = json.loads(self._request("GET", path, query=query))
        return found

    def find(self, path: str) -> Json | None:
        """None where there is no such object."""
        try:
            return self.get(path)
        except NotFound:
            return None

    def text(self, path: str, **query: Any) -> str:
        """Logs, or a page behind the API server's proxy."""
        return self._request("GET", path, query=query, accept="*/*").decode(errors="replace")

    def create(self, path: str, body: Json) -> Json:
        made: Json = json.loads(self._request("POST", path, body=body))
        return made

    def patch(self, path: str, body: Json | list[Json]) -> Json:
        """A merge patch, or a JSON patch where a list is given."""
        kind = "application/json-patch+json" if isinstance(body, list) else "application/merge-patch+json"
        patched: Json = json.loads(self._request("PATCH", path, body=body, content=kind))
        return patched

    def objects(self, path: str, selector: str = "") -> list[Json]:
        return self.objects_and_version(path, selector)[0]

    def objects_and_version(self, path: str, selector: str = "") -> tuple[list[Json], str]:
        """All objects, page by page, and the version from which a watch goes on. Begins anew if a page is too old."""
        for _ in range(3):
            try:
                return self._pages(path, selector)
            except Gone:
                continue
        raise Unavailable(f"{path} changes faster than it can be listed; try again")

    def _pages(self, path: str, selector: str) -> tuple[list[Json], str]:
        objects: list[Json] = []
        query: dict[str, Any] = {"limit": PAGE} | ({"labelSelector": selector} if selector else {})
        while True:
            page = self.get(path, **query)
            objects += page.get("items") or []
            more = (page.get("metadata") or {}).get("continue")
            if not more:
                return objects, str((page.get("metadata") or {}).get("resourceVersion", ""))
            query["continue"] = more

    def watch(self, path: str, selector: str, version: str, timeout_s: float) -> Iterator[Json]:
        """Events from `version` on, for so long at most. Silence ends it without an error; raises `Gone` when the
        version is too old."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "labelSelector": selector,
            "resourceVersion": version,
            "timeoutSeconds": max(1, int(timeout_s)),
        }
        try:
            answer = self._open("GET", path, query=query, read_s=max(timeout_s, 0.1), is_watch=True)
        except DeadlineExceeded:
            return
        try:
            for line in _lines(answer):
                event: Json = json.loads(line)
                if event.get("type") == "ERROR":
                    status = event.get("object") or {}
                    self._raise(int(status.get("code") or 500), status, Access.of("GET", path, is_watch=True))
                if event.get("type") != "BOOKMARK":
                    yield event
        except (http.ReadTimeoutError, http.ProtocolError):
            return  # a watch may break off at any time; who waits looks again
        finally:
            answer.release_conn()

    def watch_answers(self, path: str, version: str, within_s: float) -> bool:
        """Whether a watch that is to last one second says something, or ends, in time."""
        query = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version, "timeoutSeconds": 1}
        try:
            answer = self._open("GET", path, query=query, read_s=within_s, is_watch=True)
        except DeadlineExceeded:
            return False
        try:
            next(_lines(answer), None)
        except http.ReadTimeoutError:
            return False
        except http.ProtocolError:
            return True  # a watch may break off at any time
        finally:
            answer.close()
        return True

    # -- what the server knows

    def version(self) -> Json:
        return self.get("/version")

    def resources(self, group: str) -> set[str]:
        """Names of the resources of an API group, all versions; empty where the group is not installed."""
        if self._groups is None:
            self._groups = {one["name"]: one for one in self.get("/apis").get("groups", [])}
        known = self._groups.get(group)
        if known is None:
            return set()
        names: set[str] = set()
        for one in known.get("versions", []):
            found = self.find(f"/apis/{one['groupVersion']}")
            names |= {resource["name"] for resource in (found or {}).get("resources", [])}
        return names

    # -- below

    def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        content: str = "application/json",
        accept: str = "application/json",
    ) -> bytes:
        answer = self._open(method, path, query=query, body=body, content=content, accept=accept)
        try:
            data: bytes = answer.read()
        except http.ReadTimeoutError:
            raise DeadlineExceeded(f"{self.server} did not finish its answer to {path} in {READ_S:.0f} s") from None
        except http.HTTPError as error:
            raise Unavailable(f"{self.server} broke off its answer to {path}: {_line(error)}") from None
        finally:
            answer.release_conn()
        return data

    def _open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        content: str = "application/json",
        accept: str = "application/json",
        read_s: float | None = None,
        is_watch: bool = False,
    ) -> Any:
        """The open answer of a request that went well."""
        headers = {"Accept": accept} | ({"Content-Type": content} if body is not None else {})
        serialized = self._api.param_serialize(
            method, path, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        method, url, headers, _, _ = serialized
        full = url + (f"?{urlencode(query)}" if query else "")
        try:
            answer = self._api.call_api(
                method, full, headers, body, _request_timeout=(CONNECT_S, read_s or READ_S)
            ).response
        except ApiException as error:  # what the client makes of a TLS error
            raise self._unreachable(error.reason) from None
        except http.HTTPError as error:
            raise self._unreachable(error) from None
        if answer.status >= 400:
            try:
                data = answer.read()
            except http.HTTPError:
                data = b""
            self._raise(answer.status, _status(data), Access.of(method, path, is_watch=is_watch))
        return answer

    def _raise(self, code: int, status: Json, access: Access) -> None:
        said = _line(status.get("message") or f"HTTP status {code}")
        what = f"{access.verb} {access.resource}" + (f".{access.group}" if access.group else "")
        if code == 401 and access.resource.endswith("/proxy"):
            raise Unauthenticated("the pod asks for a key, which the API server does not pass on")
        if code == 401:
            raise Unauthenticated(
                f"the API server refuses the credentials of context {self.context} (expired?): log in again, "
                "then `kubectl auth whoami` tells who you are"
            )
        if code == 403:
            where = f" in namespace {access.namespace}" if access.namespace else ""
            raise Forbidden(f"not allowed: {what}{where}; the rule that allows it: {access.rule}", rule=access.rule)
        if code == 404:
            raise NotFound(f"{what}: {said}")
        if code == 410:
            raise Gone(said)
        if code == 409:
            raise Unavailable(f"{what}: changed by somebody else meanwhile; run it again")
        if code in (400, 422):
            raise InvalidRequest(f"{what}: {said}")
        if code == 429:
            raise Overloaded(f"the API server is busy: {said}")
        raise Unavailable(f"{what}: the API server says {code}: {said}")

    def _unreachable(self, error: object) -> NvilaError:
        reason = getattr(error, "reason", None) or error
        said = _line(reason)
        if "certificate" in said.lower() or "ssl" in said.lower():
            return Unavailable(
                f"the certificate of {self.server} is not trusted ({said}): certificate-authority-data of the "
                "kubeconfig must be the cluster's; fetch the kubeconfig anew"
            )
        if isinstance(reason, http.ReadTimeoutError):
            return DeadlineExceeded(f"{self.server} did not answer in {READ_S:.0f} s")
        if isinstance(reason, http.ConnectTimeoutError) and not isinstance(reason, http.NewConnectionError):
            return Unavailable(f"{self.server} cannot be reached in {CONNECT_S:.0f} s: VPN or firewall?")
        return Unavailable(
            f"nothing answers at {self.server} ({said}): is the cluster up, and context {self.context} the right one?"
        )


def _lines(answer: Any) -> Iterator[bytes]:
    """Whole lines of a chunked stream, as they come."""
    rest = b""
    for piece in answer.stream(1 << 16):
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line for line in lines if line.strip())
    if rest.strip():
        yield rest


def _status(data: bytes) -> Json:
    try:
        found = json.loads(data)
    except ValueError:
        return {"message": data[:200].decode(errors="replace")}
    return found if isinstance(found, dict) else {}


def _line(text: object) -> str:
    """In one line, without the object addresses that urllib3 prints."""
    words = re.sub(r"<[^<>]* at 0x[0-9a-f]+>:? ?", "", " ".join(str(text).split()))
    return words.removeprefix("Invalid kube-config file. ").strip().rstrip(".")
