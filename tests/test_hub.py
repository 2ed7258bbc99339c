"""Names become files: what is meant, what is fetched, what goes on after a cut, and every way in which a hub can fail.

The hub is a server on this machine; a connection to anywhere else fails the test.
"""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path

import pytest
from hub_case import BYTES, FILES, pull, refused, server  # noqa: F401 (a fixture)

from zoomr_local import hub, hub_cache, hub_names
from zoomr_local.errors import ModelError, StorageError, UsageError
from zoomr_local.hub_names import Reference, parse

huggingface_hub = pytest.importorskip("huggingface_hub")  # the extra `test` has it
import huggingface_hub.constants  # noqa: E402
import huggingface_hub.file_download  # noqa: E402

# ---------------------------------------------------------------- names


@pytest.mark.parametrize("text, meant", [
    ("user/repo", ("user/repo", None)), ("user/repo:Q8_0", ("user/repo", "Q8_0")), ("hf.co/user/repo:q8_0", ("user/repo", "q8_0")),
    ("https://huggingface.co/user/repo", ("user/repo", None)), ("https:/huggingface.co/user/repo/", ("user/repo", None)),
    ("https://huggingface.co/user/repo/resolve/main/big/x-Q4_0.gguf?download=true", ("user/repo", "big/x-Q4_0.gguf")),
    ("user/repo:m-Q8_0.gguf", ("user/repo", "m-Q8_0.gguf")), ("hf://user/repo", ("user/repo", None)), ("user/model.gguf", None), ("repo", None), ("./user/repo", None),
    ("/user/repo", None), ("a/b/c", None), ("user/repo:", None), ("~/repo", None), ("../repo", None), ("", None),
])  # fmt: skip
def test_what_is_a_name_of_the_hub(text, meant):
    assert parse(text) == (None if meant is None else Reference(*meant))


@pytest.mark.parametrize("text, meant", [
    ("https://huggingface.co/user/repo/tree/main", "user/repo"), ("https:/huggingface.co/user/repo/tree/main/", "user/repo"), ("hf.co/user/repo/tree/main?x=1", "user/repo"),
    ("hf.co/user/repo/blob/main/x-Q4_0.gguf", "user/repo:x-Q4_0.gguf"), ("hf.co/user/repo/blob/main/README.md", None),
    ("hf.co/user/repo/resolve/v9/x.gguf", UsageError), ("hf.co/user/repo/blob/v9/x.gguf", UsageError), ("hf.co/user/repo/tree/v9", UsageError),
    ("https://huggingface.co/user/repo/tree/main/BF16", UsageError), ("user/repo/tree/v9", None),
])  # fmt: skip
def test_addresses_within_a_repository(text, meant):
    if meant is UsageError:
        with pytest.raises(UsageError, match="the address names"):
            parse(text)
    else:
        assert meant == (None if (found := parse(text)) is None else str(found))


@pytest.mark.parametrize("file, quant", [
    ("Qwen3-8B-Q4_K_M.gguf", "Q4_K_M"), ("a/b.IQ4_XS.gguf", "IQ4_XS"), ("x-UD-Q4_K_XL-00001-of-00003.gguf", "UD-Q4_K_XL"), ("m-bf16.gguf", "BF16"),
    ("gpt-oss-20b-mxfp4.gguf", "MXFP4"), ("model.gguf", None), ("Q8_0.gguf", "Q8_0"), ("qwen2-7b.gguf", None), ("m-F16.gguf", "F16"),
])  # fmt: skip
def test_the_quantisation_in_a_name(file, quant):
    assert hub_names.quant_of(file) == quant


def test_without_a_quantisation_q4_k_m_is_meant_then_the_nearest():
    there = ["Q2_K", "BF16", "IQ4_XS", "Q8_0", "Q4_K_S", "Q5_K_M", "Q4_0", "Q3_K_M", "Q4_K_M", "Q6_K"]
    order = [m.quant for m in hub_names.listed({f"m-{quant}.gguf": 1 for quant in there})]
    assert order == ["Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q5_K_M", "Q3_K_M", "Q6_K", "Q2_K", "Q8_0", "BF16"]


def test_what_is_no_model_is_not_listed_and_parts_are_one():
    found = hub_names.listed({name: len(data) for name, data in FILES.items()})
    assert [(m.quant, m.size_bytes, len(m.files), m.missing) for m in found] == [("Q4_K_M", 50_000, 1, 0), ("Q8_0", 90_000, 1, 0), ("F16", 50_000, 2, 0)]
    assert hub_names.listed({"m-F16-00002-of-00003.gguf": 1})[0].missing == 2


