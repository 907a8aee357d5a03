"""Ask llama.cpp about GGUF files that this package wrote, and keep what it says beside this file, for the tests.

    pip install -e '.[bench-llama]'        # compiles llama.cpp: about 15 minutes
    python tests/data/gguf/record.py       # --check: compare only, write nothing

Of every model in `gguf_models` and of the bundled one: 300 tokens, float32 weights and KV, flash attention off, logits
of all positions. Kept are the log-probabilities of the eight most probable tokens and of sixteen others per position.

With `--converter LLAMA_CPP` (a checkout of it), its convert_hf_to_gguf.py makes files of the same folders, with this
package registered; types, shapes and hashes of their tensors, and their keys, are kept in converter.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import gguf_models  # noqa: E402
from harness.llama import Llama  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from nemotron_h import NemotronHForCausalLM  # noqa: E402
from nemotron_h.bundled import WORD_PROBLEMS, held_out  # noqa: E402
from nemotron_h.checkpoints import gguf  # noqa: E402
from nemotron_h.checkpoints.writing import convert  # noqa: E402

OTHER_TEXTS = [
    *("", " ", "  two  spaces\n\n\tand a tab ", "it's 'this' don't 'stop we'll", "12 + 345=6789", "a\r\nb \n c"),
    *("(a), [b]; c!? ... -- x|y", "Größe — naïve… “quoted”", "日本語、テキスト。", "emoji 🙂🙂 mixed🙂text"),
    *("x1y2z3 A1 B22", "$5.00 & 7% #9", "Nemotron and the <think> the</s>"),
]


def tokens(llama: Llama, text: str) -> list[int]:
    api = llama.api
    vocab, data = api.llama_model_get_vocab(llama.model), text.encode()
    room = (api.llama_token * (len(data) + 8))()
    count = api.llama_tokenize(vocab, data, len(data), room, len(room), True, True)
    return list(room[:count])


def difference(model: NemotronHForCausalLM, ids: torch.Tensor, said: torch.Tensor) -> tuple[float, float]:
    """(largest difference of log-probabilities, share of positions with the same first token)"""
    with torch.no_grad():
        ours = model(ids[None]).logits[0].double().log_softmax(-1)
    return (ours - said).abs().max().item(), (ours.argmax(-1) == said.argmax(-1)).double().mean().item()


def ask(path: Path, ids: torch.Tensor) -> torch.Tensor:
    llama = Llama(path, path.name, 512, threads=1, exact=True)
    said = torch.from_numpy(llama.logits(ids.tolist())).double().log_softmax(-1)
    llama.close()
    return said


def keep(name: str, ids: torch.Tensor, said: torch.Tensor) -> None:
    others = torch.randint(said.shape[1], (said.shape[0], 16), generator=torch.Generator().manual_seed(5))
    columns = torch.cat([said.topk(8).indices, others], dim=1)
    kept = {"input_ids": ids.int(), "columns": columns.short(), "log_probs": said.gather(1, columns).float()}
    save_file(kept, HERE / f"{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    parser.add_argument("--converter", metavar="LLAMA_CPP", type=Path, help="also run the converter of this checkout")
    arguments = parser.parse_args()
    check = arguments.check
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name in gguf_models.MODELS:
            model = gguf_models.save(name, work / name)
            convert(gguf.from_huggingface(work / name, "f32"), work / f"{name}.gguf")
            ids = gguf_models.ids()
            said = ask(work / f"{name}.gguf", ids)
            worst, top1 = difference(model, ids, said)
            figures[name] = {"largest_difference": worst, "same_first_token": top1}
            print(f"{name:10} f32: log-probabilities within {worst:.1e}, first token the same at {top1:.1%}")
            if not check:
                keep(name, ids, said)
        print(*tokenizers(work, gguf_models.tokenizer(), work / "dense.gguf", "dense"), sep="\n")
        bundled(work, figures, check)
        if arguments.converter:
            (HERE / "converter.json").write_text(json.dumps(converter(arguments.converter.resolve(), work), indent=0))
    if not check:
        (HERE / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    if max(figure["largest_difference"] for figure in figures.values()) > 1e-3:
        raise SystemExit("larger than 1e-3")


# The tokenizers here are unknown to the converter, which asks for the name of how they split text.
_RUN = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import nemotron_h, conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def converter(checkout: Path, work: Path) -> dict[str, dict]:
    """What llama.cpp's own converter makes: {model: {outtype, keys, tensors: {name: [type, shape, sha256]}}}"""
    import gguf as package

    made = {}
    for name, outtype in {"dense": "f32", "moe": "q8_0", "latent": "f16", "mtp": "bf16"}.items():
        path = work / f"theirs-{name}.gguf"
        command = [sys.executable, "-c", _RUN, str(checkout), str(work / name), "--outfile", str(path)]
        subprocess.run([*command, "--outtype", outtype], check=True, capture_output=True)
        reader = package.GGUFReader(path)
        tensors = {
            t.name: [t.tensor_type.name, t.shape.tolist()[::-1], hashlib.sha256(t.data.tobytes()).hexdigest()[:16]]
            for t in reader.tensors
        }
        keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        made[name] = {"outtype": outtype, "keys": keys, "tensors": tensors}
        print(f"{name:10} {outtype}: {len(tensors)} tensors of llama.cpp's converter")
    return made


def bundled(work: Path, figures: dict[str, dict[str, float]], check: bool) -> None:
    model = NemotronHForCausalLM.from_pretrained(WORD_PROBLEMS, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": problem["question"]}], tokenize=False)
        for problem in held_out()
    ]
    ids = torch.tensor([i for text in texts[:20] for i in tokenizer(text).input_ids][: gguf_models.LENGTH])
    for outtype in gguf.OUTTYPES:
        path = work / f"bundled-{outtype}.gguf"
        convert(gguf.from_huggingface(WORD_PROBLEMS, outtype), path)
        said = ask(path, ids)
        worst, top1 = difference(model, ids, said)
        print(f"bundled    {outtype}: log-probabilities within {worst:.1e}, first token the same at {top1:.1%}")
        if outtype == "f32":
            figures["bundled"] = {"largest_difference": worst, "same_first_token": top1}
            if not check:
                keep("bundled", ids, said)
    print(*tokenizers(work, tokenizer, work / "bundled-f32.gguf", "bundled", texts), sep="\n")


def tokenizers(work: Path, tokenizer, path: Path, name: str, texts: list[str] = ()) -> list[str]:
    texts = [*texts, *OTHER_TEXTS, *(tokenizer.decode(gguf_models.ids(40, 260)[i:]) for i in range(40))]
    llama = Llama(path, name, 512, threads=1, exact=True)
    wrong = [text for text in texts if tokens(llama, text) != tokenizer(text).input_ids]
    llama.close()
    if wrong:
        raise SystemExit(f"{name}: llama.cpp reads {wrong[0]!r} as other tokens (and {len(wrong) - 1} others)")
    return [f"{name:10} the same tokens in {len(texts)} texts"]


if __name__ == "__main__":
    main()
