"""nemotron_h/ops/native: the products with few rows against float64, what happens where there is no
compiler, who may be handed to C.

`mamba_step` and `attend` are tested beside their callers (test_mamba_step.py, test_attention.py).
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from comparing import error, random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import nemotron_h
from nemotron_h import ops
from nemotron_h.ops import native, reference
from nemotron_h.ops.linear import linear

LIBRARY = native.library()  # before any test changes where it is looked for
needs_library = pytest.mark.skipif(LIBRARY is None, reason=native.reason())
N = 37  # odd: the kernels take four rows of the weight at a time
KINDS = ["float32", "bfloat16", "int8", "int4"]


# ---------------------------------------------------------------------------------------------------------- linear


def pack_int4(q_NJ: Tensor) -> Tensor:
    """q in 0..15, (..., J) with J a multiple of 64, as int32 (..., J / 8), written out from the layout.

    A block of 64 inputs is 8 words, or 16 lanes of 16 bits; nibble t (bits 4 t) of lane L is input 16 t + L.
    """
    words = torch.zeros(*q_NJ.shape[:-1], q_NJ.shape[-1] // 8, dtype=torch.int64)
    for k in range(q_NJ.shape[-1]):
        block, t, lane = k // 64, k % 64 // 16, k % 16
        words[..., 8 * block + lane // 2] |= q_NJ[..., k].long() << (16 * (lane % 2) + 4 * t)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def weights(kind: str, generator: torch.Generator, k: int, *lead: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """A weight (*lead, N, K) as the kernels take it, its scale, and what it stands for in float64."""
    if kind in ("float32", "bfloat16"):
        w = random(generator, *lead, N, k, dtype=getattr(torch, kind))
        return w, None, w.double()
    if kind == "int8":
        q = torch.randint(-127, 128, (*lead, N, k), generator=generator, dtype=torch.int8)
        scale = torch.rand(*lead, N, generator=generator) + 0.1
        return q, scale, q.double() * scale.double()[..., None]
    padded = -(-k // 64) * 64
    q = torch.randint(0, 16, (*lead, N, padded), generator=generator)
    q[..., k:] = 8
    scale = ((torch.rand(*lead, N, padded // 32, generator=generator) + 0.1) * 0.1).bfloat16()
    exact = (q.double() - 8) * scale.double().repeat_interleave(32, -1)
    return pack_int4(q), scale, exact[..., :k]


def row_error(y_MN: Tensor, exact_MN: Tensor) -> float:
    """The largest difference in a row over the largest value that the row should have."""
    assert y_MN.isfinite().all()
    difference = (y_MN.double() - exact_MN).abs().amax(-1)
    return (difference / exact_MN.abs().amax(-1).clamp(min=1e-300)).max().item()


def tolerance(kind: str, dtype: torch.dtype) -> float:
    if dtype == torch.bfloat16:
        return 2**-8
    return 1e-6 if kind in ("float32", "bfloat16") else 1e-4


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x-float32", "x-bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
class TestLinear:
    @pytest.mark.core
    def test_every_number_of_rows_and_odd_widths(self, generator, kind, dtype):
        for k in (7, 100, 130, 512, 600):
            w, scale, exact_NK = weights(kind, generator, k)
            for rows in range(1, 10):
                x_MK = random(generator, rows, k, dtype=dtype)
                y_MN = native.linear(x_MK, w, scale)
                assert y_MN.dtype == dtype and y_MN.shape == (rows, N)
                assert row_error(y_MN, x_MK.double() @ exact_NK.T) <= tolerance(kind, dtype), (k, rows)

    @pytest.mark.parametrize("k", [7, 130])
    def test_each_row_meets_its_own_expert(self, generator, kind, dtype, k):
        w, scale, exact_ENK = weights(kind, generator, k, 5)
        for experts in ([3], [4, 0, 4, 2], [1] * 6, [0, 1, 2, 3, 4, 0, 1, 2, 3]):
            experts_M = torch.tensor(experts)
            x_MK = random(generator, len(experts), k, dtype=dtype)
            y_MN = native.linear(x_MK, w, scale, experts_M)
            expected = torch.einsum("mk,mnk->mn", x_MK.double(), exact_ENK[experts_M])
            assert row_error(y_MN, expected) <= tolerance(kind, dtype), experts

    def test_large_and_mixed_and_zero_rows(self, generator, kind, dtype):
        w, scale, exact_NK = weights(kind, generator, 130)
        x_MK = random(generator, 6, 130, dtype=torch.float64)
        x_MK[0] *= 1e30
        x_MK[1, 64:] *= 1e6  # groups of 32 with scales of their own
        x_MK[2, ::3] = 0
        x_MK[3] = 0
        x_MK[4] *= 1e-20
        x_MK = x_MK.to(dtype)
        y_MN = native.linear(x_MK, w, scale)
        assert torch.equal(y_MN[3], torch.zeros(N, dtype=dtype))
        assert row_error(y_MN, x_MK.double() @ exact_NK.T) <= tolerance(kind, dtype)

    def test_the_same_for_any_number_of_threads(self, generator, kind, dtype):
        w, scale, exact_NK = weights(kind, generator, 4000)  # large enough to be shared out
        x_MK = random(generator, 26, 4000, dtype=dtype)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(native.linear(x_MK, w, scale))
        finally:
            torch.set_num_threads(threads)
        assert row_error(results[0], x_MK.double() @ exact_NK.T) <= tolerance(kind, dtype)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    def test_weights_that_begin_anywhere(self, generator, kind, dtype):
        """A slice of a larger tensor, at an address of its elements' alignment alone."""
        w, scale, exact_NK = weights(kind, generator, 130)
        at = torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape)
        x_MK = torch.cat([torch.zeros(1, dtype=dtype), random(generator, 260, dtype=dtype)])[1:].view(2, 130)
        y_MN = native.linear(x_MK, at, scale)
        assert row_error(y_MN, x_MK.double() @ exact_NK.T) <= tolerance(kind, dtype)


