"""The nightly repetition: `shards`, `reproduce TASK OUT DEVICE` and `commit RECEIPTS`.

`shards` names the tasks that have entries; each is a job. `reproduce` makes the entries of one task again from
nothing, keeps the executed notebooks in OUT/notebooks and the receipts in OUT/receipts. `commit` takes receipts of all
shards that are valid and about an entry of this checkout, and commits those that say something new. With PUSH=1 it
pushes them.
"""
import json, os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOARD = ROOT/"leaderboard"
BOT = ("-c", "user.name=github-actions[bot]", "-c", "user.email=github-actions[bot]@users.noreply.github.com")


def shards():
    "Write `tasks=[...]` where the workflow reads outputs, and print it."
    names = sorted(p.name for p in (BOARD/"entries").iterdir() if any(p.glob("*.json")))
    line = f"tasks={json.dumps(names)}"
    if path := os.environ.get("GITHUB_OUTPUT"):
        with open(path, "a") as f: f.write(line + "\n")
    print(line)


def reproduce(task, out, device):
    "Exit code 1 where a number disagrees."
    from pruning_bench.bench import runner
    from pruning_bench.bench.checks import open_entry
    from pruning_bench.bench.verify import (entry_digest, job_of, make_receipt, read_receipts, receipts_table,
                                            write_receipt)
    if (BOARD/"entries"/task).resolve().parent != (BOARD/"entries").resolve(): sys.exit(f"{task} is no task")
    cache, out = Path(out).resolve()/"cache", Path(out).resolve()
    if cache.exists(): sys.exit(f"{cache} exists: a repetition starts from nothing")
    os.environ["PRUNING_BENCH_CACHE"] = str(cache)
    entries = [open_entry(p, BOARD/"entries") for p in sorted((BOARD/"entries"/task).glob("*.json"))]
    jobs, known = [job_of(e, device) for e in entries], read_receipts(BOARD/"receipts")
    found = runner.run_jobs(jobs, 1)
    receipts = [make_receipt(e, found[j.name], known.get(entry_digest(e), ())) for e, j in zip(entries, jobs)]
    for entry, job, receipt in zip(entries, jobs, receipts):
        write_receipt(receipt, entry, out/"receipts")
        notebook, target = job.folder()/"notebook.ipynb", out/"notebooks"/f"{job.folder().name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        if notebook.exists(): shutil.copyfile(notebook, target)
    print(receipts_table(receipts).to_string())
    sys.exit(not all(r["agrees"] for r in receipts))


def content(receipt): return {k: v for k, v in receipt.items() if k not in ("date", "machine")}


def commit(folder):
    from pruning_bench.bench.entry import read_entries
    from pruning_bench.bench.strict_json import read_strict
    from pruning_bench.bench.verify import entry_digest, read_receipts, receipt_path, write_receipt
    entries = {entry_digest(e): e for e in read_entries(BOARD/"entries")}
    new = 0
    for digest, receipts in read_receipts(folder).items():   # raises for what is no receipt
        for receipt in receipts:
            if digest not in entries: print(f"{receipt['task']}/{receipt['method']}: its entry has changed"); continue
            place = receipt_path(BOARD/"receipts", receipt, entries[digest])
            if place.is_file() and content(read_strict(place, BOARD/"receipts")) == content(receipt): continue
            write_receipt(receipt, entries[digest], BOARD/"receipts")
            new += 1
    print(f"{new} receipts say something new")
    if not new: return
    def git(*words): subprocess.run(["git", *BOT, *words], cwd=ROOT, check=True)
    git("add", "--", "leaderboard/receipts")
    git("commit", "-m", f"Receipts of {new} repetitions", "--", "leaderboard/receipts")
    if os.environ.get("PUSH") == "1": git("push")


if __name__ == "__main__": {"shards": shards, "reproduce": reproduce, "commit": commit}[sys.argv[1]](*sys.argv[2:])
