"""The published dims build without memory, with exactly the published parameter counts."""

import json
from pathlib import Path

import pytest
import torch

from nemotron_h import NemotronHConfig, NemotronHForCausalLM

pytestmark = pytest.mark.core
CONFIGS = Path(__file__).parent / "data" / "configs"
PARAMETERS = {
    "Nemotron-H-4B-Base-8K": 4_489_223_040,
    "Nemotron-H-8B-Base-8K": 8_100_852_736,
    "Nemotron-H-47B-Base-8K": 46_791_554_816,
    "Nemotron-H-56B-Base-8K": 56_324_350_464,
    "NVIDIA-Nemotron-Nano-9B-v2": 8_888_227_328,
    "NVIDIA-Nemotron-Nano-12B-v2": 12_310_001_152,
    "NVIDIA-Nemotron-3-Nano-4B-BF16": 3_973_556_832,
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31_577_940_288,
    "NVIDIA-Nemotron-3-Super-120B-A12B": 120_668_707_840,
    "NVIDIA-Nemotron-3-Ultra-550B-A55B": 549_308_993_536,
}
MTP_PARAMETERS = {
    # without and with the float32 correction bias of its router
    "NVIDIA-Nemotron-3-Super-120B-A12B": 2_942_324_736 + 512,
    "NVIDIA-Nemotron-3-Ultra-550B-A55B": 11_215_610_368,
    "NVIDIA-Nemotron-3.5-Lightning-30B-A3B": 1_335_325_952,
}


def counted(name):
    config = NemotronHConfig.from_dict(json.loads((CONFIGS / f"{name}.json").read_text()))
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    tensors = [(n, t.numel()) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    mtp = sum(size for n, size in tensors if n.startswith("mtp."))
    return sum(size for _, size in tensors) - mtp, mtp


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameters(name, expected):
    assert counted(name)[0] == expected


@pytest.mark.parametrize(("name", "expected"), MTP_PARAMETERS.items())
def test_multi_token_prediction(name, expected):
    assert counted(name)[1] == expected
