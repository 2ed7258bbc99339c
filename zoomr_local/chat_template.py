"""What a chat template (Jinja) may use: the functions and tags that those in GGUF files are written for. Only `model.py` renders one.

A template comes from a stranger's file and is a program, so it runs in Jinja's sandbox, without files and without the environment.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache, lru_cache
from typing import Any, Mapping, NoReturn, Sequence

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationTag(Extension):
    """``{% generation %}`` marks for training what a model wrote; here its body is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(source: str, messages: Sequence[Mapping[str, str]], **more: Any) -> str:
    """The text of ``messages``, open for a reply. Raises whatever the template raises, which can be any exception."""
    return _compiled(source).render(messages=list(messages), add_generation_prompt=True, **more)


@lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    extensions = ["jinja2.ext.loopcontrols", _GenerationTag]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return made


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
