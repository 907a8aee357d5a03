"""Multi-token prediction: the `mtp.*` head of a checkpoint, its file and its loss; generation/drafts.py drafts with it.

Depth k (from 1) sees at position t the hidden state of depth k-1 there (depth 0: the model's own, after `norm_f`) and
the embedding of token t+k, and predicts token t+k+1 through the model's own `lm_head`:

    h_k[t] = final_layernorm(layers_k(eh_proj([enorm(embed(x[t+k])), hnorm(h_{k-1}[t])])))

After `norm_f`, because NVIDIA's own training says so (NeMo Automodel's MTPModule takes "output of the main model's
final norm (h_0)"); vLLM's drafter is given the same. Depths beyond those of the checkpoint are its last one again.

Shape suffixes as in layers/__init__.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache.hybrid import cache_length
from .checkpoints import published
from .configuration import NemotronHConfig
from .files import atomic_write
from .layers.block import NemotronHBlock, build_mixer
from .layers.masks import read_inputs
from .layers.parts import NemotronHRMSNorm, project
from .training import losses

_FORMAT = "nemotron_h.mtp"
_REMEDY = "load one that has (Nemotron 3 Super, Ultra), or make one with nemotron_h.mtp.add_head and train it"


class NemotronHMTPLayer(NemotronHBlock):
    """One layer of a multi-token-prediction depth; the first of a depth joins the next token's embedding in, the last
    has the depth's own final norm."""

    def __init__(self, config: NemotronHConfig, kind: str, idx: int, first: bool, last: bool):
        GradientCheckpointingLayer.__init__(self)
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.block_type = kind
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = NemotronHRMSNorm(width, eps)
        self.mixer = build_mixer(config, kind, idx)
        if first:
            self.enorm = NemotronHRMSNorm(width, eps)
            self.hnorm = NemotronHRMSNorm(width, eps)
            self.eh_proj = nn.Linear(2 * width, width, bias=False)
        if last:
            self.final_layernorm = NemotronHRMSNorm(width, eps)
        self.first, self.last = first, last

    def forward(self, x_BLD: Tensor, embeds_BLD: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.first:
            assert embeds_BLD is not None
            x_BLD = project(self.eh_proj, torch.cat([self.enorm(embeds_BLD), self.hnorm(x_BLD)], dim=-1))
        x_BLD = super().forward(x_BLD, **kwargs)
        return self.final_layernorm(x_BLD.to(self.final_layernorm.weight.dtype)) if self.last else x_BLD


class NemotronHMultiTokenPredictor(nn.Module):
    """The `mtp.*` tensors of a checkpoint: `num_nextn_predict_layers` depths of `mtp_layers_block_type`."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        kinds = config.mtp_layers_block_type
        self.depths, self.pattern_length = config.num_nextn_predict_layers, len(kinds)
        self.layers = nn.ModuleList(
            NemotronHMTPLayer(config, kind, idx, first=idx == 0, last=idx == len(kinds) - 1)
            for _depth in range(self.depths)
            for idx, kind in enumerate(kinds)
        )

    def forward(self, x_BLD: Tensor, embeds_BLD: Tensor, depth: int, **kwargs: Any) -> Tensor:
        """The hidden states of one depth, counted from 0, from those of the one before (of the model for the first)
        and the embeddings of the tokens that many places further on; (B, L, D) each. The head takes them as they are.

        Depths that the checkpoint has not are its last one again.
        """
        first = min(depth, self.depths - 1) * self.pattern_length
        for layer in self.layers[first : first + self.pattern_length]:
            x_BLD = layer(x_BLD, embeds_BLD, **kwargs)
        return x_BLD


def check_head(model: Any, wanted: str) -> None:
    """Raises `ValueError` for a model without an MTP head, which `wanted` asks for."""
    if getattr(model, "mtp", None) is None:
        raise ValueError(
            f"{wanted} needs a multi-token-prediction head, and this checkpoint has none "
            f"(num_nextn_predict_layers={model.config.num_nextn_predict_layers}, no mtp.* tensors): {_REMEDY}."
        )


def add_head(model: Any, pattern: str = "*-", depths: int = 1) -> Any:
    """Give a model a new MTP head, to be trained (`model.mtp_loss_scale`): in place, and returned.

    Args:
        pattern: the layers of a depth, as in `hybrid_override_pattern`; published heads are "*E".
        depths: how many tokens ahead it has layers of its own for.

    Raises:
        ValueError: the model has a head already, or the config would be wrong.
    """
    if getattr(model, "mtp", None) is not None:
        raise ValueError(
            f"The model has an MTP head already, of {model.mtp.depths} depths: train it, or set model.mtp = None first."
        )
    config = copy.copy(model.config)
    config.mtp_hybrid_override_pattern, config.num_nextn_predict_layers = pattern, depths
    config.validate()
    if not config.has_mtp:
        raise ValueError(f"depths is {depths}: give the number of MTP depths, at least 1.")
    model.config.mtp_hybrid_override_pattern, model.config.num_nextn_predict_layers = pattern, depths
    head = NemotronHMultiTokenPredictor(model.config)
    for module in head.modules():
        model._init_weights(module)
    # The head's output goes where the model's own goes, into lm_head.
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith("final_layernorm.weight"):
                parameter.copy_(model.model.norm_f.weight)
    model.mtp = head.to(model.model.norm_f.weight.device, model.dtype).train(model.training)
    model.mtp_loss_scale = model.mtp_loss_scale
    return model


# -- a head in a file of its own --------------------------------------------------------------------------------------


def save_head(model: Any, path: str | Path) -> None:
    """Write the MTP head alone to a safetensors file, in the published names; `load_head` gives it to a model again.

    Its layers' pattern, its depths and `model.mtp_depths` are in the file's metadata.

    Raises:
        ValueError: a model without a head.
    """
    check_head(model, "save_head")
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.mtp.state_dict(prefix="mtp.").items():
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            before, projection = name.rsplit(".", 1)
            tensors |= {f"{before}.{i}.{projection}.weight": expert.clone() for i, expert in enumerate(tensor)}
        else:
            tensors[name] = tensor.contiguous()
    metadata = {"format": "pt", _FORMAT: "1", "pattern": model.config.mtp_hybrid_override_pattern}
    metadata |= {"depths": str(model.mtp.depths), "ahead": str(_depths(model))}
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_head(model: Any, path: str | Path) -> Any:
    """Give a model the MTP head of a file that `save_head` wrote: in place, in the model's dtype, and returned.

    Drafts are then as many tokens long as the head was trained for (`model.mtp_depths`), unless more are asked for.

    Raises:
        ValueError: the model has a head already, the file is cut off or no such file, or it is another model's head;
            the model is as it was.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error}): write the head again.") from error
    if said.get(_FORMAT) != "1":
        raise ValueError(
            f"{path} is not an MTP head's file (its metadata has no {_FORMAT}=1): write one with "
            "nemotron_h.mtp.save_head, or load a whole checkpoint with from_pretrained."
        )
    config = copy.copy(model.config)
    config.mtp_hybrid_override_pattern, config.num_nextn_predict_layers = said["pattern"], int(said["depths"])
    wanted = {name: shape for name, shape in published.tensors(config).items() if name.startswith("mtp.")}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{path} is the head of another model: {name} is {found.get(name, 'absent')} in it and "
                f"{wanted.get(name, 'absent')} in this one; load it into the model that it was trained for."
            )
    add_head(model, said["pattern"], int(said["depths"]))
    model.mtp.load_state_dict(
        {name.removeprefix("mtp."): tensor for name, tensor in published.in_memory(tensors, model).items()}
    )
    model.mtp_depths = int(said["ahead"])
    return model


