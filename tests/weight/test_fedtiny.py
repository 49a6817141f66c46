"Federated pruning: exact identities, golden numbers, invariants."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.mask import masks_of
from pruning_bench.core.method import describe_method
from pruning_bench.core.space import Weights
from pruning_bench.weight.fedtiny import (average_bn_stats, candidate_masks, dirichlet_split, exchange_count,
                                          exchange_weights, federated_average, fedtiny, growth_gradients,
                                          select_candidate, split_batches)


def data():
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(16, 1, 8, 8, generator=g).double(), torch.randint(0, 4, (16,), generator=g)) for _ in range(4)]


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))


def homes():
    return [[(x.float(), y)] for x, y in data()]


@pytest.mark.parametrize("concentration", [.01, .5, 100.])
def test_examples_are_divided_and_nobody_is_left_out(concentration):
    labels = torch.arange(200) % 10
    parts = dirichlet_split(labels, 7, concentration, seed=3)
    assert torch.cat(parts).sort().values.tolist() == list(range(200)) and all(len(p) for p in parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, dirichlet_split(labels, 7, concentration, seed=3)))
    if concentration == 100.: assert max(map(len, parts)) < 2 * min(map(len, parts))


def test_candidates_have_one_size_and_differ():
    masks = candidate_masks(small(), .2, 4)
    sizes = {sum(int(m.sum()) for m in c.values()) for c in masks}
    assert sizes == {round(.2 * sum(m.numel() for m in masks[0].values()))}
    assert len({tuple(int(m.sum()) for m in c.values()) for c in masks}) > 1
    w = Weights(small()).w("4.weight").abs()
    assert w[masks[1]["4.weight"] if "4.weight" in masks[1] else 0].min() >= w[~masks[1]["4.weight"]].max()


def test_averages_by_hand():
    states = [{"w": torch.tensor([1., 2.]), "n": torch.tensor(5)}, {"w": torch.tensor([4., 8.]), "n": torch.tensor(9)}]
    got = federated_average(states, [1, 2])
    assert got["w"].tolist() == [3., 6.] and got["n"].item() == 5


def test_statistics_of_norms_are_those_of_all_examples():
    model = small()
    average_bn_stats(model, [[(x.float(), y)] for x, y in data()])
    x = model[0](torch.cat([x.float() for x, _ in data()]))
    assert torch.allclose(model[1].running_mean, x.mean((0, 2, 3)), atol=1e-5)


def test_the_least_loss_is_elected():
    model = small()
    masks = candidate_masks(model, .2, 4)
    best, losses = select_candidate(model, masks, homes(), F.cross_entropy)
    assert best is masks[losses.index(min(losses))] and len(losses) == 4 and not masks_of(model)


def test_quota_by_hand():
    assert exchange_count(0, 100, 200, .3) == 60
    assert exchange_count(50, 100, 200, .3) == 30
    assert exchange_count(100, 100, 200) == 0
    assert exchange_count(130, 100, 200) == 0


def test_exchange_by_hand_and_conserved():
    w, mask = torch.tensor([[.5, -.1, .9, 0., 0.]]), torch.tensor([[True, True, True, False, False]])
    assert exchange_weights(w, mask, torch.tensor([[9., 9, 9, .2, -.7]]),
                            1).tolist() == [[True, False, True, False, True]]
    g = torch.Generator().manual_seed(0)
    w, mask, wish = torch.randn(9, 9, generator=g), torch.rand(9, 9, generator=g) > .6, torch.randn(9, 9, generator=g)
    for k in (0, 3, 20, 500):
        new = exchange_weights(w * mask, mask, wish * ~mask, k)
        assert new.sum() == mask.sum() and (new & ~mask).sum() == min(k, int(mask.sum()), int((~mask).sum()))


