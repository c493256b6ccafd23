"""Latent reasoning: a prefix, K continuous steps, a short suffix, all rows of a batch in one tensor program.

Prefixes are padded on the RIGHT: nothing real stands behind padding, so causal attention hides it without a
mask, which is what the fast kernels want.  Step k of every row happens at the same time, behind the prefix
columns, where padding is hidden.

              prefix (P columns)        latents (K)     suffix (T)
    row 0   A  B  <bot> .  .  .      |  z  z  z  z   |  <eot> </think> <gen_emb>
    row 1   A  B  C  D  E  <bot>     |  z  z  z  z   |  <eot> </think> <gen_emb>
               anchor ^ = hidden state at <disc_emb>                   ^ embedding

    z_0 = h(<bot>),   z_{k+1} = h(adapter(z_k, k, anchor))  for k = 0 .. K-1,   then h(suffix)

h(.) is the state after the decoder's final norm, over everything that stands in front.  The decoder's
arithmetic (Qwen2: RMSNorm, grouped-query attention, M-RoPE, SwiGLU) is written out here over the weights of
transformers' modules, because the cache must carry gradients and work together with activation checkpointing.
Qwen3-VL's differs in three lines, each of which names it.
Prefill, latent step, suffix and greedy decoding are one function, `decoder`, at different numbers of new
columns.

Two other ways to think stand beside the rollout: `until_done` stops each row when its state reads <eot> and
leaves to `write` what K steps do not hold; an adapter of kind "parallel" has K learnt tokens take one pass.

Shapes: B sequences, P prefix tokens, K latent steps, T suffix tokens, L new columns in a call, D width, H
query heads, G key/value heads, d = D/H, E experts.
"""

import copy
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from adapter import TransitionAdapter


class Prefix(NamedTuple):
    x: torch.Tensor  # (B, P, D) input embeddings, padded on the right
    positions: torch.Tensor  # (3, B, P) M-RoPE positions (temporal, height, width)
    lengths: torch.Tensor  # (B,) tokens without padding
    disc: torch.Tensor  # (B,) column of <disc_emb>
    deepstack: tuple = ()  # Qwen3-VL: for each of the first layers what `add_features` adds to its output


class Rollout(NamedTuple):
    anchor: torch.Tensor  # (B, D) h(<disc_emb>), not normalised
    start: torch.Tensor  # (B, D) z_0 = h(<bot>)
    latents: torch.Tensor  # (B, K, D) z_1 .. z_K
    suffix: torch.Tensor  # (B, T, D) hidden states of the suffix
    router: torch.Tensor  # (B, K, E) router probabilities


class Cache:
    """Keys and values of every layer in two blocks: the prefix, written once, and the few slots behind it.

    Everything stays in the autograd graph.  The prefix block is copied only by `of`; only the slots grow.
    """

    def __init__(self, lengths, P):
        self.taken = None  # (B,): a row's later columns see only its first `taken` slots; None: all
        padding = torch.arange(P, device=lengths.device) >= lengths[:, None]  # (B, P)
        hide = torch.zeros(padding.shape, device=lengths.device).masked_fill_(padding, float("-inf"))
        self.hide = hide[:, None, None]  # (B, 1, 1, P)
        self.prefix, self.slots = [], []  # a (k, v) for each layer, each (B, G, ., d)

    def of(self, rows):
        """The cache of some rows (n,), sorted, each once: a copy, or for all rows over the same tensors."""
        some = copy.copy(self)
        if len(rows) == len(self.hide):
            some.prefix, some.slots = list(self.prefix), list(self.slots)
            return some
        some.hide = self.hide[rows]
        some.prefix = [(k[rows], v[rows]) for k, v in self.prefix]
        some.slots = [(k[rows], v[rows]) for k, v in self.slots]
        return some

    @staticmethod
    def join(caches):
        """Several caches, with as many slots, in one, and emptied.  Short prefixes get hidden columns."""
        joined, longest = copy.copy(caches[0]), max(cache.hide.shape[-1] for cache in caches)
        missing = [longest - cache.hide.shape[-1] for cache in caches]
        hide = [F.pad(c.hide, (0, m), value=float("-inf")) for c, m in zip(caches, missing)]
        joined.hide, joined.prefix, joined.slots = torch.cat(hide), [], []
        while caches[0].prefix:  # layer by layer, so that memory holds keys and values once
            filled = [[F.pad(t, (0, 0, 0, m)) for t in c.prefix.pop(0)] for c, m in zip(caches, missing)]
            joined.prefix.append(tuple(map(torch.cat, zip(*filled))))
            joined.slots.append(tuple(map(torch.cat, zip(*[c.slots.pop(0) for c in caches]))))
        return joined


