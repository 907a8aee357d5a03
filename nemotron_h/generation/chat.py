"""A model with its tokenizer, asked one question at a time: what the command line's `generate` and `demo` do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .reasoning import ReasoningStreamer, opens_reasoning, reasoning_switch
from .speculation import report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reply:
    """What came of one prompt. `finished` is False where the token limit ended the text."""

    prompt: str
    reasoning: str | None
    answer: str | None
    tokens: int
    seconds: float
    finished: bool
    speculation: dict[str, float] | None = None  # where drafts were checked: how many, how many were kept

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class QuietStreamer(ReasoningStreamer):
    """Takes the text apart and shows nothing."""

    def on_text(self, kind: str, text: str) -> None:
        pass

    def on_end(self) -> None:
        pass


class Chat:
    """A causal language model and its tokenizer. Without a chat template, prompts are continued as they are."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str, *, dtype: str = "auto", device: str = "auto", local_files_only: bool = False) -> Chat:
        """`name` is a folder or a hub id; `device` "auto" means every CUDA device there is, else the CPU."""
        placement = _device_map(device)
        AutoConfig.from_pretrained(name, local_files_only=local_files_only)  # a wrong name fails here, in its own words
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{name} has no tokenizer that transformers can load ({_first_line(error)}); put the tokenizer's files "
                "beside its config.json."
            ) from error
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, local_files_only=local_files_only, **({"device_map": placement} if placement else {})
        )
        return cls(model.eval(), tokenizer)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def render(self, text: str, *, system: str | None = None, think: bool = True) -> str:
        """The prompt the model sees for the user's `text`."""
        check_text(text, "The prompt")
        check_text(system or "", "The system text")
        if not self.has_template:
            if system:
                raise ValueError(
                    f"This model has no chat template, so the system text {system!r} has no place; put it into the "
                    "prompt."
                )
            return text
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        messages, arguments = reasoning_switch(messages, think, self.tokenizer)
        return render_messages(self.tokenizer, messages, arguments)

    def ask(
        self,
        text: str,
        *,
        system: str | None = None,
        think: bool = True,
        streamer: ReasoningStreamer | None = None,
        **generate_kwargs: Any,
    ) -> Reply:
        """Generate a reply to `text`, each piece going to `streamer` as it comes."""
        prompt = self.render(text, system=system, think=think)
        return self.generate(text, prompt, streamer=streamer, **generate_kwargs)

    def generate(
        self, text: str, prompt: str, *, streamer: ReasoningStreamer | None = None, **generate_kwargs: Any
    ) -> Reply:
        """As `ask`, of a prompt that is rendered already; `text` is what the reply says it answers."""
        # A template writes its own special tokens; a bare text gets the tokenizer's.
        inputs = self.tokenizer(prompt, add_special_tokens=not self.has_template, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        if not inputs["input_ids"].shape[1]:
            raise ValueError(f"The prompt {text!r} has no tokens; write a question or the start of a text.")
        if streamer is None:
            streamer = QuietStreamer(self.tokenizer, started=self.has_template and opens_reasoning(prompt))
        started = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                streamer=streamer,
                return_dict_in_generate=True,
                **generate_kwargs,
            )
        seconds = time.perf_counter() - started
        reasoning, answer = streamer.split()
        last = int(output.sequences[0, -1])
        eos = self.model.generation_config.eos_token_id
        finished = last in (eos if isinstance(eos, list) else [eos])
        return Reply(text, reasoning, answer, streamer.tokens, seconds, finished, report(output))

    def drafts_of(self, assistant: Chat) -> dict[str, Any]:
        """Arguments for `ask` with which `assistant` drafts and this model checks, whatever tokenizer it has."""
        arguments: dict[str, Any] = {"assistant_model": assistant.model}
        if self.tokenizer.get_vocab() != assistant.tokenizer.get_vocab():
            arguments |= {"tokenizer": self.tokenizer, "assistant_tokenizer": assistant.tokenizer}
        return arguments


def render_messages(tokenizer: Any, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
    """The prompt of these messages. Raises `ValueError` where the template, a program from elsewhere, cannot."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments))
    except Exception as error:  # whatever Python and jinja can
        said = _first_line(error) if str(error) else type(error).__name__
        raise ValueError(
            f"The chat template cannot render the messages ({said}): correct chat_template.jinja, or fetch it again."
        ) from error


def check_text(text: str, what: str) -> str:
    """`text`, if a model can be given it.

    Raises:
        ValueError: it has bytes that are not UTF-8, which Python hands on as lone surrogates, or a NUL byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is not UTF-8: character {error.start} is {text[error.start]!r}; write it in UTF-8."
        ) from None
    if (at := text.find("\0")) >= 0:
        raise ValueError(f"{what} has a NUL byte, at character {at}, as no text has; leave it out.")
    return text


def peak_memory(model: PreTrainedModel) -> int:
    """The most memory held so far, in bytes: the device's where the model is on CUDA, else the whole process's."""
    if model.device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    import sys

    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # bytes on macOS, KiB elsewhere


def _device_map(device: str) -> Any:
    if device == "auto":
        return "auto" if torch.cuda.is_available() else None
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"There is no device {device!r}; write auto, cpu, cuda, cuda:0 or mps.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"This torch ({torch.__version__}) sees no CUDA device for device {device!r}; use cpu or auto."
        )
    return None if kind == "cpu" else {"": device}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
