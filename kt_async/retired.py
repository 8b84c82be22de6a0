"""Flags of KTransformers that mean nothing here: accepted with one warning line each.

Every entry takes a value on the old command line; `cli` skips it. The text names what replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_PER_REQUEST = "send {0} with each request"
_NO_DATABASE = "there is no database: nothing is stored between requests"
_NEVER_EFFECTIVE = "it never had an effect; drop it"

RETIRED: Final[Mapping[str, str]] = {
    # web page, files, users, Assistants API
    "web": "a chat page is always served at /",
    "web_cross_domain": "use --cors_origins '*' to let any web page call the API",
    "db_type": _NO_DATABASE,
    "db_host": _NO_DATABASE,
    "db_port": _NO_DATABASE,
    "db_name": _NO_DATABASE,
    "db_pool_size": _NO_DATABASE,
    "db_database": _NO_DATABASE,
    "user_secret_key": "use --api_key",
    "user_algorithm": "use --api_key",
    "file_upload_dir": "files are not stored",
    "assistant_store_dir": "assistants are not stored",
    "prompt_file": "send the text of the file as a message",
    "system_prompt": "send a system message",
    "username": "roles come from the messages",
    "botname": "roles come from the messages",
    # KV cache and scheduler process
    "cache_8bit": "use --kv_dtype fp8 (GPU) or f16",
    "cache_q4": "use --kv_dtype f16",
    "memory_gpu_only": "the KV cache lies where --device says; use --cpu_memory_size_GB",
    "utilization_percentage": "use --cache_lens",
    "gpu_memory_size": "use --cache_lens",
    "kvc2_config_dir": "the prefix cache needs no folder; use --no-prefix_cache to turn it off",
    "kvc2_disk_path": "the prefix cache is kept in memory only",
    "disk_path": "the prefix cache is kept in memory only",
    "sched_port": "there is no scheduler process, hence no port",
    "sched_metrics_port": "metrics are at /metrics on --port",
    "kvc2_metrics_port": "metrics are at /metrics on --port",
    "batch_size": "use --max_batch_size",
    "length": "use --max_model_len",
    "response_chunk": "tokens are sent as soon as they are text",
    "amnesia": "each request carries its own history",
    "backup_count": "rotate --log_file with the system's logrotate",
    "print_timings": "timings are in each response's usage and at /metrics",
    # sampling
    "repetition_penalty": _PER_REQUEST.format("repetition_penalty"),
    "frequency_penalty": _PER_REQUEST.format("frequency_penalty"),
    "presence_penalty": _PER_REQUEST.format("presence_penalty"),
    "json_mode": _PER_REQUEST.format("response_format"),
    "ban_strings": _PER_REQUEST.format("logit_bias"),
    "healing": _NEVER_EFFECTIVE,
    "smoothing_factor": _NEVER_EFFECTIVE,
    "dynamic_temperature": _NEVER_EFFECTIVE,
    "top_a": _NEVER_EFFECTIVE,
    "skew": _NEVER_EFFECTIVE,
    "typical": _NEVER_EFFECTIVE,
    # model
    "mode": "the chat template comes from the model; use --chat_template",
    "modes": "the chat template comes from the model; use --chat_template",
    "type": "use --backend_type",
    "mount": "a chat page is always served at /",
    "open_cross_domain": "use --cors_origins '*' to let any web page call the API",
    "q4_gguf_path": "use --gguf_path",
    "draft_model_path": "there is no speculative decoding",
    "draft_model_dir": "there is no speculative decoding",
    "draft_gguf_path": "there is no speculative decoding",
    "no_draft_scale": "there is no speculative decoding",
    "ngram_decoding": "there is no speculative decoding",
    "gpu_split": "use --optimize_config_path",
    "tp": "use --optimize_config_path",
    "rope_scale": "rope scaling comes from the model",
    "rope_alpha": "rope scaling comes from the model",
    "experts_per_token": "the number of experts comes from the model",
    "no_flash_attn": "the attention kernel is chosen by --device",
    "low_mem": _NEVER_EFFECTIVE,
    "load_q4": _NEVER_EFFECTIVE,
    "fast_safetensors": _NEVER_EFFECTIVE,
    "no_code_formatting": _NEVER_EFFECTIVE,
}
# Sections of KTransformers' config.yaml; their keys are read as flags after these renamings.
OLD_SECTIONS: Final = frozenset(
    (
        "log",
        "server",
        "db",
        "user",
        "model",
        "web",
        "ext",
        "local_chat",
        "async_server",
        "attn",
        "kvc2",
    )
)
OLD_KEYS: Final[Mapping[str, str]] = {
    "log.dir": "log_dir",
    "log.file": "log_file",
    "log.level": "log_level",
    "server.ip": "host",
    "model.type": "backend_type",
    "model.name": "model_name",
    "model.path": "model_path",
    "db.type": "db_type",
    "db.database": "db_database",
    "db.host": "db_host",
    "db.pool_size": "db_pool_size",
    "user.secret_key": "user_secret_key",
    "user.algorithm": "user_algorithm",
    "kvc2.gpu_only": "memory_gpu_only",
}
# Whole sections that mean nothing here.
OLD_DEAD_SECTIONS: Final[Mapping[str, str]] = {
    "long_context": "prompts may be as long as --max_model_len; the section is ignored",
    "fp": "the section is ignored",
}