class Unfinished(NamedTuple):  # what `until_done` leaves to be written
    rows: torch.Tensor  # (n,) of the batch
    h: torch.Tensor  # (n, D) state of the column in front of position pos
    pos: torch.Tensor  # (n,)
    cache: Cache


def rollout(lm, adapter, prefix, steps, suffix, rule="mrope", checkpointing=False, graphs=None, hook=None):
    """The method: prefill, K latent steps, suffix -> Rollout.

    lm: transformers' text model; adapter: TransitionAdapter; prefix: Prefix; steps: K, a Python int;
    suffix: (B, T, D) input embeddings; rule: see `next_positions`; graphs: None, or a `Graphs`.
    hook: None, or a function of k and the input x (B, D) of step k that gives the input to take instead;
    with it everything runs without graphs.
    """
    cache, anchor, z, pos = prefill(lm, prefix, rule, checkpointing)
    if graphs is None or hook is not None:
        behind = steps_and_suffix(lm, adapter, steps, anchor, z, pos, suffix, cache, checkpointing, hook)
    else:
        behind = graphs(lm, adapter, steps, anchor, z, pos, suffix, cache)
    return Rollout(anchor, z, *behind)


def rollout_of_groups(lm, adapter, groups, steps, rule="mrope", checkpointing=False):
    """`rollout` of rows in groups, which are padded to their own longest row alone -> [Rollout].

    groups: [(prefix, suffix)].  All rows take their latent steps together: a step has no padding.
    """
    caches, *states = zip(*[prefill(lm, prefix, rule, checkpointing) for prefix, _ in groups])
    sizes, whole = [len(z) for z in states[1]], caches[0]
    if len(caches) > 1:
        whole = Cache.join([cache.of(range(rows)) for cache, rows in zip(caches, sizes)])
    behind = latent_steps(lm, adapter, steps, *map(torch.cat, states), whole)
    for i, (k, v) in enumerate(whole.slots):
        for cache, *slots in zip(caches, k.split(sizes), v.split(sizes)):
            cache.slots[i] = slots
    rows, rollouts = zip(*states, *(part.split(sizes) for part in behind)), []
    for (_, suffix), cache, (anchor, z, pos, latents, last, router) in zip(groups, caches, rows):
        more, h = last_and_suffix(lm, last, pos, steps, suffix, cache, checkpointing)
        rollouts.append(Rollout(anchor, z, torch.cat([latents, more], 1), h, router))
    return rollouts


def prefill(lm, prefix, rule="mrope", checkpointing=False):
    """-> Cache, anchor h(<disc_emb>) (B, D), z_0 = h(<bot>) (B, D), position behind the prefix (B,)"""
    cache = Cache(prefix.lengths, prefix.x.shape[1])
    columns = torch.stack([prefix.disc, prefix.lengths - 1], 1)  # (B, 2)
    h = decoder(lm, prefix.x, prefix.positions, cache, checkpointing, prefix.deepstack, columns)
    return cache, *h.unbind(1), next_positions(prefix, rule)


def steps_and_suffix(lm, adapter, steps, anchor, z, pos, suffix, cache, checkpointing=False, hook=None):
    """What comes behind the prefix -> latents (B, K, D), suffix (B, T, D), router probabilities (B, K, E)."""
    latents, last, router = latent_steps(lm, adapter, steps, anchor, z, pos, cache, hook)
    more, h = last_and_suffix(lm, last, pos, steps, suffix, cache, checkpointing)
    return torch.cat([latents, more], 1), h, router


