"""Configuration files: which are read, what stands where, what is stronger, and one clear line for what is wrong."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoomr_local import config
from zoomr_local.config_lines import MOST_CHARACTERS, key_lines
from zoomr_local.errors import UsageError
from zoomr_local.folders import user_folder

REGISTRY = {"chat": {"temp", "kv-budget", "model", "stop", "keep-thinking"}, "solve": {"temp", "kv-budget", "model"}, "eval": {"policy", "kv-budget"}}
GENERAL = {"temp", "kv-budget", "model", "stop", "keep-thinking"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a repository in it, which is the current directory."""
    home = tmp_path / "home"
    (home / "repo" / ".git").mkdir(parents=True)
    (home / "repo" / "deep" / "er").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in [name for name in os.environ if name.startswith(("ZOOMR_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(home / "repo")
    return home


def user_file(home: Path, text: str) -> Path:
    path = user_folder("config") / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert path.is_relative_to(home)
    return path


def in_force(command="chat", model="zoomr-tiny", environment=None):
    found = config.load().in_force(command, REGISTRY[command], GENERAL & REGISTRY[command], model, environment or {})
    return {key: setting.value for key, setting in found.items()}


def test_nothing_is_set_where_no_file_is(home):
    assert config.load() == config.Config(tuple(config.paths()), (), [])
    assert [source.exists for source in config.paths()] == [False, False]
    assert in_force() == {}


def test_the_stronger_place_wins(home):
    """Every layer sets one more key, so that each value says which layer won."""
    keys = ["a-1", "a-2", "a-3", "a-4", "a-5", "a-6", "a-7"]
    registry = {"chat": set(keys)}
    layers = [
        '[models."tiny*"]\n', '[models."tiny*".chat]\n',
        "", "[chat]\n",
    ]  # fmt: skip

    def of(number):
        return "".join(f"{key} = {number}\n" for key in keys[number:])

    user_file(home, of(2) + layers[3] + of(3) + layers[0] + of(0) + layers[1] + of(1))
    Path("zoomr.toml").write_text(of(4) + "[chat]\n" + of(5))
    environment = {config.variable(key): "6" for key in keys[6:]}
    found = config.load().in_force("chat", registry["chat"], registry["chat"], "tiny-model", environment)
    assert [int(found[key].value) for key in keys] == [0, 1, 2, 3, 4, 5, 6]
    other = config.load().in_force("solve", registry["chat"], registry["chat"], "other", {})
    assert {key: setting.value for key, setting in other.items()} == {key: 2 for key in keys[2:4]} | {key: 4 for key in keys[4:]}


def test_each_value_says_where_it_stands(home):
    path = user_file(home, '# mine\ntemp = 0.5\nstop = [\n  "a",\n  "b = 1",\n]\n\n[chat]\nkv_budget = "2k"\n[models.x]\ntemp = 1\n')
    Path("zoomr.toml").write_text("\n\ntemp = 0.1")
    settings = config.load().in_force("chat", REGISTRY["chat"], GENERAL, "none", {"ZOOMR_MODEL": "m.gguf"})
    assert {key: str(setting.origin) for key, setting in settings.items()} == {
        "temp": f"{home}/repo/zoomr.toml, line 3", "stop": f"{path}, line 3", "kv-budget": f"{path}, line 9", "model": "ZOOMR_MODEL",
    }  # fmt: skip
    assert settings["temp"].origin.as_dict() == {"kind": "project", "file": f"{home}/repo/zoomr.toml", "line": 3}
    assert settings["model"].origin.as_dict() == {"kind": "environment", "variable": "ZOOMR_MODEL"}


def test_an_empty_variable_is_none(home):
    user_file(home, "temp = 0.5")
    assert in_force(environment={"ZOOMR_TEMP": ""}) == {"temp": 0.5}


def test_what_is_for_all_is_not_for_a_command_that_compares_a_list(home):
    user_file(home, 'policy = "sumr"\n[eval]\nkv-budget = "64,128"')
    assert in_force("eval", environment={"ZOOMR_POLICY": "full"}) == {"kv-budget": "64,128"}


@pytest.mark.parametrize("pattern, model, meant", [
    ("qwen3*", "/models/Qwen3-8B-Q4_K_M.gguf", True),
    ("qwen3-8b-q4_k_m", "Qwen3-8B-Q4_K_M.gguf", True),
    ("unsloth/*", "unsloth/Qwen3-8B-GGUF:Q4_K_M", True),
    ("qwen3-8b-gguf", "unsloth/Qwen3-8B-GGUF:Q4_K_M", True),
    ("zoomr-tiny", "zoomr-tiny", True),
    ("qwen3", "Qwen3-8B.gguf", False),
    ("qwen*", "/qwen/llama.gguf", False),
])  # fmt: skip
def test_the_models_a_table_is_for(pattern, model, meant):
    assert config.matches(pattern, model) is meant


def test_of_two_tables_of_a_model_the_later_one_counts(home):
    user_file(home, '[models."qwen*"]\ntemp = 1\nkv-budget = 64\n[models."*8b*"]\ntemp = 2')
    assert in_force(model="qwen3-8b") == {"temp": 2, "kv-budget": 64}


def test_markers_are_handed_on_as_they_are(home):
    user_file(home, '[[markers]]\nname = "a"\nsummary_open = "<s>"\n[[markers]]\nname = "b"\n')
    assert config.load().markers == [{"name": "a", "summary_open": "<s>"}, {"name": "b"}]


# ---------------------------------------------------------------- which files


def test_a_project_file_is_found_up_to_the_root_of_the_repository(home, monkeypatch):
    (home / "zoomr.toml").write_text("temp = 9")
    monkeypatch.chdir(home / "repo" / "deep" / "er")
    assert in_force() == {}, "what lies above the repository is not its file"
    (home / "repo" / "zoomr.toml").write_text("temp = 1")
    assert in_force() == {"temp": 1}
    (home / "repo" / "deep" / "zoomr.toml").write_text("temp = 2")
    assert in_force() == {"temp": 2}


def test_the_root_of_the_repository_is_the_end_wherever_it_lies(home, tmp_path, monkeypatch):
    for base in (home / "work", tmp_path / "outside"):
        (base / "inner" / ".git").mkdir(parents=True)
        (base / "inner" / "deep").mkdir()
        (base / "zoomr.toml").write_text("temp = 1")
        monkeypatch.chdir(base / "inner" / "deep")
        assert in_force() == {}, base
        (base / "inner" / "zoomr.toml").write_text("temp = 2")
        assert in_force() == {"temp": 2}, base


def test_without_a_repository_parents_count_below_the_home_folder_only(home, tmp_path, monkeypatch):
    (home / "plain" / "in").mkdir(parents=True)
    (tmp_path / "outside" / "in").mkdir(parents=True)
    (home / "plain" / "zoomr.toml").write_text("temp = 1")
    (tmp_path / "outside" / "zoomr.toml").write_text("temp = 2")
    monkeypatch.chdir(home / "plain" / "in")
    assert in_force() == {"temp": 1}
    monkeypatch.chdir(tmp_path / "outside" / "in")
    assert in_force() == {}, "a parent may be a folder that everybody writes to"
    monkeypatch.chdir(tmp_path / "outside")
    assert in_force() == {"temp": 2}


def test_a_project_file_of_another_user_is_not_read(home, monkeypatch):
    Path("zoomr.toml").write_text("temp = 1")
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    path = Path("zoomr.toml").resolve()
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **more: _owned(real(self, **more), 4321 if self == path else 0))
    assert config.paths()[0].refused == "it belongs to another user"
    assert in_force() == {}


def _owned(found: os.stat_result, uid: int) -> os.stat_result:
    parts = list(found)
    parts[4] = uid
    return os.stat_result(parts)


def test_the_users_file_can_be_named(home, tmp_path, monkeypatch):
    user_file(home, "temp = 1")
    (tmp_path / "other.toml").write_text("temp = 2")
    monkeypatch.setenv("ZOOMR_CONFIG", str(tmp_path / "other.toml"))
    assert in_force() == {"temp": 2}
    monkeypatch.setenv("ZOOMR_CONFIG", os.devnull)
    assert in_force() == {}
    monkeypatch.setenv("ZOOMR_CONFIG", "missing.toml")
    with pytest.raises(UsageError, match="ZOOMR_CONFIG: there is no file missing.toml"):
        config.load()
    assert [source.exists for source in config.paths()] == [False, False]


def test_the_users_folder(home, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    assert user_folder("config") == home / ".config/zoomr-local"
    assert user_folder("state") == home / ".local/state/zoomr-local"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert user_folder("config") == tmp_path / "zoomr-local"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert user_folder("config") == home / ".config/zoomr-local"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert user_folder("config") is None
    assert [source.kind for source in config.paths()] == ["project"]
    assert config.load().settings == ()


def test_a_parent_that_may_not_be_entered_has_no_project(home, monkeypatch):
    """Root may enter every folder, so the system's answer is played."""
    stat = os.stat

    def denied(path, *more, **options):
        if str(path).endswith(".git"):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *more, **options)

    monkeypatch.setattr(os, "stat", denied)
    assert config.project_folders(Path("/srv/data"), None) == [Path("/srv/data")]


def test_a_removed_current_directory_has_no_project(home, monkeypatch):
    (home / "gone").mkdir()
    monkeypatch.chdir(home / "gone")
    (home / "gone").rmdir()
    assert [source.kind for source in config.paths()] == ["user"]
    assert config.load().settings == ()


# ---------------------------------------------------------------- what is wrong


def check(home, text, project=False):
    path = home / "repo/zoomr.toml" if project else user_file(home, "")
    path.write_text(text)
    config.load().check(REGISTRY, {"temp", "kv-budget"}, {"overwrite": "it is for one run"})


@pytest.mark.parametrize("text, message", [
    ("\ntmp = 1", r"config.toml, line 2: tmp is no setting; did you mean temp\?"),
    ("[chat]\nzzz = 1", r"line 2: zzz is no setting of chat; `zoomr config show` lists them"),
    ("[eval]\ntemp = 1", "line 2: temp is no setting of eval"),
    ("[caht]\ntemp = 1", r"line 2: there is no command caht; did you mean chat\?"),
    ("temp.x = 1", "line 1: temp takes a value, not a table"),
    ("overwrite = true", "line 1: overwrite is no setting: it is for one run"),
    ("kv-budget = 1\nkv_budget = 2", "line 2: kv-budget is set twice, see line 1"),
    ("[models.x]\nmodel = 1", "line 2: the settings of a model cannot choose the model"),
    ('[models."x".chat]\ntmep = 1', "line 2: tmep is no setting of chat; did you mean temp"),
    ("models = 3", r"line 1: models are tables, for example \[models"),
    ("models.x = 3", r"line 1: models are tables, for example \[models"),
    ("markers = 3", r"line 1: markers are tables, each under \[\[markers\]\]"),
    ("[markers]\nname = 3", r"line 1: markers are tables, each under \[\[markers\]\]"),
    ("temp = 1\n\ntemp = = 2", "config.toml, line 3: no TOML: "),
    ("temp = 1\ntemp = 2", "config.toml, line 2: no TOML: cannot overwrite a value"),
    ('stop = """', "config.toml, line 1: no TOML: "),
    ("x = " + "[" * 20000, "config.toml"),
    ("#" * 70000, "more than 64 KiB are no settings"),
    ("\n[" + "a." * 30000 + "a]", "line 2: a key of more than 16 names"),
    ("\n\na" + ' . "\\"" . \'b\'' * 3000 + " = 1", "line 3: a key of more than 16 names"),
    ("x = {" + "a." * 2000 + "a = 1}", "line 1: a key of more than 16 names"),
    ("temp = " + "9" * 5000, "config.toml: no setting is a number of thousands of digits"),
    ("kv-budget = 0x" + "f" * 5000, "config.toml, line 1: kv-budget: no setting is a number of more than 64 bits"),
    ("stop = [['x', 0x1" + "0" * 16 + "]]", "line 1: stop: no setting is a number of more than 64 bits"),
])  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_line(home, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        check(home, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ('[[markers]]\nname = "a"', "zoomr.toml, line 1: a project file may not have markers"),
    ("[models.x]\ntemp = 1", "zoomr.toml, line 1: a project file may not have models"),
    ('model = "evil/repo"', r"zoomr.toml, line 1: a project file may not set model; set it in your own file .*ZOOMR_MODEL"),
    ('[chat]\nmodel = "evil/repo"', "zoomr.toml, line 2: a project file may not set model"),
])  # fmt: skip
def test_what_a_project_may_not_set(home, text, message):
    with pytest.raises(UsageError, match=message):
        check(home, text, project=True)


def test_names_in_a_file_cannot_write_to_the_terminal(home):
    with pytest.raises(UsageError, match="is no setting") as caught:
        check(home, '"\\u001b]0;owned\\u0007" = 1', project=True)
    assert str(caught.value).isprintable()


def test_what_is_no_text_or_no_file(home):
    path = user_file(home, "")
    path.write_bytes(b"temp = 1\n# caf\xe9\n")
    with pytest.raises(UsageError, match="config.toml, line 2: not UTF-8"):
        config.load()
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="config.toml is no file"):
        config.load()
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="config.toml is no file"):
        config.load()
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(UsageError, match="config.toml cannot be read: No such file"):
        config.load()


