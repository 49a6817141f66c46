"Repairs without training: identities of least squares, exactness on the cut network, refusals."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.score import score
from pruning_bench.core.stats import collect
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.repair import (channel_obs, compensate, consumer_layers, folded_filters, following_norms,
                                             recalibrate, least_squares_refit, thinet_order)



@score(unit="channel")
def by_position(w, stats): return torch.arange(len(w), 0, -1).float()   # the last units go first


class Net(nn.Module):
    "A block with batch norms, a concatenation, a flattening and a linear layer."
    def __init__(self):
        super().__init__()
        self.a, self.an = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(10, 8, 3, bias=False)
        self.cn, self.d, self.e = nn.BatchNorm2d(8), nn.Linear(8 * 16, 7), nn.Linear(7, 3, bias=False)

    def forward(self, x):
        x = torch.cat([F.relu(self.an(self.a(x))), F.relu(self.b(x))], 1)
        return self.e(F.relu(self.d(F.relu(self.cn(self.c(x))).flatten(1))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    for m in (net.an, net.cn):
        nn.init.uniform_(m.weight, .5, 1.5)
        nn.init.uniform_(m.bias, -.5, .5); m.running_mean.uniform_(-.3, .3); m.running_var.uniform_(.5, 2)
    return net.eval()

@pytest.fixture
def x(): return torch.randn(64, 2, 6, 6, generator=torch.Generator().manual_seed(1))

def problem(rows=4, columns=9, groups=2, n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(groups, n, columns, generator=g,
                     dtype=torch.double) @ torch.randn(groups, columns, columns, generator=g, dtype=torch.double))
    return torch.randn(groups, rows, columns, generator=g, dtype=torch.double), x, x.mT @ x / n

def price(w, new, gram): return ((w - new) @ gram @ (w - new).mT).diagonal(dim1=1, dim2=2).sum()

def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# the refit

@pytest.mark.parametrize("gone", [[0], [8], [1, 4], [0, 2, 3, 5, 7]])
def test_refit_is_the_least_squares_solution_and_costs_what_obs_says(gone):
    w, x, gram = problem()
    lost = torch.zeros(9, dtype=torch.bool); lost[gone] = True
    new = least_squares_refit(w, gram, lost)
    for k in range(2):
        best = torch.linalg.lstsq(x[k][:, ~lost], x[k] @ w[k].T).solution.T
        assert torch.allclose(new[k][:, ~lost], best, atol=1e-8) and (new[k][:, lost] == 0).all()
    inverse = torch.linalg.inv(gram)
    block, removed = inverse[:, lost][..., lost], w[..., lost]
    assert torch.isclose(price(w, new, gram),
                         (removed @ torch.linalg.inv(block) @ removed.mT).diagonal(dim1=1, dim2=2).sum(), rtol=1e-10)
    assert torch.allclose(new - w, -removed @ torch.linalg.inv(block) @ inverse[:, lost], atol=1e-8)

def test_one_after_another_is_all_at_once():
    w, _, gram = problem(groups=1)
    step, inv, lost = w[0].clone(), torch.linalg.inv(gram[0]), torch.zeros(9, dtype=torch.bool)
    for j in (3, 0, 7):
        step = step - step[:, j:j + 1] / inv[j, j] * inv[j]
        inv = inv - inv[:, j:j + 1] * inv[j:j + 1] / inv[j, j]
        lost[j] = True
    assert torch.allclose(step, least_squares_refit(w, gram, lost)[0], atol=1e-10)

@pytest.mark.parametrize("seed", range(4))
def test_a_refit_never_costs_more_than_dropping_and_damping_lies_between(seed):
    w, _, gram = problem(seed=seed)
    lost = torch.rand(9, generator=torch.Generator().manual_seed(seed)) < .5
    lost[0], lost[1] = True, False
    costs = [price(w, least_squares_refit(w, gram, lost, damp), gram) for damp in (0., .01, 1., 1e9)]
    assert costs == sorted(costs)
    assert costs[0] < .999 * costs[-1]
    assert torch.isclose(costs[-1], price(w, w * ~lost, gram), rtol=1e-6)

def test_nothing_gone_is_the_same_bits_and_everything_gone_is_zero():
    w, _, gram = problem()
    assert torch.equal(least_squares_refit(w, gram, torch.zeros(9, dtype=torch.bool)), w)
    assert (least_squares_refit(w, gram, torch.ones(9, dtype=torch.bool)) == 0).all()

def test_dependent_inputs_are_refused_without_damping():
    w, _, gram = problem()
    gram[:, 3], gram[:, :, 3] = gram[:, 2], gram[:, :, 2]
    gram[:, 3, 3] = gram[:, 2, 2] - 1e-6
    with pytest.raises(BadInput, match="raise damp"): least_squares_refit(w, gram, torch.arange(9) == 0)
    assert least_squares_refit(w, gram, torch.arange(9) == 0, .01).isfinite().all()


# who reads

def test_readers_know_their_columns_and_where_a_constant_goes(net, x):
    space = Channels(net, [x])
    found, norms = consumer_layers(space), following_norms(space)
    assert {n: norm for n, (norm, _) in norms.items()} == {"a": "an", "c": "cn"}
    assert {n: r.bias_target and r.bias_target[0] for n, r in found.items()} == {"c.weight": "cn.running_mean",
                                                                                 "d.weight": "d.bias",
                                                                   "e.weight": None}
    c, d = found["c.weight"], found["d.weight"]
    assert [tuple(c.columns[g].shape) for g in ("a.weight", "b.weight")] == [(6, 9), (4, 9)]
    assert tuple(d.columns["c.weight"].shape) == (8, 16)
    assert torch.equal(c.layer.read()[:, c.columns["b.weight"][1]], net.c.weight[:, 7].flatten(1))
    assert torch.equal(d.layer.read()[:, d.columns["c.weight"][2]], net.d.weight[:, 32:48])

def test_a_tied_weight_is_left_alone(x):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
                        nn.Conv2d(4, 3, 1))
    net[4].weight = net[2].weight
    assert set(consumer_layers(Channels(net, [x]))) == {"6.weight"}

def test_the_reading_is_the_covariance_of_what_arrives(net, x):
    stats = collect(Channels(net, [x]), [x[:40], x[40:]], {"consumer_stats"})
    with torch.no_grad(): z = torch.cat([F.relu(net.an(net.a(x))), F.relu(net.b(x))], 1)
    patches = F.unfold(z, 3).transpose(1, 2).flatten(0, 1).double()
    (r, _), order = stats["a.weight"].consumer_stats[0], torch.arange(90).view(10, 9).T.flatten()
    assert torch.allclose(r.mean[0], patches.mean(0)[order], atol=1e-5)
    assert torch.allclose(r.gram[0], patches.T.cov(correction=0)[order][:, order], atol=1e-4)
    last, _ = stats["d.weight"].consumer_stats[0]
    with torch.no_grad(): v = F.relu(net.d(F.relu(net.cn(net.c(z))).flatten(1))).double()
    assert last.name == "e.weight" and torch.allclose(last.gram[0], v.T @ v / 64, atol=1e-5)   # no home: second moment

def test_a_reader_that_never_runs_is_named(net, x):
    space = Channels(net, [x])
    with pytest.raises(BadInput, match="'c.weight'.*skip="): collect(space, [], {"consumer_stats"})


# on networks

def test_the_solver_writes_the_least_squares_layer_with_its_constant(net, x):
    "Both groups that one layer reads lose channels; the layer is moved once."
    dense = copy.deepcopy(net)
    prune(net, "l1-filter", 1/2, x, score=by_position, solve=compensate.configured(damping=1e-12), skip=["d"])
    with torch.no_grad():
        z = torch.cat([F.relu(dense.an(dense.a(x))), F.relu(dense.b(x))], 1)
        kept = [0, 1, 2, 6, 7]
        assert net.c.weight.shape == (8, 5, 3, 3)
        patches = F.unfold(z, 3).transpose(1, 2).flatten(0, 1).double()
        want = patches @ dense.c.weight.flatten(1).double().T
        some = patches[:, [9 * k + i for k in kept for i in range(9)]]
        fit = torch.linalg.lstsq(torch.cat([some, torch.ones(len(some), 1, dtype=torch.double)], 1), want).solution.T
    assert torch.allclose(net.c.weight.flatten(1).double(), fit[:, :-1], atol=1e-3)
    assert torch.allclose(dense.cn.running_mean - net.cn.running_mean, fit[:, -1].float(), atol=1e-3)

@pytest.mark.parametrize("solve", ["zero", "bias_compensation", "compensate", "merge_filters"])
def test_every_repair_keeps_the_writers_and_the_plan(net, x, solve):
    dense = copy.deepcopy(net)
    plan = prune(net, "l1-filter", .5, x, solve=solve)
    assert plan == prune(copy.deepcopy(dense), "l1-filter", .5, x)
    kept = plan.masks["a.weight"]
    assert torch.equal(net.a.weight, dense.a.weight[kept])
    assert torch.equal(net.an.weight, dense.an.weight[kept])
    assert net.a.out_channels == 3
    again = copy.deepcopy(dense)
    plan.apply(again)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x)) and (set(net.state_dict()) == set(dense.state_dict()))

