"""The workflows: linted, with no more rights than they need, and made of commands of the Makefile, which run here."""
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from pruning_bench import BadInput
from pruning_bench.bench.board import BEGIN_MARKER, END_MARKER, publish

ROOT = Path(__file__).resolve().parents[2]
FLOWS = {p.stem: p for p in sorted((ROOT/".github"/"workflows").glob("*.yml"))}
FORMS = sorted((ROOT/".github"/"ISSUE_TEMPLATE").glob("*.yml"))
WRITES = {("comment", "comment"): {"pull-requests"}, ("bench", "receipts"): {"contents"},
          ("release", "publish"): {"id-token"}, ("docs", "publish"): {"pages", "id-token"}}   # and nothing else


def script(name):
    "A script of the folder .ci, as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT/".ci"/f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flow(name): return yaml.load(FLOWS[name].read_text(encoding="utf-8"), yaml.BaseLoader)   # `on` stays a word
def jobs(): return [(name, job, facts) for name in FLOWS for job, facts in flow(name)["jobs"].items()]
def steps(): return [(name, job, s) for name, job, facts in jobs() for s in facts["steps"]]
def targets(): return set(re.findall(r"^([a-z-]+):", (ROOT/"Makefile").read_text(encoding="utf-8"), re.M))


# linters

@pytest.mark.parametrize("kind, paths", [("github-workflows", [*FLOWS.values()]), ("github-issue-forms", FORMS)])
def test_schemas_accept_workflows_and_forms(kind, paths):
    pytest.importorskip("check_jsonschema")
    said = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{kind}", *paths],
                          capture_output=True, text=True)
    assert paths and said.returncode == 0, said.stdout


def test_the_schema_refuses_a_workflow_that_is_none(tmp_path):
    pytest.importorskip("check_jsonschema")
    (tmp_path/"x.yml").write_text("on: push\njobs: {a: {runs-on: x, steps: [{run: true, use: y}]}}\n")
    said = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows",
                           tmp_path/"x.yml"], capture_output=True)
    assert said.returncode == 1


