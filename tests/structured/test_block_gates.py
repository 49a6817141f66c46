"Block skipping with learned gates: gradients of both penalties, closed gates, removal of the gates, refusals."
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.method import Method
from pruning_bench.core.recovery import Recovery, finetune
from pruning_bench.structured.block_gates import binary_gate, polarization_loss, train_with_gates


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))

def batches(seed=0, shape=(16,), classes=4):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, *shape, generator=g), torch.randint(0, classes, (16,), generator=g)) for _ in range(3)]

class Step(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
    def forward(self, x): return x + self.b(F.relu(self.a(x)))

def deep(blocks=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.Sequential(*[Step() for _ in range(blocks)]), nn.Linear(8, 4))


def test_a_decision_and_its_gradient():
    p = torch.tensor([.9, .2, .7, .6], requires_grad=True)
    polarization_loss(binary_gate(p).mean().view(1)).backward()
    assert binary_gate(p).tolist() == [1, 0, 1, 1] and torch.allclose(p.grad, torch.full((4,), (1 - 2 * .75) / 4))

@pytest.mark.parametrize("share", [0., .25, .5, 1.])
def test_polarisation_is_zero_only_in_agreement(share):
    assert polarization_loss(torch.tensor([share])).item() == share * (1 - share) <= .25

def voting(budget=3., agree=1., steps=6, sparsity=.5, model=None, train=None):
    shares, model = [], model or deep()
    def watched(method, keep): # the rule, and the shares of every step
        made = train_with_gates(budget, agree)(method, keep)
        return replace(made, update=lambda training: shares.append(training.state["1"]["share"]))
    record = Method(space="blocks", rule=watched, recover=train or finetune(steps, 1e-2))
    prune(model, record, sparsity, batches(), F.cross_entropy)
    return model, shares

def test_gates_are_gone_after_the_training():
    model, shares = voting()
    shares = torch.stack(shares)
    assert shares.shape == (6, 4) and ((shares >= 0) & (shares <= 1)).all()
    assert len(model[1]) == 2
    assert not any("rule" in n for n in model.state_dict())
    assert not any(m._forward_hooks for m in model.modules())

def test_gates_are_gone_after_a_training_that_breaks_off():
    def broken(model, data, loss, part=1.): raise KeyboardInterrupt
    model = deep()
    with pytest.raises(KeyboardInterrupt): voting(model=model, train=Recovery(broken, steps=3))
    assert list(model.state_dict()) == list(deep().state_dict()) and not any(m._forward_hooks for m in model.modules())

def test_the_two_terms_reach_the_gates_and_nothing_else():
    "With open gates the polarisation loss is zero and raises gates, the budget lowers them; weights see the loss."
    grads = {}
    def look(model, data, loss, part=1.):
        weight, bias = [p for n, p in model.named_parameters() if "rule" in n]
        weight.data.zero_()
        x, y = data_batch
        opt = torch.optim.SGD(model.parameters(), 0.)
        F.cross_entropy(model(x), y).backward()
        grads.update({n: p.grad.clone() for n, p in model.named_parameters() if "rule" not in n})
        grads["bias"] = bias.grad.clone()
        opt.step()   # the step that was announced
    data_batch = batches()[0]
    found = {}
    for budget, agree in ((0., 0.), (2., 0.), (0., 2.)):
        voting(budget, agree, model=deep(), train=Recovery(look, steps=1))
        found[budget, agree] = dict(grads)
    plain = found[0., 0.]
    slope = torch.sigmoid(torch.tensor(1.)) * torch.sigmoid(torch.tensor(-1.))
    assert plain["bias"].shape == (4, 1)
    assert torch.allclose(found[2., 0.]["bias"] - plain["bias"], 2 * 2 * (1 - .5) / 4 * slope, atol=1e-5)
    assert torch.allclose(found[0., 2.]["bias"] - plain["bias"], 2 * (1 - 2 * 1.) / 4 * slope, atol=1e-5)
    for n in (n for n in plain if n != "bias"):
        assert torch.equal(plain[n], found[2., 0.][n]) and torch.equal(plain[n], found[0., 2.][n])

def test_a_closed_gate_is_a_block_left_out():
    model, outs = deep(), []
    def look(model, data, loss, part=1.):
        weight, bias = [p for n, p in model.named_parameters() if "rule" in n]
        weight.data.zero_()
        bias.data.copy_(torch.tensor([[9.], [-9.], [9.], [-9.]]))
        opt = torch.optim.SGD(model.parameters(), 0.)
        for _ in range(200): out = model(x)
        out.sum().backward()
        opt.step()   # the step that was announced
        outs.append(model(x).detach())
    x = torch.randn(5, 16)
    model, _ = voting(model=model, train=Recovery(look, steps=1))
    assert torch.allclose(model(x), outs[0], atol=1e-6) and len(model[1]) == 2


@pytest.mark.parametrize("case,word", [("plain", "blocks"), ("narrow", "shape")])
def test_models_without_removable_blocks_are_refused(case, word):
    narrow = nn.Sequential(nn.Linear(16, 8),
                           nn.Sequential(*[nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 4))]))
    model = net() if case == "plain" else narrow
    with pytest.raises(BadInput, match=word) as refused: prune(model, "polarize", .5, batches(), F.cross_entropy)
    assert "\n" not in str(refused.value)
