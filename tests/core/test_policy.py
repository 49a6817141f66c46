"Runtime spaces and policies: what is checked before a model is touched, exact counts, restoring, saving."
import copy, json, pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from pruning_bench.core.inputs import BadInput
from pruning_bench.core.policy import Policy, given, load_policy, make_policy
from pruning_bench.core.runtime_space import ACTIVE, RUNTIME_SPACES, RuntimeHook, RuntimeSpace
from pruning_bench.core.runtime_space import observed_scores, runtime_space
from pruning_bench.core.score import Score, as_score, score
from pruning_bench.core.stats import Stats


class Residual(nn.Linear):
    def forward(self, x): return x + super().forward(x).relu()

class Sets(nn.Module):
    "Layers that process each vector of a set by itself, then a mean."
    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.Sequential(*(Residual(4, 4) for _ in range(depth)))
    def forward(self, x): return self.layers(x).mean(1)

@runtime_space
class TestVectors:
    "The vectors that leave every layer but the last."
    __test__ = False
    unit, offers = "vector", frozenset({"hidden"})

    def __init__(self, model, skip_first=False):
        if not isinstance(model, Sets): raise BadInput(f"{type(model).__name__} has no sets")
        self.model, self.found = model, list(range(int(skip_first), len(model.layers) - 1))

    def names(self): return [f"layers.{i}" for i in self.found]
    def shapes(self): return dict.fromkeys(self.names())
    def cost(self, name): return 1.

    @contextmanager
    def install(self, decide, needs=()):
        hooks = {i: RuntimeHook(self.dropper(f"layers.{i}", decide, needs)) for i in self.found}
        handles = [hook.attach(self.model.layers[i]) for i, hook in hooks.items()]
        try: yield
        finally:
            for h in handles: h.remove()

    def dropper(self, name, decide, needs):
        def drop(module, args, kwargs, x):
            mask = decide(name, x.norm(dim=-1), Stats(**({"hidden": x} if "hidden" in needs else {})))
            return None if mask.all() else x[mask].view(len(x), -1, x.shape[-1])
        return drop

def norm(w, stats): return w

@pytest.fixture
def net():
    torch.manual_seed(0)
    return Sets()

@pytest.fixture
def x(): return torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(1))

def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# what a policy does

def test_a_space_fits_the_protocol(net): assert isinstance(TestVectors(net), RuntimeSpace)

def test_it_equals_dropping_by_hand(net, x):
    with make_policy(net, "testvectors", norm, [.5, .25]).on(net) as masks: inside = net(x)
    h = x
    for i, count in ((0, 4), (1, 1)):
        h = net.layers[i](h)
        best = h.norm(dim=-1).topk(count).indices.sort().values
        h = h.gather(1, best[..., None].expand(-1, -1, 4))
    assert torch.equal(inside, net.layers[2](h).mean(1))
    assert [m.shape[1] for m in masks.values()] == [8, 4]

@pytest.mark.parametrize("units", [1, 2, 3, 7, 8, 13])
@pytest.mark.parametrize("share", [.1, .25, .5, .66, .9])
def test_the_number_that_stays_is_exact(net, units, share):
    count = int(share * units + .5)
    policy = Policy("testvectors", {"layers.0": share, "layers.1": 1}, "random")
    with policy.on(net) as masks:
        if count: net(torch.randn(4, units, 4))
        else:
            with pytest.raises(BadInput, match="keeps none"): net(torch.randn(4, units, 4))
    if count: assert masks["layers.0"].sum(1).tolist() == [count] * 4

def test_ties_go_to_the_first(net):
    with Policy("testvectors", {"layers.0": .5, "layers.1": 1}, norm).on(net) as masks: net(torch.ones(2, 6, 4))
    assert masks["layers.0"].tolist() == [[True] * 3 + [False] * 3] * 2

