"Coupled channels: a removed channel equals a channel nobody reads, on every model; what cannot be cut is reported."
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.core.inputs import forward
from pruning_bench.core.mask import masks_of
from pruning_bench.graph.group_views import groups_digraph, node_positions
from pruning_bench.graph.groups import Channels, components, dependency_groups
from pruning_bench.graph.saving import load_pruned
from pruning_bench.graph.surgery import cut, cut_and_compare, removed_indices, kept_slices
from pruning_bench.graph.trace import OPERATION_RULES, operation_rule, tensors_in

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(width)
    def forward(self, x): return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

def cnn():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), Residual(8),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))

def vision(name, **kw): return lambda: (getattr(torchvision.models, name)(weights=None, **kw), IMAGE)

def vit(): return torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128), IMAGE

def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config), {"input_ids": torch.arange(24).view(2, 12)}

def unet():
    from diffusers import UNet2DModel
    model = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
                        norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                        up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return model, {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 500])}

def conditional():
    from diffusers import UNet2DConditionModel
    model = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
                                 layers_per_block=2, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
                                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    return model, {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 500]),
                   "encoder_hidden_states": torch.randn(2, 7, 32)}

class Assorted(nn.Module):
    "What is rarer: circular padding, gates, shuffles, windows, spectra, cells, steps collected one by one."
    def __init__(self):
        super().__init__()
        self.round = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.slope = nn.PReLU(8)
        self.gate = nn.Conv2d(8, 12, 1)
        self.mid = nn.Conv2d(6, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 1)
        self.read = nn.Conv1d(512, 6, 1)
        self.cell = nn.LSTMCell(6, 5)
        self.second = nn.GRUCell(5, 4)
        self.out = nn.Linear(4, 2)
    def forward(self, x):
        h = self.wide(F.channel_shuffle(self.mid(F.glu(self.gate(self.slope(self.round(x))), 1)), 2))
        h = torch.fft.rfft(self.read(F.unfold(h, 8, stride=8))).abs()
        state, again, steps = None, None, h.new_zeros(h.shape[0], h.shape[2], self.second.hidden_size)
        for t in range(h.shape[2]):
            state = self.cell(h[..., t], state)
            again = steps[:, t] = self.second(state[0], again)
        return self.out(steps.sort(1).values.mean(1))

def computed():
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm
    return nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3, 2)), nn.ReLU(), weight_norm(nn.Conv2d(8, 8, 3, 2)), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))

SMALL = {"cnn": lambda: (cnn(), IMAGE), "assorted": lambda: (Assorted(), IMAGE), "resnet18": vision("resnet18"),
         "shufflenet": vision("shufflenet_v2_x0_5"), "vit": vit, "llama": llama, "unet": unet}
LARGE = {"mobilenet_v2": vision("mobilenet_v2"), "conditional unet": conditional, "vgg11_bn": vision("vgg11_bn"),
         "densenet121": vision("densenet121"), "efficientnet_b0": vision("efficientnet_b0"),
         "googlenet": vision("googlenet", init_weights=False), "squeezenet": vision("squeezenet1_1"),
         "regnet": vision("regnet_y_400mf"), "convnext": vision("convnext_tiny"), "swin": vision("swin_t"),
         "vit_b_16": lambda: (torchvision.models.vit_b_16(weights=None, image_size=32), IMAGE)}
models = [pytest.param(m, id=n) for n, m in SMALL.items()] + [pytest.param(m, id=n, marks=pytest.mark.slow)
                                                              for n, m in LARGE.items()]

def ready(make):
    "In double precision and evaluation mode, with running statistics that are not the initial ones."
    torch.manual_seed(0)
    model, batch = make()
    for m in model.modules():
        if getattr(m, "running_var", None) is not None: m.running_var.uniform_(.5, 2); m.running_mean.normal_()
    if hasattr(model, "heads"): nn.init.normal_(model.heads.head.weight)
    double = lambda t: t.double() if t.is_floating_point() else t
    return model.double().eval(), {k: double(v) for k, v in batch.items()} if isinstance(batch, dict) else double(batch)

def out(model, batch):
    with torch.no_grad(): return tensors_in(forward(model, batch))[0]

def count(model): return sum(p.numel() for p in model.parameters())

