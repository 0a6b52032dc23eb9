import importlib
import warnings

import pytest
from networks import images, make

import gatefit
from gatefit.gating.gates import gates_of


def test_old_arguments_are_read_with_a_note():
    with pytest.warns(FutureWarning, match=r"retrofit\(fill=\) is now called compensation="):
        gated = gatefit.retrofit(make("basic"), images(), "c", "step", fill=True)
    assert all(g.compensation is not None for g in gates_of(gated).values())
    with pytest.warns(FutureWarning, match="prune_unused"):
        gatefit.deploy(gated.eval(), images(4), tuned=False, harvest=True)
    with pytest.raises(TypeError, match="give one of them"):
        gatefit.retrofit(make("basic"), images(), "c", "step", fill=True, compensation=True)


def test_old_modules_are_found_with_a_note():
    with pytest.warns(FutureWarning, match=r"gatefit\.surgery is now gatefit\.gating\.insert"):
        from gatefit.surgery import retrofit
    assert retrofit is gatefit.retrofit
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gatefit.nothing")


def test_new_names_give_no_note():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        gated = gatefit.retrofit(make("basic"), images(), "c", "step", compensation=True)
    assert gates_of(gated)
