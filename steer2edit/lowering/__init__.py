"""From a plan to bytes: what every target shares."""

from steer2edit.lowering.resolve import Change, Lowering, Writing, adapter_refusal, located, resolve

__all__ = ["Change", "Lowering", "Writing", "adapter_refusal", "located", "resolve"]
