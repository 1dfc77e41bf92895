"""LoftQ: the quantized base and A B are fitted to W in turn (2310.08659, algorithm 1).

Q_t = q(W − s A_{t−1} B_{t−1}),   A_t B_t = SVD_r(W − Q_t) / s,   A_0 B_0 = 0
"""

from __future__ import annotations

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import InitContext, InitResult


def loftq(context: InitContext) -> InitResult:
    """The last A and B; the base is quantized without the A and B of the round before.

    Raises:
      ValueError: the base is not quantized.
    """
    if context.quantize is None:
        raise ValueError(
            "adapter.init loftq starts from the error of quantization, but a target's kernel is "
            "not quantized; set quant.format, do not set adapter.keep_base, and target linear "
            "layers, not the head"
        )
    w = context.weight
    latest = (context.zeros_a(), context.zeros_b())
    for _ in range(context.rounds):
        previous = latest
        quantized = context.quantize(w - highest_matmul(*previous))
        latest = context.truncated_svd(w - quantized)
    factors = context.divided_by_scale(latest)
    removed = context.divided_by_scale(previous)
    return InitResult(factors, removed=removed)
