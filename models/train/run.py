"""The training loop: `python -m models.train.run models/train/tiny.toml OUT`.

Owned by models/train; a command, and what `breadcrumbs.py` is built on. Resumes from OUT/checkpoint.pt when it
is there; writes OUT/log.jsonl (one object every few steps) and OUT/loss.png at the end. `--start FILE` begins
with the weights of another run's checkpoint or exported file instead of new ones; the optimisers begin anew.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch

from ..export import load_network
from . import side_by_side
from .batches import task_batch
from .gathering import look_loss, repair_loss
from .held import Readers, held_loss
from .looks import MAKES
from .losses import index_loss, token_loss
from .network import Network, mimetic_init
from .optimizer import make_optimizers
from .recall import beacon_echo_batch, beacon_recall_batch, reading_batch, recall_batch
from .recipe import Recipe, Stage, load_recipe

_SAVE_EVERY = 120.0  # seconds of training between checkpoints
_LOG_EVERY = 10  # steps


class Learner:
    """A network that learns: its running average, and its optimisers with their full rates."""

    def __init__(self, net: Network, optimizers: list[torch.optim.Optimizer], rates: tuple[float, ...]) -> None:
        self.net, self.optimizers, self.rates = net, optimizers, rates
        self.average = Network(net.shape)
        self.average.load_state_dict(net.state_dict())

    def state(self) -> dict:
        """What a checkpoint holds of it."""
        return {
            "net": self.net.state_dict(), "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers], "shape": self.net.shape.__dict__,
        }  # fmt: skip

    def load(self, state: dict) -> None:
        """Take over what ``state`` returned."""
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        for o, s in zip(self.optimizers, state["optimizers"], strict=True):
            o.load_state_dict(s)

    def scale_rates(self, factor: float) -> None:
        """Set every optimiser to ``factor`` times its full rate."""
        for o, lr in zip(self.optimizers, self.rates, strict=True):
            for group in o.param_groups:
                group["lr"] = lr * factor

    def update(self, keep: float) -> None:
        """One step of the optimisers on the gradients there are; ``keep`` is the share of the old average that stays."""
        side_by_side.average_gradients(self.net)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for o in self.optimizers:
            o.step()
            o.zero_grad()
        with torch.no_grad():
            mine, theirs = list(self.average.parameters()), list(self.net.parameters())
            torch._foreach_lerp_(mine, theirs, 1 - keep)


class Run(Learner):
    """A run in progress: the network that ships, and counters."""

    readers: Readers | None = None
    """Of a run whose network has beacons (`breadcrumbs.py`)."""

    def __init__(self, recipe: Recipe, out: Path, start: Network | None = None) -> None:
        """Begins as ``start``, or anew if it is None. Raises ValueError for a start of another shape."""
        net = Network(recipe.shape)
        if start is None:
            mimetic_init(net, recipe.seed)
        elif start.shape != recipe.shape:
            raise ValueError(f"the start is {start.shape}, but the recipe needs {recipe.shape}")
        else:
            net.load_state_dict(start.state_dict())
        super().__init__(net, make_optimizers(net, recipe.lr, recipe.embedding_lr), (recipe.lr, recipe.embedding_lr))
        self.recipe, self.out = recipe, out
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def save(self, name: str = "checkpoint", state: dict | None = None) -> None:
        """Write OUT/NAME.pt whole, then move it into place: ``state``, or what the run is, with the counters."""
        counters = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "recipe": self.recipe.name}
        part = self.out / f"{name}.part"
        torch.save({**(state or self.state()), **counters}, part)
        os.replace(part, self.out / f"{name}.pt")

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one. Raises ValueError for one of another recipe, or of none."""
        path = self.out / "checkpoint.pt"
        if path.exists():
            state = load_network(path)[1]
            if state["recipe"] != self.recipe.name:
                raise ValueError(f"{self.out} holds a run of {state['recipe']!r} and the recipe is {self.recipe.name!r}; give another folder")
            self.load(state)
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        r = self.recipe
        return self.step / r.steps if r.steps else self.seconds / (60 * r.minutes)

    def set_rate(self) -> float:
        """Linear warm-up, then linear decay to 0 if the recipe has it; returns the factor."""
        factor = min(1.0, (self.step + 1) / self.recipe.warmup)
        if self.recipe.decay:
            factor *= max(0.0, 1 - self.progress)
        self.scale_rates(factor)
        return factor


def _looking(recipe: Recipe) -> int:
    """How many layers gather what beacons replace, so that their attention is supervised."""
    return recipe.breadcrumbs.layers if recipe.breadcrumbs else 0


