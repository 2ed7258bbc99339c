"""The drills of the training: what a row asks for can be answered from the row, and nothing else is asked."""

import re
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

try:
    from zoomr_models import tasks, tokenizer
    from zoomr_models.tasks.series import NUMERALS
    from zoomr_models.train import batches, looks, recall
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import tasks, tokenizer
    from models.tasks.series import NUMERALS
    from models.train import batches, looks, recall

IS = tokenizer.encode(" is")[0]

ASKED = {  # what a thought copies, and the sentence of the prompt that has it
    "dag": (r"(?:After|Next) (\w+)(?:, (\w+))?\. Need (\w+) and (\w+)\.", "{made} adds {a} and {b}"),
    "ledger": (r"(?:After (\w+), |Next )(\w+ with \w+)\. Need (\w+) and (\w+)\.", "{made} takes {a} and {b}"),
    "linsys": (r"(?:After|Next) (\w+)(?:, (\w+))?\. Need (\w+) and (\w+)\.", "{made} with {a} and {b}"),
}


@pytest.mark.parametrize("family", sorted(ASKED))
def test_what_a_thought_copies_is_in_the_prompt(family):
    form, sentence = ASKED[family]
    for problem in tasks.generate(family, 3, 5, 9, "dev"):
        given = problem.prompt.split(". ")
        pieces = recall.copied(problem)
        assert len(pieces) == len(problem.thoughts)
        for j, (ids, weights) in enumerate(pieces):
            text = tokenizer.decode(ids)
            first, made, a, b = re.match(form, text).groups()
            told = sentence.format(made=made or first, a=a, b=b)
            whole = f"After {first}, {told}" if j else told
            assert any(s.endswith(whole) for s in given), (whole, problem.prompt)
            for name, value in re.findall(r" (\w+ (?:is|makes)) (\d+)\.", text):
                assert f"{name} {value}" in given
            asked = [tokenizer.decode([i]).strip() for i, w in zip(ids, weights, strict=True) if w]
            assert first not in asked[:1] and {a, b} <= set(asked)
            assert len(ids) == len(weights) and ids[0] == tokenizer.encode("After" if j else "Next")[0]


@pytest.mark.parametrize("family", sorted(ASKED))
def test_a_row_reads_every_sentence_once_and_in_another_order(family):
    ids, weights, positions = recall.reading_batch(Random(3), family, 12, 900)
    assert ids.shape == weights.shape == positions.shape and len(ids) > 1
    assert abs(ids.size - 900) < ids.shape[1]
    for row, told, at in zip(ids, weights, positions, strict=True):
        text = tokenizer.decode(row.tolist())
        prompt = text[text.index("user\n") + 5 : text.index("<|im_end|>")]
        assert tasks.split_of(family, prompt) == "train"
        begun = int(np.flatnonzero(told)[0])
        order = [prompt.index(f"After {name},") for name in re.findall(r"After (\w+),", tokenizer.decode(row[begun:].tolist()))]
        assert len(order) >= 10 and order != sorted(order)
        assert not told[: begun - 2].any() and 0 < told.sum() < len(row) - begun
        assert (np.diff(at) >= 0).all() and at[-1] < 4096 and (np.diff(at[:begun]) == 1).sum() >= begun - 3


def test_the_recall_drill_asks_for_every_key_again():
    ids, weights = recall.recall_batch(Random(0), 200, 6)
    for row, told in zip(ids, weights, strict=True):
        first = {k: v for k, v in row[:24].reshape(6, 4)[:, [0, 2]]}
        asked = np.flatnonzero(told)
        assert len(asked) == 6 and {row[t - 2]: row[t] for t in asked} == first


