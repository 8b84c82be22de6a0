"""What a model recommends for sampling."""

import json
from pathlib import Path

import pytest

from kt_async.weights.generation import recommended_sampling

GGUF = {"general.sampling.temp": 0.7, "general.sampling.top_k": 40}


def write(folder: Path, content: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_gguf_alone() -> None:
    assert recommended_sampling(None, GGUF) == {"temperature": 0.7, "top_k": 40}
    assert recommended_sampling(None, {}) == {}


def test_folder_wins_key_by_key(tmp_path: Path) -> None:
    folder = write(tmp_path, {"temperature": 0.6, "top_p": 0.95, "eos_token_id": [1]})
    found = recommended_sampling(folder, GGUF)
    assert found == {"temperature": 0.6, "top_p": 0.95, "top_k": 40}


def test_greedy_model(tmp_path: Path) -> None:
    folder = write(tmp_path, {"do_sample": False, "temperature": 0.6})
    assert recommended_sampling(folder, {})["temperature"] == 0


@pytest.mark.parametrize("bad", [-1, 5, "0.7", None, True, float("nan")])
def test_nonsense_is_left_out(bad: object, tmp_path: Path) -> None:
    assert recommended_sampling(write(tmp_path, {"temperature": bad}), {}) == {}


@pytest.mark.parametrize("text", ["", "[1]", "{", "\u00ff"])
def test_unreadable_file_recommends_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text, encoding="latin-1")
    assert recommended_sampling(tmp_path, {}) == {}