def test_two_files_of_one_quantisation_must_be_told_apart():
    models = hub_names.listed({"a-Q4_K_M.gguf": 1, "b-Q4_K_M.gguf": 1, "UD-Q5_K_XL.gguf": 1})
    with pytest.raises(ModelError, match=r"u/r means 2 models: a-Q4_K_M.gguf, b-Q4_K_M.gguf; name one of them, as in u/r:a-Q4_K_M.gguf"):
        hub_names.pick(models, Reference("u/r"), "")
    assert hub_names.pick(models, Reference("u/r", "b-Q4_K_M.gguf"), "").files == ("b-Q4_K_M.gguf",)
    assert hub_names.pick(models, Reference("u/r", "q5_k_xl"), "").quant == "UD-Q5_K_XL"


# ---------------------------------------------------------------- fetching


def test_what_is_fetched_is_said_before_and_lies_in_the_hubs_own_cache(server, tmp_path):
    said: list[str] = []
    done = pull("user/repo", said)
    assert said == [f"fetching user/repo:Q4_K_M from {server.url}: m-Q4_K_M.gguf, 48.8 KiB, to {tmp_path / 'hf/hub'}"]
    assert done.path == tmp_path / "hf/hub/models--user--repo/snapshots" / server.commit / "m-Q4_K_M.gguf"
    assert done.path.read_bytes() == BYTES["q4"] and done.path.is_symlink() and done.fetched_bytes == 50_000
    assert huggingface_hub.try_to_load_from_cache("user/repo", "m-Q4_K_M.gguf", cache_dir=tmp_path / "hf/hub") == str(done.path)
    assert pull("user/repo").fetched_bytes == 0
    assert len(server.fetched()) == 1


def test_a_cached_model_needs_neither_network_nor_the_package(server, monkeypatch):
    path = pull("user/repo:q8_0").path
    server.requests.clear()
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *more: _no_package(name) or real(name, *more))
    for name in ("user/repo", "user/repo:Q8_0", "user/repo:m-Q8_0.gguf"):
        assert hub.resolve(name, {}, print) == path
    assert server.requests == []
    with pytest.raises(ModelError, match=r"user/repo:Q4_K_M is not in the cache, and asking the hub needs the package huggingface_hub .*: pip install huggingface_hub"):
        hub.resolve("user/repo:Q4_K_M", {}, print)


def _no_package(name: str) -> None:
    if name.startswith("huggingface_hub"):
        raise ImportError("No module named 'huggingface_hub'")


def test_parts_come_together(server):
    done = pull("user/repo:F16")
    assert done.path.name == "m-F16-00001-of-00002.gguf" and done.fetched_bytes == 50_000
    assert done.path.with_name("m-F16-00002-of-00002.gguf").read_bytes() == BYTES["two"]
    done.path.with_name("m-F16-00002-of-00002.gguf").unlink()
    assert hub_cache.find(Reference("user/repo", "F16")) is None, "half a model is none"


def test_a_connection_that_is_cut_once_is_taken_up_at_once(server):
    server.cut_after, server.cuts_left = 20_500, 1
    assert pull("user/repo").path.read_bytes() == BYTES["q4"]
    assert [r.range for r in server.fetched()] == [None, "bytes=20000-"]


def test_another_process_goes_on_where_one_ended(server):
    server.cut_after, server.then_cut_after = 7_300, 0
    said = refused("user/repo:Q8_0")
    assert "cannot be reached for user/repo:Q8_0" in said and "the same command goes on from there" in said
    ((part, size),) = hub_cache.incomplete()
    assert size == 7_000 and hub_cache.cached_models() == []
    server.cuts_left = 0
    server.requests.clear()
    told: list[str] = []
    done = pull("user/repo:Q8_0", told)
    assert done.path.read_bytes() == BYTES["q8"] and done.fetched_bytes == 90_000 - size
    assert [r.range for r in server.fetched()] == [f"bytes={size}-"]
    assert f"87.9 KiB; {size / 1024:.3g} KiB of it are here" in told[0]
    assert hub_cache.incomplete() == []


