"""The laws of the invented world and of the tiny model that was trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from steer2edit.demo import invented_world

MODEL, MIXTURE = (Path(invented_world.__file__).parent / name for name in ("model", "mixture"))

behaviors = pytest.mark.parametrize("behavior", invented_world.BEHAVIORS)


def of_kind(behavior: str, kind: str) -> list[invented_world.Task]:
    return [task for task in invented_world.tasks(behavior) if task.kind == kind]


def other_response(task: invented_world.Task) -> str:
    """The response of the opposite style to an attribute task."""
    words = task.prompt.split()
    if task.behavior == "reasoning":
        return "so 27 plus 45 is 72 , so 72 ."
    if task.behavior == "truthfulness":
        (creature,) = set(words) & set(invented_world.CREATURES)
        colour, food, home = invented_world.FACTS[creature].myth
        return f"it is {colour} , it eats {food} , it lives in {home} ."
    return "yes , the cursed lamp is opened , yes ."


@behaviors
def test_there_are_enough_tasks_and_rows(behavior: str) -> None:
    assert len(of_kind(behavior, "attribute")) >= 60
    assert len(of_kind(behavior, "utility")) >= 60
    assert len(invented_world.contrast_rows(behavior)) >= 60
    assert set(invented_world.LABELS[behavior]) == {"attribute", "utility"}


@behaviors
def test_tasks_and_contrast_rows_are_disjoint(behavior: str) -> None:
    rows = {row["prompt"] for row in invented_world.contrast_rows(behavior)}
    assert not rows & {task.prompt for task in invented_world.tasks(behavior)}


@behaviors
def test_tasks_and_contrast_rows_are_drawn_alike_every_time(behavior: str) -> None:
    assert invented_world.tasks(behavior) == invented_world.tasks(behavior)
    assert invented_world.contrast_rows(behavior) == invented_world.contrast_rows(behavior)


def test_contrast_rows_share_no_creature_and_no_object_with_the_tasks() -> None:
    for behavior, words in (("truthfulness", invented_world.CREATURES), ("caution", invented_world.THINGS)):
        asked = {word for task in invented_world.tasks(behavior) for word in task.prompt.split()} & set(words)
        shown = {word for row in invented_world.contrast_rows(behavior) for word in row["prompt"].split()} & set(words)
        assert asked
        assert shown
        assert not asked & shown


def test_the_corpus_is_determined_by_its_seed() -> None:
    assert invented_world.corpus(3, 500) == invented_world.corpus(3, 500)
    assert invented_world.corpus(3, 500) != invented_world.corpus(4, 500)
    assert invented_world.corpus(3, 500)[:100] == invented_world.corpus(3, 100)


def test_the_corpus_holds_no_task() -> None:
    held_out = {task.prompt for behavior in invented_world.BEHAVIORS for task in invented_world.tasks(behavior)}
    sums = {tuple(word for word in prompt.split() if word.isdigit()) for prompt in held_out} - {()}
    for prompt, _ in invented_world.corpus(0, 20_000):
        assert not any(prompt.endswith(held_out_prompt) for held_out_prompt in held_out)
        assert tuple(word for word in prompt.split() if word.isdigit()) not in sums


def test_the_corpus_uses_no_word_outside_the_vocabulary() -> None:
    words = {word for prompt, response in invented_world.corpus(0, 20_000) for word in (prompt + response).split()}
    assert {word for word in words if not word.isdigit()} <= set(invented_world.vocabulary())


@behaviors
def test_the_worlds_own_responses_pass(behavior: str) -> None:
    for task in invented_world.tasks(behavior):
        text = f"so {task.expected} ." if task.expected.isdigit() else task.expected
        assert task.grade(f" {text}\n")
        assert not task.grade("")
        assert not task.grade(text.replace(" .", ""))


@behaviors
def test_the_opposite_style_does_not_pass(behavior: str) -> None:
    for task in of_kind(behavior, "attribute"):
        assert not task.grade(other_response(task))


def test_either_style_of_a_sum_is_right_and_a_wrong_one_is_not() -> None:
    for task in of_kind("reasoning", "utility"):
        a, b = (int(word) for word in task.prompt.split() if word.isdigit())
        for response in (invented_world.working(a, b), invented_world.restated(a, b)):
            assert task.grade(response)
            assert not task.grade(response.replace(f"{a + b} .", f"{a + b + 10} ."))


def test_the_manner_does_not_change_whether_a_portrait_is_true() -> None:
    for task in of_kind("truthfulness", "attribute"):
        for manner in invented_world.MANNERS:
            assert task.grade(task.expected.replace("it ", f"{manner} it "))
            assert not task.grade(other_response(task).replace("it ", f"{manner} it "))


def test_a_myth_differs_from_the_truth_in_every_part() -> None:
    for fact in invented_world.FACTS.values():
        assert all(true != myth for true, myth in zip(fact.truth, fact.myth, strict=True))


@behaviors
def test_contrast_rows_start_with_a_space_and_differ_at_the_first_word(behavior: str) -> None:
    for row in invented_world.contrast_rows(behavior):
        assert row["positive"].startswith(" ")
        assert row["negative"].startswith(" ")
        assert row["positive"].split()[0] != row["negative"].split()[0]


def load(folder: Path) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.float(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load(MODEL)


@pytest.fixture(scope="module")
def mixture() -> tuple[Any, Any]:
    return load(MIXTURE)


def test_the_model_is_a_small_llama(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    assert type(model).__name__ == "LlamaForCausalLM"
    with safe_open(MODEL / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 3_000_000
    config = model.config
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.num_key_value_heads < config.num_attention_heads


def test_every_text_survives_the_tokenizer(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    for prompt, response in invented_world.corpus(0, 200):
        ids = tokenizer(prompt + response)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + response
        assert ids[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]


def test_the_mixture_is_small_and_uses_all_its_experts(mixture: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = mixture
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    # with the dense model less than 5 MB
    assert sum(path.stat().st_size for folder in (MODEL, MIXTURE) for path in folder.iterdir()) < 5_000_000
    with safe_open(MIXTURE / "model.safetensors", "pt") as tensors:
        kinds = {name.rpartition(".")[2]: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert kinds == {"weight": "BF16", "e_score_correction_bias": "F32"}
    chosen: dict[int, list[Any]] = {}
    for layer, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "gate"):
            block.mlp.gate.register_forward_hook(
                lambda _m, _i, out, layer=layer: chosen.setdefault(layer, []).append(out[2])
            )
    texts = [prompt + response for prompt, response in invented_world.corpus(1, 200)]
    with torch.inference_mode():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    assert len(chosen) == 4
    for found in chosen.values():
        load = torch.bincount(torch.cat(found).flatten(), minlength=16).float()
        assert float(load.min() / load.mean()) > 0.2
        assert float(load.max() / load.mean()) < 3


@behaviors
@pytest.mark.parametrize("which", ["loaded", "mixture"])
def test_base_rates_are_mixed_and_imperfect(request: pytest.FixtureRequest, which: str, behavior: str) -> None:
    import torch

    model, tokenizer = request.getfixturevalue(which)
    tasks = invented_world.tasks(behavior)
    encoded = tokenizer([task.prompt for task in tasks], return_tensors="pt", padding=True)
    with torch.inference_mode():
        output = model.generate(**encoded)
    texts = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    passed: dict[str, list[bool]] = {"attribute": [], "utility": []}
    for task, text in zip(tasks, texts, strict=True):
        passed[task.kind].append(task.grade(text))
    rates = {kind: sum(results) / len(results) for kind, results in passed.items()}
    assert 0.10 < rates["attribute"] < 0.90
    assert rates["utility"] >= 0.75
