"""What `import engine` finds when a command of this folder is started as a file: how it is started instead.

Python then looks for modules here first.  tools/engine.py is a link to this file.
"""

import shlex
import sys
from pathlib import Path

script = Path(sys.argv[0]).resolve()
command = [sys.orig_argv[0], "-m", f"{script.parent.name}.{script.stem}", *sys.argv[1:]]
raise SystemExit(f"error: {sys.argv[0]} is a module of PLUME, which is started so:\n"
                 f"PYTHONPATH={shlex.quote(str(script.parents[1]))} {shlex.join(command)}")