@pytest.mark.parametrize("solve", ["bias_compensation", "compensate", "merge_filters"])
def test_removing_nothing_changes_no_bit(net, x, solve):
    dense = copy.deepcopy(net)
    prune(net, "l1-filter", 0, x, solve=solve)
    assert same(net, dense)

@pytest.mark.parametrize("padding, works", [(0, True), (1, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_constant_channels_are_absorbed_exactly_without_padding(padding, works, bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
                        nn.Conv2d(6, 4, 3, padding=padding, bias=bias), nn.BatchNorm2d(4)).eval()
    with torch.no_grad(): net[1].weight[[4, 5]] = 0; net[1].bias[[4, 5]] = torch.tensor([.7, -.2])
    x, dense = torch.rand(8, 1, 9, 9), copy.deepcopy(net)
    prune(net, "l1-filter", 1/3, x, score=by_position, solve="bias_compensation")
    gap = (net(x) - dense(x)).abs()
    assert net[0].out_channels == 4 and (gap.max() < 1e-5) == works
    inside = gap[..., 1:-1, 1:-1] if padding else gap
    # off by one constant inside: the mean has seen the border
    assert (inside - inside[:, :, :1, :1]).abs().max() < 1e-5
    home, other = (net[3].bias, dense[3].bias) if bias else (dense[4].running_mean, net[4].running_mean)
    if works:
        assert torch.allclose(home - other, F.relu(torch.tensor([.7])) * dense[3].weight[:, 4].sum((1, 2)), atol=1e-5)

def test_the_score_is_the_price(net, x):
    stats = collect(Channels(net, [x]), [x], {"consumer_stats"})
    scores = channel_obs(torch.zeros(8), stats["c.weight"])
    r, columns = stats["c.weight"].consumer_stats[0]
    damped = r.gram + .01 * r.gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(r.gram.shape[1], dtype=torch.double)
    for i in (0, 5):
        lost = torch.zeros(r.gram.shape[1], dtype=torch.bool); lost[columns[i]] = True
        assert torch.isclose(scores[i], price(r.matrix(), least_squares_refit(r.matrix(), damped, lost), damped),
                             rtol=1e-6)

def test_a_copy_goes_first_and_costs_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight[7], net[0].bias[7], net[2].weight[:, 7] = ((3 * net[0].weight[2], 3 * net[0].bias[2],
                                                                  -net[2].weight[:, 2] / 3))
    x = torch.randn(300, 6)
    before = net(x)
    plan = prune(net, "obspa", 1/8, x, damping=1e-6)
    assert not plan.masks["0.weight"][[2, 7]].all()
    assert plan.masks["0.weight"].sum() == 7
    assert torch.allclose(net(x), before, atol=1e-3)

def test_greedy_order_of_orthogonal_contributions_is_their_size():
    class Reader:
        gram = torch.diag(torch.tensor([1., 4., 9., .25], dtype=torch.double))[None]
        def matrix(self): return torch.tensor([[3., 1., -1., 2.], [0., 1., 1., 0.]], dtype=torch.double)[None]
    turn = thinet_order(torch.zeros(4), type("S", (), {"consumer_stats": [(Reader(), torch.arange(4)[:, None])]}))
    assert turn.tolist() == [2, 1, 3, 0]   # sizes 9, 8, 18, 1

def test_the_greedy_step_is_the_best_step(net, x):
    stats = collect(Channels(net, [x]), [x], {"consumer_stats"})["c.weight"]
    r, columns = stats.consumer_stats[0]
    def damage(which):
        lost = torch.zeros(r.gram.shape[1], dtype=torch.bool); lost[columns[which].flatten()] = True
        return price(r.matrix(), r.matrix() * ~lost, r.gram).item()
    order = thinet_order(torch.zeros(8), stats).argsort().tolist()
    for n in range(3):
        assert damage(order[:n + 1]) == pytest.approx(min(damage(order[:n] + [i]) for i in order[n:]), rel=1e-9)


# without data

def sequential(factor):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    nn.init.uniform_(net[1].weight, .5, 1.5)
    nn.init.uniform_(net[1].bias, .1, .5); net[1].running_mean.uniform_(-.2, .2); net[1].running_var.uniform_(.5, 2)
    fold = (net[1].weight / (net[1].running_var + net[1].eps).sqrt()).detach()
    with torch.no_grad():
        net[0].weight[4] = factor * net[0].weight[1] * fold[1] / fold[4]
        net[1].bias[4] = factor * (net[1].bias[1] - fold[1] * net[1].running_mean[1]) + fold[4] * net[1].running_mean[4]
    return net

@pytest.mark.parametrize("factor, works", [(.7, True), (3., True), (-.7, False)])
def test_a_multiple_of_another_channel_is_merged_exactly_unless_the_relu_tells_them_apart(factor, works):
    net, x = sequential(factor), 3 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    f, b = folded_filters(space := Channels(net, [x]), space.groups["0.weight"], following_norms(space))
    assert torch.allclose(f[4], factor * f[1], atol=1e-6)
    assert torch.allclose(b[4], factor * b[1], atol=1e-6)
    assert f.shape == (5, 27)
    before, column = net(x), net[3].weight.detach().clone()
    prune(net, "udfc", .2, x, score=by_position, ridge=1e-12)
    assert (torch.allclose(net(x), before, atol=1e-4)) == works
    assert torch.allclose(net[3].weight[:, 1], column[:, 1] + factor * column[:, 4], atol=1e-4)

def test_merging_solves_the_equations_of_the_paper():
    net = sequential(.3)
    with torch.no_grad(): net[0].weight[4] += .1 * torch.randn(3, 3, 3)
    x, column = torch.randn(2, 3, 8, 8), net[3].weight.detach().double()
    f, b = folded_filters(space := Channels(net, [x]), space.groups["0.weight"], following_norms(space))
    f, b = f.detach(), b.detach()
    prune(net, "udfc", .2, x, score=by_position, bias_weight=.3, ridge=.05)
    design = torch.cat([f[:4].T, .3**.5 * b[:4].T, .05**.5 * torch.eye(4, dtype=torch.double)])
    s = torch.linalg.lstsq(design, torch.cat([f[4], .3**.5 * b[4], torch.zeros(4, dtype=torch.double)])).solution
    assert torch.allclose(net[3].weight.double(), column[:, :4] + column[:, 4:] * s[:, None, None], atol=1e-5)

def test_udfc_looks_at_no_data(x):
    a, b = sequential(.3), sequential(.3)
    assert prune(a, "udfc", .4, torch.rand(2, 3, 8, 8)) == prune(b, "udfc", .4, torch.zeros(5, 3, 9, 9)) and same(a, b)


# batch norms

def test_recalibration_is_the_average_over_batches_and_touches_nothing_else(net, x):
    dense, batches = copy.deepcopy(net), [x[:32], x[32:]]
    net.an.momentum, net.d.training = .3, True
    recalibrate(64)(net, batches, None)
    with torch.no_grad(): heard = [dense.a(b).transpose(0, 1).flatten(1) for b in batches]
    assert torch.allclose(net.an.running_mean, sum(h.mean(1) for h in heard) / 2, atol=1e-6)
    assert torch.allclose(net.an.running_var, sum(h.var(1) for h in heard) / 2, atol=1e-6)
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in net.state_dict().items() if "running" not in k
               and "num_batches" not in k)
    assert net.an.momentum == .3 and net.d.training and not net.an.training
    first = net.an.running_mean.clone()
    recalibrate(64)(net, batches, None)
    assert torch.equal(first, net.an.running_mean)

def test_recalibration_stops_at_its_examples_and_reads_no_label(net, x):
    seen = []
    def residual():
        while True: seen.append(1); yield x[:16], None
    recalibrate(40)(net, residual(), None)
    assert len(seen) == 3
    plain = nn.Linear(2, 2)
    recalibrate()(plain, residual(), None)
    assert len(seen) == 3

def test_absorbing_changes_nothing_that_recalibration_would_not_change(net, x):
    other = copy.deepcopy(net)
    prune(net, "l1-filter", .5, x, solve="bias_compensation", recover="recalibrate", skip=["d"])
    prune(other, "l1-filter", .5, x, recover="recalibrate", skip=["d"])
    assert torch.equal(net.c.weight, other.c.weight)
    assert torch.allclose(net.cn.running_var, other.cn.running_var, atol=1e-5)


# refusals

def test_repairs_of_channels_are_refused_for_weights_and_recalibration_without_data(net, x):
    before = copy.deepcopy(net)
    with pytest.raises(BadInput, match="updates channels"): prune(net, "magnitude", .5, x, solve="compensate")
    with pytest.raises(BadInput, match="'recalibrate' reads batches"):
        prune(net, "magnitude", .5, recover="recalibrate")
    assert same(net, before)

@pytest.mark.parametrize("kind", ["grouped", "transposed", "one"])
def test_other_convolutions_are_refitted_too(kind):
    torch.manual_seed(0)
    middle = {"grouped": nn.Conv2d(8, 6, 3, groups=2), "transposed": nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1),
              "one": nn.Conv1d(8, 6, 3)}[kind]
    front = nn.Conv1d(2, 8, 1) if kind == "one" else nn.Conv2d(2, 8, 1)
    x, net = (torch.randn(32, 2, 9) if kind == "one" else torch.randn(32, 2, 7, 7)), nn.Sequential(front, middle).eval()
    raw, fixed, before = copy.deepcopy(net), copy.deepcopy(net), net(x)
    prune(raw, "l1-filter", .5, x); prune(fixed, "l1-filter", .5, x, solve=compensate.configured(damping=1e-6))
    assert fixed[0].out_channels == 4   # eight channels of two inputs: any two explain the rest
    assert (fixed(x) - before).square().mean() < 1e-4 < 1e-2 < (raw(x) - before).square().mean()


# orderings

@pytest.mark.slow
def test_recalibration_and_refits_come_in_this_order_on_digits():
    from pruning_bench.bench.task import find_task
    cnn, rows = find_task("digits-cnn"), []
    for seed in range(3):
        for method in ("rand-struct", "l1-filter"):
            for parts in ({}, {"solve": "bias_compensation"}, {"recover": "recalibrate"}, {"solve": "compensate"}):
                model = cnn.dense(seed)
                prune(model, method, .5, cnn.calibration(seed), cnn.loss, seed=seed, **parts)
                rows.append(cnn.evaluate(model, "validation")["accuracy"])
    cut, told, again, fitted = torch.tensor(rows).view(3, 2, 4).mean(0).T
    assert (told > cut).all() and (again > told).all() and (fitted > cut + .3).all()

@pytest.mark.slow
def test_a_good_choice_beats_a_lottery_after_recalibration_on_digits():
    from pruning_bench.bench.task import find_task
    cnn, rows = find_task("digits-cnn"), []
    for seed in range(3):
        for method in ("rand-struct", "thinet"):
            model = cnn.dense(seed)
            prune(model, method, .5, cnn.calibration(seed), cnn.loss, seed=seed, solve="zero")
            rows.append(cnn.evaluate(model, "validation")["accuracy"])
    lottery, greedy = torch.tensor(rows).view(3, 2).mean(0)
    assert greedy > lottery

@pytest.mark.slow
def test_readers_of_heads_and_gated_layers_are_refitted():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2,
                                         max_position_embeddings=32)).eval()
    ids = [{"input_ids": torch.randint(0, 48, (8, 16))} for _ in range(8)]
    def error(solve):
        model = copy.deepcopy(dense)
        prune(model, "obspa", .25, ids, solve=solve)
        with torch.no_grad(): return (model(**ids[0]).logits - dense(**ids[0]).logits).square().mean().item()
    assert error("compensate") < .6 * error("zero")
