"""Writes tiny random models and the logits that reference.py gives them, and shows what the cases are able to catch.

A case is DIR/<name>/{config.json, model.safetensors or shards with an index, golden.safetensors}. golden.safetensors holds
  tokens      I32 [n]              what is fed
  logits      F32 [n, vocab_size]  float64 logits after each token, rounded
  tile_pairs  I64 [2]              (query tile, earlier tile) pairs over all layers and KV heads: available, selected
  pruned      I32 [number]         structurally pruned tiles, ascending; may be empty

A case is written only when what it is for happened in it (tiles pruned, evicted, skipped ...) and when no decision was
closer than MARGIN, so that arithmetic in float32, and mostly in bf16, decides as float64 does.

Usage: python3 make_golden.py [NAME ...]             write the cases (all of them by default), print what happened
       python3 make_golden.py --search NAME ...      print the first seed that a case accepts
       python3 make_golden.py --mistakes [WORD ...]  compute the cases with one mistake at a time (those that hold a WORD)
Needs numpy, safetensors and ml_dtypes.
"""
import itertools
import json
import math
import os
import sys
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

import reference

HERE = os.path.dirname(os.path.abspath(__file__))
MARGIN = 1e-2  # of scores and importances relative, of keys (logarithms) absolute
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def case(seed, n, V, D, L, H, KV, d, T, F, act, dtype, sparsity, *, decay_bias, decay_std=1.5, gate_std=2.5, temperature=16.0,
         eps=1e-3, tied=False, shards=1, weights_of=None, topic=8, expect=()):
    """One row of CASES. decay_bias: per KV head, repeated as needed; topic: tokens in use at a time; expect: see EXPECTATIONS."""
    config = dict(model_type="tessera", architectures=["TesseraForCausalLM"], vocab_size=V, hidden_size=D, num_hidden_layers=L,
                  num_attention_heads=H, num_key_value_heads=KV, head_dim=d, intermediate_size=F, hidden_act=act,
                  rms_norm_eps=1e-5, normalizer_eps=eps, decay_temperature=temperature, tie_word_embeddings=tied, tile_size=T,
                  tile_sparsity=sparsity, eos_token_id=0, bos_token_id=0, torch_dtype=dtype)
    return dict(seed=seed, n=n, config=config, decay_bias=decay_bias, decay_std=decay_std, gate_std=gate_std, shards=shards,
                weights_of=weights_of, topic=topic, expect=expect)


def rules(prune, skip, tiles, lanes, recent, sink):
    return dict(prune_ratio=prune, skip_share=skip, cache_tiles=tiles, cache_lanes=lanes, recent_tiles=recent, sink_tiles=sink)


