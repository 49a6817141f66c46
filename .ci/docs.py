"The chapters as web pages: `make docs` renders every notebook into _docs, in the order of nbs/toc.yml."
import html, os, re, shutil
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NBS, OUT = ROOT/"nbs", ROOT/"_docs"
STYLE = "body{max-width:46em;margin:3em auto;font:16px/1.5 system-ui,sans-serif;padding:0 1em}li{margin:.6em 0}"


def book():
    "The parts of the book: [(title, [(page, minutes, pages to read before)])]."
    parts = yaml.safe_load((NBS/"toc.yml").read_text(encoding="utf-8"))["parts"]
    page = lambda f: Path(f + ".html")
    return [
        (p["title"], [(page(c["file"]), c["minutes"], [page(a) for a in c.get("after", [])]) for c in p["chapters"]])
        for p in parts]


def notebooks():
    return sorted(
        p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


def presentable(nb):
    "Without the cells and lines that only nbdev reads; links lead to the rendered pages."
    nb.cells = [c for c in nb.cells if not re.match(r"#\s*\|\s*(hide\b|default_exp)", c.source)]
    for cell in nb.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M)
        else: cell.source = re.sub(r"(\]\([^)#\s]+)\.ipynb", r"\1.html", cell.source)
    return nb


def heading(nb):
    lines = [line for line in nb.cells[0].source.splitlines() if line.strip()]
    return lines[0].lstrip("# "), lines[1].lstrip("> ")


def link(here, page, text): return f'<a href="{os.path.relpath(page, here.parent)}">{html.escape(text)}</a>'


def neighbours(page, pages, order):
    "Links to the previous and the next chapter, and to the contents."
    if page not in order: return ""
    i, links = order.index(page), [link(page, Path("contents.html"), "Contents")]
    if i: links.insert(0, "Previous: " + link(page, order[i - 1], pages[order[i - 1]][0]))
    if i + 1 < len(order): links.append("Next: " + link(page, order[i + 1], pages[order[i + 1]][0]))
    return "<p>" + " · ".join(links) + "</p>"


def contents(pages):
    "One list per part of the book, with minutes and prerequisites."
    body, start = "", Path("contents.html")
    for title, chapters in book():
        items = ""
        for page, minutes, before in chapters:
            name, sub = pages[page]
            after = "; after " + ", ".join(link(start, b, pages[b][0]) for b in before) if before else ""
            items += f"<li>{link(start, page, name)} ({minutes} minutes{after})<br>{html.escape(sub)}</li>"
        body += f"<h2>{html.escape(title)}</h2><ol>{items}</ol>"
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>pruning_bench: contents</title><style>{STYLE}</style><h1>pruning_bench</h1>{body}</html>")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    exporter = HTMLExporter()
    read = {
        path.relative_to(NBS).with_suffix(".html"): presentable(nbformat.read(path, as_version=4))
        for path in notebooks()}
    pages = {page: heading(nb) for page, nb in read.items()}
    order = [page for _, chapters in book() for page, _, _ in chapters]
    for page, nb in read.items():
        (OUT/page).parent.mkdir(parents=True, exist_ok=True)
        text = exporter.from_notebook_node(nb, {"metadata": {"name": pages[page][0]}})[0]
        around = neighbours(page, pages, order)
        text = re.sub(r"(<main>|<body[^>]*>)", lambda m: m.group() + around, text, count=1)
        (OUT/page).write_text(text.replace("</body>", around + "</body>"), encoding="utf-8")
    (OUT/"contents.html").write_text(contents(pages), encoding="utf-8")
    if not (OUT/"index.html").exists(): shutil.copy(OUT/"contents.html", OUT/"index.html")
    print(f"{len(pages)} pages, start at {OUT/'contents.html'}")


if __name__ == "__main__": main()
