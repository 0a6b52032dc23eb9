"""The README and the docs do what they say: Python blocks run, and every gatefit command line parses.

The blocks of a page share one namespace and run in a folder of their own, with `photos/` and `my_net.py` in it. A block
with `title="FILE"` is written to that file. Weights cannot be fetched offline: a small one stands in for timm.
"""

import contextlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
import typer
from PIL import Image

import gatefit
from gatefit.commands.cli import app

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n`]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OWN_NETWORK = ROOT / "docs" / "own-network.md"


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(info string behind the language, content) of each fenced block in a language."""
    return [(info.strip(), body) for name, info, body in BLOCK.findall(page.read_text()) if name == language]


def command_lines() -> list:
    """Every line of a shell block that calls gatefit, also behind `&&` or `accelerate launch -m`."""
    found = []
    for page in PAGES:
        for _, body in blocks(page, "sh"):
            for line in body.splitlines():
                for part in re.split(r"&&|\|", line):
                    words = shlex.split(part, comments=True)
                    if "gatefit" in words:
                        arguments = words[words.index("gatefit") + 1 :]
                        found.append(pytest.param(arguments, id=f"{page.stem}: {' '.join(arguments)}"))
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with photos of two classes and my_net.py."""
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("val", 4)):
        for name in ("cat", "dog"):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (40, 40, 3), generator=random, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(place / f"{i}.png")
    (title, source), *_ = [b for b in blocks(OWN_NETWORK, "python") if "title=" in b[0]]
    assert title == 'title="my_net.py"'
    (tmp_path / "my_net.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_net", raising=False)
    real = timm.create_model

    def small(name, pretrained=False, **arguments):
        network = real("test_resnet" if pretrained else name, **arguments)
        network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 32, 32)}
        return network

    monkeypatch.setattr(timm, "create_model", small)
    yield tmp_path
    sys.modules.pop("my_net", None)


def a_saved_network(monkeypatch) -> dict:
    """Write a gated network into runs/mine, and let the Hub be that folder; give what the page on folders names."""
    network = timm.create_model("test_resnet", num_classes=2)
    gated = gatefit.retrofit(network)
    gatefit.save(gated, "runs/mine")
    images = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    monkeypatch.setattr(gatefit, "from_pretrained", lambda name: gatefit.load("runs/mine"), raising=False)
    monkeypatch.setattr(gatefit, "push_to_hub", lambda folder, name: None, raising=False)
    return {"evaluation": gatefit.evaluate(gated, images)}


PRELUDES = {"folder.md": a_saved_network}
"""By page, what exists before its first block."""


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks_run(page, folder, monkeypatch):
    prelude = PRELUDES.get(page.name, lambda _: {})
    names: dict = {"__name__": "snippet", **prelude(monkeypatch)}
    for info, body in blocks(page, "python"):
        if ".no-run" in info:
            continue
        line = page.read_text()[: page.read_text().index(body)].count("\n")
        exec(compile("\n" * line + body, str(page), "exec"), names)


def test_few_blocks_are_left_out():
    left_out = [p.name for p in PAGES for info, _ in blocks(p, "python") if ".no-run" in info]
    assert len(left_out) <= 2, left_out


@pytest.mark.parametrize("arguments", command_lines())
def test_command_lines_parse(arguments):
    parse(arguments)


def test_an_unknown_option_does_not_parse():
    with pytest.raises(Exception, match="No such option"):
        parse(["convert", "resnet50", "--no-such-option"])
    with pytest.raises(Exception, match="No such command"):
        parse(["no-such-command"])


def parse(arguments: list[str]) -> None:
    """Parse a command line as gatefit does, without running it."""
    group = typer.main.get_command(app)
    with contextlib.suppress(typer.Exit), group.make_context("gatefit", list(arguments)) as context:
        rest = [*context._protected_args, *context.args]
        name, command, rest = group.resolve_command(context, rest)
        command.make_context(name, rest, parent=context)
