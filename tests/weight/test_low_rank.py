"Low-rank factorisation and trained rank pruning: exact invariants, orderings over three seeds."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.bench.task import find_task
from pruning_bench.core.recovery import Recovery, finetune
from pruning_bench.core.space import SPACES, prunable_layers
from pruning_bench.weight.low_rank import (FilterRanks, LowRankPair, Ranks, SpatialRanks, factorize_layer, filter_view,
                                           joint_singular_values, low_rank_matrix, max_rank, output_view,
                                           rank_for_energy, spatial_view, thin_svd)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))

def batches(seed=0, shape=(16,), classes=4):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, *shape, generator=g), torch.randint(0, classes, (16,), generator=g)) for _ in range(3)]


# directions

@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_by_their_identities(shape, dtype):
    w = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    u, s, v = thin_svd(w)
    for r in range(1, len(s) + 1):
        low = low_rank_matrix(u, s, v, r)
        assert torch.allclose((w - low).square().sum(), s[r:].square().sum(), atol=1e-4)
        assert torch.allclose(low_rank_matrix(*thin_svd(low), r), low, atol=1e-5)
    assert torch.allclose((u @ v.T * w).sum(), s.sum(), atol=1e-4) and s.dtype == dtype

def test_a_pull_lowers_every_singular_value_and_stops_at_zero():
    u, s, v = thin_svd(torch.diag(torch.tensor([3., 2, .5])))
    assert torch.allclose(thin_svd(low_rank_matrix(u, s, v, 3, 1.))[1], torch.tensor([2., 1, 0]), atol=1e-6)

@pytest.mark.parametrize("level,rank", [(.5, 1), (.9, 1), (.91, 2), (1., 2)])
def test_the_smallest_rank_that_holds_the_energy(level, rank):
    assert rank_for_energy(torch.tensor([3., 1, 0]), level) == rank

CONVS = [nn.Linear(7, 9), nn.Linear(7, 9, bias=False), nn.Conv2d(4, 6, 3, stride=2, padding=1),
         nn.Conv2d(4, 6, (3, 1), dilation=2, padding_mode="circular", padding=1),
         nn.Conv1d(5, 8, 3, bias=False), nn.Conv3d(3, 4, 2)]

WAYS = [output_view, spatial_view, filter_view]
UNROLLED = {"output_view": lambda w: w.permute(1, 2, 3, 0).reshape(-1, len(w)),   # channels, height, width x filters
            # channels, height x filters, width
            "spatial_view": lambda w: w.permute(1, 2, 0, 3).reshape(w.shape[1] * w.shape[2], -1),
            "filter_view": lambda w: w.reshape(*w.shape[:2], -1)}   # a matrix for each filter: channels x height, width

@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("module",
                         [*CONVS, nn.Conv2d(4, 6, (2, 3), padding="same"),
                          nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), padding_mode="replicate", bias=False),
                          nn.Conv2d(5, 7, 1)], ids=repr)
def test_two_thin_layers_compute_what_the_layer_of_low_rank_computes(module, way):
    model = nn.Sequential(copy.deepcopy(module))
    layer = way(prunable_layers(model)["0.weight"])
    parts = thin_svd(layer.read())
    pair = factorize_layer(layer, *(p[..., :2] for p in parts))
    layer.weight.data.copy_(layer.tensor(low_rank_matrix(*parts, 2)))
    x = (torch.randn(2, 7) if isinstance(module, nn.Linear)
         else torch.randn(2, module.in_channels, *[7] * (module.weight.dim() - 2)))
    assert torch.allclose(pair(x), model(x), atol=1e-5)
    assert torch.allclose(pair.weight, layer.weight, atol=1e-5) and pair.bias is layer.module.bias

@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
def test_a_kernel_of_low_rank_is_the_nearest_of_its_rank_in_the_matrix_of_its_way(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 6, (3, 2)).double())
    start = model[0].weight.detach().clone()
    layer, m = way(prunable_layers(model)["0.weight"]), UNROLLED[way.__name__](start)
    assert torch.equal(layer.read(), m) and torch.equal(layer.tensor(layer.read()), start)
    s = torch.linalg.svdvals(m)
    for r in range(1, max_rank(layer) + 1):
        low = factorize_layer(layer, *(p[..., :r] for p in thin_svd(m))).weight
        assert torch.allclose((start - low).square().sum(), s[..., r:].square().sum(), atol=1e-10)   # Eckart and Young
        assert (torch.linalg.matrix_rank(UNROLLED[way.__name__](low), rtol=1e-9) == r).all()

