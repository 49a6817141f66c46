"""ResNet-50: seconds against `torch.nn.utils.prune`, masks against a training step without masks, memory against
a training step."""
import copy, os, subprocess, sys, time

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.nn.utils import prune as torch_prune

from pruning_bench import prune
from pruning_bench.core.space import Weights

def resnet50():
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None)

def fastest(state, *works, repeats=3):
    "Seconds of the fastest run of each, on copies and in turns: a busy moment meets them all."
    found = [[] for _ in works]
    for _ in range(repeats):
        for work, times in zip(works, found):
            mine = copy.deepcopy(state)
            start = time.perf_counter(); work(mine); times.append(time.perf_counter() - start)
    return [min(times) for times in found]

def test_global_magnitude_takes_a_quarter_of_the_time_of_torch():
    model, plans = resnet50(), []
    def theirs(m):
        torch_prune.global_unstructured([(l.module, "weight") for l in Weights(m).layers.values()],
                                        torch_prune.L1Unstructured, amount=.9)
    def ours(m): plans.append(prune(m, "global-magnitude", .9))
    theirs(resnet50()); ours(resnet50())
    by_torch, by_library = fastest(model, theirs, ours)
    print(
        f"\nResNet-50, global magnitude: {by_library:.2f} s, torch.nn.utils.prune {by_torch:.2f} s, "
        f"ratio {by_library / by_torch:.3f}")
    units = sum(m.numel() for m in plans[0].masks.values())
    assert all(sum(int(m.sum()) for m in p.masks.values()) == round(.1 * units) for p in plans)   # fast and exact
    assert by_library <= .25 * by_torch

def test_masks_cost_a_twentieth_of_a_training_step_at_most():
    dense = resnet50()
    sparse = copy.deepcopy(dense)
    prune(sparse, "magnitude", .9)
    x, y = torch.randn(8, 3, 224, 224), torch.randint(0, 1000, (8,))
    optimizers = {m: torch.optim.SGD(m.parameters(), .1, momentum=.9) for m in (dense, sparse)}
    def step(model):
        start = time.perf_counter()
        optimizers[model].zero_grad(); F.cross_entropy(model(x), y).backward(); optimizers[model].step()
        return time.perf_counter() - start
    rounds = [(step(dense), step(sparse)) for _ in range(9)][1:]   # interleaved; the first one warms up
    bare, held = (min(r) for r in zip(*rounds))
    print(f"\nResNet-50, training step of 8 pictures: {bare:.2f} s, with masks {held:.2f} s, ratio {held / bare:.3f}")
    assert held <= 1.05 * bare

CHILD = """
import sys, torch, torch.nn.functional as F, torchvision
from pruning_bench import prune
from pruning_bench.core.memory import peak_memory
from pruning_bench.core.recovery import finetune
torch.manual_seed(0)
# AdamW; from the second step on its two moments are kept
def step(model, x, y): finetune(2)(model, [(x, y)], F.cross_entropy)
work = {"step": step, "synflow": lambda *a: prune(a[0], "synflow", .9, [a[1:]], rounds=2),
        "global-magnitude": lambda *a: prune(a[0], "global-magnitude", .9)}
run = work.get(sys.argv[1], lambda *a: prune(a[0], sys.argv[1], .9, [a[1:]], F.cross_entropy))
def world(n, side):
    model = torchvision.models.resnet50(weights=None)
    return model, torch.randn(n, 3, side, side), torch.randint(0, 1000, (n,))
run(*world(8, 32))   # loads the code
big = world(16, 224)
with peak_memory() as taken: run(*big)
print(taken.bytes)
"""

def peak(what):
    "Bytes above the start in a process of its own, with the allocator as it comes; None where nobody can measure them."
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    out = subprocess.run([sys.executable, "-c", CHILD, what], env=env, capture_output=True, text=True,
                         check=True).stdout.split()[-1]
    return None if out == "None" else int(out)

@pytest.mark.timeout(1200)
def test_methods_before_training_fit_where_a_training_step_fits():
    step = peak("step")
    if step is None: pytest.skip("this system does not tell how much memory a process needed")
    found = {name: peak(name) / step for name in ("global-magnitude", "snip", "grasp", "synflow")}
    print(f"\nResNet-50, 16 pictures: a training step (AdamW) takes {step / 2**20:.0f} MiB; as shares of it:",
          {n: round(r, 2) for n, r in found.items()})
    assert max(found.values()) <= 1
