"What one process of the tests of replicas does; a module of its own, because processes are started anew."
import inspect
import os
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, methods, prune, pruning
from pruning_bench.core.method import METHODS


def net(dropout=0.):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 8))


def data(rank):
    g = torch.Generator().manual_seed(100 + rank)
    return [(torch.randn(8, 16, generator=g), torch.randint(8, (8,), generator=g)) for _ in range(4)]


def outcome(work, dropout=0.):
    "The weights of the module and the digest of the plan, or the sentence of a refusal."
    module = net(dropout)
    replica = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
    try:
        plan = work(replica)
    except BadInput as e:
        return str(e)
    return {n: p.detach().clone() for n, p in module.named_parameters()}, plan.digest, list(plan.masks)


def trained_inside(name, rank, steps=8):
    def work(replica):
        torch.manual_seed(rank)
        with pruning(replica, name, None if build(name).pattern.fixed else .5, steps=steps, data=data(rank),
                     loss=F.cross_entropy) as run:
            opt = torch.optim.SGD(replica.parameters(), .1, momentum=.9)
            for i in range(steps):
                x, y = data(rank)[i % 4]
                opt.zero_grad()
                F.cross_entropy(replica(x), y).backward()
                opt.step()
        x, y = data(rank)[0]   # the training goes on after the pruning
        opt.zero_grad()
        F.cross_entropy(replica(x), y).backward()
        opt.step()
        return run.plan
    return outcome(work, dropout=.1)


def pruned(name, rank):
    def work(replica):
        torch.manual_seed(rank)
        known = inspect.signature(METHODS[name].build).parameters
        more = {k: v for k, v in {"steps": 4, "rounds": 1}.items() if k in known}
        sparsity = None if build(name).pattern.fixed else .5
        return prune(replica, name, sparsity, data(rank), F.cross_entropy, **more)
    return outcome(work)


def everything(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    table = methods(space="weights", use="prune").method
    found = {f"loop {n}": trained_inside(n, rank) for n in methods(use="prune").method if build(n).rule}
    found |= {f"prune {n}": pruned(n, rank) for n in [*table, "l1-filter"]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in ("wanda", "magnitude"): prune(net(), name, .5, data(rank))
    found["alone"] = [str(w.message) for w in told]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)   # threads of gloo may abort a process while Python shuts down
