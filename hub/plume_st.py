"""PLUME as a module of sentence-transformers.  save_pretrained copies this file into every checkpoint.

    model = SentenceTransformer("out/checkpoint", trust_remote_code=True)
    vectors = model.encode(["a red car", {"image": "car.jpg"}, {"text": "why?", "video": "clip.mp4"}])

Items are those of `Plume.encode`, or a turn {"role": "user", "content": ...}; `mode` and `steps` go to
`encode`, too.  What computes is PLUME's own model.py: see `plume`.
"""

import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from sentence_transformers.base.modules import InputModule
from torch.nn.utils.rnn import pad_sequence

MODALITIES = ("text", "image", "video", "message")
NEEDED = ("this checkpoint needs PLUME's own code: set the environment variable PLUME_HOME to the folder "
          "with its model.py, or start Python there")


def plume():
    """PLUME's module `model`: of the folder PLUME_HOME, if it is set, or else wherever Python finds it."""
    home = os.environ.get("PLUME_HOME")
    needed = f"{NEEDED} (PLUME_HOME is {home!r})"
    if home and home not in sys.path:
        sys.path.insert(0, home)
    try:
        module = importlib.import_module("model")
    except ModuleNotFoundError as e:
        if e.name != "model":  # PLUME is there, one of its packages is not
            raise
        raise ModuleNotFoundError(f"no module 'model': {needed}", name="model") from e
    if not hasattr(module, "Plume"):
        raise ImportError(f"{module.__file__} is another module 'model': {needed}")
    return module


class PlumeEmbedder(InputModule):
    """Everything from an item to its unit vector; the only module of its SentenceTransformer."""

    config_file_name = "sentence_bert_config.json"
    config_keys = ["modalities"]
    forward_kwargs = {"mode", "steps"}
    modalities = MODALITIES

    def __init__(self, model, modalities=MODALITIES):
        super().__init__()
        self.plume, self.modalities = model, list(modalities)

    @classmethod
    def load(cls, model_name_or_path, subfolder="", token=None, cache_folder=None, revision=None,
             local_files_only=False, model_kwargs=None, config_kwargs=None, processor_kwargs=None,
             backend="torch", **unused):
        """A checkpoint folder or its name on the hub.

        model_kwargs: a "dtype"; config_kwargs: settings in place of those in the checkpoint's plume block.
        """
        model_kwargs = dict(model_kwargs or {})
        dtype = model_kwargs.pop("dtype", model_kwargs.pop("torch_dtype", None))
        refused = [*model_kwargs, *(processor_kwargs or ())]
        if backend != "torch":
            refused.append(f"backend {backend!r}")
        if refused:
            raise ValueError(f"{', '.join(refused)}: not known here; model_kwargs may have a 'dtype', "
                             "config_kwargs what the plume block of config.json has")
        hub = dict(subfolder=subfolder, token=token, cache_folder=cache_folder, revision=revision,
                   local_files_only=local_files_only)
        folder = cls.load_dir_path(model_name_or_path, **hub)
        dtype = None if dtype == "auto" else dtype
        model = plume().Plume.from_pretrained(folder, dtype=dtype, **config_kwargs or {})
        return cls(model, **cls.load_config(model_name_or_path, **hub))

    def save(self, output_path, *unused, **also_unused):
        self.plume.write(output_path)
        self.save_config(output_path)

    def preprocess(self, inputs, prompt=None, **unused):
        """Items -> their rendered samples.  `rows` says which: GradCache cuts tensors along the batch."""
        items = list(plume().warn_of_file_names(inputs))
        with ThreadPoolExecutor(4) as pool:
            samples = list(pool.map(self.read, items, [prompt] * len(items)))
        ids = pad_sequence([torch.tensor(sample["ids"]) for sample in samples], batch_first=True)
        return dict(input_ids=ids, rows=torch.arange(len(samples)), samples=samples)

    def read(self, item, prompt):
        core = plume()
        where = f"item {core.quote(item)}"
        side = core.Side(parts_of(core, item, where), where=where)
        if prompt:  # in front of the text, behind pictures that stand in front of it
            kinds = [kind for kind, _ in side.parts]
            side.parts.insert(kinds.index("text") if "text" in kinds else len(kinds), ("text", prompt))
        return dict(self.plume.processor.render(side), where=where)

    def forward(self, features, mode="latent", steps=None):
        core = plume()
        core.check_mode(mode, steps)
        samples = [features["samples"][row] for row in features["rows"].tolist()]
        batch = core.to_device(core.collate(samples, self.plume.processor), self.plume.device)
        vectors, _ = self.plume.embed(batch, mode, steps)  # (B, D)
        if not torch.is_grad_enabled():
            finite = vectors.isfinite().all(1).tolist()
            wrong = [sample["where"] for sample, fine in zip(samples, finite) if not fine]
            if wrong:
                self.plume.not_finite(wrong)
        return features | dict(sentence_embedding=vectors)

    def get_embedding_dimension(self):
        return self.plume.lm.config.hidden_size

    def gradient_checkpointing_enable(self, *unused, **also_unused):
        self.plume.checkpointing = True

    @property
    def max_seq_length(self):
        """In tokens, with pictures; what is longer is an error and not cut, so it cannot be set."""
        return self.plume.processor.limits.max_len

    @property
    def tokenizer(self):
        return self.plume.processor.tokenizer


def parts_of(core, item, where):
    """An item of `Plume.encode`, or a turn of the user in sentence-transformers' form -> parts of a Side."""
    turns = item if isinstance(item, list) else [item]
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return core.parse_item(item, where=where).parts
    if len(turns) != 1 or turns[0]["role"] != "user":
        raise core.DataError(f"{where}: PLUME embeds one turn of the user; other turns and system texts are "
                             "not read")
    content, parts = turns[0].get("content"), []
    if isinstance(content, str):
        return core.parse_item(content, where=where).parts
    for piece in content:
        kind = piece.get("type")
        parts += core.parse_item({kind: piece.get(kind)}, where=where).parts
    return parts
