"""Learn pruning by running it, use any method through one call, trust a leaderboard whose every cell can be re-run."""
__version__ = "0.1.0"

import importlib, pkgutil
from pathlib import Path

from pruning_bench.core.driver import prune
from pruning_bench.core.inputs import BadInput, batch_loss
from pruning_bench.core.method import Method, build, cite, methods, register
from pruning_bench.core.own_loop import pruning
from pruning_bench.core.plan import Plan, load_plan
from pruning_bench.core.policy import Policy, load_policy, make_policy
from pruning_bench.core.registry import BUILT_IN


def import_families():
    "Import every module of the method families, which registers its methods and parts; happens when a name is first missing."
    for family in ("graph", "weight", "structured", "diffusion", "data", "inference"):
        for module in pkgutil.iter_modules([str(Path(__file__).parent/family)]):
            importlib.import_module(f"{__name__}.{family}.{module.name}")

BUILT_IN["pruning_bench.methods"] = import_families


def __getattr__(name):
    if name == "load_pruned": return importlib.import_module("pruning_bench.graph.saving").load_pruned
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
