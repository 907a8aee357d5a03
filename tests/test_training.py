"""A training step: the loss with and without logits, checkpointing, mixed precision, torch.compile, accumulation,
initialisation, and checkpoints that an interrupted run leaves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, relative_difference, small_config, small_model, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from nemotron_h import NemotronHForCausalLM
from nemotron_h.training import losses

pytestmark = pytest.mark.core


def batch(rows: int = 2, length: int = 21, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = tokens(rows, length, seed=seed)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[-1, -3:] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every gradient that a step gives."""
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    outputs.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return outputs.loss.detach(), found


def assert_alike(found, expected, tolerance: float) -> None:
    assert set(found[1]) == set(expected[1]) and found[1]
    assert abs(found[0].double() - expected[0].double()) <= tolerance * abs(expected[0].double())
    for name, gradient in expected[1].items():
        difference = (found[1][name].double() - gradient.double()).abs().max()
        assert difference <= tolerance * gradient.double().abs().max().clamp(min=1e-30), (name, difference)


class TestLossWithoutLogits:
    @pytest.mark.parametrize("family", ["dense", "latent", "tied"])
    @pytest.mark.parametrize("divided", [False, True], ids=["mean", "num_items"])
    def test_loss_and_gradients_are_those_with_logits(self, family, divided):
        model = small_model(family, dtype=torch.float32).train()
        inputs = batch() | ({"num_items_in_batch": torch.tensor(77)} if divided else {})
        expected = gradients(model, **inputs)
        model.chunked_loss = True
        found = gradients(model, **inputs)
        assert_alike(found, expected, 1e-5)
        if not divided:  # the oracle, written out
            with torch.no_grad():
                logits = model.eval()(inputs["input_ids"]).logits[:, :-1].double()
            labels = inputs["labels"][:, 1:]
            picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            assert found[0].item() == pytest.approx(-picked[labels != -100].mean().item(), rel=1e-6)

    def test_when_there_are_logits(self):
        model, inputs = small_model("dense", dtype=torch.float32), batch()
        # Off unless asked for: trainers read the logits of a training step.
        for train in (False, True):
            assert model.train(train)(**inputs).logits is not None
        model.chunked_loss = True
        assert model.train()(**inputs).logits is None
        assert model(**inputs, skip_logits=False).logits is not None
        assert model(inputs["input_ids"]).logits is not None
        assert model(**inputs, logits_to_keep=torch.arange(21)).logits is not None
        # Evaluation reads them, unless a caller says that it does not (Trainer's `use_liger_kernel` does).
        assert model.eval()(**inputs).logits is not None
        without, whole = model(**inputs, skip_logits=True), model(**inputs)
        assert without.logits is None and without.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
        assert model(inputs["input_ids"], skip_logits=True).logits is not None
        assert model(**inputs, skip_logits=True, return_dict=False)[0].ndim == 0

    def test_shifted_labels(self):
        model, inputs = small_model("dense", dtype=torch.float32).train(), batch()
        shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
        ids = inputs["input_ids"]
        expected = gradients(model, **inputs)
        assert_alike(gradients(model, input_ids=ids, shift_labels=shifted, skip_logits=True), expected, 1e-5)

    def test_a_loss_of_ones_own_gets_its_logits(self):
        model, seen = small_model("dense", dtype=torch.float32).train(), []

        def loss(logits, labels, vocab_size, **kwargs):
            seen.append(logits.shape)
            return logits.square().mean()

        model.loss_function = loss
        assert model(**batch(), skip_logits=True).logits is not None and seen == [(2, 21, 97)]

    def test_no_label_is_what_it_is_with_logits(self):
        model = small_model("dense", dtype=torch.float32).train()
        inputs = {"input_ids": tokens(1, 5), "labels": torch.full((1, 5), -100)}
        assert model(**inputs).loss.isnan() and model(**inputs, skip_logits=True).loss.isnan()
        items = {"num_items_in_batch": 3}
        assert model(**inputs, **items).loss == model(**inputs, **items, skip_logits=True).loss == 0

    def test_labels_of_another_length_are_refused(self):
        model = small_model("dense", dtype=torch.float32).train()
        with pytest.raises(ValueError, match=r"Labels of shape \(1, 4\).*one label per token"):
            model(tokens(1, 5), labels=tokens(1, 4), skip_logits=True)

    def test_in_bfloat16_it_is_nearer_to_the_exact_loss(self):
        model, inputs = small_model("dense", dtype=torch.float32), batch()
        model = model.bfloat16().train()
        with torch.no_grad():
            hidden = model.model(inputs["input_ids"]).last_hidden_state.double()
        logits = (hidden @ model.lm_head.weight.double().T)[:, :-1].flatten(0, 1)
        exact = F.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
        errors = [abs(model(**inputs, skip_logits=skip).loss.item() - exact.item()) for skip in (True, False)]
        assert errors[0] <= errors[1] + 1e-6 and errors[0] < 1e-2 * exact

    @pytest.mark.parametrize("how", ["lora", "hook", "bias"])
    def test_a_head_that_is_more_than_a_weight_is_called_in_pieces(self, how, monkeypatch):
        model, inputs = small_model("dense", dtype=torch.float32).train(), batch()
        calls: list[int] = []
        if how == "lora":
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head", "in_proj"]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_()
        elif how == "hook":
            model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
        else:
            model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 97))
        expected = gradients(model, **inputs)
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        monkeypatch.setattr(losses, "_PIECE_BYTES", 4 * 97 * 10)
        found = gradients(model, **inputs, skip_logits=True)
        assert_alike(found, expected, 1e-5)
        labelled = (inputs["labels"][:, 1:] != -100).sum().item()
        assert sum(calls) == 2 * labelled and max(calls) == 10  # forward, and again in the backward

    def test_the_logits_are_never_whole(self, monkeypatch):
        from nemotron_h.ops import cross_entropy

        class Largest(TorchDispatchMode):
            columns = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                for t in result if isinstance(result, tuple | list) else [result]:
                    if isinstance(t, torch.Tensor) and t.ndim and t.is_floating_point():
                        rows = t.numel() // t.shape[-1] if t.shape[-1] else 0
                        self.columns = max(self.columns, t.shape[-1] if rows >= 40 else 0)
                return result

        monkeypatch.setattr(cross_entropy, "_FEWEST_COLUMNS", 512)
        monkeypatch.setitem(cross_entropy._TILE_BYTES, "cpu", 0)
        model = small_model("dense", dtype=torch.float32, vocab_size=2000).train()
        for skip, columns in ((True, 512), (False, 2000)):
            with Largest() as seen:
                model(tokens(2, 40), labels=tokens(2, 40), skip_logits=skip).loss.backward()
            assert seen.columns == columns

    def test_large_logits_are_mentioned_once(self, monkeypatch, caplog):
        model = small_model("dense", dtype=torch.float32).train()
        monkeypatch.setattr(losses, "_said", set())
        model(**batch())
        assert not caplog.records
        monkeypatch.setattr(losses, "_WORTH_SAYING", 4 * 97 * 42)
        for _ in range(2):
            model(**batch())
            model(**batch(), skip_logits=True)
        assert len(caplog.records) == 1 and "chunked_loss = True" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family):
    model, inputs = small_model(family).train(), batch(length=19)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :5] = 0
    expected = gradients(model, **inputs)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # as Trainer and PEFT do where nothing else before the first layer wants a gradient
            model.enable_input_require_grads()
        found = gradients(model, **inputs)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items()), reentrant


