"""Every Triton kernel compiles to machine code for GPUs that this machine need not have.

The interpreter accepts code that the compiler refuses, so both are tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import json, re, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from adaplex.model.kernels.triton import attention, embedding, low_rank, product, replaced
from adaplex.model.kernels.triton import weight_formats as formats

arch, name = int(sys.argv[1]), sys.argv[2]
x, dot = ("*bf16", tl.bfloat16) if name == "bf16" else ("*fp32", tl.float32)
arguments = dict(
    dict.fromkeys(("query", "keys", "values", "sinks", "out", "x", "y"), x),
    **dict.fromkeys(("entered", "residual", "bias", "factor", "weights"), x),
    **dict.fromkeys(("tables", "positions", "table", "tiles", "ids"), "*i64"),
    replaced="*i1",
    **dict.fromkeys(("parts", "sums"), "*fp32"),
    scale="fp32",
)
shape = dict(GROUP=4, DV=128, DV_PADDED=128, WINDOW=100, DK=96, DK_PADDED=128)
shape.update(BLOCK_TOKENS=16, SOFTCAP=30.0, SINKS=True, DOT=dot)
block = dict(BLOCK=True, SHARES=1, DOT=dot)
expert = dict(BLOCK=False, SHARES=8, DOT=dot)
base = dict(BIAS=True, INPUTS=4000, BLOCK_IN=replaced.BLOCK_IN, DOT=dot)
few = dict(SPLIT=1024, DOT=dot, BIAS=False, SPLITS=1, ROWS=16)
more = dict(few, ROWS=product.PROMPT_ROWS)
many = dict(more, BIAS=True, SPLITS=4)
whole_sums = dict(sums=x)
def blocks(weights):
    return dict(BLOCK_IN=weights.block_in, BLOCK_OUT=weights.block_out)
dense = dict(ADD=formats.DENSE.add, **blocks(formats.DENSE), GROUP=1)
nf4 = dict(ADD=formats.NF4.add, **blocks(formats.NF4), GROUP=64)
int4 = dict(ADD=formats.INT4.add, **blocks(formats.INT4), GROUP=32)
kept = {
    "dense": dict(weight=(x,)),
    "nf4": dict(weight=("*u8", "*fp32", "*u8", "*fp32", "*fp32", "*fp32")),
    "int4": dict(weight=("*u8", "*bf16", "*bf16")),
    "merged": dict(weight=("*u8", "*bf16", "*fp32")),
}
compiled = {}
for kernel, constants, *types in (
    (attention._prompt, dict(shape, TOKENS=16, ROWS=64)),
    (attention._decode, dict(shape, TOKENS=1, ROWS=16)),
    (attention._combine, dict(shape, TOKENS=1, ROWS=16)),
    (low_rank._shrink, dict(block, SPLIT=1024, BLOCK_IN=low_rank.BLOCK_IN)),
    (low_rank._expand, dict(block, SPLITS=4, BLOCK_OUT=low_rank.BLOCK_OUT)),
    (low_rank._shrink, dict(expert, SPLIT=1024, BLOCK_IN=low_rank.BLOCK_IN)),
    (low_rank._expand, dict(expert, SPLITS=4, BLOCK_OUT=low_rank.BLOCK_OUT)),
    (replaced._scale, dict(BLOCK_IN=replaced.BLOCK_IN)),
    (replaced._product, dict(base, BLOCK_OUT=replaced.BLOCK_OUT)),
    (replaced._rows, base),
    (embedding._embed, dict(SCALED=True, BLOCK=embedding.BLOCK, DOT=dot)),
    (embedding._weights, dict(BLOCK=embedding.BLOCK)),
    (product._multiply, dict(few, **dense), kept["dense"]),
    (product._multiply, dict(more, **dense), kept["dense"]),
    (product._multiply, dict(many, **dense), kept["dense"], whole_sums),
    (product._multiply, dict(few, **nf4), kept["nf4"]),
    (product._multiply, dict(more, **nf4), kept["nf4"]),
    (product._multiply, dict(many, **nf4), kept["nf4"], whole_sums),
    (product._multiply, dict(few, **int4), kept["int4"]),
    (product._multiply, dict(more, **int4), kept["int4"]),
    (product._multiply, dict(many, **int4), kept["int4"], whole_sums),
    (product._multiply, dict(few, **dict(int4, GROUP=16)), kept["merged"]),
    (product._multiply, dict(many, **dict(int4, GROUP=128)), kept["merged"], whole_sums),
    (product._add, dict(BIAS=True, SPLITS=4, BLOCK=product.SUMMED)),
):
    names = kernel.arg_names
    typed = dict(arguments, **{n: t for each in types for n, t in each.items()})
    signature = {n: "constexpr" if n in constants else typed.get(n, "i32") for n in names}
    used = {n: constants[n] for n in names if n in constants}
    # As the launcher finds for real tensors: addresses and strides are multiples of 16.
    whole = []
    for i, n in enumerate(names):
        if isinstance(signature[n], tuple):
            whole += [(i, j) for j in range(len(signature[n]))]
        elif signature[n] not in ("constexpr", "fp32"):
            whole.append((i,))
    hints = {path: [["tt.divisibility", 16]] for path in whole}
    source = ASTSource(kernel, signature, used, hints)
    options = dict(enable_fp_fusion=False) if kernel is product._multiply else {}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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
"""Limit of shared memory of a program in bytes, by ten times the compute capability."""


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
    assert len(kernels) == 24
    for name, made in kernels.items():
        products = name.rstrip("0123456789") not in ("_combine", "_scale", "_weights", "_add")
        assert made["code"] > 0
        assert made["shared"] <= SHARED[arch]
        assert not made["atomics"]
        assert bool(made["tensor_cores"]) == (dtype == "bf16" and products)
        # Tiles of few and of many rows are two widths of one instruction, so sums have one order.
        if dtype == "bf16" and name.startswith("_multiply"):
            kind = "mma.sync.aligned.m16n8k16" if arch == 80 else "wgmma.mma_async.sync.aligned.m64"
            assert [used.startswith(kind) for used in made["tensor_cores"]] == [True]
