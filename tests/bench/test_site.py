"The web site: what it shows follows from the entries, works in a browser from a folder, and runs nothing of an entry."
import copy
import json
import math
import re
import shutil
import time
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from entries import COST, SIZE, SPEED, TIMES
from pruning_bench import BadInput
from pruning_bench.bench import site
from pruning_bench.bench.board_rows import entry_rows
from pruning_bench.bench.entry import PROVENANCE, entry_digest, entry_path, validate, write_json
from pruning_bench.bench.measure.statistics import paired_interval
from pruning_bench.bench.site_data import board_records, page_name
from pruning_bench.bench.verify import make_receipt, write_receipt


def make_run(sparsity, seed, before, after, latency=1., steps=60):
    pruned = {**TIMES, "min": .9 * latency, "p50": latency, "p90": 1.1 * latency}
    return {"sparsity": sparsity, "seed": seed, "status": "ok", "message": None, "plan": "a" * 64,
            "size": {**SIZE, "mask_density": 1 - sparsity}, "cost": {**COST, "recover_steps": steps},
            "speed": None if seed else {**SPEED, "pruned": pruned}, "code": "b" * 64,
            "quality": {"after_prune": {"accuracy": before}, "after_recover": {"accuracy": after}}}


def make_entry(method, quality, variant="default", task="toy", latency=1., sparsities=(.5, .8), spread=.01):
    runs = [make_run(s, seed, quality - s / 2, quality + spread * (seed - 1) * (1 + s), latency, 60 if spread else 0)
            for s in sparsities for seed in range(3)]
    return validate({
        "schema": "entry.v3", "task": {"name": task, "digest": "0" * 64, "track": "cnn", "metric": "accuracy",
                                       "higher": True},
        "method": {"name": method, "variant": variant, "settings": {"training": "tuned"},
                   "config": {"pattern": variant if ":" in variant else "unstructured"},
                   "family": "weight", "stage": "trained", "paper": "arXiv:1234.56789", "year": 2020},
        "dense": [{"seed": 0, "quality": {"accuracy": .95}, "size": SIZE, "train_seconds": None}], "runs": runs,
        "provenance": dict.fromkeys(PROVENANCE)})


def failing(entry):
    "The last run of an entry diverged."
    nothing = dict(quality={"after_prune": None, "after_recover": None}, cost=None, plan=None, size=None, speed=None)
    entry["runs"][-1].update(status="diverged", message="the loss is nan", **nothing)
    return validate(entry)


ENTRIES = [make_entry("wanda", .9, latency=2.), make_entry("magnitude", .85, latency=1.),
           make_entry("random", .5, spread=.05),
           make_entry("sparsegpt", .88, "2:4", sparsities=(.5,), latency=3.), make_entry("lamp", .7, spread=0.),
           failing(make_entry("obd", .6, sparsities=(.8,))), make_entry("wanda", .8, task="other"),
           make_entry("magnitude", .82, task="other")]
RETRAINED = "board=retrained&sparsity=0.5"


def publish(entries, folder):
    for e in entries: write_json(e, entry_path(folder / "entries", e))
    write_receipt(make_receipt(entries[0], entries[0]), entries[0], folder / "receipts")
    return site.build_site(folder).parent


@pytest.fixture(scope="module")
def built(tmp_path_factory): return publish(ENTRIES, tmp_path_factory.mktemp("leaderboard"))


# without a browser

def test_an_earlier_site_is_replaced_and_other_folders_are_left_alone(tmp_path):
    folder = publish(ENTRIES[:2], tmp_path)
    stale = folder / "entries" / "toy" / "gone--default.html"
    stale.write_text("old")
    site.build_site(tmp_path)
    assert not stale.exists() and (folder / "entries" / "toy" / "wanda--default.html").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("work")
    for wrong in (other, other / "thesis.tex"):
        with pytest.raises(BadInput, match="--out"): site.build_site(tmp_path, wrong)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    with pytest.raises(BadInput, match="entries"): site.build_site(tmp_path / "nothing")


def test_no_entry_hides_another():
    twice = [ENTRIES[0], copy.deepcopy(ENTRIES[0])]
    with pytest.raises(BadInput, match="two pages would be entries/toy/wanda--default.html"):
        site.site_pages(entry_rows(twice), twice, {}, {})
    odd = ["2:4", "2of4", "2/4", "..", ".", "", "WANDA", "wanda", "w\u0430nda", "a" * 300, "a" * 301, "con\x00", "<b>"]
    names = [page_name(text) for text in odd]
    assert len({n.lower() for n in names}) == len(odd)
    assert all(re.fullmatch(r"[a-z0-9@_-][a-z0-9@_.-]{0,110}", n) for n in names)
    assert page_name("a--b", "c") == page_name("a--b", "c") and page_name("A--b", "c") != page_name("A", "b--c")


