"Requests that cannot be met: one sentence each, before any work, and nothing is touched."
import pytest
import torch
from torch import nn

from pruning_bench import BadInput, make_policy, prune
from pruning_bench.core.block_by_block import block_by_block
from pruning_bench.core.mask import masks_of
from pruning_bench.core.registry import Registry, load_entry_points
from worlds import NAMES, Residual, bits, build, llama, mlp, same, world


def refused(call, *words):
    "The sentence of a refusal."
    with pytest.raises(BadInput) as e:
        call()
    text = str(e.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


TWO_GRAMMARS = [("2:4", {"pattern": "4x4"}), (.7, {"pattern": "2:4"}), ({"macs": .5, "params": .5}, {}),
                ("macs=0.5,params=0.5", {}), ({"macs": .5, "2:4": 1}, {}), ({"units": .5, "macs": .5}, {}),
                ("2:4,0.5", {}), ("0.5,macs=0.5", {}), (["2:4", .5], {}), ((.5, .6), {}), ('{"macs": 0.5} 2:4', {})]


@pytest.mark.parametrize("sparsity, parts", TWO_GRAMMARS, ids=str)
def test_a_budget_in_two_grammars_at_once(sparsity, parts):
    model, data, loss = world("magnitude")
    before = bits(model)
    refused(lambda: prune(model, "magnitude", sparsity, data, loss, **parts))
    assert same(before, bits(model)) and not masks_of(model)


def test_two_kinds_of_budget_on_a_command_line():
    cli = pytest.importorskip("pruning_bench.bench.cli")
    refused(lambda: cli.read_sparsities(["0.5", "macs=0.5"], {}), "one kind of budget", "macs=0.5")


class Point:
    "An entry point that cannot be imported, or one that can."
    def __init__(self, name, error=None):
        self.name, self.error, self.loaded = name, error, False

    def load(self):
        if self.error:
            raise self.error
        self.loaded = True


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'gone'"), RuntimeError("at import"),
                                   BadInput("score 'magnitude' is already registered")], ids=str)
def test_an_entry_point_that_fails_is_named_and_the_others_work(error):
    good, group = Point("good"), f"tests.{type(error).__name__}"
    with pytest.warns(UserWarning, match="'broken'.*repair or uninstall") as told:
        failed = load_entry_points(group, [Point("broken", error), good])
    assert list(failed) == ["broken"] and str(error) in failed["broken"] and good.loaded
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_a_name_that_nobody_has_is_answered_with_the_nearest():
    registry = Registry("colour", group="")
    registry.add("green", object())
    refused(lambda: registry["gren"], "unknown colour 'gren'", "green")
    refused(lambda: prune(mlp(), "magnitdue"), "unknown method", "magnitude")


@pytest.mark.parametrize("make", [mlp, Residual, llama])
def test_a_policy_on_a_model_without_the_units(make):
    model = make()
    before, tree = bits(model), [(n, type(m)) for n, m in model.named_modules()]
    refused(lambda: make_policy(model, "imagetokens", "attention_received", .5), type(model).__name__)
    assert same(before, bits(model)) and tree == [(n, type(m)) for n, m in model.named_modules()]


def batches():
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 48, (4, 16), generator=g)} for _ in range(2)]


@pytest.mark.parametrize("change, what", [(dict(method="sparsegpt"), "method"), (dict(sparsity=.6), "budget"),
                                          (dict(seed=1), "seed"), (dict(shift=.1), "model")], ids=str)
def test_a_stage_folder_of_another_request(change, what, tmp_path):
    def request(method="wanda", sparsity=.5, seed=0, shift=0.):
        torch.manual_seed(0)
        model = llama().eval()
        with torch.no_grad():
            for p in model.parameters():
                p += shift
        before, run = bits(model), dict(data=batches(), seed=seed, stages=block_by_block(folder=tmp_path))
        return model, before, lambda: prune(model, method, sparsity, **run)

    request()[-1]()
    model, before, again = request(**change)
    kept = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    refused(again, "another", what, "digest", "empty folder")
    assert same(before, bits(model)) and not masks_of(model)
    assert kept == {f.name: f.read_bytes() for f in tmp_path.iterdir()}


class NoLayers(nn.Module):
    "A model with weights and without anything that a method could remove."
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.LayerNorm(3)

    def forward(self, x=None, **inputs):
        x = torch.ones(2, 3) if x is None else x.flatten(1)[:, :3]
        return self.norm(x) * self.scale


@pytest.mark.parametrize("name", [n for n in NAMES if build(n).space != "examples"])
def test_a_model_without_groups_is_refused_by_every_method(name):
    _, data, loss = world(name)
    model = NoLayers()
    before = bits(model)
    refused(lambda: prune(model, name, .5, data, loss))
    assert same(before, bits(model)) and not masks_of(model)


NO_MODELS = {"a class": nn.Linear, "text": "resnet18", "a state dict": {"weight": torch.ones(2)}, "None": None}


@pytest.mark.parametrize("what", NO_MODELS)
def test_what_is_no_network(what):
    refused(lambda: prune(NO_MODELS[what], "magnitude"), "network")
