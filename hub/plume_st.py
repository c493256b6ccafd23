"""PLUME for sentence-transformers: save_pretrained copies this file into every checkpoint.

    model = SentenceTransformer("out/checkpoint", trust_remote_code=True)

It finds PLUME's folder; the rest is there, in engine/sentence_transformers.py.
"""

import importlib.util
import os
import sys

given = os.environ.get("PLUME_HOME")
files = [os.path.join(folder, "hub", "isolated.py") for folder in ([given] if given else sys.path)]
found = [file for file in files if os.path.isfile(file)]
if not found:
    state = f"is {given!r}, where there is no hub/isolated.py" if given else "is not set"
    raise ModuleNotFoundError("this checkpoint needs PLUME's own code, no older than the checkpoint: set the "
                              "environment variable PLUME_HOME to the folder with PLUME's model.py "
                              f"(PLUME_HOME {state})")
spec = importlib.util.spec_from_file_location("plume_isolated", found[0])
isolated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(isolated)


class PlumeEmbedder(isolated.load("engine.sentence_transformers").PlumeEmbedder):
    """The only module of its SentenceTransformer; here, so that its name leads to this file."""

    Plume = isolated.load("model").Plume