def test_every_row_of_the_board_is_on_the_page_of_its_task(built):
    table, page = entry_rows(ENTRIES), (built / "tasks" / "toy.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    mine = table[table.task == "toy"]
    key = lambda r: (r["board"], r["sparsity"], r["label"])
    shown = {key(r): r for r in data["rows"]}
    assert len(shown) == len(data["rows"]) == len(mine)
    for r in mine.itertuples():
        label = r.method if r.variant == "default" else f"{r.method} ({r.variant})"
        row = shown[r.board, r.sparsity, label]
        assert row["value"] is None if math.isnan(r.value) else row["value"] == r.value
        if math.isnan(r.low): assert row["low"] is row["high"] is None
        else: assert (row["low"], row["high"]) == (r.low, r.high)
    assert page.count('data-id="') == len(mine)


def test_fronts_join_comparable_rows_only():
    entries = [make_entry("cheap", .7, latency=1.), make_entry("good", .9, latency=2.),
               make_entry("poor", .6, latency=1.5),
               make_entry("early", .95, sparsities=(.3,), latency=.5)]
    filters = make_entry("filters", .92, latency=.7)
    for part in filters["runs"]: part["size"] = {**part["size"], "params": 60, "nonzero": 60}
    found = board_records(entry_rows([*entries, filters]), [*entries, filters])
    assert not any("macs" in r["fronts"] or "left" in r["fronts"] for r in found)   # all sizes are equal
    def front(name):
        return {(r["method"], r["sparsity"]) for r in found if "latency" in r[name] and r["board"] == "retrained"}
    assert front("fronts") == {(m, s) for m in ("cheap", "good") for s in (.5, .8)}
    assert front("wide_fronts") == {("early", .3)}   # better and faster than all others that remove weights


def test_a_page_names_the_receipt_and_the_dense_model(built):
    page = (built / "entries" / "toy" / "wanda--default.html").read_text()
    assert "numbers agree within their tolerance, all of them exactly" in page and "arxiv.org/abs/1234.56789" in page
    other = (built / "entries" / "toy" / "magnitude--default.html").read_text()
    assert "Nobody has made this entry again" in other
    text = (built / "tasks" / "toy.html").read_text()
    assert all(f"<dd>{SIZE[k]:,}</dd>" in text for k in ("params", "macs", "bytes"))
    assert "1,000 ms (median of 10 timings" in text


def test_every_receipt_of_an_entry_is_on_its_page():
    first, second = (make_receipt(ENTRIES[0], ENTRIES[0]) for _ in range(2))
    second.update(machine={"processor": "another one"}, same_dense=False)
    page = site.entry_page(ENTRIES[0], "reproduced", [first, second])
    assert page.count("numbers agree within their tolerance") == 2
    assert "another one" in page and "<dd>others</dd>" in page


def test_areas_under_curves_are_on_the_page_of_the_task():
    entry = make_entry("magnitude", .8, sparsities=(.2, .4, .6, .8), spread=0.)
    pages = site.site_pages(entry_rows([entry, ENTRIES[0]]), [entry, ENTRIES[0]], {}, {})
    assert "mean of accuracy from 0.2 to 0.8 sparsity</th>" in pages["tasks/toy.html"]
    assert all(f"<td>{mean}</td><td>4</td>" in pages["tasks/toy.html"] for mean in (.8, .55))


def test_the_board_and_the_site_show_one_set_of_rows(tmp_path, monkeypatch):
    "`pruning-bench board` makes the pages from the rows that it prints."
    from typer.testing import CliRunner
    from pruning_bench.bench.cli import app
    for e in ENTRIES[:2]: write_json(e, entry_path(tmp_path / "entries", e))
    given, made = [], site.site_pages
    monkeypatch.setattr(site, "site_pages", lambda table, *rest: given.append(table) or made(table, *rest))
    done = CliRunner().invoke(app, ["board", "--folder", str(tmp_path), "--readme", str(tmp_path / "none.md")])
    assert done.exit_code == 0 and len(given) == 1 and len(given[0]) == len(entry_rows(ENTRIES[:2]))
    page = tmp_path / "site" / "index.html"
    assert f"page: {page}" in done.output.replace("\n", "") and "tasks/toy.html" in page.read_text()


def test_the_executed_notebook_is_shown_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path))
    run = tmp_path / "runs" / "toy" / "wanda--default--0123"
    run.mkdir(parents=True)
    evil = "<script>alert(1)</script>"
    cells = [{"cell_type": "markdown", "source": ["# Title ", evil]},
             {"cell_type": "code", "source": [f"out = '{run}/x.json'; print('{evil}')"], "outputs": [
                 {"output_type": "stream", "text": [evil, "printed"]},
                 {"output_type": "display_data", "data": {"text/html": [evil], "image/png": "iVBORw0KGgo="}},
                 {"output_type": "display_data", "data": {"image/png": '"><script>', "text/plain": ["kept"]}}]}]
    (run / "notebook.ipynb").write_text(json.dumps({"cells": cells}))
    (run / "result.json").write_text(json.dumps(ENTRIES[0]))
    text = site.entry_page(ENTRIES[0], "claimed", [])
    assert "<h1>Title" in text and "printed" in text and "base64,iVBORw0KGgo=" in text and "kept" in text
    assert "<script>alert" not in text and str(tmp_path) not in text and "/x.json" in text
    assert "not in the cache" in site.entry_page(ENTRIES[1], "claimed", [])


