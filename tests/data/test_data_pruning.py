"Choosing training examples: exact counts, exact formulas, and the orderings that hold on every split."
import copy, math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pruning_bench import BadInput, prune
from pruning_bench.core.inputs import in_mode, seeded
from pruning_bench.core.pattern import count_to_keep, per_row
from pruning_bench.core.recovery import finetune
from pruning_bench.core.space import Examples
from pruning_bench.data.coverage import aum, stratum_budgets, stratum_indices, stratified
from pruning_bench.data.dynamics import TrainingDynamics, training_dynamics, forgetting_events, error_and_margin
from pruning_bench.data.random_subsets import round_robin, subset_batches, subset_order

SLUGS = ["random-subset", "rs2", "el2n", "forgetting", "ccs"]
SHORT = {"random-subset": {}, "rs2": {"rounds": 5}, "el2n": {"runs": 2, "epochs": 2}, "forgetting": {"epochs": 3},
         "ccs": {"epochs": 3}}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.1),
                         nn.Linear(16, 10))

@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(130) % 10
    return torch.rand(130, 1, 8, 8, generator=g) + y.view(-1, 1, 1, 1) / 10, y

def plan_of(slug, data, sparsity=.6, seed=0, model=None, **more):
    with seeded(1): model = small() if model is None else model
    return prune(model, slug, sparsity, data, F.cross_entropy, seed=seed, **SHORT[slug], **more)


# formulas

@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_an_ignorant_network_has_the_same_error_everywhere(classes):
    error, margin = error_and_margin(torch.zeros(4, classes), torch.arange(4) % classes)
    assert torch.allclose(error, torch.full((4,), math.sqrt(1 - 1 / classes))) and (margin == 0).all()

def test_error_and_margin_at_their_bounds():
    error, margin = error_and_margin(torch.tensor([[60., 0., 0.], [0., 60., 0.]]), torch.tensor([0, 0]))
    assert torch.allclose(error, torch.tensor([0., 2**.5]), atol=1e-6)
    assert torch.allclose(margin, torch.tensor([1., -1.]))

@pytest.mark.parametrize("film, count", [([0, 1, 0, 1], 1), ([1, 0, 1, 0], 2), ([1, 1, 1], 0), ([0, 0, 0], math.inf)])
def test_forgetting_counts_losses(film, count):
    assert forgetting_events(torch.tensor(film, dtype=torch.bool)[:, None]).item() == count

def test_area_under_the_margin_by_hand():
    seen = TrainingDynamics(None, torch.tensor([[[.5, -.5], [1., -1.]], [[.5, -.5], [0., 0.]]]))
    assert torch.equal(aum(torch.zeros(3, 2), type("", (), {"training_dynamics": seen})), torch.tensor([[-1., 1.]] * 3))

@pytest.mark.parametrize("sizes, total, kept", [([1, 2, 100], 9, [1, 2, 6]), ([100, 2, 1], 9, [6, 2, 1]),
                                                ([5, 5], 5, [2, 3]), ([0, 0, 4], 4, [0, 0, 4]), ([3], 0, [0])])
def test_budgets_by_hand(sizes, total, kept): assert stratum_budgets(sizes, total) == kept

def test_budgets_add_up_exactly():
    g = torch.Generator().manual_seed(0)
    for _ in range(500):
        sizes = (torch.rand(17, generator=g)**5 * 300).long().tolist()
        total = int(torch.randint(sum(sizes) + 1, (1,), generator=g))
        given = stratum_budgets(sizes, total)
        assert sum(given) == total and all(0 <= b <= s for b, s in zip(given, sizes))


# patterns

@pytest.mark.parametrize("pattern", [per_row(), round_robin(), stratified(), stratified(7, .1)])
@pytest.mark.parametrize("n", [1, 2, 9, 100, 997])
def test_every_row_has_the_exact_count(pattern, n):
    torch.manual_seed(0)
    for scores in (torch.rand(4, n), torch.zeros(4, n), torch.rand(4, n).round()):
        for fraction in (.1, .5, 1 / 3, .9):
            assert (pattern(scores, fraction).sum(1) == min(count_to_keep(fraction, n),
                                                            n - int(.1 * n) if ".1" in pattern.name else n)).all()

