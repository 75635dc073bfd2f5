"""A language model behind an OpenAI-compatible server: OpenAI's own, vLLM, llama.cpp, Ollama ...

It is asked as `offline_lm.envs.chat.prompt` says, by `/chat/completions`. The key comes from $OPENAI_API_KEY alone, and
stands in no configuration and no log. Retries, and how long they wait, are the client's own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from offline_lm.envs import chat
from offline_lm.envs.policies import State
from offline_lm.envs.written import Proposal, Sample
from offline_lm.errors import UserError

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion
    from openai.types.chat.chat_completion import Choice

KEY = "OPENAI_API_KEY"
_MENDS = {
    401: f"is ${KEY} right?",
    403: f"may the key in ${KEY} use this model?",
    404: "is there such a model, and does base_url= end as the server wants it (often in /v1)?",
    429: "lower pages=, or wait",
}


class Endpoint:
    """A server as a `offline_lm.envs.written.Proposer`; the pages that wait are asked about at the same time.

    `logprobs` are asked for until a server refuses them. They are as the server says: of vLLM at `temperature` with
    `--logprobs-mode processed_logprobs`, else as if it were 1; so only at 1 they become the logged probability of
    a response.

    Args:
        base_url: of the server; None: OpenAI's.
        timeout_s: of one request.
        extra_body: further fields of a request. With vLLM's ``return_token_ids`` the ids are logged too.

    Raises:
        UserError: openai is not installed; no key for OpenAI.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        temperature: float,
        max_tokens: int,
        page_chars: int,
        timeout_s: float,
        retries: int,
        extra_body: dict[str, Any],
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise UserError("policy=openai:MODEL needs `pip install 'offline_lm[online]'`") from error
        if base_url is None and not os.environ.get(KEY):
            raise UserError(f"policy=openai:{model}: set ${KEY}, or name a server with base_url=")
        self.model, self.temperature, self.max_tokens, self.page_chars = model, temperature, max_tokens, page_chars
        self._where, self._extra = base_url or "OpenAI", extra_body
        # OpenAI's newest models know the longer name alone, other servers the shorter one
        self._limit = "max_completion_tokens" if base_url is None else "max_tokens"
        self._logprobs = True
        self._client = openai.OpenAI(
            api_key=os.environ.get(KEY) or "none", base_url=base_url, timeout=timeout_s, max_retries=retries
        )

    @property
    def name(self) -> str:
        return f"openai-{self.model}-t{self.temperature:g}-m{self.max_tokens}-p{self.page_chars}"

    @property
    def sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "base_url": self._where}

    def propose(self, states: Sequence[State], n: int) -> list[Proposal]:
        seeds = [int(s.rng.integers(2**31)) for s in states]
        with ThreadPoolExecutor(len(states)) as threads:
            return list(threads.map(lambda s, seed: self._proposal(s, n, seed), states, seeds))

    def _proposal(self, state: State, n: int, seed: int) -> Proposal:
        """n answers: a server that gives fewer at once is asked again."""
        text = chat.prompt(state, self.page_chars)
        samples: list[Sample] = []
        read = written = 0
        logged: dict[str, Any] = {"context_hash": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()}
        while len(samples) < n:
            answer = self._ask(text, n - len(samples), seed + len(samples))
            if ids := (answer.model_extra or {}).get("prompt_token_ids"):
                logged |= {"prompt_token_ids": tuple(ids), "tokenizer_id": self.model}
            samples += [self._sample(choice) for choice in answer.choices]
            if answer.usage is not None:
                read, written = read + answer.usage.prompt_tokens, written + answer.usage.completion_tokens
        return Proposal(samples[:n], logged, (read, written))

    def _ask(self, text: str, n: int, seed: int) -> ChatCompletion:
        import openai

        options: dict[str, Any] = {"n": n, "seed": seed, "temperature": self.temperature, self._limit: self.max_tokens}
        if self._logprobs:
            options["logprobs"] = True
        try:
            answer = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": text}], extra_body=self._extra, **options
            )
        except openai.BadRequestError as error:
            if "logprobs" in options and "logprob" in error.message:
                if self._logprobs:
                    print(f"{self._where} gives no logprobs for {self.model}: none are logged")
                self._logprobs = False
                return self._ask(text, n, seed)
            raise self._told(f"refuses the request: {error.message}") from error
        except openai.APIStatusError as error:
            mend = _MENDS.get(error.status_code, "see the server's own log")
            raise self._told(f"answers {error.status_code} ({error.message}): {mend}") from error
        except openai.APITimeoutError as error:
            raise self._told("does not answer in timeout_s=: raise it, or lower pages= or n=") from error
        except openai.APIConnectionError as error:
            raise self._told(f"cannot be reached ({error.__cause__ or error}): does it run, and is it that?") from error
        except json.JSONDecodeError as error:
            raise self._told("answers what is no JSON: does base_url= end as the server wants it?") from error

        if isinstance(answer, str) or not answer.choices:  # the client hands on a web page as it is
            raise self._told("gave no answer: does base_url= end as the server wants it?")
        return answer

    def _told(self, words: str) -> UserError:
        return UserError(f"policy=openai:{self.model}: {self._where} {words}")

    def _sample(self, choice: Choice) -> Sample:
        text = (choice.message.content or "").encode("utf-8", "replace").decode()  # half a character is no text
        logged: dict[str, Any] = {}
        if ids := (choice.model_extra or {}).get("token_ids"):
            logged["response_token_ids"] = tuple(ids)
        if choice.logprobs is None or not choice.logprobs.content:
            return Sample(text, None, logged)
        logprobs = [token.logprob for token in choice.logprobs.content]
        if not all(map(math.isfinite, logprobs)):
            return Sample(text, None, logged)
        logged["response_logprobs"] = tuple(logprobs)
        return Sample(text, math.fsum(logprobs) if self.temperature == 1 else None, logged)
