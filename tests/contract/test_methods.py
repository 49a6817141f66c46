"""Every registered method, on the smallest world of its space, keeps the promises of the core."""
import copy

import pytest
import torch

from pruning_bench import BadInput, build, load_plan, prune
from pruning_bench.core.allocate import global_, uniform
from pruning_bench.core.mask import masks_of
from pruning_bench.core.pattern import count_to_keep
from worlds import NAMES, bits, pruned, run, same, settings_of, world


def test_the_registry_is_not_empty():
    some = {"random", "magnitude", "global-magnitude", "erk-magnitude", "snip", "synflow", "imp", "gradual-magnitude",
            "wanda", "sparsegpt", "l1-filter", "block-influence", "taylor-filter", "el2n", "forgetting", "ccs",
            "random-subset", "rs2"}
    assert some <= set(NAMES)


def test_no_two_methods_are_the_same():
    printed = {}
    for name in NAMES:
        provenance = {k: v for k, v in build(name).provenance.items() if k != "method"}
        printed.setdefault(str(provenance), []).append(name)
    assert not [names for names in printed.values() if len(names) > 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [.25, .5])
def test_counts_are_exact(name, sparsity):
    if build(name).pattern.fixed not in (None, 1 - sparsity):
        with pytest.raises(BadInput, match="contradicts pattern"):
            run(name, sparsity)
        return
    model, plan = run(name, sparsity)
    record, keep = build(name, **settings_of(name)), 1 - sparsity
    total = sum(m.numel() for m in plan.masks.values())
    if record.pattern.name == "per_row" and record.allocate is uniform:
        assert all((m.sum(-1) == count_to_keep(keep, m.shape[-1])).all() for m in plan.masks.values())
    elif record.pattern.name == "per_row":   # shares that differ are rounded in every row: half a weight each at most
        assert all(len(m.sum(-1).unique()) == 1 for m in plan.masks.values())
        rows = sum(len(m) for m in plan.masks.values())
        assert abs(sum(int(m.sum()) for m in plan.masks.values()) - keep * total) <= rows / 2 + 1
    elif plan.space == "weights":
        assert sum(int(m.sum()) for m in plan.masks.values()) == count_to_keep(keep, total)
    elif record.allocate is global_:
        assert sum(int(m.sum()) for m in plan.masks.values()) == count_to_keep(keep, total)
    else:
        assert all(int(m.sum()) == max(1, count_to_keep(keep, m.numel())) for m in plan.masks.values())
    assert plan.masks, "a model without groups tests nothing"
    if plan.space == "weights":
        weights, masks = dict(model.named_parameters()), masks_of(model)
        assert all(torch.equal(masks[n], m.view_as(masks[n])) for n, m in plan.masks.items())
        assert all((weights[n][~m] == 0).all() for n, m in masks.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits(name):
    (a, p), (b, q) = pruned(name), run(name)
    assert p == q and same(bits(a), bits(b))


@pytest.mark.parametrize("name", [n for n in NAMES if "random" in n or n == "rs2"])
def test_another_seed_gives_another_choice(name):
    assert run(name, seed=0)[1] != run(name, seed=1)[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_callers_random_state_is_untouched(name):
    model, data, loss = world(name)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    prune(model, name, .5, data, loss, **settings_of(name))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_are_kept(name, dtype):
    model, _ = run(name, dtype=dtype)
    assert all(p.dtype == dtype and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_pruning_again_to_the_same_budget_changes_no_decision(name):
    model, plan = pruned(name)
    if plan.space == "weights":
        assert run(name, model=model)[1] == plan
    else:
        most = build(name, **settings_of(name)).pattern.at_most
        assert run(name, sparsity=1 - most)[1].density == pytest.approx(most, abs=.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_can_be_applied_to_the_dense_model(name, tmp_path):
    model, plan = pruned(name)
    plan.save(tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert loaded == plan
    dense, data, _ = world(name)
    if plan.space == "examples":
        assert len(loaded.subset(data)) == int(plan.masks["examples"][0].sum())
        return
    loaded.apply(dense)
    dense.load_state_dict(model.state_dict())
    batch = data[0]
    def out(m): return m(**batch).logits if isinstance(batch, dict) else m(batch[0])
    assert torch.equal(out(dense.eval()), out(model.eval()))


@pytest.mark.parametrize("name", [n for n in NAMES if build(n).space == "weights"])
def test_zeros_survive_training_copies_and_reloading(name):
    model, plan = pruned(name)
    _, data, loss = world(name)
    twin = copy.deepcopy(model)
    for net in (model, twin):
        opt = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=.1)
        for x, y in data:
            opt.zero_grad()
            loss(net(x), y).backward()
            opt.step()
        weights, masks = dict(net.named_parameters()), masks_of(net)
        assert masks and all((weights[n][~m] == 0).all() for n, m in masks.items())
    vanilla = world(name)[0]
    vanilla.load_state_dict(model.state_dict())
    assert same(bits(vanilla), bits(model))


@pytest.mark.parametrize("name", NAMES)
def test_bad_weights_are_refused_and_left_alone(name):
    model, data, loss = world(name)
    next(p for p in model.parameters() if p.dim() > 1).data.view(-1)[0] = torch.nan
    before = bits(model)
    with pytest.raises(BadInput, match="not all finite") as refused:
        prune(model, name, .5, data, loss, **settings_of(name))
    assert "\n" not in str(refused.value)
    assert all(torch.equal(a.nan_to_num(9.), b.nan_to_num(9.)) for a, b in zip(before.values(), bits(model).values()))
    assert not masks_of(model)


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_is_refused_when_it_is_needed(name):
    model, data, loss = world(name)
    record = build(name, **settings_of(name))
    needs = bool(record.needs) or record.recover.steps or record.space in ("channels", "heads", "examples")
    if not needs:
        assert prune(model, name, .5).density < 1
        return
    before = bits(model)
    with pytest.raises(BadInput, match="data"):
        prune(model, name, .5)
    assert same(before, bits(model))


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_recorded(name):
    _, plan = pruned(name)
    record = build(name)
    assert plan.cost["seconds"] > 0
    traced = record.space in ("channels", "heads")   # they are found by running the model
    runs = record.needs or record.recover.steps or traced
    assert (plan.cost["forward"] > 0) == bool(runs)