@pytest.mark.parametrize("way,thin,wide",
                         [(output_view, (3, 5, 3, 2), (6, 3, 1, 1)), (spatial_view, (3, 5, 3, 1), (6, 3, 1, 2)),
                          (filter_view, (18, 5, 1, 1), (6, 3, 3, 2))], ids=lambda x: getattr(x, "__name__", ""))
def test_shapes_and_prices_of_three_directions(way, thin, wide):
    model = nn.Sequential(nn.Conv2d(5, 6, (3, 2)))
    space = {output_view: Ranks, spatial_view: SpatialRanks, filter_view: FilterRanks}[way](model)
    pair = factorize_layer(space.seen["0.weight"], *(p[..., :3] for p in thin_svd(space.seen["0.weight"].read())))
    assert (tuple(pair[0].weight.shape), tuple(pair[1].weight.shape)) == (thin, wide)
    assert pair[0].weight.numel() + pair[1].weight.numel() == 3 * space.cost("0.weight")

class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.short, self.head = (nn.Conv2d(4, 8, 3, padding=1),
                                                 nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1, stride=2),
                                                 nn.Linear(8, 4))
    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head((self.b(x) + self.short(x)).relu().mean((2, 3)))

def pictures(seed=0):
    torch.manual_seed(seed)
    return Pictures()

FORMS = ["ranks", "spatialranks", "filterranks"]

