"""MMEB-V2: the table of its 78 tasks, and readers that make them from local copies of the published files.

Facts: VLM2Vec (github.com/TIGER-AI-Lab/VLM2Vec), its src/data/eval_dataset and experiments/public.
Rows are copies of hub repositories under DIR/rows/<owner>/<name>, media the extracted archives of TIGER-Lab/MMEB-V2.
"""

import csv
import fnmatch
import glob
import hashlib
import itertools
import os
import re
import shlex
from dataclasses import dataclass, replace

import numpy as np
import yaml
from huggingface_hub import metadata_load
from tqdm import tqdm

from data import DataError, Side, closest, frame_files, parse_json, printable, quote, spans_of, writing
from tasks.beir import Task

META = dict(  # meta-task -> its column in the paper's table
    image_cls="CLS", image_qa="QA", image_ret="RET", image_gd="GD", video_cls="CLS", video_qa="QA", video_ret="RET", video_mret="MRET",
    vidore_v1="VDRv1", vidore_v2="VDRv2", visrag="VR", visdoc_ood="OOD")
CLIP_FRAMES, QUOTE = 8, '"'  # frames of every clip
CHOOSE = ("Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact text of your "
          "chosen answer. Question: ")
WATCH, PAGE = "Understand the content of the provided video.", "Understand the content of the provided document image."
FIND_PAGE, FIND_MOMENT = "Find a document image that matches the given query:", "Find the clip that corresponds to the described scene in the given video:"
MVBENCH = ("episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action object_existence object_interaction "
           "object_shuffle moving_direction action_localization scene_transition action_count moving_count moving_attribute state_change fine_grained_pose "
           "character_order egocentric_navigation counterfactual_inference").split()


def modality(meta):
    """image, video or visdoc of a meta-task; of another one its first word."""
    return "visdoc" if meta.startswith(("vidore", "visrag")) else meta.split("_")[0]


def say(instruction, text=""):
    """Instruction and text as one; a row's own image tokens are dropped, pictures have their place in the prompt."""
    if not isinstance(text, str):
        raise DataError(f"needs a text, got {quote(text)}")
    return re.sub(r"<\|image_\d+\|>\n?", "", f"{instruction} {text}").strip()


def say_of_picture(instruction, text=""):
    """As `say`, for what stands beside a picture: there VLM2Vec takes blanks in front of a line break away."""
    return say(instruction, text).replace(" \n", "\n")


# Readers: a row -> the query, its candidates {name: item}, the names of the right ones.  An item is (text, "" | "image" | "video", where that is).


def image_query(row):
    """The instruction, without the blanks around it, and the text."""
    instruction = re.sub(r"<\|image_\d+\|>", "", row["qry_inst"] or "").strip()
    return (say_of_picture if row["qry_img_path"] else say)(instruction, row["qry_text"] or "")


def image_texts(tree, row):
    texts = row.texts("tgt_text")
    return (image_query(row), "image", row["qry_img_path"]), {t: (t, "", "") for t in texts}, texts[:1]


def pictures(row, name):
    """The candidates of a row: pictures, with captions when the first has one.

    name: makes one of path and caption; the first to bear it counts.
    """
    named, paths, instruction = {}, row.texts("tgt_img_path"), row["tgt_inst"] or ""
    captions = [caption or "" for caption in row["tgt_text"] or [""] * len(paths)]
    captioned = bool(captions and captions[0].strip())
    for path, caption in zip(paths, captions, strict=True):
        text = say_of_picture(instruction, caption if captioned else "")
        named.setdefault(name(path, caption), (text, "image", path))
    return named, [*named][:1]


def image_pictures(tree, row):
    return (image_query(row), "", ""), *pictures(row, lambda path, caption: path)


def image_pairs(tree, row):  # several captions may share a picture
    candidates = pictures(row, lambda path, caption: f"{path}:{caption.strip(QUOTE)}")
    return (image_query(row), "image", row["qry_img_path"]), *candidates


