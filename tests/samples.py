"""Files that the tests read: pictures, clips, records, a folder of them; a checkpoint's files, changed."""

import json
import os
import zlib
from fractions import Fraction

import av
import numpy as np
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


def png(side, colour_type, bits, *chunks):
    """The bytes of a square PNG with these (kind, body) behind its header."""
    header = side.to_bytes(4, "big") * 2 + bytes([bits, colour_type, 0, 0, 0])
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        out += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return out


# Colour type and bits of a PNG; four pixels of the transparent colour and of the dark one as stored; the key
# (tRNS); the dark colour in 8 bits
KEYED = {
    "one colour of 8 bits": (2, 8, b"\x5a" * 12, b"\x28" * 12, b"\0\x5a" * 3, 40),
    "one colour of 16 bits": (2, 16, b"\x5a\x11" * 12, b"\x28\x28" * 12, b"\x5a\x11" * 3, 40),
    "one grey of 16 bits": (0, 16, b"\x5a\x5a" * 4, b"\x28\x28" * 4, b"\x5a\x5a", 40),
    "one grey of 8 bits": (0, 8, b"\x5a" * 4, b"\x28" * 4, b"\0\x5a", 40),
    "one grey of 4 bits": (0, 4, b"\xaa\xaa", b"\x22\x22", b"\0\x0a", 34),
    "one grey of 2 bits": (0, 2, b"\x55", b"\x00", b"\0\x01", 0),
}


def half_clear(folder):
    """8x8 pixels, stored in every way: the left half is clear, over a grey that must not show."""
    image = Image.new("RGBA", (8, 8), (40, 40, 40, 255))
    image.paste((90, 90, 90, 0), (0, 0, 4, 8))
    palette, grey_alpha = image.quantize(4), image.convert("LA")
    for stored in (image, image.convert("RGBa"), palette, grey_alpha, grey_alpha.convert("La")):
        yield stored.mode, stored, 40
    yield "an array", np.asarray(image), 40
    for name, stored in (("whole.png", image), ("whole.gif", image), ("palette.png", palette)):
        stored.save(folder / name)
        yield name, folder / name, 40
    for name, (colour_type, bits, clear, dark, key, shade) in KEYED.items():
        rows = zlib.compress((b"\0" + clear + dark) * 8)
        (folder / name).write_bytes(png(8, colour_type, bits, (b"tRNS", key), (b"IDAT", rows)))
        yield name, folder / name, shade


def write_clip(path, frames, rate=8, codec="mpeg4", stamps=None, aspect=None, audio=0, **options):
    """A clip with a key frame every twelve frames, as FFmpeg's default is.

    stamps: the time of each frame in units of 1/rate seconds; None: one unit apart.  aspect: of one pixel.
    audio: seconds of silence.  options: the codec's own.
    """
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        sound = out.add_stream("aac", rate=8000) if audio else None
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        stream.codec_context.gop_size = 12
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = stamps[i] if stamps else i, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        for i in range(audio * 8):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), "fltp", "mono")
            silence.pts, silence.rate = 1000 * i, 8000
            out.mux(sound.encode(silence))
        if audio:
            out.mux(sound.encode(None))


REPLY = "<think>Because. So.</think><answer>yes</answer>"


def turns(text, reply=REPLY):
    """One question and its reply."""
    return [{"from": "human", "value": text}, {"from": "gpt", "value": reply}]


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
    """The pairs without names of data sets; three have 1 to 3: texts, other pairs' targets, one its own.

    Two have the same query.
    """
    pairs = [dict(qry=record["qry"], pos=record["pos"]) for record in records]
    pairs[1]["neg"] = ["nothing red"]
    pairs[2]["neg"] = [pairs[3]["pos"], "nothing at all"]
    pairs[3]["neg"] = []
    pairs[7]["qry"] = pairs[2]["qry"]
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
