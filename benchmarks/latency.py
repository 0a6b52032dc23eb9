"""Time networks whose gates close half of their MACs beside the fastest forms of the originals; no training.

    python benchmarks/latency.py                                  # all: writes docs/speed.md and docs/speed.json
    python benchmarks/latency.py resnet18 --threads 1 --out s.md  # those with "resnet18" in their name
    python benchmarks/latency.py --folders runs/mine              # converted ones, on the images of their conversion

What stands in the files and is not timed again stays, if it is of the same machine. Nothing else should run
meanwhile. Each network and number of threads has a process of its own.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gatefit.commands.deploy import this_machine
from gatefit.files import write_atomically, write_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """A network and the batch sizes that it is timed at."""

    network: str
    batches: tuple[int, ...]
    rounds: int
    share: float = 0.5
    """Of the MACs, that the gates leave; 1 is a placebo, which must show no gain; 0: a folder, as it was converted."""


CASES = (
    Case("examples/cifar_resnet.py:resnet18", (1, 32), 30),
    Case("examples/cifar_resnet.py:resnet18", (1,), 30, share=1.0),
    Case("timm/resnet50", (1, 8), 12),
    Case("timm/mobilenetv2_100", (1, 32), 16),
)


def main() -> None:
    """Run, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folders", type=Path, nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed.md")
    options = parser.parse_args()
    if len({folder.resolve().name for folder in options.folders}) < len(options.folders):
        parser.error("two folders of one name; their rows could not be told apart")
    pattern = options.pattern if options.pattern is not None or options.folders else ""
    cases = [case for case in CASES if pattern is not None and pattern in case.network]
    cases += [Case(str(folder.resolve()), (1, 32), 30, share=0.0) for folder in options.folders]
    content = former(options.out.with_suffix(".json"))
    for case in cases:
        about = described(case)
        for threads in options.threads:
            measured = run(case, threads)
            for kind in ("rows", "engines"):
                key = (about["network"], case.share, threads)
                others = [r for r in content[kind] if (r["network"], r["share"], r["threads"]) != key]
                content[kind] = others + [about | row for row in measured[kind]]
            write_json(options.out.with_suffix(".json"), content)
            write_atomically(options.out, lambda file: file.write_text(report(content)))
    Console().print(f"written: {options.out}", markup=False)


def former(file: Path) -> dict[str, Any]:
    """What was measured before on this machine."""
    machine = asdict(this_machine())
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    same = all(content.get("machine", {}).get(k) == machine[k] for k in ("processor", "torch"))
    return content if same else {"machine": machine, "rows": [], "engines": []}


def described(case: Case) -> dict[str, Any]:
    """What each of its rows says; of a folder also the accuracy of both networks on the test images."""
    if case.share:
        return {"network": case.network, "share": case.share}
    done = json.loads((Path(case.network) / "report.json").read_text())
    accuracies = {"dense_accuracy": done["dense"]["accuracy"], "accuracy": done["gated"]["accuracy"]}
    return {"network": Path(case.network).name, "share": case.share, **accuracies}


def run(case: Case, threads: int) -> dict[str, list[dict[str, Any]]]:
    """The rows and engines of `gatefit bench`."""
    sizes = ",".join(map(str, case.batches))
    command = [sys.executable, "-m", "gatefit", "bench", case.network, "--batch", sizes]
    command += ["--what-if", str(case.share)] if case.share else []
    command += ["--threads", str(threads), "--rounds", str(case.rounds), "--json"]
    Console(stderr=True).print(f"{case.network}, {threads} threads", markup=False)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    measured: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return measured