def _recall_step(run: Run, stage: Stage, rng: Random, every: int) -> dict:
    pairs = rng.randint(3, max(4, min(stage.recall_pairs, 4 + run.step // 4)))
    if every:
        right, said = _beacon_drill(run, beacon_recall_batch(rng, stage.recall_tokens, pairs, every), every)
        return {"recall": right, **said}
    ids, weights = map(torch.from_numpy, recall_batch(rng, stage.recall_tokens, pairs))
    hidden, _ = run.net(ids)
    loss, right = token_loss(run.net, hidden, ids, weights)
    (run.recipe.recall_weight * loss).backward()
    return {"recall": (right * weights).sum().item() / weights.sum().item()}


def _beacon_drill(run: Run, made: tuple, every: int) -> tuple[float, dict]:
    """The gradient of a drill under beacons, as `recall.py` makes them: the share that is right, and what the log says of looks."""
    ids, weights, mask, sources, looks = map(torch.from_numpy, made)
    layers = _looking(run.recipe)
    states: dict[int, torch.Tensor] = {}
    hidden, taps = run.net(ids, mask, tuple(range(1, layers + 2)) if layers else (), states=states)
    loss, right = token_loss(run.net, hidden, ids, weights, sources)
    said: dict = {}
    if layers:
        more, said = _beacon_losses(run, taps, states, ids, mask, looks, every)
        loss = loss + more
    (run.recipe.recall_weight * loss).backward()
    return (right * weights).sum().item() / weights.sum().item(), said


def _beacon_losses(
    run: Run, taps: dict, states: dict[int, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor, looks: torch.Tensor, every: int
) -> tuple[torch.Tensor, dict]:
    """Where the layers that gather look, and what a beacon holds before the last of them; and what the log says of it."""
    crumbs = run.recipe.breadcrumbs
    looking, best = look_loss(taps, looks, mask, crumbs.layers)
    loss, said = crumbs.look_weight * looking, {"looks": [round(x, 3) for x in best]}
    if crumbs.held_weight:
        held, read = held_loss(run.readers, states[crumbs.layers - 1], run.net.embedding.weight, ids, every)
        loss, said = loss + crumbs.held_weight * held, said | {"held": read}
    return loss, said


_LONG_PROMPTS = ("dag", "ledger", "linsys")


def _reading_step(run: Run, stage: Stage, rng: Random, turn: int) -> float:
    families = [f for f in _LONG_PROMPTS if f in stage.thoughts]
    family = families[turn % len(families)]
    ids, weights, positions = map(torch.from_numpy, reading_batch(rng, family, stage.thoughts[family][1], stage.reading_tokens))
    hidden, _ = run.net(ids, positions=positions)
    loss, right = token_loss(run.net, hidden, ids, weights)
    (run.recipe.recall_weight * loss).backward()
    return (right * weights).sum().item() / weights.sum().item()


def train_step(run: Run, rng: Random) -> dict:
    """One optimiser step; returns what the log says of it."""
    recipe, stage = run.recipe, run.recipe.stage(run.progress)
    turn = run.step * side_by_side.count() + side_by_side.rank()
    family = sorted(stage.thoughts)[turn % len(stage.thoughts)]
    masked = rng.random() < stage.masked
    thoughts = rng.randint(*stage.thoughts[family])
    every = rng.choice(recipe.beacon_every) if recipe.style == "beacons" else 0
    batch = task_batch(
        rng, family, thoughts, recipe.tokens, masked, recipe.style, every, recipe.summary_rows, recipe.extra_zooms
    )  # fmt: skip
    ids, weights, mask, positions, sources = (
        torch.from_numpy(x) for x in (batch.ids, batch.weights, batch.mask, batch.positions, batch.sources)
    )
    supervised = recipe.index_layers if recipe.style == "zoomr" else ()
    layers = _looking(recipe) if len(batch.looks) else 0
    states: dict[int, torch.Tensor] = {}
    hidden, taps = run.net(ids, mask, supervised or (tuple(range(1, layers + 2)) if layers else ()), positions, states)
    loss, right = token_loss(run.net, hidden, ids, weights, sources)
    parts = [index_loss(*taps[i], batch) for i in supervised]
    index = sum((p[0] for p in parts), torch.zeros(())) / max(1, len(parts))
    told = weights > 0
    extra, more = torch.zeros(()), {}
    if layers:
        looks = torch.from_numpy(batch.looks)
        repair = repair_loss(run.net, states[layers], ids, told, looks, layers)
        extra, said = _beacon_losses(run, taps, states, ids, mask, looks, every)
        extra = extra + recipe.breadcrumbs.repair_weight * repair
        sums = told & (ids.gather(1, sources) == MAKES)
        more = {f"trace_{name}": value for name, value in said.items()}
        more |= {"repair": repair.item(), "sums": right[sums].float().mean().item() if sums.any() else None}
    (loss + stage.index_weight * index + extra).backward()
    report = {
        "family": family, "masked": masked, "T": ids.shape[1], "loss": loss.item(),
        "accuracy": right[told].float().mean().item(),
        "lookup": right[torch.from_numpy(batch.lookup)].float().mean().item(),
        "index": index.item(), "hit": [round(p[1], 3) for p in parts],
    }  # fmt: skip
    if every:
        report |= {"beacon_every": every, **more}
    if stage.recall_tokens:
        report |= _recall_step(run, stage, rng, every)
    if stage.echo_tokens and every:
        report["echo"] = _beacon_drill(run, beacon_echo_batch(rng, family, thoughts, stage.echo_tokens, every), every)[0]
    if stage.reading_tokens:
        report["reading"] = _reading_step(run, stage, rng, turn)
    run.update(min(recipe.average, run.step / (run.step + 10)))
    run.tokens += batch.ids.size * side_by_side.count()  # rows are cut to about the same number in every process
    return report


def _forget_after(log: Path, step: int) -> None:
    """Cut the log after ``step``: a run that was stopped takes the steps since its checkpoint once more. A torn last line goes too."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
    if kept != lines:
        part = log.with_suffix(".part")
        part.write_text("".join(kept))
        os.replace(part, log)


def loop(run: Run, take_step: Callable[[Run, Random], dict], logs: Callable[[int], bool]) -> None:
    """Take steps to the end of the recipe, saving on the way and logging the steps for which ``logs`` is true."""
    run.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(run.recipe.threads)
    torch.set_flush_denormal(True)  # a peaked attention makes many in its backward, and they are slow (models/LOG.md)
    saved, first = run.seconds, side_by_side.rank() == 0
    if first:
        _forget_after(run.out / "log.jsonl", run.step)
    with open(run.out / "log.jsonl" if first else os.devnull, "a") as log:
        while run.progress < 1:
            began = time.perf_counter()
            factor = run.set_rate()
            report = take_step(run, Random(f"{run.recipe.seed}/{run.step}" + (f"/{side_by_side.rank()}" if not first else "")))
            run.seconds = side_by_side.agreed(run.seconds + time.perf_counter() - began)
            run.step += 1
            if logs(run.step):
                head = {"step": run.step, "tokens": run.tokens, "minutes": run.seconds / 60}
                for one in side_by_side.gathered(report):
                    line = {**head, "rate": factor, **one}
                    line = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
                    log.write(json.dumps(line) + "\n")
                log.flush()
            if first and run.seconds - saved > _SAVE_EVERY:
                run.save()
                saved = run.seconds
    if first:
        run.save()


def train(recipe: Recipe, out: Path, start: Network | None = None) -> None:
    """Train to the end of the recipe, from ``start`` if there is no checkpoint, and draw its losses."""
    side_by_side.start(recipe.processes, _train, recipe, out, start)
    plot(out)


def _train(recipe: Recipe, out: Path, start: Network | None) -> None:
    run = Run(recipe, out, start)
    run.resume()
    loop(run, train_step, lambda step: step % _LOG_EVERY < 4)


def plot(out: Path) -> None:
    """Draw OUT/loss.png from OUT/log.jsonl: token loss and index loss against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for family in sorted({x["family"] for x in lines}):
        for masked, style in ((False, "-"), (True, ":")):
            mine = [x for x in lines if x["family"] == family and x["masked"] == masked]
            name = f"{family}, {'ZoomR mask' if masked else 'full'}"
            axes.plot([x["tokens"] / 1e6 for x in mine], [x["loss"] for x in mine], style, label=name)
    axes.plot(
        [x["tokens"] / 1e6 for x in lines], [x["index"] for x in lines], color="grey", lw=0.6,
        label="index loss",
    )  # fmt: skip
    axes.set(xlabel="task tokens, millions", ylabel="loss, nats per token", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="network to begin with, a checkpoint or a GGUF file")
    args = parser.parse_args(arguments)
    for path in (args.recipe, args.start):
        if path and not path.is_file():
            parser.error(f"there is no file {path}")
    try:
        recipe = load_recipe(args.recipe)
        if recipe.breadcrumbs:
            raise ValueError(f"{args.recipe} is a recipe of Breadcrumbs: python -m models.train.breadcrumbs {args.recipe} {args.out}")
        start = load_network(args.start)[0] if args.start else None
        Run(recipe, args.out, start).resume()  # what does not fit is said before any process is started
    except (ValueError, OSError) as error:
        parser.error(str(error))
    train(recipe, args.out, start)


if __name__ == "__main__":
    main()
