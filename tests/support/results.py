"""Result files made up for tests of the report: nothing in them was measured, and their machines say so.

Times follow simple laws (work over rate), so that what a report must say of them can be computed by hand.
"""
import json
from pathlib import Path

GPU, CPU = "Synthetic GPU", "Synthetic CPU"
RATES = {"tilewise": 500, "sdpa flash": 330, "sdpa cudnn": 520, "sdpa efficient": 200, "flex": 300, "standard": 60}   # TFLOP/s
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
REFUSED = {"state": "refused", "reason": "OutOfMemoryError: CUDA out of memory. Tried to allocate 16.00 GiB"}
ABSENT = {"state": "absent", "reason": "it is not installed"}


def result(benchmark, rows, device="cuda", **changed):
    machine = {"System": "none, this is made up", "CPU": f"{CPU}, 4 cores", "Memory": "64.0 GiB",
               "GPU": f"{GPU}, 80 GiB, compute capability 9.0" if device == "cuda" else "none", "Python": "3.12.1",
               "torch": "2.11.0", "triton": "3.6.0", "tilewise": "0.1.0"}
    return {"benchmark": benchmark, "device": device, "quick": False, "complete": True, "machine": machine,
            "environment": {"threads": "4", "OMP_WAIT_POLICY": "PASSIVE"}, "clocks": {}, "commit": "5" * 40,
            "date": "2026-01-02T03:04:05+00:00", "rows": rows, "lines": []} | changed


def timed(seconds, **more):
    return {"state": "timed", "reason": "", "seconds": seconds, "quartiles": [seconds * 0.98, seconds * 1.03],
            "host_seconds": 2e-5, "rounds": 40} | more


def row(part, case, setting, contenders, **more):
    """times_faster as the benchmarks have it, from the seconds."""
    ours = next(iter(contenders.values()))
    faster = {name: {"median": e["seconds"] / ours["seconds"],
                     "quartiles": [0.97 * e["seconds"] / ours["seconds"], 1.04 * e["seconds"] / ours["seconds"]]}
              for name, e in contenders.items() if e is not ours and "seconds" in e and "seconds" in ours}
    return {"part": part, "case": case, "setting": setting, "contenders": contenders, "times_faster": faster} | more


def attention(device="cuda"):
    """Short sequences are lost to two others, long ones won; standard attention is refused at the longest."""
    dtype, scale = ("bfloat16", 1.0) if device == "cuda" else ("float32", 1e-3)
    rows = []
    for dim in (64, 128) if device == "cuda" else (64,):
        for mask in ("full", "causal"):
            for n in LENGTHS:
                for mode, work in (("forward", 1.0), ("backward", 2.5), ("forward+backward", 3.5)):
                    batch, heads = 16384 // n, 2048 // dim
                    flops = work * 4 * batch * heads * n**2 * dim / (2 if mask == "causal" else 1)
                    setting = {"batch": batch, "seqlen": n, "heads": heads, "kv_heads": heads, "head_dim": dim, "dtype": dtype,
                               "mask": mask, "mode": mode}
                    contenders = {}
                    for name, rate in RATES.items():
                        reached = scale * rate * n / (n + (1500 if name == "tilewise" else 700))
                        reached *= (1 if mode == "forward" else 0.8) * (dim / 128 if name != "standard" else 1)
                        contenders[name] = timed(flops / reached / 1e12, tflops=reached)
                    if n >= 16384:
                        contenders["standard"] = REFUSED
                    if dim == 64 and mask == "causal":
                        contenders["flex"] = {"state": "wrong", "reason": "dq: error 3.1e-02, allowed 8.0e-03"}
                    contenders["flash_attn"] = ABSENT
                    case = f"{mode} B {batch} N {n} H {heads} D {dim} {dtype} {mask}"
                    rows.append(row("attention", case, setting, contenders))
    return result("attention", rows, device)


def memory():
    rows = []
    for n in (1024, 4096, 16384, 65536):
        for mode in ("forward", "forward+backward"):
            linear = n * 16 * 4 * (1 if mode == "forward" else 130)
            square = {"state": "timed", "reason": "", "bytes": 2 * 16 * n**2 * (1 if mode == "forward" else 3)}
            contenders = {"tilewise": {"state": "timed", "reason": "", "bytes": linear},
                          "sdpa flash": {"state": "timed", "reason": "", "bytes": 2 * linear},
                          "standard": square if n <= 16384 else REFUSED}
            setting = {"batch": 1, "seqlen": n, "heads": 16, "kv_heads": 16, "head_dim": 128, "dtype": "bfloat16",
                       "mask": "causal", "mode": mode}
            rows.append(row("memory", f"{mode} N {n} H 16 D 128 bfloat16 causal", setting, contenders))
    return result("memory", rows)


def decode():
    rows = []
    for batch in (1, 16):
        for context in (2048, 8192, 32768, 131072):
            moved = 2 * batch * context * 8 * 128 * 2
            speeds = {"tilewise": 2800, "sdpa": 900, "flash_attn": 2900 if context < 4096 else 2500, "copy": 3400}
            contenders = {name: timed(moved / 1e9 / (rate * moved / (moved + 4e7)), gb_per_s=rate * moved / (moved + 4e7))
                          for name, rate in speeds.items()}
            setting = {"batch": batch, "seqlen_q": 1, "seqlen_k": context, "heads": 32, "kv_heads": 8, "head_dim": 128,
                       "dtype": "bfloat16", "mode": "forward"}
            rows.append(row("decode", f"decode B {batch} N {context} 32/8/128 bfloat16", setting, contenders))
    return result("decode", rows)


