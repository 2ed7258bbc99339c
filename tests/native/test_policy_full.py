"""`--policy full` from prompt to answer is stock llama.cpp: the same logits at every step, bit for bit."""

import numpy as np
from conftest import config

from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.events import TokenDecoded
from zoomr_local.model import Model
from zoomr_local.sampling import SamplingParams
from zoomr_models import bundled_model_path
from zoomr_models.tasks import generate

STEPS = 60
KV = {"f16-fa": ("f16", True), "q8-fa": ("q8_0", True), "f16-nofa": ("f16", False)}


def run_engine(kv_type, flash_attn, prompt):
    """Tokens and the logits each was drawn from, float32 [STEPS, n_vocab]; and the number of cells."""
    model = Model.open(bundled_model_path())
    engine = Engine(model, EngineConfig(policy="full", kv_type=kv_type, flash_attn=flash_attn, threads=1))
    tokens, logits = [], []
    for event in engine.generate(prompt(model), SamplingParams(), STEPS):
        if isinstance(event, TokenDecoded):
            tokens.append(event.token)
            logits.append(engine.context.logits().copy())
    cells = engine.context.n_cells
    engine.close()
    model.close()
    return tokens, np.stack(logits), cells


def test_every_step_of_policy_full_is_stock(stock):
    ids = []

    def prompt(model):
        ids[:] = model.tokenize(model.render([{"role": "user", "content": generate("dag", 1, 3, 5, "dev")[0].prompt}]))
        return ids

    for name, (kv_type, flash_attn) in KV.items():
        tokens, logits, cells = run_engine(kv_type, flash_attn, prompt)
        ops = [["decode", ids, list(range(len(ids))), 0, "last"]]
        ops += [["decode", [token], [len(ids) + i], 0, "last"] for i, token in enumerate(tokens[:-1])]
        expected = stock.run(bundled_model_path(), config(name, n_cells=cells), ops)
        assert len(tokens) == STEPS and np.array_equal(logits, expected), name
