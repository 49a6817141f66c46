"Budgets: formula == meter on every model, met within one unit, bounds kept, refusals before any work."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruning_bench import BadInput, Method, load_plan, prune
from pruning_bench.bench.measure.size import macs, count_parameters
from pruning_bench.core.budget import RESOURCES, Budget, Price, fill_budget, allowed_counts, bisect_to_budget
from pruning_bench.core.rule import Rule
from pruning_bench.graph.budgets import macs as macs_of, params as params_of
from pruning_bench.graph.groups import Channels
from pruning_bench.graph.surgery import cut, kept_slices, restore_modules, module_state

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = {"input_ids": torch.arange(24).view(2, 12)}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.deep = nn.Conv2d(16, 16, 3, groups=16)
        self.up = nn.ConvTranspose2d(16, 6, 2, 2)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.conv2(F.relu(self.bn1(self.conv1(x))))
        return self.head(self.up(F.relu(self.deep(self.wide(x)))).mean((2, 3)))


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, **more))


MODELS = {"residual": (Residual, IMAGE), "resnet18": (lambda: torchvision.models.resnet18(weights=None), IMAGE),
          "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), IMAGE),
          "mobilenet": (lambda: torchvision.models.mobilenet_v2(weights=None), IMAGE),
          "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128), IMAGE),
          "llama": (lambda: llama(tie_word_embeddings=True), IDS)}


def made(name):
    make, batch = MODELS[name]
    torch.manual_seed(0)
    return make().eval(), batch


@pytest.mark.parametrize("name",
                         ["residual", "densenet", "vit", "llama", pytest.param("resnet18", marks=pytest.mark.slow),
                          pytest.param("mobilenet", marks=pytest.mark.slow)])
def test_the_formula_is_the_meter(name):
    model, batch = made(name)
    space = Channels(model, [batch], residual=True)
    params, work = params_of(space), macs_of(space)
    g = torch.Generator().manual_seed(0)
    sizes = {n: len(group) for n, group in space.groups.items()}
    assert params(sizes) == count_parameters(model) and work(sizes) == macs(model, batch)
    for trial in range(3):   # very unequal widths
        state = module_state(model)
        kept = {n: int(torch.randint(1, k + 1, (), generator=g)) for n, k in sizes.items()}
        masks = {n: torch.randperm(k, generator=g) < kept[n] for n, k in sizes.items()}
        cut(model, kept_slices(model, space.groups, masks))
        assert params(kept) == count_parameters(model) and work(kept) == macs(model, batch)
        restore_modules(state)
    assert params.heaviest(sizes) in dict(model.named_parameters())


