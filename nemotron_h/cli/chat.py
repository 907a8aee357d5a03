"""`nemotron-h chat`: a conversation, line by line, that computes only what a turn adds."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .arguments import (
    DeviceOption,
    DtypeOption,
    GreedyOption,
    MaxNewTokensOption,
    ModelOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    ThinkOption,
    TopKOption,
    TopPOption,
    decoded,
    load_chat,
    parse_size,
    sampling_arguments,
)
from .output import echo_json, prefill_shown, remarks, size, streamer_for

if TYPE_CHECKING:
    from ..generation.conversation import Conversation, Turn

NAME = "chat"
HELP = """Talk with a model, a line at a time. Its state is kept between turns, so a turn costs what it adds.

/quit leaves, /reset starts over, /think and /no_think switch the reasoning, /cache says what is kept.
"""
EXAMPLE = "Example: nemotron-h chat --no-think"


def run(
    model: ModelOption = None,
    think: ThinkOption = True,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = None,
    cache_size: Annotated[str, typer.Option(metavar="BYTES", help="Memory for kept states, as 2GiB.")] = "2GiB",
    cache_folder: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Keep states there too; the next conversation finds them.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a turn and nothing else.")] = False,
) -> None:
    sampling = {"max_new_tokens": max_new_tokens, **sampling_arguments(greedy, temperature, top_p, top_k)}
    budget = parse_size(cache_size)
    from ..generation.chat import check_text

    check_text(system or "", "--system")
    chat = load_chat(model, dtype, device)
    from ..generation.conversation import Conversation
    from ..generation.prompt_cache import PromptCache

    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    conversation = Conversation(chat, system=system, think=think, prompt_cache=PromptCache(budget, folder=cache_folder))
    notes = Console(stderr=True)
    asking = sys.stdin.isatty() and not as_json
    if asking:
        notes.print("/quit leaves, /reset starts over, /think and /no_think switch the reasoning.", style="dim")
    if not chat.has_template and not as_json:
        notes.print("This model has no chat template: the text is continued as it is.", style="dim")
    while True:
        try:
            line = _line(asking)
        except ValueError as error:
            notes.print(f"nemotron-h: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
            continue
        if line is None:
            break
        if not line.strip():
            continue
        if line.startswith("/"):
            if not _command(line.strip(), conversation, notes):
                break
            continue
        _turn(conversation, line, sampling, notes, as_json)
    if cache_folder is not None:
        conversation.prompt_cache.flush(chat.model)


def _line(asking: bool) -> str | None:
    """The next line without its end; None at the end of the input.

    Raises:
        ValueError: the line is not UTF-8, or has a NUL byte; the one after it may be.
    """
    if asking:
        try:
            return decoded(input("> ").encode(errors="surrogateescape"), "This line")
        except UnicodeDecodeError as error:
            return decoded(error.object, "This line")
        except (EOFError, KeyboardInterrupt):
            return None
    line = sys.stdin.buffer.readline()
    return decoded(line, "This line").rstrip("\n") if line else None


def _command(command: str, conversation: Conversation, notes: Console) -> bool:
    """Do what a line that begins with / says; False: leave."""
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        conversation.reset()
        notes.print("A new conversation.", style="dim")
    elif command in ("/think", "/no_think"):
        conversation.think = command == "/think"
        notes.print(f"Reasoning is {'on' if conversation.think else 'off'}.", style="dim")
    elif command == "/cache":
        cache = conversation.prompt_cache
        notes.print(f"{len(cache)} states, {size(cache.nbytes)} of {size(cache.max_bytes)}.", style="dim")
    else:
        notes.print(f"There is no {command}: /quit, /reset, /think, /no_think, /cache.", style="yellow", markup=False)
    return True


def _turn(conversation: Conversation, text: str, sampling: dict[str, Any], notes: Console, as_json: bool) -> None:
    streamer = None if as_json else streamer_for(Console(), conversation.chat)
    try:
        with prefill_shown():
            turn = conversation.say(text, streamer=streamer, **sampling)
    except KeyboardInterrupt:
        notes.print("\nStopped; this turn is not part of the conversation.", style="yellow")
        return
    if as_json:
        echo_json(_as_dict(turn))
        return
    reply = turn.reply
    remarks(reply, notes)
    notes.print(
        f"{reply.tokens} tokens in {reply.seconds:.2f} s after {turn.prompt_tokens}, {turn.reused} of them kept",
        style="dim",
    )


def _as_dict(turn: Turn) -> dict[str, Any]:
    speed = round(turn.reply.tokens_per_second, 2)
    return {
        **asdict(turn.reply),
        "tokens_per_second": speed,
        "prompt_tokens": turn.prompt_tokens,
        "reused_tokens": turn.reused,
    }
