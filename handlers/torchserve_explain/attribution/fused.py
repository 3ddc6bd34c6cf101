"""Fused functions opened: the same function made of simpler ones, each of which a rule can reach."""

import types
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchserve_explain.attribution.functions import FunctionCall

# Torch's own body of the function, which else hands the whole call to whoever replaces functions.
_MULTI_HEAD_ATTENTION: Any = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    vars(functional) | {"has_torch_function": lambda _: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(q k^T * scale + mask) v; arXiv:1706.03762, equation 1."""
    weights = torch.matmul(query * (1 / sqrt(query.shape[-1]) if scale is None else scale), _shared(key, query).mT)
    if is_causal:
        attn_mask = torch.ones_like(weights, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    weights = torch.softmax(weights if attn_mask is None else weights + attn_mask, -1)
    return torch.matmul(functional.dropout(weights, dropout_p, training=dropout_p > 0), _shared(value, query))


def _shared(keys: Tensor, query: Tensor) -> Tensor:
    """Return one key or value for each head of the queries, where several heads share it."""
    return keys if keys.shape[:-2] == query.shape[:-2] else keys.repeat_interleave(query.shape[-3] // keys.shape[-3], -3)


def _group_norm(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Return x normalised over groups of channels: a layer norm of each group."""
    grouped = x.reshape(len(x), groups, -1)
    normed = functional.layer_norm(grouped, grouped.shape[2:], eps=eps).reshape(x.shape)
    by_channel = (-1, *(1 for _ in x.shape[2:]))
    normed = normed if weight is None else normed * weight.view(by_channel)
    return normed if bias is None else normed + bias.view(by_channel)


def _add_product(x: Tensor, a: Tensor, b: Tensor, value: float = 1.0) -> Tensor:
    """Return x + value * a * b."""
    return torch.add(x, torch.mul(a, b), alpha=value)


def _opened(body: Any) -> Any:
    return lambda call: _through(call, body)


def _through(call: FunctionCall, body: Any) -> Any:
    with call.replacing:
        return body(*call.args, **call.kwargs)


OPENED = {
    "multi_head_attention_forward": _opened(_MULTI_HEAD_ATTENTION),
    "scaled_dot_product_attention": _opened(_attention),
    "group_norm": _opened(_group_norm),
    "addcmul": _opened(_add_product),
}
