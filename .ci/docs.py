"The chapters as web pages: `make docs` renders every notebook, with the outputs it carries, into _docs."
import html, re, shutil
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NBS, OUT = ROOT/"nbs", ROOT/"_docs"
SECTIONS = {"": "Start", "tutorials": "Tutorials", "core": "Core", "weight": "Weights", "structured": "Structures",
            "diffusion": "Diffusion models", "data": "Training data", "bench": "Benchmark", "benchmarks": "Benchmark notebooks"}


def notebooks():
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


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


def contents(pages):
    "One list per folder, in the order in which the folders build on each other."
    body = ""
    for folder, title in SECTIONS.items():
        mine = [p for p in pages if str(p.parent) == (folder or ".")]
        items = "".join(f'<li><a href="{p}">{html.escape(name)}</a><br>{html.escape(sub)}</li>' for p, (name, sub) in pages.items() if p in mine)
        if items: body += f"<h2>{title}</h2><ul>{items}</ul>"
    style = "body{max-width:46em;margin:3em auto;font:16px/1.5 system-ui,sans-serif;padding:0 1em}li{margin:.6em 0}"
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>pruning_bench: contents</title><style>{style}</style><h1>pruning_bench</h1>{body}</html>")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    exporter, pages = HTMLExporter(), {}
    for path in notebooks():
        nb = presentable(nbformat.read(path, as_version=4))
        page = path.relative_to(NBS).with_suffix(".html")
        pages[page] = heading(nb)
        (OUT/page).parent.mkdir(parents=True, exist_ok=True)
        (OUT/page).write_text(exporter.from_notebook_node(nb, {"metadata": {"name": pages[page][0]}})[0], encoding="utf-8")
    (OUT/"contents.html").write_text(contents(pages), encoding="utf-8")
    if not (OUT/"index.html").exists(): shutil.copy(OUT/"contents.html", OUT/"index.html")
    print(f"{len(pages)} pages, start at {OUT/'contents.html'}")


if __name__ == "__main__": main()
