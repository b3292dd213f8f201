"""Prompts as the model sees them."""

from __future__ import annotations

from typing import Any

import pytest

from sapo_ray.config.spec import DataSpec
from sapo_ray.data.templates import PromptTemplate
from sapo_ray.errors import ModelError


def _spec(**settings: object) -> DataSpec:
    return DataSpec.model_validate({"train": [{"path": "builtin:addition"}], **settings})


def test_the_chat_template_is_rendered_literally(bytes_tokenizer: Any) -> None:
    template = PromptTemplate(_spec(prompt="{question}\nThink."), bytes_tokenizer)
    assert template.render(["What is 1+1?"]) == [
        "<|im_start|>user\nWhat is 1+1?\nThink.<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_a_system_message_comes_first(bytes_tokenizer: Any) -> None:
    template = PromptTemplate(_spec(system="Be brief."), bytes_tokenizer)
    assert template.render(["Hi"]) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_special_tokens_of_the_chat_template_are_one_token_each(bytes_tokenizer: Any) -> None:
    template = PromptTemplate(_spec(), bytes_tokenizer)
    [ids] = template.encode(template.render(["1"]))
    start, end = 1, 2
    assert [i for i in ids if i < 3] == [start, end, start]
    assert len(ids) == len("user\n1\nassistant\n") + 3
    assert bytes_tokenizer.decode(ids) == "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_rendered_here_has_the_ids_that_the_tokenizer_gives_the_conversation(bytes_tokenizer: Any) -> None:
    template = PromptTemplate(_spec(system="Résumé"), bytes_tokenizer)
    conversation = [{"role": "system", "content": "Résumé"}, {"role": "user", "content": "α + β?"}]
    reference = bytes_tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    assert template.encode(template.render(["α + β?"])) == [reference["input_ids"]]


def test_braces_in_a_question_stay_as_they_are(addition_tokenizer: Any) -> None:
    template = PromptTemplate(_spec(template="plain", prompt="Q: {question} A:"), addition_tokenizer)
    assert template.render([r"\frac{1}{2} {question} {0}"]) == [r"Q: \frac{1}{2} {question} {0} A:"]


def test_chat_without_a_chat_template_is_refused(addition_tokenizer: Any) -> None:
    with pytest.raises(
        ModelError, match=r"data\.template is 'chat', but .* no chat template; set data\.template: plain"
    ):
        PromptTemplate(_spec(), addition_tokenizer)


def test_a_chat_template_that_refuses_a_system_message_says_so(bytes_tokenizer: Any) -> None:
    import copy

    strict = copy.deepcopy(bytes_tokenizer)
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ModelError, match=r"refused the messages \(System role not supported\); remove data\.system"):
        PromptTemplate(_spec(system="x"), strict).render(["Hi"])
