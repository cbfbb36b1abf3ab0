"""Itemsets: what is often found together, and how much of it there can be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import UserError

MOST = 200_000
"""How many itemsets are mined at most."""
Itemsets = dict[frozenset[str], int]
"""Sets of items, and how many transactions have all of it."""


class TooMany(UserError):
    """There would be too many itemsets."""


def frequent(transactions: Sequence[frozenset[str]], threshold: int, size: int) -> Itemsets:
    """All itemsets of 1 to `size` items that are in at least `threshold` of the transactions, with how many these are; by FP-growth."""
    counts = {item: count for item, count in Counter(item for each in transactions for item in each).items() if count >= threshold}
    if size == 1 or not counts:
        return {frozenset([item]): count for item, count in counts.items()}
    try:
        from mlxtend.frequent_patterns import fpgrowth
        from pandas import DataFrame
    except ImportError:
        raise UserError("mirage needs mlxtend, which mines itemsets: pip install 'stillhouse[graphs]'") from None
    items = sorted(counts)
    total = len(transactions)
    table = fpgrowth(DataFrame(presence(transactions, items).bool().numpy()), min_support=(threshold - 0.5) / total, max_len=size)
    return {
        frozenset(items[column] for column in columns): round(share * total)
        for columns, share in zip(table["itemsets"], table["support"], strict=True)
    }


def presence(transactions: Sequence[frozenset[str]], items: Sequence[str]) -> Tensor:
    """1 where a transaction has an item, else 0: float [transactions, items]."""
    columns = {item: column for column, item in enumerate(items)}
    found = torch.zeros(len(transactions), len(items))
    for row, each in enumerate(transactions):
        found[row, [columns[item] for item in each if item in columns]] = 1
    return found


def at_most(transactions: Sequence[frozenset[str]], threshold: int, size: int) -> float:
    """How many itemsets there can be, from the frequent pairs: as many triples, and so on, as if all of these were of x items.

    (Kruskal and Katona's theorem, in Lovász's form: with C(x, 2) sets of two there are at most C(x, k) sets of k.)
    """
    counts = Counter(item for each in transactions for item in each)
    items = [item for item, count in counts.items() if count >= threshold]
    if size == 1 or len(items) > 5000:
        return len(items) if size == 1 else math.inf
    table = presence(transactions, items)
    pairs = int(((table.T @ table).triu(1) >= max(threshold, 1)).sum())
    x = (1 + math.sqrt(1 + 8 * pairs)) / 2
    return len(items) + sum(math.prod((x - i) / (i + 1) for i in range(k)) for k in range(2, min(size, math.floor(x) + 1) + 1))
