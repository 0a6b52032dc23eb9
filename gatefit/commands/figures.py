"""Figures of an evaluation as plain JSON values: what report.json and config.json hold."""

from dataclasses import asdict
from typing import Any

import torch

from gatefit.folder import Figures
from gatefit.formats import data_title, model_title
from gatefit.inputs.models import ModelReference
from gatefit.recipe import Recipe
from gatefit.training.evaluate import Evaluation
from gatefit.training.trainer import Epoch


def summarise(
    recipe: Recipe, reference: ModelReference, evaluation: Evaluation, history: list[Epoch], labelled: bool
) -> dict[str, Any]:
    """Make the content of report.json: figures of `evaluation`, MACs as means per image."""
    return {
        "model": model_title(str(reference)),
        "data": data_title(recipe.data.name) or "imagenette",
        "seed": recipe.seed,
        "labels": labelled,
        **figures(evaluation),
        "history": [asdict(e) for e in history],
    }


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Turn an evaluation into plain JSON values."""
    macs = evaluation.macs
    return {
        "images": evaluation.images,
        "dense": {"accuracy": evaluation.dense_accuracy, "macs": evaluation.dense_macs},
        "gated": {
            "accuracy": evaluation.accuracy,
            "agreement": evaluation.agreement,
            "macs_sequential": evaluation.macs_sequential,
            "macs_parallel": evaluation.macs_parallel,
            "share": evaluation.share,
            "macs_std": float(macs.std(correction=0)),
            "macs_min": float(macs.min()),
            "macs_max": float(macs.max()),
            "paths": evaluation.paths,
        },
        "histogram": _histogram(evaluation),
        "gates": [asdict(g) for g in evaluation.gates],
    }


def kept_figures(evaluation: Evaluation, data: str) -> Figures:
    """Choose the figures that `config.json` keeps; images in a folder are called by the folder's own name."""
    return Figures(
        data=data_title(data),
        images=evaluation.images,
        accuracy=evaluation.accuracy,
        agreement=evaluation.agreement,
        macs=evaluation.macs_sequential,
        share=evaluation.share,
        original_accuracy=evaluation.dense_accuracy,
        original_macs=evaluation.dense_macs,
    )


def _histogram(evaluation: Evaluation, bins: int = 20) -> dict[str, list[float]]:
    """Count images by their share of the dense MACs."""
    share = evaluation.macs / evaluation.dense_macs
    low, high = float(share.min()), float(share.max())
    if high - low < 1e-9:
        return {"edges": [low, high], "counts": [evaluation.images]}
    counts = torch.histc(share, bins, low, high)
    return {"edges": torch.linspace(low, high, bins + 1).tolist(), "counts": counts.tolist()}