def latent_steps(lm, adapter, steps, anchor, z, pos, cache, hook=None):
    """-> latents z_1 .. (B, K-n, D), inputs (B, n, D) of the n steps that are left, router (B, K, E).

    Nothing but the suffix waits for z_K: the last step is left to the suffix's pass, so that there are K in
    all and not K + 1.
    """
    latents, probs = [z.new_zeros(len(z), 0, z.shape[1])], []
    if isinstance(adapter, TransitionAdapter) and adapter.kind == "parallel":
        # K learnt tokens instead, all of them in one pass with the suffix
        learnt = adapter.tokens.weight[:steps].expand(len(z), -1, -1)  # (B, K, D)
        return *latents, learnt, z.new_zeros(len(z), 0, 0)
    last = latents[0]
    for k in range(steps):
        x, r = adapter(z, k, anchor)  # (B, D), (B, E)
        probs.append(r)
        last = (x if hook is None else hook(k, x))[:, None]
        if k < steps - 1:
            z = decoder(lm, last, pos[:, None] + k, cache)[:, 0]  # z_{k+1}
            latents.append(z[:, None])
    router = torch.stack(probs, 1) if probs else z.new_zeros(len(z), 0, 0)
    return torch.cat(latents, 1), last, router


def last_and_suffix(lm, last, pos, steps, suffix, cache, checkpointing=False):
    """One pass of the last steps' inputs (B, n, D) and the suffix (B, T, D) -> h of each."""
    n, end = last.shape[1], steps + suffix.shape[1]
    places = pos[:, None] + torch.arange(steps - n, end, device=pos.device)
    h = decoder(lm, torch.cat([last, suffix], 1), places, cache, checkpointing)  # (B, n + T, D)
    return h[:, :n], h[:, n:]


def naive_rollout(inner, adapter, inputs, positions, disc, steps, suffix, rule="mrope"):
    """`rollout` of one item through transformers' own modules and cache: the method to read and compare with.

    inner: transformers' Qwen-VL without its head; inputs: ids and pixels as it takes them (see
    backbones/reference.py); positions (3, 1, P) M-RoPE; disc: column of <disc_emb>; suffix (1, T, D) input
    embeddings.
    """
    lm = inner.language_model
    cached = dict(past_key_values=DynamicCache(config=lm.config), use_cache=True)
    inner.rope_deltas = None  # transformers keeps those of the last call

    def behind(x, start):  # x (1, L, D), its columns at positions start, start + 1, .. -> states (1, L, D)
        places = torch.arange(start, start + x.shape[1], device=x.device).expand(3, 1, -1)
        return lm(inputs_embeds=x, position_ids=places, **cached).last_hidden_state

    h = inner(**inputs, position_ids=positions, **cached).last_hidden_state  # (1, P, D)
    start = {"mrope": int(positions.max()) + 1, "cache": h.shape[1]}[rule]
    anchor, z = h[:, disc], h[:, -1]  # (1, D) each
    states, probs = [z], []
    for k in range(steps):
        x, r = adapter(z, k, anchor)
        z = behind(x[:, None], start + k)[:, 0]
        states.append(z)
        probs.append(r)
    router = torch.stack(probs, 1) if probs else z.new_zeros(1, 0, 0)
    return Rollout(anchor, states[0], torch.stack(states, 1)[:, 1:], behind(suffix, start + steps), router)


# ---- other ways to think
def single_pass(lm, prefix):
    """h(<disc_emb>) (B, D) of the prefix alone: the anchor, normalised it is the single-pass embedding."""
    return prefill(lm, prefix)[1]


@torch.no_grad()
def greedy(lm, embed, head, prefix, end, limit, rule="mrope"):
    """Explicit chain of thought: write greedily behind <bot> until `end` (<gen_emb>), at most `limit` tokens.

    A row that has not ended by then gets `end` as its last token.  -> h(end) (B, D), tokens (B, n), filled up
    with `end`.  embed, head: token ids -> input embeddings, hidden states -> logits.
    """
    cache, _, z, pos = prefill(lm, prefix, rule)
    return write(lm, embed, head, z, pos, cache, end, limit)


def write(lm, embed, head, h, pos, cache, end, limit):
    """`greedy` from the state h (B, D) of the column in front of position pos (B,)."""
    tokens = []
    out, done = torch.zeros_like(h), torch.zeros(len(h), dtype=torch.bool, device=h.device)
    for t in range(limit):
        token = head(h).argmax(-1) if t < limit - 1 else torch.full_like(pos, end)
        token = torch.where(done, end, token)
        tokens.append(token)
        h = decoder(lm, embed(token)[:, None], pos[:, None] + t, cache)[:, 0]
        ends = (token == end) & ~done
        out, done = torch.where(ends[:, None], h, out), done | ends
        looks = t % 16 == 15 or h.device.type == "cpu"  # a GPU would have to be waited for
        if looks and bool(done.all()):
            break
    return out, torch.stack(tokens, 1)


