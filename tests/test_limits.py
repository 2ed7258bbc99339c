"""Numbers and names that the engine's C interface would cut, or end the process over, are refused or carried whole."""

import os
import shutil

import pytest

from zoomr_cli.main import main
from zoomr_local import machine
from zoomr_local.engine import EngineConfig
from zoomr_local.errors import BudgetError, EngineError, UsageError
from zoomr_local.libllama import LlamaContext, LlamaModel, devices
from zoomr_local.libllama.heads import HeadStore
from zoomr_local.sampling import SamplingParams

BEYOND = 2**32 + 1  # 1, if cut to 32 bits


@pytest.mark.parametrize("wanted, error, words", [
    (lambda: EngineConfig(threads=513), UsageError, "--threads 513: must be at most 512"),
    (lambda: EngineConfig(kv_budget=2**32 + 512), BudgetError, "must be below 2147483648 tokens"),
    (lambda: SamplingParams(repeat_last_n=2**31 - 1), UsageError, r"--repeat-last-n 2147483647: must be in \[0, 1048576\] tokens"),
])
def test_more_than_the_engine_takes_is_refused(wanted, error, words):
    with pytest.raises(error, match=words):
        wanted()


@pytest.mark.parametrize("flags", [["-t", "2147483647"], ["-t", "4294967297"], ["-n", "4294967296", "--policy", "full"], ["-ngl", "4294967296"]])
def test_the_command_line_refuses_it_before_anything_is_made(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    assert main(["solve", "in.jsonl", "-o", "out.jsonl", *flags]) == 2
    assert f"{flags[0]}'" in capsys.readouterr().err and os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("numbers", [{"n_batch": BEYOND}, {"n_ubatch": BEYOND}, {"n_cells": BEYOND}, {"n_threads": BEYOND}, {"n_cells": 2**30, "n_seq_max": 2}, {"index_rows": BEYOND}])
def test_a_context_of_numbers_that_would_be_cut(model, numbers):
    with pytest.raises(EngineError, match="every number must be below 2147483648"):
        LlamaContext(model.llama, **{"n_cells": 256, **numbers})


def test_a_store_of_numbers_that_would_be_cut(model):
    context = LlamaContext(model.llama, n_cells=256, paging=False)
    try:
        for numbers in ({"n_cells": BEYOND}, {"n_cells": 256, "observe": BEYOND}):
            with pytest.raises(EngineError, match="all below 2\\^31"):
                HeadStore(context, **numbers)
    finally:
        context.close()


def test_a_path_that_is_no_utf8(model, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"m\xff.gguf")
    shutil.copy(model.llama.path, path)
    opened = LlamaModel(os.fsdecode(path), no_alloc=True)
    assert opened.n_vocab == model.llama.n_vocab
    opened.close()


def test_one_line_of_a_strangers_batch_takes_no_gigabytes(tmp_path, monkeypatch, capsys):
    """It is that line's own failure, and the others are solved."""
    monkeypatch.chdir(tmp_path)
    body = '{"custom_id": "%s", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "repeat_penalty": 1.1, "repeat_last_n": %d}}\n'
    (tmp_path / "in.jsonl").write_text(body % ("a", 2**31 - 1) + body % ("b", 64))
    assert main(["solve", "in.jsonl", "-o", "out.jsonl", "--kv-budget", "256"]) == 3
    first, second = (tmp_path / "out.jsonl").read_text().splitlines()
    assert "a whole number of 0 to 1048576" in first and "a whole number" not in second


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("files, cores", [
    ({}, None),
    ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000", "sys/fs/cgroup/a/b/cpu.max": "400000 100000"}, 1.5),
    ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"}, 0.5),
    ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
])  # fmt: skip
def test_a_containers_processor_time(tmp_path, files, cores):
    assert machine.cpu_limit(tree(tmp_path, files)) == cores


@pytest.mark.parametrize("limit, threads", [(None, 8), (0.5, 1), (2.0, 2), (2.5, 3), (64.0, 8)])
def test_no_more_threads_than_that(monkeypatch, limit, threads):
    monkeypatch.setattr(devices, "physical_cores", lambda: 8)
    monkeypatch.setattr(devices, "cpu_limit", lambda: limit)
    assert devices.usable_cores() == threads