def test_gradients_of_the_whole_model_are_the_references(monkeypatch):
    """Every op replaced by its float64 recurrence, over packed rows of odd length."""
    from nemotron_h import ops
    from nemotron_h.ops import reference

    model, inputs = small_model("moe").train(), batch(length=29)
    inputs["seq_idx"] = torch.bucketize(torch.arange(29), torch.tensor([8, 9, 20]), right=True).expand(2, -1)
    expected_of = {}
    for which in ("ours", "reference"):
        if which == "reference":

            def plain(function):
                def call(*args, chunk_size=None, **kwargs):
                    return function(*args, **kwargs)

                return call

            for name in ("ssd", "causal_conv", "gated_rms_norm", "rms_norm", "time_step"):
                monkeypatch.setattr(ops, name, plain(getattr(reference, name)))
        expected_of[which] = gradients(model, **inputs)
    for name, gradient in expected_of["reference"][1].items():
        if gradient.any():
            assert relative_difference(expected_of["ours"][1][name], gradient) <= 1e-9, name


class TestMixedPrecision:
    @pytest.mark.parametrize("family", ["dense", "moe"])
    @pytest.mark.parametrize("chunked", [False, True], ids=["logits", "no-logits"])
    def test_autocast(self, family, chunked):
        """float32 weights, bfloat16 products: gradients in float32 near the exact ones."""
        model, inputs = small_model(family, dtype=torch.float32).train(), batch()
        model.chunked_loss = chunked
        expected = gradients(model, **inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, **inputs)
        assert set(found[1]) == set(expected[1])
        assert found[0].dtype == torch.float32 and found[0].item() == pytest.approx(expected[0].item(), rel=3e-2)
        self.assert_near(found, expected)

    @pytest.mark.parametrize("family", ["dense", "tied"])
    def test_bfloat16_weights(self, family):
        model, inputs = small_model(family, dtype=torch.float32), batch()
        model = model.bfloat16().train()
        kinds = {name: p.dtype for name, p in model.named_parameters()}
        assert all(
            (dtype == torch.float32) == name.endswith((".A_log", ".D", "dt_bias")) for name, dtype in kinds.items()
        )
        found = gradients(model, **inputs)
        assert all(gradient.dtype == kinds[name] for name, gradient in found[1].items())
        exact = small_model(family, dtype=torch.float64).train()
        exact.load_state_dict(model.state_dict())
        self.assert_near(found, gradients(exact, **inputs))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients(model, **inputs)
        assert all(torch.equal(again[1][name], gradient) for name, gradient in found[1].items())

    def assert_near(self, found, expected):
        """By direction: rounding moves single values of a tensor, and not where all of them point."""
        for name, gradient in expected[1].items():
            a, b = found[1][name].double().flatten(), gradient.double().flatten()
            assert a.isfinite().all(), name
            if b.norm() > 1e-6 and len(b) > 6 and "gate" not in name:
                assert F.cosine_similarity(a, b, dim=0) > 0.9, (name, F.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("chunked", [False, True], ids=["logits", "no-logits"])
def test_a_compiled_step_has_the_same_gradients(chunked):
    model, inputs = small_model("tied").train(), batch(length=13)
    model.chunked_loss = chunked
    expected = gradients(model, **inputs)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    found = gradients(model, **inputs)
    for name, gradient in expected[1].items():
        assert relative_difference(found[1][name], gradient) <= 1e-9, name
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    torch.compiler.reset()


def test_two_forwards_before_their_backward():
    """Siamese losses (DPO): the graphs share weights, not tensors."""
    model, first, second = small_model("moe").train(), batch(seed=1), batch(seed=2)
    alone = [gradients(model, **inputs) for inputs in (first, second)]
    loss = model(**first).loss - 2 * model(**second).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            wanted = alone[0][1][name] - 2 * alone[1][1][name]
            assert (parameter.grad - wanted).abs().max() <= 1e-10 * wanted.abs().max().clamp(min=1e-6), name


class TestAccumulation:
    @pytest.mark.parametrize("chunked", [False, True], ids=["logits", "no-logits"])
    def test_many_small_batches_are_one_large_one(self, chunked, tmp_path):
        """Rows with different numbers of labels: the mean is over tokens, not over batches."""
        torch.manual_seed(0)
        ids = tokens(8, 12)
        labels = ids.clone()
        for row in range(8):
            labels[row, : 1 + row] = -100
        rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        found = {}
        for size, steps in ((8, 1), (2, 4), (1, 8)):
            model, keep = small_model("dense", dtype=torch.float32), Keep()
            model.chunked_loss = chunked
            trainer = Trainer(
                model=model,
                args=arguments(
                    tmp_path,
                    max_steps=1,
                    save_strategy="no",
                    max_grad_norm=0.0,
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=steps,
                    logging_strategy="steps",
                    logging_steps=1,
                ),
                train_dataset=rows,
                callbacks=[keep],
            )
            trainer.train()
            logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            found[size] = torch.tensor(logged[0]), keep.gradients
        model = small_model("dense", dtype=torch.float32).train()
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten())
        loss.backward()
        expected = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for size in (8, 2, 1):
            assert abs(found[size][0] - expected[0]) <= 1e-4 * expected[0]  # the log is rounded to four digits
            assert_alike((expected[0], found[size][1]), expected, 2e-5)