@pytest.mark.parametrize("every", [4, 8])
def test_the_recall_drill_under_beacons_hides_what_it_asks_for(every):
    """The rows say what the drill says, names that nothing is said of between; of the pair asked for only beacons are in view.

    In each row some pairs are parted by a beacon where they are listed and whole where they are asked, and others the other way round.
    """
    seen_whole = 0
    for seed in range(6):
        ids, weights, mask, sources, _ = recall.beacon_recall_batch(Random(seed), 900, 20, every)
        assert abs(ids.size - 900) < 2 * ids.shape[1]
        for row, told, view, source in zip(ids, weights, mask[:, 0], sources, strict=True):
            beacons = np.flatnonzero(row == tokenizer.BEACON)
            assert beacons[0] == every and (np.diff(beacons) == every + 1).all()
            text = np.flatnonzero(row != tokenizer.BEACON)
            says = [i for i in range(len(text) - 1) if row[text[i + 1]] == IS]
            listed = {row[text[i]]: text[i : i + 3] for i in says[:20]}
            assert len(says) == 40 and len(listed) == 20 and len(text) == 160 + 10 * every
            parted = []
            for asked in (text[i : i + 3] for i in says[20:]):
                first = listed[row[asked[0]]]
                assert (row[asked] == row[first]).all() and told[asked[2]] == 1
                assert source[asked[2]] == asked[1]
                seen_whole += view[asked[1], first[2]]
                parted.append(tuple(np.searchsorted(beacons, p[2]) > np.searchsorted(beacons, p[0]) for p in (first, asked)))
            assert told.sum() == 20 and {(False, True), (True, False)} <= set(parted)
    assert seen_whole <= 2 * every  # a pair listed last may still stand uncompressed when it is asked for first


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_the_echo_drill_counts_what_the_text_before_determines(family):
    """Names, needs and first digits, each as the prompt or the thought's own beginning has it; no first token, no value, no end."""
    batch = recall.beacon_echo_batch(Random(3), family, 14, 900, 8)
    ids, weights, mask, sources, found = batch
    assert mask.shape == (len(ids), 1, ids.shape[1], ids.shape[1]) and mask.any(-1).all() and len(found)
    needs = names = digits = 0
    for row, told, source in zip(ids, weights, sources, strict=True):
        text = np.flatnonzero((row != tokenizer.BEACON) & (row != tokenizer.PAD))
        words, counts = [tokenizer.decode([t]) for t in row[text]], told[text] > 0
        prompt, reply = "".join(words).split("<think>")
        said = int(np.flatnonzero(counts)[0]) - 1
        assert "".join(words[:said]) == f"{prompt}<think>" and mask[0, 0, text[-1], text[:said]].all()
        for i, word in enumerate(words):
            begin = max([j for j in range(said, i) if words[j] == "\n"], default=said - 1) + 1
            kept = i >= said and i > begin and words[i - 1] != " is" and word != "\n"
            assert counts[i] == kept
            if counts[i] and words[i - 1] in (" on", ":"):
                again = words[i - 1] == " on"
                start = words.index(" Need" if again else " is", begin)
                assert word.strip() == (words[start + 1].strip() if again else words[start + 1].strip()[-1])
                names, digits = names + again, digits + (not again)
            if counts[i]:
                assert source[text[i]] == text[i - 1]
        for line in reply.splitlines()[:-1]:
            x, z, a, b = re.match(r"(?:Next|After \w+,) (\w+)(?: with (\w+))?\. Need (\w+) and (\w+)\.", line).groups()
            if family == "series":  # its first term is defined, each later one is as far from what it adds
                first, *added = map(NUMERALS.index, re.search(r" (\w+) adds (\w+) and (\w+)", prompt).groups())
                after = NUMERALS.index(x) - first
                assert [NUMERALS.index(a), NUMERALS.index(b)] == [y + after for y in added]
            else:
                assert re.search(rf" {x}(?: with {z})? (?:adds|takes|with) {a} and {b}\b", prompt)
            needs += 1
    assert min(needs, names) > 10 and digits > 3


def told_and_asked(ids, lookup):
    """Places of (name, is, value): of what the trace works out, and of what it looks up."""
    text = np.flatnonzero(ids != tokenizer.BEACON)
    places = lambda firsts: [text[i : i + 3] for i in firsts]  # noqa: E731
    return places(np.flatnonzero(ids[text] == batches.SO) + 1), places(np.flatnonzero(lookup[text]) - 2)


