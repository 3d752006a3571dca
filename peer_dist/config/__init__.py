"""Configuration: YAML into typed, validated objects. Read at the top, handed down as plain values."""

from peer_dist.config.load import (
    ConfigError,
    check_folders,
    check_world,
    find_config,
    load_config,
    make_folders,
    parse_config,
    unwritable,
    write_config,
)
from peer_dist.config.schema import Config

__all__ = [
    "Config",
    "ConfigError",
    "check_folders",
    "check_world",
    "find_config",
    "load_config",
    "make_folders",
    "parse_config",
    "unwritable",
    "write_config",
]