def video_classes(tree, row):  # the corpus is the list of classes
    return (tree.task.query, "video", row["video_id"]), {}, [row["pos_text"]]


def ssv2(tree, row):
    return (tree.task.query, "video", row["video_id"]), {t: (t, "", "") for t in row.texts("neg_text")}, [row["pos_text"]]


def found_by(text_key, id_key="video_id"):
    """Readers of video retrieval: a caption, or the first of several, finds the clip with this id."""

    def read(tree, row):
        name, text = str(row[id_key]), row[text_key]
        name = os.path.splitext(os.path.basename(name))[0] if id_key == "video" else name
        return (say(tree.task.query, text if isinstance(text, str) else text[0]), "", ""), {name: (tree.task.target, "video", name)}, [name]

    return read


def answers(clip, question, texts, right, shown=None):
    """A question about a clip.  texts: the candidates; shown: what of each is embedded, when that is not all."""
    return (say(CHOOSE, question), "video", clip), {t: (s, "", "") for t, s in zip(texts, shown or texts)}, [texts[right]]


def lettered(texts):
    return [f"({chr(65 + i)}) {text}" for i, text in enumerate(texts)]


def unlettered(texts):
    """"A. a text." -> "a text"; as in VLM2Vec, of a text without ". " only the last character stays."""
    return [t[t.find(". ") :].strip(". ") for t in texts]


def video_mme(tree, row):
    texts = row.texts("options")
    return answers(row["videoID"], "\n".join([row["question"], *texts]), texts, "ABCD".index(row["answer"]), unlettered(texts))


def egoschema(tree, row):
    texts = row.texts("option")
    return answers(row["video_idx"], row["question"] + " ".join(texts), texts, int(row["answer"]), unlettered(texts))


def nextqa(tree, row):
    texts = [row[f"a{i}"] for i in range(5)]
    return answers(row["video"], "\n".join([row["question"], "Options:", *lettered(texts)]), texts, row["answer"])


def mvbench(tree, row):
    options = row.texts("candidates")
    texts = lettered(options)
    question = "\n".join([row["question"], "Options:", *texts])
    right = [n for n, option in enumerate(options) if option == row["answer"]]
    if not right:
        raise DataError(f"the answer {quote(row['answer'])} is none of the candidates")
    return answers(os.path.join(row["subset"], row["video"]), question, texts, right[-1])  # of equal options the last


def activitynetqa(tree, row):
    return answers(f"v_{row['video_name']}", f"{row['question']}? (A) yes; (B) no.", ["yes", "no"], ["yes", "no"].index(row["answer"]))


def moments(tree, row):  # the folder of a query holds a folder for it and one for each candidate
    stem = os.path.splitext(os.path.basename(row["video_path"]))[0]
    folder = tree.find(stem, lambda path: os.path.isdir(path) and os.listdir(path))
    names = [n for n in sorted(os.listdir(folder)) if n != "query" and os.path.isdir(os.path.join(folder, n))]
    named = {os.path.join(stem, n): (tree.task.target, "video", os.path.join(stem, n)) for n in names}
    return (say(tree.task.query, row["query"]), "video", os.path.join(stem, "query")), named, [os.path.join(stem, n) for n in names if n.startswith("positive")]


def momentseeker(tree, row):
    stored = lambda path: os.path.join("video_frames", path.split(".mp4")[0].replace("/", "_"))  # "a/b.mp4" -> the folder of its frames
    given, kind, where, text = row["input_frames"] or "", "", "", "Find the clip that corresponds to the given text:"
    if given.endswith(".mp4"):
        kind, where, text = "video", stored(given), "Find the clip that corresponds to the given sentence and video segment:"
    elif given.endswith(".jpg"):
        kind, where, text = "image", f"query_{given}", "Select the video clip that aligns with the given text and image:"
    elif given:
        raise DataError(f"'input_frames' is {quote(given)}; needs .mp4, .jpg or nothing")
    right, wrong = ([e.get("frame_path") or stored(e["output_path"]) for e in row[key]] for key in ("positive_frames", "negative_frames"))
    return (say(text, row["query"]), kind, where), {p: (tree.task.target, "video", p) for p in right + wrong}, right


