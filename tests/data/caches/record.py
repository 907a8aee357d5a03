"""Writes the states of a tiny model and what follows on them; run on the version whose files are to be kept.

    PYTHONPATH=FOLDER:FOLDER/tests python record.py

The model is that of ../quantised/int8, whose weights are in files, bit for bit. snapshot.safetensors: two rows, by
`NemotronHCache.save`; prompts: one row, by `PromptCache.flush`; expected.safetensors: the logits of the next token, and
the ids that greedy decoding goes on with.
"""

import shutil
from pathlib import Path

import torch
from families import tokens
from safetensors.torch import save_file

from nemotron_h import NemotronHForCausalLM, PromptCache

HERE = Path(__file__).parent


@torch.no_grad()
def record() -> None:
    model = NemotronHForCausalLM.from_pretrained(HERE.parent / "quantised" / "int8", dtype=torch.float32)
    ids = tokens(2, 10, vocab=24)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    cache.save(HERE / "snapshot.safetensors", model=model, token_ids=ids[:, :9])
    expected = {"rows": model(ids[:, 9:], past_key_values=cache).logits}

    shutil.rmtree(HERE / "prompts", ignore_errors=True)
    prompts = PromptCache(folder=HERE / "prompts")
    cache = model(ids[:1, :9], use_cache=True).past_key_values
    prompts.store(cache, ids[:1, :9], model)
    prompts.flush(model)
    expected["row"] = model(ids[:1, 9:], past_key_values=cache).logits
    expected["ids"] = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    record()
