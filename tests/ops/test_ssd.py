"""nemotron_h/ops/ssd.py against the sequential recurrence: outputs and every gradient."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from comparing import assert_same, error, outputs_and_gradients, random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_h import ops
from nemotron_h.ops import reference

NO_LIMIT = (0.0, math.inf)
H, P, G, N, CHUNK = 6, 5, 3, 4, 8
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def scan_inputs(
    generator: torch.Generator, batch: int, length: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, dt, A, B, C, D and an initial state; steps tiny (dt_bias -12) to large, decays weak to strong."""
    draw = functools.partial(random, generator)
    dt_bias = torch.linspace(-12, 1, H, dtype=torch.float64)
    dt = torch.nn.functional.softplus(2 * draw(batch, length, H) + dt_bias)
    A = -torch.logspace(0, 2, H, dtype=torch.float64)[torch.randperm(H, generator=generator)]
    B, C = draw(batch, length, G, N), draw(batch, length, G, N)
    state = draw(batch, H, P, N)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # dt, A, D and the state are float32 in any model
    return [
        draw(batch, length, H, P).to(dtype),
        dt.to(wide),
        A.to(wide),
        B.to(dtype),
        C.to(dtype),
        draw(H).to(wide),
        state.to(wide),
    ]


def with_state(function):
    """The initial state as the seventh positional argument, so that it gets a gradient like the others."""

    def call(x, dt, A, B, C, D, state=None, **kwargs):
        return function(x, dt, A, B, C, D, initial_state_BHPN=state, **kwargs)

    return call


