"""Every Triton kernel compiles to machine code for GPUs that are not here.

The interpreter accepts what the compiler does not; both are asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, re, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from adaplex.model.kernels import triton_attention as attention, triton_low_rank as low_rank
from adaplex.model.kernels import triton_embedding as embedding, triton_linear as linear
from adaplex.model.kernels import triton_int4 as int4

arch, name = int(sys.argv[1]), sys.argv[2]
x, dot = ("*bf16", tl.bfloat16) if name == "bf16" else ("*fp32", tl.float32)
arguments = dict(
    dict.fromkeys(("query", "keys", "values", "sinks", "out", "x", "y"), x),
    **dict.fromkeys(("entered", "residual", "bias", "factor", "weights"), x),
    **dict.fromkeys(("tables", "positions", "table", "tiles", "ids"), "*i64"),
    replaced="*i1",
    codes="*u8",
    scales="*bf16",
    zeros="*bf16",
    **dict.fromkeys(("parts", "sums"), "*fp32"),
    scale="fp32",
)
shape = dict(GROUP=4, DV=128, DV_PADDED=128, WINDOW=100, DK=96, DK_PADDED=128)
shape.update(BLOCK_TOKENS=16, SOFTCAP=30.0, SINKS=True, DOT=dot)
block = dict(BLOCK=True, SHARES=1, DOT=dot)
expert = dict(BLOCK=False, SHARES=8, DOT=dot)
base = dict(BIAS=True, INPUTS=4000, BLOCK_IN=linear.BLOCK_IN, DOT=dot)
blocks = dict(SPLIT=1024, BLOCK_IN=int4.BLOCK_IN, BLOCK_OUT=int4.BLOCK_OUT, DOT=dot)
few = dict(blocks, BIAS=False, SPLITS=1, GROUP=32, ROWS=16)
more = dict(few, ROWS=int4.PROMPT_ROWS)
many = dict(more, BIAS=True, SPLITS=4)
whole_sums, merged = dict(sums=x), dict(zeros="*fp32")
compiled = {}
for kernel, constants, *types in (
    (attention._prompt, dict(shape, TOKENS=16, ROWS=64)),
    (attention._decode, dict(shape, TOKENS=1, ROWS=16)),
    (attention._combine, dict(shape, TOKENS=1, ROWS=16)),
    (low_rank._shrink, dict(block, SPLIT=1024, BLOCK_IN=low_rank.BLOCK_IN)),
    (low_rank._expand, dict(block, SPLITS=4, BLOCK_OUT=low_rank.BLOCK_OUT)),
    (low_rank._shrink, dict(expert, SPLIT=1024, BLOCK_IN=low_rank.BLOCK_IN)),
    (low_rank._expand, dict(expert, SPLITS=4, BLOCK_OUT=low_rank.BLOCK_OUT)),
    (linear._scale, dict(BLOCK_IN=linear.BLOCK_IN)),
    (linear._product, dict(base, BLOCK_OUT=linear.BLOCK_OUT)),
    (linear._rows, base),
    (embedding._embed, dict(SCALED=True, BLOCK=embedding.BLOCK, DOT=dot)),
    (embedding._weights, dict(BLOCK=embedding.BLOCK)),
    (int4._multiply, few),
    (int4._multiply, more),
    (int4._multiply, many, whole_sums),
    (int4._multiply, dict(few, GROUP=16), merged),
    (int4._multiply, dict(many, GROUP=128), merged, whole_sums),
    (int4._add, dict(BIAS=True, SPLITS=4, BLOCK=int4.SUMMED)),
):
    names = kernel.arg_names
    typed = dict(arguments, **{n: t for each in types for n, t in each.items()})
    signature = {n: "constexpr" if n in constants else typed.get(n, "i32") for n in names}
    used = {n: constants[n] for n in names if n in constants}
    # What the launcher finds out of real tensors: addresses and strides are multiples of 16.
    whole = [i for i, n in enumerate(names) if signature[n] not in ("constexpr", "fp32")]
    hints = {(i,): [["tt.divisibility", 16]] for i in whole}
    source = ASTSource(kernel, signature, used, hints)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    ptx = made.asm["ptx"]
    compiled[f"{kernel.__name__}{len(compiled)}"] = {
        "code": len(made.asm["cubin"]),
        "shared": made.metadata.shared,
        "atomics": bool(re.search(r"\\b(atom|red)\\.", ptx)),
        "tensor_cores": sorted(set(re.findall(r"\\bw?g?mma[._\\w]*\\.m\\d+n\\d+k\\d+", ptx))),
    }
print(json.dumps(compiled))
"""
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have, by compute capability times ten."""


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", sorted(SHARED))
def test_kernels_compile(arch: int, dtype: str, tmp_path: os.PathLike[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(arch), dtype],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert len(kernels) == 18
    for name, made in kernels.items():
        products = name.rstrip("0123456789") not in ("_combine", "_scale", "_weights", "_add")
        assert made["code"] > 0
        assert made["shared"] <= SHARED[arch]
        assert not made["atomics"]
        assert bool(made["tensor_cores"]) == (dtype == "bf16" and products)
        # Tiles of few rows and of many are two widths of one instruction: sums go in one order.
        if dtype == "bf16" and name.startswith("_multiply"):
            kind = "mma.sync.aligned.m16n8k16" if arch == 80 else "wgmma.mma_async.sync.aligned.m64"
            assert [used.startswith(kind) for used in made["tensor_cores"]] == [True]
