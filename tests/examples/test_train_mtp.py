"""The MTP example: what the head is taught, a short run from end to end, going on after an interruption."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_mtp
from transformers import AutoModelForCausalLM
from word_problems import problems

from nemotron_h import mtp
from nemotron_h.bundled import WORD_PROBLEMS

SHORT = ("--problems", "24", "--epochs", "2", "--batch-size", "8", "--ahead", "2", "--pattern", "-")


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["train_mtp", "--output", str(output), *SHORT, *arguments])
    try:
        train_mtp.main()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundled() -> tuple:
    return train_mtp.load(WORD_PROBLEMS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, all of it: six steps."""
    folder = tmp_path_factory.mktemp("mtp") / "head"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, folder, "--held-out", "1", "--drafts", "2", "--save-steps", "4")
    return folder


@torch.no_grad()
def test_the_head_is_taught_what_the_model_says_where_the_reply_is(bundled) -> None:
    model, tokenizer = bundled
    batches = train_mtp.Batches(model, tokenizer, 16, 8, seed=3)
    same = []
    assert len(batches) == 2 and sorted(map(len, batches.rows)) == [8, 8]
    for index in range(2):
        for _again in range(2):  # computed, then kept
            batch = batches[index]
            assert batch["x_BLD"].requires_grad is False
            for place, row in enumerate(batches.rows[index]):
                ids = torch.tensor([row["input_ids"]])
                assert torch.equal(batch["input_ids"][place, : ids.shape[1]], ids[0])
                whole = model(ids, output_hidden_states=True)
                torch.testing.assert_close(
                    batch["x_BLD"][place, : ids.shape[1]], whole.hidden_states[-1][0], rtol=1e-4, atol=1e-4
                )
                said = whole.logits[0].argmax(-1).tolist()
                labels = [*row["labels"][1:], -100]
                wanted = [token if label != -100 else -100 for token, label in zip(said, labels, strict=True)]
                got = batch["shift_labels"][place].tolist()
                assert got[: len(wanted)] == wanted and set(got[len(wanted) :]) <= {-100}
                same += [a == b for a, b in zip(wanted, labels, strict=True) if b != -100]
    # The model knows its data: what it says is the text, nearly everywhere but where it answers without reasoning.
    assert 0.9 < sum(same) / len(same) < 1


def test_every_batch_is_seen_once_an_epoch_in_another_order() -> None:
    first, second = (train_mtp.order_of(epoch, 50, 7) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert first == train_mtp.order_of(0, 50, 7) != train_mtp.order_of(0, 50, 8)


def test_what_is_written(written: Path, bundled) -> None:
    assert {path.name for path in written.iterdir()} >= {"model", "mtp.safetensors", "figures.json", "README.md"}
    assert [path.name for path in written.parent.iterdir() if path.name.startswith(".")] == []
    figures = json.loads((written / "figures.json").read_text())
    assert figures["training"]["steps"] == 6 and figures["training"]["ahead"] == 2
    (measured,) = figures["held_out"]
    assert measured["same_text"] == measured["problems"] == 1 and measured["drafted"] >= measured["accepted"]
    assert measured["tokens_per_step"] >= 1
    card = (written / "README.md").read_text()
    weights = sum(tensor.numel() for tensor in load_file(written / "mtp.safetensors").values())
    assert f"has {weights:,} weights: 1 depth(s) of `-`" in card and "24 problems seen 2 times, 6 steps of\n8" in card
    assert f"| 2 | {measured['acceptance']:.1%} |" in card and "1 of 1 |" in card

    model, _tokenizer = bundled
    whole = AutoModelForCausalLM.from_pretrained(written / "model")
    base = model.state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in whole.state_dict().items() if name in base)
    # The head alone is the folder's head, given to a model that had none; and it is no longer a new one.
    head = load_file(written / "mtp.safetensors")
    stored = load_file(written / "model" / "model.safetensors")
    assert head.keys() == {name for name in stored if name.startswith("mtp.")}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in head.items())
    alone = mtp.load_head(AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS), written / "mtp.safetensors")
    assert alone.state_dict().keys() == whole.state_dict().keys() and alone.mtp_depths == 2
    torch.manual_seed(7)
    new = mtp.add_head(AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS), "-").mtp.state_dict()
    assert all(not torch.equal(tensor, new[name.removeprefix("mtp.")]) for name, tensor in head.items())