def lottery(space, seed=1, exact=None): # half of every group, or of the exact (or the other) ones
    generator = torch.Generator().manual_seed(seed)
    draw = lambda g: torch.rand(len(g), generator=generator).argsort() < max(1, len(g) // 2)
    return {n: (None, draw(g) if exact is None or g.exact == exact else torch.ones(len(g), dtype=torch.bool))
            for n, g in space.groups.items()}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("make", models)
def test_removed_equals_masked_equals_unread(make, residual):
    model, batch = ready(make)
    try: space = Channels(model, [batch], residual=residual)
    except BadInput: pytest.skip("nothing to prune")
    unread, dense, choice = copy.deepcopy(model), copy.deepcopy(model), lottery(space, exact=True)
    kept = {n: k for n, (_, k) in choice.items()}
    for (p, d), lost in removed_indices(space.groups, kept).items():
        if any((p, d) in g.consumes for g in space.groups.values()):
            unread.get_parameter(p).data.index_fill_(d, torch.as_tensor(lost), 0)
    reference = out(unread, batch)
    scale = reference.abs().max()
    space.apply(choice)
    assert (out(model, batch) - reference).abs().max() <= 1e-10 * scale
    before = count(model)
    space.remove()
    assert (out(model, batch) - reference).abs().max() <= 1e-10 * scale
    assert not masks_of(model)
    slices, shapes = space.slices(), {n: p.shape for n, p in dense.named_parameters()}
    removed = sum(s.numel() - int(np.prod([len(slices[n].get(d, range(k))) for d, k in enumerate(s)]))
                  for n, s in shapes.items() if n in slices)
    assert count(model) == before - removed < before
    model.train()
    y = forward(model, batch)
    sum(t.square().mean() for t in tensors_in(y) if t.requires_grad).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for n, p in model.named_parameters() if p.requires_grad
               and n in slices)

@pytest.mark.parametrize("make", models)
def test_no_group_loses_everything_and_none_is_changed_by_nothing(make):
    model, batch = ready(make)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = prune(model, "l1-filter", 0., data=[batch])
    assert plan.slices == {} and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plan = prune(model, "l1-filter", .99, data=[batch])
    assert all(m.sum() >= 1 for m in plan.masks.values()) and out(model, batch).isfinite().all()

@pytest.mark.parametrize("make", models)
def test_a_plan_rebuilds_the_model(make, tmp_path):
    model, batch = ready(make)
    fresh = copy.deepcopy(model)
    plan = prune(model, "l1-filter", .5, data=[batch])
    plan.save(tmp_path/"plan")
    load_plan(tmp_path/"plan").apply(fresh)
    assert torch.equal(out(fresh, batch), out(model, batch))
    twin = copy.deepcopy(fresh)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(out(twin, batch), out(model, batch))
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}

def permuted(model, groups):
    "Units of every group in another order, in every tensor."
    named, generator = dict(model.named_parameters()) | dict(model.named_buffers()), torch.Generator().manual_seed(2)
    for g in groups:
        order = torch.randperm(len(g), generator=generator).numpy()
        for (p, d), index in g.members.items():
            source = named[p].data.clone()
            named[p].data.index_copy_(d, torch.as_tensor(index.ravel()),
                                      source.index_select(d, torch.as_tensor(index[order].ravel())))
    return model

@pytest.mark.parametrize("make", models)
def test_units_have_no_order(make):
    model, batch = ready(make)
    try: groups = Channels(model, [batch], residual=True).groups.values()
    except BadInput: pytest.skip("nothing to prune")
    before = out(model, batch)   # norms of LLaMA compute in single precision whatever the model
    assert (out(permuted(model, groups), batch) - before).abs().max() <= 1e-5 * before.abs().max()

@pytest.mark.parametrize("middle, why",
                         [(nn.LayerNorm(8), "layer norm"), (nn.LayerNorm(8, elementwise_affine=False), "layer norm"),
                          (nn.RMSNorm(8), "RMS norm"), (nn.RMSNorm(8, elementwise_affine=False), "RMS norm"),
                          (nn.Softmax(-1), "softmax")])
def test_what_mixes_channels_is_prunable_and_says_so(middle, why):
    model, x = nn.Sequential(nn.Linear(3, 8), middle, nn.Linear(8, 2)).double(), torch.randn(4, 3).double()
    [group] = dependency_groups(model, x).groups
    assert not group.exact and why in group.inexact_reason and len(group) == 8
    plan = prune(model, "l1-filter", .5, data=[x])
    assert plan.masks[group.name].sum() == 4 and model(x).shape == (4, 2) and model[2].in_features == 4
    if not isinstance(middle, nn.Softmax): assert tuple(model[1].normalized_shape) == (4,)

class Bald(nn.Module): # a stream of 8 with norms whose width is a number, one of them a class of its own
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.normalized_shape = (8,)
        def forward(self, x): return F.layer_norm(x, self.normalized_shape, None, None, 1e-5)
    def __init__(self):
        super().__init__()
        self.into, self.a, self.own, self.b, self.out = nn.Linear(3, 8), nn.Linear(8, 8), self.Own(), nn.GroupNorm(
            4, 8, affine=False), nn.Linear(8, 2)
    def forward(self, x): h = self.into(x); return self.out(self.b(h + self.a(self.own(h))))

