"""Turtle world, what train.py and eval.py use without --data: drawn on demand, no download.

A turtle on a 4x4 torus executes N moves; only their order decides where it ends.  The program reaches the model as
words, tiles, frames or lines of a page; the target is the final state, as text, board or clip.
"""

import functools
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import MEAN, DataError, Side, nearest
from tasks.beir import Task

MOVES, HEADINGS = ("forward", "left", "right"), ((0, -1), (1, 0), (0, 1), (-1, 0))  # north, east, south, west
STATES = [(x, y, h) for x in range(4) for y in range(4) for h in range(4)]
N = 8  # moves
FAMILIES = {  # as the benchmark's meta-tasks: how the program arrives, how the start does, how the final state is shown
    "image_cls": ("tiles", "words", "text"),
    "image_qa": ("words", "board", "text"),
    "image_ret": ("words", "words", "board"),
    "video_cls": ("frames", "words", "text"),
    "video_qa": ("frames", "board", "text"),
    "video_ret": ("words", "words", "clip"),
    "visdoc_ret": ("page", "words", "board"),
}


class World:
    """Turtle world, what `train.py` and `eval.py` use without --data: no files, pictures are drawn when they are needed.

    A turtle on a 4x4 torus executes N moves; only their order decides where it ends.  The rationale is the states passed
    through, the answer is the last.  Attributes as Pairs'.
    """

    def __init__(self, split="train", families="", test=400):
        self.names, self.bad = families.split(",") if families else list(FAMILIES), []
        for name in self.names:
            if name not in FAMILIES:
                raise DataError(f"--families: {name!r} is none of turtle world's.{nearest(name, FAMILIES)}")
        if len(set(self.names)) < len(self.names):
            raise DataError(f"--families {families!r}: one stands there twice")
        rng = np.random.default_rng(0)  # always the same split, whatever a run's seed
        programs = rng.permutation(len(MOVES) ** N)
        programs = programs[test:] if split == "train" else programs[:test]  # disjoint
        self.dataset = np.repeat(np.arange(len(self.names)), len(programs)).astype(np.int32)
        self.programs, self.digest = np.tile(programs, len(self.names)), f"turtle world {split} {families}"
        self.starts = rng.integers(len(STATES), size=len(self.programs))
        self.target = np.array([STATES.index(walk(*job)[-1]) for job in zip(self.starts, self.programs)], np.int64)

    def __len__(self):
        return len(self.dataset)

    def texts(self):
        """For the tokenizer: every word is one token, and so is every state."""
        return (word for word in [" " + m for m in MOVES] + [state_word(s) for s in STATES] for _ in range(20))

    def __getitem__(self, i):
        """-> (query Side, target Side)"""
        program, start, shown = FAMILIES[self.names[self.dataset[i]]]
        return program_side(self.programs[i], self.starts[i], program, start), state_side(self.target[i], shown)


def walk(start, program):
    """Number of the start state, program number in base 3 -> the 8 states after each move."""
    (x, y, h), passed = STATES[start], []
    for move in moves(program):
        h = (h + {"left": 3, "right": 1}.get(move, 0)) % 4
        if move == "forward":
            x, y = (x + HEADINGS[h][0]) % 4, (y + HEADINGS[h][1]) % 4
        passed.append((x, y, h))
    return passed


