"""The semantic-anchor-guided transition adapter: what turns one latent state into the input of the next step.

Paper, section "transition": the hidden state z_k cannot be fed back as it is, because the decoder's output
space is not its input space.  One small mixture of experts (one for the whole model, not one per layer) maps
it across, and the router looks at the *anchor*, a summary of the input taken at <disc_emb>, so that pictures,
clips, pages and text may take different paths:

    r  = softmax(W [z + anchor ; step_embedding(k)])                    router over E experts
    z' = z + shared(LN z) + sum_{e in top-k(r)} r_e expert_e(LN z)      NOT renormalised after the top-k

Every expert, the shared one too, is Linear(D, 2D) - GELU - Linear(2D, D).  All of them are stored in one
tensor and run in one batched product, the shared one as expert 0 with weight 1; the top-k only decides the
weights.  That computes experts which get weight zero, and never asks the device which ones were chosen.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

MAX_STEPS = 32  # rows of the step table


class TransitionAdapter(nn.Module):
    """z_k -> the decoder input of latent step k.

    kind: "moe" (the paper), "mlp" (the shared expert alone), "none" (identity: z is fed back as it is), or
    "parallel": no z is fed back, the inputs are learnt tokens, the rows of `tokens` (see latent.py).
    experts, top_k, shared_expert, anchor, step_embedding: the paper's ablations, see the formula above.
    router_bias: the formula has none; a checkpoint that stores one is loaded with it.
    ValueError: another kind, or a top_k that is not 1..experts.
    """

    def __init__(self, dim, kind="moe", experts=4, top_k=2, shared_expert=True, anchor=True,
                 step_embedding=True, router_bias=False):
        super().__init__()
        if kind not in ("moe", "mlp", "none", "parallel"):
            raise ValueError(f"adapter kind {kind[:40]!r}: needs 'moe', 'mlp', 'none' or 'parallel'")
        if kind == "moe" and not 1 <= top_k <= experts:
            raise ValueError(f"adapter top_k {top_k} of {experts} experts: needs 1 <= top_k <= experts")
        self.kind, self.top_k, self.anchor = kind, top_k, anchor
        self.experts = experts if kind == "moe" else 0  # E
        self.shared_expert = kind == "mlp" or (kind == "moe" and shared_expert)
        if kind == "parallel":
            self.tokens = nn.Embedding(MAX_STEPS, dim)
            nn.init.normal_(self.tokens.weight, std=dim**-0.5)
        if kind in ("none", "parallel"):
            return
        n = self.experts + 1 if self.shared_expert else self.experts
        self.ln = nn.LayerNorm(dim)
        self.w1 = nn.Parameter(torch.randn(n, dim, 2 * dim) * 0.02)
        self.b1 = nn.Parameter(torch.zeros(n, 1, 2 * dim))
        self.w2 = nn.Parameter(torch.randn(n, 2 * dim, dim) * 1e-3)  # small: starts near the identity
        self.b2 = nn.Parameter(torch.zeros(n, 1, dim))
        if self.experts:
            self.step_embed = nn.Embedding(MAX_STEPS, dim) if step_embedding else None
            self.router = nn.Linear(2 * dim if step_embedding else dim, experts, bias=router_bias)
            nn.init.normal_(self.router.weight, std=0.02)

    def forward(self, z, step, anchor):
        """z, anchor (B, D), step a Python int -> next input (B, D), router probabilities (B, E or 0)."""
        assert self.kind != "parallel", "learnt tokens take no state"
        B = z.shape[0]
        if self.kind == "none":
            return z, z.new_zeros(B, 0)
        if self.experts:
            x = z + anchor if self.anchor else z
            if self.step_embed is not None:
                x = torch.cat([x, self.step_embed.weight[step].expand_as(z)], -1)  # (B, 2D)
            probs = self.router(x)
            probs = probs.to(torch.promote_types(probs.dtype, torch.float32)).softmax(-1)
            top, chosen = probs.topk(self.top_k)
            w = torch.zeros_like(probs).scatter(-1, chosen, top)  # (B, E): r_e or 0
        else:
            w = probs = z.new_zeros(B, 0)
        if self.shared_expert:
            w = F.pad(w, (1, 0), value=1.0)  # (B, n): in front 1 for the shared expert
        h = self.ln(z).expand(len(self.w1), B, -1)
        h = F.gelu(torch.baddbmm(self.b1, h, self.w1))  # (n, B, 2D)
        h = torch.baddbmm(self.b2, h, self.w2)  # (n, B, D)
        return z + torch.einsum("bn,nbd->bd", w.to(h.dtype), h), probs


def balance_loss(mean_probs):
    """mean_probs (K, E), r averaged over the batch -> mean_e (mean_b r_e - 1/E)^2, mean over K (paper)."""
    K, E = mean_probs.shape
    if K == 0 or E == 0:
        return mean_probs.new_zeros(())
    return (mean_probs - 1 / E).pow(2).mean()