def test_norms_without_weights_follow_and_plans_remember(tmp_path):
    model, x = Bald().double(), torch.randn(4, 3).double()
    fresh = copy.deepcopy(model)
    [group] = dependency_groups(model, x).groups
    assert len(group) == 4
    assert group.numeric_width.keys() == {("own", 0), ("b", 0)}
    assert all(i.shape == (4, 2) for i in group.numeric_width.values()) and "carries own[i]" in repr(group)
    plan = prune(model, "l1-filter", .5, data=[x], residual=True)
    assert model.own.normalized_shape == (4,)
    assert (model.b.num_groups, model.b.num_channels) == (2, 4) and {"own", "b"} < set(plan.slices)
    plan.save(tmp_path / "half")
    again = copy.deepcopy(fresh)
    load_plan(tmp_path / "half").apply(again)
    assert torch.equal(again(x), model(x)) and torch.equal(load_pruned(tmp_path / "half", fresh)(x), model(x))
    other = Bald()
    other.own = nn.LayerNorm(8)
    with pytest.raises(BadInput, match="this plan does not fit, .* 'own.weight' of shape"):
        load_plan(tmp_path / "half").apply(other)
    assert other.into.out_features == 8

def test_a_norm_of_a_function_has_nobody_to_tell():
    class Free(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
        def forward(self, x): return self.b(F.group_norm(self.a(x), 4))
    assert dependency_groups(Free(), torch.randn(4, 3)).frozen["a.weight"] == (8, "group norm without weights")

@pytest.mark.parametrize("groups, units", [(4, 4), (8, 8), (1, 8)])
def test_group_norm(groups, units):
    model, x = nn.Sequential(nn.Conv2d(1, 8, 1), nn.GroupNorm(groups, 8), nn.Conv2d(8, 2, 1)), torch.randn(2, 1, 4, 4)
    [group] = dependency_groups(model, x).groups
    assert len(group) == units and group.exact == (groups > 1)

def test_channel_shuffle_is_a_permutation():
    class Shuffle(nn.Module):
        def forward(self, x):
            b, c, h, w = x.shape
            return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    [group] = dependency_groups(nn.Sequential(nn.Conv2d(1, 6, 1), Shuffle(), nn.Conv2d(6, 1, 1)),
                                torch.randn(2, 1, 4, 4)).groups
    assert group.members["0.weight", 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert group.members["2.weight", 1].tolist() == [[0, 1], [2, 3], [4, 5]]

@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_go_as_a_whole(cell):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 6)
            self.cell = cell(6, 8, 2, bidirectional=True, batch_first=True)
            self.b = nn.Linear(16, 2)
        def forward(self, x): return self.b(self.cell(self.a(x))[0])
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(2, 5, 3).double()
    space = Channels(model, [x])
    assert sorted(len(g) for g in space.groups.values()) == [6, 8] and all(g.exact for g in space.groups.values())
    unread, choice = copy.deepcopy(model), lottery(space)
    for (p, d), lost in removed_indices(space.groups, {n: k for n, (_, k) in choice.items()}).items():
        if any((p, d) in g.consumes for g in space.groups.values()):
            unread.get_parameter(p).data.index_fill_(d, torch.as_tensor(lost), 0)
    cut(model, kept_slices(model, space.groups, {n: k for n, (_, k) in choice.items()}))
    assert torch.allclose(out(model, x), out(unread, x), atol=1e-12)
    assert model.cell.hidden_size == 4 and model.cell.input_size == 3

def test_every_parameter_is_accounted_for():
    for make in (SMALL["resnet18"], SMALL["unet"], SMALL["vit"]):
        model, batch = ready(make)
        c = dependency_groups(model, batch)
        known = {p for g in c.groups for p, _ in g.members} | set(c.frozen) | set(c.unused) | set(c.ungrouped)
        assert {n for n, _ in model.named_parameters()} <= known and all(why for why in c.ungrouped.values())

def test_attributes_follow():
    model, batch = ready(LARGE["mobilenet_v2"])
    prune(model, "l1-filter", .5, data=[batch])
    for m in model.modules():
        if isinstance(m, nn.Conv2d): assert (m.out_channels, m.in_channels // m.groups) == m.weight.shape[:2]
        if isinstance(m, nn.BatchNorm2d): assert m.num_features == len(m.weight) == len(m.running_mean)
    assert any(m.groups == m.in_channels == 48 for m in model.modules() if isinstance(m, nn.Conv2d))

def test_whole_norm_groups():
    model, batch = ready(SMALL["unet"])
    group = next(g for g in Channels(model, [batch]).groups.values()
                 if g.name == "down_blocks.0.resnets.0.conv1.weight")
    assert len(group) == 4 and (group.members[group.name, 0] == np.arange(16).reshape(4, 4)).all()
    prune(model, "l1-filter", .5, data=[batch])
    norm = model.down_blocks[0].resnets[0].norm2
    assert (norm.num_groups, norm.num_channels) == (2, 8)

def test_streams_only_on_request():
    model, batch = ready(SMALL["cnn"])
    assert sorted(Channels(model, [batch]).names()) == ["3.conv1.weight", "4.conv1.weight"]
    assert sorted(Channels(model, [batch], residual=True).names()) == ["0.weight", "3.conv1.weight", "4.conv1.weight"]

def test_skip_leaves_shapes_alone():
    model, batch = ready(SMALL["cnn"])
    assert Channels(model, [batch], skip="3").names() == ["4.conv1.weight"]
    with pytest.raises(BadInput): Channels(model, [batch], skip=("3", "4"))

def test_heads_and_norms_are_reported():
    model, batch = ready(SMALL["vit"])
    found = dependency_groups(model, batch)
    assert "output" in found.frozen["heads.head.weight"][1]
    assert [(g.name, g.inexact_reason) for g in found.groups if not g.exact] == [("conv_proj.weight", "layer norm")]

def test_tied_weights_are_cut_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight
        def forward(self, x): return self.c(self.a(x).relu() + self.b(x).relu())
    model, batch = Tied().double(), torch.randn(3, 4).double()
    space = Channels(model, [batch], residual=True)
    space.apply({n: (None, torch.arange(6) < 2) for n in space.names()})
    masked = out(model, batch)
    space.remove()
    assert torch.allclose(out(model, batch), masked)
    assert model.b.weight is model.a.weight and model.a.weight.shape == (2, 4)

def test_auxiliary_heads_are_heard_in_training_mode():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)
        def forward(self, x): h = self.a(x).relu(); return (self.b(h), self.aux(h)) if self.training else self.b(h)
    model = Aux()
    prune(model.eval(), "l1-filter", .5, data=[torch.randn(3, 4)])
    assert model.aux.weight.shape == (3, 3) and len(model.train()(torch.randn(3, 4))) == 2

@pytest.mark.parametrize("shortcut", [lambda a, b: a + b, lambda a, b: b + a, lambda a, b: nn.Identity()(a) + b])
def test_writing_the_sum_differently_changes_no_unit(shortcut):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        def forward(self, x): h = self.a(x); return self.c(shortcut(h, self.b(h)))
    [group] = dependency_groups(Net(), torch.randn(4, 3)).groups
    assert group.residual
    assert set(group.members) == {("a.weight", 0), ("a.bias", 0), ("b.weight", 0), ("b.weight", 1), ("b.bias", 0),
                                  ("c.weight", 1)}

def test_unknown_operations_freeze():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        def forward(self, x): return self.b(self.a(x).logcumsumexp(-1))
    c = dependency_groups(Odd(), torch.randn(3, 4))
    assert not c.groups and c.frozen["a.weight"] == (6, "no rule for `logcumsumexp`")

def test_writing_into_a_part_freezes():
    class Parts(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 6), nn.Linear(8, 2)
        def forward(self, x):
            h = x.new_zeros(len(x), 8)
            h[:, :6] = self.a(x)
            return self.b(h)
    c = dependency_groups(Parts(), torch.randn(3, 4))
    assert not c.groups and "part of a tensor" in c.frozen["a.weight"][1]

def test_a_baked_width_is_noticed_and_undone():
    class Baked(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(1, 8, 3), nn.Linear(128, 2)
        def forward(self, x): return self.b(self.a(x).view(-1, 128))
    model, x = Baked(), torch.randn(4, 1, 6, 6)
    before = model(x)
    with pytest.raises(BadInput, match="skip="): prune(model, "l1-filter", .5, data=[x])
    assert torch.equal(model(x), before) and model.a.out_channels == 8 and not masks_of(model)

def test_code_that_asks_for_values_is_run_on_the_model_itself():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
            self.flat = lambda t: t.view(-1, 6)   # out of reach of a correction
        def forward(self, x):
            h = self.a(x).relu()
            if not h.isfinite().all(): raise ValueError
            return self.c(self.flat(self.b(h)))
    model, x = Asks(), torch.randn(4, 3)
    space = Channels(model, [x])
    assert space.names() == ["a.weight"]
    assert "its width" in space.coupling.frozen["b.weight"][1] and model.a.out_features == 8

def test_a_cut_that_changes_the_function_is_undone():
    class Counts(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        def forward(self, x): return self.b(self.a(x) * len(self.a.weight))
    model, x = Counts(), torch.randn(3, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match="changes what masking them computes"): prune(model, "l1-filter", .5, data=[x])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()) and not masks_of(model)
    with pytest.raises(BadInput, match="changes what masking them computes"):
        prune(model, "l1-filter", .5, data=[x], restore=False)
    assert model.a.weight.shape == (8, 4) and (model.a.weight == 0).all(1).sum() == 4 and model(x).shape == (3, 2)

def test_earlier_masks_survive():
    model, batch = ready(SMALL["cnn"])
    prune(model, "magnitude", .5, skip="7")
    zero = model[4].conv1.weight == 0
    plan = prune(model, "l1-filter", .5, data=[batch])
    rows, columns = (torch.tensor(plan.slices["4.conv1.weight"].get(d, range(8))) for d in (0, 1))
    assert torch.equal(model[4].conv1.weight == 0, zero[rows][:, columns]) and "4.conv1.weight" in masks_of(model)

@pytest.mark.parametrize("needs, examples", [(None, 2), (64, 64)])
def test_a_large_batch_is_compared_on_two_examples(needs, examples):
    class Net(nn.Sequential):
        def forward(self, x):
            if needs: assert len(x) == needs
            if not x.is_meta: seen.add(len(x))
            return super().forward(x)
    seen, net = set(), Net(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    prune(net, "l1-filter", .5, [torch.randn(64, 1, 8, 8)])
    assert seen == {examples} and net[0].out_channels == 3

def test_a_plan_for_another_width_is_refused():
    model, batch = ready(SMALL["cnn"])
    plan = prune(copy.deepcopy(model), "l1-filter", .25, data=[batch])
    prune(model, "l1-filter", .75, data=[batch])
    with pytest.raises(BadInput, match="does not fit"): plan.apply(model)

def test_components():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 300, (2, 250))
    label = components(300, a, b)
    parent = list(range(300))
    def root(i):
        while parent[i] != i: i = parent[i]
        return i
    for i, j in zip(a, b): parent[root(i)] = root(j)
    assert all((label[i] == label[j]) == (root(i) == root(j)) for i in range(300) for j in range(0, 300, 7))

def test_scores_are_sums_over_rows():
    model, batch = ready(SMALL["cnn"])
    plan = prune(copy.deepcopy(model), "l1-filter", .5, data=[batch])
    order = model[3].conv1.weight.abs().sum((1, 2, 3)).argsort(descending=True)[:4].sort().values
    assert plan.masks["3.conv1.weight"].nonzero().flatten().tolist() == order.tolist()

def test_taylor_of_a_filter_is_the_sum_of_squares():
    model, batch = ready(SMALL["cnn"])
    y = torch.tensor([0, 1])
    plan = prune(copy.deepcopy(model), "taylor-filter", .5, data=[(batch, y)], loss=F.cross_entropy)
    F.cross_entropy(model(batch), y).backward()
    w = model[3].conv1.weight
    order = (w * w.grad).square().sum((1, 2, 3)).argsort(descending=True)[:4].sort().values
    assert plan.masks["3.conv1.weight"].nonzero().flatten().tolist() == order.tolist()

def test_groups_agree_with_torch_pruning():
    tp = pytest.importorskip("torch_pruning")
    model = torchvision.models.resnet18(weights=None).eval()
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    name = {m: n for n, m in model.named_modules()}
    groups = dependency_groups(model, IMAGE).groups
    assert len(groups) == 12
    for group in groups:
        theirs = graph.get_pruning_group(model.get_submodule(group.name.removesuffix(".weight")),
                                         tp.prune_conv_out_channels, [0])
        layers = {(name[d.target.module], d.handler.__name__) for d, _ in theirs
                  if isinstance(d.target.module, (nn.Conv2d, nn.Linear))}
        assert layers == {(p.removesuffix(".weight"), f"prune_{'out' if d == 0 else 'in'}_channels")
                          for p, d in group.produces + group.consumes}

class Sphere(nn.Module):
    "Features over their own norm, which is expanded to their shape."
    def __init__(self, p): super().__init__(); self.p = p
    def forward(self, x): return F.normalize(x, p=self.p)

@pytest.mark.parametrize("p", [1., 2.])
def test_features_over_their_own_norm_can_be_cut_and_say_so(p):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Sphere(p), nn.Conv2d(8, 4, 3))
    [group] = Channels(model, [IMAGE]).groups.values()
    assert len(group) == 8 and not group.exact and "norm" in group.inexact_reason
    prune(model, "rand-struct", .5, data=[IMAGE])
    assert model[0].out_channels == 4 and model(IMAGE).shape == (2, 4, 28, 28)

def test_a_constant_that_is_not_expanded_still_pins():
    class Shifted(nn.Module):
        def forward(self, x): return x * torch.arange(8.)[:, None, None]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Shifted(), nn.Conv2d(8, 4, 3))
    [group] = dependency_groups(model, IMAGE).groups
    assert "a tensor of the code" in group.assumption   # a dry run decides
    with pytest.raises(BadInput, match="contains a width"): Channels(model, [IMAGE])