def test_attention_shrinks_with_its_heads():
    model, batch = made("vit")
    space = Channels(model, [batch])
    heads = [n for n in space.groups if "attention" in n]
    if not heads: pytest.skip("heads are no units here")
    work, sizes = macs_of(space), {n: len(g) for n, g in space.groups.items()}
    saved = work(sizes) - work(sizes | {heads[0]: sizes[heads[0]] - 1})
    tokens, wide, d = 17, 64, 16
    # four projections and two products of activations
    assert saved == (4 * tokens * wide * d + 2 * tokens * tokens * d) * (4 // sizes[heads[0]])


@pytest.mark.parametrize("of", ["channels", "params", "macs"])
@pytest.mark.parametrize("scope", ["uniform", "global", "isomorphic"])
def test_a_budget_is_met_within_one_unit(of, scope):
    model, batch = made("residual")
    space = Channels(model, [batch], residual=True)
    price = RESOURCES[of](space)
    full = {"params": count_parameters(model), "macs": macs(model, batch),
            "channels": sum(map(len, space.groups.values()))}
    for remove in (.2, .8) if of == "macs" else (.5,):
        net = copy.deepcopy(model)
        plan = prune(net, "l1-filter", {of: remove}, [batch], allocate=scope, residual=True)
        kept = {n: int(m.sum()) for n, m in plan.masks.items()}
        left = {"params": count_parameters(net), "macs": macs(net, batch), "channels": sum(kept.values())}[of]
        one_more = max(price(kept | {n: k + 1}) for n, k in kept.items() if k < len(space.groups[n]))
        assert left == plan.budget["left"] == price(kept) <= (1 - remove) * full[of] < one_more
        assert plan.budget["achieved"] == 1 - left / full[of] >= remove == plan.budget["requested"]
        assert plan.budget["full"] == full[of]
        assert f"{remove:.4f} of the {of} to remove requested" in plan._repr_html_()
        assert f"{plan.budget['achieved']:.4f} removed" in plan._repr_html_()


def test_a_plain_number_is_the_fraction_of_channels():
    model, batch = made("residual")
    plain, named = (prune(copy.deepcopy(model), "l1-filter", request, [batch]) for request in (.5, {"channels": .5}))
    assert plain == named and plain.budget == {} and named.budget["achieved"] == .5


def test_nothing_to_remove_is_the_identity():
    model, batch = made("residual")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for of in ("channels", "params", "macs"):
        plan = prune(model, "l1-filter", {of: 0.}, [batch])
        assert plan.budget["achieved"] == 0
        assert plan.density == 1 and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_same_request_gives_the_same_bits_and_a_plan_that_can_be_saved(tmp_path):
    model, batch = made("residual")
    one, two = (prune(copy.deepcopy(model), "rand-struct", {"macs": .4}, [batch], seed=3) for _ in range(2))
    assert one == two and one.budget == two.budget
    one.save(tmp_path / "plan")
    assert load_plan(tmp_path / "plan").budget == one.budget
    fresh = copy.deepcopy(model)
    load_plan(tmp_path / "plan").apply(fresh)
    assert macs(fresh, batch) == one.budget["left"]


def test_bounds_and_steps():
    model, batch = made("residual")
    full = macs(model, batch)
    net = copy.deepcopy(model)
    plan = prune(net, "l1-filter", {"macs": .5, "at_least": {"conv1*": .75}, "at_most": {"wide": 8}, "round_to": 4},
                 [batch], residual=True)
    kept = {n: int(m.sum()) for n, m in plan.masks.items()}
    assert kept["conv1.weight"] >= 9 and kept["wide.weight"] <= 8 and macs(net, batch) <= full / 2
    assert all(k % 4 == 0 or k == plan.masks[n].numel() for n, k in kept.items())
    protected = prune(copy.deepcopy(model), "l1-filter", {"macs": .2}, [batch], skip="wide*")
    assert "wide.weight" not in protected.masks and protected.budget["achieved"] >= .2


def test_steps_count_channels_not_units():
    # a unit of two channels
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    plan = prune(net, "l1-filter", {"channels": .4, "round_to": 8}, [torch.randn(2, 3, 8, 8)])
    assert plan.masks["0.weight"].numel() == 8 and int(plan.masks["0.weight"].sum()) == 4 and net[0].out_channels == 8


def test_a_schedule_meets_the_budget_at_its_end():
    model, batch = made("residual")
    full = macs(model, batch)
    plan = prune(model, "l1-filter", {"macs": .5}, [batch], schedule="cubic")
    assert macs(model, batch) == plan.budget["left"] <= full / 2


def test_latency_by_a_clock_that_counts():
    model, batch = made("residual")
    full = macs(model, batch)
    def clock(run):
        with FlopCounterMode(display=False) as counter: run()
        return counter.get_total_flops() / 2e9
    plan = prune(model, "l1-filter", {"latency": .5, "timer": clock, "pairs": 5, "tries": 7}, [batch], residual=True)
    left = macs(model, batch) / full
    assert .4 < left <= .5
    assert plan.budget["left"] == pytest.approx(left)
    assert plan.budget["stable"] and plan.budget["seconds_left"] < plan.budget["seconds_full"]
    with pytest.raises(BadInput, match="at most .* of the latency can be removed"):
        prune(model, "l1-filter", {"latency": .9999, "timer": clock, "pairs": 5}, [batch])


def test_an_unsteady_clock_is_called_unstable():
    model, batch = made("residual")
    g = torch.Generator().manual_seed(0)
    def clock(run):
        with FlopCounterMode(display=False) as counter: run()
        return counter.get_total_flops() * (.5 + torch.rand((), generator=g).item())
    plan = prune(model, "l1-filter", {"latency": .3, "timer": clock, "pairs": 9, "tries": 2}, [batch])
    assert not plan.budget["stable"] and "unstable" in repr(plan)


@pytest.mark.parametrize("request_, said",
                         [({"macs": .9999},
                           "at most .* of the macs can be removed, not 0.9999: most of what is left is in '"),
                          ({"params": .5, "at_least": {"*": .99}}, "keeps at least"),
                          ({"macs": .01, "at_most": {"conv1": .1}}, "removes .* already"),
                          ({"channels": .5, "at_most": {"conv1*": 0}}, "group 'conv1.weight' would vanish"),
                          ({"channels": .5, "at_least": {"nowhere*": 2}}, "no group is called 'nowhere"),
                          ({"mac": .5}, "did you mean macs"), ({"macs": 1.}, "not a fraction"),
                          ({"macs": "half"}, "not a fraction"), ({}, "names one resource"),
                          ({"macs": .5, "params": .5}, "names one resource"),
                          ({"macs": .5, "round": 8}, "did you mean round_to"),
                          ({"macs": .5, "round_to": 0}, "positive whole number"),
                          ({"macs": .5, "at_most": {"conv1*": 5}, "at_least": {"conv1*": 6}}, "no width left"),
                          ({"macs": .5, "at_least": {"conv1*": 1.5}}, "is no bound")])
def test_what_cannot_be_met_is_refused_before_any_work(request_, said):
    model, batch = made("residual")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(BadInput, match=said) as refused: prune(model, "l1-filter", request_, [batch])
    assert "\n" not in str(refused.value) and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_budgets_are_for_channels_and_for_decisions_that_are_made_at_once():
    model, batch = made("residual")
    with pytest.raises(BadInput, match="needs channels"): prune(model, "magnitude", {"macs": .5}, [batch])
    with pytest.raises(BadInput, match="keeps the current masks"):
        prune(model, "l1-filter", {"macs": .5}, [batch], allocate="keep_current")
    blind = Method("blind", space="channels", rule=Rule())
    with pytest.raises(BadInput, match="a rule that knows only a fraction of channels"):
        prune(model, blind, {"macs": .5}, [batch])


def test_a_product_of_computed_matrices_is_refused_for_macs_and_fine_for_params():
    class Odd(nn.Module):   # the number of positions depends on the width: channels are counted and become examples
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(5, 5, bias=False)
        def forward(self, x):
            h = self.a(x)
            return self.b(F.relu(h)) + self.c(torch.ones(h.shape[-1] ** 2, 5)).sum()
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    with pytest.raises(BadInput, match="no simple function of its widths"): prune(Odd(), "l1-filter", {"macs": .3}, [x])
    net = Odd()
    full = count_parameters(net)
    # and such a model is not cut silently either
    with pytest.raises(BadInput, match="changes what masking"): prune(net, "l1-filter", {"params": .3}, [x])
    assert count_parameters(net) == full


class Boxes(nn.Module):
    "The second head gets nothing to look at, as in a detector without a hit."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h), self.c(h[:0])