def test_an_audit_finds_no_way_in():
    "zizmor knows injections, stored credentials, unpinned actions, poisoned caches, triggers with too many rights."
    tool = shutil.which("zizmor", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not tool: pytest.skip("zizmor is not installed: make env")
    said = subprocess.run([tool, "--offline", "--no-progress", ROOT/".github"/"workflows"], capture_output=True,
                          text=True)
    assert said.returncode == 0, said.stdout


# rights

@pytest.mark.parametrize("name", FLOWS)
def test_a_workflow_starts_with_no_right_to_write(name):
    rights = flow(name)["permissions"]
    assert set(rights.items()) <= {("contents", "read")}


def test_only_four_jobs_may_write_and_each_in_one_place():
    granted = {(n, j): {k for k, v in facts.get("permissions", {}).items() if v == "write"} for n, j, facts in jobs()}
    assert {k: v for k, v in granted.items() if v} == WRITES


def test_no_job_with_rights_sees_the_code_of_a_pull_request():
    assert not any("pull_request_target" in flow(name)["on"] for name in FLOWS)
    for name, job, step in steps():
        if not step.get("uses", "").startswith("actions/checkout@"): continue
        given = step.get("with", {})
        assert "head" not in given.get("ref", "") and "repository" not in given
        assert given["persist-credentials"] == ("true" if (name, job) == ("bench", "receipts") else "false")
    assert {n for n in FLOWS if "pull_request" in flow(n)["on"]} == {"ci", "docs", "leaderboard"}
    published = flow("docs")["jobs"]["publish"]
    assert "github.event_name != 'pull_request'" in published["if"] and "actions/checkout" not in str(published)


def test_a_submission_is_checked_by_the_code_of_the_main_branch():
    checkouts = [s["with"] for n, j, s in steps() if (n, j) == ("leaderboard", "submission")
                 and s.get("uses", "").startswith("actions/checkout@")]
    assert [c.get("path") for c in checkouts] == [None, "submission"]
    assert checkouts[0]["ref"] == "${{ github.event.pull_request.base.sha }}" and "ref" not in checkouts[1]


def test_actions_are_pinned_to_a_commit_and_say_their_version():
    lines = [line for p in FLOWS.values() for line in p.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert len(lines) == sum("uses" in s for _, _, s in steps())
    assert all(re.search(r"uses: [\w.-]+(/[\w.-]+)+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) for line in lines), lines


# steps are commands of the Makefile

@pytest.mark.parametrize("name, job, step", [s for s in steps() if "run" in s[2]],
                         ids=lambda v: v.get("name", v["run"]) if isinstance(v, dict) else v)
def test_a_step_is_a_command_that_exists(name, job, step):
    if step["run"] == ".ci/run": return
    first, *words = step["run"].split()
    assert first == "make" and "\n" not in step["run"].strip()
    assert [w for w in words if "=" not in w] and {w for w in words if "=" not in w} <= targets()
    assert "${{" not in step["run"], "an expression in a command is an injection: pass it by `env`"


def test_each_job_has_a_time_limit():
    assert all(0 < int(facts["timeout-minutes"]) <= 600 for _, _, facts in jobs())


@pytest.mark.parametrize("target", ["check-entries", "check-board", "check-submission", "comment", "shards",
                                    "reproduce", "commit-receipts", "wheel", "check-wheel", "check-tag"])
def test_commands_of_workflows_call_a_script_that_is_there(target):
    said = subprocess.run(["make", "-n", target, "VENV=none", "SUBMISSION=a", "OUT=b"], cwd=ROOT, capture_output=True,
                          text=True)
    assert said.returncode == 0, said.stderr
    assert all((ROOT/p).is_file() for p in re.findall(r"\.ci/\w+\.py", said.stdout))
    assert any(f"make {target}" in s.get("run", "") for _, _, s in steps())


def test_owners_guard_what_a_submission_may_not_bring():
    owned = {line.split()[0] for line in (ROOT/".github"/"CODEOWNERS").read_text().splitlines() if line[:1] == "/"}
    assert owned >= {"/leaderboard/receipts/", "/leaderboard/tasks/", "/.github/", "/.ci/"}
    assert all((ROOT/p[1:]).exists() for p in owned)


# a submission

@pytest.fixture
def trees(tmp_path, monkeypatch):
    "A checkout of the main branch with an entry, and a submission that brings nothing yet."
    from test_checks import honest
    from pruning_bench.bench.entry import entry_path, write_json
    from pruning_bench.bench.protocol_files import frozen_protocol
    from pruning_bench.bench.task import find_task
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path/"cache"))
    base, head = tmp_path/"base", tmp_path/"head"
    protocol = frozen_protocol(find_task("digits-mlp"))
    entry = honest(protocol)
    write_json(protocol, base/"leaderboard"/"tasks"/"digits-mlp.json")
    control = {**entry, "method": {**entry["method"], "name": "random"}}
    for e in (entry, control): write_json(e, entry_path(base/"leaderboard"/"entries", e))
    (base/"README.md").write_text(f"{BEGIN_MARKER}\n{END_MARKER}\n")
    shutil.copytree(base, head)
    return base, head, entry


def submit(head, entry, **method):
    from pruning_bench.bench.entry import entry_path, write_json
    other = {**entry, "method": {**entry["method"], **method}}
    return write_json(other, entry_path(head/"leaderboard"/"entries", other))


def test_a_submission_is_compared_with_the_board(trees, tmp_path, capsys):
    base, head, entry = trees
    place, out, review = submit(head, entry, name="wanda"), tmp_path/"out", script("submission").review
    (head/"pruning_bench").mkdir()
    (head/"pruning_bench"/"__init__.py").write_text("raise SystemExit('executed')")   # code is not even looked at
    review(base, head, out)
    text = (out/"comparison.md").read_text()
    assert f"`digits-mlp/{place.name}`" in text and text.count("| new |") == 4   # two sparsities on two boards
    assert script("comment").plain_comparison(out/"comparison.md") == text
    assert not (base/"leaderboard"/"entries"/"digits-mlp"/place.name).exists()


def receipt(head, entry):
    from pruning_bench.bench.verify import make_receipt, write_receipt
    submit(head, entry, name="wanda"); write_receipt(make_receipt(entry, entry), entry, head/"leaderboard"/"receipts")


def put(name, text):
    def change(head, entry): (head/name).parent.mkdir(parents=True, exist_ok=True); (head/name).write_text(text)
    return change


def link(head, entry):
    (head/"leaderboard"/"entries"/"digits-mlp"/"wanda--default.json").symlink_to("/etc/hostname")


def large(head, entry):
    with open(head/"leaderboard"/"entries"/"digits-mlp"/"wanda--default.json", "wb") as f: f.truncate(10**9)


def false(head, entry): submit(head, {**entry, "dense": [{**d, "quality": {"accuracy": .2}} for d in entry["dense"]]})
def protocol(head, entry): put("leaderboard/tasks/digits-mlp.json", "{}")(head, entry)


@pytest.mark.parametrize("change, word", [(receipt, "receipt"), (protocol, "protocol"), (link, "no file"),
    (large, "bytes"), (false, "findings"), (put("leaderboard/schema/entry.v9.json", "{}"), "no part"),
    (put("leaderboard/entries/digits-mlp/run.sh", "touch hacked"), "findings"),
    (put("leaderboard/artefacts/x.safetensors", "x"), "findings"),
    (put("README.md", f"{BEGIN_MARKER}\n1. ours\n{END_MARKER}\n"), "follow")])
def test_what_a_submission_may_not_bring_is_refused(trees, tmp_path, change, word):
    base, head, entry = trees
    change(head, entry)
    with pytest.raises(BadInput, match=word) as refused: script("submission").review(base, head, tmp_path/"out")
    assert "\n" not in str(refused.value) and not (tmp_path/"out"/"comparison.md").exists()


def test_tables_that_follow_from_the_entries_are_accepted(trees, tmp_path, capsys):
    base, head, entry = trees
    submit(head, entry, name="wanda")
    publish(head/"leaderboard", head/"README.md", head/"nbs"/"index.ipynb")
    shutil.copytree(head/"leaderboard"/"schema", base/"leaderboard"/"schema", dirs_exist_ok=True)
    script("submission").review(base, head, tmp_path/"out")
    assert "12 rows follow from the entries" in capsys.readouterr().out


def test_a_submission_that_removes_an_entry_says_so(trees, tmp_path):
    base, head, entry = trees
    (head/"leaderboard"/"entries"/"digits-mlp"/"magnitude--default.json").unlink()
    script("submission").review(base, head, tmp_path/"out")
    assert "is removed" in (tmp_path/"out"/"comparison.md").read_text()


# the comment

@pytest.fixture
def site(monkeypatch):
    "What the interface of the site is asked, and two pull requests of one branch."
    asked, comments = [], []

    class Site(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words): pass

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append((self.command, self.path, json.loads(body or b"null"), self.headers["Authorization"]))
            pulls = [{"number": n, "head": {"sha": sha}} for n, sha in ((7, "a" * 40), (8, "b" * 40))]
            found = pulls if "/pulls?" in self.path else comments if self.command == "GET" else {}
            data = json.dumps(found).encode()
            self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers()
            self.wfile.write(data)
        do_GET = do_POST = do_PATCH = answer
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in dict(GITHUB_API_URL=f"http://127.0.0.1:{server.server_port}", GITHUB_REPOSITORY="o/r",
                            GITHUB_TOKEN="t", HEAD_OWNER="a b", HEAD_BRANCH="x&y", HEAD_SHA="b" * 40).items():
        monkeypatch.setenv(name, value)
    yield asked, comments
    server.shutdown()
    server.server_close()


def test_a_comment_is_posted_once_and_then_renewed(site, tmp_path):
    asked, comments = site
    comment, text = script("comment"), tmp_path/"c.md"
    text.write_text("`digits-mlp/wanda--default.json`\n\n| board | place |\n| --- | --- |\n| a@oneshot | 1 of 3 |\n")
    subprocess.run(["make", "comment", f"COMPARISON={text}", f"PYTHON={sys.executable}"], cwd=ROOT, check=True)
    assert [a[:2] for a in asked] == [("GET", "/repos/o/r/pulls?state=open&head=a%20b%3Ax%26y"),
        ("GET", "/repos/o/r/issues/8/comments?per_page=100"), ("POST", "/repos/o/r/issues/8/comments")]
    assert asked[-1][2]["body"] == f"{comment.MARK}\n{text.read_text()}" and asked[-1][3] == "Bearer t"
    comments += [{"id": 1, "body": comment.MARK, "user": {"login": "stranger"}},
                 {"id": 2, "body": comment.MARK, "user": {"login": "github-actions[bot]"}}]
    comment.main(text)
    assert asked[-1][:2] == ("PATCH", "/repos/o/r/issues/comments/2")


@pytest.mark.parametrize("text", ["<b>", "[a](b)", "![a](b)", "http://x", "see @someone", "&lt;", "a\rb", "a\u202eb",
                                  "x" * 60_001, "\x1b[2J"])
def test_a_comparison_that_is_not_plain_is_not_posted(site, tmp_path, text):
    comment = script("comment")
    (tmp_path/"c.md").write_text(text, newline="")
    with pytest.raises(comment.Refused): comment.main(tmp_path/"c.md")
    assert not site[0]


def test_a_commit_of_no_open_request_gets_no_comment(site, tmp_path, monkeypatch):
    comment = script("comment")
    (tmp_path/"c.md").write_text("text")
    monkeypatch.setenv("HEAD_SHA", "c" * 40)
    with pytest.raises(comment.Refused, match="0 open"): comment.main(tmp_path/"c.md")
    (tmp_path/"c.md").unlink(); (tmp_path/"c.md").symlink_to("/etc/hostname")
    with pytest.raises(comment.Refused, match="no file"): comment.main(tmp_path/"c.md")
    assert all(a[0] == "GET" for a in site[0])


# the nightly repetition

def test_shards_are_the_tasks_that_have_entries(tmp_path):
    out = tmp_path/"output"
    subprocess.run(["make", "shards", f"PYTHON={sys.executable}"], cwd=ROOT, check=True,
                   env={**os.environ, "GITHUB_OUTPUT": str(out)})
    names = json.loads(out.read_text().removeprefix("tasks="))
    assert names == sorted({p.parent.name for p in (ROOT/"leaderboard"/"entries").glob("*/*.json")}) and names


def test_receipts_that_say_something_new_are_committed(trees, tmp_path, monkeypatch, capsys):
    from pruning_bench.bench.verify import make_receipt, read_receipts, write_receipt
    base, _, entry = trees
    nightly = script("nightly")
    monkeypatch.setattr(nightly, "ROOT", base)
    monkeypatch.setattr(nightly, "BOARD", base/"leaderboard")
    def git(*words):
        command = ["git", *nightly.BOT, *words]
        return subprocess.run(command, cwd=base, check=True, capture_output=True, text=True).stdout
    git("init", "-q"); git("add", "-A"); git("commit", "-qm", "board")
    (base/"README.md").write_text("unfinished")
    good, other = make_receipt(entry, entry), {**entry, "dense": entry["dense"][:1]}
    for e in (entry, other): write_receipt(make_receipt(e, e), e, tmp_path/"received"/e["dense"][-1]["seed"].__str__())
    for folder in sorted((tmp_path/"received").iterdir()): nightly.commit(folder)
    changed = git("show", "--stat=200", "--format=%an: %s").splitlines()
    assert changed[0] == "github-actions[bot]: Receipts of 1 repetitions"
    assert "its entry has changed" in capsys.readouterr().out
    assert [r for rs in read_receipts(base/"leaderboard"/"receipts").values() for r in rs] == [good]
    assert git("status", "--porcelain").split() == ["M", "README.md"]   # nothing else was committed
    write_receipt({**good, "date": "2030-01-01"}, entry, tmp_path/"later")
    nightly.commit(tmp_path/"later")
    assert "0 receipts say something new" in capsys.readouterr().out and git("log", "--oneline").count("\n") == 2
    (tmp_path/"later"/"digits-mlp"/"x.json").write_text("[]")
    with pytest.raises(BadInput): nightly.commit(tmp_path/"later")


# the wheel

def test_a_wheel_has_the_version_of_its_tag(tmp_path):
    wheel = script("wheel")
    with pytest.raises(SystemExit, match="0 wheels"): wheel.only_wheel(tmp_path)
    (tmp_path/"pruning_bench-1.2.0-py3-none-any.whl").touch()
    wheel.check_tag(wheel.only_wheel(tmp_path), "v1.2.0")
    with pytest.raises(SystemExit, match="1.2.0"): wheel.check_tag(wheel.only_wheel(tmp_path), "v1.3.0")
