"""From a question to the prompt as the model sees it, and to its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from sapo_ray.config.spec import DataSpec
from sapo_ray.errors import ModelError


class PromptTemplate:
    """Renders questions and turns them into token ids, once; no text is ever tokenised again after that.

    Raises:
        ModelError: `data.template` is `chat` and the tokenizer has no chat template.
    """

    def __init__(self, spec: DataSpec, tokenizer: Any) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._chat = spec.template == "chat"
        if self._chat and not tokenizer.chat_template:
            raise ModelError(
                f"data.template is 'chat', but the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "set data.template: plain, or take an instruction-tuned model"
            )

    def render(self, questions: Sequence[str]) -> list[str]:
        """Prompts as text, the chat template's own special tokens included."""
        prompts = [self._spec.prompt.replace("{question}", question) for question in questions]
        if not self._chat:
            return prompts
        system = [] if self._spec.system is None else [{"role": "system", "content": self._spec.system}]
        conversations = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
        try:
            rendered: list[str] = self._tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ModelError(
                f"the chat template of {self._tokenizer.name_or_path!r} refused the messages ({error}); "
                "remove data.system if it takes no system message, or set data.template: plain"
            ) from error
        return rendered

    def encode(self, rendered: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts. A chat template writes its special tokens itself; plain text gets those
        that the tokenizer puts around text (for most: none, or a beginning-of-sequence token)."""
        ids: list[list[int]] = self._tokenizer(
            list(rendered), add_special_tokens=not self._chat, return_attention_mask=False
        )["input_ids"]
        return ids