class Gathers(nn.Module):
    "A box of each of two maps, gathered in one tensor as detectors do."
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 4, 1)
    def forward(self, x):
        seen, boxes = torch.zeros(2, self.one.out_channels, 3, 3, dtype=x.dtype), x.new_tensor([[0, 0, 0, 9, 9]])
        for i, at in enumerate((self.one(x), self.two(x))):
            seen[torch.tensor([1 - i])] = torchvision.ops.roi_align(at, boxes, 3)
        return self.out(seen)

def test_boxes_of_two_maps_share_their_channels():
    torch.manual_seed(0)
    model = Gathers().double()
    found = dependency_groups(model, IMAGE.double())
    [group] = found.groups
    assert group.exact
    assert len(group) == 8
    assert {p for p, _ in group.produces} == {"one.weight", "two.weight"} and group.consumes == [("out.weight", 1)]
    deaf = copy.deepcopy(model)
    deaf.out.weight.data[:, :3] = 0
    cut(model, kept_slices(model, {group.name: group}, {group.name: torch.arange(8) >= 3}))
    assert model.out.in_channels == 5
    assert torch.allclose(model(IMAGE.double()), deaf(IMAGE.double()), rtol=0, atol=1e-12)

def test_rows_written_into_an_input_are_found_by_the_dry_run():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        def forward(self, x):
            y = self.one(x[:2]); x = x.clone(); x[torch.tensor([0, 1])] = y
            return self.three(self.two(x))
    space = Channels(Overwrites(), [torch.randn(5, 4)])
    assert [*space.groups] == ["two.weight"] and "written into another tensor" in space.coupling.frozen["one.weight"][1]

