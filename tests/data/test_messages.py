"""Turns in every spelling that data sets use become the one that chat templates read."""

from typing import Any

import pytest

from qalora_export.data.messages import Malformed, conversation, tools_of

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def one(turn: Any) -> dict[str, Any]:
    return conversation([turn], "messages")[0][0]


def test_content_may_be_text_parts_or_null_beside_tool_calls() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert one({"role": "user", "content": parts}) == {"role": "user", "content": "abc"}
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "7"}], "name": None}
    assert one(turn) == {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "7"}]}


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "f", "arguments": '{"x": 1}'}},
        {"name": "f", "arguments": {"x": 1}},
        {"name": "f", "parameters": {"x": 1}},
    ],
)
def test_tool_calls_have_their_arguments_as_an_object(call: dict[str, Any]) -> None:
    assert one({"role": "assistant", "tool_calls": [call]})["tool_calls"] == [CALL]


def test_other_fields_reach_the_template() -> None:
    turn = {"role": "tool", "content": "3", "name": "f", "tool_call_id": "7"}
    assert one(turn) == turn
    assert one({"role": "assistant", "content": "a", "reasoning_content": "b"})["reasoning_content"] == "b"


def test_sharegpt_speakers_become_roles() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "a"},
    ]
    messages, _ = conversation(turns, "conversations")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == [CALL]


def test_weights_say_which_answers_are_learned() -> None:
    weights: list[dict[str, Any]] = [{"weight": 0}, {"weight": 1}, {"train": False}]
    turns = [{"role": "assistant", "content": "a"} | weight for weight in weights]
    messages, unlearned = conversation(turns, "messages")
    assert unlearned == {0, 2}
    assert all(set(message) == {"role", "content"} for message in messages)


def test_tools_come_as_a_list_or_as_json_text() -> None:
    assert tools_of('[{"name": "f"}]') == tools_of([{"name": "f"}]) == ({"name": "f"},)
    assert tools_of(None) == tools_of("") == ()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "not a list of messages"),
        ("hello", "not a list of messages"),
        (["hello"], "message 1 needs a string 'role'"),
        ([{"role": "user"}], "message 1 needs a string 'role'"),
        ([{"role": "user", "content": None}], "message 1 needs a string 'role'"),
        ([{"role": "user", "content": 3}], "message 1 needs a string 'role'"),
        ([{"role": "u|><|x", "content": ""}], "message 1 has the role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 has a part that is not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a part that is not text"),
        ([{"from": "narrator", "value": "x"}], "message 1 is from 'narrator'"),
        ([{"from": "gpt"}], "message 1 needs a string 'from'"),
        ([{"from": "function_call", "value": "f(x)"}], "message 1 holds JSON text that does not parse"),
        ([{"role": "assistant", "tool_calls": [{}]}], "message 1 has a tool call without a function name"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "arguments are not an object"),
        ([{"role": "assistant", "content": "", "weight": 0.5}], "message 1 has a weight"),
    ],
)
def test_what_cannot_be_read_is_named(turns: Any, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        conversation(turns, "messages")
