"""Pictures and clips from anywhere: right pixels, or one error that names the file."""

import gc
import io
import json
import math
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from backbones.families import BACKBONES, Limits
from backbones.shapes import SHAPES
from backbones.vision import normalised
from data import patchify, target_size
from files import clips
from files.clips import is_clip_file, load_frames, Part
from files.errors import DataError
from files.named import warn_of_file_names
from files.pictures import IMAGE_FORMATS, IMAGE_SUFFIXES, load_image
from model import Plume
from test_plume import assert_close, HERE, SHARED
from tests.samples import half_clear, NAMES, picture, tiff, write_clip

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")


def pixels_of(image):
    """What `load_image` shows, as numbers that can be subtracted."""
    return np.asarray(load_image(image)).astype(int)


def shades(frames, step):
    """Which of the shades 0, step, 2 * step ... each frame has."""
    return [round(np.asarray(frame).mean() / step) for frame in frames]


def equal(frames, others):
    return [np.asarray(a).tobytes() for a in frames] == [np.asarray(b).tobytes() for b in others]


def grey(shade, size=(64, 64)):
    return Image.new("RGB", size, (shade,) * 3)


def grey_clip(path, levels, size=(64, 64), codec="libx264", **options):
    """Grey frames, ten a second, a key frame every twelve."""
    write_clip(path, [grey(level, size) for level in levels], 10, codec, **options)


@pytest.mark.parametrize("size", [
    (112, 112), (97, 65), (28, 28), (1, 1), (13, 2000), (640, 480), (300, 31), (56, 84)])
def test_pixels_equal_transformers_pil_processor(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for low, high in ((56 * 56, 28 * 28 * 1280), (28 * 28, 28 * 28 * 16), (28 * 28 * 20, 28 * 28 * 40)):
        theirs = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)(image, return_tensors="pt")
        ours, grid = patchify([image], target_size(*image.size, low, high))
        assert tuple(theirs["image_grid_thw"][0].tolist()) == grid
        assert_close(normalised(torch.from_numpy(ours)), theirs["pixel_values"], "pixels")


def test_video_patches_are_pairs_of_frames_in_the_layout_of_pictures():
    frames = [picture(*name.split(), (64, 64)) for name in NAMES[::4]]  # 3: the last one is repeated
    size = target_size(*frames[0].size, 28 * 28, 28 * 28 * 9)
    ours, grid = patchify(frames, size)
    assert grid == (2, 4, 4)
    ours = ours.reshape(2, 16, 3, 2, 14, 14)
    alone = [patchify([frame], size)[0].reshape(16, 3, 2, 14, 14) for frame in frames]
    for t, (a, b) in enumerate(((0, 1), (2, 2))):
        assert_close(ours[t, :, :, 0], alone[a][:, :, 0], "first of the pair")
        assert_close(ours[t, :, :, 1], alone[b][:, :, 1], "second of the pair")
    _, grid = patchify([frames[0], picture("red", "bar", (200, 90))], size)
    assert grid == (1, 4, 4)  # another size takes the first frame's


def test_frames_are_chosen_by_time_from_first_to_last(tmp_path):
    frames = [grey(4 * i) for i in range(60)]
    even, still = str(tmp_path / "a.mp4"), str(tmp_path / "b.mkv")
    write_clip(even, frames)
    assert shades(load_frames(even, 8), 4) == pytest.approx(np.linspace(0, 59, 8), abs=1.6)
    assert shades(load_frames(even, 100), 4) == pytest.approx(range(60), abs=1.2)

    write_clip(still, frames[:12], stamps=[*range(11), 80])  # the last frame but one stands long
    by_time = [0, 10, 10, 11, 11]  # at 0, 20, 40, 60, 80
    assert shades(load_frames(still, 5), 4) == pytest.approx(by_time, abs=1.2)

    assert shades(load_frames(frames, 4), 4) == [0, 20, 39, 59]
    assert len(load_frames(frames[:1], 4)) == 1


