"Deltas of fine-tuned models: DARE and DAREx by enumeration, and what a space of deltas must leave alone."
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import transformer
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.inputs import output_tensor, seeded
from pruning_bench.core.mask import masks_of
from pruning_bench.core.method import Method
from pruning_bench.core.pattern import unstructured
from pruning_bench.core.recovery import finetune
from pruning_bench.core.stats import Stats
from pruning_bench.weight.delta_parameters import (Deltas, dare, darex, delta_of, delta_patch, hidden_change,
                                                   independent, last_hidden, least_error_divisors, mean_over_masks,
                                                   rescale, rescale_rows, search_divisor)
from pruning_bench.weight.deltas_and_sharing import swap_patch


def mlp(dtype=torch.float32):
    with seeded(0):
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).to(dtype)

def moved(base, size=.1, seed=1):
    model, g = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p += size * torch.randn(p.shape, generator=g).to(p.dtype)
    return model

def words(n=2):
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 48, (4, 16), generator=g)} for _ in range(n)]

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# by enumeration

def all_masks(n, keep):
    draws = torch.tensor(list(itertools.product((0., 1.), repeat=n))).double()
    return draws, (keep ** draws * (1 - keep) ** (1 - draws)).prod(1)

@pytest.mark.parametrize("keep", [.1, .5, .8])
def test_the_share_that_stays_is_right_on_average_and_has_the_variance_of_the_card(keep):
    c = torch.tensor([1., -2., .3, 4., .7]).double()
    draws, chance = all_masks(5, keep)
    y = draws @ c / keep
    assert torch.isclose(chance @ y, c.sum())
    assert torch.isclose(chance @ (y - c.sum()) ** 2, (1 - keep) / keep * c.square().sum())

@pytest.mark.parametrize("n, k", [(5, 2), (6, 5)])
def test_an_exact_count_is_right_on_average_and_varies_less(n, k):
    c = torch.randn(n, generator=torch.Generator().manual_seed(2)).double()
    draws = torch.stack([F.one_hot(torch.tensor(i), n).sum(0) for i in itertools.combinations(range(n), k)]).double()
    delta = [rescale(c[None], None, scores[None], k / n, unstructured())[0].sum() for scores in draws]
    y, p = torch.stack(delta), 1 - k / n
    assert torch.isclose(y.mean(), c.sum())
    expected = p / (1 - p) * (n * c.square().sum() - c.sum() ** 2) / (n - 1)
    assert torch.isclose(y.var(correction=0), expected)

@pytest.mark.parametrize("keep", [.1, .4, .9])
def test_the_divisors_of_least_error_are_those_of_brute_force(keep):
    g = torch.Generator().manual_seed(3)
    delta, x = torch.randn(3, 4, generator=g).double(), torch.randn(20, 4, generator=g).double()
    delta[2] = torch.tensor([1., 1., 1., 1.])
    gram, (draws, chance) = x.T @ x / 20, all_masks(4, keep)
    found = least_error_divisors(delta, gram[None], keep, most=50.).flatten()
    for d, q in zip(delta, found.tolist()):
        def error(q): return chance @ (((draws / q - 1) * d) @ x.T).square().mean(1)
        assert all(error(q) <= error(q * f) for f in (.98, .999, 1.001, 1.02))
    clipped = least_error_divisors(delta, gram[None], keep).flatten()
    assert torch.equal(clipped, found.clamp(max=1)) and (found >= keep).all()

def test_groups_of_rows_read_their_own_inputs():
    g = torch.Generator().manual_seed(4)
    delta, gram = torch.randn(4, 3, generator=g), torch.stack([torch.eye(3), torch.ones(3, 3)])
    found = least_error_divisors(delta, gram, .2, most=99.)
    apart = [least_error_divisors(d, m[None], .2, most=99.) for d, m in zip(delta.split(2), gram)]
    assert torch.equal(found, torch.cat(apart)) and (found[:2] == 1).all()   # orthogonal inputs: k + p

def test_rows_without_a_delta_and_without_inputs_have_finite_divisors():
    found = least_error_divisors(torch.tensor([[0., 0.], [1., -1.]]), torch.ones(1, 2, 2), .3)
    assert found.flatten().tolist() == [.3, 1.]
    assert least_error_divisors(torch.ones(1, 2), torch.zeros(1, 2, 2), .3).item() == .3

