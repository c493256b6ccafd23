"""Files that the tests read: pictures, clips, records, a folder of them; a checkpoint's files, changed."""

import json
import os
import shutil
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
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


def tiff(values, bits, photometric, order="<", packed=False, more={}):
    """The bytes of a grey TIFF file.  values: (height, width); order: of bytes, < or >; more: other tags."""
    height, width = values.shape
    digits = values[..., None] >> np.arange(bits)[::-1] & 1
    rows = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
    if bits == 16 and order == "<":
        rows = rows.reshape(height, -1, 2)[..., ::-1]
    body = zlib.compress(rows.tobytes()) if packed else rows.tobytes()
    body += b"\0" * (len(body) % 2)
    tags = {256: width, 257: height, 258: bits, 259: 8 if packed else 1, 262: photometric, 273: 8, 277: 1,
            278: height, 279: len(body)} | more
    entries = [struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(tags.items())]
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(body))
    return head + body + struct.pack(order + "H", len(tags)) + b"".join(entries) + bytes(4)


def pdf(*kids, fields=b"", more=()):
    """The bytes of a PDF file.  kids: its pages, objects from 10 on; fields: of its form; more: from 5 on.

    Object 4 is a font, F; a page without "/Contents" is white.
    """
    form = b"/AcroForm << /Fields [%s] /DA (/F 24 Tf 0 g) /DR << /Font << /F 4 0 R >> >> >>" % fields
    names = b" ".join(b"%d 0 R" % n for n in range(10, 10 + len(kids)))
    objects = {1: b"<< /Type /Catalog /Pages 2 0 R %s >>" % (form if fields else b""),
               2: b"<< /Type /Pages /Kids [%s] /Count %d >>" % (names, len(kids)),
               4: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"}
    objects |= dict(enumerate(more, 5)) | dict(enumerate(kids, 10))
    out, places = b"%PDF-1.7\n", {}
    for number, body in objects.items():
        places[number] = len(out)
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%d 1\n%010d 00000 n \n" % item for item in places.items())
    end = b"trailer\n<< /Size 99 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return out + b"xref\n0 1\n0000000000 65535 f \n" + table + end


def write_clip(path, frames, rate=8, codec="mpeg4", stamps=None, aspect=None, audio=0, pixels="yuv420p",
               matrix=None, container=(None, {}), **options):
    """A clip with a key frame every twelve frames, as FFmpeg's default is.

    stamps: the time of each frame in units of 1/rate seconds; None: one unit apart.  aspect: of one pixel.
    audio: seconds of silence.  pixels: FFmpeg's name of their format; they may be RGBA.  matrix: (a, b, c, d)
    of the display matrix.  container: FFmpeg's name and options; None: by the suffix.  options: of the codec.
    """
    with av.open(str(path), "w", *container) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        sound = out.add_stream("aac", rate=8000) if audio else None
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate = pixels, 2_000_000
        stream.codec_context.gop_size = 12
        if matrix:
            a, b, c, d = (round(value * 2**16) for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 2**30])
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            if image.mode == "RGBA":
                frame = av.VideoFrame.from_ndarray(np.asarray(image), "rgba")
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


ODD = "\udcff"  # the byte ff in a name, as Python has it: no UTF-8


def odd_folder(parent):
    """A folder whose name is no UTF-8; where there are no such names, the test is skipped."""
    folder = parent / ODD
    try:
        folder.mkdir()
    except OSError as e:
        pytest.skip(f"names are text here: {e}")
    return folder


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


def in_one_space(checkpoint, folder):
    """A copy of a checkpoint that says that its latent and single-pass embeddings are one space."""
    copy = shutil.copytree(checkpoint, folder / "one space")
    block = json.loads((copy / "config.json").read_text())["plume"]
    edit_json(copy / "config.json", plume=block | dict(one_space=True))
    return copy


def with_prompts(checkpoint, folder, **prompts):
    """A copy of a checkpoint, of the same name, that has these prompts."""
    copy = shutil.copytree(checkpoint, folder / checkpoint.name)
    block = json.loads((copy / "config.json").read_text())["plume"]
    edit_json(copy / "config.json", plume=block | dict(prompts=prompts))
    return copy


def edit_json(path, **changes):
    """Changes keys of a JSON file; a value of None takes the key away."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