def test_variables_that_are_nearly_settings_are_named():
    names = ["ZOOMR_KV_BUDGTE", "ZOOMR_DEBUG", "ZOOMR_LIB_DIR", "ZOOMR_TEMP", "ZOOMR_SOMETHING", "KV_BUDGET"]
    assert config.mistaken_variables(names, {"kv-budget", "temp"}) == [("ZOOMR_KV_BUDGTE", "ZOOMR_KV_BUDGET")]


# ---------------------------------------------------------------- lines

KEYS = st.sampled_from(["a", "b", "c", "d", '"e f"'])
VALUES = st.sampled_from(["1", "'[x]'", '"""\na = 2\n[b]\n"""', "[\n 1,\n # c = 3\n 2]", "{ y = 1 }", "true # d = 4"])
STATEMENTS = st.lists(st.tuples(KEYS, VALUES), max_size=4, unique_by=lambda pair: pair[0])


@settings(deadline=None)
@given(tables=st.lists(st.tuples(st.sampled_from(["t", "u.v", '"w x"']), STATEMENTS), max_size=3, unique_by=lambda pair: pair[0]))
def test_every_key_is_found_on_its_line(tables):
    """The lines are those on which the text was put together."""
    lines, expected = [], {}
    for table, statements in tables:
        path = tuple(part.strip('"') for part in table.split("."))
        lines.append(f"[{table}]")
        expected[path] = len(lines)
        for key, value in statements:
            expected[(*path, key.strip('"'))] = len(lines) + 1
            lines += f"{key} = {value}".split("\n")
    found = key_lines("\n".join(lines), lambda part: config._toml(Path("x"), part))
    assert {path: line for path, line in found.items() if path in expected} == expected