def test_solvers_divide_by_what_is_asked_for():
    w, scores = torch.tensor([[1., 2., 3., 4.]]), torch.tensor([[.1, .2, .3, .4]])
    assert rescale(w, None, scores, .5, unstructured())[0].tolist() == [[0, 0, 6, 8]]
    assert rescale(w, None, scores, .5, unstructured(), q=2.)[0].tolist() == [[0, 0, 1.5, 2]]
    gone = scores.clone()
    gone[0, :2] = -torch.inf   # a second step divides by the share of those that were still there
    assert rescale(w, None, gone, .25, unstructured())[0].tolist() == [[0, 0, 0, 8]]
    assert not rescale(w, None, scores, 0., unstructured())[0].any()
    rows = rescale_rows(w, Stats(gram=torch.eye(4)[None]), scores, .5, unstructured())[0]
    assert rows.tolist() == [[0, 0, 3, 4]]
    for q in (-1., float("nan"), float("inf")):
        with pytest.raises(BadInput, match="above zero"): rescale(w, None, scores, .5, unstructured(), q=q)

def test_independent_draws_keep_each_entry_with_its_probability():
    model, base = moved(mlp()), mlp()
    counts = [prune(copy.deepcopy(model), dare(base), .5, pattern=independent, seed=s).density for s in range(40)]
    assert len(set(counts)) > 5 and abs(sum(counts) / 40 - .5) < .03


# the space

@pytest.mark.parametrize("kind, dtype", [("llama", torch.float16), ("llama", torch.float32), ("opt", torch.bfloat16),
                                         ("gpt2", torch.float16)])