def test_an_interrupted_run_comes_to_the_same_weights(written: Path, tmp_path: Path, monkeypatch) -> None:
    """Stopped in the fifth of six steps, in the second epoch, with what was saved after four; nothing is written."""
    taken = []
    real = mtp.loss

    def interrupted(*args, **kwargs):
        taken.append(None)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    output = tmp_path / "head"
    arguments = ("--held-out", "1", "--drafts", "2", "--save-steps", "4")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_mtp.mtp, "loss", interrupted)
        run(patched, output, *arguments)
    assert not output.exists()
    with pytest.raises(SystemExit, match="is of a run with --seed 7, and this one has 8: give the same"):
        run(monkeypatch, output, *arguments, "--resume", "--seed", "8")
    run(monkeypatch, output, *arguments, "--resume")
    ours, theirs = (load_file(folder / "mtp.safetensors") for folder in (output, written))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    figures = json.loads((output / "figures.json").read_text())
    assert figures["training"]["steps"] == 6 and figures["training"]["final_loss"] > 0


def test_a_failure_while_measuring_leaves_no_folder(tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(train_mtp, "evaluate", fails)
    with pytest.raises(OSError, match="No space"):
        run(monkeypatch, tmp_path / "head", "--epochs", "1", "--problems", "8")
    assert not (tmp_path / "head").exists()


@torch.no_grad()
def test_what_is_measured(bundled, capsys, monkeypatch) -> None:
    """A model whose drafts are known: every second one right."""
    model, tokenizer = bundled
    items = list(problems("held_out", 1))

    def outputs(**given):
        ids = torch.cat([given["input_ids"], torch.tensor([[3, 4, 5, 6, 7, 8]])], dim=1)
        if given.get("use_mtp"):
            assert given["num_assistant_tokens"] == 2
            ids = ids.clone()
        stats = type("S", (), {"steps": 3, "drafted": 6, "accepted": 3, "tokens": 6})
        return type("O", (), {"sequences": ids, "speculation": stats})

    monkeypatch.setattr(model, "generate", outputs)
    (figures,) = train_mtp.evaluate(model, tokenizer, items, [2])
    assert (figures["acceptance"], figures["tokens_per_step"], figures["same_text"]) == (0.5, 2.0, 1)
    assert "2 drafts at a time: 3 of 6 kept (50.0%), 2.00 tokens a step" in capsys.readouterr().out

    def another(**given):
        found = outputs(**given)
        found.sequences[0, -1] += bool(given.get("use_mtp"))
        return found

    monkeypatch.setattr(model, "generate", another)
    assert train_mtp.evaluate(model, tokenizer, items, [2])[0]["same_text"] == 0


def test_evaluate_only(written: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    output = Path(shutil.copytree(written, tmp_path / "head"))
    run(monkeypatch, output, "--evaluate-only", "--held-out", "1", "--drafts", "1")
    assert "| 1 | " in (output / "README.md").read_text()
    assert re_measured(output) == [1] and "1 drafts at a time" in capsys.readouterr().out
    assert (output / "mtp.safetensors").read_bytes() == (written / "mtp.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"There is no model in .*: leave --evaluate-only out"):
        run(monkeypatch, tmp_path / "none", "--evaluate-only")


def re_measured(folder: Path) -> list[int]:
    return [entry["drafts"] for entry in json.loads((folder / "figures.json").read_text())["held_out"]]


def test_too_few_problems_are_one_sentence(bundled) -> None:
    with pytest.raises(SystemExit, match="--problems 3 do not fill one batch of 8: give at least 8"):
        train_mtp.Batches(*bundled, 3, 8, seed=1)


def test_only_the_head_learns_and_its_loss_falls(bundled) -> None:
    """Twenty steps on one batch, without the script's loop: the targets are such that they can be learnt."""
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    mtp.add_head(model, "-")
    model.requires_grad_(False)
    model.mtp_loss_scale, model.mtp_depths = 1.0, 2
    batch = train_mtp.Batches(*bundled, 4, 4, seed=1)[0]
    optimizer = train_mtp.optimizer_of(model, 1e-2)
    losses = []
    for _ in range(20):
        loss = mtp.loss(model, labels=None, **batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"mtp.{name}" for name, _ in model.mtp.named_parameters()
    }
    assert losses[-1] < 0.6 * losses[0]
    # The loss is that of the targets: depth k at position t against what the model says after t + k.
    with torch.no_grad():
        x, ids, targets = batch["x_BLD"], batch["input_ids"], batch["shift_labels"]
        expected = 0.0
        y = x
        for depth in (1, 2):
            ahead = F.pad(ids[:, depth:], (0, depth))
            y = model.mtp(y, model.model.embeddings(ahead), depth - 1)
            wanted = F.pad(targets[:, depth:], (0, depth), value=-100)
            expected += float(F.cross_entropy(model.lm_head(y).flatten(0, 1), wanted.flatten(), ignore_index=-100)) / 2
        assert abs(float(mtp.loss(model, labels=None, **batch)) - expected) < 1e-4


def test_help(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train_mtp", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("train_mtp").parse_arguments()
    said = capsys.readouterr().out
    assert all(option in said for option in ("--resume", "--evaluate-only", "--output", "--model", "--ahead"))
