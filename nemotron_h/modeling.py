"""Nemotron-H: Mamba-2, attention, MLP and MoE mixers, one per layer, on a pre-norm residual stream.

    x = x + mixer(RMSNorm(x))            mixer chosen by the pattern: M Mamba-2, * attention, - MLP, E MoE

Papers: Nemotron-H (arXiv 2504.03624), Mamba-2 (2405.21060), Nemotron 3 with LatentMoE (2512.20856).

Shape suffixes as in layers/__init__.py.
"""

# No `from __future__ import annotations` here: transformers reads the annotations of the forwards as objects.
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs
from typing_extensions import Unpack

from . import mtp
from .cache.hybrid import NemotronHCache, Uninterrupted, cache_length, check_room, grows
from .checkpoints import published
from .compat import (
    CACHE_NAME,
    CACHE_NAMES,
    NemotronHCausalLMOutput,
    NemotronHModelOutput,
    causal_mask,
    pick_cache,
    rename_cache_kwarg,
)
from .configuration import NemotronHConfig
from .generation import chunked_prefill as pieces
from .layers.attention import NemotronHAttention, eager_attention
from .layers.block import NemotronHBlock
from .layers.fused import steps
from .layers.mamba import NemotronHMamba2Mixer
from .layers.masks import read_mask, remember_padding
from .layers.moe import NemotronHExperts, NemotronHMLP, NemotronHMoE, NemotronHTopkRouter
from .layers.packing import check_prompt, document_ids, embedded, padding_mask, same_document, varlen_kwargs
from .layers.parts import NemotronHConv1d, NemotronHRMSNorm, NemotronHRMSNormGated, project, residual_std
from .mtp import NemotronHMTPLayer, NemotronHMultiTokenPredictor
from .parallel.tensor import Distributed
from .training import losses
from .training.peft_bridge import check_no_virtual_tokens, join_peft