def test_what_is_dropped_returns_to_the_base_and_the_rest_is_rescaled(kind, dtype):
    base = transformer(kind, dtype)
    model = moved(base)
    one, before = copy.deepcopy(model), copy.deepcopy(base)
    plan = prune(one, dare(base), .75)
    old, inside = delta_of(base, model), {n for n, _ in model.named_parameters() if n.endswith(("_proj.weight",
                  "fc1.weight", "fc2.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    assert set(plan.masks) == inside == set(old) and not masks_of(one) and same(base, before)
    for n, mask in plan.masks.items():
        layer = Deltas(one, base=base).layers[n]
        now, origin = layer.matrix(layer.weight), layer.matrix(layer.origin)
        assert torch.equal(now[~mask], origin[~mask])
        expected = (layer.base_matrix() + old[n] / mask.float().mean())[mask].to(dtype)
        assert torch.equal(now[mask], expected) and mask.float().mean() == .25
    for n, p in model.named_parameters():
        if n not in inside: assert torch.equal(p, one.get_parameter(n)), n

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [dare, darex])
def test_nothing_dropped_is_the_tuned_model_bit_for_bit(method, dtype):
    base = transformer("llama", dtype)
    model = moved(base)
    one = copy.deepcopy(model)
    prune(one, method(base), 0., words())
    assert same(one, model)

def test_all_dropped_is_the_base_and_a_zero_delta_is_never_touched():
    base = mlp()
    model = copy.deepcopy(base)
    with torch.no_grad(): model[0].weight[:, :3] += 1e-3
    one = copy.deepcopy(model)
    prune(one, dare(base), .5)
    assert torch.equal(one[0].weight[:, 3:], base[0].weight[:, 3:]) and torch.equal(one[2].weight, base[2].weight)
    units = Deltas(one, base=base)
    units.apply({n: (units.w(n), torch.zeros_like(units.alive(n))) for n in units.names()})
    assert same(one, base) and not units.alive("0.weight").any()

def test_tied_and_frozen_weights_stay():
    base = transformer("llama")
    model = moved(base)
    for p in model.parameters(): p.requires_grad_(False)
    tied = model.lm_head.weight
    prune(model, dare(base), .5)
    assert model.lm_head.weight is tied is model.model.embed_tokens.weight
    assert not torch.equal(tied, base.lm_head.weight) and not any(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize("parts", [dict(score="magnitude", solve="zero"), dict(score="wanda", pattern="per_row"),
                                   dict(solve="sparsegpt"), dict(score="magnitude", allocate="global", solve="zero"),
                                   dict(pattern="2:4")])
def test_scores_patterns_and_solvers_of_weights_work_on_deltas(parts):
    base = transformer("llama")
    model = moved(base)
    one = copy.deepcopy(model)
    plan = prune(one, dare(base), None if "pattern" in parts and ":" in parts["pattern"] else .5, words(), **parts)
    now, old = delta_of(base, one), delta_of(base, model)
    assert plan.density == .5 and all(not now[n][~m].any() for n, m in plan.masks.items())
    if parts == dict(score="magnitude", solve="zero"):
        for n, m in plan.masks.items(): assert old[n].abs()[m].min() >= old[n].abs()[~m].max()
    if parts.get("solve") == "zero": assert all(torch.allclose(now[n], old[n] * m) for n, m in plan.masks.items())

def test_sparsegpt_on_a_delta_changes_outputs_less_than_dropping():
    base = mlp()
    model, data = moved(base, 1.), [torch.randn(64, 8, generator=torch.Generator().manual_seed(0))]
    def error(**parts):
        one = copy.deepcopy(model)
        prune(one, dare(base), .5, data, **parts)
        return (one[0](data[0]) - model[0](data[0])).square().mean()
    assert error(solve="sparsegpt") < error(score="magnitude", solve="zero")

def test_a_seed_decides_and_a_patch_holds_the_result():
    base = transformer("gpt2")
    model = moved(base)
    plans = [prune(copy.deepcopy(model), dare(base), .9, seed=s).digest for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    prune(model, dare(base), .9)
    rebuilt = copy.deepcopy(base)
    swap_patch(rebuilt, delta_patch(base, model))
    assert same(rebuilt, model) and delta_patch(base, copy.deepcopy(base)) == {}


# figures

def test_the_search_finds_a_minimum_and_stops():
    for at in (.1, .26, .5, 1.):
        found = search_divisor(lambda q: abs(q - at), .1)
        assert min(found, key=found.get) == pytest.approx(at) and min(found) >= .1 and max(found) <= 1
    assert list(search_divisor(lambda q: 0., 1.)) == [1.]
    assert len(search_divisor(lambda q: q, .001)) <= 8

def test_a_mean_over_masks_leaves_out_the_worst_and_changes_no_model():
    base = mlp()
    model = moved(base)
    kept = copy.deepcopy(model)
    def ends(worst):
        figures = iter((3., float("nan"), 1., 2.))
        return mean_over_masks(base, model, .5, lambda m: next(figures), 4, worst)(.5)
    assert ends(1) == 2 and ends(2) == 1.5 and same(model, kept) and same(base, mlp())
    with pytest.raises(BadInput, match="draw more masks"): mean_over_masks(base, model, .5, lambda m: 0., 2, 2)

def test_the_change_of_hidden_states_is_zero_for_the_same_model():
    base, data = transformer("llama"), words()
    measure = hidden_change(base, data)
    changed = moved(base)
    expected = (last_hidden(changed, data[0]) - last_hidden(base, data[0])).abs().mean().item()
    assert measure(base) == 0 and hidden_change(base, data[:1])(changed) == pytest.approx(expected, rel=1e-5)
    x = [torch.randn(4, 8)]
    with pytest.raises(BadInput, match="pass features="): hidden_change(mlp(), x)
    assert hidden_change(mlp(), x, output_tensor)(mlp()) == 0


# refusals

@pytest.mark.parametrize("base, said", [(lambda: nn.Linear(8, 4), "has no"), (lambda: mlp(), "does not differ"),
                                        (lambda: "mlp", "not a network"), (lambda: None, "from before the fine-tuning"),
                                        (lambda: nn.Sequential(*mlp(), nn.Linear(4, 4)), "the model has not")])
def test_another_base_is_refused_in_one_sentence_and_nothing_changes(base, said):
    model = mlp()
    with pytest.raises(BadInput, match=said) as refused: prune(model, dare(base()), .5)
    assert "\n" not in str(refused.value) and same(model, mlp())

def test_masks_trainings_and_plans_are_refused():
    base, masked = mlp(), moved(mlp())
    prune(masked, "magnitude", .5)
    with pytest.raises(BadInput, match="remove_masks"): prune(masked, dare(base), .5)
    model = moved(base)
    kept, data = copy.deepcopy(model), [(torch.randn(4, 8), torch.randint(0, 4, (4,)))]
    with pytest.raises(BadInput, match="fine-tune first"):
        prune(model, dare(base), .5, data, F.cross_entropy, recover=finetune(2))
    with pytest.raises(BadInput, match="dare"): prune(model, Method(space="deltas"), .5)
    assert same(model, kept)
    plan = prune(copy.deepcopy(model), dare(base), .5)
    with pytest.raises(BadInput, match="delta_patch"): plan.apply(model)
    assert same(model, kept)

def test_a_failure_puts_the_model_back():
    base = mlp()
    model = moved(base)
    kept = copy.deepcopy(model)
    def fails(w, stats, scores, fraction, pattern):
        if w.shape[0] == 4: raise RuntimeError("no")
        return rescale(w, stats, scores, fraction, pattern)
    with pytest.raises(RuntimeError): prune(model, dare(base), .5, solve=fails)
    assert same(model, kept)
