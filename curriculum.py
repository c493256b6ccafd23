"""The progressive explicit-to-latent curriculum: which part of the rationale is still text at which step of the run.

Paper, section "curriculum": the rationale is cut into S segments; stage s replaces the first s of them by s*c latent
steps, so that reasoning moves from tokens into hidden states one segment at a time.  With S = 4 and c = 2:

    stage 0   <bot> [seg 1][seg 2][seg 3][seg 4] <eot></think> answer <gen_emb>       0 latent steps
    stage 1   <bot> z z      [seg 2][seg 3][seg 4] <eot></think> answer <gen_emb>     c
    ...
    stage S   <bot> z z z z z z z z                <eot></think> answer <gen_emb>     S*c = K
    at last   <bot> z z z z z z z z                <eot></think> <gen_emb>            the format of inference

`rest_of_rationale="inside"` (default, as drawn) leaves the remaining text inside the thought, so each latent takes the place of the
text it replaces.  `"after"` puts it behind <eot>, as the released code does.

A stage is entered on a fixed schedule (paper), or as soon as the model is good at the present one (`gate`), and a share of
the steps goes back to earlier stages (`replay`); `Progress` decides.
No tensors and no tokenizer here: this file is the schedule and the text.
"""

import math
import random
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    index: int  # 0 .. S
    latent_steps: int  # index * c
    answer: bool  # is the answer still written out?


@dataclass(frozen=True)
class Curriculum:
    """S segments, c latent steps for each; the last stage takes `last_stage` of the run, the others share the rest equally.

    With a gate that is only the latest time to enter a stage, and stage 0, where the rationale itself is learnt, may take half of
    the time before the last stage.
    """

    segments: int = 4  # S
    steps_per_segment: int = 2  # c; K = S * c
    rest_of_rationale: str = "inside"  # where the rationale that is still text goes: "inside" the thought or "after" <eot>
    last_stage: float = 0.5  # share of the run spent in stage S; in its second half the answer is dropped too
    gate: float = 0.0  # enter the next stage as soon as `first` has fallen under this; 0: by the schedule alone (paper)
    replay: float = 0.0  # share of the steps that go back: half of them to stage 0 (mode cot), half to a random earlier one

    def __post_init__(self):
        if self.rest_of_rationale not in ("inside", "after"):
            raise ValueError(f"rest_of_rationale {self.rest_of_rationale!r}: needs 'inside' or 'after'")
        if self.segments < 1 or self.steps_per_segment < 0 or not 0 < self.last_stage <= 1:
            raise ValueError(f"segments {self.segments}, steps_per_segment {self.steps_per_segment}, last_stage {self.last_stage}: "
                             "needs segments >= 1, steps_per_segment >= 0, 0 < last_stage <= 1")
        if not self.gate >= 0 or not 0 <= self.replay < 1:
            raise ValueError(f"gate {self.gate}, replay {self.replay}: needs gate >= 0 and 0 <= replay < 1")

    @property
    def latent_steps(self):
        return self.segments * self.steps_per_segment  # K

    @property
    def stages(self):
        """All stages in order: 0 .. S, and S once more without the answer."""
        return [Stage(s, s * self.steps_per_segment, True) for s in range(self.segments + 1)] + [Stage(self.segments, self.latent_steps, False)]

    def schedule(self, steps):
        """The step at which each of `stages` is entered in a run of so many steps (with a gate: at the latest)."""
        S, before = self.segments, 1 - self.last_stage
        shares = [i / S for i in range(S + 1)] if not self.gate else [0] + [(1 + i / (S - 1)) / 2 if S > 1 else 1 for i in range(S)]
        return [math.ceil(s * before * steps - 1e-6) for s in shares] + [math.ceil((1 - self.last_stage / 2) * steps - 1e-6)]

    def table(self, steps):
        """The schedule as text, one line a stage: what is printed at the start of training."""
        lines = [("entered by step" if self.gate else "from step").rjust(15) + "  stage  latent steps  text that stays"]
        entry = self.schedule(steps)
        for stage, begin, end in zip(self.stages, entry, entry[1:] + [steps]):
            kept = f"rationale {self.segments - stage.index}/{self.segments}, " if stage.index < self.segments else ""
            kept += "answer" if stage.answer else "nothing: as at inference"
            lines += [f"{begin:15d}  {stage.index:5d}  {stage.latent_steps:12d}  {kept}"] * (end > begin)
        if self.gate:
            lines.append(f"earlier, as soon as the running mean of `first` is under {self.gate:g}")
        if self.replay:
            lines.append(f"{self.replay:.0%} of the steps go back, half of them to stage 0, half to a random earlier one")
        return "\n".join(lines)

    def rewrite(self, rationale, answer, stage):
        """-> (rest of the rationale, answer): what is still written at this stage.

        Behind the latent steps stands  rest <eot></think> answer <gen_emb>  ("inside") or  <eot> rest </think> answer
        <gen_emb>  ("after"), in the words of the chat template.  A record without a rationale takes the same number of
        latent steps, so one batch has one K.
        """
        rest = "".join(segment(rationale, self.segments)[stage.index:])
        return rest, answer if stage.answer else ""


