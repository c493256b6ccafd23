"""The picture of README: from items to the vector, and what it buys, as SVG for light and for dark pages.

    python -m tools.compare --png assets/turtle_compare.png --json assets/turtle_compare.json
    python -m tools.front_picture

The figures are those of the JSON file.
"""

import math
from dataclasses import dataclass
from html import escape

from engine.flags import command, parse_flags
from files.errors import DataError
from files.jsonl import parse_json
from files.writing import write_text

LIGHT = dict(
    card="#ffffff", edge="#d1d9e0", ink="#1f2328", quiet="#59636e", grid="#e4e8ec", block="#e3e9f0",
    text="#0969da", picture="#1a7f37", clip="#bc4c00", page="#8250df", latent="#bf3989", token="#8c959f")
DARK = dict(
    card="#0d1117", edge="#3d444d", ink="#f0f6fc", quiet="#9198a1", grid="#262c36", block="#2a323d",
    text="#4493f8", picture="#3fb950", clip="#e0823d", page="#ab7df8", latent="#f778ba", token="#7d8590")
THEMES = dict(light=LIGHT, dark=DARK)
WIDTH, HEIGHT = 1000, 410
SANS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
STATE_Y, BLOCK_Y, TOKEN_Y = 128, 168, 272  # of states, of the decoder's top, of the middle of its inputs
BLOCK_HEIGHT, CELL = 72, 22
# the plot: left, right, top, bottom
LEFT, RIGHT, TOP, BOTTOM = 728, 972, 84, 322


@dataclass
class Config:
    json: str = "assets/turtle_compare.json"  # what tools.compare has measured
    out: str = "assets/front"  # the files are OUT_light.svg and OUT_dark.svg


class Drawing:
    """Shapes as SVG, in the colours of a theme."""

    def __init__(self, theme):
        self.colour, self.shapes = theme, []

    def text(self, x, y, words, size=14, colour="ink", anchor="middle", **more):
        style = {"font-size": size, "fill": self.colour[colour], "text-anchor": anchor}
        self.add("text", escape(words), x=x, y=y, **style, **more)

    def code(self, x, y, words):
        self.text(x, y, words, 12, font_family=MONO)

    def box(self, x, y, width, height, fill, stroke="none", radius=4, **more):
        self.add("rect", x=x, y=y, width=width, height=height, rx=radius,
                 fill=self.colour.get(fill, fill), stroke=self.colour.get(stroke, stroke), **more)

    def dot(self, x, y, colour, radius=6):
        self.add("circle", cx=x, cy=y, r=radius, fill=self.colour[colour])

    def line(self, path, colour="ink", width=1.6, arrow=True, dashes="none"):
        more = {"marker-end": f"url(#{colour})"} if arrow else {}
        self.add("path", d=path, fill="none", stroke=self.colour[colour], stroke_width=width,
                 stroke_dasharray=dashes, stroke_linejoin="round", **more)

    def add(self, tag, content="", **values):
        given = " ".join(f'{name.replace("_", "-")}="{plain(value)}"' for name, value in values.items())
        self.shapes.append(f"<{tag} {given}>{content}</{tag}>" if content else f"<{tag} {given}/>")

    def svg(self, title):
        heads = []
        for name in ("ink", "latent", "quiet"):
            heads.append(f'<marker id="{name}" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="5" '
                         f'markerHeight="5" orient="auto"><path d="M0 0 8 4 0 8z" '
                         f'fill="{self.colour[name]}"/></marker>')
        start = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                 f'height="{HEIGHT}" role="img" font-family="{SANS}">')
        return "\n".join([start, f"<title>{escape(title)}</title>", f"<defs>{''.join(heads)}</defs>",
                          *self.shapes, "</svg>", ""])


def plain(value):
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


