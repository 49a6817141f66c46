"Measurement against numbers derived by hand."
import copy, json, math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from safetensors.torch import load_file

from pruning_bench.bench.measure.size import (FORMATS, accuracy, wall_clock, densities, disk_bytes, load_sparse,
                                              logits_of, macs, nonzero_macs, count_nonzeros, count_parameters,
                                              save_sparse, token_nll)
from pruning_bench.core.inputs import BadInput
from pruning_bench.core.mask import attach_mask


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)
    def forward(self, x): return self.inner(x, x, x, need_weights=False)[0]

class Fused(nn.Module):
    def forward(self, x): return F.scaled_dot_product_attention(x, x, x)

CASES = {
    "linear": (nn.Linear(5, 7), torch.randn(3, 5), 35),
    "conv": (nn.Conv2d(3, 8, 3, 2, 1), torch.randn(2, 3, 8, 8), 3 * 8 * 9 * 16),
    "depthwise": (nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.randn(2, 16, 8, 8), 16 * 9 * 64),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, 2), torch.randn(2, 4, 5, 5), 4 * 6 * 4 * 25),
    "conv1d": (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 10), 4 * 6 * 3 * 8),
    "attention": (Attention(), torch.randn(2, 5, 16), 4 * 5 * 16 * 16 + 2 * 25 * 16),
    "fused attention": (Fused(), torch.randn(2, 1, 6, 8), 2 * 36 * 8),
    "encoder layer": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16),
                      4 * 5 * 256 + 2 * 25 * 16 + 2 * 5 * 16 * 32),
}

@pytest.mark.parametrize("name", CASES)
def test_macs(name):
    model, x, by_hand = CASES[name]
    assert macs(model, x) == by_hand

