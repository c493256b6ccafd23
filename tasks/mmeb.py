"""MMEB-V2: the table of its 78 tasks, and readers that make them from local copies of the published files.

Facts: VLM2Vec (github.com/TIGER-AI-Lab/VLM2Vec), its src/data/eval_dataset and experiments/public.
Rows are copies of hub repositories under DIR/rows/<owner>/<name>, media the extracted archives of
TIGER-Lab/MMEB-V2.  From the top: what each task's row means, the table, and how its files are found.
"""

import csv
import fnmatch
import glob
import hashlib
import itertools
import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import yaml
from huggingface_hub import metadata_load
from tqdm import tqdm

from files.errors import closest, DataError, quote
from files.items import printable, Side
from files.pictures import frame_files
from files.records import parse_json, spans_of
from files.writing import writing
from tasks.beir import Task

META = {  # meta-task -> its column in the paper's table
    "image_cls": "CLS", "image_qa": "QA", "image_ret": "RET", "image_gd": "GD",
    "video_cls": "CLS", "video_qa": "QA", "video_ret": "RET", "video_mret": "MRET",
    "vidore_v1": "VDRv1", "vidore_v2": "VDRv2", "visrag": "VR", "visdoc_ood": "OOD"}
CLIP_FRAMES = 8  # of every clip
SSV2_ROWS = 1000  # only the first of SmthSmthV2 count
MVBENCH = [  # its subsets, in VLM2Vec's order
    "episodic_reasoning", "action_sequence", "action_prediction", "action_antonym", "fine_grained_action",
    "unexpected_action", "object_existence", "object_interaction", "object_shuffle", "moving_direction",
    "action_localization", "scene_transition", "action_count", "moving_count", "moving_attribute",
    "state_change", "fine_grained_pose", "character_order", "egocentric_navigation",
    "counterfactual_inference"]
CHOOSE = ("Given a video and a question, select the most accurate answer from the provided candidates. "
          "Return only the exact text of your chosen answer. Question: ")


def modality(meta):
    """image, video or visdoc of a meta-task; of another one its first word."""
    return "visdoc" if meta.startswith(("vidore", "visrag")) else meta.split("_")[0]


def say(instruction, text=""):
    """Instruction and text as one, without a row's own image tokens: the prompt has a place for pictures."""
    if not isinstance(text, str):
        raise DataError(f"needs a text, got {quote(text)}")
    return re.sub(r"<\|image_\d+\|>\n?", "", f"{instruction} {text}").strip()


def say_of_picture(instruction, text=""):
    """As `say`, for what stands beside a picture: there VLM2Vec takes a blank before a line break away."""
    return say(instruction, text).replace(" \n", "\n")


# ------------------------------------------------------------------------------- readers of a row
# Each takes the Tree and the Row -> the query, its candidates {name: item}, the names of the right ones.
# An item is (text, "" | "image" | "video", where that is).


def as_items(texts):
    """Candidates that are texts and named by themselves."""
    return {text: (text, "", "") for text in texts}


def image_query(row):
    """The instruction, without the blanks around it, and the text."""
    instruction = re.sub(r"<\|image_\d+\|>", "", row["qry_inst"] or "").strip()
    join = say_of_picture if row["qry_img_path"] else say
    return join(instruction, row["qry_text"] or "")


def image_texts(tree, row):
    """A picture, perhaps with a question, finds a text; the first candidate is right."""
    texts = row.texts("tgt_text")
    return (image_query(row), "image", row["qry_img_path"]), as_items(texts), texts[:1]


def pictures(row, name):
    """The candidates of a row, pictures, with captions when the first has one; and the name of the right one.

    name: makes one of path and caption; the first to bear it counts.
    """
    named, paths, instruction = {}, row.texts("tgt_img_path"), row["tgt_inst"] or ""
    captions = [caption or "" for caption in row["tgt_text"] or [""] * len(paths)]
    captioned = bool(captions and captions[0].strip())
    for path, caption in zip(paths, captions, strict=True):
        text = say_of_picture(instruction, caption if captioned else "")
        named.setdefault(name(path, caption), (text, "image", path))
    return named, [*named][:1]


def path_alone(path, caption):
    return path


def path_and_caption(path, caption):
    """Of pairs, as several captions may share a picture."""
    words = caption.strip('"')
    return f"{path}:{words}"


def image_pictures(tree, row):
    """A text finds a picture."""
    query = (image_query(row), "", "")
    return query, *pictures(row, path_alone)


def image_pairs(tree, row):
    """A picture, perhaps with a text, finds a picture, perhaps with a caption."""
    candidates = pictures(row, path_and_caption)
    return (image_query(row), "image", row["qry_img_path"]), *candidates


def video_classes(tree, row):
    """A clip finds its class; the corpus is the list of classes."""
    return (tree.task.query, "video", row["video_id"]), {}, [row["pos_text"]]


def ssv2(tree, row):
    """A clip finds its class among those of the row, `neg_text`, which holds the right one too."""
    query = (tree.task.query, "video", row["video_id"])
    return query, as_items(row.texts("neg_text")), [row["pos_text"]]


