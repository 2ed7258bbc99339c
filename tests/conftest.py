"""Makes the helpers beside the tests importable by name, keeps the settings of whoever runs them out, and what several files use."""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

os.environ["ZOOMR_CONFIG"] = os.devnull

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun in the background of a script: programs that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def model():
    """The bundled model, loaded."""
    from zoomr_local.model import Model
    from zoomr_models import bundled_model_path

    loaded = Model.open(bundled_model_path())
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def prompt(model):
    """Tokens of a problem twice over: longer than a budget of 192, so that they are read in pieces and paged."""
    from zoomr_models.tasks import generate

    problem = generate("series", 1, seed=5, thoughts=9, split="dev")[0]
    return model.tokenize(model.render([{"role": "user", "content": problem.prompt}])) * 2


@pytest.fixture(scope="module")
def without_waiting_for_the_disk():
    """Sessions are written without fsync."""
    from zoomr_local import session_files

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session_files, "sync", lambda file: None)
        yield


@pytest.fixture
def chat(tmp_path):
    """A chat on a scripted engine of 192 cells."""
    from chats import Chat
    from talk import talking

    with talking(budget=192) as engine:
        yield Chat(engine, tmp_path)


@pytest.fixture(scope="module")
def browser_process():
    """One browser for a file's tests: starting one takes longer than anything they do with it."""
    import browser

    with browser.Page(browser.find()) as running:
        yield running


@pytest.fixture
def shown(browser_process):
    """That browser, with the window and the colours that tests begin with."""
    browser_process.look()
    return browser_process


@pytest.fixture
def foreground():
    """A shell's background jobs ignore SIGINT, and so may the tests' own process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
