"""Thirty faults, put into a copy of the package one at a time: which test of its room catches each?

    python tests/mutations.py                          all of them, each against its room's tests
    python tests/mutations.py --only router dt         those whose name has one of the words
    python tests/mutations.py --suite                  what its room lets live, against the whole suite as well
    python tests/mutations.py --check                  only whether each text is in the package exactly once

A fault is an exact text and what stands in its place; the text is looked for in every file of the package, so that it
is found wherever a move takes it. Its room is a few globs of test files. The checkout itself is never changed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    name: str
    text: str
    instead: str
    room: tuple[str, ...]
    """Globs of test files, anywhere below tests/; they are run in this order."""


HISTORY = "history: "  # a fault that the repository had, or that one of its commits guards against

MUTATIONS = [
    # -- the Mamba-2 equations
    Mutation("dt-limit: the upper end of the time step's limit is dropped", "dt_BLH.clamp(low, high)",
             "dt_BLH.clamp(low)", ("test_ssd.py", "test_time_step.py", "test_precision.py")),
    Mutation("dt-mask: a pad's time step is not 0", "dt_BLH = dt_BLH.masked_fill(~mask_BL.bool()[..., None], 0.0)",
             "pass", ("test_ssd.py", "test_one_function.py", "test_masks.py")),
    Mutation("ssd-diagonal: a position does not see itself", "device=a_BHQ.device).tril()",
             "device=a_BHQ.device).tril(-1)", ("test_ssd.py",)),
    Mutation("ssd-document: the carried state's document is looked up one position late",
             "doc_BL[:, max(here.start - 1, 0), None]", "doc_BL[:, here.start, None]", ("test_ssd.py",)),
    Mutation("ssd-gradient: the gradient of the time step forgets A", "ddt + da_BHQ.transpose(1, 2) * A", "ddt",
             ("test_ssd.py",)),
    Mutation("conv-mask: outputs at pads are not hidden", ".masked_fill(~valid_BL[..., None], 0)", "",
             ("test_causal_conv.py",)),
    Mutation("conv-block: the inputs before a block are taken one early", "x_BLC[:, start - before : stop]\n",
             "torch.cat([x_BLC[:, start - before - (start > 0) : start - (start > 0)], x_BLC[:, start:stop]], 1)\n",
             ("test_causal_conv.py",)),
    Mutation("gated-norm-groups: one group instead of n_groups", "h_GD = h.unflatten(-1, (n_groups, -1))",
             "h_GD = h.unflatten(-1, (1, -1))", ("test_gated_norm.py", "test_norms.py")),
    Mutation("native-dt: the compiled step forgets the lower limit",
             "fminf(fmaxf(raw > 20 ? raw : log1pf(expf(raw)), d.dt_min), d.dt_max)",
             "fminf(raw > 20 ? raw : log1pf(expf(raw)), d.dt_max)", ("test_mamba_step.py", "test_native*.py")),
    # -- attention, experts, packed weights, the loss
    Mutation("attention-scale: from hidden_size / heads", "self.scaling = self.head_dim**-0.5",
             "self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5",
             ("test_against_transformers.py", "test_model_api.py")),
    Mutation("attention-join: the first key of the queries' own part is seen twice",
             "seen_by_all = keys - length if length > 1 else keys",
             "seen_by_all = keys - length + 1 if length > 1 else keys", ("test_attention.py",)),
    Mutation("router-weight: the correction bias is in the weight", "weights_Tk = scores_TE.gather(1, indices_Tk)",
             "weights_Tk = choice_TE.gather(1, indices_Tk)", ("test_moe.py",)),
    Mutation("router-groups: a group's score is its best alone", "min(2, choice_TgE.shape[-1])",
             "min(1, choice_TgE.shape[-1])", ("test_moe.py",)),
    Mutation("int4-groups: the two scales of a block change places",
             "scale.to(exact).view(rows, -1, 2).transpose(1, 2)",
             "scale.to(exact).view(rows, -1, 2).flip(-1).transpose(1, 2)", ("test_quantized.py", "test_int8_int4.py")),
    Mutation("nvfp4-nibbles: the two values of a byte change places", "codes[:, 1::2] << 4 | codes[:, 0::2]",
             "codes[:, 0::2] << 4 | codes[:, 1::2]", ("test_modelopt.py", "test_fp8_nvfp4.py")),
    Mutation("loss-gradient: the label's own column is not lessened",
             "dlogits_TN.gather(1, place_T1) - inside_T1.to(dlogits_TN.dtype)", "dlogits_TN.gather(1, place_T1)",
             ("test_cross_entropy.py",)),
    # -- cache and generation
    Mutation("state-dtype: a float64 state is kept in float32",
             "torch.float64 if recurrent_states.dtype == torch.float64 else self.state_dtype", "self.state_dtype",
             ("test_one_function.py", "test_rollback.py")),
    Mutation("concat-left: shorter rows are padded on the right", "F.pad(tensor, (0, 0, left, 0)) if kind",
             "F.pad(tensor, (0, 0, 0, left)) if kind", ("test_cache_contract.py", "test_rows.py", "test_snapshots.py")),
    Mutation("draft-length: the token after the draft is kept in the cache", "self.cache.crop(taken - number - 1)",
             "self.cache.crop(taken - number)", ("test_speculation.py",)),
    Mutation("mtp-shift: a document's last token learns the next one's first",
             "shift_labels = shift_labels.masked_fill(last_BL.to(shift_labels.device), losses.IGNORED)", "pass",
             ("test_mtp.py",)),
    # -- ten faults out of the history
    Mutation(HISTORY + "dt-step: decoding does not clamp at all (transformers 5.24)",
             "dt_BLH = ops.time_step(dt_BLH, self.dt_bias, self.time_step_limit, mask_BL)",
             "dt_BLH = ops.time_step(\n            dt_BLH, self.dt_bias, self.time_step_limit if length > 1 else "
             "(0.0, float('inf')), mask_BL\n        )", ("test_one_function.py", "test_precision.py")),
    Mutation(HISTORY + "router-closed: a closed group is masked with 0", "masked_fill(~open_Tg[..., None], -torch.inf)",
             "masked_fill(~open_Tg[..., None], 0.0)", ("test_moe.py",)),
    Mutation(HISTORY + "decay-rounding: running sums in float32 alone",
             "low_BHQ = (exact_BHQ - sum_BHQ).to(a_BHQ.dtype).detach()", "low_BHQ = torch.zeros_like(sum_BHQ)",
             ("test_ssd.py", "test_low_precision.py")),
    Mutation(HISTORY + "record-copy: the record shares the state that moves on in place",
             "(None if t is None else t.clone() for t in (self.window_BCW, self.state_BHPN))\n            "
             "self._record = Record(window, state)",
             "(self.window_BCW, self.state_BHPN)\n            self._record = Record(window, state)",
             ("test_rollback.py",)),
    Mutation(HISTORY + "keys-shared: a copied cache writes over the keys that another one sees",
             "buffers.filled != position or ", "", ("test_growing_cache.py",)),
    Mutation(HISTORY + "hooks-later: a stretch of layers does not see hooks registered after it",
             "if (last := RemovableHandle.next_id) == getattr(self, \"_last_handle\", None):",
             "if hasattr(self, \"_last_handle\"):", ("test_changed_models.py", "test_decoding.py", "test_fused.py")),
    Mutation(HISTORY + "pads-between: padding inside a document splits it",
             "starts_BL = mask_BL[:, 1:] & (last_token_BL >= 0) & (position_ids_BL[:, 1:] <= previous_BL)",
             "starts_BL = position_ids_BL[:, 1:] <= position_ids_BL[:, :-1]",
             ("test_packing*.py", "test_one_function.py")),
    Mutation(HISTORY + "a-log: GGUF's A comes back without the sign", "exact = (-a.double()).log()",
             "exact = a.double().log()", ("test_gguf.py",)),
    Mutation(HISTORY + "interrupted: a cache goes on after an exception in the middle",
             "if self.before is None or self.before != int(cache_length(self.cache)):", "if False:",
             ("test_interrupted.py",)),
    Mutation(HISTORY + "tp-norm: the gated norm keeps all groups on each rank", "mixer.norm.n_groups //= world", "pass",
             ("test_parallel.py", "test_tensor.py")),
]  # fmt: skip


def found(package: Path, text: str) -> list[Path]:
    """The files that hold a text, one entry for each time."""
    files = [path for path in sorted(package.rglob("*")) if path.suffix in (".py", ".c", ".h")]
    return [path for path in files for _ in range(path.read_text(encoding="utf-8").count(text))]


def room(mutation: Mutation) -> list[str]:
    tests = ROOT / "tests"
    paths = [path for glob in mutation.room for path in sorted(tests.glob(f"**/{glob}"))]
    return [str(path.relative_to(ROOT)) for path in dict.fromkeys(paths)]


def run(copy: Path, tests: list[str]) -> tuple[str, float]:
    """The first test that fails on the copy of the package, or "" where none does, and the seconds it took."""
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    # The tests lie in the copy too: their `parents[1]` is the folder of the package that they are to test.
    line = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    start = time.monotonic()
    done = subprocess.run(line, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return "", time.monotonic() - start
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return failed[0] if failed else (done.stdout + done.stderr)[-300:], time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="faults whose name has one of the words")
    parser.add_argument("--suite", action="store_true", help="run the whole suite on what its room lets live")
    parser.add_argument("--check", action="store_true", help="only look for the texts")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.only or any(word in m.name for word in options.only)]
    wrong = {m.name: len(at) for m in chosen if len(at := found(ROOT / "nemotron_h", m.text)) != 1}
    wrong |= {m.name: 0 for m in chosen if not room(m)}
    for name, times in wrong.items():
        print(f"NOT APPLIED  {name}: its text is in the package {times} times, or its room has no tests")
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        names = ("nemotron_h", "tests", "benchmarks", "examples", "conversion", "README.md", "Makefile",
                 "pyproject.toml", "LICENSE", "constraints-floor.txt")  # fmt: skip
        for name in [] if options.check else names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, copy / name)
        for mutation in chosen:
            if mutation.name in wrong or options.check:
                continue
            (path,) = found(copy / "nemotron_h", mutation.text)
            whole = path.read_text(encoding="utf-8")
            path.write_text(whole.replace(mutation.text, mutation.instead), encoding="utf-8")
            caught, seconds = run(copy, room(mutation))
            if not caught and options.suite:
                caught, more = run(copy, ["tests"])
                seconds += more
            path.write_text(whole, encoding="utf-8")
            alive += not caught
            print(
                f"{'caught' if caught else 'ALIVE '} {seconds:5.0f} s  {mutation.name}\n                 {caught}",
                flush=True,
            )
    print(f"{len(chosen)} faults, {len(wrong)} not applied, {alive} alive")
    return 1 if wrong or alive else 0


if __name__ == "__main__":
    sys.exit(main())
