"How much time the inverse Fisher takes: `make bench` compares it with the recursion as the paper writes it."
import time

import torch

from pruning_bench.weight.second_order import Fisher

M, D, DAMP = 96, 100_000, 1e-3

def seconds(work, repeats=2):
    def once():
        start = time.perf_counter(); found = work()
        return time.perf_counter() - start, found
    return min((once() for _ in range(repeats)), key=lambda run: run[0])

def recursion(g):
    "Diagonal of the inverse by h_i = g_i / damp - sum_j h_j (h_j . g_i) / D_j, one gradient after the other."
    h, d = [], []
    for v in g:
        new = v / DAMP
        for a, b in zip(h, d): new = new - a * (torch.dot(a, v) / b)
        h.append(new); d.append(len(g) + torch.dot(v, new))
    return 1 / DAMP - sum(a.square() / b for a, b in zip(h, d))

def test_blocked_algebra_beats_the_loop_over_gradients():
    g = torch.randn(M, D, generator=torch.Generator().manual_seed(0)) * .03
    (by_library, ours), (by_hand, theirs) = seconds(lambda: Fisher(g, DAMP).diag), seconds(lambda: recursion(g))
    print(f"\n{M} gradients of {D:,} weights: {by_library:.3f} s, by the recursion {by_hand:.3f} s")
    assert torch.allclose(ours, theirs, rtol=1e-2)
    assert by_library < by_hand