CASES = {
    # Grouped query heads, tied output layer, odd vocabulary; bf16 as a real model has it.
    "gqa_swiglu_tied": case(0, 790, 97, 96, 2, 4, 2, 64, 64, 160, "swiglu", "bfloat16", rules(0.25, 0.04, 0, 4, 2, 3),
                            decay_bias=(2.0, 0.0), tied=True, expect=("pruned", "skipped", "protects a sink")),
    "d128_t128": case(2, 1100, 61, 64, 2, 2, 2, 128, 128, 128, "gelu_tanh", "float16", rules(0.3, 0.05, 8, 2, 1, 1),
                      decay_bias=(1.5, 0.0), expect=("pruned", "skipped")),
    "d128_t64": case(1, 1100, 128, 64, 2, 2, 1, 128, 64, 128, "swiglu", "bfloat16", rules(0.25, 0.04, 6, 2, 2, 0),
                     decay_bias=(3.0,), expect=("pruned", "skipped", "evicted")),
    # Many tiles through a cache of 2 a lane: every lane of every head must choose.
    "tiny_budget": case(20, 30 * 64 + 23, 61, 64, 2, 2, 2, 64, 64, 128, "gelu_tanh", "float32", rules(0.3, 0.02, 8, 4, 1, 1),
                        decay_bias=(4.0, 1.0), expect=("pruned", "skipped", "evicted", "every lane", "skips a newer tile",
                                                       "evicts a newer tile")),
    "dense": case(0, 700, 193, 128, 3, 3, 1, 64, 64, 160, "swiglu", "float16", None, decay_bias=(2.0,), shards=3,
                  expect=("all selected",)),
    # Nothing protected: the tile that has just closed may itself be pruned, evicted or skipped. 5 tiles over 2 lanes hold 4.
    # The normalizer is large enough to show. Four KV heads, for four tensor-parallel ranks.
    "edge_sparsity": case(5, 1000, 83, 64, 2, 4, 4, 64, 64, 128, "gelu_tanh", "float32", rules(0.5, 0.05, 5, 2, 0, 0),
                          decay_bias=(3.0, 1.0, 0.0, 2.0), eps=4.0,
                          expect=("pruned", "skipped", "evicted", "every lane", "last tile not held")),
    # A share so large that sometimes no tile reaches it: the selected state is then zero.
    "empty_selection": case(1, 600, 67, 64, 2, 2, 2, 64, 64, 128, "swiglu", "float32", rules(0.0, 0.3, 0, 1, 0, 0),
                            decay_bias=(5.0, 2.0), expect=("skipped", "none selected")),
    # c falls below -300 within a tile in one head: e^-c overflows float32, so only differences of c may be exponentiated.
    "strong_decay": case(0, 700, 61, 64, 2, 2, 2, 64, 64, 128, "gelu_tanh", "float32", rules(0.25, 0.01, 4, 2, 1, 1),
                         decay_bias=(-6.0, 3.0), decay_std=1.0, temperature=1.0, expect=("pruned", "evicted", "steep")),
    # The same weights with rules that drop nothing, and dense (I6). Hardly any decay: the oldest tile matters as the newest.
    "weak_decay_no_skip": case(0, 700, 67, 64, 2, 4, 2, 64, 64, 128, "swiglu", "bfloat16", rules(0.0, 0.0, 0, 4, 1, 1),
                               decay_bias=(7.0,), decay_std=0.5, expect=("all selected",)),
    "weak_decay_dense": case(0, 700, 67, 64, 2, 4, 2, 64, 64, 128, "swiglu", "bfloat16", None, decay_bias=(7.0,), decay_std=0.5,
                             weights_of="weak_decay_no_skip", expect=("all selected",)),
}


def make_weights(spec, rng):
    """Weights under which queries, keys and gates spread widely, so that tiles differ and choosing among them shows."""
    c = spec["config"]
    D, H, KV, d, F, V = (c[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                                        "intermediate_size", "vocab_size"))
    w = {}

    def matrix(name, rows, columns, std):
        w[name] = rng.normal(0.0, std / math.sqrt(columns), (rows, columns))

    def norm(name):
        w[name] = rng.uniform(0.5, 1.5, D)

    w["model.embed_tokens.weight"] = rng.normal(0.0, 1.0, (V, D)) / (math.sqrt(D / 8) if c["tie_word_embeddings"] else 1.0)
    for l in range(c["num_hidden_layers"]):
        p = f"model.layers.{l}."
        norm(p + "input_layernorm.weight")
        matrix(p + "self_attn.q_proj.weight", H * d, D, 1.5)
        matrix(p + "self_attn.k_proj.weight", KV * d, D, 1.5)
        matrix(p + "self_attn.v_proj.weight", KV * d, D, 1.5)
        matrix(p + "self_attn.o_proj.weight", D, H * d, 1.5)
        matrix(p + "self_attn.key_gate.weight", KV, D, spec["gate_std"])
        w[p + "self_attn.key_gate.bias"] = rng.uniform(-1.0, 0.5, KV)
        matrix(p + "self_attn.decay_gate.weight", KV, D, spec["decay_std"])
        w[p + "self_attn.decay_gate.bias"] = np.resize(spec["decay_bias"], KV) + rng.uniform(-0.2, 0.2, KV)
        norm(p + "post_attention_layernorm.weight")
        if c["hidden_act"] == "swiglu":
            matrix(p + "mlp.gate_proj.weight", F, D, 1.5)
        matrix(p + "mlp.up_proj.weight", F, D, 1.0)
        matrix(p + "mlp.down_proj.weight", D, F, 0.7)
    norm("model.norm.weight")
    if not c["tie_word_embeddings"]:
        matrix("lm_head.weight", V, D, 2.0)
    return {k: v.astype(DTYPES[c["torch_dtype"]]) for k, v in w.items()}


