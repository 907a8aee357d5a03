"""The corpus of the bundled model: every sum, every answer, the splits, the chat format and the tokenizer."""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import word_problems
from word_problems import (
    HELD_OUT_NAMES,
    KINDS,
    LIMIT,
    SPLITS,
    OutOfRange,
    Problem,
    problem,
    problems,
    reserved,
    work_out,
)

BUNDLED = Path(__file__).parents[2] / "nemotron_h" / "bundled" / "word-problems"

# ---------------------------------------------------------------------------------------------------------------------
# An independent reader: it solves a problem from the words of its question, and knows nothing of its steps
# ---------------------------------------------------------------------------------------------------------------------

TIMES = {"twice": 2, "three times": 3, "four times": 4, "five times": 5, "six times": 6}
LESS = re.compile(r"sell|lose|throw|take|uses|get off|leave|go out|die|are cut|destroy|spend|pay|gives")
MORE = re.compile(r"\bmore\b|another|brings|wins|receive|come on|join|get on|adds|new|also gets")


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def changed(total: int, sentences: list[str]) -> int:
    for sentence in sentences:
        (n,) = numbers_in(sentence)
        loss = LESS.search(sentence) and not MORE.search(sentence)
        total += -n if loss else n
    return total


def compared(base: int, sentence: str) -> int:
    for words, factor in TIMES.items():
        if words in sentence:
            return base * factor
    (n,) = numbers_in(sentence)
    return base + n if "more" in sentence else base - n


def solve(kind: str, question: str) -> int:
    # The last sentence asks; "Now Ann has more than Bob. How many more?" asks in two.
    told = re.split(r"(?<=\.) ", re.sub(r"(Now [^.]*\. )?[^.]*\?$", "", question).strip())
    n = numbers_in(question)
    match kind:
        case "changes" | "bus":
            return changed(n[0], told[1:])
        case "difference":
            return abs(n[0] + n[1] - n[2] - n[3])
        case "transfer":
            return (n[0] + n[2]) - (n[1] - n[2])
        case "shop" | "reading":
            return n[0] - n[1] * n[2] - sum(n[3:])
        case "garden":
            return changed(n[0] * n[1], told[1:])
        case "groups" | "wages":
            products = [sentence for sentence in told if len(numbers_in(sentence)) == 2]
            total = sum(a * b for a, b in map(numbers_in, products))
            return changed(total, told[len(products) :])
        case "comparison":
            counts = [n[0]]
            for sentence in told[1:]:
                counts.append(compared(counts[-1], sentence))
            return sum(counts) if re.search(r"together|in total|In total|in all", question) else counts[-1]
        case "farm" | "points":
            return n[0] + sum(compared(n[0], re.sub("in the first", "", sentence)) for sentence in told[1:])
    raise AssertionError(kind)


def value(expression: str) -> int:
    return eval(expression.replace("x", "*"))


def check_trace(item: Problem) -> None:
    """Every equation of the trace holds, every rest of an expression is worth the whole, columns make up results."""
    for left, right in re.findall(r"((?:\d+ [-+x] )+\d+) = (\d+)", item.trace):
        assert value(left) == int(right), item.trace
    lines = re.split(r"(?:That is|The first has|The second has|The third has|Together|The difference is) ", item.trace)
    assert lines.pop(0) == ""
    operations = 0
    for line in lines:
        whole = value(re.match(r"[-+x\d ]*\d", line).group())
        rests = re.findall(r"so ([-+x\d ]*\d)", line)
        assert all(value(rest) == whole for rest in rests), item.trace
        assert int(re.search(r"(\d+)\.\s*$", line).group(1)) == whole, item.trace
        operations += len(re.findall(r"[-+x]", re.match(r"[-+x\d ]*\d", line).group()))
        for left, op, right, columns in re.findall(r"(\d+) ([-+x]) (\d+): (.*?), so ", line):
            # A column is what follows a comma; an equation that adds the carry of a product belongs to the one before.
            values: list[int] = []
            for equation in columns.split(", "):
                if op == "x" and "+" in equation:
                    values.pop()
                values.append(int(equation.split(" = ")[1]))
            *low, high = values
            result = int(str(high) + "".join(str(digit % 10) for digit in reversed(low)))
            assert result == value(f"{left} {op} {right}"), line
    assert whole == item.answer and operations == len(item.steps)


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_what_the_words_say(split):
    for item in problems(split, 3000):
        assert solve(item.kind, item.question) == item.answer, item.question
        check_trace(item)
        assert max(numbers_in(item.trace)) <= LIMIT and 2 <= len(item.steps) <= 4
        assert "{" not in item.question and "  " not in item.question


