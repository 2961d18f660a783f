"""The QA-LoRA layer as a module of torch: what it holds and what is trained. Its formulas are in qalora/function.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qalora_export.errors import InputError
from qalora_export.grid import AFFINE16, SuperBlockGrid, SymmetricGrid, grid_named
from qalora_export.grid.named import SUPER_BLOCK
from qalora_export.grid.packing import packed_width
from qalora_export.qalora.function import QALoraFunction, product, scale_and_offset_of, weight_of
from qalora_export.qalora.scales import ScaleAdapter


def _frozen(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device), requires_grad=False)


class QALoraLinear(nn.Module):
    """A linear layer in canonical form, optionally with a QA-LoRA adapter.

    Frozen: codes uint8 (out, in·bits/8), scale float16 (out, in/g), offset float16 (out, in/g); bias (out,) or None. On
    a grid of super-blocks scale and offset are levels, uint8, beside scale_step and offset_step float16 (out, in/256);
    on a symmetric one there is no offset, so no adapter either, and scale is int8.
    They are parameters that never require gradients, not buffers, because FSDP divides parameters among devices.
    Trainable, float32: lora_A (r, in/pool), lora_B (out, r), where pool is g or a multiple of it, and where scales are
    trained too, scales.A and scales.B of the same shapes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        grid: str = AFFINE16.name,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        named = grid_named(grid, bits, group_size, where="a layer")
        if not named.divides(in_features, group_size):
            raise InputError(f"{in_features} in-features do not divide into groups of {group_size} on grid {grid}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.grid = bits, group_size, grid
        groups, on_levels = in_features // group_size, isinstance(named, SuperBlockGrid)
        self.symmetric = isinstance(named, SymmetricGrid)
        number = (torch.int8 if self.symmetric else torch.uint8) if on_levels else torch.float16
        self.codes = _frozen(out_features, packed_width(in_features, bits), torch.uint8, device)
        self.scale = _frozen(out_features, groups, number, device)
        if not self.symmetric:
            self.offset = _frozen(out_features, groups, number, device)
        if on_levels:
            blocks = in_features // SUPER_BLOCK
            self.scale_step = _frozen(out_features, blocks, torch.float16, device)
            if not self.symmetric:
                self.offset_step = _frozen(out_features, blocks, torch.float16, device)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.scales: ScaleAdapter | None = None
        self.scaling = 0.0

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """codes, scale and offset, and on a grid of super-blocks the steps of scale and of offset; where the offset
        follows from the scale, codes, scale and its step.
        """
        if self.symmetric:
            return self.codes, self.scale, self.scale_step
        numbers = (self.codes, self.scale, self.offset)
        return numbers if self.grid == AFFINE16.name else (*numbers, self.scale_step, self.offset_step)

    @property
    def pool(self) -> int:
        """In-features that one column of lora_A covers; the group size when there is no adapter."""
        return self.group_size if self.lora_A is None else self.in_features // self.lora_A.shape[1]

    def attach_adapter(
        self,
        rank: int,
        alpha: float,
        *,
        pool: int | None = None,
        scales: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add a trainable adapter: A Kaiming uniform (a=√5, as in PEFT), B zero, so offset_eff starts at m exactly.

        scales: and another of this rank on the scales, which start at s exactly.

        pool: the module's own group size, or a multiple of it; where a multiple does not divide the in-features, its
        greatest divisor that does, so that one setting serves matrices of different widths. Raises InputError when
        pool is no multiple of the group size, and where there is no offset that it could move.
        """
        if self.symmetric:
            raise InputError(
                f"an adapter cannot move the offsets of grid {self.grid}",
                why="they are −2^(bits−1)·scale",
                fix="leave this module out of train.targets, or quantize it on another grid",
            )
        pool = pool or self.group_size
        if pool % self.group_size:
            raise InputError(
                f"pool length {pool} does not fit group size {self.group_size} and {self.in_features} in-features",
                why="an adapter merges without loss only if its pool is a multiple of the quantization group",
                fix="set pool to the group size or a multiple",
            )
        columns = self.in_features // math.gcd(pool, self.in_features)

        def start() -> tuple[Tensor, Tensor]:
            a = torch.empty(rank, columns, dtype=torch.float32)
            nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
            return a, torch.zeros(self.out_features, rank, dtype=torch.float32)

        self.set_adapter(*start(), alpha / rank, scales=start() if scales else None)

    def set_adapter(self, a: Tensor, b: Tensor, scaling: float, *, scales: tuple[Tensor, Tensor] | None = None) -> None:
        """Install given adapter tensors, a (r, in/pool) and b (out, r), as trainable parameters on our device.

        scales: such a pair for the scales.
        """
        self.lora_A = nn.Parameter(a.to(self.codes.device))
        self.lora_B = nn.Parameter(b.to(self.codes.device))
        self.scaling = scaling
        self.scales = scales and ScaleAdapter(scales, self.codes, self.bits, self.scale.shape[1])

    def detach_adapter(self) -> None:
        self.lora_A = self.lora_B = self.scales = None
        self.scaling = 0.0

    @torch.no_grad()
    def effective_offset(self) -> Tensor:
        """offset_eff, float32 (out, in/g), holding float16 values or products of a level. Merge writes exactly this."""
        a, b, numbers = self._moved()
        return scale_and_offset_of(a, b, self.scaling, self.grid, *numbers)[1].float()

    def _moved(self) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """A and B that are still to move offsets, and the numbers beside the codes; with scales, moved already."""
        if self.scales is None or self.lora_A is None or self.lora_B is None:
            return self.lora_A, self.lora_B, self.packed[1:]
        pair = self.lora_A, self.lora_B
        return None, None, self.scales.effective(self.packed[1:], pair, self.scaling, self.grid)

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix the layer multiplies by, adapter and all, (out, in) in `dtype`."""
        a, b, numbers = self._moved()
        return weight_of(dtype, a, b, self.scaling, self.bits, self.grid, self.codes, *numbers)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, or in autocast's dtype when autocast is on (float64 stays)."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        if self.scales is not None and self.lora_A is not None and self.lora_B is not None and torch.is_grad_enabled():
            pair = self.lora_A, self.lora_B
            y = self.scales.linear(x, pair, self.scaling, self.bits, self.grid, *self.packed)
        else:
            run = QALoraFunction.apply if torch.is_grad_enabled() else product
            a, b, numbers = self._moved()
            y = run(x, a, b, self.scaling, self.bits, self.grid, self.codes, *numbers)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QALoraLinear:
        """Devices move, numbers do not: `.half()` or `.bfloat16()` must not round scale, offset or the adapter."""
        adapter = [p for p in (self.lora_A, self.lora_B) if p is not None]
        fixed = {id(tensor) for tensor in self.packed}
        if self.scales is not None:
            adapter += self.scales.pair
            fixed |= {id(self.scales.centre), id(self.scales.spread)}
        wide = {id(t) for p in adapter for t in (p, p.grad) if t is not None}

        def guarded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = id(tensor) in fixed or (id(tensor) in wide and moved.dtype.itemsize < tensor.dtype.itemsize)
            return tensor.to(moved.device) if kept and moved.dtype != tensor.dtype else moved

        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        rank = 0 if self.lora_A is None else self.lora_A.shape[0]
        return (
            f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group_size={self.group_size}, "
            f"grid={self.grid}, rank={rank}"
        )