# -- training --------------------------------------------------------------------------------------------------------


def loss(
    model: Any,
    x_BLD: Tensor,
    labels: Tensor | None,
    *,
    shift_labels: Tensor | None = None,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    cache: Cache | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The mean over the depths of their cross-entropies, a scalar in float32 or better; the logits never exist whole.

    At position t, depth k has the target that the model itself has at the k-th token after t. "After" skips padding,
    wherever it is; there is no target where t is padding, or where that token or its target is another document's.

    Args:
        x_BLD: (B, L, D) the model's hidden states after `norm_f`.
        labels: (B, L) target ids, -100 where there is none; or `shift_labels`, shifted by one already.
        num_items_in_batch: what the sum of each depth is divided by; None: the number of its targets (0 for none).

    The others are the model's inputs, as in `NemotronHForCausalLM.forward`. `model.mtp_depths` is the number of depths.

    Raises:
        ValueError: no head, `mtp_depths` below 1, or a cache that holds tokens: the head has not seen them.
    """
    check_head(model, "The MTP loss")
    depths = _depths(model)
    # The model may have filled an empty one by now.
    if cache is not None and (before := int(cache_length(cache)) - x_BLD.shape[1]) > 0:
        raise ValueError(
            f"The MTP loss goes over whole sequences and the cache passed held {before} tokens: pass labels without a "
            "cache, or set model.mtp_loss_scale = 0."
        )
    embeds_BLD = model.model.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    batch, length = embeds_BLD.shape[:2]
    if isinstance(attention_mask, dict):
        raise ValueError(
            "attention_mask is a dict of masks, made for generate(): pass labels with a (batch, tokens) mask."
        )
    kinds = [*model.config.layers_block_type, *model.config.mtp_layers_block_type]
    inputs = read_inputs(kinds, embeds_BLD, None, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
    mask_BL, seq_idx_BL = inputs.mask_BL, inputs.seq_idx_BL
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=losses.IGNORED)[..., 1:]
        if seq_idx_BL is not None:
            # The last token of a document has its target in the next one.
            last_BL = F.pad(seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1], (0, 1), value=True)
            shift_labels = shift_labels.masked_fill(last_BL.to(shift_labels.device), losses.IGNORED)
    after_BL = next_tokens(batch, length, mask_BL, x_BLD.device)
    kinds = model.config.mtp_layers_block_type
    told = {
        "mask_BL": mask_BL,
        "seq_idx_BL": seq_idx_BL,
        **inputs.visible(model.config, kinds, x_BLD, None, model.training),
    }
    total = x_BLD.new_zeros((), dtype=torch.promote_types(x_BLD.dtype, torch.float32))
    there_BL = torch.ones_like(after_BL, dtype=torch.bool) if mask_BL is None else mask_BL
    at_BL = torch.arange(length, device=x_BLD.device).expand(batch, length)
    for depth in range(depths):
        there_BL = there_BL & (after_BL.gather(1, at_BL) < length)
        at_BL = after_BL.gather(1, at_BL).clamp(max=length - 1)
        if seq_idx_BL is not None:
            there_BL = there_BL & (seq_idx_BL.gather(1, at_BL) == seq_idx_BL)
        index_BLD = at_BL.unsqueeze(-1).expand(-1, -1, embeds_BLD.shape[-1]).to(embeds_BLD.device)
        x_BLD = model.mtp(x_BLD, embeds_BLD.gather(1, index_BLD).to(x_BLD.device), depth, **told)
        targets_BL = shift_labels.to(at_BL.device).gather(1, at_BL).masked_fill(~there_BL, losses.IGNORED)
        number = targets_BL.ne(losses.IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        total = total + losses.without_logits(model.lm_head, x_BLD, None, targets_BL, num_items_in_batch=number)
    return total / depths


def _depths(model: Any) -> int:
    depths = model.mtp.depths if model.mtp_depths is None else model.mtp_depths
    if not isinstance(depths, int) or isinstance(depths, bool) or depths < 1:
        raise ValueError(
            f"mtp_depths is {depths!r}: give how many tokens ahead to predict, or None for the head's own."
        )
    return depths


def next_tokens(batch: int, length: int, mask_BL: Tensor | None, device: Any = None) -> Tensor:
    """(B, L) the position of the token after each one, padding skipped; `length` where there is none."""
    index_BL = torch.arange(length, device=device).expand(batch, length)
    if mask_BL is not None:
        index_BL = index_BL.masked_fill(~mask_BL.to(index_BL.device), length)
    at_or_after_BL = index_BL.flip(1).cummin(dim=1).values.flip(1)
    return F.pad(at_or_after_BL[:, 1:], (0, 1), value=length)


__all__ = [
    "NemotronHMTPLayer",
    "NemotronHMultiTokenPredictor",
    "add_head",
    "check_head",
    "load_head",
    "loss",
    "save_head",
]
