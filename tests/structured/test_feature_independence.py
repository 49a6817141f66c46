"Channel independence: the definition by naive removal, the layers of a network, invariances, refusals."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.stats import PROVIDERS
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.feature_independence import row_independence


def nuclear(m):
    return torch.linalg.svdvals(m).sum(-1)


def naive(maps):
    "The nuclear norm of every matrix, minus that of the matrix whose row is overwritten by zeros."
    out = torch.zeros(maps.shape[:2], dtype=maps.dtype)
    for n, m in enumerate(maps):
        for i in range(len(m)):
            poorer = m.clone()
            poorer[i] = 0
            out[n, i] = nuclear(m) - nuclear(poorer)
    return out


@pytest.mark.parametrize("rows, columns", [(7, 4), (4, 7), (5, 5), (3, 1), (1, 6)])
def test_the_score_is_the_naive_removal_of_each_row(rows, columns):
    torch.manual_seed(rows)
    maps = torch.randn(3, rows, columns).double()
    maps[1] = maps[1].clamp(min=0)   # with zero rows or entries, as behind a ReLU
    maps[2] = maps[2, :, :1] @ maps[2, :1]   # rank one
    assert torch.allclose(row_independence(maps), naive(maps), atol=1e-6)


def test_a_zero_row_adds_nothing_and_an_orthogonal_row_its_length():
    m = torch.tensor([[[0., 0., 0.], [3., 4., 0.], [0., 0., 2.]]])
    assert torch.allclose(row_independence(m), torch.tensor([[0., 5., 2.]]).double(), atol=1e-6)


def test_a_rotation_of_the_positions_changes_nothing_and_a_factor_scales_the_score():
    torch.manual_seed(0)
    maps, rotation = torch.randn(2, 5, 6).double(), torch.linalg.qr(torch.randn(6, 6).double()).Q
    assert torch.allclose(row_independence(maps @ rotation), row_independence(maps), atol=1e-6)
    assert torch.allclose(row_independence(3 * maps), 3 * row_independence(maps), atol=1e-6)


def convolutions():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * 16, 3)).double().eval()


def test_the_maps_of_a_network_lie_behind_the_norm_and_the_activation_and_batches_do_not_matter():
    net, x = convolutions(), torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        maps = {"0.weight": net[:3](x).flatten(2), "3.weight": net[:5](x).flatten(2)}
    for batches in ([x], [x[:1], x[1:]]):
        found = PROVIDERS["channel_independence"](Channels(net, [x]), batches)
        for name, m in maps.items():
            assert torch.allclose(found[name], naive(m).mean(0), atol=1e-6)


def test_a_copy_of_a_channel_is_removed_first():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 3)).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        net[0].weight.copy_(torch.linalg.qr(torch.randn(9, 4).double()).Q.T.reshape(4, 1, 3, 3))
        net[0].weight[3] = net[0].weight[1]
    plan = prune(net, "chip", .25, [torch.randn(16, 1, 8, 8).double()])
    assert plan.masks["0.weight"].tolist() in ([True, False, True, True], [True, True, True, False])


def test_channels_without_maps_are_refused_and_left_alone():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    before = net[0].weight.clone()
    with pytest.raises(BadInput, match="no two-dimensional feature maps, so no channel independence"):
        prune(net, "chip", .5, [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))], F.cross_entropy)
    assert torch.equal(net[0].weight, before)
