"Every numeric setting of every registered method: a value that cannot be meant is refused in one sentence, or runs."
import inspect
import math
import signal
from contextlib import contextmanager

import pytest
import torch

from pruning_bench import BadInput, build, prune
from pruning_bench.core.mask import masks_of
from pruning_bench.core.method import METHODS
from worlds import NAMES, bits, same, settings_of, world

SENSELESS = {"nan": math.nan, "inf": math.inf, "minus inf": -math.inf, "text": "much", "bool": True, "huge": 10**9,
             "huge float": 1e308, "very negative": -1e308, "complex": 1j, "list": [1]}   # for any numeric setting
DOUBTFUL = {"zero": 0, "minus one": -1, "negative": -.5, "two": 2, "one": 1}             # a sentence, or a valid run


def numeric(name):
    "The numeric settings of a method: those with a number as their default, and whole numbers without any."
    for k, p in inspect.signature(METHODS[name].build).parameters.items():
        number = isinstance(p.default, (int, float)) and not isinstance(p.default, bool)
        if number or p.annotation in (int, float):
            yield k


SETTINGS = [(n, k) for n in NAMES for k in numeric(n)]


@contextmanager
def at_most(seconds):
    "Raise when the block takes longer."
    def late(*args):
        raise TimeoutError(f"longer than {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_sentence(refused, name=None):
    text = str(refused.value)
    assert "\n" not in text and len(text) < 400
    assert name is None or name in text


def test_there_are_settings():
    assert len(SETTINGS) > 150 and {("pdp", "start"), ("soup", "members"), ("mfac", "block")} <= set(SETTINGS)


@pytest.mark.parametrize("name", NAMES)
def test_senseless_values_are_refused_before_a_model_is_asked_for(name):
    for k in numeric(name):
        for what, value in SENSELESS.items():
            with pytest.raises(BadInput) as refused:
                build(name, **{k: value})
            one_sentence(refused, k)


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_setting_touches_nothing(name):
    model, data, loss = world(name)
    before = bits(model)
    for k in numeric(name):
        with pytest.raises(BadInput, match=k):
            prune(model, name, .5, data, loss, **{k: math.nan})
    assert same(before, bits(model)) and not masks_of(model)


def try_out(name, k, value):
    "A setting at the edge of its range: one sentence and an untouched model, or finite weights and the asked count."
    model, data, loss = world(name)
    before = bits(model)
    try:
        with at_most(60):
            plan = prune(model, name, .5, data, loss, **{**settings_of(name), k: value})
    except BadInput as e:
        assert "\n" not in str(e) and same(before, bits(model)) and not masks_of(model)
        return
    assert all(torch.isfinite(p).all() for p in model.parameters())
    fixed = build(name).pattern.fixed
    assert plan.masks and abs(plan.density - (fixed or .5)) < .3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name, k", SETTINGS)
def test_zero_is_a_sentence_or_a_valid_run(name, k):
    try_out(name, k, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", [w for w in DOUBTFUL if w != "zero"])
@pytest.mark.parametrize("name, k", SETTINGS)
def test_doubtful_values_are_a_sentence_or_a_valid_run(name, k, what):
    try_out(name, k, DOUBTFUL[what])


KNOWN = [("pdp", {"start": 2}), ("pdp", {"tau": -1}), ("pdp", {"tau": 0}), ("pdp", {"start": .9, "end": .1}),
         ("soup", {"members": 0}), ("soup", {"steps": 4, "members": 50}), ("sap", {"rounds": 0}),
         ("gradual-magnitude", {"pruning_steps": 0}), ("trp", {"project_every": 0}), ("obd", {"each": 0}),
         ("mfac", {"examples_per_grad": 0}), ("rd", {"points": 0}), ("ap", {"activation_fraction": 2}),
         ("global-mp", {"min_per_layer": -5}), ("group-lasso", {"alpha": 0}), ("gcp-yolov4", {"relax_after": 1}),
         ("gcp-yolov4", {"part_weights": 3}), ("slimming", {"prune_at": 0}), ("betarank", {"exponent": 0}),
         ("imp", {"rounds": 5.5}), ("imp", {"steps": "600"}), ("l1-filter", {"residual": 1}),
         ("jackpot", {"init_score": 3}), ("sap", {"scope": "rows"}), ("masksparsity", {"select_at": .9})]


@pytest.mark.parametrize("name, bad", KNOWN, ids=str)
def test_values_that_are_wrong_where_they_stand(name, bad):
    model, data, loss = world(name)
    before = bits(model)
    with pytest.raises(BadInput) as refused:
        prune(model, name, .5, data, loss, **{**settings_of(name), **bad})
    one_sentence(refused)
    assert same(before, bits(model)) and not masks_of(model)


@pytest.mark.parametrize("good", [{"lr": 1}, {"lr": 0.}, {"steps": 1}, {"start": 0, "end": 1}], ids=str)
def test_numbers_of_the_other_type_and_ends_of_a_range_are_read(good):
    assert build("pdp", **good).name == "pdp"


def test_a_method_from_outside_is_checked_by_its_defaults():
    from pruning_bench.core.method import Method, register

    def outsider(start: float = 5., tries: int = 3, shift: float = -1., often=2, flag: bool = False):
        "Settings whose names mean something else elsewhere."
        return Method()

    register("On Settings", "folklore", 2026, "weight")(outsider)
    try:
        build("outsider", start=9., tries=1, shift=-3., often=1, flag=True)
        for bad in (dict(start=-1.), dict(tries=0), dict(shift=math.nan), dict(often=0), dict(flag=1)):
            with pytest.raises(BadInput, match="outsider"):
                build("outsider", **bad)
    finally:
        METHODS.discard("outsider")


@pytest.mark.parametrize("bad", [{"sparsity": v} for v in (-1, 1, 2, math.nan, math.inf, True, "much", [.5])]
                         + [{"calibration": v} for v in (-1, math.nan, math.inf, "many", 1.5, True)]
                         + [{"seed": v} for v in (math.nan, math.inf, "one", 1.5, 10**30, True)], ids=str)
def test_the_numbers_of_prune_itself(bad):
    model, data, loss = world("wanda")
    before = bits(model)
    with pytest.raises(BadInput) as refused:
        prune(model, "wanda", **{"sparsity": .5, "data": data, **bad})
    one_sentence(refused)
    assert same(before, bits(model)) and not masks_of(model)