class TestInitialisation:
    @pytest.mark.parametrize("rescale", [True, False])
    @pytest.mark.parametrize("family", ["dense", "latent"])
    def test_what_writes_to_the_residual_stream_starts_smaller(self, family, rescale):
        wide = {"hidden_size": 96, "intermediate_size": 96, "moe_intermediate_size": 64, "mamba_head_dim": 16}
        config = small_config(family, **wide, rescale_prenorm_residual=rescale, initializer_range=0.03)
        model = NemotronHForCausalLM(config)
        smaller = 0.03 / config.num_hidden_layers**0.5 if rescale else 0.03
        counted = {True: 0, False: 0}
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "conv1d" in name:
                continue
            written = name.endswith(
                ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")
            )  # shared experts' too
            expected = smaller if written else 0.03
            # Five standard errors of a standard deviation.
            assert parameter.std().item() == pytest.approx(expected, rel=5 / (2 * parameter.numel()) ** 0.5), name
            counted[written] += 1
        assert min(counted.values()) >= 4

    def test_a_loaded_projection_keeps_what_the_file_says(self, tmp_path):
        small_model("dense", dtype=torch.float32).save_pretrained(tmp_path)
        loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
        expected = small_model("dense", dtype=torch.float32).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def arguments(folder: Path, **kwargs) -> TrainingArguments:
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **settings | kwargs)


