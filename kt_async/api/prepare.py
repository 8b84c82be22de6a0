"""From a checked body to sequences for the engine: template, tokens, limits, sampling. [loop]

Long texts are tokenised in an executor; everything else here is short.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from kt_async.api.bodies import Body, ChatBody, CompletionBody, Message, TextPart
from kt_async.api.choice import Choice, TextRules
from kt_async.api.run import Run
from kt_async.api.sampling import choice_seed, salt_bits, sampling_params
from kt_async.api.schema import check_ids, invalid, split_prompts, stop_list
from kt_async.api.state import ApiState
from kt_async.engine.types import GenerationRequest
from kt_async.errors import RequestError
from kt_async.text.detokenizer import Detokenizer, StopStrings

INLINE_CHARS = 4096  # texts up to this size are tokenised on the loop, well under 1 ms
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
# The template's own arguments; chat_template_kwargs may not replace them.
_RESERVED_KWARGS = frozenset(
    {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its tokens, and the text that the answer begins with."""

    param: str  # the field it came from
    ids: list[int]
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is ready to run."""

    request_id: str
    prompts: list[Prompt]
    n: int
    rules: TextRules
    requests: list[GenerationRequest]

    def make_run(self, state: ApiState) -> Run:
        """Return the run with one choice per sequence, prompt by prompt."""
        choices = [
            Choice(p * self.n + i, state.tokenizer, self.rules, prompt.prefix, prompt.ids)
            for p, prompt in enumerate(self.prompts)
            for i in range(self.n)
        ]
        return Run(self.request_id, choices, [len(p.ids) for p in self.prompts], state.metrics)


async def prepare_chat(body: ChatBody, state: ApiState, request_id: str) -> Job:
    """Render, tokenise and check a chat. Raises RequestError 400."""
    settings = state.settings
    kwargs = body.chat_template_kwargs or {}
    if reserved := _RESERVED_KWARGS & kwargs.keys():
        name = f"chat_template_kwargs.{min(reserved)}"
        raise invalid(f"{name}: set by the server, not by the request", name)
    generate = body.add_generation_prompt is not False
    messages = [_message_dict(m, pos) for pos, m in enumerate(body.messages)]
    text = state.template.render(messages, add_generation_prompt=generate, **kwargs)
    prefix = ""
    if body.echo and body.messages[-1].role == "assistant":
        prefix = messages[-1]["content"]
    if settings.force_think and generate:
        tag = settings.think_tag
        if not text.rstrip().endswith(tag.rstrip()):
            text += tag
        prefix += tag
    ids = await _encode(state, text)
    limit = body.max_completion_tokens or body.max_tokens
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    return _job(body, state, request_id, [Prompt("messages", ids, prefix)], limit, num_logprobs)


async def prepare_completion(body: CompletionBody, state: ApiState, request_id: str) -> Job:
    """Tokenise and check a completion. Raises RequestError 400."""
    vocab_size = state.engine.info.vocab_size
    given = split_prompts(body.prompt)
    prompts = []
    for pos, item in enumerate(given):
        param = "prompt" if len(given) == 1 else f"prompt[{pos}]"
        if isinstance(item, str):
            ids, text = await _encode(state, item), item
        else:
            check_ids(item, vocab_size, param)
            ids, text = item, _prompt_text(state, item) if body.echo else ""
        if not ids:
            raise invalid(f"{param}: must not be empty", param)
        prompts.append(Prompt(param, ids, text if body.echo else ""))
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    num_logprobs = -1 if body.logprobs is None else body.logprobs
    explicit = body.max_tokens is not None
    return _job(body, state, request_id, prompts, limit, num_logprobs, explicit=explicit)


def _message_dict(message: Message, pos: int) -> dict[str, Any]:
    """Return a message as chat templates expect it, content always a string."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content if isinstance(part, TextPart))
    # Templates know "system"; "developer" is OpenAI's newer name for it.
    role = "system" if message.role == "developer" else message.role
    out: dict[str, Any] = {"role": role, "content": content or message.refusal or ""}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        out["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, pos, index),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    return out


def _arguments(text: str, pos: int, index: int) -> Any:
    """Return a call's arguments as the object that templates print."""
    try:
        return orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        name = f"messages[{pos}].tool_calls[{index}].function.arguments"
        raise invalid(f"{name}: not valid JSON", name) from None


async def _encode(state: ApiState, text: str) -> list[int]:
    tokenizer = state.tokenizer
    if len(text) <= INLINE_CHARS:
        ids = tokenizer.encode(text)
    else:
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(state.executor, tokenizer.encode, text)
    # Templates mostly write the BOS themselves; it must be there once.
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    return ids


def _prompt_text(state: ApiState, ids: Sequence[int]) -> str:
    tokenizer = state.tokenizer
    shown = ids[1:] if ids and ids[0] == tokenizer.bos_id else ids
    detok = Detokenizer()
    return detok.feed(b"".join(map(tokenizer.token_bytes, shown))) + detok.finish()


def _job(
    body: Body,
    state: ApiState,
    request_id: str,
    prompts: list[Prompt],
    limit: int | None,
    num_logprobs: int,
    *,
    explicit: bool = True,
) -> Job:
    """Check the limits and build one engine request per sequence."""
    n = body.n or 1
    most = state.settings.max_sequences
    if n * len(prompts) > most:
        raise invalid(f"n: {len(prompts)} prompts x n = {n} exceed {most} sequences", "n")
    max_tokens = [_max_tokens(p, limit, explicit, state) for p in prompts]
    min_tokens = body.min_tokens or 0
    if min_tokens > min(max_tokens):
        raise invalid(
            f"min_tokens: {min_tokens} exceeds the {min(max_tokens)} tokens that may be generated",
            "min_tokens",
        )
    stops = stop_list(body.stop)
    rules = TextRules(
        stops=StopStrings(stops) if stops else None,
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=min_tokens,
        skip_special=body.skip_special_tokens is not False,
        logprobs=num_logprobs >= 0,
        prompt_logprobs=num_logprobs >= 0 and isinstance(body, CompletionBody) and bool(body.echo),
    )
    prompt_logprobs = num_logprobs if rules.prompt_logprobs else -1
    sampling = sampling_params(body, state, num_logprobs, prompt_logprobs)
    vocab_size = state.engine.info.vocab_size
    check_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")
    stop_ids = set(body.stop_token_ids or ())
    if not body.ignore_eos:
        stop_ids |= state.tokenizer.eos_ids
    # Without a seed of the client's, equal prompts of one request give different answers too.
    seeded = body.seed is not None
    seed = body.seed if body.seed is not None else secrets.randbits(64)
    salt = salt_bits(body.cache_salt)
    requests = [
        GenerationRequest(
            request_id=request_id,
            prompt_ids=prompt.ids,
            max_tokens=max_tokens[pos],
            sampling=replace(sampling, seed=choice_seed(seed, i if seeded else pos * n + i)),
            stop_ids=tuple(sorted(stop_ids)),
            min_tokens=min_tokens,
            priority=body.priority or 0,
            cache_salt=salt,
        )
        for pos, prompt in enumerate(prompts)
        for i in range(n)
    ]
    return Job(request_id, prompts, n, rules, requests)


def _max_tokens(prompt: Prompt, limit: int | None, explicit: bool, state: ApiState) -> int:
    """Return how many tokens a prompt may generate. Raises RequestError 400.

    limit: the request's; explicit: the client wrote it, so it is never lowered silently to what
    fits. The operator's max_new_tokens caps it like any other end by length.
    """
    longest = state.engine.info.max_model_len
    prompt_len = len(prompt.ids)
    room = longest - prompt_len
    if room < 0 or (room == 0 and limit != 0):
        raise RequestError(
            400,
            f"{prompt.param}: the prompt has {prompt_len} tokens, the model's context holds {longest} tokens of"
            " prompt and answer",
            code="context_length_exceeded",
            param=prompt.param,
        )
    if limit is None:
        limit = room
    elif explicit and limit > room:
        raise RequestError(
            400,
            f"max_tokens: {prompt_len} prompt tokens + max_tokens = {limit} exceed the model's"
            f" context of {longest} tokens; at most {room} can be generated",
            code="context_length_exceeded",
            param="max_tokens",
        )
    limit = min(limit, room)
    cap = state.settings.max_new_tokens
    return limit if cap is None else min(limit, cap)
