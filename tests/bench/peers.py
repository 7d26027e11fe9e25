#!/usr/bin/env python3
"""Times other implementations of attention beside tessera's, at the same shapes, on the same GPU, in one call.

    tests/bench/peers.py --tessera build/release/bin/tessera --tokens 131072 --heads 16 --head-dim 64

Needs a CUDA GPU, torch and flash-linear-attention (fla). Prints a table, or with --json one object. Ratios are between
medians of this call: figures of different cards or calls do not belong beside each other.
"""
import argparse
import json
import statistics
import subprocess
import sys


def load(name, install):
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        sys.exit(f"peers.py: the package {name.split('.')[0]} is missing ({error}); pip install {install}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tessera", metavar="PATH", help="the program; without it only the peers are timed")
    parser.add_argument("--tokens", type=int, default=131072, help="of the prefill, one sequence (default 131072)")
    parser.add_argument("--batch", type=int, default=256, help="sequences of the decode (default 256)")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args()


def time_tessera(options):
    command = [options.tessera, "bench", "kernel", "--json", "--device", "cuda", "--op", "attention",
               "--tokens", options.tokens, "--batch", options.batch, "--heads", options.heads,
               "--head-dim", options.head_dim, "--repeat", options.repeat]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"peers.py: {options.tessera} bench kernel failed with {done.returncode}")
    return json.loads(done.stdout)


def time_call(torch, call, repeat):
    """Median, least and most seconds of a call: events around as many calls as take 2 ms, after a warm-up."""
    def row(n):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # what follows is enqueued while this runs
        start.record()
        for _ in range(n):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    for _ in range(2):
        row(1)
    n = 1
    while n < 1024 and row(n) < 2e-3:
        n *= 2
    samples = [row(n) / n for _ in range(repeat)]
    return {"seconds": statistics.median(samples), "seconds_least": min(samples), "seconds_most": max(samples)}


def peers(torch, options):
    """(kind, name, call) of each; prefill: one causal sequence; decode: one token of each sequence of a batch."""
    from torch.nn import functional
    simple_gla = load("fla.ops.simple_gla", "flash-linear-attention")
    linear = load("fla.ops.linear_attn", "flash-linear-attention")
    lightning = load("fla.ops.lightning_attn", "flash-linear-attention")
    attention = load("torch.nn.attention", "torch")
    H, d = options.heads, options.head_dim

    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def decay(*shape):
        return functional.logsigmoid(torch.randn(*shape, device="cuda") + 2.5) / 16

    q, k, v = (normal(1, options.tokens, H, d) for _ in range(3))
    g = decay(1, options.tokens, H)
    by_head = [t.transpose(1, 2).contiguous() for t in (q, k, v)]

    def sdpa(backend):
        def call():
            with attention.sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(*by_head, is_causal=True)
        return call

    def elu_linear():
        return linear.chunk_linear_attn(functional.elu(q) + 1, functional.elu(k) + 1, v, normalize=True)

    # States larger than any cache by themselves; q, k, v of a token are small beside them.
    one_q, one_k, one_v = (normal(options.batch, 1, H, d) for _ in range(3))
    one_g = decay(options.batch, 1, H)
    state = torch.randn(options.batch, H, d, d, device="cuda")

    return [
        ("prefill", "torch SDPA cuDNN, softmax", sdpa(attention.SDPBackend.CUDNN_ATTENTION)),
        ("prefill", "torch SDPA flash, softmax", sdpa(attention.SDPBackend.FLASH_ATTENTION)),
        ("prefill", "fla chunk_linear_attn, ELU + 1, normalised", elu_linear),
        ("prefill", "fla chunk_simple_gla", lambda: simple_gla.chunk_simple_gla(q, k, v, g=g)),
        ("prefill", "fla chunk_lightning_attn",
         lambda: lightning.chunk_lightning_attn(q, k, v, layer_idx=0, num_layers=24)),
        ("decode", "fla fused_recurrent_simple_gla",
         lambda: simple_gla.fused_recurrent_simple_gla(one_q, one_k, one_v, g=one_g, initial_state=state,
                                                       output_final_state=True)),
    ]


def time_peers(torch, options):
    results = []
    with torch.no_grad():
        for kind, name, call in peers(torch, options):
            try:
                results.append({"kind": kind, "name": name, **time_call(torch, call, options.repeat)})
            except Exception as error:  # one peer that does not run here must not hide the others
                results.append({"kind": kind, "name": name, "error": str(error).splitlines()[0]})
            # Compiling a peer can take minutes: what is known by then is not lost with the rest.
            print(f"peers.py: {json.dumps(results[-1])}", file=sys.stderr, flush=True)
    return results


def main():
    options = parse()
    torch = load("torch", "torch")
    fla = load("fla", "flash-linear-attention")
    if not torch.cuda.is_available():
        sys.exit("peers.py: torch sees no CUDA GPU")
    kernels = time_tessera(options)["kernels"] if options.tessera else []
    ours = [{"kind": kernel["op"].split()[1], "name": f"tessera {kernel['op']}",
             **{key: kernel[key] for key in ("seconds", "seconds_least", "seconds_most")}}
            for kernel in kernels if kernel["op"].startswith("attention")]
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
              "fla": getattr(fla, "__version__", "unknown"), "tokens": options.tokens, "batch": options.batch,
              "heads": options.heads, "head_dim": options.head_dim, "repeats": options.repeat,
              "results": ours + time_peers(torch, options)}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['device']}, torch {result['torch']}, fla {result['fla']}: prefill of {options.tokens} tokens, "
          f"decode of {options.batch} sequences, {options.heads} heads of {options.head_dim}, bf16")
    dense = {one["kind"]: one["seconds"] for one in ours if "sparse" not in one["name"]}
    print(f"{'':46} {'ms':>9} {'least to most':>19}  times tessera's dense form")
    for one in result["results"]:
        if "error" in one:
            print(f"{one['name']:46} {one['error']}")
            continue
        ratio = f"{one['seconds'] / dense[one['kind']]:.2f}" if one["kind"] in dense else ""
        print(f"{one['name']:46} {1e3 * one['seconds']:9.3f} {1e3 * one['seconds_least']:9.3f} "
              f"{1e3 * one['seconds_most']:9.3f}  {ratio}")


if __name__ == "__main__":
    main()
