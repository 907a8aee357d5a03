"""nemotron_h/ops/causal_conv.py against a queue of inputs: outputs, windows and every gradient."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from comparing import assert_same, error, outputs_and_gradients, random

from nemotron_h import ops
from nemotron_h.ops import reference

C, K = 8, 4
LENGTHS = [1, 2, K - 1, K, 29, 150]  # 150 is more than two blocks of the path without gradient


def conv_inputs(generator, batch, length, dtype=torch.float64, kernel=K):
    """x, weight, bias and an incoming window that is not zero."""
    draw = functools.partial(random, generator, dtype=dtype)
    return [draw(batch, length, C), draw(C, kernel), draw(C), draw(batch, C, kernel - 1)]


def with_window(function, **kwargs):
    def call(x, weight, bias=None, window=None):
        return function(x, weight, bias, window_BCW=window, **kwargs)

    return call


def any_mask(generator, batch, length):
    return torch.rand(batch, length, generator=generator) > 0.4


class TestAgainstTheReference:
    @pytest.mark.parametrize("length", LENGTHS)
    @pytest.mark.parametrize("masked, packed", list(itertools.product([False, True], repeat=2)))
    def test_float64(self, generator, length, masked, packed):
        kwargs = {
            "mask_BL": any_mask(generator, 3, length) if masked else None,
            "seq_idx_BL": torch.randint(0, 3, (3, length), generator=generator) if packed else None,
        }
        inputs = conv_inputs(generator, 3, length)
        assert_same(with_window(ops.causal_conv, **kwargs), with_window(reference.causal_conv, **kwargs), inputs, 1e-12)
        with torch.no_grad():
            y, window = with_window(ops.causal_conv, **kwargs)(*inputs)
            expected, expected_window = with_window(reference.causal_conv, **kwargs)(*inputs)
        assert error(y, expected) < 1e-12 and torch.equal(window, expected_window)

    @pytest.mark.parametrize("given", [2, 3], ids=["no-bias", "no-window"])
    def test_bias_and_window_may_be_left_out(self, generator, given):
        inputs = conv_inputs(generator, 2, 9)[:given]
        assert_same(with_window(ops.causal_conv), with_window(reference.causal_conv), inputs, 1e-12)

    @pytest.mark.parametrize("kernel", [1, 2, 3, 5])
    def test_other_kernel_sizes(self, generator, kernel):
        inputs = conv_inputs(generator, 2, 9, kernel=kernel)
        for mask in (None, any_mask(generator, 2, 9)):
            run, expected = (with_window(f, mask_BL=mask) for f in (ops.causal_conv, reference.causal_conv))
            assert_same(run, expected, inputs, 1e-12)

    @pytest.mark.parametrize("activation", [None, torch.tanh, "swish"])
    def test_activations(self, generator, activation):
        inputs = conv_inputs(generator, 2, 9)
        run, expected = (with_window(f, activation=activation) for f in (ops.causal_conv, reference.causal_conv))
        assert_same(run, expected, inputs, 1e-12)

    def test_unknown_activation_is_named(self, generator):
        with pytest.raises(ValueError, match=r"activation='gelu'.*'silu', None or a function"):
            with_window(ops.causal_conv, activation="gelu")(*conv_inputs(generator, 1, 2))

    def test_float32(self, generator):
        inputs = conv_inputs(generator, 2, 150, torch.float32)
        assert_same(with_window(ops.causal_conv), with_window(reference.causal_conv), inputs, 1e-6)

    def test_bfloat16_rounds_only_its_output(self, generator):
        inputs = conv_inputs(generator, 2, 150, torch.bfloat16)
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                y, window = with_window(ops.causal_conv)(*inputs)
            expected, _ = with_window(reference.causal_conv)(*(t.double() for t in inputs))
            assert y.dtype == window.dtype == torch.bfloat16
            # One rounding: half a unit in the last place of each value, not of the largest.
            assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()
            assert torch.equal(window, inputs[0][:, -K + 1 :].transpose(1, 2))


class TestCarrying:
    @pytest.mark.parametrize("split", [1, 2, 3, 14, 28])
    def test_a_split_with_the_window_carried_is_the_whole(self, generator, split):
        def in_two(x, weight, bias, window):
            first, window = ops.causal_conv(x[:, :split], weight, bias, window_BCW=window)
            second, window = ops.causal_conv(x[:, split:], weight, bias, window_BCW=window)
            return torch.cat([first, second], 1), window

        assert_same(in_two, with_window(ops.causal_conv), conv_inputs(generator, 2, 29), 1e-12)

    def test_token_by_token_under_any_mask_is_the_whole(self, generator):
        x, weight, bias, window = conv_inputs(generator, 3, 17)
        mask = any_mask(generator, 3, 17)
        whole, last = ops.causal_conv(x, weight, bias, window_BCW=window, mask_BL=mask)
        for t in range(17):
            here = slice(t, t + 1)
            y, window = ops.causal_conv(x[:, here], weight, bias, window_BCW=window, mask_BL=mask[:, here])
            assert error(y, whole[:, here]) < 1e-12 or not mask[:, t].any()
        assert torch.equal(window, last)

    def test_the_new_window_does_not_keep_the_sequence_alive(self, generator):
        _, window = with_window(ops.causal_conv)(*conv_inputs(generator, 2, 150))
        assert window.is_contiguous() and window.untyped_storage().nbytes() == window.numel() * window.element_size()


class TestPads:
    @pytest.mark.parametrize("where", ["left", "right", "middle", "everywhere"])
    def test_pads_are_not_there(self, generator, where):
        length, kept = 13, 6
        at = torch.arange(length)
        valid = {
            "left": at >= length - kept,
            "right": at < kept,
            "middle": (at < 2) | (at >= 2 + length - kept),
            "everywhere": torch.tensor(
                [False, True, True, False, False, True, False, True, False, False, True, True, False]
            ),
        }[where]

        def padded(x, *rest):
            y, window = with_window(ops.causal_conv, mask_BL=valid[None].expand(2, -1))(x, *rest)
            return y[:, valid], window

        def unpadded(x, *rest):
            return with_window(ops.causal_conv)(x[:, valid], *rest)

        assert_same(padded, unpadded, conv_inputs(generator, 2, length), 1e-12)

    def test_outputs_at_pads_are_zero_and_what_stands_there_does_not_matter(self, generator):
        x, *rest = conv_inputs(generator, 2, 13)
        mask = any_mask(generator, 2, 13)
        y, window = with_window(ops.causal_conv, mask_BL=mask)(x, *rest)
        noisy = torch.where(mask[..., None], x, torch.nan)
        y_noisy, window_noisy = with_window(ops.causal_conv, mask_BL=mask)(noisy, *rest)
        assert torch.equal(y, y_noisy) and torch.equal(window, window_noisy)
        assert not y[~mask].any()

    def test_a_row_of_pads_only_keeps_its_window(self, generator):
        *inputs, window = conv_inputs(generator, 2, 5)
        mask = torch.tensor([[0] * 5, [1] * 5])
        for seq_idx in (None, torch.zeros(2, 5)):
            y, after = ops.causal_conv(*inputs, window_BCW=window, mask_BL=mask, seq_idx_BL=seq_idx)
            assert torch.equal(after[0], window[0]) and not y[0].any()
            assert torch.equal(after[1], inputs[0][1, -3:].T)


class TestDocuments:
    def test_documents_do_not_see_each_other(self, generator):
        lengths, values = [3, 9, 1, 2], [7, 2, 7, 0]
        seq_idx = torch.tensor([[v for v, n in zip(values, lengths, strict=True) for _ in range(n)]])

        def separate(x, weight, bias, window):
            results = [
                ops.causal_conv(part, weight, bias, window_BCW=window if i == 0 else None)
                for i, part in enumerate(x.split(lengths, 1))
            ]
            return torch.cat([y for y, _ in results], 1), results[-1][1]

        packed = with_window(ops.causal_conv, seq_idx_BL=seq_idx)
        assert_same(packed, separate, conv_inputs(generator, 1, sum(lengths)), 1e-12)

    def test_a_pad_belongs_to_the_document_before_it(self, generator):
        inputs = conv_inputs(generator, 1, 7)
        mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0]])
        numbers = torch.tensor([[5, 0, 0, 5, 0, 1, 5]])
        y, window = with_window(ops.causal_conv, mask_BL=mask, seq_idx_BL=numbers)(*inputs)
        valid = mask[0].bool()
        x, *rest = inputs
        expected, expected_window = with_window(ops.causal_conv, seq_idx_BL=numbers[:, valid])(x[:, valid], *rest)
        assert error(y[:, valid], expected) < 1e-12 and torch.equal(window, expected_window)


def test_autocast_changes_nothing(generator):
    inputs = conv_inputs(generator, 2, 9, torch.float32)
    outputs, gradients, weights = outputs_and_gradients(with_window(ops.causal_conv), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_gradients, _ = outputs_and_gradients(with_window(ops.causal_conv), inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(outputs + gradients, cast + cast_gradients, strict=True))


def test_it_takes_a_slice_of_a_projection(generator):
    x, *rest = conv_inputs(generator, 2, 150)
    wide = torch.cat([random(generator, 2, 150, 5), x, random(generator, 2, 150, 3)], -1)
    run = with_window(ops.causal_conv)
    assert torch.equal(run(wide[..., 5:-3], *rest)[0], run(x, *rest)[0])


def test_gradcheck(generator):
    inputs = [t.requires_grad_() for t in conv_inputs(generator, 2, 4)]
    for mask in (None, torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])):
        assert torch.autograd.gradcheck(with_window(ops.causal_conv, mask_BL=mask), inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_without_graph_breaks(generator, masked):
    run = with_window(ops.causal_conv, mask_BL=any_mask(generator, 2, 9) if masked else None)
    torch.compiler.reset()
    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager"), run, conv_inputs(generator, 2, 9), 1e-12)
