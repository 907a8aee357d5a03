"""What scan, convolution and norms keep for the backward, counted; and the gradients that come of keeping so little."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from comparing import assert_same, error, outputs_and_gradients, random
from torch import Tensor

from nemotron_h import ops
from nemotron_h.ops import reference

H, P, G, N, CHUNK = 4, 5, 2, 6, 4


def scan_inputs(generator: torch.Generator, batch: int, length: int) -> list[Tensor]:
    """x, dt, A, B, C, D, state; time steps from 1e-5 up, decays from weak to strong."""
    draw = functools.partial(random, generator)
    dt = torch.nn.functional.softplus(2 * draw(batch, length, H) + torch.linspace(-12, 1, H, dtype=torch.float64))
    A = -torch.logspace(0, 2, H, dtype=torch.float64)
    wide = [draw(batch, length, G, N) for _ in range(2)]
    return [draw(batch, length, H, P), dt, A, *wide, draw(H), draw(batch, H, P, N)]


def scan(function, **kwargs):
    def call(x, dt, A, B, C, D, state=None):
        return function(x, dt, A, B, C, D, initial_state_BHPN=state, **kwargs)

    return call


def kept(function, inputs: list[Tensor]) -> dict[int, int]:
    """Bytes by storage that a call leaves for its backward, but for those of its inputs."""
    given = {t.untyped_storage().data_ptr() for t in inputs}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = function(*(t.requires_grad_() for t in inputs))  # kept alive, so that no storage is counted twice
    del alive
    return seen


class TestScan:
    @pytest.mark.parametrize("chunks", [1, 2, 3, 4, 9, 16, 17])
    def test_it_keeps_the_root_of_its_states(self, generator, chunks):
        inputs = scan_inputs(generator, 2, chunks * CHUNK)
        state_bytes = inputs[-1].nbytes
        seen = kept(scan(ops.ssd, chunk_size=CHUNK), inputs)
        assert sum(seen.values()) <= math.ceil(math.sqrt(chunks)) * state_bytes

    # The last chunk short, one position, or whole; one stretch of kept states short or whole.
    @pytest.mark.parametrize("length", [1, 3, CHUNK, CHUNK + 1, 4 * CHUNK, 5 * CHUNK + 1, 9 * CHUNK, 10 * CHUNK - 1])
    @pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
    @pytest.mark.parametrize("carried", [False, True], ids=["zero-state", "carried-state"])
    def test_gradients(self, generator, length, packed, carried):
        inputs = scan_inputs(generator, 2, length)[: 7 if carried else 6]
        seq_idx = torch.randint(0, 2, (2, length), generator=generator) if packed else None
        fast, slow = scan(ops.ssd, seq_idx_BL=seq_idx, chunk_size=CHUNK), scan(reference.ssd, seq_idx_BL=seq_idx)
        assert_same(fast, slow, inputs, 1e-12, 1e-10)

    @pytest.mark.parametrize("borders", [[4], [5], [3, 8, 9], [36]], ids=str)
    def test_gradients_of_long_documents(self, generator, borders):
        """Documents that end inside, at the end of and after whole stretches of chunks."""
        length = 10 * CHUNK
        seq_idx = torch.bucketize(torch.arange(length), torch.tensor(borders), right=True)[None]
        fast, slow = scan(ops.ssd, seq_idx_BL=seq_idx, chunk_size=CHUNK), scan(reference.ssd, seq_idx_BL=seq_idx)
        assert_same(fast, slow, scan_inputs(generator, 1, length), 1e-12, 1e-10)

    def test_pads_get_no_gradient_and_give_none(self, generator):
        length, valid = 9 * CHUNK + 1, torch.rand(9 * CHUNK + 1, generator=generator) > 0.4
        x, dt, A, B, C, D, state = scan_inputs(generator, 1, length)
        dt = dt.masked_fill(~valid[None, :, None], 0)

        def at_valid(function):
            def call(x, dt, A, B, C, D, state):
                y, after = function(x, dt, A, B, C, D, initial_state_BHPN=state)
                return y[:, valid], after

            return call

        fast = at_valid(functools.partial(ops.ssd, chunk_size=CHUNK))
        inputs = [x, dt, A, B, C, D, state]
        assert_same(fast, at_valid(reference.ssd), inputs, 1e-12, 1e-10)
        _, gradients, _ = outputs_and_gradients(fast, inputs)
        for gradient in (gradients[0], gradients[3], gradients[4]):
            assert not gradient[:, ~valid].any()

    def test_the_graph_can_be_walked_twice(self, generator):
        inputs = [t.requires_grad_() for t in scan_inputs(generator, 1, 5 * CHUNK + 2)]
        y, state = scan(ops.ssd, chunk_size=CHUNK)(*inputs)
        loss = y.square().sum() + state.square().sum()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_under_functorch_the_plain_walk_is_differentiated(self, generator):
        inputs = scan_inputs(generator, 1, 3 * CHUNK + 1)

        def loss(*inputs):
            y, state = scan(ops.ssd, chunk_size=CHUNK)(*inputs)
            return y.square().sum() + state.square().sum()

        leaves = [t.clone().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        found = torch.func.grad(loss, argnums=tuple(range(7)))(*inputs)
        assert all(error(a, b) < 1e-10 for a, b in zip(found, expected, strict=True))


class TestConvolution:
    def inputs(self, generator, length, dtype=torch.float64, batch=2):
        draw = functools.partial(random, generator, dtype=dtype)
        return [draw(batch, length, 6), draw(6, 4), draw(6), draw(batch, 6, 3)]

    @pytest.mark.parametrize("seq", [None, "packed"])
    @pytest.mark.parametrize("activation", ["silu", None])
    @pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 101])
    def test_gradients_over_blocks(self, generator, length, activation, seq):
        seq_idx = torch.randint(0, 2, (2, length), generator=generator) if seq else None

        def run(function):
            def call(x, weight, bias, window):
                return function(x, weight, bias, window_BCW=window, seq_idx_BL=seq_idx, activation=activation)

            return call

        assert_same(run(ops.causal_conv), run(reference.causal_conv), self.inputs(generator, length), 1e-12, 1e-11)

    @pytest.mark.parametrize("kernel", [1, 2, 40])
    def test_gradients_of_other_kernels(self, generator, kernel):
        inputs = [random(generator, 1, 70, 3), random(generator, 3, kernel), random(generator, 3)]
        assert_same(ops.causal_conv, reference.causal_conv, inputs, 1e-12, 1e-11)

    def test_nothing_is_kept_but_its_inputs(self, generator):
        inputs = self.inputs(generator, 64, torch.bfloat16)
        # The window, turned round; for eight positions as large as that.
        assert sum(kept(lambda x, w, b, s: ops.causal_conv(x, w, b, window_BCW=s), inputs).values()) <= 1024

    def test_frozen_weights_get_no_gradient_and_x_the_same(self, generator):
        x, weight, bias, _ = self.inputs(generator, 50)
        leaf = x.clone().requires_grad_()
        y, _ = ops.causal_conv(leaf, weight, bias)
        (alone,) = torch.autograd.grad(y.square().sum(), leaf)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y, _ = ops.causal_conv(*leaves)
        assert torch.equal(alone, torch.autograd.grad(y.square().sum(), leaves)[0])


class TestNorms:
    @pytest.mark.parametrize("rows", [1, 31, 33, 70])
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_gradients_over_blocks(self, generator, rows, groups):
        y, z, weight = random(generator, 2, rows, 16), random(generator, 2, rows, 16), random(generator, 16)
        run = functools.partial(ops.gated_rms_norm, eps=1e-5, n_groups=groups)
        slow = functools.partial(reference.gated_rms_norm, eps=1e-5, n_groups=groups)
        assert_same(run, slow, [y, z, weight], 1e-13, 1e-12)
        if groups == 1:
            assert_same(
                functools.partial(ops.rms_norm, eps=1e-5),
                functools.partial(reference.rms_norm, eps=1e-5),
                [y, weight],
                1e-13,
                1e-12,
            )

    def test_nothing_is_kept_but_its_inputs(self, generator):
        inputs = [random(generator, *shape, dtype=torch.bfloat16) for shape in ((2, 64, 16), (2, 64, 16), (16,))]
        assert not kept(lambda y, z, w: ops.gated_rms_norm(y, z, w, 1e-5, 2), inputs)
        assert not kept(lambda y, z, w: ops.rms_norm(y, w, 1e-5), inputs)

    def test_gradients_in_bfloat16_are_rounded_once(self, generator):
        inputs = [random(generator, 1, 40, 16, dtype=torch.bfloat16) for _ in range(2)]
        weight = random(generator, 16, dtype=torch.bfloat16)
        run = functools.partial(ops.gated_rms_norm, eps=1e-5, n_groups=2)
        slow = functools.partial(reference.gated_rms_norm, eps=1e-5, n_groups=2)
        assert_same(run, slow, [*inputs, weight], 2**-8, 2**-8)

    def test_a_frozen_weight(self, generator):
        y, z, weight = random(generator, 40, 16), random(generator, 40, 16), random(generator, 16)
        leaves = [y.clone().requires_grad_(), z.clone().requires_grad_()]
        alone = torch.autograd.grad(ops.gated_rms_norm(*leaves, weight, 1e-5, 2).square().sum(), leaves)
        leaves = [t.clone().requires_grad_() for t in (y, z, weight)]
        both = torch.autograd.grad(ops.gated_rms_norm(*leaves, 1e-5, 2).square().sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=False))


@pytest.mark.parametrize("op", ["conv", "norm", "gated"])
def test_under_functorch_the_plain_forms_are_differentiated(generator, op):
    x, z, weight = random(generator, 1, 40, 8), random(generator, 1, 40, 8), random(generator, 8)
    kernel = random(generator, 8, 4)
    run = {
        "conv": lambda x: ops.causal_conv(x, kernel, weight)[0],
        "norm": lambda x: ops.rms_norm(x, weight, 1e-5),
        "gated": lambda x: ops.gated_rms_norm(x, z, weight, 1e-5, 2),
    }[op]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf).pow(3).sum(), leaf)
    assert error(torch.func.grad(lambda x: run(x).pow(3).sum())(x), expected) < 1e-12
