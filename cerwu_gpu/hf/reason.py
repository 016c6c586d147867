"""What another library's exception says, short enough for one sentence of ours."""


def reason(error: Exception) -> str:
    """The first line of the message that has words in it, or the exception's kind."""
    lines = (line.strip().rstrip(".:") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
