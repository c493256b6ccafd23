"""What a request to tools/serve.py says, each text and picture checked, and what it is answered.

`input` is one item or a list of items, `messages` is one item.  An item is a string, an object as
`Plume.encode` takes it ({"text"?, "image"?, "video"?, "start"?, "end"?, "fps"?}), a part of a chat message,
or a message, {"content": parts}.  A picture is a data: URI or a file below --media; no address is opened.
"""

import base64
import contextlib
import os
from collections import namedtuple
from urllib.parse import unquote

from engine.stream import MODES
from files.errors import DataError, nearest, quote
from files.items import ITEM_KEYS, parse_item, Side
from files.jsonl import only_keys, parse_json
from files.pictures import bytes_of_data_uri
from hub.prompts import template_of, with_prompt

FIELDS = ("input", "messages", "model", "dimensions", "encoding_format", "mode", "truncate", "prompt_name",
          "user")
CHOICES = dict(encoding_format=("float", "base64"), mode=MODES, truncate=(False, True))  # first: the default
PARTS = {"text": "text", "image_url": "image", "video_url": "video"}  # type of a part -> key of an item
MOST = 2048  # items of a request, as OpenAI has it; parts of an item
LONGEST = 1 << 18  # characters of a text: to count the tokens of 16 MiB takes a minute, in which others wait
# What a request asks for; how: as `Plume.encode` has it
Wanted = namedtuple("Wanted", "sides how model base64")
How = namedtuple("How", "mode dim prompt truncate", defaults=("latent", None, None, False))


def parse_request(body, width, media, prompts):
    """Bytes of JSON -> Wanted.  width: components of a vector; media: folder of files, or "".

    prompts: the checkpoint's.
    """
    request = parse_json(body, "the body")
    only_keys(request, FIELDS, "the body")
    request = {key: value for key, value in request.items() if value is not None}
    for key, choices in CHOICES.items():
        value = request.setdefault(key, choices[0])
        if value not in choices or type(value) is not type(choices[0]):  # 1 == True
            raise DataError(f"{key} {quote(value)}.{nearest(value, choices)}")
    dim, prompt = request.get("dimensions"), request.get("prompt_name")
    if dim is not None and (type(dim) is not int or not 1 <= dim <= width):
        raise DataError(f"dimensions {quote(dim)}: this model has 1 to {width}")
    template_of(prompts, prompt)  # refuses what is none
    how = How(request["mode"], dim, prompt, request["truncate"])
    is_base64 = request["encoding_format"] == "base64"
    sides = sides_of(request, media)
    for side in sides:
        check_size(side)
    return Wanted(sides, how, request.get("model", ""), is_base64)


def check_size(side):
    if len(side.parts) > MOST:
        raise DataError(f"{side.where}: {len(side.parts):,} parts; this server takes {MOST:,} an item")
    longest = max(len(text) for kind, text in [("text", ""), *side.parts] if kind == "text")
    if longest > LONGEST:
        raise DataError(f"{side.where}: a text of {longest:,} characters; this server takes {LONGEST:,}")


def check_reasons(why):
    """DataError with the first reasons why items of a request have no embedding; none if there are none."""
    if len(why) > 3:
        why = [*why[:3], f"and {len(why) - 3} more"]
    if why:
        raise DataError("; ".join(why))


def answer_of(wanted, vectors, lost, model, name):
    """-> the body of the answer.  lost: tokens by an item's number; name: the model's"""
    template = template_of(model.settings["prompts"], wanted.how.prompt)
    parts = [part for side in wanted.sides for part in with_prompt(side, template).parts]
    tokens = sum(len(model.processor.encode(text)) for kind, text in parts if kind == "text")
    tokens -= sum(lost.values())
    if wanted.base64:
        vectors = [base64.b64encode(row).decode() for row in vectors.astype("<f4")]
    data = [dict(object="embedding", index=i, embedding=row) for i, row in enumerate(vectors)]
    answer = dict(object="list", data=data, model=name, usage=dict(prompt_tokens=tokens, total_tokens=tokens))
    if wanted.how.truncate:
        answer["truncated"] = {str(i): number for i, number in lost.items()}
    return answer