# in a browser

@pytest.fixture(scope="module")
def window():
    "One page of headless Chromium for all tests: what a script compiles to is kept, and every visit loads anew."
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: pages are not tried in a browser")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None: pytest.skip("no chromium: pages are not tried in a browser")
    with driver.sync_playwright() as play:
        try: chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except driver.Error as e: pytest.skip(f"chromium does not start here: {str(e).splitlines()[0]}")
        yield chromium.new_page()
        chromium.close()


@pytest.fixture
def visit(window):
    "A function that opens a page; whatever goes wrong in it fails the test."
    wrong = []
    heard = {"console": lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None,
             "pageerror": lambda e: wrong.append(str(e)),
             "dialog": lambda d: (wrong.append(f"dialog {d.message}"), d.dismiss()),
             "request": lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None,
             "requestfailed": lambda r: wrong.append(f"missing {r.url}")}
    for name, handler in heard.items(): window.on(name, handler)
    window.set_default_timeout(60_000)

    def open_page(path, address="", width=1300, scheme="light"):
        window.goto("about:blank")   # another part behind the # alone loads nothing
        window.set_viewport_size({"width": width, "height": 900})
        window.emulate_media(color_scheme=scheme)
        window.goto(Path(path).absolute().as_uri() + (f"#{address}" if address else ""))
        return window

    yield open_page
    window.evaluate("localStorage.clear()")
    for name, handler in heard.items(): window.remove_listener(name, handler)
    assert not wrong


def until(page, condition):
    "Wait until an expression of the page is true; the page allows no evaluation of text, so this asks from outside."
    for _ in range(600):
        if page.evaluate(condition): return
        time.sleep(.1)
    raise AssertionError(f"never: {condition}")


def column(page, title, table="#rows"):
    "The texts of a column of a table, from top to bottom."
    names = [re.sub(r"\s+", " ", t).strip() for t in page.locator(f"{table} thead th").all_inner_texts()]
    at = names.index(title) + 1
    return [t.strip() for t in page.locator(f"{table} tbody tr td:nth-child({at})").all_inner_texts()]


def methods_of(page): return [t.removesuffix(" control") for t in column(page, "method")]
def address_of(page): return {k: v[0] for k, v in parse_qs(page.url.partition("#")[2]).items()}


def test_rows_are_sorted_and_rows_without_a_number_come_last(built, visit):
    page = visit(built / "tasks" / "toy.html", "board=retrained&sparsity=0.8")
    assert methods_of(page) == ["wanda", "magnitude", "lamp", "random", "obd"]   # as the board has them
    header = page.locator("#rows th", has_text="accuracy")
    header.click()
    assert methods_of(page) == ["random", "lamp", "magnitude", "wanda", "obd"]
    header.click()
    assert methods_of(page) == ["wanda", "magnitude", "lamp", "random", "obd"]
    page.locator("#rows th", has_text="method").get_by_role("button").press("Enter")
    until(page, "document.querySelector('#rows tbody tr').innerText.startsWith('lamp')")
    assert methods_of(page) == sorted(methods_of(page))


