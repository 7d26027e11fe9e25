"""Literal float64 reference of the tessera model: one token at a time, no batching, no tricks.

It states what docs/model.md must say and what every backend must compute.
Needs numpy, safetensors and ml_dtypes (which teaches numpy bf16).
Usage: python3 reference.py MODEL_DIR "prompt text" [n_new]   greedy continuation, byte-level models
"""
import json
import math
import os
import sys

import ml_dtypes  # noqa: F401  importing it is what registers bfloat16 with numpy
import numpy as np
from safetensors.numpy import load_file


def elu1(x):
    """Feature map phi(x) = ELU(x) + 1: x + 1 for x > 0, exp(x) otherwise."""
    return np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0)))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def log_sigmoid(x):
    return np.minimum(x, 0.0) - np.log1p(np.exp(-np.abs(x)))


def rms_norm(x, w, eps):
    return x / math.sqrt(np.mean(x * x) + eps) * w


def gelu_tanh(x):
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * sigmoid(x)


class Head:
    """One KV head of one layer of one sequence: completed tiles, the open tile, the selected state."""

    def __init__(self, d):
        self.tiles = {}           # t -> (S [d,d], z [d], E, key)   completed tiles that are still stored
        self.open = []            # (phi_k [d], v [d], c)           keys of the open tile; c = log decay since tile start
        self.c = 0.0              # log decay accumulated in the open tile
        self.E = 0.0              # log decay accumulated to the end of the last completed tile
        self.q_sum = np.zeros(d)  # sum of phi(q) over the open tile and the query heads of this group
        self.S = np.zeros((d, d)) # selected state for the open tile, decayed to the tile's start
        self.z = np.zeros(d)


class Sequence:
    def __init__(self, model):
        c = model.cfg
        self.heads = [[Head(c["head_dim"]) for _ in range(c["num_key_value_heads"])] for _ in range(c["num_hidden_layers"])]
        self.pos = 0
        self.importance = []      # I_t of every completed tile, from layer 0
        self.pruned = set()
        self.mass = 0.0           # running I of the open tile
        self.stats = {"available": 0, "selected": 0}


