"""Rows about log-probs of response tokens, forward and backward, with a vocabulary of 32k."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import LARGE, TINY, Shape
from benchmarks.rows import Row, Side, cpu_seconds, peak_mebibytes
from coalign.models.fused_head import fused_logps

POSITIONS = 1024
TARGETS = {"all positions": (1.25, 0.65), "response positions, half": (0.8, 0.55)}  # time, memory

Found = tuple[Tensor, Tensor, Tensor]


class Head:
    """An output projection, the hidden states before it, and the positions that predict a token of a response."""

    def __init__(
        self, shape: Shape, positions: int, half: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.hidden_TD = torch.randn(positions, shape.hidden, dtype=dtype, requires_grad=True)
            weight_VD = torch.randn(shape.vocabulary, shape.hidden) * shape.hidden**-0.5
            self.weight_VD = nn.Parameter(weight_VD.to(dtype))
            self.index_N = torch.arange(positions // 2 if half else positions)
            self.kept_N = torch.arange(positions // 2, positions) if half else torch.arange(positions)
            self.target_N = torch.randint(shape.vocabulary, (len(self.kept_N),))

    def finish(self, logp_N: Tensor) -> Found:
        """Go back through the log-probs and return them with both gradients."""
        (-logp_N.mean()).backward()
        hidden, weight = self.hidden_TD.grad, self.weight_VD.grad
        assert hidden is not None and weight is not None
        self.hidden_TD.grad = self.weight_VD.grad = None
        return logp_N.detach(), hidden, weight

    def plain(self) -> Found:
        """Take the log-softmax of all logits."""
        logp_TV = torch.log_softmax(nn.functional.linear(self.hidden_TD, self.weight_VD), dim=-1)
        return self.finish(logp_TV[self.kept_N, self.target_N])

    def ours(self) -> Found:
        """Take the log-probs that are needed, a block of the vocabulary at a time."""
        hidden_ND = self.hidden_TD if len(self.kept_N) == len(self.hidden_TD) else self.hidden_TD[self.kept_N]
        return self.finish(fused_logps(hidden_ND, self.weight_VD, None, self.index_N, self.target_N))


def close(a: Any, b: Any) -> bool:
    """Return whether log-probs and gradients are equal to 1e-4."""
    return all(torch.allclose(x, y, atol=1e-4, rtol=1e-4) for x, y in zip(a, b, strict=True))


def logprob_rows(tiny: bool) -> list[Row]:
    """Return time and memory, where all positions predict a response token and where half of them do."""
    rows = []
    for where, (time, memory) in TARGETS.items():
        shape, positions = (TINY, 16) if tiny else (LARGE, POSITIONS)
        head = Head(shape, positions, half="half" in where)
        name = f"log-probs, {len(head.hidden_TD)} positions, vocabulary {len(head.weight_VD)}, {where}"
        make = functools.partial(
            Row, name, "full log_softmax", ours=Side(head.ours), plain=Side(head.plain), same=close, at_most=True
        )
        rows += [
            make(target=time, measure=cpu_seconds),
            make(target=memory, measure=peak_mebibytes, unit="MiB", warm_up=False, max_repeats=1),
        ]
    return rows


BUILDERS: dict[str, Callable[[bool], list[Row]]] = {"logprobs": logprob_rows}
