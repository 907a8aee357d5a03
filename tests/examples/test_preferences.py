"""The DPO, GRPO and evaluation examples: their problems, rule and pairs, and a short run of each from end to end."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import dpo
import evaluate
import grpo
import preferences
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h.bundled import WORD_PROBLEMS, held_out

EXAMPLES = Path(preferences.__file__).parent
SCRIPTS = ("dpo", "grpo", "evaluate")


def run(script: str, *arguments: object, fails: bool = False) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert bool(done.returncode) == fails, done.stderr[-4000:]
    return done.stdout if not fails else done.stderr


def installed(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"pip install {package}")


def test_no_problem_is_both_trained_on_and_asked():
    trained = preferences.training_problems(2000)
    asked = preferences.test_problems(300)
    shipped = {item["question"] for item in held_out()}
    assert len(asked) == 300 and {preferences.question_of(item) for item in asked} <= shipped
    assert not {preferences.question_of(item) for item in trained} & shipped
    for item in trained[:300] + asked:  # the last number of the reasoning is the answer, and the reply says it
        reasoning, answer = re.fullmatch(
            r"<think>\n(.*)\n</think>\n\nThe answer is (\d+)\.", item["messages"][1]["content"]
        ).groups()
        assert int(re.findall(r"\d+", reasoning)[-1]) == int(answer) == item["answer"]


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("12 + 5 = 17.\n</think>\n\nThe answer is 17.\n", 1.0),
        ("12 + 5 = 99.\n</think>\n\nThe answer is 17.", 1.0),  # the rule reads the answer alone
        ("12 + 5 = 17.\n</think>\n\nThe answer is 18.\n", 0.0),
        ("12 + 5 = 17.\n</think>\n\nThe answer is 117.\n", 0.0),
        ("12 + 5 = 17.\n</think>\n\n", 0.0),
        ("", 0.0),
        ("The answer is 17.", 0.0),  # before the end of the reasoning, or never ended
        ("The answer is 17.\n</think>\n\n", 0.0),
        ("The answer is 17.\n</think>\n\nThe answer is 18.", 0.0),
        ("</think>\n\nThe answer is 16. The answer is 17.", 0.0),  # guesses
        ("</think>\n\nThe answer is 16.\n</think>\n\nThe answer is 17.", 0.0),
    ],
)
def test_the_reward_is_for_one_right_answer_after_the_reasoning(reply, points):
    assert grpo.reward(reply, 17) == points
    assert grpo.right_answer([[{"role": "assistant", "content": reply}]], answer=[17], prompts=[None]) == [points]


class Parrot:
    """A model and tokenizer for `replies`, which is patched: without chance it knows the first problem alone."""

    asked: list[dict]

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, model, tokenizer, questions, **options):
        self.asked.append({"questions": list(questions), **options})
        known = () if options else ("one",)
        return [f"hm.\n</think>\n\nThe answer is {1 if question in known else 5}.\n" for question in questions]


def test_pairs_are_the_models_own_mistakes(monkeypatch):
    problems = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"so {q}"}], "answer": n}
        for q, n in (("one", 1), ("two", 2), ("five", 5))
    ]
    monkeypatch.setattr(dpo, "replies", parrot := Parrot())
    pairs = dpo.own_mistakes(None, None, problems, temperature=1.5)
    # "two" is wrong at once; "one" goes wrong by chance; "five" is right both times and gives no pair
    assert [pair["prompt"][0]["content"] for pair in pairs] == ["two", "one"]
    assert [asked["questions"] for asked in parrot.asked] == [["one", "two", "five"], ["one", "five"]]
    assert parrot.asked[1]["do_sample"] is True and parrot.asked[1]["temperature"] == 1.5
    for pair in pairs:
        assert pair["chosen"][0]["content"].endswith(pair["prompt"][0]["content"])
        assert pair["rejected"] == [{"role": "assistant", "content": "<think>\nhm.\n</think>\n\nThe answer is 5."}]


def test_what_a_pair_becomes_is_what_the_model_said():
    """The rejected reply is, token for token, what follows the generation prompt."""
    tokenizer = AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    made = dpo.pair(preferences.test_problems(1)[0], "That is 4.\n</think>\n\nThe answer is 4.\n")
    prompt = tokenizer.apply_chat_template(made["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(made["prompt"] + made["rejected"], tokenize=False)
    assert whole == prompt + "That is 4.\n</think>\n\nThe answer is 4.\n<SPECIAL_12>\n"


def adapted_as_merged(folder: Path) -> int:
    """How many weights of the merged model are W + s B A, all of them changed; the others are the base's."""
    from safetensors.torch import load_file

    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS).state_dict()
    checked = set()
    for name, A in adapter.items():
        if name.endswith(".lora_A.weight"):
            B = adapter[name.replace("lora_A", "lora_B")]
            assert B.abs().max() > 0, name
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            torch.testing.assert_close(merged[weight], base[weight] + 2 * B @ A, atol=1e-6, rtol=0)
            checked.add(weight)
    assert all(torch.equal(merged[name], base[name]) for name in base.keys() - checked)
    return len(checked)


