"""``python -m steer2edit`` is the command line."""

from steer2edit.cli.app import main

main(prog_name="steer2edit")
