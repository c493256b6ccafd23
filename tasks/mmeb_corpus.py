"""What there is to find in a task of MMEB-V2: candidates of the rows, lists of classes, pages."""

import hashlib
import os
import re

from tqdm import tqdm

from files.errors import DataError, lfs_hint, quote
from files.writing import writing
from tasks.mmeb_readers import video_classes


class Candidates:
    """The candidates of a task, each once: `sides` are its corpus, `names` their ids."""

    def __init__(self, tree, problems):
        self.tree, self.problems = tree, problems
        self.sides, self.names = [], []
        self.known = {}  # name -> (item, its row in sides or None: it cannot be used)
        self.renamed = 0  # how often a known name came with another item; the first counts

    def add(self, where, name, item):
        """-> row of the candidate, or None."""
        if name not in self.known:
            self.known[name] = item, None
            try:
                side = self.tree.side(item, f"{self.problems.name}: {where}")
                self.known[name] = item, len(self.sides)
                self.sides.append(side)
                self.names.append(name)
            except DataError as e:
                self.problems.add(where, e)
        first, row = self.known[name]
        if first != item:
            self.renamed += 1
        return row

    def add_corpus(self):
        """What there is besides the candidates of the rows."""
        corpus = []
        if self.tree.task.read is video_classes:
            corpus = classes_of(self.tree)
        elif self.tree.task.is_document:
            corpus = pages_of(self.tree)
        for where, name, item in corpus:
            if name in self.known:
                self.problems.add(where, DataError(f"the id {quote(name)} stands there twice"))
            self.add(where, name, item)

    def add_query(self, where, named, right):
        """A query's candidates -> {corpus row: gain} of the right ones, corpus rows of all."""
        is_global = self.tree.task.is_global
        rows = [self.add(where, name, item) for name, item in named.items()]
        rows = [row for row in rows if row is not None]
        gains = {}
        for name in right:
            if name not in (self.known if is_global else named):
                raise DataError(f"the right candidate {quote(name)} is none of the candidates")
            _, row = self.known[name]
            if row is not None:
                gains[row] = right[name] if isinstance(right, dict) else 1
        if not gains:
            raise DataError("no right candidate for this query")
        if not is_global and len(rows) < 2:
            raise DataError("a query with one candidate: it cannot be wrong")
        return gains, rows


def classes_of(tree):
    """The classes of a video_cls task, from a file of their names -> (where, name, item)s."""
    path = os.path.join(tree.root, "classes", f"{tree.task.name}.txt")
    if not os.path.exists(path):
        raise DataError(
            f"{path}: no such file; write the names of the {tree.task.corpus} classes there, one a line, "
            "as they stand in VLM2Vec's src/data/eval_dataset/video_classification_utils.py: "
            "the repository of the rows does not hold them")
    if hint := lfs_hint(path):
        raise DataError(f"{path}: no names are in it{hint}")
    try:
        with open(path, encoding="utf-8-sig") as f:
            names = [line.strip() for line in f]
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8: {e}") from e
    return [(f"{path}: line {n}", name, (name, "", "")) for n, name in enumerate(names, 1) if name]


def pages_of(tree):
    """The pages of a document task -> (where, name, item)s; reads what is judged, too."""
    read_judgements(tree)
    pages, files = [], {}
    for row in tree.rows("corpus", ["corpus-id"]):
        name = str(row["corpus-id"])
        file = page_file(tree.task, name)
        other = files.setdefault(file, name)
        if other != name:
            raise DataError(f"{row.where}: the pages {quote(other)} and {quote(name)} have one file name, "
                            f"{quote(file)}; rename one in corpus and qrels")
        pages.append((row.where, name, file))
    # where there are versions, pages are those of the rows: an archive does not say which version it has
    trusted = [p for p in tree.places if p == tree.extracted or not tree.task.versions]
    missing = files.keys() - {name for place in trusted for name in os.listdir(place)}
    in_rows = extract(tree, missing) if missing else set()
    for where, name, file in pages:
        tree.media["image", file] = file in in_rows
        yield where, name, (tree.task.target, "" if file in in_rows else "image", file)


def read_judgements(tree):
    """The qrels, as VLM2Vec reads them: without gains of 0; of a pair that stands twice the greater."""
    for row in tree.rows("qrels"):
        gains, gain = tree.judged.setdefault(str(row["query-id"]), {}), row["score"]
        if not isinstance(gain, (int, float)):
            raise DataError(f"{row.where}: 'score' must be a number, got {quote(gain)}")
        if gain > 0:
            page = str(row["corpus-id"])
            gains[page] = max(gain, gains.get(page, 0))


def page_file(task, name):
    """The file of a page, as VLM2Vec names it; a separator must not lead out of the folder."""
    file = f"{name}.png"
    if task.meta == "visrag":
        base, ext = os.path.splitext(name)
        file = f"{base[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{ext}"
    return re.sub(r"[/\\]", "_", file)


def extract(tree, missing):
    """Write the pages that no place has as they stand in the rows.

    -> those that are only there: all, when nothing is to be written.
    """
    label = f"{tree.task.name}: taking pages out of the rows"
    for row in tqdm(tree.rows("corpus"), desc=label, leave=False):
        file, image = page_file(tree.task, str(row["corpus-id"])), row.get("image")
        content = image.get("bytes") if isinstance(image, dict) else None
        if file not in missing or not content:
            continue
        if not tree.extract:
            return missing  # one is there: the others are not looked at
        os.makedirs(tree.extracted, exist_ok=True)
        # `writing` puts a whole file in place: another process may take out the same page
        with writing(os.path.join(tree.extracted, file), "wb") as f:
            f.write(content)
    tree.places = [p for p in dict.fromkeys((tree.extracted, *tree.places)) if os.path.isdir(p)]
    return set()