def found_by(tree, clip, caption):
    """A caption, or the first of several, finds the clip with this name."""
    text = caption if isinstance(caption, str) else caption[0]
    return (say(tree.task.query, text), "", ""), {clip: (tree.task.target, "video", clip)}, [clip]


def stem_of(path):
    """"videos/a.mp4" -> "a"."""
    return os.path.splitext(os.path.basename(path))[0]


def didemo(tree, row):
    return found_by(tree, stem_of(str(row["video"])), row["caption"])


def msrvtt(tree, row):  # and MSVD
    return found_by(tree, str(row["video_id"]), row["caption"])


def vatex(tree, row):
    return found_by(tree, str(row["videoID"]), row["enCap"])


def youcook2(tree, row):
    return found_by(tree, str(row["id"]), row["sentence"])


def answers(clip, question, texts, right, shown=None):
    """A question about a clip.

    texts: the candidates; right: the number of the right one; shown: what of each is embedded, if not all.
    """
    query = (say(CHOOSE, question), "video", clip)
    named = {text: (embedded, "", "") for text, embedded in zip(texts, shown or texts)}
    return query, named, [texts[right]]


def lettered(texts):
    return [f"({chr(65 + i)}) {text}" for i, text in enumerate(texts)]


def unlettered(texts):
    """"A. a text." -> "a text"; as in VLM2Vec, of a text without ". " only the last character stays."""
    return [t[t.find(". ") :].strip(". ") for t in texts]


def video_mme(tree, row):
    texts = row.texts("options")
    clip = row["videoID"]
    question = "\n".join([row["question"], *texts])
    return answers(clip, question, texts, "ABCD".index(row["answer"]), unlettered(texts))


def egoschema(tree, row):
    texts = row.texts("option")
    clip = row["video_idx"]
    question = row["question"] + " ".join(texts)  # no blank before the first, as in VLM2Vec
    return answers(clip, question, texts, int(row["answer"]), unlettered(texts))


def nextqa(tree, row):
    texts = [row[f"a{i}"] for i in range(5)]
    clip = row["video"]
    question = "\n".join([row["question"], "Options:", *lettered(texts)])
    return answers(clip, question, texts, row["answer"])


def mvbench(tree, row):
    options = row.texts("candidates")
    texts = lettered(options)
    question = "\n".join([row["question"], "Options:", *texts])
    right = [n for n, option in enumerate(options) if option == row["answer"]]
    if not right:
        raise DataError(f"the answer {quote(row['answer'])} is none of the candidates")
    clip = os.path.join(row["subset"], row["video"])
    return answers(clip, question, texts, right[-1])  # of equal options the last


def activitynetqa(tree, row):
    texts = ["yes", "no"]
    clip = f"v_{row['video_name']}"
    question = f"{row['question']}? (A) yes; (B) no."
    return answers(clip, question, texts, texts.index(row["answer"]))


def is_filled(path):
    return os.path.isdir(path) and os.listdir(path)


def moments(tree, row):
    """A text and a clip find a moment of it: a folder holds one for the clip and one for each candidate."""
    stem = stem_of(row["video_path"])
    folder = tree.find(stem, is_filled)
    named, right = {}, []
    for name in sorted(os.listdir(folder)):
        if name == "query" or not os.path.isdir(os.path.join(folder, name)):
            continue
        clip = os.path.join(stem, name)
        named[clip] = (tree.task.target, "video", clip)
        if name.startswith("positive"):
            right.append(clip)
    return (say(tree.task.query, row["query"]), "video", os.path.join(stem, "query")), named, right


def seeker_frames(path):
    """"a/b.mp4" -> the folder of its frames."""
    return os.path.join("video_frames", path.split(".mp4")[0].replace("/", "_"))


def seeker_clips(entries):
    """The folders of a row's clips; newer rows name them."""
    return [entry.get("frame_path") or seeker_frames(entry["output_path"]) for entry in entries]


def momentseeker(tree, row):
    """A text, alone or with a clip or a picture, finds one of several right moments."""
    given = row["input_frames"] or ""
    if given == "":
        kind, where, instruction = "", "", "Find the clip that corresponds to the given text:"
    elif given.endswith(".mp4"):
        kind, where = "video", seeker_frames(given)
        instruction = "Find the clip that corresponds to the given sentence and video segment:"
    elif given.endswith(".jpg"):
        kind, where = "image", f"query_{given}"
        instruction = "Select the video clip that aligns with the given text and image:"
    else:
        raise DataError(f"'input_frames' is {quote(given)}; needs .mp4, .jpg or nothing")
    right, wrong = seeker_clips(row["positive_frames"]), seeker_clips(row["negative_frames"])
    named = {clip: (tree.task.target, "video", clip) for clip in right + wrong}
    return (say(instruction, row["query"]), kind, where), named, right


def pages(tree, row):
    """A text finds pages of the corpus, graded by the qrels."""
    query = (say(tree.task.query, row["query"]), "", "")
    return query, {}, tree.judged.get(str(row["query-id"]), {})


