"""Which worker samples next: never one that is not fit, evenly, and at a cost that does not grow with their number."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sapo_ray.rollout.choosing import LeastLoaded


@dataclass(eq=False)
class Worker:
    in_flight: int = 0
    fit: bool = True


class Asked:
    """Workers that count how often they are looked at."""

    def __init__(self, count: int) -> None:
        self.workers = [Worker() for _ in range(count)]
        self.looks = 0
        self.choice = LeastLoaded(self._fit, self._is_fit)

    def _fit(self) -> list[Worker]:
        self.looks += len(self.workers)
        return [worker for worker in self.workers if worker.fit]

    def _is_fit(self, worker: Worker) -> bool:
        self.looks += 1
        return worker.fit


def test_of_few_workers_the_least_loaded_is_chosen_every_time() -> None:
    pool = Asked(10)
    for number, worker in enumerate(pool.workers):
        worker.in_flight = 10 - number
    assert pool.choice.choose() is pool.workers[9]
    pool.workers[9].fit = False
    assert pool.choice.choose() is pool.workers[8]
    newcomer = Worker()
    pool.workers.append(newcomer)
    assert pool.choice.choose() is newcomer


def test_a_worker_that_is_not_fit_any_more_is_never_chosen_and_none_is_none() -> None:
    pool = Asked(1000)
    pool.choice.choose()
    for worker in pool.workers[:990]:
        worker.fit = False
    for _ in range(200):
        chosen = pool.choice.choose()
        assert chosen is not None
        assert chosen.fit
        chosen.in_flight += 1
    for worker in pool.workers:
        worker.fit = False
    assert pool.choice.choose() is None
    pool.workers[500].fit = True
    assert pool.choice.choose() is pool.workers[500]


def test_a_thousand_workers_get_as_much_as_each_other() -> None:
    pool = Asked(1000)
    for _ in range(4000):
        chosen = pool.choice.choose()
        assert chosen is not None
        chosen.in_flight += 1
    assert set(Counter(worker.in_flight for worker in pool.workers)) <= {3, 4, 5}


def test_a_newcomer_among_a_thousand_waits_for_some_choices_only() -> None:
    pool = Asked(1000)
    for worker in pool.workers:
        worker.in_flight = 9
    pool.choice.choose()
    pool.workers.append(newcomer := Worker())
    chosen = [pool.choice.choose() for _ in range(2 * 32 + 2)]
    assert newcomer in chosen


def test_a_choice_costs_at_most_two_looks_at_each_of_those_compared_however_many_workers_there_are() -> None:
    for count in (100, 1000, 10_000):
        pool = Asked(count)
        for _ in range(3200):
            pool.choice.choose()
        assert pool.looks / 3200 < 70
