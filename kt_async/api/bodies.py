"""Request bodies as structs: types and ranges of every field. msgspec checks them in `schema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MAX_LOGPROBS = 20  # KT_MAX_LOGPROBS
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 48  # the scheduler holds 64 with the model's own
MAX_BIAS = 1024  # kt_request.num_bias

Temperature = Annotated[float, Meta(ge=0, le=2)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(gt=0, le=10)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; we send none


class TextPart(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A text part of a message."""

    text: str


class ImagePart(Struct, tag_field="type", tag="image_url"):
    """Known, so that the refusal can say what is wrong."""


class AudioPart(Struct, tag_field="type", tag="input_audio"):
    """Known, so that the refusal can say what is wrong."""


class FilePart(Struct, tag_field="type", tag="file"):
    """Known, so that the refusal can say what is wrong."""


class FunctionCall(Struct, forbid_unknown_fields=True):
    """The function of a tool call in the history."""

    name: str
    arguments: str


class ToolCall(Struct, forbid_unknown_fields=True):
    """A tool call of an earlier assistant message."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Struct, forbid_unknown_fields=True):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | ImagePart | AudioPart | FilePart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    # Answers of other servers carry these; only their empty forms mean nothing.
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


class ResponseFormat(Struct):
    """`response_format`."""

    type: str


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """What chat and text completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Unit | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[Stop] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    cache_salt: str | int | None = None
    return_speed: bool | None = None
    echo: bool | None = None
    user: str | None = None
    # Accepted without effect: they do not change the answer.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    # Refused unless absent or empty.
    response_format: ResponseFormat | None = None
    structured_outputs: Any = None
    grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class ChatBody(Body, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    modalities: list[str] | None = None
    parallel_tool_calls: Any = None  # without effect as long as there are no tools
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(Body, kw_only=True):
    """Body of /v1/completions."""

    # Which of the list forms it is gets checked in check_prompts; msgspec allows one array type.
    prompt: str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: str | None = None
