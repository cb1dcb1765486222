"""Tokens, keys and passwords in text: patterns of the detect-secrets library, and those of this field's services.

Only patterns with a form of their own are used (a prefix, a length, a header). Detectors of mere randomness or of words such
as "password" find too much in vocabularies and configs.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from steer2edit.errors import Steer2EditError
from steer2edit.files.untrusted import open_regular

# module and class of detect-secrets; a vocabulary may well hold something like user:word@host
_DETECTORS = (
    ("aws", "AWSKeyDetector"),
    ("azure_storage_key", "AzureStorageKeyDetector"),
    ("basic_auth", "BasicAuthDetector"),
    ("discord", "DiscordBotTokenDetector"),
    ("github_token", "GitHubTokenDetector"),
    ("gitlab_token", "GitLabTokenDetector"),
    ("jwt", "JwtTokenDetector"),
    ("mailchimp", "MailchimpDetector"),
    ("npm", "NpmDetector"),
    ("openai", "OpenAIDetector"),
    ("private_key", "PrivateKeyDetector"),
    ("pypi_token", "PypiTokenDetector"),
    ("sendgrid", "SendGridDetector"),
    ("slack", "SlackDetector"),
    ("square_oauth", "SquareOAuthDetector"),
    ("stripe", "StripeDetector"),
    ("telegram_token", "TelegramBotTokenDetector"),
    ("twilio", "TwilioKeyDetector"),
)
_NOT_IN_VOCABULARIES = frozenset(["BasicAuthDetector", "TwilioKeyDetector", "PrivateKeyDetector"])
_OTHERS = {
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "Hugging Face organisation token": r"\bapi_org_[A-Za-z0-9]{30,}\b",
    "OpenAI key": r"\bsk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{40,}\b",
    "Anthropic key": r"\bsk-ant-[A-Za-z0-9_-]{20,}\b",
    "Google key": r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    "Groq key": r"\bgsk_[A-Za-z0-9]{40,}\b",
    "xAI key": r"\bxai-[A-Za-z0-9]{60,}\b",
    "Replicate token": r"\br8_[A-Za-z0-9]{30,}\b",
    "GitHub token": r"\bgithub_pat_[A-Za-z0-9_]{30,}\b",
    "W&B key": r"(?i)wandb[a-z_.-]{0,20}key[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}\b",
}
# no text that a push sends is larger; of a GGUF file the metadata, which come first
_MOST_BYTES = 512 << 20
_METADATA_BYTES = 64 << 20
_HEADER_BYTES = 100 << 20


def secrets_in(text: str, *, vocabulary: bool = False) -> list[str]:
    """The kinds of tokens, keys and passwords that a text holds.

    A ``vocabulary`` holds pieces of any text: there only forms count that no piece has by chance. Raises Steer2EditError
    without detect-secrets.
    """
    kinds = [kind for kind, pattern in _others() if pattern.search(text)]
    for name, kind, patterns, detector in _detectors():
        if vocabulary and name in _NOT_IN_VOCABULARIES:
            continue
        if any(pattern.search(text) for pattern in patterns) and (detector is None or any(detector(text))):
            kinds.append(kind)
    return list(dict.fromkeys(kinds))


def text_of(content: Path | bytes, name: str) -> str:
    """A file's content as text, by what it is: UTF-8, UTF-16, or bytes each as a character.

    Of a safetensors file it is the header, of a GGUF file its first part. Raises OSError.
    """
    if isinstance(content, bytes):
        raw = content[:_MOST_BYTES]
    else:
        with open_regular(content) as file:
            head = file.read(9)
            limit = _METADATA_BYTES if head[:4] == b"GGUF" else _MOST_BYTES
            if head[8:] == b"{" and PurePosixPath(name).suffix.lower() == ".safetensors":
                limit = min(int.from_bytes(head[:8], "little"), _HEADER_BYTES)
            raw = head + b"".join(_blocks(file, limit))
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace")
    if b"\0" in raw[:4096]:
        # also UTF-16 without a mark: without its zeros it is the same text
        return raw.replace(b"\0", b"").decode("latin-1")
    return raw.decode("utf-8", "replace")


def _blocks(file: Any, limit: int) -> Iterator[bytes]:
    while limit > 0 and (block := file.read(min(limit, 1 << 20))):
        limit -= len(block)
        yield block


@functools.cache
def _others() -> list[tuple[str, re.Pattern[str]]]:
    return [(kind, re.compile(pattern)) for kind, pattern in _OTHERS.items()]


@functools.cache
def _detectors() -> list[tuple[str, str, list[re.Pattern[str]], Any]]:
    """Class name, kind, patterns and, where a match is looked at further, the detector's own function."""
    found = []
    try:
        for module, name in _DETECTORS:
            detector = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)()
            patterns = [re.compile(one.pattern, one.flags | re.MULTILINE) for one in detector.denylist]
            further = detector.analyze_string if name == "JwtTokenDetector" else None
            found.append((name, str(detector.secret_type), patterns, further))
    except ImportError:
        raise Steer2EditError(
            "push searches what it sends for tokens and keys, and needs detect-secrets for it: pip install detect-secrets"
        ) from None
    return found
