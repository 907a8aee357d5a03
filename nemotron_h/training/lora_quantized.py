"""LoRA on packed weights (int8, int4, FP8, NVFP4): routed experts, and what merging into any of them says. Needs PEFT.

PEFT adapts a 3-D parameter W by running its module with W + B A in W's place, which integers cannot hold. Here the rows
that an expert gets go through A and B beside the packed weight, y = W x + s B (A x), and W + B A is never made. Names,
shapes and settings of the adapter are PEFT's own, so it opens on the plain model too, and the other way round.

Shape suffixes: S rows sorted by expert, E experts, r rank, K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from peft.tuners.lora import layer as lora_layer
from torch import Tensor, nn

from ..quantization.packed import PackedExperts, PackedLinear

Multiply = Callable[[str, Tensor, Tensor], Tensor]


class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's wrapper of one 3-D parameter, for `PackedExperts`. PEFT knows wrappers by this class's name."""

    lora_A: Any
    lora_B: Any
    num_experts: int

    def get_param(self) -> Tensor:
        """A tensor of the packed weight's shape and place, (E, N, K), without memory: PEFT looks at nothing else."""
        base = cast(PackedExperts, self.get_base_layer())
        packed = cast(Tensor, base._parameters[self.parameter_name])
        return torch.empty((), device=packed.device).expand(base.weights()[self.parameter_name])

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, indices_Tk: Tensor, weights_Tk: Tensor, multiply: Multiply | None = None, **kwargs: Any
    ) -> Tensor:
        self._check_forward_args(x_TD, **kwargs)
        base = self.base_layer
        beneath = multiply or cast(PackedExperts, self.get_base_layer()).multiply
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]

        def with_adapters(weight: str, x_SK: Tensor, experts_S: Tensor) -> Tensor:
            y_SN = beneath(weight, x_SK, experts_S)
            for name in active if weight == self.parameter_name else ():
                y_SN = y_SN + self._product(name, x_SK, experts_S).to(y_SN.dtype)
            return y_SN

        return base(x_TD, indices_Tk, weights_Tk, multiply=with_adapters)

    def _product(self, adapter: str, x_SK: Tensor, experts_S: Tensor) -> Tensor:
        """s B_e (A_e x) for each row's expert e: (S, N)."""
        A = self.lora_A[adapter].weight
        A_ErK = A.view(self.num_experts, -1, A.shape[-1])
        B = self.lora_B[adapter].weight
        B_ENr = B.view(B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        experts, counts = torch.unique_consecutive(experts_S, return_counts=True)
        rows = x_SK.to(A.dtype).split(counts.tolist())
        parts = [row @ A_ErK[e].T @ B_ENr[e].T for e, row in zip(experts.tolist(), rows, strict=True)]
        return torch.cat(parts) * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        _refuse_merging(self.get_base_layer())


class Linear(lora_layer.Linear):
    """PEFT's adapter of a linear layer, which packed weights take as they are; only merging is another matter."""

    def __init__(self, *args: Any, parameter_name: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        _refuse_merging(self.get_base_layer())


def _refuse_merging(base: nn.Module) -> NoReturn:
    raise ValueError(
        f"An adapter cannot be merged into packed weights ({type(base).__name__}) without rounding much of it away: "
        "load the model without quantisation, or dequantize() it before it is wrapped, then open the adapter and merge."
    )


ADAPTER_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    PackedExperts: ParamWrapper,
    PackedLinear: Linear,
}
"""Module classes whose packed weights PEFT would not treat rightly, each with the adapter's class for it."""

__all__ = ["ADAPTER_CLASSES", "Linear", "ParamWrapper"]
