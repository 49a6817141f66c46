"""Comment a pull request with the comparison that a check has written: `python .ci/comment.py COMPARISON.md`.

The check ran in a job whose workflow file may come from the pull request, so its output is the text of a stranger: it
is posted only if it is short and plain. The pull request is looked up by the commit that was checked, never read from
the output. Standard library only.
"""
import json, os, re, sys, urllib.parse, urllib.request
from pathlib import Path

MARK = "<!-- comparison of pruning_bench -->"
MOST_CHARACTERS, TOO_LONG = 60_000, "the comparison is too long: read it in the log of the check"
NOT_PLAIN = re.compile(r"<|&#?\w+;|\]\(|!\[|https?:|(?<!\w)@\w|"   # markup, links, mentions; what is not shown:
                       r"[\x00-\x09\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


class Refused(Exception): "Why nothing is posted."


def plain_comparison(path):
    "The text of a comparison; raises `Refused`."
    path = Path(path)
    if path.is_symlink() or not path.is_file(): raise Refused(f"{path} is no file: nothing is posted")
    if path.stat().st_size > 4 * MOST_CHARACTERS: raise Refused(TOO_LONG)
    try: text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError: raise Refused("the comparison is no text: nothing is posted") from None
    if len(text) > MOST_CHARACTERS: raise Refused(TOO_LONG)
    if found := NOT_PLAIN.search(text): raise Refused(f"the comparison holds {ascii(found[0])}: nothing is posted")
    return text


def call(path, method="GET", **body):
    "One call of the interface of the site that holds the repository."
    request = urllib.request.Request(
        os.environ["GITHUB_API_URL"] + path, json.dumps(body).encode() if body else None, method=method,
        headers={"Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}", "Accept": "application/vnd.github+json"})
    with urllib.request.urlopen(request, timeout=60) as answer: return json.load(answer)


def request_number(repository):
    "The open pull request whose head is the commit that was checked; raises `Refused` where there is none."
    head = urllib.parse.quote(f"{os.environ['HEAD_OWNER']}:{os.environ['HEAD_BRANCH']}", safe="")
    found = [p["number"] for p in call(f"/repos/{repository}/pulls?state=open&head={head}")
             if p["head"]["sha"] == os.environ["HEAD_SHA"]]
    if len(found) != 1: raise Refused(f"{len(found)} open pull requests have the checked commit: nothing is posted")
    return found[0]


def main(path):
    repository, text = os.environ["GITHUB_REPOSITORY"], plain_comparison(path)
    number = request_number(repository)
    comments = call(f"/repos/{repository}/issues/{number}/comments?per_page=100")
    mine = [c["id"] for c in comments if c["body"].startswith(MARK) and c["user"]["login"] == "github-actions[bot]"]
    where = f"comments/{mine[0]}" if mine else f"{number}/comments"
    call(f"/repos/{repository}/issues/{where}", "PATCH" if mine else "POST", body=f"{MARK}\n{text}")


if __name__ == "__main__":
    try: main(sys.argv[1])
    except Refused as e: sys.exit(f"comment: {e}")
