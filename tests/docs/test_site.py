"""The generated pages of the docs site hold all that the code has."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import typer

import gatefit
from gatefit.commands.cli import app
from gatefit.recipe import Recipe

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parent.parent.parent
MARKDOWN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_option_of_every_command_is_described(hooks):
    page = hooks.commands_page()
    for name, command in typer.main.get_command(app).commands.items():
        section = page.split(f"## `gatefit {name}`")[1].split("\n## ")[0]
        for parameter in command.params:
            hidden = getattr(parameter, "hidden", False)  # old names, which go on working
            assert hidden or parameter.opts[0] in section or parameter.name.upper() in section, parameter.name


def test_every_setting_has_a_row_in_its_table(hooks):
    page = hooks.settings_page()

    def check(cls, path):
        section = page.split(f"## `[{path}]`\n")[1].split("\n## ")[0] if path else page
        for field in dataclasses.fields(cls):
            part = field.default_factory
            if dataclasses.is_dataclass(part):
                check(part, f"{path}.{field.name}" if path else field.name)
            else:
                assert f"| `{field.name}` |" in section, (path, field.name)

    check(Recipe, "")
    assert "What to do with an image that cannot be read." in page  # a meaning, from below its field


def test_every_public_name_is_on_the_page_of_the_api(hooks):
    documented = set(re.findall(r"^::: .*\.(\w+)$", hooks.api_page(), re.MULTILINE))
    assert documented == {name for name in gatefit.__all__ if callable(getattr(gatefit, name))}


def test_the_notebook_becomes_a_page_with_its_pictures(hooks):
    page = hooks.notebook_page(hooks.NOTEBOOK)
    assert page.startswith("# ") and page.count("![picture](data:image/png;base64,") == 3


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_hold(page):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).is_file(), link
