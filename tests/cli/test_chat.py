"""`nemotron-h chat`: turns, what they cost, commands, and that an answer is the one a fresh process would give."""

import json
from pathlib import Path

import pytest

from nemotron_h import PromptCache
from nemotron_h.generation.conversation import Conversation

pytestmark = pytest.mark.core

FIRST = "Anna has 12 apples. She buys 7 more. How many apples does Anna have now?"
SECOND = "Tom has 30 pens. He buys 4 more. How many pens does Tom have now?"


def turns(cli, *arguments: str, input: str) -> list[dict]:
    return [json.loads(line) for line in cli("chat", *arguments, "--json", input=input).stdout.splitlines()]


def test_a_conversation(cli, cli_json) -> None:
    """Of the bundled model, whose template takes the reasoning out of what was said."""
    first, second = turns(cli, input=f"{FIRST}\n\n{SECOND}\n")
    alone = cli_json("generate", FIRST)
    assert (first["answer"], first["reasoning"]) == (alone["answer"], alone["reasoning"])
    assert first["reused_tokens"] == 0 and first["finished"]
    assert second["prompt"] == SECOND
    # All of the first turn's prompt but what asks for an answer was kept.
    assert first["prompt_tokens"] - 8 <= second["reused_tokens"] < first["prompt_tokens"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + 20


def test_every_turn_is_what_a_fresh_prompt_gives(cli, chat_model: str) -> None:
    """The same messages rendered and generated from nothing, with transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(chat_model).eval(),
        AutoTokenizer.from_pretrained(chat_model),
    )
    asked = ["How many?", "And now?", "Why?"]
    found = turns(
        cli, "-m", chat_model, "--greedy", "--no-think", "--system", "Be brief.", "--max-new-tokens", "9",
        input="\n".join(asked),
    )  # fmt: skip
    messages = [{"role": "system", "content": "Be brief. /no_think"}]
    for number, (text, turn) in enumerate(zip(asked, found, strict=True)):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=9, do_sample=False)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert turn["answer"] == answer
        assert turn["prompt_tokens"] == ids.shape[1]
        assert (turn["reused_tokens"] > 0) is (number > 0)
        messages.append({"role": "assistant", "content": answer})


def test_commands(cli) -> None:
    lines = [FIRST, "/cache", "/no_think", FIRST, "/reset", FIRST, "/think", "/what", "/quit", "never asked"]
    result = cli("chat", input="\n".join(lines))
    assert result.stdout.count("The answer is") == 3
    assert "never asked" not in result.output
    for note in ("states, ", "Reasoning is off.", "A new conversation.", "Reasoning is on.", "There is no /what"):
        assert note in result.stderr
    assert result.stderr.count("tokens in ") == 3


def test_reset_starts_over_and_finds_what_is_kept(cli) -> None:
    first, again = turns(cli, input=f"{FIRST}\n/reset\n{FIRST}\n")
    assert (again["answer"], again["prompt_tokens"]) == (first["answer"], first["prompt_tokens"])
    assert again["reused_tokens"] == first["prompt_tokens"] - 1


def test_a_folder_is_found_by_the_next(cli, tmp_path: Path) -> None:
    arguments = ("--cache-folder", str(tmp_path / "states"), "--cache-size", "4MiB")
    (first,) = turns(cli, *arguments, input=FIRST)
    (again,) = turns(cli, *arguments, input=FIRST)
    assert first["reused_tokens"] == 0 and again["reused_tokens"] == first["prompt_tokens"] - 1
    assert first["answer"] == again["answer"]


def test_a_line_that_is_no_text_is_said_and_the_conversation_goes_on(cli) -> None:
    """The first and the last of three questions are answered as if nothing stood between them."""
    wrong = {b"caf\xe9?": "byte 3 is 0xe9", b"\xff\xfeH": "byte 0 is 0xff", b"a\0b": "NUL byte, at character 1"}
    between = b"\n".join(wrong)
    result = cli("chat", "--json", "--no-think", input=b"\n".join([FIRST.encode(), between, SECOND.encode()]))
    undisturbed = turns(cli, "--no-think", input=f"{FIRST}\n{SECOND}\n")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for name in ("prompt", "answer", "prompt_tokens", "reused_tokens"):
        assert [turn[name] for turn in answers] == [turn[name] for turn in undisturbed]
    said = result.stderr.splitlines()
    assert len(said) == 3
    for line, reason in zip(said, wrong.values(), strict=True):
        assert line.startswith("nemotron-h: This line ") and reason in line


def test_without_a_template_the_text_goes_on(cli, base_model: str) -> None:
    first, second = turns(cli, "-m", base_model, "--greedy", "--max-new-tokens", "5", input="Once upon\n a time\n")
    assert second["prompt_tokens"] > first["prompt_tokens"] and second["reused_tokens"] > 0
    assert "no chat template" in cli("chat", "-m", base_model, "--max-new-tokens", "2", input="Once\n").stderr


def test_errors(refused, base_model: str, chat_model: str) -> None:
    assert "no chat template" in refused("chat", "-m", base_model, "--system", "Be brief.", input="Hi\n")
    assert "is not a size" in refused("chat", "-m", chat_model, "--cache-size", "much", input="Hi\n")
    assert "--greedy does not go with --top-k" in refused("chat", "--greedy", "--top-k", "3", input="Hi\n")


def test_a_turn_that_is_stopped_is_not_said(chat_model: str) -> None:
    from nemotron_h.generation.chat import Chat

    conversation = Conversation(Chat.load(chat_model), prompt_cache=PromptCache())
    conversation.say("How many?", max_new_tokens=3)
    before = list(conversation.messages)

    class Stopped(Exception):
        pass

    def stop(*_arguments):
        raise Stopped

    with pytest.raises(Stopped):
        conversation.say("And now?", max_new_tokens=3, prefix_allowed_tokens_fn=stop)
    assert conversation.messages == before
    conversation.say("And now?", max_new_tokens=3)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
