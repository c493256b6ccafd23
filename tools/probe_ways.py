"""The ways in which tools/probe.py embeds queries: as trained, and each time with one thing changed."""

import copy
import functools
import operator
from typing import Callable, NamedTuple

import torch

from data import collate, to_device
from latent import prefill, select_column, steps_and_suffix, unit

TRAINED = "as trained"  # name of the row that all others are compared with


class Queries:
    """A batch of queries, computed up to <bot> once; `roll` goes on from there as often as it is called."""

    def __init__(self, model, sides):
        rule = model.settings["latent_positions"]
        self.model, self.steps = model, model.settings["latent_steps"]
        samples = [model.processor.render(side) for side in sides]
        batch = to_device(collate(samples, model.processor), model.device)
        prefix = model.prefix(batch)
        self.cache, self.anchor, self.start, self.pos = prefill(model.lm, prefix, rule)
        self.gen = batch["gen"]
        self.suffix = model.lm.embed_tokens(batch["suffix"])  # (B, T, D)
        self.inputs = []  # K inputs (B, D) of the latent steps, as trained
        self.trained, self.latents, self.router = self.roll(self.steps, hook=self.record)

    def record(self, k, x):
        self.inputs.append(x)
        return x

    def roll(self, steps, adapter=None, hook=None, shift=0):
        """-> embeddings (B, D), latents (B, K, D), router probabilities (B, K, E).

        adapter: called in place of the model's; hook: see `latent.rollout`; shift: positions to leave out.
        """
        cache = self.cache.of(range(len(self.pos)))  # all rows
        latents, suffix, router = steps_and_suffix(
            self.model.lm, adapter or self.model.adapter, steps, self.anchor, self.start, self.pos + shift,
            self.suffix, cache, hook=hook)
        return unit(select_column(suffix, self.gen)).cpu(), latents, router


class Way(NamedTuple):
    """A way to embed queries: a row of the table."""

    subject: str  # what is used when the score changes
    what: str  # what was changed, for the report
    embed: Callable  # Queries -> (B, D)


def ways_of(model):
    """{name of a row: Way}, as far as the checkpoint has what a row changes."""
    adapter, K = model.adapter, model.settings["latent_steps"]
    ways = {TRAINED: Way("", f"nothing: {K} latent steps, as eval.py scores them",
                         operator.attrgetter("trained"))}
    for k in range(K):
        subject = "the steps are" if k == 0 else f"the steps behind {k} are"
        what = f"only {k} of the {K} steps, then the suffix"
        ways[f"K = {k}"] = Way(subject, what, functools.partial(fewer_steps, k))
    for name, change in INPUTS.items():
        what = f"what the adapter gives to each step is {INPUTS_ARE[name]}"
        ways[f"inputs {name}"] = Way("the thoughts are", what, functools.partial(other_inputs, change))
    # the suffix sees the prefix alone, from its place behind the latents: they have no other effect
    hidden = functools.partial(fewer_steps, 0, shift=K)
    ways["latents hidden from the suffix"] = Way(
        "the thoughts are", "the suffix sees the prefix alone, from its usual positions", hidden)
    if adapter.kind != "none":
        ways["adapter left out"] = Way(
            "the adapter is", "each state goes back into the decoder as it is",
            functools.partial(other_adapter, left_out))
    if adapter.experts:
        for e in range(adapter.experts):
            alone = torch.full((adapter.experts,), -torch.inf)
            alone[e] = 0
            ways[f"expert {e} alone"] = Way(
                "the routing is", f"the router gives all to expert {e}; a shared one stays",
                functools.partial(routed, alone))
        uniform = torch.zeros(adapter.experts)
        ways["experts uniform"] = Way(
            "the routing is", "the router gives as much to every expert", functools.partial(routed, uniform))
    if adapter.experts and adapter.anchor:
        for name, change in dict(shuffled=of_another_query, zero=torch.zeros_like).items():
            embed = functools.partial(other_anchor, change)
            what = "that of the neighbour in the batch" if name == "shuffled" else "all zeros"
            ways[f"anchor {name}"] = Way("the anchor is", f"the anchor that the router sees is {what}", embed)
    return ways


def fewer_steps(k, queries, shift=0):
    return queries.roll(k, shift=shift)[0]


def other_inputs(change, queries):
    """change: inputs (K, B, D) as trained -> those that the steps get instead."""
    inputs = change(torch.stack(queries.inputs))
    return queries.roll(queries.steps, hook=lambda k, _: inputs[k])[0]


def other_adapter(adapter, queries):
    return queries.roll(queries.steps, adapter)[0]


def left_out(z, step, anchor):
    """An adapter that feeds the state back as it is."""
    return z, z.new_zeros(len(z), 0)


def other_anchor(change, queries):
    return other_adapter(lambda z, step, anchor: queries.model.adapter(z, step, change(anchor)), queries)


def routed(logits, queries):
    """All rows get these logits (E,) of the router, and all experts take part."""
    adapter = copy.copy(queries.model.adapter)  # over the same weights
    adapter.top_k = adapter.experts

    def constant(router, inputs, output):
        return logits.to(output).expand_as(output)

    with adapter.router.register_forward_hook(constant):
        return other_adapter(adapter, queries)


def of_another_query(x):
    return x.roll(1, -2)  # of the neighbour in the batch


def batch_mean(x):
    return x.mean(-2, keepdim=True).expand_as(x)


def noise(x):
    """Random directions, as long as the inputs are."""
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return random * (x.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True))


INPUTS = {"zero": torch.zeros_like, "of another query": of_another_query, "mean": batch_mean, "noise": noise}
INPUTS_ARE = {"zero": "zero", "of another query": "what the neighbour in the batch had as trained",
              "mean": "its mean over the batch", "noise": "a random direction of the same length"}
NEEDS_OTHERS = ("inputs of another query", "inputs mean", "anchor shuffled")  # of one they say nothing
