"""native.c under AddressSanitizer and UndefinedBehaviorSanitizer, over odd shapes, pruned layers, int8 and int4.

    python tests/ops/sanitized.py

Builds the library with both, in a folder of its own, and runs every function of it: on tensors of odd sizes, whose ends
are the ends of their memory, and through whole models. A read or write past an end, or arithmetic that C does not
define, stops the script with the sanitizer's report. Results are compared with torch's. Needs gcc; a few minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
LIBRARIES = ("libasan.so", "libubsan.so")


def main() -> int:
    """This script again, in a process into which the sanitizers were loaded first."""
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in LIBRARIES
    ]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(found),
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "CC": "gcc",
            "XDG_CACHE_HOME": cache,
            "OMP_NUM_THREADS": "2",
        }
        return subprocess.run([sys.executable, __file__, "inside"], env=environment).returncode


def inside() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    from families import small_model, tokens
    from torch import nn

    from nemotron_h import NemotronHCache, ops
    from nemotron_h.ops import native
    from nemotron_h.quantization.int8_int4 import config_for

    native.load._FLAGS = (*(flag for flag in native.load._FLAGS if flag != "-O3"), "-O1", *FLAGS)  # type: ignore[assignment]
    assert native.library() is not None, native.reason()
    calls: Counter[str] = Counter()
    worst: Counter[str] = Counter()
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
        calls[name] += 1
        difference = (
            (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-9)
        ).item()
        worst[name] = max(worst[name], difference)
        assert difference <= tolerance, f"{name}: {difference}"

    def without_library(call):
        os.environ[native.ENVIRONMENT_VARIABLE] = "0"
        try:
            return call()
        finally:
            del os.environ[native.ENVIRONMENT_VARIABLE]

    sizes = (1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 64, 65, 97, 129)
    with torch.no_grad():
        for n in sizes:
            for k in sizes:
                for dtype in (torch.float32, torch.bfloat16):
                    weight = randn(n, k, dtype=dtype)
                    for rows in (1, 2, 3, 4, 5, 9, 17):
                        x = randn(rows, k, dtype=dtype)
                        compare("linear", native.linear(x, weight), x.double() @ weight.double().T, 2e-2)
                for bits in (8, 4):
                    q, scale = ops.quantize_weight(randn(n, k), bits)
                    plain = ops.dequantize_weight(q, scale, bits, k, torch.float32)
                    for rows in (1, 3, 6):
                        x = randn(rows, k, dtype=torch.bfloat16)
                        compare(f"linear int{bits}", native.linear(x, q, scale), x.double() @ plain.double().T, 5e-2)
        for experts in (1, 3, 8):
            for n, k in ((5, 7), (16, 33), (65, 64)):
                weight, x = randn(experts, n, k), randn(6, k)
                chosen = torch.randint(0, experts, (6,), generator=draw).sort().values
                theirs = torch.einsum("sk,snk->sn", x.double(), weight[chosen].double())
                compare("linear of experts", native.linear(x, weight, experts_M=chosen), theirs, 1e-5)
        for width in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                x, w = randn(3, width, dtype=dtype), randn(width, dtype=dtype)
                compare("rms_norm", ops.rms_norm(x, w, 1e-5), without_library(lambda: ops.rms_norm(x, w, 1e-5)), 2e-2)  # noqa: B023
                wide = randn(3, 2 * width + 3, dtype=dtype)
                z, y = wide[:, 3 : width + 3], randn(3, width, dtype=dtype)
                groups = next(g for g in (5, 3, 2, 1) if width % g == 0)
                norm = lambda: ops.gated_rms_norm(y, z, w, 1e-5, groups)  # noqa: B023, E731
                compare("gated_rms_norm", norm(), without_library(norm), 2e-2)
        for channels in (1, 3, 8, 17, 65):
            for taps in (2, 3, 4, 8):
                for length in (1, 2, 5, 37):
                    x = randn(2, length, channels + 5)[..., 2 : channels + 2]
                    arguments = randn(channels, taps), randn(channels)
                    window = randn(2, channels, taps - 1)
                    conv = lambda: ops.causal_conv(x, *arguments, window_BCW=window)[0]  # noqa: B023, E731
                    compare("causal_conv", conv(), without_library(conv), 1e-5)
        for keys in (1, 2, 7, 16, 17, 65):
            for heads, key_heads in ((1, 1), (3, 1), (6, 2), (8, 8), (10, 2)):
                for queries in (q for q in (1, 2, 5) if q <= keys):
                    q, buffer = randn(2, heads, queries, 16), randn(2, key_heads, keys + 3, 16)
                    k = v = buffer[:, :, :keys]
                    attend = lambda: ops.causal_attention(q, k, v, 0.25)  # noqa: B023, E731
                    compare("attend", attend(), without_library(attend), 1e-5)

        def decode(model, ids, first: int = 5) -> torch.Tensor:
            cache = NemotronHCache(model.config)
            cache.activate_past_recording()
            out = [model(ids[:, :first], cache=cache).logits]
            out += [model(part, cache=cache).logits for part in ids[:, first:].split([1, 3, 1, 2, 1, 1], dim=1)]
            cache.crop(-2)
            return torch.cat([*out, model(ids[:, -2:], cache=cache).logits], 1)

        shapes = [
            {},
            {"hidden_size": 17, "intermediate_size": 23},
            {"mamba_num_heads": 3, "n_groups": 3, "mamba_head_dim": 5, "ssm_state_size": 7, "conv_kernel": 2},
            {"mamba_num_heads": 10, "n_groups": 5, "mamba_head_dim": 1, "ssm_state_size": 1, "conv_kernel": 8},
            {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 33, "vocab_size": 101},
        ]
        with tempfile.TemporaryDirectory() as folder:
            for number, shape in enumerate(shapes):
                for family in ("dense", "moe", "attention", "mamba"):
                    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 8e-2)):
                        model = small_model(family, dtype, **{"head_dim": 16, **shape})
                        for module in [m for m in model.modules() if hasattr(m, "up_proj") and hasattr(m, "act_fn")]:
                            if number and isinstance(
                                module.up_proj, nn.Linear
                            ):  # pruned: its attributes say what they said
                                module.up_proj.weight = nn.Parameter(module.up_proj.weight[:13].clone())
                                module.down_proj.weight = nn.Parameter(module.down_proj.weight[:, :13].clone())
                        model.requires_grad_(False)
                        for rows in (1, 3):
                            run = lambda: decode(model, tokens(rows, 14))  # noqa: B023, E731
                            compare(f"decoding {dtype}"[:18], run(), without_library(run), tolerance)
                # With experts, what rounds differently may choose others: those are run, and not compared.
                for family in ("dense", "moe") if number < 2 else ():
                    source = f"{folder}/{number}-{family}"
                    small_model(family, torch.bfloat16, **{"head_dim": 16, **shape}).save_pretrained(source)
                    for bits in ("int8", "int4"):
                        config = config_for(bits, source, {})
                        packed = type(model).from_pretrained(source, quantization_config=config).eval()
                        for rows in (1, 2):
                            run = lambda: decode(packed, tokens(rows, 14))  # noqa: B023, E731
                            theirs = without_library(run) if family == "dense" else run()
                            compare(f"decoding {bits}, {family}", run(), theirs, 1.5e-1)
    for name in calls:
        print(f"{name:24}{calls[name]:6} calls, largest difference {worst[name]:.1e}")
    print(f"{native.reason()}: no report of a sanitizer")


if __name__ == "__main__":
    if sys.argv[1:] == ["inside"]:
        inside()
    else:
        sys.exit(main())