@pytest.mark.parametrize("outputs", [1, 2])
def test_maps_of_one_channel_are_joined_like_others(outputs):
    class Heads(nn.Module):
        "Scores of two scales in one tensor, as dense detectors do."
        def __init__(self): super().__init__(); self.body, self.score = nn.Conv2d(3, 8, 1), nn.Conv2d(8, outputs, 1)
        def forward(self, x):
            return torch.cat([self.score(self.body(y).relu()).sigmoid().flatten(2) for y in (x, x[..., ::2, ::2])], 2)
    [group] = dependency_groups(Heads(), IMAGE).groups
    assert group.name == "body.weight" and len(group) == 8 and group.exact and group.consumes == [("score.weight", 1)]

def test_the_drawing_shows_every_member():
    model, batch = ready(SMALL["resnet18"])
    found = dependency_groups(model, batch)
    net, home = groups_digraph(found), lambda p: ("module", p.rpartition(".")[0])
    for g in found.groups:
        hub = ("group", g.name)
        writers, readers = ({home(p) for p, _ in keys} for keys in (g.produces, g.consumes))
        assert writers == {a for a, _, r in net.in_edges(hub, data="role")}
        assert readers == {b for _, b, r in net.out_edges(hub, data="role") if r == "reads"}
        assert {home(p) for p, _ in g.members} == {*net.predecessors(hub), *net.successors(hub)}
        assert net.nodes[hub] == {"units": len(g), "residual": g.residual}
    at = node_positions(net, found.modules)
    assert len(set(at.values())) == len(at) == len(net)
    assert at["module", "conv1"][1] > at["module", "layer1.0.conv1"][1] > at["module", "fc"][1]

