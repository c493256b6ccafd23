"""Pictures and clips from anywhere: right pixels, or one error that names the file."""

import io
import json
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
from data import DataError, load_frames, load_image, patchify
from test_plume import HERE, SHARED, COLOURS, SHAPES, assert_close, picture, write_clip, make_model


@pytest.mark.parametrize("size", [(112, 112), (97, 65), (28, 28), (1, 1), (13, 2000), (640, 480), (300, 31), (56, 84)])
def test_pixels_equal_transformers_pil_processor(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for low, high in ((56 * 56, 28 * 28 * 1280), (28 * 28, 28 * 28 * 16), (28 * 28 * 20, 28 * 28 * 40)):
        theirs = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)(image, return_tensors="pt")
        ours, grid = patchify([image], low, high)
        assert tuple(theirs["image_grid_thw"][0].tolist()) == grid
        assert_close(ours, theirs["pixel_values"], "pixels", 1e-6)


def test_video_patches_are_pairs_of_frames_in_the_layout_of_pictures():
    frames = [picture(c, s, (64, 64)) for c, s in zip(COLOURS, SHAPES)]  # 3: the last one is repeated
    ours, grid = patchify(frames, 28 * 28, 28 * 28 * 9)
    assert grid == (2, 4, 4)
    single = [patchify([f], 28 * 28, 28 * 28 * 9)[0].reshape(16, 3, 2, 14, 14) for f in frames]
    ours = ours.reshape(2, 16, 3, 2, 14, 14)
    for t, (a, b) in enumerate(((0, 1), (2, 2))):
        assert_close(ours[t, :, :, 0], single[a][:, :, 0], "first of the pair")
        assert_close(ours[t, :, :, 1], single[b][:, :, 1], "second of the pair")
    mixed, grid = patchify([frames[0], picture("red", "bar", (200, 90))], 28 * 28, 28 * 28 * 9)
    assert grid == (1, 4, 4)  # another size takes the first frame's


def test_frames_are_chosen_by_time_from_first_to_last(tmp_path):
    shades = [Image.new("RGB", (64, 64), (i * 4,) * 3) for i in range(60)]
    write_clip(tmp_path / "a.mp4", shades)
    write_clip(tmp_path / "b.mkv", shades[:12], stamps=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 80])  # then a long still
    at = lambda frames: [round(np.asarray(f).mean() / 4) for f in frames]
    assert at(load_frames(str(tmp_path / "a.mp4"), 8)) == pytest.approx(np.linspace(0, 59, 8), abs=1.6)
    assert at(load_frames(str(tmp_path / "a.mp4"), 100)) == pytest.approx(range(60), abs=1.2)
    assert at(load_frames(str(tmp_path / "b.mkv"), 5)) == pytest.approx([0, 10, 10, 11, 11], abs=1.2)  # by time: 0, 20, 40, 60, 80
    assert at(load_frames(shades, 4)) == [0, 20, 39, 59] and len(load_frames(shades[:1], 4)) == 1
    (tmp_path / "frames").mkdir()
    for i in (10, 9, 2, 1):
        shades[i].save(tmp_path / "frames" / f"f{i}.png")
    assert at(load_frames(str(tmp_path / "frames"), 8)) == [1, 2, 9, 10]  # natural order


