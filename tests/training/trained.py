"""A small network, its gates, and settings for short trainings on the digits."""

from dataclasses import replace

import torch
from networks import Basic, Network

import gatefit
from gatefit.inputs.models import InputSpec
from gatefit.recipe import ClosingPart, DistillationPart, FinetunePart

SPEC = InputSpec((3, 8, 8), (0.3,) * 3, (0.35,) * 3)


LOOP = FinetunePart(epochs=4, batch_size=64, flip=False)
CLOSING = ClosingPart(target=0.6, bn_recalibration_images=600, gate_reinits=1)


def short(**changes):
    """Settings of a short training as arguments of `finetune`; changes by name, whatever part they are in."""
    parts = {"settings": LOOP, "distillation": DistillationPart(), "closing": CLOSING}
    for name, part in parts.items():
        mine = {k: v for k, v in changes.items() if hasattr(part, k)}
        parts[name] = replace(part, **mine)
        changes = {k: v for k, v in changes.items() if k not in mine}
    assert not changes, changes
    return parts


def network():
    net = Network(Basic(8, 8), Basic(8, 16, 2), Basic(16, 16))
    net.pretrained_cfg = {"input_size": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}
    return net


def gate(dense, gates="lc", form="step"):
    return gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), gates, form)


def floats(digits, start):
    from gatefit.inputs.data import normalise

    return normalise(digits.train.__getitems__(list(range(start, start + 100)))[0], SPEC)
