"""Gated networks made fast: what no image needs goes for good, what an image does not need is not run for it."""

import warnings
from collections.abc import Callable, Iterable
from typing import get_args

import torch
from torch import Tensor, fx, nn

from gatefit.decisions import Placement
from gatefit.deployment.compare import latency_of
from gatefit.deployment.dynamic import assemble
from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.engines.onnx import OnnxNetwork, need_onnx, onnx_blocks, onnx_network
from gatefit.deployment.engines.pytorch import packed, torch_blocks
from gatefit.deployment.engines.registry import Backend
from gatefit.deployment.engines.segments import ONNX, TORCH
from gatefit.deployment.info import Images, deployed_info, fingerprint
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.network import DeployedNetwork, seal
from gatefit.deployment.plan import BlockPlan, Latency, Observed, observe, plan_block
from gatefit.deployment.region import Region, region_or_none
from gatefit.deployment.tune import milliseconds, tune
from gatefit.errors import DeployError
from gatefit.gating.gates import gates_of
from gatefit.mode import evaluating
from gatefit.progress import OnProgress, Progress, silent
from gatefit.renamed import renamed_argument

TUNING_IMAGES = 8
"""Images, or batches of more than that, that forms are timed by."""


EXPECTED_IMAGES = 4
"""That an expectation is measured by."""


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
    on_progress: OnProgress = silent,
) -> DeployedNetwork | OnnxNetwork:
    """Turn a gated network into one that runs only what each image needs; its outputs stay the same.

    Its `.latency` says how long it takes on this machine beside the network without gates; a warning says so where it
    is slower. It is for inference only, and its weights cannot be changed.

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
            (`gatefit.deployment.engines.native_network`); else every block has its codebook, and nothing is timed.
        batch: images at once that it is tuned for; "onnx" runs them one by one, so that it must be 1 there.
        placement: "sequential": gates first. "parallel", of backend "torch" alone: the first layer of each branch runs
            whole, on CUDA while the gates run on a stream of their own; blocks have codebooks (arXiv 2007.15151).
        on_progress: told each step.

    Returns:
        (B, C, H, W) -> (B, classes); of backend "onnx" with the file's content as `.model`.

    Raises:
        GatefitError: `gated` has no gates, there are no calibration images, they or the weights are not finite, or the
            backend is not installed.
    """
    deployed = make_deployed(
        gated,
        calibration,
        backend,
        masks,
        prune_unused=prune_unused,
        tuned=tuned,
        batch=batch,
        placement=placement,
        on_progress=on_progress,
    )
    latency = deployed.latency
    if latency is not None and latency.slower:
        warnings.warn(
            f"the deployed network takes {latency.deployed:.2f} ms for a batch of {latency.batch} on this machine, and "
            f"without gates {latency.original:.2f} ms ({latency.engine}); close more gates, try the other backend, or "
            "keep the original here",
            stacklevel=3,
        )
    return deployed


def make_deployed(
    gated: fx.GraphModule,
    calibration: Tensor | Iterable[Tensor],
    backend: Backend = "torch",
    masks: int = 4,
    *,
    prune_unused: bool = False,
    tuned: bool = True,
    batch: int = 1,
    placement: Placement = "sequential",
    on_progress: OnProgress = silent,
    compared: bool = True,
) -> DeployedNetwork | OnnxNetwork:
    """Do what `deploy` does, without the warning; and where it is not to be `compared`, without the dense network."""

    def say(line: str) -> None:
        on_progress(Progress("deploy", message=line))

    gates_of(gated)  # refuses a network that has none
    images = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    compared &= tuned and next(gated.parameters()).device.type == "cpu"
    _check(images, backend, masks, batch, placement)
    _check_finite(gated, images)
    _check_placement(gated, placement)
    batches = whole_batches(torch.cat(images), batch, max(1, TUNING_IMAGES // batch))
    weights = fingerprint(gated.state_dict())
    say(f"asking the gates what {sum(map(len, images))} images open")
    with evaluating(gated):
        observed = observe(gated, images)
        if tuned:
            say("timing the forms of each block with masks")
        plans = _plans(gated, observed, batches, backend, masks, prune_unused, tuned, placement)
        deployed = assemble(gated, plans)
    if backend == "onnx":
        say("writing the ONNX file")
        file = onnx_network(deployed, images[0][:1])
        file.weights = weights
        file.latency = latency_of(file, gated, batches, backend, say) if compared else None
        return file
    forms = [packed(deployed)]
    if tuned and not prune_unused and placement == "sequential":
        forms += _gathered_forms(gated, plans, batches, say)
    fastest = _fastest(forms, batches)
    latency = latency_of(fastest, gated, batches, backend, say) if compared else None
    return seal(fastest, Images(tuple(images[0].shape[1:]), images[0].dtype), latency, weights)


def expected_latency(gated: fx.GraphModule, images: Tensor) -> Latency | None:
    """Time what `deploy` would probably make for single images, without trying each block's forms: in seconds.

    Raises:
        GatefitError: the network cannot be deployed.
    """
    batches = list(images[:EXPECTED_IMAGES].split(1))
    with evaluating(gated):
        plans = _plans(gated, observe(gated, [images]), batches, "torch", 4, False, False, "sequential")
        forms = [packed(assemble(gated, plans)), *_gathered_forms(gated, plans, batches, lambda line: None)]
    return latency_of(_fastest(forms, batches), gated, batches, "torch")


def _check_finite(gated: fx.GraphModule, images: list[Tensor]) -> None:
    """Refuse weights and images that are not numbers: gates close for these, and nobody would hear of it."""
    if not all(x.isfinite().all() for x in images):
        raise DeployError("the calibration images hold NaN or infinite values; normalise them, or leave such out")
    for name, tensor in (*gated.named_parameters(), *gated.named_buffers()):
        # a buffer may hold infinity on purpose, such as a mask of attention
        if tensor.isnan().any() or (isinstance(tensor, nn.Parameter) and tensor.isinf().any()):
            raise DeployError(f"'{name}' of the network holds NaN or infinite values; train or load it anew")


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
        if batch > 1:
            raise DeployError(f"the backend 'onnx' runs images one by one: leave batch at 1, not {batch}")
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
    gated: fx.GraphModule,
    plans: dict[str, tuple[BlockPlan, Region | None]],
    batches: list[Tensor],
    say: Callable[[str], None],
) -> list[fx.GraphModule]:
    """Make the network with gathered weights: with each segment in its fastest engine, and all of it in PyTorch."""
    if next(gated.parameters()).device.type != "cpu":
        return []
    say("building the compiled kernels, or taking them from the cache")
    if kernels() is None:
        return []
    say("timing what lies between the blocks in each engine")
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
    times_ms = milliseconds(forms, [(b,) for b in batches])
    return forms[min(range(len(forms)), key=times_ms.__getitem__)]


def whole_batches(images: Tensor, batch: int, most: int) -> list[Tensor]:
    """At most `most` batches of one size of `images`, (B, C, H, W); these are repeated where there are not enough."""
    if batch > len(images):
        images = images.repeat(-(-batch // len(images)), 1, 1, 1)
    return list(images[: min(most, len(images) // batch) * batch].split(batch))
