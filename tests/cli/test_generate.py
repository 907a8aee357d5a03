"""`nemotron-h generate`: what is streamed, what is refused, what --json says."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from nemotron_h.bundled import WORD_PROBLEMS
from nemotron_h.generation.chat import Chat
from nemotron_h.generation.conversation import Conversation


@pytest.mark.core
def test_json(cli_json, chat_model: str) -> None:
    reply = cli_json("generate", "How many?", "-m", chat_model, "--greedy", "--max-new-tokens", "12")
    assert reply["prompt"] == "How many?"
    assert reply["tokens"] == 12 and reply["finished"] is False
    assert reply["reasoning"] and reply["answer"] is None  # the random model never says </think>
    assert reply["seconds"] > 0 and reply["tokens_per_second"] > 0


@pytest.mark.core
def test_no_think(cli_json, chat_model: str) -> None:
    reply = cli_json("generate", "How many?", "-m", chat_model, "--greedy", "--max-new-tokens", "12", "--no-think")
    assert reply["reasoning"] is None and reply["answer"]


@pytest.mark.core
def test_streamed_text_is_the_json_text(cli, cli_json, base_model: str) -> None:
    arguments = ("generate", "Once upon", "-m", base_model, "--greedy", "--max-new-tokens", "12")
    shown = cli(*arguments)
    assert shown.stdout == cli_json(*arguments)["answer"] + "\n"
    assert "no chat template" in shown.stderr
    assert "12 tokens in" in shown.stderr and "--max-new-tokens raises the limit" in shown.stderr


def test_stdin(cli_json, base_model: str) -> None:
    arguments = ("-m", base_model, "--greedy", "--max-new-tokens", "4")
    piped = cli_json("generate", "-", *arguments, input="Once upon\n")
    assert piped["prompt"] == "Once upon"
    assert piped["answer"] == cli_json("generate", "Once upon", *arguments)["answer"]


def test_sampling_repeats_with_a_seed(cli_json, base_model: str) -> None:
    def answer(*more: str) -> str:
        return cli_json("generate", "Once", "-m", base_model, "--max-new-tokens", "16", *more)["answer"]

    sampled = answer("--temperature", "1.5", "--top-p", "0.99", "--seed", "1")
    assert sampled == answer("--temperature", "1.5", "--top-p", "0.99", "--seed", "1")
    assert sampled != answer("--temperature", "1.5", "--top-p", "0.99", "--seed", "2")
    assert answer("--top-k", "1", "--seed", "3") == answer("--greedy") == answer("--temperature", "0")


def test_system(cli_json, refused, chat_model: str, base_model: str) -> None:
    with_system = cli_json("generate", "Hi", "-m", chat_model, "--system", "Be brief.", "--max-new-tokens", "4")
    assert with_system["tokens"] == 4
    assert "no chat template" in refused("generate", "Hi", "-m", base_model, "--system", "Be brief.", "--json")


def test_errors(refused, base_model: str, tmp_path: Path) -> None:
    assert "is empty" in refused("generate", " ")
    assert "is empty" in refused("generate", "-", input="\n")
    assert "no folder 'nowhere'" in refused("generate", "Hi", "-m", "nowhere")
    assert "--greedy does not go with --temperature and --top-p" in refused(
        "generate", "Hi", "-m", base_model, "--greedy", "--temperature", "1", "--top-p", "0.5"
    )
    assert "'float7'" in refused("generate", "Hi", "-m", base_model, "--dtype", "float7")
    assert "'gpu'" in refused("generate", "Hi", "-m", base_model, "--device", "gpu")
    assert "no config.json" in refused("generate", "Hi", "-m", str(tmp_path))


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (b"caf\xe9?", "byte 3 is 0xe9"),
        (b"\xff\xfeH\0i\0", "byte 0 is 0xff"),  # UTF-16, as Windows' editors call Unicode
        (b"Hi\xed\xb3\xbf", "byte 2 is 0xed"),  # a lone surrogate, encoded
        (b"Hi \xf0\x9f\x99", "byte 3 is 0xf0"),  # cut in the middle of a character
        (b"a\0b", "NUL byte, at character 1"),
    ],
)
def test_bytes_that_are_no_text(refused, written: bytes, sentence: str, tmp_path: Path) -> None:
    """In a prompt that is piped, named on the command line (where Python makes surrogates of them), or in a file."""
    said = refused("generate", "-", input=written)
    assert said.startswith("nemotron-h: The prompt ") and sentence in said
    (tmp_path / "text").write_bytes(written)
    assert sentence in refused("logprobs", WORD_PROBLEMS, "--file", str(tmp_path / "text"))
    assert sentence in refused("logprobs", WORD_PROBLEMS, "--file", "-", input=written)
    if b"\0" not in written:  # no system hands on such an argument
        argument = written.decode(errors="surrogateescape")
        where = f"is not UTF-8: character {sentence.split()[1]} is "
        assert f"The prompt {where}" in refused("generate", argument)
        assert f"--system {where}" in refused("generate", "Hi", "--system", argument)
        assert f"--system {where}" in refused("chat", "--system", argument, input="Hi")
        assert f"--text {where}" in refused("logprobs", WORD_PROBLEMS, "--text", argument)
        assert f"--text {where}" in refused("verify", WORD_PROBLEMS, WORD_PROBLEMS, "--text", argument)


def test_a_lone_surrogate_in_the_library(base_model: str) -> None:
    chat = Chat.load(base_model)
    for text in ("a\ud800", "\udcff", "x\udfffy"):
        with pytest.raises(ValueError, match="The prompt is not UTF-8: character"):
            chat.ask(text, max_new_tokens=1)
        with pytest.raises(ValueError, match="The prompt is not UTF-8: character"):
            Conversation(chat).say(text, max_new_tokens=1)


def test_lines_of_windows_and_other_alphabets_are_text(cli_json, base_model: str) -> None:
    arguments = ("-m", base_model, "--greedy", "--max-new-tokens", "2")
    for written in ("Wie groß?\r\nUnd wo?\r\n", "東京 🙂\n", "naïve"):
        text = written.replace("\r\n", "\n").rstrip("\n")
        assert cli_json("generate", "-", *arguments, input=written.encode())["prompt"] == text
        assert cli_json("generate", text, *arguments)["prompt"] == text


def test_a_switch_that_does_not_switch_is_one_line(cli, chat_model: str, tmp_path: Path) -> None:
    """Of a template that has none, once, however often it is asked; and of a message that the switch is read in."""
    shutil.copytree(chat_model, tmp_path / "none")
    (tmp_path / "none" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    few = ("--greedy", "--max-new-tokens", "2")
    for more in ((), ("--json",)):
        said = cli("generate", "Hi", "-m", str(tmp_path / "none"), "--no-think", *few, *more).stderr.splitlines()
        assert [line for line in said if "nemotron-h:" in line] == [
            "nemotron-h: This chat template has no switch for reasoning: think=False changes nothing."
        ]
    said = cli("chat", "-m", str(tmp_path / "none"), "--no-think", *few, input="Hi\nWell\nAnd?\n").stderr
    assert said.count("no switch for reasoning") == 1
    letters = "nemotron-h: The chat template takes its switch's letters out of 'https://x/think'"
    assert letters in cli("generate", "See https://x/think now", "--no-think", *few).stderr
    assert "nemotron-h:" not in cli("generate", "See https://x now", "--no-think", *few).stderr


def in_a_terminal(*arguments: str, stdin: bytes) -> tuple[bytes, bytes]:
    """What the command line writes to its standard output, and to a terminal that is its standard error."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "nemotron_h", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        process.stdin.write(stdin)
        process.stdin.close()
        shown = b""
        with suppress(OSError):  # how Linux ends a terminal that nobody writes to any more
            while piece := os.read(ours, 1 << 16):
                shown += piece
        os.close(ours)
        return process.stdout.read(), shown


