"""The two endpoints that sample: fields -> jobs -> answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fireopd_jax.rollout.requests import Completion
from fireopd_jax.serving.answers import (
    TokenLogprobs,
    chat_logprobs,
    checked,
    completion_logprobs,
    ending,
    envelope,
    finite,
    id_logprobs,
    namer,
    prompt_logprobs,
)
from fireopd_jax.serving.errors import bad_field
from fireopd_jax.serving.fields import ChatFields, CompletionFields
from fireopd_jax.serving.scorer import LARGEST_SUPPORT, ScoreRequest
from fireopd_jax.serving.service import Gone, Prompt, Service
from fireopd_jax.serving.worker import Scoring


async def complete(service: Service, fields: CompletionFields, gone: Gone) -> dict[str, Any]:
    """Answer `POST /v1/completions`."""
    service.check_model(fields.model)
    prompts = [service.prompt(each, fields.add_special_tokens) for each in contents(fields)]
    for prompt in prompts:
        service.room(len(prompt), fields.max_tokens)
    support = given_ids(service, fields, prompts)
    generations = [
        service.generation(prompt.ids.tolist(), fields, fields.max_tokens)
        for prompt in prompts
        if fields.max_tokens
    ]
    scorings = []
    if fields.prompt_logprobs is not None or support is not None:
        best, start = fields.prompt_logprobs or 0, fields.prompt_logprob_start
        scorings = [Scoring(ScoreRequest(each.ids, best, support, start)) for each in prompts]
    await service.run(generations, scorings, gone)
    samples = [
        [checked(each) for each in job.future.result()] for job in generations
    ] or nothing_sampled(prompts, fields.n)
    ids = [prompt.ids for prompt in prompts]
    found = await listed(service, ids, samples, gone, best=fields.logprobs, whole=fields.echo)
    parts = [prompt_part(service, fields, job) for job in scorings] or [{}] * len(prompts)
    choices: list[dict[str, Any]] = []
    for prompt, own, part in zip(prompts, samples, parts, strict=True):
        for each in own:
            index = len(choices)
            choice = completion_choice(service, fields, prompt, each, found[index])
            choices.append({"index": index} | choice | part)
    drawn = sum(len(each.tokens) for own in samples for each in own)
    return envelope(service, "text_completion", "cmpl", choices, sum(map(len, prompts)), drawn)


async def chat(service: Service, fields: ChatFields, gone: Gone) -> dict[str, Any]:
    """Answer `POST /v1/chat/completions`."""
    service.check_model(fields.model)
    if fields.messages is None:
        raise bad_field("messages", "this field is required")
    if fields.top_logprobs and not fields.logprobs:
        raise bad_field("top_logprobs", "needs logprobs=true")
    prompt = service.conversation(fields)
    room = service.room(len(prompt), fields.max_completion_tokens or fields.max_tokens)
    job = service.generation(prompt, fields, room)
    await service.run([job], [], gone)
    samples = [checked(each) for each in job.future.result()]
    best = fields.top_logprobs if fields.logprobs else None
    found = await listed(service, [job.prompt], [samples], gone, best=best)
    choices = []
    for index, each in enumerate(samples):
        skip, ids = fields.skip_special_tokens, each.tokens.tolist()
        begun = fields.continue_final_message
        text = service.continued(prompt if begun else (), ids, skip_special=skip)
        text, why = ending(text, each, fields, service.spec.stop)
        choice = {"index": index, "message": {"role": "assistant", "content": text}} | why
        logprobs = found[index]
        choice["logprobs"] = logprobs and chat_logprobs(logprobs, namer(service, fields))
        choices.append(choice | ({"token_ids": ids} if fields.return_token_ids else {}))
    drawn = sum(len(each.tokens) for each in samples)
    out = envelope(service, "chat.completion", "chatcmpl", choices, len(prompt), drawn)
    return out | ({"prompt_token_ids": list(prompt)} if fields.return_token_ids else {})


def contents(fields: CompletionFields) -> Sequence[str | Sequence[int]]:
    """Return the prompts of a request, each a text or token ids."""
    found: Any = fields.prompt
    if isinstance(found, str) or (found and isinstance(found[0], int)):
        return [found]
    if not found:
        raise bad_field("prompt", "it is empty; expected at least one token")
    return found


def given_ids(
    service: Service, fields: CompletionFields, prompts: Sequence[Prompt]
) -> np.ndarray | None:
    """Return the ids to score, i32[R, K], one row for each source row from the start on.

    Raises ApiError for rows that differ in length, or that are not those of the one prompt.
    """
    rows = fields.prompt_logprob_token_ids
    name, start = "prompt_logprob_token_ids", fields.prompt_logprob_start
    if rows is None:
        if start:
            raise bad_field("prompt_logprob_start", f"needs {name}")
        return None
    if len(prompts) > 1:
        raise bad_field(name, f"expected one prompt in the request, not {len(prompts)}")
    if len({len(row) for row in rows}) > 1 or not 1 <= len(rows[0]) <= LARGEST_SUPPORT:
        raise bad_field(
            name, f"expected rows of one length from 1 to {LARGEST_SUPPORT}, padded with -1"
        )
    length = len(prompts[0])
    if len(rows) != length - 1 - start:
        raise bad_field(
            name,
            f"{len(rows)} rows; expected {length - 1 - start}: a prompt of {length} tokens has "
            f"{length - 1} source rows, and row j of these is scored at source row "
            f"prompt_logprob_start + j = {start} + j, which predicts token {start + 1} + j",
        )
    service.known(name, [each for row in rows for each in row if each != -1])
    return np.asarray(rows, np.int32)


def nothing_sampled(prompts: Sequence[Prompt], count: int) -> list[list[Completion]]:
    """Return empty responses, for requests with max_tokens=0."""
    ids, values = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return [[Completion(0, ids, values, values, ids, "length")] * count for _ in prompts]


async def listed(
    service: Service,
    prompts: Sequence[np.ndarray],
    samples: Sequence[Sequence[Completion]],
    gone: Gone,
    *,
    best: int | None,
    whole: bool = False,
) -> list[TokenLogprobs | None]:
    """Return the log-probabilities of each choice's response, with `whole` of its prompt, too.

    `best` is how many of the most probable tokens are listed beside; None: nothing is listed. The
    engine has those of the sampled tokens; all others need the sequence scored.
    """
    flat = [(prompt, each) for prompt, own in zip(prompts, samples, strict=True) for each in own]
    if best is None:
        return [None] * len(flat)
    if not (best or whole):
        return [TokenLogprobs.sampled(each) for _, each in flat]
    sequences = [np.concatenate([prompt, each.tokens]) for prompt, each in flat]
    jobs = [Scoring(ScoreRequest(tokens, best)) for tokens in sequences]
    sampled = any(len(each.tokens) for _, each in flat)
    await service.run([], jobs, gone, follow_up=sampled)
    return [
        TokenLogprobs.scored(tokens, finite(job.future.result()), 1 if whole else len(prompt))
        for (prompt, _), tokens, job in zip(flat, sequences, jobs, strict=True)
    ]


def completion_choice(
    service: Service,
    fields: CompletionFields,
    prompt: Prompt,
    completion: Completion,
    found: TokenLogprobs | None,
) -> dict[str, Any]:
    """Return what a choice tells of its response."""
    ids = completion.tokens.tolist()
    text = service.continued(prompt.ids.tolist(), ids, skip_special=fields.skip_special_tokens)
    text, why = ending(text, completion, fields, service.spec.stop)
    before = prompt.text if fields.echo else ""
    logprobs = None
    if found is not None:
        first = int(prompt.ids[0]) if fields.echo else None
        logprobs = completion_logprobs(found, namer(service, fields), first)
    choice = {"text": before + text, "logprobs": logprobs} | why
    if fields.return_token_ids:
        choice |= {"prompt_token_ids": prompt.ids.tolist(), "token_ids": ids}
    return choice


def prompt_part(service: Service, fields: CompletionFields, job: Scoring) -> dict[str, Any]:
    """Return what a choice tells of its prompt, scored by a job."""
    scored, out = finite(job.future.result()), {}
    if fields.prompt_logprobs is not None:
        listed = TokenLogprobs.scored(job.request.tokens, scored, 1)
        out["prompt_logprobs"] = prompt_logprobs(listed, service.token_text)
    if job.request.support is not None and scored.at_ids is not None:
        out["prompt_token_id_logprobs"] = id_logprobs(job.request.support, scored.at_ids)
    return out