@torch.no_grad()
def until_done(lm, adapter, head, prefix, steps, suffix, gen, eot, done, rule="mrope"):
    """Mode auto: latent steps until the state of a row reads <eot>.

    After each step, and before the first, a row stops whose state gives the token `eot` a probability above
    `done`; its vector is that of the rollout with as many steps.  One that does not in K steps is left, for
    `write` to go on in words.  Rows that have stopped ride along.  Looks at the device before every step.
    suffix (B, T, D), gen (B,) place of <gen_emb> in it; head: see `greedy`.
    -> h(<gen_emb>) (B, D), 0 for rows that are left; latent steps (B,); Unfinished.
    """
    cache, anchor, z, pos = prefill(lm, prefix, rule)
    taken, stopped = torch.full_like(pos, steps), torch.zeros_like(pos, dtype=torch.bool)
    for k in range(steps + 1):
        stops = at_least_float32(head(z)).softmax(-1)[:, eot] > done
        taken, stopped = torch.where(stops & ~stopped, k, taken), stopped | stops
        if k == steps or bool(stopped.all()):
            break
        x, _ = adapter(z, k, anchor)
        z = decoder(lm, x[:, None], pos[:, None] + k, cache)[:, 0]

    out, pos = torch.zeros_like(z), pos + taken
    ready, left = stopped.nonzero()[:, 0], (~stopped).nonzero()[:, 0]
    if len(ready):
        seen = cache.of(ready)
        seen.taken = taken[ready]
        places = pos[ready, None] + torch.arange(suffix.shape[1], device=pos.device)
        out[ready] = select_column(decoder(lm, suffix[ready], places, seen), gen[ready])
    return out, taken, Unfinished(left, z[left], pos[left], cache.of(left))


def length_of(tokens, end):
    """What `greedy` gives (B, n) -> the number of tokens written (B,), `end` among them."""
    return (tokens != end).sum(1) + 1


def next_positions(prefix, rule):
    """Position of the first column behind the prefix, (B,), the same on all three axes.

    "mrope": the row's own M-RoPE positions go on.  "cache": the number of cached tokens, as in the released
    code; after a picture that is a jump upwards, because M-RoPE counts a picture's sides and not its tokens.
    """
    if rule == "cache":
        return prefix.lengths
    if rule == "mrope":
        return prefix.positions.amax((0, 2)) + 1
    raise ValueError(f"latent_positions {rule!r}: needs 'mrope' or 'cache'")


def select_column(h, column):
    """h (B, L, D), column (B,) -> (B, D)"""
    return h[torch.arange(len(h), device=h.device), column]


# ---- the decoder
def decoder(lm, x, positions, cache, checkpointing=False, deepstack=(), columns=None):
    """All layers over L new columns: x (B, L, D), positions (3, B, L) or (B, L) -> final states (B, L, D).

    On an empty cache the columns are the prefix; later ones become slots.  The cache is updated.
    deepstack: see Prefix.  columns (B, n): of a prefix, those whose final states are wanted, no visual tokens
    -> (B, n, D): of the others the last layer computes keys and values alone.
    """
    cos, sin = rotary(lm, positions.expand(3, *positions.shape[-2:]), x)  # (B, 1, L, d) each
    mask, first = mask_of(x, cache), not cache.prefix
    for i, layer in enumerate(lm.layers):
        past = None if first else (*cache.prefix[i], *cache.slots[i], cache.hide)
        wanted = columns if i + 1 == len(lm.layers) else None
        if checkpointing and torch.is_grad_enabled():
            x, k, v = checkpoint(block, layer, x, cos, sin, mask, past, wanted, use_reentrant=False)
        else:
            x, k, v = block(layer, x, cos, sin, mask, past, wanted)
        if i < len(deepstack) and wanted is None:  # Qwen3-VL
            x = add_features(x, *deepstack[i])
        if first:
            cache.prefix.append((k, v))
            cache.slots.append((k[:, :, :0], v[:, :, :0]))
        else:
            cache.slots[i] = k, v
    return rms_norm(x, lm.norm)


def add_features(x, places, features):
    """x (B, L, D) with features (M, D) of visual tokens added at their flat places (M,) in (B, L)."""
    return x.flatten(0, 1).index_add(0, places, features.to(x.dtype)).view_as(x)