def sparse():
    rows = []
    for density in (1.0, 0.5, 0.25, 0.125, 0.0625):
        full = 0.02
        contenders = {"tilewise": timed(full * density * 1.1 + 2e-4), "flex": timed(full * density * 1.5 + 1e-3),
                      "full x density": timed(full * density, yardstick=True)}
        setting = {"seqlen": 16384, "heads": 16, "head_dim": 64, "dtype": "bfloat16", "mode": "forward", "pattern": "random",
                   "density": density, "block": 128}
        rows.append(row("sparse", f"random density {density} N 16384 D 64 forward", setting, contenders))
    return result("sparse", rows)


def cpu():
    """Promises, one met and one missed; a time that is promised; a case that failed."""
    setting = {"seqlen": 2048, "heads": 8, "head_dim": 64, "dtype": "float32", "mode": "forward", "mask": "full"}
    dense = row("dense", "forward N 2048 H 8 D 64 float32 full", setting,
                {"tilewise": timed(0.026), "sdpa": timed(0.056), "sgemm": timed(0.049)})
    dense["times_faster"]["sdpa"]["bar"] = 1.1
    dense["times_faster"]["sgemm"]["bar"] = 2.0
    build = row("compiling", "build plain", {"mode": "build"}, {"tilewise": timed(2.1, bar=3.0)})
    longer = row("dense", "forward N 8192 H 4 D 64 float32 full", setting | {"seqlen": 8192, "heads": 4},
                 {"tilewise": timed(0.2), "sdpa": timed(0.18), "sgemm": timed(0.3)})
    return result("cpu", [dense, longer, build], "cpu")


def traffic():
    rows = []
    for n in (1024, 4096, 16384):
        setting = {"seqlen": n, "heads": 16, "head_dim": 64, "dtype": "float16", "mode": "forward", "mask": "full",
                   "block": 128}
        counts = {"counted": 8.2 * n**2 * 16, "closed form": 8.0 * n**2 * 16}
        contenders = {name: {"state": "timed", "reason": "", "count": int(count)} for name, count in counts.items()}
        rows.append(row("traffic", f"forward N {n} H 16 D 64", setting, contenders,
                        published={"FlashAttention, figure 2": {"bytes": 4.4e9, "hardware": "A100-40GB"}} if n == 1024 else {}))
    for n in LENGTHS:       # of rows that `attention` has too
        flops = 4 * 16384 * n * 2048
        setting = {"batch": 16384 // n, "seqlen_q": n, "seqlen_k": n, "heads": 32, "kv_heads": 32, "head_dim": 64,
                   "mode": "forward", "dtype": "bfloat16", "device": "GPU", "peak": 1e15, "bandwidth": 4e12, "flops": flops,
                   "intensity": n / 4, "bound": "products", "algorithm": "Tilewise"}
        least = {"state": "timed", "reason": "", "seconds": max(flops / 1e15, flops / (n / 4) / 4e12)}
        rows.append(row("roofline", f"tilewise {n}", setting, {"roofline": least}))
    return result("traffic", rows)


def paper():
    rows = []
    for n in (512, 1024, 2048):
        rows.append(row("table 9", f"forward N {n}", {"seqlen": n, "mode": "forward"},
                        {"tilewise": timed(n / 1e6), "standard": timed(n / 1e5)},
                        published={"FlashAttention, table 9": {"seconds": n / 5e5, "hardware": "A100-40GB"}}))
    return result("paper", rows)


def numerics():
    errors = {name: {"state": "right", "reason": "", "errors": {"out": [e, 2e-3], "dq": [2 * e, 6e-3]}}
              for name, e in (("tilewise", 4e-4), ("standard", 1e-3), ("sdpa flash", 3e-3))}
    errors["flex"] = {"state": "wrong", "reason": "out: NaN", "errors": {"out": [float("nan"), 2e-3]}}
    rows = [row("numerics", "normal inputs, bfloat16", {"dtype": "bfloat16"}, errors)]
    for dtype, eps in (("bfloat16", 2**-8), ("float16", 2**-11)):        # relative errors: eps, 2 eps and, with length, more
        for keys in (512, 2048):
            rms = {"tilewise": {"out": [4 * eps, 4.0], "dq": [eps, 1.0]},
                   "standard": {"out": [2 * eps, 1.0], "dq": [2 * eps, 1.0]},
                   "sdpa flash": {"out": [eps, 1.0], "dq": [eps * keys / 512, 1.0]}}
            rows.append(row("lengths", f"normal {dtype} N 32 x {keys}", {"dtype": dtype, "kind": "normal", "seqlen_k": keys},
                            {name: {"state": "right", "reason": "", "rms": found} for name, found in rms.items()}))
    return result("numerics", rows)


def overhead():
    return result("overhead", [row("call", "attention, 1 token", {"seqlen": 1}, {
        "tilewise": timed(3e-5, host_seconds=1.2e-5), "sdpa": timed(2e-5, host_seconds=8e-6)})])


MADE = {"attention": attention, "memory": memory, "decode": decode, "sparse": sparse, "traffic": traffic, "paper": paper,
        "numerics": numerics, "overhead": overhead, "cpu": cpu, "attention_cpu": lambda: attention("cpu")}


def write(folder: Path, *names: str) -> list[Path]:
    """Files of these names, all without; their paths."""
    paths = []
    for name in names or MADE:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(MADE[name]()))
        paths.append(path)
    return paths
