"Every registered part: its own name, one reader that accepts it in every form, and a refusal for parts of other kinds."
import inspect

import pytest

from pruning_bench import BadInput, build, methods, prune
from pruning_bench.core.allocate import ALLOCATORS, Allocator, as_allocator
from pruning_bench.core.budget import RESOURCES
from pruning_bench.core.mask import masks_of
from pruning_bench.core.method import METHODS
from pruning_bench.core.part import Part
from pruning_bench.core.pattern import PATTERNS, Pattern, as_pattern
from pruning_bench.core.recovery import RECOVERIES, Recovery, as_recovery
from pruning_bench.core.registry import Registry
from pruning_bench.core.rule import RuleMaker, as_rule
from pruning_bench.core.runtime_space import RUNTIME_SPACES
from pruning_bench.core.schedule import SCHEDULES, Schedule, as_schedule
from pruning_bench.core.score import SCORES, Score, as_score
from pruning_bench.core.solve import SOLVERS, Solver, as_solver
from pruning_bench.core.space import SPACES
from pruning_bench.core.stages import STAGES, Stages, as_stages
from pruning_bench.core.stats import PROVIDERS, Provider
from worlds import NAMES, bits, same, world

methods()   # loads every family
READERS = {"score": (SCORES, Score, as_score), "allocate": (ALLOCATORS, Allocator, as_allocator),
           "pattern": (PATTERNS, Pattern, as_pattern), "solve": (SOLVERS, Solver, as_solver),
           "schedule": (SCHEDULES, Schedule, as_schedule), "recover": (RECOVERIES, Recovery, as_recovery),
           "stages": (STAGES, Stages, as_stages)}
REGISTRIES = [r for r, _, _ in READERS.values()] + [SPACES, PROVIDERS, RUNTIME_SPACES, RESOURCES, METHODS]
REGISTERED = [(r, n) for r in REGISTRIES for n in r]
PARTS = [(slot, n) for slot, (r, _, _) in READERS.items() for n in r]
UNITS = ("weight", "channel", "head", "block", "residual", "expert", "rank", "row", "location", "example", "token",
         "sub-layer", "any")


def label(x):
    return x.kind if isinstance(x, Registry) else str(x)


def without_settings(entry):
    "Whether a factory can be called with no argument."
    if isinstance(entry, Part):
        return True
    known = inspect.signature(entry).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in known)


def made(slot, name):
    "A registered part as a record; None where its factory wants an argument."
    registry, kind, _ = READERS[slot]
    entry = registry[name]
    if isinstance(entry, kind):
        return entry
    return entry() if without_settings(entry) else None


def test_the_registries_are_not_empty():
    assert all(len(r) for r in REGISTRIES) and len(REGISTERED) > 150


@pytest.mark.parametrize("registry, name", REGISTERED, ids=label)
def test_the_registered_name_is_the_name_of_the_part(registry, name):
    entry = registry[name]
    own = getattr(entry, "slug", None) or getattr(entry, "name", None) or entry.__name__
    if inspect.isclass(entry):
        own = own.lower()
    assert own.strip("_") == name


@pytest.mark.parametrize("slot, name", PARTS)
def test_a_part_is_read_by_name_as_a_record_and_as_it_is_registered(slot, name):
    registry, kind, read = READERS[slot]
    record = made(slot, name)
    if record is None:   # a pattern such as n_m: its name alone says too little
        with pytest.raises((BadInput, TypeError)):
            read(name)
        return
    for form in (name, record, registry[name]):
        found = read(form)
        assert isinstance(found, kind) and str(found) == str(record)
    assert read(record) is record


@pytest.mark.parametrize("slot", READERS)
def test_a_plain_function_is_a_part(slot):
    _, kind, read = READERS[slot]

    def mine(*args):
        return args

    assert isinstance(read(mine), kind) and isinstance(read(lambda *args: args), kind)
    assert isinstance(as_rule(lambda method, keep: None), RuleMaker)


@pytest.mark.parametrize("slot, name", PARTS)
def test_a_part_of_another_kind_is_refused_in_one_sentence(slot, name):
    entry, record = READERS[slot][0][name], made(slot, name)
    for other, (_, _, read) in READERS.items():
        if other == slot:
            continue
        for form in filter(None, (entry, record)):
            with pytest.raises(BadInput) as refused:
                read(form)
            assert "\n" not in str(refused.value) and "pass" in str(refused.value)


@pytest.mark.parametrize("slot", READERS)
@pytest.mark.parametrize("value", [3, None, 1.5, object, {"a": 1}, "no such part", Registry], ids=str)
def test_what_is_no_part_is_refused_in_one_sentence(slot, value):
    with pytest.raises(BadInput) as refused:
        READERS[slot][2](value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("slot", [s for s in READERS if s != "stages"])
def test_prune_refuses_a_part_of_another_kind_and_touches_nothing(slot):
    model, data, loss = world("magnitude")
    before, wrong = bits(model), SOLVERS["zero"] if slot != "solve" else SCORES["magnitude"]
    with pytest.raises(BadInput) as refused:
        prune(model, "magnitude", .5, data, loss, **{slot: wrong})
    assert wrong.name in str(refused.value) and "\n" not in str(refused.value)
    assert same(before, bits(model)) and not masks_of(model)


@pytest.mark.parametrize("registry, name", REGISTERED, ids=label)
def test_a_taken_name_is_refused_and_nothing_changes(registry, name):
    def another(*args):
        "Another definition."

    another.__module__ = "elsewhere"
    before, sources = dict(registry.entries), dict(registry.sources)
    with pytest.raises(BadInput, match="already registered") as refused:
        registry.add(name, another)
    assert "\n" not in str(refused.value) and repr(name) in str(refused.value) and "replaces=True" in str(refused.value)
    assert registry.entries == before and registry.sources == sources
    assert all(registry.entries[n] is v for n, v in before.items())


def needs_of(part):
    return getattr(part, "needs", ())


@pytest.mark.parametrize("slot, name", PARTS)
def test_every_statistic_that_a_part_needs_exists(slot, name):
    for need in needs_of(made(slot, name)):
        offered = any(need in s.offers for s in RUNTIME_SPACES.values())
        assert offered or isinstance(PROVIDERS[need], Provider)


@pytest.mark.parametrize("name", NAMES)
def test_every_statistic_that_a_method_needs_or_sets_exists(name):
    record = build(name)
    for need, settings in {**dict.fromkeys(record.needs, {}), **record.readings}.items():
        known = inspect.signature(PROVIDERS[need].fn, follow_wrapped=False).parameters
        open_ = any(p.kind == p.VAR_KEYWORD for p in known.values())   # it hands settings on
        assert open_ or set(settings) <= set(known), f"{need} has no such setting"
    assert set(record.readings) <= set(record.needs)


@pytest.mark.parametrize("name", [n for n, s in SCORES.items() if s.fn.__module__.startswith("pruning_bench")])
def test_a_score_ranks_units_that_exist(name):
    assert SCORES[name].unit in UNITS and SCORES[name].scope in ("group", "space") and SCORES[name].__doc__


@pytest.mark.parametrize("name", SPACES)
def test_a_space_has_the_whole_interface(name):
    space = SPACES[name]
    wanted = ("names", "w", "alive", "reduce", "cost", "apply", "remove", "slices", "restore")
    assert all(callable(getattr(space, a)) for a in wanted) and space.unit in UNITS
