"""--help, wrong flags and Ctrl-C of a command, before it imports torch, which takes seconds.

A command's first line imports engine.threads, and that this.  The command's own module is only beginning to
run then: its class Config is not made yet, so the flags are read in its source.
"""

import ast
import signal
import sys
from pathlib import Path

from engine.flags import end_at_once, one_line_errors, read_flags

HOME = Path(__file__).resolve().parents[1]


def check_command_line():
    """Ends the program where the flags of the command that is starting are wrong, or are --help."""
    main = vars(sys.modules["__main__"])
    file = Path(main.get("__file__") or "none").resolve()
    if file.suffix != ".py" or HOME not in file.parents:
        return  # a user's program, or a test
    if lines := config_lines(file):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, end_at_once)
        one_line_errors(read_flags, lines, sys.argv[1:], main["__doc__"])


def config_lines(file):
    """The source of a module's class Config, behind that of the class above it (train.Config); or none."""
    text = file.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            lines = text.splitlines()[node.lineno : node.end_lineno]
            for above in node.bases:
                lines = config_lines(HOME / f"{above.value.id}.py") + lines
            return lines
    return []
