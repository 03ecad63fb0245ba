"""The reference against formulas that share no code with it: no loop over a state, in double."""

import pytest
import torch

from hybrid_kernels import linear_attention, selective_scan

B, T, H, K, V = 1, 9, 2, 3, 4


@pytest.fixture
def rows():
    torch.manual_seed(0)
    q, k = (torch.randn(B, T, H, K, dtype=torch.float64) for _ in range(2))
    return q, k, torch.randn(B, T, H, V, dtype=torch.float64)


def weights(log_decay, shift=0):
    """exp of the sum of log decays over (j, i - shift], as (B, i, j, H, D), 0 for the future."""
    decays = log_decay.exp()
    found = torch.zeros(B, T, T, *decays.shape[2:], dtype=torch.float64)
    for i in range(T):
        for j in range(i + 1 - shift):
            found[:, i, j] = decays[:, j + 1 : i + 1 - shift].prod(1)
    return found


def test_no_decay_is_masked_attention_without_softmax(rows):
    q, k, v = rows
    o, state = linear_attention(q, k, v, output_final_state=True, backend="reference")
    scores = torch.einsum("bihk,bjhk->bijh", q, k) * torch.ones(T, T).tril()[None, :, :, None]
    assert torch.allclose(o, K**-0.5 * torch.einsum("bijh,bjhv->bihv", scores, v))
    assert torch.allclose(state, torch.einsum("bthk,bthv->bhkv", k, v))


def test_vector_decays_on_both_sides(rows):
    q, k, v = rows
    keys, values = -torch.rand_like(k), -torch.rand_like(v)
    o, _ = linear_attention(
        q, k, v, log_decay=keys, value_log_decay=values, scale=1.0, backend="reference"
    )
    expected = torch.einsum(
        "bihk,bjhk,bijhk,bijhv,bjhv->bihv", q, k, weights(keys), weights(values), v
    )
    assert torch.allclose(o, expected)


def test_bonus_reads_before_the_decay(rows):
    q, k, v = rows
    g, u = -torch.rand_like(k), torch.randn(H, K, dtype=torch.float64)
    o, _ = linear_attention(q, k, v, log_decay=g, bonus=u, scale=1.0, backend="reference")
    expected = torch.einsum("bihk,bjhk,bijhk,bjhv->bihv", q, k, weights(g, shift=1), v)
    expected += torch.einsum("bthk,hk,bthk,bthv->bthv", q, u, k, v)
    assert torch.allclose(o, expected)


def test_delta_rule_is_a_product_of_reflections(rows):
    """S_T = sum_t prod_{s>t} (I - beta_s k_s k_s^T) diag(alpha_s) beta_t k_t v_t^T (2510.26692)."""
    q, k, v = rows
    g, beta = -torch.rand_like(k), 2 * torch.rand(B, T, H, dtype=torch.float64)
    _, state = linear_attention(
        q, k, v, log_decay=g, beta=beta, output_final_state=True, backend="reference"
    )
    assert state is not None
    for h in range(H):
        expected = torch.zeros(K, V, dtype=torch.float64)
        for t in range(T):
            term = beta[0, t, h] * torch.outer(k[0, t, h], v[0, t, h])
            for s in range(t + 1, T):
                erase = torch.eye(K) - beta[0, s, h] * torch.outer(k[0, s, h], k[0, s, h])
                term = erase @ torch.diag(g[0, s, h].exp()) @ term
            expected += term
        assert torch.allclose(state[0, h], expected)


def test_writing_the_same_key_twice_replaces_its_value():
    """What the delta rule is for: with beta 1 a unit key answers with the last value written."""
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, 5, 1, 8)
    v = torch.randn(1, 5, 1, 3)
    o, _ = linear_attention(k, k, v, beta=torch.ones(1, 5, 1), scale=1.0, backend="reference")
    assert torch.allclose(o, v, atol=1e-6)


def test_selective_scan_is_a_sum_over_the_past():
    torch.manual_seed(0)
    u, B_, C = torch.randn(B, T, H), torch.randn(B, T, K), torch.randn(B, T, K)
    delta, A = torch.rand(B, T, H), -torch.rand(H, K)
    y, _ = selective_scan(u, delta, A, B_, C, torch.ones(H), backend="reference")
    g = delta[..., None] * A
    expected = torch.einsum(
        "bin,bijdn,bjn,bjd->bid", C.double(), weights(g), B_.double(), (delta * u).double()
    )
    assert torch.allclose(y.double(), expected + u, atol=1e-5)
