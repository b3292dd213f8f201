"""Did pip find the build of torch that was meant? `check_torch.py cpu|gpu`."""

import sys

import torch

wanted = sys.argv[1]
found = "gpu" if torch.version.cuda else "cpu"
if found != wanted:
    sys.exit(
        f"torch {torch.__version__} is a {found} build, the {wanted} set needs a {wanted} build; "
        + (
            "PyTorch's CPU index was probably not reachable: install a CPU build of that version into .venv yourself, "
            "then run make setup again"
            if wanted == "cpu"
            else "run make clean, then make setup GPU=1 where no CPU build comes first"
        )
    )
