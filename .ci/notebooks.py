"""Execute notebooks, each in a process of its own: `python .ci/notebooks.py --flags "slow data" --workers 2 [NB ...]`.

A notebook that shares a process with others sees what they registered, and can pass or hang because of it. So the heavy
libraries are imported once, and every notebook gets a fork that has nothing else. Cells marked with one of `tst_flags`
of settings.ini are skipped unless --flags names the mark. A notebook that takes longer than --limit seconds has failed.
The random streams of Python, NumPy and torch start at --seed in every notebook: no assertion may need a certain one.
"""
import argparse, importlib, multiprocessing, random, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = (
    "torch", "torchvision", "transformers", "diffusers", "sklearn.datasets", "pandas", "seaborn", "matplotlib.pyplot",
    "nbdev.test")


def execute(path, flags, seed):
    import numpy, torch
    from nbdev.config import get_config
    from nbdev.test import test_nb
    for start in (random.seed, numpy.random.seed, torch.manual_seed): start(seed)
    done, _ = test_nb(path, get_config().tst_flags.split(), flags, basepath=get_config().config_path)
    sys.exit(not done)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    hidden = lambda p: any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)
    waiting = [p.resolve() for p in asked.notebooks] or sorted(
        p for p in (ROOT / "nbs").rglob("*.ipynb") if not hidden(p))
    for name in SHARED: importlib.import_module(name)
    running, failed, fork = {}, [], multiprocessing.get_context("fork")
    try:
        while waiting or running:
            while waiting and len(running) < asked.workers:
                path = waiting.pop(0)
                process = fork.Process(target=execute, args=(path, asked.flags.split(), asked.seed))
                process.start()
                running[path] = process, time.monotonic()
            for path, (process, since) in list(running.items()):
                took = time.monotonic() - since
                if process.is_alive() and took < asked.limit: continue
                late = process.is_alive()
                if late: process.kill()
                process.join(); del running[path]
                if process.exitcode: failed.append(path)
                verdict = f"FAILED: longer than {asked.limit:.0f} s" if late else "FAILED" if process.exitcode else "ok"
                print(f"{took:6.1f} s  {path.relative_to(ROOT)}  {verdict}", flush=True)
            time.sleep(.05)
    finally:
        for process, _ in running.values(): process.kill()
    if failed: sys.exit(f"{len(failed)} notebooks failed: {', '.join(str(p.relative_to(ROOT)) for p in failed)}")


if __name__ == "__main__": main()
