"How much time the library itself takes: `make bench` prints seconds and checks them against a bare equivalent."
import copy, subprocess, sys, time

import pytest
import torch
from torch import nn

from pruning_bench import prune

def seconds(work, repeats=3):
    "The fastest of a few runs, each on its own copy."
    def once(state):
        start = time.perf_counter(); work(state)
        return time.perf_counter() - start
    return min(once(copy.deepcopy(net())) for _ in range(repeats))

def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))

@torch.no_grad()
def bare(model):
    "Uniform magnitude pruning by hand, without any of the library's guarantees."
    for layer in model:
        w = layer.weight
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        mask[w.abs().flatten().topk(w.numel() // 2).indices] = True
        w.mul_(mask.view_as(w))

@pytest.mark.parametrize("parts", [dict(), dict(allocate="global"), dict(allocate="erk"), dict(pattern="2:4"),
                                   dict(schedule="cubic")], ids=str)
def test_prune_costs_a_small_multiple_of_the_bare_arithmetic(parts):
    by_hand, by_library = seconds(bare), seconds(lambda model: prune(model, **parts))
    steps = 10 if "schedule" in parts else 1
    print(f"\n8.4M weights, {parts or 'uniform magnitude'}: {by_library:.3f} s, by hand {by_hand:.3f} s")
    assert by_library < 4 * steps * by_hand

def test_import_is_not_much_slower_than_that_of_torch():
    def run(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True); return time.perf_counter() - start
    run("import pruning_bench")
    alone, ours = (min(run(f"import {name}") for _ in range(3)) for name in ("torch", "pruning_bench"))
    print(f"\nimport torch {alone:.2f} s, import pruning_bench {ours:.2f} s")
    assert ours < alone + 2
