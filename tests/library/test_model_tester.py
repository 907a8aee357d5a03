"""`transformers`' own `ModelTesterMixin` on this package's four classes, over a dense, a MoE and a latent-MoE pattern.

The mixin is in the source distribution of the installed version; `python tests/library/fetch.py` puts it where this
file looks. That distribution has `tests/*.py` only. What `test_modeling_common.py` imports from folders that it lacks
(`STAND_INS`) is given empty classes here, so the library's tests of exporters and of `generate()` do not run;
`tests/test_model_api.py` exports, and `tests/test_generation.py` generates.

A test of the library that cannot hold here is skipped with its reason, or run with the one premise changed that it
does not share; both are at `NemotronHTests` and `DenseTest` below. The other skips are the library's own words: no
accelerator, no flash attention, no rotary positions, no sub-models.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from families import small_config
from transformers.core_model_loading import WeightConverter

import nemotron_h
from nemotron_h.checkpoints import published

sys.path.insert(0, str(Path(__file__).parent))
import fetch

if not fetch.fetched():
    pytest.skip(
        f"the tests of transformers {fetch.version()} are not here: run `{fetch.COMMAND}`", allow_module_level=True
    )

PACKAGE = "_transformers_tests"
STAND_INS = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


def module(name: str, folder: Path | None = None) -> ModuleType:
    """An empty module, a package where it has a folder, under a name that nothing else has."""
    created = sys.modules[name] = types.ModuleType(name)
    created.__path__ = [] if folder is None else [str(folder)]
    return created


def load_mixin() -> ModuleType:
    """The library's `tests.test_modeling_common`, with stand-ins for what its distribution lacks."""
    module(PACKAGE, fetch.folder())
    for name, mixin in STAND_INS.items():
        if not fetch.folder().joinpath(*name.split(".")).with_suffix(".py").exists():
            module(f"{PACKAGE}.{name.split('.')[0]}")
            setattr(module(f"{PACKAGE}.{name}"), mixin, type(mixin, (), {}))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


common = load_mixin()
# They differ between versions of the library.
ITS_TESTS = frozenset(dir(common.ModelTesterMixin))


class ModelTester:
    """What the mixin asks for: a small config, inputs for it, and their sizes."""

    __test__ = False
    is_training = True
    batch_size, seq_length = 3, 7

    def __init__(self, family: str, **overrides: Any) -> None:
        self.family, self.overrides = family, overrides
        config = self.get_config()
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_hidden_layers = config.num_hidden_layers

    def get_config(self) -> nemotron_h.NemotronHConfig:
        return small_config(self.family, **self.overrides)

    def prepare_config_and_inputs_for_common(self) -> tuple[nemotron_h.NemotronHConfig, dict[str, torch.Tensor]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NO_BACKBONE = mock.patch.object(published, "check_nothing_missing", lambda *_: None)
"""This package refuses a checkpoint that lacks tensors of its own class (tests/test_published_layout.py), and one test
of the library loads a file without any, to read the report; it runs with the refusal off."""


class NemotronHTests(common.ModelTesterMixin):
    family: str
    overrides: dict[str, Any] = {}
    all_model_classes = (
        nemotron_h.NemotronHModel,
        nemotron_h.NemotronHForCausalLM,
        nemotron_h.NemotronHForSequenceClassification,
        nemotron_h.NemotronHForTokenClassification,
    )
    # The library asks by the year in the file's licence header, and these files have none.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.family, **self.overrides)
        # The library writes every tensor into messages that it then does not need.
        torch.set_printoptions(threshold=0, edgeitems=0)
        self.addCleanup(torch.set_printoptions, profile="default")

    def subTest(self, msg: Any = None, **params: Any) -> contextlib.AbstractContextManager:
        """One report per class, not per tensor and dtype: thousands of them take longer than the tests."""
        if msg in {model_class.__name__ for model_class in self.all_model_classes}:
            return super().subTest(msg, **params)
        return contextlib.nullcontext()

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        """The library knows by name which of its own classes takes which labels."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        tester = self.model_tester
        if return_labels and model_class is nemotron_h.NemotronHForSequenceClassification:
            inputs["labels"] = torch.zeros(tester.batch_size, dtype=torch.long)
        if return_labels and model_class is nemotron_h.NemotronHForTokenClassification:
            inputs["labels"] = torch.zeros(tester.batch_size, tester.seq_length, dtype=torch.long)
        return inputs

    # One premise changed

    def test_attention_outputs(self) -> None:
        # The library wants attentions of every layer; here only the attention layers have them.
        self.model_tester.num_hidden_layers = self.model_tester.get_config().layers_block_type.count("attention")
        super().test_attention_outputs()

    def test_reverse_loading_mapping(self) -> None:
        # A base model is saved without the prefix that a file of the whole model has (`backbone.`), so the table's
        # renaming matches none of its names; transformers' own class of this family does the same.
        super().test_reverse_loading_mapping(skip_base_model=True)

    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self) -> None:
        # The library's generic heads write their annotations as strings, and it skips the whole test at the first such.
        self.all_model_classes = self.all_model_classes[:2]
        super().test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions()

    @NO_BACKBONE
    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        super().test_model_weights_reload_no_missing_tied_weights()

    # Skipped

    @unittest.skip("the limit is two layers, and a pattern that has every kind of mixer has more")
    def test_num_layers_is_small(self) -> None: ...

    @unittest.skip("the source distribution has no GenerationTesterMixin; tests/test_generation.py tests generate()")
    def test_generation_tester_mixin_inheritance(self) -> None: ...

    if "test_bc_cache_name_forward" in ITS_TESTS:

        @unittest.skip("wants a deprecation warning for past_key_values; every name of the cache is welcome here")
        def test_bc_cache_name_forward(self) -> None: ...


class DenseTest(NemotronHTests, unittest.TestCase):
    family = "dense"

    def test_reverse_loading_mapping(self) -> None:
        # The family's table also has the experts, which a dense pattern has not.
        everything = common.get_model_conversion_mapping

        def without_experts(*args: Any, **kwargs: Any) -> list:
            return [entry for entry in everything(*args, **kwargs) if not isinstance(entry, WeightConverter)]

        with mock.patch.object(common, "get_model_conversion_mapping", without_experts):
            super().test_reverse_loading_mapping()

    @unittest.skip("the list names the router, which a dense pattern has not; the MoE patterns run this")
    def test_keep_in_fp32_modules_exist(self) -> None: ...

    if "test_output_router_logits_from_config" in ITS_TESTS:

        @unittest.skip("a dense pattern has no router; the MoE patterns run this")
        def test_output_router_logits_from_config(self) -> None: ...


for _name in dir(DenseTest):
    if _name.startswith("test_eager_matches_batched_and_grouped_inference"):
        _skip = unittest.skip("a dense pattern has no experts; the MoE patterns run this")
        setattr(DenseTest, _name, _skip(getattr(DenseTest, _name)))


class MoETest(NemotronHTests, unittest.TestCase):
    family = "moe"


class LatentMoETest(NemotronHTests, unittest.TestCase):
    family = "latent"
    # A width that torch's grouped GEMM takes in half precision; tests/test_model_api.py has one that it refuses.
    overrides = {"moe_latent_size": 24}
