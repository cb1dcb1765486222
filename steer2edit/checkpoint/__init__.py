"""Reading a checkpoint's folder: its tensors, without a model."""

from steer2edit.checkpoint.reader import (
    DTYPES,
    EDITABLE,
    INDEX,
    SINGLE,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    part_name,
    read_header,
    read_json,
    split_part_name,
)

__all__ = [
    "DTYPES", "EDITABLE", "INDEX", "SINGLE", "Checkpoint", "TensorInfo", "open_checkpoint", "part_name", "read_header",
    "read_json", "split_part_name",
]  # fmt: skip