@pytest.mark.parametrize("space", FORMS)
@pytest.mark.parametrize("method", ["truncated-svd", "trp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_way_keeps_exact_counts_and_its_plan_makes_the_same_network(space, method, dtype, tmp_path):
    model, x = pictures().to(dtype), torch.randn(2, 4, 6, 6, dtype=dtype)
    data = [(a.to(dtype), y) for a, y in batches(shape=(4, 6, 6))]
    plan = prune(model, method, .5, data, F.cross_entropy, space=space,
                 **({"recover": finetune(6, 1e-2)} if method == "trp" else {}))
    assert all(int(m.sum()) == max(1, int(.5 * len(m) + .5)) for m in plan.masks.values())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert isinstance(model.b, LowRankPair) and plan.space == space
    fresh = pictures().to(dtype)
    plan.save(tmp_path / "plan")
    load_plan(tmp_path / "plan").apply(fresh)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    if method == "truncated-svd":
        again = pictures().to(dtype)
        plan.apply(again)
        assert torch.allclose(again(x), prune_and_run(space, x), atol=1e-4)

def prune_and_run(space, x):
    model = pictures().to(x.dtype)
    # magnitude, read along a direction, is its singular value
    prune(model, space=space, score="magnitude", sparsity=.5)
    return model(x)

@pytest.mark.parametrize("space", FORMS)
def test_the_split_after_trained_ranks_costs_nothing_in_every_way(space):
    model, data, seen = pictures(), batches(shape=(4, 6, 6)), []
    def look(model, data, loss, part=1.):
        finetune(10, 1e-2)(model, data, loss, part)
        seen.append(model(data_x).detach())
    train, data_x = Recovery(look, steps=10), data[0][0]
    prune(model, "trp", .5, data, F.cross_entropy, recover=train, space=space)
    assert torch.allclose(model(data_x), seen[0], atol=1e-4)
    assert prune(pictures(), "trp", .5, data, F.cross_entropy, recover=train,
                 space=space) == prune(pictures(), "trp", .5, data, F.cross_entropy, recover=train, **{"space": space})

def test_a_budget_over_layers_with_different_prices_is_met_within_one_direction():
    for space in FORMS:
        model = pictures()
        units = SPACES[space](pictures())
        plan = prune(model, space=space, score="energy", allocate="global", sparsity=.4)
        spent = sum(units.cost(n) * int(m.sum()) for n, m in plan.masks.items())
        total = sum(units.cost(n) * len(m) for n, m in plan.masks.items())
        assert abs(spent - .6 * total) <= max(units.cost(n) for n in plan.masks)

def test_directions_shared_by_filters_are_weighed_together():
    units = FilterRanks(pictures())
    s = torch.linalg.svdvals(dict(pictures().named_parameters())["b.weight"].detach().reshape(8, 8, 9))
    assert torch.allclose(units.w("b.weight"), s.square().sum(0).sqrt()[:len(units.w("b.weight"))], atol=1e-5)
    assert torch.equal(joint_singular_values(torch.tensor([[3., 1], [4, 0]])), torch.tensor([5., 1]))

def test_an_unknown_way_is_refused():
    with pytest.raises(BadInput, match="unknown space 'spatial'"):
        prune(pictures(), "truncated-svd", .5, space="spatial")
    from pruning_bench import build
    with pytest.raises(BadInput, match="unknown space"): build("trp", space="spatial")
    assert build("trp", space="spatialranks").space == "spatialranks"

def test_units_fill_the_room_and_the_numbers_kept_are_the_fraction_kept():
    model = net()
    units = {n: Ranks(model).w(n).numel() for n in Ranks(model).names()}
    assert units == {"0.weight": 9, "2.weight": 12, "4.weight": 3}
    plan = prune(model, "truncated-svd", .5)
    assert {n: int(m.sum()) for n, m in plan.masks.items()} == {"0.weight": 5, "2.weight": 6, "4.weight": 2}
    assert [tuple(p.shape) for p in model[2].parameters()] == [(6, 24), (24, 6), (24,)]
    assert isinstance(model[2], LowRankPair)

def test_a_layer_that_keeps_all_its_room_is_not_touched():
    model, twin = net(), net()
    plan = prune(model, "truncated-svd", 0.)
    assert plan.density == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert not any(isinstance(m, LowRankPair) for m in model)

def test_magnitude_read_along_a_direction_is_its_singular_value():
    space = Ranks(net())
    for n in space.names():
        assert torch.allclose(space.reduce(n, {n: space.layers[n].read().abs()}), space.w(n), atol=1e-5)
    assert prune(net(), space="ranks", score="magnitude", sparsity=.5) == prune(net(), "truncated-svd", .5)

def test_a_score_with_readings_chooses_directions_too():
    model = net()
    plan = prune(model, space="ranks", score="wanda", sparsity=.5, data=batches(), loss=F.cross_entropy)
    assert all(int(m.sum()) == max(1, int(.5 * len(m) + .5)) for m in plan.masks.values())
    fresh = net()
    plan.apply(fresh)
    x = torch.randn(3, 16)
    assert torch.allclose(fresh(x), model(x), atol=1e-4)

def test_a_saved_plan_makes_the_same_network_of_the_dense_one(tmp_path):
    model, fresh, x = net(), net(), torch.randn(3, 16)
    prune(model, "truncated-svd", .7).save(tmp_path / "plan")
    load_plan(tmp_path / "plan").apply(fresh)
    assert torch.allclose(fresh(x), model(x), atol=1e-4)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]

def test_several_cuts_leave_the_rank_that_was_asked_for():
    model = net()
    plan = prune(model, "truncated-svd", .75, batches(), F.cross_entropy, schedule="cubic", recover=finetune(10, 1e-2))
    assert [int(m.sum()) for m in plan.masks.values()] == [2, 3, 1]
    assert torch.linalg.matrix_rank(model[2].weight) == 3

def test_a_module_used_twice_is_replaced_twice():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.ModuleDict({"one": nn.Linear(8, 8)}); self.b = self.a["one"]
        def forward(self, x): return self.a["one"](x) + self.b(x)
    twice = Twice()
    prune(twice, "truncated-svd", .5)
    assert twice.b is twice.a["one"] and isinstance(twice.b, LowRankPair)

def test_attention_and_depthwise_layers_are_left_alone():
    model = nn.ModuleDict({"att": nn.MultiheadAttention(8, 2), "deep": nn.Conv2d(8, 8, 3, groups=8),
                           "lin": nn.Linear(8, 8)})
    assert Ranks(model).names() == ["lin.weight"]

def test_an_encoder_layer_of_torch_still_runs_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    before = model(x).detach()
    prune(model, "truncated-svd", .1)
    with torch.no_grad(): fast = model(x)
    assert torch.allclose(fast, model(x), atol=1e-5) and not torch.allclose(fast, before, atol=1e-3)


# trained ranks

@pytest.mark.parametrize("every", [1, 5])
def test_trained_ranks_lose_nothing_at_the_split(every):
    model, data, seen = net(), batches(), []
    def train(model, data, loss, part=1.):
        finetune(20, 1e-2)(model, data, loss, part)
        seen.append((model(x).detach(), [int(torch.linalg.matrix_rank(model[i].weight, rtol=1e-4)) for i in (0, 2, 4)]))
    x = data[0][0]
    prune(model, "trp", .5, data, F.cross_entropy, recover=Recovery(train, steps=20), project_every=every)
    assert torch.allclose(model(x), seen[0][0], atol=1e-4) and seen[0][1] == [5, 6, 2]

def test_without_a_cut_and_a_pull_trp_is_ordinary_training():
    model, plain = net(), net()
    prune(model, "trp", 0., batches(), F.cross_entropy, recover=finetune(12, 1e-2), nuclear_norm_weight=0.)
    finetune(12, 1e-2)(plain, batches(), F.cross_entropy)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(model.parameters(), plain.parameters()))

