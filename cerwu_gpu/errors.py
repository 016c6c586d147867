"""One exception per way to be wrong; each message names the thing and the remedy."""


class CerwuError(Exception):
    """The root of every error that cerwu_gpu raises on purpose."""


class ConfigError(CerwuError, ValueError):
    """A setting is outside its range, or two settings contradict each other."""


class ModelError(CerwuError):
    """The model or its tokenizer cannot be found, read or compressed."""


class CalibrationError(CerwuError):
    """The calibration or evaluation text cannot be used."""


class OutputError(CerwuError):
    """The output cannot be written where it was asked for."""


class FactorizationError(CerwuError):
    """A Hessian has no Cholesky factor, even with more damping."""


class TargetError(CerwuError):
    """A requested size, bit rate or quality cannot be reached."""


class FormatError(CerwuError):
    """A compressed directory is not what docs/format.md says it must be."""


class CorruptionError(FormatError):
    """Stored bytes differ from what their checksum or their streams promise."""


class VersionError(FormatError):
    """A compressed directory was made by a newer cerwu_gpu."""


def reason(error: BaseException) -> str:
    """Return what another library's exception says, short enough for one sentence of ours: the
    first line of its message that has words in it, or else the exception's kind."""
    lines = (line.strip().rstrip(".:") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
