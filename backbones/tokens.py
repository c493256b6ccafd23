"""How a tokenizer reads a text here: all of it, always the same way, special tokens in it as characters."""

import re

import tokenizers

LOOKS_SPECIAL = re.compile(r"<\|[^|]+\|>")


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
