"""Generate the pages that must not be copied by hand: commands, recipe settings, Python API, and pages kept elsewhere.

mkdocs calls `on_files` before it builds the site, and `on_page_markdown` with each page.
"""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs does not run from the repository: document this gatefit, not an installed one

import gatefit  # noqa: E402
from gatefit import recipe  # noqa: E402
from gatefit.commands.cli import app  # noqa: E402

NOTEBOOK = ROOT / "examples" / "digits.ipynb"
SCHEMAS = "gatefit/schemas"
ELSEWHERE = {
    "recipes/README.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages outside docs/, and what they are called on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    pages = {
        "commands.md": commands_page(),
        "settings.md": settings_page(),
        "api.md": api_page(),
        "notebook.md": notebook_page(NOTEBOOK),
        **{name: site_links((ROOT / source).read_text()) for source, name in ELSEWHERE.items()},
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for schema in sorted((ROOT / SCHEMAS).glob("*.json")):
        files.append(File.generated(config, f"schemas/{schema.name}", content=schema.read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to the JSON Schemas of the package hold on the site too."""
    return markdown.replace(f"](../{SCHEMAS}/", "](schemas/")


def commands_page() -> str:
    """Every command with its arguments and options, as Typer knows them."""
    command = typer.main.get_command(app)
    with command.make_context("gatefit", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="gatefit")
    text = re.sub(r"\*\*Commands\*\*:\n\n.*?(?=^## )", "", text, count=1, flags=re.DOTALL | re.MULTILINE)  # cut short
    return text.replace("# `gatefit`", "# Commands", 1)


def settings_page() -> str:
    """Every table of a recipe: keys, defaults and meanings, from the dataclasses and the docstrings of their fields."""
    intro = (
        "# Recipe settings\n\nA recipe is a TOML file that holds everything a conversion depends on. Every key is "
        "optional. `gatefit convert` writes the complete recipe into its output folder.\n"
    )
    return intro + "\n".join(_tables(recipe.Recipe, ""))


def _tables(cls: type, path: str) -> list[str]:
    nested = {f.name: t for f in dataclasses.fields(cls) if dataclasses.is_dataclass(t := _hint(cls, f.name))}
    plain = [f for f in dataclasses.fields(cls) if f.name not in nested]
    meanings = recipe.field_docstrings(cls)
    summary = re.sub(r"^\[.*?\]: ", "", (inspect.getdoc(cls) or "").split("\n\n")[0])
    lines = [f"\n## {f'`[{path}]`' if path else 'At the top'}\n", f"{_sentence(summary)}\n"]
    if plain:
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{f.name}` | {_cell(_type(_hint(cls, f.name)))} | {_default(f)} | {_cell(meanings.get(f.name, ''))} |"
            for f in plain
        ]
    for name, part in nested.items():
        lines += _tables(part, f"{path}.{name}" if path else name)
    return lines


def _hint(cls: type, name: str) -> Any:
    return inspect.get_annotations(cls, eval_str=True)[name]


def _type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    choices = re.match(r"Literal\[(.*)\]$", text)
    if choices:
        return " or ".join(f"`{choice}`" for choice in choices[1].replace("'", '"').split(", "))
    return f"`{text.removesuffix(' | None')}`"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else f"`{field.default_factory()}`"
    return "not set" if field.default is None else f"`{json.dumps(field.default, default=str)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def api_page() -> str:
    """Each public name, documented where it is defined: functions first."""
    objects = {name: value for name in gatefit.__all__ if callable(value := getattr(gatefit, name))}
    functions = [n for n, o in objects.items() if not isinstance(o, type)]
    order = [*functions, *(n for n in objects if n not in functions)]
    lines = ["# Python API\n", "All of these are imported with `import gatefit`.\n"]
    lines += [f"::: {objects[name].__module__}.{objects[name].__qualname__}\n" for name in order]
    return "\n".join(lines)


def notebook_page(file: Path) -> str:
    """A notebook with its outputs as Markdown; pictures stand in the page."""
    parts = []
    for cell in json.loads(file.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![picture](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```"


def site_links(text: str) -> str:
    """Turn links that hold in the repository into links that hold on the site."""
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text)
    for source, name in ELSEWHERE.items():
        text = text.replace(f"]({source})", f"]({name})")
    return text
