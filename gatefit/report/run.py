"""What is known of a converted folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatefit.files import read_json

REPORT = "report.json"
BENCH = "bench.json"


@dataclass(frozen=True)
class Run:
    """A converted folder, as reports show it."""

    name: str
    summary: dict[str, Any]
    """The content of report.json."""
    bench: list[dict[str, Any]]
    """Rows of `gatefit bench`; empty if it has not been run."""


def read_run(folder: Path) -> Run:
    """What `convert` and `bench` wrote into `folder`.

    Raises:
        CheckpointError: there is no report.json, or it is damaged.
    """
    summary = read_json(folder / REPORT)
    bench = read_json(folder / BENCH)["rows"] if (folder / BENCH).is_file() else []
    return Run(folder.resolve().name, summary, bench)