def test_a_norm_that_does_not_fit_is_found_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(9), nn.Conv2d(8, 4, 3)).eval()
    message = "does not run on the first batch of data: RuntimeError: running_mean should contain 8 elements not 9"
    with pytest.raises(BadInput, match=message):
        prune(model, "l1-filter", .5, data=[torch.randn(2, 3, 8, 8)])

def test_one_norm_group_for_all_channels_is_cut_channel_by_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    plan = prune(model, "l1-filter", .5, data=[x])
    assert model[1].num_groups == 1
    assert model[1].num_channels == model[3].in_channels == 4
    assert model(x).shape == (2, 4, 4, 4) and int(plan.masks["0.weight"].sum()) == 4

class Picks(nn.Module):
    "Words at places that the data tells, one for each sentence."
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 3)
    def forward(self, ids):
        return self.head((self.embed(ids)
                          + self.inner(self.embed(ids)))[torch.arange(len(ids), device=ids.device), ids.argmax(1)])

def test_picks_from_two_axes_let_the_others_follow():
    torch.manual_seed(0)
    model, ids = Picks().eval(), torch.randint(0, 20, (4, 6))
    group = next(g for g in dependency_groups(model, ids).groups if g.name == "embed.weight")
    assert len(group) == 12 and ("head.weight", 1) in group.members and ("inner.weight", 1) in group.members
    prune(model, "rand-struct", .5, data=[ids], residual=True)
    assert model.head.in_features == 6 and model(ids).shape == (4, 3)

def test_index_puts_what_lies_apart_first():
    class Apart(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)
        def forward(self, x):   # (batch, 3, 4, 5)
            y = self.a(x)[torch.tensor([0, 1]), :, torch.tensor([1, 2])]   # (2, 3, 8)
            return self.b(y)
    torch.manual_seed(0)
    model, x = Apart().eval(), torch.randn(2, 3, 4, 5)
    assert [len(g) for g in dependency_groups(model, x).groups] == [8]
    prune(model, "rand-struct", .5, data=[x])
    assert model.b.in_features == 4 and model(x).shape == (2, 3, 2)

@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("method", ["magnitude", "l1-filter"])
@pytest.mark.parametrize("wrong, why",
                         [("resnet18", "not str: pass the module itself"), (None, "not NoneType"),
                          ([nn.Linear(2, 2)], "not list"), (nn.Linear, "Linear is a class: pass a network"),
                          (lambda: torch.jit.script(torchvision.models.resnet18(weights=None)),
                           "was compiled by TorchScript")])
def test_what_is_not_a_network_is_refused(wrong, why, method):
    if why.startswith("was"): wrong = wrong()
    with pytest.raises(BadInput, match=why): prune(wrong, method, .5, data=[torch.randn(2, 3, 64, 64)])

