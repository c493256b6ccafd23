"""Turtle world, what train.py and eval.py use without --data: drawn on demand, no download.

A turtle on a 4x4 torus executes 8 moves; only their order decides where it ends.  The program reaches the
model as words, tiles, frames or lines of a page; the target is the final state, as text, board or clip.
Programs may have other lengths (`moves`), a rule book at the start may give the moves other meanings
(`rules`), and pages may bear a code word that belongs to the answer (`codes`).
"""

import functools
import string
from dataclasses import replace

import numpy as np

from backbones.families import QWEN2_VL
from files.errors import DataError, nearest, quote
from files.items import Side
from tasks.beir import Task
from tasks.turtle_pictures import clip_to, draw_board, draw_rule, HEADINGS, program_part, STOP

MOVES = ("forward", "left", "right")
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
    "visdoc_ret": ("page", "words", "board")}
# queries of words alone are learnt first: half as many batches leave more to those with a picture or clip
WEIGHTS = {"image_ret": 0.5, "video_ret": 0.5}
CODED = {"visdoc_ret": ("page", "words", "text")}  # families of a world with code words
LETTERS = 4  # of a code word


class World:
    """Pairs that are drawn when they are needed; attributes as those of files.records.Pairs.

    split: train or test, which share no program; of few moves there are too few programs, those they share,
        and then no start state
    families: names with commas between, "": all
    test: programs of the test split
    backbone: the family for which pictures are drawn
    moves: the length of all programs, or the fewest and the most, as "2-12": as many of each, and shorter
        ones are filled up with STOP
    rules: every query shows one of RULES; otherwise all go by the first
    codes: pages with code words, and no other family
    The rationale of a query is the states passed through, and the letters of its code word; the answer is the
    last state, and the code word.
    """

    def __init__(self, split="train", families="", test=400, backbone=QWEN2_VL, moves="8", rules=False,
                 codes=False):
        self.families = CODED if codes else FAMILIES
        self.names = families.split(",") if families else list(self.families)
        self.weights, self.bad = WEIGHTS, []
        for name in self.names:
            if name not in self.families:
                known = nearest(name, self.families)
                raise DataError(f"--families: {name!r} is none of this turtle world's.{known}")
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
        shared = len(MOVES) ** self.lengths < 4 * test
        # of every 8 starts one is kept for the test split: of 8 .. 15 it is 9
        block = self.starts[shared] // 8
        shift = rng.integers(1, 8, size=len(block)) if split == "train" else 0
        self.starts[shared] = 8 * block + (block + shift) % 8
        self.rules = rng.integers(len(RULES), size=len(self.programs)) if rules else None
        self.digest = f"turtle world {split} {families}"
        if moves != "8" or rules or codes:
            self.digest += f" moves {moves}, rules {rules}, codes {codes}"
        self.target = np.array([STATES.index(self.passed(i)[-1]) for i in range(len(self))], np.int64)
        if codes:  # the number of a target is that of its state and, in 64s, that of its code word, from 1 on
            self.target += len(STATES) * rng.integers(1, 1 + 26**LETTERS, size=len(self))
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
        if self.families is CODED:
            words += [f" {letter}" for letter in string.ascii_lowercase]
        for word in words:
            yield from [word] * 20

    def __getitem__(self, i):
        """-> (query Side, target Side)"""
        _, _, shown = self.families[self.names[self.dataset[i]]]
        return self.query(i), state_side(self.target[i], shown, self.backbone)

    @functools.cached_property
    def query_hash(self):
        """(N,) equal for pairs that are equal: a few moves make few programs."""
        key = np.zeros(len(self), np.int64)
        targets = len(STATES) * (1 + 26**LETTERS)
        parts = (self.dataset, 8), (self.lengths, 16), (self.starts, len(STATES)), (self.target, targets)
        for values, count in parts:
            key = key * count + values
        return key * 3**LONGEST + self.programs

    def rule(self, i):
        return RULES[0 if self.rules is None else self.rules[i]]

    def passed(self, i):
        """The states of pair i, one after each move."""
        return walk(self.starts[i], self.programs[i], self.lengths[i], self.rule(i))

    def query(self, i):
        """The query Side: rule book, start and program, each as the family shows it."""
        program_as, start_as, _ = self.families[self.names[self.dataset[i]]]
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
            parts.append(program_part(words, program_as, backbone, code_word(self.target[i])))
        if text:
            parts.append(("text", text))
        rationale = "".join(state_word(s) for s in self.passed(i)) + code_word(self.target[i])
        return Side(parts, rationale, target_word(self.target[i]), f"turtle program {self.programs[i]}")