@pytest.mark.core
@pytest.mark.parametrize("on", [pytest.param("1", marks=needs_library), "0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_of_a_few_rows(generator, monkeypatch, dtype, on):
    """`rms_norm` with native.c and without, below and above the number of rows that it takes."""
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, on)
    calls, function = [], native.rms_norm
    monkeypatch.setattr(native, "rms_norm", lambda *args: calls.append(1) or function(*args))
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for shape, size in itertools.product(((), (1,), (1, 1), (2, 2), (3, 3)), (1, 7, 8, 37, 128)):
        x, weight = random(generator, *shape, size, dtype=dtype), random(generator, size, dtype=dtype)
        for times in (1.0, 1e-3, 100.0):
            expected = reference.rms_norm((x * times).double(), weight.double(), 1e-5)
            y = ops.rms_norm(x * times, weight, 1e-5)
            assert y.dtype == dtype and error(y, expected) <= bound, (shape, size, times)
    zero = ops.rms_norm(torch.zeros(1, 8, dtype=dtype), torch.ones(8, dtype=dtype), 1e-5)
    assert torch.equal(zero, torch.zeros(1, 8, dtype=dtype))
    assert bool(calls) == (on == "1" and dtype in (torch.float32, torch.bfloat16))
    leaf = random(generator, 1, 8, dtype=dtype).requires_grad_()
    ops.rms_norm(leaf, torch.ones(8, dtype=dtype), 1e-5).sum().backward()
    exact = leaf.detach().double().requires_grad_()
    reference.rms_norm(exact, torch.ones(8, dtype=torch.float64), 1e-5).sum().backward()
    assert error(leaf.grad, exact.grad) <= 8 * bound


BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.fixture
def counted(monkeypatch):
    """native.c on; the list grows with every call of the function that is named."""
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)

    def count(name):
        calls, function = [], getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args: calls.append(1) or function(*args))
        return calls

    return count


@needs_library
@pytest.mark.core
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("times", [1.0, 40.0], ids=["small", "where exp ends"])
def test_convolution(generator, counted, dtype, times):
    """Lengths around a thread's stretch of 128, channels around its 512 and the 8 of a vector, x a slice of more."""
    calls = counted("causal_conv")
    shapes = list(itertools.product((1, 2, 127, 129, 300), (1, 7, 24, 520), (1, 2, 4), (True, False)))
    for length, channels, kernel, begun in shapes:
        x = (random(generator, 2, length, channels + 3, dtype=dtype) * times)[..., 2:-1]
        weight, bias = random(generator, channels, kernel, dtype=dtype), random(generator, channels, dtype=dtype)
        window = random(generator, 2, channels, kernel - 1, dtype=dtype) if begun else None
        exact = None if window is None else window.double()
        y, left = ops.causal_conv(x, weight, bias if begun else None, window_BCW=window)
        bias = bias.double() if begun else None
        expected, after = reference.causal_conv(x.double(), weight.double(), bias, window_BCW=exact)
        assert y.dtype == dtype and error(y, expected) <= BOUND[dtype], (length, channels, kernel)
        assert torch.equal(left.double(), after)
    assert len(calls) == len(shapes)