def pages(tree, row):
    return (say(tree.task.query, row["query"]), "", ""), {}, tree.judged.get(str(row["query-id"]), {})


@dataclass
class Published:
    """A task of MMEB-V2.  queries, corpus: the published counts (0: not published); versions: {repository: (version, queries)}."""

    name: str
    meta: str
    read: object
    hub: str
    subset: str = ""
    split: str = "test"
    query: str = ""
    target: str = ""
    folder: str = ""  # of its frames or pages
    queries: int = 1000
    corpus: int = 0
    versions: dict = None

    @property
    def full_name(self):
        return f"{self.meta}/{self.name}"

    @property
    def is_document(self):
        return modality(self.meta) == "visdoc"

    @property
    def is_global(self):  # ranked against the whole corpus
        return self.is_document or self.meta == "video_ret" or self.read is video_classes


def published():
    """-> {name: Published}, all 78, meta-tasks in the paper's order."""
    image = lambda meta, read, names: [Published(n, meta, read, "ziyjiang/MMEB_Test_Instruct", n) for n in names.split()]
    video = lambda name, meta, read, hub, queries=1000, folder="", **rest: Published(
        name, meta, read, hub if "/" in hub else f"VLM2Vec/{hub}", queries=queries, folder=folder or name, **rest)
    page = lambda name, meta, hub, queries, corpus=0, split="test", **rest: Published(
        name, meta, pages, hub, split=split, query=FIND_PAGE, target=PAGE, folder=name, queries=queries, corpus=corpus, **rest)
    seen = dict(target=WATCH)
    vidore = {"arxivqa": (500, 500), "docvqa": (451, 500), "infovqa": (494, 500), "tabfquad": (280, 70), "tatdqa": (1646, 277), "shiftproject": (100, 1000),
              "syntheticDocQA_artificial_intelligence": (100, 968), "syntheticDocQA_energy": (100, 977), "syntheticDocQA_government_reports": (100, 972),
              "syntheticDocQA_healthcare_industry": (100, 965)}
    vidore2 = {"esg_reports_human_labeled_v2": (52, 1538), "biomedical_lectures_v2_multilingual": (640, 1016),
               "economics_reports_v2_multilingual": (232, 452), "esg_reports_v2_multilingual": (228, 1538)}
    visrag = {"ArxivQA": 816, "ChartQA": 63, "MP-DocVQA": 591, "SlideVQA": 556, "InfoVQA": 718, "PlotQA": 863}
    fixed = lambda hub, old, n, m=0: {hub: ("fixed", n), f"VLM2Vec/{old}": ("original", m or n)}
    tasks = [
        *image("image_cls", image_texts, "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211"),
        *image("image_qa", image_texts, "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA"),
        *image("image_ret", image_pictures, "VisDial VisualNews_t2i MSCOCO_t2i WebQA Wiki-SS-NQ EDIS"),
        *image("image_ret", image_texts, "VisualNews_i2t MSCOCO_i2t"),
        *image("image_ret", image_pairs, "CIRR NIGHTS FashionIQ OVEN"),
        *image("image_gd", image_pairs, "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing"),
        video("K700", "video_cls", video_classes, "Kinetics-700", corpus=700, query="Recognize the category of the video content."),
        video("SmthSmthV2", "video_cls", ssv2, "SmthSmthV2", folder="SSv2",
              query="What actions or object interactions are being performed by the person in the video?"),
        video("HMDB51", "video_cls", video_classes, "HMDB51", corpus=51, query="What actions or objects interactions are the person in the video doing?"),
        video("UCF101", "video_cls", video_classes, "UCF101", corpus=101, query="What activities or sports are being performed by the person in the video?"),
        video("Breakfast", "video_cls", video_classes, "Breakfast", 433, corpus=10,
              query="Recognize the breakfast type that the person is cooking in the video."),
        video("MVBench", "video_qa", mvbench, "MVBench", 4000, split="train"),
        video("Video-MME", "video_qa", video_mme, "Video-MME", 2700),
        video("NExTQA", "video_qa", nextqa, "NExTQA", 8564, subset="MC"),
        video("EgoSchema", "video_qa", egoschema, "EgoSchema", 500, subset="Subset"),
        video("ActivityNetQA", "video_qa", activitynetqa, "ActivityNetQA"),
        video("DiDeMo", "video_ret", found_by("caption", "video"), "DiDeMo", 1004, query="Find a video that includes the following described scenes:", **seen),
        video("MSR-VTT", "video_ret", found_by("caption"), "MSR-VTT", subset="test_1k",
              query="Find a video that contains the following visual content:", **seen),
        video("MSVD", "video_ret", found_by("caption"), "MSVD", 670,
              query="Find the video snippet that corresponds to the given summary:", **seen),
        video("VATEX", "video_ret", found_by("enCap", "videoID"), "VATEX", 4478, query="Select a video that fits the description provided:", **seen),
        video("YouCook2", "video_ret", found_by("sentence", "id"), "lmms-lab/YouCook2", 3179, split="val",
              query="Find a video that demonstrates the following action while making a recipe:", **seen),
        video("QVHighlight", "video_mret", moments, "QVHighlight", 1083, query=FIND_MOMENT, **seen),
        video("Charades-STA", "video_mret", moments, "Charades-STA", 727, query=FIND_MOMENT, **seen),
        video("MomentSeeker", "video_mret", momentseeker, "MomentSeeker", 1602, target="Understand the content of the provided video clip.",
              versions=fixed("VLM2Vec/MomentSeeker", "MomentSeeker_1k8", 1602, 1800)),
        *(page(f"ViDoRe_{n}", "vidore_v1", f"vidore/{n}_test{'' if n[:4] in ('tatd', 'shif', 'synt') else '_subsampled'}_beir", *c) for n, c in vidore.items()),
        *(page(f"ViDoRe_{n}", "vidore_v2", f"vidore/{n.removesuffix('_multilingual')}", *c) for n, c in vidore2.items()),
        *(page(f"VisRAG_{n}", "visrag", f"openbmb/VisRAG-Ret-Test-{n}", q, split="train") for n, q in visrag.items()),
        page("ViDoSeek-page", "visdoc_ood", "VLM2Vec/ViDoSeek-page-fixed", 1142, versions=fixed("VLM2Vec/ViDoSeek-page-fixed", "ViDoSeek-page", 1142)),
        page("ViDoSeek-doc", "visdoc_ood", "VLM2Vec/ViDoSeek", 1142),
        page("MMLongBench-page", "visdoc_ood", "VLM2Vec/MMLongBench-page-fixed", 838, 6492,
             versions=fixed("VLM2Vec/MMLongBench-page-fixed", "MMLongBench", 838)),
        page("MMLongBench-doc", "visdoc_ood", "VLM2Vec/MMLongBench-doc", 838, 6492)]
    return {t.name: t for t in tasks}


