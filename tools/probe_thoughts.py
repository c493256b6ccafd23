"""What the latent steps of queries say: for tools/probe.py, which says how it is started.

Every state z_0 .. z_K is read as the model reads its own text: by the output embedding.
"""

import os
from dataclasses import dataclass, field

import numpy as np
import torch

from curriculum import Stage
from eval import first_found, first_rank
from files.clips import Part
from latent import unit
from tools.probe_ways import TRAINED

TOKENS = 3  # most likely ones that are kept of each state


@dataclass
class Thoughts:
    """What the steps of a task's queries said, as trained; N queries, K steps, E experts."""

    tokens: list = field(default_factory=list)  # ids (N, K+1, TOKENS) read from z_0 .. z_K, likeliest first
    probs: list = field(default_factory=list)  # their probabilities
    router: list = field(default_factory=list)  # (N, K, E)
    to_before: list = field(default_factory=list)  # (N, K) cosine of z_k+1 to z_k
    to_anchor: list = field(default_factory=list)  # (N, K+1)
    expected: list = field(default_factory=list)  # {step: token of the rationale}, one a query

    def add(self, queries, curriculum, sides):
        states = torch.cat([queries.start[:, None], queries.latents], 1)  # (B, K+1, D)
        head, top = queries.model.backbone.lm_head, []
        for k in range(states.shape[1]):  # not all at once: the vocabulary may be large
            top.append(head(states[:, k]).float().softmax(-1).topk(TOKENS))
        directions = unit(states)
        self.tokens += torch.stack([t.indices for t in top], 1).tolist()
        self.probs += torch.stack([t.values for t in top], 1).tolist()
        self.router += queries.router.tolist()
        self.to_before += (directions[:, 1:] * directions[:, :-1]).sum(-1).tolist()
        self.to_anchor += (directions * unit(queries.anchor)[:, None]).sum(-1).tolist()
        final = Stage(curriculum.segments, curriculum.latent_steps, False)
        self.expected += [dict(queries.model.processor.replaced(side, final, curriculum)) for side in sides]

    def agrees(self, i):
        """-> {step: whether query i's likeliest token there is the rationale's}"""
        return {step: self.tokens[i][step][0] == token for step, token in self.expected[i].items()}

    def agreement(self):
        """-> the share of steps that agree of each query with a rationale, {step: share of these queries}"""
        shares, by_step = [], {}
        for i in range(len(self.expected)):
            agrees = self.agrees(i)
            if agrees:
                shares.append(float(np.mean(list(agrees.values()))))
            for step, right in agrees.items():
                by_step.setdefault(step, []).append(right)
        return shares, {step: float(np.mean(right)) for step, right in sorted(by_step.items())}


def label(side, most=80):
    """At most so many characters for an item: its text, what it is known to show, or the name of its file."""
    text = " ".join(value for kind, value in side.parts if kind == "text" and value).strip()
    files = [str(value) for kind, value in side.parts
             if kind in ("image", "video") and isinstance(value, (str, Part))]
    text = text or side.answer.strip() or (os.path.basename(files[0]) if files else side.where)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def trajectory(model, task, i, vectors, corpus, thoughts, ranks):
    """All that is known of one query, as JSON has it; and the Sides of the candidates that were found."""

    def first(name, count):
        """-> what would be retrieved with this row's vectors, as (row of the corpus, score)"""
        return first_found(vectors[name][i : i + 1], corpus[name], [task.candidates[i]], count)[0]

    decode, K = model.processor.tokenizer.decode, len(thoughts.router[i])
    agrees, steps = thoughts.agrees(i), []
    for k in range(K + 1):
        name = TRAINED if k == K else f"K = {k}"
        ((found, _),) = first(name, 1)
        read = [(decode([t]), p) for t, p in zip(thoughts.tokens[i][k], thoughts.probs[i][k])]
        step = dict(tokens=read, to_anchor=thoughts.to_anchor[i][k], retrieved=label(task.corpus[found]),
                    right=found in task.relevant[i])
        if k in agrees:
            step |= dict(agrees=agrees[k], rationale=decode([thoughts.expected[i][k]]))
        if k > 0:
            step["to_before"] = thoughts.to_before[i][k - 1]
        if k < K:
            step["experts"] = thoughts.router[i][k]
        steps.append(step)
    found = [row for row, _ in first(TRAINED, 5)]
    retrieved = [dict(label=label(task.corpus[row]), right=row in task.relevant[i]) for row in found]
    firsts = {name: first_rank(ranks[name][i]) for name in (TRAINED, "single")}
    return dict(task=task.name, id=task.query_ids[i], query=label(task.queries[i], 400), ranks=firsts,
                steps=steps, retrieved=retrieved), [task.corpus[row] for row in found]


def chosen(ids, query_ids, ranks, show):
    """-> {name of a list: rows of queries to show}"""
    if ids:
        return {"chosen": [i for i, name in enumerate(query_ids) if name in ids]}
    gain = np.array([1 / first_rank(a) - 1 / first_rank(b) for a, b in zip(ranks[TRAINED], ranks["single"])])
    order = np.argsort(-gain, kind="stable").tolist()
    wins = [i for i in order if gain[i] > 0]
    loses = [i for i in reversed(order) if gain[i] < 0]
    rest = [i for i in order if gain[i] == 0]
    return {"wins": wins[:show], "loses": loses[:show], "same": rest[:show]}


def as_text(t):
    """A trajectory in lines."""
    lines = [f"\n{t['task']}, query {t['id']}: {t['query']}",
             "state  says                                             to before  to anchor  would retrieve"]
    for k, step in enumerate(t["steps"]):
        said = "  ".join(f"{token.strip()} {p:.2f}" for token, p in step["tokens"])
        if not step.get("agrees", True):
            said += f"  (not {step['rationale'].strip()})"
        before = f"{step['to_before']:9.2f}" if "to_before" in step else " " * 9
        mark = "  (right)" if step["right"] else ""
        lines.append(f"{k:5d}  {said:47}  {before}  {step['to_anchor']:9.2f}  {step['retrieved']}{mark}")
    return "\n".join(lines)
