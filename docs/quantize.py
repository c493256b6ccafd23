"""faiss on embeddings of float32, bytes and bits: their size and hit@1 in turtle world.  In PLUME's folder:

    pip install faiss-cpu sentence-transformers
    PYTHONPATH=$PWD python docs/quantize.py out/checkpoint
"""

import sys

import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss

from model import Plume
from tasks.turtle import World

model, world = Plume.from_pretrained(sys.argv[1]), World("test", "image_ret")
queries = model.encode([query for query, _ in world])
corpus = model.encode([target for _, target in world])  # float32, unit rows
for precision in ("float32", "uint8", "ubinary"):
    small = quantize_embeddings(corpus, precision, calibration_embeddings=corpus)
    hits, _ = semantic_search_faiss(  # the best quantized rows are scored again with the query's full numbers
        queries, small, corpus_precision=precision, calibration_embeddings=corpus, top_k=1,
        rescore=precision != "float32")
    found = np.array([hit[0]["corpus_id"] for hit in hits])
    print(precision, small.nbytes, "bytes, hit@1", (world.target[found] == world.target).mean())