MMEB = published()


class Row(dict):
    """A row of a data set that knows where it stands."""

    def __init__(self, row, where, **more):
        super().__init__(row, **more)
        self.where = where

    def __missing__(self, key):
        raise DataError(f"{self.where}: no column {key!r}.{closest(key, self)} There are {quote(list(self))}.")

    def texts(self, key):
        """A column that must be a list of texts."""
        if not isinstance(self[key], list) or not all(isinstance(text, str) for text in self[key]):
            raise DataError(f"{self.where}: {key!r} must be a list of texts, got {quote(self[key])}")
        return self[key]


def row_files(folder, subset, split):
    """The files of one subset and split in the copy of a hub data set: by the `configs` of its README.md, otherwise by their names."""
    files = sorted(os.path.relpath(os.path.join(at, n), folder) for at, _, names in os.walk(folder) for n in names
                   if n.endswith((".parquet", ".jsonl", ".json", ".tsv")) and f"{os.sep}." not in at[len(folder) :] and n != "dataset_infos.json")
    of_subset = [f for f in files if not subset or subset in f.split(os.sep) or re.match(rf"{re.escape(subset)}(-\d|\.)", os.path.basename(f))]
    splits = {f: re.findall(r"(?<![a-z])(train|test|val|validation|dev)(?![a-z])", f.lower()) for f in of_subset}
    right = [f for f in of_subset if split in splits[f] or not split or split == "val" and "validation" in splits[f]]
    right = right or ([] if any(splits.values()) else of_subset)
    readme = os.path.join(folder, "README.md")
    try:
        configs = (metadata_load(readme) or {}).get("configs") or [] if os.path.isfile(readme) else []
        for config in configs:
            if config.get("config_name") == (subset or "default") or len(configs) == 1 and not subset:
                given = config.get("data_files") or []
                given = given if isinstance(given, list) else [given]
                patterns = [g["path"] if isinstance(g, dict) else g for g in given if not isinstance(g, dict) or g.get("split", split) == split]
                patterns = [p for path in patterns for p in ([path] if isinstance(path, str) else path)]
                patterns = [os.path.normpath(p) for path in patterns for p in (path, os.path.join(path, "*"))]
                right = [f for f in files if any(fnmatch.fnmatch(f, p) for p in patterns)] or right
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise DataError(f"{readme}: its 'configs' cannot be read: {str(e).splitlines()[0]}") from e
    shards = {}
    for f in right:
        if m := re.fullmatch(r"(.*)-\d+-of-(\d+)(?:-\w+)?(\.\w+)", f):
            shards.setdefault(m.groups()[::2] + (int(m[2]),), []).append(f)
    for (stem, suffix, count), parts in shards.items():
        if len(parts) != count:
            raise DataError(f"{os.path.join(folder, stem)}-...-of-{count:05d}{suffix}: {len(parts)} of {count} files are there; get the others as well")
    return right


