"""A checkpoint as the one module of a SentenceTransformer: items in, unit vectors out.

    model = SentenceTransformer("out/checkpoint", trust_remote_code=True)
    vectors = model.encode(["a red car", {"image": "car.jpg"}, {"text": "why?", "video": "clip.mp4"}])

Items are those of `Plume.encode`, or a turn {"role": "user", "content": ...}; `mode`,
`steps`, `dim`, `done` and `limit` go to `encode`, too.  Of a checkpoint that says that its latent and
single-pass embeddings are one space, `encode_document` gives the single-pass one, unless mode or steps are
given; `encode_query` thinks.
A prompt is a text in front, or with one {} a template; see hub/prompts.py.
hub/plume_st.py, which stands in the checkpoint, finds this file and fills in Plume.
"""

import copy
import importlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from sentence_transformers.base.modules import InputModule

from data import collate, padded, to_device
from engine.containers import what_instead
from engine.st_card import CardData
from engine.stream import check_embeddings, check_mode, check_numbers
from engine.truncate import render_truncated, warn_of_cut
from files.errors import DataError, quote
from files.items import parse_item, Side
from files.named import warn_of_file_names
from files.pictures import PICTURE
from hub.isolated import HOME
from hub.layouts import write_checkpoint
from hub.prompts import template_of_prefix, with_prompt
from latent import unit

MODALITIES = ("text", "image", "video", "message")


class PlumeEmbedder(InputModule):
    """Everything from an item to its unit vector."""

    Plume = None  # the class of model.py, which imports engine/
    config_file_name = "sentence_bert_config.json"
    config_keys = ["modalities"]
    forward_kwargs = {"mode", "steps", "task", "dim", "done", "limit"}
    modalities = MODALITIES

    def __init__(self, model, modalities=MODALITIES):
        super().__init__()
        self.plume, self.modalities = model, list(modalities)
        self.shortened = None  # a processor whose max_len is max_seq_length, once that was set

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
        home = os.environ.get("PLUME_HOME")
        if home and Path(home).resolve() != HOME:
            raise ImportError(f"PLUME_HOME is {home!r} now, and for this checkpoint Python has imported the "
                              f"PLUME in {str(HOME)!r}; start Python anew")
        hub = dict(subfolder=subfolder, token=token, cache_folder=cache_folder, revision=revision,
                   local_files_only=local_files_only)
        folder = cls.load_dir_path(model_name_or_path, **hub)
        dtype = None if dtype == "auto" else dtype
        model = cls.Plume.from_pretrained(folder, dtype=dtype, **config_kwargs or {})
        return cls(model, **cls.load_config(model_name_or_path, **hub))

    def on_model_ready(self, model):
        if not isinstance(model.model_card_data, CardData):
            model.model_card_data = CardData.taking_over(model.model_card_data)

    def save(self, output_path, *unused, **also_unused):
        write_checkpoint(self.plume, output_path)
        self.save_config(output_path)

    def __reduce_ex__(self, protocol):
        """Where our modules have their plain names, a process that gets the pickle imports them so, too."""
        Plume = type(self.plume)
        if Plume.__module__ != "model":
            return super().__reduce_ex__(protocol)
        return make_empty, (Plume, type(self).__module__), self.__dict__

    def preprocess(self, inputs, prompt=None, **unused):
        """Items -> their rendered samples.  `rows` says which: GradCache cuts tensors along the batch."""
        items = list(warn_of_file_names(inputs))
        with ThreadPoolExecutor(4) as pool:
            samples = list(pool.map(self.read, items, [prompt] * len(items)))
        if self.shortened:
            cut = {i: sample["cut"] for i, sample in enumerate(samples) if sample["cut"]}
            warn_of_cut(cut, len(samples), self.max_seq_length)
        ids = padded([sample["ids"] for sample in samples], 0)
        return dict(input_ids=ids, rows=torch.arange(len(samples)), samples=samples)

    def read(self, item, prompt):
        if not isinstance(item, (str, list, tuple, dict, os.PathLike, *PICTURE)):
            instead = what_instead(item) or "take list(items)"
            raise DataError("sentence-transformers takes a "
                            f"{type(item).__name__} for a single item; {instead}")
        where = f"item {quote(item)}"
        side = Side(parts_of(item, where), where=where)
        template = template_of_prefix(prompt or "")
        if self.shortened:
            return dict(render_truncated(self.shortened, side, template), where=where)
        side = with_prompt(side, template)
        return dict(self.plume.processor.render(side), where=where)

    def forward(self, features, mode=None, steps=None, task=None, dim=None, done=0.5, limit=512):
        """mode: "latent" unless given; task: "query", "document" or None; the others as in `Plume.encode`."""
        settings, trained = self.plume.settings, self.training and torch.is_grad_enabled()
        if trained and settings["one_space"]:
            warnings.warn("training here does not keep latent and single-pass embeddings in one space, as "
                          "train.py --w_cross does: the checkpoint does not say so any more")
            settings["one_space"] = False
        if mode is None and steps is None and task == "document" and settings["one_space"]:
            mode = "single"
        mode = mode or "latent"
        check_mode(mode, steps)
        check_numbers(done, dim, self.get_embedding_dimension(), limit=limit)
        samples = [features["samples"][row] for row in features["rows"].tolist()]
        batch = to_device(collate(samples, self.plume.processor), self.plume.device)
        vectors, _ = self.plume.embed(batch, mode, steps, limit, done)  # (B, D)
        if dim is not None:
            vectors = unit(vectors[:, :dim])
        if not torch.is_grad_enabled():
            check_embeddings(self.plume, samples, vectors.cpu().numpy())
        return features | dict(sentence_embedding=vectors)

    def get_embedding_dimension(self):
        return self.plume.lm.config.hidden_size

    def gradient_checkpointing_enable(self, *unused, **also_unused):
        self.plume.checkpointing = True

    @property
    def max_seq_length(self):
        """In tokens, with pictures and the prompt.  What is longer is an error, until this is set.

        Then it loses the end of its text, and a warning counts it.
        """
        return (self.shortened or self.plume.processor).limits.max_len

    @max_seq_length.setter
    def max_seq_length(self, length):
        processor = self.plume.processor
        most = processor.limits.max_len
        if length is None:
            self.shortened = None
            return
        if type(length) is not int or not 1 <= length <= most:
            raise DataError(
                f"max_seq_length {quote(length)}: needs a whole number up to {most}, the checkpoint's "
                "max_len, or None: longer items are an error then. To load it with another max_len give "
                "config_kwargs={'limits': {'max_len': ...}}")
        self.shortened = copy.copy(processor)
        self.shortened.limits = replace(processor.limits, max_len=length)

    @property
    def tokenizer(self):
        return self.plume.processor.tokenizer


def make_empty(Plume, module):
    """An embedder for what a pickle holds; Plume comes first, so that its module is imported by then."""
    cls = importlib.import_module(module).PlumeEmbedder
    return cls.__new__(cls)


def parts_of(item, where):
    """An item of `Plume.encode`, or a turn of the user in sentence-transformers' form -> parts of a Side."""
    turns = item if isinstance(item, list) else [item]
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return parse_item(item, where=where).parts
    if len(turns) != 1 or turns[0]["role"] != "user":
        raise DataError(f"{where}: PLUME embeds one turn of the user; other turns and system texts are not "
                        "read")
    content, parts = turns[0].get("content"), []
    if isinstance(content, str):
        return parse_item(content, where=where).parts
    for piece in content:
        kind = piece.get("type")
        parts += parse_item({kind: piece.get(kind)}, where=where).parts
    return parts
