"""The values of a row -> what a record has: a text, or a path of a picture or clip relative to the record.

A string of a column is a text or the name of a file.  The first one of its column decides: where it names an
existing picture or clip (or is a data: URI), all strings of the column must, and otherwise none may.  What is
nothing but an address, what can only be an encoded picture, and <image> without a picture are no text either.
--text COLUMN says that a column is text, whatever it names.
"""

import av
import hashlib
import io
import os
import re

from PIL import Image

from files.clips import VIDEO_OPTIONS, VIDEO_SUFFIXES
from files.errors import DataError, quote, reason
from files.named import MEDIA_SUFFIXES, medium_named
from files.pictures import bytes_of_data_uri, DECODER_ERRORS, IMAGE_FORMATS
from files.writing import writing

# Each is tried on a string without the blanks around it.  An address is the whole line; its path may have
# blanks.  //comment of a program is none, //host/path is
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S.*|(//|www\.)(\S+|[\w.-]+/.*)", re.I)
DATA_URI = re.compile(r"data:((image|video)/|([\w.+-]+/[\w.+-]+)?(;[^,\s]*)?,)", re.I)  # right or not
# base64 of JPEG, PNG, GIF, WebP: nothing else, or so much of it
ENCODED = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)([\w+/=\r\n-]{16,}\Z|[\w+/=\s-]{200,})", re.A)
MARKER = re.compile(r"<(image|video)>|<\|(?:image|video)_\d+\|>")  # the second form is VLM2Vec's
NO_ADDRESS = "no address is opened; download it, and name the file"