def sides_of(request, media):
    if ("input" in request) == ("messages" in request):
        raise DataError("the body: needs either 'input' or 'messages'")
    key = "input" if "input" in request else "messages"
    given = request[key]
    if key == "messages" and (not isinstance(given, list) or len(given) != 1):
        raise DataError("messages: needs a list of one message of the user; no system texts, no other turns")
    if not isinstance(given, list):
        return [side_of(given, media, key)]
    if not 1 <= len(given) <= MOST:
        raise DataError(f"input: needs 1 to {MOST} items, got {len(given)}")
    if any(isinstance(item, (int, list)) for item in given):
        raise DataError(f"{key}: token ids are not taken: which token has which id is this checkpoint's own; "
                        "send the text (LangChain: check_embedding_ctx_length=False)")
    return [side_of(item, media, f"{key}[{i}]") for i, item in enumerate(given)]


def side_of(item, media, where):
    """An item, a message, or a part of one -> Side"""
    if isinstance(item, dict) and "content" in item:
        return side_of_message(item, media, where)
    if isinstance(item, dict) and "type" in item:
        item = item_of_part(item, where)
    if isinstance(item, dict):
        only_keys(item, ITEM_KEYS, where)  # parse_item would open the path of a stored object
        item = dict(item)
        for kind in ("image", "video"):
            given = item.get(kind)
            if isinstance(given, list):
                item[kind] = [medium(one, kind, media, where) for one in given]
            elif given is not None:
                item[kind] = medium(given, kind, media, where)
    return parse_item(item, where=where)


def side_of_message(message, media, where):
    only_keys(message, ("role", "content"), where)
    role, content = message.get("role", "user"), message["content"]
    if role != "user":
        raise DataError(f"{where}: needs 'role' 'user', got {quote(role)}")
    if isinstance(content, str):
        return parse_item(content, where=where)
    if not isinstance(content, list) or not content:
        raise DataError(f"{where}: 'content' needs a string or a list of parts, got {quote(content)}")
    parts = []
    for i, part in enumerate(content):
        name = f"{where}.content[{i}]"
        parts += side_of(item_of_part(part, name), media, name).parts
    return Side(parts, where=where)


def item_of_part(part, where):
    """{"type": "image_url", "image_url": a URL, or {"url"}} -> {"image": the URL}; so with clips and texts"""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in tuple(PARTS):
        needs = f"an object whose 'type' is one of {', '.join(PARTS)}"
        raise DataError(f"{where}: needs {needs}, got {quote(part)}")
    only_keys(part, ("type", kind), where)
    value = part.get(kind)
    if kind != "text" and isinstance(value, dict):
        only_keys(value, ("url", "detail"), where)  # detail: OpenAI's, says nothing here
        value = value.get("url")
    return {PARTS[kind]: value}


def medium(given, kind, media, where):
    """A picture or clip -> the bytes of a data: URI, or the path of a file below the folder media."""
    what = f"{where}: {kind} {quote(given)}"
    if not isinstance(given, str):
        raise DataError(f"{what}: needs a data: URI or a path")
    if given[:5].lower() == "data:":
        return bytes_of_data_uri(given, what)
    if given[:7].lower() == "file://":
        given = unquote(given[7:])
    if "://" in given:
        raise DataError(f"{what}: no address is opened; send the picture as data:image/png;base64,...")
    if not media:
        raise DataError(f"{what}: this server opens no files; it was started without --media")
    root = os.path.realpath(media)
    with contextlib.suppress(ValueError):  # of a NUL in it
        file = os.path.realpath(os.path.join(root, given))  # no link and no .. leads out
        if os.path.commonpath([root, file]) == root and os.path.isfile(file):
            return file
    raise DataError(f"{what}: no such file below the server's --media")