def test_unusual_pictures_become_plain_rgb(tmp_path):
    rgb = picture("red", "circle", (120, 80))
    reference = np.asarray(rgb).astype(int)

    def same(name, tolerance, **kw):
        got = np.asarray(load_image(str(tmp_path / name))).astype(int)
        assert got.shape == reference.shape and np.abs(got - reference).mean() < tolerance, name

    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95), same("cmyk.jpg", 6)
    exif = Image.Exif()
    exif[274] = 6
    rgb.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95), same("turned.jpg", 6)
    rgb.save(tmp_path / "png_as.jpg", "PNG"), same("png_as.jpg", 0.1)
    rgb.save(tmp_path / "photo.webp", lossless=True), same("photo.webp", 0.1)
    rgb.convert("P").save(tmp_path / "palette.png"), same("palette.png", 12)
    alpha = Image.fromarray(np.where(reference.min(2, keepdims=True) < 200, reference, 7).astype(np.uint8)).convert("RGBA")  # white turned dark ..
    alpha.putalpha(Image.fromarray((reference.min(2) < 200).astype(np.uint8) * 255))  # .. and transparent
    alpha.save(tmp_path / "alpha.png"), same("alpha.png", 1)
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[picture("blue", "bar", (120, 80), at) for at in (0, 5, 9)], duration=100), same("moving.gif", 12)
    assert len(load_frames(str(tmp_path / "moving.gif"), 8)) == 4
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(load_image(str(tmp_path / "clear.png"))) == 255).all()
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256).repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    assert_close(np.asarray(load_image(str(tmp_path / "grey16.png")))[0, :, 0].astype(int), np.arange(256), "16-bit ramp", 1)
    for mode in ("1", "L", "LA"):
        rgb.convert(mode).save(tmp_path / "mode.png")
        assert_close(np.asarray(load_image(str(tmp_path / "mode.png"))), np.asarray(rgb.convert(mode.strip("A")).convert("RGB")), mode)


def test_arrays_bytes_and_open_files_are_pictures_like_files(model, world, tmp_path):
    path = world / "red bar.png"
    array, expected = np.asarray(Image.open(path).convert("RGB")), model.encode([{"image": str(path)}])
    clear = np.dstack([np.zeros_like(array), np.zeros(array.shape[:2], np.uint8)])
    with open(path, "rb") as file:
        twice = bytes(byte for byte in path.read_bytes() for _ in range(2))
        given = [array, array[:, ::-1][:, ::-1], np.asfortranarray(array), path.read_bytes(), bytearray(path.read_bytes()), memoryview(twice)[::2],
                 io.BytesIO(path.read_bytes()), file, file, Image.open(path), path]
        for many in ([{"image": source} for source in given], [source for source in given if isinstance(source, (np.ndarray, Image.Image, Path))]):
            assert_close(model.encode(many, batch_size=4), np.repeat(expected, len(many), 0), "pictures", 1e-6)
        frames = [np.asarray(f) for f in load_frames(str(world / "red bar.mp4"), 16)]
        assert_close(model.encode([{"video": frames}]), model.encode([{"video": str(world / "red bar.mp4")}]), "frames as arrays", 1e-6)
    assert (np.asarray(load_image(clear)) == 255).all() and np.array_equal(np.asarray(load_image(path.read_bytes())), array)
    closed = open(path, "rb")
    closed.close()
    text = open(HERE / "model.py")
    for source, why in ((np.zeros((9, 9), np.uint8), "shape"), (np.zeros((9, 9, 2), np.uint8), "shape"), (np.zeros((2, 9, 9, 3), np.uint8), "shape"),
                        (np.zeros((9, 9, 3), np.float32), "float32"), (np.zeros((0, 9, 3), np.uint8), "shape"), (np.zeros((9, 9, 5), np.uint8), "shape"),
                        (b"", "0 bytes"), (b"<html>" * 99, "no picture.*<html>"), (io.BytesIO(b"x"), "1 bytes"), (text, "mode 'rb'"), (closed, "closed"),
                        (torch.zeros(9, 9, 3), "got Tensor"), (7, "got int"), ([], "got list"), ("", "empty path"), (Path(""), "does not exist")):
        with pytest.raises(DataError, match=f"item 0: image.*{why}") as error:
            model.encode([{"image": source}] if not isinstance(source, list) else [{"image": [source]}])
        assert len(str(error.value)) < 400
    text.close()