# ---- the pipeline
def draw_pipeline(d):
    for x, head, below in ((206, "prefix", "one pass"), (408, "K = 8 latent steps", "no token is sampled"),
                           (582, "suffix", "one pass")):
        d.text(x, 38, head, 15, font_weight=600)
        d.text(x, 57, below, 13, "quiet")
    draw_items(d)
    d.box(118, BLOCK_Y + 48, 534, 16, "block", radius=0)  # the cache joins the blocks
    for x, width in ((118, 176), (342, 38), (462, 38), (520, 132)):
        d.box(x, BLOCK_Y, width, BLOCK_HEIGHT, "block", radius=6)
    d.text(206, BLOCK_Y + 30, "decoder", 15, font_weight=600)
    d.text(206, BLOCK_Y + 60, "keys and values are kept", 12, "quiet")
    d.text(586, BLOCK_Y + 30, "decoder", 15, font_weight=600)

    item = [(x, kind) for x, kind in zip(range(134, 230, 24), ("text", "picture", "clip", "page"))]
    for x, colour in (*item, (242, "ink"), (277, "latent")):
        draw_cell(d, x, colour)
    d.text(168, 306, "your item", 13)
    d.code(232, 324, "<disc_emb>")
    d.code(279, 306, "<bot>")
    draw_state(d, 242, "ink")
    draw_state(d, 277, "latent")
    d.text(277, STATE_Y - 13, "z₀", 14)

    for x, gap, before in ((361, 318, 277), (481, 438, 414)):
        draw_step(d, x, gap, before)
    d.line(f"M370 {STATE_Y} H380", "latent", arrow=False)
    d.text(361, STATE_Y - 13, "z₁", 14)
    d.text(481, STATE_Y - 13, "z₈", 14)
    d.text(401, STATE_Y + 4, "· · ·", 18, "latent", font_weight=700)
    d.text(401, TOKEN_Y + 5, "· · ·", 18, "latent", font_weight=700)
    down = f"V{STATE_Y + 23}"
    d.line(f"M242 {STATE_Y - 8} V96 Q242 90 248 90 H439 Q445 90 445 96 {down}", "quiet", dashes="4 3")
    d.line(f"M319 90 Q325 90 325 96 {down}", "quiet", dashes="4 3")
    d.text(238, 98, "anchor", 13, anchor="end")

    for x in (543, 586, 629):
        draw_cell(d, x, "token")
    d.code(543, 306, "<eot>")
    d.code(584, 324, "</think>")
    d.code(617, 306, "<gen_emb>")
    draw_state(d, 629, "ink")
    d.line(f"M629 {STATE_Y - 8} V106")
    for i, colour in enumerate(("text", "page", "latent", "clip", "picture")):
        d.box(604 + 10 * i, 84, 10, 18, colour, "card", 0)
    d.text(598, 98, "unit vector", 13, anchor="end")

    d.text(118, 364, "A", 14, "latent", "start", font_weight=700)
    d.text(138, 364, "adapter: 4 experts, 2 of them chosen by state, step and anchor", 13, "quiet", "start")
    d.text(118, 386, "z", 14, "latent", "start", font_weight=700)
    d.text(138, 386, "state after the final norm: zₖ₊₁ = decoder(A(zₖ, k, anchor))", 13, "quiet", "start")


def draw_step(d, x, gap, before):
    """A latent step at x: from the state at `before` through the adapter at `gap` to the next state."""
    y = STATE_Y + 26  # the adapter's top
    d.line(f"M{before + 9} {STATE_Y} H{gap - 13} Q{gap - 7} {STATE_Y} {gap - 7} {STATE_Y + 6} V{y - 2}",
           "latent")
    d.line(f"M{gap} {y + 26} V{TOKEN_Y - 6} Q{gap} {TOKEN_Y} {gap + 6} {TOKEN_Y} H{x - CELL / 2 - 2}",
           "latent")
    d.box(gap - 15, y, 30, 26, "card", "latent", 5, stroke_width=1.6)
    d.text(gap, y + 18, "A", 15, "latent", font_weight=700)
    draw_cell(d, x, "latent")
    draw_state(d, x, "latent")


def draw_items(d):
    """The four kinds, and an arrow into the prefix."""
    for i, kind in enumerate(("text", "picture", "clip", "page")):
        y = 198 + 39 * i
        d.box(14, y, 88, 32, "card", kind, 6, stroke_width=1.6)
        draw_icon(d, kind, 22, y + 7)
        d.text(72, y + 21, kind, 13)
    d.line(f"M103 {TOKEN_Y} H120")


def draw_icon(d, kind, x, y):
    """18 x 18 at x, y."""
    if kind == "text":
        d.text(x + 9, y + 14, "Aa", 14, kind, font_weight=700)
        return
    if kind == "page":
        d.line(f"M{x + 3} {y} h8 l4 4 v14 h-12z M{x + 6} {y + 8} h6 m-6 4 h6", kind, 1.5, False)
        return
    d.line(f"M{x} {y + 2} h18 v14 h-18z", kind, 1.5, False)
    if kind == "picture":
        d.line(f"M{x + 1} {y + 14} l5 -6 4 4 3 -3 4 5", kind, 1.5, False)
    else:
        d.add("path", d=f"M{x + 6.5} {y + 5} l6 4 -6 4z", fill=d.colour[kind])


