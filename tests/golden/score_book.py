"""Writes book_score.json: what the float64 reference scores the demo model at on the first bytes of a book.

The book itself is not part of this repository; tests/launcher/book_cuda.sh knows it by the checksum written here.

Usage: python3 score_book.py FILE [N_BYTES]    20000 bytes take about a quarter of an hour
Needs numpy, safetensors and ml_dtypes.
"""
import hashlib
import json
import math
import os
import sys

import numpy as np

import reference

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 20000
    with open(sys.argv[1], "rb") as f:
        text = f.read(n)
    assert len(text) == n, f"{sys.argv[1]} has {len(text)} bytes, {n} are wanted"
    model = reference.Model(os.path.join(HERE, "../../configs/models/demo"))
    s, nats = reference.Sequence(model), 0.0
    for i, (token, target) in enumerate(zip(text, text[1:])):
        logits = model.step(s, token)
        largest = logits.max()
        nats += largest + math.log(np.exp(logits - largest).sum()) - logits[target]
        if i % 1000 == 999:
            print(f"{i + 1} of {n - 1}: {nats / math.log(2) / (i + 1):.6f} bits per byte", file=sys.stderr, flush=True)
    score = {"bytes": n, "sha256": hashlib.sha256(text).hexdigest(), "tokens": n - 1, "nats": nats,
             "bits_per_byte": nats / math.log(2) / (n - 1), "perplexity": math.exp(nats / (n - 1)),
             "tile_pairs_available": s.stats["available"], "tile_pairs_selected": s.stats["selected"]}
    with open(os.path.join(HERE, "book_score.json"), "w") as f:
        json.dump(score, f, indent=2)
        f.write("\n")


if __name__ == "__main__":
    main()