def test_the_nuclear_norm_pulls_every_singular_value_towards_zero():
    model, before = net().double(), net().double()
    def still(model, data, loss, part=1.): # three steps without a gradient of the loss
        opt = torch.optim.SGD(model.parameters(), .1)
        for _ in range(3):
            opt.zero_grad()
            (0 * sum(p.sum() for p in model.parameters())).backward()
            opt.step()
    data = [(x.double(), y) for x, y in batches()]
    prune(model, "trp", 0., data, F.cross_entropy, recover=Recovery(still, steps=3), project_every=1,
          nuclear_norm_weight=.2)
    for i in (0, 2, 4):
        was, now = (torch.linalg.svdvals(m[i].weight) for m in (before, model))
        assert torch.allclose(now, (was - 3 * .1 * .2).clamp(min=0), atol=1e-8) and was[0] > .06

def test_a_level_below_the_budget_lowers_the_rank():
    model = net()
    prune(model, "trp", .2, batches(), F.cross_entropy, recover=finetune(10, 1e-3), energy_kept=.3, project_every=1)
    assert torch.linalg.matrix_rank(model[2].weight, rtol=1e-4) < 10

def test_global_allocation_while_training():
    plan = prune(net(), "trp", .5, batches(), F.cross_entropy, recover=finetune(6, 1e-2), allocate="global")
    assert (sum(int(m.sum()) * c for m, c in zip(plan.masks.values(), (40, 48, 28)))
            == pytest.approx(.5 * (9 * 40 + 12 * 48 + 3 * 28), abs=50))


# refusals

def test_refusals():
    sparse = net()
    prune(sparse, "magnitude", .5)
    for call, word in ((lambda: prune(nn.Linear(8, 8), "truncated-svd", .5), "inside a module"),
                       (lambda: prune(sparse, "truncated-svd", .5), "skip="),
                       (lambda: prune(net(), "trp", .5, batches(), F.cross_entropy, recover="none"), "trains")):
        with pytest.raises(BadInput, match=word) as refused: call()
        assert "\n" not in str(refused.value)

def test_a_plan_of_another_shape_is_refused():
    plan = prune(net(), "truncated-svd", .5)
    other = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 4))
    with pytest.raises(BadInput, match="does not fit"): plan.apply(other)
    assert not any(isinstance(m, LowRankPair) for m in other)


# orderings

@pytest.mark.slow
def test_a_plain_network_loses_at_the_cut_and_a_trained_rank_does_not():
    world, drops = find_task("digits-mlp"), {"plain": [], "trp": []}
    for seed in range(3):
        model, before = world.dense(seed), []
        full = world.evaluate(model)["accuracy"]
        prune(model, "truncated-svd", .9, skip="5.weight")
        drops["plain"].append(full - world.evaluate(model)["accuracy"])
        def train(model, data, loss, part=1.):
            finetune(600, 3e-3, weight_decay=1e-4)(model, data, loss, part)
            before.append(world.evaluate(model)["accuracy"])
        model = world.initial(seed)
        prune(model, "trp", .9, world.batches(seed), world.loss, skip="5.weight", recover=Recovery(train, steps=600))
        drops["trp"].append(before[0] - world.evaluate(model)["accuracy"])
    assert max(map(abs, drops["trp"])) < .005 and sum(drops["plain"]) / 3 > .05
