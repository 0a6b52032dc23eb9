"""Gated networks made fast: what no image needs goes for good, what an image does not need is not run for it."""

import statistics
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from gatefit.decisions import Placement
from gatefit.deployment.bench.timing import times
from gatefit.deployment.dynamic import assemble
from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.engines.runtimes import OnnxNetwork, need_onnx, onnx_blocks, onnx_network, packed, torch_blocks
from gatefit.deployment.engines.segments import ONNX, TORCH
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.plan import observe, plan_block
from gatefit.deployment.region import region_or_none
from gatefit.deployment.tune import ROUNDS, tune
from gatefit.errors import DeployError
from gatefit.gating.gates import gates_of

Backend = Literal["torch", "onnx"]
TUNING_IMAGES = 8
"""Images, or batches of more than that, that forms are timed by."""


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
    gates = gates_of(gated)
    images = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    if not images or not all(len(x) for x in images):
        raise DeployError("there are no calibration images; pass a tensor (B, C, H, W) or an iterable of such")
    if masks < 1:
        raise DeployError(f"masks must be 1 or more, not {masks}")
    if backend not in ("torch", "onnx"):
        raise DeployError(f"backend must be 'torch' or 'onnx', not {backend!r}")
    if placement not in get_args(Placement):
        raise DeployError(f"placement must be 'sequential' or 'parallel', not {placement!r}")
    if backend == "onnx":
        need_onnx()
        if placement == "parallel":
            raise DeployError("the parallel placement needs the backend 'torch'")
    if batch < 1:
        raise DeployError(f"batch must be 1 or more, not {batch}")
    if placement == "parallel" and not any(p and p.prefix for p in (region_or_none(gated, g) for g in gates.values())):
        raise DeployError("no block has a first layer that can run beside its gates; use the sequential placement")
    training = gated.training
    seen = observe(gated.eval(), images)
    batch = 1 if backend == "onnx" else batch
    batches = whole_batches(torch.cat(images), batch, max(1, TUNING_IMAGES // batch))
    if tuned:
        layout, build = (
            (torch.contiguous_format, onnx_blocks) if backend == "onnx" else (torch.channels_last, torch_blocks)
        )
        tried = tune(gated, seen, [b.to(memory_format=layout) for b in batches], build, masks, prune_unused, placement)
        plans = {name: (plan, region) for name, (plan, region, _) in tried.items()}
    else:
        plans = {
            name: plan_block(gated, gate, seen[name], masks, prune_unused, placement) for name, gate in gates.items()
        }
    deployed = assemble(gated, plans)
    deployed.meta["plans"] = tuple(plan for plan, _ in plans.values())
    gated.train(training)
    if backend == "onnx":
        return onnx_network(deployed, images[0][:1])
    forms = [packed(deployed)]
    gathers = tuned and not prune_unused and placement == "sequential"
    if gathers and next(gated.parameters()).device.type == "cpu" and kernels() is not None:
        forms.append(gathered_network(gated, plans, batches))
        engines = forms[-1].meta["engines"]
        if ONNX in engines:
            forms.append(gathered_network(gated, plans, batches, [TORCH] * len(engines)))
    chosen = forms[0]
    if len(forms) > 1:
        times_ms = times(dict(enumerate(forms)), batches, ROUNDS)
        chosen = forms[min(times_ms, key=lambda i: statistics.median(times_ms[i]))]
    chosen.meta["plans"] = deployed.meta["plans"]
    return chosen


def whole_batches(images: Tensor, batch: int, most: int) -> list[Tensor]:
    """At most `most` batches of one size of `images`, (B, C, H, W); these are repeated where there are not enough."""
    if batch > len(images):
        images = images.repeat(-(-batch // len(images)), 1, 1, 1)
    return list(images[: min(most, len(images) // batch) * batch].split(batch))
