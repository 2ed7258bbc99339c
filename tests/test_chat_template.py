"""What the chat templates of GGUF files use of Jinja: a date, loop control, training's tags; and what they may not."""

import re

import jinja2
import pytest

from zoomr_local.chat_template import render

ASK = [{"role": "user", "content": "<b>?"}]


def test_what_templates_of_real_models_use():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}", ASK))
    assert render("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", ASK) == "02"
    text = "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{% endfor %}|{{ add_generation_prompt }}{{ eos_token }}"
    assert render(text, ASK, eos_token="</s>") == "<b>?|True</s>"
    assert render("{% if a %}\n  {% set b = 1 %}\n{% endif %}\nx\n", ASK, a=True) == "x", "blocks leave no lines"


def test_a_template_refuses_and_cannot_leave_the_sandbox():
    with pytest.raises(jinja2.TemplateError, match="no system"):
        render("{{ raise_exception('no system') }}", ASK)
    for source in ("{{ messages.__class__.__mro__ }}", "{{ strftime_now.__globals__['datetime'] }}", "{% set _ = messages.append(1) %}"):
        with pytest.raises(jinja2.exceptions.SecurityError):
            render(source, ASK)
    with pytest.raises(jinja2.exceptions.TemplateSyntaxError):
        render("{% generation %}", ASK)
