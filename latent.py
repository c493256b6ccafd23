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
    x: torch.Tensor  # (B, P, D) input embeddings, padded on the right; contiguous
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
    """Keys and values of every layer, to train with: the prefix's, written once, and the few slots behind it.

    Everything stays in the autograd graph.  The prefix block is copied only by `of`; only the slots grow.
    """

    def __init__(self, lm, lengths, P):
        self.n, self.joined = P, [(None, None)] * len(lm.layers)  # prefix columns; see `joined_weights`
        padding = torch.arange(P, device=lengths.device) >= lengths[:, None]  # (B, P)
        hide = torch.zeros(padding.shape, device=lengths.device).masked_fill_(padding, float("-inf"))
        self.hide = hide[:, None, None]  # (B, 1, 1, P)
        self.prefix, self.slots = [], []  # a (k, v) for each layer, each (B, G, ., d)

    def keep(self, i, k, v):
        """Layer i's prefix, or all of its slots."""
        if i == len(self.prefix):
            k, v = k.clone(memory_format=torch.contiguous_format), v.contiguous()
            self.prefix.append((k, v))  # copied once, and by no later product; a view would keep the queries
            self.slots.append((k[:, :, :0], v[:, :, :0]))
        else:
            self.slots[i] = k, v

    def attention(self, L, share):
        """How L new columns look at the old ones and at themselves: for each layer a function, see `block`.

        share: query heads that share a head of keys.
        """
        n = self.slots[0][0].shape[2]
        mask = causal_mask(L, n, n + L, self.hide).repeat(share, 1) if L > 1 else None  # one sees every slot
        return [functools.partial(attend_two_blocks, *kv, *slots, self.hide, mask)
                for kv, slots in zip(self.prefix, self.slots)]

    def of(self, rows):
        """The cache of some rows (n,), sorted, each once: a copy, or for all rows over the same tensors.

        Two Buffers over the same tensors write their later columns to the same places.
        """
        some = copy.copy(self)
        some.prefix, some.slots = list(self.prefix), list(self.slots)
        if len(rows) < len(self.hide):
            some.hide = self.hide[rows]
            some.prefix = [(k[rows], v[rows]) for k, v in self.prefix]
            some.slots = [(k[rows], v[rows]) for k, v in self.slots]
        return some

    @staticmethod
    def join(caches):
        """Several caches without slots in one, and emptied.  Short ones get hidden columns."""
        joined, n = copy.copy(caches[0]), max(cache.n for cache in caches)
        hide = [F.pad(c.hide[..., : c.n], (0, n - c.n), value=float("-inf")) for c in caches]
        joined.n, joined.hide, joined.prefix, joined.slots = n, torch.cat(hide), [], []
        while caches[0].prefix:  # layer by layer, so that memory holds keys and values once
            filled = [[F.pad(t[:, :, : c.n], (0, 0, 0, n - c.n)) for t in c.prefix.pop(0)] for c in caches]
            joined.keep(len(joined.prefix), *map(torch.cat, zip(*filled)))
        return joined


class Buffer(Cache):
    """The same for inference: one block, the first n columns of `prefix` and `hide`, and room behind them."""

    def __init__(self, lm, lengths, P):
        super().__init__(lm, lengths, P)
        device = lengths.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            # there each product would cast them anew, while weights by themselves are cast once
            self.joined = [joined_weights(layer) for layer in lm.layers]

    def keep(self, i, k, v):
        if i == len(self.prefix):  # what comes later is in its place already, see `attend_in_place`
            self.reserve(self.n + 1)
            self.hide = self.hide.to(k.dtype)
            room = self.hide.shape[-1] - self.n
            self.prefix.append((F.pad(k, (0, 0, 0, room)), F.pad(v, (0, 0, 0, room))))

    def reserve(self, columns):
        size = self.hide.shape[-1]
        if columns > size:
            ample = columns * 5 // 4 if self.prefix else columns  # 26 and more: for steps and suffix
            more = ample // 8 * 8 + 32 - size  # eights: CUDA's kernels want that of a mask's rows
            self.hide = F.pad(self.hide, (0, more))
            for i, kv in enumerate(self.prefix):
                self.prefix[i] = [F.pad(t, (0, 0, 0, more)) for t in kv]

    def attention(self, L, share):
        self.reserve(self.n + L)
        mask = self.hide
        if L > 1:
            mask = (mask + causal_mask(L, self.n, mask.shape[-1], mask)).repeat(1, 1, share, 1)
        self.n += L
        return [functools.partial(attend_in_place, *kv, self.n, mask[..., : self.n]) for kv in self.prefix]

    def forget(self, P, taken):
        """Later columns of a row see only the first taken (B,) of its columns behind the prefix's P."""
        column = torch.arange(self.hide.shape[-1], device=taken.device)
        over = (column >= P + taken[:, None]) & (column < self.n)  # (B, columns)
        self.hide = self.hide.masked_fill(over[:, None, None], float("-inf"))