def moves(program):
    return tuple(MOVES[int(program) // 3**k % 3] for k in range(N))


def state_word(state):
    """(1, 2, 1) -> " byE": column a-d, row w-z, heading.  The blank belongs to it: it makes the token the same everywhere."""
    return " " + "abcd"[state[0]] + "wxyz"[state[1]] + "NESW"[state[2]]


def program_side(program, start, program_as, start_as):
    """Start and program as a query.  A frame of a clip stands twice: two frames make one visual token, so each shows one thing."""
    words, passed, state = moves(program), walk(start, program), STATES[start]
    media = {"tiles": lambda: [("image", stack([draw_tile(w) for w in words]))], "page": lambda: [("image", stack([draw_line(w) for w in words]))],
             "frames": lambda: [("video", [draw_tile(w) for w in words for _ in range(2)])], "board": lambda: [("image", draw_board(state))]}
    parts = [p for shown in (start_as, program_as) if shown != "words" for p in media[shown]()]
    text = state_word(state) * (start_as == "words") + "".join(f" {w}" for w in words) * (program_as == "words")
    return Side(parts + [("text", text)] * (text != ""), "".join(map(state_word, passed)), state_word(passed[-1]), f"turtle program {program}")


def state_side(index, shown):
    """One of the 64 states as text, as a board, or as a clip of a walk that ends there."""
    x, y, h = state = STATES[index]
    walked = [((x - k * HEADINGS[h][0]) % 4, (y - k * HEADINGS[h][1]) % 4, h) for k in (3, 2, 1, 0)]
    clip = lambda: [draw_board(s, tuple(walked[:k])) for k, s in enumerate(walked) for _ in range(2)]
    part = ("text", state_word(state)) if shown == "text" else ("image", draw_board(state)) if shown == "board" else ("video", clip())
    return Side([part], "", state_word(state), f"turtle state{state_word(state)}")


# Pictures stand on the grey that becomes 0 when pixels are normalised (MEAN): what is drawn is all that the vision tower
# sees, and it learns to read in fewer steps than on a white ground.
GROUND = tuple(round(255 * float(m)) for m in MEAN)


def arrow(draw, cx, cy, r, heading, fill):
    """A triangle that points north, east, south or west."""
    dx, dy = HEADINGS[heading]
    tail, side = (cx - r * dx, cy - r * dy), (0.7 * r * dy, -0.7 * r * dx)
    draw.polygon([(cx + r * dx, cy + r * dy), (tail[0] - side[0], tail[1] - side[1]), (tail[0] + side[0], tail[1] + side[1])], fill=fill)


def stack(images):
    """Pictures of one width, one below the other."""
    out = Image.new("RGB", (images[0].width, sum(i.height for i in images)))
    for i, image in enumerate(images):
        out.paste(image, (0, i * image.height))
    return out


@functools.cache
def draw_tile(word):
    """A move as an arrow: up is forward."""
    image = Image.new("RGB", (28, 28), GROUND)
    ImageDraw.Draw(image).rectangle((0, 0, 27, 27), outline="gray")
    arrow(ImageDraw.Draw(image), 14, 14, 10, *{"forward": (0, "black"), "left": (3, "blue"), "right": (1, "red")}[word])
    return image


@functools.cache
def draw_line(word):
    """A line of a page."""
    image = Image.new("RGB", (56, 28), GROUND)
    ImageDraw.Draw(image).text((2, 6), word, fill="black", font=ImageFont.load_default(14))
    return image


@functools.cache
def draw_board(state, trail=()):
    """The torus, 7 pixels a cell: one visual token.  States of the trail leave their cells dark, which tells a clip's frames apart."""
    image, (x, y, h) = Image.new("RGB", (28, 28), GROUND), state
    draw = ImageDraw.Draw(image)
    for i in range(16):
        draw.rectangle((i % 4 * 7, i // 4 * 7, i % 4 * 7 + 6, i // 4 * 7 + 6), outline="gray")
    for i, j, _ in trail:
        draw.rectangle((7 * i + 1, 7 * j + 1, 7 * i + 5, 7 * j + 5), fill="black")
    arrow(draw, 7 * x + 3, 7 * y + 3, 3, h, "white")
    return image


def world_tasks():
    """Every family as a Task "<family>/turtle": unseen programs against all 64 final states; and for the question answering
    ones "<family>/turtle_hard": only against the states where one wrong move would have led."""
    test = World("test")
    n = len(test) // len(FAMILIES)
    tasks = {}
    for f, name in enumerate(test.names):
        rows = range(f * n, (f + 1) * n)
        task = Task(f"{name}/turtle", [test[i][0] for i in rows], [state_side(s, FAMILIES[name][2]) for s in range(len(STATES))],
                    [{int(test.target[i]): 1} for i in rows], [None] * n, [str(test.programs[i]) for i in rows])
        tasks[task.name] = task
        if name.endswith("_qa"):
            near = [sorted({STATES.index(walk(test.starts[i], p)[-1]) for p in one_wrong_move(test.programs[i])} | {int(test.target[i])}) for i in rows]
            tasks[f"{task.name}_hard"] = replace(task, name=f"{task.name}_hard", candidates=near)
    return tasks


def one_wrong_move(program):
    """The numbers of the 2 N programs that differ from this one in one move."""
    return [program + (other - program // 3**k % 3) * 3**k for k in range(N) for other in range(3) if other != program // 3**k % 3]
