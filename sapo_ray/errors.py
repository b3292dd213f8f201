"""Every error this package raises for its users.

    SapoRayError
    |-- ConfigError          a job file, override or key is wrong: says field, value, bound, remedy
    |-- DataError            a data set is missing, malformed or unusable: says file and line
    |-- ModelError           a model or tokenizer cannot be loaded or is of an unsupported kind
    |-- WeightsRefused       weights arrived damaged or incomplete, or failed the canary
    |-- WorkerLost           an actor died or stopped answering
    |-- WorkerDrained        a rollout worker was taken away before it had finished: no loss, and nobody's fault
    |-- DeadlineExceeded     a named, bounded wait ran out
    |   `-- NoWorker         no rollout worker could be used meanwhile: says nothing about what was to be sampled
    |-- CheckpointError      a checkpoint is missing, damaged, or does not fit the job
    |-- ResourceError        too little disk, memory, shared memory or cluster capacity
    |   `-- DiskFull         the run directory's disk takes no more at this moment
    `-- TrainingFailed       the run itself cannot go on: says why and what was kept
        `-- Superseded       another attempt has the run; this one ends at once and writes no more

All are picklable with their message alone, because they cross process borders.
"""


class SapoRayError(Exception):
    """Base of all errors of this package; the message is meant for the user."""


class ConfigError(SapoRayError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(SapoRayError, ValueError):
    """A data source is missing, malformed or cannot be used as asked."""


class ModelError(SapoRayError):
    """A model or tokenizer cannot be loaded, or is of a kind that is not supported."""


class WeightsRefused(SapoRayError):
    """A weight update was damaged, incomplete, or failed the canary; nothing may be generated under it."""


class WorkerLost(SapoRayError):
    """An actor died or stopped answering."""


class PayloadLost(WorkerLost):
    """Finished samples went with the node that held them; whoever was given them is as it was."""


class WorkerDrained(SapoRayError):
    """A rollout worker was scaled away or left behind; what it had not finished is to be asked for again."""


class DeadlineExceeded(SapoRayError, TimeoutError):
    """A named wait ran out of time."""


class NoWorker(DeadlineExceeded):
    """No rollout worker could be used within the time; what waited for one is not to blame."""


class CheckpointError(SapoRayError):
    """A checkpoint is missing, damaged, or belongs to another job."""


class ResourceError(SapoRayError):
    """Disk, memory, shared memory or cluster capacity is not enough."""


class NoRoom(ResourceError):
    """The cluster has no nodes for the learner, within its deadline."""


class DiskFull(ResourceError):
    """The disk is full: what was to be written may be tried again once there is room."""


class TrainingFailed(SapoRayError):
    """The run cannot go on."""


class Superseded(TrainingFailed):
    """Another attempt has the run; this one ends at once and writes no more."""
