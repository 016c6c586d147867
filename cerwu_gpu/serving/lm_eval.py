"""lm-eval's command line with one more model type: `--model cerwu --model_args pretrained=DIR`.

lm-eval finds no models of other packages by itself, so `python -m cerwu_gpu.serving.lm_eval`
registers the type and then is `lm_eval`.
"""

import logging
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from cerwu_gpu.hf.models import load_tokenizer
from cerwu_gpu.serving.loading import Resident, load_compressed, local_snapshot

log = logging.getLogger("cerwu_gpu")


@register_model("cerwu")
class CerwuLM(HFLM):
    """A compressed directory, or the Hub name of one, as a model of lm-eval."""

    def __init__(
        self,
        pretrained: str,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        resident: Resident = "dense",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: compressed directory, or the Hub name of one.
            device: of the model; the CPU, with a warning, for a CUDA device that is not here.
            dtype: name of a torch dtype to cast to; default: as it was compressed.
            resident: "dense", or "compressed" for the least memory.
            trust_remote_code: run the code of the directory, where it has some.
            options: further arguments of HFLM, such as batch_size.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            # lm-eval's own default is cuda:0, whatever the machine has.
            log.warning("there is no CUDA device here: %s runs on the CPU.", pretrained)
            device = "cpu"
        folder = local_snapshot(pretrained)
        model = load_compressed(
            folder,
            device=device,
            dtype=None if dtype in (None, "auto") else getattr(torch, str(dtype)),
            resident=resident,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(folder, trust_remote_code)
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)


if __name__ == "__main__":
    cli_evaluate()
