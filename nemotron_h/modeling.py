"""Nemotron-H: Mamba-2, attention, MLP and MoE mixers, one per layer, on a pre-norm residual stream.

    x = x + mixer(RMSNorm(x))            mixer chosen by the pattern: M Mamba-2, * attention, - MLP, E MoE

Papers: Nemotron-H (arXiv 2504.03624), Mamba-2 (2405.21060), Nemotron 3 with LatentMoE (2512.20856).

Shape suffixes as in layers/__init__.py.
"""

# No `from __future__ import annotations` here: transformers reads the annotations of the forwards as objects.
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs
from typing_extensions import Unpack

from . import mtp
from .cache.hybrid import NemotronHCache, Uninterrupted, cache_length, check_room
from .checkpoints import published
from .compat import (
    CACHE_NAME,
    CACHE_NAMES,
    NemotronHCausalLMOutput,
    NemotronHModelOutput,
    pick_cache,
)
from .configuration import NemotronHConfig
from .generation import chunked_prefill
from .generation.mixin import NemotronHGenerationMixin
from .layers.arguments import FOR_A_HEAD, check_kwargs, embedded
from .layers.attention import NemotronHAttention
from .layers.block import NemotronHBlock
from .layers.fused import steps
from .layers.mamba import NemotronHMamba2Mixer
from .layers.masks import read_inputs, remember_padding
from .layers.moe import NemotronHExperts, NemotronHMLP, NemotronHMoE, NemotronHTopkRouter
from .layers.parts import NemotronHConv1d, NemotronHRMSNorm, NemotronHRMSNormGated, residual_std
from .mtp import NemotronHMTPLayer, NemotronHMultiTokenPredictor
from .parallel.tensor import Distributed
from .quantization import int8_int4
from .training import losses
from .training.peft_bridge import join_peft


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
        # Not before: it registers the method "modelopt" with the library, which other models' checkpoints name too.
        from .quantization import modelopt

        modelopt.prepare(kwargs.pop("quantized", None), source, kwargs)
        if (quantize := kwargs.pop("quantize", None)) is not None:
            kwargs["quantization_config"] = int8_int4.config_for(quantize, source, kwargs)
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
        if not FOR_A_HEAD.isdisjoint(kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in FOR_A_HEAD}  # type: ignore[assignment]
        check_kwargs(kwargs)
        x_BLD = embedded(self.embeddings, input_ids, inputs_embeds, self.config)
        cache = pick_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        if cache is not None:
            cache = NemotronHCache.adopt(cache, self.config)
            check_room(cache, *x_BLD.shape[:2])
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            _check_empty(cache)
            cache, use_cache = None, False  # the recomputation would update a cache a second time
        kinds = self.config.layers_block_type
        inputs = read_inputs(kinds, x_BLD, cache, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        if inputs.seq_idx_BL is not None:
            use_cache = False  # documents that do not see each other leave nothing to go on from
        if use_cache and cache is None:
            cache = NemotronHCache(self.config)
        visible = inputs.visible(self.config, kinds, x_BLD, cache, self.training)
        told = {"mask_BL": inputs.mask_BL, "seq_idx_BL": inputs.seq_idx_BL, **visible, **kwargs}
        with Uninterrupted(cache, "a forward"):
            for layer in steps(self.layers, x_BLD, cache, inputs.mask_BL, visible["plainly_causal"]):
                x_BLD = layer(x_BLD, cache=cache, **told)  # x + mixer(norm(x))
            x_BLD = self.norm_f(x_BLD.to(self.norm_f.weight.dtype))
            remember_padding(cache, inputs.mask_BL, inputs.past)
        return NemotronHModelOutput(last_hidden_state=x_BLD, **{CACHE_NAME: cache if use_cache else None})


def _check_empty(cache: Cache | None) -> None:
    if length := int(cache_length(cache)):
        raise ValueError(
            f"Gradient checkpointing cannot go on from a cache, and this one has {length} tokens: pass the whole "
            "sequence without a cache, or switch checkpointing off."
        )


class NemotronHForCausalLM(NemotronHGenerationMixin, NemotronHPreTrainedModel, GenerationMixin):
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
            return_last_hidden_state: True returns the backbone's hidden states of all positions, (B, L, D), as
                `outputs.last_hidden_state` too. Not in the signature, as the two before it.
            logits_to_keep: compute the logits of the last so many positions only (0: all), or of the positions in
                this index tensor.

        With `model.mtp_loss_scale` the loss has the MTP depths' added, scaled (`mtp.loss`).
        """
        shift_labels, skip_logits = kwargs.pop("shift_labels", None), kwargs.pop("skip_logits", None)
        with_states = kwargs.pop("return_last_hidden_state", False)
        check_kwargs(kwargs)
        cache = pick_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        batch: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "cache": cache}
        batch |= {"attention_mask": attention_mask, "position_ids": position_ids, "seq_idx": seq_idx}
        batch |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        # Whatever the config says: the backbone is asked for its hidden states by name.
        settings = {"use_cache": use_cache, "return_dict": True, **kwargs}
        number = settings.pop("num_items_in_batch", None)
        kept = logits_to_keep if isinstance(logits_to_keep, int) and not with_states else 0
        outputs = chunked_prefill.run(self.model, kept, batch, settings)
        if outputs is None:
            outputs = self.model(**batch, **settings)
        x_BLD = outputs.last_hidden_state
        with Uninterrupted(cache, "a forward"):  # the layers have gone on already
            logits_BLV, loss = losses.logits_and_loss(
                self, x_BLD, logits_to_keep, labels, shift_labels=shift_labels, skip_logits=skip_logits, **kwargs
            )
            if loss is not None and self.mtp_loss_scale:
                ahead = mtp.loss(self, x_BLD, labels, shift_labels=shift_labels, num_items_in_batch=number, **batch)
                loss = loss + self.mtp_loss_scale * ahead
        return NemotronHCausalLMOutput(
            loss=loss,
            logits=logits_BLV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            last_hidden_state=x_BLD if with_states else None,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


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
