"""A text that is the name of a picture or clip: it stays text everywhere, and a warning says so once."""

import os
import warnings

from files.clips import is_clip_file, VIDEO_SUFFIXES
from files.errors import quote
from files.pictures import IMAGE_SUFFIXES

MEDIA_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES


def medium_named(text, root=""):
    """-> "image" or "video" where the whole text is the name of such a file under the root, else None."""
    if not text.lower().endswith(MEDIA_SUFFIXES):
        return None
    path = os.path.join(root, text)
    if not os.path.isfile(path):
        return None
    if text.lower().endswith(IMAGE_SUFFIXES):
        return "image"
    return "video" if is_clip_file(path) else None  # .ts may be a source of TypeScript


class FileNameWarning:
    """Gives its one warning at the first of the texts it is shown that is the name of a picture or clip."""

    def __init__(self, root=""):
        self.root, self.given = root, False

    def look(self, text, where=""):
        if self.given or not medium_named(text, self.root):
            return
        self.given = True
        warnings.warn("a string that is the name of a file is embedded as text; for the picture or clip "
                      f"itself give {{'image': ...}} or {{'video': ...}}.  The first is {where}{quote(text)}")

    def look_at_side(self, side):
        """A Side that is one text and nothing else."""
        if [kind for kind, _ in side.parts] == ["text"]:
            self.look(side.parts[0][1], f"{side.where}: ")


def warn_of_file_names(items):
    """The items as they come; the first string that is the name of a picture or clip gives a warning."""
    warning = FileNameWarning()
    for item in items:
        if isinstance(item, str):
            warning.look(item)
        yield item
