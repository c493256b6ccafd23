"""The report of tools/probe.py: one HTML file with pictures, which opens without a network.

    python -m tools.probe --html report.html

Tables, heat maps, and a card for every query shown: its pictures, what the steps said, the first five found.
Plain HTML and CSS: pictures are data in the file, nothing is loaded, no script runs.
"""

import base64
import io
from html import escape

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from files.clips import load_frames
from files.pictures import load_image
from files.writing import writing
from tasks.turtle import state_word, STATES
from tasks.turtle_pictures import draw_board

LARGEST = 8 << 20  # bytes of cards; with the tables the file stays under 10 MB
LISTS = {  # what the lists of queries are -> heading, what to see there
    "chosen": ("The queries you named", ""),
    "wins": ("Where latent wins", "The right candidate ranks higher than by the single-pass embedding."),
    "loses": ("Where latent loses", "The right candidate ranks lower than by the single-pass embedding."),
    "same": ("Of the rest", "The right candidate has the same rank in both."),
}
CHANGED = "what was changed"  # head of the names of rows
AGREEMENT = "agreement: steps whose state says, as its likeliest word, that of the rationale they replaced"
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c1e21; --soft: #5c626b; --line: #d9dce1;
  --card: #f6f7f9; --heat: #8fbcf5; --right: #1a7f37; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #14161a; --text: #e6e8eb; --soft: #a0a7b1;
  --line: #353a42; --card: #1d2025; --heat: #2a5d9f; --right: #5bd47f; --wrong: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p, ul { margin: .3rem 0; max-width: 48rem; } .soft { color: var(--soft); }
a { color: inherit; } nav a { display: inline-block; margin-right: 1rem; padding: .3rem 0; }
:focus-visible { outline: 3px solid var(--heat); outline-offset: 2px; }
.scroll { overflow-x: auto; margin: .5rem 0; } summary { cursor: pointer; padding: .3rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
.what { font-weight: 400; white-space: normal; width: 20rem; max-width: 40vw; }
th { font-weight: 600; } td.number { text-align: right; } td.heat { text-align: center;
  background: color-mix(in srgb, var(--heat) calc(var(--v) * 100%), transparent); }
td.bar { min-width: 7rem;
  background: linear-gradient(90deg, var(--heat) calc(var(--v) * 100%), transparent 0); }
.side { display: flex; flex-wrap: wrap; gap: 0 2rem; } .side > * { min-width: 0; }
@media (max-width: 40rem) { .causality table { font-size: .75rem; }
  .causality :is(th, td) { white-space: normal; padding: .2rem .3rem; }
  .causality td.bar { min-width: 3.5rem; } .causality td.between { white-space: nowrap; } }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 36rem), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  min-width: 0; } article :is(th, td) { padding: .2rem .4rem; }
img { max-width: 100%; height: auto; vertical-align: top; border-radius: 2px; }
img.small { image-rendering: pixelated; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; list-style: none; padding: 0; margin: .4rem 0; }
.row li { font-size: .8rem; max-width: 9.5rem; padding: .25rem; border: 2px solid transparent; }
.row li.is-right { border-color: var(--right); border-radius: .3rem; }
.right { color: var(--right); font-weight: 600; } .wrong { color: var(--wrong); font-weight: 600; }
"""


# ---- pictures
def picture(image, alt, largest):
    """A Pillow image -> an <img>: small ones enlarged with hard edges, large ones scaled down to a JPEG."""
    file = io.BytesIO()
    if image.width <= 64:
        image.save(file, "PNG")
        kind, zoom, look = "png", min(3, largest / max(image.size)), ' class="small"'
    else:
        image = image.copy()
        image.thumbnail((largest, largest) if image.height >= image.width / 2 else (4 * largest, largest))
        image.save(file, "JPEG", quality=80)
        kind, zoom, look = "jpeg", 1, ""
    width, height = max(1, round(image.width * zoom)), max(1, round(image.height * zoom))
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<img{look} alt="{escape(alt)}" width="{width}" height="{height}" '
            f'src="data:image/{kind};base64,{data}">')


def strip(frames):
    """Frames of a clip side by side, of one height."""
    height = min(frames[0].height, 96)
    frames = [f.resize((max(1, round(f.width * height / f.height)), height)) for f in frames]
    return Image.fromarray(np.hstack([ImageOps.expand(f, (0, 0, 2, 0), "white") for f in frames]))


def media_of(side, alt, largest, most_frames):
    """The pictures of a Side as <img>s, at most so many pixels high; of a clip a strip of frames."""
    shown = []
    for kind, value in side.parts:
        if kind == "image":
            shown.append(picture(load_image(value), f"picture: {alt}", largest))
        elif kind == "video":
            frames = load_frames(value, most_frames)
            image = strip(frames)
            shown.append(picture(image, f"{len(frames)} frames of a clip: {alt}", max(largest, image.width)))
    return " ".join(shown)


def walk(steps):
    """Turtle world: each state's likeliest word drawn on the board, with the cells walked before."""
    known, trail, items = {state_word(state): state for state in STATES}, [], []
    for k, step in enumerate(steps):
        word = step["tokens"][0][0]
        state, shown = known.get(word), ""
        if state is not None:
            left = tuple(old for old in trail if old[:2] != state[:2])
            shown = picture(draw_board(state, trail=left), f"turtle at{word}", 84)
            trail.append(state)
        items.append(f"<li>{shown}<div>{k}: {said(step)}</div></li>")
    return f'<ol class="row">{"".join(items)}</ol>'


