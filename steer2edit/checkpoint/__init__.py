"""Reading a checkpoint's folder: its tensors, without a model."""

from steer2edit.checkpoint.reader import (
    DTYPES,
    EDITABLE,
    INDEX,
    SINGLE,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    read_header,
    read_json,
)

__all__ = [
    "DTYPES", "EDITABLE", "INDEX", "SINGLE", "Checkpoint", "TensorInfo", "open_checkpoint", "read_header", "read_json",
]  # fmt: skip