def test_unusual_pictures_become_plain_rgb(tmp_path):
    size = (120, 80)
    rgb = picture("red", "circle", size)
    reference = pixels_of(rgb)
    turned = Image.Exif()
    turned[274] = 6
    more = [picture("blue", "bar", size, at) for at in (0, 5, 9)]
    for name, image, tolerance, options in (
        ("cmyk.jpg", rgb.convert("CMYK"), 6, dict(quality=95)),
        ("turned.jpg", rgb.rotate(90, expand=True), 6, dict(quality=95, exif=turned)),
        ("png_as.jpg", rgb, 0.1, dict(format="PNG")),
        ("palette.png", rgb.convert("P"), 12, {}),
        ("moving.gif", rgb, 12, dict(save_all=True, append_images=more, duration=100)),
    ):
        image.save(tmp_path / name, **options)
        got = pixels_of(str(tmp_path / name))
        assert got.shape == reference.shape and np.abs(got - reference).mean() < tolerance, name
    assert len(load_frames(str(tmp_path / "moving.gif"), 8)) == 4

    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256).repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    got = pixels_of(str(tmp_path / "grey16.png"))
    assert_close(got[0, :, 0], np.arange(256), "16-bit ramp", 1)


def test_arrays_bytes_and_open_files_are_pictures_like_files(model, world):
    path = world / "red bar.png"
    content = path.read_bytes()
    every_second = memoryview(bytes(byte for byte in content for _ in range(2)))[::2]
    array = np.asarray(Image.open(path).convert("RGB"))
    views = [array, array[:, ::-1][:, ::-1], np.asfortranarray(array)]
    expected = model.encode([{"image": str(path)}])
    with open(path, "rb") as file:
        sources = [*views, content, bytearray(content), every_second, io.BytesIO(content), file, file,
                   Image.open(path), path]
        items = [{"image": source} for source in sources]
        bare = [source for source in sources if isinstance(source, (np.ndarray, Image.Image, Path))]
        for many in (items, bare):
            got = model.encode(many, batch_size=4)
            assert_close(got, np.repeat(expected, len(many), 0), "pictures", 1e-6)

    clip = str(world / "red bar.mp4")
    frames = [np.asarray(frame) for frame in load_frames(clip, 16)]
    assert_close(model.encode([{"video": frames}]), model.encode([{"video": clip}]), "frames as arrays", 1e-6)


def test_what_is_no_picture_is_an_error_of_few_words(model):
    closed, text = open(HERE / "model.py", "rb"), open(HERE / "model.py")
    closed.close()
    shapes = (9, 9), (9, 9, 2), (9, 9, 5), (0, 9, 3), (2, 9, 9, 3)
    for source, why in (
        *((np.zeros(shape, np.uint8), "shape") for shape in shapes),
        (np.zeros((9, 9, 3), np.float32), "float32"), (torch.zeros(9, 9, 3), "got Tensor"),
        (7, "got int"), ([[]], "got list"),
        (b"", "0 bytes"), (io.BytesIO(b"x"), "1 bytes"), (b"<html>" * 99, "no picture.*<html>"),
        (text, "mode 'rb'"), (closed, "closed"), ("", "empty path"), (Path(""), "does not exist"),
    ):
        with pytest.raises(DataError, match=f"item 0: image.*{why}") as error:
            model.encode([{"image": source}])
        assert len(str(error.value)) < 400
    text.close()


def test_what_is_transparent_is_white_however_it_is_stored(tmp_path):
    for name, stored, dark in half_clear(tmp_path):
        got = pixels_of(stored)
        assert (got[:, :4] == 255).all(), name
        assert np.abs(got[:, 4:] - dark).max() <= 2, name


# (a, b, c, d) of the display matrix; what a player shows; as EXIF calls it
ORIENTATIONS = [
    ((1, 0, 0, 1), lambda x: x, 1), ((-1, 0, 0, 1), lambda x: x[:, ::-1], 2),
    ((-1, 0, 0, -1), lambda x: x[::-1, ::-1], 3), ((1, 0, 0, -1), lambda x: x[::-1], 4),
    ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2), 5), ((0, 1, -1, 0), lambda x: np.rot90(x, -1), 6),
    ((0, -1, -1, 0), lambda x: x[::-1, ::-1].transpose(1, 0, 2), 7), ((0, -1, 1, 0), np.rot90, 8)]


