"""What people have on their disks becomes problems, or one clear error with its line; nothing is guessed silently."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zoomr_local.errors import UsageError
from zoomr_local.openai_batch import record_of, result_line
from zoomr_local.problem_input import FORMS, read_input
from zoomr_local.problems import Columns, Problem
from zoomr_local.template import Template


def read(data: str | bytes, source: str = "in.csv", form: str | None = None, encoding: str | None = None, **columns) -> list[Problem]:
    if "template" in columns:
        columns["template"] = Template.parse(columns["template"])
    return read_input(data.encode() if isinstance(data, str) else data, source, form, encoding, Columns(**columns)).problems


def asked(problems) -> list[tuple]:
    return [(p.id, p.messages[-1]["content"], p.answer, p.line) for p in problems]


def complaint(*arguments, **more) -> str:
    with pytest.raises(UsageError) as caught:
        read(*arguments, **more)
    return str(caught.value)


# ---------------------------------------------------------------- tables


def test_a_table_finds_its_columns_by_name_and_numbers_its_rows():
    text = 'Level,Problem,Solution\n1,"What is 2 + 2,\nin words?",four\n\n2,"Say ""hi""",\n'
    assert asked(read(text)) == [(1, "What is 2 + 2,\nin words?", "four", 2), (2, 'Say "hi"', None, 5)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_delimiters_and_line_ends_of_every_spreadsheet(delimiter, ending):
    text = ending.join(delimiter.join(row) for row in (["id", "question", "answer"], ["a", "p", "1"], ["b", "q", "2"])) + ending
    assert [(p.id, p.answer) for p in read(text)] == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1"])
def test_encodings_are_read_by_their_mark_or_their_name(encoding):
    data = "question,answer\nWie groß?,6\n".encode(encoding)
    marked = encoding in ("utf-8-sig", "utf-16")
    assert asked(read(data, encoding=None if marked else encoding)) == [(1, "Wie groß?", "6", 2)]


def test_named_columns_and_an_id_column():
    text = "key,Q,A\nx,one?,1\ny,two?,2\n"
    assert asked(read(text, question="Q", answer="A", id="key")) == [("x", "one?", "1", 2), ("y", "two?", "2", 3)]


def test_a_cell_longer_than_pythons_own_limit_is_no_error():
    assert len(read("question\n" + "x" * 300_000)[0].messages[0]["content"]) == 300_000


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("a,b\n1,2\n", {}, "no column is called question, problem or prompt; name it with --question-column, one of: a, b"),
        ("question,answer\np\n", {}, "line 2: has 1 cell, the header has 2"),
        ('question,answer\n"p,1\n', {}, "line 2: not CSV (unexpected end of data)"),
        ('question,answer\n"p"x,1\n', {}, "line 2: not CSV"),
        ("question,answer\n ,1\n", {}, "line 2: question is empty"),
        ("id,question\na,p\na,q\n", {}, 'line 3: id "a" stands in line 2 already'),
        ("question,question\np,q\n", {}, "the header has 'question' more than once"),
        ("question,prompt\np,q\n", {}, "the header has question and prompt; say which with --question-column"),
        ("question\np\n", {"answer": "Lösung"}, "--answer-column Lösung: the header has question"),
        ("question\n", {}, "in.csv holds no problems"),
        ("", {}, "in.csv holds no problems"),
        (b"question\np\nx\xffy\n", {}, "line 3 is not UTF-8 (byte 2); name its encoding with --encoding"),
        (b"question\np\0q\n", {}, "line 2 holds a NUL byte"),
        ("question\np\n", {"encoding": "klingon"}, "--encoding klingon: there is no such encoding"),
        ("question\np\n", {"encoding": "hex"}, "--encoding hex: there is no such encoding"),
        (b"\xff\xfeq", {}, "is not utf-16"),
        ("question\np\n", {"form": "xls"}, "--input-format xls: choose one of jsonl, csv, lines, paragraphs, openai"),
    ],
)
def test_a_bad_table_is_one_error_with_its_line(text, more, expected):
    assert expected in complaint(text, **more)


# ---------------------------------------------------------------- plain text


def test_a_text_is_one_problem_a_line_until_a_blank_line_stands_between():
    assert asked(read("one?\n two? \r\n\n", "in.txt")) == [(1, "one?", None, 1), (2, "two?", None, 2)]
    assert asked(read("\none\nmore?\n \n\ntwo?", "in.txt")) == [(1, "one\nmore?", None, 2), (2, "two?", None, 6)]


def test_lines_and_paragraphs_can_be_asked_for():
    assert [p.messages[0]["content"] for p in read("a\nb\n\nc", "in.txt", "lines")] == ["a", "b", "c"]
    assert [p.messages[0]["content"] for p in read("a\nb", "in.txt", "paragraphs")] == ["a\nb"]