# ------------------------------------------------------------------------------- the 78 tasks


@dataclass
class Published:
    """A task of MMEB-V2 as it is published.  read: its reader, of those above."""

    name: str
    meta: str
    read: object
    hub: str  # repository of its rows
    queries: int = 1000  # the published count
    corpus: int = 0  # candidates, the published count; 0: not published
    folder: str = ""  # of its frames or pages
    subset: str = ""
    split: str = "test"
    query: str = ""  # instruction, where the rows or the reader have none
    target: str = ""
    versions: dict = None  # {repository: (version, queries)}, of a task that was mended

    @property
    def full_name(self):
        return f"{self.meta}/{self.name}"

    @property
    def is_document(self):
        return modality(self.meta) == "visdoc"

    @property
    def is_global(self):
        """Ranked against the whole corpus, not against the candidates of the row."""
        return self.is_document or self.meta == "video_ret" or self.read is video_classes


def image(name, meta, read):
    return Published(name, meta, read, "ziyjiang/MMEB_Test_Instruct", subset=name)


def video(name, meta, read, hub, queries, corpus=0, folder="", **rest):
    return Published(name, meta, read, hub, queries, corpus, folder or name, **rest)


def page(name, meta, hub, queries, corpus=0, split="test", versions=None):
    query = "Find a document image that matches the given query:"
    target = "Understand the content of the provided document image."
    return Published(name, meta, pages, hub, queries, corpus, name, "", split, query, target, versions)


WATCH = "Understand the content of the provided video."
FIND_MOMENT = "Find the clip that corresponds to the described scene in the given video:"
MOMENTSEEKER = {"VLM2Vec/MomentSeeker": ("fixed", 1602), "VLM2Vec/MomentSeeker_1k8": ("original", 1800)}
VIDOSEEK = {"VLM2Vec/ViDoSeek-page-fixed": ("fixed", 1142), "VLM2Vec/ViDoSeek-page": ("original", 1142)}
MMLONGBENCH = {"VLM2Vec/MMLongBench-page-fixed": ("fixed", 838), "VLM2Vec/MMLongBench": ("original", 838)}