class TestInterruption:
    @pytest.mark.parametrize("family", ["dense", "moe"])
    def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(self, family, tmp_path):
        """Weights, optimiser, scheduler and random numbers (dropout draws from them), rows in another order each
        epoch."""
        ids = tokens(8, 9)
        rows = [{"input_ids": row, "labels": row} for row in ids]

        def run(seed: int, resume: str | None = None):
            torch.manual_seed(17 + seed), random.seed(seed), np.random.seed(seed)
            model = small_model(family, dtype=torch.float32, seed=seed, attention_dropout=0.3)
            trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows)
            trainer.train(resume_from_checkpoint=resume)
            return trainer

        whole = run(0)
        resumed = run(5, str(tmp_path / "checkpoint-3"))
        assert resumed.state.global_step == 6
        for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
        assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
        one, other = (t.optimizer.state_dict()["state"] for t in (whole, resumed))
        for key in one:
            assert all(torch.equal(one[key][part], other[key][part]) for part in one[key])

    def test_a_kill_during_a_save_leaves_the_last_checkpoint(self, tmp_path):
        """The process is killed half way through the second checkpoint's weights; the first one goes on."""
        script = Path(tmp_path) / "train.py"
        script.write_text(KILLED)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "run")], env=environment)
        assert process.wait(120) == -signal.SIGKILL
        left = sorted(path.name for path in (tmp_path / "run").iterdir() if (path / "trainer_state.json").exists())
        assert left == ["checkpoint-2"]  # of the second there is a folder at most, and not whole
        from transformers.trainer_utils import get_last_checkpoint

        last = get_last_checkpoint(str(tmp_path / "run"))
        complete = str(tmp_path / "run" / "checkpoint-2")
        model = NemotronHForCausalLM.from_pretrained(complete)
        rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
        trainer = Trainer(model=model, args=arguments(tmp_path / "run", save_steps=2), train_dataset=rows)
        trainer.train(resume_from_checkpoint=complete)
        assert trainer.state.global_step == 6 and last is not None


KILLED = """
import os, signal, sys
import safetensors.torch
from families import small_model, tokens
from transformers import Trainer
from test_training import arguments

folder = sys.argv[1]
rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
model = small_model("dense", dtype=__import__("torch").float32)
trainer = Trainer(model=model, args=arguments(folder, save_steps=2), train_dataset=rows)
save = model.save_pretrained


def save_and_die(*args, **kwargs):
    if trainer.state.global_step == 4:
        import transformers.modeling_utils as library

        def half(tensors, path, *rest, **options):
            data = safetensors.torch.save(dict(tensors))
            with open(path, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        library.safe_save_file = half
    return save(*args, **kwargs)


model.save_pretrained = save_and_die
trainer.train()
"""
