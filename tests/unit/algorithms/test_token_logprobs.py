"""The chunked head against the plain one: values, gradients, memory, and a weight that comes and goes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapo_ray.algorithms.token_logprobs import default_chunk_tokens, token_logprobs

N, H, V = 37, 16, 501


def inputs(dtype: torch.dtype, *, tokens: int = N, vocabulary: int = V) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets, gradient of the log-probs; logits have a deviation of about 1."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = (0.25 * torch.randn(vocabulary, H, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    outer = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, outer


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits in the dtype of the inputs, softmax in float32 (float64 for float64), everything at once."""
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(-1)


def gradients(logp: Tensor, outer: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((logp * outer.to(logp.dtype)).sum(), (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, N, 1000, None])
def test_float32_agrees_with_the_plain_head_to_1e_6(chunk: int | None, temperature: float) -> None:
    hidden, weight, targets, outer = inputs(torch.float32)
    got = token_logprobs(hidden, weight, targets, temperature, chunk)
    logp, entropy = naive(hidden, weight, targets, temperature)
    assert got.logp.dtype is torch.float32
    torch.testing.assert_close(got.logp, logp, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.entropy, entropy, rtol=0, atol=2e-6)
    for ours, plain in zip(
        gradients(got.logp, outer, hidden, weight), gradients(logp, outer, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_temperature_0_7_is_not_temperature_1() -> None:
    hidden, weight, targets, _ = inputs(torch.float64)
    logits = hidden @ weight.t()
    at_target = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    expected = at_target / 0.7 - torch.logsumexp(logits / 0.7, dim=1)
    torch.testing.assert_close(token_logprobs(hidden, weight, targets, 0.7, 5).logp, expected)
    assert (token_logprobs(hidden, weight, targets, 1.0, 5).logp - expected).abs().max() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_pass_gradcheck_in_float64(temperature: float) -> None:
    hidden, weight, targets, _ = inputs(torch.float64, tokens=5, vocabulary=11)

    def logp(h: Tensor, w: Tensor) -> Tensor:
        return token_logprobs(h, w, targets, temperature, 2).logp

    assert torch.autograd.gradcheck(logp, (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_errs_no_more_than_the_plain_head_and_a_half(temperature: float) -> None:
    hidden, weight, targets, outer = inputs(torch.bfloat16)
    exact_inputs = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    exact = naive(*exact_inputs, targets, temperature)[0]
    got = token_logprobs(hidden, weight, targets, temperature, 5).logp
    plain = naive(hidden, weight, targets, temperature)[0]
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, plain, rtol=0, atol=2e-6)
    for ours, theirs, truth in zip(
        gradients(got, outer, hidden, weight),
        gradients(plain, outer, hidden, weight),
        gradients(exact, outer, *exact_inputs),
        strict=True,
    ):
        assert ours.dtype is torch.bfloat16
        # Products with a block of the vocabulary are rounded to bfloat16 each, though summed in float32.
        assert (ours.double() - truth).norm() <= 1.5 * (theirs.double() - truth).norm()


def test_a_uniform_distribution_has_entropy_log_v_without_gradient() -> None:
    hidden, _, targets, _ = inputs(torch.float32)
    got = token_logprobs(hidden, torch.zeros(V, H), targets, 1.0, 5)
    assert got.entropy.tolist() == pytest.approx([math.log(V)] * N, rel=1e-6)
    assert not got.entropy.requires_grad
    assert got.logp.tolist() == pytest.approx([-math.log(V)] * N, rel=1e-6)


def test_logits_of_10000_overflow_nothing() -> None:
    hidden = torch.full((2, 1), 100.0, requires_grad=True)
    weight = torch.tensor([[100.0], [99.99], [-100.0]], requires_grad=True)
    got = token_logprobs(hidden, weight, torch.tensor([0, 2]), 1.0)
    expected = [-math.log1p(math.exp(-1.0)), -20000 - math.log1p(math.exp(-1.0))]
    assert got.logp.tolist() == pytest.approx(expected, rel=1e-3)
    for gradient in torch.autograd.grad(got.logp.sum(), (hidden, weight)):
        assert torch.isfinite(gradient).all()


def test_a_weight_that_is_released_after_forward_and_back_before_backward_gets_its_gradient() -> None:
    """As ZeRO-3 does: between forward and backward the parameter's data is an empty tensor."""
    hidden, weight, targets, outer = inputs(torch.float64)
    expected = gradients(naive(hidden, weight, targets, 0.7)[0], outer, hidden, weight)
    parameter = torch.nn.Parameter(weight.detach().clone())
    whole = parameter.data
    logp = token_logprobs(hidden, parameter, targets, 0.7, 5).logp
    parameter.data = torch.empty(0, dtype=torch.float64)
    assert logp.grad_fn is not None
    saved = logp.grad_fn.saved_tensors  # type: ignore[attr-defined]
    assert any(tensor is parameter for tensor in saved), "backward must see the parameter itself, not a copy"
    parameter.data = whole
    for got, want in zip(gradients(logp, outer, hidden, parameter), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("train_hidden", "train_weight"), [(True, False), (False, True)])
def test_only_what_is_trained_gets_a_gradient(train_hidden: bool, train_weight: bool) -> None:
    hidden, weight, targets, outer = inputs(torch.float64)
    expected = gradients(naive(hidden, weight, targets, 1.0)[0], outer, hidden, weight)
    h = hidden.detach().requires_grad_(train_hidden)
    w = weight.detach().requires_grad_(train_weight)
    (token_logprobs(h, w, targets, 1.0, 5).logp * outer).sum().backward()
    for tensor, want in ((h, expected[0]), (w, expected[1])):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, want)
        else:
            assert tensor.grad is None


def test_tied_weights_add_up_both_gradients() -> None:
    _, weight, targets, outer = inputs(torch.float64)
    tokens = torch.arange(N)
    results = []
    for head in (lambda *a: token_logprobs(*a, 5)[0], lambda *a: naive(*a)[0]):
        tied = weight.detach().clone().requires_grad_()
        (head(tied[tokens], tied, targets, 0.7) * outer).sum().backward()
        results.append(tied.grad)
    torch.testing.assert_close(results[0], results[1])


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_as_large_as_a_tenth_of_the_logits_ever_exists() -> None:
    tokens, vocabulary = 512, 50_000
    hidden, weight, targets, outer = inputs(torch.float32, tokens=tokens, vocabulary=vocabulary)
    with LargestTensor() as ours:
        gradients(token_logprobs(hidden, weight, targets, 1.0).logp, outer, hidden, weight)
    with LargestTensor() as plain:
        gradients(naive(hidden, weight, targets, 1.0)[0], outer, hidden, weight)
    assert plain.elements == tokens * vocabulary
    assert 0 < ours.elements < tokens * vocabulary / 10


@given(st.integers(0, 100_000), st.integers(1, 300_000))
def test_the_chosen_block_is_a_32nd_of_the_logits_or_8_mb(tokens: int, vocabulary: int) -> None:
    chunk = default_chunk_tokens(tokens, vocabulary)
    assert 1 <= chunk <= max(tokens, 1)
    assert chunk * vocabulary <= max(math.ceil(tokens / 32) * vocabulary, 1 << 21, vocabulary)


def test_no_tokens_give_no_log_probs_and_no_gradient() -> None:
    hidden, weight, targets, _ = inputs(torch.float32, tokens=0)
    got = token_logprobs(hidden, weight, targets, 1.0)
    assert got.logp.shape == (0,)
    got.logp.sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()
