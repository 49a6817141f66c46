"""Mutation pass: change one constant or operator of a module and see whether its tests fail. Not run by `make test`.

python tests/mutants.py core/allocate weight/dynamic_sparse [--function NAME] [--sample N] [--seed S] [--no-lesson]

A mutant that the mirrored test files leave alive is also tried against the lesson of its module. Prints the survivors
and ends with status 1 where there are some. One process per mutant, forked after the imports, one at a time.
"""
import argparse
import ast
import importlib
import importlib.abc
import importlib.util
import io
import json
import os
import random
import re
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM = ("numpy", "pandas", "pytest", "torch", "safetensors.torch", "tqdm", "IPython.display", "sklearn.datasets",
        "sklearn.model_selection", "matplotlib.pyplot", "torchvision")   # imported once, before the forks
SHARED = {"core": "tests/core/test_core.py"}   # tests of a family, for modules without a mirrored file
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
             ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or,
             ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
             ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
NAMES = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "any": "all", "all": "any"}


def other_constant(value):
    "Another number or truth value; None for what is neither."
    if isinstance(value, bool): return not value
    if isinstance(value, int): return value + 1
    return value * 2 if isinstance(value, float) and value else None


def changes_of(node):
    "Functions that change one node, each with the text of the change."
    if isinstance(node, ast.Constant) and (new := other_constant(node.value)) is not None:
        yield f"{node.value!r} -> {new!r}", lambda: setattr(node, "value", new)
    op = node.ops[0] if isinstance(node, ast.Compare) else getattr(node, "op", None)
    if type(op) in OPERATORS:
        new = OPERATORS[type(op)]()
        def swap():
            if isinstance(node, ast.Compare): node.ops[0] = new
            else: node.op = new
        yield f"{type(op).__name__} -> {type(new).__name__}", swap
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        yield f"drop {type(node.op).__name__}", lambda: setattr(node, "op", ast.UAdd()) if not isinstance(
            node.op, ast.Not) else setattr(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "negate the condition", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    field = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node))
    if field and getattr(node, field) in NAMES:
        new_name = NAMES[getattr(node, field)]
        yield f"{getattr(node, field)} -> {new_name}", lambda: setattr(node, field, new_name)


def visited(node, inside=""):
    "Nodes whose value decides something, with the name of the function around them: no messages, types or cards."
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)): return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): inside = inside or node.name
    yield node, inside
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"): continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST): yield from visited(child, inside)


class Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Imports one module from a syntax tree."
    def __init__(self, name, path, tree): self.name, self.path, self.tree = name, path, tree
    def find_spec(self, name, path=None, target=None):
        if name == self.name: return importlib.util.spec_from_file_location(name, self.path, loader=self)
    def create_module(self, spec): return None
    def exec_module(self, module): exec(compile(self.tree, self.path, "exec"), vars(module))


def run_lesson(module, notebook):
    "Run the cells of a lesson that a test run would run; those that are exported come from the module."
    names = dict(vars(importlib.import_module(module)), __name__="__main__")
    for cell in json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        marks = " ".join(re.findall(r"^#\s*\|\s*(.+?)\s*$", source, re.M))
        skipped = re.search(r"\b(export|exporti|default_exp|slow|gpu|net|data)\b|eval: false", marks)
        if cell["cell_type"] == "code" and not skipped: exec(compile(source, "lesson", "exec"), names)


def survives(name, path, tree, change, check, limit):
    "Whether a check passes with a changed module, in a process of its own; a check that outlasts its limit fails."
    child = os.fork()
    if not child:
        code = 1
        try:
            sys.meta_path.insert(0, Replaced(name, str(path), tree))
            if change: change()
            ast.fix_missing_locations(tree)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()): code = int(check())
        except BaseException: code = 1   # whatever the change breaks is noticed
        finally: os._exit(code)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status) == 0
        time.sleep(.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def mutate(module, args):
    "Try the mutants of one module; returns the lines about survivors and the number of mutants."
    import pytest
    family, stem = module.split("/")
    path, name = ROOT / "pruning_bench" / f"{module}.py", f"pruning_bench.{family}.{stem}"
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    files = [f for f in (f"tests/{family}/test_{stem}.py", SHARED.get(family, "")) if (ROOT / f).is_file()][:1]
    if not files: sys.exit(f"{module}: there is no tests/{family}/test_{stem}.py")
    tests = lambda: pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])   # noqa: E731
    notebook = (path.parent / re.search(r"File to edit: (\S+\.ipynb)", text)[1]).resolve()
    lesson = lambda: run_lesson(name, notebook) or 0   # noqa: E731
    checks, limits = [tests] + [lesson] * args.lesson, []
    for check in checks:
        began = time.monotonic()
        if not survives(name, path, tree, None, check, 900): sys.exit(f"{module}: the check fails without any change")
        limits.append(30 + 6 * (time.monotonic() - began))
    mutants = [(node, inside, *change) for node, inside in visited(tree) for change in changes_of(node)
               if getattr(node, "lineno", 0) and (not args.function or inside in args.function)]
    chosen = random.Random(args.seed).sample(mutants, min(args.sample or len(mutants), len(mutants)))
    print(f"{module}: {len(chosen)} of {len(mutants)} mutants, against {', '.join(files)}"
          + (" and the lesson" if args.lesson else ""), flush=True)
    alive = []
    for node, inside, what, change in sorted(chosen, key=lambda m: m[0].lineno):
        if all(survives(name, path, tree, change, *c) for c in zip(checks, limits)):
            alive.append(f"  {module}.py:{node.lineno} {inside}: {what}   | {lines[node.lineno - 1].strip()}")
            print(alive[-1], flush=True)
    return alive, len(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", help="such as core/allocate")
    parser.add_argument("--function", action="append", help="only mutants inside this function or class")
    parser.add_argument("--sample", type=int, help="number of mutants per module; all of them if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--no-lesson", dest="lesson", action="store_false", help="only the test files")
    args = parser.parse_args()
    for name in WARM: importlib.import_module(name)
    found = [mutate(module, args) for module in args.modules]
    alive = sum(len(a) for a, _ in found)
    print(f"{alive} of {sum(n for _, n in found)} mutants survive")
    return bool(alive)


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    sys.exit(main())
