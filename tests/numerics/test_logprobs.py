"""logprobs: equal to the Hugging Face model's own loss, row by row, in every family."""

from __future__ import annotations

import pytest
import torch

from coalign.batching import Item, collate
from coalign.logprobs import sum_by_response, token_logps
from numerics.tiny import FAMILIES, network, random_items


def own_logp(model: torch.nn.Module, item: Item, response: tuple[int, ...]) -> float:
    """Return the summed log-prob of one response by the model's own loss, one row, no padding."""
    ids = torch.tensor([[*item.prompt, *response]])
    labels = torch.tensor([[-100] * len(item.prompt) + list(response)])
    with torch.no_grad():
        return -float(model(input_ids=ids, labels=labels).loss) * len(response)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_log_probs_equal_the_models_own_loss(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """Padded rows of unlike lengths give what the model's loss gives for each row alone."""
    model = network(family, dtype)
    items = random_items(6)
    batch = collate(items, pad_id=0, shared_prefix=False, dtype=dtype)
    with torch.no_grad():
        logp_N = token_logps(model, batch)
    assert logp_N.dtype == dtype and bool((logp_N < 0).all())
    found = sum_by_response(logp_N, batch) / torch.bincount(batch.response_N)
    expected = [own_logp(model, item, r) / len(r) for item in items for r in item.responses]
    # Hugging Face computes its loss in float32 whatever the weights' dtype
    assert found.tolist() == pytest.approx(expected, abs=max(tolerance, 2e-6))
    direct = []
    for item in items:
        for response in item.responses:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*item.prompt, *response]])).logits[0].log_softmax(-1)
            direct += [float(logits[len(item.prompt) - 1 + k, token]) for k, token in enumerate(response)]
    assert logp_N.tolist() == pytest.approx(direct, abs=tolerance)


def test_log_probs_of_a_model_that_ignores_logits_to_keep() -> None:
    """A network that returns logits of all positions gives the same."""

    class AllPositions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network("llama")

        def forward(self, logits_to_keep: int, **inputs: object) -> object:
            return self.module(**inputs)

    batch = collate(random_items(4), 0, False, torch.float64)
    with torch.no_grad():
        assert torch.allclose(token_logps(AllPositions(), batch), token_logps(network("llama"), batch), atol=1e-12)


def test_log_probs_of_bfloat16_weights_are_float32() -> None:
    """The softmax of a bfloat16 model runs in float32, so that small differences survive."""
    batch = collate(random_items(3), 0, False, torch.bfloat16)
    with torch.no_grad():
        logp_N = token_logps(network("llama", torch.bfloat16), batch)
        exact_N = token_logps(network("llama", torch.float32), batch)
    assert logp_N.dtype is torch.float32
    assert float((logp_N - exact_N).abs().mean()) < 0.1