_FORWARD_KWARGS = frozenset(
    {*TransformersKwargs.__optional_keys__, "return_dict", "debug_io", "debug_io_dir", "prune_layers"}
)
# What trainers hand to the backbone with all the rest: a head's business, which cuts and compares afterwards.
_FOR_A_HEAD = frozenset({"labels", "shift_labels", "logits_to_keep", "skip_logits", "num_items_in_batch"})
_RENAMED = {"num_logits_to_keep": "logits_to_keep"}


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse what no layer would read, so that a misspelt argument is not lost."""
    if unknown := sorted(set(kwargs) - _FORWARD_KWARGS):
        _check_renamed(kwargs)
        value = kwargs[unknown[0]]
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(
            f"forward() got the unknown argument {unknown[0]}={shown}: leave it out; "
            "`help(NemotronHModel.forward)` lists what there is."
        )


def _check_renamed(kwargs: Mapping[str, Any]) -> None:
    for old, new in _RENAMED.items():
        if old in kwargs:
            raise TypeError(f"{old}={kwargs[old]!r} is the old name of an argument: write {new}={kwargs[old]!r}.")


class NemotronHPreTrainedModel(Distributed, PreTrainedModel):
    config: NemotronHConfig
    config_class = NemotronHConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NemotronHBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    calls_out_proj = True  # as a module, on every path: what PEFT puts there counts (training/peft_bridge.py asks)
    # Otherwise the library reads the source of the file that a class is in, which for a user's subclass is another.
    _can_set_experts_implementation_cached_value = True
    # Mamba layers can forget their last tokens (MambaLayer.crop), so generate() need not refuse what asks for that.
    _is_stateful = False
    _can_record_outputs = {
        "hidden_states": NemotronHBlock,
        "attentions": NemotronHAttention,
        "router_logits": OutputRecorder(NemotronHTopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["mixer.A_log", "mixer.D", "mixer.dt_bias", "gate.weight", "e_score_correction_bias"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """`PreTrainedModel.from_pretrained`, which also refuses files that are cut short or lack tensors.

        What a checkpoint has to have says the class that its config.json names in `architectures`; what only this class
        has, a new head, is initialised, and the library's report names it.

        Args:
            quantize: "int8" or "int4": the linear layers and routed experts in so many bits, made while loading.
            quantized: "packed" keeps what NVIDIA's ModelOpt quantised (FP8, NVFP4) as it is and dequantises it where it
                is used; without it such weights are dequantised on loading.

        Raises:
            OSError: a file cannot be read.
            ValueError: a tensor is missing, or has another shape than the config says; `quantize` is not known, or the
                model is quantised already; `quantized` is not known, or the model is not quantised by ModelOpt.
        """
        source = pretrained_model_name_or_path
        published.check_source(source, kwargs)
        from .quantization import modelopt as modelopt_quantizer

        modelopt_quantizer.prepare(kwargs.pop("quantized", None), source, kwargs)
        if (quantize := kwargs.pop("quantize", None)) is not None:
            from .quantization.int8_int4 import config_for

            kwargs["quantization_config"] = config_for(quantize, source, kwargs)
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            name, reason = published.unreadable_file(source) or (source, str(error))
            raise OSError(f"{name} in {source} cannot be read ({reason}): fetch that file again.") from None
        except FileNotFoundError as error:
            raise OSError(
                f"{source} lacks {Path(str(error.filename or error)).name}, which its index names: fetch it."
            ) from None
        # With an adapter, what the library hands back is said of its tensors, not of the model's.
        missing, mismatched = vars(model).pop("_loaded", (info["missing_keys"], info["mismatched_keys"]))
        if not ignore_mismatched_sizes:
            published.check_shapes(mismatched, source)
        if source is not None and missing:
            named = published.architectures(source, model.config, kwargs)
            published.check_nothing_missing(model, missing, source, _saved_from(named, type(model)))
        return (model, info) if output_loading_info else model

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        self._loaded = set(loading_info.missing_keys), set(loading_info.mismatched_keys)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`nn.Module.load_state_dict`, which also takes the published names: Trainer reads the files of its own
        checkpoints with it when it resumes."""
        return super().load_state_dict(published.in_memory(state_dict, self), strict=strict, assign=assign)

    @property
    def backbone(self) -> nn.Module:
        """The layers without a head, by the name that NVIDIA's remote code and the published files have for them."""
        # A class of the remote code's kind may have a module of this name.
        return self._modules.get("backbone") or self._modules.get(self.base_model_prefix) or self

    def __setattr__(self, name: str, value: Any) -> None:
        # A second module beside the first would be saved twice, and never called.
        if name == "backbone" and self.base_model_prefix in self._modules:
            name = self.base_model_prefix
        super().__setattr__(name, value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedModel.save_pretrained`, in the published layout. A wrong config is refused before anything is
        written."""
        self.config.validate()
        return super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialisation for training from scratch; `transformers` calls it for weights no checkpoint gave only."""
        super()._init_weights(module)
        if isinstance(module, (NemotronHMamba2Mixer, NemotronHTopkRouter, NemotronHExperts)):
            module.initialize(self.config)
        elif isinstance(module, (NemotronHRMSNorm, NemotronHRMSNormGated)):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear) and getattr(module, "writes_residual", False):
            # Said by the linear itself: the library passes over modules without parameters of their own, as a block is.
            init.normal_(module.weight, std=residual_std(self.config))


class NemotronHModel(NemotronHPreTrainedModel):
    """The layers and the final norm: token ids to hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"^mtp\.", r"^lm_head\."]

    def __init__(self, config: NemotronHConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([NemotronHBlock(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm_f = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = cast(nn.Embedding, value)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        cache_params: Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> NemotronHModelOutput:
        """Hidden states of a batch of token rows.

        Args:
            input_ids: (B, L) token ids; or `inputs_embeds` (B, L, D).
            attention_mask: (B, past + L), 0 at padding, on either side; or a 4-D mask for the attention layers, or
                the dict that `create_masks_for_generate` made.
            position_ids: (B, L); not used as positions. Where they restart, a packed document begins.
            cache: the tokens before these; also accepted as `past_key_values` and `cache_params`.
            use_cache: return the cache for going on; a new one is made where none is given.
            seq_idx: (B, L) number of the document that each token belongs to, for packed rows.
            cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) cumulative lengths of the documents of one packed row.

        What is a head's (`labels`, `logits_to_keep` and the like) is passed over: all positions come back.
        """
        if not _FOR_A_HEAD.isdisjoint(kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in _FOR_A_HEAD}  # type: ignore[assignment]
        _check_kwargs(kwargs)
        x_BLD = embedded(self.embeddings, input_ids, inputs_embeds, self.config)
        batch, length = x_BLD.shape[:2]

        cache = pick_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        if cache is not None:
            cache = NemotronHCache.adopt(cache, self.config)
            check_room(cache, batch, length)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The recomputation would update the cache a second time.
            if length_before := int(cache_length(cache)):
                raise ValueError(
                    f"Gradient checkpointing cannot go on from a cache, and this one has {length_before} tokens: pass "
                    "the whole sequence without a cache, or switch checkpointing off."
                )
            cache, use_cache = None, False

        prepared, kinds = None, self.config.layers_block_type
        if isinstance(attention_mask, dict):
            if "mamba" not in attention_mask:
                raise ValueError(
                    f"attention_mask is a dict of {', '.join(map(repr, attention_mask))}: pass a (batch, tokens) mask, "
                    "or what NemotronHForCausalLM.create_masks_for_generate makes."
                )
            prepared, mask_BL = attention_mask, attention_mask["mamba"]
        else:
            attention_mask, seq_idx = read_mask(attention_mask, seq_idx, batch, length, cache, kinds)
            mask_BL = padding_mask(attention_mask, length, cache)
        seq_idx_BL = document_ids(x_BLD, mask_BL, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k, cache)
        if seq_idx_BL is not None:
            # Documents that do not see each other leave nothing to go on from.
            use_cache = False
        if use_cache and cache is None:
            cache = NemotronHCache(self.config)

        visible = (
            {"attention_mask": prepared["attention"], "plainly_causal": False}
            if prepared is not None
            else self.who_sees_whom(kinds, x_BLD, attention_mask, mask_BL, seq_idx_BL, cache)
        )
        with Uninterrupted(cache, "a forward"):
            for layer in steps(self.layers, x_BLD, cache, mask_BL, visible["plainly_causal"]):
                x_BLD = layer(x_BLD, mask_BL=mask_BL, seq_idx_BL=seq_idx_BL, cache=cache, **visible, **kwargs)
            x_BLD = self.norm_f(x_BLD.to(self.norm_f.weight.dtype))
            if mask_BL is not None and cache is not None and not torch.compiler.is_compiling():
                remember_padding(cache, mask_BL, int(cache_length(cache)) - length)
        return NemotronHModelOutput(last_hidden_state=x_BLD, **{CACHE_NAME: cache if use_cache else None})

    def who_sees_whom(
        self,
        kinds: list[str],
        x_BLD: Tensor,
        attention_mask: Any,
        mask_BL: Tensor | None,
        seq_idx_BL: Tensor | None,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """What the attention layers among layers of these kinds are called with: a mask, that they are plainly causal,
        or the lengths of packed documents."""
        if "attention" not in kinds:
            return {"attention_mask": None, "plainly_causal": False}
        if seq_idx_BL is None:
            if self._is_plainly_causal(x_BLD, attention_mask, cache):
                return {"attention_mask": None, "plainly_causal": True}
            return {
                "attention_mask": causal_mask(self.config, x_BLD, attention_mask, cache),
                "plainly_causal": False,
            }
        if varlen := varlen_kwargs(self.config, seq_idx_BL):
            return {"attention_mask": None, "plainly_causal": False, **varlen}
        same = same_document(seq_idx_BL, mask_BL)
        return {
            "attention_mask": causal_mask(self.config, x_BLD, None, None, and_mask_function=same),
            "plainly_causal": False,
        }

    def _is_plainly_causal(self, x_BLD: Tensor, attention_mask: Any, cache: Cache | None) -> bool:
        """Whether "sdpa", where it is the library's own, may run without its mask: inference over rows without padding,
        keys that end with the queries. Whether a mask is all ones is asked of an accelerator before a multi-token step
        only."""
        return (
            self.config._attn_implementation == "sdpa"
            and ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention) is sdpa_attention_forward
            and F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not (is_tracing(x_BLD) if type(x_BLD) is not Tensor or x_BLD.is_cuda else torch.jit.is_tracing())
            and not (self.training and self.config.attention_dropout)
            and grows(cache)
            and (
                attention_mask is None
                or (
                    attention_mask.ndim == 2
                    and (x_BLD.shape[1] > 1 or attention_mask.device.type == "cpu")
                    and bool(attention_mask.all())
                )
            )
        )


class NemotronHForCausalLM(NemotronHPreTrainedModel, GenerationMixin):
    """Nemotron-H with its language-modelling head.

    `model.chunked_loss = True` trains without logits: given labels in training mode, forward computes the same loss a
    few columns of the vocabulary at a time, and `outputs.logits` is None. `skip_logits=` of a forward says so for that
    call, in either mode. Off unless asked for, because scripts and trainers read the logits of a training step. A model
    in PEFT's wrapper has it set before it is wrapped, or on `model.get_base_model()`: set on the wrapper, it stays
    there, and does nothing.

    `model.mtp_loss_scale = 0.3` trains the multi-token-prediction head that Nemotron 3 checkpoints have, or one that
    `nemotron_h.mtp.add_head` made; `model.mtp_depths = 2` trains it two tokens ahead, its last depth used again.
    """

    chunked_loss = False
    mtp_depths: int | None = None
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NemotronHConfig):
        super().__init__(config)
        self.model = NemotronHModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = NemotronHMultiTokenPredictor(config) if config.has_mtp else None
        self.mtp_loss_scale = getattr(config, "mtp_loss_scale", None) or 0.0
        self.post_init()

    @property
    def mtp_loss_scale(self) -> float:
        """What the mean loss of the MTP depths counts in `loss`; 0, unless the config has an `mtp_loss_scale`, is off.

        Setting it freezes or unfreezes `mtp.*`: a parameter that no loss reaches would keep DDP waiting.
        """
        return self._mtp_loss_scale

    @mtp_loss_scale.setter
    def mtp_loss_scale(self, scale: float) -> None:
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 <= scale < math.inf:
            raise ValueError(f"mtp_loss_scale is {scale!r}: give a number such as 0.3, or 0 for no MTP loss.")
        if scale:
            mtp.check_head(self, "mtp_loss_scale")
        self._mtp_loss_scale = float(scale)
        for parameter in self.mtp.parameters() if self.mtp is not None else ():
            if parameter.is_floating_point():
                parameter.requires_grad_(scale > 0)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        cache_params: Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> NemotronHCausalLMOutput:
        """Next-token logits, (B, L, V), in float32 or better; arguments as in `NemotronHModel.forward`, and

        Args:
            labels: (B, L) target ids, -100 where there is none; shifted by one inside.
            shift_labels: (B, L) target ids that are shifted already, in place of `labels` (training that splits the
                sequence over devices shifts before it splits). Not in the signature: Trainer would take it for a
                label that every batch must have.
            skip_logits: with labels, True computes the loss without logits and returns None for them, False returns
                them; None: True in training mode if `model.chunked_loss`. Not in the signature either. A loss function
                of your own (`model.loss_function = ...`) gets its logits all the same.
            logits_to_keep: compute the logits of the last so many positions only (0: all), or of the positions in
                this index tensor.

        With `model.mtp_loss_scale` the loss has the MTP depths' added, scaled (`mtp.loss`).
        """
        shift_labels, skip_logits = kwargs.pop("shift_labels", None), kwargs.pop("skip_logits", None)
        drafter = kwargs.pop("drafter", None)  # in generate(): who is to get the hidden states
        _check_kwargs(kwargs)
        cache = pick_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "return_dict": True,  # whatever the config says: it is asked for its hidden states by name
            **{key: value for key, value in kwargs.items() if key != "num_items_in_batch"},
        }
        packing = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        keep: Any = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        packed = any(given is not None for given in packing.values())
        piece = 0 if packed else pieces.wanted(self.model, cache, position_ids=position_ids, **inputs)
        if piece:
            kept = logits_to_keep if isinstance(logits_to_keep, int) and drafter is None else 0
            outputs = pieces.run(self.model, piece, kept, cache, **inputs)
            keep = slice(None) if kept else keep
        else:
            outputs = self.model(cache=cache, position_ids=position_ids, **inputs, **packing)
        if drafter is not None:
            drafter.hidden_states_BLD = outputs.last_hidden_state
        with Uninterrupted(cache, "a forward"):  # the layers have gone on already
            x_BLD = outputs.last_hidden_state[:, keep]
            loss = logits_BLV = None
            has_labels = labels is not None or shift_labels is not None
            whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
            skip = self.chunked_loss and self.training if skip_logits is None else skip_logits
            if has_labels and whole and skip and losses.is_the_librarys(self.loss_function):
                loss = losses.without_logits(
                    self.lm_head, x_BLD, labels, shift_labels, num_items_in_batch=kwargs.get("num_items_in_batch")
                )
            else:
                if has_labels and self.training and skip_logits is None:
                    losses.say_once_that_logits_are_large(x_BLD.shape[:-1].numel(), self.vocab_size)
                # Two-dimensional whatever the head is by now (a resized or adapted one): see ops.linear.
                logits_TV = project(self.lm_head, x_BLD.reshape(-1, x_BLD.shape[-1]))
                logits_BLV = logits_TV.view(*x_BLD.shape[:-1], logits_TV.shape[-1])
                logits_BLV = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
                if has_labels:
                    loss = self.loss_function(logits_BLV, labels, self.vocab_size, shift_labels=shift_labels, **kwargs)
            if loss is not None and self.mtp_loss_scale:
                loss = loss + self.mtp_loss_scale * mtp.loss(
                    self,
                    outputs.last_hidden_state,
                    labels,
                    shift_labels=shift_labels,
                    input_ids=input_ids,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    cache=cache,
                    num_items_in_batch=kwargs.get("num_items_in_batch"),
                    **packing,
                )
        return NemotronHCausalLMOutput(
            loss=loss,
            logits=logits_BLV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' `generate()`; the cache goes by any of its names.

        Args:
            prompt_cache: a `nemotron_h.PromptCache`: the prompt goes on from the longest kept beginning of it, and is
                kept in turn, also at `prompt_boundaries=[lengths]`; see `generation.prefixes.generate`.
            use_mtp: draft with the MTP head, `num_assistant_tokens` at a time (unless given, `mtp_depths` or its own;
                more: its last depth again). The tokens are those without it, up to rounding; sampled ones are drawn
                from the same distribution.

        Raises:
            ValueError: a cache of `transformers`' own, which without attention layers does not know its length;
                `use_mtp` and a checkpoint without an MTP head, or more tokens at a time than the cache takes back.
        """
        _check_renamed(kwargs)
        check_prompt(args, kwargs, self.config)
        kwargs = mtp.generation_options(self, args, kwargs)
        if (prompt_cache := kwargs.pop("prompt_cache", None)) is not None:
            check_no_virtual_tokens(self, "prompt_cache= keeps states by the tokens that led to them")
            from .generation import prefixes

            return prefixes.generate(self, prompt_cache, *args, **kwargs)
        kwargs = rename_cache_kwarg(kwargs)
        cache = kwargs.get(CACHE_NAME)
        if cache is not None and "attention" not in self.config.layers_block_type:
            if not isinstance(cache, NemotronHCache):
                raise ValueError(
                    f"A {type(cache).__name__} does not know its length in a model without attention layers: pass "
                    "NemotronHCache(model.config)."
                )
        with Uninterrupted(cache, "generate()", if_moved=True):
            return super().generate(*args, **kwargs)

    @functools.wraps(PreTrainedModel.get_compiled_call)
    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
        compiled = super().get_compiled_call(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            with Uninterrupted(kwargs.get(CACHE_NAME), "a compiled forward"):
                return compiled(*args, **kwargs)

        return call

    @functools.wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        from .generation.batching import check

        check(self.config)
        return super().init_continuous_batching(*args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache = kwargs.get(CACHE_NAME)
        if kwargs.get("is_first_iteration") and isinstance(cache, NemotronHCache) and cache.shown_again:
            ids = args[0] if args else kwargs["input_ids"]
            kwargs["next_sequence_length"] = ids.shape[1] - cache.shown_again
            cache.shown_again = 0
        # generate() hands the tokenizers that it needs for stop strings and assistants on to every step.
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "prepare_inputs_for_generation" in vars(self) and CACHE_NAME in inputs:
            # PEFT has put itself in front. It looks for the cache under this name, to know the prompt's first step.
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}

    def _assisted_decoding(self, input_ids: Tensor, **kwargs: Any) -> Any:
        check_no_virtual_tokens(self, "a draft is checked several tokens at a time")
        # Everywhere but here the library cuts a prompt to what a given cache has not seen.
        cache, mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        if isinstance(cache, NemotronHCache):
            length = getattr(kwargs.get("generation_config"), "_mask_length", -1) if mask is None else mask.shape[1]
            cache.shown_again = int(cache.get_seq_length()) if length == input_ids.shape[1] else 0
        from .generation import speculation

        return speculation.decode(self, super()._assisted_decoding, input_ids, **kwargs)

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if mtp.is_asked(generation_config):
            return mtp.Drafter(self, generation_config, kwargs.get("logits_processor"))
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        implementation = generation_config.cache_implementation
        static = implementation in ("static", "offloaded_static")
        if (
            model_kwargs.get(CACHE_NAME) is None
            and generation_config.use_cache is not False
            and (static or implementation in (None, "dynamic", "dynamic_full", "offloaded", "quantized"))
        ):
            max_cache_length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs[CACHE_NAME] = NemotronHCache(
                self.config,
                max_cache_len=max_cache_length if static else None,
                offloading=(implementation or "").startswith("offloaded"),
                quantized=(generation_config.cache_config or {}) if implementation == "quantized" else None,
            )
            if generation_config.is_assistant:  # what it drafts may have to be taken back
                model_kwargs[CACHE_NAME].activate_past_recording()
                # Its masks are guessed from the ids, anew for every draft, where a drafted token may be the pad token.
                model_kwargs[CACHE_NAME].padding_is_known = False
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @staticmethod
    def create_masks_for_generate(
        config: NemotronHConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The masks of both kinds of layers, made outside the compiled step: their growth would recompile it."""
        cache = pick_cache(**{name: kwargs.get(name) for name in CACHE_NAMES})
        length = inputs_embeds.shape[1]
        kinds = config.layers_block_type
        attention_mask, seq_idx = read_mask(attention_mask, None, inputs_embeds.shape[0], length, cache, kinds)
        if seq_idx is not None:
            raise ValueError(
                "attention_mask tells several documents apart, and generate() goes on from one a row: pass them as "
                "rows of their own."
            )
        attention = causal_mask(config, inputs_embeds, attention_mask, cache) if "attention" in kinds else None
        # A token that generate() appends is never padding.
        return {"attention": attention, "mamba": None if length == 1 else padding_mask(attention_mask, length, cache)}


class NemotronHForSequenceClassification(GenericForSequenceClassification, NemotronHPreTrainedModel):
    """Nemotron-H with a linear classifier on each row's last token that is not padding."""

    _keys_to_ignore_on_load_unexpected = NemotronHModel._keys_to_ignore_on_load_unexpected


class NemotronHForTokenClassification(GenericForTokenClassification, NemotronHPreTrainedModel):
    """Nemotron-H with a linear classifier on every token."""

    _keys_to_ignore_on_load_unexpected = NemotronHModel._keys_to_ignore_on_load_unexpected


def _saved_from(names: list[str], loading: type) -> type:
    """The class among a checkpoint's `architectures`; a causal model's, as the published ones are, where nobody knows
    them, so that no download that was cut short gets a random head."""
    ours = (NemotronHModel, NemotronHForCausalLM, NemotronHForSequenceClassification, NemotronHForTokenClassification)
    known = {cls.__name__: cls for cls in (*_subclasses(NemotronHPreTrainedModel), loading, *ours)}
    return next((known[name] for name in names if name in known), NemotronHForCausalLM)


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


published.register()
join_peft()

__all__ = [
    "NemotronHAttention",
    "NemotronHBlock",
    "NemotronHConv1d",
    "NemotronHExperts",
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHForTokenClassification",
    "NemotronHMLP",
    "NemotronHMTPLayer",
    "NemotronHMamba2Mixer",
    "NemotronHMoE",
    "NemotronHModel",
    "NemotronHMultiTokenPredictor",
    "NemotronHPreTrainedModel",
    "NemotronHRMSNorm",
    "NemotronHRMSNormGated",
    "NemotronHTopkRouter",
]