def test_a_share_of_one_is_the_identity(net, x):
    dense = net(x)
    def never(w, stats): raise AssertionError("no score is needed")
    with Policy("testvectors", {"layers.0": 1, "layers.1": 1}, never).on(net): assert torch.equal(net(x), dense)

def test_units_are_ranked_within_each_example(net, x):
    with make_policy(net, "testvectors", norm, .5).on(net):
        together = net(x)
        assert torch.allclose(torch.cat([net(x[i:i+1]) for i in range(5)]), together, atol=1e-6)

def test_a_pattern_of_weights_chooses_units(net, x):
    with make_policy(net, "testvectors", norm, .5, pattern="2:4").on(net) as masks: net(x)
    assert (masks["layers.0"].view(5, 2, 4).sum(-1) == 2).all()
    with pytest.raises(BadInput, match="divide"), make_policy(net, "testvectors", norm, .5, pattern="2:4").on(net):
        net(x[:, :6])

def test_declared_statistics_arrive_and_no_others(net, x):
    def first(w, stats): return stats.hidden[..., 0]
    declared = Score(first, "first", needs=frozenset({"hidden"}), unit="vector")
    with make_policy(net, "testvectors", declared, .5).on(net): net(x)
    with pytest.raises(BadInput, match="not declared"), make_policy(net, "testvectors", first, .5).on(net): net(x)


# restoring

@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, BadInput])
def test_the_model_is_as_before_also_after_an_error(net, x, error):
    dense, before = net(x), hooks(net)
    with pytest.raises(error), make_policy(net, "testvectors", norm, .5).on(net):
        net(x)
        raise error("anything")
    assert torch.equal(net(x), dense) and hooks(net) == before and not any(m in ACTIVE for m in net.modules())

def test_an_error_of_the_score_leaves_the_model_plain(net, x):
    dense = net(x)
    def broken(w, stats): return w / 0 * 0
    with pytest.raises(BadInput, match="not a number"), make_policy(net, "testvectors", broken, .5).on(net): net(x)
    assert torch.equal(net(x), dense) and not hooks(net)

def test_a_second_policy_is_refused_and_the_first_goes_on(net, x):
    policy = make_policy(net, "testvectors", norm, .5)
    with policy.on(net):
        inside = net(x)
        for other in (net, nn.Sequential(net), net.layers):
            with pytest.raises(BadInput, match="already|is on"), policy.on(other): pass
        with pytest.raises(BadInput, match="is on"): make_policy(net, "testvectors", norm, .5)
        assert torch.equal(net(x), inside)
    with policy.on(net): assert torch.equal(net(x), inside)

def test_copies_made_inside_are_plain(net, x):
    dense, policy = net(x), make_policy(net, "testvectors", norm, .5)
    with policy.on(net):
        inside, copied, pickled = net(x), copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        assert torch.equal(copied(x), dense) and torch.equal(pickled(x), dense)
        with policy.on(copied): assert torch.equal(copied(x), inside)
    assert torch.equal(copied(x), dense) and torch.equal(pickled(x), dense) and torch.equal(net(x), dense)

def test_one_policy_for_two_models_at_a_time(net, x):
    other, policy = Sets(), make_policy(net, "testvectors", norm, .5)
    with policy.on(net) as here, policy.on(other) as there:
        net(x)
        other(x[:2])
    assert len(here["layers.0"]) == 5 and len(there["layers.0"]) == 2


# refusals

NO_SHARES = [0, -.5, 1.5, float("nan"), float("inf"), "half", True]

@pytest.mark.parametrize("shares", [{}, None, .5, *({"layers.0": v} for v in NO_SHARES)])
def test_shares_that_mean_nothing(shares):
    with pytest.raises(BadInput): Policy("testvectors", shares, norm)

