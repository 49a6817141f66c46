"""Look at a wheel: `python .ci/wheel.py dist [--tag v1.2.3]`.

Without a tag: install it in an environment of its own, without the development tools, prune a layer, list the methods.
With a tag: its version is the one that the tag names, so that no other version is published under it.
"""
import argparse, subprocess, sys, tempfile, venv
from pathlib import Path

PRUNE = "import torch; from pruning_bench import prune; print(prune(torch.nn.Linear(4, 4), 'magnitude', .5))"


def only_wheel(folder):
    wheels = sorted(Path(folder).glob("*.whl"))
    if len(wheels) != 1: sys.exit(f"{folder} holds {len(wheels)} wheels, not one: make clean wheel")
    return wheels[0].resolve()


def check_tag(wheel, tag):
    version = wheel.name.split("-")[1]
    if tag != f"v{version}": sys.exit(f"the wheel has version {version}, not {tag}: correct settings.ini or the tag")


def install_and_use(wheel):
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        def run(*words): subprocess.run([f"{folder}/bin/{words[0]}", *words[1:]], cwd=folder, check=True)
        run("python", "-m", "pip", "install", str(wheel))
        run("python", "-c", PRUNE)
        run("python", "-m", "pip", "install", f"{wheel}[bench]")
        run("pruning-bench", "methods")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tag")
    asked = parser.parse_args()
    wheel = only_wheel(asked.folder)
    check_tag(wheel, asked.tag) if asked.tag else install_and_use(wheel)
