"""The training loop: built on accelerate, resumable at any step, the same for dense and gated networks."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast, set_seed
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from gatefit.errors import CheckpointError, RecipeError, TrainingError, first_line
from gatefit.files import tensors_digest, write_tensors
from gatefit.gating.gates import Gate, is_gate_key
from gatefit.inputs.data import ImageSet, normalise
from gatefit.inputs.loader import augment, generator, loader
from gatefit.inputs.models import InputSpec
from gatefit.progress import OnProgress, Progress, silent
from gatefit.recipe import DistillationPart, FinetunePart
from gatefit.training.objective import Objective, Teacher

CHECKPOINT_SECONDS = 120


@dataclass(frozen=True)
class Epoch:
    """Means over one epoch of training."""

    epoch: int
    loss: float
    accuracy: float | None
    """Share of training images classified right; None without labels."""
    share: float
    """Share of the dense MACs that really ran (sequential placement, gates included)."""
    lr: float


class Controller(Protocol):
    """Changes what a network runs while the network trains: gates that close today, exits and widths to come."""

    def begin(self) -> None:
        """Prepare the network before the first step of a fresh training."""

    def penalty(self) -> Tensor | None:
        """Give the term of the loss for the last forward, a scalar; None: there is none."""

    def step(self, step: int, steps: int, average: Callable[[float], float]) -> None:
        """Act after optimiser step `step` (from 0) of `steps`; `average` is over processes."""

    def state(self) -> dict[str, float]:
        """Give what a checkpoint has to keep."""

    def restore(self, state: dict[str, float]) -> None:
        """Take back what a checkpoint kept."""


@dataclass
class _State:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    controllers: list[dict[str, float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    """Of the epoch under way: loss, right answers, share, images."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """Of the loss, in fp16."""


class Trainer:
    """Trains a network in place; `run` is the loop from top to bottom.

    The order of images, their augmentation and the random state of every step depend on the seed and the
    step alone, so a run that was broken off ends as if it had not been.

    Args:
        network: what is trained.
        images: training images, with labels where they fit.
        spec: how images are normalised.
        settings: the loop.
        stage: name of the training in progress records and checkpoints.
        seed: of all randomness.
        on_progress: called after each step.
        teacher: the original network, to distil from.
        distillation: how it teaches.
        controllers: what changes the work that the network does, in the order in which they act.
        share: gives the share of the dense MACs that the last forward ran; None: it always runs whole.
        gate_lr: peak learning rate of gates.

    Raises:
        RecipeError: the batch size does not fit, or there is nothing to learn from.
    """

    def __init__(
        self,
        network: nn.Module,
        images: ImageSet,
        spec: InputSpec,
        settings: FinetunePart,
        *,
        stage: str,
        seed: int,
        on_progress: OnProgress = silent,
        teacher: nn.Module | None = None,
        distillation: DistillationPart | None = None,
        controllers: Sequence[Controller] = (),
        share: Callable[[], float] | None = None,
        gate_lr: float = 0.0,
    ) -> None:
        self.network, self.images, self.spec, self.settings = network, images, spec, settings
        self.stage, self.seed, self.on_progress = stage, seed, on_progress
        self.controllers, self.share = controllers, share
        distillation = distillation or DistillationPart()
        AcceleratorState._reset_state()  # the precision of an earlier training in this process is over
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            kwargs_handlers=[unused],
            dynamo_backend="inductor" if settings.compile else None,
        )
        self.device = self.accelerator.device
        network.to(self.device)
        distilled = None if teacher is None else Teacher(teacher, network, distillation.feature_weight > 0)
        self.objective = Objective(network, distilled, distillation, images.labels is not None).to(self.device)
        self.state = _State()
        check_batches(settings, images)
        if images.labels is None and self.objective.teacher is None:
            raise RecipeError("there are neither labels that fit the network nor an original network to distil from")
        self.per_epoch = len(images) // settings.batch_size
        self.steps = self.per_epoch * settings.epochs
        self.optimizer = _optimizer(network, settings, gate_lr)

    def run(self, checkpoint: Path | None = None, resume: bool = False) -> list[Epoch]:
        """Train to the end, from `checkpoint` if there is one and `resume` is set."""
        s = self.settings
        found = checkpoint if resume and checkpoint is not None and checkpoint.exists() else None
        if self._average(float(found is not None)) not in (0, 1):
            raise CheckpointError(f"only some of the processes find {checkpoint}: all hosts must share its folder")
        if found is not None:
            self._restore(found)
        else:
            for controller in self.controllers:
                controller.begin()
            if self.controllers and checkpoint is not None and self.accelerator.is_main_process:
                self._save(checkpoint)  # what they prepared takes minutes
        self.objective.to(memory_format=torch.channels_last)
        objective, optimizer = self.accelerator.prepare(self.objective, self.optimizer)
        saved = time.monotonic()
        objective.train()
        for batch in self._batches():
            step = self.state.step
            self._set_rates(step)
            set_seed(((self.seed * 1_000_003 + step) * 64 + self.accelerator.process_index) % 2**32)
            sums = torch.zeros(3, dtype=torch.float64)
            for images, labels, index in zip(*(t.chunk(s.accumulate) for t in batch), strict=True):
                loss, right = self._loss(objective, images, labels, index, step // self.per_epoch)
                self.accelerator.backward(loss / s.accumulate)
                share = self.share() if self.share is not None else 1.0
                sums += torch.tensor([float(loss.detach()) / s.accumulate, right, share / s.accumulate])
            loss_sum, right_sum, share_sum = self.accelerator.reduce(sums.to(self.device), "sum").tolist()
            world = self.accelerator.num_processes
            if not math.isfinite(loss_sum):
                raise TrainingError(
                    f"the loss is not finite at step {step + 1} of {self.steps} ({self.stage}); lower the learning rate"
                )
            optimizer.step()
            optimizer.zero_grad()
            for controller in self.controllers:
                controller.step(step, self.steps, self._average)
            if self.controllers:
                self._agree([t for k, t in self.network.state_dict().items() if is_gate_key(k)])
            self._note(loss_sum / world, right_sum, share_sum / world)
            due = time.monotonic() - saved > CHECKPOINT_SECONDS or self.state.step % self.per_epoch == 0
            if checkpoint is not None and due and self.accelerator.is_main_process:
                self._save(checkpoint)
                saved = time.monotonic()
        self._agree(list(self.network.buffers()))
        # prepare() may have wrapped forward in autocast
        self.accelerator.unwrap_model(objective, keep_fp32_wrapper=False)
        self.network.eval().to(memory_format=torch.contiguous_format)
        return [Epoch(**e) for e in self.state.history]

    @torch.no_grad()
    def _agree(self, tensors: list[Tensor]) -> None:
        """Give every process what the first one has: each moved its gates by what its own images showed."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().clone()))

    def _average(self, value: float) -> float:
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device), "mean"))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give this process's part of every global batch that is still to come."""
        s, world, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        while self.state.step < self.steps:
            epoch, done = divmod(self.state.step, self.per_epoch)
            order = torch.randperm(len(self.images), generator=generator(self.seed, epoch))
            batches = order[: self.per_epoch * s.batch_size].view(self.per_epoch, s.batch_size)[done:]
            yield from loader(self.images, batches.chunk(world, 1)[rank].tolist())

    def _loss(
        self, objective: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int
    ) -> tuple[Tensor, int]:
        """Compute the loss of one forward pass, and how many images it got right."""
        x = images.to(self.device)
        if images.dtype == torch.uint8 and self.settings.augment:
            x = augment(x, index, len(self.images), self.seed, epoch, self.settings.flip)
        x = normalise(x, self.spec).contiguous(memory_format=torch.channels_last)
        labels = labels.to(self.device)
        try:
            loss, logits = objective(x, labels)
        except TorchDynamoException as error:
            raise TrainingError(
                f"the network could not be compiled ({first_line(error)}); set finetune.compile = false"
            ) from error
        for penalty in (controller.penalty() for controller in self.controllers):
            loss = loss if penalty is None else loss + penalty
        right = int((logits.detach().argmax(1) == labels).sum()) if self.images.labels is not None else 0
        return loss, right

    def _set_rates(self, step: int) -> None:
        """Set the rates: a short warm-up and a cosine to zero, or the paper's drops."""
        warm = min(1.0, (step + 1) / max(1.0, 0.1 * self.steps))
        factor = warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        if self.settings.drop_every:
            factor = 0.1 ** (step // self.per_epoch // self.settings.drop_every)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak"]

    def _note(self, loss: float, right: float, share: float) -> None:
        size, state = self.settings.batch_size, self.state
        state.step += 1
        for i, value in enumerate((loss * size, right, share * size, size)):
            state.sums[i] += value
        means = [x / state.sums[3] for x in state.sums[:3]]
        accuracy = means[1] if self.images.labels is not None else None
        ran = means[2] if self.share is not None else None
        self.on_progress(Progress(self.stage, state.step, self.steps, means[0], accuracy, ran))
        if state.step % self.per_epoch == 0:
            lr = self.optimizer.param_groups[0]["lr"]
            state.history.append(asdict(Epoch(state.step // self.per_epoch, means[0], accuracy, means[2], lr)))
            state.sums = [0.0] * 4

    def _save(self, file: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
        self.state.controllers = [controller.state() for controller in self.controllers]
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        state = json.dumps({**asdict(self.state), "stage": self.stage})
        write_tensors(file, tensors, {"state": state, "digest": tensors_digest(tensors, state)})

    def _restore(self, file: Path) -> None:
        try:
            with safetensors.safe_open(file, "pt") as stream:
                metadata = stream.metadata()
                tensors = {k: stream.get_tensor(k) for k in stream.keys()}  # noqa: SIM118
            if metadata["digest"] != tensors_digest(tensors, metadata["state"]):
                raise ValueError("its content is not what was saved")
            header = json.loads(metadata["state"])
            if header.pop("stage") != self.stage:
                raise ValueError("it is of another stage")
            self.state = _State(**header)
            for controller, state in zip(self.controllers, self.state.controllers, strict=True):
                controller.restore(state)
            self.network.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            saved = self.optimizer.state_dict()
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, i, name = key.split(".")
                    saved["state"].setdefault(int(i), {})[name] = value
            self.optimizer.load_state_dict(saved)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(self.state.scaler)
        except Exception as error:
            raise CheckpointError(
                f"{file} is damaged or of another run ({first_line(error)}); remove it to begin anew"
            ) from error


def check_batches(settings: FinetunePart, images: ImageSet) -> None:
    """Refuse to train with a batch size that processes and passes cannot share, or that is more than all images.

    Raises:
        RecipeError: it is one of these.
    """
    if not settings.epochs:
        return
    world = PartialState().num_processes
    if settings.batch_size % (world * settings.accumulate):
        raise RecipeError(
            f"batch size {settings.batch_size} cannot be divided among {world} processes and "
            f"{settings.accumulate} passes"
        )
    if settings.batch_size > len(images):
        raise RecipeError(
            f"batch size {settings.batch_size} is more than the {len(images)} training images; lower batch_size in "
            "the recipe's [finetune] or [baseline], such as with --set finetune.batch_size=16"
        )


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set all BN running statistics to the average over `batches`, everything else as in eval mode."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    network.eval()
    before = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        for batch in batches:
            network(batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    network.eval()


def _optimizer(network: nn.Module, settings: FinetunePart, gate_lr: float) -> torch.optim.SGD:
    """Group parameters by module identity: gates have their own learning rate and no weight decay."""
    gates = {id(p) for m in network.modules() if isinstance(m, Gate) for fc in m.layers for p in fc.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("every parameter of the network is frozen; set requires_grad on those to be trained")
    groups = [
        {
            "params": [p for p in trained if id(p) not in gates],
            "peak": settings.lr,
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in trained if id(p) in gates], "peak": gate_lr, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [g for g in groups if g["params"] and g["peak"]], settings.lr, settings.momentum, nesterov=settings.momentum > 0
    )