def rows_of(folder, subset, split, columns=None):
    """The Rows of the copy of a hub data set, one after the other; of .parquet files only the columns asked for."""
    files = [os.path.join(folder, f) for f in row_files(folder, subset, split)]
    if not files:
        raise DataError(f"{folder}: no .parquet, .jsonl, .json or .tsv file of {f'subset {subset!r}, ' if subset else ''}split {split!r}")
    for path in files:
        if path.endswith(".parquet"):
            try:
                import pyarrow.parquet  # only here
            except ImportError as e:
                raise DataError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from e
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    batches = file.iter_batches(64, columns=[c for c in file.schema_arrow.names if not columns or c in columns])
                    yield from (Row(row, f"{path}: row {n}") for n, row in enumerate((r for b in batches for r in b.to_pylist()), 1))
            except (pyarrow.ArrowException, OSError) as e:
                raise DataError(f"{path}: not a readable .parquet file: {e}") from e
        elif path.endswith(".tsv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                for n, raw in enumerate(csv.DictReader(file, delimiter="\t"), 1):
                    number = re.compile(r"0|-?[1-9]\d*")  # 007 is a name
                    yield Row({k: int(v) if number.fullmatch(v or "") else v for k, v in raw.items()}, f"{path}: row {n}")
        else:
            with open(path, "rb") as file:
                for n, (_, _, text) in enumerate(spans_of(file, path), 1):
                    raw = parse_json(text, where := f"{path}: row {n}")
                    if not isinstance(raw, dict):
                        raise DataError(f"{where}: needs an object, got {type(raw).__name__}")
                    yield Row(raw, where)


def download(root, hub):
    """The command that copies a hub repository's rows to where they are looked for."""
    parts = " ".join(f"--include '{pattern}'" for pattern in ("*.parquet", "*.json*", "*.tsv", "README.md"))
    return f"hf download {hub} --repo-type dataset {parts} --local-dir {shlex.quote(copies(root, hub)[0])}"


def copies(root, hub):
    """Where a hub repository's rows may lie; the second is how visdoc-tasks.data.tar.gz holds them."""
    return [os.path.join(root, "rows", *hub.split("/")), *(os.path.join(root, *doubled, "data", hub.split("/")[1])
                                                           for doubled in (["visdoc-tasks"], ["visdoc-tasks"] * 2))]


class Tree:
    """The local files of one task: rows of its hub repository, media in any of the spellings that are in use.

    extract: pages that are only in the rows are written to DIR/visdoc-tasks/extracted.
    """

    def __init__(self, root, task, released=False, extract=True):
        self.root, self.extract, self.judged, self.frames, self.media = root, extract, {}, {}, {}  # media: is each one there?
        if released and task.read is pages and task.meta != "visrag":
            task = replace(task, query="", target="")
        self.released = released
        self.task, self.max_frames = task, 10**6 if released and task.read is momentseeker else CLIP_FRAMES
        there = [(hub, c) for hub in task.versions or [task.hub] for c in copies(root, hub) if os.path.isdir(c)]
        self.hub, self.copy = there[0] if there else (task.hub, "")
        self.revision = revision(self.copy)
        stems = [f"{task.name.lower()}_1k6"] * bool(task.versions) + [task.name.lower(), task.name.lower().replace("-", "_"), task.folder.lower()]
        stems = [stem for stem in stems if os.path.exists(os.path.join(root, "video-tasks", "data", f"{stem}.jsonl"))]
        self.jsonl = stems[0] if stems else ""  # some trees have the rows beside the videos
        if not self.copy and not self.jsonl:
            raise DataError(f"{copies(root, task.hub)[0]}: no such folder; get it with: {download(root, task.hub)}")
        own = os.path.join("visdoc-tasks", "extracted", *self.hub.split("/"), self.revision)
        if task.is_document:
            names = [task.folder, task.folder.removeprefix("ViDoRe_"), self.hub.split("/")[1]]
            places = [own, *(os.path.join("visdoc-tasks", *m, n) for m in ((), ("images",), ("visdoc-tasks",), ("visdoc-tasks", "images")) for n in names)]
        elif task.folder:  # video_ret.tar.gz holds its folders below data/ziyan/video_retrieval
            spellings = dict.fromkeys([task.folder, task.folder.replace("-", "_"), task.folder.replace("_", "-"), task.folder.lower()])
            groups = [task.meta, *(os.path.join(m, "data", "ziyan", "video_retrieval") for m in (task.meta, "") if task.meta == "video_ret")]
            places = [os.path.join("video-tasks", *m, g, n, *end) for m in (("frames",), ()) for g in groups for n in spellings for end in ((), ("frames",))]
        else:
            places = ["image-tasks", os.path.join("image-tasks", "MMEB")]
        self.own, self.places = os.path.join(root, own), [p for p in (os.path.join(root, p) for p in places) if os.path.isdir(p)]

    def rows(self, config=None, columns=None):
        """The task's Rows, or those of one config of its repository."""
        if not self.copy:
            return rows_of(os.path.join(self.root, "video-tasks", "data"), self.jsonl, "")
        if self.task.read is mvbench:
            return (Row(row, row.where, subset=subset) for subset in MVBENCH for row in rows_of(self.copy, subset, self.task.split))
        rows = rows_of(self.copy, config or self.task.subset, self.task.split, columns)
        return itertools.islice(rows, 1000) if self.task.read is ssv2 else rows

    def find(self, name, usable=os.path.isfile):
        """The path of a file, or of a folder that is usable, in one of the places."""
        for place in self.places if name not in ("", None) else ():
            if usable(path := os.path.join(place, str(name))):
                return path
        raise DataError(f"{quote(name)} is not in {' or '.join(self.places) if self.places else 'the folder of this task, which does not exist'}")

    def has_frames(self, path):
        if path not in self.frames:
            frames = frame_files(path) if os.path.isdir(path) else []
            n = len(frames)
            self.frames[path] = [frames[i] for i in (range(n) if n <= self.max_frames else np.linspace(0, n - 1, self.max_frames, dtype=int))]
        return bool(self.frames[path])

    def side(self, item, where):
        """An item -> Side.  Of a clip at most 8 frames: in natural order, evenly spaced."""
        text, kind, name = item
        text = text.strip() if self.released else text  # as its collator does
        if not kind:
            return Side([("text", printable(text, where))], where=where)
        self.media.setdefault((kind, name), False)
        media = self.find(name) if kind == "image" else self.frames[self.find(name, self.has_frames)]
        self.media[kind, name] = True
        return Side([(kind, media), ("text", printable(text, where))], where=where)

    def corpus(self):
        """What there is to find besides the candidates of the rows: yields (where, name, item)."""
        if self.task.read is video_classes:
            path = os.path.join(self.root, "classes", f"{self.task.name}.txt")
            if not os.path.exists(path):
                raise DataError(f"{path}: no such file; write the names of the {self.task.corpus} classes there, one a line, as they stand in VLM2Vec's "
                                "src/data/eval_dataset/video_classification_utils.py: the repository of the rows does not hold them")
            try:
                with open(path, encoding="utf-8-sig") as f:
                    names = [line.strip() for line in f]
            except UnicodeDecodeError as e:
                raise DataError(f"{path}: not UTF-8: {e}") from e
            yield from ((f"{path}: line {n}", name, (name, "", "")) for n, name in enumerate(names, 1) if name)
        elif self.task.is_document:
            for row in self.rows("qrels"):
                gains = self.judged.setdefault(str(row["query-id"]), {})
                if not isinstance(row["score"], (int, float)):
                    raise DataError(f"{row.where}: 'score' must be a number, got {quote(row['score'])}")
                if row["score"] > 0:
                    gains[str(row["corpus-id"])] = max(row["score"], gains.get(str(row["corpus-id"]), 0))
            names = [(row.where, str(row["corpus-id"])) for row in self.rows("corpus", ["corpus-id"])]
            files = {}
            for where, name in names:
                if (other := files.setdefault(self.page_file(name), name)) != name:
                    raise DataError(f"{where}: the pages {quote(other)} and {quote(name)} have one file name, "
                                    f"{quote(self.page_file(name))}; rename one in corpus and qrels")
            # pages of a data set that has versions are those of its rows: an archive does not say which version it has
            trusted = [p for p in self.places if p == self.own or not self.task.versions]
            missing = files.keys() - {n for place in trusted for n in os.listdir(place)}
            in_rows = self.take_out(missing) if missing else set()
            for where, name in names:
                file = self.page_file(name)
                self.media["image", file] = file in in_rows
                yield where, name, (self.task.target, "" if file in in_rows else "image", file)

    def page_file(self, name):
        base, ext = os.path.splitext(name)  # as VLM2Vec names them; a separator must not lead out of the folder
        file = f"{base[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{ext}" if self.task.meta == "visrag" else f"{name}.png"
        return re.sub(r"[/\\]", "_", file)

    def take_out(self, missing):
        """Write the pages that no place has as they stand in the rows.  -> those that are only there: all, when nothing is to be written."""
        for row in tqdm(self.rows("corpus"), desc=f"{self.task.name}: taking pages out of the rows", leave=False):
            file, image = self.page_file(str(row["corpus-id"])), row.get("image")
            content = image.get("bytes") if isinstance(image, dict) else None
            if file in missing and content:
                if not self.extract:
                    return missing  # one is there: the others are not looked at
                os.makedirs(self.own, exist_ok=True)
                with writing(os.path.join(self.own, file), "wb") as f:  # another process may take out the same page
                    f.write(content)
        self.places = [p for p in dict.fromkeys((self.own, *self.places)) if os.path.isdir(p)]
        return set()


def revision(folder):
    """The commit of a copy that `hf download --local-dir` made, or ""."""
    found = folder and sorted(glob.glob(os.path.join(folder, ".cache", "huggingface", "download", "**", "*.metadata"), recursive=True))
    if not found:
        return ""
    with open(found[0]) as f:
        return f.readline().strip()


def read_published(root, name, released=False, skip_bad=False, extract=True):
    """A task of MMEB-V2 from its local files -> Task.

    Raises DataError naming task, file and row for anything that is missing or broken; with skip_bad what cannot be used
    is left out and named in Task.bad.  released: the prompts and frames of the released evaluation.
    """
    tree = Tree(root, MMEB[name], released, extract)
    task, bad, sides, known, renamed = tree.task, [], [], {}, 0  # known: candidate -> (item, its row in the corpus, or None)

    def complain(where, error):
        text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        text = text if where in text else f"{where}: {text}"
        text = text if text.startswith(f"{name}: ") else f"{name}: {text}"
        if not skip_bad:
            raise DataError(text)
        bad.append(text)

    def add(where, key, item):
        nonlocal renamed
        if key not in known:
            known[key] = item, None
            try:
                side = tree.side(item, f"{name}: {where}")
                known[key] = item, len(sides)
                sides.append(side)
            except DataError as e:
                complain(where, e)
        renamed += known[key][0] != item
        return known[key][1]

    for where, key, item in tree.corpus():
        if key in known:
            complain(where, DataError(f"the id {quote(key)} stands there twice"))
        add(where, key, item)
    queries, relevant, candidates, ids, seen, count = [], [], [], [], set(), 0
    for row in tree.rows("queries" if task.is_document else None):
        count, where = count + 1, row.where
        try:
            item, named, right = task.read(tree, row)
            key = str(row["query-id"]) if task.is_document else str(count)
            if key in seen:
                raise DataError(f"the id {quote(key)} stands there twice")
            seen.add(key)
            query = tree.side(item, f"{name}: {where}")
            rows = [r for r in [add(where, n, candidate) for n, candidate in named.items()] if r is not None]
            if strange := [n for n in right if n not in (known if task.is_global else named)]:
                raise DataError(f"the right candidate {quote(strange[0])} is none of the candidates")
            gains = {known[n][1]: right[n] if isinstance(right, dict) else 1 for n in right if known[n][1] is not None}
            if not gains or not task.is_global and len(rows) < 2:
                raise DataError("no right candidate for this query" if not gains else "a query with one candidate: it cannot be wrong")
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as e:
            complain(where, e)
            continue
        queries.append(query)
        relevant.append(gains)
        candidates.append(None if task.is_global else rows)
        ids.append(key)
    version, expected = (task.versions or {}).get(tree.hub, ("", task.queries))
    if count != expected:  # MomentSeeker's repository held the original until 2025-07-31
        version, expected = next((v for v in (task.versions or {}).values() if v[1] == count), ("unknown" if version else "", expected))
    if count != expected:
        complain(tree.copy or tree.jsonl, DataError(f"{count} queries, {expected} are published" + ": an unknown version" * (version == "unknown")))
    if task.corpus and len(known) != task.corpus:
        complain(tree.copy, DataError(f"{len(known)} candidates, {task.corpus} are published"))
    if not queries:
        raise DataError(f"{name}: no query is left" + (f"; {len(bad)} problems, the first: {bad[0]}" if bad else ""))
    about = dict(data=os.path.realpath(root), hub=tree.hub, version=version, revision=tree.revision, rows=count, renamed=renamed,
                 media=sum(tree.media.values()), media_wanted=len(tree.media))
    return Task(task.full_name, queries, sides, relevant, candidates, ids, "ndcg@5" if task.is_document else "hit@1", about, bad)
