"""What `gatefit bench` runs: a converted folder, or any network with gates that close at random."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gatefit.commands.opened import input_of, open_folder
from gatefit.deployment.bench.timing import Row, Timing, bench
from gatefit.deployment.bench.what_if import keep_open, set_share
from gatefit.deployment.deploy import deploy, whole_batches
from gatefit.deployment.engines.onnx import OnnxNetwork, has_onnx
from gatefit.deployment.engines.pytorch import Run
from gatefit.errors import DeployError
from gatefit.gating.info import info_of
from gatefit.gating.insert import retrofit
from gatefit.inputs.data import some_images
from gatefit.inputs.models import build, parse_reference
from gatefit.inputs.spec import StatedInput, network_input

IMAGES = 64
"""Of which masks are chosen, and that are timed; they are repeated for larger batches."""


def run_bench(
    network: str,
    data: str,
    batches: list[int],
    what_if: float | None,
    threads: int,
    rounds: int,
    stated: StatedInput,
    say: Callable[[str], None],
    trust_code: bool = False,
) -> tuple[list[Timing], list[Row]]:
    """Time a folder or model, see `gatefit.deployment.bench.timing.bench`; the number of threads is put back.

    `stated` is what the user says of a model's input, and `say` is told what its input is.

    Raises:
        GatefitError: there is no such folder or model, a model without `what_if`, or numbers out of range.
    """
    for name, value, least in (("--threads", threads, 0), ("--rounds", rounds, 1)):
        if value < least:
            raise DeployError(f"{name} must be {least} or more, not {value}")
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        if Path(network).is_dir():
            if stated != StatedInput():
                raise DeployError(f"{network} says its own input; --image-size, --mean and --std are for a model")
            say(str(input_of(Path(network))))
            original, gated, images = _folder(Path(network), data, trust_code)
        elif what_if is None:
            raise DeployError(f"'{network}' is no folder; a model that is not converted needs --what-if SHARE")
        else:
            original, gated, images = _what_if(network, what_if, stated, say)
        # Written ahead: what exporting leaves in memory is not the network's.
        file = deploy(gated, images, "onnx").model if has_onnx() else None
        timings: list[Timing] = []
        rows: list[Row] = []
        for size in batches:
            deployed: dict[str, Callable[[], Run]] = {"torch": functools.partial(deploy, gated, images, batch=size)}
            if isinstance(file, bytes):
                deployed["onnxruntime"] = functools.partial(OnnxNetwork, file)
            timed = images if size <= len(images) else torch.cat(whole_batches(images, size, 1))
            some_timings, some_rows = bench(original, gated, deployed, timed, size, rounds)
            timings, rows = timings + some_timings, rows + some_rows
        return timings, rows
    finally:
        torch.set_num_threads(before)


def _folder(folder: Path, data: str, trust_code: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    opened = open_folder(folder, data, trust_code=trust_code)
    if opened.original is None:
        raise DeployError(f"{folder} does not hold the original network to compare with")
    return opened.original, opened.gated, some_images(opened.data.train, info_of(opened.gated).input, IMAGES)


def _what_if(
    name: str, share: float, stated: StatedInput, say: Callable[[str], None]
) -> tuple[nn.Module, nn.Module, Tensor]:
    if not 0 < share <= 1:
        raise DeployError(f"--what-if must lie between 0 and 1, not {share}")
    torch.manual_seed(0)
    model = build(parse_reference(name)).eval()
    taken = network_input(model, stated)
    say(str(taken))
    shape = taken.spec.shape
    gated = retrofit(model, torch.zeros(2, *shape), "lc", "step").eval()
    # Noise with a colour of its own for each image: without it all images look alike once they are pooled.
    images = torch.randn(IMAGES, *shape) + torch.randn(IMAGES, shape[0], 1, 1)
    if share < 1:
        set_share(gated, images, share)
    else:
        keep_open(gated, images)
    return model, gated, images
