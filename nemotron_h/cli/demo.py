"""`nemotron-h demo`: the bundled model at work on problems it never saw, with and without its reasoning."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .arguments import DeviceOption, JsonOption, MaxNewTokensOption, ModelOption, load_chat
from .output import echo_json, number_table, show, size

if TYPE_CHECKING:
    from ..generation.chat import Reply

NAME = "demo"
HELP = "Let the bundled model solve held-out word problems, with reasoning and without, and count."
EXAMPLE = "Example: nemotron-h demo -n 5"


@dataclass
class Tally:
    """What one way of answering came to."""

    title: str
    right: int = 0
    problems: int = 0
    tokens: int = 0
    seconds: float = 0.0
    replies: list[dict[str, Any]] = field(default_factory=list)

    def add(self, problem: dict[str, Any], reply: Reply) -> bool:
        from ..bundled import read_answer

        right = read_answer(reply.answer) == problem["answer"]
        self.right += right
        self.problems += 1
        self.tokens += reply.tokens
        self.seconds += reply.seconds
        self.replies.append({**asdict(reply), "expected": problem["answer"], "right": right})
        return right

    @property
    def accuracy(self) -> float:
        return self.right / self.problems

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        numbers = {name: value for name, value in asdict(self).items() if name != "title"}
        return {**numbers, "accuracy": self.accuracy, "tokens_per_second": round(self.tokens_per_second, 2)}


def run(
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many problems.")] = 20,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Problems whose sentences were kept from training as well.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Which problems are drawn.")] = 0,
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    from ..bundled import figures, held_out

    problems = [problem for problem in held_out() if bool(problem["unseen_template"]) is unseen]
    problems = random.Random(seed).sample(problems, min(number, len(problems)))
    chat = load_chat(model, "auto", device)
    from ..generation.chat import peak_memory

    console = Console(quiet=as_json)
    tallies = {True: Tally("with reasoning"), False: Tally("without reasoning")}
    console.print(f"{len(problems)} word problems the model has never seen, each answered twice.\n", highlight=False)
    for i, problem in enumerate(problems, 1):
        console.print(f"[bold]{i}/{len(problems)}[/bold] ", end="")
        show(console, f"{problem['question']}\n")
        for think, tally in tallies.items():
            reply = chat.ask(
                problem["question"],
                think=think,
                streamer=_reasoning_shown(console, chat) if think else None,
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
            right = tally.add(problem, reply)
            verdict = "[green]right[/green]" if right else f"[red]wrong[/red], it is {problem['answer']}"
            console.print(f"  [bold]{tally.title}:[/bold] ", end="")
            show(console, reply.answer or "(no answer)")
            console.print(f"  {verdict}", highlight=False)
        console.print()
    memory = peak_memory(chat.model)
    if as_json:
        result = {"reasoning": tallies[True].as_dict(), "no_reasoning": tallies[False].as_dict()}
        echo_json({**result, "peak_memory_bytes": memory})
        return
    console.print(_summary(list(tallies.values())))
    what = "GPU memory" if chat.model.device.type == "cuda" else "memory of the process, torch included"
    console.print(f"Peak {what}: {size(memory)}", highlight=False)
    if model is None:
        for line in _measured(figures()):
            console.print(line, style="dim", highlight=False, soft_wrap=True)


def _reasoning_shown(console: Console, chat: Any) -> Any:
    """A streamer that shows the reasoning, dimmed, as it comes; the answer is printed with its verdict afterwards."""
    from ..generation.reasoning import ReasoningStreamer

    class Streamer(ReasoningStreamer):
        def on_text(self, kind: str, text: str) -> None:
            if kind == "reasoning":
                if self.reasoning == text:
                    console.print("  ", end="")
                show(console, text, "dim")

        def on_end(self) -> None:
            if self.reasoning:
                console.print()

    return Streamer(chat.tokenizer)


def _summary(tallies: list[Tally]) -> Table:
    table = number_table("", "right", "accuracy", "tokens", "tokens/s")
    for tally in tallies:
        table.add_row(
            tally.title,
            f"{tally.right}/{tally.problems}",
            f"{tally.accuracy:.0%}",
            f"{tally.tokens:,}",
            f"{tally.tokens_per_second:.0f}",
        )
    return table


def _measured(figures: dict[str, Any]) -> list[str]:
    """The accuracies on all held-out problems, from when the model was trained."""
    names = {"held_out": "held-out problems", "unseen": "problems in sentences never seen"}
    return [
        f"When it was trained, on all {figures[split]['problems']} {name}: "
        f"{figures[split]['think']['accuracy']:.1%} with reasoning, "
        f"{figures[split]['no_think']['accuracy']:.1%} without."
        for split, name in names.items()
        if split in figures
    ]
