"""The pages of a PDF file as pictures, one by one; needs pypdfium2."""

import contextlib
import math

from files.errors import DataError
from files.pictures import DECODER_ERRORS, MAX_PIXELS

BROKEN_PAGES = 1000  # after so many in a row that cannot be drawn the rest of a file is left out


def pages(file, area, first=1):
    """The pages of a PDF file as pictures of about `area` pixels, each drawn when it is asked for.

    In the place of one that cannot be drawn comes a DataError that says why.
    """
    import pypdfium2

    errors, broken = (pypdfium2.PdfiumError, *DECODER_ERRORS), 0
    try:
        with contextlib.closing(pypdfium2.PdfDocument(file)) as document:
            document.init_forms()  # before any page: what is in the fields of a form is drawn, too
            if not len(document):
                raise DataError("it has no pages")
            for number in range(first - 1, len(document)):
                try:
                    page = draw_page(document, number, area)
                except errors as e:
                    page = DataError(f"cannot be drawn: {e}")
                broken = broken + 1 if isinstance(page, DataError) else 0
                if broken > BROKEN_PAGES:  # the file may promise any number of pages
                    raise DataError(f"page {number + 1} of {len(document)} and {BROKEN_PAGES} in front of it "
                                    "cannot be drawn; the rest is left out")
                yield page
    except errors as e:
        raise DataError(f"{file}: cannot be used as a PDF file: {e}") from e


def draw_page(document, number, area):
    """One page, counted from 0, as a picture of about `area` pixels."""
    page = document[number]
    width, height = page.get_size()  # in points; a scale of 4 is 288 dots an inch
    scale = min(4, math.sqrt(area / max(1, width * height)))
    pixels = (width * scale + 1) * (height * scale + 1)
    if not pixels <= MAX_PIXELS:
        raise DataError(f"{width:g}x{height:g} points are {pixels:,.0f} pixels, the limit is {MAX_PIXELS:,}")
    image = page.render(scale=scale).to_pil()
    page.close()
    return image
