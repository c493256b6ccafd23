"""A tokenizer for random weights; how one reads a text: all of it, always the same way, no special tokens."""

import re

import tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

LOOKS_SPECIAL = re.compile(r"<\|[^|]+\|>")


def train_tokenizer(texts, special, whole=(), size=8192):
    """A byte-level BPE of at most `size` entries, split like Qwen2's; a string of `whole` is one token."""
    backend, qwen = tokenizers.Tokenizer(tokenizers.models.BPE()), Qwen2Tokenizer().backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    backend.decoder = qwen.decoder
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def read_whole(tokenizer):
    """Switches off what the files of transformers' tokenizer may say and what gives a text other ids.

    The tokenizers library saves truncation and padding as they were last used, and BPE's dropout is random.
    -> its backend
    """
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(name, None)  # of its tokenizer_config.json
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, tokenizers.models.BPE):
        backend.model.dropout = None
    return backend


def text_reader(tokenizer, special):
    """A copy of transformers' tokenizer for the texts of users: special tokens in them are characters.

    These are the names in `special`, what is marked as special, and what looks like <|it|>: a folder of
    vocab.json, merges.txt and added_tokens.json marks none.  Other added tokens (Qwen3's <think>, those of
    `train_tokenizer`) are words of the vocabulary, which its models read in text, and stay tokens.
    """
    copy = tokenizers.Tokenizer.from_str(read_whole(tokenizer).to_str())
    added = [token.content for token in copy.get_added_tokens_decoder().values()]
    hidden = {name for name in special if copy.token_to_id(name) is not None}
    hidden |= set(filter(LOOKS_SPECIAL.fullmatch, added))
    copy.add_special_tokens(sorted(hidden))  # known ones keep their ids and are marked
    copy.encode_special_tokens = True
    return copy