# Meta-tasks in the paper's order.  The instructions of the image tasks stand in their rows.
TABLE = [
    # name, meta-task, reader; all of them 1000 queries
    image("ImageNet-1K", "image_cls", image_texts),
    image("N24News", "image_cls", image_texts),
    image("HatefulMemes", "image_cls", image_texts),
    image("VOC2007", "image_cls", image_texts),
    image("SUN397", "image_cls", image_texts),
    image("Place365", "image_cls", image_texts),
    image("ImageNet-A", "image_cls", image_texts),
    image("ImageNet-R", "image_cls", image_texts),
    image("ObjectNet", "image_cls", image_texts),
    image("Country211", "image_cls", image_texts),
    image("OK-VQA", "image_qa", image_texts),
    image("A-OKVQA", "image_qa", image_texts),
    image("DocVQA", "image_qa", image_texts),
    image("InfographicsVQA", "image_qa", image_texts),
    image("ChartQA", "image_qa", image_texts),
    image("Visual7W", "image_qa", image_texts),
    image("ScienceQA", "image_qa", image_texts),
    image("VizWiz", "image_qa", image_texts),
    image("GQA", "image_qa", image_texts),
    image("TextVQA", "image_qa", image_texts),
    image("VisDial", "image_ret", image_pictures),
    image("VisualNews_t2i", "image_ret", image_pictures),
    image("MSCOCO_t2i", "image_ret", image_pictures),
    image("WebQA", "image_ret", image_pictures),
    image("Wiki-SS-NQ", "image_ret", image_pictures),
    image("EDIS", "image_ret", image_pictures),
    image("VisualNews_i2t", "image_ret", image_texts),
    image("MSCOCO_i2t", "image_ret", image_texts),
    image("CIRR", "image_ret", image_pairs),
    image("NIGHTS", "image_ret", image_pairs),
    image("FashionIQ", "image_ret", image_pairs),
    image("OVEN", "image_ret", image_pairs),
    image("MSCOCO", "image_gd", image_pairs),
    image("RefCOCO", "image_gd", image_pairs),
    image("RefCOCO-Matching", "image_gd", image_pairs),
    image("Visual7W-Pointing", "image_gd", image_pairs),
    # name, meta-task, reader, repository, queries, and how many candidates where that is published
    video("K700", "video_cls", video_classes, "VLM2Vec/Kinetics-700", 1000, 700,
          query="Recognize the category of the video content."),
    video("SmthSmthV2", "video_cls", ssv2, "VLM2Vec/SmthSmthV2", 1000, folder="SSv2",
          query="What actions or object interactions are being performed by the person in the video?"),
    video("HMDB51", "video_cls", video_classes, "VLM2Vec/HMDB51", 1000, 51,
          query="What actions or objects interactions are the person in the video doing?"),
    video("UCF101", "video_cls", video_classes, "VLM2Vec/UCF101", 1000, 101,
          query="What activities or sports are being performed by the person in the video?"),
    video("Breakfast", "video_cls", video_classes, "VLM2Vec/Breakfast", 433, 10,
          query="Recognize the breakfast type that the person is cooking in the video."),
    video("MVBench", "video_qa", mvbench, "VLM2Vec/MVBench", 4000, split="train"),
    video("Video-MME", "video_qa", video_mme, "VLM2Vec/Video-MME", 2700),
    video("NExTQA", "video_qa", nextqa, "VLM2Vec/NExTQA", 8564, subset="MC"),
    video("EgoSchema", "video_qa", egoschema, "VLM2Vec/EgoSchema", 500, subset="Subset"),
    video("ActivityNetQA", "video_qa", activitynetqa, "VLM2Vec/ActivityNetQA", 1000),
    video("DiDeMo", "video_ret", didemo, "VLM2Vec/DiDeMo", 1004, target=WATCH,
          query="Find a video that includes the following described scenes:"),
    video("MSR-VTT", "video_ret", msrvtt, "VLM2Vec/MSR-VTT", 1000, subset="test_1k", target=WATCH,
          query="Find a video that contains the following visual content:"),
    video("MSVD", "video_ret", msrvtt, "VLM2Vec/MSVD", 670, target=WATCH,
          query="Find the video snippet that corresponds to the given summary:"),
    video("VATEX", "video_ret", vatex, "VLM2Vec/VATEX", 4478, target=WATCH,
          query="Select a video that fits the description provided:"),
    video("YouCook2", "video_ret", youcook2, "lmms-lab/YouCook2", 3179, split="val", target=WATCH,
          query="Find a video that demonstrates the following action while making a recipe:"),
    video("QVHighlight", "video_mret", moments, "VLM2Vec/QVHighlight", 1083, query=FIND_MOMENT, target=WATCH),
    video("Charades-STA", "video_mret", moments, "VLM2Vec/Charades-STA", 727,
          query=FIND_MOMENT, target=WATCH),
    video("MomentSeeker", "video_mret", momentseeker, "VLM2Vec/MomentSeeker", 1602,
          target="Understand the content of the provided video clip.", versions=MOMENTSEEKER),
    # name, meta-task, repository, queries, and how many candidates where that is published
    page("ViDoRe_arxivqa", "vidore_v1", "vidore/arxivqa_test_subsampled_beir", 500, 500),
    page("ViDoRe_docvqa", "vidore_v1", "vidore/docvqa_test_subsampled_beir", 451, 500),
    page("ViDoRe_infovqa", "vidore_v1", "vidore/infovqa_test_subsampled_beir", 494, 500),
    page("ViDoRe_tabfquad", "vidore_v1", "vidore/tabfquad_test_subsampled_beir", 280, 70),
    page("ViDoRe_tatdqa", "vidore_v1", "vidore/tatdqa_test_beir", 1646, 277),
    page("ViDoRe_shiftproject", "vidore_v1", "vidore/shiftproject_test_beir", 100, 1000),
    page("ViDoRe_syntheticDocQA_artificial_intelligence", "vidore_v1",
         "vidore/syntheticDocQA_artificial_intelligence_test_beir", 100, 968),
    page("ViDoRe_syntheticDocQA_energy", "vidore_v1", "vidore/syntheticDocQA_energy_test_beir", 100, 977),
    page("ViDoRe_syntheticDocQA_government_reports", "vidore_v1",
         "vidore/syntheticDocQA_government_reports_test_beir", 100, 972),
    page("ViDoRe_syntheticDocQA_healthcare_industry", "vidore_v1",
         "vidore/syntheticDocQA_healthcare_industry_test_beir", 100, 965),
    page("ViDoRe_esg_reports_human_labeled_v2", "vidore_v2", "vidore/esg_reports_human_labeled_v2", 52, 1538),
    page("ViDoRe_biomedical_lectures_v2_multilingual", "vidore_v2",
         "vidore/biomedical_lectures_v2", 640, 1016),
    page("ViDoRe_economics_reports_v2_multilingual", "vidore_v2", "vidore/economics_reports_v2", 232, 452),
    page("ViDoRe_esg_reports_v2_multilingual", "vidore_v2", "vidore/esg_reports_v2", 228, 1538),
    page("VisRAG_ArxivQA", "visrag", "openbmb/VisRAG-Ret-Test-ArxivQA", 816, split="train"),
    page("VisRAG_ChartQA", "visrag", "openbmb/VisRAG-Ret-Test-ChartQA", 63, split="train"),
    page("VisRAG_MP-DocVQA", "visrag", "openbmb/VisRAG-Ret-Test-MP-DocVQA", 591, split="train"),
    page("VisRAG_SlideVQA", "visrag", "openbmb/VisRAG-Ret-Test-SlideVQA", 556, split="train"),
    page("VisRAG_InfoVQA", "visrag", "openbmb/VisRAG-Ret-Test-InfoVQA", 718, split="train"),
    page("VisRAG_PlotQA", "visrag", "openbmb/VisRAG-Ret-Test-PlotQA", 863, split="train"),
    page("ViDoSeek-page", "visdoc_ood", "VLM2Vec/ViDoSeek-page-fixed", 1142, versions=VIDOSEEK),
    page("ViDoSeek-doc", "visdoc_ood", "VLM2Vec/ViDoSeek", 1142),
    page("MMLongBench-page", "visdoc_ood", "VLM2Vec/MMLongBench-page-fixed", 838, 6492, versions=MMLONGBENCH),
    page("MMLongBench-doc", "visdoc_ood", "VLM2Vec/MMLongBench-doc", 838, 6492)]

