"""A layer of `torch.nn` or an operation between two convolutions: eight channels become four,
and removed equals masked, or the reason is given."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import prune
from pruning_bench.graph.groups import dependency_groups

C, X = 8, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

class Does(nn.Module):
    def __init__(self, does, *layers):
        super().__init__()
        self.does, self.layers = does, nn.ModuleList(layers)
    def forward(self, x): return self.does(x, *self.layers)

def between(middle, channels=C):
    middle = middle if isinstance(middle, nn.Module) else Does(middle)
    return nn.Sequential(nn.Conv2d(3, C, 3, padding=1), middle, nn.AdaptiveAvgPool2d(2), nn.Conv2d(channels, 4, 1))

POINTWISE = ("ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh LeakyReLU Sigmoid Tanh Softplus "
             "Softshrink Hardshrink Tanhshrink Softsign LogSigmoid RReLU Identity PReLU Dropout Dropout2d "
             "AlphaDropout").split()
LAYERS = {n: getattr(nn, n)() for n in POINTWISE} | {
    "one slope per channel": nn.PReLU(C), "threshold": nn.Threshold(.1, .2), "softmax": nn.Softmax2d(),
    "gate": (nn.GLU(1), C // 2),
    "batch norm": nn.BatchNorm2d(C), "synchronised": nn.SyncBatchNorm(C), "instance norm": nn.InstanceNorm2d(C),
    "with weights": nn.InstanceNorm2d(C, affine=True, track_running_stats=True), "group norm": nn.GroupNorm(2, C),
    "bare group norm": nn.GroupNorm(2, C, affine=False),
    "bare layer norm": Does(lambda x, n: n(x.movedim(1, 3)).movedim(3, 1), nn.LayerNorm(C, elementwise_affine=False)),
    "bare rms norm": Does(lambda x, n: n(x.movedim(1, 3)).movedim(3, 1), nn.RMSNorm(C, elementwise_affine=False)),
    "max pool": nn.MaxPool2d(2), "with places": lambda x: F.max_pool2d_with_indices(x, 2)[0],
    "mean pool": nn.AvgPool2d(2), "power pool": nn.LPPool2d(2, 2), "adaptive": nn.AdaptiveMaxPool2d(2),
    "reflected": nn.ReflectionPad2d(1), "replicated": nn.ReplicationPad2d(1), "in a circle": nn.CircularPad2d(1),
    "with zeros": nn.ZeroPad2d(1), "with a half": nn.ConstantPad2d(1, .5),
    "nearest": nn.Upsample(scale_factor=2), "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": nn.Upsample(scale_factor=2, mode="bicubic"), "area": lambda x: F.interpolate(x, (5, 5), mode="area"),
    "pixel shuffle": (nn.PixelShuffle(2), C // 4), "and back": (nn.PixelUnshuffle(2), 4 * C),
    "channel shuffle": nn.ChannelShuffle(2),
    "transposed": nn.ConvTranspose2d(C, C, 2, 2), "transposed, grouped": nn.ConvTranspose2d(C, C, 2, 2, groups=2),
    "depthwise": nn.Conv2d(C, C, 3, groups=C), "two each": (nn.Conv2d(C, 2 * C, 3, groups=C), 2 * C),
    "grouped": nn.Conv2d(C, C, 3, groups=2), "circular": nn.Conv2d(C, C, 3, padding=1, padding_mode="circular"),
    "squeeze": Does(lambda x, a, b: x * b(a(x.mean((2, 3), keepdim=True)).relu()).sigmoid(), nn.Conv2d(C, 4, 1),
                    nn.Conv2d(4, C, 1)),
    "shifted": Does(lambda x, a: x + a(x.mean((2, 3)))[:, :, None, None], nn.Linear(C, C)),
    "unit length": lambda x: F.normalize(x, dim=1), "chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "maxout": (lambda x: torch.maximum(*x.chunk(2, 1)), C // 2), "mirrored": lambda x: x.flip(3),
    "rolled": lambda x: x.roll(1, 3), "summed up": lambda x: x.cumsum(3),
    "looked up": lambda x: F.grid_sample(x, torch.zeros(2, 4, 4, 2), align_corners=False),
    "clamped": lambda x: x.clamp(0, 6), "chosen": lambda x: torch.where(x > 0, x, .1 * x),
    "sorted": lambda x: x.sort(-1)[0], "largest": lambda x: x.topk(4, -1)[0],
    "spectrum": lambda x: torch.fft.rfft2(x).abs(),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(3, (4, 2)).contiguous())).flatten(3),
    "einsum": Does(lambda x, a: torch.einsum("bchw,dc->bdhw", x, a.weight), nn.Linear(C, C, bias=False)),
    "repeated": lambda x: x.repeat(1, 1, 2, 2), "repeated channels": (lambda x: x.repeat(1, 2, 1, 1), 2 * C),
    "each twice": (lambda x: x.repeat_interleave(2, 1), 2 * C),
    "expanded": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8),
    "in place": lambda x: x.clone().mul_(2).add_(1),
    "standardised": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt(),
    "without epsilon": lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True),
    "rounded": lambda x: x + (x.round() - x).detach(),
    "checkpointed": Does(lambda x, a: torch.utils.checkpoint.checkpoint(a, x, use_reentrant=False), nn.Conv2d(C, C, 1))}

@pytest.mark.parametrize("name", LAYERS)
def test_what_lies_between_two_convolutions(name):
    torch.manual_seed(0)
    made = LAYERS[name]
    model = between(*(made if isinstance(made, tuple) else (made,))).eval()
    found = dependency_groups(model, X)
    # a slope for all channels
    assert set(found.frozen) == {"3.weight"} and not found.unused and found.ungrouped.keys() <= {"3.bias", "1.weight"}
    prune(model, "l1-filter", .5, data=[X], residual=True)   # compares what is removed with what is masked
    assert model[0].out_channels == model[0].weight.shape[0] == 4 and model(X).shape[:2] == (2, 4)

NOT_YET = {"along": (lambda x: x.flip(1), "runs along it"), "neighbours": (nn.LocalResponseNorm(3), "runs over it"),
           "by number": (lambda x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]], "picked by numbers"),
           "one by one": (lambda x: torch.stack(x.unbind(1), 1), "fixed positions"),
           "every second": ((lambda x: x[:, ::2], 4), "fixed positions"),
           "random windows": (nn.FractionalMaxPool2d(2, output_size=4), "no rule for")}

@pytest.mark.parametrize("name", NOT_YET)
def test_what_cannot_be_cut_says_why(name):
    made, why = NOT_YET[name]
    assert why in dependency_groups(between(*(made if isinstance(made, tuple) else (made,))).eval(),
                                    X).frozen["0.weight"][1]

class Loop(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.first, self.cell, self.out = nn.Linear(5, 6), cell(6, 8), nn.Linear(8, 2)
    def forward(self, x):
        state = None
        for t in range(x.shape[1]): state = self.cell(self.first(x[:, t]), state)
        return self.out(state[0] if isinstance(state, tuple) else state)

@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(cell):
    model, x = Loop(cell), torch.randn(2, 3, 5)
    assert [len(g) for g in dependency_groups(model, x).groups] == [6, 8]
    prune(model, "l1-filter", .5, data=[x])
    assert (model.cell.input_size, model.cell.hidden_size, model.out.in_features) == (3, 4, 4)
    assert model(x).shape == (2, 2)

def test_bags_and_windows():
    bags = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 2))
    prune(bags, "l1-filter", .5, data=[torch.randint(0, 20, (3, 4))])
    assert bags[0].embedding_dim == bags[1].in_features == 4
    windows = nn.Sequential(nn.Conv2d(3, C, 1), nn.Unfold(2, stride=2), nn.Conv1d(4 * C, 16, 1),
                            Does(lambda x: F.fold(x, (8, 8), 2, stride=2)), nn.Conv2d(4, 3, 1))
    prune(windows, "l1-filter", .5, data=[X])
    assert windows[0].out_channels == 4
    assert windows[2].in_channels == 16 and windows[2].out_channels == 8 and windows[4].in_channels == 2

class Standardised(nn.Conv2d):
    "BiT and NFNet: filters are standardised over their inputs."
    def forward(self, x):
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias)

class Tokens(nn.Module):
    "A norm of tokens, whose features lie along the last axis."
    def __init__(self, norm): super().__init__(); self.a, self.norm, self.b = nn.Linear(4, 16), norm, nn.Linear(16, 3)
    def forward(self, x): return self.b(self.norm(self.a(x)).relu())

def standardised(size):
    return nn.Sequential(Standardised(3, 16, size), nn.ReLU(), Standardised(16, 8, size), nn.ReLU(), nn.Conv2d(8, 4, 1))

MIXING = {"weights, 1x1": (lambda: standardised(1), (2, 3, 8, 8)),
          "weights, 3x3": (lambda: standardised(3), (2, 3, 8, 8)),
          "instance norm": (lambda: Tokens(nn.InstanceNorm1d(10, affine=True)), (6, 10, 4)),
          "batch norm in training": (lambda: Tokens(nn.BatchNorm1d(10, track_running_stats=False)), (6, 10, 4)),
          "group norm": (lambda: Tokens(nn.GroupNorm(5, 10)), (6, 10, 4)),
          "one norm group": (lambda: Tokens(nn.GroupNorm(1, 10)), (6, 10, 4))}

@pytest.mark.parametrize("name", MIXING)
def test_a_norm_that_mixes_along_another_axis_is_not_exact(name):
    make, shape = MIXING[name]
    model, x = make().eval(), torch.randn(shape)
    groups = dependency_groups(model, x).groups
    # the rows of the first standardised layer are read by filters that are standardised over them
    assert not groups[0].exact
    prune(model, "l1-filter", .5, data=x)
    assert groups[0].name.startswith(("0.", "a.")) and len(next(model.parameters())) == 8
    assert model(x).isfinite().all() and not any((p == 0).all() for n, p in model.named_parameters() if p.dim() > 1)

def test_a_batch_norm_with_running_statistics_leaves_other_axes_exact():
    groups = dependency_groups(Tokens(nn.BatchNorm1d(10)).eval(), torch.randn(6, 10, 4)).groups
    assert [g.exact for g in groups] == [True]