def test_an_interrupted_cut_is_put_back():
    model, x, asked = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 3), []
    def run(): # the second answer, that of the cut model, is interrupted
        asked.append(model[0].out_features)
        if len(asked) == 2: raise KeyboardInterrupt
        return model(x)
    with pytest.raises(KeyboardInterrupt):
        cut_and_compare(model, {"0.weight": {0: [0]}, "0.bias": {0: [0]}, "2.weight": {1: [0]}}, run)
    assert asked == [8, 1] and model[0].out_features == model[2].in_features == 8 and model(x).shape == (4, 2)

def test_the_rarer_layers_are_all_understood():
    found = dependency_groups(Assorted(), IMAGE)
    assert {g.name: len(g) for g in found.groups} == {"round.weight": 8, "gate.weight": 6, "mid.weight": 4,
                                                      "wide.weight": 8, "read.weight": 6, "cell.weight_ih": 5,
                                                      "second.weight_ih": 4}
    assert set(found.frozen) == {"out.weight"} and not found.unused

@pytest.mark.parametrize("budget", [.5, {"macs": .5}, {"params": .5}])
def test_weights_that_are_computed_from_others(budget, tmp_path):
    model, batch = ready(lambda: (computed(), IMAGE))
    reasons = {g.name: g.inexact_reason for g in dependency_groups(model, batch).groups}
    assert reasons == {"0.parametrizations.weight.original": "a product with a vector",
                       "2.parametrizations.weight.original1": "weight norm"}
    before, groups = out(model, batch), Channels(model, [batch], residual=True).groups.values()
    assert (out(permuted(model, groups), batch) - before).abs().max() <= 1e-5 * before.abs().max()
    fresh = copy.deepcopy(model)
    plan = prune(model, "l1-filter", budget, data=[batch])
    small = model[2].parametrizations.weight
    assert small.original0.shape[0] == small.original1.shape[0] < 8 and out(model, batch).isfinite().all()
    plan.save(tmp_path / "half")
    load_plan(tmp_path / "half").apply(fresh)
    assert torch.equal(out(fresh, batch), out(model, batch))
    model(batch).square().mean().backward()
    assert small.original1.grad.shape == small.original1.shape


def test_masks_of_torch_are_cut_with_their_weights():
    from torch.nn.utils import prune as masks
    model = nn.Sequential(masks.random_unstructured(nn.Conv2d(3, 8, 3), "weight", .3), nn.ReLU(),
                          nn.Conv2d(8, 2, 3)).eval()
    first = dependency_groups(model, IMAGE).groups[0]
    assert first.produces == [("0.weight_orig", 0)] and ("0.weight_mask", 0) in first.members
    zeros = (model[0].weight_mask == 0).flatten(1).sum(1)
    plan = prune(model, "l1-filter", .5, data=[IMAGE])
    assert model[0].weight_mask.shape == model[0].weight_orig.shape == (4, 3, 3, 3)
    assert model(IMAGE).shape == (2, 2, 28, 28)
    assert torch.equal((model[0].weight_mask == 0).flatten(1).sum(1), zeros[plan.masks[first.name]])

def test_weights_of_a_fixed_frame_stay():
    from torch.nn.utils.parametrizations import orthogonal
    found = dependency_groups(nn.Sequential(orthogonal(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 8))
    assert not found.groups and "tril" in found.ungrouped["0.parametrizations.weight.original"]

def test_partners_by_number_stay_equally_wide():
    class Believes(nn.Module): # the width of one layer is asked of another one
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.fit = lambda t, n: t.view(len(t), n)   # out of reach of a correction
        def forward(self, x): h = self.a(x); return self.out(self.c(self.fit(self.b(h.relu()), h.shape[1])).relu())
    model, x = Believes().double(), torch.randn(4, 3).double()
    space = Channels(model, [x])
    assert len(space.coupling.groups) == 3
    assert space.groups.keys() == {"a.weight", "c.weight"}
    assert set(space.groups["a.weight"].produces) == {("a.weight", 0), ("b.weight", 0)}
    nn.init.constant_(model.b.weight, 1e-3)   # a global ranking would take more of b than of a
    plan = prune(model, "l1-filter", .5, data=[x], allocate="global")
    assert model.a.out_features == model.b.out_features == plan.masks["a.weight"].sum() and model(x).shape == (4, 2)

def test_a_width_that_is_asked_twice_and_told_once_stays():
    class Told(nn.Module): # one of the partners is also known by heart
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 2)
            self.fit, self.flat = lambda t, n: t.view(len(t), n), lambda t: t.view(-1, 8)
        def forward(self, x):
            h = self.a(x)
            return self.out(self.c(self.flat(self.fit(self.b(h.relu()), h.shape[1]))).relu())
    space = Channels(Told(), [torch.randn(4, 3)])
    assert space.groups.keys() == {"c.weight"} and {"a.weight", "b.weight"} < set(space.coupling.frozen)


# one rule for each operation

