"""PLUME as a model of MTEB (pip install mteb), for its text, ViDoRe and MIEB tasks.

    import mteb
    from tools.mteb_model import PlumeEncoder

    mteb.evaluate(PlumeEncoder("out/checkpoint"), mteb.get_benchmark("ViDoRe(v2)").tasks)

MTEB keeps results by name and revision: the revision is the hash of the weights and settings.
"""

import os

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from engine.kept import fingerprint
from hub.weights import count_parameters
from model import Plume

KINDS = ("text", "image", "video")


class PlumeEncoder(AbsEncoder):
    """A checkpoint for `mteb.evaluate`.

    mode, steps, truncate: see `Plume.encode`; a long document is cut unless told, so as not to end a task.
    prompts: {a task, a task type, "query" or "document": the text in front}.
    index_mode: of documents; default: "single" where the checkpoint says that this is one space, else mode.
    """

    def __init__(self, path, mode="latent", steps=None, prompts=None, index_mode=None, truncate=True,
                 **loading):
        self.model, self.mode, self.steps = Plume.from_pretrained(path, **loading), mode, steps
        self.truncate = truncate
        usual = "single" if self.model.settings["one_space"] else mode
        self.index_mode = index_mode or usual
        self.model_prompts = self.validate_task_to_prompt_name(prompts) or {}
        name = os.path.basename(os.path.abspath(path))
        # What is not as usual is an experiment to MTEB: kept apart, and not among what load_results gives
        given = dict(steps=steps, prompts=self.model_prompts)
        given |= dict(mode=mode) if mode != "latent" else {}
        given |= dict(index_mode=index_mode) if self.index_mode != usual else {}
        self.mteb_model_meta = ModelMeta.create_empty(dict(
            name=f"plume/{name}", revision=fingerprint(self.model), similarity_fn_name=ScoringFunction.COSINE,
            modalities=list(KINDS), n_parameters=count_parameters(self.model),
            max_tokens=self.model.processor.limits.max_len, embed_dim=self.model.lm.config.hidden_size,
            experiment_kwargs={key: value for key, value in given.items() if value}))

    def encode(self, inputs, *, task_metadata, prompt_type=None, batch_size=16, show_progress_bar=True,
               **unused):
        """inputs: MTEB's loader of batches, dicts of lists -> float32 array (N, D) of unit rows."""
        prompt = self.model_prompts.get(self.get_prompt_name(task_metadata, prompt_type), "")
        items = (item for batch in inputs for item in items_of(batch, prompt))
        mode = self.index_mode if prompt_type == "document" else self.mode
        steps = self.steps if mode == self.mode else None
        return self.model.encode(
            items, mode, steps, batch_size, show_progress_bar, truncate=self.truncate)


def items_of(batch, prompt):
    """A batch of MTEB -> items as `Plume.encode` takes them, the prompt in front of their texts."""
    columns = {kind: batch[kind] for kind in KINDS if kind in batch}
    items = [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
    if prompt:
        items = [item | dict(text=prompt + item.get("text", "")) for item in items]
    return items
