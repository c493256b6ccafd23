"""MMEB-V2 in miniature, for the tests: 78 tasks of four queries, laid out as on the hub and in the archives.

What each task must be stands beside its files, and was not read from them.
"""

import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tasks.mmeb import MMEB, MVBENCH
from tests.samples import NAMES, picture

CONCEPTS = NAMES[:4]  # what the four queries are about

# Instructions, copied from VLM2Vec
INST = "Represent the given image"
WATCH = "Understand the content of the provided video."
WATCH_CLIP = "Understand the content of the provided video clip."
PAGE_QUERY = "Find a document image that matches the given query:"
PAGE_TARGET = "Understand the content of the provided document image."
FIND_MOMENT = "Find the clip that corresponds to the described scene in the given video:"
CHOOSE = ("Given a video and a question, select the most accurate answer from the provided candidates. "
          "Return only the exact text of your chosen answer. Question: ")
CLIP_QUERIES = {
    "K700": "Recognize the category of the video content.",
    "SmthSmthV2": "What actions or object interactions are being performed by the person in the video?",
    "HMDB51": "What actions or objects interactions are the person in the video doing?",
    "UCF101": "What activities or sports are being performed by the person in the video?",
    "Breakfast": "Recognize the breakfast type that the person is cooking in the video.",
    "DiDeMo": "Find a video that includes the following described scenes:",
    "MSR-VTT": "Find a video that contains the following visual content:",
    "MSVD": "Find the video snippet that corresponds to the given summary:",
    "VATEX": "Select a video that fits the description provided:",
    "YouCook2": "Find a video that demonstrates the following action while making a recipe:",
}
SEEKER_QUERIES = [  # what a row of MomentSeeker shows, its instruction
    ("", "Find the clip that corresponds to the given text:"),
    ("p1.jpg", "Select the video clip that aligns with the given text and image:"),
    ("long/v2.mp4", "Find the clip that corresponds to the given sentence and video segment:"),
    ("long/v3.mp4", "Find the clip that corresponds to the given sentence and video segment:"),
]

# Of the image tasks: what finds pictures, and the captions of those
TEXT_FINDS_PICTURE = ("VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA", "Wiki-SS-NQ", "EDIS")
PICTURE_FINDS_PICTURE = (
    "CIRR", "NIGHTS", "FashionIQ", "OVEN", "MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing")
CAPTIONS = {"WebQA": "a {}", "EDIS": "a {}", "OVEN": '"a {}"', "RefCOCO-Matching": '"a {}"'}

# How folders of frames and files of rows beside them are spelled, where not as the task
FRAMES = {"SmthSmthV2": "SSv2", "Charades-STA": "Charades_STA"}
BESIDE_FRAMES = {
    "Charades-STA": "charades_sta", "MomentSeeker": "momentseeker_1k6", "ActivityNetQA": "activitynetqa"}

JUDGED = [  # query, page, gain; 0 is no gain, and of a pair that stands twice the greater counts
    (0, 0, 1),
    (0, 3, 2),
    (1, 1, 1),
    (1, 2, 0),
    (2, 2, 1),
    (2, 2, 2),
    (3, 3, 1),
]
GAINS = [{0: 1, 3: 2}, {1: 1}, {2: 2}, {3: 1}]


