"""Any video file, part of one, or folder of frames -> frames evenly spaced in time, and when each begins."""

import bisect
import contextlib
import itertools
import math
import os
import re
import warnings
from collections import namedtuple
from dataclasses import dataclass, replace

import av
import numpy as np
from PIL import Image

from files.errors import DataError, lfs_hint, quote
from files.frames import display_matrix, rgb_of_frame, upright
from files.pictures import DECODER_ERRORS, frame_files, load_image, MAX_PIXELS, to_rgb
from files.sampling import evenly_spaced, frames_taken

VIDEO_SUFFIXES = tuple(  # a clip of any other name can be given, too; a folder is searched for these
    ".mp4 .m4v .mov .qt .3gp .3gpp .3g2 .f4v .mj2 .mkv .mk3d .webm .avi .divx .flv .wmv .asf .ogv .ogm .mpg "
    ".mpeg .mpe .m1v .m2v .mpv .m2p .vob .ts .m2t .m2ts .mts .tp .trp .mxf .dv .rm .rmvb .ivf .y4m .h264 "
    ".264 .hevc .h265 .265".split())
SUFFIXES_OF_TEXT = (".ts", ".mts")  # of TypeScript's sources, too
# Four packets of an MPEG transport stream: each begins with a G; with or without a time or check bytes
TRANSPORT_STREAM = re.compile(b"|".join(b"G(.{%d}G){3}" % (size - 1) for size in (188, 192, 204)), re.S)
VIDEO_OPTIONS = {  # a playlist must not open other files or addresses
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,flv,asf,ogg,"
                        "h264,hevc,ivf,yuv4mpegpipe,mxf,dv,rm"}
SEES_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # these keep it in a second picture beside each frame


@dataclass(frozen=True)
class Part:
    """Of a video file what is shown from second `start` to right before `end`; its first frame is at 0.

    fps: frames a second that are taken; None: as of every clip.
    """

    video: str
    start: float = 0.0
    end: float = math.inf
    fps: float | None = None

    def __str__(self):
        if (self.start, self.end) == (0, math.inf):
            return self.video
        return f"{self.video} ({self.start:g} - {self.end:g} s)"


