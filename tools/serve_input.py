"""The body of a request to tools/serve.py -> what is to be embedded, each text and picture checked.

`input` is one item or a list of items, `messages` is one item.  An item is a string, an object as
`Plume.encode` takes it ({"text"?, "image"?, "video"?, "start"?, "end"?, "fps"?}), a part of a chat message,
or {"content": parts}.  A picture is a data: URI or a file below --media; no address is ever opened.
"""

import base64
import contextlib
import os
import re
from collections import namedtuple
from urllib.parse import unquote

from engine.stream import check_mode
from files.errors import DataError, quote
from files.items import ITEM_KEYS, parse_item, Side
from files.jsonl import only_keys, parse_json
from files.pictures import frame_files
from hub.prompts import template_of

FIELDS = ("input", "messages", "model", "dimensions", "encoding_format", "mode", "truncate",
          "prompt_name", "user")
PARTS = {"text": "text", "image_url": "image", "video_url": "video"}  # type of a part -> key of an item
MOST = 2048  # items of a request, as OpenAI has it
DATA = re.compile(r"data:([\w.+/-]*)(?:;[^,]*)?;base64,", re.I)
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.I)
Wanted = namedtuple("Wanted", "sides model mode dim base64 truncate prompt")  # what a request asks for


def parse_request(body, width, media, prompts):
    """Bytes of JSON -> Wanted.  width: components of a vector; media: folder of files, or "".

    prompts: the checkpoint's.
    """
    request = parse_json(body, "the body")
    only_keys(request, FIELDS, "the body")
    request = {key: value for key, value in request.items() if value is not None}
    template_of(prompts, request.get("prompt_name"))  # refuses what is none
    dim, form = request.get("dimensions"), request.get("encoding_format", "float")
    if dim is not None and (type(dim) is not int or not 1 <= dim <= width):
        raise DataError(f"dimensions {quote(dim)}: this model has 1 to {width}")
    if form not in ("float", "base64"):
        raise DataError(f"encoding_format {quote(form)}: needs 'float' or 'base64'")
    mode, truncate = request.get("mode", "latent"), request.get("truncate", False)
    if type(truncate) is not bool:
        raise DataError(f"truncate {quote(truncate)}: needs true or false")
    try:
        check_mode(mode, None)
    except ValueError as e:
        raise DataError(str(e)) from e
    if ("input" in request) == ("messages" in request):
        raise DataError("the body: needs either 'input' or 'messages'")
    if "messages" in request:
        sides = [side_of_turns(request["messages"], media)]
    else:
        sides = sides_of_input(request["input"], media)
    wanted = request.get("model", ""), mode, dim, form == "base64", truncate, request.get("prompt_name")
    return Wanted(sides, *wanted)


def sides_of_input(given, media):
    if not isinstance(given, list):
        return [side_of(given, media, "input")]
    if not 1 <= len(given) <= MOST:
        raise DataError(f"input: needs 1 to {MOST} items, got {len(given)}")
    if any(isinstance(item, (int, list)) for item in given):
        raise DataError("input: token ids are not taken: which token has which id is this checkpoint's own; "
                        "send the text (LangChain: check_embedding_ctx_length=False)")
    return [side_of(item, media, f"input[{i}]") for i, item in enumerate(given)]


def side_of_turns(turns, media):
    """`messages`: one turn of the user -> Side"""
    if not isinstance(turns, list) or len(turns) != 1:
        raise DataError("messages: needs a list of one turn of the user; system texts and other turns are "
                        "not read")
    turn, where = turns[0], "messages[0]"
    only_keys(turn, ("role", "content"), where)
    if turn.get("role") != "user":
        raise DataError(f"{where}: needs 'role' 'user', got {quote(turn.get('role'))}")
    return side_of_parts(turn.get("content"), media, where)


def side_of(item, media, where):
    """An item of `input` -> Side"""
    if isinstance(item, dict) and "type" in item:
        return side_of_parts([item], media, where)
    if isinstance(item, dict) and "content" in item:
        only_keys(item, ("content",), where)
        return side_of_parts(item["content"], media, where)
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


def side_of_parts(content, media, where):
    """The content of a chat message, a string or parts, in its order -> Side"""
    if isinstance(content, str):
        return parse_item(content, where=where)
    if not isinstance(content, list) or not content:
        raise DataError(f"{where}: 'content' needs a string or a list of parts, got {quote(content)}")
    parts = []
    for i, part in enumerate(content):
        name = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in PARTS:
            raise DataError(f"{name}: needs an object whose 'type' is one of {', '.join(PARTS)}, got "
                            f"{quote(part)}")
        only_keys(part, ("type", kind), name)
        value = part.get(kind)
        if kind != "text" and isinstance(value, dict):
            only_keys(value, ("url", "detail"), name)  # detail: OpenAI's, says nothing here
            value = value.get("url")
        parts += side_of({PARTS[kind]: value}, media, name).parts
    return Side(parts, where=where)


def medium(given, kind, media, where):
    """A picture or clip -> the bytes of a picture, the path of a file below media, or those of its frames."""
    what = f"{where}: {kind} {quote(given)}"
    if not isinstance(given, str):
        raise DataError(f"{what}: needs a data: URI or a path")
    if given[:5].lower() == "data:":
        return picture_bytes(given, what)
    scheme = SCHEME.match(given)
    if scheme and scheme[1].lower() != "file":
        raise DataError(f"{what}: no address is opened; send the picture as data:image/png;base64,...")
    if not media:
        raise DataError(f"{what}: this server opens no files; it was started without --media")
    file = below(media, unquote(given[len("file://") :]) if scheme else given, what)
    if kind == "video" and os.path.isdir(file):  # each of its frames may be a link
        return [below(media, frame, what) for frame in frame_files(file)]
    if not os.path.isfile(file):
        raise DataError(f"{what}: no such file below the server's --media")
    return file


def below(media, path, what):
    """-> the real path, where no link and no .. has led out of the folder media; or DataError."""
    root = os.path.realpath(media)
    with contextlib.suppress(ValueError):  # of a NUL in it
        file = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([root, file]) == root:
            return file
    raise DataError(f"{what}: is not below the server's --media")


def picture_bytes(uri, what):
    head = DATA.match(uri[:200])
    if not head or head[1].lower().startswith(("video/", "audio/")):
        raise DataError(f"{what}: needs data:image/png;base64,...; a clip is a file below --media")
    try:
        return base64.b64decode(uri[head.end() :], validate=True)
    except ValueError as e:
        raise DataError(f"{what}: not base64: {e}") from e