class Miniature:
    """Some or all tasks under `root`, and what each must be: expected[name] = (queries, candidates, gains).

    Queries and the candidates of each are items for `encode`; the gains of each are {candidate: gain}.
    only: names of tasks and meta-tasks; other: the other spelling of the same data that is in use.
    """

    def __init__(self, root, only=None, other=False):
        pytest.importorskip("pyarrow", reason="the published rows are .parquet files")
        self.root, self.other, self.expected = Path(root), other, {}
        for name, task in MMEB.items():
            if only is None or name in only or task.meta in only:
                make = self.maker(name, task)
                self.expected[name] = make(name, task)

    def maker(self, name, task):
        if task.is_document:
            return self.pages
        if task.meta.startswith("image"):
            return self.images
        if name == "MomentSeeker":
            return self.momentseeker
        makers = dict(
            video_cls=self.classes, video_ret=self.clips, video_qa=self.questions, video_mret=self.moments)
        return makers[task.meta]

    # files

    def draw(self, path, concept, at=0):
        """A picture of the concept, where there is none yet -> its path."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(*concept.split(), (56, 56), at).save(path)
        return str(path)

    def write_rows(self, hub, config, split, rows, style="parquet"):
        """A part of a hub repository: two shards of .parquet, or JSON lines."""
        folder = self.root / "rows" / hub / config
        if self.other and config in ("queries", "corpus", "qrels"):
            folder = self.root / "visdoc-tasks" / "data" / hub.split("/")[1] / config
        folder.mkdir(parents=True, exist_ok=True)
        if style == "json":
            write_lines(folder / f"{split}.jsonl", rows)
            return
        import pyarrow.parquet

        half = len(rows) // 2
        for n, part in enumerate((rows[:half], rows[half:])):
            path = folder / f"{split}-0000{n}-of-00002.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)

    def write_video_rows(self, name, task, rows):
        if self.other and name in BESIDE_FRAMES:
            path = self.root / "video-tasks" / "data" / f"{BESIDE_FRAMES[name]}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, rows)
            return
        style = "json" if name in ("Breakfast", "MomentSeeker") else "parquet"
        self.write_rows(task.hub, task.subset, task.split, rows, style)

    def video_folder(self, name, task):
        videos = self.root / "video-tasks"
        if not self.other:
            return videos / "frames" / task.meta / FRAMES.get(name, name)
        if task.meta == "video_ret":  # as the archive holds them
            return videos / "frames/video_ret/data/ziyan/video_retrieval" / name
        return videos / task.meta / ("SSv2" if name == "SmthSmthV2" else name)

    def clip(self, name, task, clip, concept, count=10):
        """A folder of frames -> the paths of the (at most) 8 of them that are used."""
        folder = self.video_folder(name, task) / ("frames" if self.other else "") / clip
        paths = [self.draw(folder / f"frame_{k + 1}.jpg", concept, k - 5) for k in range(count)]  # 10 after 9
        if count <= 8:
            return paths
        return [paths[int(k * (count - 1) / 7)] for k in range(8)]

    # image tasks

    def images(self, name, task):
        rows, queries, candidates = [], [], []
        for i in range(4):
            row, query, found = self.image_row(name, task, i)
            rows.append(row)
            queries.append(query)
            candidates.append(found)
        self.write_rows("ziyjiang/MMEB_Test_Instruct", name, "test", rows)
        return queries, candidates, [{0: 1}] * 4

    def image_row(self, name, task, i):
        """Row, query and candidates; the first of these is right."""
        folder = self.root / "image-tasks" / ("MMEB" if self.other else "")
        concepts = [NAMES[(i + 3 * k) % 12] for k in range(4)]
        paths = [f"{name}/Test/{concept}.jpg" for concept in concepts]
        instruction = f"{INST} for {name}."
        question = f"what is this, {i}?" if task.meta == "image_qa" else ""
        row = dict(
            qry_inst=f"<|image_1|>\n{instruction}", qry_text=question, qry_img_path=paths[0],
            tgt_text=concepts, tgt_inst="", tgt_img_path=[""] * 4)
        shown = self.draw(folder / paths[0], concepts[0])
        query = dict(text=f"{instruction} {question}".strip(), image=shown)
        found = [dict(text=concept) for concept in concepts]
        if name in TEXT_FINDS_PICTURE:
            text = f"the {concepts[0]} \nof {i}"
            row |= dict(qry_text=f"{text}\n", qry_img_path="")  # a line break at the end, as VisDial's
            query = dict(text=f"{instruction} {text}")
        if name in TEXT_FINDS_PICTURE + PICTURE_FINDS_PICTURE:
            images = [self.draw(folder / path, concept) for path, concept in zip(paths, concepts)]
            if name == "RefCOCO-Matching":  # one picture, four captions
                paths, images = paths[:1] * 4, images[:1] * 4
            captions = [CAPTIONS.get(name, "").format(concept) for concept in concepts]
            row |= dict(tgt_inst="<|image_1|>\nRepresent it.", tgt_text=captions, tgt_img_path=paths)
            found = []
            for caption, image in zip(captions, images):
                found.append(dict(text=f"Represent it. {caption}".strip(), image=image))
        return row, query, found

    # video tasks

    def clips(self, name, task):
        """A caption finds a clip."""
        rows = [caption_row(name, f"v{i}", concept) for i, concept in enumerate(CONCEPTS)]
        self.write_video_rows(name, task, rows)
        queries = [dict(text=f"{CLIP_QUERIES[name]} {concept}") for concept in CONCEPTS]
        corpus = []
        for i, concept in enumerate(CONCEPTS):
            frames = self.clip(name, task, f"v{i}", concept, 3 if i == 0 else 10)
            corpus.append(dict(text=WATCH, video=frames))
        return queries, [corpus] * 4, [{i: 1} for i in range(4)]

    def classes(self, name, task):
        """A clip finds its class."""
        rows, queries, labels = [], [], NAMES
        for i, concept in enumerate(CONCEPTS):
            rows.append(dict(video_id=f"v{i}", pos_text=concept))
            queries.append(dict(text=CLIP_QUERIES[name], video=self.clip(name, task, f"v{i}", concept)))
        if name == "SmthSmthV2":  # the classes stand in the rows
            labels = NAMES[:5]
            rows = [row | dict(neg_text=labels) for row in rows]
        else:
            (self.root / "classes").mkdir(exist_ok=True)
            (self.root / "classes" / f"{name}.txt").write_text("\n".join(labels) + "\n")
        self.write_video_rows(name, task, rows)
        corpus = [dict(text=label) for label in labels]
        return queries, [corpus] * 4, [{i: 1} for i in range(4)]

    def questions(self, name, task):
        """A question about a clip finds its answer."""
        asked = [("", i) for i in range(4)]  # subset and number of the question
        if name == "MVBench":  # the first stands in all 20 subsets, three more in one
            asked = []
            for subset in MVBENCH:
                asked += [(subset, i) for i in range(4 if subset == "action_count" else 1)]
        rows, queries, candidates, gains = [], [], [], []
        for subset, i in asked:
            texts = NAMES[i : i + 4]
            if name in ("NExTQA", "EgoSchema"):
                texts = NAMES[i : i + 5]
            elif name == "ActivityNetQA":
                texts = ["yes", "no"]
            right = i % len(texts)
            row, question, answers, clip = QUESTIONS[name](i, texts, right)
            frames = self.clip(name, task, f"{subset}/{clip}" if subset else clip, CONCEPTS[i])
            rows.append(row)
            queries.append(dict(text=f"{CHOOSE} {question}", video=frames))
            candidates.append([dict(text=answer) for answer in answers])
            gains.append({right: 1})
        if name != "MVBench":
            self.write_video_rows(name, task, rows)
            return queries, candidates, gains
        folder = self.root / "rows/VLM2Vec/MVBench/json"
        folder.mkdir(parents=True)
        for subset in MVBENCH:  # one JSON array each
            mine = [row for row, (of, _) in zip(rows, asked) if of == subset]
            (folder / f"{subset}.json").write_text(json.dumps(mine))
        return queries, candidates, gains

    def moments(self, name, task):
        """A text and a clip find the moment of it."""
        rows, queries, candidates = [], [], []
        for i, concept in enumerate(CONCEPTS):
            rows.append(dict(query=concept, video_path=f"videos/v{i}.mp4"))
            given = self.clip(name, task, f"v{i}/query", concept)
            queries.append(dict(text=f"{FIND_MOMENT} {concept}", video=given))
            found = []
            for k, moment in enumerate(("negative_0", "negative_1", "positive_0")):
                frames = self.clip(name, task, f"v{i}/{moment}", NAMES[i + k], 8)
                found.append(dict(text=WATCH, video=frames))
            candidates.append(found)
        self.write_video_rows(name, task, rows)
        return queries, candidates, [{2: 1}] * 4

    def momentseeker(self, name, task):
        """A text, alone or with a picture or a clip, finds two moments."""
        rows, queries, candidates = [], [], []
        for i, (concept, (given, ask)) in enumerate(zip(CONCEPTS, SEEKER_QUERIES)):
            query = dict(text=f"{ask} {concept}")
            if given.endswith(".jpg"):
                query["image"] = self.draw(self.video_folder(name, task) / f"query_{given}", concept)
            elif given.endswith(".mp4"):
                query["video"] = self.clip(name, task, f"video_frames/long_v{i}", concept)
            entries, found = [], []
            for k in range(4):
                entries.append(dict(output_path=f"clips/{i}_{k}.mp4"))
                frames = self.clip(name, task, f"video_frames/clips_{i}_{k}", NAMES[i + k], 9)
                found.append(dict(text=WATCH_CLIP, video=frames))
            rows.append(dict(
                query=concept, input_frames=given, positive_frames=entries[:2], negative_frames=entries[2:]))
            queries.append(query)
            candidates.append(found)
        self.write_video_rows(name, task, rows)
        return queries, candidates, [{0: 1, 1: 1}] * 4

    # document tasks

    def pages(self, name, task):
        """A text finds pages of the corpus, graded."""
        corpus, rows = [], []
        for k, concept in enumerate(NAMES[:6]):
            png = io.BytesIO()
            picture(*concept.split(), (56, 84)).save(png, "PNG")
            corpus.append(dict(text=PAGE_TARGET, image=Image.open(png)))
            page, content = page_id(name, task, k), png.getvalue()
            if self.other:  # the pages lie beside the rows, as an archive holds them
                folder = self.page_folder(name, task)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / page_file(task, str(page))).write_bytes(content)
                content = None
            rows.append({"corpus-id": page, "image": dict(bytes=content, path=None)})
        asked, judged = [], []
        for q, concept in enumerate(CONCEPTS):
            asked.append({"query-id": q, "query": f"a {concept}", "language": "english"})
        for q, k, gain in JUDGED:
            judged.append({"query-id": q, "corpus-id": page_id(name, task, k), "score": gain})
        self.write_rows(task.hub, "corpus", task.split, rows)
        self.write_rows(task.hub, "queries", task.split, asked)
        self.write_rows(task.hub, "qrels", task.split, judged)
        queries = [dict(text=f"{PAGE_QUERY} a {concept}") for concept in CONCEPTS]
        return queries, [corpus] * 4, GAINS

    def page_folder(self, name, task):
        if name.endswith(("_v2", "_multilingual")):
            name = name.removeprefix("ViDoRe_")
        return self.root / "visdoc-tasks" / ("images" if task.meta == "visrag" else "visdoc-tasks") / name


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def caption_row(name, clip, caption):
    """A row of a video_ret data set: each has names of its own for its columns."""
    return {
        "DiDeMo": dict(video=f"videos/{clip}.mp4", caption=caption),
        "MSR-VTT": dict(video_id=clip, video=f"{clip}.mp4", caption=caption),
        "MSVD": dict(video_id=clip, video="x.avi", caption=[caption, "no"]),
        "VATEX": dict(videoID=clip, enCap=[caption, "no"]),
        "YouCook2": dict(id=clip, video_path=f"x/{clip}.mp4", sentence=caption),
    }[name]


# Rows of the video_qa data sets: question i, texts of the answers, number of the right one
# -> row, question as it is asked, answers as they are embedded, name of the clip


def in_brackets(texts):
    return [f"({letter}) {text}" for letter, text in zip("ABCDE", texts)]


def with_dots(texts):
    return [f"{letter}. {text}." for letter, text in zip("ABCDE", texts)]


def mvbench_row(i, texts, right):
    options = in_brackets(texts)
    row = dict(question="Q?", video=f"v{i}.mp4", candidates=texts, answer=texts[right])
    return row, "\n".join(["Q?", "Options:", *options]), options, f"v{i}.mp4"


def video_mme_row(i, texts, right):
    options = with_dots(texts)
    row = dict(question="Q?", videoID=f"v{i}", options=options, answer="ABCD"[right])
    return row, "\n".join(["Q?", *options]), texts, f"v{i}"


def nextqa_row(i, texts, right):
    columns = {f"a{k}": text for k, text in enumerate(texts)}
    row = dict(columns, question="Q", video=i, answer=right)
    return row, "\n".join(["Q", "Options:", *in_brackets(texts)]), texts, f"{i}"


def egoschema_row(i, texts, right):
    options = with_dots(texts)
    row = dict(question="Q?", video_idx=f"v{i}", option=options, answer=str(right))
    return row, "Q?" + " ".join(options), texts, f"v{i}"


def activitynetqa_row(i, texts, right):
    row = dict(question="is it", video_name=f"x{i}", answer=texts[right])
    return row, "is it? (A) yes; (B) no.", texts, f"v_x{i}"


QUESTIONS = {
    "MVBench": mvbench_row,
    "Video-MME": video_mme_row,
    "NExTQA": nextqa_row,
    "EgoSchema": egoschema_row,
    "ActivityNetQA": activitynetqa_row,
}


def page_id(name, task, k):
    if task.meta == "visrag":
        return f"page {k} " + "of a long name " * 6 + ".png"
    return k if name == "ViDoRe_tatdqa" else f"doc/{k}"


def page_file(task, page):
    """The name of a page's picture in the published archive."""
    if task.meta != "visrag":
        return page.replace("/", "_") + ".png"
    stem, dot, suffix = page.rpartition(".")
    return stem[:50] + "_" + hashlib.md5(page.encode()).hexdigest()[:8] + dot + suffix
