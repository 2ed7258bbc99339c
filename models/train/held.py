"""What a beacon must hold: a loss that reads the names and numbers it replaces back from its hidden state.

Owned by models/train; called by the training loop, for beacon networks only. The readers, one matrix for each place before a beacon, exist in
training alone. Without this loss a beacon learned what it is asked for much later, by a sum or a lookup, through every layer between; a linear
probe then found the first number of a sum for 65 % at most (models/LOG.md). Of this the paper says nothing; autoencoding as an aim for
compressed tokens is that of In-Context Autoencoder (arXiv 2307.06945, from memory), which rebuilds all of the text with a decoder.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tokenizer import BEACON
from .looks import NAME_TOKENS, NUMBER_TOKENS

_TOLD = np.array((*NAME_TOKENS, *NUMBER_TOKENS))


class Readers(nn.Module):
    """One matrix [D, D] for each of ``most`` places before a beacon, newest first; ``weight`` float32 [most, D, D]."""

    def __init__(self, width: int, most: int, seed: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(most, width, width, generator=draws) / width**0.5)


def held_places(ids: np.ndarray, most: int) -> np.ndarray:
    """int64 [N, 4]: (row, beacon, place, distance) of every name and number that a beacon replaces, ``most`` places before it or nearer.

    ids int64 [B, T]. What stands further before its next beacon is of the prompt, which stays.
    """
    found = []
    for row, told in enumerate(np.isin(ids, _TOLD)):
        beacons = np.flatnonzero(ids[row] == BEACON)
        places = np.flatnonzero(told)
        after = np.searchsorted(beacons, places)
        places, after = places[after < len(beacons)], after[after < len(beacons)]
        distance = beacons[after] - places
        near = distance <= most
        found.append(np.stack([np.full(near.sum(), row), beacons[after][near], places[near], distance[near]], 1))
    return np.concatenate(found)


def held_loss(readers: Readers, states: Tensor, embedding: Tensor, ids: Tensor, every: int) -> tuple[Tensor, float]:
    """Mean cross-entropy, in nats, of the names and numbers that beacons replace, read from the beacons; and the share that is read right.

    states float32 [B, T, D], hidden states behind a layer; embedding float32 [vocab, D], which takes no gradient; ids int64 [B, T], with a
    beacon after every ``every`` tokens.
    """
    row, beacon, place, distance = torch.from_numpy(held_places(ids.numpy(), every)).T
    if not len(row):
        return torch.zeros(()), 1.0
    order = torch.argsort(distance, stable=True)
    beacons = F.rms_norm(states[row, beacon][order], states.shape[-1:])
    counts = torch.bincount(distance, minlength=every + 1)[1:].tolist()
    read = torch.cat([part @ weight.T for part, weight in zip(beacons.split(counts), readers.weight, strict=False)])
    scores, goal = F.linear(read, embedding.detach()), ids[row, place][order]
    return F.cross_entropy(scores, goal), (scores.argmax(-1) == goal).float().mean().item()
