"Frozen layers are ranked like all others, stay frozen, and are not trained."
import pytest
import torch
import torch.nn.functional as F

from pruning_bench import BadInput, build, prune
from pruning_bench.core.recovery import finetune
from worlds import NAMES, bits, finished, mlp, labelled, run, same, settings_of, world




def trains(name):
    record = build(name, **settings_of(name))
    return bool(record.recover.steps or record.rule)


@pytest.mark.parametrize("name", [n for n in NAMES if not trains(n)])
def test_a_frozen_model_gets_the_plan_of_one_that_is_not_frozen(name):
    model, _, _ = world(name)
    model.requires_grad_(False)
    kept = dict(model.named_parameters())
    model, plan = run(name, model=model)
    dense, expected = finished(name)
    assert plan == expected and same(bits(model), bits(dense))
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in kept)


@pytest.mark.parametrize("name", [n for n in NAMES if trains(n) and build(n).space != "examples"])
def test_methods_that_train_leave_a_frozen_layer_frozen(name):
    model, data, loss = world(name)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    first = next(n for n, p in model.named_parameters() if p.dim() > 1)
    model.get_parameter(first).requires_grad_(False)
    try:
        prune(model, name, .5, data, loss, **settings_of(name))
    except BadInput as e:
        assert "frozen" in str(e) and "skip=" in str(e) and "\n" not in str(e)
    found = {n: p.requires_grad for n, p in model.named_parameters() if n in flags}
    assert all(flag == (n != first) for n, flag in found.items())


def test_training_a_model_that_is_frozen_as_a_whole_is_refused():
    net = mlp().requires_grad_(False)
    before = bits(net)
    with pytest.raises(BadInput, match="every parameter of Sequential is frozen"):
        prune(net, "magnitude", .5, labelled(torch.float32), F.cross_entropy, recover=finetune(2))
    assert same(before, bits(net))


@pytest.mark.parametrize("name", ["set", "rigl", "granet"])
def test_weights_that_nothing_trains_are_not_dropped_and_grown(name):
    net = mlp()
    net[1].weight.requires_grad_(False)
    with pytest.raises(BadInput, match="'1.weight' is frozen: name it in skip="):
        prune(net, name, .5, labelled(torch.float32), F.cross_entropy, steps=3)
    before = net[1].weight.clone()
    plan = prune(net, name, .5, labelled(torch.float32), F.cross_entropy, steps=3, skip=("1.weight",))
    assert plan.density == .5 and "1.weight" not in plan.masks and torch.equal(net[1].weight, before)