class Strided(nn.Module):
    def __init__(self, read, columns):
        super().__init__()
        self.up, self.read, self.down = nn.Conv2d(3, 8, 1), read, nn.Linear(columns, 2)
    def forward(self, x): return self.down(self.read(self.up(x)).flatten(1))


@pytest.mark.parametrize("read, columns, indices", [
    (lambda h: h.as_strided((len(h), h[0].numel()), (h[0].numel(), 1)), 128, [*range(16, 32)]),   # a view
    (lambda h: h.as_strided((*h.shape[:3], 2), (*h.stride()[:3], 2)), 64, [*range(8, 16)]),       # every second column
    # without the first row
    (lambda h: h.as_strided((*h.shape[:2], 3, 4), h.stride(), h.stride(2)), 96, [*range(12, 24)]),
    (lambda h: h[..., :3].as_strided((*h.shape[:3], 2), (*h.stride()[:3], 2)), 64, [*range(8, 16)]),   # of a piece
])
def test_strided_reads_that_keep_channels_apart_can_be_cut(read, columns, indices):
    torch.manual_seed(0)
    model, x = Strided(read, columns), torch.randn(2, 3, 4, 4)
    [group] = dependency_groups(model, x).groups
    assert len(group) == 8 and group.members["down.weight", 1][1].tolist() == indices
    small = copy.deepcopy(model)
    plan = prune(small, "l1-filter", .5, data=[x])
    with torch.no_grad(): model.down.weight.view(2, 8, -1)[:, ~plan.masks["up.weight"]] = 0
    assert small.up.out_channels == 4 and torch.allclose(small(x), model(x), atol=1e-6)


@pytest.mark.parametrize("read, columns", [
    (lambda h: h.as_strided((1, *h.shape[1:]), h.stride(), h.stride(1)), 128),       # starts at the second channel
    (lambda h: h.as_strided((2, 8, 4, 4), (16, 16, 4, 1)), 128),                     # images that overlap
])
def test_strided_reads_that_mix_channels_are_frozen(read, columns):
    found = dependency_groups(Strided(read, columns), torch.randn(2, 3, 4, 4))
    assert not found.groups and found.frozen["up.weight"] == (8, "is read in steps")


def test_an_operation_has_one_rule():
    assert OPERATION_RULES["as_strided"].__module__ == "pruning_bench.graph.rules_shape"
    assert OPERATION_RULES["_scaled_dot_product_attention_math"].__module__ == "pruning_bench.graph.attention"
    def other(g, outs, a): return [[] for _ in outs]
    with pytest.raises(BadInput, match="operation rule 'as_strided' is already registered"):
        operation_rule("as_strided")(other)
    assert OPERATION_RULES["as_strided"] is not other


# tensors that the code makes

class Makes(nn.Module):
    "Adds a tensor that its forward pass makes."
    def __init__(self, made):
        super().__init__()
        self.a, self.b, self.made = nn.Linear(3, 8), nn.Linear(8, 2), made
    def forward(self, x):
        h = self.a(x)
        return self.b(self.made(h) + h)

def written(h):
    state = torch.zeros(h.shape, device=h.device)
    return state.copy_(h)

@pytest.mark.parametrize("made", [lambda h: torch.zeros(h.shape[-1], device=h.device), written,
                                  lambda h: torch.full((1, h.shape[1]), .5, device=h.device)])
def test_a_tensor_that_the_code_makes_is_a_guess_for_the_dry_run(made):
    model, x = Makes(made).eval(), torch.randn(4, 3)
    space = Channels(model, [x])
    assert "of the code" in space.groups["a.weight"].assumption and len(space.groups["a.weight"]) == 8
    prune(model, "l1-filter", .5, data=[x])   # compared with the masked model
    assert model.a.out_features == 4

def test_a_tensor_whose_values_depend_on_the_width_is_found_out():
    model, x = Makes(lambda h: torch.linspace(0, 1, h.shape[-1], device=h.device)).eval(), torch.randn(4, 3)
    assert len(dependency_groups(model, x).groups) == 1
    space = Channels(nn.Sequential(model, nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)), [x])
    assert space.names() == ["0.b.weight", "1.weight"] and "0.a.weight" in space.coupling.frozen

class Shape(nn.Module):
    "Reads one channel, for its shape or for its values."
    def __init__(self, read):
        super().__init__()
        self.a, self.b, self.read = nn.Linear(3, 8), nn.Linear(8, 2), read
    def forward(self, x):
        h = self.a(x)
        return self.b(h) + self.read(h[:, :, -1])

def test_what_is_read_for_its_shape_only_freezes_nothing():
    x = torch.randn(2, 5, 3)
    [group] = dependency_groups(Shape(lambda t: torch.arange(t.shape[1], device=t.device)[:, None]), x).groups
    assert len(group) == 8 and not group.assumption
    found = dependency_groups(Shape(lambda t: t[:, :, None]), x)
    assert not found.groups and "picks fixed positions" in found.frozen["a.weight"][1]
