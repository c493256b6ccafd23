"""MMEB-V2: the table of its 78 tasks, and each as a Task, from local copies of the published files.

Facts: VLM2Vec (github.com/TIGER-AI-Lab/VLM2Vec), its src/data/eval_dataset and experiments/public.
What a row means is in mmeb_readers.py, where rows and media lie in mmeb_files.py and mmeb_rows.py, what there
is to find in mmeb_corpus.py.
"""

import os
from dataclasses import dataclass

from files.errors import DataError, quote
from tasks.beir import Task
from tasks.mmeb_corpus import Candidates
from tasks.mmeb_files import Tree
from tasks.mmeb_readers import (
    activitynetqa, captions, egoschema, image_pairs, image_pictures, image_texts, moments, momentseeker,
    mvbench, nextqa, pages, ssv2, video_classes, video_mme)

META = {  # meta-task -> its column in the paper's table
    "image_cls": "CLS", "image_qa": "QA", "image_ret": "RET", "image_gd": "GD",
    "video_cls": "CLS", "video_qa": "QA", "video_ret": "RET", "video_mret": "MRET",
    "vidore_v1": "VDRv1", "vidore_v2": "VDRv2", "visrag": "VR", "visdoc_ood": "OOD"}


def modality(meta):
    """image, video or visdoc of a meta-task; of another one its first word."""
    return "visdoc" if meta.startswith(("vidore", "visrag")) else meta.split("_")[0]