COLOUR_KEYS = {  # colour type and bits of a PNG -> the transparent colour and the dark one as stored, the key, bytes of 4 pixels
    "one colour of 8 bits": (2, 8, b"\x5a" * 12, b"\x28" * 12, b"\0\x5a" * 3), "one colour of 16 bits": (2, 16, b"\x5a\x11" * 12, b"\x28\x28" * 12, b"\x5a\x11" * 3),
    "one grey of 16 bits": (0, 16, b"\x5a\x5a" * 4, b"\x28\x28" * 4, b"\x5a\x5a"), "one grey of 8 bits": (0, 8, b"\x5a" * 4, b"\x28" * 4, b"\0\x5a"),
    "one grey of 4 bits": (0, 4, b"\xaa\xaa", b"\x22\x22", b"\0\x0a"), "one grey of 2 bits": (0, 2, b"\x55", b"\x00", b"\0\x01"),
}


@pytest.mark.parametrize("how", ["RGBA", "RGBa", "LA", "La", "PA", "palette in memory", "palette in a PNG", *COLOUR_KEYS, "GIF", "WEBP", "TIFF"])
def test_what_is_transparent_is_white_in_every_encoding(how, tmp_path):
    image = Image.new("RGBA", (8, 8), (40, 40, 40, 255))
    image.paste((90, 90, 90, 0), (0, 0, 4, 8))  # the left half is clear, over a grey that must not show
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    if how in ("RGBa", "LA"):
        shown = image.convert(how)
    elif how == "La":
        shown = image.convert("LA").convert("La")
    elif how == "PA":
        shown = Image.new("PA", (8, 8))
        shown.putpalette([90] * 3 + [40] * 3)
        for x, y in np.ndindex(8, 8):
            shown.putpixel((x, y), (0, 0) if x < 4 else (1, 255))
    elif how.startswith("palette"):
        shown = image.quantize(4)
        if how.endswith("PNG"):
            shown.save(tmp_path / "p.png")
            shown = str(tmp_path / "p.png")
    elif how in COLOUR_KEYS:
        kind, bits, clear, dark, key = COLOUR_KEYS[how]
        rows = (b"\0" + clear + dark) * 8
        header = (8).to_bytes(4, "big") * 2 + bytes([bits, kind, 0, 0, 0])
        shown = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    elif how in ("GIF", "WEBP", "TIFF"):
        image.save(tmp_path / "x", how, **(dict(lossless=True) if how == "WEBP" else {}))
        shown = str(tmp_path / "x")
    else:
        shown = image
    got = np.asarray(load_image(shown)).astype(int)
    assert (got[:, :4] == 255).all() and np.abs(got[:, 4:] - {"one grey of 4 bits": 34, "one grey of 2 bits": 0}.get(how, 40)).max() <= 2


def test_sizes_and_limits_of_nothing_are_clear_errors(model):
    for limits, why in ((dict(max_pixels=0), "max_pixels 0: needs a whole number of at least 784"), (dict(num_frames=0), "num_frames 0"),
                        (dict(video_max_pixels=100), "video_max_pixels 100"), (dict(max_len=0), "max_len 0"), (dict(min_pixels=-1), "min_pixels -1"),
                        (dict(max_pixels=1e6), "max_pixels 1000000.0"), (dict(max_pixels="big"), "max_pixels 'big'"), (dict(num_frames=True), "num_frames True"),
                        (dict(min_pixels=9999, max_pixels=2000), "min_pixels 9999 is above max_pixels 2000")):
        with pytest.raises(DataError, match=why):
            data.Limits(**limits)
        if all(type(v) is int for v in limits.values()):
            with pytest.raises(DataError, match=why):
                make_model(limits=limits)
    for size in ((0, 10), (10, 0), (0, 0)):
        with pytest.raises(DataError, match=f"item 0: .*{size[0]}x{size[1]} pixels"):
            model.encode([{"image": Image.new("RGB", size)}])
        with pytest.raises(DataError, match="at least 1x1"):
            data.target_size(*size, 784, 7840)
    for most in (0, -5, 783):
        with pytest.raises(DataError, match=f"max_pixels {most}: needs at least 784"):
            data.target_size(30, 30, 784, most)
    with pytest.raises(DataError, match="num_frames 0"):
        load_frames([picture("red", "bar")], 0)


