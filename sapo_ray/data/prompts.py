"""Prompts in a seeded, resumable order, and the prompts of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sapo_ray.config.spec import DataSpec, SourceSpec
from sapo_ray.data.mixture import epoch_order, next_source
from sapo_ray.data.sources import Rows, load_rows, named_apart
from sapo_ray.data.templates import PromptTemplate
from sapo_ray.errors import CheckpointError, DataError
from sapo_ray.types import Prompt

_BATCH = 1024
_ADDED = 8
"""Tokens that a tokenizer may put around a text (beginning, end, a leading space), and some to spare."""


class PromptSource:
    """All training sources as one endless stream of prompts.

    Sources alternate by weight; within one, every usable row comes once per epoch. All rows are rendered at the start,
    for the fingerprint, and those that could be too long are tokenised, to know. Ids are not kept: they are made when
    a prompt is taken.

    Args:
        unusable_golds: for each source, rows to leave out because their reference cannot be graded against.

    Raises:
        DataError: a source is unusable, or a prompt is too long (see `data.overlong`).
        ConfigError: two sources have the same name.
    """

    def __init__(
        self, spec: DataSpec, tokenizer: Any, seed: int, unusable_golds: Sequence[frozenset[int]] | None = None
    ) -> None:
        self._spec = spec
        self._seed = seed
        self._template = PromptTemplate(spec, tokenizer)
        self._names = named_apart(spec.train, "data.train")
        self._weights = [source.weight for source in spec.train]
        settings = [spec.max_prompt_tokens, spec.overlong, spec.shuffle, seed, self._names, self._weights]
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        self._rows: list[Rows] = []
        self._usable: list[np.ndarray] = []
        self.skipped = 0
        """Rows left out for their length."""
        self.skipped_golds = 0
        """Rows left out for their reference answer."""
        for source, unusable in zip(spec.train, unusable_golds or [frozenset()] * len(spec.train), strict=True):
            rows = load_rows(source)
            survey = _Survey(rows, spec, unusable)
            if unusable:
                digest.update(repr(sorted(unusable)).encode())
            for row, text, ids in _rendered(rows, self._template, short_enough=spec.max_prompt_tokens):
                survey.see(row, ids)
                for part in (text.encode(), rows.golds[row].encode()):
                    digest.update(b"%d:%b" % (len(part), part))
            self._rows.append(rows)
            self._usable.append(np.asarray(survey.usable(), np.int32))
            self.skipped += survey.overlong
            self.skipped_golds += survey.ungradable
        self.fingerprint = digest.hexdigest()
        """Of all rendered prompts and reference answers, the vocabulary, and the settings that decide the order."""
        self._taken = [0] * len(self._rows)

    def __len__(self) -> int:
        """Usable rows of all sources."""
        return sum(map(len, self._usable))

    def take(self) -> Prompt:
        """The next prompt."""
        index = sum(self._taken)
        source = next_source(self._weights, self._taken)
        epoch, position = divmod(self._taken[source], len(self._usable[source]))
        if self._spec.shuffle:
            position = epoch_order(self._seed, self._names[source], epoch, len(self._usable[source]))[position]
        self._taken[source] += 1
        return self._prompt(source, int(self._usable[source][position]), epoch, index)

    def state(self) -> dict[str, Any]:
        """Where the stream stands; JSON, one number per source."""
        return {"fingerprint": self.fingerprint, "taken": dict(zip(self._names, self._taken, strict=True))}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            CheckpointError: the state is of other data or settings.
        """
        if state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"the checkpoint was made with other training data: fingerprint {state['fingerprint']}, "
                f"now {self.fingerprint}; restore files, tokenizer and data settings as they were, or start a new job"
            )
        self._taken = [int(state["taken"][name]) for name in self._names]

    def _prompt(self, source: int, row: int, epoch: int, index: int) -> Prompt:
        rows = self._rows[source]
        [text] = self._template.render([rows.questions[row]])
        [ids] = self._template.encode([text])
        return _as_prompt(rows, row, f"{rows.name}:{row}:{epoch}", index, text, ids)


