"""A job reaches only what the operator allows, whatever is tried."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from api_parts import Connect, problem, started, submitted
from starlette.testclient import TestClient

from sapo_ray.config.load import resolve
from sapo_ray.control import specs
from sapo_ray.control.confine import allowed
from sapo_ray.control.store import Store, jobs

ROW = b'{"question": "1+1", "answer": "2"}\n'


def refused(client: TestClient, **spec: Any) -> dict[str, Any]:
    return problem(client.post("/v1/jobs", json={"spec": {"preset": "quickstart", **spec}}), 403, "not_allowed")


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "Qwen/Qwen3-8B", "../models/x", "./x", "~/x", "", "builtin:../x", "file:///etc", "C:\\x", "a/b/c"],
)
def test_models_and_data_outside_the_list_are_refused_with_what_is_allowed(admin: TestClient, path: str) -> None:
    found = refused(admin, model={"path": path, "warm_start_accuracy": None})
    assert found["param"] == "model.path"
    assert "allowed: builtin:*" in found["detail"]
    found = refused(admin, data={"train": [{"path": "builtin:addition"}, {"path": path}]})
    assert found["param"] == "data.train.1.path"
    found = refused(admin, evaluation={"data": [{"path": path}]})
    assert found["param"] == "evaluation.data.0.path"


def test_everything_that_is_not_allowed_is_listed_at_once(admin: TestClient) -> None:
    found = refused(
        admin,
        model={"path": "a/b", "trust_remote_code": True, "revision": "../x", "warm_start_accuracy": None},
        data={"train": [{"path": "/data/x.jsonl", "split": "../../etc/x"}]},
        verifier={"reward": "os:system"},
        logging={"mlflow_uri": "http://evil"},
        run_dir="/tmp/mine",
    )
    assert {one["param"] for one in found["errors"]} == {
        "model.path", "model.revision", "model.trust_remote_code", "data.train.0.path", "data.train.0.split",
        "verifier.reward", "run_dir", "logging.mlflow_uri",
    }  # fmt: skip


def test_a_folder_that_is_allowed_is_allowed_and_no_way_out_of_it(connect: Connect, tmp_path: Path) -> None:
    models, secret = tmp_path / "models", tmp_path / "secret"
    (models / "good").mkdir(parents=True)
    secret.mkdir()
    (models / "link").symlink_to(secret)
    (models / "inner").symlink_to(models / "good")
    patterns = [f"{models}/*"]
    assert allowed(f"{models}/good", patterns)
    assert allowed(f"{models}/inner", patterns)
    assert not allowed(f"{models}/link", patterns)
    assert not allowed(f"{models}/link/x", patterns)
    assert not allowed(f"{models}/../secret", patterns)
    assert not allowed(f"{models}/good/../../secret", patterns)
    assert not allowed(str(models), patterns)
    assert not allowed(f"{models}x/good", patterns)
    assert not allowed(f"{models}/good\0", patterns)
    client = connect(allow_models=patterns)
    spec = {"preset": "quickstart", "model": {"path": f"{models}/good", "warm_start_accuracy": None}}
    assert client.post("/v1/jobs", json={"spec": spec}).status_code == 201
    assert "link" in refused(client, model={"path": f"{models}/link", "warm_start_accuracy": None})["detail"]


def test_the_operator_may_name_a_folder_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real" / "m").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    assert allowed(str(tmp_path / "alias" / "m"), [f"{tmp_path}/alias/*"])
    assert allowed(str(tmp_path / "real" / "m"), [f"{tmp_path}/alias/*"])


@pytest.mark.parametrize(
    ("value", "patterns", "expected"),
    [
        ("Qwen/Qwen3-8B", ["Qwen/*"], True),
        ("Qwen/../etc", ["Qwen/*"], False),
        ("Qwen/a/b", ["Qwen/*"], False),
        ("Qwen", ["Qwen/*"], False),
        ("/etc/passwd", ["*"], False),
        ("/etc/passwd", ["Qwen/*", "builtin:*"], False),
        ("openai/gsm8k", ["*"], True),
        ("builtin:addition", ["builtin:addition"], True),
        ("builtin:bytes", ["builtin:addition"], False),
        ("builtin:a/../b", ["builtin:*"], False),
        ("org/.hidden", ["org/*"], False),
    ],
)
def test_hub_ids_and_builtins_are_matched_as_names(value: str, patterns: list[str], expected: bool) -> None:
    assert allowed(value, patterns) is expected


def test_a_split_cannot_lead_out_of_an_allowed_folder(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    client = connect(allow_data=[f"{tmp_path}/*", "builtin:*"])
    for split in ("../x", "/etc/x", "a/b", "..", "", ".hidden", "x\n"):
        found = refused(client, data={"train": [{"path": f"{tmp_path}/data", "split": split}]})
        assert found["param"] == "data.train.0.split"
    spec = {"preset": "quickstart", "data": {"train": [{"path": f"{tmp_path}/data", "split": "train[:10%]"}]}}
    assert client.post("/v1/jobs", json={"spec": spec}).status_code == 201


def test_rewards_and_remote_code_need_the_operators_word(connect: Connect) -> None:
    client = connect(allow_rewards=["rewards.*:*"], allow_trust_remote_code=True)
    assert "allowed: rewards.*:*" in refused(client, verifier={"reward": "os:system"})["detail"]
    spec = {"preset": "quickstart", "verifier": {"reward": "rewards.maths:score"}, "model": {"trust_remote_code": True}}
    assert client.post("/v1/jobs", json={"spec": spec}).status_code == 201


def test_own_code_is_refused_once_two_tenants_share_the_cluster(connect: Connect) -> None:
    client = connect(allow_rewards=["*"])
    spec = {"preset": "quickstart", "verifier": {"reward": "rewards:score"}}
    assert client.post("/v1/jobs", json={"spec": spec}).status_code == 201
    assert client.post("/v1/api-keys", json={"name": "k", "tenant": "rival"}).status_code == 201
    assert "several tenants" in refused(client, verifier={"reward": "rewards:score"})["detail"]
    alone = connect(allow_rewards=["*"], shared_cluster=False)
    assert alone.post("/v1/jobs", json={"spec": spec}).status_code == 201


def test_a_data_set_is_found_by_its_tenant_alone_and_reaches_the_driver_as_a_file(
    acme: TestClient, rival: TestClient, store: Store
) -> None:
    made = acme.post("/v1/datasets?name=sums.jsonl", content=ROW, headers={"Content-Type": "application/jsonl"}).json()
    data = {"train": [{"path": f"dataset:{made['id']}"}]}
    assert "no such data set" in refused(rival, data=data)["detail"]
    for wrong in ("dataset:", "dataset:../x", "dataset:ds-2gd4q7x3zkmbw6tfh5ye", "dataset:*"):
        assert "no such data set" in refused(acme, data={"train": [{"path": wrong}]})["detail"]
    job_id = submitted(acme, spec={"preset": "quickstart", "data": data})
    assert acme.get(f"/v1/jobs/{job_id}").json()["spec"]["data"]["train"][0]["path"] == f"dataset:{made['id']}"
    token = started(store, job_id)
    found = acme.get(f"/v1/link/{job_id}/1/assignment", headers={"Authorization": f"Bearer {token}"}).json()
    source = found["spec"]["data"]["train"][0]
    assert Path(source["path"]).read_bytes() == ROW
    assert source["path"].endswith(".jsonl")
    assert Path(found["run_dir"]).name == job_id


def test_a_data_set_in_use_cannot_be_deleted(acme: TestClient) -> None:
    made = acme.post("/v1/datasets?name=sums.jsonl", content=ROW, headers={"Content-Type": "application/jsonl"}).json()
    job_id = submitted(acme, spec={"preset": "quickstart", "data": {"train": [{"path": f"dataset:{made['id']}"}]}})
    other = submitted(acme, spec={"preset": "quickstart", "evaluation": {"data": [{"path": f"dataset:{made['id']}"}]}})
    found = problem(acme.delete(f"/v1/datasets/{made['id']}"), 409, "illegal_transition")
    assert sorted(found["job_ids"]) == sorted([job_id, other])
    acme.post(f"/v1/jobs/{job_id}:cancel")
    assert problem(acme.delete(f"/v1/datasets/{made['id']}"), 409, "illegal_transition")["job_ids"] == [other]
    acme.post(f"/v1/jobs/{other}:cancel")
    assert acme.delete(f"/v1/datasets/{made['id']}").status_code == 204


def test_a_data_set_that_is_deleted_between_the_check_and_the_queue_leaves_no_job_without_data(
    acme: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = acme.post("/v1/datasets?name=sums.jsonl", content=ROW, headers={"Content-Type": "application/jsonl"}).json()
    check = specs.checked

    def check_and_lose(*given: Any) -> Any:
        found = check(*given)
        assert acme.delete(f"/v1/datasets/{made['id']}").status_code == 204
        return found

    monkeypatch.setattr(specs, "checked", check_and_lose)
    assert made["id"] in refused(acme, data={"train": [{"path": f"dataset:{made['id']}"}]})["detail"]
    assert acme.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_data_set_waits_to_be_deleted_while_a_job_that_reads_it_is_being_stored(
    acme: TestClient, store: Store, tmp_path: Path
) -> None:
    made = acme.post("/v1/datasets?name=sums.jsonl", content=ROW, headers={"Content-Type": "application/jsonl"}).json()
    spec = resolve({"preset": "quickstart", "data": {"train": [{"path": f"dataset:{made['id']}"}]}})
    with ThreadPoolExecutor(1) as pool:
        with store.begin() as session:
            specs.hold_datasets(session, "acme", spec)
            deleting = pool.submit(acme.delete, f"/v1/datasets/{made['id']}")
            time.sleep(0.5)  # it has come to the lock by now, or goes past it if there is none
            stored = jobs.create_job(
                session,
                tenant="acme",
                name="job",
                spec=spec.model_dump(mode="json"),
                steps=1,
                priority=50,
                labels={},
                scale=(1, 1, 1),
                runs_root=tmp_path,
            )
        assert problem(deleting.result(), 409, "illegal_transition")["job_ids"] == [stored.id]


def test_a_secret_that_the_tenant_does_not_have_is_refused_and_those_it_has_are_named(
    connect: Connect, tmp_path: Path
) -> None:
    for tenant, name, value in [
        ("default", "HF_TOKEN", b"h-1"), ("default", "BROKEN", b"\xff"), ("rival", "THEIRS", b"h-2")
    ]:  # fmt: skip
        (tmp_path / "secrets" / tenant).mkdir(parents=True, exist_ok=True)
        (tmp_path / "secrets" / tenant / name).write_bytes(value)
    client = connect(secrets_dir=tmp_path / "secrets")
    found = refused(client, secrets=["HF_TOKEN", "THEIRS", "BROKEN"])
    assert [(one["param"], one["detail"]) for one in found["errors"]] == [
        (
            "secrets.1",
            "secrets.1 'THEIRS': this tenant has no such secret; the operator keeps for it: BROKEN, HF_TOKEN",
        ),
        ("secrets.2", "secrets.2 'BROKEN': the operator's file of it is not UTF-8; tell the operator"),
    ]
    spec = {"preset": "quickstart", "secrets": ["HF_TOKEN"]}
    made = client.post("/v1/jobs", json={"spec": spec})
    assert (made.status_code, made.json()["spec"]["secrets"]) == (201, ["HF_TOKEN"])
    assert "h-1" not in made.text
    assert "for it: none" in refused(connect(), secrets=["HF_TOKEN"])["detail"]
    wrong = client.post("/v1/jobs", json={"spec": spec | {"secrets": ["hf-token"]}})
    assert "capitals, digits and underscores" in problem(wrong, 422, "invalid_job")["detail"]


def test_a_copy_goes_only_where_the_operator_allows(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to("/etc")
    assert "allowed: none" in refused(connect(), output={"uri": "s3://bucket/x"})["detail"]
    client = connect(allow_outputs=[f"{tmp_path}/out/*", "s3://models/*", "file:///exports/*"])
    for good in (
        f"{tmp_path}/out/a",
        f"file://{tmp_path}/out/a",
        "s3://models/a/b",
        "/exports/a",
        "local:///exports/a",
    ):
        assert client.post("/v1/jobs", json={"spec": {"preset": "quickstart", "output": {"uri": good}}}).is_success, (
            good
        )
    for bad in (
        f"{tmp_path}/out", f"{tmp_path}/out/link/x", f"local://{tmp_path}/out/link/x", "s3://other/x", "s3://models",
        "s3a://models/x", "/etc/x", "file:///etc/x",
    ):  # fmt: skip
        assert refused(client, output={"uri": bad})["param"] == "output.uri", bad
    anywhere = connect(allow_outputs=["*"])
    for bad in ("s3://models/x", "/exports/a", "file:///exports/a"):
        assert refused(anywhere, output={"uri": bad})["param"] == "output.uri", bad


def test_what_is_allowed_is_told(connect: Connect) -> None:
    client = connect(allow_models="builtin:*,Qwen/*", allow_rewards='["r:*"]')
    found = client.get("/v1/models").json()
    assert [one["path"] for one in found["data"]] == ["builtin:*", "Qwen/*"]
    assert (found["data_paths"], found["rewards"]) == (["builtin:*", "dataset:*"], ["r:*"])
    assert (found["outputs"], found["secrets"]) == ([], [])