@pytest.mark.parametrize("command", [("generate", "-"), ("chat",)], ids=["generate", "chat"])
def test_a_terminal_shows_how_far_a_long_prompt_is(cli, base_model: str, command: tuple[str, ...]) -> None:
    arguments = (*command, "-m", base_model, "--greedy", "--max-new-tokens", "3")
    written = b"a long text, " * 400
    printed, shown = in_a_terminal(*arguments, stdin=written)
    total = len(written) - (command == ("chat",))  # the last token is left to begin with
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown)
    seen = [int(done) for done, of in re.findall(rb"(\d+)/(\d+) tokens", text) if int(of) == total]
    assert seen[0] == 0 and seen == sorted(seen)
    assert b"3 tokens in" in text
    piped = cli(*arguments, input=written)  # where standard error is no terminal
    assert printed.decode() == piped.stdout
    assert "prompt" not in piped.stderr and "\x1b" not in piped.stderr


def test_a_short_prompt_has_nothing_to_show(base_model: str) -> None:
    assert b"prompt" not in in_a_terminal("generate", "Hi", "-m", base_model, "--max-new-tokens", "3", stdin=b"")[1]


def test_weights_that_are_cut_off(refused, base_model: str, tmp_path: Path) -> None:
    shutil.copytree(base_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused("generate", "Hi", "-m", str(tmp_path / "cut"))


def test_the_hub_without_a_network(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (("generate", "Hi", "-m"), ("info",)):
        assert "nobody/nothing is no folder here" in refused(*command, "nobody/nothing")


def test_debug_brings_the_traceback(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON_H_DEBUG", "1")
    assert isinstance(cli("generate", " ", code=1).exception, ValueError)


@pytest.mark.core
def test_bundled_model_reasons(cli, cli_json) -> None:
    problem = "Anna has 12 apples. She buys 7 more. Later she uses 4 of them. How many apples does Anna have now?"
    reply = cli_json("generate", problem)
    assert reply["finished"] and reply["reasoning"] and reply["answer"] == "The answer is 15."
    shown = cli("generate", problem).stdout
    assert shown.strip() == f"{reply['reasoning']}\n\n{reply['answer']}"
    assert cli_json("generate", problem, "--no-think")["reasoning"] is None


@pytest.mark.core
def test_mtp(cli, cli_json, refused, base_model: str) -> None:
    """The bundled model's head drafts: the same reply in fewer steps, and how many drafts were kept."""
    problem = "Anna has 12 apples. She buys 7 more. Later she uses 4 of them. How many apples does Anna have now?"
    plain, drafted = cli_json("generate", problem), cli_json("generate", "--mtp", problem)
    assert plain["speculation"] is None
    found = drafted["speculation"]
    for name in ("reasoning", "answer", "tokens", "finished"):
        assert drafted[name] == plain[name], name
    assert found["tokens_per_step"] == round(found["tokens"] / found["steps"], 3) >= 2
    assert found["drafted"] > 2 * (found["steps"] - 2)  # three at a time, as it was trained
    one = cli_json("generate", "--mtp", "--mtp-tokens", "1", problem)
    assert one["answer"] == plain["answer"] and one["speculation"]["drafted"] < one["speculation"]["steps"]
    shown = cli("generate", "--mtp", problem).stderr
    assert f"{found['tokens_per_step']:.2f} tokens per step, {found['accepted']} of {found['drafted']} drafted" in shown
    # of another model, its own head
    assert "--mtp needs a multi-token-prediction head" in refused("generate", "Hi", "-m", base_model, "--mtp")
    assert "--assistant and --mtp draft in different ways" in refused("generate", "Hi", "--mtp", "--assistant", "x")
    assert "--early-exit 2 drafted with some of the model's own" in refused("generate", "Hi", "--early-exit", "2")
    assert "--mtp-tokens 2 is a number of drafts of --mtp" in refused("generate", "Hi", "--mtp-tokens", "2")