def documents(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random runs; some numbers come back later, so that only a change can mean a new document."""
    return torch.randint(0, 2, (batch, length), generator=generator)


class TestTimeStep:
    def test_matches_the_reference_with_gradients(self, generator):
        inputs = [4 * random(generator, 2, 9, H), torch.linspace(-12, 1, H, dtype=torch.float64)]
        mask = torch.rand(2, 9, generator=generator) > 0.3
        for limit in (NO_LIMIT, (0.05, 1.5)):
            for mask_BL in (None, mask, mask.long()):
                assert_same(ops.time_step, reference.time_step, inputs, 1e-14, 1e-12, limit=limit, mask_BL=mask_BL)

    def test_small_steps_are_not_clamped_and_pads_are_zero(self):
        dt = ops.time_step(torch.zeros(1, 3, 1), torch.tensor([-12.0]), NO_LIMIT, torch.tensor([[1, 0, 1]]))
        assert dt[0, 0, 0].item() == pytest.approx(math.log1p(math.exp(-12.0)), rel=1e-6)
        assert dt[0, 1, 0].item() == 0.0

    def test_a_pad_is_zero_even_under_a_lower_limit(self):
        dt = ops.time_step(torch.zeros(1, 2, 1), torch.zeros(1), (0.1, 2.0), torch.tensor([[False, True]]))
        assert dt.flatten().tolist() == [0.0, pytest.approx(math.log(2.0))]

    def test_bfloat16_input_is_computed_in_float32(self, generator):
        raw = random(generator, 2, 5, H, dtype=torch.bfloat16)
        bias = torch.linspace(-12, 1, H)
        dt = ops.time_step(raw, bias, NO_LIMIT)
        assert dt.dtype == torch.float32
        assert error(dt, reference.time_step(raw, bias, NO_LIMIT)) < 1e-6


class TestScan:
    @pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
    @pytest.mark.parametrize("carried", [False, True], ids=["zero-state", "carried-state"])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_float64(self, generator, length, carried, packed):
        inputs = scan_inputs(generator, 2, length)[: 7 if carried else 6]
        seq_idx = documents(2, length, generator) if packed else None
        run = with_state(functools.partial(ops.ssd, seq_idx_BL=seq_idx, chunk_size=CHUNK))
        assert_same(run, with_state(functools.partial(reference.ssd, seq_idx_BL=seq_idx)), inputs, 1e-12, 1e-10)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_float32(self, generator, length):
        inputs = scan_inputs(generator, 2, length, torch.float32)
        assert_same(
            with_state(functools.partial(ops.ssd, chunk_size=CHUNK)), with_state(reference.ssd), inputs, 1e-6, 3e-6
        )

    def test_bfloat16_rounds_only_its_output(self, generator):
        inputs = scan_inputs(generator, 2, 29, torch.bfloat16)
        (y, state), _, _ = outputs_and_gradients(with_state(ops.ssd), inputs)
        (expected, expected_state), _, _ = outputs_and_gradients(
            with_state(reference.ssd), [t.double() for t in inputs]
        )
        assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
        assert error(state, expected_state) < 1e-6
        assert torch.equal(y, expected.to(torch.bfloat16)) or error(y, expected) < 2**-8

    @pytest.mark.parametrize("chunk", [1, 2, 7, 16, 64])
    def test_the_result_does_not_depend_on_the_chunk(self, generator, chunk):
        inputs = scan_inputs(generator, 2, 29)
        assert_same(
            with_state(functools.partial(ops.ssd, chunk_size=chunk)), with_state(reference.ssd), inputs, 1e-12, 1e-10
        )

    def test_gradcheck(self, generator):
        shapes = [(1, 5, 2, 2), (1, 5, 2), (2,), (1, 5, 1, 2), (1, 5, 1, 2), (2,), (1, 2, 2, 2)]
        inputs = [random(generator, *shape) for shape in shapes]
        inputs[1] = inputs[1].abs() + 0.05  # away from 0, where a finite difference leaves the domain
        inputs[2] = -inputs[2].abs()
        inputs = [t.requires_grad_() for t in inputs]
        for seq_idx in (None, torch.tensor([[0, 0, 1, 1, 1]])):
            run = with_state(functools.partial(ops.ssd, chunk_size=3, seq_idx_BL=seq_idx))
            assert torch.autograd.gradcheck(run, inputs)

    def test_each_input_alone_may_want_a_gradient(self, generator):
        inputs = scan_inputs(generator, 1, 9)
        _, expected, weights = outputs_and_gradients(with_state(ops.ssd), inputs)
        for index in range(len(inputs)):
            leaf = inputs[index].clone().requires_grad_()
            y, state = with_state(ops.ssd)(*inputs[:index], leaf, *inputs[index + 1 :])
            loss = (y * weights[0]).sum() + (state * weights[1]).sum()
            assert error(torch.autograd.grad(loss, leaf)[0], expected[index]) < 1e-12

    @pytest.mark.parametrize("split", [1, CHUNK - 1, CHUNK, CHUNK + 1, 28])
    def test_a_split_with_the_state_carried_is_the_whole(self, generator, split):
        inputs = scan_inputs(generator, 2, 29)

        def in_two(x, dt, A, B, C, D, state):
            first, state = ops.ssd(
                x[:, :split], dt[:, :split], A, B[:, :split], C[:, :split], D, initial_state_BHPN=state
            )
            second, state = ops.ssd(
                x[:, split:], dt[:, split:], A, B[:, split:], C[:, split:], D, initial_state_BHPN=state
            )
            return torch.cat([first, second], 1), state

        assert_same(in_two, with_state(functools.partial(ops.ssd, chunk_size=CHUNK)), inputs, 1e-12, 1e-10)

    def test_the_state_of_a_pad_is_bitwise_what_it_was(self, generator):
        x, _, A, B, C, D, state = scan_inputs(generator, 2, 5, torch.float32)
        _, after = ops.ssd(x, torch.zeros(2, 5, H), A, B, C, D, initial_state_BHPN=state, chunk_size=2)
        assert torch.equal(after, state)
        _, after = ops.ssd_step(x[:, 0], torch.zeros(2, H), A, B[:, 0], C[:, 0], D, state)
        assert torch.equal(after, state)

    @pytest.mark.parametrize("where", ["left", "right", "middle", "everywhere"])
    def test_pads_are_not_there(self, generator, where):
        length, kept = 29, 17
        at = torch.arange(length)
        valid = {
            "left": at >= length - kept,
            "right": at < kept,
            "middle": (at < 5) | (at >= 5 + length - kept),
            "everywhere": torch.zeros(length, dtype=torch.bool).index_fill(
                0, torch.randperm(length, generator=generator)[:kept], True
            ),
        }[where]
        inputs = scan_inputs(generator, 1, length)

        def padded(x, dt, A, B, C, D, state):
            dt = dt.masked_fill(~valid[None, :, None], 0)
            y, state = ops.ssd(x, dt, A, B, C, D, initial_state_BHPN=state, chunk_size=CHUNK)
            return y[:, valid], state

        def unpadded(x, dt, A, B, C, D, state):
            return ops.ssd(x[:, valid], dt[:, valid], A, B[:, valid], C[:, valid], D, initial_state_BHPN=state)

        assert_same(padded, unpadded, inputs, 1e-12, 1e-10)

    def test_documents_do_not_see_each_other(self, generator):
        lengths, values = [3, 9, 1, 16], [7, 2, 7, 0]
        inputs = scan_inputs(generator, 1, sum(lengths))
        seq_idx = torch.tensor([[v for v, n in zip(values, lengths, strict=True) for _ in range(n)]])

        def separate(x, dt, A, B, C, D, state):
            parts = [t.split(lengths, 1) for t in (x, dt, B, C)]
            results = [
                ops.ssd(xi, dti, A, Bi, Ci, D, initial_state_BHPN=state if i == 0 else None)
                for i, (xi, dti, Bi, Ci) in enumerate(zip(*parts, strict=True))
            ]
            return torch.cat([y for y, _ in results], 1), results[-1][1]

        packed = with_state(functools.partial(ops.ssd, seq_idx_BL=seq_idx, chunk_size=CHUNK))
        assert_same(packed, separate, inputs, 1e-12, 1e-10)

    def test_strong_decay_costs_later_positions_no_digits(self, generator):
        # Steps of dt A = -300 and -1e-4 in turn: in a float32 running sum the weak ones would be lost.
        length = 64
        inputs = scan_inputs(generator, 1, length, torch.float32)
        strong = (torch.arange(length) % 16 == 0)[None, :, None]
        inputs[1] = torch.where(strong, 3.0, 1e-6).expand(1, length, H).contiguous()
        inputs[2] = torch.full((H,), -100.0)
        assert_same(with_state(ops.ssd), with_state(reference.ssd), inputs, 5e-7, 2e-6)

    def test_nothing_overflows_above_the_diagonal(self, generator):
        inputs = scan_inputs(generator, 1, 16, torch.float32)
        inputs[1] = torch.full((1, 16, H), 20.0)
        inputs[2] = torch.full((H,), -50.0)
        outputs, gradients, _ = outputs_and_gradients(with_state(functools.partial(ops.ssd, chunk_size=16)), inputs)
        assert all(t.isfinite().all() for t in outputs + gradients)

    def test_autocast_changes_nothing(self, generator):
        inputs = scan_inputs(generator, 1, 29, torch.float32)
        outputs, gradients, weights = outputs_and_gradients(with_state(ops.ssd), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            cast, cast_gradients, _ = outputs_and_gradients(with_state(ops.ssd), inputs, weights)
        assert all(torch.equal(a, b) for a, b in zip(outputs + gradients, cast + cast_gradients, strict=True))

    def test_it_takes_slices_of_one_projection(self, generator):
        x, dt, A, B, C, D, _ = scan_inputs(generator, 2, 29)
        joined = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], -1)
        x_, B_, C_ = joined.split([H * P, G * N, G * N], -1)
        y, _ = ops.ssd(x_.view(x.shape), dt, A, B_.view(B.shape), C_.view(C.shape), D)
        assert torch.equal(y, ops.ssd(x, dt, A, B, C, D)[0])

    @pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
    def test_no_tensor_grows_with_length_times_length(self, generator, gradient):
        class Largest(TorchDispatchMode):
            elements = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                for t in result if isinstance(result, tuple | list) else [result]:
                    if isinstance(t, Tensor):
                        self.elements = max(self.elements, t.numel())
                return result

        length, chunk = 32 * CHUNK, CHUNK
        inputs = [t.requires_grad_(gradient) for t in scan_inputs(generator, 1, length)]
        with Largest() as seen:
            y, _ = ops.ssd(*inputs[:6], chunk_size=chunk)
            if gradient:
                y.sum().backward()
        # The largest are the inputs themselves; one chunk's decay is H x chunk x chunk.
        assert seen.elements <= max(inputs[0].numel(), H * chunk * chunk)

    def test_compiled_without_graph_breaks(self, generator):
        inputs = scan_inputs(generator, 2, 13)
        seq_idx = documents(2, 13, generator)
        run = with_state(functools.partial(ops.ssd, seq_idx_BL=seq_idx, chunk_size=CHUNK))
        torch.compiler.reset()
        assert_same(torch.compile(run, fullgraph=True, backend="aot_eager"), run, inputs, 1e-12, 1e-10)

    def test_exports(self, generator):
        class Scan(torch.nn.Module):
            def forward(self, x, dt, A, B, C, D, state):
                return ops.ssd(x, dt, A, B, C, D, initial_state_BHPN=state, chunk_size=CHUNK)

        inputs = tuple(scan_inputs(generator, 2, 21))
        y, state = torch.export.export(Scan(), inputs).module()(*inputs)
        expected, expected_state = Scan()(*inputs)
        # Another order of the same sums: eagerly the walk works in buffers.
        torch.testing.assert_close((y, state), (expected, expected_state), rtol=1e-12, atol=1e-12)


class TestStep:
    def step_inputs(self, generator, dtype=torch.float64):
        x, dt, A, B, C, D, state = scan_inputs(generator, 2, 1, dtype)
        return [x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state]

    def test_matches_the_reference_with_gradients(self, generator):
        assert_same(ops.ssd_step, reference.ssd_step, self.step_inputs(generator), 1e-13)
        assert_same(ops.ssd_step, reference.ssd_step, self.step_inputs(generator, torch.float32), 1e-6)

    def test_token_by_token_is_the_scan(self, generator):
        x, dt, A, B, C, D, state = scan_inputs(generator, 2, 29)
        whole, last = ops.ssd(x, dt, A, B, C, D, initial_state_BHPN=state, chunk_size=CHUNK)
        outputs = []
        for t in range(29):
            y, state = ops.ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
            outputs.append(y)
        assert error(torch.stack(outputs, 1), whole) < 1e-12 and error(state, last) < 1e-12

    def test_the_given_state_is_left_alone(self, generator):
        inputs = self.step_inputs(generator)
        before = inputs[-1].clone()
        _, after = ops.ssd_step(*inputs)
        assert torch.equal(inputs[-1], before) and after.data_ptr() != inputs[-1].data_ptr()

    def test_a_state_held_in_bfloat16_is_computed_in_float32(self, generator):
        *inputs, state = self.step_inputs(generator, torch.bfloat16)
        y, after = ops.ssd_step(*inputs, state.bfloat16())
        expected, expected_after = reference.ssd_step(*(t.double() for t in inputs), state.bfloat16().double())
        assert y.dtype == torch.bfloat16 and after.dtype == torch.float32
        assert error(after, expected_after) < 1e-6 and error(y, expected) < 2**-8

    def test_compiled_without_graph_breaks(self, generator):
        inputs = self.step_inputs(generator)
        torch.compiler.reset()
        assert_same(torch.compile(ops.ssd_step, fullgraph=True, backend="aot_eager"), ops.ssd_step, inputs, 1e-12)
