"""The tiny models under real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo_ray.models.builtin import make_addition_model, make_bytes_model

# A process of its own: vLLM on CPUs wants its environment set before torch is imported.
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    engine = LLM(
        model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20, disable_log_stats=True,
    )
    defaults = engine.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (1.0, 1.0, 0), defaults
    outputs = engine.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    answers = [[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in outputs]
    print("ANSWERS" + json.dumps(answers))
"""


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (make_addition_model, ["17+25=", r"99+10=9+0=9,9+1+0=10,\boxed{"]),
        (make_bytes_model, ["Is 2 < 10?\n", "¿Qué? 数学 "]),
    ],
)
def test_vllm_tokenises_and_answers_greedily_as_transformers_does(
    make: Callable[[Path, int], None], texts: list[str], tmp_path: Path
) -> None:
    make(tmp_path / "model", 0)
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    command = [sys.executable, str(script), str(tmp_path / "model"), json.dumps(texts)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    answers = json.loads(process.stdout.rpartition("ANSWERS")[2])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text, (prompt_ids, token_ids) in zip(texts, answers, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert prompt_ids == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert token_ids == output[0, len(prompt_ids) :].tolist()