@dataclass
class Published:
    """A task of MMEB-V2 as it is published."""

    name: str
    meta: str
    read: object  # a reader of mmeb_readers.py
    hub: str  # repository of its rows
    queries: int = 1000  # the published count
    corpus: int = 0  # candidates, the published count; 0: not published
    folder: str = ""  # of its frames or pages, if not its name
    subset: str = ""
    split: str = "test"
    query: str = ""  # instruction, where the rows or the reader have none
    target: str = ""
    versions: dict = None  # {repository: (version, queries)}, of a task that was mended

    def __post_init__(self):
        self.folder = self.folder or self.name

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
    Published("K700", "video_cls", video_classes, "VLM2Vec/Kinetics-700", 1000, 700,
              query="Recognize the category of the video content."),
    Published("SmthSmthV2", "video_cls", ssv2, "VLM2Vec/SmthSmthV2", 1000, folder="SSv2",
              query="What actions or object interactions are being performed by the person in the video?"),
    Published("HMDB51", "video_cls", video_classes, "VLM2Vec/HMDB51", 1000, 51,
              query="What actions or objects interactions are the person in the video doing?"),
    Published("UCF101", "video_cls", video_classes, "VLM2Vec/UCF101", 1000, 101,
              query="What activities or sports are being performed by the person in the video?"),
    Published("Breakfast", "video_cls", video_classes, "VLM2Vec/Breakfast", 433, 10,
              query="Recognize the breakfast type that the person is cooking in the video."),
    Published("MVBench", "video_qa", mvbench, "VLM2Vec/MVBench", 4000, split="train"),
    Published("Video-MME", "video_qa", video_mme, "VLM2Vec/Video-MME", 2700),
    Published("NExTQA", "video_qa", nextqa, "VLM2Vec/NExTQA", 8564, subset="MC"),
    Published("EgoSchema", "video_qa", egoschema, "VLM2Vec/EgoSchema", 500, subset="Subset"),
    Published("ActivityNetQA", "video_qa", activitynetqa, "VLM2Vec/ActivityNetQA", 1000),
    Published("DiDeMo", "video_ret", captions, "VLM2Vec/DiDeMo", 1004, target=WATCH,
              query="Find a video that includes the following described scenes:"),
    Published("MSR-VTT", "video_ret", captions, "VLM2Vec/MSR-VTT", 1000, subset="test_1k", target=WATCH,
              query="Find a video that contains the following visual content:"),
    Published("MSVD", "video_ret", captions, "VLM2Vec/MSVD", 670, target=WATCH,
              query="Find the video snippet that corresponds to the given summary:"),
    Published("VATEX", "video_ret", captions, "VLM2Vec/VATEX", 4478, target=WATCH,
              query="Select a video that fits the description provided:"),
    Published("YouCook2", "video_ret", captions, "lmms-lab/YouCook2", 3179, split="val", target=WATCH,
              query="Find a video that demonstrates the following action while making a recipe:"),
    Published("QVHighlight", "video_mret", moments, "VLM2Vec/QVHighlight", 1083,
              query=FIND_MOMENT, target=WATCH),
    Published("Charades-STA", "video_mret", moments, "VLM2Vec/Charades-STA", 727,
              query=FIND_MOMENT, target=WATCH),
    Published("MomentSeeker", "video_mret", momentseeker, "VLM2Vec/MomentSeeker", 1602,
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


class Problems:
    """What is wrong with a task, a sentence each in `bad`; without skip_bad the first is raised."""

    def __init__(self, name, skip_bad):
        self.name, self.skip_bad, self.bad = name, skip_bad, []

    def add(self, where, error):
        text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        if where not in text:
            text = f"{where}: {text}"
        text = f"{self.name}: " + text.removeprefix(f"{self.name}: ")
        if not self.skip_bad:
            raise DataError(text)
        self.bad.append(text)


def version_of(task, hub, count):
    """-> a mended task's version by the number of its queries ("": not one), and the number it must have."""
    versions = task.versions or {}
    version, expected = versions.get(hub, ("", task.queries))
    # MomentSeeker's repository held the original until 2025-07-31
    for other, queries in [(version, expected), *versions.values()]:
        if count == queries:
            return other, queries
    return "unknown" if version else "", expected


def read_published(root, name, released=False, skip_bad=False, extract=True):
    """A task of MMEB-V2 from its local files -> Task.

    Raises DataError naming task, file and row for anything that is missing or broken; with skip_bad what
    cannot be used is left out and named in Task.bad.  released, extract: as for Tree.
    """
    tree, problems = Tree(root, MMEB[name], released, extract), Problems(name, skip_bad)
    published, found = tree.task, Candidates(tree, problems)
    found.add_corpus()
    metric = "ndcg@5" if published.is_document else "hit@1"
    task = Task(published.full_name, [], found.sides, [], [], [], found.names, metric, bad=problems.bad)
    ids, count = set(), 0
    for count, row in enumerate(tree.rows("queries" if published.is_document else None), 1):
        try:
            item, named, right = published.read(tree, row)
            key = str(row["query-id"]) if published.is_document else str(count)
            if key in ids:
                raise DataError(f"the id {quote(key)} stands there twice")
            ids.add(key)
            query = tree.side(item, f"{name}: {row.where}")
            gains, rows = found.add_query(row.where, named, right)
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as e:
            problems.add(row.where, e)
            continue
        task.queries.append(query)
        task.relevant.append(gains)
        task.candidates.append(None if published.is_global else rows)
        task.query_ids.append(key)

    version, expected = version_of(published, tree.hub, count)
    if count != expected:
        unknown = ": an unknown version" if version == "unknown" else ""
        why = DataError(f"{count} queries, {expected} are published{unknown}")
        problems.add(tree.copy or tree.jsonl, why)
    if published.corpus and len(found.known) != published.corpus:
        why = DataError(f"{len(found.known)} candidates, {published.corpus} are published")
        problems.add(tree.copy, why)
    if not task.queries:
        first = f"; {len(task.bad)} problems, the first: {task.bad[0]}" if task.bad else ""
        raise DataError(f"{name}: no query is left{first}")
    task.about = dict(
        data=os.path.realpath(root), files_hash=tree.files_hash(), hub=tree.hub, version=version,
        revision=tree.revision, rows=count,
        renamed=found.renamed, media=sum(tree.media.values()), media_wanted=len(tree.media))
    return task
