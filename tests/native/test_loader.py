"""What is checked before weights are loaded."""

from pathlib import Path

import numpy as np
import pytest

from kt_async.errors import ConfigError
from kt_async.weights.loader import check_types
from kt_async.weights.source import TYPE_IDS, open_model
from kt_async.weights.writer import TensorData, write_gguf


def test_integer_tensor_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    values = np.zeros((4, 32), np.float32)
    tensors = [
        TensorData("good", TYPE_IDS["F32"], values.shape, [values.tobytes()]),
        TensorData("bad", TYPE_IDS["I32"], values.shape, [values.tobytes()]),
    ]
    write_gguf(path, {"general.architecture": "qwen3moe"}, tensors)
    files = open_model(path)
    check_types(files, ["good"])
    with pytest.raises(ConfigError, match=r"model\.gguf: tensor 'bad' has type I32"):
        check_types(files, ["good", "bad"])
    files.close()