def lengths_of(moves):
    """--moves: "8" -> [8], "2-4" -> [2, 3, 4]"""
    first, dash, last = moves.partition("-")
    if not dash:
        last = first
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= LONGEST):
        raise DataError(f"--moves {quote(moves)}: needs a number of moves, or the fewest and the most, as "
                        f"2-12; 1 to {LONGEST}")
    return list(range(int(first), int(last) + 1))


def moves_lost(processor, moves):
    """What there is to say when a checkpoint takes fewer frames than turtle world's clips have, or ""."""
    frames, taken = 2 * lengths_of(moves)[-1], processor.limits.num_frames
    if frames <= taken:
        return ""
    return (f"turtle world's longest clips have {frames} frames, and the checkpoint takes {taken} of a clip: "
            "moves are lost there")


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


def code_word(target):
    """The number of a target -> " q z k t", or "" if it has none."""
    number, letters = int(target) // len(STATES) - 1, ""
    if number < 0:
        return ""
    for _ in range(LETTERS):
        letters += " " + string.ascii_lowercase[number % 26]
        number //= 26
    return letters


def target_word(target):
    """The number of a target -> its state and its code word."""
    return state_word(STATES[target % len(STATES)]) + code_word(target)


def nearly_equal(target):
    """Numbers of targets that have another state, or one other letter."""
    state, code, n = int(target) % len(STATES), int(target) // len(STATES) - 1, len(STATES)
    near = [(state + step) % n + n * (code + 1) for step in (1, 4, 16)]
    for k in range(LETTERS):
        letter = code // 26**k % 26
        near.append(state + n * (code + ((letter + 1) % 26 - letter) * 26**k + 1))
    return near


def state_side(target, shown, backbone):
    """The number of a target, shown as text, as a board, or as a clip of a walk that ends there -> Side."""
    state, word = STATES[target % len(STATES)], target_word(target)
    if shown == "text":
        part = ("text", word)
    elif shown == "board":
        part = ("image", draw_board(state, backbone))
    else:
        part = ("video", clip_to(state, backbone))
    return Side([part], "", word, f"turtle state{word}")


def world_tasks(backbone=QWEN2_VL, moves="8", rules=False, codes=False):
    """{name: Task}: every family as "<family>/turtle", unseen programs against all 64 final states.

    Those of question answering also as "<family>/turtle_hard": only against the states where one wrong move
    would have led.  moves, rules, codes: see World.  With code words the candidates are all targets and those
    that differ from one in a single thing.
    """
    test = World("test", backbone=backbone, moves=moves, rules=rules, codes=codes)
    n, numbers = len(test) // len(test.names), range(len(STATES))
    if codes:
        near = [number for target in test.target for number in nearly_equal(target)]
        numbers = sorted({*test.target.tolist(), *near})
    place = {number: row for row, number in enumerate(numbers)}
    tasks = {}
    for f, name in enumerate(test.names):
        rows = range(f * n, (f + 1) * n)
        _, _, shown = test.families[name]
        task = Task(
            f"{name}/turtle",
            queries=[test[i][0] for i in rows],
            corpus=[state_side(number, shown, backbone) for number in numbers],
            relevant=[{place[test.target[i]]: 1} for i in rows],
            candidates=[None] * n,
            query_ids=query_ids(test, rows),
            corpus_ids=[target_word(number).strip() for number in numbers])
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
    program, n, ends = int(world.programs[i]), world.lengths[i], {int(world.target[i])}
    for k in range(n):
        right = program // 3**k % 3
        for move in {0, 1, 2} - {right}:
            wrong = program + (move - right) * 3**k
            ends.add(STATES.index(walk(world.starts[i], wrong, n, world.rule(i))[-1]))
    return sorted(ends)
