"""Writes docs/jobs.md from the job's own description: `python -m sapo_ray.config.reference > docs/jobs.md`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from sapo_ray.config.keys import Key, all_keys, item_section
from sapo_ray.config.load import RESUMABLE, resumable_name
from sapo_ray.config.spec import JobSpec, Section, SourceSpec

_HEAD = """\
# Jobs

<!-- Written by `make docs` from sapo_ray/config/spec.py and sections.py; edit there. -->

A job is one YAML file. The smallest one is a line, `preset: quickstart`; `configs/` holds a few more.
`sapo-ray validate JOB.yaml --show` prints a job with every key.

- **Presets.** `preset: quickstart` puts values beneath yours: what the file says goes over them, section by section;
  a list replaces a list.
- **Overrides.** `--set rollout.workers=4` goes over the file, any number of times. Values are YAML; text keys take
  the text as it stands. Lists by index: `--set data.train.0.path=mine.jsonl`.
- **Checks.** Everything is checked before anything starts: every problem of single keys at once, then of keys that must
  fit together; each with the key, its value, the bound and the way out. Unknown keys are
  refused, keys given twice too. Numbers may be written `1e-6`.
- **Resuming.** A resumed run may change {resumable}. Anything else needs a new job.

A key without a default is required.
"""


def render() -> str:
    """The reference page, one table per section."""
    allowed = [f"`{resumable_name(key)}`" for key in RESUMABLE]
    text = _HEAD.format(resumable=", ".join(allowed[:-1]) + " and " + allowed[-1])
    for title, doc, rows in _sections():
        text += f"\n## {title}\n\n{doc}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        text += "".join(_row(key) for key in rows)
    return text


def _sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Title, text and keys of each section; the sources' keys once, though two sections hold sources."""
    keys = all_keys()
    yield "Top level", _doc(JobSpec), [key for name, key in keys.items() if "." not in name]
    for name, found in JobSpec.model_fields.items():
        section, _ = item_section(found.annotation)
        if section is None:
            continue
        lists = [_list_key(n, f) for n, f in section.model_fields.items() if item_section(f.annotation)[1]]
        own = [k for n, k in keys.items() if n.startswith(f"{name}.") and "[]" not in n]
        yield f"`{name}`", _doc(section), lists + own
        if name == "data":
            entries = [k for n, k in keys.items() if n.startswith("data.train[].")]
            yield "`data.train` and `evaluation.data`, each entry", _doc(SourceSpec), entries


def _list_key(name: str, found: FieldInfo) -> Key:
    return Key(
        name=name,
        kind="list of sources",
        choices=(),
        bounds="at least one" if found.is_required() else "",
        nullable=False,
        text=False,
        required=found.is_required(),
        default="" if found.is_required() else "[]",
        doc=found.description or "",
    )


def _doc(section: type[Section]) -> str:
    return inspect.getdoc(section) or ""


def _row(key: Key) -> str:
    kind = key.kind if not key.choices else ", ".join(f"`{choice}`" for choice in key.choices)
    kind += f", {key.bounds}" if key.bounds else ""
    default = f"`{key.default}`" if key.default else "required"
    cells = (f"`{key.name.rsplit('.', 1)[-1]}`", kind, default, key.doc)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.stdout.write(render())
