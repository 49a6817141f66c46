"A task that is trained in a second: is the sum of the first two of eight numbers positive?"
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from pruning_bench.bench.task import Task, register_task
from pruning_bench.core.recovery import finetune


def examples(n: int,    # number of examples
             seed: int, # of the random numbers
             )->TensorDataset: # of (eight numbers, class)
    "Standard normal numbers, and whether the first two add up to more than zero."
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())


def network()->nn.Module:
    "A hidden layer of 32 units."
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))


@torch.no_grad()
def accuracy(model, loader)->float: # fraction
    "The fraction of right answers."
    return torch.cat([model(x).argmax(1) == y for x, y in loader]).float().mean().item()


TRAIN = dict(steps=200, lr=1e-2)
register_task(Task.from_parts(
    network, examples(512, 0), examples(256, 2), F.cross_entropy, accuracy, name="sum-of-two",
    validation=examples(256, 1), dense_training=finetune(**TRAIN), recover=finetune(steps=20, lr=1e-3), bound=.9,
    config={"train": TRAIN, "recover": dict(steps=20, lr=1e-3)},
    varies=("dense model", "calibration", "random masks", "recovery order")))