class Progress:
    """Which stage each step of a run belongs to: known at least `DELAY` steps ahead, equal on all ranks, resumable.

    With a gate the schedule is only the latest step to enter a stage: `observe` brings the next one forward when the
    running mean of `first`, over steps of the present stage, has fallen under the gate.  That takes effect DELAY steps
    later, which is more than data workers prefetch, so no batch is ever written for a stage that is over.
    """

    DELAY = 16  # steps between a decision and its effect; part of the recipe, not of the machine
    WINDOW = 20  # steps of the running mean

    def __init__(self, curriculum, steps, seed=0):
        self.curriculum, self.stages, self.seed = curriculum, curriculum.stages, seed
        self.entry = curriculum.schedule(steps)  # the step at which each stage is entered
        self.observed, self.recent = 0, []  # the stage observed last, and `first` in its last steps

    def place(self, step):
        """Index into `stages` that the run has come to at this step."""
        return max(i for i, begin in enumerate(self.entry) if begin <= step)

    def replayed(self, step):
        """Index into `stages` that this step is trained in: the run's, or an earlier one.  A pure function of the step."""
        dice, here = random.Random(f"{self.seed} {step}"), self.place(step)
        return dice.choice((0, dice.randrange(here))) if here and dice.random() < self.curriculum.replay else here

    def stage(self, step):
        return self.stages[self.replayed(step)]

    def observe(self, step, first):
        """first: loss on the first token behind the latents in this step, averaged over ranks."""
        here = self.place(step)
        if self.replayed(step) != here:
            return
        if here != self.observed:
            self.observed, self.recent = here, []
        self.recent = [*self.recent, first][-self.WINDOW :]
        if here + 1 < len(self.stages) and len(self.recent) == self.WINDOW and sum(self.recent) < self.curriculum.gate * self.WINDOW:
            self.entry[here + 1] = min(self.entry[here + 1], step + self.DELAY)

    def state(self):
        return dict(entry=self.entry, observed=self.observed, recent=self.recent)

    def load(self, state):
        self.entry, self.observed, self.recent = list(state["entry"]), state["observed"], list(state["recent"])


def segment(text, parts):
    """Cut text into `parts` strings that join to it again: at sentence ends if there are enough sentences, else between
    words, never inside a word.  With fewer words than parts the last strings are empty."""
    units = re.findall(r".+?(?:[.!?;]+(?=\s|\Z)|[。！？；]+|\Z)", text, re.S)  # sentences, each with the blank in front of it
    if len(units) < parts:
        units = re.findall(r"\s*\S+", text)  # words
    trailing = text[sum(map(len, units)):]
    n = len(units)
    if n < parts:
        cut = [min(i, n) for i in range(parts + 1)]
    else:  # the cut nearest to equal numbers of characters that leaves every part at least one unit
        ends, cut = [0], [0]
        for u in units:
            ends.append(ends[-1] + len(u))
        for i in range(1, parts):
            span = range(cut[-1] + 1, n - (parts - i) + 1)
            cut.append(min(span, key=lambda j: abs(ends[j] - ends[-1] * i / parts)))
        cut.append(n)
    out = ["".join(units[a:b]) for a, b in zip(cut, cut[1:])]
    out[-1] += trailing
    return out
