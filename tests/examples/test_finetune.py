"""The fine-tuning examples: their data, what they count as right, and a short run of each from end to end."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import halves
from finetuning import (
    ask_plain_transformers,
    hub_name,
    plot_loss,
    read_answer,
    read_jsonl,
    require_checkpoint,
    write_folder,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_problems import HELD_OUT_NAMES

from nemotron_h.bundled import WORD_PROBLEMS

EXAMPLES = Path(halves.__file__).parent
LESS = re.compile(r"\b(gives|give|loses|sells|takes|throws|uses)\b")


def solve(question: str) -> int:
    """An independent reader: it goes through the sentences and knows nothing of how the problem was made."""
    first, *told = re.split(r"(?<=\.) ", question)
    count = int(re.search(r"\d+", first)[0])
    name = re.search(r"(?:does|with) ([A-Z]\w+)|does (she|he)", told[-1])
    for sentence in told[:-1]:
        if "half" in sentence:
            assert count % 2 == 0, question
            count //= 2
            continue
        (n,) = map(int, re.findall(r"\d+", sentence))
        gain = re.search(r"\bmore\b|another|wins|receives|collects|buys|finds|gets", sentence)
        assert bool(gain) != bool(LESS.search(sentence)) or "gives" in sentence, sentence
        count += n if gain else -n
    assert name, question
    return count


@pytest.mark.parametrize("split", halves.FILES)
def test_the_shipped_files_are_what_the_script_makes_and_their_answers_are_right(split):
    lines = halves.FILES[split].read_text().splitlines()
    assert len(lines) == halves.SIZES[split]
    for index in (0, 1, 77, len(lines) - 1):
        assert json.loads(lines[index]) == halves.problem(split, index)
    for item in map(json.loads, lines):
        question, reply = (message["content"] for message in item["messages"])
        assert [message["role"] for message in item["messages"]] == ["user", "assistant"]
        assert item["answer"] == solve(question) == read_answer(reply), item


def test_every_line_of_the_reasoning_is_true():
    for item in read_jsonl(halves.FILES["train"])[:400] + read_jsonl(halves.FILES["test"]):
        reasoning = re.search(r"<think>\n(.*)\n</think>", item["messages"][1]["content"])[1]
        for sum_, result in re.findall(r"(\d+(?: [+-] \d+)+) = (\d+)", reasoning):
            assert eval(sum_) == int(result), reasoning
        for part, sum_ in re.findall(r"(\d+) = (\d+(?: \+ \d+)+)", reasoning):
            assert eval(sum_) == int(part), reasoning
        for number, half in re.findall(r"(\d+): \d+ = \d+ \+ [^:]*?so (\d+)\.", reasoning):
            assert int(number) == 2 * int(half), reasoning


def test_training_and_test_share_no_people_and_no_number_that_is_halved():
    people = {name for names in HELD_OUT_NAMES.values() for name in names}
    halved = {}
    for split, path in halves.FILES.items():
        found = halved[split] = set()
        for item in read_jsonl(path):
            named = people & set(re.findall(r"[A-Z]\w+", item["messages"][0]["content"]))
            assert bool(named) == (split == "test")
            found |= set(re.findall(r"(\d+): \d+ = \d+ \+ (?!\d+ =)", item["messages"][1]["content"]))
        assert len(found) > (300 if split == "train" else 10)  # few ones are learnt by heart
    assert not halved["train"] & halved["test"]


def test_the_tokens_of_the_replies_are_those_that_the_model_has_learnt_to_write():
    """LoRA leaves the head alone, which cannot tell apart what it never had to write."""
    tokenizer = AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    lines = (Path(WORD_PROBLEMS) / "held_out.jsonl").read_text().splitlines()
    known = {token for line in lines for token in tokenizer(json.loads(line)["reasoning"])["input_ids"]}
    for item in read_jsonl(halves.FILES["train"])[::20]:
        reasoning = item["messages"][1]["content"].removeprefix("<think>\n").partition("\n")[0]
        assert set(tokenizer(reasoning)["input_ids"]) <= known, reasoning


def test_only_an_answer_after_the_reasoning_counts():
    assert read_answer("<think>\nThat is 4.\n</think>\n\nThe answer is 12.") == 12
    assert read_answer("<think>\nThe answer is 12.") is None
    assert read_answer("<think>\nThe answer is 12.\n</think>\n\n") is None
    with pytest.raises(ValueError, match="7 has no half above zero"):
        halves.work_out_half(7)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fails(folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "half").touch()
        raise OSError("No space left on device")

    write_folder(tmp_path / "model", lambda folder: (Path(folder).mkdir(), (Path(folder) / "old").touch()))
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "model", fails)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"]
    write_folder(tmp_path / "model", lambda folder: (Path(folder).mkdir(), (Path(folder) / "new").touch()))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


def test_a_run_goes_on_from_the_last_whole_checkpoint(tmp_path):
    arguments = argparse.Namespace(resume=True, output=tmp_path)
    with pytest.raises(SystemExit, match="checkpoints has no checkpoint to go on from"):
        require_checkpoint(arguments)
    for number, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        (folder / ("trainer_state.json" if whole else "model.safetensors")).touch()
    assert require_checkpoint(arguments) == str(tmp_path / "checkpoints" / "checkpoint-10")
    assert require_checkpoint(argparse.Namespace(resume=False, output=tmp_path)) is None


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    assert plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2}], tmp_path / "loss.png", "loss")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


PLAIN_SAID = (
    r"in transformers\.models\.nemotron_h\.modeling_nemotron_h: (\d+\.\d)% of 2 right \(with this package: \1%\)"
)


def run(script: str, *arguments: object, fails: bool = False) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert bool(done.returncode) == fails, done.stderr
    return done.stdout if not fails else done.stderr


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> tuple[Path, Path]:
    """A dozen problems each to train on and to ask."""
    folder = tmp_path_factory.mktemp("data")
    for split, path in halves.FILES.items():
        (folder / f"{split}.jsonl").write_text("\n".join(path.read_text().splitlines()[:12]) + "\n")
    return folder / "train.jsonl", folder / "test.jsonl"


def test_full_fine_tuning_resumes_to_the_same_weights(few, tmp_path):
    train, test = few
    arguments = ("--data", train, "--test", test, "--test-size", 2, "--batch-size", 4, "--save-steps", 2)
    said = run("finetune_full.py", *arguments, "--epochs", 2, "--output", tmp_path / "whole", "--check-plain", 2)
    assert re.search(r"before: \d+\.\d% of 2 held-out.*after: .* right \(before", said, re.DOTALL)
    assert re.search(PLAIN_SAID, said) and "2 of 2 replies are the same" in said
    figures = json.loads((tmp_path / "whole" / "figures.json").read_text())
    assert figures["steps"] == 6 and figures["transformers_own_class"]["same_replies"] == 2
    whole_card = (tmp_path / "whole" / "model" / "README.md").read_text()
    assert "Trained on: train.jsonl." in whole_card and "| right answers to 2 held-out problems, after |" in whole_card
    assert str(tmp_path) not in whole_card
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS).state_dict()
    assert all(not torch.equal(whole[name], base[name]) for name in base if name.endswith("_proj.weight"))
    # interrupted after step 4 of 6: what came later is gone
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    for path in sorted((checkpoints / "checkpoint-6").iterdir()):
        path.unlink()
    (checkpoints / "checkpoint-6").rmdir()
    run("finetune_full.py", *arguments, "--epochs", 2, "--output", tmp_path / "whole", "--resume", "--check-plain", 0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_lora_end_to_end(few, tmp_path):
    for package in ("trl", "datasets", "peft"):
        pytest.importorskip(package, reason=f"pip install {package}")
    train, test = few
    said = run(
        "finetune_lora.py", "--data", train, "--test", test, "--test-size", 2, "--batch-size", 4, "--epochs", 1,
        "--learning-rate", 1e-2, "--output", tmp_path, "--check-plain", 2, "--save-steps", 2,
    )  # fmt: skip
    assert "adapter: 6 of 6 layers (mamba 2/2, attention 2/2, mlp 2/2); 508,928 of 710,168 weights (71.7%)" in said
    assert re.search(PLAIN_SAID, said) and "2 of 2 replies are the same" in said and "minutes in all" in said
    assert 'license: "apache-2.0"' in (tmp_path / "merged" / "README.md").read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter", "merged", "figures.json", "checkpoints"} <= names and not [n for n in names if n[0] == "."]
    # what is merged is W + s B A, by the adapter's own tensors
    from safetensors.torch import load_file

    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS).state_dict()
    checked = 0
    for name, A in adapter.items():
        if name.endswith(".lora_A.weight"):
            B = adapter[name.replace("lora_A", "lora_B")]
            assert B.abs().max() > 0, name
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            assert torch.allclose(merged[weight], base[weight] + 2 * B @ A, atol=1e-6), name
            checked += 1
    assert checked == 16 == len(adapter) // 2


def test_replies_that_differ_through_plain_transformers_are_counted(monkeypatch, capsys):
    """With what the other process says made up: one reply of three is another, and wrong."""
    problems = [{"messages": [{"content": "?"}], "answer": answer} for answer in (1, 2, 3)]
    ours = [f"</think>The answer is {answer}." for answer in (1, 2, 4)]
    theirs = [ours[0], "</think>The answer is 7.", ours[2]]

    def answers(line, input, **_):
        assert json.loads(input) == ["?"] * 3 and line[3] == "folder"
        said = "noise\n" + json.dumps({"module": "theirs", "replies": theirs})
        return subprocess.CompletedProcess(line, 0, stdout=said, stderr="")

    monkeypatch.setattr(subprocess, "run", answers)
    figures = ask_plain_transformers(Path("folder"), problems, [*ours, "more"])
    assert figures == {"problems": 3, "right": 1 / 3, "right_with_this_package": 2 / 3, "same_replies": 2}
    said = "folder in theirs: 33.3% of 3 right (with this package: 66.7%), 2 of 3 replies are the same\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "a\nKeyError: 'b'"))
    with pytest.raises(RuntimeError, match=r"^folder does not load without this package: KeyError: 'b'$"):
        ask_plain_transformers(Path("folder"), problems, ours)


def test_where_to_push_is_owner_and_name():
    assert hub_name("me/halves") == "me/halves"
    for wrong in ("halves", "/halves", "a/b/c"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not OWNER/NAME"):
            hub_name(wrong)


@pytest.mark.parametrize("name", ["finetune_full", "finetune_lora"])
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse()
    said = capsys.readouterr().out
    assert all(option in said for option in ("--resume", "--output", "--push-to-hub", "--model"))


def test_what_is_not_installed_is_said_in_one_sentence(monkeypatch):
    script = importlib.import_module("finetune_lora")
    monkeypatch.setattr(sys, "argv", ["finetune_lora"])
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None if name == "trl" else name)
    with pytest.raises(SystemExit, match=r"^This example needs trl: pip install trl$"):
        script.main()