def test_a_product_of_nothing_costs_nothing():
    model, x = Boxes().eval(), torch.randn(8, 6)
    plan = prune(model, "l1-filter", {"macs": .5}, x)
    assert plan.budget["full"] == 6 * 16 + 16 * 4
    assert model.a.out_features == model.b.in_features == model.c.in_features == 8 and plan.budget["left"] == 80

def test_meeting_is_exact_for_any_monotone_price():
    g = torch.Generator().manual_seed(1)
    for trial in range(300):
        sizes = dict(enumerate(torch.randint(2, 30, (4,), generator=g).tolist()))
        weights = torch.randint(1, 50, (4,), generator=g).tolist()
        def price(kept): return sum(w * kept[n] for n, w in enumerate(weights)) + math.prod(kept.values())
        allowed = {n: list(range(1, k + 1)) for n, k in sizes.items()}
        least = price({n: 1 for n in sizes})
        target = least + torch.rand((), generator=g).item() * (price(sizes) - least)
        got = bisect_to_budget(lambda x: {n: math.floor(x * k + .5) for n, k in sizes.items()}, allowed, Price(price),
                               target)
        assert price(got) <= target * (1 + 1e-9)
        again = fill_budget(got, {n: min(sizes[n], got[n] + 1) for n in sizes}, allowed, lambda k: price(k) <= target)
        assert sum(again.values()) - sum(got.values()) <= sum(got[n] < math.floor(k + .5) for n, k in sizes.items())
        lower = {n: max(1, got[n] - 2) for n in sizes}
        assert all(price(lower) <= price(got) for _ in (0,))


