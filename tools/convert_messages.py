"""A row of messages as ms-swift has them, or of VLM2Vec's training sets -> query, targets, negatives."""

import re

from files.errors import DataError, nearest, quote
from files.items import listed


def swift_messages(row, values, system):
    """messages, positive_messages, negative_messages and their images -> query, targets, negatives

    system: what becomes of a system turn, see `user_text`.
    """
    kinds = ("", "positive_", "negative_")
    only(row, [f"{kind}{key}" for kind in kinds for key in ("messages", "images", "videos")])
    sides = [[spoken(row["messages"], row.get("images"), row.get("videos"), values, system)]]
    for kind in kinds[1:]:
        messages = row.get(f"{kind}messages") or []
        images, videos = ((row.get(f"{kind}{key}") or [None] * len(messages)) for key in ("images", "videos"))
        if not len(messages) == len(images) == len(videos):
            raise DataError(f"{len(messages)} {kind}messages, {len(images)} lists of images, {len(videos)} "
                            "lists of videos: each message needs its own")
        sides.append([spoken(*parts, values, system) for parts in zip(messages, images, videos)])
    (query,), targets, negatives = sides
    if not targets:
        raise DataError("no positive_messages; a record needs a target")
    return query, targets, negatives


def spoken(messages, images, videos, values, system):
    """The user's message, with its media, as a side."""
    return with_media(user_text(messages, system), images or [], videos or [], values)


def user_text(messages, system):
    """The one turn of the user.

    system: "keep" puts a system turn's text in front of it, behind media with which it begins, as an
    instruction; "drop" leaves it out.
    """
    roles = [turn.get("role") for turn in messages]
    for turn in messages:
        if not isinstance(turn.get("content"), str):
            raise DataError(f"'content' {quote(turn.get('content'))}: needs a string with <image> (<video>) "
                            "where a medium belongs, and the paths in 'images' ('videos') beside the "
                            "messages, as ms-swift has it; 'positive_images' has a list for each message")
    text = messages[-1]["content"] if messages else ""
    if roles == ["user"]:
        return text
    if roles != ["system", "user"]:
        raise DataError(f"needs one message of the user, got {roles}")
    if not system:
        raise DataError(f"a system turn, {quote(messages[0]['content'])}: the checkpoint's template has one "
                        "system text for all items; --system keep puts this one in front of the user's text, "
                        "--system drop leaves it out")
    instruction = messages[0]["content"]
    if system == "drop" or not instruction:
        return text
    media = re.match(r"(<(image|video)>\s*)*", text).end()
    return f"{text[:media]}{instruction}\n{text[media:]}"


def with_media(text, images, videos, values):
    """A text with markers, and what they stand for, as a side."""
    values.explicit(text)
    if not text.strip():
        raise DataError("an empty text, and no picture or clip")
    for kind, given in (("image", images), ("video", videos)):
        markers = text.count(f"<{kind}>")
        if markers != len(given) and (given or "messages" not in values.texts):
            raise DataError(f"{markers} <{kind}> in {quote(text)}, {len(given)} {kind}s given")
    values.check_markers(text, ("image", "video"))
    if not images and not videos:
        return text
    side = dict(conversations=[{"from": "human", "value": text}])
    if images:
        side["image"] = [values.path(image) for image in images]
    if len(videos) > 1:
        raise DataError(f"{len(videos)} videos in one text; a side has one")
    if videos:
        side["video"] = values.path(videos[0])
    return side


def swift_queries(row, values):
    """query, response, rejected_response; images in the order of the markers -> query, targets, negatives"""
    only(row, ("query", "response", "rejected_response", "images"))
    texts = [row["query"], row["response"], *listed(row.get("rejected_response") or None)]
    images, sides = list(row.get("images") or []), []
    for text in texts:
        n = text.count("<image>")
        sides.append(with_media(text, images[:n], [], values))
        images = images[n:]
    if images:
        raise DataError(f"{len(images)} images more than <image> markers")
    return sides[0], [sides[1]], sides[2:]


def vlm2vec(row, values):
    """qry, pos_text, neg_text with paths of one picture each -> query, targets, negatives

    Lists of positives and negatives are several.
    """
    if "pos" in row:
        raise DataError("'qry' and 'pos': these are training records already; train.py --data takes them")
    only(row, ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"))
    query = marked(row["qry"], row.get("qry_image_path"), values)
    targets = marked_list(row.get("pos_text"), row.get("pos_image_path"), values)
    negatives = marked_list(row.get("neg_text"), row.get("neg_image_path"), values)
    if not targets:
        raise DataError("neither pos_text nor pos_image_path says anything")
    return query, targets, negatives


def marked_list(texts, paths, values):
    """One or several texts, and as many paths -> the items that are not empty."""
    texts = listed(texts or "")
    paths = listed(paths or [""] * len(texts))
    both = list(zip(texts, paths, strict=True))
    there = [one for one in both if any(one)]
    if there and len(there) < len(both):
        raise DataError(f"{len(both) - len(there)} of {len(both)} items have neither text nor path")
    return [marked(*one, values) for one in there]


def marked(text, path, values):
    """A text with <|image_1|> where the picture belongs -> an item."""
    text = (text or "").replace("<|image_1|>", "<image>")
    if path and "<image>" not in text:
        text = f"<image>{text}"
    return with_media(text, [path] if path else [], [], values)


def only(row, known):
    for key, value in row.items():
        if key not in known and value is not None:
            raise DataError(f"unknown key {quote(key)}.{nearest(key, known)}")
