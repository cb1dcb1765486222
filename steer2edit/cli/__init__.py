"""The command line: each file holds some of the commands, and only parses, calls the library and prints."""

from steer2edit.cli.app import main

__all__ = ["main"]
