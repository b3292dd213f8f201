"""YAML as job files use it: safe, numbers like 1e-6 read as numbers, a key given twice refused."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sapo_ray.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 wants a dot in `1.0e-6`; people write `1e-6` and mean the number, as YAML 1.2 and JSON do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse(text: str, source: str) -> Any:
    """The one document in `text`; `source` names it in errors.

    Raises:
        ConfigError: a syntax error with its line, or every key that stands twice in one mapping.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        twice = _duplicates(root)
        if twice:
            raise ConfigError("\n".join(f"{source}, {one}" for one in twice))
        return loader.construct_document(root)
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be read; a job is three levels deep") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source}{_line(error.problem_mark)}: not valid YAML: {_syntax(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def _duplicates(root: yaml.Node) -> list[str]:
    """One sentence for each key that repeats an earlier one of the same mapping."""
    found: list[str] = []
    seen: set[int] = set()
    pending: list[tuple[yaml.Node, str]] = [(root, "")]
    while pending:
        node, prefix = pending.pop()
        if id(node) in seen:  # an alias may lead back
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [(item, f"{prefix}{index}.") for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else str(key.start_mark.line)
                line = key.start_mark.line + 1
                if name in first and name != "<<":
                    found.append(f"line {line}: {prefix}{name} stands twice, first on line {first[name]}; keep one")
                first.setdefault(name, line)
                pending.append((value, f"{prefix}{name}."))
    return found


def _line(mark: yaml.Mark | None) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error.context)
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    if "mapping values are not allowed" in problem:
        return f"{problem}; put text that holds a colon in quotes, and check the indentation"
    if "<block end>, but found '<scalar>'" in problem or "found undefined alias" in problem:
        return f"{problem}; text that begins with {{, [, *, & or a quote must stand in quotes as a whole"
    if "single document" in str(error.context):
        return "a second document begins here; a job file holds one"
    return problem
