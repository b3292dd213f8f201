"""`--set key=value` on the command line."""

from __future__ import annotations

import pytest

from sapo_ray.config.load import load_job, resolve
from sapo_ray.errors import ConfigError

QUICK = {"preset": "quickstart"}


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(QUICK, overrides)
    return str(caught.value)


def test_values_are_yaml_and_the_last_one_wins():
    job = resolve(QUICK, ["learner.lr=1e-3", "learner.betas=[0.8, 0.9]", "rollout.workers=3", "rollout.workers=4"])
    assert (job.learner.lr, job.learner.betas, job.rollout.workers) == (1e-3, (0.8, 0.9), 4)


def test_an_override_goes_over_the_file_and_the_preset(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("preset: quickstart\nsteps: 7\n")
    assert load_job(path).steps == 7
    assert load_job(path, ["steps=9"]).steps == 9


def test_the_preset_itself_may_be_an_override():
    assert resolve({}, ["preset=quickstart", "steps=3"]).steps == 3


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.prompt={question}=", "{question}="),
        ("data.prompt= {question}: ", " {question}: "),
        ("data.prompt='{question} '", "{question} "),
        ('data.prompt="{question}\\n"', "{question}\n"),
    ],
)
def test_text_is_taken_as_it_stands_unless_quoted(override: str, text: str):
    assert resolve(QUICK, [override]).data.prompt == text


def test_text_keys_take_what_would_be_a_number_or_a_truth_value_elsewhere():
    job = resolve(QUICK, ["name=7", "model.revision=12e5", "data.train.0.split=no"])
    assert (job.name, job.model.revision, job.data.train[0].split) == ("7", "12e5", "no")


@pytest.mark.parametrize("text", ["", "null", "~"])
def test_a_text_key_that_may_be_null_can_be_cleared(text: str):
    assert resolve({**QUICK, "run_dir": "x"}, [f"run_dir={text}"]).run_dir is None


def test_list_entries_are_set_by_index_and_the_next_index_adds_one():
    job = resolve(QUICK, ["data.train.0.limit=5", "data.train.1.path=more.jsonl", "data.train.1.weight=2"])
    assert [(s.path, s.limit, s.weight) for s in job.data.train] == [
        ("builtin:addition", 5, 1.0),
        ("more.jsonl", None, 2.0),
    ]


def test_overrides_alone_can_make_a_job():
    job = resolve({}, ["steps=1", "model.path=m", "data.train.0.path=d.jsonl"])
    assert [source.path for source in job.data.train] == ["d.jsonl"]


def test_the_mapping_given_is_left_as_it_was():
    job = {"preset": "quickstart", "learner": {"lr": 1.0}}
    resolve(job, ["learner.lr=2"])
    assert job == {"preset": "quickstart", "learner": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.workers", "--set 'rollout.workers' is not of the form key=value; write e.g. --set rollout.workers=4"),
        ("=3", "--set '=3' is not of the form key=value"),
        ("a..b=3", "--set 'a..b=3' is not of the form key=value"),
        ("learner.betas=[0.9", "--set learner.betas=[0.9, line 1, column 5: not valid YAML"),
        ("rollout.workers=four", "rollout.workers must be a whole number >= 1, got 'four'"),
        ("rollout.workers=", "rollout.workers must be a whole number >= 1, got nothing (null)"),
        ("rollout.worker=4", "rollout.worker is not a key; did you mean rollout.workers?"),
        ("steps.x=4", "--set steps.x: steps is 60, not a section"),
        (
            "data.train.x.path=a",
            "data.train is a list of 1; after it comes a number from 0 to 1 (1 adds an entry), got 'x'",
        ),
        ("data.train.2.path=a", "after it comes a number from 0 to 1 (1 adds an entry), got '2'"),
        ("rollout=4", "rollout must hold keys (workers, min_workers, max_workers, drain_timeout_s, ...), got 4"),
    ],
)
def test_a_wrong_override_is_refused_by_its_name(override: str, message: str):
    assert message in refused(override)


def test_wrong_overrides_and_wrong_values_are_listed_together():
    text = refused("rollout.workers", "steps.x=4", "learner.ranks=0")
    assert text.startswith("job has 3 problems:")
    for part in (
        "'rollout.workers' is not of the form",
        "steps is 60, not a section",
        "learner.ranks must be >= 1, got 0",
    ):
        assert part in text