def test_sums_are_worked_as_on_paper():
    assert work_out("47 + 35")[1] == "47 + 35: 7 + 5 = 12, 4 + 3 + 1 = 8, so 82."
    assert work_out("502 - 67")[1] == "502 - 67: 12 - 7 = 5, 10 - 6 - 1 = 3, 5 - 0 - 1 = 4, so 435."
    assert work_out("47 x 6")[1] == "47 x 6: 7 x 6 = 42, 4 x 6 = 24, 24 + 4 = 28, so 282."
    assert work_out("6 x 47")[1] == "6 x 47: 6 x 7 = 42, 6 x 4 = 24, 24 + 4 = 28, so 282."
    assert work_out("3 + 5")[1] == "3 + 5 = 8."
    steps, text = work_out("35 - 3 x 5 - 14")
    assert [str(step) for step in steps] == ["3 x 5", "35 - 15", "20 - 14"]
    assert text == (
        "35 - 3 x 5 - 14. 3 x 5 = 15, so 35 - 15 - 14. 35 - 15: 5 - 5 = 0, 3 - 1 = 2, "
        "so 20 - 14: 10 - 4 = 6, 2 - 1 - 1 = 0, so 6."
    )


@pytest.mark.parametrize("expression", ["3 - 5", "500 + 500"])
def test_results_stay_in_range(expression):
    with pytest.raises(OutOfRange, match="is not between 1 and 999"):
        work_out(expression)


def test_two_long_factors_are_refused():
    with pytest.raises(ValueError, match="47 x 12"):
        work_out("47 x 12")


def test_a_problem_is_a_function_of_its_split_and_number():
    assert problem("train", 41) == problem("train", 41) != problem("held_out", 41)
    with pytest.raises(ValueError, match="'test'"):
        problem("test", 0)


def test_splits_share_no_name_no_reserved_sum_and_no_question():
    sums = {split: set() for split in SPLITS}
    questions = {split: set() for split in SPLITS}
    names = set(HELD_OUT_NAMES["she"] + HELD_OUT_NAMES["he"])
    for split in SPLITS:
        for item in problems(split, 3000):
            questions[split].add(item.question)
            sums[split] |= {(step.left, step.op, step.right) for step in item.steps}
            if split == "train":
                assert not names & set(re.findall(r"\w+", item.question)), item.question
            else:
                assert any(reserved(step.left, step.op, step.right) for step in item.steps)
    assert not any(reserved(*key) for key in sums["train"])
    assert not questions["train"] & questions["held_out"] and not questions["train"] & questions["unseen"]
    assert not questions["held_out"] & questions["unseen"]


def test_unseen_wordings_are_in_no_training_problem():
    skeletons = {split: set() for split in SPLITS}
    words = word_problems.OBJECTS + word_problems.CONTAINERS + word_problems.PLANTS + word_problems.ANIMALS
    things = re.compile("|".join(rf"\b{word}\b" for word in words))
    for split in SPLITS:
        for item in problems(split, 3000):
            for sentence in re.split(r"(?<=[.?]) ", item.question):
                skeletons[split].add(things.sub("things", re.sub(r"\d+", "n", re.sub(r"\b[A-Z]\w+", "Name", sentence))))
    assert len(skeletons["unseen"] - skeletons["train"]) > 0.8 * len(skeletons["unseen"])
    assert len(skeletons["held_out"] - skeletons["train"]) < 0.1 * len(skeletons["held_out"])


def test_all_kinds_and_lengths_occur():
    chosen = list(problems("held_out", 600))
    assert {item.kind for item in chosen} == set(KINDS)
    assert {len(item.steps) for item in chosen} == {2, 3, 4}


# ---------------------------------------------------------------------------------------------------------------------
# Chat format and tokenizer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_tiny():
    import train_tiny

    return train_tiny


@pytest.fixture(scope="module", params=["fresh", "shipped"])
def tokenizer(request, train_tiny):
    from transformers import AutoTokenizer

    if request.param == "fresh":
        return train_tiny.train_tokenizer(512, sample=500)
    return AutoTokenizer.from_pretrained(BUNDLED)


def render(tokenizer, *messages: tuple[str, str], **options) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(conversation, tokenize=False, **options)