def ffmpeg_frame(path):
    """The first frame as ffmpeg turns it, or None where no ffmpeg is installed."""
    if shutil.which("ffmpeg") is None:
        return None
    command = "ffmpeg -v error -i FILE -frames:v 1 -f image2pipe -c:v png -".split()
    command[4] = str(path)
    written = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return np.asarray(Image.open(io.BytesIO(written)))


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_frames_are_turned_and_mirrored_by_the_whole_display_matrix(tmp_path, suffix):
    frames, path = [picture("red", "bar", (64, 48), -9)] * 2, str(tmp_path / f"clip.{suffix}")
    frames[0].paste("blue", (0, 30, 20, 48))
    write_clip(path, frames)
    stored = np.asarray(load_frames(path, 1)[0])
    for (a, b, c, d), turn, _ in ORIENTATIONS:
        expected = turn(stored)
        same = [(a, b, c, d), (2 * a, 2 * b, 2 * c, 2 * d), (a + 1e-3, b, c, d - 1e-3)]
        for matrix in same[:1] if suffix == "mkv" else same:  # Matroska has an angle and a mirror
            write_clip(path, frames, matrix=matrix)
            got = np.asarray(load_frames(path, 1)[0])
            assert got.shape == expected.shape and (got == expected).all(), matrix
        theirs = ffmpeg_frame(path)
        assert theirs is None or (got == theirs).all(), matrix
    for matrix in ((0, 0, 0, 0), (1, 1, 1, 1), (1, 0, 0, 0)):  # these say nothing
        write_clip(path, frames, matrix=matrix)
        assert (np.asarray(load_frames(path, 1)[0]) == stored).all(), matrix
    write_clip(tmp_path / "wide.mov", frames, matrix=(0, 2, 1, 0))
    assert load_frames(str(tmp_path / "wide.mov"), 1)[0].size == (96, 64)  # the pixels are not square, too


def test_pictures_and_frames_obey_all_eight_orientations_of_exif(tmp_path):
    image = picture("red", "bar", (64, 48), -9)
    stored, clip = np.asarray(image), str(tmp_path / "clip.avi")
    for _, turn, number in ORIENTATIONS:
        for kind, options in (("PNG", {}), ("TIFF", {}), ("TIFF", dict(compression="tiff_lzw")),
                              ("WEBP", dict(lossless=True)), ("JPEG", dict(quality=95))):
            exif, file = Image.Exif(), io.BytesIO()
            exif[274] = number
            image.save(file, kind, exif=exif, **options)
            got, expected = np.asarray(load_image(file)).astype(int), turn(stored).astype(int)
            assert got.shape == expected.shape and np.abs(got - expected).mean() < 3, (kind, number)
        with av.open(clip, "w") as out:  # of the last one
            stream = out.add_stream("mjpeg", rate=5)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 5)
            out.mux(packet)
        frame = np.asarray(load_frames(clip, 1)[0]).astype(int)
        assert frame.shape == got.shape and np.abs(frame - got).mean() < 3, number


CLEAR_CLIPS = [  # tolerance of the colours
    ("mov", "qtrle", "argb", 0), ("mov", "png", "rgba", 0), ("mov", "prores_ks", "yuva444p10le", 3),
    ("mkv", "ffv1", "bgra", 0), ("mkv", "ffv1", "yuva420p", 6), ("avi", "utvideo", "gbrap", 0),
    ("webm", "libvpx-vp9", "yuva420p", 9), ("webm", "libvpx", "yuva420p", 9)]


@pytest.mark.parametrize("suffix, codec, pixels, tolerance", CLEAR_CLIPS)
def test_what_is_transparent_in_a_clip_is_white_as_in_a_picture(tmp_path, suffix, codec, pixels, tolerance):
    path, frames = str(tmp_path / f"clip.{suffix}"), []
    for n in range(40):
        image = Image.new("RGBA", (96, 64), (40 + 4 * n,) * 3 + (255,))
        image.paste((10, 10, 10, 0), (0, 0, 32, 64))
        image.paste((200, 40, 60, 128), (32, 0, 64, 64))
        frames.append(image)
    options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    write_clip(path, frames, 10, codec, pixels=pixels, matrix=suffix == "webm" and (0, 1, 1, 0), **options)
    shown = load_frames(path, 4)  # with jumps
    for frame, n in zip(shown, (0, 13, 26, 39), strict=True):
        got, expected = pixels_of(frame), pixels_of(frames[n])
        if suffix == "webm":
            expected = expected.transpose(1, 0, 2)
        assert np.abs(got - expected).mean() <= tolerance / 3 and (got[:20, :20] > 253).all()
    assert equal(load_frames(frames[:1], 1), [load_image(frames[0])])


