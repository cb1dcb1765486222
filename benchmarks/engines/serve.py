"""vLLM with a base and two adapters at once.

Every prompt goes to all three in one batch, and the answers are printed.

venv-vllm/bin/python benchmarks/engines/serve.py BASE NAME=ADAPTER NAME=ADAPTER [--prompt TEXT …] [--tokens 60]
"""

from __future__ import annotations

import argparse

PROMPTS = ("How do I boil an egg?", "Why is the sky blue?", "Can you help me plan a birthday party?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="+", metavar="NAME=ADAPTER")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--tokens", type=int, default=60)
    given = parser.parse_args()
    import vllm
    from vllm.lora.request import LoRARequest

    adapters = [one.split("=", 1) for one in given.adapters]
    requests = [None, *(LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters, 1))]
    engine = vllm.LLM(
        given.base,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        enable_lora=True,
        max_lora_rank=8,
        # one more than adapters: see run_vllm.py
        max_loras=len(adapters) + 1,
    )
    prompts = given.prompt or PROMPTS
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts for _ in requests]
    settings = vllm.SamplingParams(temperature=0.0, max_tokens=given.tokens)
    outputs = engine.chat(asked, settings, lora_request=requests * len(prompts), use_tqdm=False)
    answers = iter(outputs)
    for prompt in prompts:
        print(f"\n{prompt}")
        for name in ("base", *(name for name, _ in adapters)):
            answer = next(answers).outputs[0]
            print(f"  {name} ({len(answer.token_ids)} tokens): {' '.join(answer.text.split())}")


if __name__ == "__main__":
    main()