@pytest.mark.parametrize("parts, says", [
    (dict(score="magnitude"), "ranks weights"), (dict(score="nothing"), "unknown score"),
    (dict(score=3), "not a score"),
    (dict(score=Score(norm, needs=frozenset({"gram"}), unit="vector")), "offers hidden"),
    (dict(score=Score(norm, unit="vector", scope="space")), "place by place"),
    (dict(score=norm, pattern="unstructured"), "examples"),
    (dict(score=norm, pattern="4x4"), "examples"), (dict(score=norm, pattern="1:4"), "keeps 0.25"),
    (dict(score=norm, space="testvector"), "testvectors"), (dict(score=norm, options={"skip_first": norm}), "options"),
    (dict(score=norm, allocate="nothing"), "unknown allocation")])
def test_parts_that_do_not_fit_are_refused_when_the_policy_is_made(parts, says):
    with pytest.raises(BadInput, match=says): Policy(**{"space": "testvectors", "shares": {"layers.0": .5}, **parts})

@pytest.mark.parametrize("shares, says", [({"layers.0": .5}, "no share for 'layers.1'"),
                                          ({"layers.0": .5, "layers.1": .5, "layers.7": .5}, "another architecture")])
def test_places_of_another_model(net, shares, says):
    with pytest.raises(BadInput, match=says), Policy("testvectors", shares, norm).on(net): pass
    assert not hooks(net)

@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, 3, Sets])
def test_models_without_the_units(model):
    with pytest.raises(BadInput), Policy("testvectors", {"layers.0": .5}, norm).on(model): pass

def test_unknown_options(net):
    with pytest.raises(BadInput, match="options"): make_policy(net, "testvectors", norm, .5, afterr=3)

def test_a_compiled_model_is_refused(net):
    policy = make_policy(net, "testvectors", norm, .5)
    with pytest.raises(BadInput, match="compile"), policy.on(nn.Sequential(torch.compile(net))): pass

def test_scores_of_another_shape(net, x):
    policy = make_policy(net, "testvectors", lambda w, s: w[:, :1], .5)
    with pytest.raises(BadInput, match="units arrive"), policy.on(net): net(x)

def test_a_pattern_that_keeps_another_number(net, x):
    def everything(scores, fraction): return torch.ones_like(scores, dtype=torch.bool)
    policy = make_policy(net, "testvectors", norm, .5, pattern=everything)
    with pytest.raises(BadInput, match="another number"), policy.on(net): net(x)


# shares

@pytest.mark.parametrize("keep", [[.5, .25], (.5, .25), {"layers.0": .5, "layers.1": .25},
                                  {"layers.1": .25, "layers.0": .5}])
def test_given_shares(net, keep):
    policy = make_policy(net, "testvectors", norm, keep)
    assert policy.shares == {"layers.0": .5, "layers.1": .25} and policy.provenance["allocate"].startswith("given")

@pytest.mark.parametrize("keep", [[.5], [.5, .5, .5], {"layers.0": .5}, {"layers.0": .5, "layers.2": .5}, [0., .5],
                                  "half", None, 0, 2])
def test_given_shares_that_do_not_fit(net, keep):
    with pytest.raises(BadInput): make_policy(net, "testvectors", norm, keep)

def test_an_allocator_that_compares_scores_needs_data(net, x):
    with pytest.raises(BadInput, match="data="): make_policy(net, "testvectors", norm, .5, allocate="global")
    policy = make_policy(net, "testvectors", norm, .5, allocate="global", data=[x, x[:2, :6]])
    scores = observed_scores(TestVectors(net), as_score(norm), [x, x[:2, :6]])
    every = torch.cat(list(scores.values()))
    edge = every.sort(descending=True).values[round(.5 * len(every)) - 1]
    assert policy.shares == {n: int((s >= edge).sum()) / len(s) for n, s in scores.items()} and not hooks(net)

@pytest.mark.parametrize("name", ["erk", "keep_current"])
def test_allocators_of_weights_are_refused(net, x, name):
    with pytest.raises(BadInput): make_policy(net, "testvectors", norm, .5, allocate=name, data=[x])

