"""Time networks whose gates close half of their MACs beside the fastest forms of the originals; no training.

    python benchmarks/latency.py                                  # all: writes docs/speed.md and docs/speed.json
    python benchmarks/latency.py resnet18 --threads 1 --out s.md  # those with "resnet18" in their name

Nothing else should run meanwhile. Each network and number of threads has a process of its own.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gatefit.deployment.folder import this_machine
from gatefit.files import write_atomically, write_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """A network and the batch sizes that it is timed at."""

    network: str
    batches: tuple[int, ...]
    rounds: int
    share: float = 0.5
    """Of the MACs, that the gates leave; 1 is a placebo, which must show no gain."""


CASES = (
    Case("examples/cifar_resnet.py:resnet18", (1, 32), 30),
    Case("examples/cifar_resnet.py:resnet18", (1,), 30, share=1.0),
    Case("timm/resnet50", (1, 8), 12),
    Case("timm/mobilenetv2_100", (1, 32), 16),
)


def main() -> None:
    """Run, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed.md")
    options = parser.parse_args()
    content: dict[str, Any] = {"machine": asdict(this_machine()), "rows": [], "engines": []}
    for case in CASES:
        if options.pattern in case.network:
            for threads in options.threads:
                measured = run(case, threads)
                for kind in ("rows", "engines"):
                    content[kind] += [{"network": case.network, "share": case.share} | row for row in measured[kind]]
    write_json(options.out.with_suffix(".json"), content)
    write_atomically(options.out, lambda file: file.write_text(report(content)))
    Console().print(f"written: {options.out}", markup=False)


def run(case: Case, threads: int) -> dict[str, list[dict[str, Any]]]:
    """The rows and engines of `gatefit bench`."""
    sizes = ",".join(map(str, case.batches))
    command = [sys.executable, "-m", "gatefit", "bench", case.network, "--what-if", str(case.share), "--batch", sizes]
    command += ["--threads", str(threads), "--rounds", str(case.rounds), "--json"]
    Console(stderr=True).print(f"{case.network}, {threads} threads", markup=False)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    measured: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return measured


def report(content: dict[str, Any]) -> str:
    """docs/speed.md."""
    machine = content["machine"]
    head = (
        "# Speed\n\nWritten by `python benchmarks/latency.py`. Gates without training close "
        "half of the MACs (`gatefit bench MODEL --what-if 0.5`), or nothing (`--what-if 1`, a placebo); inputs are "
        "random. Each dynamic engine stands beside the fastest form of the original in the same run; times are medians "
        "of interleaved rounds. Realised is (1 - time share) / (1 - MACs share): 1 where all that is saved shows, "
        "negative where the dynamic network is slower.\n\n"
        f"Machine: {machine['processor']}, PyTorch {machine['torch']}, fp32.\n\n"
        "| network | threads | batch | original, fastest | ms | gated, in | ms | MACs share | time share | realised "
        "| largest difference | gates alone, ms | peak MB, original and gated |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    lines = [
        f"| {name_of(r)} | {r['threads']} | {r['batch']} | {r['dense_engine']} "
        f"| {r['dense_ms']:.2f} | {r['engine']} | {r['dynamic_ms']:.2f} | {r['macs_share']:.3f} "
        f"| {r['time_share']:.3f} | {realised(r)} | {r['max_abs_diff']:.0e} | {r['gates_ms']:.2f} | {megabytes(r)} |"
        for r in content["rows"]
    ]
    return head + "\n".join(lines) + "\n" + every_engine(content["engines"])


def every_engine(engines: list[dict[str, Any]]) -> str:
    """A table of all that was timed, a line for each network, number of threads and batch size."""
    runs: dict[tuple[Any, ...], dict[str, str]] = {}
    for e in engines:
        name = e["engine"] + (", gated" if e["dynamic"] else "")
        key = (name_of(e), e["share"], e["threads"], e["batch"])
        runs.setdefault(key, {})[name] = f"{e['p50_ms']:.2f} ({e['p95_ms']:.2f})"
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    head = (
        "\n## Every engine\n\nMilliseconds for a batch: median, and 95th percentile in brackets. A share of 1 is the "
        "placebo: what gates cost that never close.\n\n"
        f"| network | share | threads | batch | {' | '.join(names)} |\n{'| --- ' * (4 + len(names))}|\n"
    )
    lines = [f"| {' | '.join([*map(str, key), *(run.get(n, '-') for n in names)])} |" for key, run in runs.items()]
    return head + "\n".join(lines) + "\n"


def name_of(row: dict[str, Any]) -> str:
    """Of the network, without what comes before."""
    return str(row["network"].split("/")[-1].split(":")[-1])


def megabytes(row: dict[str, Any]) -> str:
    """Peak memory of both."""
    return ", ".join("-" if m is None else f"{m:.0f}" for m in (row["dense_peak_mb"], row["dynamic_peak_mb"]))


def realised(row: dict[str, Any]) -> str:
    """A dash for a placebo, which has nothing to realise."""
    return f"{row['realised']:.2f}" if row["macs_share"] < 0.99 else "-"


if __name__ == "__main__":
    main()