# ---- tables
def table(heads, rows, label):
    """Heads and rows of ready cells -> a table that scrolls by itself when the screen is narrow."""
    heads = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table><thead>'
            f"<tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>")


def name_cell(text, what=""):
    """what: a sentence below the name"""
    below = f'<div class="what soft">{escape(what)}</div>' if what else ""
    return f'<th scope="row">{escape(text)}{below}</th>'


def counted(number, one, many):
    return f"{number:,} {one if number == 1 else many}"


def between(row):
    low, high = row["interval"]
    return f"{100 * low:.1f} - {100 * high:.1f}"


def score_cells(row):
    """A bar, and the interval."""
    return [f'<td class="bar" style="--v:{row["score"]:.3f}">{100 * row["score"]:.1f}</td>',
            f'<td class="between">{between(row)}</td>']


def heat_cell(value, most):
    return f'<td class="heat" style="--v:{value / most:.3f}">{value:.2f}</td>'


def causality(rows, label, metric, explained=False):
    """{row: score, interval, verdict, what} as a table with bars."""
    lines = []
    for name, row in rows.items():
        cells = [name_cell(name, row["what"] if explained else ""), *score_cells(row)]
        lines.append([*cells, f"<td>{escape(row['verdict'])}</td>"])
    heads = [CHANGED, f"{metric} %", "95%", "verdict"]
    return f'<div class="causality">{table(heads, lines, label)}</div>'


def agreement_table(result):
    """Of each task and of all."""
    found = {name: task["agreement"] for name, task in result["tasks"].items()}
    found = {name: row for name, row in found.items() if row} | {"all": result["agreement"]}
    lines = [[name_cell(name), *score_cells(row)] for name, row in found.items()]
    return table(["task", "steps %", "95%"], lines, "agreement")


def heat_maps(result):
    """Experts by step and task; agreement by step and task."""
    steps, experts, agreement = range(result["steps"]), [], []
    for name, task in result["tasks"].items():
        E = len(task["experts"][0])
        most = max((p for probs in task["experts"] for p in probs), default=1)
        for e in range(E):
            task_cell = "" if e else f'<th scope="rowgroup" rowspan="{E}">{escape(name)}</th>'
            cells = [heat_cell(probs[e], most) for probs in task["experts"]]
            experts.append([task_cell, f"<td>{e}</td>", *cells])
        if task["agreement"]:
            by_step = task["agreement"]["by_step"]
            cells = [heat_cell(by_step[k], 1) if k in by_step else "<td></td>" for k in steps]
            agreement.append([name_cell(name), *cells])
    out = ['<section id="heat"><h2>Agreement and experts</h2>']
    if agreement:
        out += [f"<p>{AGREEMENT}</p>", agreement_table(result)]
    out.append('<div class="side">')
    if experts:
        out += ["<div><p>The router's mean probability of each expert, in front of each step.</p>",
                table(["task", "expert", *steps], experts, "experts by step"), "</div>"]
    if agreement:
        out += ["<div><p>Share of queries whose state in front of this step says the rationale's word.</p>",
                table(["task", *steps], agreement, "agreement by step"), "</div>"]
    return "\n".join(out) + "</div></section>"


# ---- cards
def said(step):
    """The likeliest word of a state, marked where the rationale is known."""
    word = escape(step["tokens"][0][0].strip() or "(blank)")
    if "agrees" not in step:
        return word
    if step["agrees"]:
        return f'<span class="right">{word} \u2713</span>'
    return f'<span class="wrong">{word} \u2717 {escape(step["rationale"].strip())}</span>'


