"""PDP on channels: the mask where it is heard, its slope, the ramp, fixed shares, a late return, and what is left."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, prune, pruning
from pruning_bench.core.mask import masks_of
from pruning_bench.core.pattern import count_to_keep
from pruning_bench.core.recovery import finetune
from pruning_bench.graph.attention import Heads
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.soft_filters import squared_filter_norms


def net(norm=False, dtype=torch.float32):
    torch.manual_seed(0)
    one, two = (nn.BatchNorm2d(8), nn.BatchNorm2d(6)) if norm else (nn.Identity(), nn.Identity())
    return nn.Sequential(nn.Conv2d(2, 8, 3), one, nn.ReLU(), nn.Conv2d(8, 6, 3), two, nn.ReLU(), nn.Flatten(),
                         nn.Linear(24, 3)).to(dtype)


def data(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 2, 6, 6, generator=g).to(dtype), torch.randint(3, (6,), generator=g)) for _ in range(2)]


def steps(model, n, lr=.05):
    opt = torch.optim.SGD(model.parameters(), lr)
    for x, y in itertools.islice(itertools.cycle(data(next(model.parameters()).dtype)), n):
        opt.zero_grad(); F.cross_entropy(model(x), y).backward(); opt.step(); yield


@pytest.fixture
def ears(monkeypatch): # the factors that the readers hear: a function of the group
    kept, gate = [], Channels.gate
    monkeypatch.setattr(Channels, "gate", lambda space, factor: (kept.append(factor), gate(space, factor))[1])
    return kept


def test_a_mask_on_what_is_read_is_a_mask_on_weights_and_biases_where_no_norm_is_between():
    model, (x, _) = net(dtype=torch.float64), data(torch.float64)[0]
    space, twin = Channels(model, data(torch.float64)), copy.deepcopy(model)
    masks = {n: torch.rand(len(g), dtype=torch.float64) for n, g in space.groups.items()}
    assert list(masks) == ["0.weight", "3.weight"]
    with space.gate(masks.get): heard = model(x)
    for i in (0, 3):
        twin[i].weight.data *= masks[f"{i}.weight"].view(-1, 1, 1, 1); twin[i].bias.data *= masks[f"{i}.weight"]
    assert torch.allclose(heard, twin(x), atol=1e-12) and not torch.allclose(heard, model(x), atol=1e-3)


@pytest.mark.parametrize("norm", [False, True])
def test_loudness_is_the_squared_norm_and_has_the_slope_of_the_formula(norm):
    model = net(norm, torch.float64)
    space, tau = Channels(model, data(torch.float64)), .3
    for n, i in (("0.weight", 0), ("3.weight", 3)):
        assert torch.allclose(squared_filter_norms(space, n), model[i].weight.square().flatten(1).sum(1))
        assert torch.allclose(squared_filter_norms(space, n).sqrt().float(), space.w(n).float())
        t = space.w(n).double()[2]
        m = torch.sigmoid((squared_filter_norms(space, n) - t**2) / tau)
        assert abs(m[2].item() - .5) < 1e-6
        slope, = torch.autograd.grad(m.sum(), model[i].weight)
        assert torch.allclose(slope, (m * (1 - m) * 2 / tau).view(-1, 1, 1, 1) * model[i].weight)
        assert (slope.flatten(1).abs().sum(1) > 0).all()


def test_as_many_channels_as_the_ramp_says_are_heard_by_half_or_more_and_then_none_is_soft(ears):
    model, rows = net(), []
    with pruning(model, "pdp-channels", .5, steps=20, data=data(), start=.2, ramp_end=.6, prune_at=.8) as p:
        for k, _ in enumerate(steps(model, 20), 1):
            factors = {n: ears[0](n) for n in p.training.names}
            rows.append({n: None if f is None else int((f >= .5).sum()) for n, f in factors.items()})
    final = {n: int(m.sum()) for n, m in p.plan.masks.items()}
    # before the start, and after the cut
    assert sum(final.values()) == 7 and all(r == dict.fromkeys(final) for r in rows[:3] + rows[15:])
    for k, row in enumerate(rows[3:15], 4):
        gone = min(1., (k / 20 - .2) / .4)
        assert row == {n: count_to_keep(1 - gone * (1 - final[n] / len(p.plan.masks[n])), len(p.plan.masks[n]))
                       for n in row}
    assert rows[3] == {"0.weight": 8, "3.weight": 6} and rows[11] == final


def test_shares_are_fixed_at_the_start_and_a_channel_that_grows_late_returns(ears):
    model = net()
    with pruning(model, "pdp-channels", .5, steps=10, data=data(), start=.2, ramp_end=.5, prune_at=.8) as p:
        for k, _ in enumerate(steps(model, 10, lr=0.), 1):
            if k == 3:
                at_start = {n: s.clone() for n, s in ((n, p.training.w(n)) for n in p.training.names)}
                model[3].weight.data *= 10   # a whole layer grows, and its share does not
            if k == 6:
                weakest = int(at_start["0.weight"].argmin())
                assert ears[0]("0.weight")[weakest] < .5   # on its way out
                model[0].weight.data[weakest] *= 100
    flat = torch.cat(list(at_start.values())).sort(descending=True).values
    # one ranking of all norms, at the start
    assert {n: int(m.sum()) for n, m in p.plan.masks.items()} == {n: int((s >= flat[6]).sum())
                                                                  for n, s in at_start.items()}
    assert p.plan.masks["0.weight"][weakest]


def test_channels_on_their_way_out_learn_and_channels_that_are_cut_do_not(ears):
    model = net()
    with pruning(model, "pdp-channels", .5, steps=10, data=data(), start=.1, ramp_end=.5, prune_at=.8) as p:
        for k, _ in enumerate(steps(model, 10), 1):
            if k == 7:
                quiet = ears[0]("0.weight") < .5
                model.zero_grad(); F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
                assert quiet.any() and (model[0].weight.grad[quiet].flatten(1).abs().sum(1) > 0).all()
            if k == 9:
                dead = ~masks_of(model)["0.weight"].flatten(1).any(1)
                assert dead.any() and (model[0].weight[dead] == 0).all() and (model[3].weight[:, dead] == 0).all()
    assert torch.equal(p.plan.masks["0.weight"], ~dead)
    assert model[0].out_channels == int((~dead).sum()) == model[3].in_channels


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_are_gone_and_the_plan_makes_the_same_network(norm, dtype):
    model, fresh, (x, _) = net(norm, dtype), net(norm, dtype), data(dtype)[0]
    plan = prune(model, "pdp-channels", .5, data(dtype), F.cross_entropy, recover=finetune(10, 1e-2))
    widths = [int(m.sum()) for m in plan.masks.values()]
    assert sum(widths) == 7
    assert [model[0].out_channels, model[3].out_channels] == widths
    assert {v.dtype for v in model.parameters()} == {dtype}
    plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert not any(m._forward_pre_hooks for m in model if not masks_of(m))


def test_channels_have_a_name_of_their_own_and_need_a_batch():
    assert build("pdp-channels").space == "channels" and build("pdp").space == "weights"
    with pytest.raises(BadInput, match="channels need data=, at least one batch"): prune(net(), "pdp-channels", .5)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.out = ((nn.Linear(5, 16), nn.MultiheadAttention(16, 4, batch_first=True),
                                              nn.Linear(16, 3)))
    def forward(self, x):
        h = self.embed(x)
        return self.out(self.attend(h, h, h, need_weights=False)[0])


def test_gates_of_heads_are_the_network_without_them_and_learn():
    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(2, 6, 5)
    space, before = Heads(model, [x]), type(model.attend)
    gate = torch.tensor([1., 0, 1, 0], requires_grad=True)
    with space.gate(lambda n: gate):
        heard = model(x)
        heard.square().sum().backward()
    assert type(model.attend) is before
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert (gate.grad != 0).all()
    space.apply({n: (None, gate.bool()) for n in space.names()})
    space.remove()
    assert torch.allclose(model(x), heard, atol=1e-6)


class Borrowed(nn.Module): # takes the weight of a module that it never calls
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
    def forward(self, x): return F.linear(self.a(x).relu(), self.b.weight, self.b.bias)


@pytest.mark.parametrize("method", ["lapp", "pdp-channels"])
def test_a_gate_that_would_do_nothing_is_refused(method):
    model, rows = Borrowed(), [(torch.randn(6, 3), torch.randint(2, (6,)))]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match="'b.weight', which Linear does not multiply"):
        prune(model, method, .5, rows, F.cross_entropy, recover=finetune(5))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_allocation_that_reads_statistics_is_refused_inside_a_training():
    with pytest.raises(BadInput, match="allocation 'emo' reads 'calibration_batches'"):
        prune(net(), "sfp", .5, data(), F.cross_entropy, allocate="emo", recover=finetune(4))