def test_ctrl_c_keeps_what_came_and_says_so(server, monkeypatch):
    real, told = huggingface_hub.file_download.http_get, []

    def interrupted(url, file, **more):
        file.write(BYTES["q4"][:5_000])
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull("user/repo", told)
    assert told[-1] == "what came is kept; the same command goes on from there"
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", real)
    assert pull("user/repo").fetched_bytes == 45_000


def test_a_server_without_ranges_sends_all_of_it_again(server):
    folder = hub_cache.repo_dir("user/repo") / "blobs"
    folder.mkdir(parents=True)
    from hub_server import _sha

    (folder / (_sha(BYTES["q4"]) + ".incomplete")).write_bytes(b"x" * 10_000)
    server.ranges = False
    assert pull("user/repo").path.read_bytes() == BYTES["q4"]


@pytest.mark.parametrize("size", [10_000, 50_000, 60_000])
def test_a_part_that_holds_something_else_is_found_and_thrown_away(server, size):
    from hub_server import _sha

    folder = hub_cache.repo_dir("user/repo") / "blobs"
    folder.mkdir(parents=True)
    (folder / (_sha(BYTES["q4"]) + ".incomplete")).write_bytes(b"x" * size)
    if size <= 50_000:
        assert "m-Q4_K_M.gguf arrived damaged (its SHA-256 is not the hub's) and was deleted; pull it again" in refused("user/repo")
        assert hub_cache.incomplete() == []
    assert pull("user/repo").path.read_bytes() == BYTES["q4"]


def test_damage_on_the_way_is_found(server):
    server.damaged = True
    assert "arrived damaged" in refused("user/repo")
    assert hub_cache.cached_models() == []


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_us(server):
    server.redirect_to = "http://localhost:{port}"
    assert pull("user/repo").path.read_bytes() == BYTES["q4"]
    by_host = {r.host.split(":")[0]: set() for r in server.requests}
    for request in server.requests:
        by_host[request.host.split(":")[0]].add(request.token)
    assert by_host == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {None}}


def test_a_newer_commit_is_pulled_and_the_older_one_stays_usable(server):
    old = pull("user/repo:Q8_0").path
    server.commit = "d" * 40
    new = pull("user/repo:Q4_K_M").path
    assert hub.resolve("user/repo:Q8_0", {}, print) == old and hub.resolve("user/repo", {}, print) == new


def test_what_branch_main_has_is_what_a_name_means(server):
    old = pull("user/repo:Q8_0").path
    server.commit = "d" * 40
    server.repos["user/repo"]["m-Q8_0.gguf"] = BYTES["one"]
    new = pull("user/repo:Q8_0").path
    os.utime(old.parent, (2e9, 2e9))  # touched by somebody since
    assert hub.resolve("user/repo", {}, print) == new and new.read_bytes() == BYTES["one"] and old.read_bytes() == BYTES["q8"]


# ---------------------------------------------------------------- what can go wrong


def test_a_quantisation_that_is_not_there_is_answered_with_those_that_are(server):
    assert refused("user/repo:Q4_K_L") == (
        f"user/repo has no Q4_K_L on {server.url} (did you mean Q4_K_M?); there are Q4_K_M (48.8 KiB), Q8_0 (87.9 KiB), F16 (48.8 KiB)"
    )
    assert server.fetched() == []


def test_no_gguf_no_repository_no_access(server):
    assert "user/words has no GGUF model on" in refused("user/words") and "ends in -GGUF" in refused("user/words")
    assert f"there is no user/nothing on {server.url}, or it is private" in refused("user/nothing")
    pull("user/repo")
    assert "(did you mean user/repo?)" in refused("user/rep")
    server.gated.add("user/repo")
    assert refused("user/repo:Q8_0") == f"user/repo is gated: ask for access at {server.url}/user/repo, then log in with `hf auth login` or set HF_TOKEN"


def test_a_hub_that_is_down_or_none(server, monkeypatch):
    server.status = 503
    assert f"{server.url} refused user/repo with status 503; try again later" in refused("user/repo")
    server.status = 200
    assert "did not answer like a hub" in refused("user/repo")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached for user/repo" in refused("user/repo")
    for text in ("no address", "http://[::1", "http://127.0.0.1:9/\x01", "http://h:99999", "https://", "ftp://h"):
        monkeypatch.setenv("HF_ENDPOINT", text)
        assert "not the address of a hub; unset it for https://huggingface.co" in refused("user/repo")


