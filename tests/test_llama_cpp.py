"""An outside opinion: log-probabilities recorded from llama.cpp for a small published-layout checkpoint (float32)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemotron_h import NemotronHCache, NemotronHForCausalLM

pytestmark = pytest.mark.core
FOLDER = Path(__file__).parent / "data" / "oracle" / "dense"


@pytest.mark.parametrize("pieces", [[300], [150] + [1] * 150, [100, 37, 163]], ids=["prefill", "decode", "chunks"])
@torch.no_grad()
def test_log_probabilities(pieces):
    model = NemotronHForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    recorded = load_file(FOLDER / "llama_cpp.safetensors")
    ids, expected = recorded["input_ids"].reshape(1, -1).long(), recorded["log_probs"]
    cache, logits = NemotronHCache(model.config), []
    for piece in ids.split(pieces, dim=1):
        logits.append(model(piece, cache=cache).logits[0])
    log_probs = torch.cat(logits).log_softmax(-1)
    assert (log_probs.argmax(-1) == expected.argmax(-1)).all()
    difference = (log_probs - expected).abs().max().item()
    print(f"largest difference to llama.cpp: {difference:.2e}")
    assert difference <= 1e-3