def report(content: dict[str, Any]) -> str:
    """docs/speed.md."""
    machine = content["machine"]
    order = {case.network: i for i, case in enumerate(CASES)}
    rows = sorted(
        content["rows"], key=lambda r: (order.get(r["network"], len(order)), r["network"], r["share"], r["threads"])
    )
    random, converted = [r for r in rows if r["share"]], [r for r in rows if not r["share"]]
    text = (
        "# Speed\n\nThis page is written by `python benchmarks/latency.py`; numbers are never edited by hand.\n\n"
        "- The first table times networks whose gates are not trained. They close half of the MACs at random "
        "(`gatefit bench MODEL --what-if 0.5`), or nothing: MACs share 1, a placebo that shows what gates cost. "
        "Inputs are random.\n"
        "- *original, fastest* is the engine that runs the fp32 original fastest. *gated, in* is the engine of the "
        "deployed network. Both were timed in one run, in turns; times are medians for a batch.\n"
        "- *realised* is (1 - time share) / (1 - MACs share). At 1 all that is saved shows on the clock. Below 0 the "
        "gated network is slower.\n"
        "- Compare within a row only. Different rows may be of different days, when the machine had more or less to "
        "itself.\n"
        "- INT8 of the original is not in these tables. It was faster wherever it was measured: see the [log](log.md)."
        "\n\n"
        f"Machine: {machine['processor']}, PyTorch {machine['torch']}, fp32.\n\n" + table(random)
    )
    if converted:
        text += (
            "\n## Converted networks\n\nEach was converted with the recipe and options that name it "
            "(recipes/README.md). Inputs are images of its data set, decoded and normalised before the clock starts. "
            "Accuracy is that of the original and of the gated network on the whole test set.\n\n"
        ) + table(converted, {"accuracy": accuracy})
    return text + every_engine(content["engines"])


def table(rows: list[dict[str, Any]], more: dict[str, Callable[[dict[str, Any]], str]] | None = None) -> str:
    """A line for each row, with columns that say `more` of its network."""
    columns = {
        "network": name_of,
        **(more or {}),
        "threads": lambda r: str(r["threads"]),
        "batch": lambda r: str(r["batch"]),
        "original, fastest": lambda r: r["dense_engine"],
        "ms": lambda r: f"{r['dense_ms']:.2f}",
        "gated, in": lambda r: r["engine"],
        "ms, gated": lambda r: f"{r['dynamic_ms']:.2f}",
        "MACs share": lambda r: f"{r['macs_share']:.3f}",
        "time share": lambda r: f"{r['time_share']:.3f}",
        "realised": realised,
        "largest difference": lambda r: f"{r['max_abs_diff']:.0e}",
        "gates alone, ms": lambda r: f"{r['gates_ms']:.2f}",
        "peak MB, original and gated": megabytes,
    }
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(say(r) for say in columns.values())} |" for r in rows)]) + "\n"


def every_engine(engines: list[dict[str, Any]]) -> str:
    """A table of all that was timed, a line for each network, number of threads and batch size."""
    runs: dict[tuple[Any, ...], dict[str, str]] = {}
    for e in engines:
        name = e["engine"] + (", gated" if e["dynamic"] else "")
        key = (name_of(e), e["share"], e["threads"], e["batch"])
        runs.setdefault(key, {})[name] = f"{e['p50_ms']:.2f} ({e['p95_ms']:.2f})"
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    head = (
        "\n## Every engine\n\nMilliseconds for a batch: the median, and the 95th percentile in brackets. Share 1 is "
        "the placebo, whose gates never close. Share 0 marks converted networks.\n\n"
        f"| network | share | threads | batch | {' | '.join(names)} |\n{'| --- ' * (4 + len(names))}|\n"
    )
    lines = [f"| {' | '.join([*map(str, key), *(run.get(n, '-') for n in names)])} |" for key, run in runs.items()]
    return head + "\n".join(lines) + "\n"


def name_of(row: dict[str, Any]) -> str:
    """Of the network, without what comes before."""
    return str(row["network"].split("/")[-1].split(":")[-1])


def accuracy(row: dict[str, Any]) -> str:
    """Of both, in percent."""
    return " -> ".join(f"{100 * row[k]:.2f}" for k in ("dense_accuracy", "accuracy") if row[k] is not None) or "-"


def megabytes(row: dict[str, Any]) -> str:
    """Peak memory of both."""
    return ", ".join("-" if m is None else f"{m:.0f}" for m in (row["dense_peak_mb"], row["dynamic_peak_mb"]))


def realised(row: dict[str, Any]) -> str:
    """A dash for a placebo, which has nothing to realise."""
    return f"{row['realised']:.2f}" if row["macs_share"] < 0.99 else "-"


if __name__ == "__main__":
    main()