def make_tokens(spec, rng):
    """Stretches of about a tile, each from a few tokens only and out of step with the tiles, so that tiles differ."""
    V, T, out = spec["config"]["vocab_size"], spec["config"]["tile_size"], []
    while len(out) < spec["n"]:
        few = rng.integers(0, V, spec["topic"])
        out.extend(rng.choice(few, rng.integers(T // 2, 3 * T // 2)))
    return np.array(out[: spec["n"]], dtype=np.int32)


def make_model(spec):
    rng = np.random.default_rng(spec["seed"])
    return make_weights(spec, rng), make_tokens(spec, rng)


class Held(dict):
    """Tiles of a head, remembering what was deleted."""

    def __init__(self):
        super().__init__()
        self.gone = {}

    def __delitem__(self, t):
        self.gone[t] = self[t]
        super().__delitem__(t)


class Watched(reference.Model):
    """The reference, noting after each tile what it decided and by how much."""

    def __init__(self, config, weights):
        self.cfg, self.w = config, {k: np.asarray(v, dtype=np.float64) for k, v in weights.items()}
        self.facts = set()
        self.n_evicted = self.n_skipped = 0
        self.lanes = set()          # (layer, KV head, lane) that evicted
        self.margins = {"prune": math.inf, "evict": math.inf, "skip": math.inf}
        self.steepest = 0.0         # most negative c

    def sequence(self):
        s = reference.Sequence(self)
        for a in itertools.chain(*s.heads):
            a.tiles = Held()
        return s

    def margin(self, rule, value):
        self.margins[rule] = min(self.margins[rule], float(value))

    def close_tile(self, s, l, t):
        sp, T, group = self.cfg["tile_sparsity"], self.cfg["tile_size"], self.cfg["num_attention_heads"] // self.cfg["num_key_value_heads"]
        r = [a.q_sum / (T * group) for a in s.heads[l]]
        if sp and l == 0 and t > 0 and sp["prune_ratio"] > 0:
            # Pruned iff I_t <= the i-th smallest of the earlier ones, i from 0: the margin is the distance to that one.
            bound = sorted(s.importance)[math.ceil(sp["prune_ratio"] * t) - 1]
            if t >= sp["sink_tiles"]:
                self.margin("prune", abs(s.mass / bound - 1))
            elif s.mass <= bound:
                self.facts.add("protects a sink")
        for a in s.heads[l]:
            self.steepest = min(self.steepest, a.c)
            a.tiles.gone.clear()
        super().close_tile(s, l, t)
        if not sp:
            return
        for j, a in enumerate(s.heads[l]):
            self.note(s, l, j, a, t + 1, r[j])

    def note(self, s, l, j, a, nxt, r):
        sp = self.cfg["tile_sparsity"]
        old = lambda u: nxt - u > sp["recent_tiles"] and u >= sp["sink_tiles"]
        lane = lambda u: u % sp["cache_lanes"]
        for u, (_, _, _, key) in a.tiles.gone.items():
            assert old(u)
            if u == nxt - 1:
                self.facts.add("last tile not held")
            if u in s.pruned:
                continue
            self.n_evicted += 1
            self.lanes.add((l, j, lane(u)))
            rivals = {x: e[3] for x, e in a.tiles.items() if old(x) and lane(x) == lane(u)}
            assert len(rivals) == sp["cache_tiles"] // sp["cache_lanes"]
            self.margin("evict", min(rivals.values()) - key)
            if min(rivals) < u:
                self.facts.add("evicts a newer tile")
        score = {u: math.exp(a.E - E) * (r @ z) for u, (_, z, E, _) in a.tiles.items()}
        total = sum(score.values())
        skipped = {u for u in score if old(u) and score[u] < sp["skip_share"] * total}
        self.n_skipped += len(skipped)
        for u in filter(old, score):
            if sp["skip_share"] > 0:
                self.margin("skip", abs(score[u] / (sp["skip_share"] * total) - 1))
        if skipped and any(old(u) and u < max(skipped) for u in set(score) - skipped):
            self.facts.add("skips a newer tile")
        if len(skipped) == len(score):
            self.facts.add("none selected")


# What "expect" may ask of a finished run.
EXPECTATIONS = {
    "pruned": lambda m, s: len(s.pruned) > 0,
    "evicted": lambda m, s: m.n_evicted > 0,
    "every lane": lambda m, s: len(m.lanes) == m.cfg["num_hidden_layers"] * m.cfg["num_key_value_heads"] * m.cfg["tile_sparsity"]["cache_lanes"],
    "skipped": lambda m, s: m.n_skipped > 0 and s.stats["selected"] < s.stats["available"],
    "skips a newer tile": lambda m, s: "skips a newer tile" in m.facts,     # while an older one is selected
    "evicts a newer tile": lambda m, s: "evicts a newer tile" in m.facts,   # while an older one stays
    "protects a sink": lambda m, s: "protects a sink" in m.facts,           # that would have been pruned
    "last tile not held": lambda m, s: "last tile not held" in m.facts,
    "none selected": lambda m, s: "none selected" in m.facts,
    "all selected": lambda m, s: s.stats["selected"] == s.stats["available"] > 0,
    "steep": lambda m, s: m.steepest < -300,
}


def run(model, s, tokens):
    return np.stack([model.step(s, int(t)) for t in tokens])


def objections(spec, model, s):
    """Why this run is no good as a case; empty when it is."""
    out = [f"expected: {e}" for e in spec["expect"] if not EXPECTATIONS[e](model, s)]
    return out + [f"{rule} margin {m:.1e}" for rule, m in model.margins.items() if m <= MARGIN]


def write(path, spec, weights, tokens, logits, s):
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(spec["config"], f, indent=2)
        f.write("\n")
    names = sorted(weights)
    if spec["shards"] == 1:
        save_file(weights, os.path.join(path, "model.safetensors"))
    else:
        files = [f"model-{i + 1:05d}-of-{spec['shards']:05d}.safetensors" for i in range(spec["shards"])]
        where = {n: files[i % spec["shards"]] for i, n in enumerate(names)}
        for name in files:
            save_file({n: weights[n] for n in names if where[n] == name}, os.path.join(path, name))
        index = {"metadata": {"total_size": sum(v.nbytes for v in weights.values())}, "weight_map": where}
        with open(os.path.join(path, "model.safetensors.index.json"), "w") as f:
            json.dump(index, f, indent=2)
            f.write("\n")
    save_file({"tokens": tokens, "logits": logits.astype(np.float32),
               "tile_pairs": np.array([s.stats["available"], s.stats["selected"]], dtype=np.int64),
               "pruned": np.array(sorted(s.pruned), dtype=np.int32)}, os.path.join(path, "golden.safetensors"))


def make(name, seed=None):
    """Computes a case. Returns (spec, weights, tokens, logits, model, sequence)."""
    spec = dict(CASES[name])
    source = dict(CASES[spec["weights_of"]]) if spec["weights_of"] else spec
    if seed is not None:
        spec["seed"] = source["seed"] = seed
    weights, tokens = make_model(source)
    model = Watched(spec["config"], weights)
    s = model.sequence()
    return spec, weights, tokens, run(model, s, tokens), model, s


def describe(name, spec, model, s, seconds):
    tiles = spec["n"] // spec["config"]["tile_size"]
    margins = ", ".join(f"{k} {v:.1e}" for k, v in model.margins.items() if v < math.inf) or "no decisions"
    print(f"{name}: {spec['n']} tokens, {tiles} tiles; pruned {len(s.pruned)}, evicted {model.n_evicted}, skipped {model.n_skipped}, "
          f"selected {s.stats['selected']} of {s.stats['available']} pairs; smallest margins: {margins}; "
          f"lowest c {model.steepest:.2g}; {seconds:.0f} s", flush=True)


def main():
    if sys.argv[1:2] == ["--mistakes"]:
        import mistakes
        return mistakes.main(sys.argv[2:], HERE)
    if sys.argv[1:2] == ["--search"]:
        for name in sys.argv[2:]:
            for seed in range(50):
                t0 = time.time()
                spec, _, _, logits, model, s = make(name, seed)
                wrong = objections(spec, model, s)
                describe(name, spec, model, s, time.time() - t0)
                print(f"  seed {seed}: {'; '.join(wrong) or 'good'}", flush=True)
                if not wrong:
                    break
        return 0
    for name in sys.argv[1:] or CASES:
        t0 = time.time()
        spec, weights, tokens, logits, model, s = make(name)
        describe(name, spec, model, s, time.time() - t0)
        wrong = objections(spec, model, s)
        if wrong:
            print(f"{name}: not written: {'; '.join(wrong)}; choose another seed with --search {name}", file=sys.stderr)
            return 1
        if spec["weights_of"]:
            other = load_file(os.path.join(HERE, spec["weights_of"], "golden.safetensors"))["logits"]
            assert np.allclose(logits, other, rtol=1e-6, atol=1e-6), "the dense and the tile form disagree"
        write(os.path.join(HERE, name), spec, weights, tokens, logits, s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