def parsed(text: str) -> tuple[dict, int]:
    """What `key_lines` finds, and the characters that it has had parsed for that."""
    characters = [0]

    def parse(part):
        characters[0] += len(part)
        return config._toml(Path("x"), part)

    return key_lines(text, parse), characters[0]


def test_long_statements_are_read_once_or_twice_and_hostile_ones_until_a_bound():
    text = "a = 1\nb = [\n" + "1,\n" * 10_000 + "]\nc = 2"
    found, characters = parsed(text)
    assert found == {("a",): 1, ("b",): 2, ("c",): 10_004} and characters < 2 * len(text)
    small, large = (parsed("a = 1\nb = [\n" + "[1],\n" * n + "]\nc = 2") for n in (100, 12_000))
    assert small[0] == {("a",): 1, ("b",): 2, ("c",): 104} and large[0] == {("a",): 1}
    assert large[1] < MOST_CHARACTERS + 100_000


DOTTED = ".".join("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("text", [
    f'# see, {DOTTED} = 1\nstop = "{DOTTED}"  # [{DOTTED}\n', f'stop = ["x, {DOTTED}", \'[{DOTTED}\']', f'system = """\n{DOTTED} = 1\n[{DOTTED}]\n"""',
    f"system = \'\'\'\n{DOTTED}\'\'\'", f'stop = "\\", {DOTTED}"', '"' + DOTTED + '" = 1', ".".join("abcdefghijklmnop") + " = 1",
])  # fmt: skip
def test_dots_in_strings_and_comments_make_no_deep_key(text):
    config._toml(Path("x"), text)
    assert config._deep_line(text) is None