@needs_library
@pytest.mark.core
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("times", [1.0, 40.0], ids=["small", "where exp ends"])
def test_gated_norm(generator, counted, dtype, times):
    calls = counted("gated_rms_norm")
    shapes = list(itertools.product(((1,), (17,), (2, 5), (33, 1)), (1, 2, 8), (1, 7, 8, 37)))
    for shape, groups, span in shapes:
        size = groups * span
        y, weight = random(generator, *shape, size, dtype=dtype), random(generator, size, dtype=dtype)
        z = (random(generator, *shape, size + 3, dtype=dtype) * times)[..., 1:-2]
        out = ops.gated_rms_norm(y, z, weight, 1e-5, groups)
        expected = reference.gated_rms_norm(y.double(), z.double(), weight.double(), 1e-5, groups)
        assert out.dtype == dtype and error(out, expected) <= BOUND[dtype] * (3 if times > 1 else 1), (
            shape,
            groups,
            span,
        )
    assert len(calls) == len(shapes)
    rows_unevenly_apart = random(generator, 2, 9, 8, dtype=dtype)[:, 2:]
    ops.gated_rms_norm(
        random(generator, 2, 7, 8, dtype=dtype), rows_unevenly_apart, torch.ones(8, dtype=dtype), 1e-5, 2
    )
    assert len(calls) == len(shapes)


@needs_library
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_convolution_and_norm_keep_what_is_not_a_number(generator, dtype, value):
    """As torch has it: silu(-inf) is NaN there too, and a norm over an infinity."""
    x, weight = random(generator, 1, 9, 16, dtype=dtype), random(generator, 16, 4, dtype=dtype).abs()
    x[0, 4, 11] = value
    y, _ = ops.causal_conv(x, weight, None)
    wrong = torch.zeros(9, 16, dtype=torch.bool)
    wrong[4:8, 11] = True
    # minus infinity: e^88 ends before it, so -0 where torch says NaN
    assert torch.equal(~y[0].isfinite(), wrong) or value == -float("inf")
    assert y[0][~wrong].isfinite().all()
    out = ops.gated_rms_norm(x, torch.ones_like(x), torch.ones(16, dtype=dtype), 1e-5, 2)
    assert not out[0, 4, 11].isfinite() and out[0, 4, :8].isfinite().all() and out[0, [0, 8]].isfinite().all()


@needs_library
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_stays_so(generator, kind, value):
    w, _, _ = weights(kind, generator, 130)
    x_MK = random(generator, 3, 130, dtype=torch.float32)
    x_MK[1, 77] = value
    y_MN = native.linear(x_MK, w)
    assert not y_MN[1].isfinite().any() and y_MN[[0, 2]].isfinite().all()


@needs_library
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1])
def test_no_nan_is_rounded_to_a_number(bits):
    """Adding to the bits of the last ones would carry into the sign."""
    weight = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        assert native.linear(torch.ones(1, 1, dtype=dtype), weight).isnan().all()


@needs_library
def test_bfloat16_is_rounded_to_nearest_even():
    """Sums that lie exactly between two bfloat16 numbers, and beside the middle."""
    sums = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-15, -(1 + 2**-8), 3e38, float("inf")])
    y_MN = native.linear(torch.ones(1, 1, dtype=torch.bfloat16), sums[:, None].contiguous())
    assert torch.equal(y_MN[0], sums.bfloat16())


# ------------------------------------------------------------------------------------------- where nothing was built


