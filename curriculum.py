"""The progressive explicit-to-latent curriculum: how far the run is decides how much of the rationale is still text.

Paper, section "curriculum": the rationale is cut into S segments; stage s replaces the first s of them by s*c latent
steps, so that reasoning moves from tokens into hidden states one quarter at a time:

    stage 0   <bot> [seg 1][seg 2][seg 3][seg 4] <eot></think> answer <gen_emb>       0 latent steps
    stage 1   <bot> z z      [seg 2][seg 3][seg 4] <eot></think> answer <gen_emb>     c
    ...
    stage S   <bot> z z z z z z z z                <eot></think> answer <gen_emb>     S*c = K
    at last   <bot> z z z z z z z z                <eot></think> <gen_emb>            the format of inference

`rest_of_rationale="inside"` (default, as drawn) leaves the remaining text inside the thought, so each latent takes the place of the
text it replaces.  `"after"` puts it behind <eot>, as the released code does.
No tensors and no tokenizer here: this file is the schedule and the text.
"""

import re
from dataclasses import dataclass


CLOSING = "</think>\n"  # between <eot> and <gen_emb> at inference


@dataclass(frozen=True)
class Stage:
    index: int  # 0 .. S
    latent_steps: int  # index * c
    answer: bool  # is the answer still written out?


@dataclass(frozen=True)
class Curriculum:
    """S segments, c latent steps for each; the last stage takes `last` of the run, the others share the rest equally."""

    segments: int = 4  # S
    steps_per_segment: int = 2  # c; K = S * c
    rest_of_rationale: str = "inside"  # where the rationale that is still text goes: "inside" the thought or "after" <eot>
    last_stage: float = 0.5  # share of the run spent in stage S; in its second half the answer is dropped too

    def __post_init__(self):
        if self.rest_of_rationale not in ("inside", "after"):
            raise ValueError(f"rest_of_rationale {self.rest_of_rationale!r}: needs 'inside' or 'after'")
        if self.segments < 1 or self.steps_per_segment < 0 or not 0 < self.last_stage <= 1:
            raise ValueError(f"segments {self.segments}, steps_per_segment {self.steps_per_segment}, last_stage {self.last_stage}: "
                             "needs segments >= 1, steps_per_segment >= 0, 0 < last_stage <= 1")

    @property
    def latent_steps(self):
        return self.segments * self.steps_per_segment  # K

    def stage_at(self, progress):
        """progress in [0, 1), the share of the run that is done -> Stage (paper: fixed schedule)."""
        if progress < 1 - self.last_stage:
            s = int(progress / (1 - self.last_stage) * self.segments)
            return Stage(s, s * self.steps_per_segment, True)
        return Stage(self.segments, self.latent_steps, progress < 1 - self.last_stage / 2)

    def table(self):
        """The schedule as text, one line a stage: what is printed at the start of training."""
        edges = [i / self.segments * (1 - self.last_stage) for i in range(self.segments)] if self.last_stage < 1 else []
        edges += [1 - self.last_stage, 1 - self.last_stage / 2, 1.0]
        lines = ["progress      stage  latent steps  text that stays"]
        for a, b in zip(edges, edges[1:]):
            st = self.stage_at((a + b) / 2)
            kept = f"rationale {self.segments - st.index}/{self.segments}, " if st.index < self.segments else ""
            kept += "answer" if st.answer else "nothing: as at inference"
            lines.append(f"{a:4.0%} - {b:4.0%}   {st.index:5d}  {st.latent_steps:12d}  {kept}")
        return "\n".join(lines)

    def rewrite(self, rationale, answer, stage):
        """-> (rest of the rationale, closing text): what is still written at this stage.

        Behind the latent steps stands  rest <eot> closing <gen_emb>  ("inside") or  <eot> rest closing <gen_emb>  ("after").
        A record without a rationale takes the same number of latent steps, so one batch has one K.
        """
        rest = "".join(segment(rationale, self.segments)[stage.index:])
        return rest, CLOSING + (f"<answer>{answer}</answer>\n" if answer and stage.answer else "")


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