@pytest.mark.parametrize("text, line", [
    (f"{DOTTED} = 1", 1), (f"\n[{DOTTED}]", 2), (f"\na = {{ {DOTTED} = 1 }}", 2), (f"a = [1, {{b = 1, {DOTTED} = 2}}]", 1),
    (".".join(f'"{"a" * 100}"' for _ in range(17)) + " = 1", 1), (".".join(["\'a.b\'"] * 17) + " = 1", 1),
    (f'a = """\n"b\n"""\nc = "#"\n {DOTTED} = 1', 5), (f'a = "#"\n{DOTTED}', 2), (f"a = \'\\\'\n[{DOTTED}", 2),
])  # fmt: skip
def test_a_deep_key_is_found_with_its_line(text, line):
    assert config._deep_line(text) == line


def test_the_backport_for_python_3_10_reads_the_same(home, monkeypatch):
    pytest.importorskip("tomli")
    text = '[chat]\ntemp = 0.5\nstop = ["a"]\n[[markers]]\nname = "a"\n'
    user_file(home, text)
    ours = config.load()
    monkeypatch.setattr("sys.version_info", (3, 10, 0))
    assert config.load() == ours
    with pytest.raises(UsageError, match="config.toml, line 2: no TOML: "):
        check(home, "a = 1\nb = = 2")