def test_a_client_sends_the_largest_gradients_of_dead_weights():
    model = small().eval()
    space = Weights(model)
    mask = torch.rand(4, 216, generator=torch.Generator().manual_seed(0)) > .5
    space.apply({"4.weight": (space.w("4.weight") * mask, mask)})
    x, y = homes()[0][0]
    sent = growth_gradients(model, "4.weight", (x, y), F.cross_entropy, 7)
    w = model[4].weight.detach().clone().requires_grad_()
    dense = torch.autograd.grad(F.cross_entropy(model[3](model[2](model[1](model[0](x)))) @ w.T + model[4].bias, y),
                                w)[0]
    want = dense.abs().masked_fill(mask, 0).flatten().topk(7).indices.sort().values
    assert torch.equal(sent.flatten().nonzero().flatten(), want)
    assert torch.allclose(sent.flatten()[want], dense.flatten()[want], atol=1e-6)


def test_a_federation_keeps_its_number_of_weights_and_learns():
    model = small()
    log = fedtiny(model, homes(), F.cross_entropy, keep=.3, rounds=8, local_steps=3, exchange_every=2, lr=.1)
    total = round(.3 * (54 + 864))
    assert {n for n, _ in log} == {total}
    assert sum(int(m.sum()) for m in masks_of(model).values()) == total
    assert sum(k for _, k in log) > 0
    assert all((p[~masks_of(model)[n]] == 0).all() for n, p in model.named_parameters() if n in masks_of(model))
    one, two = small(), small()
    fedtiny(one, homes(), F.cross_entropy, keep=.3, rounds=3), fedtiny(two, homes(), F.cross_entropy, keep=.3, rounds=3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize("more, moved", [(dict(exchange_every=0), 0), (dict(num_candidates=1), None)])
def test_parts_of_the_federation_can_be_left_out(more, moved):
    log = fedtiny(copy.deepcopy(small()), homes(), F.cross_entropy, keep=.3, rounds=4, local_steps=1, **more)
    assert moved is None or sum(k for _, k in log) == moved


def test_what_was_pruned_stays_pruned_and_skipped_layers_stay_dense():
    model = small()
    mask = torch.rand(4, 216, generator=torch.Generator().manual_seed(5)) > .5
    space = Weights(model)
    space.apply({"4.weight": (space.w("4.weight") * mask, mask)})
    skip_first = Weights(model, skip=("0.*",))
    fedtiny(model, homes(), F.cross_entropy, keep=.2, rounds=6, local_steps=2, space=skip_first, lr=.1)
    after = masks_of(model)["4.weight"]
    assert int(after.sum()) == round(.2 * 864) and not (after & ~mask).any() and "0.weight" not in masks_of(model)


def test_registered_with_the_share_and_the_clients_of_the_request():
    data = [(x.float(), y) for x, y in data_of(6)]
    for more in ({}, dict(skip="0.*"), dict(clients=2, exchange_every=1)):
        model = small()
        plan = prune(model, "fedtiny", .7, data, F.cross_entropy, steps=20, seed=3, **more)
        size = sum(m.numel() for m in plan.masks.values())
        assert sum(int(m.sum()) for m in plan.masks.values()) == round(.3 * size)
        assert ("0.weight" in plan.masks) == ("skip" not in more)
    with pytest.raises(BadInput, match="exchanges single weights.*2:4"):
        prune(small(), "fedtiny", "2:4", data, F.cross_entropy, steps=20, skip="0.*")
    with pytest.raises(BadInput, match="cannot be divided among 50 clients"):
        prune(small(), "fedtiny", .5, data[:1], F.cross_entropy, steps=20, clients=50)


def data_of(n):
    g = torch.Generator().manual_seed(1)
    return [(torch.rand(16, 1, 8, 8, generator=g), torch.randint(0, 4, (16,), generator=g)) for _ in range(n)]


def test_examples_with_class_labels_are_divided_and_other_batches_go_in_turns():
    labelled = data_of(4)
    parts = split_batches(labelled, 3, .5, 0)
    found, given = (torch.cat([y for _, y in b]).sort().values for b in (sum(parts, []), labelled))
    assert torch.equal(found, given)
    texts = [{"input_ids": torch.full((2, 3), i)} for i in range(5)]
    assert split_batches(texts, 2, .5, 0) == [texts[0::2], texts[1::2]]
    with pytest.raises(BadInput, match="1 batches cannot be divided among 2 clients"):
        split_batches(texts[:1], 2, .5, 0)


def test_only_plain_sparsity_is_listed():
    assert describe_method("fedtiny")["patterns"] == "unstructured" and describe_method("fedtiny")["labels"]