class Unfinished(NamedTuple):  # what `until_done` leaves to be written
    rows: torch.Tensor  # (n,) of the batch
    h: torch.Tensor  # (n, D) state of the column in front of position pos
    pos: torch.Tensor  # (n,)
    cache: Cache


def rollout(lm, adapter, prefix, steps, suffix, rule="mrope", checkpointing=False, graphs=None, hook=None):
    """The method: prefill, K latent steps, suffix -> Rollout.

    lm: transformers' text model; adapter: TransitionAdapter; prefix: Prefix; steps: K, a Python int;
    suffix: (B, T, D) input embeddings; rule: see `next_positions`; graphs: None, or an engine.graphs.Graphs.
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
    caches, *states = zip(*[prefill(lm, prefix, rule, checkpointing, Cache) for prefix, _ in groups])
    sizes, whole = [len(z) for z in states[1]], caches[0]
    if steps > 1 and len(caches) > 1:
        whole = Cache.join([cache.of(range(rows)) for cache, rows in zip(caches, sizes)])
    anchor, z, pos = map(torch.cat, states)
    rope = rotary_behind(lm, pos, steps + max(suffix.shape[1] for _, suffix in groups), z)
    behind = latent_steps(lm, adapter, steps, anchor, z, rope, whole)
    if whole is not caches[0]:
        for i, (k, v) in enumerate(whole.slots):
            for cache, *slots in zip(caches, k.split(sizes), v.split(sizes)):
                cache.slots[i] = slots
    rows, rollouts = zip(*states, rope.split(sizes, 1), *(part.split(sizes) for part in behind)), []
    for (_, suffix), cache, (anchor, z, _, rope, latents, last, router) in zip(groups, caches, rows):
        more, h = last_and_suffix(lm, last, rope, steps, suffix, cache, checkpointing)
        rollouts.append(Rollout(anchor, z, torch.cat([latents, more], 1), h, router))
    return rollouts


def prefill(lm, prefix, rule="mrope", checkpointing=False, kind=None):
    """-> Cache, anchor h(<disc_emb>) (B, D), z_0 = h(<bot>) (B, D), position behind the prefix (B,)"""
    kind = kind or (Cache if torch.is_grad_enabled() else Buffer)  # of cache
    cache, rope = kind(lm, prefix.lengths, prefix.x.shape[1]), rotary(lm, prefix.positions, prefix.x)
    columns = torch.stack([prefix.disc, prefix.lengths - 1], 1)  # (B, 2)
    h = decoder(lm, prefix.x, rope, cache, checkpointing, prefix.deepstack, columns)
    return cache, *h.unbind(1), next_positions(prefix, rule)


def steps_and_suffix(lm, adapter, steps, anchor, z, pos, suffix, cache, checkpointing=False, hook=None):
    """What comes behind the prefix -> latents (B, K, D), suffix (B, T, D), router probabilities (B, K, E)."""
    rope = rotary_behind(lm, pos, steps + suffix.shape[1], z)
    latents, last, router = latent_steps(lm, adapter, steps, anchor, z, rope, cache, hook)
    more, h = last_and_suffix(lm, last, rope, steps, suffix, cache, checkpointing)
    return torch.cat([latents, more], 1), h, router


def latent_steps(lm, adapter, steps, anchor, z, rope, cache, hook=None):
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
            z = decoder(lm, last, rope[..., k : k + 1, :], cache)[:, 0]  # z_{k+1}
            latents.append(z[:, None])
    router = torch.stack(probs, 1) if probs else z.new_zeros(len(z), 0, 0)
    return torch.cat(latents, 1), last, router


def last_and_suffix(lm, last, rope, steps, suffix, cache, checkpointing=False):
    """One pass of the last steps' inputs (B, n, D) and the suffix (B, T, D) -> h of each."""
    n, end = last.shape[1], steps + suffix.shape[1]
    x, rope = torch.cat([last, suffix], 1), rope[..., steps - n : end, :]
    h = decoder(lm, x, rope, cache, checkpointing)  # (B, n + T, D)
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
    return prefill(lm, prefix, kind=Cache)[1]  # without room for more columns


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
    tokens, rope = [], rotary_behind(lm, pos, limit, h)
    out, done = torch.zeros_like(h), torch.zeros(len(h), dtype=torch.bool, device=h.device)
    for t in range(limit):
        token = head(h).argmax(-1) if t < limit - 1 else torch.full_like(pos, end)
        token = torch.where(done, end, token)
        tokens.append(token)
        h = decoder(lm, embed(token)[:, None], rope[..., t : t + 1, :], cache)[:, 0]
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
    rope = rotary_behind(lm, pos, steps, z)
    for k in range(steps + 1):
        stops = at_least_float32(head(z)).softmax(-1)[:, eot] > done
        taken, stopped = torch.where(stops & ~stopped, k, taken), stopped | stops
        if k == steps or bool(stopped.all()):
            break
        x, _ = adapter(z, k, anchor)
        z = decoder(lm, x[:, None], rope[..., k : k + 1, :], cache)[:, 0]

    out, pos = torch.zeros_like(z), pos + taken
    ready, left = stopped.nonzero()[:, 0], (~stopped).nonzero()[:, 0]
    if len(ready):
        seen = cache.of(ready)
        seen.forget(prefix.x.shape[1], taken[ready])
        rope = rotary_behind(lm, pos[ready], suffix.shape[1], z)
        out[ready] = select_column(decoder(lm, suffix[ready], rope, seen), gen[ready])
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
def decoder(lm, x, rope, cache, checkpointing=False, deepstack=(), columns=None):
    """All layers over L new columns: x (B, L, D), rope of their positions -> final states (B, L, D).

    On an empty cache the columns are the prefix; later ones become slots.  The cache is updated.
    deepstack: see Prefix.  columns (B, n): those whose states are wanted, no visual ones -> (B, n, D).
    """
    attention = [attend_causally] * len(lm.layers)
    if cache.prefix:
        attention = cache.attention(x.shape[1], lm.layers[0].self_attn.num_key_value_groups)
    for i, (layer, attend) in enumerate(zip(lm.layers, attention)):
        wanted = columns if i + 1 == len(lm.layers) else None
        given = layer, x, rope, attend, wanted, *cache.joined[i]
        if checkpointing and torch.is_grad_enabled():
            x, k, v = checkpoint(block, *given, use_reentrant=False)
        else:
            x, k, v = block(*given)
        if i < len(deepstack) and wanted is None:  # Qwen3-VL
            x = add_features(x, *deepstack[i])
        cache.keep(i, k, v)
    return rms_norm(x, lm.norm)


