"""CUDA graphs, for speed alone: all that comes behind the prefix starts at once.

    model.graphs = Graphs()  # then encode as usual
"""

import functools

import torch

from latent import Buffer, steps_and_suffix


class Graphs:
    """`steps_and_suffix` as CUDA graphs, for inference: one for each B, K, T and number of prefix columns.

    A latent step of a small batch is hundreds of kernels, each shorter than the time in which Python starts
    it; a graph starts all K steps at once (how much faster: not run).  It reads fixed places in memory: the
    rollout's inputs are copied there, the prefix's keys and values with hidden columns behind, 7 or 1/16 of
    its length at most, so that few sizes serve all.  A shape runs as usual when it is first seen and is
    recorded when it comes again; `keep` shapes at most, others always run as usual, and so does everything
    under autocast.  Weights may change in place; when they move, all is forgotten.  Python values
    (`adapter.top_k`) stay as recorded.
    """

    def __init__(self, keep=16):
        self.keep, self.weights, self.seen, self.recorded = keep, None, set(), {}

    @torch.no_grad()
    def __call__(self, lm, adapter, steps, anchor, z, pos, suffix, cache):
        weights = [p.data_ptr() for module in (lm, adapter) for p in module.parameters()]
        if weights != self.weights:
            self.weights, self.seen, self.recorded = weights, set(), {}
        P = cache.n
        hidden = -P % max(8, 1 << max(0, P.bit_length() - 5))  # columns behind the prefix
        shape = (steps, hidden + P, *suffix.shape)
        known = shape in self.recorded or (shape in self.seen and len(self.recorded) < self.keep)
        self.seen.add(shape)
        usual, given = functools.partial(steps_and_suffix, lm, adapter, steps), (anchor, z, pos, suffix)
        if not known or torch.is_autocast_enabled(suffix.device.type):
            return usual(*given, cache)
        if shape not in self.recorded:
            self.recorded[shape] = at_fixed_places(
                lm, usual, given, cache, hidden + P, steps + suffix.shape[1])
        replay, outputs, inputs, fixed = self.recorded[shape]
        for old, new in zip(inputs, given):
            old.copy_(new)
        fixed.hide[..., P : P + hidden].fill_(float("-inf"))
        fixed.hide[..., :P].copy_(cache.hide[..., :P])
        for fixed_kv, kv in zip(fixed.prefix, cache.prefix):
            for old, new in zip(fixed_kv, kv):
                old[:, :, P : P + hidden].zero_()  # to hide is not enough: 0 x NaN of an earlier batch is NaN
                old[:, :, :P].copy_(new[:, :, :P])
        replay()
        return [t.clone() for t in outputs]


def at_fixed_places(lm, usual, given, cache, P, columns):
    """`usual` over copies of its inputs and a cache of P prefix columns -> replay, outputs, inputs, cache."""
    inputs = [t.clone() for t in given]
    fixed = Buffer(lm, torch.zeros(len(cache.hide), dtype=torch.long, device=cache.hide.device), P)
    fixed.reserve(P + columns)
    for i, kv in enumerate(cache.prefix):
        fixed.keep(i, *[t.new_zeros(*t.shape[:2], P, t.shape[3]) for t in kv])

    def function():
        fixed.n = P
        return usual(*inputs, fixed)

    return *record(function, cache.hide.device), inputs, fixed


def record(function, device):
    """A function without arguments as a CUDA graph -> replay, and its outputs, which a replay overwrites."""
    if device.type != "cuda":
        raise ValueError(f"latent.Graphs on {device}: needs a CUDA device; leave `graphs` None on others")
    with torch.cuda.device(device):
        here, side = torch.cuda.current_stream(), recording_stream(device)
        side.wait_stream(here)
        with torch.cuda.stream(side):  # once without recording: libraries load kernels, take workspaces
            function()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device at the same time
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = function()
    return graph.replay, outputs


@functools.cache
def recording_stream(device):
    return torch.cuda.Stream(device)  # one for all graphs: libraries keep a workspace for every stream
