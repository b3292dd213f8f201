"""Kinds of trouble: how each is recognised, and what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

STORAGE = "storage"
CLUSTER = "cluster"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of trouble."""

    code: str
    words: str
    """Regular expression; found in what was said of the trouble."""
    remedy: str
    component: str | None = None
    """The part that it is of; None: whoever the words name."""


OTHER = Kind(
    code="other",
    words="",
    remedy="read the lines above and the part's log; if it is the machine's doing, `sapo-ray resume` goes on from the "
    "newest checkpoint (a service does so by itself, three times)",
)
# The first that fits is it: what says more comes first.
KINDS = (
    Kind(
        code="interrupted",
        words=r"interrupted by the user|the driver was told to end",
        component="driver",
        remedy="go on with `sapo-ray resume RUN`",
    ),
    Kind(
        code="disk_full",
        words=r"No space left|ENOSPC|EDQUOT|Disk quota|too little disk|free some space|disk is full|DiskFull",
        component=STORAGE,
        remedy="free some space on the run's disk, or lower checkpoint.min_free_gb or checkpoint.keep; then resume: "
        "the newest checkpoint is whole",
    ),
    Kind(
        code="shared_memory",
        words=r"/dev/shm|object store (needs|on )|ObjectStoreFull",
        component=CLUSTER,
        remedy="give machines or containers more shared memory (docker: --shm-size) or Ray a larger object store",
    ),
    Kind(
        code="out_of_memory",
        words=r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory|can't allocate memory|low on memory"
        r"|No available memory for the cache|less than (desired|requested)[\w ]* memory|not enough [\w ]*memory|OOM",
        remedy="give the part more memory, or ask for less: fewer rollout.max_num_seqs, a lower "
        "rollout.gpu_memory_utilization or rollout.kv_cache_mb (rollout), fewer learner.tokens_per_micro_batch, "
        "learner.gradient_checkpointing or more learner.ranks (learner), a larger verifier.memory_mb (verifier)",
    ),
    Kind(
        code="checkpoint_damaged",
        words=r"CheckpointError",
        component="checkpoint",
        remedy="restore the named file from a copy, or remove the damaged checkpoint's folder so that an older one is "
        "used; `checkpoints/latest` names the one to begin with",
    ),
    Kind(
        code="data",
        words=r"DataError|data source",
        component="data",
        remedy="see that data.*.path is where it was and readable from the cluster's machines, then resume; other data "
        "need a new job",
    ),
    Kind(
        code="model",
        words=r"ModelError|is not a local folder or|Repository Not Found",
        component="model",
        remedy="correct model.path (a folder with config.json and weights, or a Hub id that is cached or may be "
        "fetched), and submit the job again",
    ),
    Kind(
        code="verifier",
        words=r"groups in a row could not be used|VerifierErrors",
        component="verifier",
        remedy="look at `reason` and `detail` of the gradings (samples, journal.jsonl): a slow or failing reward "
        "function shows as timeout or crash; mend it, or raise verifier.deadline_s",
    ),
    Kind(
        code="reward",
        words=r"verifier\.reward|reward function",
        component="verifier",
        remedy="see that verifier.reward names a function that the cluster's machines can import; try it by "
        "`sapo-ray grade`",
    ),
    Kind(
        code="no_capacity",
        words=r"no room for learner|free in the cluster|[Ii]nsufficient resources|cannot be scheduled",
        component=CLUSTER,
        remedy="add machines, end other jobs, or ask for less: rollout.workers, learner.ranks",
    ),
    Kind(
        code="weights_refused",
        words=r"WeightsRefused|could not take over|canary|fingerprint",
        remedy="the worker is replaced; if it goes on, set rollout.dtype to model.dtype and compare both machines' "
        "versions of vLLM and torch",
    ),
    Kind(
        code="diverged",
        words=r"not finite|non-?finite|NaN",
        component="learner",
        remedy="lower learner.lr, or go back: submit a new job on an earlier checkpoint; the batch is kept in "
        "nonfinite/ of the run directory",
    ),
    Kind(
        code="job",
        words=r"ConfigError",
        component="job",
        remedy="correct the key that is named, and submit the job again",
    ),
    Kind(
        code="token_refused",
        words=r"refused this attempt's token|TokenRefused",
        component="control plane",
        remedy="the service does not know this attempt (any more); resume the job there, or go on by `sapo-ray resume`",
    ),
    Kind(code="superseded", words=r"superseded", component="driver", remedy="nothing: a later attempt has the run"),
    Kind(
        code="unreachable_cluster",
        words=r"cluster does not answer|timed out during startup|LauncherUnavailable|Ray says UNKNOWN"
        r"|no assignment within",
        component=CLUSTER,
        remedy="see that the Ray cluster is up and that service and drivers reach each other; jobs go on by themselves",
    ),
    Kind(
        code="silent",
        words=r"finished nothing|did not answer|nothing heard of|sign of life|did not come within|not done in time"
        r"|DeadlineExceeded|within \d+ s",
        remedy="look at the machine of the part that is named (is it reachable, is the process stopped?); if it only "
        "needs longer, raise the deadline that is named",
    ),
    Kind(
        code="worker_died",
        words=r"\bdied\b|\bended\b|WorkerLost|EngineDead|ActorDied|was lost",
        remedy="read its last lines; without any, it was killed from outside, by the kernel for memory most often "
        "(see dmesg on its machine)",
    ),
)
_GUESSES = re.compile(r"There are some potential root causes.*")
"""Ray says this of every actor that died, memory among the guesses."""
_NAMED = re.compile(r"\b(rollout|verifier|learner)-\d+(\.\d+)?\b")
_RANK = re.compile(r"\brank \[?(\d+)")


def kind_of(*said: str) -> Kind:
    """The kind of a trouble by what was said of it, the first words before the others."""
    for text in (_GUESSES.sub("", one) for one in said):
        for kind in KINDS:
            if re.search(kind.words, text):
                return kind
    return OTHER


def component_of(text: str, otherwise: str) -> str:
    """The part that a text names."""
    if found := _NAMED.search(text):
        return found.group()
    if found := _RANK.search(text):
        return f"learner-{found.group(1)}"
    if "rollout" in text and "rollout." not in text:
        return "rollout pool"
    return "learner" if "learner" in text and "learner." not in text else otherwise


def kind_by(code: str) -> Kind:
    """The kind with a code."""
    return next((kind for kind in KINDS if kind.code == code), OTHER)
