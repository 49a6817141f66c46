"A removal keeps the memory format of every tensor, and weights under a weight norm stay finite."
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from pruning_bench import prune
from pruning_bench.core.recovery import finetune
from pruning_bench.graph.surgery import same_layout

g = torch.Generator().manual_seed(0)
DATA = [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g))]


def conv(wrap=lambda m: m):
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Conv2d(3, 16, 3)), nn.BatchNorm2d(16), nn.ReLU(), wrap(nn.Conv2d(16, 24, 1)),
                         nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(24, 4))


def strides(model):
    return {n: p.stride() for n, p in model.named_parameters() if p.dim() > 3}


@pytest.mark.parametrize("method", ["l1-filter", "sfp", "taylor-filter", "magnitude", "sparsegpt", "rigl"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_survives_a_removal(layout, method):
    model, more = conv().to(memory_format=layout), {"steps": 4} if method in ("sfp", "rigl") else {}
    plan = prune(model, method, .5, DATA, F.cross_entropy, **more)
    fresh = conv().to(memory_format=layout)
    plan.apply(fresh)
    wanted = conv().to(memory_format=layout)
    for m in (model, fresh):
        for n, p in m.named_parameters():
            if p.dim() == 4:
                same = torch.empty(p.shape).to(memory_format=layout).stride()
                sizes = [i for i, s in enumerate(p.shape) if s > 1]   # the stride of one index has no meaning
                assert p.is_contiguous(memory_format=layout) and [p.stride()[i] for i in sizes] == \
                    [same[i] for i in sizes], n
        assert strides(m).keys() == strides(wanted).keys()


@pytest.mark.parametrize("shape, fewer, order", [((4, 6), (4, 3), (1, 0)), ((7,), (3,), (0,)),
                                                 ((8, 3, 5, 5, 5), (4, 3, 5, 5, 5), (0, 2, 3, 4, 1)),
                                                 ((), (), ())])
def test_a_layout_is_an_order_of_dimensions(shape, fewer, order):
    like = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    new = torch.arange(float(torch.Size(fewer).numel())).view(fewer)
    found = same_layout(new, like)
    assert torch.equal(found, new) and found.permute(order).is_contiguous()


SOFT = {"l1-filter": dict(schedule="cubic", recover=finetune(steps=12)), "sfp": dict(steps=12),
        "soft-fpgm": dict(steps=12), "group-lasso": dict(steps=12), "growing-reg": dict(steps=12),
        "slimming": dict(steps=12)}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", SOFT)
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_soft_masks_of_a_weight_norm_stay_finite(wrap, method):
    model = nn.Sequential(*conv(wrap)[:5], nn.BatchNorm2d(24), *conv()[6:]).train()
    plan = prune(model, method, .5, DATA, F.cross_entropy, **SOFT[method])
    assert plan.density == .5 and all(v.isfinite().all() for v in model.state_dict().values())
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_masked_filter_of_a_weight_norm_is_zero():
    model, seen = conv(parametrizations.weight_norm), []

    def look(model, data, loss, part):
        weights = [m.weight.flatten(1) for m in (model[0], model[3])]
        seen.append([(w == 0).all(1).sum().item() for w in weights])
        assert all(w.isfinite().all() for w in weights)

    prune(model, "l1-filter", .5, DATA, F.cross_entropy, schedule=[.75, .5], recover=look)
    assert seen[0] == [4, 6]
