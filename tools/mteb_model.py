"""PLUME as a model of MTEB (pip install mteb), for its text, ViDoRe and MIEB tasks.

    import mteb
    from tools.mteb_model import PlumeEncoder

    mteb.evaluate(PlumeEncoder("out/checkpoint"), mteb.get_benchmark("ViDoRe(v2)").tasks)

MTEB keeps results by name and revision: the revision is the hash of the weights and settings.
"""

import itertools
import os

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from engine.kept import fingerprint, short_hash
from files.items import parse_item
from hub.prompts import template_of_prefix
from hub.weights import count_parameters
from model import Plume

KINDS = ("text", "image", "video")


class PlumeEncoder(AbsEncoder):
    """A checkpoint for `mteb.evaluate`.

    mode, steps, truncate: see `Plume.encode`; a long document is cut unless told, so as not to end a task.
    prompts: {a task, a task type, "query" or "document": a text in front, or a template with {}}; a task's
    own go before the checkpoint's `query` and `document`.
    index_mode: of documents; default: "single" where the checkpoint says that this is one space, else mode.
    """

    def __init__(self, path, mode="latent", steps=None, prompts=None, index_mode=None, truncate=True,
                 **loading):
        self.model, self.mode, self.steps = Plume.from_pretrained(path, **loading), mode, steps
        self.truncate, known = truncate, self.model.settings["prompts"]
        usual = "single" if self.model.settings["one_space"] else mode
        self.index_mode = index_mode or usual
        own = {name: known[name] for name in ("query", "document") if known[name] != "{}"}
        self.model_prompts = own | (self.validate_task_to_prompt_name(prompts) or {})
        for name, text in self.model_prompts.items():
            known[name] = template_of_prefix(text)
        name = os.path.basename(os.path.abspath(path))
        # What is not as usual is an experiment to MTEB: kept apart, and not among what load_results gives;
        # the checkpoint's own prompts are the usual ones
        given = dict(steps=steps, prompts=prompts)
        given |= dict(mode=mode) if mode != "latent" else {}
        given |= dict(index_mode=index_mode) if self.index_mode != usual else {}
        self.mteb_model_meta = ModelMeta.create_empty(dict(
            name=f"plume/{name}", revision=short_hash(fingerprint(self.model), str(own)),
            similarity_fn_name=ScoringFunction.COSINE, modalities=list(KINDS),
            n_parameters=count_parameters(self.model),
            max_tokens=self.model.processor.limits.max_len, embed_dim=self.model.lm.config.hidden_size,
            experiment_kwargs={key: value for key, value in given.items() if value}))

    def encode(self, inputs, *, task_metadata, prompt_type=None, batch_size=16, show_progress_bar=True,
               **unused):
        """inputs: MTEB's loader of batches, dicts of lists -> float32 array (N, D) of unit rows."""
        name = self.get_prompt_name(task_metadata, prompt_type)
        prompt = name if name in self.model_prompts else None
        mode = self.index_mode if prompt_type == "document" else self.mode
        steps = self.steps if mode == self.mode else None
        return self.model.encode(
            sides_of(inputs), mode, steps, batch_size, show_progress_bar, prompt=prompt,
            truncate=self.truncate)


def sides_of(batches):
    """MTEB's batches -> Sides."""
    numbers = itertools.count()
    for batch in batches:
        columns = {kind: batch[kind] for kind in KINDS if kind in batch}
        for row in zip(*columns.values(), strict=True):
            yield parse_item(dict(zip(columns, row)), where=f"item {next(numbers)}")
