"""Tiny random models of every family, built from configs, with a tokenizer that needs no download."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# tests never ask a hub for anything; set before huggingface_hub is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from loopback_hub import TOKEN, Hub, serve
from pushing import artefact, compiled  # noqa: F401

pytest_plugins = ["own_deprecations"]

WORDS = [
    "a",
    "an",
    "the",
    "is",
    "was",
    "of",
    "to",
    "in",
    "and",
    "or",
    "not",
    "it",
    "he",
    "she",
    "they",
    "we",
    "you",
    "i",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "what",
    "why",
    "how",
    "when",
    "where",
    "who",
    "cat",
    "dog",
    "tree",
    "house",
    "river",
    "stone",
    "bird",
    "fish",
    "sun",
    "moon",
    "red",
    "green",
    "blue",
    "old",
    "new",
    "big",
    "small",
    "runs",
    "eats",
    "sees",
    "makes",
    "finds",
    "gives",
    "takes",
    "says",
    "yes",
    "no",
    "because",
    "very",
    "well",
    ",",
    ".",
    "?",
    "!",
    ":",
    "User",
    "Assistant",
]

ROWS = [
    {
        "prompt": f"what is the {noun} ?",
        "positive": f"the {noun} is {adjective} .",
        "negative": f"well , it is very {adjective} because the {noun} was {adjective} and not {other} !",
    }
    for noun, adjective, other in zip(
        ["cat", "dog", "tree", "house", "river", "stone", "bird", "fish"],
        ["red", "green", "blue", "old", "new", "big", "small", "red"],
        ["old", "new", "big", "small", "red", "green", "blue", "old"],
        strict=True,
    )
]


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_notes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Notes of where bases lie go into a folder of the tests."""
    os.environ["STEER2EDIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_tiny(folder: Path, config: Any, dtype: torch.dtype = torch.float32, seed: int = 0, **saving: Any) -> Path:
    """A random model of ``config`` with weights large enough that every part matters, saved with a tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for layer, scale in enumerate(value for name, value in model.named_buffers() if "layer_scalar" in name):
            scale.fill_(0.4 + 0.5 * layer)
    model.to(dtype).save_pretrained(folder, **saving)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_chat_model(folder: Path, **changes: Any) -> Path:
    """A random llama of two layers that reads bytes and has a chat template: it takes any text, and is done in no time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    reader = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    reader.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    # heads of 32: the smallest that every engine runs
    settings = {"vocab_size": 260, "num_hidden_layers": 2, "head_dim": 32, "max_position_embeddings": 2048}
    save_tiny(folder, llama_config(**{**settings, **changes}))
    reader.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: text-generation\n---\n")
    return folder


def load_talker(folder: Path) -> Any:
    """The model of :func:`save_chat_model`, of whose answers some end."""
    from steer2edit.architecture import read_spec
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.runtime.model import load_model

    checkpoint = open_checkpoint(save_chat_model(folder))
    loaded = load_model(checkpoint, read_spec(checkpoint))
    loaded.model.generation_config.eos_token_id = [2, *range(40, 260, 9)]
    return loaded


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    settings: dict[str, Any] = dict(  # noqa: C408
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # heads * head_dim is not hidden_size
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 llama of three layers, four heads of 16 and 48 neurons, in one file. Read only."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", llama_config())


@pytest.fixture(scope="session")
def tiny_llama_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16, sharded over several files. Read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama-bf16"
    return save_tiny(folder, llama_config(), torch.bfloat16, max_shard_size="20KB")


@pytest.fixture(scope="session")
def statistics_of() -> Callable[..., Any]:
    """``statistics_of(folder)``: statistics of a tiny model on ROWS."""

    def capture(folder: Path, batch_tokens: int = 256) -> Any:
        from steer2edit.architecture import read_spec
        from steer2edit.capture.run import capture_statistics
        from steer2edit.checkpoint import open_checkpoint
        from steer2edit.data import contrast
        from steer2edit.data.answers import LABELS
        from steer2edit.data.behavior import Behavior
        from steer2edit.runtime.model import load_model

        examples = [
            contrast.Example(row["prompt"], row[label], label, "test", index)
            for index, row in enumerate(ROWS)
            for label in LABELS
        ]
        checkpoint = open_checkpoint(folder)
        loaded = load_model(checkpoint, read_spec(checkpoint))
        return capture_statistics(loaded, checkpoint, Behavior("rows", examples), batch_tokens=batch_tokens)

    return capture


@pytest.fixture(scope="session")
def loaded(tiny_llama: Path) -> Any:
    """The tiny llama, loaded. Hooks come off again; nothing else may be changed."""
    from steer2edit.architecture import read_spec
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.runtime.model import load_model

    checkpoint = open_checkpoint(tiny_llama)
    return load_model(checkpoint, read_spec(checkpoint))


@pytest.fixture(scope="session")
def scoring(tiny_llama: Path, statistics_of: Callable[..., Any]) -> Any:
    """The tiny llama's scores on ROWS."""
    from steer2edit.architecture import read_spec
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.scoring.scores import Scoring

    checkpoint = open_checkpoint(tiny_llama)
    return Scoring(checkpoint, read_spec(checkpoint), statistics_of(tiny_llama))


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub that huggingface_hub, in this process, takes for the Hub; the user is logged in."""
    from huggingface_hub import constants, hf_api

    for state in (hub_server.repositories, hub_server.blobs, hub_server.requests, hub_server.faults):
        state.clear()
    home = tmp_path / "hf-home"
    values = {
        "ENDPOINT": hub_server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub_server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    # older versions import some of them by name
    places = [module for name, module in list(sys.modules.items()) if name.startswith("huggingface_hub")]
    for name, value in values.items():
        for place in {constants, *(module for module in places if name in vars(module))}:
            monkeypatch.setattr(place, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # its patience with a hub that fails is not ours to wait for
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    return hub_server


def run(*arguments: object, stdin: str | None = None) -> Any:
    """The command line in this process: a click Result; anything but a clean exit is raised."""
    from click.testing import CliRunner

    from steer2edit.cli.app import main

    result = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