def encode_clip(path, shades, size=(64, 64), aspect=None, codec="libx264", **options):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options=options)
        (stream.width, stream.height), stream.pix_fmt, stream.codec_context.gop_size = size, "yuv420p", 12
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, shade in enumerate(shades):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (shade,) * 3))
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_have_the_shape_in_which_a_player_shows_them(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    for aspect, shape in ((None, (64, 48)), (Fraction(2), (128, 48)), (Fraction(1, 2), (64, 96)), (Fraction(64, 45), (91, 48)), (Fraction(1), (64, 48))):
        encode_clip(path, range(0, 200, 20), (64, 48), aspect)
        frames = load_frames(str(path), 3)
        assert [f.size for f in frames] == [shape] * 3
        assert [round(np.asarray(f).mean()) for f in frames] == pytest.approx([0, 90, 180], abs=12)
    assert data.display_size(720, 576, Fraction(16, 15)) == (768, 576) and data.display_size(720, 480, Fraction(8, 9)) == (720, 540)
    for aspect in (Fraction(1, 100_000), Fraction(100_000)):
        with pytest.raises(DataError, match="too large when shown"):
            data.display_size(64, 48, aspect)


@pytest.mark.parametrize("codec, options, suffix", [("libx264", {}, "mkv"), ("libx264", {}, "mp4"), ("libx264", {}, "ts"), ("mpeg2video", dict(bf="2"), "mpg"),
                                                    ("mpeg2video", dict(bf="2"), "mkv"), ("mpeg4", dict(bf="2"), "avi")])
def test_frames_in_front_of_the_first_key_frame_do_not_count(tmp_path, codec, options, suffix):
    """A recording that begins in the middle: what hangs on frames that are not there is not in the clip, and no error."""
    encode_clip(tmp_path / "whole.mkv", range(0, 240, 6), codec=codec, **options)
    with av.open(str(tmp_path / "whole.mkv")) as source, av.open(str(tmp_path / f"cut.{suffix}"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(source.streams.video[0]) if p.size][5:]
        key = next(p for p in packets if p.is_keyframe)
        first = round(float(key.pts * key.time_base) * 10)
        for packet in packets:
            packet.stream = stream
            out.mux(packet)
    at = lambda count: [round(np.asarray(f).mean() / 6) for f in load_frames(str(tmp_path / f"cut.{suffix}"), count)]
    assert 0 < first < 20 and at(100) == pytest.approx(range(first, 40), abs=1.1)
    assert at(5) == pytest.approx(np.linspace(first, 39, 5), abs=1.2)


def test_a_folder_of_frames_takes_every_suffix_that_a_picture_may_have(tmp_path):
    formats = {"a.jpeg": "JPEG", "b.JFIF": "JPEG", "c.jpe": "JPEG", "d.avif": "AVIF", "e.ppm": "PPM", "f.pgm": "PPM", "g.PNG": "PNG", "h.tif": "TIFF", "i.webp": "WEBP"}
    formats = {name: kind for name, kind in formats.items() if kind in data.IMAGE_FORMATS}
    for i, (name, kind) in enumerate(formats.items()):
        Image.new("L" if name == "f.pgm" else "RGB", (32, 32), 20 * i if name == "f.pgm" else (20 * i,) * 3).save(tmp_path / name, kind)
    for name in ("notes.txt", "._a.jpeg", "program.eps"):
        (tmp_path / name).write_text("no frame")
    assert [round(np.asarray(f).mean() / 20) for f in load_frames(str(tmp_path), 99)] == list(range(len(formats)))


def test_broken_media_are_errors_that_name_the_file(world, tmp_path):
    rgb = picture("red", "circle", (320, 200))
    rgb.save(tmp_path / "whole.jpg")
    bytes_ = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(bytes_[: len(bytes_) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = chunk(b"IHDR", (12000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{world / 'red bar.mp4'}'\n")
    Image.new("1", (9500, 9500)).save(tmp_path / "huge.png")  # valid, and few bytes
    for name, why in (("cut.jpg", "truncated"), ("empty.png", "cannot"), ("page.jpg", "cannot"), ("float.tiff", "32-bit"), ("bomb.png", "12000x12000 pixels, the limit"), ("huge.png", "9500x9500 pixels, the limit"),
                      ("program.eps", "cannot"), ("nothing.jpg", "No such")):
        with pytest.raises(DataError, match=f"{name}.*({why})"):
            load_image(str(tmp_path / name))
    for lazy in ("cut.jpg", "huge.png"):
        with Image.open(tmp_path / lazy) as image, pytest.raises(DataError):
            load_image(image)
    clip = (world / "red bar.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "zeros.mp4").write_bytes(clip.replace(clip[100 : len(clip) // 2], b"\0" * (len(clip) // 2 - 100)))
    (tmp_path / "dir").mkdir()
    for name in ("cut.mp4", "empty.mp4", "zeros.mp4", "dir", "nothing.mp4", "list.ffconcat"):
        with pytest.raises(DataError, match=name):
            load_frames(str(tmp_path / name), 8)
    with pytest.raises(DataError, match="200 to 1"):
        patchify([Image.new("RGB", (4000, 10))], 3136, 50176)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_all_nasty_files_do_what_a_good_loader_does(model):
    folder = SHARED / "nasty"
    print("using", folder)
    errors = {"truncated.jpg", "header_only.jpg", "zero_byte.png", "text_as.jpg", "bomb_60000x60000.png", "bomb_12000x12000.png", "float32.tiff", "extreme_10x4000.png",
              "extreme_4000x10.jpg", "truncated.mp4", "bitrot.mp4", "undecodable.mp4", "zero_byte.mp4", "zero_frames.mkv", "audio_only.mp4", "frames_empty_dir", "does_not_exist.jpg"}
    frames = {"plain.mp4": 16, "one_frame.mp4": 1, "three_frames.mp4": 3, "vfr.mkv": 16, "vp9.webm": 16, "av1.webm": 16, "h264.mkv": 16, "mpeg4.avi": 16, "odd_size_97x65.mkv": 8,
              "tenbit.mkv": 16, "gray.mkv": 8, "long_600_frames.mp4": 600, "vertical_rotated.mp4": 16, "frames_mixed": 4, "truncated.mkv": 9}
    reference = np.asarray(load_image(str(folder / "rgb_reference.png"))).astype(int)
    cases = json.loads((folder / "nasty.json").read_text())
    assert len(cases) == 48
    for case in cases:
        path, kind = str(folder / case["file"]), case["kind"]
        load = lambda: model.processor.media("image" if kind == "image" else "video", path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if case["file"] in errors:
                with pytest.raises(DataError) as error:
                    load()
                assert case["file"] in str(error.value), case["file"]
                continue
            pixels, (t, h, w) = load()
        assert np.isfinite(pixels).all() and len(pixels) == t * h * w > 0, case["file"]
        assert not said or case["file"] == "truncated.mkv", (case["file"], [str(s.message) for s in said])
        if case["file"] in frames:
            assert len(load_frames(path, 1000)) == frames[case["file"]] and len(load_frames(path, 8)) == min(8, frames[case["file"]]), case["file"]
    for name, tolerance in (("cmyk.jpg", 12), ("exif_rot6.jpg", 12), ("exif_bad.jpg", 12), ("photo.webp", 12), ("progressive.jpg", 12)):
        got = np.asarray(load_image(str(folder / name))).astype(int)
        assert got.shape == reference.shape and np.abs(got - reference).mean() < tolerance, name
    assert load_frames(str(folder / "vertical_rotated.mp4"), 8)[0].size == (64, 96)
    assert len(load_frames(str(folder / "animated.gif"), 8)) == 6
    assert (np.asarray(load_image(str(folder / "all_transparent.png"))) == 255).all()
    ramp = np.asarray(load_image(str(folder / "gray16.png")))
    assert ramp.min() < 10 and ramp.max() > 245 and len(np.unique(ramp)) > 50
