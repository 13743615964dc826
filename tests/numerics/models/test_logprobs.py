"""logprobs: equal to the Hugging Face model's own loss, row by row, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coalign.config import LoraTable
from coalign.models import fused_head, logprobs
from coalign.models.fused_head import fused_logps
from coalign.models.logprobs import Batch, sum_by_response, token_logps
from coalign.models.lora import attach_lora
from coalign.training.micro_batches import Item, collate
from numerics.tiny import FAMILIES, VOCABULARY, network, plain_logps, random_items


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
    batch = collate(items, pad_id=0, shared_prefix=False)
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

    batch = collate(random_items(4), 0, False)
    with torch.no_grad():
        assert torch.allclose(token_logps(AllPositions(), batch), token_logps(network("llama"), batch), atol=1e-12)


def test_log_probs_of_bfloat16_weights_are_float32() -> None:
    """The softmax of a bfloat16 model runs in float32, so that small differences survive."""
    batch = collate(random_items(3), 0, False)
    with torch.no_grad():
        logp_N = token_logps(network("llama", torch.bfloat16), batch)
        exact_N = token_logps(network("llama", torch.float32), batch)
    assert logp_N.dtype is torch.float32
    assert float((logp_N - exact_N).abs().mean()) < 0.1


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no block hold more than 7 of the 64 words, so that the last one is short."""
    monkeypatch.setattr(fused_head, "BLOCK_LOGITS_CPU", 1)
    monkeypatch.setattr(fused_head, "MIN_COLUMNS", 7)
    yield


def fused(model: Any) -> bool:
    """Return whether token_logps has found that this model's head can compute log-probs itself."""
    return logprobs._returned_unchanged.get(model.get_output_embeddings(), False)


def gradients(model: Any, logps: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return log-probs and the gradients of a sum that weighs each of them differently."""
    model.zero_grad()
    logp_N = logps(model, batch)
    (logp_N * torch.linspace(0.2, 1.7, len(logp_N), dtype=logp_N.dtype)).sum().backward()
    return logp_N.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [*FAMILIES, "tied", "lora", "lora on a tied head"])
@pytest.mark.usefixtures("small_blocks")
def test_the_fused_head_equals_the_full_softmax(shape: str, dtype: torch.dtype, tolerance: float, shared: bool) -> None:
    """Values and gradients of every weight: tied or not, with a bias (Phi), with adapters."""
    model = network(shape if shape in FAMILIES else "llama", dtype, tie_word_embeddings="tied" in shape)
    if "lora" in shape:
        model = attach_lora(model, LoraTable(enabled=True, rank=2, alpha=4.0)).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    batch = collate(random_items(7), 0, shared)
    found, expected = gradients(model, token_logps, batch), gradients(model, plain_logps, batch)
    assert fused(model)
    assert torch.allclose(found[0], expected[0], rtol=0, atol=tolerance)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 3
    for name, gradient in expected[1].items():
        scale = 1.0 if dtype is torch.float64 else 1.0 + float(gradient.abs().max())
        assert torch.allclose(found[1][name], gradient, rtol=0, atol=tolerance * scale), name


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_logits_that_change_after_the_head_are_taken_as_they_are(family: str) -> None:
    """A model that caps or scales its logits is noticed, and its log-probs are those of what it returns."""
    model = network(family, torch.float32)
    batch = collate(random_items(7), 0, False)
    found, expected = gradients(model, token_logps, batch), gradients(model, plain_logps, batch)
    assert not fused(model)
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-5)
    assert all(torch.allclose(found[1][n], g, rtol=1e-5, atol=1e-5) for n, g in expected[1].items())


class LargestLogits(TorchDispatchMode):
    """Notes the most elements of any tensor whose rows are as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim > 1 and out.shape[-1] == self.width and out.shape[0] != 32:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.usefixtures("small_blocks")
def test_the_logits_never_exist_in_full() -> None:
    """No tensor of either pass spans the vocabulary, while the slow twin's do."""
    model = network("llama", torch.float32, vocab_size=VOCABULARY + 1)
    batch = collate(random_items(7), 0, False)
    token_logps(model, batch)
    sizes = []
    for logps in (token_logps, plain_logps):
        with LargestLogits(VOCABULARY + 1) as seen:
            gradients(model, logps, batch)
        sizes.append(seen.most)
    assert sizes[0] == 0 and sizes[1] >= batch.input_ids_BT.numel() * (VOCABULARY + 1)


def test_the_head_stays_a_module_that_is_called() -> None:
    """Hooks of the head run, as ZeRO-3 needs to gather its weights, and afterwards it computes logits again."""
    model, batch = network("llama"), collate(random_items(3), 0, False)
    calls: list[torch.Size] = []
    token_logps(model, batch)
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    token_logps(model, batch)
    assert calls == [(1, len(batch.target_N), 1)] and "forward" not in vars(model.lm_head)
    assert model(input_ids=batch.input_ids_BT).logits.shape[-1] == VOCABULARY


def test_one_position_may_predict_several_tokens() -> None:
    """fused_logps adds up the gradients of tokens that share a position, also when two of them are equal."""
    hidden_UD = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(11, dtype=torch.float64, requires_grad=True)
    row_N, target_N = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([4, 10, 4, 0, 1])

    def logps(hidden_UD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor) -> torch.Tensor:
        return fused_logps(hidden_UD, weight_VD, bias_V, row_N, target_N)

    expected_N = (hidden_UD @ weight_VD.t() + bias_V).log_softmax(-1)[row_N, target_N]
    assert torch.allclose(logps(hidden_UD, weight_VD, bias_V), expected_N, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(logps, (hidden_UD, weight_VD, bias_V))


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [0, 100_000, 2**27])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_compiled_blocks_equal_the_full_softmax_on_a_gpu(
    dtype: torch.dtype, tolerance: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and both gradients, several blocks, none, some or all of them kept; a position with two targets."""
    monkeypatch.setattr(fused_head, "BLOCK_LOGITS_GPU", 30_000)
    monkeypatch.setattr(fused_head, "KEPT_LOGITS_GPU", kept)
    for positions, vocabulary in ((40, 3000), (77, 5001), (1, 700)):
        torch.manual_seed(positions)
        hidden_UD = torch.randn(positions, 64, device="cuda").to(dtype)
        weight_VD = (torch.randn(vocabulary, 64, device="cuda") / 2).to(dtype)
        row_N = torch.cat([torch.arange(positions), torch.zeros(3, dtype=torch.long)]).cuda()
        target_N = torch.randint(vocabulary, (positions + 3,), device="cuda")
        target_N[-1] = target_N[-2]  # twice the same place
        weights_N = torch.randn(len(row_N), device="cuda")

        def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            logits = (hidden @ weight.t()).to(dtype).double()
            return logits.log_softmax(-1)[row_N, target_N]  # noqa: B023

        found = []
        for wide in (False, True):
            hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden_UD, weight_VD))
            logp_N = plain(hidden, weight) if wide else fused_logps(hidden, weight, None, row_N, target_N)
            (logp_N * weights_N).sum().backward()
            found.append((logp_N.detach(), hidden.grad, weight.grad))
            assert hidden.grad is not None and weight.grad is not None
        for a, b in zip(*found, strict=True):
            assert a is not None and b is not None
            assert float((a.double() - b.double()).abs().max()) <= tolerance * (1 + float(b.abs().max()))
