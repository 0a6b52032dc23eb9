"""What is known of a converted folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatefit.errors import CheckpointError
from gatefit.files import read_json

REPORT = "report.json"
BENCH = "bench.json"
_KEYS = {"model", "data", "seed", "images", "dense", "gated", "history"}


@dataclass(frozen=True)
class Result:
    """A converted folder, as its page and those of others show it."""

    name: str
    report: dict[str, Any]
    """The content of report.json."""
    bench: list[dict[str, Any]]
    """Rows of `gatefit bench`; empty if it has not been run."""


def read_result(folder: Path) -> Result:
    """What `convert` and `bench` wrote into `folder`.

    Raises:
        CheckpointError: there is no report.json, or one of the two is damaged or of another program.
    """
    report = read_json(folder / REPORT)
    if not isinstance(report, dict) or not set(report) >= _KEYS:
        raise CheckpointError(f"{folder / REPORT} is not one that gatefit convert wrote: keys are missing")
    bench = read_json(folder / BENCH) if (folder / BENCH).is_file() else {"rows": []}
    if not isinstance(bench, dict) or "rows" not in bench:
        raise CheckpointError(f"{folder / BENCH} is not one that gatefit bench wrote; remove it")
    return Result(folder.resolve().name, report, bench["rows"])