def test_strata_cut_the_hardest_first():
    s = torch.arange(100.)[None]
    kept = stratified(10, .25)(s, .5)
    assert not kept[0, 75:].any()
    assert kept.sum() == 50
    assert stratum_indices(s[0], 10).tolist() == [i * 10 // 99 if i < 99 else 9 for i in range(100)]

def test_infinite_scores_and_removed_units():
    s = torch.rand(1, 60)
    s[0, :5], s[0, 5:20] = torch.inf, -torch.inf
    kept = stratified(10)(s, .5)
    assert kept.sum() == 30 and not kept[0, 5:20].any()
    gone = torch.rand(6, 20)
    gone[:, :8] = -torch.inf
    turns = round_robin()(gone, .3)
    assert (turns.sum(1) == 6).all() and not turns[:, :8].any()

@pytest.mark.parametrize("n, fraction", [(100, .1), (1197, .1), (101, .3), (7, .5), (50, .9)])
def test_nobody_is_used_twice_before_all_were_used(n, fraction):
    torch.manual_seed(0)
    used = round_robin()(torch.rand(23, n), fraction).long().cumsum(0)
    assert (used.amax(1) - used.amin(1) <= 1).all()
    assert used[n // count_to_keep(fraction, n) - 1].max() == 1


# methods

@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("sparsity", [.25, .5, .9])
def test_counts_and_determinism(slug, sparsity, data):
    plan = plan_of(slug, data, sparsity)
    assert (plan.masks["examples"].sum(1) == count_to_keep(1 - sparsity, 130)).all()
    assert plan == plan_of(slug, data, sparsity) != plan_of(slug, data, sparsity, seed=1)

@pytest.mark.parametrize("slug", SLUGS)
def test_the_model_and_its_surroundings_are_untouched(slug, data):
    model = small().train()
    model[4].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(3); expected = torch.rand(3)
    torch.manual_seed(3); plan_of(slug, data, model=model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize("slug", SLUGS)
def test_every_form_of_data_gives_the_same_plan(slug, data):
    x, y = data
    forms = [(x, y), [(x[:64], y[:64]), (x[64:], y[64:])], TensorDataset(x, y), DataLoader(TensorDataset(x, y), 16),
             DataLoader(TensorDataset(x, y), 16, shuffle=True), (b for b in [(x[:9], y[:9]), (x[9:], y[9:])])]
    plans = [plan_of(slug, form) for form in forms]
    assert len({p.digest for p in plans}) == 1
    assert all(torch.equal(plans[0].subset(f)[5][0], x[plans[0].kept()[5]]) for f in forms[:5])

def test_scores_depend_on_labels_and_not_on_calibration(data):
    x, y = data
    assert plan_of("el2n", (x, y)) == plan_of("el2n", (x, y), calibration=1) != plan_of("el2n", (x, y.roll(1)))

def test_ties_of_forgetting_are_random(data):
    x, y = data
    rows = [prune(small(), "forgetting", .5, (x, y), F.cross_entropy, seed=s, epochs=1).kept() for s in range(3)]
    assert all(ids.max() > 100 and ids.min() < 30 for ids in rows) and not torch.equal(rows[0], rows[1])

def test_a_static_score_serves_many_rounds(data):
    from pruning_bench import build
    from dataclasses import replace
    plan = prune(small(), replace(build("el2n", epochs=1, runs=1), options={"rounds": 3}), .5, data, F.cross_entropy)
    mask = plan.masks["examples"]
    assert mask.shape == (3, 130) and (mask == mask[0]).all()

def test_models_that_return_a_record(data):
    class Wrapped(nn.Module):
        def __init__(self): super().__init__(); self.net = small()
        def forward(self, x): return type("Output", (), {"logits": self.net(x)})
    with seeded(1): model = Wrapped()
    plan = prune(model, "el2n", .5, data, lambda out, y: F.cross_entropy(out.logits, y), epochs=1, runs=1)
    assert plan.kept().numel() == 65


# batches

def test_batches_follow_the_rows_of_a_plan(data):
    plan = plan_of("rs2", data, .8)
    order = torch.tensor(sum(subset_order(plan, 13, 22), []))
    for epoch in range(11):
        assert torch.equal(order[epoch * 26:(epoch + 1) * 26].sort().values, plan.kept("examples", epoch % 5))
    loader = subset_batches(plan, data, 13, 22)
    one, two = ([y for _, y in loader] for _ in range(2))
    assert len(loader) == 22
    assert {len(b) for b in one} == {13}
    assert torch.equal(torch.cat(one), torch.cat(two))
    assert torch.equal(torch.cat(one), data[1][order])
    assert subset_order(plan, 13, 22, seed=1) != subset_order(plan, 13, 22, seed=0)


# refusals

class Stream(IterableDataset):
    def __iter__(self): return iter([(torch.zeros(1, 8, 8), 0)] * 4)
    def __len__(self): return 4

@pytest.mark.parametrize("data", [None, Stream(), DataLoader(Stream(), 2), (torch.zeros(4, 64), torch.zeros(3).long()),
                                  [{"x": torch.zeros(2)}], []])
def test_data_that_cannot_be_counted(data):
    with pytest.raises(BadInput) as refused: prune(small(), "random-subset", .5, data)
    assert "\n" not in str(refused.value)

@pytest.mark.parametrize("request_, says", [
    (dict(data=TensorDataset(torch.rand(8, 64)), loss=F.cross_entropy), "needs labels"),
    (dict(data=torch.rand(8, 64), loss=F.cross_entropy), "needs labels"),
    (dict(data=(torch.rand(8, 64), torch.rand(8, 10)), loss=F.cross_entropy), "class number"),
    (dict(data=(torch.rand(8, 64), torch.zeros(8).long())), "needs a loss"),
    (dict(data=(torch.rand(8, 64), torch.zeros(8).long()), loss=F.cross_entropy, runs=0), "at least 1"),
    (dict(data=(torch.rand(8, 64), torch.zeros(8).long()), loss=F.cross_entropy, epoch=3), "epochs")])
def test_requests_that_cannot_be_met(request_, says):
    with pytest.raises(BadInput, match=says): prune(small(), "el2n", .5, **request_)

def test_a_score_of_examples_needs_their_space(data):
    with pytest.raises(BadInput, match="space='examples'"):
        prune(small(), score="el2n", data=data, loss=F.cross_entropy)

def test_a_cut_larger_than_what_is_removed(data):
    with pytest.raises(BadInput, match="at most 0.7"): prune(small(), "ccs", .2, data, F.cross_entropy, beta=.3)
    with pytest.raises(BadInput, match="beta"): prune(small(), "ccs", .5, data, F.cross_entropy, beta=1.5)

def test_a_plan_for_other_data(data):
    with pytest.raises(BadInput, match="130 examples"): subset_batches(plan_of("rs2", data), (data[0][:9], data[1][:9]))

def test_parameters_that_cannot_start_again_are_named(data):
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.net, self.gain = small(), nn.Parameter(torch.ones(10))
        def forward(self, x): return self.net(x) * self.gain
    with pytest.warns(UserWarning, match="gain"): prune(Odd(), "el2n", .5, data, F.cross_entropy, epochs=1, runs=1)


# orderings on three seeds, which change the choice, the start and the order

SEEDS, STEPS = range(3), 600

def results(slug, sparsity, labels, steps=STEPS, **more):
    "Test accuracy for each seed."
    from pruning_bench.bench.tasks.digits import digits, mlp
    x, (test_x, test_y), out = digits("train")[0], digits("test"), []
    for seed in SEEDS:
        plan = prune(mlp(), slug, sparsity, (x, labels), F.cross_entropy, seed=seed, **more)
        with seeded(seed): net = mlp()
        finetune(steps, lr=3e-3)(net, subset_batches(plan, (x, labels), 64, steps, seed), F.cross_entropy)
        with in_mode(net, False), torch.no_grad(): out.append((net(test_x).argmax(1) == test_y).float().mean().item())
    return torch.tensor(out)

@pytest.mark.slow
def test_hard_examples_do_at_half_and_lose_at_a_tenth():
    from pruning_bench.bench.tasks.digits import digits
    y = digits("train")[1]
    assert results("el2n", .5, y).mean() > results("random-subset", .5, y).mean() - .01   # no worse
    assert results("random-subset", .9, y).mean() - results("el2n", .9, y).mean() >= .10

@pytest.mark.slow
def test_wrong_labels_are_the_hardest():
    from pruning_bench.bench.tasks.digits import digits, mlp
    from pruning_bench.bench.tasks.digits_data import noisy_labels
    from sklearn.metrics import roc_auc_score
    x, y = digits("train")
    space = Examples(mlp(), TensorDataset(x, noisy_labels()))
    for seed in SEEDS:
        with seeded(seed): seen = training_dynamics(space, None, F.cross_entropy, runs=5, epochs=10)["examples"]
        assert roc_auc_score(noisy_labels() != y, seen.error[:, -1].mean(0)) >= .98
        with seeded(seed): seen = training_dynamics(space, None, F.cross_entropy, epochs=30)["examples"]
        assert roc_auc_score(noisy_labels() != y, -seen.margin.sum(1).mean(0)) >= .98

@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [.5, .9])
def test_easy_examples_win_under_noise(sparsity):
    from pruning_bench.bench.tasks.digits_data import noisy_labels
    assert (results("el2n", sparsity, noisy_labels(),
                    score="el2n_easy") > results("el2n", sparsity, noisy_labels())).all()

@pytest.mark.slow
def test_a_changing_subset_beats_a_static_one_at_equal_steps():
    from pruning_bench.bench.tasks.digits import digits
    from pruning_bench.bench.tasks.digits_data import noisy_labels
    for labels in (digits("train")[1], noisy_labels()):
        assert (results("rs2", .9, labels, steps=120) > results("random-subset", .9, labels, steps=120)).all()
