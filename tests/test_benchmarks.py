"""Every benchmark runs, at dimensions that mean nothing, and writes what it measured and where."""

import importlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


@pytest.fixture
def script(monkeypatch):
    """The module of a script, as it finds its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def refuse(constant):
    raise ValueError(f"{constant} in JSON")


def numbers(data, under=""):
    """(innermost key, number) of everything in a report."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from numbers(value, key)
    elif isinstance(data, list):
        for value in data:
            yield from numbers(value, under)
    elif isinstance(data, (int, float)) and not isinstance(data, bool):
        yield under, data


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs(name, script, tmp_path, monkeypatch):
    benchmark = script(name)
    if name == "loading":  # interpreters that import transformers take half a minute of a busy machine
        monkeypatch.setattr(benchmark, "PEER", "import json")
        monkeypatch.setattr(benchmark, "OURS", "import json, decimal")
    report = benchmark.main(["--dims", "tiny", "--budget", "60", "--rounds", "2", "--output", str(tmp_path)])
    text = (tmp_path / f"{name}.json").read_text()
    read = json.loads(text, parse_constant=refuse)
    assert str(tmp_path) not in text and str(BENCHMARKS) not in text
    assert set(read) == set(report) >= {"benchmark", "environment", "dims", "checks", "notes", "seconds"}
    environment = read["environment"]
    for key in ("cpu", "instructions", "torch_capability", "cores", "threads", "torch", "transformers", "nemotron_h"):
        assert environment[key], key
    assert environment["bf16_instructions"] in (True, False)
    found = list(numbers({key: value for key, value in read.items() if key not in ("environment", "options", "dims")}))
    measured = [number for key, number in found if key in ("seconds", "rounds", "tokens_per_second")]
    assert len(measured) >= 3 and all(math.isfinite(number) for _, number in found)
    assert all(number > 0 for number in measured)
    assert read["checks"]


def test_make_bench_runs_them_all():
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    (named,) = (line.split("?=")[1].split() for line in makefile.splitlines() if line.startswith("BENCHMARKS ?="))
    assert sorted(named) == SCRIPTS


def test_both_models_have_the_same_tensors(script):
    models = script("harness.models")
    mine, twin = models.pair(models.ours(models.config("tiny")))
    theirs = twin.model.state_dict()
    for name, tensor in mine.model.state_dict().items():
        copied = name.endswith(("A_log", ".D", "dt_bias"))
        assert (theirs[name].data_ptr() == tensor.data_ptr()) is not copied, name
    assert all(parameter.requires_grad for parameter in twin.model.parameters())  # as loaded
    # Filled caches are ones that both can go on from, and alike.
    caches = models.filled_caches(mine, twin, 40)
    token = models.tokens(mine.model.config, 1)
    a, b = (side.forward(token, cache).logits for side, cache in zip((mine, twin), caches, strict=True))
    torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)


def test_llama_cpp_computes_the_same_model(script, tmp_path):
    llama, models = script("harness.llama"), script("harness.models")
    if reason := llama.missing():
        pytest.skip(reason)
    model = models.ours(models.config("tiny"), torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # weights under which the logits are not nearly alike
            parameter.data.mul_(8)
    ids = models.tokens(model.config, 100)
    llama.write_gguf(model, tmp_path / "model.gguf")
    peer = llama.Llama(tmp_path / "model.gguf", "float32", 128, 1, exact=True)
    found = torch.from_numpy(peer.logits(ids[0].tolist())).log_softmax(-1)
    peer.close()
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert (found - expected).abs().max() <= 1e-4


def test_what_does_not_fit_is_measured_in_part(script):
    prefill = script("prefill")
    counts, layers = Counter(mamba=4, mlp=4, attention=1), {"mamba": 0.2, "mlp": 0.2, "attention": 0.1}
    slow, fast = (prefill.ways(layers_, counts, 2048) for layers_ in (layers, {k: v / 10 for k, v in layers.items()}))
    assert [plan.cost for plan in slow] == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.0, 27.2])
    assert [plan.tokens for plan in slow] == [128, 256, 512, 1024, 2048, 2048]

    def chosen(available):
        plans = prefill.choose({"slow": slow, "fast": fast}, available)
        return {name: (plan.whole, plan.tokens) for name, plan in plans.items()}

    assert chosen(100.0) == {"slow": (True, 2048), "fast": (True, 2048)}
    assert chosen(12.0) == {"slow": (False, 2048), "fast": (True, 2048)}
    assert chosen(2.5) == {"slow": (False, 512), "fast": (False, 1024)}
    assert chosen(0.0) == {"slow": (False, 128), "fast": (False, 128)}
    assert slow[-1].says() is None and slow[-2].says().endswith("one layer of each kind, times their number")
    assert slow[2].says().endswith("512 tokens, scaled to 2048 in proportion")
    # llama.cpp runs whole models only.
    assert [plan.whole for plan in prefill.ways({"all": 1.0}, counts, 512)] == [True, True, True]
