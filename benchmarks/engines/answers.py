"""A server against transformers on the same model: greedy answers, drawn answers asked again, a prefix, and a yes.

python benchmarks/engines/answers.py MODEL URL [--server-model NAME] [--dtype float32]
"""

from __future__ import annotations

import argparse

from steer2edit.engines.engine import Request, Sampling, written
from steer2edit.engines.opening import open_engine, open_named
from steer2edit.runtime.model import DTYPES, Runtime

QUESTIONS = ("What is a river?", "Name three birds.", "Why is the sky blue?", "Is fire hot?", "How do I boil an egg?")
ASKED = ("Is fire hot? Reply with Yes or No.", "Is ice hot? Reply with Yes or No.")
GREEDY = Sampling(max_new_tokens=16)
DRAWN = Sampling(max_new_tokens=16, temperature=0.8, top_p=0.95, seed=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("url")
    parser.add_argument("--server-model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    given = parser.parse_args()
    here, there = (
        open_named(given.model, Runtime(dtype=given.dtype)),
        open_engine(server=given.url, model=given.server_model),
    )
    print("server:", there.described()["server"], "model:", there.described()["model"])
    greedy = [Request(question) for question in QUESTIONS]
    first, second = (written(engine, greedy, GREEDY) for engine in (here, there))
    same = sum(a == b for a, b in zip(first, second, strict=True))
    print(f"greedy answers as in transformers: {same} of {len(greedy)}")
    drawn = [Request(question, sample=sample) for question in QUESTIONS for sample in range(2)]
    together, again = written(there, drawn, DRAWN), written(there, drawn, DRAWN)
    alone = [written(there, [request], DRAWN)[0] for request in drawn]
    print(
        f"drawn answers asked again: {_same(together, again)} of {len(drawn)} the same; alone: {_same(together, alone)}"
    )
    begun = [Request(QUESTIONS[0], prefix="A river is a large")]
    for engine in (here, there):
        print(f"a prefix goes on: {written(engine, begun, GREEDY)[0].text!r}")
    asked = [Request(question) for question in ASKED]
    print(
        "yes, transformers:", [round(p, 3) for p in here.yes(asked)], "server:", [round(p, 3) for p in there.yes(asked)]
    )


def _same(first: object, second: object) -> int:
    assert isinstance(first, list) and isinstance(second, list)
    return sum(a == b for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
