"""GGUF files, as llama.cpp reads them: architectures `nemotron_h` (dense) and `nemotron_h_moe` (any `E` layer).

| published | GGUF | there |
|---|---|---|
| backbone.embeddings, backbone.norm_f, lm_head | token_embd, output_norm, output | no output where it is tied |
| backbone.layers.N.norm | blk.N.attn_norm | |
| mixer.in_proj, out_proj | ssm_in, ssm_out | rows z, x, B, C, dt, as here |
| mixer.conv1d.weight (C, 1, K), .bias | ssm_conv1d.weight (C, K), .bias | the bias is zeros where there is none |
| mixer.A_log (H,) | ssm_a (H, 1) | **-exp(A_log)** |
| mixer.D (H,), mixer.dt_bias (H,) | ssm_d (H, 1), ssm_dt.bias (H,) | |
| mixer.norm (d_inner,) | ssm_norm (n_groups, d_inner / n_groups) | |
| mixer.q_proj, k_proj, v_proj, o_proj | attn_q, attn_k, attn_v, attn_output | **q and k reordered**, see below |
| mixer.up_proj, down_proj | ffn_up, ffn_down | |
| mixer.gate.weight, .e_score_correction_bias | ffn_gate_inp.weight, exp_probs_b.bias | |
| mixer.experts.E.up_proj, down_proj | ffn_up_exps (E, ., .), ffn_down_exps | stacked |
| mixer.shared_experts.up_proj, down_proj | ffn_up_shexp, ffn_down_shexp | |
| mixer.fc1_latent_proj, fc2_latent_proj | ffn_latent_down, ffn_latent_up | |
| mtp.layers.0.*, mtp.layers.1.* | blk.{number of layers}.*: one block more | see `names.MTP` |

A layer's kind is told by two lists: heads of keys (0: no attention) and width of the MLP (0: none); both 0 is Mamba.
Matrices are stored as asked for (f32, f16, bf16, q8_0); vectors, norms, the convolution, the router, A and D in f32.

Of each head of q and k, the rows 0, 1, ... d-1 are stored as 0, d/2, 1, d/2 + 1, ...: a habit of llama.cpp's converter
for rotary models. Without a position encoding it changes no product of q and k, but adapters that llama.cpp's
converter made expect it, and files that it wrote have it.

What llama.cpp does not compute is refused: MLP and MoE layers in one model, a clamp of the time step, biases of
`in_proj` or of experts. Of MTP it knows one depth of `*E`, and subtracts a mean in its last norm (llama.cpp 0c1e5709):
other drafts than here, the same text. Files of other quantisations are read, dequantised.

The tokenizer is in `tokenizer`. `config.json` and its neighbours travel in keys `huggingface.*` that llama.cpp
passes over, so that a file comes back as the folder it was; without them the config is read off llama.cpp's own keys.
f32, f16 and bf16 come back exactly, except `A_log`: -exp of it is rounded to float32, so a float32 `A_log` may come
back a step of float32 (of its own or of 1.0, whichever is larger) beside what it was; a bfloat16 one is exact.
"""

from __future__ import annotations

from pathlib import Path

from .names import Row, table
from .reading import GGUFFile, to_huggingface
from .writing import OUTTYPES, export, from_huggingface

__all__ = [
    "OPTIONS",
    "OUTTYPES",
    "GGUFFile",
    "Row",
    "export",
    "from_huggingface",
    "recognises",
    "table",
    "to_huggingface",
]

OPTIONS = {
    "outtype": "f32, f16, bf16 (the default) or q8_0 for the matrices",
    "pre": "llama.cpp's name for how the tokenizer splits text, where it cannot be told",
    "mtp": "False leaves the multi-token-prediction layers out",
    "dtype": "the folder's dtype; as stored without it, float32 for what was quantised",
    "shard_bytes": "the largest size of a file of the folder, in bytes",
}


def recognises(path: Path) -> bool:
    """A GGUF file, by its first bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
