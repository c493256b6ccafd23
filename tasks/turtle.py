"""Turtle world, what train.py and eval.py use without --data: drawn on demand, no download.

A turtle on a 4x4 torus executes 8 moves; only their order decides where it ends.  The program reaches the
model as words, tiles, frames or lines of a page; the target is the final state, as text, board or clip.
Programs may have other lengths (`moves`), and a rule book at the start may give the moves other meanings
(`rules`).
"""

import functools
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import QWEN2_VL, DataError, Side, nearest, quote
from tasks.beir import Task

MOVES = ("forward", "left", "right")
STOP = "stop"  # fills up a program that is shorter than others of its world
HEADINGS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # north, east, south, west
STATES = [(x, y, h) for x in range(4) for y in range(4) for h in range(4)]
RULES = ("turtle", "mirror", "compass", "walls")  # what the moves mean; see `walk`
QUOTA = 3**8  # programs of each length
LONGEST = 14  # moves
# as the benchmark's meta-tasks: how the program arrives, how the start does, how the final state is shown
FAMILIES = {
    "image_cls": ("tiles", "words", "text"),
    "image_qa": ("words", "board", "text"),
    "image_ret": ("words", "words", "board"),
    "video_cls": ("frames", "words", "text"),
    "video_qa": ("frames", "board", "text"),
    "video_ret": ("words", "words", "clip"),
    "visdoc_ret": ("page", "words", "board"),
}


class World:
    """Pairs that are drawn when they are needed; attributes as those of data.Pairs.

    split: train or test, which share no program, and of lengths with few programs no start state; families:
    names with commas between, "": all; test: programs of the test split; backbone: data.Backbone for which
    pictures are drawn; moves: the length of all programs, or the shortest and the longest, as "2-12", with
    equally many of each, filled up with STOP to equal places; rules: every query shows one of RULES,
    otherwise all go by the first.
    The rationale of a query is the states passed through, the answer is the last.
    """

    def __init__(self, split="train", families="", test=400, backbone=QWEN2_VL, moves="8", rules=False):
        self.names = families.split(",") if families else list(FAMILIES)
        self.bad = []
        for name in self.names:
            if name not in FAMILIES:
                raise DataError(f"--families: {name!r} is none of turtle world's.{nearest(name, FAMILIES)}")
        if len(set(self.names)) < len(self.names):
            raise DataError(f"--families {families!r}: one stands there twice")
        each = lengths_of(moves)
        test //= len(each)
        rng, programs, lengths = np.random.default_rng(0), [], []  # the same split, whatever a run's seed
        for n in each:
            drawn = rng.permutation(len(MOVES) ** n)
            if len(drawn) < 4 * test:
                drawn = np.resize(drawn, test + QUOTA)
            drawn = np.resize(drawn[test:], QUOTA - test) if split == "train" else drawn[:test]
            programs.append(drawn)
            lengths += [n] * len(drawn)
        count = len(self.names)
        self.dataset = np.repeat(np.arange(count), len(lengths)).astype(np.int32)
        self.programs, self.lengths = np.tile(np.concatenate(programs), count), np.tile(lengths, count)
        self.starts = rng.integers(len(STATES), size=len(self.programs))
        few = len(MOVES) ** self.lengths < 4 * test
        eight = self.starts[few] // 8  # one start of every 8 is kept for the test split
        other = rng.integers(1, 8, size=len(eight)) if split == "train" else 0
        self.starts[few] = 8 * eight + (eight + other) % 8
        self.rules = rng.integers(len(RULES), size=len(self.programs)) if rules else None
        self.digest = f"turtle world {split} {families}"
        if moves != "8" or rules:
            self.digest += f" moves {moves}, rules {rules}"
        ends = [self.passed(i)[-1] for i in range(len(self))]
        self.target = np.array([STATES.index(end) for end in ends], np.int64)
        self.longest = max(each)
        self.negatives = 0  # no record has hard ones
        self.backbone = backbone

    def __len__(self):
        return len(self.dataset)

    def texts(self):
        """For the tokenizer: every word is one token, and so is every state."""
        words = [f" {move}" for move in MOVES] + [state_word(state) for state in STATES]
        if min(self.lengths) < self.longest:
            words.append(f" {STOP}")
        if self.rules is not None:
            words += [f" {rule}" for rule in RULES]
        for word in words:
            yield from [word] * 20

    def __getitem__(self, i):
        """-> (query Side, target Side)"""
        _, _, shown = FAMILIES[self.names[self.dataset[i]]]
        return self.query(i), state_side(self.target[i], shown, self.backbone)

    def rule(self, i):
        return RULES[0 if self.rules is None else self.rules[i]]

    def passed(self, i):
        """The states of pair i, one after each move."""
        return walk(self.starts[i], self.programs[i], self.lengths[i], self.rule(i))

    def query(self, i):
        """The query Side: rule book, start and program, each as the family shows it."""
        program_as, start_as, _ = FAMILIES[self.names[self.dataset[i]]]
        parts, text, backbone = [], "", self.backbone
        state, words = STATES[self.starts[i]], moves(self.programs[i], self.lengths[i])
        words += (STOP,) * (self.longest - len(words))
        if start_as == "words":
            if self.rules is not None:
                text += f" {self.rule(i)}"
            text += state_word(state)
        else:
            if self.rules is not None:
                parts.append(("image", draw_rule(self.rule(i), backbone)))
            parts.append(("image", draw_board(state, backbone)))
        if program_as == "words":
            text += "".join(f" {word}" for word in words)
        else:
            parts.append(program_part(words, program_as, backbone))
        if text:
            parts.append(("text", text))
        passed = [state_word(s) for s in self.passed(i)]
        return Side(parts, "".join(passed), passed[-1], f"turtle program {self.programs[i]}")


