"""Logging for applications; the library itself never configures it."""

from abe.logging.settings import LoggingConfig
from abe.logging.utils import (
    apply_debug_switches,
    create_log_file_path,
    get_logger,
    get_logger_level,
    get_logging_dict_config,
    set_logger_level,
    setup_logging_from_config,
)

__all__ = [
    "LoggingConfig",
    "apply_debug_switches",
    "create_log_file_path",
    "get_logger",
    "get_logger_level",
    "get_logging_dict_config",
    "set_logger_level",
    "setup_logging_from_config",
]