def test_what_an_uncompressed_clip_does_not_use_is_not_transparency(tmp_path):
    """Of the 32 bits of a pixel 8 are unused in AVI files, and mostly 0."""
    frames = [Image.new("RGBA", (64, 48), (200, 40, 60, 0))] * 2
    write_clip(tmp_path / "clip.avi", frames, codec="rawvideo", pixels="bgra")
    assert (pixels_of(load_frames(str(tmp_path / "clip.avi"), 1)[0]) == (200, 40, 60)).all()
    image = Image.new("RGBA", (64, 48))
    image.paste("red", (0, 0, 20, 20))
    image.save(tmp_path / "clip.gif", save_all=True, append_images=[Image.new("RGBA", (64, 48), "blue")])
    first = pixels_of(load_frames(str(tmp_path / "clip.gif"), 2)[0])
    assert (first[40:] == 255).all() and (first[:20, :20] == (255, 0, 0)).all()


def expected_grey(values, largest):
    """What a picture of these values shows, where 0 is black."""
    return np.repeat(values[..., None] / largest * 255, 3, 2)


@pytest.mark.parametrize("packed", [False, True])
def test_tiff_pictures_have_the_range_of_their_bits_and_the_zero_of_their_photometric_tag(packed):
    shown = set()
    for bits in (1, 2, 4, 8, 10, 12, 14, 16):
        values = np.random.default_rng(bits).integers(0, 2**bits, (6, 9))
        values[0, :3] = 0, 2**bits - 1, 2 ** (bits - 1)
        for photometric in (0, 1):
            expected = expected_grey(values, 2**bits - 1)
            if photometric == 0:
                expected = 255 - expected
            for order in "<>":
                source = tiff(values, bits, photometric, order, packed)
                try:
                    got = pixels_of(source)
                except DataError as e:
                    assert "Pillow does not read" in str(e)
                    continue
                assert np.abs(got - expected).max() <= 1, (bits, photometric, order)
                shown.add((bits, photometric, order))
    assert {(12, 1, "<"), (16, 0, "<"), (16, 1, ">"), (16, 1, "<")} <= shown and len(shown) >= 20
    values = np.random.default_rng(0).integers(0, 256, (6, 8))
    for bits in (8, 16):
        with pytest.raises(DataError, match="signed pixels have no fixed range"):
            load_image(tiff(values, bits, 1, "<", packed, {339: 2}))
    if not packed:
        with pytest.raises(DataError, match="separate planes, of a kind that Pillow reads wrong"):
            load_image(tiff(values % 16, 4, 1, more={284: 2}))


def test_pictures_of_the_ppm_kind_have_the_range_that_they_name():
    for largest in (1, 100, 255, 256, 1023, 4095, 65535):
        for kind, samples in ((2, 1), (3, 3), (5, 1), (6, 3)):  # 2 and 3 are text
            values = np.random.default_rng(largest).integers(0, largest + 1, (6, 9, samples))
            values.flat[:2] = 0, largest
            body = values.astype(">u2" if largest > 255 else "u1").tobytes()
            if kind < 5:
                body = " ".join(map(str, values.flat)).encode()
            got = pixels_of(b"P%d 9 6 %d\n" % (kind, largest) + body)
            assert np.abs(got - values / largest * 255).max() <= 1, (largest, kind)


@pytest.mark.parametrize("shape, limits, why", [
    ("tiny", dict(max_pixels=0), "max_pixels 0: needs a whole number of at least 1"),
    ("tiny", dict(num_frames=True), "frames.* True"), ("tiny", dict(max_pixels=1e6), "max_pixels.* 1000000"),
    ("tiny", dict(video_max_pixels=100), "is above video_max_pixels 100"),
    ("tiny", dict(min_pixels=1, max_pixels=783), "max_pixels 783: needs a whole number of at least 784"),
    ("tiny3", dict(video_min_pixels=1, video_max_pixels=1023), "video_max_pixels 1023: .* at least 1024"),
])
def test_limits_that_make_no_sense_are_refused(shape, limits, why):
    backbone = BACKBONES[SHAPES[shape].get("backbone", "qwen2_vl")]
    with pytest.raises(DataError, match=why):
        Limits(**SHAPES[shape]["limits"] | limits).check(backbone)
    with pytest.raises(DataError, match=why):
        Plume.random(["red"], shape, limits=limits)
    token = backbone.side**2
    Limits(min_pixels=1, max_pixels=token, video_min_pixels=1, video_max_pixels=token).check(backbone)


