"""The progressive explicit-to-latent curriculum: which part of the rationale is still text at which step.

Paper, section "curriculum": the rationale is cut into S segments; stage s replaces the first s of them by s*c
latent steps, so that reasoning moves from tokens into hidden states one segment at a time.  S = 4, c = 2:

    stage 0   <bot> [seg 1][seg 2][seg 3][seg 4] <eot></think> answer <gen_emb>       0 latent steps
    stage 1   <bot> z z      [seg 2][seg 3][seg 4] <eot></think> answer <gen_emb>     c
    ...
    stage S   <bot> z z z z z z z z                <eot></think> answer <gen_emb>     S*c = K
    at last   <bot> z z z z z z z z                <eot></think> <gen_emb>            the format of inference

`rest_of_rationale="inside"` (default, as drawn) leaves the remaining text inside the thought, so each latent
takes the place of the text it replaces.  `"after"` puts it behind <eot>, as the released code does.

`adaptive` gives every unit of the rationale (a sentence, or a word where there is only one sentence) one
latent step instead.  A rationale of n < S units is told in n steps, and those behind read <eot>; of a longer
one the end stays written at every stage.  So the model says when it is done, which mode "auto" follows.

A stage is entered on a fixed schedule (paper), or as soon as the model is good at the present one (`gate`),
and a share of the steps goes back to earlier stages (`replay`); `Progress` decides.
No tensors and no tokenizer here: this file is the schedule and the text.
"""

import itertools
import math
import random
import re
from dataclasses import dataclass, replace

# What stands in front of the first thing that is said: blanks, marks, and numbers of a list, as 1. (2) b) IV.
MARK = r"[\s*•#>|_()\[\]\"'“”‘’.,:;!?…。！？；]|-(?=\s)"
MARKS = rf"(?:{MARK}){{0,80}}"  # a text may be nothing else: with a bound it takes no time to find that out
NUMBER = r"(?:\d{1,3}(?:\.\d+)*|[ivxIVX]{2,5}|[a-zA-Z](?=\)|\.\s\w\w))[.)]"
LEAD = rf"(?:{MARKS}{NUMBER}[^\w\s]*\s)*{MARKS}(?!{MARK})(?=\S)"
# A sentence, and a word with the blank in front of it, on a new line (or in a new sentence) with its lead.
SENTENCE = re.compile(rf"(?:{LEAD})?.+?(?:[.!?;]+(?=\s|\Z)|[。！？；]+|\Z)(?:\W+\Z)?|\W+\Z", re.S)
WORD = re.compile(rf"(?:(?:(?<![^.!?;])|(?=\s*\n)){LEAD})?\s*\S+(?:\s+\Z)?|\s+\Z")
LEAD_OR_BLANKS = re.compile(rf"{LEAD}|\s*")  # where there is no word, punctuation says something


@dataclass(frozen=True)
class Stage:
    index: int  # 0 .. S
    latent_steps: int  # index * c
    answer: bool  # is the answer still written out?


@dataclass(frozen=True)
class Curriculum:
    """S segments, c latent steps for each; the last stage takes `last_stage` of the run, the others the rest.

    With a gate that is only the latest time to enter a stage: stage 0, where the rationale itself is learnt,
    may take half of the time before the last stage, and each one after it less than the one before.
    ValueError: values that make no schedule.
    """

    segments: int = 4  # S
    steps_per_segment: int = 2  # c; K = S * c
    rest_of_rationale: str = "inside"  # where the text that is left goes: "inside" the thought, "after" <eot>
    last_stage: float = 0.5  # share of the run spent in stage S; in its second half the answer is dropped too
    gate: float = 0.0  # enter the next stage when `gate_loss` is under this; 0: by the schedule alone (paper)
    replay: float = 0.0  # share of the steps that go back: half to stage 0 (mode cot), half to a random one
    adaptive: bool = False  # a step for each unit of the rationale

    def __post_init__(self):
        if self.rest_of_rationale not in ("inside", "after"):
            raise ValueError(f"rest_of_rationale {self.rest_of_rationale!r}: needs 'inside' or 'after'")
        if self.segments < 1 or self.steps_per_segment < 0:
            raise ValueError(f"segments {self.segments}, steps_per_segment {self.steps_per_segment}: "
                             "needs segments >= 1, steps_per_segment >= 0")
        if not 0 < self.last_stage <= 1:
            raise ValueError(f"last_stage {self.last_stage}: needs 0 < last_stage <= 1")
        if self.adaptive and (self.steps_per_segment != 1 or self.rest_of_rationale != "inside"):
            raise ValueError("adaptive: a unit of the rationale takes one step, the rest stays inside the "
                             "thought: needs steps_per_segment 1, rest_of_rationale 'inside'")
        if not self.gate >= 0 or not 0 <= self.replay < 1:
            raise ValueError(f"gate {self.gate}, replay {self.replay}: needs gate >= 0 and 0 <= replay < 1")

    @property
    def latent_steps(self):
        return self.segments * self.steps_per_segment  # K

    @property
    def stages(self):
        """All stages in order: 0 .. S, and S once more without the answer."""
        stages = [Stage(s, s * self.steps_per_segment, True) for s in range(self.segments + 1)]
        return [*stages, Stage(self.segments, self.latent_steps, False)]

    def schedule(self, steps):
        """The step at which each of `stages` is entered in a run of `steps`; with a gate: at the latest."""
        S = self.segments
        if not self.gate:
            shares = [s / S for s in range(S + 1)]
        elif S == 1:
            shares = [0, 1]
        else:  # stages 1 .. S - 1 share the second half
            shares = [0] + [1 - (1 - s / (S - 1)) ** 2 / 2 for s in range(S)]
        before = (1 - self.last_stage) * steps  # steps before stage S
        entries = [share * before for share in shares] + [(1 - self.last_stage / 2) * steps]
        return [math.ceil(entry - 1e-6) for entry in entries]

    def table(self, steps):
        """The schedule as text, one line a stage: what is printed at the start of training."""
        head = "entered by step" if self.gate else "from step"
        lines = [f"{head:>15}  stage  latent steps  text that stays"]
        entry = self.schedule(steps)
        for stage, begin, end in zip(self.stages, entry, entry[1:] + [steps]):
            if begin >= end:
                continue
            kept = "answer" if stage.answer else "nothing: as at inference"
            if self.adaptive:
                kept = "units behind the steps, answer" if stage.answer else "units behind the steps"
            elif stage.index < self.segments:
                kept = f"rationale {self.segments - stage.index}/{self.segments}, {kept}"
            lines.append(f"{begin:15d}  {stage.index:5d}  {stage.latent_steps:12d}  {kept}")
        if self.gate:
            lines.append(f"earlier, as soon as the running mean of `gate_loss` is under {self.gate:g}")
        if self.replay:
            back = f"{self.replay:.0%} of the steps go back"
            lines.append(f"{back}, half of them to stage 0, half to a random earlier one")
        return "\n".join(lines)

    def rewrite(self, rationale, answer, stage):
        """-> (rest of the rationale, answer): what is still written at this stage.

        Behind the latent steps stands  rest <eot></think> answer <gen_emb>  ("inside") or  <eot> rest
        </think> answer <gen_emb>  ("after"), in the words of the chat template.  A record without a rationale
        takes the same number of latent steps, so one batch has one K.
        """
        rest = "".join(self.parts(rationale)[stage.index :])
        goes_on = self.adaptive and rest  # in words, as in mode auto: to the answer, at every stage
        return rest, answer if stage.answer or goes_on else ""

    def parts(self, rationale):
        """The rationale in S strings, of which stage s replaces the first s.

        adaptive: in as many as it has units, but no fewer than S.
        """
        if not self.adaptive:
            return segment(rationale, self.segments)
        units = len(SENTENCE.findall(rationale))
        if units == 1:
            units = len(WORD.findall(rationale))
        parts = segment(rationale, max(1, units))
        return parts + [""] * (self.segments - len(parts))


