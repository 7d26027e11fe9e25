"""Mistakes that are easy to make in an implementation, and the golden cases that notice them.

Each is a change to the text of reference.py. A case notices it when the logits move by more than NOTICED, in the
Euclidean norm over all tokens, relative to the right ones. Run through make_golden.py --mistakes; every mistake must be noticed.
"""
import os
import types

import numpy as np
from safetensors.numpy import load_file

NOTICED = 3e-5  # float32 stays within 1e-6 (measured), so a test whose bound is 1e-5 sees all of them

# (what is done wrong, then pairs of a text in reference.py and its replacement)
MISTAKES = [
    ("features: no +1 in the exponential branch (ELU instead of ELU + 1)", "np.exp(np.minimum(x, 0.0)))", "np.exp(np.minimum(x, 0.0)) - 1.0)"),
    ("key gate forgotten", "pk = gate[j] * elu1(k[j])", "pk = elu1(k[j])"),
    ("key gate inside the feature map", "pk = gate[j] * elu1(k[j])", "pk = elu1(gate[j] * k[j])"),
    ("decay_temperature forgotten", ' / c["decay_temperature"]', ""),
    ("key gate on the value as well", "a.open.append((pk, v[j], a.c))", "a.open.append((pk, gate[j] * v[j], a.c))"),
    ("decay_temperature inside the sigmoid", 'log_g = log_sigmoid(w', 'log_g = log_sigmoid(1.0 / c["decay_temperature"] * (w', '.bias"]) / c["decay_temperature"]', '.bias"]))'),
    ("a key is decayed by its own token's gate", "a.open.append((pk, v[j], a.c))", "a.open.append((pk, v[j], a.c - log_g[j]))"),
    ("selected state not decayed inside the open tile (no e^c_n)", "math.exp(a.c) * (pq @ a.S), math.exp(a.c) * (pq @ a.z)", "pq @ a.S, pq @ a.z"),
    ("e^c_n and e^-c_m as two float32 factors", "m = math.exp(a.c - c_j) *", "m = float(np.exp(np.float32(a.c)) * np.exp(np.float32(-c_j))) *"),
    ("tile states not decayed to the query tile", "sum((math.exp(a.E - a.tiles[u][2]) * a.tiles[u][0]", "sum((a.tiles[u][0]"),
    ("normalizer_eps forgotten", "y[i] = num / (den + neps)", "y[i] = num / den"),
    ("normalizer_eps twice: once per partial denominator", "den + neps", "den + 2 * neps"),
    ("gelu: the erf form", "return 0.5 * x * (1.0 + np.tanh(", "return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))\n    return (1.0 + np.tanh("),
    ("swiglu: silu on up_proj", 'silu(w[p + "mlp.gate_proj.weight"] @ h) * (w[p + "mlp.up_proj.weight"] @ h)', 'silu(w[p + "mlp.up_proj.weight"] @ h) * (w[p + "mlp.gate_proj.weight"] @ h)'),
    ("query head i reads KV head i mod KV", "for i in range(j * group, (j + 1) * group):", 'for i in range(j, H, KV):'),
    ("pruning: rank among the unpruned tiles only", "sum(i < s.mass for i in s.importance)", "sum(i < s.mass for u, i in enumerate(s.importance) if u not in s.pruned)"),
    ("pruning: <= instead of <", '< sp["prune_ratio"] * t', '<= sp["prune_ratio"] * t'),
    ("pruning: t + 1 tiles instead of t", 'sp["prune_ratio"] * t:', 'sp["prune_ratio"] * (t + 1):'),
    ("pruning: sinks are pruned too", 'if sp and t >= sp["sink_tiles"] and', "if sp and",
     "for u in old:                                  #", "for u in [u for u in a.tiles if nxt - u > sp['recent_tiles']]:  #"),
    ("budget: sinks are evicted too", 'held = sorted((u for u in old', 'held = sorted((u for u in [u for u in a.tiles if nxt - u > sp["recent_tiles"]]'),
    ("pruning: a pruned tile leaves at once, also when recent", 'for u in old:                                  #', "for u in [u for u in a.tiles if u >= sp['sink_tiles']]:  #"),
    ("pruning: only in layer 0", "if u in s.pruned:", "if l == 0 and u in s.pruned:"),
    ("importance: without the key gate", "s.mass += pk.sum()", "s.mass += elu1(k[j]).sum()"),
    ("importance: of the first KV head only", "if l == 0:\n                    s.mass", "if l == 0 and j == 0:\n                    s.mass"),
    ("importance: summed over all layers", "if l == 0:\n                    s.mass", "if True:\n                    s.mass"),
    ("importance: decayed within the tile", "s.mass += pk.sum()", "s.mass = s.mass * (math.exp(log_g[j]) if j == 0 else 1.0) + pk.sum()"),
    ("budget: the key without E", "math.log(z.sum()) - a.E", "math.log(z.sum())"),
    ("budget: the oldest tile leaves (key is the tile's number)", "key=lambda u: (a.tiles[u][3], u)", "key=lambda u: u"),
    ("budget: applied before pruned tiles leave", "for u in old:                                  #", "for u in []:  #",
     "            score = {", "            for u in s.pruned & a.tiles.keys() & set(old if sp else ()):\n                del a.tiles[u]\n            score = {"),
    ("budget: recent tiles take room", 'held[sp["cache_tiles"] // sp["cache_lanes"]:]', 'held[max(0, sp["cache_tiles"] // sp["cache_lanes"] - sum(u % sp["cache_lanes"] == lane and nxt - u <= sp["recent_tiles"] for u in a.tiles)):]'),
    ("budget: sinks take room", 'held[sp["cache_tiles"] // sp["cache_lanes"]:]', 'held[max(0, sp["cache_tiles"] // sp["cache_lanes"] - sum(u % sp["cache_lanes"] == lane for u in range(min(nxt, sp["sink_tiles"])))):]'),
    ("budget: one lane of cache_tiles", 'for lane in range(sp["cache_lanes"]):', 'sp = dict(sp, cache_lanes=1)\n                    for lane in range(1):'),
    ("budget: a lane's share rounded up", 'held[sp["cache_tiles"] // sp["cache_lanes"]:]', 'held[-(-sp["cache_tiles"] // sp["cache_lanes"]):]'),
    ("skipping: scores without decay", "score = {u: math.exp(a.E - E) * (r @ z)", "score = {u: (r @ z)"),
    ("skipping: r of the last query, not the tile's mean", "a.q_sum += pq", "a.q_sum = pq"),
    ("skipping: r of the group's first query head only", "a.q_sum += pq", "a.q_sum = a.q_sum + (pq if i == j * group else 0.0)"),
    ("skipping: the sum leaves out recent tiles and sinks", "total = sum(score.values())", "total = sum(v for u, v in score.items() if not sp or (nxt - u > sp['recent_tiles'] and u >= sp['sink_tiles']))"),
    ("skipping: the share is of the largest score", "total = sum(score.values())", "total = max(score.values(), default=0.0)"),
    ("skipping: a skipped tile never comes back", "a.open, a.c, a.q_sum = [], 0.0", "a.tiles = type(a.tiles)((u, a.tiles[u]) for u in keep) if sp else a.tiles\n            a.open, a.c, a.q_sum = [], 0.0"),
    ("skipping: the sinks are skipped", 'or u < sp["sink_tiles"]\n', "\n"),
    ("recent_tiles 0 taken as 1", 'sp = self.cfg, self.cfg.get("tile_sparsity")\n', 'sp = self.cfg, self.cfg.get("tile_sparsity")\n        sp = sp and dict(sp, recent_tiles=max(1, sp["recent_tiles"]))\n'),
    ("an empty selection keeps the previous state", "a.S = sum(", "if not keep: a.open, a.c, a.q_sum = [], 0.0, np.zeros_like(a.q_sum); continue\n            a.S = sum("),
]