class Block(nn.Module):
    "Two 3 x 3 convolutions and a shortcut without weights (option A of He et al., 2015)."
    def __init__(self, i, o):
        super().__init__()
        self.stride = o // i
        self.a, self.na = nn.Conv2d(i, o, 3, self.stride, 1, bias=False), nn.BatchNorm2d(o)
        self.b, self.nb = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
    def forward(self, x):
        short = F.pad(x[:, :, ::self.stride, ::self.stride],
                      (0, 0, 0, 0, *[(self.b.in_channels - x.shape[1]) // 2] * 2))
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + short)

def resnet(depth):
    n = (depth - 2) // 6
    widths = [16] * (n + 1) + [32] * n + [64] * n
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         *[Block(i, o) for i, o in zip(widths, widths[1:])],
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

@pytest.mark.parametrize("depth,by_hand", [(20, 40_551_040), (32, 68_862_592), (44, 97_174_144), (56, 125_485_696)])
def test_macs_of_residual_networks(depth, by_hand):
    net, x = resnet(depth), torch.randn(2, 3, 32, 32)
    assert macs(net, x) == nonzero_macs(net, x) == by_hand

def test_macs_of_the_networks_of_the_suite():
    cifar = pytest.importorskip("pruning_bench.bench.tasks.cifar10")
    x = torch.randn(1, 3, 32, 32)
    assert {d: macs(cifar.ResNet(d), x) for d in (20, 56)} == {20: 40_551_040, 56: 125_485_696}

@pytest.mark.slow
def test_stable_diffusion_on_the_meta_device():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2,
                                              block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",
                                              ) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    assert count_parameters(unet) == 859_520_964
    with pytest.raises(BadInput, match="meta device"): disk_bytes(unet)

class First(nn.Module):
    "A recurrent network that returns its outputs only."
    def __init__(self, kind, *args, **settings):
        super().__init__(); self.inner = getattr(nn, kind)(*args, batch_first=True, **settings)
    def forward(self, x): return self.inner(x)[0]

@pytest.mark.parametrize("kind,gates", [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_macs_of_recurrent_networks(kind, gates):
    x = torch.randn(3, 5, 4)
    assert macs(First(kind, 4, 8), x) == gates * 8 * (4 + 8) * 5
    both = gates * 8 * (4 + 8) * 5 * 2 + gates * 8 * (16 + 8) * 5 * 2   # two directions; the second layer reads both
    assert macs(First(kind, 4, 8, bidirectional=True, num_layers=2), x) == both
    empty = First(kind, 4, 8)
    empty.inner.weight_hh_l0.data.zero_()
    assert nonzero_macs(empty, x) == gates * 8 * 4 * 5
    empty.inner.weight_ih_l0.data.view(-1)[::2] = 0
    assert nonzero_macs(empty, x) == gates * 8 * 2 * 5

def test_macs_of_a_projected_lstm_and_of_cells():
    assert macs(First("LSTM", 4, 8, proj_size=3), torch.randn(2, 5, 4)) == 5 * (4 * 8 * (4 + 3) + 8 * 3)
    assert macs(nn.GRUCell(4, 8), torch.randn(2, 4)) == 3 * 8 * (4 + 8)

def test_counting_leaves_the_back_ends_as_they_were():
    before = (torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled(),
              torch.backends.cuda.flash_sdp_enabled())
    for wrong in (False, True):
        with pytest.raises(BadInput) if wrong else torch.no_grad():
            macs(nn.Sequential(First("LSTM", 4, 4), *[nn.Flatten(0, 1), Bilinear()] * wrong), torch.randn(2, 5, 4))
        assert before == (torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled(),
                          torch.backends.cuda.flash_sdp_enabled())

class Bilinear(nn.Bilinear):
    def __init__(self): super().__init__(4, 4, 2)
    def forward(self, x): return super().forward(x, x)

class Vector(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.arange(12.).view(3, 4))
    def forward(self, x): return torch.stack([self.w @ v for v in x])

def test_products_without_a_formula_are_refused_and_vectors_are_counted():
    with pytest.raises(BadInput, match="_trilinear"): macs(Bilinear(), torch.randn(2, 4))
    assert macs(Vector(), torch.randn(5, 4)) == 12 and nonzero_macs(Vector(), torch.randn(5, 4)) == 11

class Harmless(nn.Module):
    "Names that look like products and are none."
    def forward(self, x):
        return x.cummax(1).values + torch.lgamma(x.abs() + 1) + torch.linspace(
            0, 1, x.shape[1]) + x.to_sparse_csr().to_dense()

def test_names_that_look_like_products():
    assert macs(nn.Sequential(Harmless(), nn.Linear(4, 2)), torch.randn(3, 4)) == 8

def test_macs_of_a_mixture_of_experts():
    from transformers import MixtralConfig, MixtralForCausalLM
    T, d = 12, 32
    net = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=d, intermediate_size=48, num_hidden_layers=2,
                                           num_attention_heads=4, num_key_value_heads=4,
                                           num_local_experts=4, num_experts_per_tok=2))
    # projections, router, two experts per token; attention
    layer = T * (4 * d * d + d * 4 + 2 * 3 * d * 48) + 2 * T * T * d
    ids = {"input_ids": torch.arange(2 * T).view(2, T)}
    assert macs(net, ids) == nonzero_macs(net, ids) == 2 * layer + T * d * 64
    for n, p in net.named_parameters():
        if "down_proj" in n: p.data.zero_()
    assert nonzero_macs(net, ids) == 2 * (layer - T * 2 * d * 48) + T * d * 64

@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_resampling_is_not_taken_for_a_product(mode):
    assert macs(nn.Sequential(nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(1, 2, 1), nn.GELU()),
                torch.randn(1, 1, 4, 4)) == 2 * 64

def test_nonzero_macs_of_attention():
    model, x, by_hand = CASES["encoder layer"]
    model = copy.deepcopy(model).eval()
    assert nonzero_macs(model, x) == by_hand
    model.self_attn.in_proj_weight.data[:16] = 0      # no queries
    model.self_attn.out_proj.weight.data[:, :4] = 0
    assert nonzero_macs(model, x) == by_hand - 5 * 16 * 16 - 5 * 16 * 4
    for p in model.parameters(): p.data.zero_()
    assert nonzero_macs(model, x) == 2 * 25 * 16      # scores and values of attention have no weights

@pytest.mark.parametrize("name", ["linear", "conv", "depthwise", "transposed", "conv1d"])
def test_nonzero_macs_are_zero_without_weights_and_all_with_them(name):
    model, x, by_hand = CASES[name]
    assert nonzero_macs(model, x) == by_hand
    empty = copy.deepcopy(model)
    empty.weight.data.zero_()
    assert nonzero_macs(empty, x) == 0

def test_macs_leave_mode_and_hooks_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = copy.deepcopy(net.state_dict())
    nonzero_macs(net, torch.randn(3, 4))
    assert net.training
    assert not net[0]._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())

