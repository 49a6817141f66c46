"""Learn pruning by running it, use any method through one call, trust a leaderboard whose every cell can be re-run."""
__version__ = "0.1.0"

import importlib, pkgutil
from pathlib import Path

from pruning_bench.core.during import pruning
from pruning_bench.core.inputs import BadInput, batch_loss
from pruning_bench.core.method import Method, build, cite, methods, prune, register
from pruning_bench.core.plan import Plan, load_plan
from pruning_bench.structured.reshape import load_pruned

for _family in ("weight", "structured", "diffusion", "data"):   # importing a method registers it
    for _module in pkgutil.iter_modules([str(Path(__file__).parent / _family)]):
        importlib.import_module(f"{__name__}.{_family}.{_module.name}")
