"""Choice of the device for the work."""

import torch

from cerwu_gpu.errors import ConfigError


def find_device(device: str | torch.device | None) -> torch.device:
    """Return the requested device; for None the GPU where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)  # a name may be known and the device not be there
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"device is {str(device)!r}, which is not here: use cpu.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {str(device)!r}: use cpu or cuda.")
    return chosen
