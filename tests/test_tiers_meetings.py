"""Rare meetings of faults, full tiers and saves, in the middle of a generation: the harness of `test_tiers_faults.py`."""

import os

import numpy as np
import pytest
import test_tiers_faults
from test_tiers_faults import of, run, thoughts

from zoomr_local.checkpoint import Checkpoint
from zoomr_local.errors import StorageError
from zoomr_local.events import BlockLost, Warned
from zoomr_local.policies.base import Selection
from zoomr_local.tiers import Fault, PageStore


def test_a_winner_whose_page_is_lost_while_others_are_fetched_stays_out(tmp_path, monkeypatch):
    """As where closing gaps for a later one shows that its file could not be written."""
    fetch, lost = PageStore.read_ahead, []

    def read_ahead(store, key):
        n = fetch(store, key)
        others = [other for other in store._pinned - {key} if other in store and store.at_hand(other)]
        if others and not lost:
            lost.append(others[0])
            store._fail("write", store._pages[others[0]], OSError(28, os.strerror(28)), lost=True)
        return n

    monkeypatch.setattr(PageStore, "read_ahead", read_ahead)
    g, events = run(tmp_path, wait_for_disk=True)
    assert events[-1].reason == "stop" and [(e.blocks[0], e.part) for e in of(BlockLost, events)] == lost and lost


def test_a_block_whose_page_was_lost_and_stored_anew_is_not_lost(tmp_path):
    g, events = run(tmp_path, watch=lambda g, events: None)
    key = g.cache.store.keys()[0]
    g.cache.store._faults.append(Fault("write", key, "no space", tmp_path / "page", lost=True))
    (said,) = g.cache.flush()
    assert isinstance(said, Warned) and "stays in RAM" in said.message
    assert g.cache.lost_blocks == 0 and g.cache.available().all()
    g.cache.store.close()


def test_a_block_in_cells_whose_page_is_lost_is_stored_anew_when_it_leaves_them(tmp_path):
    g, events = run(tmp_path, watch=lambda g, events: None)
    cache, store = g.cache, g.cache.store
    block = next(b for b in np.flatnonzero(cache._in["detail"]).tolist() if (b, "detail") in store)
    store._fail("write", store._pages[(block, "detail")], OSError(28, os.strerror(28)), lost=True)
    (said,) = cache.flush()
    assert isinstance(said, Warned) and (block, "detail") not in store
    assert cache.lost_blocks == 0 and cache.available().all()
    n = len(cache.available())
    moved = list(cache.apply(Selection(np.zeros(n, bool), cache._in["summary"][:n].copy())))
    assert not of(BlockLost, moved) and (block, "detail") in store and not cache._in["detail"][block]
    store.close()


def test_an_error_comes_through_where_every_event_is_a_checkpoint(tmp_path):
    """The events of the step that fails are told first; a save at one of them must not hide why it failed."""
    said = []
    checkpoint = Checkpoint(tmp_path / "ck", {}, 0.0, said.append, said.append)

    class Saving:
        def save(self, path, note):
            self.g.settle()
            self.g.state()

    def watch(g, events):
        Saving.g = g
        checkpoint.tick(Saving(), [])

    with pytest.raises(StorageError, match="are full"):
        run(tmp_path, 8192, 0, on_full="error", watch=watch)
    assert len(said) == 1 and "middle of a step, so its state is not whole; nothing is saved" in said[0]


def test_a_page_that_fits_in_no_case_costs_no_other_its_room(tmp_path, monkeypatch):
    """One thought of more than 64 tokens among those of 30, and an arena that is smaller than its page."""
    plain = thoughts
    monkeypatch.setattr(test_tiers_faults, "thoughts", lambda n: plain(5) + plain(1, length=100) + plain(n - 6))
    around = []

    def watch(g, events):
        put = g.cache._put

        def watched(key, *more):
            before = g.cache.store.keys()
            stored = put(key, *more)
            if key == (5, "detail"):
                around.append((before, g.cache.store.keys(), stored))
            return stored

        if len(events) == 1:
            g.cache._put = watched

    g, events = run(tmp_path, 1024, 0, policy="sumr", watch=watch)
    ((before, after, stored),) = around
    assert before == after and [part for _, part in before].count("detail") and stored == 0
    assert [e.part for e in of(BlockLost, events) if e.blocks == (5,)][0] == "detail" and events[-1].reason == "stop"
    g.cache.store.close()