def test_sizes_of_nothing_or_of_too_much_are_clear_errors(model):
    for size in ((0, 10), (10, 0), (0, 0)):
        with pytest.raises(DataError, match=f"item 0: .*{size[0]}x{size[1]} pixels"):
            model.encode([{"image": Image.new("RGB", size)}])
        with pytest.raises(DataError, match="at least 1x1"):
            target_size(*size, 784, 7840)
    with pytest.raises(DataError, match="max_pixels 783: needs at least 784"):
        target_size(30, 30, 784, 783)
    with pytest.raises(DataError, match="200 to 1"):
        target_size(4000, 10, 3136, 50176)
    with pytest.raises(DataError, match="num_frames 0"):
        load_frames([picture("red", "bar")], 0)
    for aspect in (Fraction(1, 100_000), Fraction(100_000)):
        with pytest.raises(DataError, match="too large when shown"):
            clips.display_size(64, 48, aspect)


@pytest.mark.parametrize("aspect, shape", [
    (None, (64, 48)), (Fraction(1), (64, 48)), (Fraction(2), (128, 48)), (Fraction(1, 2), (64, 96)),
    (Fraction(64, 45), (91, 48))])
def test_frames_have_the_shape_in_which_a_player_shows_them(tmp_path, aspect, shape):
    path = tmp_path / "clip.mkv"
    grey_clip(path, range(0, 200, 20), (64, 48), aspect=aspect)
    frames = load_frames(str(path), 3)
    assert [frame.size for frame in frames] == [shape] * 3
    assert shades(frames, 1) == pytest.approx([0, 90, 180], abs=12)


@pytest.mark.parametrize("codec, options, suffix", [
    ("libx264", {}, "mkv"), ("libx264", {}, "mp4"), ("libx264", {}, "ts"),
    ("mpeg2video", dict(bf="2"), "mpg"), ("mpeg2video", dict(bf="2"), "mkv"), ("mpeg4", dict(bf="2"), "avi")])
