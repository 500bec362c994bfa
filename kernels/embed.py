"""The embedding of tokens: of each its own row of the vocabulary, or an image's feature in that row's place.

    out[t] = features[feature_rows[t]]   where feature_rows[t] >= 0,
             table[ids[t] - first]       elsewhere, where the table holds that id,
             0                           elsewhere

ids: int64 [T]; table: [rows, hidden], the embeddings of the ids [first, first + rows), one rank's part of them;
feature_rows: int64 [T], or None where no token is an image's; features: [I, hidden], or None where another rank has
them, which leaves zero in their place: the sum over the ranks is the embedding -> [T, hidden] of the table's dtype.
Table and features are dense and of one dtype. A row past the features gives zero; nothing outside is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels.checks import check_dense, check_dtype, check_rows, check_shape


def check_inputs(ids: Tensor, table: Tensor, feature_rows: Tensor | None, features: Tensor | None) -> None:
    op = "embed"
    check_shape(op, "ids", ids, (None,))
    check_shape(op, "table", table, (None, None))
    if not table.shape[0]:
        raise ValueError(f"{op}: table has shape {list(table.shape)}, must have a row")
    check_dtype(op, "ids", ids, torch.int64)
    check_rows(op, "ids", ids)
    check_dense(op, "table", table)
    if feature_rows is not None:
        check_shape(op, "feature_rows", feature_rows, (ids.shape[0],))
        check_dtype(op, "feature_rows", feature_rows, torch.int64)
        check_rows(op, "feature_rows", feature_rows)
    if features is not None:
        if feature_rows is None:
            raise ValueError(f"{op}: feature_rows is None, must be int64 [T] where features are given")
        check_shape(op, "features", features, (None, table.shape[1]))
        check_dtype(op, "features", features, table.dtype)
        check_dense(op, "features", features)


def embed_reference(
    ids: Tensor,
    table: Tensor,
    *,
    first: int = 0,
    feature_rows: Tensor | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """Token by token."""
    check_inputs(ids, table, feature_rows, features)
    out = table.new_zeros((ids.shape[0], table.shape[1]))
    rows = [-1] * ids.shape[0] if feature_rows is None else feature_rows.tolist()
    for token, (token_id, row) in enumerate(zip(ids.tolist(), rows, strict=True)):
        if row >= 0:
            if features is not None and row < features.shape[0]:
                out[token] = features[row]
        elif first <= token_id < first + table.shape[0]:
            out[token] = table[token_id - first]
    return out


def embed_torch(
    ids: Tensor,
    table: Tensor,
    *,
    first: int = 0,
    feature_rows: Tensor | None = None,
    features: Tensor | None = None,
) -> Tensor:
    check_inputs(ids, table, feature_rows, features)
    wanted = ids - first if first else ids
    known = wanted.clamp(0, table.shape[0] - 1)
    out, is_zero = table.index_select(0, known), known != wanted
    if feature_rows is not None:
        is_feature = feature_rows >= 0
        if features is None or not features.shape[0]:
            is_zero |= is_feature
        else:
            held = feature_rows.clamp(0, features.shape[0] - 1)
            out = torch.where(is_feature.unsqueeze(1), features.index_select(0, held), out)
            is_zero = torch.where(is_feature, held != feature_rows, is_zero)
    return out.masked_fill_(is_zero.unsqueeze(1), 0)