MMEB = {task.name: task for task in TABLE}


# ------------------------------------------------------------------------------- rows and their files


class Row(dict):
    """A row of a data set that knows where it stands."""

    def __init__(self, row, where, **more):
        super().__init__(row, **more)
        self.where = where

    def __missing__(self, key):
        there = quote(list(self))
        raise DataError(f"{self.where}: no column {key!r}.{closest(key, self)} There are {there}.")

    def texts(self, key):
        """A column that must be a list of texts."""
        if not isinstance(self[key], list) or not all(isinstance(text, str) for text in self[key]):
            raise DataError(f"{self.where}: {key!r} must be a list of texts, got {quote(self[key])}")
        return self[key]


def row_files(folder, subset, split):
    """The files of one subset ("": the only one) and split ("": any) in the copy of a hub data set.

    -> their paths below folder, sorted: by the `configs` of its README.md, otherwise by their names.
    Raises DataError for a README.md that cannot be read and when not all parts of a file are there.
    """
    files = data_files(folder)
    by_name = files_by_name(files, subset, split)
    right = files_by_readme(folder, files, subset, split) or by_name
    shards = Counter()
    for file in right:
        if m := re.fullmatch(r"(.*)-\d+-of-(\d+)(?:-\w+)?(\.\w+)", file):
            shards[m[1], int(m[2]), m[3]] += 1
    for (stem, count, suffix), there in shards.items():
        if there != count:
            whole = f"{os.path.join(folder, stem)}-...-of-{count:05d}{suffix}"
            raise DataError(f"{whole}: {there} of {count} files are there; get the others as well")
    return right


def data_files(folder):
    """The files of rows below a folder, sorted; hidden folders hold what a download left."""
    found = []
    for place, _, names in os.walk(folder):
        if f"{os.sep}." in place[len(folder) :]:
            continue
        for name in names:
            if name.endswith((".parquet", ".jsonl", ".json", ".tsv")) and name != "dataset_infos.json":
                found.append(os.path.relpath(os.path.join(place, name), folder))
    return sorted(found)


def files_by_name(files, subset, split):
    """Those of a subset, which is a folder or how a name begins, and a split, which is a word of the path."""
    begins = re.compile(rf"{re.escape(subset)}(-\d|\.)")
    if subset:
        files = [f for f in files if subset in f.split(os.sep) or begins.match(os.path.basename(f))]
    if not split:
        return files
    wanted = {"val", "validation"} if split == "val" else {split}
    splits = re.compile(r"(?<![a-z])(train|test|val|validation|dev)(?![a-z])")
    named = {f: set(splits.findall(f.lower())) for f in files}
    right = [f for f in files if named[f] & wanted]
    if right or any(named.values()):
        return right
    return files  # no name says a split: there is only one


def files_by_readme(folder, files, subset, split):
    """Those that README.md's `configs` name for a subset and split; [] when it names none."""
    readme = os.path.join(folder, "README.md")
    if not os.path.isfile(readme):
        return []
    right = []
    try:
        configs = (metadata_load(readme) or {}).get("configs") or []
        for config in configs:
            named = config.get("config_name") == (subset or "default")
            if named or (len(configs) == 1 and not subset):
                patterns = patterns_of(config, split)
                right = [f for f in files if fits(f, patterns)] or right
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise DataError(f"{readme}: its 'configs' cannot be read: {str(e).splitlines()[0]}") from e
    return right


def fits(file, patterns):
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def patterns_of(config, split):
    """The patterns that a config of a README.md has for a split; a folder stands for the files in it."""
    given, patterns = config.get("data_files") or [], []
    if not isinstance(given, list):
        given = [given]
    for entry in given:
        if isinstance(entry, dict):
            if entry.get("split", split) != split:
                continue
            entry = entry["path"]
        paths = [entry] if isinstance(entry, str) else entry
        for path in paths:
            patterns += [os.path.normpath(path), os.path.normpath(os.path.join(path, "*"))]
    return patterns


def rows_of(folder, subset, split, columns=None):
    """The Rows of the copy of a hub data set, one by one; of .parquet files only the columns asked for.

    Raises DataError naming file and row for what is not there or cannot be read.
    """
    files = [os.path.join(folder, f) for f in row_files(folder, subset, split)]
    if not files:
        of_subset = f"subset {subset!r}, " if subset else ""
        raise DataError(f"{folder}: no .parquet, .jsonl, .json or .tsv file of {of_subset}split {split!r}")
    for path in files:
        if path.endswith(".parquet"):
            yield from parquet_rows(path, columns)
        elif path.endswith(".tsv"):
            yield from tsv_rows(path)
        else:
            yield from json_rows(path)