def evaluation_prompts(
    sources: Sequence[SourceSpec],
    data: DataSpec,
    tokenizer: Any,
    limit: int | None = None,
    unusable_golds: Sequence[frozenset[int]] | None = None,
) -> list[Prompt]:
    """Prompts of an evaluation in file order, the first `limit` rows of each source, with the template of `data`.

    Ids are `eval/source:row:0`, so that they differ from those of training prompts. Rows that are too long are an
    error or left out, as `data.overlong` says; rows in `unusable_golds` (see PromptSource) are left out of the first
    `limit`, not replaced by later ones.

    Raises:
        DataError, ConfigError: as PromptSource.
    """
    template = PromptTemplate(data, tokenizer)
    named_apart(sources, "evaluation.data")
    prompts: list[Prompt] = []
    for source, unusable in zip(sources, unusable_golds or [frozenset()] * len(sources), strict=True):
        bounds = [bound for bound in (source.limit, limit) if bound is not None]
        rows = load_rows(source.model_copy(update={"limit": min(bounds, default=None)}))
        survey = _Survey(rows, data, unusable)
        for row, text, ids in _rendered(rows, template, short_enough=0):
            if survey.see(row, ids):
                prompts.append(_as_prompt(rows, row, f"eval/{rows.name}:{row}:0", len(prompts), text, ids or ()))
        survey.usable()
    return prompts


def _as_prompt(rows: Rows, row: int, prompt_id: str, index: int, text: str, ids: Sequence[int]) -> Prompt:
    if not ids:
        raise DataError(
            f"{rows.places[row]}: nothing of the prompt is in the model's vocabulary; mend or remove the row"
        )
    return Prompt(id=prompt_id, index=index, source=rows.name, text=text, token_ids=tuple(ids), gold=rows.golds[row])


def _rendered(
    rows: Rows, template: PromptTemplate, *, short_enough: int
) -> Iterator[tuple[int, str, list[int] | None]]:
    """Yield (row, rendered text, token ids) of all rows, in batches.

    Ids are None where the text cannot have more than `short_enough` tokens, which spares most of the time: a token
    covers one character at least, in ASCII, which no normalisation lengthens.
    """
    for start in range(0, len(rows), _BATCH):
        texts = template.render(rows.questions[start : start + _BATCH])
        doubtful = [i for i, text in enumerate(texts) if not text.isascii() or len(text) + _ADDED > short_enough]
        ids = dict(zip(doubtful, template.encode([texts[i] for i in doubtful]), strict=True)) if doubtful else {}
        for i, text in enumerate(texts):
            yield start + i, text, ids.get(i)


@dataclass(slots=True)
class _Survey:
    """Which rows of a source are short enough, and can be graded against."""

    rows: Rows
    spec: DataSpec
    unusable: frozenset[int] = frozenset()
    overlong: int = 0
    ungradable: int = 0
    _fitting: list[int] = field(default_factory=list)
    _first: int = 0
    _first_tokens: int = 0
    _longest: int = 0

    def see(self, row: int, ids: Sequence[int] | None) -> bool:
        """Whether the row is used; ids are None where it is certainly short enough."""
        if row in self.unusable:
            self.ungradable += 1
            return False
        if ids is None or len(ids) <= self.spec.max_prompt_tokens:
            self._fitting.append(row)
            return True
        if self.overlong == 0:
            self._first, self._first_tokens = row, len(ids)
        self.overlong += 1
        self._longest = max(self._longest, len(ids))
        return False

    def usable(self) -> list[int]:
        """The rows to use, once all were seen.

        Raises:
            DataError: one is too long and `data.overlong` is `error`, or none is left.
        """
        limit = self.spec.max_prompt_tokens
        if self.overlong and self.spec.overlong == "error":
            raise DataError(
                f"{self.rows.places[self._first]}: the prompt has {self._first_tokens} tokens, data.max_prompt_tokens "
                f"is {limit}; {self.overlong} of {len(self.rows)} rows are longer, the longest has {self._longest}; "
                "raise data.max_prompt_tokens, or set data.overlong: skip"
            )
        if not self._fitting and self.ungradable:
            raise DataError(
                f"data source {self.rows.name!r}: none of {len(self.rows)} rows is left: {self.ungradable} reference "
                f"answers cannot be parsed, {self.overlong} prompts are longer than data.max_prompt_tokens ({limit}); "
                "set gold to where the answer stands"
            )
        if not self._fitting:
            raise DataError(
                f"data source {self.rows.name!r}: all {len(self.rows)} prompts are longer than data.max_prompt_tokens "
                f"({limit}), the longest has {self._longest}; raise data.max_prompt_tokens"
            )
        return self._fitting
