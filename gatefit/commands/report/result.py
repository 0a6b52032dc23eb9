"""What is known of a converted folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatefit.errors import CheckpointError
from gatefit.files import read_json

REPORT = "report.json"
"""Its keys are described by gatefit/schemas/report.schema.json."""
BENCH = "bench.json"
_KEYS = {"model", "data", "seed", "images", "dense", "gated", "history"}
_DENSE = {"accuracy", "macs"}
_GATED = {"accuracy", "agreement", "macs_sequential", "macs_parallel"}
_EPOCH = {"epoch", "loss", "accuracy", "share"}
_ROW = {"engine", "batch", "threads", "macs_share", "time_share"}


@dataclass(frozen=True)
class Result:
    """A converted folder, as its page and those of others show it."""

    name: str
    report: dict[str, Any]
    """The content of report.json."""
    bench: list[dict[str, Any]]
    """Rows of `gatefit bench`; empty if it has not been run."""


def read_result(folder: Path) -> Result:
    """Read what `convert` and `bench` wrote into `folder`.

    Raises:
        CheckpointError: there is no report.json, or one of the two is damaged or of another program.
    """
    report = read_json(folder / REPORT, "report")
    parts = [(_DENSE, "dense"), (_GATED, "gated")]
    if not (
        _has(report, _KEYS)
        and all(_has(report[part], keys) for keys, part in parts)
        and _all_have(report["history"], _EPOCH)
    ):
        raise CheckpointError(f"{folder / REPORT} is not one that gatefit convert wrote: keys are missing")
    bench = read_json(folder / BENCH, "bench") if (folder / BENCH).is_file() else {"rows": []}
    if not (_has(bench, {"rows"}) and _all_have(bench["rows"], _ROW)):
        raise CheckpointError(f"{folder / BENCH} is not one that gatefit bench wrote; remove it")
    return Result(folder.resolve().name, report, bench["rows"])


def _has(value: Any, keys: set[str]) -> bool:
    return isinstance(value, dict) and set(value) >= keys


def _all_have(values: Any, keys: set[str]) -> bool:
    return isinstance(values, list) and all(_has(value, keys) for value in values)
