"""Reading a job: presets, numbers, and every way in which a file can be wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_ray.config.keys import all_keys, names_at
from sapo_ray.config.load import load_job, preset_names, resolve
from sapo_ray.config.problems import ABSENT, FAMILIAR
from sapo_ray.errors import ConfigError

MINIMAL = {"steps": 1, "model": {"path": "m"}, "data": {"train": [{"path": "d.jsonl"}]}}


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def problems(job: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(job, overrides)
    return str(caught.value)


def test_the_quickstart_preset_holds_the_measured_recipe():
    job = resolve({"preset": "quickstart"})
    assert (job.model.path, job.model.dtype, job.model.warm_start_accuracy) == ("builtin:addition", "float32", 0.15)
    assert (job.rollout.prompts_per_step, job.rollout.group_size, job.rollout.max_new_tokens) == (32, 16, 28)
    assert (job.rollout.workers, job.rollout.temperature, job.rollout.max_staleness) == (2, 1.0, 0)
    assert (job.learner.ranks, job.learner.zero_stage, job.learner.mini_batches, job.learner.epochs) == (2, 2, 4, 1)
    assert (job.learner.lr, job.learner.schedule, job.learner.lr_end) == (5e-4, "linear", 0.05)
    assert (job.learner.betas, job.learner.weight_decay, job.learner.grad_clip) == ((0.9, 0.99), 0.0, 1.0)
    assert (job.algorithm.loss, job.algorithm.gate, job.algorithm.tau_preset) == ("sapo", "sigmoid", "qwen")
    assert (job.data.template, job.data.prompt) == ("plain", "{question}")
    assert (job.verifier.workers, job.verifier.processes, job.verifier.answer) == (1, 2, "boxed")
    assert [(source.path, source.split) for source in job.evaluation.data] == [("builtin:addition", "heldout")]
    assert (job.steps, job.checkpoint.every) == (60, 20)


def test_what_the_job_says_goes_over_the_preset_section_by_section_and_lists_are_replaced(tmp_path: Path):
    text = "preset: quickstart\nlearner:\n  lr: 3e-4\ndata:\n  train:\n    - path: mine.jsonl\n"
    job = load_job(write(tmp_path, text))
    assert job.learner.lr == 3e-4
    assert job.learner.ranks == 2
    assert job.data.template == "plain"
    assert [source.path for source in job.data.train] == ["mine.jsonl"]


def test_defaults_are_those_for_real_models():
    job = resolve(MINIMAL)
    assert (job.learner.lr, job.rollout.max_staleness, job.algorithm.old_logprobs) == (1e-6, 0, "decoupled")


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", ".1e-5", "+1e-6", "0.000001"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str):
    assert load_job(write(tmp_path, f"preset: quickstart\nlearner:\n  lr: {text}\n")).learner.lr == 1e-6


def test_scientific_notation_is_a_whole_number_where_it_is_one(tmp_path: Path):
    assert load_job(write(tmp_path, "preset: quickstart\nsteps: 1e3\n")).steps == 1000
    with pytest.raises(ConfigError, match=r"steps must be a whole number >= 1, got 0\.01"):
        load_job(write(tmp_path, "preset: quickstart\nsteps: 1e-2\n"))


def test_text_in_quotes_stays_text_even_if_it_looks_like_a_number(tmp_path: Path):
    job = load_job(write(tmp_path, "preset: quickstart\nmodel:\n  revision: '12e5'\n"))
    assert job.model.revision == "12e5"


def test_text_without_quotes_that_is_a_number_is_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"name must be text, got 7; put it in quotes"):
        load_job(write(tmp_path, "preset: quickstart\nname: 7\n"))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file; give the path of a job file"):
        load_job("nowhere.yaml")


def test_a_folder_is_not_a_job(tmp_path: Path):
    with pytest.raises(ConfigError, match="is a folder; give the path of a job file in it"):
        load_job(tmp_path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match=r"job\.yaml is empty; the smallest job is `preset: quickstart`"):
        load_job(write(tmp_path, text))


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "a list"), ("quickstart\n", "single value .'quickstart'.")])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str, kind: str):
    with pytest.raises(ConfigError, match=rf"must hold `key: value` lines, got a.*{kind.removeprefix('a ')}"):
        load_job(write(tmp_path, text))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 6\)"):
        load_job(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nmodel: {path: m\n", r"job\.yaml, line 3, column 1: not valid YAML"),
        ("steps: 1\nname: a: b\n", r"line 2, column 8: not valid YAML: .*put text that holds a colon in quotes"),
        ("steps: 1\n\trollout: 1\n", r"line 2, column 1: not valid YAML: a tab; indent with spaces"),
        ("steps: 1\n---\nsteps: 2\n", r"line 2, column 1: not valid YAML: a second document begins here"),
        ("steps: !!python/object/apply:os.getcwd []\n", r"line 1, column 8: not valid YAML: could not determine"),
        ("steps: \x01\n", r"job\.yaml: not valid YAML: unacceptable character"),
    ],
)
def test_a_yaml_error_says_where_it_is(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_job(write(tmp_path, text))


def test_every_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path):
    text = "steps: 1\nrollout:\n  workers: 1\n  workers: 2\nsteps: 2\ndata:\n  train:\n    - path: a\n      path: b\n"
    with pytest.raises(ConfigError) as caught:
        load_job(write(tmp_path, text))
    assert [line.split("job.yaml, ")[1] for line in str(caught.value).splitlines()] == [
        "line 5: steps stands twice, first on line 1; keep one",
        "line 9: data.train.0.path stands twice, first on line 8; keep one",
        "line 4: rollout.workers stands twice, first on line 3; keep one",
    ]


def test_an_alias_that_leads_back_to_itself_does_not_hang(tmp_path: Path):
    with pytest.raises(ConfigError, match="a is not a key"):
        load_job(write(tmp_path, "preset: quickstart\na: &a [*a]\n"))


def test_all_problems_are_listed_at_once():
    job = {
        "preset": "quickstart",
        "algorithm": {"gate": "sigmod"},
        "rollout": {"worker": 3, "max_staleness": -1},
        "learner": {"ranks": "two"},
        "verifier": 3,
        "data": None,
    }
    lines = problems(job).splitlines()
    assert lines[0] == "job has 6 problems:"
    assert sorted(line.split(";")[0].split(",")[0].strip() for line in lines[1:]) == [
        "- algorithm.gate must be sigmoid",
        "- data is empty",
        "- learner.ranks must be a whole number >= 1",
        "- rollout.max_staleness must be >= 0",
        "- rollout.worker is not a key",
        "- verifier must hold keys (workers",
    ]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "rollout",
            "workers",
            0,
            "rollout.workers must be >= 1, got 0; Rollout actors to begin with, each with an engine of its own.",
        ),
        ("rollout", "workers", True, "rollout.workers must be a whole number >= 1, got True; "),
        ("rollout", "workers", 1.5, "rollout.workers must be a whole number >= 1, got 1.5; "),
        ("rollout", "workers", None, "got nothing (null); remove the line to have the default, 1"),
        ("rollout", "top_p", 0.9, "rollout.top_p must be >= 1, got 0.9; Must be 1: log-probs are over the full vocab"),
        ("rollout", "temperature", 0, "rollout.temperature must be > 0, got 0; Of training samples"),
        ("rollout", "temperature", float("nan"), "rollout.temperature must be a number > 0, got nan; "),
        ("rollout", "max_staleness", "soon", "rollout.max_staleness must be a whole number >= 0, got 'soon'; "),
        ("algorithm", "gate", "sigmod", "got 'sigmod' (did you mean sigmoid?); Gate of `sapo`. Default: sigmoid."),
        ("algorithm", "dual_clip", 1, "algorithm.dual_clip must be > 1, got 1; grpo only"),
        ("algorithm", "restoring", "maybe", "algorithm.restoring must be true or false, got 'maybe'; "),
        ("learner", "zero_stage", 4, "learner.zero_stage must be <= 3, got 4; DeepSpeed ZeRO stage. Default: 2."),
        ("learner", "betas", [0.9], "learner.betas"),
        ("learner", "betas", [0.9, 1], "learner.betas.1 must be < 1, got 1; AdamW. Default: [0.9, 0.999]."),
        ("learner", "betas", 0.9, "learner.betas must be a list of 2 numbers >= 0, < 1, got 0.9; "),
        ("model", "path", 3, "model.path must be text, got 3; put it in quotes"),
        ("data", "train", [], "data.train must be a list of at least one entry, got []"),
        ("data", "train", "a.jsonl", "data.train must be a list of at least one entry, got 'a.jsonl'"),
        ("data", "train", ["a"], "data.train.0 must hold keys (path, config, split, name, ...), got 'a'"),
        ("data", "train", [{"weight": 1}], "data.train.0.path is missing; add it: JSONL or Parquet file"),
        ("data", "prompt", "Solve it.", "data.prompt must contain {question}, got 'Solve it.'; put it where"),
        ("data", "system", "Be brief.", "data.system needs data.template: chat; with plain, write it into data.prompt"),
        ("checkpoint", "keep", 1, "checkpoint.keep must be >= 2, got 1; Newest ones kept. Default: 2."),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_bound_and_remedy(section: str, key: str, value: Any, message: str):
    text = problems({"preset": "quickstart", section: {key: value}})
    assert text.startswith("job: ")
    assert message in text


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        ("HF_TOKEN", "secrets must be a list of texts, got 'HF_TOKEN'"),
        (["hf_token"], "secrets.0 must be capitals, digits and underscores, as HF_TOKEN is, got 'hf_token'"),
        (["OK", "A=b"], "secrets.1 must be capitals, digits and underscores"),
        (["OK", 5], "secrets.1 must be text, got 5"),
        ([""], "secrets.0 must be capitals"),
    ],
)
def test_secrets_are_a_list_of_names(secrets: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        resolve({"preset": "quickstart", "secrets": secrets})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["/models/mine", "s3://bucket/models/a b", "gs://b/x", "file:///models/x", "sftp://me@host/x", "/a?b"]
)
def test_a_copy_of_the_model_may_go_to_a_folder_or_a_url(uri: str):
    assert resolve({"preset": "quickstart", "output": {"uri": uri}}).output.uri == uri


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://key:s3cr3t@bucket/x", "must hold no user, password or query"),
        ("s3://key:s3c/r3t@bucket/x", "must hold no user, password or query"),
        ("az://c/x?sig=s3cr3t", "must hold no user, password or query"),
        ("models/mine", "must be an absolute path or a URL"),
        ("~/models", "must be an absolute path or a URL"),
        ("", "must be an absolute path or a URL"),
        ("s3://", "must be an absolute path or a URL"),
        ("file://host/x", "must be an absolute path or a URL"),
        ("file:////etc", "must be an absolute path or a URL"),
        ("S3://bucket", "must be an absolute path or a URL"),
        ("simplecache::s3://bucket/x", "without `::` and `..`"),
        ("s3://bucket/x/../y", "without `::` and `..`"),
        ("/models/../etc", "without `::` and `..`"),
        ("/models/\x1b[31m", "at most 1000 printable characters"),
        ("/" + "x" * 1000, "at most 1000 printable characters"),
        (7, "output.uri must be text, got 7"),
    ],
)
def test_a_place_for_the_copy_that_is_none_is_refused_and_no_password_is_shown(uri: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        resolve({"preset": "quickstart", "output": {"uri": uri}})
    assert message in str(caught.value)
    assert "s3c" not in str(caught.value)


def test_a_name_that_no_folder_should_bear_is_refused():
    assert "name" in problems(MINIMAL | {"name": "a/b"})
    assert "Letters, digits, dot, dash, underscore" in problems(MINIMAL | {"name": "a/b"})


def test_settings_that_contradict_each_other_are_all_named():
    text = problems(
        {"preset": "quickstart"},
        "learner.mini_batches=64",
        "learner.tokens_per_micro_batch=8",
        "algorithm.overlong_buffer=28",
        "model.path=foo",
    )
    assert "learner.mini_batches must be <= rollout.prompts_per_step (32), got 64; a mini-batch holds whole" in text
    assert "must be >= data.max_prompt_tokens + rollout.max_new_tokens = 44, got 8; one sample must fit" in text
    assert "belongs to model.path: builtin:addition, got 'foo'; set model.warm_start_accuracy: null" in text
    assert "algorithm.overlong_buffer must be < rollout.max_new_tokens (28), got 28; shorten it" in text


def test_settings_that_no_engine_could_follow_are_all_named():
    text = problems(
        {"preset": "quickstart"},
        "model.dtype=bfloat16",
        "rollout.dtype=float32",
        "learner.offload_optimizer=true",
        "learner.zero_stage=0",
        "learner.transport=ipc",
        "rollout.tensor_parallel=2",
    )
    assert "rollout.dtype float32 needs model.dtype float32, got bfloat16" in text
    assert "learner.offload_optimizer needs learner.zero_stage >= 1, got 0" in text
    assert "learner.transport: ipc needs rollout.tensor_parallel 1, got 2" in text


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"tau_preset": None}, "give both algorithm.tau_pos and tau_neg, or a preset (qwen, study)"),
        ({"restoring": True, "loss": "grpo"}, "algorithm.restoring needs loss: sapo and a smooth gate"),
        ({"restoring": True, "gate": "clip"}, "algorithm.restoring needs loss: sapo and a smooth gate"),
        ({"dual_clip": 3}, "algorithm.dual_clip belongs to loss: grpo, got loss: sapo; remove it"),
        (
            {"old_logprobs": "bypass", "correction": "icepop"},
            "needs old_logprobs: decoupled; with bypass set it to none",
        ),
    ],
)
def test_an_algorithm_that_contradicts_itself_is_refused(algorithm: dict[str, Any], message: str):
    assert message in problems({"preset": "quickstart", "algorithm": algorithm})


def test_an_unknown_preset_is_refused_without_blaming_the_keys_that_it_would_have_given():
    assert problems({"preset": "quickstat"}) == (
        "job: preset must be quickstart, got 'quickstat' (did you mean quickstart?); "
        "Values to start from; everything written in the job goes over them."
    )


def test_what_is_missing_is_named_with_an_example():
    text = problems({})
    assert "steps is missing; add it: Rollout batches consumed." in text
    assert "model is missing; add `model: {path: ...}`, or start from `preset: quickstart`" in text
    assert "data is missing; add `data: {train: [{path: ...}]}`, or start from `preset: quickstart`" in text


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"rollout": {"worker": 1}}, "rollout.worker is not a key; did you mean rollout.workers?"),
        ({"rolout": {"workers": 1}}, "rolout is not a key; did you mean rollout?"),
        ({"workers": 4}, "workers is not a key; did you mean rollout.workers?"),
        ({"rollout": {"gates": "erf"}}, "rollout.gates is not a key; did you mean algorithm.gate?"),
        ({"learning_rate": 1e-6}, "learning_rate is not a key; did you mean learner.lr?"),
        ({"learner": {"num_generations": 8}}, "learner.num_generations is not a key; did you mean rollout.group_size?"),
        (
            {"data": {"train": [{"path": "a", "wieght": 2}]}},
            "data.train.0.wieght is not a key; did you mean data.train.0.w",
        ),
        ({"checkpoint": {"xyzzy": 1}}, "checkpoint.xyzzy is not a key; checkpoint has: every, keep, min_free_gb"),
        ({"xyzzy": 1}, "xyzzy is not a key; a job has: preset, name, seed, steps, run_dir, secrets, model"),
        ({3: 1}, "3 is not a key; a job has: preset"),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_probably_meant(job: dict[str, Any], message: str):
    assert message in problems({"preset": "quickstart"} | job)


def test_the_names_other_trainers_use_lead_to_keys_that_exist():
    leaves = {name.replace("[]", ".0") for name in all_keys()}
    assert set(FAMILIAR.values()) <= leaves
    ours = {name.rsplit(".", 1)[-1] for name in all_keys()}
    assert ours.isdisjoint(ABSENT)
    assert ours.isdisjoint(FAMILIAR)


@pytest.mark.parametrize(
    ("section", "name", "said"),
    [
        ("algorithm", "beta", r"algorithm\.beta is not a key; there is no KL penalty .*AdamW's two are learner\.betas"),
        ("learner", "beta", r"learner\.beta is not a key; .*learner\.betas"),
        ("algorithm", "kl_coef", r"algorithm\.kl_coef is not a key; there is no KL penalty and no reference model"),
        ("rollout", "top_k", r"rollout\.top_k is not a key; training samples from the whole distribution"),
        ("rollout", "min_p", r"rollout\.min_p is not a key; training samples from the whole distribution"),
        ("rollout", "tensor_parallel_size", r"did you mean rollout\.tensor_parallel\?"),
        ("algorithm", "clip_ratio", r"did you mean algorithm\.eps_low\?"),
    ],
)
def test_names_of_other_trainers_are_answered(section: str, name: str, said: str):
    with pytest.raises(ConfigError, match=said):
        resolve({"preset": "quickstart", section: {name: 1}})


def test_a_prompt_in_braces_without_quotes_is_told_to_put_them(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r'data\.prompt must be text, got .*must stand in quotes, e\.g\. prompt: "{que'
    ):
        load_job(write(tmp_path, "preset: quickstart\ndata:\n  prompt: {question}\n"))
    with pytest.raises(ConfigError, match=r"line 3, column 22: not valid YAML: .*must stand in quotes as a whole"):
        load_job(write(tmp_path, "preset: quickstart\ndata:\n  prompt: {question} = ?\n"))


SECTIONS = ["", "model", "data", "data.train.0", "algorithm", "rollout", "verifier", "learner", "checkpoint"]
SECTIONS += ["evaluation", "evaluation.data.0", "logging", "deadlines"]


@settings(max_examples=300)
@given(section=st.sampled_from(SECTIONS), key=st.from_regex(r"[a-z][a-z_]{0,20}", fullmatch=True), value=st.integers())
def test_any_unknown_key_anywhere_is_refused_by_its_name(section: str, key: str, value: int):
    location = [part for part in section.split(".") if part]
    if key in names_at(location):
        return
    name = ".".join([*location, key])
    assert f"{name} is not a key; " in problems({"preset": "quickstart"}, f"{name}={value}")


def test_every_preset_is_a_complete_job_and_every_one_can_be_named():
    assert preset_names() == ["quickstart"]
    for name in preset_names():
        assert resolve({"preset": name}).preset == name


def test_loading_a_job_imports_neither_torch_nor_ray():
    program = (
        "import sys; from sapo_ray.config.load import resolve; from sapo_ray.config.estimate import estimate; "
        "estimate(resolve({'preset': 'quickstart'})); "
        "print([m for m in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
