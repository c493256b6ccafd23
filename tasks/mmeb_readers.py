"""MMEB-V2: what a row of each task means, as VLM2Vec's own readers take it: pictures, clips, pages.

A reader takes the Tree (the files of the task) and a Row -> the query, its candidates {name: item}, and the
names of the right ones.  An item is (text, "" | "image" | "video", where that is).
"""

import os
import re

from files.errors import DataError, quote

CHOOSE = ("Given a video and a question, select the most accurate answer from the provided candidates. "
          "Return only the exact text of your chosen answer. Question: ")
CAPTION_COLUMNS = {  # of the video_ret data sets: the clip, and its caption or captions
    "DiDeMo": ("video", "caption"),
    "MSR-VTT": ("video_id", "caption"),
    "MSVD": ("video_id", "caption"),
    "VATEX": ("videoID", "enCap"),
    "YouCook2": ("id", "sentence")}


def instructed(instruction, text="", by_picture=False):
    """Instruction and text as one, without a row's own image tokens: the prompt has a place for pictures.

    by_picture: it stands beside one; there VLM2Vec takes a blank before a line break away.
    """
    if not isinstance(text, str):
        raise DataError(f"needs a text, got {quote(text)}")
    joined = re.sub(r"<\|image_\d+\|>\n?", "", f"{instruction} {text}").strip()
    return joined.replace(" \n", "\n") if by_picture else joined


def as_items(texts):
    """Candidates that are texts and named by themselves."""
    return {text: (text, "", "") for text in texts}


def image_query(row):
    """The instruction, without the blanks around it, and the text."""
    instruction = re.sub(r"<\|image_\d+\|>", "", row["qry_inst"] or "").strip()
    return instructed(instruction, row["qry_text"] or "", by_picture=bool(row["qry_img_path"]))


def image_candidates(row, named_by_caption=False):
    """The pictures of a row, with captions when the first has one; and the name of the right one, the first.

    A name is a path, and with named_by_caption, as captions may share a picture, the caption behind it; the
    first to bear it counts.
    """
    named, paths, instruction = {}, row.texts("tgt_img_path"), row["tgt_inst"] or ""
    captions = [caption or "" for caption in row["tgt_text"] or [""] * len(paths)]
    captioned = bool(captions and captions[0].strip())
    for path, caption in zip(paths, captions, strict=True):
        name = path
        if named_by_caption:
            name += ":" + caption.strip('"')
        text = instructed(instruction, caption if captioned else "", by_picture=True)
        named.setdefault(name, (text, "image", path))
    return named, [*named][:1]


def image_texts(tree, row):
    """A picture, perhaps with a question, finds a text; the first candidate is right."""
    texts = row.texts("tgt_text")
    return (image_query(row), "image", row["qry_img_path"]), as_items(texts), texts[:1]


def image_pictures(tree, row):
    """A text finds a picture."""
    return (image_query(row), "", ""), *image_candidates(row)


def image_pairs(tree, row):
    """A picture, perhaps with a text, finds a picture, perhaps with a caption."""
    query = (image_query(row), "image", row["qry_img_path"])
    return query, *image_candidates(row, named_by_caption=True)


def video_classes(tree, row):
    """A clip finds its class; the corpus is the list of classes."""
    return (tree.task.query, "video", row["video_id"]), {}, [row["pos_text"]]


def ssv2(tree, row):
    """A clip finds its class among those of the row, `neg_text`, which holds the right one too."""
    query = (tree.task.query, "video", row["video_id"])
    return query, as_items(row.texts("neg_text")), [row["pos_text"]]


def captions(tree, row):
    """A caption, or the first of several, finds the clip."""
    clip_column, text_column = CAPTION_COLUMNS[tree.task.name]
    clip, text = str(row[clip_column]), row[text_column]
    if tree.task.name == "DiDeMo":
        clip = stem_of(clip)
    query = instructed(tree.task.query, text if isinstance(text, str) else text[0])
    return (query, "", ""), {clip: (tree.task.target, "video", clip)}, [clip]


def stem_of(path):
    """"videos/a.mp4" -> "a"."""
    return os.path.splitext(os.path.basename(path))[0]


def answers(clip, question, texts, right, shown=None):
    """A question about a clip; right: the number of the right text; shown: what is embedded of each."""
    query = (instructed(CHOOSE, question), "video", clip)
    named = {text: (embedded, "", "") for text, embedded in zip(texts, shown or texts)}
    return query, named, [texts[right]]


def lettered(texts):
    return [f"({chr(65 + i)}) {text}" for i, text in enumerate(texts)]


def unlettered(texts):
    """"A. a text." -> "a text"; as in VLM2Vec, of a text without ". " only the last character stays."""
    return [t[t.find(". ") :].strip(". ") for t in texts]


def video_mme(tree, row):
    texts = row.texts("options")
    question = "\n".join([row["question"], *texts])
    return answers(row["videoID"], question, texts, "ABCD".index(row["answer"]), unlettered(texts))


def egoschema(tree, row):
    texts = row.texts("option")
    question = row["question"] + " ".join(texts)  # no blank before the first, as in VLM2Vec
    return answers(row["video_idx"], question, texts, int(row["answer"]), unlettered(texts))


def nextqa(tree, row):
    texts = [row[f"a{i}"] for i in range(5)]
    question = "\n".join([row["question"], "Options:", *lettered(texts)])
    return answers(row["video"], question, texts, row["answer"])


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
    question = f"{row['question']}? (A) yes; (B) no."
    return answers(f"v_{row['video_name']}", question, texts, texts.index(row["answer"]))


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
    query = instructed(tree.task.query, row["query"])
    return (query, "video", os.path.join(stem, "query")), named, right


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
    return (instructed(instruction, row["query"]), kind, where), named, right


def seeker_frames(path):
    """"a/b.mp4" -> the folder of its frames."""
    return os.path.join("video_frames", path.split(".mp4")[0].replace("/", "_"))


def seeker_clips(entries):
    """The folders of a row's clips; newer rows name them."""
    return [entry.get("frame_path") or seeker_frames(entry["output_path"]) for entry in entries]


def pages(tree, row):
    """A text finds pages of the corpus, graded by the qrels."""
    query = (instructed(tree.task.query, row["query"]), "", "")
    return query, {}, tree.judged.get(str(row["query-id"]), {})
