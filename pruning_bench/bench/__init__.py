"The benchmark: tasks, measuring, runs, entries, the board and the command line. Needs the extra `bench`."


def main():
    "The command `pruning-bench`; without its libraries it says what to install."
    try: from pruning_bench.bench.cli import main as run
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == "pruning_bench": raise
        raise SystemExit(f"pruning-bench needs {e.name}, which is not installed: pip install 'pruning_bench[bench]'") from None
    run()
