"""From a finished run to a branch: what is prepared passes the checks where it is merged, what is refused leaves no
bundle and no branch, and names that anybody may choose stay names."""
import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pruning_bench import BadInput
from pruning_bench.bench import board as boards
from pruning_bench.bench.artefacts import artefact_path
from pruning_bench.bench.checks import check_files
from pruning_bench.bench.cli import app
from pruning_bench.bench.entry import entry_path, validate, write_json
from pruning_bench.bench.run import dense_run, make_entry, run_with_status
from pruning_bench.bench.stored_runs import committed_names, store_run, write_entry
from pruning_bench.bench.submit import branch_name, commit_branch, difference, git, open_run, submit
from pruning_bench.bench.task import find_task

NAME = "digits-mlp/magnitude--default"


def finished(method, folder):
    "A run of one seed, as a worker leaves it in the cache."
    task = find_task("digits-mlp")
    run, model, plan = run_with_status(task, method, .9, 0)
    run = store_run(task, method, {}, run, model, plan, folder/"artefacts")
    entry = make_entry(task, method, "default", {}, [dense_run(task, 0)], [run], "0" * 64)
    entry["provenance"].update(dirty=False, commit=None)   # this checkout may have changes
    write_json(entry, folder/"result.json")
    return entry


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Two finished runs."
    home = tmp_path_factory.mktemp("runs")
    return {m: (finished(m, home/m), home/m/"artefacts") for m in ("magnitude", "random")}


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    "A cache with a finished run, and a repository whose leaderboard has a random control."
    for name in [n for n in os.environ if n.startswith("GIT_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path/"cache"))
    put_run(tmp_path, made["magnitude"][0], made["magnitude"][1])
    repo = tmp_path/"repo"
    write_entry(*made["random"], repo/"leaderboard/entries")
    for command in ("init -q -b main", "config user.name A", "config user.email a@example.org", "add .",
                    "commit -q -m board"): git(repo, *command.split())
    monkeypatch.chdir(repo)
    return tmp_path


def put_run(home, entry, artefacts=None):
    "Put a run into the cache; a name that is a path stays in its folder."
    folder = home/"cache/runs/digits-mlp/magnitude--default--0123456789abcdef"
    write_json(entry, folder/"result.json")
    if artefacts and not (folder/"artefacts").exists(): (folder/"artefacts").symlink_to(artefacts)
    return folder/"result.json"


def changed(entry, change):
    other = copy.deepcopy(entry)
    change(other)
    return other


def state(home):
    "All files but the objects of git, with the time of their last change, and all branches."
    files = {p: p.is_dir() or p.lstat().st_mtime_ns for p in home.rglob("*")
             if "objects" not in p.parts and p.name != "index"}
    ran = subprocess.run(["git", "-C", home/"repo", "for-each-ref"], capture_output=True, text=True)
    return files, ran.stdout


def is_refused(home, words, name=NAME, **more):
    "One sentence, and everything is as it was."
    before = state(home)
    with pytest.raises(BadInput, match=words) as refused: submit(name, **more)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 2500
    assert state(home) == before


def test_a_finished_run_becomes_a_branch_that_passes_the_checks(place, made):
    before = state(place)[0]
    done = submit(NAME)
    new = set(state(place)[0]) - set(before)
    bundle = Path("submissions/digits-mlp/magnitude--default")
    assert done["branch"] == "submit/digits-mlp/magnitude--default" and done["text"] == bundle/"pull_request.md"
    assert all(p.is_relative_to(Path("submissions").absolute()) or "refs" in p.parts or "logs" in p.parts for p in new)
    assert git(".", "status", "--porcelain") == "?? submissions/" and git(".", "branch", "--show-current") == "main"
    merged = place/"merged"
    git(place, "clone", "-q", "-b", done["branch"], "repo", "merged")
    in_branch = {p.relative_to(merged/"leaderboard"): p.read_bytes() for p in (merged/"leaderboard").rglob("*.*")}
    assert {p.relative_to(bundle): p.read_bytes() for p in done["files"]}.items() <= in_branch.items()
    assert not [f for f in check_files([merged/"leaderboard/entries"], merged/"leaderboard")
                if f.fatal and "random" not in f.path]
    rows = boards.folder_rows(merged/"leaderboard")
    assert {"magnitude", "random"} == set(rows.method) and set(done["difference"].board) == set(rows.board)


def test_the_text_names_the_entry_the_difference_and_the_commands(place):
    done = submit(NAME)
    text = done["text"].read_text()
    assert text.startswith("Entry: magnitude (default) on digits-mlp\n")
    assert "pruning-bench verify leaderboard/entries/digits-mlp/magnitude--default.json --reproduce" in text
    assert all(str(v) in text for v in done["difference"].result) and "seeds-are-paired" in text
    assert str(place) not in text   # no path of this machine
    assert [c.split()[0] for c in done["commands"]] == ["git", "gh"]
    subprocess.run(["git", "clone", "-q", "--bare", ".", str(place/"origin")], check=True)
    git(".", "remote", "add", "origin", str(place/"origin"))
    subprocess.run(done["commands"][0], shell=True, check=True, capture_output=True)   # as printed
    assert git(place/"origin", "rev-parse", done["branch"]) == git(".", "rev-parse", done["branch"])


@pytest.mark.parametrize("name, words", [
    ("digits-mlp/magnitud--default", "did you mean digits-mlp/magnitude--default"), ("nothing", "finished run"),
    ("digits-mlp/magnitude", "finished run"), ("", "no JSON|result.json|finished run"), (".", "finished run"),
    ("../../etc/passwd", "finished run"), ("--help", "finished run"), ("a\nb", "finished run")])
def test_what_is_no_run_is_refused(place, name, words): is_refused(place, words, name)


@pytest.mark.parametrize("change, words", [
    (lambda e: e["provenance"].update(dirty=True), "provenance-is-complete"),
    (lambda e: e["dense"][0]["quality"].update(accuracy=.3), "dense-baseline"),
    (lambda e: e["runs"][0]["quality"]["after_recover"].update(accuracy=.97), "right answers"),
    (lambda e: e["runs"][0]["artefacts"].update(plan=None) or e["runs"][0]["size"].update(mask_density=.5), "sparsity"),
    (lambda e: e["runs"][0].update(plan="0" * 64), "not the one that the run names"),
    (lambda e: e["task"].update(digest="0" * 64), "task-is-frozen"), (lambda e: e.update(rank=1), "rank"),
    (lambda e: e["task"].update(name="gone"), "unknown task"), (lambda e: e.update(schema="entry.v9"), "entry.v9")])
def test_what_a_check_refuses_leaves_nothing(place, made, change, words):
    put_run(place, changed(made["magnitude"][0], change))
    is_refused(place, words)


def test_a_branch_or_a_folder_that_exists_is_kept(place):
    git(".", "branch", "submit/digits-mlp/magnitude--default")
    is_refused(place, "git branch -D")
    git(".", "branch", "-D", "submit/digits-mlp/magnitude--default")
    git(".", "branch", "submit")   # a branch cannot be a folder of branches too
    is_refused(place, "git update-ref failed")
    git(".", "branch", "-D", "submit")
    (place/"repo/mine").mkdir()
    (place/"repo/mine/notes.txt").write_text("keep")
    is_refused(place, "remove it", out="mine")
    is_refused(place, "cannot be written", out="mine/notes.txt/bundle")
    assert submit(NAME)["branch"]


def test_a_repository_that_cannot_commit_is_refused(place):
    for key in ("name", "email"): git(".", "config", "--unset", f"user.{key}")
    git(".", "config", "user.useConfigOnly", "true")
    is_refused(place, "git commit-tree failed")
    git(place, "init", "-q", "empty")
    git(place, "-C", "empty", "config", "user.name", "A")
    is_refused(place, "git read-tree failed", board=place/"empty")


def test_without_git_there_is_a_bundle_and_no_branch(place, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("bin")))
    with pytest.raises(BadInput, match="install it"): git(".", "status")
    done = submit(NAME)
    assert done["branch"] is None and done["commands"] == [] and all(f.is_file() for f in done["files"])
    assert [f for f in (place/"repo/.git/refs/heads").rglob("*") if f.is_file()] == [place/"repo/.git/refs/heads/main"]


def test_outside_of_a_repository_there_is_a_bundle_and_no_branch(place):
    done = submit(NAME, board=place/"elsewhere")
    assert done["branch"] is None and set(done["difference"].place) == {"1 of 1"}
    assert "verify elsewhere/entries/digits-mlp/" in done["text"].read_text()


HOSTILE = ["../magnitude", "..", "/etc/passwd", "a/b", "a\\b", "", "-x", "--exec=touch", "magnitude\n", "MAGNITUDE",
           "m\u0430gnitude", "$(touch x)", "a;b", "a" * 300, "not-registered"]


@pytest.mark.parametrize("name", HOSTILE)
def test_methods_whose_name_is_no_name_are_refused(place, made, name):
    put_run(place, changed(made["magnitude"][0], lambda e: e["method"].update(name=name)))
    is_refused(place, "plain name|not registered|markup|invisible")


@pytest.mark.parametrize("name", ["../../x", "..", "/etc", "digits-mlp/../x", "module:os", "digits-m\u217cp",
                                  "a" * 300])
def test_tasks_whose_name_is_no_name_are_refused(place, made, name):
    put_run(place, changed(made["magnitude"][0], lambda e: e["task"].update(name=name)))
    is_refused(place, "unknown")


@pytest.mark.parametrize("variant", ["../../a", "a | b", "a\nb", "`x`", "[a](http://x)", "<b>", "a\u202eb", "",
                                     "a" * 201])
def test_variants_that_are_no_names_are_refused(place, made, variant):
    put_run(place, changed(made["magnitude"][0], lambda e: e["method"].update(variant=variant)))
    is_refused(place, "plain name|markup|invisible|shorter")


@pytest.mark.parametrize("variant", ["a..b", "x.lock", "a/../../b", "2:4, tuned", "(x) *", "it's", "a@{0}"])
def test_other_variants_are_one_file_and_one_branch(place, made, variant):
    entry = changed(made["magnitude"][0], lambda e: e["method"].update(variant=variant))
    done = submit(str(put_run(place, entry)), "bundle")
    git(".", "check-ref-format", "--branch", done["branch"])
    changed_files = git(".", "diff", "--name-only", "main", done["branch"]).splitlines()
    assert all(f.startswith("leaderboard/") and ".." not in Path(f).parts for f in changed_files)
    assert sum(f.startswith("leaderboard/entries/digits-mlp/magnitude--") for f in changed_files) == 1
    assert {p.name for p in place.iterdir()} == {"cache", "repo"}


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\x80\x04.", b"{", b"[" * 100_000, b'{"a": 1, "a": 2}',
                                  b'{"schema": NaN}'])
def test_results_that_are_no_entries_are_refused(place, data):
    put_run(place, {}).write_bytes(data)
    is_refused(place, ".")


def test_an_artefact_of_another_content_is_refused(place, made):
    entry, source = made["magnitude"]
    folder = put_run(place, entry).parent
    (folder/"artefacts").unlink()
    (folder/"artefacts").mkdir()
    sha = entry["runs"][0]["artefacts"]["outcomes"]
    artefact_path(folder/"artefacts", sha).write_bytes(artefact_path(source, sha).read_bytes() + b"x")
    is_refused(place, "another content")


def test_an_entry_that_replaces_another_takes_its_artefacts_along(place, made):
    "Those that another entry commits too stay."
    first = submit(NAME)
    git(".", "merge", "-q", first["branch"])
    outcomes = made["magnitude"][0]["runs"][0]["artefacts"]["outcomes"]
    newer = changed(made["magnitude"][0], lambda e: e["runs"][0]["artefacts"].update(outcomes=None))
    git(".", "branch", "-D", first["branch"])
    done = submit(str(put_run(place, newer)), "again")
    assert set(done["difference"].before) == set(done["difference"].result)
    said = git(".", "diff", "--name-status", "main", done["branch"]).splitlines()
    assert sorted(s.split("\t") for s in said) == [
        ["D", f"leaderboard/artefacts/{outcomes}.safetensors"],
        ["M", "leaderboard/entries/digits-mlp/magnitude--default.json"]]
    twin = changed(made["magnitude"][0], lambda e: e["method"].update(variant="twin"))
    write_json(twin, entry_path("leaderboard/entries", twin))
    git(".", "branch", "-D", done["branch"])
    third = submit(str(put_run(place, newer)), "third")
    assert git(".", "diff", "--name-only", "main", third["branch"]).split() == [
        "leaderboard/entries/digits-mlp/magnitude--default.json"]


def test_an_entry_that_the_repository_has_is_no_submission(place):
    git(".", "merge", "-q", submit(NAME)["branch"])
    git(".", "branch", "-D", branch_name(open_run(NAME)[0]))
    entry = "leaderboard/entries/digits-mlp/magnitude--default.json"
    is_refused(place, "has this entry already", entry, out="other")


def test_an_entry_without_numbers_changes_no_row(place, made):
    def fail(e):
        e["runs"][0].update(status="infeasible", message="no", size=None, cost=None, plan=None, speed=None,
                            quality={"after_prune": None, "after_recover": None},
                            artefacts=dict.fromkeys(e["runs"][0]["artefacts"]))
    entry = changed(made["magnitude"][0], fail)
    assert validate(entry) and not committed_names(entry)
    done = submit(str(put_run(place, entry)))
    assert list(done["difference"].columns) and all(done["difference"].before == "new")


def test_runs_of_other_code_are_said_to_be_stale(place, made):
    entry = changed(made["magnitude"][0], lambda e: e["runs"][0].update(code="0" * 64))
    assert "code-is-todays" in submit(str(put_run(place, entry)), "old")["text"].read_text()
    git(".", "branch", "-D", branch_name(entry))
    assert "code-is-todays" not in submit(str(put_run(place, made["magnitude"][0])), "new")["text"].read_text()


def test_the_difference_counts_each_method_once(place, made):
    entry, artefacts = made["magnitude"]
    first = difference(entry, "leaderboard")
    write_entry(entry, artefacts, "leaderboard/entries")
    again = difference(entry, "leaderboard")
    assert set(first.place.str[-4:]) == {"of 2"} == set(again.place.str[-4:])
    assert set(first.before) == {"new"} and list(again.before) == list(again.result)


def test_entries_that_lie_outside_of_the_repository_are_refused(place):
    (place/"repo/leaderboard/entries").rename(place/"entries")
    (place/"repo/leaderboard/entries").symlink_to(place/"entries")
    is_refused(place, "not in the repository")


def test_a_commit_changes_nothing_but_its_branch(place):
    (place/"repo/staged.txt").write_text("x")
    git(".", "add", "staged.txt")
    before = git(".", "status", "--porcelain"), git(".", "rev-parse", "HEAD"), (place/"repo/.git/index").read_bytes()
    (place/"new.txt").write_text("y")
    commit_branch(Path(".").resolve(), "other", {"a/b.txt": place/"new.txt"}, "A title")
    assert before == (git(".", "status", "--porcelain"), git(".", "rev-parse", "HEAD"),
                      (place/"repo/.git/index").read_bytes())
    assert git(".", "show", "--format=%s", "--name-only", "other").split("\n") == ["A title", "", "a/b.txt"]


def test_on_the_command_line(place):
    done = CliRunner().invoke(app, ["submit", NAME, "--out", "bundle"])
    assert done.exit_code == 0 and "git push origin submit/digits-mlp/magnitude--default" in done.stdout
    assert json.loads(Path("bundle/entries/digits-mlp/magnitude--default.json").read_text())["schema"] == "entry.v4"
    assert isinstance(CliRunner().invoke(app, ["submit", NAME, "--out", "bundle"]).exception, BadInput)
    bare = CliRunner().invoke(app, ["submit", NAME, "--out", "bare", "--folder", str(place/"elsewhere")])
    assert bare.exit_code == 0 and "no repository" in bare.stdout