def test_options_choose_the_places(net):
    policy = make_policy(net, "testvectors", norm, .5, skip_first=True)
    assert list(policy.shares) == ["layers.1"] and policy.options == {"skip_first": True}


# the value

def test_it_prints_like_a_plan(net):
    policy = make_policy(net, "testvectors", "random", [.5, .25])
    assert repr(policy).startswith("Policy(random, testvectors: 0.5000, 0.2500 kept")
    assert policy.digest[:12] in repr(policy)
    assert policy.table().share.tolist() == [.5, .25] and policy.table()["product"].tolist() == [.5, .125]
    assert "<table" in policy._repr_html_()
    assert {"score": "random", "pattern": "per_row", "space": "testvectors"}.items() <= policy.provenance.items()

def test_equal_decisions_have_equal_digests():
    def made(**other): return Policy(**{"space": "testvectors", "shares": {"a": .5}, "score": "random", **other})
    assert made() == made(shares={"a": .5}) and hash(made()) == hash(made()) and made(allocate=given([.5])) == made()
    others = [made(shares={"a": .25}), made(shares={"b": .5}), made(pattern="2:4"), made(options={"skip_first": True}),
              made(score=norm)]
    assert len({made().digest, *(o.digest for o in others)}) == 6
    assert made() != made(score=lambda w, s: w) and made(score=norm) == made(score=norm)

@score(unit="vector", needs=("hidden",))
def largest_entry(w, stats, power=1):
    "For the file."
    return stats.hidden.abs().amax(-1) ** power

@pytest.mark.parametrize("parts", [dict(score="random"), dict(score=largest_entry),
                                   dict(score=largest_entry.configured(power=2)), dict(score="random", pattern="2:4"),
                                   dict(score="random", allocate=given([.5]))])
def test_it_comes_back_from_a_file(tmp_path, parts):
    policy = Policy("testvectors", {"layers.0": .5}, **parts, options={"skip_first": True}, provenance={"noted": 3})
    back = load_policy(policy.save(tmp_path/"policy"))
    assert back == policy and back.provenance == policy.provenance and back.options == policy.options
    assert str(back.score) == str(policy.score) and str(back.allocate) == str(policy.allocate)
    stats = Stats(hidden=torch.randn(2, 8, 4))
    torch.manual_seed(0)
    a = policy.score(torch.ones(2, 8), stats)
    torch.manual_seed(0)
    assert torch.equal(a, back.score(torch.ones(2, 8), stats))

def all_units(scores, fraction): return torch.ones_like(scores, dtype=torch.bool)

@pytest.mark.parametrize("part, value", [("score", norm), ("score", lambda w, s: w), ("pattern", all_units),
                                         ("score", Score(norm, "random", unit="any")),
                                         ("allocate", lambda s, k, space: {})])
def test_functions_without_a_registered_name_are_not_written(tmp_path, part, value):
    policy = Policy(**{"space": "testvectors", "shares": {"layers.0": .5}, "score": "random", part: value})
    with pytest.raises(BadInput, match="not registered"): policy.save(tmp_path/"policy")
    assert not (tmp_path/"policy").exists()

def test_files_that_are_no_policy(tmp_path):
    with pytest.raises(BadInput, match="no policy"): load_policy(tmp_path)
    file = Policy("testvectors", {"layers.0": .5}, "random").save(tmp_path)/"policy.json"
    good = json.loads(file.read_text())
    unknown = dict(score={"name": "nothing", "settings": {}})
    for change in (dict(shares={"layers.0": .4}), unknown, dict(space="nothing"), dict(shares=3)):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(BadInput): load_policy(tmp_path)
    for text in ("", "{", "[]", "{}", json.dumps({**good, "score": 3})):
        file.write_text(text)
        with pytest.raises(BadInput): load_policy(tmp_path)

def test_registries_refuse_taken_names():
    with pytest.raises(BadInput, match="already registered"):
        @runtime_space
        class TestVectors: pass
    assert RUNTIME_SPACES["testvectors"].unit == "vector"
