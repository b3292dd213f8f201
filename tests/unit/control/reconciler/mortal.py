"""Processes that die at an effect of theirs: after a commit, after a call of the cluster, after a file was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sapo_ray.control.store import Store


class Crash(BaseException):
    """The process dies here; not an Exception, so that nothing can catch it by mistake."""


class Mortal:
    """Lets a process die after its n-th effect: a committed transaction or a call of the cluster."""

    def __init__(self, dies_after: int) -> None:
        self.left = dies_after

    def effect(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Crash

    def after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with death waiting behind it."""

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            self.effect()
            return result

        return call


class MortalStore:
    """A store whose process dies after a commit."""

    def __init__(self, store: Store, mortal: Mortal) -> None:
        self._store = store
        self._mortal = mortal

    def begin(self) -> Any:
        mortal, inner = self._mortal, self._store.begin()

        class Transaction:
            def __enter__(self) -> Any:
                return inner.__enter__()

            def __exit__(self, *error: Any) -> Any:
                result = inner.__exit__(*error)
                mortal.effect()
                return result

        return Transaction()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class MortalCluster:
    """A cluster whose caller dies after a call, the answer unread."""

    def __init__(self, cluster: Any, mortal: Mortal) -> None:
        self._cluster = cluster
        self._mortal = mortal

    def __getattr__(self, name: str) -> Any:
        return self._mortal.after(getattr(self._cluster, name))