def test_rows_are_filtered_and_the_address_says_how(built, visit):
    page = visit(built / "tasks" / "toy.html")
    page.select_option("select[name=board]", "retrained")
    page.select_option("select[name=sparsity]", "0.5")
    assert set(methods_of(page)) == {"wanda", "magnitude", "random", "sparsegpt (2:4)", "lamp"}
    page.uncheck("input[name=controls]")
    assert "random" not in methods_of(page)
    page.fill("input[type=search]", "sparse")
    assert methods_of(page) == ["sparsegpt (2:4)"]
    page.fill("input[type=search]", "")
    page.select_option("select[name=sparsity]", "")
    assert set(column(page, "sparsity")) == {"0.5", "0.8"}
    assert address_of(page) == {"board": "retrained", "against": "method", "controls": "no"}
    page.select_option("select[name=kind]", "2:4")
    assert set(methods_of(page)) == {"sparsegpt (2:4)"} and address_of(page)["kind"] == "2:4"


def test_a_link_shows_the_same_choice_and_marks_its_row(built, visit):
    page = visit(built / "methods" / "magnitude.html")
    links = page.locator("a.permanent").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    wanted = next(a for a in links if "toy" in a and RETRAINED in a)
    again = visit(built / "methods" / wanted.partition("#")[0], wanted.partition("#")[2])
    assert again.locator("tr.selected-row").inner_text().startswith("magnitude")
    assert again.locator("select[name=board]").input_value() == "retrained"
    assert again.locator("select[name=sparsity]").input_value() == "0.5"
    again.evaluate("location.hash = 'board=no+retraining&sparsity=0.8&against=latency'")
    until(again, "document.querySelector('select[name=board]').value === 'no retraining'")
    assert again.locator("tr.selected-row").count() == 0 and set(column(again, "sparsity")) == {"0.8"}


def test_the_plot_draws_means_and_intervals_best_on_top(built, visit):
    page = visit(built / "tasks" / "toy.html", RETRAINED)
    shown = page.evaluate("() => { const p = document.querySelector('#plot'), t = p.data[0];"
                          "return {x: t.x, symbol: t.marker.symbol, up: t.error_x.array,"
                          "names: p.layout.yaxis.ticktext} }")
    table = entry_rows(ENTRIES).query("task == 'toy' and board == 'retrained' and sparsity == .5")
    table = table.sort_values("value")
    assert shown["x"] == table.value.tolist()
    assert [n.split(" ")[0] for n in shown["names"]] == table.method.tolist()
    assert [s.split("-")[0] for s in shown["symbol"]] == ["diamond" if c else "circle" for c in table.control]
    assert all(s.endswith("-open") for s in shown["symbol"])   # no entry here was made again under today's code
    assert sum(up is not None for up in shown["up"]) == 4   # lamp gives the same number for every seed
    for up, r in zip(shown["up"], table.itertuples()):
        assert up is None if math.isnan(r.high) else up == pytest.approx(r.high - r.value)


def test_the_plot_says_when_sizes_are_equal_and_draws_fronts_where_they_differ(built, visit):
    page = visit(built / "tasks" / "toy.html", RETRAINED + "&against=macs")
    assert "have the same MACs" in page.locator("#note").inner_text()
    assert page.evaluate("document.querySelector('#plot').data.length") == 1
    page.select_option("select[name=against]", "latency")
    lines = page.evaluate("document.querySelector('#plot').data.filter(t => t.mode === 'lines').map(t => t.x)")
    assert lines == [[1000, 2000]]
    page.select_option("select[name=sparsity]", "")
    page.select_option("select[name=against]", "removed")
    modes = page.evaluate("document.querySelector('#plot').data.map(t => [t.x.length, t.mode])")
    assert sorted(modes) == [[1, "markers"], *[[2, "lines+markers"]] * 4]   # a curve needs two points


def test_a_reader_learns_what_a_method_would_cost(built, visit):
    page = visit(built / "tasks" / "toy.html", RETRAINED)
    cost = lambda: dict(zip(methods_of(page), column(page, "what would this cost me")))
    assert cost()["wanda"] == "60.3 steps"   # 60 steps of retraining, and a forward pass
    page.fill("input[name=step]", "10")
    assert cost()["wanda"] == "≈ 10 min" and cost()["lamp"] == "≈ 3.3 s"
    page.locator("input[name=step]").press("Enter")
    assert address_of(page)["step"] == "10"


