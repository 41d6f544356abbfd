"""docs/operations.md says what the commands say, and has a runbook for every alert."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from nvila.cli.main import main
from tests.charts.helm import render
from tests.deploy.files import ROOT

DOCUMENT = ROOT / "docs/operations.md"
BLOCK = re.compile(r"<!-- nvila (capacity [^\n]*?) -->\n(.*?)<!-- end -->", re.DOTALL)


def output(words: str) -> str:
    """What the command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(shlex.split(words)) == 0
    return printed.getvalue()


@pytest.mark.parametrize(("words", "text"), BLOCK.findall(DOCUMENT.read_text()), ids=lambda value: value[:40])
def test_tables_are_what_the_command_prints(words: str, text: str) -> None:
    assert text.strip() == output(words).strip(), f"renew it: python -m {__name__}"


def test_every_alert_has_its_runbook() -> None:
    values = {"monitoring": {"rules": True}, "gateway": {"data": {"persistence": {"enabled": True}}}}
    (rule,) = render(values).all("PrometheusRule")
    alerts = {one["alert"] for group in rule["spec"]["groups"] for one in group["rules"]}
    headings = set(re.findall(r"^### (Nvila\w+)$", DOCUMENT.read_text(), re.MULTILINE))

    assert headings == alerts


def test_files_and_pictures_that_it_names_exist() -> None:
    text = DOCUMENT.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DOCUMENT.parent / target).exists(), target
    for path in re.findall(r"\b(?:charts|deploy|services|ci)/[\w/.-]+\w", text):
        assert (ROOT / path).exists() or (ROOT / "charts/nvila" / path).exists(), path


def renew(path: Path = DOCUMENT) -> None:
    """Write the tables anew."""
    text = BLOCK.sub(
        lambda found: f"<!-- nvila {found[1]} -->\n{output(found[1]).strip()}\n<!-- end -->", path.read_text()
    )
    path.write_text(text)


if __name__ == "__main__":
    renew()