def test_frames_in_front_of_the_first_key_frame_do_not_count(tmp_path, codec, options, suffix):
    """A recording that begins in the middle: what depends on frames that are missing is not shown."""
    whole, cut = str(tmp_path / "whole.mkv"), str(tmp_path / f"cut.{suffix}")
    grey_clip(whole, range(0, 240, 6), codec=codec, **options)
    with av.open(whole) as source, av.open(cut, "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(source.streams.video[0]) if packet.size][5:]
        key = next(packet for packet in packets if packet.is_keyframe)
        first = round(float(key.pts * key.time_base) * 10)
        for packet in packets:
            packet.stream = stream
            out.mux(packet)
    assert 0 < first < 20
    assert shades(load_frames(cut, 100), 6) == pytest.approx(range(first, 40), abs=1.1)
    assert shades(load_frames(cut, 5), 6) == pytest.approx(np.linspace(first, 39, 5), abs=1.2)


@pytest.fixture
def decoded(monkeypatch):
    """(key, time) of every frame that is decoded; key: time of the key frame that was jumped to, or None."""
    frames, timed_frames = [], clips.timed_frames

    def watched(container, track, key=None):
        for time, frame in timed_frames(container, track, key):
            frames.append((key, time))
            yield time, frame

    monkeypatch.setattr(clips, "timed_frames", watched)
    return frames


def decoded_through(path, count, monkeypatch):
    """The frames as they come without a jump."""
    read_headers = clips.read_headers
    with monkeypatch.context() as m:
        m.setattr(clips, "read_headers", lambda *args: replace(read_headers(*args), keys=[]))
        return load_frames(path, count)


@pytest.mark.parametrize("suffix, codec, options", [
    ("mp4", "libx264", dict(bf="0")),
    ("mp4", "libx264", dict(bf="3")),  # shown in another order; the file has an edit list
    ("mkv", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12"}),
    ("ts", "libx264", dict(bf="2")), ("mpg", "mpeg2video", dict(bf="2")),
    ("avi", "mpeg4", {}), ("webm", "libvpx-vp9", {}),
    ("mkv", "libx264", dict(stamps=[*range(60), *range(100, 160, 3), *range(400, 520)])),  # variable rate
    ("mp4", "libx264", dict(stamps=[*range(7, 207)])),  # begins later
    ("mp4", "libx264", dict(audio=2)), ("mp4", "libx264", dict(audio=40)),  # 40: longer than the pictures
])
def test_jumping_to_key_frames_gives_the_frames_of_decoding_through(
        suffix, codec, options, tmp_path, decoded, monkeypatch):
    path = str(tmp_path / f"clip.{suffix}")
    grey_clip(path, range(20, 220), codec=codec, **options)
    for count in (1, 2, 3, 5, 8, 16, 64, 500):
        frames = load_frames(path, count)
        jumped = len(decoded)
        assert equal(frames, decoded_through(path, count, monkeypatch)), count
        through = len(decoded) - jumped
        decoded.clear()
        if count == 5 and suffix in ("mp4", "mkv"):  # in the others not every key frame can be asked for
            assert jumped < 100 < 200 == through


def test_where_a_jump_lands_wrong_all_frames_are_decoded(tmp_path, decoded, monkeypatch):
    path, timed_frames = str(tmp_path / "clip.mp4"), clips.timed_frames
    grey_clip(path, range(20, 220))
    right = load_frames(path, 5)
    assert any(key is not None for key, _ in decoded)

    def one_late(container, track, key=None):
        for time, frame in timed_frames(container, track, key):
            yield time + (key is not None), frame

    monkeypatch.setattr(clips, "timed_frames", one_late)
    decoded.clear()
    assert equal(load_frames(path, 5), right)
    assert decoded[-1][0] is None and len(decoded) > 200


@needs_shared
@pytest.mark.filterwarnings("ignore:.*promised")
@pytest.mark.parametrize("folder", ["nasty", "real_dev/videos/real"])
def test_jumping_changes_no_frame_of_real_clips(folder, decoded, monkeypatch):
    print("using", SHARED / folder)
    videos = [path for path in (SHARED / folder).iterdir() if path.suffix in clips.VIDEO_SUFFIXES]
    for path in [str(path) for path in videos if path.name not in NASTY_ERRORS]:
        assert equal(load_frames(path, 8), decoded_through(path, 8, monkeypatch)), path
    assert any(key is not None for key, _ in decoded)


@pytest.mark.parametrize("suffix, options", [
    ("mp4", {}), ("mkv", {}), ("webm", dict(codec="libvpx-vp9")), ("mp4", dict(stamps=[*range(7, 207)]))])
def test_a_part_of_a_clip_has_the_frames_that_begin_in_it_or_the_one_shown_meanwhile(
        suffix, options, tmp_path):
    path = str(tmp_path / f"clip.{suffix}")
    grey_clip(path, range(20, 220), **options)
    whole = load_frames(path, 500)
    for start, end in ((0, 20), (0, 1), (2.4, 2.5), (3.7, 11.2), (19.9, 20), (12, math.inf), (7.25, 7.45)):
        first, last = math.ceil(10 * start), math.ceil(10 * min(end, 20))  # ten frames a second
        assert equal(load_frames(Part(path, start, end), 500), whole[first:last]), (start, end)
    windows = [load_frames(Part(path, start, start + 3), 500) for start in range(0, 20, 3)]
    assert equal([frame for frames in windows for frame in frames], whole)
    few = load_frames(Part(path, 4, 8), 3)
    assert equal(few[::2], [whole[40], whole[79]])
    assert equal([few[1]], [whole[59]]) or equal([few[1]], [whole[60]])  # both are as near to 5.95 s
    with pytest.raises(DataError, match=r"clip\.\w+ .*begins at 20\.5 s, and the clip ends after 20"):
        load_frames(Part(path, 20.5, 30), 3)
    grey_clip(path, [40, 120, 200], **options | dict(stamps=[0, 10, 80]))  # the second from 1 to 8 s
    assert equal(load_frames(Part(path, 3, 5), 8), load_frames(path, 3)[1:2])


def test_items_may_be_parts_of_clips(model, tmp_path):
    path = str(tmp_path / "clip.mp4")
    grey_clip(path, [20] * 20 + [220] * 20)
    items = [{"video": path, "text": "why?"} | part
             for part in ({}, dict(start=0, end=2), dict(end=2), dict(start=2), dict(start=0, end=100))]
    whole, begin, same, end, long = model.encode(items)
    assert_close(begin, same, "without a start")
    assert_close(whole, long, "the whole clip")
    assert min(np.abs(begin - end).max(), np.abs(begin - whole).max()) > 1e-3
    every = model.encode([items[0] | dict(fps=fps) for fps in (0, 100, 1.5)])  # 16 of 40 frames, 16, 6
    assert_close(every[0], whole, "fps 0")
    assert np.abs(every[2] - whole).max() > 1e-3
    marked = {"video": Path(path), "start": 2, "text": "<video>why?"}
    assert_close(model.encode([marked])[0], model.encode([items[3]])[0], "with a marker")
    for bad, why in (
            (dict(video=[path], start=1), "and 'fps' belong to a 'video' that is a file, not ["),
            (dict(video=str(tmp_path), end=1), "belong to a video file"),
            (dict(video=path, start=2, end=1), "'start' 2, 'end' 1: need 0 <= start < end"),
            (dict(video=path, start=-1), "need 0 <= start < end"),
            (dict(video=path, end=math.nan), "need 0 <= start < end"),
            (dict(video=path, start="1"), "are seconds, got '1'"),
            (dict(video=path, fps="2"), "'fps' is frames a second, or 0 for num_frames of them, got '2'"),
            (dict(video=path, fps=math.nan), "got nan"), (dict(video=path, fps=True), "got True")):
        with pytest.raises(DataError, match=re.escape(why)):
            model.encode([bad])


def test_a_folder_of_frames_is_in_natural_order_and_takes_every_suffix_that_a_picture_may_have(tmp_path):
    formats = {"a1.jpeg": "JPEG", "a2.JFIF": "JPEG", "a9.avif": "AVIF", "a10.jpe": "JPEG", "e.ppm": "PPM",
               "g.PNG": "PNG", "h.tif": "TIFF", "i.webp": "WEBP"}
    formats = {name: kind for name, kind in formats.items() if kind in IMAGE_FORMATS}
    for i, (name, kind) in enumerate(formats.items()):
        grey(20 * i, (32, 32)).save(tmp_path / name, kind)
    for name in ("notes.txt", "._a.jpeg", "program.eps"):
        (tmp_path / name).write_text("no frame")
    assert shades(load_frames(str(tmp_path), 99), 20) == list(range(len(formats)))


def test_broken_pictures_are_errors_that_name_the_file(tmp_path):
    picture("red", "circle", (320, 200)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    Image.new("1", (9500, 9500)).save(tmp_path / "huge.png")  # valid, and few bytes
    for name, body, why in (
        ("cut.jpg", content[: len(content) // 2], "truncated"),
        ("page.jpg", b"<html>404</html>", "cannot"),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot"),
        ("huge.png", None, "9500x9500 pixels, the limit"),
        ("float.tiff", None, "32-bit"),
        ("nothing.jpg", None, "No such"),
    ):
        if body is not None:
            (tmp_path / name).write_bytes(body)
        with pytest.raises(DataError, match=f"{name}.*({why})"):
            load_image(str(tmp_path / name))
    for lazy in ("cut.jpg", "huge.png"):
        with Image.open(tmp_path / lazy) as image, pytest.raises(DataError):
            load_image(image)


def test_broken_clips_are_errors_that_name_the_file(world, tmp_path):
    clip = (world / "red bar.mp4").read_bytes()
    half = len(clip) // 2
    (tmp_path / "cut.mp4").write_bytes(clip[:half])
    (tmp_path / "zeros.mp4").write_bytes(clip.replace(clip[100:half], b"\0" * (half - 100)))
    (tmp_path / "dir").mkdir()
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{world / 'red bar.mp4'}'\n")
    for name in ("cut.mp4", "zeros.mp4", "dir", "nothing.mp4", "list.ffconcat"):
        with pytest.raises(DataError, match=name):
            load_frames(str(tmp_path / name), 8)


CONTAINERS = [
    ("3gp", "libx264", "3gp"), ("3g2", "libx264", "3g2"), ("qt", "libx264", "mov"), ("f4v", "libx264", "mp4"),
    ("divx", "mpeg4", "avi"), ("flv", "flv", "flv"), ("wmv", "wmv2", "asf"), ("asf", "wmv1", "asf"),
    ("ogv", "libvpx", "ogg"), ("m2v", "mpeg2video", "mpeg2video"), ("vob", "mpeg2video", "vob"),
    ("ts", "libx264", "mpegts"), ("MTS", "libx264", "mpegts"), ("m2ts", "libx264", "mpegts"),
    ("mxf", "mpeg2video", "mxf"), ("y4m", "wrapped_avframe", "yuv4mpegpipe")]


def test_clips_are_known_by_every_suffix_and_typescript_is_none(tmp_path):
    for suffix, codec, container in CONTAINERS:
        path = str(tmp_path / f"clip.{suffix}")
        muxing = {"mpegts_m2ts_mode": "1"} if "2" in suffix and "ts" in suffix else {}
        frames = [grey(level) for level in range(40, 200, 8)]
        write_clip(path, frames, 25, codec, container=(container, muxing))
        assert is_clip_file(path), suffix
        assert shades(load_frames(path, 5), 8) == pytest.approx([5, 10, 15, 19, 24], abs=1), suffix
    sources = ["", "Go", "G" * 900, "GB: 1,\n" * 900, "\ufeffexport const G = 'G'\n" * 99]
    for n, source in enumerate(sources):
        for suffix in (".ts", ".mts"):
            path = tmp_path / f"{n}{suffix}"
            path.write_text(source, encoding="utf-8")
            assert not is_clip_file(str(path)), source[:9]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(warn_of_file_names([str(path), "x"])) == [str(path), "x"]
    with pytest.warns(UserWarning, match="name of a file"):
        list(warn_of_file_names([str(tmp_path / "clip.ts")]))
    assert {".jfif", ".jpe", ".tif", ".pgm", ".pnm", ".bmp", ".webp", ".mpo"} <= {*IMAGE_SUFFIXES}


NASTY = SHARED / "nasty"
NASTY_ERRORS = (
    "truncated.jpg header_only.jpg zero_byte.png text_as.jpg bomb_60000x60000.png bomb_12000x12000.png "
    "float32.tiff extreme_10x4000.png extreme_4000x10.jpg truncated.mp4 bitrot.mp4 undecodable.mp4 "
    "zero_byte.mp4 zero_frames.mkv audio_only.mp4 frames_empty_dir does_not_exist.jpg").split()
NASTY_FRAMES = {
    "one_frame.mp4": 1, "three_frames.mp4": 3, "odd_size_97x65.mkv": 8, "gray.mkv": 8, "frames_mixed": 4,
    "animated.gif": 6, "long_600_frames.mp4": 600, "truncated.mkv": 9} | dict.fromkeys(
    "plain.mp4 vfr.mkv vp9.webm av1.webm h264.mkv mpeg4.avi tenbit.mkv vertical_rotated.mp4".split(), 16)


@needs_shared
def test_all_nasty_files_do_what_a_good_loader_does_and_have_the_right_pixels(model):
    print("using", NASTY)
    cases = json.loads((NASTY / "nasty.json").read_text())
    assert len(cases) == 48
    for name, kind in ((case["file"], case["kind"]) for case in cases):
        path, kind = str(NASTY / name), "image" if kind == "image" else "video"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if name in NASTY_ERRORS:
                with pytest.raises(DataError) as error:
                    model.processor.media(kind, path)
                assert name in str(error.value), name
                continue
            pixels, (t, h, w), _ = model.processor.media(kind, path)
        assert pixels.dtype == np.uint8 and len(pixels) == t * h * w > 0, name
        assert not said or name == "truncated.mkv", (name, [str(warning.message) for warning in said])
        if name in NASTY_FRAMES:
            assert len(load_frames(path, 1000)) == NASTY_FRAMES[name], name
            assert len(load_frames(path, 8)) == min(8, NASTY_FRAMES[name]), name
    reference = pixels_of(str(NASTY / "rgb_reference.png"))
    for name in ("cmyk.jpg", "exif_rot6.jpg", "exif_bad.jpg", "photo.webp", "progressive.jpg"):
        got = pixels_of(str(NASTY / name))
        assert got.shape == reference.shape and np.abs(got - reference).mean() < 12, name
    assert (pixels_of(str(NASTY / "all_transparent.png")) == 255).all()
    ramp = pixels_of(str(NASTY / "gray16.png"))
    assert ramp.min() < 10 and ramp.max() > 245 and len(np.unique(ramp)) > 50
    assert load_frames(str(NASTY / "vertical_rotated.mp4"), 8)[0].size == (64, 96)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted on Linux")
def test_decoded_frames_keep_no_threads_for_which_a_forked_process_would_wait(tmp_path):
    grey_clip(str(tmp_path / "a.mp4"), range(0, 240, 20), size=(256, 256))
    load_frames(str(tmp_path / "a.mp4"), 4)
    gc.collect()
    gc.disable()
    before = len(os.listdir("/proc/self/task"))
    try:
        load_frames(str(tmp_path / "a.mp4"), 8)
        assert len(os.listdir("/proc/self/task")) <= before
    finally:
        gc.enable()