def parquet_rows(path, columns):
    try:
        import pyarrow.parquet  # only here: who has no such file does not need it
    except ImportError as e:
        raise DataError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from e
    n = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [c for c in file.schema_arrow.names if not columns or c in columns]
            for batch in file.iter_batches(64, columns=wanted):
                for row in batch.to_pylist():
                    n += 1
                    yield Row(row, f"{path}: row {n}")
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a readable .parquet file: {e}") from e


def tsv_rows(path):
    number = re.compile(r"0|-?[1-9]\d*")  # 007 is a name
    with open(path, encoding="utf-8-sig", newline="") as file:
        for n, raw in enumerate(csv.DictReader(file, delimiter="\t"), 1):
            cells = {k: int(v) if number.fullmatch(v or "") else v for k, v in raw.items()}
            yield Row(cells, f"{path}: row {n}")


def json_rows(path):
    with open(path, "rb") as file:
        for n, (_, _, text) in enumerate(spans_of(file, path), 1):
            where = f"{path}: row {n}"
            raw = parse_json(text, where)
            if not isinstance(raw, dict):
                raise DataError(f"{where}: needs an object, got {type(raw).__name__}")
            yield Row(raw, where)


def copies(root, hub):
    """Where a hub repository's rows may lie; the others are how visdoc-tasks.data.tar.gz holds them."""
    name, archive = hub.split("/")[1], os.path.join(root, "visdoc-tasks")
    return [
        os.path.join(root, "rows", *hub.split("/")),
        os.path.join(archive, "data", name),
        os.path.join(archive, "visdoc-tasks", "data", name)]


def download(root, hub):
    """The command that copies a hub repository's rows to where they are looked for."""
    patterns = ("*.parquet", "*.json*", "*.tsv", "README.md")
    parts = " ".join(f"--include '{pattern}'" for pattern in patterns)
    return f"hf download {hub} --repo-type dataset {parts} --local-dir {shlex.quote(copies(root, hub)[0])}"


def revision(folder):
    """The commit of a copy that `hf download --local-dir` made, or ""."""
    if not folder:
        return ""
    left = os.path.join(folder, ".cache", "huggingface", "download", "**", "*.metadata")
    found = sorted(glob.glob(left, recursive=True))
    if not found:
        return ""
    with open(found[0]) as f:
        return f.readline().strip()


def media_places(task, hub, own):
    """Folders below the root that may hold a task's media, in every spelling that is in use."""
    if task.is_document:
        names = [task.folder, task.folder.removeprefix("ViDoRe_"), hub.split("/")[1]]
        archives = [(), ("images",), ("visdoc-tasks",), ("visdoc-tasks", "images")]
        return [own] + [os.path.join("visdoc-tasks", *archive, n) for archive in archives for n in names]
    if not task.folder:
        return ["image-tasks", os.path.join("image-tasks", "MMEB")]
    names = [task.folder, task.folder.replace("-", "_"), task.folder.replace("_", "-"), task.folder.lower()]
    groups = [task.meta]
    if task.meta == "video_ret":  # so does video_ret.tar.gz hold its folders
        inside = os.path.join("data", "ziyan", "video_retrieval")
        groups += [os.path.join(task.meta, inside), inside]
    spellings = itertools.product(("frames", ""), groups, dict.fromkeys(names), ("", "frames"))
    return [os.path.normpath(os.path.join("video-tasks", *spelling)) for spelling in spellings]


# ------------------------------------------------------------------------------- a task from its files