class Values:
    """What the values of all rows are.

    source: folder that media paths are relative to; root: that of the records; folder: for media that come as
    bytes, each written once; texts: columns whose strings are text.  row: number of the row that is read.
    """

    def __init__(self, source, root, folder, texts=()):
        self.source, self.root, self.folder, self.texts, self.row = source, root, folder, texts, 0
        self.first = {}  # column -> (whether its strings are media, number of a row, the string in it)
        self.media = {}  # column -> how many strings were media
        self.names_alone = {}  # column -> (row, string), while all its strings look like names of files
        self.not_there = {}  # column -> how many texts look like names of media

    # ---- a string
    def string(self, value, column):
        """-> ("text", the value), or ("image" or "video", its path)"""
        if column in self.texts:
            return "text", value
        kind = self.kind_of(value)
        self.agree(kind is not None, value, column)
        if kind is None:
            self.check_text(value, column)
            return "text", value
        self.media[column] = self.media.get(column, 0) + 1
        return kind, self.path(value)

    def kind_of(self, value):
        """-> "image" or "video" where a string is a medium, else None"""
        data = DATA_URI.match(value.strip()[:200])
        if data:
            return "video" if data[1].lower().startswith("video/") else "image"
        name = self.name_of(value)
        kind, file = medium_named(name, self.source), os.path.join(self.source, name)
        if kind or name.lower().endswith(MEDIA_SUFFIXES) or not os.path.isfile(file):
            return kind
        try:  # a name without a suffix
            with Image.open(file, formats=IMAGE_FORMATS):
                return "image"
        except DECODER_ERRORS:
            return None

    def name_of(self, value):
        """The name of a file without the blanks around it, unless the file has them in its name."""
        return value if os.path.exists(os.path.join(self.source, value)) else value.strip()

    def agree(self, is_medium, value, column):
        """DataError where this string is a medium and the column's first one is text, or the reverse."""
        was_medium, row, first = self.first.setdefault(column, (is_medium, self.row, value))
        if is_medium or not looks_like_a_name(value):
            self.names_alone[column] = None
        else:
            self.names_alone.setdefault(column, (self.row, value))
        if was_medium == is_medium:
            return
        medium, text = (value, first) if is_medium else (first, value)
        raise DataError(
            f"column {column!r}: {quote(medium)} is a picture or clip, {quote(text)} in row "
            f"{row if is_medium else self.row} is none below {self.source}: the strings of a column are all "
            f"media or all text. --text {column} makes all of them text, --media is the folder of the files")

    def check_text(self, value, column):
        """DataError where a text is an address or an encoded picture; -> the text.  Counts names of media."""
        if column in self.texts:
            return value
        if ADDRESS.fullmatch(value.strip()):
            raise DataError(f"column {column!r}: {quote(value)}: {NO_ADDRESS} (--text {column}: it is text)")
        if ENCODED.match(value.strip()):
            raise DataError(f"column {column!r}: {quote(value[:40])}...: a picture in base64; write "
                            f"data:image/png;base64, in front of it (--text {column}: it is text)")
        if looks_like_a_name(value):
            self.not_there[column] = self.not_there.get(column, 0) + 1
        return value

    def check_markers(self, text, media, column="messages"):
        """DataError where a text has the marker of a medium that is not there.

        media: some of "image" and "video": what the text's side has; how many, train.py's reader counts.
        """
        if column in self.texts:
            return
        for marker in MARKER.finditer(text):
            if marker[1] not in media:
                raise DataError(
                    f"column {column!r}: {marker[0]} in {quote(text)} stands for a picture or clip, and none "
                    f"is given for it (<image>, <video> are its markers; --text {column}: it is text)")

    def explicit(self, value, column="messages"):
        """A text by its key, as in a message: DataError where it is a medium, an address, ...; -> the text"""
        if column not in self.texts and self.kind_of(value):
            raise DataError(f"{quote(value)} is a picture or clip, and stands where text is meant; give it "
                            f"as 'image' or 'video' (--text {column}: it is text)")
        return self.check_text(value, column)

    def check_names(self):
        """At the end: DataError for a column of nothing but names of files that are not there."""
        for column, alone in self.names_alone.items():
            if alone:
                row, value = alone
                raise DataError(
                    f"column {column!r}: all its strings are names of pictures or clips, and none of them is "
                    f"below {self.source}, as row {row}'s {quote(value)}: --media is the folder of the "
                    f"files, --text {column} makes them text")

    # ---- a medium
    def path(self, value):
        """A path, data: URI, bytes, {"bytes", "path"} or a list of these -> paths relative to the records"""
        if isinstance(value, list):  # frames
            return [self.path(frame) for frame in value]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value.lstrip()[:5].lower() == "data:":
            value = bytes_of_data_uri(value.strip(), quote(value[:60]))
        if isinstance(value, bytes):
            _, suffix = kind_of_bytes(value)
            return os.path.relpath(self.write(value, suffix), self.root)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"a medium needs a path or bytes, got {quote(value)}")
        name = self.name_of(value)
        file = os.path.join(self.source, name)
        if ADDRESS.fullmatch(name) and not os.path.exists(file):
            raise DataError(f"{quote(value)}: {NO_ADDRESS}")
        return os.path.relpath(file, self.root)

    def stored(self, value):
        """Bytes, or {"bytes", "path"} -> "image" or "video", and its path"""
        raw = value if isinstance(value, bytes) else value.get("bytes")
        if raw:
            return kind_of_bytes(raw)[0], self.path(value)
        return self.kind_of(value.get("path") or "") or "image", self.path(value)

    def write(self, raw, suffix):
        os.makedirs(self.folder, exist_ok=True)
        name = f"{hashlib.blake2b(raw, digest_size=16).hexdigest()}{suffix}"
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            with writing(path, "wb") as f:
                f.write(raw)
        return path


def looks_like_a_name(text):
    """Whether a text is one line that ends as the name of a picture or clip does."""
    text = text.strip()
    return text.lower().endswith(MEDIA_SUFFIXES) and len(text.splitlines()) == 1


def kind_of_bytes(raw):
    """The bytes of a file -> ("image" or "video", the suffix of its format)"""
    try:
        with Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS) as image:
            return "image", f".{image.format.lower()}"
    except DECODER_ERRORS as e:
        why = reason(e)
    try:
        with av.open(io.BytesIO(raw), options=VIDEO_OPTIONS) as clip:
            names = [f".{name}" for name in clip.format.name.split(",")]
            return "video", next((name for name in names if name in VIDEO_SUFFIXES), ".mp4")
    except DECODER_ERRORS:
        raise DataError(f"bytes that are no picture and no clip: {why}") from None
