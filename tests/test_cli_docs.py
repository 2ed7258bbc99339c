"""The documentation says what the commands say, and names every field that they write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from fake_engine import FakeEngine, FakeModel

from zoomr_cli.docs import reference
from zoomr_cli.main import app
from zoomr_local.sampling import SamplingParams
from zoomr_local.solve import Problem, Solver

ROOT = Path(__file__).resolve().parent.parent


def test_the_reference_page_is_made_from_the_commands():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert page == reference(), "run: python -m zoomr_cli.docs > docs/cli.md"


def test_every_command_and_option_has_help():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_every_field_of_a_record_is_documented():
    class Silent:
        def event(self, event):
            pass

    solver = Solver(FakeModel(), FakeEngine(), SamplingParams(), 100)
    record = solver.solve(Problem("a", ({"role": "user", "content": "p"},), "4", 1), Silent())
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "records.md").read_text()))
    fields = {*record, *(f for part in ("usage", "timing", "kv") for f in record[part])}
    assert fields <= documented, fields - documented


@pytest.mark.parametrize("page", ["README.md", "docs/records.md"])
def test_pages_link_to_files_that_exist(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"