def test_levels_by_hand():
    b = Budget.parse({"channels": .5, "round_to": 8, "at_least": {"a*": .3}, "at_most": {"b": 20}})
    assert allowed_counts({"a.weight": 20, "b": 30, "c": 5}, {"a.weight": 1, "b": 1, "c": 1},
                          b) == {"a.weight": [8, 16, 20], "b": [8, 16], "c": [5]}
    assert allowed_counts({"a": 12}, {"a": 4},
                          Budget.parse({"channels": .5, "round_to": 8})) == {"a": [2, 4, 6, 8, 10, 12]}


def test_the_command_line_takes_a_budget():
    from pruning_bench.bench.cli import read_sparsities
    from pruning_bench.bench.run import random_control, method_arm
    from pruning_bench.bench.task import find_task
    assert read_sparsities(["macs=0.5", "macs=.7"], {}) == ((.5, .7), {"budget": "macs"})
    assert read_sparsities(["0.5"], {}) == ((.5,), {})
    for wrong, said in ((["mac=0.5"], "did you mean macs"), (["macs=0.5", "0.5"], "in two runs"),
                        (["macs=1.5"], "not a fraction in")):
        with pytest.raises(BadInput, match=said): read_sparsities(wrong, {})
    world = find_task("digits-cnn")
    model, plan, _, _ = method_arm(world, "l1-filter", .5, 0, {"budget": "macs"}, "cpu")
    assert plan.budget["of"] == "macs" and plan.budget["achieved"] >= .5
    chance = random_control(world, "l1-filter", .5, 0, {"budget": "macs"}, "cpu")[1]   # the control has the same widths
    assert {n: int(m.sum()) for n, m in chance.masks.items()} == {n: int(m.sum()) for n, m in plan.masks.items()}


class Blocks(nn.Module):
    "Most of the work is in the residual stream; a few channels lie inside the blocks."
    def __init__(self, inner=0):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.inner = nn.Sequential(nn.Conv2d(16, inner, 1), nn.ReLU(), nn.Conv2d(inner, 16, 1)) if inner else None

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks: x = x + block(x).relu()
        if self.inner is not None: x = x + self.inner(x)
        return self.head(x.mean((2, 3)))

@pytest.mark.parametrize("inner", [0, 8])   # without channels outside the stream, and with too few
def test_residual_streams_take_part_where_a_budget_needs_them_and_the_plan_says_so(inner):
    torch.manual_seed(0)
    model, x = Blocks(inner).eval(), torch.randn(2, 3, 8, 8)
    plan = prune(model, "l1-filter", {"macs": .5}, data=[x])
    assert plan.budget["achieved"] >= .5 and model.stem.out_channels < 16
    assert plan.provenance["residual_because"].endswith("without residual streams")
    assert "residual streams included" in repr(plan)
    model(x).sum().backward()

@pytest.mark.parametrize("inner", [0, 8])
def test_residual_streams_stay_where_the_caller_says_so(inner):
    model, x = Blocks(inner).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(BadInput, match="residual"): prune(model, "l1-filter", {"macs": .5}, data=[x], residual=False)
    assert model.stem.out_channels == 16

def test_residual_streams_stay_where_a_budget_is_met_without_them():
    model, x = Blocks(64).eval(), torch.randn(2, 3, 8, 8)
    plan = prune(model, "l1-filter", {"params": .2}, data=[x])
    assert model.stem.out_channels == 16 and "residual_because" not in plan.provenance
    assert "residual streams" not in repr(plan)

class Returned(Blocks):
    "Also returns the stream."
    def forward(self, x): return self.head((y := self.blocks[0](self.stem(x))).mean((2, 3))), y + self.blocks[1](y)

def test_a_stream_that_is_an_output_is_named_with_its_remedy():
    model, x = Returned(8).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(BadInput, match=r"returns hidden states, .* loss=batch_loss"):
        prune(model, "l1-filter", {"macs": .9}, data=[x])