def mask_of(x, cache):
    """What L new columns see of the n slots and of themselves, (1 or B, 1, L, n + L): 0 is seen, -inf not.

    None: everything.
    """
    L = x.shape[1]
    if not cache.prefix or (L == 1 and cache.taken is None):  # the prefill is causal; one sees every slot
        return None
    n = cache.slots[0][0].shape[2]  # all old slots and, causally, each other
    mask = torch.full((1, 1, L, n + L), float("-inf"), device=x.device).triu(n + 1)
    if cache.taken is None:
        return mask
    slot = torch.arange(n + L, device=x.device)
    over = (slot >= cache.taken[:, None]) & (slot < n)  # (B, n + L)
    return mask.masked_fill(over[:, None, None], float("-inf"))


def block(layer, x, cos, sin, mask, past, columns=None):
    """One decoder layer -> its output (B, L, D); keys and values: the prefix's, or all slots so far.

    columns (B, n): the output of these alone, (B, n, D).
    """
    att, mlp = layer.self_attn, layer.mlp
    h = rms_norm(x, layer.input_layernorm)
    k, v = (split_heads(linear(p, h), att.head_dim) for p in (att.k_proj, att.v_proj))
    if hasattr(att, "q_norm"):  # Qwen3-VL
        k = rms_norm(k, att.k_norm)
    k = rotate(k, cos, sin)  # (B, G, L, d)
    if columns is not None:
        mask = (torch.arange(x.shape[1], device=x.device) <= columns[..., None])[:, None]  # (B, 1, n, L)
        x, h = (t.take_along_dim(columns[..., None], 1) for t in (x, h))
        cos, sin = (t.take_along_dim(columns[:, None, :, None], 2) for t in (cos, sin))
    q = split_heads(linear(att.q_proj, h), att.head_dim)
    if hasattr(att, "q_norm"):
        q = rms_norm(q, att.q_norm)
    q = rotate(q, cos, sin)  # (B, H, L or n, d)
    if past is None:
        keys, values = for_heads(k, q), for_heads(v, q)
        a = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        k, v = k.contiguous(), v.contiguous()  # once, so that no later product has to copy them
    else:
        k_prefix, v_prefix, k_slots, v_slots, hide = past
        k, v = torch.cat([k_slots, k], 2), torch.cat([v_slots, v], 2)
        a = attend_two_blocks(q, k_prefix, v_prefix, k, v, hide, mask)
    x = x + linear(att.o_proj, a.transpose(1, 2).flatten(2))
    h = rms_norm(x, layer.post_attention_layernorm)
    return x + linear(mlp.down_proj, F.silu(linear(mlp.gate_proj, h)) * linear(mlp.up_proj, h)), k, v


