"""A small HTTP server that speaks the Kubernetes API: lists in pages, gets, patches, watches, logs, the pod proxy,
access reviews, and `Status` objects for errors. What it holds and how it fails is set from outside, also while it runs.
"""

from __future__ import annotations

import copy
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Json = dict[str, Any]

TOKEN = "token-of-the-tests"
REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    410: "Expired",
    409: "Conflict",
    500: "InternalError",
}
PLURALS = {
    "NetworkPolicy": "networkpolicies",
    "PriorityClass": "priorityclasses",
    "Ingress": "ingresses",
    "StorageClass": "storageclasses",
}


def plural(kind: str) -> str:
    return PLURALS.get(kind, f"{kind.lower()}s")


@dataclass
class State:
    """`objects`: by collection path, by name. `forbidden`: (verb, resource). `missing_groups`: not installed."""

    objects: dict[str, dict[str, Json]] = field(default_factory=dict)
    version: Json = field(default_factory=lambda: {"major": "1", "minor": "31+", "gitVersion": "v1.31.4-eks-1"})
    token: str = TOKEN
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    denied_creates: set[str] = field(default_factory=set)
    missing_groups: set[str] = field(default_factory=set)
    pages: dict[str, str] = field(default_factory=dict)
    """Metrics by pod:port."""
    logs: dict[tuple[str, str, bool], str] = field(default_factory=dict)
    delay_s: float = 0.0
    watch_delay_s: float = 0.0
    """Silence at the beginning of every watch, headers included."""
    gone_watches: int = 0
    gone_pages: int = 0
    page_size: int = 0
    """Largest page, whatever the client asks for."""
    resource_version: int = 100
    events: list[tuple[int, str, Json]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    patches: list[tuple[str, str, Any]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, *objects: Json) -> None:
        for one in objects:
            self.put(one)

    def put(self, one: Json) -> None:
        """Add or replace; watches see it."""
        with self.changed:
            path = collection(one)
            self.resource_version += 1
            one["metadata"]["resourceVersion"] = str(self.resource_version)
            is_new = one["metadata"]["name"] not in self.objects.setdefault(path, {})
            self.objects[path][one["metadata"]["name"]] = one
            self.events.append(
                (self.resource_version, path, {"type": "ADDED" if is_new else "MODIFIED", "object": one})
            )
            self.changed.notify_all()

    def get(self, path: str, name: str) -> Json:
        return self.objects[path][name]


def collection(one: Json) -> str:
    version, namespace = one["apiVersion"], one["metadata"].get("namespace")
    base = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return base + (f"/namespaces/{namespace}" if namespace else "") + f"/{plural(one['kind'])}"


_OBJECT = re.compile(
    r"(?P<path>/(?:api/v1|apis/(?P<group>[^/]+)/[^/]+)(?:/namespaces/[^/]+(?=/))?/(?P<resource>[a-z]+))"
    r"(?:/(?P<name>[^/]+)(?:/(?P<sub>.+))?)?$"
)
CORE = ("nodes", "pods", "services", "configmaps", "secrets", "namespaces", "events", "persistentvolumeclaims")
GROUPS = {
    "apps/v1": ("deployments", "statefulsets", "replicasets"),
    "autoscaling/v2": ("horizontalpodautoscalers",),
    "policy/v1": ("poddisruptionbudgets",),
    "networking.k8s.io/v1": ("networkpolicies", "ingresses"),
    "storage.k8s.io/v1": ("storageclasses",),
    "authorization.k8s.io/v1": ("selfsubjectaccessreviews",),
    "metrics.k8s.io/v1beta1": ("nodes", "pods"),
    "ray.io/v1": ("rayservices", "rayclusters"),
    "keda.sh/v1alpha1": ("scaledobjects",),
    "monitoring.coreos.com/v1": ("servicemonitors", "podmonitors", "prometheusrules"),
    "gateway.networking.k8s.io/v1": ("httproutes", "gateways"),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: State

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def _serve(self, method: str) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        state = self.state
        state.requests.append((method, path))
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        time.sleep(state.delay_s)
        if self.headers.get("authorization") != f"Bearer {state.token}":
            self._status(401, "Unauthorized")
        elif path == "/version":
            self._json(state.version)
        elif path == "/apis":
            self._json({"kind": "APIGroupList", "groups": self._groups()})
        elif (discovered := path.removeprefix("/apis/")) in GROUPS:
            self._discover(discovered)
        elif found := _OBJECT.match(path):
            self._resource(method, found, query, body)
        else:
            self._status(404, "the server could not find the requested resource")

    def _groups(self) -> list[Json]:
        names: dict[str, list[str]] = {}
        for version in GROUPS:
            names.setdefault(version.split("/")[0], []).append(version)
        return [
            {"name": name, "versions": [{"groupVersion": version} for version in versions]}
            for name, versions in names.items()
            if name not in self.state.missing_groups
        ]

    def _discover(self, version: str) -> None:
        if version.split("/")[0] in self.state.missing_groups:
            self._status(404, "the server could not find the requested resource")
        else:
            self._json({"kind": "APIResourceList", "resources": [{"name": name} for name in GROUPS[version]]})

    def _resource(self, method: str, found: re.Match[str], query: dict[str, str], body: Any) -> None:
        state, resource, name, sub = self.state, found["resource"], found["name"], found["sub"]
        is_watch = query.get("watch") == "true"
        verb = {"POST": "create", "PATCH": "patch"}.get(method) or ("watch" if is_watch else "get" if name else "list")
        what = f"{resource}/{sub.split('/')[0]}" if sub else resource
        group = found["group"] or ""
        if (verb, what) in state.forbidden:
            self._status(
                403, f'{what} is forbidden: User "tester" cannot {verb} resource "{what}" in API group "{group}"'
            )
        elif group in state.missing_groups:
            self._status(404, "the server could not find the requested resource")
        elif resource == "selfsubjectaccessreviews":
            asked = body["spec"]["resourceAttributes"]["resource"]
            self._json({**body, "status": {"allowed": asked not in state.denied_creates}}, 201)
        elif is_watch:
            self._watch(found["path"], query)
        elif sub == "log":
            key = (name, query.get("container", ""), query.get("previous") == "true")
            self._text(state.logs.get(key, f"a line of {key}\n"))
        elif sub and sub.startswith("proxy/"):
            page = state.pages.get(name)
            self._text(page) if page is not None else self._status(401, "Unauthorized by the pod", "text/plain")
        elif method == "PATCH":
            self._patch(found["path"], name, sub, body)
        elif name:
            one = state.objects.get(found["path"], {}).get(name)
            self._json(one) if one else self._status(404, f'{resource} "{name}" not found')
        else:
            self._list(found["path"], query)

    def _list(self, path: str, query: dict[str, str]) -> None:
        state = self.state
        if query.get("continue") and state.gone_pages:
            state.gone_pages -= 1
            self._status(410, "The provided continue parameter is too old")
            return
        objects = [one for one in state.objects.get(path, {}).values() if matches(one, query.get("labelSelector", ""))]
        size = state.page_size or int(query.get("limit") or 500)
        begin = int(query.get("continue") or 0)
        metadata: Json = {"resourceVersion": str(state.resource_version)}
        if begin + size < len(objects):
            metadata["continue"] = str(begin + size)
        self._json({"kind": "List", "metadata": metadata, "items": objects[begin : begin + size]})

    def _watch(self, path: str, query: dict[str, str]) -> None:
        state = self.state
        if state.gone_watches:
            state.gone_watches -= 1
            self._begin("application/json", chunked=True)
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            self._chunk(json.dumps({"type": "ERROR", "object": gone}))
            self._chunk("")
            return
        time.sleep(state.watch_delay_s)
        self._begin("application/json", chunked=True)
        self._chunk(json.dumps({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "1"}}}))
        since, ends_s = int(query.get("resourceVersion") or 0), time.monotonic() + float(query["timeoutSeconds"])
        while (left_s := ends_s - time.monotonic()) > 0:
            with state.changed:
                new = [(v, e) for v, p, e in state.events if v > since and p == path]
                if not new:
                    state.changed.wait(min(left_s, 0.2))
            for version, event in new:
                since = version
                if matches(event["object"], query.get("labelSelector", "")):
                    self._chunk(json.dumps(event))
        self._chunk("")

    def _patch(self, path: str, name: str, sub: str | None, body: Any) -> None:
        state, kind = self.state, self.headers.get("content-type", "")
        one = copy.deepcopy(state.objects.get(path, {}).get(name))
        if one is None:
            self._status(404, f'"{name}" not found')
            return
        state.patches.append((f"{path}/{name}" + (f"/{sub}" if sub else ""), kind, body))
        try:
            one = json_patched(one, body) if kind.startswith("application/json-patch") else merge_patched(one, body)
        except (AssertionError, KeyError) as error:
            self._status(422, f"the patch does not apply: {error}")
            return
        state.put(one)
        self._json(one)

    # -- answers

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(code, "application/json", json.dumps(value).encode())

    def _text(self, text: str) -> None:
        self._send(200, "text/plain", text.encode())

    def _status(self, code: int, message: str, kind: str = "application/json") -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}
        status["reason"] = REASONS.get(code, "")
        self._send(code, kind, json.dumps(status).encode())

    def _send(self, code: int, kind: str, data: bytes) -> None:
        try:
            self.send_response(code)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client did not wait

    def _begin(self, kind: str, *, chunked: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        if chunked:
            self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _chunk(self, line: str) -> None:
        data = f"{line}\n".encode() if line else b""
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:
            self.close_connection = True


def matches(one: Json, selector: str) -> bool:
    labels = one["metadata"].get("labels") or {}
    pairs = [part.split("=", 1) for part in selector.split(",") if part]
    return all(labels.get(name) == value for name, value in pairs)


def merge_patched(one: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    out = dict(one) if isinstance(one, dict) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merge_patched(out.get(key), value)
    return out


def json_patched(one: Json, operations: list[Json]) -> Json:
    """RFC 6902, of it what is used: test, add and replace."""
    for operation in operations:
        *parents, last = operation["path"].strip("/").split("/")
        into: Any = one
        for key in parents:
            into = into[int(key)] if isinstance(into, list) else into[key]
        if operation["op"] == "test":
            assert into[last] == operation["value"], f"test of {operation['path']}"
        else:
            assert operation["op"] == "add" or last in into, f"nothing at {operation['path']}"
            into[last] = operation["value"]
    return one


@contextmanager
def serve(state: State, certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Address of a server on a free port of this machine."""
    handler: Callable[..., BaseHTTPRequestHandler] = type("BoundHandler", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    scheme = "http"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"{scheme}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def kubeconfig(path: Path, server: str, token: str = TOKEN, **cluster: Any) -> Path:
    """A file as a login writes it."""
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "test", "cluster": {"server": server} | cluster}],
                "users": [{"name": "tester", "user": {"token": token}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "tester", "namespace": "apps"}}],
            }
        )
    )
    return path
