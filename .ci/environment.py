"""Make the environment that the Makefile uses complete: `python3 .ci/environment.py PATH`.

A missing environment is created and gets this project with its development tools. An existing one is left alone when it
already has what settings.ini asks for, and otherwise gets only what it lacks. PATH/.pruning_bench records what was
done: creating | created | created DIGEST | found DIGEST; an interrupted run goes on where that file says it stopped.
Standard library only: it runs before anything is installed.
"""
import configparser, fcntl, hashlib, os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MISSING = """
import sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
def absent(text):
    want = Requirement(text)
    if want.marker and not want.marker.evaluate(): return False
    try: return not want.specifier.contains(version(want.name), prereleases=True)
    except PackageNotFoundError: return True
print("\\n".join(r for r in sys.argv[1:] if absent(r)))
"""


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def digest(cfg):
    text = "\n".join(cfg[k] for k in ("requirements", "bench_requirements", "dev_requirements", "console_scripts"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def create(venv, state, min_python):
    if sys.version_info < tuple(map(int, min_python.split("."))):
        sys.exit(
            f"pruning_bench needs Python {min_python} or newer, this is {sys.version.split()[0]}: make "
            "PYTHON=python3.12 ...")
    state.write_text("creating")
    for old in set(venv.iterdir()) - {state}:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    print(f"Creating {venv} (once; PyTorch and its libraries take several GB and a few minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    state.write_text("created")


def half_installed(venv):
    "Metadata folders without a RECORD: pip was stopped inside these packages, and would take them for complete."
    return [d for d in venv.glob("lib/python*/site-packages/*.dist-info") if not (d/"RECORD").exists()]


def complete(venv, cfg, done):
    python, state = venv/"bin/python", venv/".pruning_bench"
    if not any(venv.iterdir()) or (state.exists() and state.read_text() == "creating"):
        create(venv, state, cfg["min_python"])
    if not python.exists(): sys.exit(f"{venv} is not a virtual environment: name another with VENV=path, or remove it")
    kind = state.read_text().split()[0] if state.exists() else "found"
    if kind == "created":
        for folder in half_installed(venv): shutil.rmtree(folder)
        subprocess.run([python, "-m", "pip", "install", "-e", f"{ROOT}[dev]"], check=True)
    else:
        wanted = " ".join(cfg[k] for k in ("requirements", "bench_requirements", "dev_requirements")).split()
        lacking = subprocess.run(
            [python, "-c", MISSING, *wanted], check=True, text=True, stdout=subprocess.PIPE
        ).stdout.split()
        if lacking: subprocess.run([python, "-m", "pip", "install", *lacking], check=True)
    if os.access(venv, os.W_OK): state.write_text(f"{kind} {done}")


def main():
    venv, cfg = Path(sys.argv[1]).absolute(), settings()
    state, done = venv/".pruning_bench", digest(cfg)
    def ready(): return state.exists() and state.read_text().endswith(f" {done}") and (venv/"bin/python").exists()
    if ready(): return
    os.environ.pop("PYTHONPATH", None)
    venv.mkdir(parents=True, exist_ok=True)
    lock = os.open(venv, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not ready(): complete(venv, cfg, done)


if __name__ == "__main__":
    try: main()
    except KeyboardInterrupt: sys.exit("Interrupted: the same command goes on from here.")
    except subprocess.CalledProcessError as e:
        sys.exit(
            f"The environment is not complete ({' '.join(map(str, e.cmd[1:4]))} failed, see above): the same "
            "command tries again.")
