"ResRep: compactors merge exactly, forgotten rows follow the penalty alone, and removed rows leave nothing behind."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, prune
from pruning_bench.core.inputs import in_mode
from pruning_bench.core.rule import apply_rule
from pruning_bench.graph.groups import Channels
from pruning_bench.graph.surgery import write_values
from pruning_bench.structured.resrep import compactor_places, compactors, merged_values, shrink_rows


def with_norms(bias=False):
    net = nn.Sequential(nn.Conv2d(1, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3),
                        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(80, 7, bias=bias), nn.BatchNorm1d(7), nn.ReLU(),
                        nn.Linear(7, 3))
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(m.weight, .5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_(std=.3)
            m.running_var.uniform_(.5, 2)
    return net


@pytest.fixture
def net():
    torch.manual_seed(0)
    return with_norms().double().eval()


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 1, 8, 8, generator=g).double(), torch.randint(0, 3, (16,), generator=g))
            for _ in range(4)]


@pytest.mark.parametrize("bias", [False, True])
def test_the_merged_network_is_the_network_with_compactors(batches, bias):
    torch.manual_seed(2)
    net = with_norms(bias).double().eval()
    x = batches[0][0]
    places = compactor_places(Channels(net, batches))
    q = {n: torch.randn(len(p.channels), len(p.channels)).double() for n, p in places.items()}
    assert len(q) == 3
    with torch.no_grad(), compactors(places, q):
        truth = net(x)
    for n, p in places.items():
        write_values(net, merged_values(p, q[n]))
    assert torch.allclose(net(x), truth, rtol=1e-9, atol=1e-9)


def train(net, batches, keep=.5, steps=40, lr=.05, optimizer=torch.optim.SGD, **settings):
    "A training under the rule; returns its state, the outputs with compactors at the end, and the space."
    space, method = Channels(net, batches), build("resrep", steps=steps, **settings)
    with apply_rule(method.rule(method, keep), space, keep, steps) as training:
        net.train()
        opt = optimizer(net.parameters(), lr)
        for i in range(steps):
            x, y = batches[i % len(batches)]
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
        with in_mode(net, False), torch.no_grad():
            truth = net(batches[0][0])
    return training, truth, space


def test_rows_that_are_forgotten_in_time_are_exactly_zero_and_removing_them_changes_nothing(net, batches):
    training, truth, space = train(net, batches, total_shrinkage=3.)
    net.eval()
    removed = torch.cat([training.state[n]["compactor"].detach()[~space.alive(n)].flatten() for n in training.names])
    assert len(removed) and removed.abs().max() == 0
    assert torch.allclose(net(batches[0][0]), truth, rtol=1e-8, atol=1e-8)   # merged, and masked
    space.remove()
    assert torch.allclose(net(batches[0][0]), truth, rtol=1e-8, atol=1e-8)   # and narrower
    assert sum(net[i].weight.shape[0] for i in (0, 3, 6)) == 9


def test_the_gradient_of_forgotten_rows_is_reset_and_that_of_the_others_is_not(net, batches):
    space, method = Channels(net, batches), build("resrep", total_shrinkage=0., steps=4, ramp_end=0.)
    with apply_rule(method.rule(method, .5), space, .5, 4) as training:
        opt = torch.optim.SGD(net.parameters(), .1)
        for x, y in batches:
            remembered = {n: s["remembered"].clone() for n, s in training.state.items()}
            before = {n: s["compactor"].detach().clone() for n, s in training.state.items()}
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            moved = {n: (s["compactor"].detach() != before[n]).any(1) for n, s in training.state.items()}
            assert not any(moved[n][~m].any() for n, m in remembered.items())
            assert any(moved[n][m].any() for n, m in remembered.items())
        assert sum((~m).sum() for m in remembered.values()) >= 4


def test_the_proximal_step_shortens_rows_and_keeps_their_direction():
    torch.manual_seed(0)
    q = torch.randn(5, 4).double()
    before, norm = q.clone(), q.norm(dim=1)
    shrink_rows(q, 1.5)
    assert torch.allclose(q.norm(dim=1), (norm - 1.5).clamp(min=0))
    long = norm > 1.5
    assert long.any() and torch.allclose(F.normalize(q[long]), F.normalize(before[long]))


def test_in_training_mode_the_merged_norms_keep_the_scale_of_their_outputs(net, batches):
    train(net, batches[:1], steps=10)
    x = batches[0][0]
    out = net[:2].eval()(x)
    again = copy.deepcopy(net[:2]).train()(x)
    assert torch.allclose(out.std((0, 2, 3))[:2], again.std((0, 2, 3))[:2], rtol=.1)


def test_prune_meets_the_budget_and_keeps_the_architecture(net, batches):
    plan = prune(net, "resrep", {"macs": .4}, batches, F.cross_entropy, steps=6)
    assert plan.budget["achieved"] >= .4 and isinstance(net[1], nn.BatchNorm2d) and net[0].bias is None


class ReadTwice(nn.Module):
    "A convolution whose output is read before its batch norm as well."
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.head((F.relu(self.norm(x)) + x).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6, 3)

    def forward(self, x): return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("make, said", [(ReadTwice, "something else reads their outputs"),
                                        (Grouped, "needs one layer that writes all channels")])
def test_networks_without_a_place_for_compactors_are_refused_and_left_alone(batches, make, said):
    torch.manual_seed(0)
    net = make().double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(BadInput, match=said):
        prune(net, build("resrep", steps=2), .5, batches, F.cross_entropy)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