def lengths_of(moves):
    """--moves: "8" -> [8], "2-4" -> [2, 3, 4]"""
    first, dash, last = moves.partition("-")
    if not dash:
        last = first
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= LONGEST):
        raise DataError(f"--moves {quote(moves)}: needs a number of moves, or the fewest and the most, as "
                        f"2-12; 1 to {LONGEST}")
    return list(range(int(first), int(last) + 1))


def walk(start, program, n=8, rule="turtle"):
    """Number of the start state, number of a program of n moves -> the n states, one after each move.

    turtle: turn, or go where the head points to; on a torus, so that the board has no edge.
    mirror: left and right are exchanged.  walls: there is an edge, and a step over it is not made.
    compass: forward, left and right go one step north, west and east, and the head points there.
    """
    x, y, h = STATES[start]
    passed = []
    for move in moves(program, n):
        turn = {"forward": 0, "left": 3, "right": 1}[move]
        if rule == "mirror":
            turn = -turn
        h = turn if rule == "compass" else (h + turn) % 4
        if move == "forward" or rule == "compass":
            to_x, to_y = x + HEADINGS[h][0], y + HEADINGS[h][1]
            inside = 0 <= to_x < 4 and 0 <= to_y < 4
            if inside or rule != "walls":
                x, y = to_x % 4, to_y % 4
        passed.append((x, y, h))
    return passed


