"""Any picture -> an upright RGB Pillow image on white; limits are checked before anything is decoded."""

import base64
import io
import os
import re
import struct
import threading
import warnings

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from files.errors import DataError, lfs_hint, quote

MAX_PIXELS = 89_478_485  # of a stored picture or frame; Pillow only warns there, here it is an error
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What Pillow's and FFmpeg's readers raise on broken files, other than their own errors
DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, LookupError, ArithmeticError,
                  EOFError, struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning)
Image.init()
# Others can start programs (EPS)
IMAGE_FORMATS = [f for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if f in Image.OPEN]
IMAGE_SUFFIXES = (
    *(end for end, name in Image.registered_extensions().items() if name in IMAGE_FORMATS),
    ".mpo", ".pjpeg", ".pjp", ".jif")  # JPEG, too
PICTURE = (Image.Image, np.ndarray, bytes, bytearray, memoryview, io.IOBase)  # besides a path
DATA_URI = re.compile(r"data:[\w.+/-]*(?:;[^,]*)?;base64,", re.I)
LOADING = threading.Lock()  # Pillow reads a picture's file late; two threads may be given the same picture


def load_image(source):
    """A path, Pillow image, array, bytes or open file -> RGB Pillow image, upright, on white.

    Animations give their first frame.
    Raises DataError for anything unreadable, truncated, too large, signed or of more than 16 bits.
    """
    try:
        source = as_image(source)
        if isinstance(source, Image.Image):
            with LOADING:
                return to_rgb(source)
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            return to_rgb(image)
    except DECODER_ERRORS as e:
        name = source if isinstance(source, (str, os.PathLike)) else quote(source)
        raise DataError(f"{name}: cannot be used as a picture: {e}{lfs_hint(source)}") from e


def frame_files(folder):
    """The paths of the pictures in a folder, in natural order: frame10 behind frame9."""
    def by_number(name):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    names = [n for n in os.listdir(folder) if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
    return [os.path.join(folder, name) for name in sorted(names, key=by_number)]


def bytes_of_data_uri(uri, where):
    """data:image/png;base64,... -> the bytes of the file"""
    head = DATA_URI.match(uri[:200])
    if not head:
        raise DataError(f"{where}: needs data:image/png;base64,...")
    try:
        return base64.b64decode("".join(uri[head.end() :].split()), validate=True)
    except ValueError as e:
        raise DataError(f"{where}: not base64: {e}") from e


def as_image(source):
    """An array, the bytes of a file, or an open file -> Pillow image; anything else stays as it is.

    An array is (height, width, 3 or 4) of uint8.  Raises DataError, or one of DECODER_ERRORS.
    """
    if not isinstance(source, (str, os.PathLike, *PICTURE)):
        raise DataError(f"needs a path, Pillow image, array, bytes or file, got {type(source).__name__}")
    if isinstance(source, np.ndarray):
        colours = source.shape[2] if source.ndim == 3 else 0
        if source.dtype != np.uint8 or colours not in (3, 4) or not source.size:
            raise DataError(f"an array of {source.dtype} with the shape {source.shape}; "
                            "a picture is uint8, (height, width, 3 or 4)")
        return Image.fromarray(source)
    if isinstance(source, io.IOBase):
        with LOADING:  # the same file may be given twice
            source.seek(0)
            source = source.read()
        if isinstance(source, str):
            raise DataError("a file that is open for text; open it with mode 'rb'")
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = bytes(source)
        try:
            return Image.open(io.BytesIO(source), formats=IMAGE_FORMATS)
        except UnidentifiedImageError as e:
            begin = quote(source[:16])
            raise DataError(f"{len(source)} bytes that are no picture, or one of a kind that Pillow does not "
                            f"read: they begin with {begin}") from e
    return source


def to_rgb(image):
    """Decodes a Pillow image -> RGB, upright, white where it is transparent; 12 or 16-bit grey in 8 bits."""
    if image.width * image.height == 0:
        raise DataError(f"{image.width}x{image.height} pixels: an empty picture")
    if image.width * image.height > MAX_PIXELS:  # before anything is decoded
        raise DataError(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS:,}")
    if type(image) is Image.Image and image.mode == "RGB" and not image.info:  # nothing to decode or to turn
        return image
    check_tiff(tiff_tags(image), image.mode)
    clear, deep = clear_colour(image), grey_range(image)
    try:
        image = ImageOps.exif_transpose(image)
    except (ValueError, TypeError, KeyError):  # a broken EXIF block says nothing about the pixels
        image.load()
    if deep:
        black, white = deep
        shades = (np.arange(2**16) - black) * 255 // (white - black)
        if clear is not None:
            shades[clear] = 255
        return Image.fromarray(shades.clip(0, 255).astype(np.uint8)[np.asarray(image)]).convert("RGB")
    if image.has_transparency_data:
        if clear is not None:
            image.info["transparency"] = clear
        if image.mode == "La":  # Pillow converts it to LA only
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def grey_range(image):
    """The values of black and white in a grey picture of more than 8 bits; None for all others."""
    if image.mode == "I" and image.format == "PPM":  # Pillow scales what is above 255 to 16 bits
        return 0, 65535
    if image.mode in ("F", "I"):
        raise DataError("32-bit pixels have no fixed range; convert to 8 or 16 bit first")
    if not image.mode.startswith("I;16"):
        return None
    tags = tiff_tags(image)
    white = 2 ** max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))) - 1
    return (white, 0) if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else (0, white)


def tiff_tags(image):
    """Of a TIFF file that was opened, {number: value}; {} for all others."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def check_tiff(tags, mode):
    """DataError for a TIFF file that Pillow opens and would show wrong."""
    if 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise DataError("signed pixels have no fixed range; convert to unsigned 8 or 16 bit first")
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2:  # each colour stands alone
        whole_bytes = set(tags.get(TiffImagePlugin.BITSPERSAMPLE, ())) == {8}
        inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        packed = tags.get(TiffImagePlugin.COMPRESSION, 1) != 1
        if mode in ("LA", "La", "PA") or not packed and (inverted or not whole_bytes):
            raise DataError("a TIFF file with separate planes, of a kind that Pillow reads wrong; save it "
                            "with the samples of a pixel side by side")


def clear_colour(image):
    """The one grey or colour that a PNG calls transparent, or None.

    Pillow scales pixels to 8 bits, but not this value; a file that is not read yet tells its bits.
    """
    value = image.info.get("transparency")
    bits = image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    if isinstance(value, int) and bits in ("L;2", "L;4"):
        return value * {"L;2": 85, "L;4": 17}[bits]
    if isinstance(value, tuple) and bits == "RGB;16B":
        return tuple(part >> 8 for part in value)
    return value