def add_features(x, places, features):
    """x (B, L, D) with features (M, D) of visual tokens added at their flat places (M,) in (B, L)."""
    return x.flatten(0, 1).index_add(0, places, features.to(x.dtype)).view_as(x)


def block(layer, x, rope, attend, columns, qkv, gate_up):
    """One decoder layer -> its output (B, L, D), and the keys and values that its cache keeps.

    attend: q (B, H, L, d), k, v (B, G, L, d) -> (B, H, L, d), and these; columns (B, n): the output of these
    alone, None: of all; qkv, gate_up: see `joined_weights`.
    """
    att, mlp = layer.self_attn, layer.mlp
    h = rms_norm(x, layer.input_layernorm)
    if qkv is None:
        qk, v = torch.cat([linear(att.q_proj, h), linear(att.k_proj, h)], -1), linear(att.v_proj, h)
    else:
        h, n = product(*qkv, h).contiguous(), att.v_proj.out_features  # contiguous: see `product`
        qk, v = h[..., :-n], h[..., -n:]
    qk, v = split_heads(qk, att.head_dim), split_heads(v, att.head_dim)
    G = v.shape[1]
    if hasattr(att, "q_norm"):  # Qwen3-VL
        qk = torch.cat([rms_norm(qk[:, :-G], att.q_norm), rms_norm(qk[:, -G:], att.k_norm)], 1)
    qk = rotate(qk, *rope)  # (B, H + G, L, d)
    a, k, v = attend(qk[:, :-G], qk[:, -G:], v)
    a = a.transpose(1, 2).flatten(2)  # (B, L, H*d)
    if columns is not None:
        x, a = (t.take_along_dim(columns[..., None], 1) for t in (x, a))
    x = x + linear(att.o_proj, a)
    h = rms_norm(x, layer.post_attention_layernorm)
    if gate_up is None:
        h = F.silu(linear(mlp.gate_proj, h)) * linear(mlp.up_proj, h)
        return x + linear(mlp.down_proj, h), k, v
    gate, up = product(*gate_up, h).chunk(2, -1)
    h = F.silu(gate, inplace=True).mul_(up)
    x.view(-1, x.shape[-1]).addmm_(h.flatten(0, 1), mlp.down_proj.weight.T)  # x + down(h), in x's place
    return x, k, v


