"""Lines of OpenAI's batch format: requests read as problems, and records written as results.

Pure. Of a request's body what this program can do is done, what would only change how it is served is passed over with
a note in the record, and all else is refused, for that request alone: it would, or could, have made another answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UsageError
from .gguf_file import printable
from .problems import Columns, Gathered, Problem, checked_messages, json_lines, prompt_messages, refuse_one_document
from .sampling import MAX_REPEAT_LAST
from .schema import compile_schema

URL = "/v1/chat/completions"
EXAMPLE = '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "What is 2 + 2?"}]}}'

_HARMLESS = {  # a value of theirs that asks for nothing
    "stream": (False,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "logprobs": (False,), "logit_bias": ({},),
    "modalities": (["text"],), "frequency_penalty": (0,), "presence_penalty": (0,), "top_logprobs": (0,), "n": (1,),
}  # fmt: skip
_PASSED_OVER = {
    "model", "user", "metadata", "store", "stream", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls", "cache_prompt", "id_slot", "priority", "request_id",
}  # fmt: skip
"""What only changes how a request is served or billed, and `parallel_tool_calls`, as there are no tools."""
_CURES = {
    "n": "one choice is made of a request; --votes takes several",
    "reasoning_effort": "its words are no count of tokens; leave it out, and give --think-budget for all lines",
    "frequency_penalty": "repeat_penalty is",
    "presence_penalty": "repeat_penalty is",
}
_MESSAGE_PASSED_OVER = {"name", "refusal", "annotations", "reasoning_content"}
"""What chat templates have no place for, or drop from earlier turns."""
_MESSAGE_READ = {"role", "content", "tool_calls", "function_call"}
_FINISH = {"stop": "stop"}
"""The reasons that OpenAI's format has a word for; every other is ``length``, with our own word in ``zoomr``."""


def read_batch(lines: Iterable[bytes], source: str, columns: Columns = Columns()) -> list[Problem]:
    """Every request of a batch file; ``custom_id`` becomes the problem's id.

    Raises UsageError that names the lines which are no requests. A request that cannot be served is a problem that is
    refused.
    """
    if columns.question or columns.answer or columns.id:
        raise UsageError(f"{source} holds OpenAI batch lines, which have no columns; leave out --question-column, --answer-column and --id-column")
    lines = list(lines)
    refuse_one_document(lines, source)
    gathered = Gathered(source)
    for number, data in json_lines(lines, gathered):
        if not isinstance(data.get("custom_id"), str):
            gathered.bad(number, 'needs a "custom_id" (text)')
        elif not isinstance(data.get("body"), dict):
            gathered.bad(number, 'needs a "body" (an object)')
        else:
            gathered.add(_request(data, number, columns))
    return gathered.whole(EXAMPLE)


def _request(data: dict[str, Any], number: int, columns: Columns) -> Problem:
    body = {name: value for name, value in data["body"].items() if value is not None}
    notes: list[str] = []
    try:
        if data.get("method", "POST") != "POST" or data.get("url", URL) != URL:
            raise ValueError(f"{data.get('method', 'POST')} {data.get('url', URL)} is not served; only POST {URL} is")
        messages = _messages(body, notes)
        if columns.template is not None:
            users = [i for i, message in enumerate(messages) if message["role"] == "user"]
            if not users:
                raise ValueError("the template wraps the last user's message, and there is none")
            messages[users[-1]] = prompt_messages(messages[users[-1]]["content"], {}, columns.template)[0]
        options = _options(body, f"body.response_format of {data['custom_id']!r}")
        _others(body, notes)
    except (ValueError, UsageError) as error:
        return Problem(data["custom_id"], (), None, number, refused=str(error))
    return Problem(data["custom_id"], tuple(messages), None, number, options, notes=tuple(notes))


