"""The tier of clusterkv's rows: it is made whole or refused in words. Without a model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from zoomr_local.cluster_cache import HeadTier
from zoomr_local.errors import StorageError

STORE = SimpleNamespace(n_head_kv=2, cell_bytes=16)


def none_left(*_):
    raise MemoryError


@pytest.mark.parametrize("array", ["empty", "zeros"])
def test_a_tier_that_the_machine_has_no_memory_for_is_refused_in_words(monkeypatch, array):
    monkeypatch.setattr(np, array, none_left)
    with pytest.raises(StorageError, match="no memory for --kv-ram: 3.12 KiB are needed; lower -n"):
        HeadTier(STORE, [1], 100, 3200)


def test_a_tier_that_may_become_too_large_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(np, "empty", none_left)
    with pytest.raises(StorageError, match="give --kv-ram that much, or a smaller -n"):
        HeadTier(STORE, [1], 100, 3199)