def test_three_densities():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    masked = copy.deepcopy(net)
    attach_mask(masked[0], "weight", torch.arange(24).view(6, 4) >= 12)
    masked[0].weight.data[5, :3] = 0
    assert densities(masked, net) == {"mask": 18 / 30, "nonzero": 15 / 30, "structure": 1.}
    assert densities(masked, net, "whole") == {"mask": 25 / 37, "nonzero": 22 / 37, "structure": 1.}
    assert densities(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)), net)["structure"] == .5
    with pytest.raises(BadInput, match="unknown scope"): count_parameters(net, "prunables")

def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    assert count_parameters(net) == 16 + 10 and count_nonzeros(net) == 26

def written(model, tmp_path):
    save_sparse(model, tmp_path/"sparse")
    raw = (tmp_path/"sparse").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    about = json.loads(json.loads(raw[8:8 + header])["__metadata__"]["tensors"])
    return len(raw) - 8 - header, about

@pytest.mark.parametrize("left,best,data", [(4096, "dense", 4096 * 4), (1024, "mask", 4096 // 8 + 1024 * 4),
                                            (40, "rows", 40 * (2 + 4) + 65 * 4)])
def test_bytes_by_hand(left, best, data, tmp_path):
    net = nn.Linear(64, 64, bias=False)
    net.weight.data.view(-1)[torch.randperm(4096)[left:]] = 0
    size, about = written(net, tmp_path)
    assert about["weight"][0] == best and size == data
    both = disk_bytes(net)
    assert both["sparse"] == (tmp_path/"sparse").stat().st_size and 4096 * 4 < both["dense"] < 4096 * 4 + 200

@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64,
                                   torch.bool])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (3, 4, 2, 2), (2, 40000)])
def test_every_format_restores_every_bit(name, dtype, shape):
    pack, read = FORMATS[name]
    g = torch.Generator().manual_seed(0)
    t = torch.randint(-3, 4, shape, generator=g).to(dtype) * (torch.rand(shape, generator=g) < .4)
    for x in (t, torch.zeros_like(t), torch.ones_like(t)):
        again = read(pack(x), list(x.shape))
        assert again.dtype == x.dtype and torch.equal(again.view(torch.uint8), x.view(torch.uint8))

def test_saved_models_come_back_bit_for_bit(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(40, 40), nn.Linear(40, 40))
    net[3].weight = net[2].weight
    net[2].weight.data[:30] = 0
    net[2].weight.data[1, :4] = torch.tensor([-0., math.nan, math.inf, 1e-45])
    net.register_buffer("nothing", torch.zeros(0, 3))
    save_sparse(net, tmp_path/"net")
    again, state = load_sparse(tmp_path/"net"), net.state_dict()
    assert list(again) == list(state)
    assert all(again[n].dtype == t.dtype and again[n].shape == t.shape for n, t in state.items())
    assert all(again[n].numpy().tobytes() == t.numpy().tobytes() for n, t in state.items())
    assert len([k for k in load_file(tmp_path/"net") if k.startswith("3.weight")]) == 0   # tied: stored once

def test_sparse_files_are_never_much_longer_and_shrink_with_sparsity():
    net = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 4))
    sizes = []
    for keep in (1., .9, .5, .2, .05, .01, 0.):
        for layer in net: layer.weight.data[torch.rand(layer.weight.shape) >= keep] = 0
        sizes.append(disk_bytes(net))
    assert len({s["dense"] for s in sizes}) == 1 and all(s["sparse"] <= s["dense"] + 400 for s in sizes)
    assert [s["sparse"] for s in sizes] == sorted((s["sparse"] for s in sizes), reverse=True)
    assert sizes[-1]["sparse"] < sizes[0]["sparse"] / 20

def test_a_negative_zero_costs_what_a_number_costs(tmp_path):
    net = nn.Linear(64, 64, bias=False)
    net.weight.data.zero_(); net.weight.data[0] = -0.
    assert written(net, tmp_path)[0] == 64 * (2 + 4) + 65 * 4

def test_quality():
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == .75
    assert not logits_of(nn.Linear(2, 3), torch.ones(4, 2)).requires_grad
    assert torch.equal(logits_of(nn.Identity(), torch.arange(10.).view(5, 2), size=2), torch.arange(10.).view(5, 2))
    class Even(nn.Module):
        def forward(self, input_ids): return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 11)})
    assert math.exp(token_nll(Even(), torch.randint(11, (5, 8)), size=2)) == pytest.approx(11, rel=1e-5)

def test_clock():
    with wall_clock() as taken: sum(range(1000))
    assert taken.seconds > 0
