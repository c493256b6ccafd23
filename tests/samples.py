"""Files that the tests read: pictures, clips, records, a folder of them; a checkpoint's files, changed."""

import json
import os
from fractions import Fraction

import av
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

COLOURS = dict(red=(220, 30, 30), green=(20, 160, 40), blue=(40, 60, 220), black=(0, 0, 0))
SHAPES = ("square", "circle", "bar")
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def picture(colour, shape, size=(84, 84), at=0):
    """A shape on white; at: how far to the right of the middle."""
    image = Image.new("RGB", size, "white")
    w, h = size
    left, right, top = w // 4 + at, 3 * w // 4 + at, h // 4
    draw = ImageDraw.Draw(image)
    if shape == "square":
        draw.rectangle((left, top, right, 3 * h // 4), COLOURS[colour])
    elif shape == "circle":
        draw.ellipse((left, top, right, 3 * h // 4), COLOURS[colour])
    else:
        assert shape == "bar", shape
        draw.rectangle((left, top, right, top + h // 8), COLOURS[colour])
    return image


def write_clip(path, frames, rate=8, codec="mpeg4", stamps=None):
    """stamps: the time of each frame in units of 1/rate seconds; None: one unit apart."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts = stamps[i] if stamps else i
            frame.time_base = Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


REPLY = "<think>Because. So.</think><answer>yes</answer>"


def turns(text, reply=REPLY, who=("from", "value", "human", "gpt")):
    """One question and its reply, in the spelling of published records."""
    speaker, content, user, assistant = who
    return [{speaker: user, content: text}, {speaker: assistant, content: reply}]


def record(**kw):
    """A record that is right, with other values for some of its keys."""
    query = dict(conversations=turns("<image>\nwhat?"), image=["red bar.png"])
    return dict(dataset_name="d", qry=query, pos=dict(conversations=turns("yes"))) | kw


def side(name, what, text, **media):
    """One side of a pair of the world: the question, and why the answer is this name."""
    colour, shape = name.split()
    thought = f"The {what} shows one thing. Its colour is {colour}. Its shape is {shape}. So it is a {name}."
    return dict(conversations=turns(text, f"<think>{thought}</think><answer>{name}</answer>"), **media)


def make_world(root):
    """A picture and a clip of each name; over them two data sets in train.jsonl and two retrieval tasks.

    hard.jsonl: the pairs to pictures, some with hard negatives.
    """
    records = []
    for name in NAMES:
        colour, shape = name.split()
        picture(colour, shape).save(root / f"{name}.png")
        write_clip(root / f"{name}.mp4", [picture(colour, shape, (64, 64), at) for at in range(-4, 4)])
        query = side(name, "text", f"Find the picture: {name}")
        target = side(name, "picture", "<image>\nRepresent.", image=[f"{name}.png"])
        records.append(dict(dataset_name="t2i", qry=query, pos=target))
        query = side(name, "clip", "<video>\nName the clip.", video=f"{name}.mp4")
        target = side(name, "text", name)
        records.append(dict(dataset_name="v2t", qry=query, pos=target))
    write_lines(root / "train.jsonl", records)
    write_lines(root / "hard.jsonl", with_hard_negatives(records[::2]))

    write_task(root / "tasks" / "image_ret" / "t2i",
               [dict(text=f"Find the picture: {n}") for n in NAMES],
               [dict(text="Represent.", image=f"../{n}.png") for n in NAMES])
    write_task(root / "tasks" / "video_cls" / "v2t",
               [dict(text="Name the clip.", video=f"../{n}.mp4") for n in NAMES],
               [dict(text=n) for n in NAMES])


def with_hard_negatives(records):
    """The pairs without names of data sets; three have 1 to 3: texts, other pairs' targets, one its own."""
    pairs = [dict(qry=record["qry"], pos=record["pos"]) for record in records]
    pairs[1]["neg"] = ["nothing red"]
    pairs[2]["neg"] = [pairs[3]["pos"], "nothing at all"]
    pairs[3]["neg"] = []
    pairs[5]["neg"] = [pairs[5]["pos"], pairs[0]["pos"], dict(text="Represent.", image="black bar.png")]
    return pairs


def write_task(folder, queries, documents):
    """Query i has one relevant document, the i-th."""
    folder.mkdir(parents=True)
    write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", **query} for i, query in enumerate(queries)])
    write_lines(folder / "corpus.jsonl", [{"_id": n, **document} for n, document in zip(NAMES, documents)])
    qrels = [f"q{i}\t{n}\t1\n" for i, n in enumerate(NAMES)]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(qrels))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shard(folder):
    """The weights of a checkpoint in three files and an index -> the file of each tensor."""
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    where = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        own = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(own, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return where


def edit_json(path, **changes):
    """Changes keys of a JSON file; a value of None takes the key away."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
