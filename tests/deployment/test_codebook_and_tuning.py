"""Codebooks cover every image; tuning keeps what is faster; pruning drops what no image opens."""

import pytest
import torch
from deployed import gated_network, same
from networks import CASES, GATABLE, images, make

import gatefit
from gatefit.deployment.codebook import assign, choose_codebook, expected_units, most_frequent
from gatefit.deployment.info import deployed_info
from gatefit.deployment.plan import BlockPlan
from gatefit.deployment.tune import forms_of


def test_a_codebook_covers_every_image():
    torch.manual_seed(0)
    kinds = torch.rand(3, 32) < 0.4
    opens = kinds[torch.randint(3, (200,))] & (torch.rand(200, 32) < 0.95)
    possible = torch.ones(32, dtype=torch.bool)
    book = choose_codebook(opens, 4)
    assert len(book) <= 4 and book[-1].all() and (book.sum(1).diff() > 0).all()
    strangers = torch.rand(100, 32) < 0.5
    for some in (opens, strangers):
        assert not (some & ~book[assign(some, book)]).any()
    assert expected_units(opens, book) < 0.75 * 32
    assert expected_units(opens, choose_codebook(opens, 1)) == 32
    exact, covered = most_frequent(kinds[torch.randint(3, (50,))], 4, possible)
    assert covered == 1.0 and len(exact) == 4


def test_nothing_to_deploy():
    with pytest.raises(gatefit.GatefitError, match="has no gates"):
        gatefit.deploy(make("basic"), images())
    with pytest.raises(gatefit.GatefitError, match="calibration"):
        gatefit.deploy(gated_network("basic"), [])
    with pytest.raises(gatefit.GatefitError, match="placement must be"):
        gatefit.deploy(gated_network("basic"), images(), placement="beside")
    with pytest.raises(gatefit.GatefitError, match="needs the backend 'torch'"):
        gatefit.deploy(gated_network("basic"), images(), "onnx", placement="parallel")
    assert set(GATABLE) <= set(CASES)


NOISY = pytest.mark.filterwarnings("ignore:the deployed network takes", "ignore:this network was tuned for")
"""What tiny networks warn of."""


@NOISY
@pytest.mark.parametrize(("backend", "batch"), [("torch", 1), ("torch", 12), ("onnx", 1)])
def test_tuned(backend, batch):
    """Whatever the clock chooses, outputs stay."""
    gated = gated_network("basic")
    deployed = gatefit.deploy(gated, images(8), backend, batch=batch)
    with torch.no_grad():
        assert same(deployed(images(5, seed=3)), gated(images(5, seed=3)))


@NOISY
def test_harvest_drops_what_no_calibration_image_opens():
    gated = gated_network("basic", spread=0.0)
    few = images(2)
    pruned = gatefit.deploy(gated, few, masks=1, prune_unused=True)
    books = [p.codebook for p in deployed_info(pruned).plans if p.codebook is not None]
    assert books and any(not book.all() for book in books)
    assert all(book.all() for p in deployed_info(gatefit.deploy(gated, few, masks=1)).plans for book in p.codebook[-1:])
    with torch.no_grad():
        assert same(pruned(few), gated(few)) and not same(pruned(images(9, seed=5)), gated(images(9, seed=5)))


def test_forms_of_a_block():
    book = torch.tensor([[True, False], [True, True]])
    forms = forms_of(BlockPlan("b", True, book))
    assert [(f.skip, len(f.codebook)) for f in forms] == [(True, 2), (True, 1), (False, 2), (False, 1)]
    assert [f.dynamic for f in forms] == [True, True, True, False]
    assert len(forms_of(BlockPlan("b", False, None))) == 1
