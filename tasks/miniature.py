"""MMEB-V2 in miniature, for the tests: 78 tasks of four queries, laid out as on the hub and in the archives.

What each task must be stands beside its files, and was not read from them.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tasks.mmeb import MMEB
from tasks.mmeb_files import MVBENCH
from tests.samples import NAMES, picture, write_lines

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
    "YouCook2": "Find a video that demonstrates the following action while making a recipe:"}
SEEKER_QUERIES = [  # what a row of MomentSeeker shows, its instruction
    ("", "Find the clip that corresponds to the given text:"),
    ("p1.jpg", "Select the video clip that aligns with the given text and image:"),
    ("long/v2.mp4", "Find the clip that corresponds to the given sentence and video segment:"),
    ("long/v3.mp4", "Find the clip that corresponds to the given sentence and video segment:")]

# Of the image tasks: what finds pictures, and the captions of those
TEXT_FINDS_PICTURE = ("VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA", "Wiki-SS-NQ", "EDIS")
PICTURE_FINDS_PICTURE = (
    "CIRR", "NIGHTS", "FashionIQ", "OVEN", "MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing")
CAPTIONS = {"WebQA": "a {}", "EDIS": "a {}", "OVEN": '"a {}"', "RefCOCO-Matching": '"a {}"'}

# How folders of frames and files of rows beside them are spelled, where not as the task
FRAMES = {"SmthSmthV2": "SSv2", "Charades-STA": "Charades_STA"}
BESIDE_FRAMES = {
    "Charades-STA": "charades_sta", "MomentSeeker": "momentseeker_1k6", "ActivityNetQA": "activitynetqa"}

JUDGED = [(0, 0, 1), (0, 3, 2), (1, 1, 1), (1, 2, 0), (2, 2, 1), (2, 2, 2), (3, 3, 1)]  # query, page, gain
GAINS = [{0: 1, 3: 2}, {1: 1}, {2: 2}, {3: 1}]  # 0 is none; of a pair that stands twice the greater counts


class Miniature:
    """Some or all tasks under `root`, and what each must be: expected[name] = (queries, candidates, gains).

    Queries and the candidates of each are items for `encode`; the gains of each are {candidate: gain}.
    only: names of tasks and meta-tasks; other: the other spelling of the same data that is in use.
    """

    def __init__(self, root, only=None, other=False):
        pytest.importorskip("pyarrow", reason="the published rows are .parquet files")
        self.root, self.other, self.expected = Path(root), other, {}
        of_clips = dict(
            video_cls=self.classes, video_ret=self.clips, video_qa=self.questions, video_mret=self.moments)
        for name, task in MMEB.items():
            if only is not None and name not in only and task.meta not in only:
                continue
            if task.is_document:
                self.expected[name] = self.pages(name, task)
                continue
            make = self.momentseeker if name == "MomentSeeker" else of_clips.get(task.meta, self.images)
            rows, *self.expected[name] = zip(*make(name, task))
            self.write_task(name, task, rows)

    # files

    def draw(self, path, concept, at=0):
        """A picture of the concept, where there is none yet -> its path."""
        if not path.exists():
            picture(*concept.split(), (56, 56), at).save(in_folder(path))
        return str(path)

    def clip(self, name, task, clip, concept, count=10):
        """A folder of frames -> the paths of the (at most) 8 of them that are used."""
        folder = self.video_folder(name, task) / ("frames" if self.other else "") / clip
        paths = [self.draw(folder / f"frame_{k + 1}.jpg", concept, k - 5) for k in range(count)]  # 10 after 9
        if count <= 8:
            return paths
        return [paths[int(k * (count - 1) / 7)] for k in range(8)]

    def video_folder(self, name, task):
        videos = self.root / "video-tasks"
        if not self.other:
            return videos / "frames" / task.meta / FRAMES.get(name, name)
        if task.meta == "video_ret":  # as the archive holds them
            return videos / "frames/video_ret/data/ziyan/video_retrieval" / name
        return videos / task.meta / ("SSv2" if name == "SmthSmthV2" else name)

    def write_task(self, name, task, rows):
        if self.other and name in BESIDE_FRAMES:
            write_lines(in_folder(self.root / "video-tasks" / "data" / f"{BESIDE_FRAMES[name]}.jsonl"), rows)
        elif name == "MVBench":  # one JSON array a subset, whose rows do not name it
            for subset in MVBENCH:
                mine = [row for of, row in rows if of == subset]
                path = self.root / "rows/VLM2Vec/MVBench/json" / f"{subset}.json"
                in_folder(path).write_text(json.dumps(mine))
        else:
            self.write_rows(task.hub, task.subset, task.split, rows)

    def write_rows(self, hub, config, split, rows):
        """A part of a hub repository: two shards of .parquet, or JSON lines."""
        folder = self.root / "rows" / hub / config
        if self.other and config in ("queries", "corpus", "qrels"):
            folder = self.root / "visdoc-tasks" / "data" / hub.split("/")[1] / config
        if hub in ("VLM2Vec/Breakfast", "VLM2Vec/MomentSeeker"):
            write_lines(in_folder(folder / f"{split}.jsonl"), rows)
            return
        import pyarrow.parquet

        half = len(rows) // 2
        for n, part in enumerate((rows[:half], rows[half:])):
            path = in_folder(folder / f"{split}-0000{n}-of-00002.parquet")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(part)), path)

    # tasks: each yields row, query, candidates, and the gains of the right ones

    def images(self, name, task):
        folder = self.root / "image-tasks" / ("MMEB" if self.other else "")
        instruction = f"{INST} for {name}."
        for i in range(4):
            concepts = [NAMES[(i + 3 * k) % 12] for k in range(4)]
            paths = [f"{name}/Test/{concept}.jpg" for concept in concepts]
            question = f"what is this, {i}?" if task.meta == "image_qa" else ""
            row = dict(
                qry_inst=f"<|image_1|>\n{instruction}", qry_text=question, qry_img_path=paths[0],
                tgt_text=concepts, tgt_inst="", tgt_img_path=[""] * 4)
            images = [self.draw(folder / path, concept) for path, concept in zip(paths, concepts)]
            query = dict(text=f"{instruction} {question}".strip(), image=images[0])
            found = [dict(text=concept) for concept in concepts]
            if name in TEXT_FINDS_PICTURE:
                text = f"the {concepts[0]} \nof {i}"
                row |= dict(qry_text=f"{text}\n", qry_img_path="")  # a line break at the end, as VisDial's
                query = dict(text=f"{instruction} {text}")
            if name in TEXT_FINDS_PICTURE + PICTURE_FINDS_PICTURE:
                if name == "RefCOCO-Matching":  # one picture, four captions
                    paths, images = paths[:1] * 4, images[:1] * 4
                captions = [CAPTIONS.get(name, "").format(concept) for concept in concepts]
                row |= dict(tgt_inst="<|image_1|>\nRepresent it.", tgt_text=captions, tgt_img_path=paths)
                texts = [f"Represent it. {caption}".strip() for caption in captions]
                found = [dict(text=text, image=image) for text, image in zip(texts, images)]
            yield row, query, found, {0: 1}

    def clips(self, name, task):
        """A caption finds a clip."""
        frames = [self.clip(name, task, f"v{i}", CONCEPTS[i], 3 if i == 0 else 10) for i in range(4)]
        corpus = [dict(text=WATCH, video=paths) for paths in frames]
        for i, concept in enumerate(CONCEPTS):
            query = dict(text=f"{CLIP_QUERIES[name]} {concept}")
            yield caption_row(name, f"v{i}", concept), query, corpus, {i: 1}

    def classes(self, name, task):
        """A clip finds its class; those of SmthSmthV2 stand in the rows."""
        labels, more = NAMES, {}
        if name == "SmthSmthV2":
            labels, more = NAMES[:5], dict(neg_text=NAMES[:5])
        else:
            in_folder(self.root / "classes" / f"{name}.txt").write_text("\n".join(labels) + "\n")
        for i, concept in enumerate(CONCEPTS):
            query = dict(text=CLIP_QUERIES[name], video=self.clip(name, task, f"v{i}", concept))
            row = dict(video_id=f"v{i}", pos_text=concept, **more)
            yield row, query, [dict(text=label) for label in labels], {i: 1}

    def questions(self, name, task):
        """A question about a clip finds its answer."""
        asked = [("", i) for i in range(4)]  # subset and number of the question
        if name == "MVBench":  # the first stands in all 20 subsets, three more in one
            asked = [(subset, i) for subset in MVBENCH for i in range(4 if subset == "action_count" else 1)]
        for subset, i in asked:
            texts = NAMES[i : i + (5 if name in ("NExTQA", "EgoSchema") else 4)]
            if name == "ActivityNetQA":
                texts = ["yes", "no"]
            right = i % len(texts)
            row, question, answers, clip = question_row(name, i, texts, right)
            frames = self.clip(name, task, os.path.join(subset, clip), CONCEPTS[i])
            query = dict(text=f"{CHOOSE} {question}", video=frames)
            if subset:
                row = subset, row
            yield row, query, [dict(text=answer) for answer in answers], {right: 1}

    def moments(self, name, task):
        """A text and a clip find the moment of it."""
        for i, concept in enumerate(CONCEPTS):
            given = self.clip(name, task, f"v{i}/query", concept)
            query = dict(text=f"{FIND_MOMENT} {concept}", video=given)
            found = []
            for k, moment in enumerate(("negative_0", "negative_1", "positive_0")):
                frames = self.clip(name, task, f"v{i}/{moment}", NAMES[i + k], 8)
                found.append(dict(text=WATCH, video=frames))
            yield dict(query=concept, video_path=f"videos/v{i}.mp4"), query, found, {2: 1}

    def momentseeker(self, name, task):
        """A text, alone or with a picture or a clip, finds two moments."""
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
            row = dict(
                query=concept, input_frames=given, positive_frames=entries[:2], negative_frames=entries[2:])
            yield row, query, found, {0: 1, 1: 1}

    def pages(self, name, task):
        """A text finds pages of the corpus, graded -> queries, candidates, gains."""
        corpus, rows, names = [], [], [page_names(name, task, k) for k in range(6)]
        archive = self.root / "visdoc-tasks" / ("images" if task.meta == "visrag" else "visdoc-tasks")
        archive /= name.removeprefix("ViDoRe_") if name.endswith(("_v2", "_multilingual")) else name
        for concept, (page, file) in zip(NAMES, names):
            png = io.BytesIO()
            picture(*concept.split(), (56, 84)).save(png, "PNG")
            corpus.append(dict(text=PAGE_TARGET, image=Image.open(png)))
            content = png.getvalue()
            if self.other:  # the pages lie beside the rows, as an archive holds them
                in_folder(archive / file).write_bytes(content)
                content = None
            rows.append({"corpus-id": page, "image": dict(bytes=content, path=None)})
        asked = [{"query-id": q, "query": f"a {c}", "language": "english"} for q, c in enumerate(CONCEPTS)]
        judged = [{"query-id": q, "corpus-id": names[k][0], "score": gain} for q, k, gain in JUDGED]
        for config, its_rows in (("corpus", rows), ("queries", asked), ("qrels", judged)):
            self.write_rows(task.hub, config, task.split, its_rows)
        queries = [dict(text=f"{PAGE_QUERY} a {concept}") for concept in CONCEPTS]
        return queries, [corpus] * 4, GAINS


def in_folder(path):
    """The path, with its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def caption_row(name, clip, caption):
    """A row of a video_ret data set: each has names of its own for its columns."""
    return {
        "DiDeMo": dict(video=f"videos/{clip}.mp4", caption=caption),
        "MSR-VTT": dict(video_id=clip, video=f"{clip}.mp4", caption=caption),
        "MSVD": dict(video_id=clip, video="x.avi", caption=[caption, "no"]),
        "VATEX": dict(videoID=clip, enCap=[caption, "no"]),
        "YouCook2": dict(id=clip, video_path=f"x/{clip}.mp4", sentence=caption)}[name]


