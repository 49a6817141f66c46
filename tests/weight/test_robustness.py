"Corruptions are seeded and bounded; length, angle, margin and bias make the logit; losses are attributed."
import math

import pytest
import torch
from torch import nn

from pruning_bench import BadInput
from pruning_bench.core.inputs import seeded
from pruning_bench.weight.robustness import (CORRUPTIONS, class_geometry, corrupt, gaussian_blur, head_features,
                                             lost_by, low_contrast, mean_corruption_error, occlusion,
                                             robustness_table)


def images(n=6):
    return torch.rand(n, 2, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_seeded_bounded_and_graded(name):
    x = images()
    kept, state = x.clone(), torch.get_rng_state()
    a, b = corrupt(x, name, 2, seed=5), corrupt(x, name, 2, seed=5)
    assert torch.equal(a, b) and torch.equal(x, kept) and torch.equal(state, torch.get_rng_state())
    assert a.shape == x.shape and a.dtype == x.dtype and 0 <= a.min() and a.max() <= 1
    assert torch.equal(corrupt(x, name, 0), x) and corrupt(x, name, 0) is not x
    moved = [(corrupt(x, name, s, seed=5) - x).square().sum().item() for s in range(4)]
    assert moved[0] == 0 and all(i < j for i, j in zip(moved, moved[1:]))
    if name in ("Gaussian noise", "impulse noise", "occlusion"):
        assert not torch.equal(a, corrupt(x, name, 2, seed=6))


@pytest.mark.parametrize("name, severity", [("fog", 1), ("Gaussian noise", 4), ("Gaussian noise", -1),
                                            ("Gaussian noise", 1.5)])
def test_unknown_corruptions_and_severities_are_refused(name, severity):
    with pytest.raises(BadInput):
        corrupt(images(), name, severity)


def test_blur_keeps_constants_and_contrast_keeps_means():
    flat = torch.full((2, 3, 8, 8), .3)
    assert torch.allclose(gaussian_blur(flat, 1., None), flat, atol=1e-6)
    x = images()
    assert torch.allclose(low_contrast(x, .7, None).mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-6)
    spread = low_contrast(x, .7, None).std((1, 2, 3)) / x.std((1, 2, 3))
    assert torch.allclose(spread, torch.full_like(spread, .3), atol=1e-5)
    hidden = (occlusion(x, .5, torch.Generator().manual_seed(0)) != x).any(1).flatten(1).sum(1)
    assert (hidden <= 25).all() and (hidden >= 1).all()   # a side of four pixels meets at most five


def test_the_factors_multiply_to_the_logit_and_the_margin_has_the_sign_of_the_prediction():
    with seeded(0):
        f, w, b = torch.randn(200, 7), torch.randn(5, 7), torch.randn(5)
        y = torch.randint(0, 5, (200,))
    g = class_geometry(f, w, y, b)
    z = f.double() @ w.double().T + b.double()
    product = w.double().norm(dim=1)[y] * g["length"] * torch.cos(g["angle"].deg2rad()) + b.double()[y]
    assert torch.allclose(product, z.gather(1, y[:, None])[:, 0], atol=1e-9)
    assert torch.equal(g["margin"] > 0, z.argmax(1) == y)


def test_the_margin_is_the_distance_to_the_boundary():
    "A step of this length against the closest competitor brings the example to the boundary, a shorter one does not."
    with seeded(1):
        f, w, b = torch.randn(30, 6).double(), torch.randn(4, 6).double(), torch.randn(4).double()
    y = (f @ w.T + b).argmax(1)
    m = class_geometry(f, w, y, b)["margin"]
    for i in range(30):
        others = [c for c in range(4) if c != y[i]]
        ways = {c: (w[c] - w[y[i]]) / (w[c] - w[y[i]]).norm() for c in others}
        gap = lambda t, c: (f[i] + t * ways[c]) @ (w[y[i]] - w[c]) + b[y[i]] - b[c]
        assert min(abs(gap(m[i], c).item()) for c in others) < 1e-9
        assert all(gap(.99 * m[i], c) > 0 for c in others)


def test_features_of_zero_and_networks_without_a_head():
    g = class_geometry(torch.zeros(1, 3), torch.eye(3), torch.tensor([1]))
    assert g["length"].item() == 0 and math.isfinite(g["angle"].item()) and g["margin"].item() == 0
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.Dropout(.5), nn.Linear(8, 4)).train()
    x = images()
    features, head = head_features(net, x)
    assert head is net[3] and net.training and torch.equal(features, net[1](net[0](x)))
    with pytest.raises(BadInput, match="linear layer"):
        head_features(nn.Sequential(*net, nn.Softmax(1)), x)


def test_losses_are_attributed_and_errors_are_relative():
    def bools(*values): return torch.tensor(values).bool()
    found = lost_by(bools(1, 1, 1, 1, 0), bools(1, 0, 1, 1, 1), bools(1, 1, 0, 1, 0), bools(1, 0, 0, 0, 0))
    assert found == {"pruning": .25, "corruption": .25, "only both": .25}
    assert lost_by(*[bools(0, 0)] * 4) == {"pruning": 0, "corruption": 0, "only both": 0}
    def table(*errors): return [dict(corruption=n, severity=s, accuracy=1 - e) for n, s, e in errors]
    base = table(("clean", 0, .9), ("a", 1, .1), ("a", 2, .3), ("b", 1, .5))
    mine = table(("clean", 0, .1), ("a", 1, .2), ("a", 2, .2), ("b", 1, .25))
    assert mean_corruption_error(base, base) == 1
    assert mean_corruption_error(mine, base) == pytest.approx((1 + .5) / 2)
    with pytest.raises(BadInput, match="no error"):
        mean_corruption_error(mine, table(("a", 1, 0.), ("b", 1, .5)))


def test_the_table_has_a_row_per_corruption_and_severity():
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    rows = robustness_table(net, images(), y)
    assert len(rows) == 1 + sum(len(a) for _, a in CORRUPTIONS.values())
    with torch.no_grad():
        assert rows[0]["accuracy"] == pytest.approx((net(images()).argmax(1) == y).float().mean().item())