class Tree:
    """The local files of one task: rows of its hub repository, media in any of the spellings that are in use.

    released: the prompts and frames of the released evaluation; extract: pages that are only in the rows are
    written to DIR/visdoc-tasks/extracted.  Raises DataError when there are no rows.
    """

    def __init__(self, root, task, released=False, extract=True):
        if released and task.read is pages and task.meta != "visrag":
            task = replace(task, query="", target="")
        self.root, self.task, self.released, self.extract = root, task, released, extract
        self.max_frames = CLIP_FRAMES
        if released and task.read is momentseeker:
            self.max_frames = 10**6  # all
        self.judged = {}  # of a document task, query id -> {page: gain}
        self.frames = {}  # folder -> its frames that are used
        self.media = {}  # (kind, name) -> is it there?
        self.hub, self.copy, self.jsonl = self.find_rows()
        self.revision = revision(self.copy)
        own = os.path.join("visdoc-tasks", "extracted", *self.hub.split("/"), self.revision)
        self.own = os.path.join(root, own)
        places = [os.path.join(root, p) for p in media_places(task, self.hub, own)]
        self.places = [p for p in places if os.path.isdir(p)]

    def find_rows(self):
        """-> repository, the folder that is its copy or "", the name of the file beside the videos or ""."""
        task = self.task
        hub, copy = task.hub, ""
        places = [(h, place) for h in task.versions or [task.hub] for place in copies(self.root, h)]
        there = [(h, place) for h, place in places if os.path.isdir(place)]
        if there:
            hub, copy = there[0]
        name = task.name.lower()
        stems = [name, name.replace("-", "_"), task.folder.lower()]
        if task.versions:
            stems.insert(0, f"{name}_1k6")
        data = os.path.join(self.root, "video-tasks", "data")
        stems = [stem for stem in stems if os.path.exists(os.path.join(data, f"{stem}.jsonl"))]
        if not copy and not stems:
            wanted = copies(self.root, task.hub)[0]
            raise DataError(f"{wanted}: no such folder; get it with: {download(self.root, task.hub)}")
        return hub, copy, stems[0] if stems else ""

    def rows(self, config=None, columns=None):
        """The task's Rows, or those of one config of its repository."""
        task = self.task
        if not self.copy:
            return rows_of(os.path.join(self.root, "video-tasks", "data"), self.jsonl, "")
        if task.read is mvbench:
            return self.mvbench_rows()
        rows = rows_of(self.copy, config or task.subset, task.split, columns)
        return itertools.islice(rows, SSV2_ROWS) if task.read is ssv2 else rows

    def mvbench_rows(self):
        for subset in MVBENCH:
            for row in rows_of(self.copy, subset, self.task.split):
                yield Row(row, row.where, subset=subset)

    def find(self, name, usable=os.path.isfile):
        """The path of a file, or of a folder that is usable, in one of the places.  Raises DataError."""
        if name not in ("", None):
            for place in self.places:
                path = os.path.join(place, str(name))
                if usable(path):
                    return path
        places = " or ".join(self.places) or "the folder of this task, which does not exist"
        raise DataError(f"{quote(name)} is not in {places}")

    def has_frames(self, path):
        """Whether a folder holds a clip; its frames are kept: in natural order, at most 8, evenly spaced."""
        if path not in self.frames:
            frames = frame_files(path) if os.path.isdir(path) else []
            if len(frames) > self.max_frames:
                chosen = np.linspace(0, len(frames) - 1, self.max_frames, dtype=int)
                frames = [frames[i] for i in chosen]
            self.frames[path] = frames
        return bool(self.frames[path])

    def side(self, item, where):
        """An item -> Side.  Raises DataError for media that are not there."""
        text, kind, name = item
        if self.released:  # as its collator does
            text = text.strip()
        if not kind:
            return Side([("text", printable(text, where))], where=where)
        self.media.setdefault((kind, name), False)
        if kind == "image":
            media = self.find(name)
        else:
            media = self.frames[self.find(name, self.has_frames)]
        self.media[kind, name] = True
        return Side([(kind, media), ("text", printable(text, where))], where=where)

    def corpus(self):
        """What there is to find besides the candidates of the rows: (where, name, item)s."""
        if self.task.read is video_classes:
            return self.classes()
        return self.pages() if self.task.is_document else []

    def classes(self):
        path = os.path.join(self.root, "classes", f"{self.task.name}.txt")
        if not os.path.exists(path):
            raise DataError(
                f"{path}: no such file; write the names of the {self.task.corpus} classes there, one a line, "
                "as they stand in VLM2Vec's src/data/eval_dataset/video_classification_utils.py: "
                "the repository of the rows does not hold them")
        try:
            with open(path, encoding="utf-8-sig") as f:
                names = [line.strip() for line in f]
        except UnicodeDecodeError as e:
            raise DataError(f"{path}: not UTF-8: {e}") from e
        for n, name in enumerate(names, 1):
            if name:
                yield f"{path}: line {n}", name, (name, "", "")

    def pages(self):
        self.read_judgements()
        names = [(row.where, str(row["corpus-id"])) for row in self.rows("corpus", ["corpus-id"])]
        files = {}
        for where, name in names:
            file = self.page_file(name)
            other = files.setdefault(file, name)
            if other != name:
                raise DataError(f"{where}: the pages {quote(other)} and {quote(name)} have one file name, "
                                f"{quote(file)}; rename one in corpus and qrels")
        # where there are versions, pages are those of the rows: an archive does not say which version it has
        trusted = [p for p in self.places if p == self.own or not self.task.versions]
        missing = files.keys() - {name for place in trusted for name in os.listdir(place)}
        in_rows = self.take_out(missing) if missing else set()
        for where, name in names:
            file = self.page_file(name)
            self.media["image", file] = file in in_rows
            yield where, name, (self.task.target, "" if file in in_rows else "image", file)

    def read_judgements(self):
        """The qrels, as VLM2Vec reads them: without gains of 0; of a pair that stands twice the greater."""
        for row in self.rows("qrels"):
            gains, gain = self.judged.setdefault(str(row["query-id"]), {}), row["score"]
            if not isinstance(gain, (int, float)):
                raise DataError(f"{row.where}: 'score' must be a number, got {quote(gain)}")
            if gain > 0:
                page = str(row["corpus-id"])
                gains[page] = max(gain, gains.get(page, 0))

    def page_file(self, name):
        """The file of a page, as VLM2Vec names it; a separator must not lead out of the folder."""
        file = f"{name}.png"
        if self.task.meta == "visrag":
            base, ext = os.path.splitext(name)
            file = f"{base[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{ext}"
        return re.sub(r"[/\\]", "_", file)

    def take_out(self, missing):
        """Write the pages that no place has as they stand in the rows.

        -> those that are only there: all, when nothing is to be written.
        """
        label = f"{self.task.name}: taking pages out of the rows"
        for row in tqdm(self.rows("corpus"), desc=label, leave=False):
            file, image = self.page_file(str(row["corpus-id"])), row.get("image")
            content = image.get("bytes") if isinstance(image, dict) else None
            if file not in missing or not content:
                continue
            if not self.extract:
                return missing  # one is there: the others are not looked at
            os.makedirs(self.own, exist_ok=True)
            # `writing` puts a whole file in place: another process may take out the same page
            with writing(os.path.join(self.own, file), "wb") as f:
                f.write(content)
        self.places = [p for p in dict.fromkeys((self.own, *self.places)) if os.path.isdir(p)]
        return set()