def trajectory_table(steps):
    lines = []
    for k, step in enumerate(steps):
        others = ", ".join(f"{token.strip()} {p:.2f}" for token, p in step["tokens"][1:])
        experts = " ".join(f"{p:.2f}" for p in step.get("experts", []))
        before = f"{step['to_before']:.2f}" if "to_before" in step else ""
        mark = ' <span class="right">\u2713</span>' if step["right"] else ""
        lines.append([
            name_cell(str(k)), f"<td>{said(step)} {step['tokens'][0][1]:.2f}</td>",
            f"<td>{escape(step['retrieved'])}{mark}</td>", f'<td class="number">{before}</td>',
            f'<td class="number">{step["to_anchor"]:.2f}</td>', f"<td>{experts}</td>",
            f"<td>{escape(others)}</td>"])
    heads = ["state", "says", "would find", "to before", "to anchor", "experts", "or says"]
    return table(heads, lines, "the trajectory, state by state")


def card(found, query, candidates, turtle):
    """One query: its pictures, its steps, what it found."""
    ranks = found["ranks"]
    out = [f"<article><h3>{escape(found['task'])}, query {escape(found['id'])}</h3>",
           f"<p>{escape(found['query'])}</p>", media_of(query, found["query"], 200, 6),
           f'<p class="soft">rank of the right one: latent {ranks["as trained"]}, '
           f'single {ranks["single"]}</p>']
    if turtle:
        out += ["<p>The walk as the steps say it:</p>", walk(found["steps"])]
    else:
        words = " \u2192 ".join(said(step) for step in found["steps"])
        out.append(f"<p>The steps say: {words}</p>")
    out.append('<p>First found:</p><ol class="row">')
    for n, (one, side) in enumerate(zip(found["retrieved"], candidates), 1):
        look = ' class="is-right"' if one["right"] else ""
        mark = ' <span class="right">\u2713 right</span>' if one["right"] else ""
        shown = media_of(side, one["label"], 84, 3)
        out.append(f"<li{look}>{shown}<div>{n}. {escape(one['label'])}{mark}</div></li>")
    out += ["</ol><details><summary>State by state</summary>", trajectory_table(found["steps"]),
            "</details></article>"]
    return "\n".join(out)


def write_report(path, result, shown):
    """Writes the file -> a line that says what is in it.

    result: what --json writes; shown: a (trajectory, query Side, Sides of the candidates found) a query.
    """
    cards, size, left_out = {}, 0, 0  # {name of a list: its cards}
    for found, query, candidates in tqdm(shown, "cards", leave=False):
        if size < LARGEST:
            text = card(found, query, candidates, turtle=not result["data"])
            size += len(text)
            cards.setdefault(found["list"], []).append(text)
        else:
            left_out += 1
    total = sum(task["queries"] for task in result["tasks"].values())
    largest = max(task["candidates"] for task in result["tasks"].values())
    count = (f"{len(shown) - left_out} of {total:,} queries, each with the first 5 of up to {largest:,} "
             "candidates")
    notes = [*result["notes"], f"shown below: {count}"]
    if left_out:
        notes.append(f"{left_out} more queries are left out: the file would be over 10 MB; lower --show")
    links = {"causality": "Causality", "heat": "Agreement and experts"}
    links |= {name: LISTS[name][0] for name in cards}
    nav = "".join(f'<a href="#{name}">{text}</a>' for name, text in links.items())
    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Probe of {escape(result['ckpt'])}</title><style>{STYLE}</style></head><body><header>",
        "<h1>Do the latent steps matter, and what do they say?</h1>",
        f"<p>{escape(result['ckpt'])}, {counted(len(result['tasks']), 'task', 'tasks')}, "
        f"K = {result['steps']}, {escape(result['device'])}, {result['seconds']:.0f} s</p>",
        "<ul class=\"soft\">" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>",
        f"<nav>{nav}</nav></header><main>",
        '<section id="causality"><h2>Causality: what changes the score is used</h2>',
        causality(result["all"], "all tasks", result["metric"], explained=True)]
    for name, task in result["tasks"].items():
        about = (f"{name}: {counted(task['queries'], 'query', 'queries')}, "
                 f"{counted(task['candidates'], 'candidate', 'candidates')}")
        rows = causality(task["rows"], name, task["metric"])
        out.append(f"<details><summary>{escape(about)}</summary>{rows}</details>")
    out += ["</section>", heat_maps(result)]
    for name, texts in cards.items():
        heading, about = LISTS[name]
        out.append(f'<section id="{name}"><h2>{heading}</h2><p class="soft">{about}</p><div class="cards">')
        out += [*texts, "</div></section>"]
    out.append("</main></body></html>\n")
    text = "\n".join(out)
    with writing(path) as f:
        f.write(text)
    return f"report: {path}, {len(text) / 2**20:.1f} MB, {count}"
