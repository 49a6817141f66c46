"ZipLM: the greedy order against brute force, updates against a joint refit, widths by errors and costs."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, prune
from pruning_bench.core.stats import collect
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.repair import damped_cholesky, least_squares_refit
from pruning_bench.structured.ziplm import minus_removal_error, removal_costs, without_columns, ziplm_order


def problem(columns=8, rows=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g).double()
    x = torch.randn(200, columns, generator=g).double() @ mix
    return torch.randn(rows, columns, generator=g).double(), x.T @ x / 200


def error(w, new, h):
    return (((w - new) @ h) * (w - new)).sum()


@pytest.mark.parametrize("count", [1, 2])
def test_the_cost_is_the_error_of_the_refit(count):
    w, h = problem()
    units = torch.randperm(8, generator=torch.Generator().manual_seed(1)).view(-1, count)
    found = removal_costs(w, torch.linalg.inv(h), units)
    for at, c in zip(units, found):
        gone = torch.zeros(8, dtype=torch.bool)
        gone[at] = True
        assert torch.allclose(c, error(w, least_squares_refit(w[None], h[None], gone)[0], h), rtol=1e-6)


def test_updates_one_after_the_other_are_the_refit_for_all_at_once():
    w, h = problem()
    new, inverse, gone = w, torch.linalg.inv(h), torch.zeros(8, dtype=torch.bool)
    for at in ([3], [0, 6], [5]):
        new, inverse = without_columns(new, inverse, torch.tensor(at))
        gone[at] = True
        assert torch.allclose(new, least_squares_refit(w[None], h[None], gone)[0], atol=1e-8)
        left = ~gone
        assert torch.allclose(inverse[left][:, left], torch.linalg.inv(h[left][:, left]), atol=1e-8)


class Twice(nn.Module):
    "Channels that two convolutions read, one of them after a flattening."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(6 * 16, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x).mean((2, 3))[:, :3] + self.c(x.flatten(1))


@pytest.fixture
def world():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    return Twice().double().eval(), [torch.randn(40, 1, 6, 6, generator=g).double() for _ in range(5)]


def test_the_order_is_the_greedy_one_by_brute_force_over_all_layers_that_read(world):
    net, batches = world
    stats = collect(Channels(net, batches), batches, {"consumer_stats"})["a.weight"]
    assert len(stats.consumer_stats) == 2
    found = ziplm_order(torch.ones(6), stats, damping=.01)
    energy = sum(((r.matrix() @ damped_cholesky(r.gram, .01)[0]) * r.matrix()).sum() for r, _ in stats.consumer_stats)
    def lost(units):
        total = 0.
        for r, columns in stats.consumer_stats:
            gone = torch.zeros(r.gram.shape[1], dtype=torch.bool)
            gone[columns[units].flatten()] = True
            m, h = r.matrix(), damped_cholesky(r.gram, .01)[0]
            new = least_squares_refit(m, r.gram, gone, .01) if not gone.all() else 0 * m
            total += float(error(m[0], new[0], h[0]))
        return total
    removed = []
    for _ in range(6):
        best = min((u for u in range(6) if u not in removed), key=lambda u: lost([*removed, u]))
        removed.append(best)
        assert found[best].item() == pytest.approx(lost(removed) / float(energy), rel=1e-6)
    assert found.argsort().tolist() == removed
    assert found.max().item() == pytest.approx(1)   # without any channel all energy is lost


def test_a_twin_is_free_only_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        net[0].weight[4], net[0].bias[4] = net[0].weight[1], net[0].bias[1]
    x = torch.randn(300, 5).double()
    order = ziplm_order(torch.ones(6), collect(Channels(net, [x]), [x], {"consumer_stats"})["0.weight"], damping=1e-8)
    assert min(order[1], order[4]) < 1e-6 and max(order[1], order[4]) > 1e-3
    before = net(x).detach()
    prune(net, "ziplm", {"params": .01}, [x], of="params", levels=6, damping=1e-8)
    assert net[0].weight.shape[0] == 5 and torch.allclose(net(x), before, atol=1e-4)


def test_the_value_of_a_width_is_minus_the_error_of_the_rest():
    s = torch.tensor([1., .6, .3, .1])
    assert minus_removal_error(s, [1, 2, 4]) == pytest.approx([-.6, -.3, 0.])


def test_the_layer_that_is_cheap_to_reconstruct_is_narrowed_first():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    with torch.no_grad():   # the first layer has rank two
        net[0].weight.copy_(torch.randn(8, 2).double() @ torch.randn(2, 8).double())
    x = torch.randn(400, 8).double()
    plan = prune(copy.deepcopy(net), "ziplm", .5, [x], of="params", levels=8, damping=1e-6)
    kept = {n: int(m.sum()) for n, m in plan.masks.items()}
    assert kept["0.weight"] < kept["1.weight"] and sum(kept.values()) == 8


def test_heads_and_neurons_of_a_transformer_are_structures():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32)).eval()
    g = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 48, (4, 16), generator=g)} for _ in range(4)]
    plan = prune(net, "ziplm", .5, batches, of="macs", levels=4)
    assert {len(m) for m in plan.masks.values()} == {4, 32}
    assert sum(int(m.sum()) for m in plan.masks.values()) == 36


def test_an_unknown_resource_is_refused_before_work():
    with pytest.raises(BadInput, match="'joules'"):
        build("ziplm", of="joules")
