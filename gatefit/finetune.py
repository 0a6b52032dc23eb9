"""The fine-tune: cross-entropy, distillation from the original, and the penalty that closes gates."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

from gatefit.control import GAIN, lower, price_threshold, smallest_share, threshold_for
from gatefit.cost import Costs, costs_of, macs_per_image, opens_of
from gatefit.data import ImageSet, Splits, as_images, normalise
from gatefit.errors import CheckpointError, RecipeError, TrainingError
from gatefit.files import write_atomically
from gatefit.gates import Gate
from gatefit.penalty import salience_penalty
from gatefit.recipe import FinetunePart
from gatefit.start import start_from_data

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


@dataclass(frozen=True)
class Progress:
    """Where a training stands after a step."""

    stage: str
    step: int
    steps: int
    loss: float
    accuracy: float | None
    share: float


@dataclass
class _State:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    factor: float = 1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    """loss, right answers, share, images of the epoch under way."""


Report = Callable[[Progress], None]


def finetune(
    gated: fx.GraphModule,
    data: "Splits | ImageSet | str | tuple[Tensor, Tensor]",
    teacher: nn.Module | None = None,
    l1: float | None = None,
    target: float | None = None,
    *,
    settings: FinetunePart | None = None,
    start: str = "data",
    seed: int = 0,
    report: Report | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> list[Epoch]:
    """Train a gated network so that its gates close, in place; leave it in eval mode.

    Args:
        gated: from `retrofit`.
        data: see `gatefit.data.as_images`; without labels that fit the head, distillation alone trains it.
        teacher: the original network, to distil from; None: labels alone.
        l1: L1 coefficient on the saliences of an image.
        target: share of the dense MACs to end at, instead of `l1`.
        settings: all other settings.
        start: "data" (see `gatefit.start`) or "identity".
        seed: of the order of images, augmentation and dropout.
        report: called after each step.
        checkpoint: a file that is written as training goes, and removed by nobody but its owner.
        resume: go on from `checkpoint` if it is there; the end is then the same as without the break.

    Raises:
        RecipeError: contradictory settings, or a target that cannot be reached.
        TrainingError: the loss is not finite.
        CheckpointError: `checkpoint` is damaged or cannot be written.
    """
    given = asdict(settings or FinetunePart())
    if l1 is not None or target is not None:
        given |= {"l1": l1, "target": target}
    settings = FinetunePart(**given)
    images = as_images(data, gated.meta["input"], seed).train
    trainer = _Trainer(gated, teacher, images, settings, start, seed, report or (lambda _: None))
    return trainer.run(checkpoint, resume)


class _Trainer:
    """One fine-tune; `run` is the loop from top to bottom."""

    def __init__(
        self,
        gated: fx.GraphModule,
        teacher: nn.Module | None,
        images: ImageSet,
        settings: FinetunePart,
        start: str,
        seed: int,
        report: Report,
    ) -> None:
        self.gated, self.images, self.settings = gated, images, settings
        self.start, self.seed, self.report = start, seed, report
        self.accelerator = Accelerator(mixed_precision=settings.precision)
        self.device = self.accelerator.device
        gated.to(self.device)
        self.costs: Costs = costs_of(gated, gated.meta["input"].shape)
        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False) if teacher else None
        self.state = _State()
        self._check()
        self.per_epoch = len(images) // settings.batch_size
        self.steps = self.per_epoch * settings.epochs
        self.optimizer = _optimizer(gated, settings)

    def _check(self) -> None:
        s, world = self.settings, self.accelerator.num_processes
        if s.l1 is None and s.target is None:
            raise RecipeError("give --l1 X or --target SHARE: without either no gate would close")
        if s.batch_size % (world * s.accumulate):
            raise RecipeError(
                f"batch size {s.batch_size} cannot be divided among {world} processes and {s.accumulate} passes"
            )
        if s.batch_size > len(self.images):
            raise RecipeError(f"batch size {s.batch_size} is more than the {len(self.images)} training images")
        if self.images.labels is None and self.teacher is None:
            raise RecipeError("there are neither labels that fit the network nor an original network to distil from")
        if s.target is not None:
            if self.start != "data":
                raise RecipeError("target needs gates.start = 'data'; with 'identity' use l1")
            least = smallest_share(self.costs, s.keep)
            if s.target < least:
                raise RecipeError(
                    f"target {s.target} cannot be reached: {least:.3f} of the MACs are outside the gates' reach"
                )

    def run(self, checkpoint: Path | None, resume: bool) -> list[Epoch]:
        s = self.settings
        if resume and checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)
        elif self.start == "data":
            self.state.factor = start_from_data(self.gated, self.images, seed=self.seed)
        network, optimizer = self.accelerator.prepare(self.gated, self.optimizer)
        saved = time.monotonic()
        network.train()
        for batch in self._batches():
            step = self.state.step
            self._set_rates(step)
            set_seed(self.seed * 1_000_003 + step + self.accelerator.process_index)
            loss, right, share = 0.0, 0, 0.0
            parts = [t.chunk(s.accumulate) for t in batch]
            for images, labels, index in zip(*parts, strict=True):
                value, hits = self._loss(network, images, labels, index, step // self.per_epoch)
                self.accelerator.backward(value / s.accumulate)
                loss += float(value.detach()) / s.accumulate
                right += hits
                opened = macs_per_image(self.costs, opens_of(self.gated))
                share += float(opened.mean()) / self.costs.dense / s.accumulate
            totals = torch.tensor([loss, share, right], dtype=torch.float64, device=self.device)
            loss, share, right = self.accelerator.reduce(totals, "sum").tolist()
            loss, share = loss / self.accelerator.num_processes, share / self.accelerator.num_processes
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step + 1} of {self.steps}; lower finetune.lr or finetune.gate_lr"
                )
            optimizer.step()
            optimizer.zero_grad()
            self._close(step)
            self._note(loss, right, share)
            due = time.monotonic() - saved > CHECKPOINT_SECONDS or self.state.step % self.per_epoch == 0
            if checkpoint is not None and due and self.accelerator.is_main_process:
                self._save(checkpoint)
                saved = time.monotonic()
        self.accelerator.wait_for_everyone()
        self._settle()
        return [Epoch(**e) for e in self.state.history]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's part of every global batch that is still to come."""
        s, world, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        while self.state.step < self.steps:
            epoch, done = divmod(self.state.step, self.per_epoch)
            order = torch.randperm(len(self.images), generator=_generator(self.seed, epoch))
            batches = order[: self.per_epoch * s.batch_size].view(self.per_epoch, s.batch_size)[done:]
            mine = batches.chunk(world, 1)[rank].tolist()
            yield from _loader(self.images, mine)

    def _loss(
        self, network: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int
    ) -> tuple[Tensor, int]:
        s = self.settings
        x = images.to(self.device)
        if images.dtype == torch.uint8:
            if s.augment:
                x = augment(x, index, len(self.images), self.seed, epoch, s.flip)
            x = normalise(x, self.gated.meta["input"])
        labels = labels.to(self.device)
        logits = network(x)
        weight = s.distillation if self.teacher is not None else 0.0
        if self.images.labels is None:
            weight, right = 1.0, 0
        else:
            right = int((logits.detach().argmax(1) == labels).sum())
        loss = logits.new_zeros((), dtype=torch.float32)
        if weight < 1:
            loss = loss + (1 - weight) * F.cross_entropy(logits.float(), labels)
        if weight > 0 and self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                wanted = self.teacher(x)
            loss = loss + weight * distillation(logits.float(), wanted.float(), s.temperature)
        if s.l1:
            loss = loss + s.l1 * salience_penalty(self.gated, s.penalty)
        return loss, right

    def _set_rates(self, step: int) -> None:
        warm = min(1.0, (step + 1) / max(1, 0.1 * self.steps))
        factor = warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak"]

    def _close(self, step: int) -> None:
        """One step of the closed loop, or of the price's ramp (see `gatefit.control`)."""
        s = self.settings
        ramp = [min(1.0, (t / self.steps) / s.ramp) if s.ramp else 1.0 for t in (step, step + 1)]
        if s.target is not None:
            wanted = 1 - (1 - s.target) * ramp[1]
            shift = (1.0 if step == 0 else GAIN) * threshold_for(self.gated, self.costs, wanted, s.keep)
            shift = float(self.accelerator.reduce(torch.tensor(shift, device=self.device), "mean"))
        elif self.start == "data" and s.l1:
            before = 0.0 if step == 0 else price_threshold(s.l1 * ramp[0] ** 2, self.state.factor)
            shift = price_threshold(s.l1 * ramp[1] ** 2, self.state.factor) - before
        else:
            return
        lower(self.gated, shift, s.keep)

    def _note(self, loss: float, right: float, share: float) -> None:
        s, state = self.settings, self.state
        state.step += 1
        for i, value in enumerate((loss * s.batch_size, right, share * s.batch_size, s.batch_size)):
            state.sums[i] += value
        count = state.sums[3]
        means = [x / count for x in state.sums[:3]]
        accuracy = means[1] if self.images.labels is not None else None
        self.report(Progress("fine-tune", state.step, self.steps, means[0], accuracy, means[2]))
        if state.step % self.per_epoch == 0:
            lr = self.optimizer.param_groups[0]["lr"]
            state.history.append(asdict(Epoch(state.step // self.per_epoch, means[0], accuracy, means[2], lr)))
            state.sums = [0.0, 0.0, 0.0, 0.0]

    @torch.no_grad()
    def _settle(self) -> None:
        """BN statistics with the final hard gates, then the threshold that meets the target with them."""
        s = self.settings
        count = min(s.recalibrate, len(self.images))
        chosen = torch.randperm(len(self.images), generator=_generator(self.seed, -1))[:count]
        batches = [b.tolist() for b in chosen.split(min(200, max(1, count)))]
        if s.target is not None and count:
            self._meet_target(batches)
        if count and s.epochs:
            recalibrate(self.gated, (self._plain(x) for x, _, _ in _loader(self.images, batches)))
        if s.target is not None and count:
            self._meet_target(batches)
        self.gated.eval()

    def _meet_target(self, batches: list[list[int]]) -> None:
        """The gates of later blocks see what earlier ones closed, so the threshold is found in a few rounds."""
        assert self.settings.target is not None
        self.gated.eval()
        for _ in range(3):
            shifts = []
            for images, _, _ in _loader(self.images, batches[:10]):
                self.gated(self._plain(images))
                shifts.append(threshold_for(self.gated, self.costs, self.settings.target, self.settings.keep))
            lower(self.gated, sum(shifts) / len(shifts), self.settings.keep)

    def _plain(self, images: Tensor) -> Tensor:
        x = images.to(self.device)
        return normalise(x, self.gated.meta["input"]) if images.dtype == torch.uint8 else x

    def _save(self, file: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self.gated.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        header = {"state": json.dumps(asdict(self.state))}
        write_atomically(file, lambda f: safetensors.torch.save_file(tensors, f, metadata=header))

    def _restore(self, file: Path) -> None:
        try:
            with safetensors.safe_open(file, "pt") as stream:
                header = stream.metadata()
                tensors = {k: stream.get_tensor(k) for k in stream.keys()}  # noqa: SIM118
            self.state = _State(**json.loads(header["state"]))
            self.gated.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            saved = self.optimizer.state_dict()
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, i, name = key.split(".")
                    saved["state"].setdefault(int(i), {})[name] = value
            self.optimizer.load_state_dict(saved)
        except Exception as error:
            raise CheckpointError(f"{file} is damaged or of another run ({error}); remove it to begin anew") from error


def distillation(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL divergence to the teacher's softened predictions, times T^2 (Hinton et al., arXiv 1503.02531)."""
    student = F.log_softmax(logits / temperature, 1)
    teacher = F.log_softmax(wanted / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def augment(images: Tensor, index: Tensor, count: int, seed: int, epoch: int, flip: bool) -> Tensor:
    """Random crop with a padding of 1/8 and flip of a batch (B, 3, H, W).

    What happens to an image depends on its index, the seed and the epoch alone: not on batches or processes.
    """
    pad = images.shape[-1] // 8
    generator = _generator(seed, epoch)
    plan = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)[:, index].to(images.device)
    mirrored = (torch.rand(count, generator=generator)[index] < 0.5).to(images.device) & flip
    height, width = images.shape[-2:]
    padded = F.pad(images, (pad,) * 4)
    rows = plan[0][:, None] + torch.arange(height, device=images.device)
    columns = plan[1][:, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    each = torch.arange(len(images), device=images.device)
    return padded.permute(0, 2, 3, 1)[each[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def recalibrate(network: nn.Module, batches: Iterator[Tensor]) -> None:
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


def _optimizer(gated: nn.Module, settings: FinetunePart) -> torch.optim.SGD:
    """Groups by module identity: gates have their own learning rate and no weight decay."""
    gates = {id(p) for m in gated.modules() if isinstance(m, Gate) for p in m.parameters()}
    backbone = [p for p in gated.parameters() if id(p) not in gates and p.requires_grad]
    own = [p for p in gated.parameters() if id(p) in gates]
    return torch.optim.SGD(
        [
            {"params": backbone, "peak": settings.lr, "weight_decay": settings.weight_decay},
            {"params": own, "peak": settings.gate_lr, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def _loader(images: ImageSet, batches: list[list[int]]) -> DataLoader[Any]:
    workers = 0 if images.resident is not None else 2
    return DataLoader(images, batch_sampler=batches, collate_fn=_whole, num_workers=workers)  # type: ignore[arg-type]


def _whole(batch: Any) -> Any:
    return batch


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 100_003 + epoch + 1)
