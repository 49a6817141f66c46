"The network of three layers and the batches on which single steps of a method are worked out."
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import prune
from pruning_bench.core.inputs import seeded

TOTAL = 12 * 16 + 16 * 8 + 8 * 4   # weights


def mlp(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def batches(seed=0, n=6):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 12, generator=g), torch.randint(0, 4, (32,), generator=g)) for _ in range(n)]


def trained(name, sparsity=.75, **settings):
    model = mlp()
    plan = prune(model, name, sparsity, batches(), F.cross_entropy, **{"steps": 20, **settings})
    return model, plan


def identical(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
