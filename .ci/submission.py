"""Check a submission with the code of this checkout: `python .ci/submission.py SUBMISSION OUT`.

SUBMISSION is a checkout of the branch that is submitted. Nothing in it is imported or executed: its entries and
artefacts are copied beside the board of this checkout, into OUT, and looked at there. OUT/comparison.md says what the
entries change on the board. Exit code 2 where the submission is refused.
"""
import filecmp, json, shutil, sys
from pathlib import Path

from pruning_bench import BadInput
from pruning_bench.bench.artefacts import MOST_ARTEFACT_BYTES
from pruning_bench.bench.board import check_pages
from pruning_bench.bench.board_text import to_markdown
from pruning_bench.bench.checks import check_files, open_entry
from pruning_bench.bench.submit import difference

ROOT = Path(__file__).resolve().parent.parent
BROUGHT = ("leaderboard/entries/", "leaderboard/artefacts/", "leaderboard/tasks/")   # what a submission brings
TABLES = ("README.md", "leaderboard/README.md", "leaderboard/figures/")   # made by `board`
MOST_FILES = 2_000


def files(root):
    "Everything below the board that is no folder, and the page that shows it; links are listed, not followed."
    found = [root/"README.md", *(root/"leaderboard").rglob("*")]
    names = {p.relative_to(root).as_posix() for p in found if p.is_symlink() or p.exists() and not p.is_dir()}
    return {n for n in names if not n.startswith(("leaderboard/site/", "leaderboard/runs/"))}


def same(a, b):
    if a.is_symlink() or b.is_symlink() or not (a.is_file() and b.is_file()): return False
    return filecmp.cmp(a, b, shallow=False)


def changes(base, head):
    "Paths that were added, changed or removed, sorted."
    old, new = files(base), files(head)
    return sorted((old ^ new) | {n for n in old & new if not same(base/n, head/n)})


def refuse_places(changed, base):
    "Raise `BadInput` for a change that a submission may not make."
    if len(changed) > MOST_FILES: raise BadInput(f"{len(changed):,} files are changed: at most {MOST_FILES:,} are read")
    for name in changed:
        what = ascii(name)[:200]
        if name.startswith("leaderboard/receipts/"):
            raise BadInput(f"{what} is a receipt: receipts are written by those who verify, leave it out")
        if name.startswith("leaderboard/tasks/") and (base/name).exists():
            raise BadInput(f"{what} is a frozen protocol: leave it as it is")
        if not name.startswith(BROUGHT + TABLES): raise BadInput(f"{what} is no part of a submission: leave it out")


def lay_over(base, head, changed, out):
    "The board of this checkout with the changes of the submission."
    ignored = shutil.ignore_patterns("site", "runs")
    shutil.copytree(base/"leaderboard", out/"leaderboard", ignore=ignored)
    shutil.copyfile(base/"README.md", out/"README.md")
    for name in changed:
        source, target = head/name, out/name
        if not (source.is_symlink() or source.exists()): target.unlink(); continue
        what = ascii(name)[:200]
        if source.is_symlink() or not source.is_file(): raise BadInput(f"{what} is no file: submit the file itself")
        if (size := source.stat().st_size) > MOST_ARTEFACT_BYTES:
            raise BadInput(f"{what} has {size:,} bytes: at most {MOST_ARTEFACT_BYTES:,} are read")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def comparison(base, out, changed):
    "What the entries of a submission change on the board, as Markdown."
    text = ["What this submission changes on the board, counted from its entries by the code of the main branch.", ""]
    for name in (n for n in changed if n.startswith("leaderboard/entries/")):
        short = name.removeprefix("leaderboard/entries/")
        if not (out/name).exists(): text += [f"`{short}` is removed.", ""]; continue
        table = difference(open_entry(out/name, out/"leaderboard"/"entries"), base/"leaderboard", out/"leaderboard")
        text += [f"`{short}`", "", to_markdown(table) if len(table) else "No row of a board.", ""]
    return "\n".join(text)


def review(base, head, out):
    "Check a submission and write the comparison; raises `BadInput` where it is refused."
    changed = changes(base, head)
    refuse_places(changed, base)
    lay_over(base, head, changed, out)
    found = check_files([out/"leaderboard"/"entries"], out/"leaderboard")
    mine = [f for f in found if f.fatal or Path(f.path).relative_to(out).as_posix() in changed]
    print(*(str(f).replace(f"{out}/", "") + (" (remark)" if not f.fatal else "") for f in mine), sep="\n")
    refused = sum(f.fatal for f in found)
    if refused: raise BadInput(f"{refused} findings refuse the submission: see the lines above")
    if any(n.startswith(TABLES) for n in changed):
        print(check_pages(out/"leaderboard", out/"README.md", base/"nbs"/"index.ipynb"), "rows follow from the entries")
    (out/"comparison.md").write_text(comparison(base, out, changed), encoding="utf-8")
    print(json.dumps({"changed": len(changed), "comparison": str(out/"comparison.md")}))


if __name__ == "__main__":
    head, out = (Path(a).resolve() for a in sys.argv[1:3])
    try: review(ROOT, head, out)
    except BadInput as e: print(f"submission: {e}", file=sys.stderr); sys.exit(2)
