"""The page: HTML with everything in it."""

import base64
import html
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gatefit.formats import mega, percent

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem }
p { margin: .2rem 0 .8rem; max-width: 48rem } .word { color: #666 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem; border-bottom: 1px solid #ddd;
       text-align: right } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    file: str
    """Name of its picture, without the ending."""
    title: str
    text: str
    missing: str = ""
    """What to say where there is no picture."""
    picture: bytes = b""

    def with_picture(self, picture: bytes) -> "Section":
        """Give the same section with its picture, a PNG."""
        return replace(self, picture=picture)


def png(figure: Figure) -> bytes:
    """Draw a figure."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def render(name: str, report: dict[str, Any], sections: list[Section]) -> str:
    """Render the whole page, which needs no other file."""
    title = html.escape(f"{name}: {without_folders(report['model'])}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title}</h1>",
        f"<p>{report['images']:,} images of {html.escape(without_folders(report['data']))}, seed {report['seed']}.</p>",
        _table(report),
    ]
    for section in sections:
        text = section.text if section.picture else section.missing
        kind = "" if section.picture else " class=word"
        parts.append(f"<h2>{html.escape(section.title)}</h2><p{kind}>{html.escape(text)}</p>")
        if section.picture:
            data = base64.b64encode(section.picture).decode()
            parts.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(section.title)}">')
    return "\n".join(parts) + "\n"


def without_folders(name: str) -> str:
    """Shorten a path to its last part, and leave any other name of a network or a data set as it is.

    >>> [without_folders(n) for n in ("/nets/mine.py:build", "/data/photos", "torch/cifar10")]
    ['mine.py:build', 'photos', 'torch/cifar10']
    """
    is_path = Path(name).is_absolute() or ".py:" in name or name.startswith(".")
    return Path(name).name if is_path else name


def _table(report: dict[str, Any]) -> str:
    dense, gated = report["dense"], report["gated"]
    rows = [("original", dense["accuracy"], None if gated["agreement"] is None else 1.0, dense["macs"])]
    for placement in ("sequential", "parallel"):
        rows.append((f"gated, {placement}", gated["accuracy"], gated["agreement"], gated[f"macs_{placement}"]))
    cells = [
        f"<tr><td>{what}<td>{percent(accuracy)}<td>{percent(agreement)}<td>{mega(macs)}"
        f"<td>{percent(macs / dense['macs'])}"
        for what, accuracy, agreement, macs in rows
    ]
    head = "<tr><th><th>accuracy<th>agreement<th>MACs per image<th>share"
    words = (
        "Agreement: images answered as the original does. Sequential: each gate runs before its block. Parallel: it "
        "runs beside the block's first layer, which then runs whole."
    )
    return f"<table>{head}{''.join(cells)}</table><p class=word>{words}</p>"
