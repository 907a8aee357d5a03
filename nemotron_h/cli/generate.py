"""`nemotron-h generate`: one prompt, the answer streamed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from .arguments import (
    DeviceOption,
    DtypeOption,
    GreedyOption,
    JsonOption,
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
    sampling_arguments,
)
from .output import echo_json, prefill_shown, remarks, streamer_for

NAME = "generate"
HELP = "Ask a model, and watch it think and answer. Models without a chat template continue the text."
EXAMPLE = 'Example: nemotron-h generate "Anna has 12 apples. She buys 7 more. How many apples does Anna have now?"'


def run(
    prompt: Annotated[str, typer.Argument(help="The question, or - to read it from standard input.")],
    model: ModelOption = None,
    think: ThinkOption = True,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = None,
    prompt_lookup: Annotated[
        int | None, typer.Option(min=1, help="Draft so many tokens from the text itself; the model checks them.")
    ] = None,
    assistant: Annotated[
        str | None, typer.Option(metavar="FOLDER|HUB_ID", help="A smaller model that drafts; the model checks.")
    ] = None,
    early_exit: Annotated[str | None, typer.Option(hidden=True)] = None,  # refused: it was an option once
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Draft with the multi-token-prediction head; the bundled model has one.")
    ] = False,
    mtp_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --mtp: so many at a time.  [default: as trained]")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    sampling = sampling_arguments(greedy, temperature, top_p, top_k)
    if early_exit is not None:
        raise ValueError(
            f"--early-exit {early_exit} drafted with some of the model's own layers, which made nothing faster and is "
            "gone: use --prompt-lookup, --assistant or --mtp."
        )
    drafts = draft_arguments(prompt_lookup, assistant, mtp, mtp_tokens)
    text = decoded(sys.stdin.buffer.read(), "The prompt").rstrip("\n") if prompt == "-" else prompt
    if not text.strip():
        raise ValueError(f"The prompt {text!r} is empty; write a question, or - and send one to standard input.")
    from ..generation.chat import check_text

    check_text(text, "The prompt")
    check_text(system or "", "--system")
    chat = load_chat(model, dtype, device)
    if assistant is not None:
        drafts = chat.drafts_of(load_chat(assistant, dtype, device))
    if mtp:
        from ..bundled import WORD_PROBLEMS_MTP
        from ..mtp import check_head, load_head

        if model is None:
            load_head(chat.model, WORD_PROBLEMS_MTP)
        check_head(chat.model, "--mtp")
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    console, notes = Console(), Console(stderr=True)
    if not chat.has_template and not as_json:
        notes.print("This model has no chat template: the text is continued as it is.", style="dim")
    streamer = None if as_json else streamer_for(console, chat)
    with prefill_shown():
        reply = chat.ask(
            text, system=system, think=think, streamer=streamer, max_new_tokens=max_new_tokens, **sampling, **drafts
        )
    if as_json:
        result = {**asdict(reply), "tokens_per_second": round(reply.tokens_per_second, 2)}
        echo_json(result)
        return
    remarks(reply, notes)
    notes.print(f"{reply.tokens} tokens in {reply.seconds:.2f} s, {reply.tokens_per_second:.1f} tokens/s", style="dim")
    if (found := reply.speculation) is not None:
        kept = f"{found['accepted']} of {found['drafted']} drafted tokens kept ({found['acceptance_rate']:.0%})"
        notes.print(f"{found['tokens_per_step']:.2f} tokens per step, {kept}", style="dim")


def draft_arguments(
    prompt_lookup: int | None, assistant: str | None, mtp: bool = False, mtp_tokens: int | None = None
) -> dict[str, Any]:
    """The options as `generate()` takes them, but for the assistant, which has to be loaded."""
    if mtp_tokens is not None and not mtp:
        raise ValueError(f"--mtp-tokens {mtp_tokens} is a number of drafts of --mtp; add --mtp, or leave it out.")
    given = {"--prompt-lookup": prompt_lookup, "--assistant": assistant, "--mtp": mtp or None}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"{' and '.join(names)} draft in different ways; leave all but one of them out.")
    if prompt_lookup is not None:
        return {"prompt_lookup_num_tokens": prompt_lookup}
    if mtp:
        return {"use_mtp": True} | ({} if mtp_tokens is None else {"num_assistant_tokens": mtp_tokens})
    return {}