class Problems:
    """What is wrong with a task, a sentence each in `bad`; without skip_bad the first is raised."""

    def __init__(self, name, skip_bad):
        self.name, self.skip_bad, self.bad = name, skip_bad, []

    def add(self, where, error):
        text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        if where not in text:
            text = f"{where}: {text}"
        if not text.startswith(f"{self.name}: "):
            text = f"{self.name}: {text}"
        if not self.skip_bad:
            raise DataError(text)
        self.bad.append(text)


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
        for where, name, item in self.tree.corpus():
            if name in self.known:
                self.problems.add(where, DataError(f"the id {quote(name)} stands there twice"))
            self.add(where, name, item)


def match(found, where, named, right, is_global):
    """Add a query's candidates -> {corpus row: gain} of the right ones, corpus rows of all."""
    rows = [found.add(where, name, item) for name, item in named.items()]
    rows = [row for row in rows if row is not None]
    gains = {}
    for name in right:
        if name not in (found.known if is_global else named):
            raise DataError(f"the right candidate {quote(name)} is none of the candidates")
        _, row = found.known[name]
        if row is not None:
            gains[row] = right[name] if isinstance(right, dict) else 1
    if not gains:
        raise DataError("no right candidate for this query")
    if not is_global and len(rows) < 2:
        raise DataError("a query with one candidate: it cannot be wrong")
    return gains, rows


def version_of(task, hub, count):
    """-> a mended task's version by the number of its queries ("": not one), and the number it must have."""
    versions = task.versions or {}
    version, expected = versions.get(hub, ("", task.queries))
    if count == expected:
        return version, expected
    for other, queries in versions.values():  # MomentSeeker's repository held the original until 2025-07-31
        if count == queries:
            return other, queries
    return "unknown" if version else "", expected


def read_published(root, name, released=False, skip_bad=False, extract=True):
    """A task of MMEB-V2 from its local files -> Task.

    Raises DataError naming task, file and row for anything that is missing or broken; with skip_bad what
    cannot be used is left out and named in Task.bad.  released, extract: as for Tree.
    """
    tree, problems = Tree(root, MMEB[name], released, extract), Problems(name, skip_bad)
    task, found = tree.task, Candidates(tree, problems)
    found.add_corpus()
    queries, relevant, candidates, ids, seen, count = [], [], [], [], set(), 0
    for row in tree.rows("queries" if task.is_document else None):
        count += 1
        try:
            item, named, right = task.read(tree, row)
            key = str(row["query-id"]) if task.is_document else str(count)
            if key in seen:
                raise DataError(f"the id {quote(key)} stands there twice")
            seen.add(key)
            query = tree.side(item, f"{name}: {row.where}")
            gains, rows = match(found, row.where, named, right, task.is_global)
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as e:
            problems.add(row.where, e)
            continue
        queries.append(query)
        relevant.append(gains)
        candidates.append(None if task.is_global else rows)
        ids.append(key)
    version, expected = version_of(task, tree.hub, count)
    if count != expected:
        text = f"{count} queries, {expected} are published"
        if version == "unknown":
            text += ": an unknown version"
        problems.add(tree.copy or tree.jsonl, DataError(text))
    if task.corpus and len(found.known) != task.corpus:
        problems.add(tree.copy, DataError(f"{len(found.known)} candidates, {task.corpus} are published"))
    bad = problems.bad
    if not queries:
        first = f"; {len(bad)} problems, the first: {bad[0]}" if bad else ""
        raise DataError(f"{name}: no query is left{first}")
    about = dict(
        data=os.path.realpath(root), hub=tree.hub, version=version, revision=tree.revision, rows=count,
        renamed=found.renamed, media=sum(tree.media.values()), media_wanted=len(tree.media))
    metric = "ndcg@5" if task.is_document else "hit@1"
    return Task(
        task.full_name, queries, found.sides, relevant, candidates, ids, found.names, metric, about, bad)
