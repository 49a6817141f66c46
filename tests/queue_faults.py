"""A queue of quick jobs in a process of its own, to be killed.

The notebook notes that it began and that it ended, one line each, and writes a valid entry. Without a kernel the cells
run in the worker itself, so that a job takes a fraction of a second; everything around the cells is the same.
"""
import os
import time
from pathlib import Path

import nbformat
import psutil
from rich.console import Console

from entries import ENTRY_CODE
from pruning_bench.bench import processes, runner
from pruning_bench.bench.runner import Job

NOTEBOOK = """
import json, os, pathlib, time
def note(word):
    log = os.open(pathlib.Path(os.environ["PRUNING_BENCH_CACHE"]) / word, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{variant}\\n".encode()); os.close(log)
note("began")
WORK
ENTRY_CODE
pathlib.Path(out).write_text(json.dumps(entry))
note("ended")
"""
WITHOUT_KERNEL = """
import sys
sys.argv[0] = {file!r}
sys.path.insert(0, {folder!r})
import worker
sys.path.pop(0)
def run_cells(template, folder, parameters):
    import json, pathlib
    names = dict(parameters)
    for cell in json.loads(pathlib.Path(template).read_text())["cells"][1:]: exec("".join(cell["source"]), names)
worker.execute_notebook = run_cells
sys.exit(worker.EXIT_CODES[worker.run_worker(sys.stdin.read())])
"""


def jobs(n):
    return [Job("digits-mlp", "magnitude", f"job {i}", (.5,), (0,)) for i in range(n)]


def undo_prepare(monkeypatch, cache):
    "Let a test put back at its end what `prepare` replaces."
    for name in ("template_notebook", "plan_steps"): monkeypatch.setattr(runner, name, getattr(runner, name))
    monkeypatch.setattr(processes, "WORKER_FILE", processes.WORKER_FILE)
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(cache))


def prepare(store, work="time.sleep(.1)", kernel=False):
    "Replace the benchmark notebook by a quick one, and without `kernel` the worker too; in this process."
    store = Path(store)
    store.mkdir(parents=True, exist_ok=True)
    os.environ["PRUNING_BENCH_CACHE"] = str(store)
    cells = [nbformat.v4.new_code_cell("task = method = variant = device = out = ''\nsparsities = seeds = []\n"
                                       "settings = {}")]
    code = NOTEBOOK.replace("ENTRY_CODE", ENTRY_CODE).replace("WORK", work)
    cells.append(nbformat.v4.new_code_cell(code))
    cells[0].metadata["tags"] = ["parameters"]
    for i, cell in enumerate(cells): cell["id"] = f"cell{i}"   # the same notebook in every process
    template = store / "template.ipynb"
    if not template.exists():
        nbformat.write(nbformat.v4.new_notebook(cells=cells), store / f"{os.getpid()}.ipynb")
        os.replace(store / f"{os.getpid()}.ipynb", template)
    real = runner.plan_steps
    runner.template_notebook = lambda job: template
    runner.plan_steps = lambda todo, retry: [s for s in real(todo, retry)
                                             if s.job and not setattr(s, "needs", frozenset())]
    if not kernel:
        folder = str(Path(processes.__file__).parent)
        (store / "quick_worker.py").write_text(WITHOUT_KERNEL.format(file="quick", folder=folder))
        processes.WORKER_FILE = str(store / "quick_worker.py")


def run_queue(store, n, workers, **settings):
    "Run the jobs; what `run_jobs` returns."
    prepare(store, **settings)
    return runner.run_jobs(jobs(n), workers, console=Console(quiet=True))


def forked_queue(store, n, workers, **settings):
    "The same in a forked process, which has imported everything already; its number."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        found = run_queue(store, n, workers, **settings)
        code = 0 if all(isinstance(entry, dict) for entry in found.values()) else 2
    finally: os._exit(code)


def lines(store, word):
    path = Path(store) / word
    return path.read_text().splitlines() if path.exists() else []


def results(store):
    "The state of every result file: a second run of a job would change it."
    return {p.parent.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(store).glob("runs/*/*/result.json")}


def left_over(store):
    "The processes that still work on a store."
    def at_it(p):
        try: return p.pid != os.getpid() and p.environ().get("PRUNING_BENCH_CACHE") == str(store) \
            and p.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return [p for p in psutil.process_iter() if at_it(p)]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(.05)
    return condition()