def test_two_methods_are_compared_by_their_paired_differences(built, visit):
    page = visit(built / "compare.html", "a=wanda--default&b=magnitude--default")
    assert set(column(page, "task", "#differences")) == {"toy", "other"}
    rows = list(zip(*(column(page, c, "#differences") for c in ("task", "board", "sparsity", "A − B"))))
    found = next(r for r in rows if r[:3] == ("toy", "retrained", "0.5"))
    wanda, magnitude = ([r["quality"]["after_recover"]["accuracy"] for r in e["runs"] if r["sparsity"] == .5]
                        for e in ENTRIES[:2])
    wanted = paired_interval(wanda, magnitude)
    assert float(found[3]) == pytest.approx(wanted["mean"], abs=1e-3)
    page.select_option("select[name=a]", "magnitude--default")
    page.select_option("select[name=b]", "wanda--default")
    back = list(zip(*(column(page, c, "#differences") for c in ("task", "board", "sparsity", "A − B"))))
    assert float(next(r for r in back if r[:3] == found[:3])[3]) == -float(found[3])
    page.select_option("select[name=b]", "random--default")
    verdicts = dict(zip(zip(column(page, "board", "#differences"), column(page, "sparsity", "#differences")),
                        column(page, "this comparison says", "#differences")))
    assert verdicts["retrained", "0.5"] == "A is better" and "no interval" in verdicts["no retraining", "0.5"]
    page.select_option("select[name=a]", page_name("sparsegpt", "2:4"))
    page.select_option("select[name=b]", "obd--default")
    assert "never measured" in page.locator("#note").inner_text()


def test_every_page_loads_without_errors_and_without_a_network_on_narrow_and_on_dark_screens(built, visit):
    pages = [*built.glob("*.html"), *built.glob("tasks/*.html"), built / "methods" / "wanda.html",
             built / "entries" / "toy" / "wanda--default.html"]
    for path in pages:
        page = visit(path, width=360, scheme="dark")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        assert page.evaluate("document.documentElement.classList.contains('dark')")
        page.set_viewport_size({"width": 1300, "height": 900})
        assert page.locator("h1").count() == 1 and page.locator("main").is_visible()


def test_the_keyboard_reaches_the_content_and_the_colours(built, visit):
    page = visit(built / "tasks" / "toy.html", RETRAINED)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


HOSTILE = ["</script><script>pwned=1</script>", "<img src=x onerror=pwned=1>", "\"><svg onload=pwned=1>", "{{7*7}}",
           "' onmouseover='pwned=1", "<a href=\"javascript:pwned=1\">x</a>", "<b>%3Cscript%3E</b>", "__proto__"]


HOSTILE = [" ".join(HOSTILE), "__proto__"]   # one after the other: fewer pages to open
IMAGE = "<img src=x onerror=pwned=1>"


def hostile_entries():
    "Two entries for every hostile string, accepted by the schema, with the string in every place that takes one."
    for text in HOSTILE:
        entries = [make_entry(text, .9), make_entry("magnitude", .8, variant=text)]
        for e in entries:
            e["task"].update(name=text, metric=text)
            e["method"].update(family=text, paper="arXiv:" + text, settings={text: text}, config={text: {text: [text]}})
            e["provenance"].update({k: text for k in e["provenance"]}, **{text: text})
            for part in [*e["dense"], *e["runs"]]:
                for quality in ([part["quality"]] if "train_seconds" in part else part["quality"].values()):
                    quality[text] = quality.pop("accuracy")
            for run in e["runs"]: run["message"] = text
            yield validate(e)


def test_hostile_strings_stay_text(tmp_path, visit):
    entries = list(hostile_entries())
    receipt = make_receipt(entries[0], entries[0])
    receipt.update(message=HOSTILE[0], machine={IMAGE: HOSTILE[0]})
    protocols = {text: {"about": text, "sources": [text], "protocol": {text: text}} for text in HOSTILE}
    table = entry_rows(entries, lambda e, row: IMAGE)
    pages = site.site_pages(table, entries, {entry_digest(entries[0]): [receipt]}, protocols, lambda e: IMAGE)
    assert all(re.fullmatch(r"[a-zA-Z0-9@_./-]+", path) and ".." not in path for path in pages)
    site.write_site(pages, tmp_path / "site")
    def check(page):
        assert page.evaluate("typeof pwned") == "undefined"
        assert page.locator("img, iframe, object, embed, a[href^='javascript']").count() == 0
        assert page.locator("script:not([src]):not([type='application/json'])").count() == 0
        assert "49" not in page.locator("h1").inner_text()
    for path in pages:
        if path.startswith("entries/") and "magnitude" in path: continue   # the same places as in the other entry
        page = visit(tmp_path / "site" / path)
        check(page)
        if path.startswith("tasks/"):
            for against in ("latency", "removed"):
                page.select_option("select[name=against]", against)
                check(page)
    page = visit(tmp_path / "site" / "tasks" / f"{page_name(HOSTILE[0])}.html")
    page.locator("#plot .point").first.hover(force=True)
    check(page)
    assert IMAGE in page.locator("#rows").inner_text()
    assert any(IMAGE in text for text in page.locator("#plot .ytick").all_text_contents())