def resume_after_losing(folder: Path, checkpoint: str, script: str, *arguments: object) -> dict[str, torch.Tensor]:
    """Go on as if the run had been interrupted before `checkpoint`; the adapter that comes of it."""
    from safetensors.torch import load_file

    shutil.rmtree(folder / "checkpoints" / checkpoint)
    shutil.rmtree(folder / "adapter")
    run(script, *arguments, "--resume", "--output", folder)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_dpo_end_to_end(tmp_path):
    installed("trl", "datasets", "peft")
    from safetensors.torch import load_file

    arguments = (
        "--problems",
        40,
        "--test-size",
        2,
        "--batch-size",
        4,
        "--epochs",
        1,
        "--held-out-pairs",
        4,
        "--save-steps",
        2,
    )
    said = run("dpo.py", *arguments, "--output", tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert re.search(r"before: \d+\.\d% of 2 held-out.*after: .* right \(before", said, re.DOTALL)
    assert "4 held-out pairs: the right reply is preferred in" in said and figures["held_out_pairs"] == 4
    rewards = figures["rewards"]
    assert (
        rewards["margins"] == pytest.approx(rewards["chosen"] - rewards["rejected"], abs=1e-5)
        and rewards["margins"] > 0
    )
    assert figures["pairs"] == len(dpo.read_pairs(tmp_path / "pairs.jsonl"))
    assert figures["steps"] == -(-(figures["pairs"] - 4) // 4) >= 3
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") or "pip install matplotlib" in said
    assert adapted_as_merged(tmp_path) == 16
    whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    again = resume_after_losing(tmp_path, f"checkpoint-{figures['steps']}", "dpo.py", *arguments)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_grpo_end_to_end(tmp_path):
    installed("trl", "datasets", "peft")
    from safetensors.torch import load_file

    arguments = (
        "--problems", 8, "--test-size", 2, "--batch-size", 8, "--group", 4, "--steps", 3, "--save-steps", 2,
        "--temperature", 1.5, "--max-new-tokens", 120,
    )  # fmt: skip
    said = run("grpo.py", *arguments, "--output", tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert re.search(r"before: mean reward \d\.\d+ on 2 .*after: mean reward", said, re.DOTALL)
    # eight replies a step, each 0 or 1
    assert len(figures["rewards_in_training"]) == figures["steps"] == 3
    assert all((8 * mean).is_integer() for mean in figures["rewards_in_training"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") or "pip install matplotlib" in said
    assert adapted_as_merged(tmp_path) == 16
    whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    again = resume_after_losing(tmp_path, "checkpoint-3", "grpo.py", *arguments)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_evaluate_end_to_end(tmp_path):
    installed("lm_eval", "datasets")
    rows = [item for item in held_out() if item["unseen_template"]][:6]
    data = [preferences.as_messages(row["question"], row["reasoning"], row["answer"]) for row in rows]
    data[0]["answer"] += 1  # whatever the model says here is wrong
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    said = run("evaluate.py", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out")
    assert "lm_eval holds nemotron_h.modeling.NemotronHForCausalLM" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["class"] == "nemotron_h.modeling.NemotronHForCausalLM"
    # an independent count: the model's greedy replies, one at a time
    model, tokenizer = (kind.from_pretrained(WORD_PROBLEMS) for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected = []
    for row in data:
        ids = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        text = tokenizer.decode(model.generate(**ids, max_new_tokens=256)[0, ids["input_ids"].shape[1] :])
        expected.append(f"</think>\n\nThe answer is {row['answer']}." in text)
    assert not expected[0] and 0 < sum(expected) < 6
    assert results["problems"] == {"word_problems": 6}
    assert results["scores"]["word_problems"]["exact_match,after-reasoning"] == pytest.approx(sum(expected) / 6)
    assert results["one_by_one"] == pytest.approx(sum(expected) / 6)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {row["doc"]["question"]: row["exact_match"] for row in samples} == {
        row["messages"][0]["content"]: float(right) for row, right in zip(data, expected, strict=True)
    }
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse()
    said = capsys.readouterr().out
    assert all(option in said for option in ("--resume", "--output", "--model", f"Example: python examples/{name}.py"))


@pytest.mark.parametrize(("name", "package"), [("dpo", "trl"), ("grpo", "trl"), ("evaluate", "lm_eval")])
def test_what_is_not_installed_is_said_in_one_sentence(name, package, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(preferences.importlib.util, "find_spec", lambda asked: None if asked == package else asked)
    with pytest.raises(SystemExit, match=rf"^This example needs {package}: pip install {package}$"):
        importlib.import_module(name).main()


def test_wrong_input_is_said_in_one_sentence(monkeypatch, tmp_path):
    for module in (dpo, grpo, evaluate):
        monkeypatch.setattr(module, "require", lambda *packages: None)
    line = tmp_path / "data.jsonl"
    line.write_text('{"messages": []}\n')

    def fails(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--output", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as error:
            importlib.import_module(name).main()
        return str(error.value)

    assert "has no checkpoint to go on from: leave --resume out" in fails("dpo", "--resume")
    assert "--batch-size 64 is not made of groups of 7" in fails("grpo", "--group", 7)
    assert "line 1 has the keys messages, or no message: write {'messages': [...], 'answer': N}" in fails(
        "evaluate", "--data", line
    )
    assert "data.jsonl, line 1 has the keys" in fails("grpo", "--test", line)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    with pytest.raises(SystemExit, match="line 1 has no rejected: write prompt, chosen, rejected"):
        dpo.read_pairs(tmp_path / "pairs.jsonl")


def test_the_task_names_its_problems_wherever_it_is(tmp_path):
    """lm_eval's own command reads the YAML from another folder."""
    import yaml

    folder = tmp_path / 'a "task"'
    evaluate.write_task(folder, [{"question": "2 + 2?", "answer": 4}])
    task = yaml.safe_load((folder / "word_problems.yaml").read_text())
    (path,) = task["dataset_kwargs"]["data_files"].values()
    assert task["task"] == "word_problems" and json.loads(Path(path).read_text()) == {"question": "2 + 2?", "answer": 4}
    (found,) = [one["regex_pattern"] for one in task["filter_list"][0]["filter"] if "regex_pattern" in one]
    assert re.findall(found, "The answer is 3.\n</think>\n\nThe answer is 4.\n") == ["4"]
    assert re.findall(found, "The answer is 3.\n") == []


def test_deepspeed_keeps_what_computes_in_float32():
    """ZeRO casts a model whole under "bf16": the config autocasts the linear layers of a float32 model instead."""
    config = json.loads((EXAMPLES / "deepspeed.json").read_text())
    assert config["zero_optimization"]["stage"] == 3 and not {"bf16", "fp16"} & config.keys()
    assert config["torch_autocast"]["enabled"] and config["torch_autocast"]["dtype"] == "bfloat16"
    assert config["torch_autocast"]["lower_precision_safe_modules"] == ["torch.nn.Linear"]
