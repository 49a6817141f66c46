"Graph metanetworks: exact conversions, symmetries, the penalty by hand, refusals, and what meta-training leaves alone."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.graph_metanetwork import (GraphMetanetwork, NetworkGraph, edit_network, group_penalty,
                                                        meta_train, pool_edges)


class Net(nn.Module):
    "A stream of four channels with one residual branch of six, and a layer that reads each channel twice."
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.up, self.inner, self.down = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.down(F.relu(self.inner(self.up(x))))
        return self.head(F.adaptive_avg_pool2d(x, (1, 2)).flatten(1))


def net(seed=0):
    torch.manual_seed(seed)
    model = Net().eval()
    for m in (model.norm, model.inner):
        nn.init.normal_(m.weight, 1, .2)
        nn.init.normal_(m.running_mean)
    return model


def batches(n=3):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(8, 1, 4, 4, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(n)]


def graph_of(model):
    return NetworkGraph(Channels(model, batches(1), residual=True))


def metanetwork(seed=0, scale=.01):
    torch.manual_seed(seed)
    return GraphMetanetwork(8, 2, scale)


def test_weights_come_back_exactly_whatever_the_kernel():
    model = net()
    graph = graph_of(model)
    assert set(graph.edges) == {"stem.weight", "up.weight", "down.weight", "head.weight"}
    for p in graph.edges:
        k = graph.kernels(p)
        assert k.shape[-1] == 9 and torch.equal(graph.weight(p, k), model.get_parameter(p))
    assert graph.kernels("head.weight").shape[:2] == (3, 4)   # two columns of the head are one edge


def test_without_scale_the_network_is_returned_and_with_it_the_change_is_proportional():
    model, meta = net(), metanetwork()
    own, graph = dict(model.named_parameters()), graph_of(model)
    with torch.no_grad():
        small = meta(graph)
        meta.scale = .02
        large = meta(graph)
        meta.scale = 0.
        assert all(torch.equal(v, own[n]) for n, v in meta(graph).items())
    changed = {n for n in own if not torch.equal(small[n], own[n])}
    assert changed >= {"stem.weight", "up.weight", "down.weight", "head.weight", "norm.weight", "inner.bias"}
    assert all(torch.allclose(large[n] - own[n], 2 * (small[n] - own[n]), atol=1e-6) for n in own)


@pytest.mark.parametrize("seed", range(3))
def test_a_permutation_of_channels_permutes_the_change(seed):
    g = torch.Generator().manual_seed(seed)
    order, stream = torch.randperm(6, generator=g), torch.randperm(4, generator=g)
    both = torch.stack([2 * stream, 2 * stream + 1], 1).flatten()   # the head reads every channel twice
    rows = {"up": order, "inner": order, "stem": stream, "norm": stream, "down": stream}
    columns = {"up.weight": stream, "down.weight": order, "head.weight": both}

    def permuted(state):
        state = {n: v[rows[n.split(".")[0]]] if n.split(".")[0] in rows and v.dim() else v for n, v in state.items()}
        return {n: v[:, columns[n]] if n in columns else v for n, v in state.items()}

    one, two = net(), net()
    two.load_state_dict(permuted(one.state_dict()))
    assert torch.allclose(one(batches()[0][0]), two(batches()[0][0]), atol=1e-5)
    meta = metanetwork(scale=1.)
    with torch.no_grad(): want, got = permuted(meta(graph_of(one))), meta(graph_of(two))
    assert all(torch.allclose(want[n], got[n], atol=1e-4) for n in want)


def test_pooling_by_hand():
    e = torch.tensor([[[1.], [3.]], [[2.], [2.]]])
    assert torch.allclose(pool_edges(e, 1), torch.tensor([[2., 3., 1.], [2., 2., 1e-3]]), atol=1e-3)


def test_the_penalty_by_hand():
    model = net()
    space = Channels(model, batches(1))   # the branch alone: up, its norm, and the columns of down
    n = space.names()
    assert len(n) == 1
    params = {k: v.detach() for k, v in model.named_parameters()}
    s = (params["up.weight"].square().sum((1, 2, 3)) + params["inner.weight"].square()
         + params["down.weight"].square().sum((0, 2, 3)))
    norm = s.sqrt()
    strength = 16 ** ((norm.max() - norm) / (norm.max() - norm.min()))
    assert group_penalty(space, params).item() == pytest.approx((strength * s).sum().item(), rel=1e-5)


def test_meta_training_lowers_its_loss_and_leaves_the_networks_alone():
    nets = [net(s) for s in range(2)]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in nets]
    meta = metanetwork(scale=.1)
    log = meta_train(meta, [graph_of(m) for m in nets], batches(1), F.cross_entropy, 20, lr=1e-2, penalty=1e-2)
    total = [a + 1e-2 * b for a, b in log]
    assert len(log) == 40 and sum(total[-4:]) < sum(total[:4])
    assert all(torch.equal(v, b[k]) for m, b in zip(nets, before) for k, v in m.state_dict().items())
    assert not any(m.training for m in nets)
    changed = edit_network(meta, graph_of(nets[0]))
    assert changed is nets[0] and not torch.equal(changed.up.weight, before[0]["up.weight"])
    assert torch.equal(changed.norm.running_mean, before[0]["norm.running_mean"])


def test_kernels_that_do_not_fit_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(BadInput, match="kernels of at most nine numbers.*'0.weight'.*skip="): graph_of(model)