def changed_reference(source, changes):
    """The module that reference.py would be with the changes."""
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source, f"reference.py no longer holds: {old}"
        source = source.replace(old, new, 1)
    module = types.ModuleType("changed_reference")
    exec(compile(source, "reference.py with a mistake", "exec"), module.__dict__)
    return module


def distance(module, path):
    golden = load_file(os.path.join(path, "golden.safetensors"))
    model = module.Model(path)
    s = module.Sequence(model)
    with np.errstate(all="ignore"):
        got = np.stack([model.step(s, int(t)) for t in golden["tokens"]])
        return float(np.linalg.norm(got - golden["logits"]) / np.linalg.norm(golden["logits"]))


def main(words, here):
    with open(os.path.join(here, "reference.py")) as f:
        source = f.read()
    cases = sorted(e.name for e in os.scandir(here) if os.path.exists(os.path.join(e.path, "golden.safetensors")))
    silent = 0
    for what, *changes in MISTAKES:
        if words and not any(w in what for w in words):
            continue
        module, seen = changed_reference(source, changes), {}
        for name in cases:
            error = distance(module, os.path.join(here, name))
            if not error <= NOTICED:  # NaN is noticed
                seen[name] = error
        silent += not seen
        print(f"{what}: " + (", ".join(f"{n} {e:.1e}" for n, e in seen.items()) or "NOT NOTICED"), flush=True)
    return 1 if silent else 0