def test_columns_of_a_text_are_an_error():
    assert "which has no columns" in complaint("a", "in.txt", question="q")


@pytest.mark.parametrize(
    ("data", "form"),
    [
        ("question,answer\np,1\n", "csv"),
        ("name;Prompt\nx;p\n", "csv"),
        ("What is a question, and who asks?\n", "lines"),
        ('{"id": 1, "prompt": "p"}\n', "jsonl"),
        ('\n{"custom_id": "a", "body": {"messages": [{"role": "user", "content": "p"}]}}\n', "openai"),
        ("a\n\nb", "paragraphs"),
    ],
)
def test_an_input_without_a_telling_name_is_known_by_its_content(data, form):
    found = read_input(data.encode(), "standard input")
    assert (found.form, found.guessed) == (form, True)


def test_a_name_that_tells_is_believed():
    assert read_input(b"question,x\n", "in.txt").form == "lines"
    assert "line 1: not JSON" in complaint("question,answer\np,1\n", "in.jsonl")


# ---------------------------------------------------------------- JSON lines and templates


def test_json_lines_may_call_their_prompt_question_or_what_is_said():
    assert asked(read('{"id": 1, "question": "q", "answer": 2}', "in.jsonl")) == [(1, "q", "2", 1)]
    assert asked(read('{"n": 1, "q": "x", "a": "y"}', "in.jsonl", question="q", answer="a", id="n")) == [(1, "x", "y", 1)]
    assert 'line 1: has no "q"' in complaint('{"id": 1}', "in.jsonl", question="q")


def test_lines_without_ids_are_numbered_unless_one_of_them_has_one():
    assert asked(read('{"question": "p", "answer": "1"}\n\n{"question": "q"}\n', "in.jsonl")) == [(1, "p", "1", 1), (2, "q", None, 3)]
    assert 'line 1: needs an "id"' in complaint('{"prompt": "p"}\n{"id": 1, "prompt": "q"}\n', "in.jsonl")
    assert 'line 1: needs an "n"' in complaint('{"prompt": "p"}\n', "in.jsonl", id="n")


@pytest.mark.parametrize("keys", [("prompt", "question"), ("question", "problem"), ("messages", "problem")])
def test_of_several_keys_that_could_be_the_question_none_is_guessed(keys):
    values = {"messages": [{"role": "user", "content": "m"}], "prompt": "p", "question": "q", "problem": "r"}
    line = json.dumps({"id": 1, **{key: values[key] for key in keys}})
    first, second = keys
    assert f'line 1: has "{first}" and "{second}"; say which with --question-column' in complaint(line, "in.jsonl")
    for key in keys:
        (problem,) = read(line, "in.jsonl", question=key)
        assert problem.messages[0]["content"] == {"messages": "m"}.get(key, values[key])
    assert read(json.dumps({"id": 1, first: values[first], second: None}), "in.jsonl")[0].messages[0]["content"] == {"messages": "m"}.get(first, values[first])


def test_keys_in_other_letters_are_named_in_the_error():
    assert '"Question" is one with --question-column' in complaint('{"id": 1, "Question": "q"}', "in.jsonl")


@pytest.mark.parametrize("line", ['{"id": 1, "prompt": "p"}', json.dumps({"custom_id": "a", "body": {}})])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_document_is_one_error_that_says_how_to_make_lines_of_it(line, indent):
    array, inside = [json.loads(line)] * 3, {"a": 1, "rows": [json.loads(line)]}
    assert complaint(json.dumps(array, indent=indent), "my file.json") == (
        "my file.json is one JSON array of 3 entries, not one object a line; make lines of it: jq -c '.[]' 'my file.json' > lines.jsonl"
    )
    assert "jq -c '.[]' in.jsonl" in complaint(json.dumps(array, indent=indent), "in.jsonl", "openai")
    if indent:
        assert "one JSON object over several lines" in complaint(json.dumps(inside, indent=indent), "in.json")
        assert "jq -c '.rows[]' in.json >" in complaint(json.dumps(inside, indent=indent), "in.json")


def test_a_template_wraps_the_fields_of_a_row_and_braces_of_its_own():
    text = Template.parse("{subject}: {question}\nEnd with \\boxed{{}}.")
    assert text.fill({"subject": "sums", "question": "{x}?"}) == "sums: {x}?\nEnd with \\boxed{}."
    problems = read("subject,prompt\nsums,2+2?\n", template="{subject}: {question} {prompt}")
    assert problems[0].messages == ({"role": "user", "content": "sums: 2+2? 2+2?"},)
    (problem,) = read('{"id": 7, "a": 2, "b": [1, "x"]}', "in.jsonl", template="{id}: {a} in {b}?")
    assert problem.messages[0]["content"] == '7: 2 in [1, "x"]?'
    assert read("p", "in.txt", template="Q: {question}")[0].messages[0]["content"] == "Q: p"