def _messages(body: dict[str, Any], notes: list[str]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise ValueError("body.messages must be a list")
    plain = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("every message must be an object")
        if message.get("role") not in ("system", "developer", "user", "assistant") or message.get("tool_calls") or message.get("function_call"):
            raise ValueError(f"a message of role {json.dumps(message.get('role'))[:40]} or with a tool's calls is not supported")
        role = "system" if message["role"] == "developer" else message["role"]
        plain.append({"role": role, "content": _content(message.get("content"))})
        for name in (name for name, value in message.items() if name not in _MESSAGE_READ and value not in (None, [])):
            if name not in _MESSAGE_PASSED_OVER:
                raise ValueError(printable(f"messages[].{name} is not supported; leave it out"))
            _note(notes, f"messages[].{name} is passed over")
    return list(checked_messages(plain))


def _content(content: Any) -> Any:
    """Text, also of a list of text parts. Raises ValueError for pictures, sounds and files."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a message's part of type {json.dumps(kind)[:40]} is not supported, only text")
    return "".join(part["text"] for part in content)


def _is_whole(value: int | float) -> bool:
    return isinstance(value, int)


_OPTIONS = {  # key of a body: our option, the values it may have, how that is said
    "max_tokens": ("max_tokens", lambda v: _is_whole(v) and 1 <= v < 2**31, "a whole number of 1 to 2147483647"),
    "max_completion_tokens": ("max_tokens", lambda v: _is_whole(v) and 1 <= v < 2**31, "a whole number of 1 to 2147483647"),
    "temperature": ("temperature", lambda v: 0 <= v <= 2, "a number of 0 to 2"),
    "top_p": ("top_p", lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    "seed": ("seed", lambda v: _is_whole(v) and 0 <= v < 2**32 - 1, "a whole number of 0 to 4294967294"),
    # of other servers that read these lines: llama.cpp, vLLM
    "top_k": ("top_k", lambda v: _is_whole(v) and -1 <= v < 2**31, "a whole number, 0 or -1 for none"),
    "min_p": ("min_p", lambda v: 0 <= v < 1, "a number of 0 to below 1"),
    "repeat_penalty": ("repeat_penalty", lambda v: 0 < v <= 10, "a number above 0 and at most 10"),
    "repetition_penalty": ("repeat_penalty", lambda v: 0 < v <= 10, "a number above 0 and at most 10"),
    "repeat_last_n": ("repeat_last_n", lambda v: _is_whole(v) and 0 <= v <= MAX_REPEAT_LAST, f"a whole number of 0 to {MAX_REPEAT_LAST}"),
}
_READ = {"messages", "stop", "response_format", *_OPTIONS}


def _options(body: dict[str, Any], schema_name: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, (option, fits, wanted) in _OPTIONS.items():
        if name not in body:
            continue
        value = body[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise ValueError(f"body.{name} {json.dumps(value)[:40]} must be {wanted}")
        if options.get(option, value) != value:
            raise ValueError(f"body.{names[option]} {options[option]} and body.{name} {value} say two things; leave one of them out")
        options[option], names[option] = value, name
    if options.get("top_k") == -1:
        options["top_k"] = 0
    if "stop" in body:
        stop = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError("body.stop must be text or a list of texts, none of them empty")
        options["stop"] = stop
    schema = _schema(body.get("response_format"))
    if schema is not None:
        compile_schema(schema, schema_name)
        if options.get("stop"):
            raise ValueError("body.stop could cut what body.response_format asks for; leave one of them out")
        options["schema"] = schema
    return options


def _schema(form: Any) -> Any:
    kind = form.get("type") if isinstance(form, dict) else form
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inside = form.get("json_schema") if isinstance(form, dict) else None
    if kind != "json_schema" or not isinstance(inside, dict) or "schema" not in inside:
        raise ValueError("body.response_format must be text, json_object, or json_schema with a schema")
    return inside["schema"]


def _others(body: dict[str, Any], notes: list[str]) -> None:
    for name, value in body.items():
        if name in _READ or any(value == harmless and type(value) is not bool or value is harmless for harmless in _HARMLESS.get(name, ())):
            continue
        if name not in _PASSED_OVER:
            shown = f" {json.dumps(value)[:40]}" if isinstance(value, int | float | str) else ""
            raise ValueError(printable(f"body.{name}{shown} is not supported: {_CURES.get(name, 'leave it out')}"))
        _note(notes, "body.model is passed over: -m says which model answers" if name == "model" else f"body.{name} is passed over")


def _note(notes: list[str], text: str) -> None:
    text = printable(text)
    if text not in notes:
        notes.append(text)


# ---------------------------------------------------------------- results


def result_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a line of a batch's result; what the format has no place for stands under ``zoomr``."""
    rest = {name: value for name, value in record.items() if name not in ("id", "content", "reasoning")}
    line = {"id": f"zoomr-{record['key']}", "custom_id": record["id"], "response": None, "error": None, "zoomr": rest}
    if "error" in record:
        line["error"] = {"code": record["error"]["type"], "message": record["error"]["message"]}
        return line
    message = {"role": "assistant", "content": record["content"]}
    if record["reasoning"]:
        message["reasoning_content"] = record["reasoning"]
    used = record["usage"]
    usage = {
        "prompt_tokens": used["prompt_tokens"], "completion_tokens": used["completion_tokens"],
        "total_tokens": used["prompt_tokens"] + used["completion_tokens"],
        "completion_tokens_details": {"reasoning_tokens": used["reasoning_tokens"]},
    }  # fmt: skip
    choice = {"index": 0, "message": message, "finish_reason": _FINISH.get(record["finish_reason"], "length"), "logprobs": None}
    body = {"id": f"chatcmpl-{record['key']}", "object": "chat.completion", "model": record["model"], "choices": [choice], "usage": usage}
    line["response"] = {"status_code": 200, "request_id": record["key"], "body": body}
    return line


def record_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """The record that ``result_line`` wrote. Raises ValueError if it did not."""
    try:
        rest, response = line["zoomr"], line["response"]
        texts = {"content": "", "reasoning": ""}
        if response is not None:
            message = response["body"]["choices"][0]["message"]
            texts = {"content": message["content"], "reasoning": message.get("reasoning_content", "")}
        return {"id": line["custom_id"], "answer": rest["answer"], **texts, **rest}
    except (LookupError, TypeError, AttributeError):
        raise ValueError("no line of a result that zoomr wrote") from None
