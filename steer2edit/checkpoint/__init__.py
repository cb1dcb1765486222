"""Reading a checkpoint's folder: its tensors, without a model."""

from steer2edit.checkpoint.header import DTYPES, EDITABLE, TensorInfo, part_name, read_header, split_part_name
from steer2edit.checkpoint.json_file import read_json
from steer2edit.checkpoint.opening import open_checkpoint
from steer2edit.checkpoint.reader import Checkpoint
from steer2edit.checkpoint.weight_files import INDEX, SINGLE, choose_weights

__all__ = [
    "DTYPES", "EDITABLE", "INDEX", "SINGLE", "Checkpoint", "TensorInfo", "choose_weights", "open_checkpoint", "part_name",
    "read_header", "read_json", "split_part_name",
]  # fmt: skip
