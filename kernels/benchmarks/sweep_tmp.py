import sys, itertools, time
import torch
from functools import partial
from vlprune.kernels.benchmarks.timing import device_time, copy_bandwidth
from vlprune.kernels.benchmarks.cases import sets, randn, index
from vlprune import ops
import vlprune.kernels.attention_rows.triton as ar
import vlprune.kernels.received_attention.triton as ra
import vlprune.kernels.gather_tokens.triton as gt
import vlprune.kernels.gather_cache.triton as gc
import vlprune.kernels.max_min.triton as mm
import vlprune.kernels.greedy_dpp.triton as dp
import vlprune.kernels.token_entropy.triton as te
import vlprune.kernels.indexed_decode.triton as de

B = "triton"


def grid(**k):
    return [dict(zip(k, v)) for v in itertools.product(*k.values())]


def ar_in(b, h, hkv, s):
    return lambda: sets(lambda: (randn(b, h, 1, 128), randn(b, hkv, s, 128)))


arf = lambda q, k: ops.attention_rows(q, k, scale=0.088, heads="mean", backend=B)
big = grid(KEYS=[64, 128], WARPS=[4], STAGES=[2, 3, 4], OVERSUBSCRIBE=[8, 16]) + grid(
    KEYS=[128], WARPS=[8], STAGES=[3], OVERSUBSCRIBE=[16]
)
J = {
    "ar_big": [(ar, ar_in(8, 28, 4, 32768), arf, big + grid(TILE=[4096, 8192]))],
    "ar_mid": [
        (ar, ar_in(8, 28, 4, 8192), arf, grid(KEYS=[64, 128], STAGES=[3], OVERSUBSCRIBE=[8, 16, 32])),
        (ar, ar_in(8, 32, 32, 2944), arf, grid(KEYS=[64, 128], STAGES=[2, 3, 4], OVERSUBSCRIBE=[8, 16, 32])),
    ],
    "ar_small": [
        (ar, ar_in(1, 28, 4, 640), arf, grid(KEYS=[32, 64], WARPS=[2, 4], TILE=[1024, 2048])),
        (ar, ar_in(1, 28, 4, 2944), arf, grid(KEYS=[32, 64], WARPS=[4], OVERSUBSCRIBE=[4, 16])),
    ],
    "ra": [
        (
            ra,
            lambda: sets(lambda: (randn(1, 32, 2944, 128), randn(1, 32, 2944, 128))),
            lambda q, k: ops.received_attention(q, k, scale=0.088, backend=B),
            grid(BLOCK=[64, 128], WARPS=[4, 8], STAGES=[2, 3]),
        ),
        (
            ra,
            lambda: sets(lambda: (randn(1, 16, 729, 72), randn(1, 16, 729, 72))),
            lambda q, k: ops.received_attention(q, k, scale=0.088, backend=B),
            grid(BLOCK=[64, 128], WARPS=[4, 8], STAGES=[2, 3]),
        ),
    ],
    "gt": [
        (
            gt,
            lambda: sets(
                lambda: (
                    randn(8, 2944, 4096),
                    randn(1, 2944, 128),
                    randn(1, 2944, 128),
                    torch.rand(8, 2944, device="cuda") > 0.5,
                    index(8, 2944, 384),
                )
            ),
            lambda *x: ops.gather_tokens(x[:-1], x[-1], backend=B),
            grid(TILE=[1024, 2048, 4096], WARPS=[4, 8]),
        )
    ],
    "gc": [
        (
            gc,
            lambda: ((*(randn(8, 4, 2944, 128) for _ in range(56)), index(8, 2944, 384)),),
            lambda *x: ops.gather_cache(x[:28], x[28:-1], x[-1], backend=B)[0],
            grid(TILE=[2048, 4096, 8192], WARPS=[4, 8]),
        )
    ],
    "mm1": [
        (
            mm,
            lambda: sets(lambda: (randn(576, 4096),)),
            lambda x: ops.max_min(x, 64, backend=B),
            grid(SMALL=[(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (32, 128, 4, 4), (64, 128, 8, 3)])
            + grid(LANES=[8, 32]),
        )
    ],
    "mm2": [
        (
            mm,
            lambda: sets(lambda: (randn(2880, 4096),)),
            lambda x: ops.max_min(x, 160, backend=B),
            grid(LARGE=[(128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 4)])
            + grid(LANES=[8, 32]),
        )
    ],
    "dp": [
        (
            dp,
            lambda: sets(lambda: (randn(576, 4096), torch.rand(576, device="cuda"))),
            lambda x, r: ops.greedy_dpp((x, r), 64, backend=B),
            grid(STEP=[4, 8, 16], LANES=[2, 4, 8]),
        ),
        (
            dp,
            lambda: sets(lambda: (randn(2880, 4096), torch.rand(2880, device="cuda"))),
            lambda x, r: ops.greedy_dpp((x, r), 160, backend=B),
            grid(STEP=[4, 8, 16], LANES=[4, 8]),
        ),
    ],
    "te": [
        (
            te,
            lambda: sets(lambda: (randn(32, 576, 128),)),
            lambda x: ops.token_entropy(x, backend=B),
            grid(REFLECT=[1, 2, 4]) + grid(TOKENS=[1, 2, 4, 8], WARPS=[1, 4]),
        )
    ],
    "de": [
        (
            de,
            lambda: sets(
                lambda: (
                    randn(8, 28, 1, 128),
                    randn(8, 4, 32768, 128),
                    randn(8, 4, 32768, 128),
                    index(8, 32000, 1638) + 100,
                )
            ),
            lambda q, k, v, i: ops.indexed_decode(q, k, v, (0, 35), i, (32704, 32768), scale=0.088, backend=B),
            grid(ROWS=[32, 64, 128], WARPS=[4], STAGES=[2, 3, 4], OVERSUBSCRIBE=[4, 8])
            + grid(ROWS=[64], WARPS=[2, 8], OVERSUBSCRIBE=[4]),
        )
    ],
}


def kernels(call, tag):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    d = {}
    for e in p.events():
        if e.device_type == torch.autograd.DeviceType.CUDA:
            d.setdefault(e.name[:24], []).append(e.device_time)
    print("   kernels", tag, {k: round(sorted(v)[len(v) // 2], 1) for k, v in d.items()})


names = sys.argv[2].split(",") if len(sys.argv) > 2 else list(J)
t0 = time.time()
for n in names:
    for mod, make, f, cfgs in J[n]:
        inp = make()
        base = {}
        for c in [{}] + cfgs:
            for k in {k for c in cfgs for k in c}:
                base.setdefault(k, getattr(mod, k))
            for k, v in {**base, **c}.items():
                setattr(mod, k, v)
            try:
                f(*inp[0])
                if sys.argv[1] == "time":
                    m, how = device_time([partial(f, *i) for i in inp], samples=12, budget=0.05)
                    print(f"{n} {inp[0][0].shape} {c}: {m} {how}", flush=True)
                    if not c:
                        kernels(partial(f, *inp[0]), n)
            except Exception as e:
                print(n, c, "FAIL", repr(e)[:150], flush=True)
        for k, v in base.items():
            setattr(mod, k, v)
        del inp
print("done", names, round(time.time() - t0))