def test_a_template_wraps_the_last_users_message():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (problem,) = read(json.dumps({"id": 1, "messages": chat}), "in.jsonl", template="<{question}>")
    assert problem.messages == (chat[0], {"role": "user", "content": "<u>"})


def test_an_unknown_field_names_the_line_and_what_there_is():
    said = complaint("prompt,subject\np,s\n", template="{quesiton}")
    assert "line 2: the template's field {quesiton} is not there (did you mean question?); there are prompt, question, subject" in said


@pytest.mark.parametrize("text", ["{question.__class__}", "{question[0]}", "{question!r}", "{question:>99999999}", "{}", "{ }", "{", "}", "{a", "{0}{", "none"])
def test_a_template_is_no_program(text):
    with pytest.raises(UsageError, match="--template"):
        Template.parse(text)


# ---------------------------------------------------------------- OpenAI batch lines


def batch(body: dict | None = None, **more) -> Problem:
    body = {"messages": [{"role": "user", "content": "p"}], **(body or {})}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body, **more}
    (problem,) = read(json.dumps(line), "in.jsonl")
    return problem


def test_a_request_becomes_a_problem_with_its_own_options():
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    problem = batch({
        "messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]}],
        "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 1, "stream": False, "tools": [], "logprobs": False,
        "frequency_penalty": 0, "user": None, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "repeat_last_n": 9, "reasoning_effort": None, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    })  # fmt: skip
    assert problem.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "pq"})
    assert problem.options == {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "top_k": 20, "min_p": 0.1, "repeat_penalty": 1.1, "repeat_last_n": 9, "schema": schema,
    }  # fmt: skip
    assert batch({"top_k": -1}).options == {"top_k": 0}
    assert (problem.id, problem.refused, problem.notes) == ("a", None, ())
    assert problem.asked()["options"]["temperature"] == 0.5 and "options" not in batch().asked()


def test_what_does_not_change_the_answer_is_passed_over_and_said():
    problem = batch({"model": "gpt-4o", "user": "me", "metadata": {}, "messages": [{"role": "user", "content": "p", "name": "n"}]})
    assert problem.refused is None
    assert problem.notes == (
        "messages[].name is passed over", "body.model is passed over: -m says which model answers", "body.user is passed over",
        "body.metadata is passed over",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"tools": [{}]}, "body.tools is not supported"),
        ({"logprobs": True}, "body.logprobs true is not supported"),
        ({"frequency_penalty": 0.5}, "body.frequency_penalty 0.5 is not supported: repeat_penalty is"),
        ({"n": 3}, "body.n 3 is not supported: one choice is made of a request; --votes takes several"),
        ({"reasoning_effort": "low"}, 'body.reasoning_effort "low" is not supported'),
        ({"reasoning_effort": "medium"}, "give --think-budget for all lines"),
        ({"verbosity": "low"}, 'body.verbosity "low" is not supported: leave it out'),
        ({"typical_p": 0.5}, "body.typical_p 0.5 is not supported"),
        ({"top_k": 1.5}, "body.top_k 1.5 must be a whole number"),
        ({"top_k": -2}, "body.top_k -2"),
        ({"min_p": 1}, "body.min_p 1 must be a number of 0 to below 1"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "body.repeat_penalty 1.1 and body.repetition_penalty 1.2 say two things"),
        ({"messages": [{"role": "user", "content": "p", "audio": {"id": "x"}}]}, "messages[].audio is not supported"),
        ({"temperature": 3}, "body.temperature 3 must be a number of 0 to 2"),
        ({"max_tokens": "many"}, "body.max_tokens"),
        ({"seed": -1}, "body.seed -1"),
        ({"stop": [""]}, "body.stop"),
        ({"messages": "p"}, "body.messages must be a list"),
        ({"messages": []}, "must be a list that is not empty"),
        ({"messages": [{"role": "tool", "content": "p"}]}, 'role "tool"'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 'type "image_url" is not supported, only text'),
        ({"response_format": {"type": "xml"}}, "body.response_format must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "a"}}}}, "'pattern', which is not supported"),
    ],
)
def test_what_would_make_another_answer_is_refused_for_that_request_alone(body, why):
    assert why in batch(body).refused