class Progress:
    """Which stage each step of a run belongs to: known `DELAY` steps ahead, equal on all ranks, resumable.

    With a gate the schedule is only the latest step to enter a stage: `observe` brings the next one forward
    when the running mean of `gate_loss`, over steps of the present stage, has fallen under the gate.  That
    takes effect DELAY steps later, more than data workers prefetch, so no batch is ever written for a stage
    that is over.
    """

    DELAY = 16  # steps between a decision and its effect; part of the recipe, not of the machine
    WINDOW = 20  # steps of the running mean

    def __init__(self, curriculum, steps, seed=0):
        self.curriculum, self.stages, self.seed = curriculum, curriculum.stages, seed
        self.entry = curriculum.schedule(steps)  # the step at which each stage is entered
        self.observed, self.recent = 0, []  # the stage observed last, and `gate_loss` in its last steps

    def place(self, step):
        """Index into `stages` that the run has come to at this step."""
        return max(i for i, begin in enumerate(self.entry) if begin <= step)

    def replayed(self, step):
        """Index into `stages` that this step is trained in; depends on the step (and the seed) alone."""
        dice, here = random.Random(f"{self.seed} {step}"), self.place(step)
        if here == 0 or dice.random() >= self.curriculum.replay:
            return here
        earlier = dice.randrange(here)
        return dice.choice((0, earlier))

    def stage(self, step):
        stage = self.stages[self.replayed(step)]
        if self.curriculum.adaptive and not self.stages[self.place(step)].answer:
            return replace(stage, answer=False)  # after any number of steps, as in mode auto
        return stage

    def observe(self, step, gate_loss):
        """gate_loss: loss on the first token that can be wrong in this step, averaged over ranks."""
        here = self.place(step)
        if self.replayed(step) != here:
            return
        if here != self.observed:
            self.observed, self.recent = here, []
        self.recent = [*self.recent, gate_loss][-self.WINDOW :]
        full, last = len(self.recent) == self.WINDOW, here + 1 == len(self.stages)
        if full and not last and sum(self.recent) < self.curriculum.gate * self.WINDOW:
            self.entry[here + 1] = min(self.entry[here + 1], step + self.DELAY)

    def state(self):
        return dict(entry=self.entry, observed=self.observed, recent=self.recent)

    def load(self, state):
        self.entry, self.recent = list(state["entry"]), list(state["recent"])
        self.observed = state["observed"]


def segment(text, parts):
    """Cut text into `parts` strings that join to it again.

    At sentence ends if there are enough sentences, else between words, never inside a word; with fewer words
    than parts the last strings are empty.
    """
    units = SENTENCE.findall(text)
    if len(units) < parts:
        units = WORD.findall(text)
    n = len(units)
    ends = [0, *itertools.accumulate(len(unit) for unit in units)]  # where each unit ends, in characters
    cut = [0]
    for i in range(1, parts):
        # the cut nearest to equal numbers of characters that leaves every part at least one unit
        places = range(cut[-1] + 1, n - (parts - i) + 1)
        wanted = ends[-1] * i / parts
        cut.append(min(places, key=lambda place: abs(ends[place] - wanted), default=min(i, n)))
    return ["".join(units[a:b]) for a, b in zip(cut, [*cut[1:], n])]