def attend_causally(q, k, v):
    """The prefix: q (B, H, L, d) over its own k, v (B, G, L, d) -> (B, H, L, d), k, v."""
    keys, values = for_heads(k, q), for_heads(v, q)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True), k, v


def attend_two_blocks(k_prefix, v_prefix, k_slots, v_slots, hide, mask, q, k, v):
    """q (B, H, L, d) over prefix (B, G, P, d) and slots (B, G, n, d): two score blocks, one softmax.

    hide: 0 / -inf for the prefix, (B, 1, 1, P); mask: for old and new slots, (H/G*L, n + L), or None.
    Query heads of a group share their keys: they are folded into rows, and the cache is neither repeated nor
    copied.  -> (B, H, L, d), k and v of all slots
    """
    k, v = torch.cat([k_slots, k], 2), torch.cat([v_slots, v], 2)
    G, P, d = k_prefix.shape[1:]
    rows = q.reshape(len(q), G, -1, d) * d**-0.5  # (B, G, H/G*L, d)
    far = rows @ k_prefix.mT + hide  # (B, G, H/G*L, P)
    near = rows @ k.mT  # (B, G, H/G*L, n + L)
    if mask is not None:
        near = near + mask
    w = at_least_float32(torch.cat([far, near], -1)).softmax(-1).to(v.dtype)
    return (w[..., :P] @ v_prefix + w[..., P:] @ v).view_as(q), k, v


def attend_in_place(keys, values, n, mask, q, k, v):
    """The same over the first n columns of keys, values (B, G, ., d), the last L of which are written here.

    mask: (B, 1, 1 or H/G*L, n)
    """
    L, G, d = q.shape[2], *keys.shape[1::2]
    keys[:, :, n - L : n], values[:, :, n - L : n] = k, v
    rows = q.reshape(len(q), G, -1, d)  # (B, G, H/G*L, d)
    a = F.scaled_dot_product_attention(rows, keys[:, :, :n], values[:, :, :n], attn_mask=mask)
    return a.reshape(q.shape), keys, values


