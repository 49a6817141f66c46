import os
import random
from pathlib import Path

SETTINGS = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PRUNING_BENCH_OFFLINE": "1", "TQDM_DISABLE": "1",
            "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
for name, value in SETTINGS.items(): os.environ.setdefault(name, value)   # before anything imports torch

import pytest


@pytest.fixture(scope="session")
def data_dir():
    "The folder of extra data sets, for tests that need more than the package embeds."
    folder = os.environ.get("PRUNING_BENCH_DATA")
    if not folder or not Path(folder).is_dir(): pytest.skip("PRUNING_BENCH_DATA names no folder")
    return Path(folder).resolve()


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="where the random streams of every test start")


def start_random_streams(config):
    "Python, NumPy and torch draw the same numbers in every run: no test may need a certain seed."
    import numpy
    import torch
    for start in (random.seed, numpy.random.seed, torch.manual_seed): start(config.getoption("seed"))


def pytest_configure(config): start_random_streams(config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    start_random_streams(item.config)
    if item.get_closest_marker("gpu"):
        import torch
        if not torch.cuda.is_available(): pytest.skip("no CUDA device")
