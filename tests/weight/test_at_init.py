"GraSP: exact sign and Hessian; batch splits, temperature and buffers; ranking of methods that prune at initialisation."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.bench.task import find_task
from pruning_bench.core.inputs import seeded
from pruning_bench.core.recovery import finetune
from pruning_bench.core.space import Weights
from pruning_bench.core.stats import collect
from pruning_bench.weight.at_init import grasp, hessian_grad, split_batch


def mlp(*sizes, seed=0):
    with seeded(seed):
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])

def conv(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                             nn.Conv2d(4, 6, 3, stride=2, bias=False),
                             nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10, bias=False))

def batches(n=2, size=16):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 1, 8, 8, generator=g), torch.randint(0, 10, (size,), generator=g)) for _ in range(n)]

def half_square(out, y): return ((out - y)**2).mean() / 2


@pytest.mark.parametrize("temperature", [1., 4.])
@pytest.mark.parametrize("parts", [1, 4])
def test_grasp_is_exact_on_a_quadratic_loss(temperature, parts):
    torch.manual_seed(0)
    line, x, y = nn.Linear(6, 1, bias=False).double(), torch.randn(32, 6).double(), torch.randn(32, 1).double()
    w = line.weight.detach()
    A, b = x.T @ x / 32 / temperature**2, x.T @ y / 32 / temperature
    got = hessian_grad(Weights(line), [(x, y)], half_square, temperature, parts)["weight"]
    assert torch.allclose(got, (A @ (A @ w.T - b)).T, rtol=1e-10)
    space = Weights(line)
    found = collect(space, [(x, y)], {"hessian_grad"}, half_square, {"hessian_grad": dict(temperature=temperature)})
    gates = torch.ones(6, 1).double().requires_grad_()
    ((A @ (gates * w.T) - b)**2).sum().backward()   # the squared norm of the gradient
    assert torch.allclose(grasp(w, found["weight"]), gates.grad.T / 2, rtol=1e-10)

def test_the_weight_that_goes_first_weakens_the_gradient_least():
    torch.manual_seed(0)
    line, x, y = nn.Linear(8, 1, bias=False).double(), torch.randn(64, 8).double(), torch.randn(64, 1).double()
    line.weight.data *= 1e-3   # first order is enough
    w = line.weight.detach().clone()
    def norm(v): return ((x.T @ (x @ v.T - y) / 64)**2).sum().item()
    without = [norm(w * (torch.arange(8) != i)) for i in range(8)]
    masks = [prune(copy.deepcopy(line), "grasp", s, [(x, y)], half_square, temperature=1.).masks["weight"]
             for s in (1 / 8, 7 / 8)]
    assert without.index(max(without)) == (~masks[0]).nonzero()[0, 1]
    assert without.index(min(without)) == masks[1].nonzero()[0, 1]

def test_hessian_times_gradient_of_a_network():
    net, (x, y) = mlp(64, 12, 10).double(), batches(1)[0]
    x, space = x.double(), Weights(net)
    names = space.names()
    def loss(*ws): return F.cross_entropy(torch.func.functional_call(net, dict(zip(names, ws)), x), y)
    ws = tuple(net.get_parameter(n).detach() for n in names)
    g = torch.autograd.functional.jacobian(loss, ws)
    expected = torch.autograd.functional.hvp(loss, ws, g)[1]
    for parts in (1, 2, 4):
        got = hessian_grad(space, [(x, y)], F.cross_entropy, 1., parts)
        assert all(torch.allclose(got[n], e, rtol=1e-6) for n, e in zip(names, expected))

@pytest.mark.parametrize("sizes", [(10,), (7, 3), (4, 4, 2)])
def test_pieces_count_by_their_examples(sizes):
    net, (x, y) = mlp(64, 12, 10).double(), batches(1, 10)[0]
    whole = hessian_grad(Weights(net), [(x.double(), y)], F.cross_entropy, 1., 1)
    data = list(zip(x.double().split(sizes), y.split(sizes)))
    for parts in (1, 2, 3, 4):   # 10 examples in 4 pieces: 3, 3, 2, 2
        got = hessian_grad(Weights(net), data, F.cross_entropy, 1., parts)
        assert all((got[n] - h).abs().max() <= 1e-10 * h.abs().max() for n, h in whole.items())

def test_the_model_is_left_as_it_was():
    net = conv().eval()
    before = copy.deepcopy(net.state_dict())
    hessian_grad(Weights(net), batches(), F.cross_entropy)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net.training
    x = batches()[0][0]
    twin = conv().eval()
    assert torch.equal(net(x), twin(x)) and all(p.grad is None for p in net.parameters())   # the temperature is gone
    with pytest.raises(ValueError): hessian_grad(Weights(net), [(x, torch.zeros(3).long())] * 2, F.cross_entropy)
    assert torch.equal(net(x), twin(x)) and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

def test_batches_are_cut_along_their_examples():
    x, y = torch.arange(10.).view(5, 2), torch.arange(5)
    assert [len(p[0]) for p in split_batch((x, y), 2)] == [3, 2]
    assert torch.equal(torch.cat([p[1] for p in split_batch([x, y], 2)]), y)
    cut = split_batch({"input_ids": x, "flag": True, "one": torch.tensor(3)}, 2)
    assert [len(c["input_ids"]) for c in cut] == [3, 2] and all(c["flag"] is True and c["one"] == 3 for c in cut)
    # batch norm sees two at least
    assert prune(conv(), "grasp", .5, [(batches()[0][0][:3], batches()[0][1][:3])], F.cross_entropy).density == .5

class Attention(nn.Module):
    def __init__(self): super().__init__(); self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 10)
    def forward(self, x):
        q, k, v = self.qkv(x.flatten(1, 2)).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))

def test_grasp_differentiates_attention_twice():
    with seeded(0): net = Attention()
    assert prune(net, "grasp", .5, batches(), F.cross_entropy).density == .5

def test_grasp_needs_labels():
    with pytest.raises(BadInput): prune(conv(), "grasp", .5)
    with pytest.raises(BadInput, match="labels"): prune(conv(), "grasp", .5, [b[0] for b in batches()], F.cross_entropy)


@pytest.mark.slow
def test_the_ladder_at_one_percent():
    world, found = find_task("digits-mlp"), {}
    for name, parts in {"synflow": {}, "grasp": {}, "snip": {}, "magnitude": dict(allocate="global")}.items():
        found[name] = []
        for seed in range(3):
            with seeded(seed):
                net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                                    nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
            with seeded(seed):
                for w in net.parameters():
                    if w.dim() > 1: nn.init.kaiming_normal_(w)
            prune(net, name, .99, world.calibration(seed), world.loss, seed=seed, **parts)
            finetune(600, .05, "sgd", 5e-4)(net, world.batches(seed), world.loss)
            found[name].append(100 * world.evaluate(net)["accuracy"])
    mean = {n: sum(v) / 3 for n, v in found.items()}
    assert mean["synflow"] > mean["snip"] + 2 and min(mean["snip"], mean["grasp"]) > mean["magnitude"] + 50
