"""The flags as settings: what files and variables say reaches every command, and `zoomr config` says what is in force and why."""

import json
import os
from pathlib import Path

import pytest
import typer

from zoomr_cli.main import app, main
from zoomr_cli.settings import NOT_CONFIGURED, ONE_RUN, PROJECT_KEYS, key_of, registry, with_origins
from zoomr_local.config import Origin, Setting

ROOT = typer.main.get_command(app)


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Writes the user's file; the current directory is empty and no variable is set."""
    for name in [name for name in os.environ if name.startswith("ZOOMR_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "config.toml"
    path.write_text("")
    monkeypatch.setenv("ZOOMR_CONFIG", str(path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def write(text: str) -> Path:
        path.write_text(text)
        return path

    return write


@pytest.fixture
def received(monkeypatch):
    """What the commands are called with, instead of doing it."""
    calls = []

    def replaced(command):
        if getattr(command, "commands", None) is not None:
            return command
        monkeypatch.setattr(command, "callback", lambda **values: calls.append(values))
        return command

    real = type(ROOT).resolve_command
    monkeypatch.setattr(type(ROOT), "resolve_command", lambda self, ctx, args: (lambda n, c, r: (n, replaced(c), r))(*real(self, ctx, args)))
    return calls


def shown(capsys, *more):
    assert main(["config", "show", "--json", *more]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    return {(row["key"], command): (row["value"], row["origin"]) for row in rows for command in row["commands"]}


def test_a_flag_is_stronger_than_a_variable_than_a_project_than_the_user_than_a_preset_than_the_default(user, received, monkeypatch):
    user('window = 2\nsinks = 2\nseed = 2\nrefresh = 2\n[models."zoomr-*"]\ntop-k = 1\nwindow = 1\nsinks = 1\nseed = 1\nrefresh = 1\n')
    Path("zoomr.toml").write_text("sinks = 3\nseed = 3\nrefresh = 3\n")
    monkeypatch.setenv("ZOOMR_SEED", "4")
    monkeypatch.setenv("ZOOMR_REFRESH", "4")
    main(["solve", "x.jsonl", "--refresh", "5"])
    (values,) = received
    assert {key: values[key] for key in ("top_p", "top_k", "window", "sinks", "seed", "refresh")} == {
        "top_p": 0.95, "top_k": 1, "window": 2, "sinks": 3, "seed": 4, "refresh": 5,
    }  # fmt: skip


@pytest.mark.parametrize("text, key, value", [
    ('kv-budget = 2048', "kv_budget", "2048"),
    ("kv_budget = '2k'", "kv_budget", "2k"),
    ("temp = 1", "temp", 1.0),
    ("flash-attn = false", "flash_attn", False),
    ("stop = 'END'", "stop", ["END"]),
    ("stop = ['a b', 'c']", "stop", ["a b", "c"]),
    ("vote-layers = [2, 3]", "vote_layers", "2,3"),
    ("kv-dir = 'pages'", "kv_dir", Path("pages")),
])  # fmt: skip
def test_a_value_arrives_as_its_flag_would(user, received, text, key, value):
    user(text)
    main(["chat"])
    assert received[0][key] == value and type(received[0][key]) is type(value)


@pytest.mark.parametrize("name, text, value", [("FLASH_ATTN", "0", False), ("STOP", "a b", ["a b"]), ("KV_DIR", "x", Path("x")), ("MODEL", "m.gguf", Path("m.gguf"))])
def test_a_variable_arrives_as_its_flag_would(user, received, monkeypatch, name, text, value):
    monkeypatch.setenv(f"ZOOMR_{name}", text)
    main(["chat"])
    assert received[0][name.lower()] == value


@pytest.mark.parametrize("text, said", [
    ("temp = nan", "line 1: temp nan: must be a finite number"), ("[chat]\ntop-p = inf", "line 2: top-p inf: must be a finite number"),
    ("[models.x]\nmin-p = '-inf'", "line 2: min-p -inf: must be a finite number"), ("[[markers]]\nname = 'x'\nopen = nan", "hold a number that is not finite"),
])  # fmt: skip
def test_numbers_that_are_not_finite_are_refused_and_never_in_the_json(user, capsys, text, said):
    user(text)
    assert main(["config", "show", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_a_variable_that_is_not_finite_is_refused(user, capsys, monkeypatch):
    monkeypatch.setenv("ZOOMR_TEMP", "nan")
    assert main(["config", "show", "--json"]) == 2
    assert "ZOOMR_TEMP: temp nan: must be a finite number" in capsys.readouterr().err


def test_a_table_of_a_command_is_for_that_command(user, received):
    user("temp = 0.5\n[chat]\ntemp = 0.9")
    main(["chat"])
    main(["solve", "x"])
    assert [values["temp"] for values in received] == [0.9, 0.5]


def test_the_model_that_is_typed_chooses_the_preset(user, received):
    user('model = "b"\n[models.a]\ntemp = 0.1\n[models.b]\ntemp = 0.2\n[models.zoomr-tiny]\ntemp = 0.3')
    main(["chat", "-m", "a"])
    main(["chat"])
    user("[models.zoomr-tiny]\ntemp = 0.3")
    main(["chat"])
    assert [values["temp"] for values in received] == [0.1, 0.2, 0.3]


def test_commands_that_compare_a_list_do_not_follow_what_is_for_all(user, received, monkeypatch):
    user('policy = "sumr"\nkv-budget = 64\n[eval]\npolicy = ["full", "zoomr"]\n')
    monkeypatch.setenv("ZOOMR_POLICY", "recency")
    for words in (["eval"], ["bench"], ["demo"], ["solve", "x"]):
        main(words)
    assert [values["policy"] or None for values in received] == ["full,zoomr", "full,zoomr", None, "recency"]
    assert [values["kv_budget"] for values in received] == ["512,800", "64", "64", "64"]


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("text, message", [
    ("tempp = 1", "config.toml, line 1: tempp is no setting; did you mean temp?"),
    ("temp = 'hot'", "config.toml, line 1: temp hot: input should be a valid number"),
    ("[solve]\ntemp = 'hot'", "config.toml, line 2: temp hot: input should be a valid number"),
    ("temp = true", "config.toml, line 1: temp takes X, not true"),
    ("temp = [1]", "config.toml, line 1: temp takes one value, not a list"),
    ("temp = 2024-01-01", "config.toml, line 1: temp takes X, not a table or date"),
    ("stop = [[1]]", "config.toml, line 1: stop takes TEXT, not such a list"),
    ("max-tokens = 0", "config.toml, line 1: max-tokens 0: input should be greater than or equal to 1"),
    ("max-tokens = 1.5", "config.toml, line 1: max-tokens 1.5: input should be a valid integer"),
    ("flash-attn = 1", "config.toml, line 1: flash-attn is true or false, not 1"),
    ("overwrite = true", "config.toml, line 1: overwrite is no setting: it is for one run, give it as a flag"),
    ("[problems]\nn = 'x'", "config.toml, line 2: n x: input should be a valid integer"),
    ("temp = ", "config.toml, line 1: no TOML: "),
])  # fmt: skip
def test_what_is_wrong_is_one_line_and_exit_code_2(user, received, capsys, text, message):
    user(text)
    for words in (["policies"], ["config", "show"]):
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and message in said.err
    assert received == []
    assert main(["chat", "--help"]) == 0, "help is for those whose files are broken, too"
    assert main(["config", "path"]) == 0


def test_a_value_that_the_command_refuses_says_where_it_is_set(user, capsys, monkeypatch):
    path = user('kv-type = "q9"')
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == f"error: --kv-type q9: choose f16 or q8_0 (--kv-type is set by {path}, line 1)\n"
    assert main(["plan", "--kv-type", "q9"]) == 2
    assert capsys.readouterr().err == "error: --kv-type q9: choose f16 or q8_0\n"
    path = user("flash-attn = false")
    assert main(["plan", "--kv-type", "q8_0"]) == 2
    assert f"leave out --no-flash-attn or take f16 (--no-flash-attn is set by {path}, line 1)" in capsys.readouterr().err
    monkeypatch.setenv("ZOOMR_TOP_K", "many")
    assert main(["chat"]) == 2
    assert "ZOOMR_TOP_K: top-k many: input should be a valid integer" in capsys.readouterr().err


def test_only_flags_that_were_not_typed_are_explained():
    settings = {"kv-ram": Setting("kv-ram", "1", Origin("environment", "ZOOMR_KV_RAM")), "kv": Setting("kv", 1, Origin("user", "f", 2))}
    assert with_origins("x --kv-ram 1 and --kv-ram, --temp", settings) == "x --kv-ram 1 and --kv-ram, --temp (--kv-ram is set by ZOOMR_KV_RAM)"
    assert with_origins("see --kv-rams", settings) == "see --kv-rams"


def test_what_a_project_sets_is_said_unless_it_is_typed_or_quiet(user, received, capsys, monkeypatch):
    Path("zoomr.toml").write_text("seed = 1\ntemp = 0.5\n")
    main(["chat", "--temp", "0.1"])
    assert capsys.readouterr().err == f"note: {Path.cwd()}/zoomr.toml sets seed\n"
    main(["chat", "-q"])
    monkeypatch.setenv("ZOOMR_QUIET", "1")
    main(["chat"])
    assert capsys.readouterr().err == ""


def test_a_variable_that_is_nearly_one_is_named(user, received, capsys, monkeypatch):
    monkeypatch.setenv("ZOOMR_KV_BUDGTE", "5")
    main(["chat"])
    assert capsys.readouterr().err == "note: ZOOMR_KV_BUDGTE is no setting; did you mean ZOOMR_KV_BUDGET?\n"


# ---------------------------------------------------------------- what a project may do


@pytest.mark.parametrize("key", sorted({key for keys in registry(ROOT).values() for key in keys} - PROJECT_KEYS))
def test_a_project_cannot_set_anything_else(user, received, capsys, key):
    Path("zoomr.toml").write_text(f"{key} = 1")
    assert main(["chat"]) == 2
    assert f"zoomr.toml, line 1: a project file may not set {key}" in capsys.readouterr().err
    assert received == []


def test_nothing_a_project_may_set_names_a_file_a_model_or_a_size_of_the_machine():
    keys = registry(ROOT)
    known = {key for of_command in keys.values() for key in of_command}
    assert PROJECT_KEYS <= known, PROJECT_KEYS - known
    assert not PROJECT_KEYS & {"model", "kv-dir", "kv-ram", "kv-disk", "threads", "n-gpu-layers", "jobs", "memory", "suite", "save", "quiet", "checkpoint-every"}
    for of_command in keys.values():
        for key, option in of_command.items():
            if key in PROJECT_KEYS:
                assert option.metavar is None or not {"FILE", "DIR", "PNG", "MODEL"} & set(option.metavar.split("|")), key


def test_every_flag_is_a_setting_or_for_one_run():
    flags = {key_of(p) for command in ROOT.commands.values() if hasattr(command, "params") for p in command.params if p.param_type_name == "option"}
    assert not ONE_RUN & {key for keys in registry(ROOT).values() for key in keys}
    inner = {key_of(p) for group in ROOT.commands.values() for command in getattr(group, "commands", {}).values() for p in command.params if p.param_type_name == "option"}
    of_root = {key_of(p) for p in ROOT.params}
    assert ONE_RUN <= flags | inner | of_root | {"help"}, "no flag of that name is left"
    assert NOT_CONFIGURED <= set(ROOT.commands)


# ---------------------------------------------------------------- config show, config path


def test_show_says_every_setting_of_every_command_with_its_place(user, capsys, monkeypatch):
    path = user("# c\n[chat]\ntemp = 0.7\n")
    monkeypatch.setenv("ZOOMR_SEED", "9")
    rows = shown(capsys)
    assert {(key, command) for key, command in rows} == {(key, command) for command, keys in registry(ROOT).items() for key in keys}
    assert rows["temp", "chat"] == (0.7, {"kind": "user", "file": str(path), "line": 3})
    assert rows["temp", "solve"] == (0.0, {"kind": "default"})
    assert rows["seed", "solve"] == (9, {"kind": "environment", "variable": "ZOOMR_SEED"})


def test_show_says_what_the_command_gets(user, received, capsys):
    """Value by value: what show prints is what the command is called with."""
    user('kv-budget = 300\nstop = ["a"]\nflash-attn = false\n[chat]\ntemp = 0.7\n[models."z*"]\ntop-k = 3')
    rows = shown(capsys)
    main(["chat"])
    options = registry(ROOT)["chat"]
    for key, option in options.items():
        assert rows[key, "chat"][0] == received[0][option.name], key


def test_show_for_people(user, capsys):
    path = user('temp = 0.5\nstop = "x"\n[[markers]]\nname = "a"\n')
    assert main(["config", "show", "chat", "--origin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("temp")] == [["temp", "0.5", f"{path},", "line", "1"]]
    assert [line.split() for line in lines if line.startswith("top-k")] == [["top-k", "40", "default"]]
    assert [line.split() for line in lines if line.startswith("stop")] == [["stop", '["x"]', f"{path},", "line", "2"]]
    assert lines[-1] == "1 [[markers]] in your file"
    assert main(["config", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("temp")] == [["temp", "0.5"]]
    assert {tuple(line.split()) for line in lines if line.startswith("kv-budget")} >= {("kv-budget", '"512,800"', "eval")}


def test_show_takes_a_model_and_refuses_what_is_no_command(user, capsys):
    user("[models.other]\ntemp = 0.1")
    assert shown(capsys, "-m", "other.gguf")["temp", "chat"][0] == 0.1
    assert shown(capsys)["temp", "chat"][0] == 0.6
    assert main(["config", "show", "caht"]) == 2
    assert "caht has no settings (did you mean chat?); there are chat, solve" in capsys.readouterr().err


def test_path_says_which_files_are_looked_for(user, capsys, tmp_path):
    path = user("")
    assert main(["config", "path"]) == 0
    assert capsys.readouterr().out == f"project  {Path.cwd()}/zoomr.toml  (not there)\nuser     {path}  (is read)\n"
    Path("zoomr.toml").write_text("")
    assert main(["config", "path", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": [
        {"kind": "project", "path": f"{Path.cwd()}/zoomr.toml", "exists": True, "refused": None, "fault": None},
        {"kind": "user", "path": str(path), "exists": True, "refused": None, "fault": None},
    ]}  # fmt: skip


@pytest.mark.parametrize("kind, fault", [("fifo", "config.toml is no file"), ("folder", "config.toml is no file"), ("text", "config.toml, line 2: no TOML: ")])
def test_path_does_not_say_that_a_file_is_read_which_cannot_be(user, capsys, kind, fault):
    path = user("temp = 1\ntemp = = 2")
    if kind != "text":
        path.unlink()
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    assert main(["config", "path"]) == 0
    said = capsys.readouterr()
    assert f"user     {path}  (cannot be read)\n" in said.out and fault in said.err and "(is read)" not in said.out
    assert main(["config", "path", "--json"]) == 0
    assert fault in json.loads(capsys.readouterr().out)["files"][1]["fault"]


def test_help_shows_what_is_set_as_the_default(user, capsys):
    user("max-tokens = 777")
    assert main(["solve", "--help"]) == 0
    assert "[default: 777]" in capsys.readouterr().out


def test_a_user_without_a_home_folder_is_told_where_a_file_could_be(user, capsys, monkeypatch):
    for name in ("ZOOMR_CONFIG", "HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert main(["config", "path"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("project ") and "\nuser" not in said.out and "set HOME or XDG_CONFIG_HOME" in said.err


def test_the_page_lists_what_a_project_may_set_and_what_is_no_setting():
    page = (Path(__file__).resolve().parent.parent / "docs" / "config.md").read_text()
    listed = page.split("and nothing else:\n\n", 1)[1].split("\n\n", 1)[0]
    assert set(listed.replace("`", "").split()) == PROJECT_KEYS
    flags = page.split("No settings, because they say what one run does:", 1)[1].split(".", 1)[0]
    assert set(flags.replace("`", "").replace(",", " ").split()) == {f"--{key}" for key in ONE_RUN - {"help", "version", "list"}}