@pytest.mark.parametrize("every", [4, 8])
def test_a_trace_under_beacons_says_where_its_own_names_and_numbers_stand(every):
    """What a sum, a kept result, a need or a name said again is made of is in view of the place that says it, or it is asked of its beacon."""
    batch = batches.task_batch(Random(2), "linsys", 9, 900, True, "beacons", every)
    near = {tuple(look[1:]) for look in batch.looks.tolist() if look[0] == looks.NEAR}
    sums = names = asked = kept = 0
    for row, ids in enumerate(batch.ids):
        text, mask = np.flatnonzero(ids != tokenizer.BEACON), batch.mask[row, 0]
        words = [tokenizer.decode([t]) for t in ids[text]]
        beacons = np.flatnonzero(ids == tokenizer.BEACON)
        for i, word in enumerate(words):
            needed = []
            if word == " makes" and words[i - 1].strip().isdigit():
                sentence = max(j for j in range(i) if words[j] in (":", "."))
                needed = [(text[i], text[j]) for j in range(sentence + 1, i) if words[j].strip().isdigit()]
                sums += len(needed)
            if word == " now" and beacons[0] < text[i]:
                needed = [(text[i - 2], max(t for t, w in zip(text[: i - 1], words, strict=False) if w == words[i - 1]))]
                names += 1
            if word == " Need" and beacons[0] < text[i]:
                mine = text[i - 2]  # the name that the thought works out
                needed = [(text[i], mine), (text[i + 2], mine), (text[i + 2], text[i + 1])]
                asked += 1
            if word == " Keep":
                needed = [(text[i + 6 + (words[i + 5] == " so")], text[i + j]) for j in (1, 3)]
                kept += 1
            for at, place in needed:
                if not mask[at, place]:
                    beacon = beacons[beacons > place][0]
                    assert (row, at, beacon) in near
    assert sums > 60 and min(names, asked, kept) >= 8


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_a_trace_under_beacons_says_where_its_lookups_stand(family):
    """Each value that a thought worked out is gathered once; what is looked up of it is asked of that beacon, and nowhere else."""
    every = 8
    batch = batches.task_batch(Random(1), family, 28, 900, True, "beacons", every)  # what the first terms of `series` need is in the prompt
    ids, mask = batch.ids, batch.mask[:, 0]
    far = [look for r, row in enumerate(ids) for look in looks._looks(r, row, mask[r], *told_and_asked(row, batch.lookup[r]))]
    assert set(far) <= set(map(tuple, batch.looks.tolist()))
    of = lambda kind: [look[1:] for look in far if look[0] == kind]  # noqa: E731
    gathered = {(row, value): beacon for row, beacon, value in of(looks.GATHERED)}
    for (row, value), beacon in gathered.items():
        assert ids[row, beacon] == tokenizer.BEACON and (ids[row, value:beacon] != tokenizer.BEACON).all()
    text = [row[row != tokenizer.BEACON] for row in ids]
    assert len(gathered) == sum(int((row == batches.SO).sum()) for row in text)
    asked = 0
    for row, at, beacon in of(looks.ASKED):
        value = next(v for (r, v), b in gathered.items() if (r, b) == (row, beacon))
        looked_up = next(t for t in np.flatnonzero(batch.lookup[row]) if batch.sources[row, t] == at)
        assert ids[row, looked_up] == ids[row, value] and mask[row, at, beacon] and not mask[row, at, value]
        asked += 1
    prompt_only = [row for row in range(len(ids)) if not any(r == row for r, *_ in of(looks.ASKED))]
    assert asked >= 9 and not prompt_only
    assert all(ids[row, to] == tokenizer.BEACON and mask[row, at, to] for row, at, to in of(looks.PARTED))
    assert len(batches.task_batch(Random(1), family, 3, 300, False, "beacons", every).looks) == 0