def test_a_template_needs_a_users_message_to_wrap_in_a_batch_too():
    body = {"messages": [{"role": "system", "content": "s"}]}
    (problem,) = read(json.dumps({"custom_id": "a", "body": body}), "in.jsonl", template="<{question}>")
    assert "the template wraps the last user's message" in problem.refused


def test_another_address_is_refused_and_no_request_is_a_bad_line():
    assert "only POST /v1/chat/completions is" in batch(url="/v1/embeddings").refused
    assert 'line 2: needs a "body"' in complaint('{"custom_id": "a", "body": {}}\n{"custom_id": "b"}\n', "in.jsonl")
    assert 'line 2: needs a "custom_id"' in complaint('{"custom_id": "a", "body": {}}\n{"custom_id": 3, "body": {}}\n', "in.jsonl")


RECORD = {
    "id": "a", "answer": "4", "content": "It is 4.", "reasoning": "two and two", "finish_reason": "kv_full",
    "usage": {"prompt_tokens": 5, "completion_tokens": 7, "reasoning_tokens": 3}, "timing": {}, "kv": {}, "seed": 0, "model": "m", "key": "k",
}  # fmt: skip


def test_a_record_becomes_a_result_line_and_comes_back_whole():
    line = result_line(RECORD)
    assert line["custom_id"] == "a" and line["error"] is None
    body = line["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "It is 4.", "reasoning_content": "two and two"}
    assert (body["choices"][0]["finish_reason"], line["zoomr"]["finish_reason"]) == ("length", "kv_full")
    assert body["usage"]["total_tokens"] == 12
    assert record_of(json.loads(json.dumps(line))) == RECORD
    failed = {**{k: v for k, v in RECORD.items() if k not in ("usage", "timing", "kv")}, "content": "", "reasoning": "",
              "error": {"type": "T", "message": "m"}}  # fmt: skip
    assert result_line(failed)["error"] == {"code": "T", "message": "m"} and result_line(failed)["response"] is None
    assert record_of(result_line(failed)) == failed
    with pytest.raises(ValueError):
        record_of({"id": "a"})


# ---------------------------------------------------------------- anything at all


SNIPPETS = st.sampled_from([
    b"question,answer\n", b"id;prompt\n", b'"', b",", b";", b"\t", b"\n", b"\r", b"\n\n", b'{"id": 1, "prompt": "p"}', b"{", b"[", b"\0", b"\xff\xfe",
    b"\xef\xbb\xbf", b'{"custom_id": "a", "body": {"messages": [{"role": "user", "content": "p"}]}}', b'"body": ', b"null", b"1e999", b"\xed\xa0\x80", b"p",
])  # fmt: skip
SCRAPS = st.binary(max_size=60) | st.lists(SNIPPETS | st.binary(max_size=4), max_size=12).map(b"".join)


@settings(deadline=None)
@given(
    SCRAPS, st.sampled_from(["in.csv", "in.tsv", "in.txt", "in.jsonl", "standard input"]), st.sampled_from([None, *FORMS]),
    st.sampled_from([None, "utf-8", "latin-1", "utf-16", "utf-7", "idna", "hex", "\0"]), st.sampled_from([None, "Q: {question}", "{x}"]),
    st.sampled_from([None, "question", "id"]),
)  # fmt: skip
@example(b'{"custom_id":"a","body":{"messages":[{"role":"user","content":[{"type":[]}]}]}}', "in.jsonl", None, None, None, None)
@example(b'{"id": 1, "prompt": "' + b"1" * 9 + b'", "answer": ' + b"1" * 5000 + b"}", "in.jsonl", None, None, None, None)
def test_any_bytes_are_problems_or_a_usage_error(data, source, form, encoding, template, column):
    columns = Columns(column, None, None, None if template is None else Template.parse(template))
    try:
        found = read_input(data, source, form, encoding, columns)
    except UsageError as error:
        assert str(error).strip()
        return
    assert found.problems and found.form in FORMS
    for problem in found.problems:
        assert problem.refused or problem.messages
        json.dumps(problem.asked())


BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "text", "json_schema", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
        "messages", "role", "content", "type", "text", "stop", "n", "seed", "temperature", "max_tokens", "response_format", "json_schema", "schema",
        "tools", "logprobs", "logit_bias", "modalities", "user", "top_p", "tool_calls",
    ]), inner, max_size=5),
    max_leaves=15,
)  # fmt: skip


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "stop", "n", "temperature", "response_format", "tools", "seed"]), BODIES), BODIES)
def test_any_body_is_a_problem_a_refusal_or_a_bad_line(body, rest):
    line = {"custom_id": "a", "method": rest, "body": {**(rest if isinstance(rest, dict) else {}), **body}}
    (problem,) = read(json.dumps(line), "in.jsonl")
    assert problem.refused or problem.messages