def is_clip_file(path):
    """Whether a file is a clip by its suffix and, where sources of TypeScript have that, by its content."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES_OF_TEXT:
        return suffix in VIDEO_SUFFIXES
    try:
        with open(path, "rb") as f:
            head = f.read(8192)
    except OSError:  # decoding it will say why
        return True
    return b"\0" in head and TRANSPORT_STREAM.search(head) is not None  # text may have a G in every line


def load_clip(source, count, frame_rate=2.0, fps=0.0):
    """A clip -> at most `count` RGB Pillow images, evenly spaced in time from the first frame to the last.

    And in seconds when each of them begins, counted from the first one's begin, and when the clip ends.
    source: a video file, a `Part` of one, a folder of frame files (natural order), or a list of what
    `load_image` takes.  frame_rate: frames a second where the source does not tell.
    fps: frames a second that are taken, up to `count`, as `frames_taken`; 0: `count` of every clip.
    A clip with fewer frames gives all it has.  Frames of a file are shown as a player does: turned, mirrored
    and stretched as the file asks for; where they are transparent they are white.  Decoding keeps only the
    chosen frames in memory.
    """
    if count < 1:
        raise DataError(f"num_frames {count}: a clip needs at least 1")
    is_list = isinstance(source, (list, tuple))
    if is_list or not isinstance(source, Part) and os.path.isdir(source):
        frames = source if is_list else frame_files(source)
        if not frames:
            raise DataError(f"{quote(source)}: a clip given as frames, but there is no frame in it")
        chosen = evenly_spaced(len(frames), frames_taken(len(frames), frame_rate, count, fps))
        return [load_image(frames[i]) for i in chosen], [i / frame_rate for i in (*chosen, len(frames))]
    part = source if isinstance(source, Part) else Part(source)
    try:
        return decode_clip(part, count, frame_rate, fps if part.fps is None else part.fps)
    except DECODER_ERRORS as e:  # FFmpegError is an OSError or ValueError
        raise DataError(f"{source}: cannot be used as a video: {e}{lfs_hint(part.video)}") from e


def load_frames(source, count):
    """The frames of `load_clip` alone."""
    frames, _ = load_clip(source, count)
    return frames


def decode_clip(part, count, frame_rate, fps):
    """The headers say when each frame is shown; those nearest to `count` evenly spaced times are decoded.

    With fps they are evenly spaced by their numbers, as Qwen3-VL has it; else by their times.
    What lies between two of them is jumped over where a key frame stands there.  Where the frames then do not
    come at the times of their headers, all are decoded.
    """
    source = part.video
    with av.open(source, options=VIDEO_OPTIONS) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise DataError("no video track in this file")
        size, codec = (stream.codec_context.width, stream.codec_context.height), stream.codec_context.name
        shape = display_size(*size, stream.sample_aspect_ratio)
        track = read_headers(container, stream, source)
    times = times_within(track, part)
    if fps:
        rate = frame_rate if track.start is None else track.rate
        taken = frames_taken(len(times), rate, count, fps)
        wanted = [times[i] for i in evenly_spaced(len(times), taken)]
    else:
        wanted = times if len(times) <= count else np.linspace(times[0], times[-1], count)
    # the last of them ends where the next one begins
    end = [*track.times, track.end][bisect.bisect(track.times, times[-1])]
    unit = 1 / frame_rate if track.start is None else track.unit
    matrix = first_matrix(source, track) if track.decoder else None  # that decoder does not pass it on

    def shown(frame):
        nonlocal matrix
        if matrix is None:  # once: the side data of a frame keep it in memory until garbage is collected
            matrix = display_matrix(frame)
        image = rgb_of_frame(frame, codec)
        if shape != size:
            image = image.resize(shape, Image.BICUBIC)
        return to_rgb(upright(image, matrix))

    def decoded(track):
        frames, begin = [], []
        for time, frame in nearest_frames(source, track, wanted):
            frames.append(shown(frame))
            begin.append(time)
        return frames, [round((time - times[0]) * unit, 6) for time in (*begin, end)]

    if len(track.keys) > 1:
        with contextlib.suppress(*DECODER_ERRORS):  # among them: DataError
            return decoded(track)
    return decoded(replace(track, keys=[]))


def display_size(width, height, aspect):
    """Size at which stored frames are shown: the smaller side grows.  aspect: of a pixel."""
    aspect = float(aspect or 1)
    if width * height > MAX_PIXELS:
        raise DataError(f"frames of {width}x{height} pixels, the limit is {MAX_PIXELS:,}")
    if not 1 / 200 < aspect < 200 or width * height * max(aspect, 1 / aspect) > MAX_PIXELS:
        raise DataError(f"frames of {width}x{height} pixels, each {aspect:g} times as wide as it is high: "
                        "too large when shown")
    if aspect < 1:
        return width, round(height / aspect)
    return round(width * aspect), height


def first_matrix(source, track):
    """The `display_matrix` that FFmpeg's own decoder gives the first frame."""
    with av.open(source, options=VIDEO_OPTIONS) as container:
        frame = next(container.decode(container.streams[track.index]), None)
        return frame and display_matrix(frame)


@dataclass
class Track:
    """What the headers of a video track say; times in its own unit."""

    index: int  # of the track in the file
    first: int  # number of its first key frame's packet
    start: int | None  # that one's time; None where a header lacks its time: then frames are counted
    times: list  # of all frames that are shown, sorted
    keys: list  # of the key frames among them, sorted
    end: float  # when the last frame is no longer shown
    unit: float  # in seconds
    rate: float  # frames a second
    decoder: str | None  # another one than FFmpeg's own


Header = namedtuple("Header", "time duration is_key is_discarded")  # of a packet