def load_weights(path):
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json names, in float64."""
    files = ["model.safetensors"]
    if not os.path.exists(os.path.join(path, files[0])):
        with open(os.path.join(path, "model.safetensors.index.json")) as f:
            files = sorted(set(json.load(f)["weight_map"].values()))
    return {k: np.asarray(v, dtype=np.float64) for name in files for k, v in load_file(os.path.join(path, name)).items()}


class Model:
    def __init__(self, path):
        with open(os.path.join(path, "config.json")) as f:
            self.cfg = json.load(f)
        self.w = load_weights(path)

    def step(self, s, token):
        """Feed one token, return the logits of the next [vocab_size]."""
        c, w = self.cfg, self.w
        H, KV, d, T = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["tile_size"]
        eps, neps, group = c["rms_norm_eps"], c["normalizer_eps"], H // KV
        x = w["model.embed_tokens.weight"][token].copy()
        for l in range(c["num_hidden_layers"]):
            p = f"model.layers.{l}."
            h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
            q = (w[p + "self_attn.q_proj.weight"] @ h).reshape(H, d)
            k = (w[p + "self_attn.k_proj.weight"] @ h).reshape(KV, d)
            v = (w[p + "self_attn.v_proj.weight"] @ h).reshape(KV, d)
            gate = sigmoid(w[p + "self_attn.key_gate.weight"] @ h + w[p + "self_attn.key_gate.bias"])          # [KV]
            log_g = log_sigmoid(w[p + "self_attn.decay_gate.weight"] @ h + w[p + "self_attn.decay_gate.bias"]) / c["decay_temperature"]
            y = np.zeros((H, d))
            for j in range(KV):
                a = s.heads[l][j]
                a.c += log_g[j]
                pk = gate[j] * elu1(k[j])
                a.open.append((pk, v[j], a.c))
                if l == 0:
                    s.mass += pk.sum()
                for i in range(j * group, (j + 1) * group):
                    pq = elu1(q[i])
                    a.q_sum += pq
                    num, den = math.exp(a.c) * (pq @ a.S), math.exp(a.c) * (pq @ a.z)
                    for pk_j, v_j, c_j in a.open:
                        m = math.exp(a.c - c_j) * (pq @ pk_j)
                        num, den = num + m * v_j, den + m
                    y[i] = num / (den + neps)
            x = x + w[p + "self_attn.o_proj.weight"] @ y.reshape(-1)
            if (s.pos + 1) % T == 0:
                self.close_tile(s, l, s.pos // T)
            h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
            if c["hidden_act"] == "swiglu":
                m = silu(w[p + "mlp.gate_proj.weight"] @ h) * (w[p + "mlp.up_proj.weight"] @ h)
            else:
                m = gelu_tanh(w[p + "mlp.up_proj.weight"] @ h)
            x = x + w[p + "mlp.down_proj.weight"] @ m
        s.pos += 1
        head = w["model.embed_tokens.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
        return head @ rms_norm(x, w["model.norm.weight"], eps)

    def close_tile(self, s, l, t):
        """Tile t is complete in layer l: store its state, decide what is kept, select for tile t + 1."""
        c, sp = self.cfg, self.cfg.get("tile_sparsity")
        T, group = c["tile_size"], c["num_attention_heads"] // c["num_key_value_heads"]
        if l == 0:  # structural pruning: rank of this tile's importance among the earlier tiles
            if sp and t >= sp["sink_tiles"] and sum(i < s.mass for i in s.importance) < sp["prune_ratio"] * t:
                s.pruned.add(t)
            s.importance.append(s.mass)
            s.mass = 0.0
        for a in s.heads[l]:
            S = sum(math.exp(a.c - cj) * np.outer(pk, v) for pk, v, cj in a.open)
            z = sum(math.exp(a.c - cj) * pk for pk, v, cj in a.open)
            a.E += a.c
            a.tiles[t] = (S, z, a.E, math.log(z.sum()) - a.E)
            r = a.q_sum / (T * group)
            nxt = t + 1
            if sp:
                old = [u for u in a.tiles if nxt - u > sp["recent_tiles"] and u >= sp["sink_tiles"]]
                for u in old:                                  # pruned tiles leave once they are no longer recent
                    if u in s.pruned:
                        del a.tiles[u]
                if sp["cache_tiles"]:                          # budget: top cache_tiles / lanes by key in every lane
                    for lane in range(sp["cache_lanes"]):
                        held = sorted((u for u in old if u in a.tiles and u % sp["cache_lanes"] == lane),
                                      key=lambda u: (a.tiles[u][3], u), reverse=True)
                        for u in held[sp["cache_tiles"] // sp["cache_lanes"]:]:
                            del a.tiles[u]
            score = {u: math.exp(a.E - E) * (r @ z) for u, (S, z, E, key) in a.tiles.items()}
            total = sum(score.values())
            keep = [u for u in a.tiles if not sp or nxt - u <= sp["recent_tiles"] or u < sp["sink_tiles"]
                    or score[u] >= sp["skip_share"] * total]
            s.stats["available"] += nxt
            s.stats["selected"] += len(keep)
            a.S = sum((math.exp(a.E - a.tiles[u][2]) * a.tiles[u][0] for u in keep), np.zeros_like(a.S))  # keep may be empty
            a.z = sum((math.exp(a.E - a.tiles[u][2]) * a.tiles[u][1] for u in keep), np.zeros_like(a.z))
            a.open, a.c, a.q_sum = [], 0.0, np.zeros_like(a.q_sum)


def main():
    m = Model(sys.argv[1])
    s, out, n = Sequence(m), list(sys.argv[2].encode()), int(sys.argv[3]) if len(sys.argv) > 3 else 64
    for t in out:
        logits = m.step(s, t)
    for _ in range(n):
        out.append(int(np.argmax(logits)))
        logits = m.step(s, out[-1])
    print(bytes(out).decode("utf-8", "replace"))
    print(f"tiles: {s.stats}", file=sys.stderr)


if __name__ == "__main__":
    main()
