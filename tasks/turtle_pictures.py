"""The pictures of turtle world: moves as tiles and lines, states as boards and clips, rule books.

Each is drawn for a backbone, in whole visual tokens of its size.
"""

import functools

from PIL import Image, ImageDraw, ImageFont

from backbones.families import QWEN2_VL

HEADINGS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # north, east, south, west
STOP = "stop"  # fills up a program that is shorter than others of its world
ARROWS = {"forward": (0, "black"), "left": (3, "blue"), "right": (1, "red")}  # heading and colour of a tile's
COVERS = {  # of the rule books: colours of the upper and the lower half
    "turtle": ("white", "red"), "mirror": ("black", "red"),
    "compass": ("white", "blue"), "walls": ("black", "blue")}


def program_part(words, program_as, backbone, code=""):
    """Moves as one picture of tiles, as a page, or as the frames of a clip -> (kind, what is drawn).

    code: stands at the head of a page.
    """
    if program_as == "tiles":
        return "image", stack([draw_tile(word, backbone) for word in words])
    if program_as == "page":
        lines = [draw_line(word, backbone) for word in words]
        if code:
            lines.insert(0, draw_text(code.strip(), backbone))
        return "image", stack(lines)
    # two frames make one visual token: it shows one move
    return "video", [draw_tile(word, backbone) for word in words for _ in range(2)]


def clip_to(state, backbone):
    """The frames of three moves forward that end in this state, each twice."""
    x, y, h = state
    dx, dy = HEADINGS[h]
    walked, frames = [], []
    for k in (3, 2, 1, 0):
        here = ((x - k * dx) % 4, (y - k * dy) % 4, h)
        frames += [draw_board(here, backbone, tuple(walked))] * 2
        walked.append(here)
    return frames


def blank(width, height, backbone):
    """So many visual tokens of the grey that becomes 0 when pixels are normalised.

    What is drawn there is all that the vision tower sees: it learns to read in fewer steps than on white.
    """
    ground = tuple(round(255 * mean) for mean in backbone.mean)
    return Image.new("RGB", (width * backbone.side, height * backbone.side), ground)


def arrow(draw, cx, cy, r, heading, fill):
    """A triangle around (cx, cy) that points north, east, south or west."""
    dx, dy = HEADINGS[heading]
    tip = (cx + r * dx, cy + r * dy)
    tail_x, tail_y = cx - r * dx, cy - r * dy
    side_x, side_y = 0.7 * r * dy, -0.7 * r * dx
    left, right = (tail_x - side_x, tail_y - side_y), (tail_x + side_x, tail_y + side_y)
    draw.polygon([tip, left, right], fill=fill)


def stack(images):
    """Pictures of one width, one below the other."""
    out = Image.new("RGB", (images[0].width, sum(i.height for i in images)))
    for i, image in enumerate(images):
        out.paste(image, (0, i * image.height))
    return out


@functools.cache
def draw_tile(word, backbone=QWEN2_VL):
    """A move as an arrow: up is forward.  STOP is an empty tile."""
    image, side = blank(1, 1, backbone), backbone.side
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, side - 1, side - 1), outline="gray")
    if word != STOP:
        heading, colour = ARROWS[word]
        arrow(draw, side // 2, side // 2, side // 2 - 4, heading, colour)
    return image


@functools.cache
def draw_line(word, backbone=QWEN2_VL):
    """A line of a page.  STOP is an empty one."""
    return draw_text("" if word == STOP else word, backbone)


def draw_text(text, backbone):
    image = blank(2, 1, backbone)
    ImageDraw.Draw(image).text((2, 6), text, fill="black", font=ImageFont.load_default(14))
    return image


@functools.cache
def draw_rule(rule, backbone=QWEN2_VL):
    """The cover of a rule book: two halves of colours."""
    image, side = blank(1, 1, backbone), backbone.side
    draw, (upper, lower) = ImageDraw.Draw(image), COVERS[rule]
    draw.rectangle((0, 0, side - 1, side // 2 - 1), fill=upper)
    draw.rectangle((0, side // 2, side - 1, side - 1), fill=lower)
    return image


@functools.cache
def draw_board(state, backbone=QWEN2_VL, trail=()):
    """The torus with the turtle in this state, 4 x 4 cells: one visual token.

    trail: states that leave their cells dark, which tells a clip's frames apart.
    """
    x, y, h = state
    image, cell = blank(1, 1, backbone), backbone.side // 4
    draw, last = ImageDraw.Draw(image), cell - 1
    for i in range(16):
        left, top = i % 4 * cell, i // 4 * cell
        draw.rectangle((left, top, left + last, top + last), outline="gray")
    for i, j, _ in trail:
        draw.rectangle((cell * i + 1, cell * j + 1, cell * i + last - 1, cell * j + last - 1), fill="black")
    arrow(draw, cell * x + cell // 2, cell * y + cell // 2, 3, h, "white")
    return image