def forget() -> None:
    """As a process that has loaded nothing."""
    native.load._built.cache_clear()
    native.load.loaded = None


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache folder; gives that folder."""
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # What this process has loaded comes back with the fixture's end.
    monkeypatch.setattr(native.load, "loaded", None, raising=False)
    monkeypatch.setattr(native.load, "_thread", None)
    forget()
    yield tmp_path / "cache" / "nemotron_h"
    if native.load._thread is not None:  # or it would build with the next test's compiler, in the next test's folder
        native.load._thread.join(60)
    native.load._built.cache_clear()


def works(generator: torch.Generator) -> bool:
    """Whether a product of one row is right, whoever makes it."""
    x, w = random(generator, 1, 32, dtype=torch.float32), random(generator, N, 32, dtype=torch.float32)
    return row_error(linear(x, w), x.double() @ w.double().T) <= 1e-6


def script(path: Path, body: str) -> Path:
    path.write_text("#!/bin/sh\n" + textwrap.dedent(body))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler in name: it notes what it is asked, and "links" the library that was built before, slowly enough for
    a second one to come upon it half done."""
    built = Path(LIBRARY._name)
    log = tmp_path / "asked"
    log.touch()
    path = script(
        tmp_path / "stand-in-cc",
        f"""
        echo "$1" >> {log}
        case "$1" in
        --version) echo "stand-in ${{STAND_IN_VERSION:-1}}"; exit 0;;
        esac
        link="$1"
        while [ "$1" != -o ]; do shift; done
        if [ "$link" = -shared ]; then
            head -c 1000 {built} > "$2"
            sleep 0.2
            cat {built} > "$2"
        else
            : > "$2"
        fi
        """,
    )

    def asked() -> list[str]:
        return log.read_text().split()

    return path, built, asked


@pytest.mark.core
def test_without_a_compiler(fresh, monkeypatch, generator):
    monkeypatch.setenv("PATH", "")
    for cc in (None, "no-such-compiler"):
        if cc is not None:
            monkeypatch.setenv("CC", cc)
        forget()
        assert native.library() is None and works(generator)
        assert native.reason() == (
            "no C compiler was found (cc, gcc, clang), so decoding on this CPU runs in torch, slower"
        )
    assert not native.serves(torch.ones(1))


@needs_library
def test_a_compiler_of_another_name_gives_way_to_the_usual_ones(fresh, monkeypatch, compiler, tmp_path):
    path, _, _ = compiler
    script(tmp_path / "gcc", f'exec {path} "$@"')
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(native.load.shutil, "which", lambda name: str(tmp_path / "gcc") if name == "gcc" else None)
    assert native.library() is not None and native.reason() == "native.c, built with gcc"


@pytest.mark.parametrize("value", ["0", "off", "False", "no"])
def test_switched_off(monkeypatch, generator, value):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, value)
    assert native.library() is None and not native.serves(torch.ones(1))
    assert native.reason() == f"NEMOTRON_H_KERNELS={value}"
    assert works(generator)


@needs_library
@pytest.mark.parametrize("value", [None, "auto", "1"])
def test_switched_on(monkeypatch, value):
    if value is None:
        monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, value)
    assert native.library() is not None and native.serves(torch.ones(1))


FAILURES = {
    "version": ("echo 'cc: licence expired' >&2; exit 3", "licence expired"),
    "compile": (
        'case "$1" in --version) echo 1;; *) echo "native.c:1: error: no OpenMP\n  here" >&2; exit 1;; esac',
        "error: no OpenMP here",
    ),
    "link": (
        'case "$1" in --version) echo 1;; -shared) echo "ld: cannot find -lm" >&2; exit 1;; esac',
        "cannot find -lm",
    ),
    "silent": ('case "$1" in --version) echo 1;; *) exit 7;; esac', "Command"),
    "nothing-written": ("echo 1", "No such file"),
    "not-a-library": (
        'case "$1" in --version) echo 1;; *) while [ "$1" != -o ]; do shift; done; echo nonsense > "$2";; esac',
        "file too short",
    ),
    "not-a-program": (None, "Exec format error"),
}


@pytest.mark.core
@pytest.mark.parametrize("failure", FAILURES)
def test_a_compiler_that_fails(fresh, monkeypatch, tmp_path, generator, caplog, failure):
    body, words = FAILURES[failure]
    cc = script(tmp_path / "bad-cc", body or "")
    if body is None:
        cc.write_bytes(b"\x7fELF and nothing else")
    monkeypatch.setenv("CC", str(cc))
    with caplog.at_level(logging.INFO, "nemotron_h"):
        assert native.library() is None and works(generator)
    reason = native.reason()
    assert reason.startswith(f"{cc} cannot build native.c (") and words in reason
    assert reason.endswith("), so decoding on this CPU runs in torch, slower") and "\n" not in reason
    assert len(caplog.records) == 1  # said once, and not asked again at every product
    assert [entry.name for entry in fresh.glob("*")] in ([], [next((p.name for p in fresh.glob("*.so")), "")])


