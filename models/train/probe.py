"""Teacher-forced accuracy of a checkpoint: `python -m models.train.probe CHECKPOINT -n 10`.

Owned by models/train; called by hand and by the ablations. It is quick, so it is for watching a run and for finding what goes wrong;
accuracy is what `zoomr eval` measures by the real engine. Each dev problem's reference trace is read once under each of three masks:

- full: everything before a token is in view;
- zoomr: prompt, summaries, the open thought, the last 48 positions, and from its naming on each thought that the open one needs: what
  the runtime would show if its selection were always right;
- sumr: the same without the needed thoughts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .. import tokenizer as tok
from ..export import load_network
from ..tasks import LONG_THOUGHTS, generate
from .batches import SO, Row, make_row
from .network import Network

MASKS = ("full", "zoomr", "sumr")
WINDOW = 48


@dataclass
class Count:
    """What was right: tokens that are told, values that stand two thoughts back or further, whole traces."""

    right: int = 0
    told: int = 0
    far_right: int = 0
    far: int = 0
    exact: int = 0
    traces: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def sight(row: Row, kind: str) -> np.ndarray:
    """bool [T, T]: what each token of the row sees under a mask of ``MASKS``."""
    at = np.arange(len(row.ids))
    causal = at[:, None] >= at
    if kind == "full":
        return causal
    mask = (row.owner < 0) | row.summary | (row.owner[:, None] == row.owner) | (at[:, None] - at < WINDOW)
    if kind == "zoomr":
        for (named, _, _, end), needs in zip(row.spans, row.needs, strict=True):
            for block in needs:
                mask[named + 2 : end + 1, row.owner == block] = True
    return mask & causal


def far_values(row: Row) -> np.ndarray:
    """int [n]: places of looked-up values whose thought is not the one before."""
    made: dict[int, int] = {}  # the name's token: the thought that worked it out
    found = []
    for j, (_, first, last, end) in enumerate(row.spans[:-1]):
        found += [at + 1 for at in (first, last) if made.get(int(row.ids[at - 1]), j) < j - 1]
        inside = np.flatnonzero((row.owner == j) & (row.ids == SO))
        made.update({int(row.ids[at + 1]): j for at in inside})
    return np.array(found, int)


@torch.no_grad()
def measure(net: Network, rows: list[Row], kind: str) -> Count:
    """The counts of ``rows`` under a mask of ``MASKS``."""
    count = Count()
    for row in rows:
        mask = torch.from_numpy(sight(row, kind))[None, None]
        guess = net.logits(net(torch.from_numpy(row.ids)[None], mask)[0][0]).argmax(-1).numpy()
        right = np.append(False, guess[:-1] == row.ids[1:])
        told, far = row.weights > 0, far_values(row)
        count.right += int((right & told).sum())
        count.told += int(told.sum())
        count.far_right += int(right[far].sum())
        count.far += len(far)
        count.exact += bool((right | ~told).all())
        count.traces += 1
        for t in np.flatnonzero(~right & told):
            count.errors[f"{tok.decode(row.ids[t - 4 : t + 1].tolist())!r}, guessed {tok.decode([int(guess[t - 1])])!r}"] += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-n", type=int, default=10, help="problems a family")
    parser.add_argument("--families", default=",".join(LONG_THOUGHTS))
    parser.add_argument("--share", type=float, default=1.0, help="length, of the test sets' thoughts")
    parser.add_argument("--plain", action="store_true", help="a model of plain traces: no summaries, everything in view")
    parser.add_argument("--errors", type=int, default=0, metavar="N", help="also the N most frequent errors under the zoomr mask")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        net, state = load_network(args.checkpoint)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if state:  # a file that was exported has no counters
        print(f"step {state['step']}, {state['tokens'] / 1e6:.2f} million task tokens, {state['seconds'] / 60:.0f} minutes")
    for family in args.families.split(","):
        thoughts = max(1, round(LONG_THOUGHTS[family] * args.share))
        rows = [make_row(p, summaries=not args.plain) for p in generate(family, args.n, 77, thoughts, "dev")]
        for kind in ("full",) if args.plain else MASKS:
            c = measure(net, rows, kind)
            print(f"{family:7} {kind:6} tokens {c.right / c.told:.4f}  far values {c.far_right}/{c.far}  whole traces {c.exact}/{c.traces}", flush=True)
            if kind == "zoomr":
                for text, times in c.errors.most_common(args.errors):
                    print(f"          {times:3} x {text}")


if __name__ == "__main__":
    main()