def attend_two_blocks(q, k_prefix, v_prefix, k_slots, v_slots, hide, mask):
    """q (B, H, L, d), prefix (B, G, P, d), slots (B, G, n, d) -> (B, H, L, d): two score blocks, one softmax.

    hide: 0 / -inf for the prefix, (B, 1, 1, P); mask: the same for the slots, (1 or B, 1, L, n), or None.
    Query heads of a group share their keys: they are folded into rows, and the cache is neither repeated nor
    copied.
    """
    B, H, L, d = q.shape
    G, P = k_prefix.shape[1:3]
    q = q.reshape(B, G, H // G * L, d) * d**-0.5
    far = q @ k_prefix.mT + hide  # (B, G, H/G*L, P)
    near = q @ k_slots.mT  # (B, G, H/G*L, n)
    if mask is not None:
        near = near + mask.repeat(1, 1, H // G, 1)
    w = at_least_float32(torch.cat([far, near], -1)).softmax(-1).to(v_slots.dtype)
    return (w[..., :P] @ v_prefix + w[..., P:] @ v_slots).view(B, H, L, d)


def rotary(lm, positions, x):
    """M-RoPE's cos and sin (B, 1, L, d) at positions (3, B, L): each frequency belongs to one of three axes.

    `mrope_section` says how many of the d/2 frequencies are temporal, height, width.  In float32.
    """
    rope, d = lm.config.rope_parameters, lm.layers[0].self_attn.head_dim
    exponents = torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d  # (d/2,)
    angles = positions[..., None].float() * (1 / rope["rope_theta"] ** exponents)  # (3, B, L, d/2)
    sections = rope["mrope_section"]
    if lm.config.model_type == "qwen3_vl_text":
        parts = [interleaved(angles, sections)]
    else:  # one section behind the other
        parts = [section[axis] for axis, section in enumerate(angles.split(sections, -1))]
    angles = torch.cat(parts * 2, -1)[:, None]
    cos, sin = angles.cos(), angles.sin()
    sin[..., : d // 2].neg_()
    return cos.to(x.dtype), sin.to(x.dtype)


def interleaved(angles, sections):
    """Qwen3-VL: (3, B, L, d/2) -> (B, L, d/2) of temporal, height, width, temporal, ..; the rest temporal."""
    mixed = angles[0].clone()
    for axis in (1, 2):
        mine = slice(axis, 3 * sections[axis], 3)
        mixed[..., mine] = angles[axis, ..., mine]
    return mixed


def rotate(x, cos, sin):
    """Pairs (a, b) of x's halves -> (a cos - b sin, b cos + a sin); the minus stands in `rotary`'s table."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)  # under autocast cos and sin are wider


def rms_norm(x, norm):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))  # half precision would lose too much here


def unit(x):
    return F.normalize(at_least_float32(x), dim=-1)


def split_heads(x, d):
    return x.view(*x.shape[:2], -1, d).transpose(1, 2)  # (B, L, H*d) -> (B, H, L, d)


def for_heads(kv, q):
    """Keys or values (B, G, L, d) as attention takes them: so, or a copy for every head (B, H, L, d).

    torch's flash kernels let a group's heads share them.  The kernel for float32 on CUDA does not, and what
    would run in its place keeps all L x L scores.
    """
    if q.device.type == "cpu" or q.dtype in (torch.bfloat16, torch.float16):
        return kv
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def linear(layer, x):
    """layer(x), x (B, L, D).  On a CPU a latent step's few rows are faster as (W x^T)^T, in blocks of 16.

    The products of a step of 16 / 32 / 48 rows take 17 / 24 / 38 ms so and 19 / 26 / 45 the usual way (8
    layers, D = 512, 2 threads, an AMD EPYC, 2026-11-25).  With 8 and 64 rows it was slower on another CPU
    (docs/log.md).
    """
    rows = x.shape[0] * x.shape[1]
    plain = type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter  # not rounded
    if x.device.type != "cpu" or not plain or not 16 <= rows <= 48:
        return layer(x)
    x_t = x.flatten(0, 1).T  # (D, B*L)
    if layer.bias is None:
        y_t = layer.weight @ x_t
    else:
        y_t = torch.addmm(layer.bias[:, None], layer.weight, x_t)
    return y_t.T.unflatten(0, x.shape[:2])


# ---- CUDA graphs, for speed alone
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
        P = cache.hide.shape[-1]
        hidden = -P % max(8, 1 << max(0, P.bit_length() - 5))  # columns behind the prefix
        shape = (steps, hidden + P, *suffix.shape)
        known = shape in self.recorded or (shape in self.seen and len(self.recorded) < self.keep)
        self.seen.add(shape)
        usual, given = functools.partial(steps_and_suffix, lm, adapter, steps), (anchor, z, pos, suffix)
        if not known or torch.is_autocast_enabled(suffix.device.type):
            return usual(*given, cache)
        if shape not in self.recorded:
            self.recorded[shape] = at_fixed_places(usual, given, cache, hidden + P)
        replay, outputs, inputs, fixed = self.recorded[shape]
        for old, new in zip(inputs, given):
            old.copy_(new)
        fixed.hide[..., P:].fill_(float("-inf"))
        fixed.hide[..., :P].copy_(cache.hide)
        for fixed_kv, kv in zip(fixed.prefix, cache.prefix):
            for old, new in zip(fixed_kv, kv):
                old[:, :, P:].zero_()  # to hide is not enough: 0 x NaN of an earlier batch is NaN
                old[:, :, :P].copy_(new)
        replay()
        return [t.clone() for t in outputs]


def at_fixed_places(usual, given, cache, P):
    """`usual` over copies of its inputs and a cache of P prefix columns -> replay, outputs, inputs, cache."""
    inputs = [t.clone() for t in given]
    fixed = Cache(torch.zeros(len(cache.hide), dtype=torch.long, device=cache.hide.device), P)
    for kv in cache.prefix:
        fixed.prefix.append(tuple(t.new_zeros(*t.shape[:2], P, t.shape[3]) for t in kv))

    def function():
        fixed.slots = [(k[:, :, :0], v[:, :, :0]) for k, v in fixed.prefix]
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
