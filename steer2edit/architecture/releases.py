"""Model types that older releases of transformers hold in modules of other names or forms than are described here.

Their checkpoints are the same. An edit finds its modules from the named release on, and the runtime refuses earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping

RUNS_SINCE: Mapping[str, str] = {
    # their experts were a list of linear layers of a kind of their own
    **dict.fromkeys(("aria", "aria_text"), "5.18"),
    # their language model lay in ``model``, where it lies in ``model.language_model`` since
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), "5.21"),
}
"""The first release of transformers whose modules are those described, for types that earlier releases of 5.15 on know."""