def causal_mask(L, n, columns, like):
    """(L, columns): row i sees n old columns, and new ones up to its own: 0 is seen, -inf not."""
    return like.new_full((L, columns), float("-inf")).triu(n + 1)


def rotary_behind(lm, pos, L, x):
    """`rotary` of the L columns from position pos (B,) on, the same on all axes."""
    return rotary(lm, (pos[:, None] + torch.arange(L, device=pos.device)).expand(3, -1, -1), x)


def rotary(lm, positions, x):
    """M-RoPE's cos and sin (2, B, 1, L, d) at positions (3, B, L): a frequency belongs to one of three axes.

    `mrope_section` says how many of the d/2 frequencies are temporal, height, width.  In float32.
    """
    given, d = lm.config.rope_parameters, lm.layers[0].self_attn.head_dim
    exponents = torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d  # (d/2,)
    angles = positions[..., None].float() * (1 / given["rope_theta"] ** exponents)  # (3, B, L, d/2)
    sections = given["mrope_section"]
    if lm.config.model_type == "qwen3_vl_text":
        parts = [interleaved(angles, sections)]
    else:  # one section behind the other
        parts = [section[axis] for axis, section in enumerate(angles.split(sections, -1))]
    angles = torch.cat(parts * 2, -1)[:, None]
    rope = torch.stack([angles.cos(), angles.sin()])
    rope[1, ..., : d // 2].neg_()
    return rope.to(x.dtype)


def interleaved(angles, sections):
    """Qwen3-VL: (3, B, L, d/2) -> (B, L, d/2) of temporal, height, width, temporal, ..; the rest temporal."""
    mixed = angles[0].clone()
    for axis in (1, 2):
        mine = slice(axis, 3 * sections[axis], 3)
        mixed[..., mine] = angles[axis, ..., mine]
    return mixed


def rotate(x, cos, sin):
    """Pairs (a, b) of x's halves -> (a cos - b sin, b cos + a sin); the minus stands in `rotary`'s table."""
    turned = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return turned.to(x.dtype)  # under autocast cos and sin are wider


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
    return product(layer.weight, layer.bias, x) if is_plain(layer) else layer(x)


def is_plain(layer):  # neither wrapped, rounded nor hooked
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter and not hooked


def joined_weights(layer):
    """(weight, bias) of one product for q, k, v, and of one for gate, up; None where these lie apart.

    `hub.weights.side_by_side` puts them there.  Not to train with: the last bits may differ.
    """
    att, mlp = layer.self_attn, layer.mlp
    plain = is_plain(mlp.down_proj) and mlp.down_proj.bias is None
    gate_up = joined((mlp.gate_proj, mlp.up_proj)) if plain else None
    return joined((att.q_proj, att.k_proj, att.v_proj)), gate_up


def joined(layers):
    if not all(map(is_plain, layers)):
        return None
    weight = as_one([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else as_one([layer.bias for layer in layers])
    apart = weight is None or (bias is None) != (layers[0].bias is None)
    return None if apart else (weight, bias)


def as_one(parts):
    """Tensors that stand one behind the other in memory -> one of all of them, without a copy; else None."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != first.untyped_storage()._cdata or part.storage_offset() != end:
            return None
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def product(weight, bias, x):
    """x (B, L, D) -> x W^T + b.  On a CPU a latent step's few rows are faster as (W x^T)^T, in blocks of 16.

    The products of a step of 16 / 32 / 48 rows take 17 / 24 / 38 ms so and 19 / 26 / 45 the usual way (8
    layers, D = 512, 2 threads, an AMD EPYC, 2026-11-25).  With 8 and 64 rows it was slower on another CPU
    (docs/log.md).
    """
    rows = x.shape[0] * x.shape[1]
    if x.device.type != "cpu" or not 16 <= rows <= 48:
        return F.linear(x, weight, bias)
    x_t = x.flatten(0, 1).T  # (D, B*L)
    y_t = weight @ x_t if bias is None else torch.addmm(bias[:, None], weight, x_t)
    return y_t.T.unflatten(0, x.shape[:2])