def moves(program, n=8):
    """The number of a program of n moves, in base 3 -> its words."""
    return tuple(MOVES[int(program) // 3**k % 3] for k in range(n))


def state_word(state):
    """(1, 2, 1) -> " byE": column a-d, row w-z, heading.

    The blank belongs to it: it makes the token the same everywhere.
    """
    x, y, h = state
    return " " + "abcd"[x] + "wxyz"[y] + "NESW"[h]


def program_part(words, program_as, backbone):
    """Moves as one picture of tiles, as a page, or as the frames of a clip -> (kind, what is drawn)."""
    if program_as == "tiles":
        return "image", stack([draw_tile(word, backbone) for word in words])
    if program_as == "page":
        return "image", stack([draw_line(word, backbone) for word in words])
    frames = []
    for word in words:
        frames += [draw_tile(word, backbone)] * 2  # two frames make one visual token: it shows one move
    return "video", frames


def state_side(index, shown, backbone):
    """The number of a state, shown as text, as a board, or as a clip of a walk that ends there -> Side."""
    state = STATES[index]
    word = state_word(state)
    if shown == "text":
        part = ("text", word)
    elif shown == "board":
        part = ("image", draw_board(state, backbone))
    else:
        part = ("video", clip_to(state, backbone))
    return Side([part], "", word, f"turtle state{word}")


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
    if word == STOP:
        return image
    heading, colour = {"forward": (0, "black"), "left": (3, "blue"), "right": (1, "red")}[word]
    arrow(draw, side // 2, side // 2, side // 2 - 4, heading, colour)
    return image


@functools.cache
def draw_line(word, backbone=QWEN2_VL):
    """A line of a page.  STOP is an empty one."""
    image = blank(2, 1, backbone)
    if word == STOP:
        return image
    ImageDraw.Draw(image).text((2, 6), word, fill="black", font=ImageFont.load_default(14))
    return image


@functools.cache
def draw_rule(rule, backbone=QWEN2_VL):
    """The cover of a rule book: two halves of colours."""
    image, side = blank(1, 1, backbone), backbone.side
    draw, number = ImageDraw.Draw(image), RULES.index(rule)
    draw.rectangle((0, 0, side - 1, side // 2 - 1), fill=("white", "black")[number % 2])
    draw.rectangle((0, side // 2, side - 1, side - 1), fill=("red", "blue")[number // 2])
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


def world_tasks(backbone=QWEN2_VL, moves="8", rules=False):
    """{name: Task}: every family as "<family>/turtle", unseen programs against all 64 final states.

    Those of question answering also as "<family>/turtle_hard": only against the states where one wrong move
    would have led.  moves, rules: see World.
    """
    test = World("test", backbone=backbone, moves=moves, rules=rules)
    n = len(test) // len(FAMILIES)
    tasks = {}
    for f, name in enumerate(test.names):
        rows = range(f * n, (f + 1) * n)
        _, _, shown = FAMILIES[name]
        task = Task(
            f"{name}/turtle",
            queries=[test[i][0] for i in rows],
            corpus=[state_side(s, shown, backbone) for s in range(len(STATES))],
            relevant=[{int(test.target[i]): 1} for i in rows],
            candidates=[None] * n,
            query_ids=query_ids(test, rows),
            corpus_ids=[state_word(state).strip() for state in STATES])
        tasks[task.name] = task
        if name.endswith("_qa"):
            hard = f"{task.name}_hard"
            tasks[hard] = replace(task, name=hard, candidates=[nearly_right(test, i) for i in rows])
    return tasks


def query_ids(world, rows):
    """The numbers of programs; with several lengths or rules, which have the same numbers, of rows, too."""
    several = world.rules is not None or len(set(world.lengths)) > 1
    return [f"{world.programs[i]}-{i}" if several else str(world.programs[i]) for i in rows]


def nearly_right(world, i):
    """The numbers of the states to which pair i leads with at most one wrong move, sorted."""
    n, rule = world.lengths[i], world.rule(i)
    ends = {int(world.target[i])}
    for program in one_wrong_move(world.programs[i], n):
        ends.add(STATES.index(walk(world.starts[i], program, n, rule)[-1]))
    return sorted(ends)


def one_wrong_move(program, n):
    """The numbers of the 2 n programs of n moves that differ from this one in one."""
    programs = []
    for k in range(n):
        move = program // 3**k % 3
        for other in range(3):
            if other != move:
                programs.append(program + (other - move) * 3**k)
    return programs
