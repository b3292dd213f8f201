"""Claim: token log-probs and their gradients take at most a tenth of the extra memory of the plain head at V = 152k.

Each case runs in a process of its own: inputs are made and touched, the peak of resident memory is reset, then one
forward and backward runs. Extra memory is that peak above what was resident before; it includes the gradients of
hidden states and weight, which every way must hold (their size is printed beside it). Time is processor time of one
thread, which does not depend on who else uses the machine.

    python benchmarks/logprob_head.py [--tokens 1024] [--hidden 128] [--repeats 2] [--dtypes float32 bfloat16]

bfloat16 is off unless asked for: without matrix units for it, a CPU takes minutes a case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sapo_ray.algorithms.token_logprobs import token_logprobs

RESULT = Path(__file__).parent / "results" / "logprob_head.json"
VOCABULARIES = (32_000, 152_000)
TEMPERATURE = 0.7
MB = 1 << 20


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log_softmax of all logits, then pick."""
    logits = (hidden @ weight.t()).float() / TEMPERATURE
    return torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def selective(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Pick, minus log-sum-exp: no log_softmax is kept, all logits are."""
    logits = (hidden @ weight.t()).float() / TEMPERATURE
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - torch.logsumexp(logits, dim=-1)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """This project's."""
    return token_logprobs(hidden, weight, targets, TEMPERATURE).logp


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "selective": selective,
    "chunked": chunked,
}


def status_mb(name: str) -> float:
    """VmRSS (resident now) or VmHWM (peak since the last reset) of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def once(way: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Processor seconds of one forward and backward; gradients are dropped before it."""
    hidden.grad = weight.grad = None
    start = time.process_time()
    WAYS[way](hidden, weight, targets).sum().backward()
    return time.process_time() - start


def measure(way: str, vocabulary: int, tokens: int, width: int, dtype: str, repeats: int) -> dict[str, float]:
    """Peak extra memory of the first run at full size, and the fastest of `repeats` more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    # A tiny run first, so that libraries have their own buffers before memory is counted.
    once(way, torch.randn(4, width).to(kind).requires_grad_(), torch.randn(64, width).to(kind).requires_grad_(),
         torch.zeros(4, dtype=torch.long))  # fmt: skip
    hidden = torch.randn(tokens, width).to(kind).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(kind).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mb("VmRSS")
    once(way, hidden, weight, targets)
    extra = status_mb("VmHWM") - before
    seconds = min(once(way, hidden, weight, targets) for _ in range(repeats))
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size() / MB
    return {"extra_mb": extra, "gradients_mb": gradients, "cpu_seconds": seconds}


def in_a_process(way: str, vocabulary: int, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh interpreter."""
    command = [
        sys.executable, __file__, "--case", way, str(vocabulary), dtype,
        "--tokens", str(args.tokens), "--hidden", str(args.hidden), "--repeats", str(args.repeats),
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800).stdout
    result: dict[str, float] = json.loads(output)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--case", nargs=3, metavar=("WAY", "VOCABULARY", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        way, vocabulary, dtype = args.case
        print(json.dumps(measure(way, int(vocabulary), args.tokens, args.hidden, dtype, args.repeats)))
        return
    rows = []
    print(f"{args.tokens} tokens, hidden {args.hidden}, forward + backward, temperature {TEMPERATURE}")
    heads = ("extra MB", "of plain", "grads MB", "cpu s", "of plain")
    print(f"{'dtype':<10}{'V':>8}  {'way':<10}" + "".join(f"{head:>10}" for head in heads))
    for dtype in args.dtypes:
        for vocabulary in VOCABULARIES:
            base: dict[str, float] = {}
            for way in WAYS:
                result = in_a_process(way, vocabulary, dtype, args)
                base = base or result
                row = {"dtype": dtype, "vocabulary": vocabulary, "way": way, **result,
                       "memory_of_plain": result["extra_mb"] / base["extra_mb"],
                       "time_of_plain": result["cpu_seconds"] / base["cpu_seconds"]}  # fmt: skip
                rows.append(row)
                print(
                    f"{dtype:<10}{vocabulary:>8}  {way:<10}{result['extra_mb']:>10.0f}{row['memory_of_plain']:>10.3f}"
                    f"{result['gradients_mb']:>10.0f}{result['cpu_seconds']:>10.2f}{row['time_of_plain']:>10.2f}",
                    flush=True,
                )
    machine = {
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "threads": 1,
        "torch": torch.__version__,
    }
    RESULT.parent.mkdir(exist_ok=True)
    settings = {"tokens": args.tokens, "hidden": args.hidden, "repeats": args.repeats}
    RESULT.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n")
    worst = max(r["memory_of_plain"] for r in rows if r["way"] == "chunked" and r["vocabulary"] == 152_000)
    print(f"at V = 152k the chunked head takes {worst:.3f} of the plain head's extra memory (claim: at most 0.1)")
    if worst > 0.1:
        sys.exit(1)


if __name__ == "__main__":
    main()
