"""A decoded frame of a clip -> an RGB Pillow image as a player shows it: turned, mirrored, on white."""

import math
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import Type
from PIL import Image

from files.pictures import to_rgb


def rgb_of_frame(frame, codec):
    """The pixels as they are stored; what is transparent is white, as in a picture.

    By one thread: a frame keeps those that have converted it, and a process that is forked afterwards would
    wait for them for ever when it frees the frame.
    """
    parts = frame.format.components
    if not frame.format.has_palette and not any(part.is_alpha for part in parts):
        return frame.to_image(threads=1)
    pixels = frame.to_ndarray(format="rgba", threads=1)
    if codec == "rawvideo" and not pixels[..., 3].any():  # in an AVI file 8 of the 32 bits say nothing
        pixels = pixels[..., :3]
    return to_rgb(Image.fromarray(pixels))


def display_matrix(frame):
    """(a, b, c, d): a step to the right in the stored frame goes by (a, b) on the screen, one down by (c, d).

    On the screen b and d point down, too.
    """
    try:
        side_data = frame.side_data
    except ValueError:  # PyAV has no name for one of them
        side_data = without_unnamed(frame).side_data
    if "DISPLAYMATRIX" not in side_data:
        return 1, 0, 0, 1
    matrix = np.frombuffer(side_data["DISPLAYMATRIX"], np.int32)
    return tuple(matrix[[0, 1, 3, 4]].tolist())


def without_unnamed(frame):
    """The frame without the side data that PyAV has no name for, such as EXIF."""
    graph, named = av.filter.Graph(), {kind.value for kind in Type}
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    drop = [graph.add("sidedata", f"mode=delete:type={n}") for n in range(64) if n not in named]
    graph.link_nodes(source, *drop, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


def upright(image, matrix):
    """A stored frame as a player turns it.  Of the matrix only the turn and the mirror count.

    The sizes in it are in the aspect ratio already; one that makes a line of the frame says nothing.
    """
    a, b, c, d = matrix
    if a * d == b * c:
        return image
    if a * d < b * c:  # mirrored
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    degrees = -math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c)))  # counterclockwise
    quarter = 90 * round(degrees / 90)
    return image.rotate(quarter if abs(degrees - quarter) < 1 else degrees, expand=True)
