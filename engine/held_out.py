"""Pairs that are held out of training, and hit@1 on them while it runs."""

import numpy as np
import torch.distributed as dist

from engine.ranks import all_gather_objects, say
from files.errors import DataError


def readable_pairs(cfg, pairs, rows, processor):
    """The held-out rows whose media can be read; the first bad one is an error without --skip_bad."""
    good = []
    for i in rows:
        sides = pairs[i]
        try:
            for side in sides:
                processor.render(side)
            good.append(i)
        except DataError as e:
            if not cfg.skip_bad:
                raise
            say("left out:", e)
    if good:
        targets = {pairs[i][1].key() for i in good}
        say(f"{len(good)} pairs are held out; hit@1 by chance {1 / len(targets):.1%}")
    elif cfg.eval_every:
        raise DataError(f"--eval_every {cfg.eval_every}: a tenth of {len(pairs)} pairs leaves none to "
                        "hold out that can be read, with all pairs of the same query; leave it out")
    return good


def hit_at_1(model, pairs, rows, autocast):
    """hit@1 of the held-out queries against their targets: latent, or auto if the model says when it is done.

    Any target that stands with the same query is right.  In auto a row may write as many tokens as the
    longest rationale and answer there have, and 16 for the tags.  All ranks give the first one's number.
    """
    queries, targets = zip(*[pairs[i][:2] for i in rows])
    _, first, gold = np.unique([target.key() for target in targets], return_index=True, return_inverse=True)
    asked = [query.key() for query in queries]
    right = set(zip(asked, gold))
    mode = "auto" if model.says_when_done else "latent"
    texts = [side.rationale + side.answer for side in (*queries, *targets)]
    limit = 16 + max(map(len, model.processor.tokenizer(texts).input_ids))
    with autocast:
        q = model.encode(list(queries), mode, limit=limit)
        t = model.encode([targets[i] for i in first], mode, limit=limit)
    hit = float(np.mean([pair in right for pair in zip(asked, (q @ t.T).argmax(1))]))
    return all_gather_objects(hit)[0] if dist.is_initialized() else hit
