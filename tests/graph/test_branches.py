"Networks whose input decides which layers run: all branches that the data takes are cut together."
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, batch_loss, load_plan, prune
from pruning_bench.core.inputs import first_batch
from pruning_bench.graph.branches import MOST_BATCHES, covering_batches
from pruning_bench.graph.groups import Channels, dependency_groups


class Routed(nn.Module):
    "The sign of the first pixel of the first example chooses one of several convolutions."
    def __init__(self, routes=2):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.routes = nn.ModuleList(nn.Conv2d(12, 8, k, padding=k // 2) for k in (1, 3, 5)[:routes])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        route = self.routes[int(x[0, 0, 0, 0]) % len(self.routes)]
        return self.head(route(self.bn(self.stem(x)).relu()).relu().mean((2, 3)))


class Exits(nn.Module):
    "Dark images leave after the first layer."
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 10)
        self.early, self.late = nn.Linear(12, 4), nn.Linear(10, 4)

    def forward(self, x):
        h = self.one(x).relu()
        return self.early(h) if x.mean() < 0 else self.late(self.two(h).relu())


def images(route):
    g = torch.Generator().manual_seed(route)
    x = torch.rand(6, 3, 8, 8, generator=g) * .5
    x[0, 0, 0, 0] = route + .5
    return x, torch.randint(4, (6,), generator=g)


def silence(model, plan, groups):
    "Zero the removed units in a copy: what the smaller network must compute."
    with torch.no_grad():
        own = dict(model.named_parameters())
        for n, kept in plan.masks.items():
            for (p, d), index in groups[n].members.items():
                if p in own:
                    own[p].index_fill_(d, torch.as_tensor(index)[~kept].flatten(), 0)
    return model


METHODS = {"l1-filter": {}, "taylor-filter": {}, "sfp": {"steps": 6}, "group-lasso": {"steps": 6}, "rand-struct": {}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("routes", [2, 3])
def test_all_routes_run_after_a_cut(routes, method):
    torch.manual_seed(0)
    model, data = Routed(routes), [images(r) for r in (0, 0, 1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(model, method, .5, data, F.cross_entropy, **METHODS[method])
    assert {r.in_channels for r in model.routes} == {model.stem.out_channels} != {12}
    assert {r.out_channels for r in model.routes} == {model.head.in_features} != {8}
    for x, _ in data:
        assert model(x).isfinite().all()


def test_the_smaller_network_computes_what_the_masked_one_does(tmp_path):
    torch.manual_seed(0)
    model, data = Routed(3).double().eval(), [(x.double(), y) for x, y in (images(r) for r in range(3))]
    dense, groups = copy.deepcopy(model), Channels(model, data).groups
    plan = prune(model, "l1-filter", {"macs": .5}, data)
    masked = silence(copy.deepcopy(dense), plan, groups)
    for x, _ in data:
        assert torch.allclose(model(x), masked(x), rtol=0, atol=1e-10)
    plan.save(tmp_path / "half")
    load_plan(tmp_path / "half").apply(dense)
    assert all(torch.equal(dense(x), model(x)) for x, _ in data)


def test_an_early_exit_is_cut_with_the_rest():
    torch.manual_seed(0)
    model, x = Exits(), torch.rand(5, 6)
    prune(model, "l1-filter", .5, [x, -x])
    assert model.one.out_features == model.early.in_features == model.two.in_features == 6
    assert model(x).shape == model(-x).shape == (5, 4)


def told(model, data, **more):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prune(model, "l1-filter", .5, data, **more)
    return [str(w.message) for w in found]


def test_layers_that_no_batch_runs_are_named():
    x = torch.rand(5, 6)
    [text] = told(Exits(), [x])
    assert "'early.weight'" in text and "add such a batch" in text
    assert told(Exits(), x) == [text]
    assert not told(Exits(), [x, -x]) and not told(Exits(), [x], skip="early")
    [text] = told(Routed(3), [images(0)[0]])
    assert "'routes.1.weight'" in text and "'routes.2.weight'" in text


def test_a_network_whose_layers_all_run_is_looked_at_once():
    calls = []
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    assert len(covering_batches(model, [torch.rand(2, 6)] * 3, lambda *_: calls.append(1), {})) == 1 and not calls


def test_many_batches_are_not_all_tried():
    x, seen = torch.rand(5, 6), []

    class Stream:
        def __iter__(self):
            for i in range(100):
                seen.append(i)
                yield x

    told(Exits(), Stream(), calibration=4)
    assert max(seen) < MOST_BATCHES


def test_the_order_of_a_shuffled_loader_is_not_disturbed():
    data = torch.utils.data.TensorDataset(torch.cat([torch.rand(8, 6), -torch.rand(8, 6)]))
    stack, model = (lambda rows: torch.stack([r[0] for r in rows])), Exits()
    loader = torch.utils.data.DataLoader(data, 1, shuffle=True, collate_fn=stack)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    told(model, loader)
    assert torch.equal(torch.rand(2), expected) and first_batch(loader).shape == (1, 6)
    assert model(torch.rand(2, 6)).shape == model(-torch.rand(2, 6)).shape


class Returning(nn.Module):
    "The stream is returned beside the answer."
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = self.stem(x)
        h = h + self.block(h).relu()
        return {"logits": self.head(h), "states": h}


def test_a_returned_hidden_state_is_named_with_the_loss_that_frees_its_stream():
    torch.manual_seed(0)
    net, x = Returning(), torch.randn(5, 6)
    found = dependency_groups(net, x)
    assert "hidden state that the model returns" in found.frozen["stem.weight"][1] == found.frozen["block.weight"][1]
    assert found.frozen["head.weight"][1] == "is an output of the model"   # nothing in the model reads it
    with pytest.raises(BadInput), pytest.warns(UserWarning, match="finds no stream.*'stem.weight'.*batch"):
        prune(net, "l1-filter", .5, [x], residual=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(net, "l1-filter", .5, [x], residual=True, loss=batch_loss(lambda m, b: m(b)["logits"].mean()))
    assert net.stem.out_features == net.head.in_features == 8


def test_a_budget_out_of_reach_names_the_returned_states():
    class Deep(Returning):
        def __init__(self):
            super().__init__()
            self.block, self.inner = nn.Identity(), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        def forward(self, x):
            h = self.stem(x)
            h = h + self.inner(h)
            return {"logits": self.head(h), "states": h}
    torch.manual_seed(0)
    with pytest.raises(BadInput, match="returns hidden states.*batch_loss"):
        prune(Deep(), "l1-filter", {"macs": .9}, [torch.randn(5, 6)])
