"""What the tools that draw share.  They draw with matplotlib, an extra: pip install matplotlib."""

import importlib.util

from files.errors import DataError
from files.writing import writable, writing


def check_output(flag, png, json_file):
    """Raises DataError, before any long work, where no picture can be drawn or no file written."""
    if not png.lower().endswith(".png") or not writable(png) or not writable(json_file):
        raise DataError(f"--{flag} {png!r} must end in .png; it and --json {json_file!r} must be files in "
                        "folders that exist")
    found = importlib.util.find_spec("matplotlib")
    if not (found and found.origin):  # a folder of that name is found, too: without origin
        raise DataError(f"--{flag} {png} is drawn with a package that is not there: pip install matplotlib")


def new_figure(width, height, panels=1):
    """A figure of width x height pixels -> (figure, its panels from left to right)"""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    figure = Figure((width / 100, height / 100), dpi=100, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def save_figure(figure, path):
    with writing(path, "wb") as f:
        figure.savefig(f, format="png")