def question_row(name, i, texts, right):
    """Question i of a video_qa data set; texts: the answers, right: the number of the right one.

    -> row, question as it is asked, answers as they are embedded, name of the clip
    """
    bracketed = [f"({letter}) {text}" for letter, text in zip("ABCDE", texts)]
    dotted = [f"{letter}. {text}." for letter, text in zip("ABCDE", texts)]
    if name == "MVBench":
        row = dict(question="Q?", video=f"v{i}.mp4", candidates=texts, answer=texts[right])
        return row, "\n".join(["Q?", "Options:", *bracketed]), bracketed, f"v{i}.mp4"
    if name == "Video-MME":
        row = dict(question="Q?", videoID=f"v{i}", options=dotted, answer="ABCD"[right])
        return row, "\n".join(["Q?", *dotted]), texts, f"v{i}"
    if name == "NExTQA":
        columns = {f"a{k}": text for k, text in enumerate(texts)}
        row = dict(columns, question="Q", video=i, answer=right)
        return row, "\n".join(["Q", "Options:", *bracketed]), texts, f"{i}"
    if name == "EgoSchema":
        row = dict(question="Q?", video_idx=f"v{i}", option=dotted, answer=str(right))
        return row, "Q?" + " ".join(dotted), texts, f"v{i}"
    row = dict(question="is it", video_name=f"x{i}", answer=texts[right])
    return row, "is it? (A) yes; (B) no.", texts, f"v_x{i}"


def page_names(name, task, k):
    """The id of a page, and the name of its picture in the published archive."""
    if task.meta != "visrag":
        page = k if name == "ViDoRe_tatdqa" else f"doc/{k}"
        return page, str(page).replace("/", "_") + ".png"
    stem = f"page {k} " + "of a long name " * 6
    return f"{stem}.png", f"{stem[:50]}_{hashlib.md5(f'{stem}.png'.encode()).hexdigest()[:8]}.png"