def read_headers(container, stream, source):
    """The headers of all packets -> Track.

    What comes before the first key frame, in the file or on the screen, depends on frames that are missing.
    """
    headers = [Header(p.pts, p.duration or 0, p.is_keyframe, p.is_discard)
               for p in container.demux(stream) if p.size]  # empty packets flush
    first = next((n for n, header in enumerate(headers) if header.is_key), 0)
    start = headers[first].time if headers else None
    shown = [header for header in headers[first:] if not header.is_discarded]
    if start is None or any(header.time is None for header in shown):
        start, times, keys, end = None, list(range(len(shown))), [], len(shown)
    else:
        shown = [header for header in shown if header.time >= start]
        times = sorted(header.time for header in shown)
        keys = sorted(header.time for header in shown if header.is_key)
        end = max((header.time + header.duration for header in shown), default=0)
    if not times:
        raise DataError("no frames in the video track")
    if start is not None and container.duration and not container.streams.audio:
        seconds, promised = float(end * stream.time_base), container.duration / av.time_base
        if seconds < 0.8 * promised:
            warnings.warn(f"{source}: {promised:.1f} s promised, but the frames end after {seconds:.1f} s "
                          "(cut off?); using these")
    if end == times[-1]:  # the header says no duration: the last frame is shown as long as the others
        end += (times[-1] - times[0]) / max(1, len(times) - 1)
    tags = {name.lower(): value for name, value in stream.metadata.items()}
    decoder = SEES_ALPHA.get(stream.codec_context.name) if tags.get("alpha_mode") == "1" else None
    unit = float(stream.time_base)
    rate = float(stream.average_rate or len(times) / (max(1, end - times[0]) * unit))
    return Track(stream.index, first, start, times, keys, end, unit, rate, decoder)


def times_within(track, part):
    """The times of the frames that begin in a part; where none does, of the one that is shown meanwhile."""
    if part.start == 0 and part.end == math.inf:
        return track.times
    if track.start is None:
        raise DataError("a part of it is wanted, but the file does not say when its frames are shown")
    seconds = [round((time - track.times[0]) * track.unit, 6) for time in track.times]
    begin, end = bisect.bisect_left(seconds, part.start), bisect.bisect_left(seconds, part.end)
    if begin < end:
        return track.times[begin:end]
    length = (track.end - track.times[0]) * track.unit
    if part.start >= length:
        raise DataError(f"the part begins at {part.start:g} s, and the clip ends after {length:.2f} s")
    return track.times[begin - 1 : begin]


def nearest_frames(source, track, wanted):
    """For each of the sorted times in `wanted` the decoded (time, frame) nearest to it; of two the later."""
    with av.open(source, options=VIDEO_OPTIONS) as container:
        frames = timed_frames(container, track)
        before, now = None, next(frames, None)  # two neighbours, (time, frame) each
        for time in wanted:
            if track.keys:
                right = nearest_time(track.times, time)
                key = track.keys[bisect.bisect(track.keys, right) - 1]
                if now is not None and now[0] < key:
                    frames = timed_frames(container, track, key)
                    before, now = None, next(frames, None)
            while now is not None and now[0] < time:
                before, now = now, next(frames, None)
            neighbours = [frame for frame in (now, before) if frame is not None]
            if not neighbours:
                raise DataError("no frames could be decoded")
            found = min(neighbours, key=lambda frame: abs(frame[0] - time))
            if track.keys and found[0] != right:
                raise DataError(f"a frame at {found[0]} instead of {right}")
            yield found


def nearest_time(times, wanted):
    """The one of the sorted times that is nearest; of two the later one."""
    n = bisect.bisect_left(times, wanted)
    neighbours = times[max(0, n - 1) : n + 1]
    return min(reversed(neighbours), key=lambda time: abs(time - wanted))


def timed_frames(container, track, key=None):
    """Decode a track -> (time, frame) from its first key frame on, or from the one whose time is `key`."""
    stream, skip, start = container.streams[track.index], track.first, track.start
    decoder = av.CodecContext.create(track.decoder, "r") if track.decoder else stream.codec_context
    if key is not None:
        container.seek(key, stream=stream)
        skip, start = 0, key
    packets = container.demux(stream)
    packets = (p for p in packets if p.size or p.dts is None)  # without dts: the last one, which flushes
    packets = itertools.islice(packets, skip, None)
    if key is not None:
        packet = next(packets, None)
        if packet is None or packet.pts != key:
            raise DataError(f"no packet at {key} where the file was asked for it")
        packets = itertools.chain([packet], packets)
    for i, frame in enumerate(frame for packet in packets for frame in decoder.decode(packet)):
        time = i if start is None or frame.pts is None else frame.pts
        if start is not None and time < start:
            continue
        if frame.is_corrupt:
            raise DataError(f"frame {i} is corrupt")
        yield time, frame
