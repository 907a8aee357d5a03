"""Generate with a model that is split over several processes: every layer over all of them, Mamba layers too.

    torchrun --nproc-per-node 8 examples/tensor_parallel.py nvidia/NVIDIA-Nemotron-Nano-9B-v2

Without a GPU the processes talk through gloo. Their number has to divide the model's Mamba groups, which are 8 in every
published model and 1 in the bundled one.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import nemotron_h  # noqa: F401  (registers the family: the Auto classes below give this package's classes)

QUESTION = "Tom has 12 apples. He buys 7 more apples. How many apples does Tom have now?"


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate with tensor parallelism; start it with torchrun.")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64, help="at most so many new ones")
    arguments = parser.parse_args()
    if not torch.distributed.is_torchelastic_launched():
        parser.error("start it with torchrun: torchrun --nproc-per-node 8 examples/tensor_parallel.py MODEL")

    if not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=arguments.dtype, distributed_config=DistributedConfig(tp_plan="auto")
    )
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": arguments.question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    # Every process samples by itself: greedy, or with one seed for all, so that they agree on the token.
    output = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
    if torch.distributed.get_rank() == 0:
        here = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
        whole = sum(p.numel() for p in model.parameters())
        print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        print(f"{here:,} of {whole:,} parameters in this process, one of {torch.distributed.get_world_size()}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