def test_offline_nothing_is_asked(server, monkeypatch):
    path = pull("user/repo").path
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.resolve("user/repo", {}, print) == path
    assert refused("user/repo:Q8_0") == (
        "user/repo:Q8_0 is not in the cache, and HF_HUB_OFFLINE forbids the network; unset it and: zoomr models pull user/repo:Q8_0"
    )
    assert refused("user/repo") == (
        "user/repo is in the cache and -m user/repo takes it, and HF_HUB_OFFLINE forbids the network; unset it and: zoomr models pull user/repo"
    )
    assert server.requests == []


def test_a_disk_without_room_is_said_before_anything_comes(server, monkeypatch):
    monkeypatch.setattr("zoomr_local.machine.free_disk_bytes", lambda folder: 40_000)
    assert "Q4_K_M needs 48.8 KiB more" in refused("user/repo", StorageError) and "39.1 KiB free" in refused("user/repo", StorageError)
    assert server.fetched() == [] and "HF_HOME" in refused("user/repo", StorageError)


def test_a_disk_that_fills_up_meanwhile_keeps_what_came(server, monkeypatch):
    real = huggingface_hub.file_download.http_get

    def full(url, file, **more):
        file.write(BYTES["q4"][:5_000])
        file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    said = refused("user/repo", StorageError)
    assert "cannot be written: No space left on device" in said and "goes on from there" in said
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", real)
    assert pull("user/repo").fetched_bytes == 45_000


def test_two_processes_do_not_write_one_file(server):
    from hub_server import _sha

    folder = hub_cache.repo_dir("user/repo") / "blobs"
    folder.mkdir(parents=True)
    import fcntl

    with (folder / (_sha(BYTES["q4"]) + ".incomplete")).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is fetching m-Q4_K_M.gguf right now" in refused("user/repo")


def test_a_name_that_no_repository_can_have(server):
    assert "is no name of a repository" in refused("user/a..b", UsageError)


def test_an_etag_cannot_name_another_folder(server, monkeypatch):
    monkeypatch.setattr("hub_server._sha", lambda data: "../../../evil")
    assert "does not say how large" in refused("user/repo")


@pytest.mark.parametrize("name", ["../evil-Q4_0.gguf", "/evil-Q4_0.gguf", "a/../../evil-Q4_0.gguf", "..\\evil-Q4_0.gguf", "x\0-Q4_0.gguf"])
def test_a_file_name_cannot_leave_its_folder_and_nothing_is_fetched(server, name):
    server.repos["user/evil"] = {name: b"x" * 100}
    assert "which no folder can hold; take another repository" in refused("user/evil:Q4_0")
    assert server.fetched() == [] and not hub_cache.repo_dir("user/evil").exists()


@pytest.mark.parametrize("commit", ["../../../../evil", "/evil"])
def test_a_commit_cannot_name_another_folder(server, tmp_path, commit):
    server.commit = commit
    refused("user/repo")
    assert not [name for _, folders, names in os.walk(tmp_path) for name in [*folders, *names] if "evil" in name]


# ---------------------------------------------------------------- resolve


def test_paths_and_bundled_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    bundled = {"zoomr-tiny": Path("/there/zoomr-tiny.gguf")}
    Path("user").mkdir()
    Path("user/repo").write_text("a file wins over the hub")
    Path("qwen-Q4_K_M.gguf").write_text("x")
    assert hub.resolve("zoomr-tiny", bundled, print) == bundled["zoomr-tiny"]
    assert hub.resolve("user/repo", bundled, print) == Path("user/repo")
    for text, said in (
        ("zoomr-tny", "no model file at zoomr-tny (did you mean zoomr-tiny?); give the path of a .gguf file with -m"),
        ("qwen-Q4_K_S.gguf", "did you mean qwen-Q4_K_M.gguf?"), ("user", "user is a folder"), ("nothing", "no model file at nothing; give"),
        ("user/none.gguf", "no model file at user/none.gguf"), ("a/b/c", "no model file at a/b/c"),
    ):  # fmt: skip
        with pytest.raises(ModelError) as caught:
            hub.resolve(text, bundled, print)
        assert said in str(caught.value), caught.value


def test_the_home_of_a_user_who_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", "~nobody-at-all/hub")
    with pytest.raises(ModelError, match="no model file at ~nobody-at-all/x.gguf; give the path"):
        hub.resolve("~nobody-at-all/x.gguf", {}, print)
    assert hub_cache.cached_models() == []
