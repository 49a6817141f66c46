"The smallest model, data and loss of every space, for the clauses that every registered method keeps."
import copy
import functools
import inspect

import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import build, methods, prune
from pruning_bench.core.method import METHODS

SMALL = {"steps": 3, "rounds": 3, "epochs": 2, "runs": 2}   # settings that make a method short, where it has them
SMALLEST = {"soup": {"rounds": 1}}                          # three networks, one step each


def settings_of(name):
    known = inspect.signature(METHODS[name].build).parameters
    return {k: v for k, v in {**SMALL, **SMALLEST.get(name, {})}.items() if k in known}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.conv2(F.relu(self.bn1(self.conv1(x))))
        return self.head(x.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))


class Categories(nn.Module):
    "Four levels of brightness at 64 pixels: a table of 32 rows for every two columns of pixels."
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(32, 4) for _ in range(4))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        code = (4 * x).long().clamp(0, 3).flatten(1).view(len(x), 4, 16) + 4 * (torch.arange(16) % 8)
        return self.head(torch.cat([t(code[:, i]).mean(1) for i, t in enumerate(self.tables)], 1))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM
    return MixtralForCausalLM(MixtralConfig(vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                                            num_local_experts=6, num_experts_per_tok=2,
                                            experts_implementation="eager"))   # the grouped product has no float64


def images(n=96):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 10
    return torch.rand(n, 1, 8, 8, generator=g) + y.view(-1, 1, 1, 1) / 10, y


def labelled(dtype):
    x, y = images()
    return [(x[i:i + 32].to(dtype), y[i:i + 32]) for i in (0, 32, 64)]


def ids(dtype):
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 48, (4, 16), generator=g)} for _ in range(3)]


def dataset(dtype):
    x, y = images()
    return torch.utils.data.TensorDataset(x.to(dtype), y)


WORLDS = {"weights": (mlp, labelled, F.cross_entropy), "ranks": (mlp, labelled, F.cross_entropy),
          "channels": (Residual, labelled, F.cross_entropy), "heads": (llama, ids, None),
          "blocks": (llama, ids, None), "residuals": (llama, ids, None), "experts": (mixtral, ids, None),
          "sublayers": (llama, ids, None),
          "rows": (Categories, labelled, F.cross_entropy), "locations": (mlp, labelled, F.cross_entropy),
          "examples": (mlp, dataset, F.cross_entropy)}
NAMES = list(methods(use="prune").method)


def world(name, dtype=torch.float32):
    make, data, loss = WORLDS[build(name).space]
    torch.manual_seed(0)
    return make().to(dtype).eval(), data(dtype), loss


def run(name, sparsity=.5, dtype=torch.float32, seed=0, model=None):
    fresh, data, loss = world(name, dtype)
    model = fresh if model is None else model
    return model, prune(model, name, sparsity, data, loss, seed=seed, **settings_of(name))


@functools.cache
def finished(name):
    return run(name)


def pruned(name):
    "A model pruned to one half, that a test may change, and its plan."
    model, plan = finished(name)
    return copy.deepcopy(model), plan


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