def test_what_the_compiler_says_at_length_is_cut(fresh, monkeypatch, tmp_path):
    cc = script(tmp_path / "wordy-cc", f"echo '{40 * 'a warning '}' >&2; exit 1")
    monkeypatch.setenv("CC", str(cc))
    assert len(native.reason()) < 200 + len(str(cc)) + 100 and "a warning a warning" in native.reason()


@needs_library
@pytest.mark.parametrize("problem", ["in-the-way", "not-writable", "another-users"])
def test_a_cache_folder_that_cannot_be_used(fresh, monkeypatch, compiler, generator, tmp_path, problem):
    path, _, _ = compiler
    monkeypatch.setenv("CC", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if problem == "in-the-way":
        fresh.parent.write_text("a file")
    elif problem == "not-writable":  # to root everything is: asked, the system says no
        access = os.access
        monkeypatch.setattr(native.load.os, "access", lambda where, mode: mode != os.W_OK and access(where, mode))
    else:
        uid = os.getuid()
        monkeypatch.setattr(native.load.os, "getuid", lambda: uid + 1)
    assert native.library() is not None and works(generator)
    where = Path(native.library()._name)
    assert where.parent.parent == tmp_path and where.parent.name.startswith("nemotron_h-")
    assert stat.S_IMODE(where.parent.stat().st_mode) == 0o700  # nobody else may put a library there


@needs_library
def test_nowhere_to_write_at_all(fresh, monkeypatch, compiler, generator, tmp_path):
    monkeypatch.setenv("CC", str(compiler[0]))
    fresh.parent.write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not" / "there"))
    assert native.library() is None and works(generator)
    assert "No such file" in native.reason()


@needs_library
class TestBuilding:
    def test_the_file_is_used_again(self, fresh, monkeypatch, compiler):
        path, _, asked = compiler
        monkeypatch.setenv("CC", str(path))
        first = native.library()._name
        assert Path(first).parent == fresh and stat.S_IMODE(fresh.stat().st_mode) == 0o700
        assert asked() == ["--version", native.load._FLAGS[0], "-shared"]
        forget()
        assert native.library()._name == first
        assert asked() == ["--version", native.load._FLAGS[0], "-shared", "--version"]
        for _ in range(3):
            native.library()
        assert len(asked()) == 4  # one process asks once

    def test_another_compiler_source_or_processor_is_another_file(self, fresh, monkeypatch, compiler, tmp_path):
        path, _, _ = compiler
        names = {native.load._cached(str(path)).name}
        monkeypatch.setenv("STAND_IN_VERSION", "2")
        names.add(native.load._cached(str(path)).name)
        monkeypatch.setattr(native.load, "_processor", lambda: "another")
        names.add(native.load._cached(str(path)).name)
        source = tmp_path / "changed.c"
        source.write_text(native.load.SOURCE.read_text() + "\n")
        monkeypatch.setattr(native.load, "SOURCE", source)
        names.add(native.load._cached(str(path)).name)
        assert len(names) == 4 and {entry.name for entry in fresh.iterdir()} == names

    def test_nothing_waits_for_the_compiler(self, fresh, monkeypatch, compiler):
        """The first question begins the build and is answered with torch; once it is built, with the library."""
        path, _, _ = compiler
        monkeypatch.setenv("CC", str(path))
        monkeypatch.setattr(native.load, "loaded", None)
        monkeypatch.setattr(native.load, "_thread", None)
        begun, go_on, build = threading.Event(), threading.Event(), native.load._build

        def slow(*arguments):
            begun.set()
            assert go_on.wait(60)
            build(*arguments)

        monkeypatch.setattr(native.load, "_build", slow)
        x = torch.ones(1, 8)
        assert not native.serves(x) and begun.wait(60) and not native.serves(x)
        go_on.set()
        native.load._thread.join(60)
        assert native.serves(x) and native.library() is not None

    def test_threads_at_once(self, fresh, monkeypatch, compiler):
        path, _, asked = compiler
        monkeypatch.setenv("CC", str(path))
        found = []
        threads = [threading.Thread(target=lambda: found.append(native.library()._name)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len(set(found)) == 1
        assert asked() == ["--version", native.load._FLAGS[0], "-shared"]

    def test_builders_at_once_see_the_file_whole_or_not_at_all(self, fresh, compiler):
        """Several that all find nothing and build, as processes do that start together."""
        path, built, asked = compiler
        start, contents = threading.Barrier(6), []

        def build():
            start.wait()
            contents.append(native.load._cached(str(path)).read_bytes())

        threads = [threading.Thread(target=build) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert asked().count("-shared") > 1  # the premise: they did build beside each other
        assert contents == [built.read_bytes()] * 6
        assert len(list(fresh.iterdir())) == 1  # nothing half done is left lying about

    def test_two_processes_at_once(self, fresh, compiler, monkeypatch):
        """This one and another, which begins to build when this one does."""
        path, built, asked = compiler
        monkeypatch.setenv("CC", str(path))
        package = Path(nemotron_h.__file__).parent
        code = f"""
        import sys, types
        # ops alone: the package itself imports transformers, which takes seconds
        sys.modules["nemotron_h"] = types.ModuleType("nemotron_h")
        sys.modules["nemotron_h"].__path__ = [{str(package)!r}]
        import torch
        from nemotron_h.ops import native
        print("ready", flush=True)
        sys.stdin.readline()
        assert native.library() and native.serves(), native.reason()
        y = native.linear(torch.full((1, 64), 2.0), torch.full((3, 64), 0.5))
        print(y.tolist(), native.library()._name)
        """
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], text=True, **pipes) as other:
            assert other.stdout.readline() == "ready\n", other.stderr.read()
            other.stdin.write("go\n")
            other.stdin.flush()
            here = native.library()._name
            said, complaint = other.communicate(timeout=120)
        assert said == f"[[64.0, 64.0, 64.0]] {here}\n" and other.returncode == 0, complaint
        assert Path(here).read_bytes() == built.read_bytes() and list(fresh.iterdir()) == [Path(here)]
        assert asked().count("--version") == 2


# ---------------------------------------------------------------------------------------------------------- serves


@needs_library
class TestServes:
    def test_plain_tensors(self):
        x, parameter = torch.ones(2, 3), torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)
        assert native.serves(x, None, parameter, x.bfloat16(), x[1:], x[0])

    def test_not_contiguous(self):
        x = torch.ones(4, 6)
        assert not native.serves(x.t()) and not native.serves(x[:, ::2]) and not native.serves(x[:, 1:])
        assert not native.serves(x[:1].expand(3, 6))
        assert not native.serves(x, None, x.t())

    def test_another_device(self):
        assert not native.serves(torch.ones(2, device="meta"))
        assert not native.serves(torch.ones(2), torch.ones(2, device="meta"))

    def test_subclasses(self):
        class Subclass(Tensor):
            pass

        class Weight(torch.nn.Parameter):
            pass

        assert not native.serves(torch.ones(2).as_subclass(Subclass))
        assert not native.serves(Weight(torch.ones(2), requires_grad=False))

    def test_gradients(self):
        x, weight = torch.ones(2), torch.nn.Parameter(torch.ones(2))
        assert not native.serves(x, weight) and not native.serves(weight * 2)
        with torch.no_grad():
            assert native.serves(x, weight)
        with torch.inference_mode():
            assert native.serves(x, weight, torch.ones(2))

    def test_compiled(self):
        asked = torch.compile(lambda x: x + int(native.serves(x)), backend="eager", fullgraph=True)
        torch.compiler.reset()
        assert native.serves(torch.zeros(1)) and asked(torch.zeros(1)).item() == 0

    def test_traced(self):
        seen = []
        torch.jit.trace(lambda x: (seen.append(native.serves(x)), x + 1)[1], torch.zeros(1), check_trace=False)
        assert seen and not any(seen)

    def test_fake_and_other_dispatch_modes(self):
        with FakeTensorMode() as mode:
            assert not native.serves(torch.zeros(1))
            fake = mode.from_tensor(torch.zeros(1))
        assert not native.serves(fake)

    @pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
    def test_function_transforms(self, transform):
        seen = []

        def function(x):
            seen.append(native.serves(x))
            return x.sum()

        x = torch.ones(3, 2)
        with torch.no_grad():
            if transform == "jvp":
                torch.func.jvp(function, (x,), (x,))
            else:
                getattr(torch.func, transform)(function)(x)
        assert seen == [False]
