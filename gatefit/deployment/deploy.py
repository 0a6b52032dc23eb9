"""Gated networks made fast: what no image needs goes for good, what an image does not need is not run for it."""

import statistics
from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor, fx

from gatefit.decisions import Placement
from gatefit.deployment.bench.timing import times
from gatefit.deployment.dynamic import assemble
from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.engines.onnx import OnnxNetwork, need_onnx, onnx_blocks, onnx_network
from gatefit.deployment.engines.pytorch import packed, torch_blocks
from gatefit.deployment.engines.registry import Backend
from gatefit.deployment.engines.segments import ONNX, TORCH
from gatefit.deployment.info import deployed_info
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.plan import BlockPlan, Observed, observe, plan_block
from gatefit.deployment.region import Region, region_or_none
from gatefit.deployment.tune import ROUNDS, tune
from gatefit.errors import DeployError
from gatefit.gating.gates import gates_of
from gatefit.gating.info import image_spec
from gatefit.mode import evaluating
from gatefit.renamed import renamed_argument

TUNING_IMAGES = 8
"""Images, or batches of more than that, that forms are timed by."""


@renamed_argument("harvest", "prune_unused")
def deploy(
    gated: fx.GraphModule,
    calibration: Tensor | Iterable[Tensor],
    backend: Backend = "torch",
    masks: int = 4,
    *,
    prune_unused: bool = False,
    tuned: bool = True,
    batch: int = 1,
    placement: Placement = "sequential",
) -> fx.GraphModule | OnnxNetwork:
    """Turn a gated network into one that runs only what each image needs; its outputs stay the same.

    Args:
        gated: from `retrofit`, `finetune` or `load`; untouched.
        calibration: normalised images, (B, C, H, W), or an iterable of such: they choose the masks.
        backend: "torch", a module for batches of any size; or "onnx", one file for ONNX Runtime on the CPU, for
            images of the size of the calibration images.
        masks: entries of each block's codebook, at most (see `gatefit.deployment.codebook`).
        prune_unused: also drop for good the channels that no calibration image opened; each block then has a codebook.
            Outputs may differ.
        tuned: keep only what is faster on this machine: of each block's forms with a codebook, and for "torch" of the
            whole with codebooks and the whole with weights gathered for each image
            (`gatefit.deployment.engines.native_network`); else every block has its codebook.
        batch: images at once that it is tuned for; "onnx" runs them one by one.
        placement: "sequential": gates first. "parallel", of backend "torch" alone: the first layer of each branch runs
            whole, on CUDA while the gates run on a stream of their own; blocks have codebooks (arXiv 2007.15151).

    Returns:
        (B, C, H, W) -> (B, classes); of backend "onnx" with the file's content as `.model`.

    Raises:
        GatefitError: `gated` has no gates, there are no calibration images, or the backend is not installed.
    """
    image_spec(gated)  # refuses a network that has no gates, is deployed, or takes other inputs
    images = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    _check(images, backend, masks, batch, placement)
    _check_placement(gated, placement)
    batch = 1 if backend == "onnx" else batch
    batches = whole_batches(torch.cat(images), batch, max(1, TUNING_IMAGES // batch))
    with evaluating(gated):
        observed = observe(gated, images)
        plans = _plans(gated, observed, batches, backend, masks, prune_unused, tuned, placement)
        deployed = assemble(gated, plans)
    if backend == "onnx":
        return onnx_network(deployed, images[0][:1])
    forms = [packed(deployed)]
    if tuned and not prune_unused and placement == "sequential":
        forms += _gathered_forms(gated, plans, batches)
    return _fastest(forms, batches)


def _check(images: list[Tensor], backend: str, masks: int, batch: int, placement: str) -> None:
    """Refuse arguments with which nothing can be deployed."""
    if not images or not all(len(x) for x in images):
        raise DeployError("there are no calibration images; pass a tensor (B, C, H, W) or an iterable of such")
    if masks < 1:
        raise DeployError(f"masks must be 1 or more, not {masks}")
    if backend not in get_args(Backend):
        raise DeployError(f"backend must be 'torch' or 'onnx', not {backend!r}")
    if placement not in get_args(Placement):
        raise DeployError(f"placement must be 'sequential' or 'parallel', not {placement!r}")
    if backend == "onnx":
        need_onnx()
        if placement == "parallel":
            raise DeployError("the parallel placement needs the backend 'torch'")
    if batch < 1:
        raise DeployError(f"batch must be 1 or more, not {batch}")


def _check_placement(gated: fx.GraphModule, placement: Placement) -> None:
    """Refuse the parallel placement where it would change nothing."""
    regions = (region_or_none(gated, gate) for gate in gates_of(gated).values())
    if placement == "parallel" and not any(region and region.prefix for region in regions):
        raise DeployError("no block has a first layer that can run beside its gates; use the sequential placement")


def _plans(
    gated: fx.GraphModule,
    observed: dict[str, Observed],
    batches: list[Tensor],
    backend: Backend,
    masks: int,
    prune_unused: bool,
    tuned: bool,
    placement: Placement,
) -> dict[str, tuple[BlockPlan, Region | None]]:
    """Plan each block: the form that is fastest in the backend, or without tuning the one with a codebook."""
    if not tuned:
        return {
            name: plan_block(gated, gate, observed[name], masks, prune_unused, placement)
            for name, gate in gates_of(gated).items()
        }
    layout, build = (torch.contiguous_format, onnx_blocks) if backend == "onnx" else (torch.channels_last, torch_blocks)
    given = [b.to(memory_format=layout) for b in batches]
    tried = tune(gated, observed, given, build, masks, prune_unused, placement)
    return {name: (plan, region) for name, (plan, region, _) in tried.items()}


def _gathered_forms(
    gated: fx.GraphModule, plans: dict[str, tuple[BlockPlan, Region | None]], batches: list[Tensor]
) -> list[fx.GraphModule]:
    """Make the network with gathered weights: with each segment in its fastest engine, and all of it in PyTorch."""
    if next(gated.parameters()).device.type != "cpu" or kernels() is None:
        return []
    with evaluating(gated):
        forms = [gathered_network(gated, plans, batches)]
        engines = deployed_info(forms[0]).engines or ()
        if ONNX in engines:
            forms.append(gathered_network(gated, plans, batches, [TORCH] * len(engines)))
    return forms


def _fastest(forms: list[fx.GraphModule], batches: list[Tensor]) -> fx.GraphModule:
    """Race the forms against each other, rounds interleaved."""
    if len(forms) == 1:
        return forms[0]
    taken = times(dict(enumerate(forms)), batches, ROUNDS)
    return forms[min(taken, key=lambda i: statistics.median(taken[i]))]


def whole_batches(images: Tensor, batch: int, most: int) -> list[Tensor]:
    """Cut at most `most` batches of one size from `images`, (B, C, H, W), which repeat where there are too few."""
    if batch > len(images):
        images = images.repeat(-(-batch // len(images)), 1, 1, 1)
    return list(images[: min(most, len(images) // batch) * batch].split(batch))