def test_ids_are_those_of_the_v2_checkpoints(tokenizer):
    tokens = ["<unk>", "<s>", "</s>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [0, 1, 2, 10, 11, 12]
    assert tokenizer("Hi").input_ids[0] not in (1, 2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 12, 0)


def test_template_thinks_unless_told_not_to(tokenizer):
    ask = {"add_generation_prompt": True}
    on = "<SPECIAL_10>System\n\n<SPECIAL_11>User\nHow many?\n<SPECIAL_11>Assistant\n<think>\n"
    off = on.replace("<think>\n", "<think></think>")
    assert render(tokenizer, ("user", "How many?"), **ask) == on
    assert render(tokenizer, ("system", "/think"), ("user", "How many?"), **ask) == on
    assert render(tokenizer, ("system", "/no_think"), ("user", "How many?"), **ask) == off
    assert render(tokenizer, ("user", "How many? /no_think"), **ask) == off
    assert render(tokenizer, ("system", "/no_think"), ("user", "How many? /think"), **ask) == on
    assert render(tokenizer, ("user", "How many?"), enable_thinking=False, **ask) == off
    assert render(tokenizer, ("system", "/no_think"), ("user", "How many?"), enable_thinking=True, **ask) == on


def test_template_drops_the_reasoning_of_earlier_turns(tokenizer):
    turns = [("system", "Be brief. /think"), ("user", "A"), ("assistant", "<think>\nx\n</think>\n\nB"), ("user", "C")]
    assert render(tokenizer, *turns) == (
        "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\nA\n<SPECIAL_11>Assistant\nB\n<SPECIAL_12>\n"
        "<SPECIAL_11>User\nC\n"
    )
    # The last message is the one that is trained on, or continued.
    assert render(tokenizer, *turns[:3]).endswith("<SPECIAL_11>Assistant\n<think>\nx\n</think>\n\nB\n<SPECIAL_12>\n")


def test_template_refuses_other_roles(tokenizer):
    with pytest.raises(Exception, match="'tool' cannot stand here"):
        render(tokenizer, ("user", "A"), ("tool", "B"))


def test_assistant_mask_covers_the_assistant(tokenizer):
    conversation = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    encoded = tokenizer.apply_chat_template(
        conversation, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    chosen = [id for id, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(chosen) == "B\n<SPECIAL_12>\n"


def test_text_survives_the_tokenizer(tokenizer, train_tiny):
    texts = [train_tiny.completion_text(item, think=True) for item in problems("unseen", 50)]
    texts += ["Zoë's naïve 12,345 €\n\n\tend", "<think>\n1 + 2 = 3.\n</think>\n\n"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    # A reasoning parser needs the marks in the decoded text.
    assert tokenizer.decode(tokenizer("<think>").input_ids, skip_special_tokens=True) == "<think>"


def test_digits_are_tokens_of_their_own(tokenizer):
    assert [tokenizer.decode([id]) for id in tokenizer("is 407.").input_ids][-4:] == [" 4", "0", "7", "."]


def test_only_the_assistants_turn_is_learned(tokenizer, train_tiny):
    rows = train_tiny.encode_problems(tokenizer, 24, think_share=0.5)
    targets = [tokenizer.decode([id for id in row["labels"] if id != -100]) for row in rows]
    for index, (row, target) in enumerate(zip(rows, targets, strict=True)):
        item = problem("train", index)
        think = "</think>" in target
        assert target == train_tiny.completion_text(item, think)
        opening = "<think>\n" if think else "<think></think>"
        whole = f"User\n{item.question}\n<SPECIAL_11>Assistant\n{opening}{target}"
        assert tokenizer.decode(row["input_ids"]).endswith(whole)
    assert 8 <= sum("</think>" in target for target in targets) <= 16


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_batches_have_one_length_and_every_row_once(train_tiny):
    lengths = [(7 * row) % 100 for row in range(1001)]
    order = list(train_tiny.BatchesOfOneLength(lengths, batch_size=10, seed=1))
    assert sorted(order) == list(range(1001))
    spreads, means = [], []
    for at in range(0, 1000, 10):
        batch = [lengths[row] for row in order[at : at + 10]]
        spreads.append(max(batch) - min(batch))
        means.append(sum(batch) / 10)
    assert sum(spreads) / len(spreads) < 15
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_orthogonalised_keeps_the_directions(train_tiny):
    for matrix in (torch.randn(24, 60), torch.randn(60, 24)):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        step = train_tiny.orthogonalised(matrix)
        assert step.shape == matrix.shape
        assert torch.linalg.svdvals(step).sub(1).abs().max() < 0.4
        assert torch.nn.functional.cosine_similarity(step.flatten(), (left @ right).flatten(), dim=0) > 0.95


def test_script_trains_resumes_and_writes_a_folder(train_tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(train_tiny, "train_tokenizer", partial(train_tiny.train_tokenizer, sample=500))
    output = tmp_path / "model"
    command = f"train_tiny.py --output {output} --problems 48 --batch-size 8 --hidden-size 32 --vocab-size 512"
    monkeypatch.setattr(sys, "argv", f"{command} --held-out 4 --minutes 5 --save-steps 4".split())
    train_tiny.main()
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names >= {"chat_template.jinja", "generation_config.json", "figures.json", "held_out.jsonl"}
    figures = json.loads((output / "figures.json").read_text())
    assert figures["training"]["steps"] == 6 and figures["training"]["seed"] == 7
    assert set(figures["held_out"]) >= {"problems", "think", "no_think"}
    first = AutoModelForCausalLM.from_pretrained(output).state_dict()

    # Training again from the checkpoint in the middle gives the same weights.
    shutil.rmtree(tmp_path / "model.training" / "checkpoint-6")
    sys.argv.append("--resume")
    train_tiny.main()
    for name, tensor in AutoModelForCausalLM.from_pretrained(output).state_dict().items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What ships
# ---------------------------------------------------------------------------------------------------------------------


def test_shipped_problems_are_the_generators():
    lines = [json.loads(line) for line in (BUNDLED / "held_out.jsonl").read_text().splitlines()]
    figures = json.loads((BUNDLED / "figures.json").read_text())
    assert len(lines) == figures["held_out"]["problems"] + figures["unseen"]["problems"] >= 200
    assert [line["unseen_template"] for line in lines].count(True) == figures["unseen"]["problems"]
    for index, line in enumerate(lines[:50]):
        assert line == problem("held_out", index).record()
        assert solve(line["kind"], line["question"]) == line["answer"]


def test_shipped_model_is_small():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 8_000_000
