"""What vLLM answers, greedily, from each of some checkpoint folders: run by ``experts_vllm.py`` in vLLM's own environment.

Reads ``{"folders": [...], "prompts": [[ids]], "tokens": n}`` from the standard input and writes the file named on the
command line: for each folder, the generated ids and the log-probability of each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file to write")
    options = parser.parse_args()
    # vLLM reads them while it is imported
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    given = json.load(sys.stdin)
    sampling = SamplingParams(temperature=0, max_tokens=given["tokens"], ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": ids} for ids in given["prompts"]]
    answers = {}
    for folder in given["folders"]:
        engine = LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=len(prompts),
            max_num_batched_tokens=512,
        )
        found = [output.outputs[0] for output in engine.generate(prompts, sampling, use_tqdm=False)]
        answers[folder] = {
            "ids": [list(one.token_ids) for one in found],
            "logprobs": [[by[i].logprob for by, i in zip(one.logprobs, one.token_ids, strict=True)] for one in found],
        }
        del engine
    options.out.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
