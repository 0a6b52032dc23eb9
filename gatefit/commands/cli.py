"""The command line: parses, calls, shows."""

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from gatefit.errors import GatefitError

app = typer.Typer(
    help="Turn a trained network into one that runs only the blocks and channels each image needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Gates(StrEnum):
    """Which gates to retrofit."""

    lc = "lc"
    l = "l"  # noqa: E741
    c = "c"


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="timm or torchvision name, or file.py:function.")] = "",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Fetch the weights through timm.")] = False,
    weights: Annotated[str, typer.Option(help="A .safetensors or torch state-dict file.")] = "",
    data: Annotated[str, typer.Option(help="Image folder, tar, 'digits' or a name timm knows.")] = "",
    l1: Annotated[float | None, typer.Option(help="L1 coefficient on the saliences.")] = None,
    target: Annotated[float | None, typer.Option(help="Share of the MACs to end at.")] = None,
    gates: Annotated[Gates | None, typer.Option(help="Block gates (l), channel gates (c), or both.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the fine-tune.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML recipe; options override it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a broken run in --out.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: what there is.")] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness.")] = None,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Skip unreadable images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert a trained network into one that skips blocks and channels image by image."""
    with _session() as stdout:
        _choose_device(device)
        from gatefit.commands.convert import convert as run
        from gatefit.commands.display import TrainingBar, show_report
        from gatefit.errors import RecipeError
        from gatefit.recipe import Recipe, read_recipe

        if l1 is not None and target is not None:
            raise RecipeError("give --l1 or --target, not both: each sets how much is closed")
        whole = read_recipe(recipe) if recipe else Recipe()
        name = (recipe.stem if recipe else model.replace("/", "-").replace(".py:", "-")) or "model"
        whole = replace(
            whole,
            seed=whole.seed if seed is None else seed,
            model=_override(
                whole.model,
                name=_absolute(model) or None,
                pretrained=pretrained or None,
                weights=_absolute(weights) or None,
            ),
            data=_override(whole.data, name=_absolute(data) or None, corrupt="skip" if skip_corrupt else None),
            gates=_override(whole.gates, kinds=gates.value if gates else None),
            finetune=_override(whole.finetune, epochs=epochs),
            closing=_override(
                whole.closing if l1 is None and target is None else replace(whole.closing, l1=None, target=None),
                l1=l1,
                target=target,
            ),
        )
        folder = out or Path("runs") / name
        messages = Console(stderr=True, quiet=not _is_main(), markup=False)
        with TrainingBar(messages) as bar:
            done = run(whole, folder, resume=resume, on_progress=bar)
        if not _is_main():
            return
        if as_json:
            _print_json(stdout, done.report)
        else:
            console = Console(file=stdout, markup=False)
            show_report(console, done.report)
            console.print(f"written: {folder}; look at {folder / 'report.html'}", soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="timm or torchvision name, or file.py:function.")],
    image_size: Annotated[int, typer.Option(help="Side of the input; 0: the network's own.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every residual block of a network, what its gates would control, and what was refused."""
    with _session() as stdout:
        import torch

        from gatefit.commands.display import show_blocks
        from gatefit.gating.insert import find_blocks, no_block_message
        from gatefit.inputs.models import build, input_spec, parse_reference

        network = build(parse_reference(model))
        if image_size < 0:
            raise GatefitError(f"--image-size must be positive, not {image_size}")
        shape = input_spec(network, image_size or None).shape
        found = find_blocks(network, torch.zeros(2, *shape))
        if as_json:
            _print_json(stdout, {"model": model, **_plain(found)})
        else:
            show_blocks(Console(file=stdout, markup=False), model, found)
        if not found.blocks:
            from gatefit.errors import ConversionError

            raise ConversionError(no_block_message(model, found))


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a shell pattern such as 'resnet*d'.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which networks of timm and torchvision can be gated, and how much of their MACs."""
    with _session() as stdout:
        from rich.progress import track

        from gatefit.commands.coverage import cover
        from gatefit.commands.display import show_coverage
        from gatefit.inputs.models import names_like

        names = names_like(pattern)
        messages = Console(stderr=True)
        found = [cover(n) for n in track(names, "matching", console=messages, transient=True)]
        if as_json:
            _print_json(stdout, [asdict(c) for c in found])
        else:
            show_coverage(Console(file=stdout, markup=False), found)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A folder that gatefit convert wrote.")],
    data: Annotated[str, typer.Option(help="Other images; default: those of the conversion.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: what there is.")] = "",
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Skip unreadable images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Accuracy, agreement with the original, MACs per image and open gates of a converted network."""
    with _session() as stdout:
        _choose_device(device)
        from gatefit.commands.display import show_report
        from gatefit.commands.opened import evaluate_folder

        _, report = evaluate_folder(folder, data, skip_corrupt)
        if as_json:
            _print_json(stdout, report)
        else:
            show_report(Console(file=stdout, markup=False), report)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that gatefit convert wrote; the first one's report.")],
    data: Annotated[str, typer.Option(help="Other images; default: those of the conversion.")] = "",
    block: Annotated[str, typer.Option(help="Block whose channels are shown; default: the most varied one.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: what there is.")] = "",
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Skip unreadable images.")] = False,
) -> None:
    """Write a page with pictures, report.html, into the first folder: its figures, compared with the others'."""
    with _session() as stdout:
        _choose_device(device)
        from gatefit.commands.opened import report_folders

        page = report_folders(folders, data, skip_corrupt, block)
        Console(file=stdout, markup=False).print(f"written: {page}", soft_wrap=True)


class Backends(StrEnum):
    """What runs a deployed network."""

    torch = "torch"
    onnx = "onnx"


class Placements(StrEnum):
    """Where gates run."""

    sequential = "sequential"
    parallel = "parallel"


@app.command()
def deploy(
    folder: Annotated[Path, typer.Argument(help="A folder that gatefit convert wrote.")],
    data: Annotated[str, typer.Option(help="Images to choose masks by; default: those of the conversion.")] = "",
    backend: Annotated[Backends, typer.Option(help="A PyTorch module, or one ONNX file.")] = Backends.torch,
    masks: Annotated[int, typer.Option(help="Masks of each block, at most.")] = 4,
    prune_unused: Annotated[bool, typer.Option("--harvest", help="Drop channels no calibration image opened.")] = False,
    batch: Annotated[int, typer.Option(help="Images at once that it is tuned for.")] = 1,
    placement: Annotated[Placements, typer.Option(help="Gates first, or beside first layers.")] = Placements.sequential,
    out: Annotated[Path | None, typer.Option(help="The ONNX file; default DIR/model.onnx.")] = None,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Skip unreadable images.")] = False,
) -> None:
    """Make a converted network fast: only what an image needs is run, outputs stay the same."""
    with _session() as stdout:
        from gatefit.commands.deploy import deploy_folder
        from gatefit.commands.display import show_deployment
        from gatefit.commands.opened import open_folder

        opened = open_folder(folder, data, skip_corrupt)
        rows = deploy_folder(folder, opened, backend.value, masks, prune_unused, batch, out, placement.value)
        show_deployment(Console(file=stdout, markup=False), rows)


@app.command()
def bench(
    network: Annotated[str, typer.Argument(help="A folder that gatefit convert wrote, or with --what-if a model.")],
    data: Annotated[str, typer.Option(help="Images to run; default: those of the conversion.")] = "",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,8",
    what_if: Annotated[float | None, typer.Option(help="Share of the MACs to leave, at random; 1: a placebo.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as torch has chosen.")] = 0,
    rounds: Annotated[int, typer.Option(help="Rounds in which every engine runs once.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the original in its fastest forms beside the deployed network, rounds interleaved."""
    with _session() as stdout:
        from gatefit.commands.bench import run_bench
        from gatefit.commands.display import show_bench
        from gatefit.commands.report.result import BENCH
        from gatefit.files import write_json

        sizes = [int(b) if b.strip().isdigit() else 0 for b in batch.split(",")]
        if not all(sizes):
            raise GatefitError(f"--batch must be sizes with commas between, such as 1,8, not '{batch}'")
        timings, rows = run_bench(network, data, sizes, what_if, threads, rounds)
        measured = {"rows": [asdict(r) for r in rows], "engines": [asdict(t) for t in timings]}
        if as_json:
            _print_json(stdout, measured)
        else:
            show_bench(Console(file=stdout, markup=False), timings, rows)
        if Path(network).is_dir():  # for the report
            try:
                write_json(Path(network) / BENCH, measured)
            except GatefitError as error:
                Console(stderr=True, markup=False).print(f"note: not kept for the report: {error}", soft_wrap=True)


def main() -> None:
    """Entry point of the `gatefit` command."""
    _keep_memory()
    app()


@contextmanager
def _session() -> Iterator[TextIO]:
    """One line and exit 1 for what a user can mend; 130 for Ctrl-C.

    Gives the stream for results; whatever a library prints by itself goes to stderr, so that --json stays JSON.
    """
    try:
        stdout = sys.stdout
        with redirect_stdout(sys.stderr):
            yield stdout
    except GatefitError as error:
        typer.echo(f"gatefit: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("gatefit: interrupted; what convert has saved --resume goes on with", err=True)
        raise typer.Exit(130) from None
    except (OSError, RuntimeError, MemoryError) as error:
        typer.echo(f"gatefit: {type(error).__name__}: {' '.join(str(error).split())[:300]}", err=True)
        raise typer.Exit(1) from None


def _print_json(stream: TextIO, value: Any) -> None:
    print(json.dumps(value, indent=2), file=stream)


def _keep_memory() -> None:
    """Let glibc keep what it has freed: by default it returns each large activation to the system and faults it
    in again, which took two thirds of the time of networks at 224 pixels."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, 1 << 26)


def _choose_device(device: str) -> None:
    """accelerate reads the choice of device from the environment, before its first use.

    By itself it would take other accelerators than CUDA's too, of which some know no float64.
    """
    import torch

    if device == "cpu" or not (device or torch.cuda.is_available()):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise GatefitError(f"--device {device}: torch finds no CUDA device here; use --device cpu")
        if ":" in device:
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    elif device:
        raise GatefitError(f"--device must be cpu or cuda, not '{device}'")


def _absolute(value: str) -> str:
    """A path that exists as an absolute one, so that the written recipe holds anywhere; names as they are."""
    path, colon, function = value.rpartition(".py:")
    if colon:
        return f"{Path(path + '.py').absolute()}:{function}"
    return str(Path(value).expanduser().absolute()) if value and Path(value).expanduser().exists() else value


def _override(part: Any, **values: Any) -> Any:
    return replace(part, **{k: v for k, v in values.items() if v is not None})


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _plain(found: Any) -> dict[str, Any]:
    blocks = [
        {
            "name": b.name,
            "macs": b.macs,
            "channels": b.channels,
            "units": b.units,
            "target": b.channel_units.target if b.channel_units else None,
            "no_channel_gate": b.no_channel_gate,
            "layers": [asdict(layer) for layer in b.layers],
        }
        for b in found.blocks
    ]
    return {"macs": found.macs, "blocks": blocks, "skipped": [asdict(s) for s in found.skipped]}