def draw_cell(d, x, colour):
    """An input of the decoder, and its way into it."""
    d.box(x - CELL / 2, TOKEN_Y - CELL / 2, CELL, CELL, colour)
    d.line(f"M{x} {TOKEN_Y - CELL / 2 - 1} V{BLOCK_Y + BLOCK_HEIGHT + 3}")


def draw_state(d, x, colour):
    d.line(f"M{x} {BLOCK_Y - 1} V{STATE_Y + 9}")
    d.dot(x, STATE_Y, colour)


# ---- the plot
def draw_plot(d, measured):
    rows = measured["rows"]
    K = max(row["steps"] or 0 for row in rows)
    low, high = min(row["ms"] for row in rows) / 1.25, max(row["ms"] for row in rows) * 1.6
    chance = sum(measured["chance"].values()) / len(measured["chance"])

    def place(ms, share):
        across = math.log(ms / low) / math.log(high / low)
        return LEFT + (RIGHT - LEFT) * across, BOTTOM - (BOTTOM - TOP) * share

    d.text((LEFT + RIGHT) / 2 - 14, 38, "accuracy against time", 15, font_weight=600)
    below = f"turtle world, hit@1, mean of {len(measured['chance'])} tasks"
    d.text((LEFT + RIGHT) / 2 - 14, 57, below, 13, "quiet")
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = place(low, share)
        d.line(f"M{LEFT} {y:.1f} H{RIGHT}", "grid", 1, False)
        d.text(LEFT - 8, y + 4, f"{share:.0%}", 12, "quiet", "end")
    for ms in (n * 10**k for k in range(-2, 4) for n in (1, 1.5, 2, 3, 5, 7)):
        if low <= ms <= high:
            d.text(place(ms, 0)[0], BOTTOM + 20, f"{ms:g}", 12, "quiet")
    unit = f"milliseconds a query, {measured['device'].upper()}"
    d.text((LEFT + RIGHT) / 2, BOTTOM + 40, unit, 13, "quiet")
    _, y = place(low, chance)
    d.line(f"M{LEFT} {y:.1f} H{RIGHT}", "quiet", 1.2, False, "3 3")
    d.text(RIGHT, y - 6, f"chance {chance:.1%}", 12, "quiet", "end")

    latent = [place(row["ms"], row["mean"]) for row in rows if row["mode"] == "latent"]
    d.line("M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in latent), "latent", 1.2, False)
    for row in rows:
        (x, y), hit = place(row["ms"], row["mean"]), f"{row['mean']:.1%}"
        if row["mode"] == "latent":
            d.dot(x, y, "latent", 5)
            if row["steps"] == K:
                note(d, x - 12, y + 24, "latent", "end", f"{K} latent steps", hit)
            elif row["steps"] > 2 and row["steps"] % 2 == 0:
                d.text(x, y - 10, f"{row['steps']}", 12, "latent")
        elif row["mode"] == "single":
            d.dot(x, y, "text", 5)
            note(d, x - 20, y - 36, "text", "start", "single pass", hit)
        elif row["mode"] == "cot":
            d.dot(x, y, "clip", 5)
            note(d, x - 4, y + 24, "clip", "start", hit, f"{row['tokens']:.0f} tokens", "written")


def note(d, x, y, colour, anchor, *lines):
    """Lines in a colour, which the grid does not cross."""
    for around in (dict(stroke=d.colour["card"], stroke_width=5), {}):  # not every viewer knows paint-order
        for i, line in enumerate(lines):
            d.text(x, y + 17 * i, line, 13, colour, anchor, font_weight=600, **around)


def picture(measured, theme):
    """What tools.compare has measured, a theme -> the text of an SVG file."""
    d = Drawing(theme)
    d.box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", "edge", 10)
    draw_pipeline(d)
    d.line(f"M676 24 V{HEIGHT - 24}", "edge", 1, False)
    draw_plot(d, measured)
    return d.svg("PLUME: prefix, latent steps, suffix; and accuracy against time")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    with open(cfg.json, "rb") as f:
        measured = parse_json(f.read(), cfg.json)
    if not (isinstance(measured, dict) and {"rows", "chance", "device"} <= measured.keys()):
        raise DataError(f"{cfg.json}: is no file of python -m tools.compare --json")
    for name, theme in THEMES.items():
        write_text(f"{cfg.out}_{name}.svg", picture(measured, theme))
        print(f"{cfg.out}_{name}.svg")


if __name__ == "__main__":
    command(main)
